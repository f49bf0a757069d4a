//! `sock_diag(7)` for unix, TCP and packet sockets, and the socket options that other crates do not offer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::setns::{Namespace, beside, inside};
use crate::{Pid, check};

/// What the kernel tells of a unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode of the socket that it is connected to; 0 for one that nobody has open: it is closed, or waits to be accepted.
    pub peer: Option<u32>,
    /// Bit 0: receiving was shut down, bit 1: sending.
    pub shutdown: u8,
    pub listens: bool,
    /// Of a socket that listens: inodes of those that have connected and were not accepted, in order; 0 for one that is closed.
    pub waiting: Vec<u32>,
    /// How many more may wait, of a socket that listens.
    pub backlog: u32,
}

/// All unix sockets of the network namespace that process `pid` is in, by inode.
///
/// # Errors
/// Of the calls; `InvalidData` for an answer that is not as `sock_diag(7)` says.
pub fn unix_sockets(pid: Pid) -> io::Result<BTreeMap<u32, UnixSocket>> {
    all_unix(inside(pid, Namespace::Network, diagnostics_socket)?)
}

/// As [`unix_sockets`], of the network namespace that a socket belongs to.
///
/// # Errors
/// As there.
pub fn unix_sockets_beside(socket: BorrowedFd<'_>) -> io::Result<BTreeMap<u32, UnixSocket>> {
    all_unix(beside(socket, diagnostics_socket)?)
}

fn all_unix(socket: OwnedFd) -> io::Result<BTreeMap<u32, UnixSocket>> {
    let mut sockets = BTreeMap::new();
    dump(socket, &request(), |body| {
        let (inode, found) = socket_of(body)?;
        sockets.insert(inode, found);
        Some(())
    })?;
    Ok(sockets)
}

/// What the kernel tells of a TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// As linux/tcp_states.h numbers them.
    pub state: u8,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// Bytes, and the mark of the end, that nobody has read.
    pub unread: u32,
    /// 0 where no descriptor refers to it: it has not been accepted yet, or was closed.
    pub inode: u32,
}

/// All TCP sockets of the network namespace that process `pid` is in, but those that never had an address.
///
/// # Errors
/// As [`unix_sockets`].
pub fn tcp_sockets(pid: Pid) -> io::Result<Vec<TcpSocket>> {
    let mut sockets = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = u8::try_from(family).expect("families are small");
        let socket = inside(pid, Namespace::Network, diagnostics_socket)?;
        dump(socket, &tcp_request(family), |body| {
            sockets.push(tcp_socket_of(body)?);
            Some(())
        })?;
    }
    Ok(sockets)
}

/// A bit of what [`datagram_shutdowns`] tells (`SEND_SHUTDOWN` of net/sock.h).
pub const SHUT_FOR_SENDING: u8 = 2;

/// For which directions the UDP sockets are shut that are bound in the network namespace of process `pid`, by inode.
///
/// # Errors
/// As [`unix_sockets`].
pub fn datagram_shutdowns(pid: Pid) -> io::Result<BTreeMap<u32, u8>> {
    const PROTOCOLS: [i32; 2] = [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE];
    let mut found = BTreeMap::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for protocol in PROTOCOLS {
            let small =
                |number: i32| u8::try_from(number).expect("families and protocols are small");
            let socket = inside(pid, Namespace::Network, diagnostics_socket)?;
            let dumped = dump(socket, &internet_request(small(family), small(protocol)), |body| {
                /// `INET_DIAG_SHUTDOWN`
                const SHUTDOWN: u16 = 8;
                let attributes = attributes(body.get(INTERNET_BYTES..)?)?;
                let shut = attributes.iter().find(|(kind, _)| *kind == SHUTDOWN);
                if let Some((_, [bits, ..])) = shut {
                    found.insert(word(body, 68)?, *bits);
                }
                Some(())
            });
            match dumped {
                // A kernel without the protocol.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
    }
    Ok(found)
}

/// What the kernel tells of a packet socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PacketSocket {
    /// As linux/if_ether.h numbers them; 0 for none.
    pub protocol: u16,
    /// Number of the interface that it is bound to; 0 for all, -1 for one that is gone.
    pub interface: i32,
    /// Packets from this size on are queued beside a ring.
    pub copy_threshold: u32,
    pub memberships: Vec<PacketMembership>,
    /// It has memory of its own that packets are exchanged through (`PACKET_RX_RING`, `PACKET_TX_RING`).
    pub has_ring: bool,
}

