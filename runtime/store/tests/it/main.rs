//! The store against folders, a real S3 server and faults of both.

mod damage;
mod faults;
mod layout;
mod log;
mod manage;
mod round_trip;
mod s3;
mod sample;
