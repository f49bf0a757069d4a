//! `sock_diag(7)` for unix sockets, and the socket options that other crates do not offer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::setns::{Namespace, inside};
use crate::{Pid, check};

/// What the kernel tells of a unix socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode of the socket that it is connected to; 0 for none, or one that is closed.
    pub peer: u32,
    /// Bit 0: receiving was shut down, bit 1: sending.
    pub shutdown: u8,
    pub named: bool,
}

/// All unix sockets of the network namespace that process `pid` is in, by inode.
///
/// # Errors
/// Of the calls; `InvalidData` for an answer that is not as `sock_diag(7)` says.
pub fn unix_sockets(pid: Pid) -> io::Result<BTreeMap<u32, UnixSocket>> {
    let mut socket = File::from(inside(pid, Namespace::Network, diagnostics_socket)?);
    socket.write_all(&request())?;
    let mut sockets = BTreeMap::new();
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        let count = socket.read(&mut buffer)?;
        let mut rest = buffer.get(..count).unwrap_or_default();
        while !rest.is_empty() {
            let (kind, body, tail) = message(rest).ok_or_else(malformed)?;
            rest = tail;
            match kind {
                NLMSG_DONE => return Ok(sockets),
                NLMSG_ERROR => {
                    let errno = word(body, 0).ok_or_else(malformed)?.cast_signed();
                    return Err(io::Error::from_raw_os_error(-errno));
                }
                _ => {
                    let (inode, found) = socket_of(body).ok_or_else(malformed)?;
                    sockets.insert(inode, found);
                }
            }
        }
    }
}

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_BYTES: usize = 16;

fn diagnostics_socket() -> io::Result<OwnedFd> {
    const NETLINK_SOCK_DIAG: libc::c_int = 4;
    // SAFETY: the call takes numbers only.
    let fd = unsafe {
        libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
    };
    check(fd.into())?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `struct nlmsghdr` and `struct unix_diag_req` (linux/unix_diag.h), asking for all states, names and peers.
fn request() -> Vec<u8> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const REQUEST_DUMP: u16 = 0x301;
    const SHOW_NAME_AND_PEER: u32 = 1 | 4;
    let mut bytes = Vec::new();
    bytes.extend(40u32.to_le_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_le_bytes());
    bytes.extend(REQUEST_DUMP.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend([1, 0, 0, 0]); // AF_UNIX
    bytes.extend(u32::MAX.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(SHOW_NAME_AND_PEER.to_le_bytes());
    bytes.extend([0; 8]);
    bytes
}

/// Splits off one message: its type, its body, and what follows.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(word(bytes, 0)?).ok()?;
    let kind = u16::from_le_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// `struct unix_diag_msg` and its attributes.
fn socket_of(body: &[u8]) -> Option<(u32, UnixSocket)> {
    const NAME: u16 = 0;
    const PEER: u16 = 2;
    const SHUTDOWN: u16 = 6;
    let inode = word(body, 4)?;
    let mut socket = UnixSocket::default();
    let mut rest = body.get(16..)?;
    while rest.len() >= 4 {
        let length = usize::from(u16::from_le_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_le_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(4..length)?;
        match kind {
            NAME => socket.named = true,
            PEER => socket.peer = word(value, 0)?,
            SHUTDOWN => socket.shutdown = *value.first()?,
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some((inode, socket))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "unexpected answer of sock_diag")
}

/// An integer option of a socket.
pub fn int_option(socket: RawFd, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0i32;
    let mut bytes: libc::socklen_t = 4;
    // SAFETY: the kernel writes at most `bytes` bytes to `value`.
    let result =
        unsafe { libc::getsockopt(socket, level, name, (&raw mut value).cast(), &raw mut bytes) };
    check(result.into())?;
    Ok(value)
}

/// Sets an integer option of a socket.
pub fn set_int_option(socket: RawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the kernel reads four bytes of `value`.
    let result = unsafe { libc::setsockopt(socket, level, name, (&raw const value).cast(), 4) };
    check(result.into()).map(drop)
}

/// Copies the first message or bytes that a socket will receive, from where `SO_PEEK_OFF` points, without taking it.
///
/// Returns how long it is, which may be more than `buffer` holds, and whether descriptors come with it (they are closed again).
///
/// # Errors
/// `WouldBlock`: there is nothing.
pub fn peek(socket: RawFd, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
    let mut control = [0u64; 64];
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all fields of msghdr may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the message's vectors cover `buffer` and `control`, which outlive the call.
    let result = unsafe { libc::recvmsg(socket, &raw mut message, flags) };
    let count =
        usize::try_from(check(result as libc::c_long)?).expect("-1 is the only negative result");
    let mut descriptors = false;
    // SAFETY: the header is the one that the kernel filled in.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !next.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a header inside `control`.
        let header = unsafe { *next };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            descriptors = true;
            // SAFETY: the data follows the header, inside `control`.
            let data = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
            let bytes = header.cmsg_len as usize - data.addr().wrapping_sub(next.addr());
            for index in 0..bytes / size_of::<RawFd>() {
                // SAFETY: `index` is within the descriptors that the header counts.
                let place = unsafe { data.add(index) };
                // SAFETY: as above; the kernel only aligns headers, so the read does not assume alignment.
                let fd = unsafe { place.read_unaligned() };
                // SAFETY: the kernel just made this descriptor for us.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: `next` is a header inside `control`.
        next = unsafe { libc::CMSG_NXTHDR(&raw const message, next) };
    }
    Ok((count, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    /// A peer that is not found would cut a restored connection in two.
    #[test]
    fn finds_the_peer_of_a_pair() {
        use std::os::unix::fs::MetadataExt;
        let (left, right) = UnixStream::pair().expect("pair");
        let inode = |socket: &UnixStream| {
            let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
            u32::try_from(std::fs::metadata(path).expect("own descriptor").ino())
                .expect("socket inodes are small")
        };
        let own = i32::try_from(std::process::id()).expect("a pid");
        let sockets = unix_sockets(own).expect("sock_diag");
        assert_eq!(sockets.get(&inode(&left)).expect("listed").peer, inode(&right));
        let left_inode = inode(&left);
        drop(right);
        let after = unix_sockets(own).expect("sock_diag");
        assert_eq!(after.get(&left_inode).expect("listed").peer, 0);
    }
}
