//! Checkpoint and restore of a process tree and of its files.
//!
//! This crate knows no OCI types and no network: data leaves and enters through [`samara_capsule::transfer`].

mod aio;
mod attributes;
pub mod capture;
pub mod clocks;
mod copy_on_write;
mod datagrams;
mod descriptors;
mod directories;
mod epoll;
mod file_names;
pub mod files;
pub mod freeze;
mod held_pages;
pub mod host;
mod inotify;
mod internet;
pub mod labels;
mod left_calls;
mod mappings;
mod memory;
mod nameless;
pub mod names;
mod netlink;
mod notices;
mod packets;
pub mod phase;
mod pipes;
mod plan;
mod posix_queues;
mod prepared;
mod process;
mod procfiles;
mod ranges;
mod restart;
pub mod restore;
mod root;
pub mod snapshot;
mod socket_options;
mod sockets;
mod sqlite;
mod system_v;
mod tcp;
mod terminals;
mod thread_facts;
mod timers;
mod tracee;
pub mod tracking;
mod unix_sockets;
pub mod unsupported;
mod vdso;

pub use process::{Confinement, SeccompPolicy};
pub use tracee::TraceeError;
