//! `getsockopt(2)`, `setsockopt(2)`: options of sockets as bytes, whatever their type.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::check;

/// An option of at most `bytes_max` bytes, as long as the kernel says that it is.
///
/// # Errors
/// ENOPROTOOPT or EOPNOTSUPP: this socket or kernel has no such option.
pub fn get(socket: BorrowedFd<'_>, level: i32, name: i32, bytes_max: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; bytes_max];
    let count = get_into(socket, level, name, &mut value)?;
    value.truncate(count);
    Ok(value)
}

/// As [`get`], for an option that reads its value before it answers. Returns the length that the kernel tells.
pub fn get_into(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: &mut [u8],
) -> io::Result<usize> {
    let mut bytes = libc::socklen_t::try_from(value.len())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the kernel reads and writes at most `bytes` bytes at `value`.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut bytes)
    };
    check(result.into())?;
    Ok(bytes as usize)
}

/// Sets an option to bytes that contain no pointer.
pub fn set(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let bytes = libc::socklen_t::try_from(value.len())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the kernel reads `bytes` bytes at `value`.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), bytes) };
    check(result.into()).map(drop)
}

/// Bytes of a `struct sock_filter`.
const INSTRUCTION_BYTES: usize = 8;
/// `BPF_MAXINSNS` of linux/bpf_common.h.
const INSTRUCTIONS_MAX: usize = 4096;

/// The classic BPF program that was attached with `SO_ATTACH_FILTER`, as an array of `struct sock_filter`; empty for none.
///
/// # Errors
/// EACCES: the socket has an extended BPF program, which is not told.
pub fn filter(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    // The length counts instructions here, on the way in and out.
    let mut program = vec![0u8; INSTRUCTIONS_MAX * INSTRUCTION_BYTES];
    let mut count = libc::socklen_t::try_from(INSTRUCTIONS_MAX).expect("a small number");
    // SAFETY: the kernel writes at most `count` instructions to `program`, which has room for them.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            program.as_mut_ptr().cast(),
            &raw mut count,
        )
    };
    check(result.into())?;
    program.truncate(count as usize * INSTRUCTION_BYTES);
    Ok(program)
}

/// Attaches a classic BPF program, an array of `struct sock_filter`. The kernel verifies it.
pub fn attach_filter(socket: BorrowedFd<'_>, program: &[u8]) -> io::Result<()> {
    let count = program.len() / INSTRUCTION_BYTES;
    if count > INSTRUCTIONS_MAX || count * INSTRUCTION_BYTES != program.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let filter = libc::sock_fprog {
        len: u16::try_from(count).expect("at most 4096"),
        filter: program.as_ptr().cast_mut().cast(),
    };
    let bytes = libc::socklen_t::try_from(size_of_val(&filter)).expect("a small structure");
    // SAFETY: the kernel reads the structure and `len` instructions at its pointer, and writes nothing.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            bytes,
        )
    };
    check(result.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    /// A filter that is lost lets packets through that a program does not expect.
    #[test]
    fn filters_are_read_as_they_were_attached() {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        assert_eq!(filter(socket.as_fd()).expect("no filter"), Vec::<u8>::new());
        let accept_all = [6, 0, 0, 0, 0xff, 0xff, 0, 0];
        attach_filter(socket.as_fd(), &accept_all).expect("attach");
        assert_eq!(filter(socket.as_fd()).expect("a filter"), accept_all);
        assert!(attach_filter(socket.as_fd(), &accept_all[..7]).is_err());
    }
}
