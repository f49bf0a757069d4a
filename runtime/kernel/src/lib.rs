//! Every system call and `/proc` parser that Samara uses, behind safe types.
//!
//! One module per interface, named as its man page. This is the only crate with `unsafe` code.
//! What the crate does not have: policy. It neither retries, nor decides, nor remembers.

pub mod bpf;
mod btf;
pub mod close_range;
pub mod epoll;
pub mod fcntl;
pub mod file_end;
pub mod fork;
pub mod inotify;
pub mod kcmp;
pub mod keyctl;
pub mod mapping_list;
pub mod mount_namespace;
pub mod mount_setattr;
pub mod mq_overview;
pub mod netdevice;
pub mod packet;
pub mod pagemap;
pub mod pid_namespaces;
pub mod pidfd;
pub mod proc;
pub mod process_vm;
pub mod ptrace;
pub mod robust_list;
pub mod sched;
pub mod seccomp;
pub mod setns;
pub mod signal;
pub mod signalfd;
pub mod sock_diag;
pub mod sockopt;
pub mod sysvipc;
pub mod tape;
pub mod task_list;
pub mod tcp;
pub mod thread_list;
pub mod timerfd;
pub mod tty;
pub mod unix;
pub mod userfaultfd;
pub mod wait;

use std::io;

/// A process or thread id as the caller's pid namespace numbers it.
pub type Pid = libc::pid_t;

/// Turns the -1 of a libc call into the error that `errno` names.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
