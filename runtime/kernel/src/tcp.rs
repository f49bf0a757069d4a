//! `tcp(7)`: what a connection holds, and what it has sent that the other end does not have yet.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use crate::{check, sockopt};

/// A few fields of `struct tcp_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// `TCP_ESTABLISHED` and so on of linux/tcp_states.h.
    pub state: u8,
    /// `TCPI_OPT_`: what both ends have agreed on; nothing before they have.
    pub options: u8,
    pub segment_bytes: u32,
    /// Of a listening socket: connections that may wait to be accepted.
    pub backlog: u32,
}

/// # Errors
/// Of the call; `InvalidData` where the kernel tells less than Linux 2.6 did.
pub fn info(socket: BorrowedFd<'_>) -> io::Result<Info> {
    let bytes = sockopt::get(socket, libc::SOL_TCP, libc::TCP_INFO, 104)?;
    let word = |at: usize| {
        bytes
            .get(at..at + 4)
            .and_then(|word| word.try_into().ok())
            .map(u32::from_le_bytes)
            .ok_or(io::ErrorKind::InvalidData)
    };
    let byte = |at: usize| bytes.get(at).copied().ok_or(io::ErrorKind::InvalidData);
    Ok(Info { state: byte(0)?, options: byte(5)?, segment_bytes: word(16)?, backlog: word(28)? })
}

/// Bytes that can be read.
pub fn unread(socket: BorrowedFd<'_>) -> io::Result<usize> {
    count(socket, libc::FIONREAD)
}

/// Bytes, and the mark of the end, that the other end has not confirmed.
pub fn unconfirmed(socket: BorrowedFd<'_>) -> io::Result<usize> {
    count(socket, libc::TIOCOUTQ)
}

fn count(socket: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: both requests write an int.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut count) };
    check(result.into())?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Where a connection stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// What the other end has not confirmed.
    pub unconfirmed: Vec<u8>,
    /// The number of the next byte that will be sent.
    pub send_next: u32,
    /// The number of the next byte that will be received.
    pub receive_next: u32,
}

const TCP_REPAIR_OFF_NO_WP: i32 = -1;
const TCP_RECV_QUEUE: i32 = 1;
const TCP_SEND_QUEUE: i32 = 2;

