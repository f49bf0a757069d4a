//! `unix(7)`: names as the kernel has them, messages with all that travels beside their bytes, and who made a connection.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::check;

/// Offset of the name in `struct sockaddr_un`.
const NAME_OFFSET: usize = size_of::<libc::sa_family_t>();
/// The most bytes that a name has.
pub const NAME_BYTES_MAX: usize = 108;

/// Process, user and group, as `struct ucred` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// 0: a process that the caller's pid namespace does not have.
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

/// A name of a socket: a path, or after a zero byte an abstract name. `None`: it has none.
///
/// # Errors
/// Of `getsockname(2)`.
pub fn name(socket: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    address(|address, bytes| {
        // SAFETY: the kernel writes at most `bytes` bytes to `address`.
        unsafe { libc::getsockname(socket.as_raw_fd(), address, bytes) }
    })
}

/// The name of the socket that this one is connected to, as [`name`].
///
/// # Errors
/// ENOTCONN, and others of `getpeername(2)`.
pub fn peer_name(socket: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    address(|address, bytes| {
        // SAFETY: the kernel writes at most `bytes` bytes to `address`.
        unsafe { libc::getpeername(socket.as_raw_fd(), address, bytes) }
    })
}

fn address(
    ask: impl FnOnce(*mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int,
) -> io::Result<Option<Vec<u8>>> {
    // The kernel ends a path with a zero byte, for which a full `struct sockaddr_un` has no room.
    let mut address = [0u8; NAME_OFFSET + NAME_BYTES_MAX + 2];
    let mut bytes = libc::socklen_t::try_from(address.len()).expect("a small array");
    check(ask(address.as_mut_ptr().cast(), &raw mut bytes).into())?;
    Ok(name_of(&address, bytes as usize))
}

fn name_of(address: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let name = address.get(NAME_OFFSET..bytes)?;
    match name {
        [] => None,
        [0, ..] => Some(name.to_vec()),
        path => path.split(|byte| *byte == 0).next().map(<[u8]>::to_vec),
    }
}

/// `struct sockaddr_un` for a name, as [`name`] tells it.
///
/// # Errors
/// `InvalidInput`: no socket can have that name.
pub fn address_of(name: &[u8]) -> io::Result<Vec<u8>> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let family = libc::sa_family_t::try_from(libc::AF_UNIX).expect("a small number");
    let mut address = family.to_le_bytes().to_vec();
    address.extend(name);
    // The kernel takes a path of full length without its end.
    if name.first() != Some(&0) && name.len() < NAME_BYTES_MAX {
        address.push(0);
    }
    Ok(address)
}

/// Gives a socket a name; a path is made in the caller's file system.
///
/// # Errors
/// As [`address_of`], and of `bind(2)`.
pub fn bind(socket: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let address = address_of(name)?;
    let bytes = libc::socklen_t::try_from(address.len()).expect("a small array");
    // SAFETY: the kernel reads `bytes` bytes of `address`.
    check(unsafe { libc::bind(socket.as_raw_fd(), address.as_ptr().cast(), bytes) }.into())
        .map(drop)
}

/// Gives a socket an abstract name that nobody has.
///
/// # Errors
/// Of `bind(2)`.
pub fn bind_anywhere(socket: BorrowedFd<'_>) -> io::Result<()> {
    let family = libc::sa_family_t::try_from(libc::AF_UNIX).expect("a small number");
    let address = family.to_le_bytes();
    let bytes = libc::socklen_t::try_from(address.len()).expect("a small array");
    // SAFETY: the kernel reads `bytes` bytes of `address`.
    check(unsafe { libc::bind(socket.as_raw_fd(), address.as_ptr().cast(), bytes) }.into())
        .map(drop)
}

/// Connects a socket to the one of that name.
///
/// # Errors
/// As [`address_of`], and of `connect(2)`.
pub fn connect(socket: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    connect_to(socket, &address_of(name)?)
}

/// Takes the first connection that waits at a socket that listens.
///
/// # Errors
/// Of `accept4(2)`.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel takes null pointers where no address is wanted.
    let result = unsafe {
        libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags)
    };
    own(check(result.into())?)
}

