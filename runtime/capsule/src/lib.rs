//! The capsule format: records, page maps, frames, manifest.
//!
//! This crate turns values into bytes and back; `docs/capsule-format.md` is the normative description of those bytes.
//! Every decoder treats its input as hostile: lengths are bounded before memory is taken, arithmetic is checked, and
//! what this version does not know is refused by name.
//!
//! It performs no I/O, holds no `unsafe` and knows no async runtime. It does not know what the records of a capsule mean.

pub mod cbor;
pub mod collection;
pub mod config;
pub mod digest;
pub mod frame;
pub mod log;
pub mod manifest;
pub mod pack;
pub mod pagemap;
pub mod record;
pub mod stream;
pub mod transfer;
mod varint;

/// Version of the format that this crate writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// No blob of a capsule is larger, except a manifest. One blob is always handled whole in memory, so this bounds memory.
pub const BLOB_BYTES_MAX: usize = 16 << 20;
