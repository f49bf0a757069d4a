//! The store against folders, a real S3 server and faults of both.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, and tells what it measured")]

mod collect;
mod damage;
mod differences;
mod faults;
mod injected;
mod layout;
mod log;
mod manage;
mod pace;
mod round_trip;
mod s3;
mod sample;
mod segments;