/// Reads where a connection stands. The kernel tells it only in repair mode, in which the connection does nothing else.
///
/// A process of its own does it, which nothing signals and which needs nobody: whoever kills this one, the connection leaves
/// the mode again after a few microseconds.
///
/// # Errors
/// EPERM: this process has no CAP_NET_ADMIN in the user namespace of the connection.
pub fn standing(socket: BorrowedFd<'_>) -> io::Result<Standing> {
    // A packet of which a part is confirmed may be kept as a whole.
    const PARTLY_BYTES: usize = 1 << 20;
    let room = unconfirmed(socket)? + PARTLY_BYTES;
    let reuse = sockopt::get(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 4)?;
    let shared = SharedBytes::new(HEADER_BYTES + room)?;
    let everything = blocked_signals()?;
    // SAFETY: the child calls nothing but functions that are safe after a fork of a process with threads.
    let child = unsafe { libc::fork() };
    if child == 0 {
        read_standing(socket.as_raw_fd(), &shared, room, reuse.first().copied().unwrap_or(0));
    }
    let forked = check(child.into());
    restore_signals(&everything);
    forked?;
    loop {
        let mut status = 0;
        // SAFETY: the call writes an int.
        match check(unsafe { libc::waitpid(child, &raw mut status, 0) }.into()) {
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let bytes = shared.bytes();
    let word = |index: usize| {
        let at = index * 4;
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
    };
    if word(0) != DONE {
        return Err(io::Error::other("the process that looks at a connection was killed"));
    }
    if word(1) != 0 {
        return Err(io::Error::from_raw_os_error(word(1).cast_signed()));
    }
    let length = (word(4) as usize).min(room);
    Ok(Standing {
        send_next: word(2),
        receive_next: word(3),
        unconfirmed: bytes[HEADER_BYTES..HEADER_BYTES + length].to_vec(),
    })
}

/// Five words: [`DONE`], error number, the two numbers, the length of the data.
const HEADER_BYTES: usize = 20;
const DONE: u32 = 0x5341_4d41;

/// The child's part of [`standing`].
fn read_standing(socket: i32, shared: &SharedBytes, room: usize, reuse: u8) -> ! {
    // SAFETY: the call takes nothing. A signal to the engine's group is not for this process.
    unsafe { libc::setsid() };
    let set = |level: i32, name: i32, value: i32| {
        // SAFETY: the kernel reads an int.
        unsafe { libc::setsockopt(socket, level, name, (&raw const value).cast(), 4) }
    };
    let next = |queue: i32| {
        let mut number = 0u32;
        let mut bytes: libc::socklen_t = 4;
        set(libc::SOL_TCP, libc::TCP_REPAIR_QUEUE, queue);
        // SAFETY: the kernel writes four bytes.
        unsafe {
            libc::getsockopt(
                socket,
                libc::SOL_TCP,
                libc::TCP_QUEUE_SEQ,
                (&raw mut number).cast(),
                &raw mut bytes,
            )
        };
        number
    };
    let mut errno = 0;
    let (mut received, mut sent, mut length) = (0, 0, 0);
    if set(libc::SOL_TCP, libc::TCP_REPAIR, 1) == 0 {
        received = next(TCP_RECV_QUEUE);
        sent = next(TCP_SEND_QUEUE);
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: the mapping has `room` bytes behind the header.
        let data = unsafe { shared.address.add(HEADER_BYTES) };
        // SAFETY: as above.
        let count = unsafe { libc::recv(socket, data.cast(), room, flags) };
        if count < 0 {
            errno = last_errno();
        } else {
            length = u32::try_from(count).unwrap_or(0);
        }
        set(libc::SOL_TCP, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP);
        // Which the mode has changed.
        set(libc::SOL_SOCKET, libc::SO_REUSEADDR, i32::from(reuse));
    } else {
        errno = last_errno();
    }
    let words = [DONE, errno.cast_unsigned(), sent, received, length];
    // SAFETY: the mapping begins with the header, and pages are aligned.
    unsafe { shared.address.cast::<[u32; 5]>().write(words) };
    // SAFETY: the call ends this process at once.
    unsafe { libc::_exit(0) }
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn blocked_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: a set of signals is plain data; it is filled in below.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is ours.
    unsafe { libc::sigfillset(&raw mut all) };
    let mut before = all;
    // SAFETY: both sets are ours.
    let result =
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
    if result == 0 { Ok(before) } else { Err(io::Error::from_raw_os_error(result)) }
}

fn restore_signals(mask: &libc::sigset_t) {
    // SAFETY: the set is one that the kernel has given.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, ptr::null_mut()) };
}

/// Memory that a child shares.
#[derive(Debug)]
struct SharedBytes {
    address: *mut u8,
    length: usize,
}

impl SharedBytes {
    fn new(length: usize) -> io::Result<SharedBytes> {
        // SAFETY: a new mapping where the kernel likes.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(SharedBytes { address: address.cast(), length })
    }

    /// What is there once the child has ended.
    fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping lives as long as `self`, and nobody else writes to it any more.
        unsafe { std::slice::from_raw_parts(self.address, self.length) }
    }
}

impl Drop for SharedBytes {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and its last user is gone.
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;

    /// Data that a sender holds because its receiver is full would be lost with a move.
    #[test]
    fn what_a_full_receiver_has_not_taken_is_read_from_the_sender() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let mut sender =
            TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
        let (receiver, _) = listener.accept().expect("accept");
        sender.set_nonblocking(true).expect("flag");
        let data: Vec<u8> = (0..16_000_000u32).map(|number| number.to_le_bytes()[1]).collect();
        let mut written = 0;
        loop {
            match sender.write(&data[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        let reuse = sockopt::get(sender.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 4);
        let (sent, got) =
            (standing(sender.as_fd()).expect("sender"), standing(receiver.as_fd()).expect("both"));
        let missing = sent.send_next.wrapping_sub(got.receive_next) as usize;
        assert!(missing > 0 && missing <= sent.unconfirmed.len());
        assert!(sent.unconfirmed.ends_with(&data[written - missing..written]));
        assert_eq!(unread(receiver.as_fd()).expect("count"), written - missing);
        let after = sockopt::get(sender.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 4);
        assert_eq!(reuse.expect("before"), after.expect("after"));
    }
}
