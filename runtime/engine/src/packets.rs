//! Sockets of the link layer (`AF_PACKET`): protocol, interface, memberships, fanout, options.
//!
//! An interface is found by its name. A socket whose interface is not there in the new container is left as one whose
//! interface has been removed: it receives nothing.
//!
//! What this module does not do: packets that nobody has read, rings (`PACKET_RX_RING`), and fanout by a program. They are
//! refused.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;
use samara_capsule::record::{Bytes, FileKind, LinkMembership, PacketSocket};
use samara_kernel::setns::{Namespace, inside};
use samara_kernel::{Pid, packet, sock_diag, sockopt};

use crate::capture::{CaptureError, read};
use crate::descriptors::Found;
use crate::internet::new_socket;
use crate::socket_options;

/// The obsolete type of linux/net.h.
const SOCK_PACKET: i32 = 10;
/// Options of linux/if_packet.h.
const PACKET_ADD_MEMBERSHIP: i32 = 1;
const PACKET_COPY_THRESH: i32 = 7;
const PACKET_FANOUT: i32 = 18;
/// What a fanout chooses by: an extended or classic BPF program, which the kernel does not tell.
const FANOUT_BY_PROGRAM: [u8; 2] = [6, 7];

/// Describes a packet socket, or says why it can't be saved.
pub(crate) fn note(
    found: &Found<'_>,
    socket: BorrowedFd<'_>,
    kind: i32,
    init: Pid,
) -> Result<Result<FileKind, String>, CaptureError> {
    let what = || read(found.link);
    let options = socket_options::capture(socket, found.metadata, socket_options::PACKET);
    let options = match options.map_err(what())? {
        Ok(options) => options,
        Err(refusal) => return Ok(Err(refusal)),
    };
    // Not every kernel has this part of sock_diag.
    let known = sock_diag::packet_sockets(init).unwrap_or_default();
    let Some(told) = u32::try_from(found.identity().1).ok().and_then(|inode| known.get(&inode))
    else {
        return Ok(Err("this kernel does not tell the state of a packet socket".to_owned()));
    };
    if told.has_ring {
        let what = "a packet socket with a ring (PACKET_RX_RING, PACKET_TX_RING) is not supported";
        return Ok(Err(what.to_owned()));
    }
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
        .map_err(io::Error::from)
        .map_err(what())?;
    let events = fds.iter().fold(PollFlags::empty(), |events, fd| events | fd.revents());
    if events.intersects(PollFlags::IN | PollFlags::ERR) {
        let what = "unread packets or an error in a packet socket are not supported";
        return Ok(Err(what.to_owned()));
    }
    let fanout = match sockopt::get(socket, libc::SOL_PACKET, PACKET_FANOUT, 4) {
        Ok(value) => value.first_chunk::<4>().map_or(0, |word| u32::from_le_bytes(*word)),
        Err(_) => 0,
    };
    if fanout != 0 && FANOUT_BY_PROGRAM.contains(&fanout.to_le_bytes()[2]) {
        let what = "a packet socket of a group with a program (PACKET_FANOUT_CBPF, PACKET_FANOUT_EBPF) is not supported";
        return Ok(Err(what.to_owned()));
    }
    let names = inside(init, Namespace::Network, || {
        let bound = (told.interface != 0).then(|| interface_name(told.interface)).transpose()?;
        let memberships = told.memberships.iter().map(|membership| {
            Ok(LinkMembership {
                interface: interface_name(membership.interface)?,
                kind: membership.kind,
                address: Bytes::from(membership.address.clone()),
                count: membership.count,
            })
        });
        Ok((bound, memberships.collect::<io::Result<Vec<_>>>()?))
    });
    let Ok((interface, memberships)) = names else {
        return Ok(Err("a packet socket of an interface that is gone is not supported".to_owned()));
    };
    Ok(Ok(FileKind::Packet(Box::new(PacketSocket {
        kind,
        options,
        protocol: told.protocol,
        interface,
        copy_threshold: told.copy_threshold,
        memberships,
        fanout,
    }))))
}

/// The name of an interface of the calling thread's network namespace.
fn interface_name(index: i32) -> io::Result<Bytes> {
    let index = u32::try_from(index).map_err(io::Error::other)?;
    let name = nix::net::if_::if_indextoname(index).map_err(io::Error::from)?;
    Ok(Bytes::from(name.into_bytes()))
}

/// The number of an interface of the calling thread's network namespace; `None` where there is none of this name.
fn interface_index(name: &[u8]) -> Option<i32> {
    let found = nix::net::if_::if_nametoindex(name).ok().and_then(|index| index.try_into().ok());
    if found.is_none() {
        let name = String::from_utf8_lossy(name);
        tracing::warn!("a packet socket has no interface {name} any more");
    }
    found
}

/// Makes a packet socket of the container's network namespace.
pub(crate) fn restore(init: Pid, record: &PacketSocket) -> io::Result<OwnedFd> {
    inside(init, Namespace::Network, || make(record))
}

fn make(record: &PacketSocket) -> io::Result<OwnedFd> {
    // One that was made for no protocol hears nothing until it is bound, last of all. The obsolete type can't be bound to one.
    let is_obsolete = record.kind == SOCK_PACKET;
    let protocol = if is_obsolete { i32::from(record.protocol.to_be()) } else { 0 };
    let socket = new_socket(libc::AF_PACKET, record.kind, protocol)?;
    socket_options::prepare(socket.as_fd(), &record.options)?;
    let set = |name, value: &[u8]| sockopt::set(socket.as_fd(), libc::SOL_PACKET, name, value);
    if record.copy_threshold != 0 {
        set(PACKET_COPY_THRESH, &record.copy_threshold.to_le_bytes())?;
    }
    for membership in &record.memberships {
        let Some(index) = interface_index(&membership.interface) else { continue };
        let request = membership_request(index, membership)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        for _ in 0..membership.count {
            set(PACKET_ADD_MEMBERSHIP, &request)?;
        }
    }
    socket_options::finish(socket.as_fd(), &record.options)?;
    let interface = match &record.interface {
        None => Some(0),
        Some(name) => interface_index(name),
    };
    match (&record.interface, interface) {
        (Some(name), Some(_)) if is_obsolete => packet::bind_by_name(socket.as_fd(), name)?,
        (_, Some(index)) if !is_obsolete && (index, record.protocol) != (0, 0) => {
            packet::bind(socket.as_fd(), record.protocol, index)?;
        }
        _ => {}
    }
    if is_obsolete {
        discard(&socket);
    }
    if record.fanout != 0 && interface.is_some() {
        set(PACKET_FANOUT, &record.fanout.to_le_bytes())?;
    }
    Ok(socket)
}

/// `struct packet_mreq`, which is longer for a long address.
fn membership_request(index: i32, membership: &LinkMembership) -> Option<Vec<u8>> {
    const ADDRESS_BYTES: usize = 8;
    let length = u16::try_from(membership.address.len()).ok()?;
    let mut request = index.to_le_bytes().to_vec();
    request.extend(membership.kind.to_le_bytes());
    request.extend(length.to_le_bytes());
    request.extend(membership.address.iter());
    request.resize(request.len().max(8 + ADDRESS_BYTES), 0);
    Some(request)
}

/// Takes what came before the socket was as it should be.
fn discard(socket: &OwnedFd) {
    let mut buffer = [0u8; 1];
    while rustix::net::recv(socket, &mut buffer[..], RecvFlags::DONTWAIT | RecvFlags::TRUNC).is_ok()
    {
    }
}
