//! Capsules in an object store: addresses, the log that orders commits, and bounded parallel writing and reading.
//!
//! The public interface is blocking; inside, a small tokio runtime does the network's work. Every call to a store ends
//! within a bound that the node's configuration sets: the caller may be holding a container stopped.
//!
//! What this crate does not do: it knows no process, no container and no record. It takes no credentials from the
//! environment, and writes conditionally in one way only, put-if-absent.

pub mod collect;
pub mod compact;
mod condemned;
pub mod config;
pub mod diff;
mod encode;
pub mod frames;
pub mod history;
mod kept;
pub mod layout;
pub mod list;
mod local_packs;
pub mod location;
pub mod log;
pub mod pace;
mod pool;
pub mod reader;
pub mod remove;
pub mod store;
pub mod verify;
pub mod writer;

pub use collect::Retention;
pub use config::NodeConfig;
pub use kept::Kept;
pub use location::Location;
pub use log::Lease;
pub use reader::CapsuleReader;
pub use store::Store;
pub use writer::{CapsuleWriter, Progress};