/// Undoes the connection of a datagram socket.
pub fn disconnect(socket: BorrowedFd<'_>) -> io::Result<()> {
    let family = libc::sa_family_t::try_from(libc::AF_UNSPEC).expect("a small number");
    connect_to(socket, &family.to_le_bytes())
}

fn connect_to(socket: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let bytes = libc::socklen_t::try_from(address.len()).expect("a small array");
    // SAFETY: the kernel reads `bytes` bytes of `address`.
    check(unsafe { libc::connect(socket.as_raw_fd(), address.as_ptr().cast(), bytes) }.into())
        .map(drop)
}

/// The node in the file system that a socket was bound to, opened with `O_PATH`, wherever it is now. `None`: there is none.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN.
pub fn node(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    /// `SIOCUNIXFILE`: `SIOCPROTOPRIVATE + 0` (linux/un.h).
    const SIOCUNIXFILE: libc::Ioctl = 0x89e0;
    // SAFETY: the request takes no argument.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE) };
    match check(result.into()) {
        Ok(fd) => own(fd).map(Some),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Bytes that wait to be received; of a datagram socket those of the first message.
pub fn waiting_bytes(socket: BorrowedFd<'_>) -> io::Result<usize> {
    count(socket, libc::FIONREAD)
}

/// What is on its way from this socket and nobody has received, in bytes of the kernel's memory.
pub fn unread_bytes(socket: BorrowedFd<'_>) -> io::Result<usize> {
    count(socket, libc::TIOCOUTQ)
}

/// Whether the next byte of a stream is the one that was sent with `MSG_OOB`.
pub fn at_mark(socket: BorrowedFd<'_>) -> io::Result<bool> {
    /// Of linux/sockios.h.
    const SIOCATMARK: libc::Ioctl = 0x8905;
    Ok(count(socket, SIOCATMARK)? != 0)
}

fn count(socket: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<usize> {
    let mut value: libc::c_int = 0;
    // SAFETY: the kernel writes an int to `value`.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut value) }.into())?;
    Ok(usize::try_from(value).unwrap_or(0))
}

/// A message, or a part of a stream, that was looked at.
#[derive(Debug, Default)]
pub struct Message {
    /// How long it is, which may be more than the buffer holds.
    pub bytes: usize,
    pub sender: Option<Vec<u8>>,
    /// Descriptors that came with it, as new ones of the caller.
    pub rights: Vec<OwnedFd>,
    /// Who sent it, if the socket has `SO_PASSCRED` set. Without it nothing tells the end from an empty message.
    pub credentials: Option<Credentials>,
    /// Descriptors were lost, for want of numbers.
    pub cut: bool,
}

/// Copies a message or bytes that a socket will receive, from where `SO_PEEK_OFF` points, without taking it.
///
/// # Errors
/// `WouldBlock`: there is nothing. An error that the socket has pending, which is thereby taken.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> io::Result<Message> {
    // Room for 253 descriptors (SCM_MAX_FD), credentials, a pidfd, a security label, times.
    let mut control = [0u64; 256];
    let mut address = [0u8; NAME_OFFSET + NAME_BYTES_MAX + 2];
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all fields of msghdr may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = address.as_mut_ptr().cast();
    message.msg_namelen = libc::socklen_t::try_from(address.len()).expect("a small array");
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags =
        flags | libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the message's vectors cover `address`, `buffer` and `control`, which outlive the call.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let bytes =
        usize::try_from(check(result as libc::c_long)?).expect("-1 is the only negative result");
    let mut found = Message {
        bytes,
        sender: name_of(&address, message.msg_namelen as usize),
        cut: message.msg_flags & libc::MSG_CTRUNC != 0,
        ..Message::default()
    };
    // SAFETY: the header is the one that the kernel filled in.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !next.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a header inside `control`.
        let header = unsafe { *next };
        // SAFETY: the data follows the header, inside `control`.
        let data = unsafe { libc::CMSG_DATA(next) };
        let bytes = header.cmsg_len as usize - data.addr().wrapping_sub(next.addr());
        // SAFETY: the kernel has written as many bytes as the header says.
        let data = unsafe { std::slice::from_raw_parts(data, bytes) };
        found.add(header.cmsg_level, header.cmsg_type, data);
        // SAFETY: `next` is a header inside `control`.
        next = unsafe { libc::CMSG_NXTHDR(&raw const message, next) };
    }
    Ok(found)
}

/// How many bytes of a stream, from where `SO_PEEK_OFF` points, fit into `bytes` bytes in whole parts as they were sent.
///
/// The kernel gives no part of which it can't copy all. So it is told to copy what is beyond to where nothing can be.
///
/// # Errors
/// Of `recvmsg(2)`; EFAULT: not even the first part fits.
pub fn whole_parts(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<usize> {
    let mut buffer = vec![0u8; bytes];
    let nowhere = std::ptr::null_mut();
    let mut vectors = [
        libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() },
        libc::iovec { iov_base: nowhere, iov_len: 1 },
    ];
    // SAFETY: all fields of msghdr may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the first vector covers `buffer`, which outlives the call; the kernel refuses to write to the second.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    Ok(usize::try_from(check(result as libc::c_long)?).expect("-1 is the only negative result"))
}

impl Message {
    fn add(&mut self, level: i32, kind: i32, data: &[u8]) {
        /// `SCM_PIDFD` of linux/socket.h.
        const SCM_PIDFD: i32 = 4;
        if level != libc::SOL_SOCKET {
            return;
        }
        let words = data.chunks_exact(4).map(|word| word.try_into().expect("chunks of four bytes"));
        match kind {
            libc::SCM_RIGHTS => self.rights.extend(words.map(i32::from_le_bytes).map(taken)),
            // What a process's descriptor says, the credentials say too.
            SCM_PIDFD => words.map(i32::from_le_bytes).filter(|fd| *fd >= 0).for_each(|fd| {
                drop(taken(fd));
            }),
            libc::SCM_CREDENTIALS => {
                let words: Vec<u32> = words.map(u32::from_le_bytes).collect();
                if let [pid, uid, gid] = words[..] {
                    self.credentials = Some(Credentials { pid: pid.cast_signed(), uid, gid });
                }
            }
            _ => {}
        }
    }
}

fn taken(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel just made this descriptor for us, and each is taken once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Who is at the other end: who connected, or listened, or made the pair. `None`: nobody has.
pub fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<Option<Credentials>> {
    let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut bytes = libc::socklen_t::try_from(size_of_val(&found)).expect("a small structure");
    // SAFETY: the kernel writes at most `bytes` bytes to `found`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut bytes,
        )
    };
    check(result.into())?;
    let credentials = Credentials { pid: found.pid, uid: found.uid, gid: found.gid };
    Ok((credentials.uid != u32::MAX).then_some(credentials))
}

