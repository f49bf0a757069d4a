//! Sockets by family, and what calls on them wait for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::time::TimeValLike;
use samara_capsule::record::FileKind;
use samara_kernel::Pid;
use samara_kernel::pidfd::PidFd;
use samara_kernel::sock_diag::int_option;

use crate::capture::{CaptureError, Tables, read};
use crate::descriptors::Found;
use crate::restart::Direction;
use crate::{internet, unix_sockets};

/// Describes a socket that a descriptor refers to, or says why it can't be saved.
pub(crate) fn note(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let socket = found.borrow()?;
    let domain = int_option(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN)
        .map_err(read(found.link))?;
    match domain {
        libc::AF_UNIX => unix_sockets::note(found, tables),
        _ => internet::note(found, socket.as_fd(), tables),
    }
}

/// How long a call that waits for a socket does so at most; zero is for ever.
pub(crate) fn timeout(pid: Pid, fd: RawFd, direction: Direction) -> io::Result<Duration> {
    let socket = PidFd::open(pid)?.get_fd(fd)?;
    let value = match direction {
        Direction::Receive => getsockopt(&socket, sockopt::ReceiveTimeout),
        Direction::Send => getsockopt(&socket, sockopt::SendTimeout),
    }?;
    Ok(Duration::from_micros(value.num_microseconds().unsigned_abs()))
}