/// What an interface receives for a packet socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketMembership {
    pub interface: i32,
    /// How often the socket has asked for it.
    pub count: u32,
    /// `PACKET_MR_` of linux/if_packet.h.
    pub kind: u16,
    pub address: Vec<u8>,
}

/// All packet sockets of the network namespace that process `pid` is in, by inode.
///
/// # Errors
/// As [`unix_sockets`].
pub fn packet_sockets(pid: Pid) -> io::Result<BTreeMap<u32, PacketSocket>> {
    let mut sockets = BTreeMap::new();
    dump(inside(pid, Namespace::Network, diagnostics_socket)?, &packet_request(), |body| {
        let (inode, found) = packet_socket_of(body)?;
        sockets.insert(inode, found);
        Some(())
    })?;
    Ok(sockets)
}

/// Asks the kernel, and gives the body of each message to `take`, which returns `None` for one that it does not understand.
fn dump(
    socket: OwnedFd,
    request: &[u8],
    mut take: impl FnMut(&[u8]) -> Option<()>,
) -> io::Result<()> {
    let mut socket = File::from(socket);
    socket.write_all(request)?;
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        let count = socket.read(&mut buffer)?;
        let mut rest = buffer.get(..count).unwrap_or_default();
        while !rest.is_empty() {
            let (kind, body, tail) = message(rest).ok_or_else(malformed)?;
            rest = tail;
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let errno = word(body, 0).ok_or_else(malformed)?.cast_signed();
                    return Err(io::Error::from_raw_os_error(-errno));
                }
                _ => take(body).ok_or_else(malformed)?,
            }
        }
    }
}

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const REQUEST_DUMP: u16 = 0x301;

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

