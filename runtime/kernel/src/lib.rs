//! Every system call and `/proc` parser that Samara uses, behind safe types.
//!
//! One module per interface, named as its man page. This is the only crate with `unsafe` code.

pub mod bpf;
pub mod close_range;
pub mod keyctl;
pub mod mount_setattr;
pub mod pidfd_send_signal;
pub mod seccomp;
pub mod signal;
