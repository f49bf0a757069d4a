//! Netlink sockets: port, groups, options.
//!
//! What this module does not do: messages that nobody has read, and queues of packets (`NETLINK_NETFILTER`), for which the
//! kernel keeps more than the socket. They are refused.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::netlink::SocketAddrNetlink;
use samara_capsule::record::{FileKind, NetlinkSocket};
use samara_kernel::Pid;
use samara_kernel::setns::{Namespace, inside};
use samara_kernel::sockopt;

use crate::capture::{CaptureError, read};
use crate::descriptors::Found;
use crate::internet::new_socket;
use crate::socket_options;

/// Options of linux/netlink.h.
const NETLINK_ADD_MEMBERSHIP: i32 = 1;
const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
/// `NETLINK_NETFILTER`
const NETFILTER: i32 = 12;
/// More groups than any protocol has.
const GROUP_BYTES_MAX: usize = 4096;

/// Describes a netlink socket, or says why it can't be saved.
pub(crate) fn note(
    found: &Found<'_>,
    socket: BorrowedFd<'_>,
    (kind, protocol): (i32, i32),
) -> Result<Result<FileKind, String>, CaptureError> {
    let what = || read(found.link);
    if protocol == NETFILTER {
        return Ok(Err("a netlink socket of the packet filter is not supported".to_owned()));
    }
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
        .map_err(io::Error::from)
        .map_err(what())?;
    if fds.iter().any(|fd| fd.revents().contains(PollFlags::IN)) {
        return Ok(Err("unread messages in a netlink socket are not supported".to_owned()));
    }
    let options = socket_options::capture(socket, found.metadata, socket_options::NETLINK);
    let options = match options.map_err(what())? {
        Ok(options) => options,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let address = |result: rustix::io::Result<rustix::net::SocketAddrAny>| -> io::Result<_> {
        Ok(SocketAddrNetlink::try_from(result?)?)
    };
    let local = address(rustix::net::getsockname(socket)).map_err(what())?;
    let peer = rustix::net::getpeername(socket).map_err(io::Error::from).map_err(what())?;
    let peer = match peer {
        Some(peer) => {
            let peer = address(Ok(peer)).map_err(what())?;
            (peer.pid(), peer.groups())
        }
        None => (0, 0),
    };
    let groups = groups(socket).map_err(what())?;
    let port = local.pid();
    Ok(Ok(FileKind::Netlink(Box::new(NetlinkSocket {
        kind,
        protocol,
        options,
        port,
        groups,
        peer,
    }))))
}

/// The groups that a socket has joined: the kernel tells them as bits.
fn groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut bits = vec![0u8; GROUP_BYTES_MAX];
    let name = NETLINK_LIST_MEMBERSHIPS;
    let count = sockopt::get_into(socket, libc::SOL_NETLINK, name, &mut bits)?;
    bits.truncate(count);
    let set = |byte: u8, bit: u32| byte >> bit & 1 == 1;
    Ok((0u32..)
        .zip(bits)
        .flat_map(|(index, byte)| {
            (0..8).filter(move |bit| set(byte, *bit)).map(move |bit| index * 8 + bit + 1)
        })
        .collect())
}

/// Makes a netlink socket of the container's network namespace.
pub(crate) fn restore(init: Pid, record: &NetlinkSocket) -> io::Result<OwnedFd> {
    inside(init, Namespace::Network, || {
        let socket = new_socket(libc::AF_NETLINK, record.kind, record.protocol)?;
        socket_options::prepare(socket.as_fd(), &record.options)?;
        if record.port != 0 || !record.groups.is_empty() {
            rustix::net::bind(&socket, &SocketAddrNetlink::new(record.port, 0))?;
        }
        for group in &record.groups {
            let group = group.to_le_bytes();
            sockopt::set(socket.as_fd(), libc::SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group)?;
        }
        let (port, groups) = record.peer;
        if record.peer != (0, 0) {
            rustix::net::connect(&socket, &SocketAddrNetlink::new(port, groups))?;
        }
        socket_options::finish(socket.as_fd(), &record.options)?;
        Ok(socket)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group that is not joined again is a change of the network that a program never hears of.
    #[test]
    fn groups_are_found_by_their_bits() {
        let socket =
            new_socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).expect("a socket");
        for group in [1u32, 33] {
            let group = group.to_le_bytes();
            sockopt::set(socket.as_fd(), libc::SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group)
                .expect("join");
        }
        assert_eq!(groups(socket.as_fd()).expect("groups"), [1, 33]);
    }
}