/// `struct nlmsghdr` and `struct unix_diag_req` (linux/unix_diag.h), asking for all states, peers and queues.
fn request() -> Vec<u8> {
    /// `UDIAG_SHOW_PEER`, `UDIAG_SHOW_ICONS`, `UDIAG_SHOW_RQLEN`.
    const SHOW: u32 = 4 | 8 | 0x10;
    let mut bytes = Vec::new();
    bytes.extend(40u32.to_le_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_le_bytes());
    bytes.extend(REQUEST_DUMP.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend([1, 0, 0, 0]); // AF_UNIX
    bytes.extend(u32::MAX.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(SHOW.to_le_bytes());
    bytes.extend([0; 8]);
    bytes
}

/// Bytes of `struct inet_diag_msg`.
const INTERNET_BYTES: usize = 72;

fn tcp_request(family: u8) -> Vec<u8> {
    const TCP: u8 = 6;
    internet_request(family, TCP)
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2` (linux/inet_diag.h), asking for all states.
fn internet_request(family: u8, protocol: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(72u32.to_le_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_le_bytes());
    bytes.extend(REQUEST_DUMP.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, protocol, 0, 0]);
    bytes.extend(u32::MAX.to_le_bytes());
    bytes.extend([0; 48]);
    bytes
}

/// `struct nlmsghdr` and `struct packet_diag_req` (linux/packet_diag.h), asking for all but statistics.
fn packet_request() -> Vec<u8> {
    /// `PACKET_SHOW_INFO`, `PACKET_SHOW_MCLIST`, `PACKET_SHOW_RING_CFG`.
    const SHOW: u32 = 1 | 2 | 4;
    let mut bytes = Vec::new();
    bytes.extend(36u32.to_le_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_le_bytes());
    bytes.extend(REQUEST_DUMP.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend([u8::try_from(libc::AF_PACKET).expect("families are small"), 0, 0, 0]);
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(SHOW.to_le_bytes());
    bytes.extend([0; 8]);
    bytes
}

/// `struct packet_diag_msg` and its attributes.
fn packet_socket_of(body: &[u8]) -> Option<(u32, PacketSocket)> {
    const INFO: u16 = 0;
    const MEMBERSHIPS: u16 = 1;
    const RECEIVE_RING: u16 = 2;
    const SEND_RING: u16 = 3;
    let protocol = u16::from_le_bytes(body.get(2..4)?.try_into().ok()?);
    let mut socket = PacketSocket { protocol, ..PacketSocket::default() };
    for (kind, value) in attributes(body.get(16..)?)? {
        match kind {
            INFO => {
                socket.interface = word(value, 0)?.cast_signed();
                socket.copy_threshold = word(value, 12)?;
            }
            MEMBERSHIPS => {
                // `struct packet_diag_mclist`, whose address has room for `MAX_ADDR_LEN` bytes.
                let entries = value.chunks_exact(44).map(|entry| {
                    let half =
                        |at| Some(u16::from_le_bytes(entry.get(at..at + 2)?.try_into().ok()?));
                    Some(PacketMembership {
                        interface: word(entry, 0)?.cast_signed(),
                        count: word(entry, 4)?,
                        kind: half(8)?,
                        address: entry.get(12..12 + usize::from(half(10)?))?.to_vec(),
                    })
                });
                socket.memberships = entries.collect::<Option<_>>()?;
            }
            RECEIVE_RING | SEND_RING => socket.has_ring = true,
            _ => {}
        }
    }
    Some((word(body, 4)?, socket))
}

/// Splits the attributes behind a message.
fn attributes(mut rest: &[u8]) -> Option<Vec<(u16, &[u8])>> {
    let mut found = Vec::new();
    while rest.len() >= 4 {
        let length = usize::from(u16::from_le_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_le_bytes(rest.get(2..4)?.try_into().ok()?);
        found.push((kind, rest.get(4..length)?));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(found)
}

/// `struct inet_diag_msg`.
fn tcp_socket_of(body: &[u8]) -> Option<TcpSocket> {
    let [family, state] = body.get(..2)?.try_into().ok()?;
    let address = |ip: usize, port: usize| -> Option<SocketAddr> {
        let port = u16::from_be_bytes(body.get(port..port + 2)?.try_into().ok()?);
        let bytes: [u8; 16] = body.get(ip..ip + 16)?.try_into().ok()?;
        if i32::from(family) == libc::AF_INET6 {
            return Some((bytes, port).into());
        }
        let [a, b, c, d, ..] = bytes;
        Some(([a, b, c, d], port).into())
    };
    Some(TcpSocket {
        state,
        local: address(8, 4)?,
        remote: address(24, 6)?,
        unread: word(body, 56)?,
        inode: word(body, 68)?,
    })
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
    const PEER: u16 = 2;
    const CONNECTIONS: u16 = 3;
    const QUEUES: u16 = 4;
    const SHUTDOWN: u16 = 6;
    /// `TCP_LISTEN`
    const LISTENS: u8 = 10;
    let inode = word(body, 4)?;
    let mut socket = UnixSocket { listens: *body.get(2)? == LISTENS, ..UnixSocket::default() };
    for (kind, value) in attributes(body.get(16..)?)? {
        match kind {
            PEER => socket.peer = Some(word(value, 0)?),
            CONNECTIONS => {
                socket.waiting = (0..value.len() / 4).filter_map(|n| word(value, 4 * n)).collect();
            }
            QUEUES => socket.backlog = word(value, 4)?,
            SHUTDOWN => socket.shutdown = *value.first()?,
            _ => {}
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    /// A connection whose other end is not found would be reset by a move.
    #[test]
    fn finds_both_ends_of_a_connection() {
        use std::net::{TcpListener, TcpStream};
        let own = i32::try_from(std::process::id()).expect("a pid");
        for ip in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(ip).expect("listen");
            let near = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
            let (here, there) =
                (near.local_addr().expect("bound"), near.peer_addr().expect("peer"));
            let all = tcp_sockets(own).expect("sock_diag");
            let find = |local, remote| {
                let found = all.iter().find(|s| s.local == local && s.remote == remote);
                *found.expect("listed")
            };
            assert_ne!(find(here, there).inode, 0);
            assert_eq!(find(there, here).inode, 0, "nobody has accepted it");
        }
    }

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
        assert_eq!(sockets.get(&inode(&left)).expect("listed").peer, Some(inode(&right)));
        let left_inode = inode(&left);
        drop(right);
        let after = unix_sockets(own).expect("sock_diag");
        assert_eq!(after.get(&left_inode).expect("listed").peer, Some(0));
    }
}