/// The supplementary groups of who is at the other end.
///
/// # Errors
/// `ENODATA`: as where [`peer_credentials`] has nobody.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    /// Of linux/socket.h.
    const SO_PEERGROUPS: i32 = 59;
    // NGROUPS_MAX.
    let mut groups = vec![0u32; 65536];
    let mut bytes = libc::socklen_t::try_from(groups.len() * 4).expect("a small array");
    // SAFETY: the kernel writes at most `bytes` bytes to `groups`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    check(result.into())?;
    groups.truncate(bytes as usize / 4);
    Ok(groups)
}

fn own(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    /// A server that is found under another name than it had is not found.
    #[test]
    fn names_are_read_as_they_were_bound() {
        let folder = tempfile_path();
        for name in [&b"\0ab\0c\xff"[..], folder.as_bytes()] {
            let unbound = UnixDatagram::unbound().expect("socket");
            assert_eq!(super::name(unbound.as_fd()).expect("name"), None);
            bind(unbound.as_fd(), name).expect("bind");
            assert_eq!(super::name(unbound.as_fd()).expect("name").as_deref(), Some(name));
            connect(unbound.as_fd(), name).expect("connect to itself");
            assert_eq!(peer_name(unbound.as_fd()).expect("name").as_deref(), Some(name));
            unbound.send(b"123").expect("send");
            let message = peek(unbound.as_fd(), &mut [0; 8], 0).expect("peek");
            assert_eq!((message.bytes, message.sender.as_deref()), (3, Some(name)));
        }
        std::fs::remove_file(folder).expect("the node is there");
    }

    fn tempfile_path() -> String {
        format!("{}/samara-unix-{}", std::env::temp_dir().display(), std::process::id())
    }
}
