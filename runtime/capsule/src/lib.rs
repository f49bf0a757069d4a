//! The capsule format: records, page maps, frames, manifest.
//!
//! This crate turns values into bytes and back. It performs no I/O, holds no `unsafe` and knows no async runtime.

pub mod record;
pub mod transfer;
