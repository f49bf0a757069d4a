//! Checkpoint and restore of a process tree and of its files.
//!
//! This crate knows no OCI types and no network: data leaves and enters through [`samara_capsule::transfer`].

pub mod files;
