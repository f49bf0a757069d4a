//! TCP: listening sockets, and connections with both ends in the container.
//!
//! A connection is made again as a real one, between two sockets of the new container with the same ports, and its queues are
//! filled by sending: [decision](../../../docs/decisions/tcp-connections.md). What leads out of the container is reset: the
//! program reads what had arrived, then gets ECONNRESET, and connects again as after any failure of a network.
//!
//! Limits: an error that nobody has fetched yet comes back as ECONNRESET, or as ECONNREFUSED where no connection had been made;
//! a socket that lost a connection out of the container has another number than before in `getsockname`; connections that wait to be accepted are
//! accepted in another order.
//!
//! What this module does not do: urgent data, protocols on top of a connection (TLS in the kernel), data in a connection that
//! nobody has accepted. They are refused.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, Shutdown};
use samara_capsule::record::{
    Bytes, Connection, FileKind, InternetSocket, InternetState, OtherEnd, SocketAddress,
    SocketOption, SocketOptions,
};
use samara_kernel::pidfd::PidFd;
use samara_kernel::sock_diag::{self, TcpSocket};
use samara_kernel::{Pid, sockopt, tcp};

use crate::capture::{CaptureError, Tables, index, read};
use crate::descriptors::Found;
use crate::internet::{
    Addresses, MPTCP, Made, anywhere, at, bind, canonical, from_record, last_peer, local,
    new_socket, peer, to_record, was_given, with_ip,
};
use crate::socket_options;
use crate::unsupported::{Place, UNACCEPTED_TCP};

/// States of linux/tcp_states.h.
const ESTABLISHED: u8 = 1;
const SYN_SENT: u8 = 2;
const SYN_RECEIVED: u8 = 3;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LISTEN: u8 = 10;
/// `TCPI_OPT_TIMESTAMPS`
const TIMESTAMPS: u8 = 1;
/// FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING: this end has said that it sends no more.
const WRITE_SHUT: [u8; 4] = [4, 5, 9, 11];

/// A socket whose state depends on others, or takes long to read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Noted {
    file: u32,
    pid: Pid,
    fd: i32,
    state: u8,
    local: SocketAddr,
    peer: SocketAddr,
    read_shut: bool,
}

/// Describes a TCP socket. Connections are completed by [`resolve`] when all sockets have been seen.
pub(crate) fn note(
    found: &Found<'_>,
    socket: BorrowedFd<'_>,
    (domain, protocol): (i32, i32),
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let what = || read(found.link);
    let options = socket_options::capture(socket, found.metadata, socket_options::INTERNET);
    let mut options = match options.map_err(what())? {
        Ok(options) => options,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let info = tcp::info(socket).map_err(what())?;
    if info.options & TIMESTAMPS != 0 {
        add_timestamps(&mut options);
    }
    let events = events(socket).map_err(what())?;
    let (local, peer) = (local(socket).map_err(what())?, peer(socket).map_err(what())?);
    let state = match info.state {
        LISTEN => InternetState::Listening { backlog: info.backlog },
        CLOSE if !events.contains(PollFlags::RDHUP) => InternetState::Idle,
        _ if protocol == MPTCP => {
            return Ok(Err("a connection of multipath TCP is not supported".to_owned()));
        }
        CLOSE => {
            let had_connection = info.options != 0;
            let error = events.contains(PollFlags::ERR).then_some(if had_connection {
                libc::ECONNRESET
            } else {
                libc::ECONNREFUSED
            });
            let peer = last_peer(socket, domain).map_err(what())?.map(to_record);
            InternetState::Ended { unread: unread(socket).map_err(what())?, error, peer }
        }
        state => {
            if events.contains(PollFlags::PRI) {
                return Ok(Err("urgent data in a TCP connection is not supported".to_owned()));
            }
            if !sockopt::get(socket, libc::SOL_TCP, libc::TCP_ULP, 16).is_ok_and(|n| n.is_empty()) {
                return Ok(Err(
                    "a protocol on top of a TCP connection (TCP_ULP) is not supported".to_owned()
                ));
            }
            let unknown = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
            tables.connections.push(Noted {
                file: index(tables.files.len()),
                pid: found.pid,
                fd: found.fd,
                state,
                local: local.unwrap_or(unknown),
                peer: peer.unwrap_or(unknown),
                read_shut: state != CLOSE_WAIT && events.contains(PollFlags::RDHUP),
            });
            InternetState::Idle
        }
    };
    Ok(Ok(FileKind::Internet(Box::new(InternetSocket {
        domain,
        kind: libc::SOCK_STREAM,
        protocol,
        options,
        local: local.map(to_record),
        memberships: Vec::new(),
        state,
    }))))
}

/// A connection tells the size of its segments without the timestamps that are in them; it was set with them.
fn add_timestamps(options: &mut SocketOptions) {
    const TIMESTAMPS_BYTES: i32 = 12;
    let is_size = |option: &&mut SocketOption| {
        (option.level, option.name) == (libc::SOL_TCP, libc::TCP_MAXSEG)
    };
    let size = socket_options::number(options, libc::SOL_TCP, libc::TCP_MAXSEG);
    if let (Some(size), Some(option)) = (size, options.values.iter_mut().find(is_size)) {
        option.value = Bytes::from(size.saturating_add(TIMESTAMPS_BYTES).to_le_bytes().to_vec());
    }
}

fn events(socket: BorrowedFd<'_>) -> io::Result<PollFlags> {
    let all = PollFlags::IN | PollFlags::OUT | PollFlags::PRI | PollFlags::RDHUP;
    let mut fds = [PollFd::from_borrowed_fd(socket, all)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(fds.iter().fold(PollFlags::empty(), |events, fd| events | fd.revents()))
}

/// Copies what a connection can read, without taking it.
fn unread(socket: BorrowedFd<'_>) -> io::Result<Bytes> {
    let offset = |value: &[u8]| sockopt::set(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, value);
    let before = sockopt::get(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 4)?;
    let off = (-1i32).to_le_bytes();
    if before != off {
        offset(&off)?;
    }
    let copied = copy(socket);
    if before != off {
        offset(&before)?;
    }
    copied
}

fn copy(socket: BorrowedFd<'_>) -> io::Result<Bytes> {
    let count = tcp::unread(socket)?;
    if count == 0 {
        return Ok(Bytes::new());
    }
    let mut buffer = vec![0; count];
    match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(read) if read == count => Ok(Bytes::from(buffer)),
        Ok(_) => Err(io::Error::other("a connection has less data than it says")),
        Err(error) => Err(error.into()),
    }
}

/// Finds the other ends of the noted connections, and reads what is in them.
pub(crate) fn resolve(tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    let noted = std::mem::take(&mut tables.connections);
    if noted.is_empty() {
        return Ok(());
    }
    let kernel = sock_diag::tcp_sockets(tables.request.init)
        .map_err(read("the TCP sockets of the container"))?;
    let by_ends: BTreeMap<(SocketAddr, SocketAddr), Noted> =
        noted.iter().map(|one| ((canonical(one.local), canonical(one.peer)), *one)).collect();
    for one in &noted {
        let state = match other_end(one, &by_ends, &kernel) {
            Ok(found) => complete(one, found).map_err(read("a TCP connection"))?,
            Err(what) => {
                tables.refuse(one.pid, Place::Descriptor(one.fd), what);
                continue;
            }
        };
        if let Some(file) = tables.files.get_mut(one.file as usize)
            && let FileKind::Internet(socket) = &mut file.kind
        {
            socket.state = state;
        }
    }
    Ok(())
}

/// What is on the other side.
#[derive(Clone, Copy, Debug)]
enum Other {
    Socket(Noted),
    Waiting,
    Closed,
    Outside,
    /// Has not answered.
    Silent(SocketAddr),
}

fn other_end(
    one: &Noted,
    by_ends: &BTreeMap<(SocketAddr, SocketAddr), Noted>,
    kernel: &[TcpSocket],
) -> Result<Other, &'static str> {
    if one.state == SYN_SENT {
        // Whom it calls, `getpeername` does not tell.
        let found = kernel.iter().find(|socket| {
            socket.state == SYN_SENT && canonical(socket.local) == canonical(one.local)
        });
        return Ok(found.map_or(Other::Outside, |socket| Other::Silent(socket.remote)));
    }
    let reversed = (canonical(one.peer), canonical(one.local));
    if let Some(other) = by_ends.get(&reversed) {
        return Ok(Other::Socket(*other));
    }
    let other = kernel
        .iter()
        .find(|socket| (canonical(socket.local), canonical(socket.remote)) == reversed);
    match other {
        Some(TcpSocket {
            inode: 0,
            state: ESTABLISHED | CLOSE_WAIT | SYN_RECEIVED,
            unread,
            ..
        }) => {
            // The mark of the end counts as a byte.
            if *unread > u32::from(WRITE_SHUT.contains(&one.state)) {
                return Err(UNACCEPTED_TCP);
            }
            Ok(Other::Waiting)
        }
        Some(TcpSocket { inode: 0, .. }) if one.state != CLOSE_WAIT => {
            Err("a TCP connection whose other end was closed and still sends is not supported")
        }
        Some(TcpSocket { inode: 0, .. }) | None if one.state == CLOSE_WAIT => Ok(Other::Closed),
        Some(_) | None => Ok(Other::Outside),
    }
}

/// Reads a connection's queues.
fn complete(one: &Noted, other: Other) -> io::Result<InternetState> {
    /// Packets on the loopback arrive within microseconds.
    const ATTEMPTS: u32 = 100;
    let socket = PidFd::open(one.pid)?.get_fd(one.fd)?;
    let socket = socket.as_fd();
    let state = |other, unread, in_flight| {
        InternetState::Connection(Box::new(Connection {
            peer: to_record(one.peer),
            other,
            unread,
            in_flight,
            read_shut: one.read_shut,
            write_shut: WRITE_SHUT.contains(&one.state),
        }))
    };
    let sender = match other {
        Other::Outside => {
            let (error, peer) = (Some(libc::ECONNRESET), Some(to_record(one.peer)));
            return Ok(InternetState::Ended { unread: unread(socket)?, error, peer });
        }
        Other::Silent(peer) => return Ok(InternetState::Connecting { peer: to_record(peer) }),
        Other::Waiting => return Ok(state(OtherEnd::Waiting, unread(socket)?, Bytes::new())),
        Other::Closed => return Ok(state(OtherEnd::Closed, unread(socket)?, Bytes::new())),
        Other::Socket(sender) => sender,
    };
    let file = OtherEnd::File(sender.file);
    let sending = PidFd::open(sender.pid)?.get_fd(sender.fd)?;
    for _ in 0..ATTEMPTS {
        let before = unread(socket)?;
        if tcp::unconfirmed(sending.as_fd())? == 0 {
            // Confirmed is received, so nothing can come any more.
            return Ok(state(file, unread(socket)?, Bytes::new()));
        }
        let sent = tcp::standing(sending.as_fd())?;
        let received = tcp::standing(socket)?;
        if unread(socket)? != before {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        let ahead = sent.send_next.wrapping_sub(received.receive_next) as usize;
        // The mark of the end counts as a byte, and comes last.
        let bytes = ahead.saturating_sub(usize::from(WRITE_SHUT.contains(&sender.state)));
        let start = sent.unconfirmed.len().checked_sub(bytes);
        let in_flight = start.and_then(|start| sent.unconfirmed.get(start..));
        let in_flight = in_flight
            .ok_or_else(|| io::Error::other("a connection has sent more than it has kept"))?;
        return Ok(state(file, before, Bytes::from(in_flight.to_vec())));
    }
    Err(io::Error::other("a connection of stopped processes does not come to rest"))
}

/// Makes all TCP sockets again.
///
/// A port on which somebody listens cannot be bound by a connection, but the other way round it can, with `SO_REUSEADDR`: so
/// connections come first, then what is bound, then what listens, and last the connections that wait there.
pub(crate) fn restore(
    sockets: &[(u32, &InternetSocket)],
    addresses: &Addresses,
) -> io::Result<Made> {
    let mut made = Made::new();
    let sockets: BTreeMap<u32, &InternetSocket> =
        sockets.iter().filter(|(_, socket)| socket.kind == libc::SOCK_STREAM).copied().collect();
    // Before any port is taken: what has ended has none.
    for (file, socket) in &sockets {
        if let InternetState::Ended { unread, error, peer } = &socket.state {
            made.insert(*file, ended(socket, unread, *error, peer.as_ref(), addresses)?);
        }
    }
    for (file, socket) in &sockets {
        if let InternetState::Connection(connection) = &socket.state {
            connect(*file, socket, connection, &sockets, addresses, &mut made)?;
        }
    }
    for (file, socket) in &sockets {
        match &socket.state {
            InternetState::Idle | InternetState::Listening { .. } => {
                let new = new_socket(socket.domain, socket.kind, socket.protocol)?;
                socket_options::prepare(new.as_fd(), &socket.options)?;
                // A new socket tells a size that nobody has set.
                let size = sockopt::get(new.as_fd(), libc::SOL_TCP, libc::TCP_MAXSEG, 4)?;
                let wanted =
                    socket_options::number(&socket.options, libc::SOL_TCP, libc::TCP_MAXSEG);
                if wanted.is_some_and(|wanted| size != wanted.to_le_bytes()) {
                    limit_segments(new.as_fd(), &socket.options)?;
                }
                if let Some(address) = &socket.local {
                    let address = from_record(address)?;
                    // Who has begun to listen beside others may have taken back that it lets them.
                    if matches!(socket.state, InternetState::Listening { .. })
                        && listens_beside(*file, address.port(), &sockets)
                    {
                        set_flag(new.as_fd(), libc::SO_REUSEPORT, 1)?;
                    }
                    if is_shared(*file, address.port(), &sockets) {
                        reuse(new.as_fd())?;
                    }
                    bind(new.as_fd(), address, addresses)?;
                }
                made.insert(*file, new);
            }
            InternetState::Connecting { .. }
            | InternetState::Connection(_)
            | InternetState::Ended { .. }
            | InternetState::Datagrams(_) => {}
        }
    }
    for (file, socket) in &sockets {
        if let (InternetState::Listening { backlog }, Some(new)) = (&socket.state, made.get(file)) {
            rustix::net::listen(new, i32::try_from(*backlog).unwrap_or(i32::MAX))?;
        }
    }
    for (file, socket) in &sockets {
        match &socket.state {
            InternetState::Connection(connection) if connection.other == OtherEnd::Waiting => {
                made.insert(*file, wait_in_line(socket, connection, addresses)?);
            }
            InternetState::Connecting { peer } => {
                let peer = addresses.follow(from_record(peer)?);
                made.insert(*file, begin(socket, peer)?);
            }
            InternetState::Idle
            | InternetState::Listening { .. }
            | InternetState::Connection(_)
            | InternetState::Ended { .. }
            | InternetState::Datagrams(_) => {}
        }
    }
    for (file, socket) in &sockets {
        if let Some(new) = made.get(file) {
            let was_reused =
                socket_options::number(&socket.options, libc::SOL_SOCKET, libc::SO_REUSEADDR);
            set_reuse(new.as_fd(), was_reused.unwrap_or(0))?;
            if matches!(socket.state, InternetState::Listening { .. }) {
                let was_common =
                    socket_options::number(&socket.options, libc::SOL_SOCKET, libc::SO_REUSEPORT);
                set_flag(new.as_fd(), libc::SO_REUSEPORT, was_common.unwrap_or(0))?;
            }
            socket_options::finish(new.as_fd(), &socket.options)?;
        }
    }
    Ok(made)
}

/// Whether others have this port too: sockets, or ends of connections that nobody holds any more.
fn is_shared(file: u32, port: u16, sockets: &BTreeMap<u32, &InternetSocket>) -> bool {
    sockets.iter().filter(|(other, _)| **other != file).any(|(_, record)| {
        let far = match &record.state {
            InternetState::Connection(connection) => Some(connection.peer.port),
            InternetState::Idle
            | InternetState::Listening { .. }
            | InternetState::Connecting { .. }
            | InternetState::Ended { .. }
            | InternetState::Datagrams(_) => None,
        };
        far == Some(port) || record.local.as_ref().is_some_and(|local| local.port == port)
    })
}

/// Whether another socket listens at this port.
fn listens_beside(file: u32, port: u16, sockets: &BTreeMap<u32, &InternetSocket>) -> bool {
    sockets.iter().filter(|(other, _)| **other != file).any(|(_, record)| {
        matches!(record.state, InternetState::Listening { .. })
            && record.local.as_ref().is_some_and(|local| local.port == port)
    })
}

fn reuse(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_reuse(socket, 1)
}

fn set_reuse(socket: BorrowedFd<'_>, value: i32) -> io::Result<()> {
    set_flag(socket, libc::SO_REUSEADDR, value)
}

fn set_flag(socket: BorrowedFd<'_>, name: i32, value: i32) -> io::Result<()> {
    sockopt::set(socket, libc::SOL_SOCKET, name, &value.to_le_bytes())
}

/// A socket that will have an end's options, bound where that end was.
fn prepared(
    socket: &InternetSocket,
    room: usize,
    address: Option<SocketAddr>,
) -> io::Result<OwnedFd> {
    let new = new_socket(socket.domain, socket.kind, socket.protocol)?;
    socket_options::prepare(new.as_fd(), &socket.options)?;
    limit_segments(new.as_fd(), &socket.options)?;
    reuse(new.as_fd())?;
    socket_options::make_room(&new, room)?;
    if let Some(address) = address {
        rustix::net::bind(&new, &address).map_err(|error| at(address, error.into()))?;
    }
    Ok(new)
}

/// Segments that are smaller than the loopback's were set by the program.
fn limit_segments(socket: BorrowedFd<'_>, options: &SocketOptions) -> io::Result<()> {
    const LOOPBACK_BYTES_MIN: i32 = 32_000;
    let Some(bytes) = socket_options::number(options, libc::SOL_TCP, libc::TCP_MAXSEG) else {
        return Ok(());
    };
    if !(88..LOOPBACK_BYTES_MIN).contains(&bytes) {
        return Ok(());
    }
    sockopt::set(socket, libc::SOL_TCP, libc::TCP_MAXSEG, &bytes.to_le_bytes())
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a connection's other end is not there")
}

/// Makes a connection that was established, with both of its ends where they are known.
fn connect(
    file: u32,
    socket: &InternetSocket,
    connection: &Connection,
    sockets: &BTreeMap<u32, &InternetSocket>,
    addresses: &Addresses,
    made: &mut Made,
) -> io::Result<()> {
    let other_file = match connection.other {
        OtherEnd::File(other) => Some(other),
        OtherEnd::Closed => None,
        OtherEnd::Waiting => return Ok(()),
    };
    // The end of the lower number makes both.
    if made.contains_key(&file) || other_file.is_some_and(|other| other < file) {
        return made.contains_key(&file).then_some(()).ok_or_else(damaged);
    }
    let here = from_record(socket.local.as_ref().ok_or_else(damaged)?)?;
    let there = from_record(&connection.peer)?;
    if other_file == Some(file) {
        // Connected to itself.
        let here = moved(here, addresses);
        let new = prepared(socket, connection.unread.len(), Some(here))?;
        start(new.as_fd(), here)?;
        wait_until("a connection", || Ok(tcp::info(new.as_fd())?.state == ESTABLISHED))?;
        fill(new.as_fd(), new.as_fd(), &connection.unread)?;
        made.insert(file, new);
        return Ok(());
    }
    let other = match other_file {
        Some(other) => Some(*sockets.get(&other).ok_or_else(damaged)?),
        None => None,
    };
    let far = match other.map(|other| &other.state) {
        Some(InternetState::Connection(far)) if far.other == OtherEnd::File(file) => Some(far),
        Some(_) => return Err(damaged()),
        None => None,
    };
    let room = connection.unread.len()
        + connection.in_flight.len()
        + far.map_or(0, |far| far.unread.len() + far.in_flight.len());
    let (left, right) = match (other, far) {
        (Some(other), Some(far)) => {
            let address = from_record(other.local.as_ref().ok_or_else(damaged)?)?;
            let address = moved(address, addresses);
            let accepted = if was_given(other, address) { anywhere(address) } else { address };
            let listener = prepared(other, room, Some(accepted))?;
            let to = moved(from_record(&connection.peer)?, addresses);
            let here = moved(here, addresses);
            let near = prepared(socket, room, Some(before_connecting(socket, here, to)))?;
            let (left, right) = meet(near, to, &listener)?;
            drop(listener);
            fill(left.as_fd(), right.as_fd(), &far.unread)?;
            fill(right.as_fd(), left.as_fd(), &connection.unread)?;
            // From here on what does not fit stays with its sender.
            limit(left.as_fd(), &socket.options)?;
            limit(right.as_fd(), &other.options)?;
            send_all(left.as_fd(), &far.in_flight)?;
            send_all(right.as_fd(), &connection.in_flight)?;
            (left, Some((right, far)))
        }
        _ => {
            let (near, far) = match (addresses.find(here), addresses.find(there)) {
                (Some(here), Some(there)) if is_local(there, addresses) => (Some(here), there),
                _ => (None, loopback(socket.domain)),
            };
            let bound = near.map(|_| far);
            let listener = new_socket(socket.domain, socket.kind, 0)?;
            reuse(listener.as_fd())?;
            let bound = bound.unwrap_or_else(|| loopback(socket.domain));
            rustix::net::bind(&listener, &bound).map_err(|error| at(bound, error.into()))?;
            let to = local(listener.as_fd())?.unwrap_or(bound);
            let near = near.map(|here| before_connecting(socket, here, to));
            let (left, right) = meet(prepared(socket, room, near)?, to, &listener)?;
            fill(right.as_fd(), left.as_fd(), &connection.unread)?;
            drop(right);
            wait_until("the end of a connection", || {
                Ok(tcp::info(left.as_fd())?.state == CLOSE_WAIT)
            })?;
            (left, None)
        }
    };
    shut(left.as_fd(), connection)?;
    if let Some((right, far)) = right {
        shut(right.as_fd(), far)?;
        made.insert(other_file.ok_or_else(damaged)?, right);
    }
    made.insert(file, left);
    Ok(())
}

/// What a socket is bound to that will be connected to `to` from `here`. Left alone, the kernel chooses the same address on both
/// ends where there is one.
fn before_connecting(socket: &InternetSocket, here: SocketAddr, to: SocketAddr) -> SocketAddr {
    if was_given(socket, here) && here.ip() == to.ip() { anywhere(here) } else { here }
}

/// The loopback takes the place of an own address that the new container has not.
fn moved(address: SocketAddr, addresses: &Addresses) -> SocketAddr {
    addresses.find(address).unwrap_or_else(|| match address.ip().to_canonical() {
        IpAddr::V4(_) => with_ip(address, Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(_) => with_ip(address, Ipv6Addr::LOCALHOST.into()),
    })
}

fn is_local(address: SocketAddr, addresses: &Addresses) -> bool {
    addresses.find(address).is_some()
}

fn loopback(domain: i32) -> SocketAddr {
    if domain == libc::AF_INET6 {
        // Without IPv6 in the new container, IPv4 is still there.
        (Ipv4Addr::LOCALHOST.to_ipv6_mapped(), 0).into()
    } else {
        (Ipv4Addr::LOCALHOST, 0).into()
    }
}

/// Connects `near` to `listener`, which is bound to `to`, and returns both ends.
fn meet(near: OwnedFd, to: SocketAddr, listener: &OwnedFd) -> io::Result<(OwnedFd, OwnedFd)> {
    rustix::net::listen(listener, 1).map_err(|error| at(to, error.into()))?;
    start(near.as_fd(), to).map_err(|error| at(to, error))?;
    let mut far = None;
    wait_until("a connection", || match rustix::net::accept(listener) {
        Ok(accepted) => {
            far = Some(accepted);
            Ok(true)
        }
        Err(rustix::io::Errno::AGAIN) => Ok(false),
        Err(error) => Err(error.into()),
    })?;
    let far = far.ok_or_else(damaged)?;
    rustix::io::fcntl_setfd(&far, rustix::io::FdFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&far, true)?;
    Ok((near, far))
}

/// Begins to connect.
fn start(socket: BorrowedFd<'_>, to: SocketAddr) -> io::Result<()> {
    match rustix::net::connect(socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What is done between processes that stand still ends within milliseconds; more is a sign that it never will.
const WAIT_MAX: Duration = Duration::from_secs(10);

fn wait_until(what: &str, mut done: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let deadline = Instant::now() + WAIT_MAX;
    let mut pause = Duration::from_micros(20);
    while !done()? {
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{what} does not come")));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
    Ok(())
}

/// Sends `data` until the receiver has it.
fn fill(from: BorrowedFd<'_>, to: BorrowedFd<'_>, data: &[u8]) -> io::Result<()> {
    send_all(from, data)?;
    wait_until("data of a connection", || Ok(tcp::unread(to)? >= data.len()))
}

fn send_all(from: BorrowedFd<'_>, data: &[u8]) -> io::Result<()> {
    let mut rest = data;
    wait_until("room for data of a connection", || {
        while !rest.is_empty() {
            match rustix::net::send(from, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(rustix::io::Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    })
}

/// Gives a receiver its own buffer, so that it takes no more than before. The sender's follows when it has sent.
fn limit(socket: BorrowedFd<'_>, options: &SocketOptions) -> io::Result<()> {
    match socket_options::number(options, libc::SOL_SOCKET, libc::SO_RCVBUF) {
        Some(bytes) => {
            sockopt::set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(bytes / 2).to_le_bytes())
        }
        None => Ok(()),
    }
}

fn shut(socket: BorrowedFd<'_>, connection: &Connection) -> io::Result<()> {
    match (connection.read_shut, connection.write_shut) {
        (false, false) => {}
        (true, false) => rustix::net::shutdown(socket, Shutdown::Read)?,
        (false, true) => rustix::net::shutdown(socket, Shutdown::Write)?,
        (true, true) => rustix::net::shutdown(socket, Shutdown::Both)?,
    }
    Ok(())
}

/// A socket whose connection is no more: with what it can still read, and the error that it will get after that.
///
/// It tells the addresses that it had where the new container has both of them.
fn ended(
    socket: &InternetSocket,
    unread: &[u8],
    error: Option<i32>,
    peer: Option<&SocketAddress>,
    addresses: &Addresses,
) -> io::Result<OwnedFd> {
    let own = |address: Option<&SocketAddress>| -> io::Result<Option<SocketAddr>> {
        Ok(address.map(from_record).transpose()?.and_then(|address| addresses.find(address)))
    };
    if let (Some(here), Some(there)) = (own(socket.local.as_ref())?, own(peer)?) {
        match end(socket, unread, error, Some(here), there) {
            Ok(new) => return Ok(new),
            // An older kernel, or a port that somebody else has.
            Err(why) => tracing::debug!("a socket that was {here} does not tell so: {why}"),
        }
    }
    end(socket, unread, error, None, loopback(socket.domain))
}

/// Makes a connection between two addresses and ends it.
fn end(
    socket: &InternetSocket,
    unread: &[u8],
    error: Option<i32>,
    here: Option<SocketAddr>,
    there: SocketAddr,
) -> io::Result<OwnedFd> {
    let new = new_socket(socket.domain, socket.kind, socket.protocol)?;
    let listener = new_socket(socket.domain, socket.kind, 0)?;
    reuse(listener.as_fd())?;
    rustix::net::bind(&listener, &there)?;
    let to = local(listener.as_fd())?.ok_or_else(damaged)?;
    let freed = here.map(|here| choose(new.as_fd(), here)).transpose()?;
    let new = if error == Some(libc::ECONNREFUSED) {
        // Nobody listens at an address that is bound.
        refuse(new, to)?
    } else {
        end_with(new, to, &listener, unread)?
    };
    if let Some(freed) = freed {
        freed.put_back(new.as_fd())?;
    }
    // It has no port any more, so that it can even be told which families it is for, which binding it has changed.
    socket_options::prepare(new.as_fd(), &socket.options)?;
    if here.is_some_and(|here| local(new.as_fd()).ok().flatten() != Some(here)) {
        return Err(damaged());
    }
    if error.is_none() {
        // A connection that both sides have ended differs in nothing else, and leaves nothing behind when it is reset.
        sockopt::get(new.as_fd(), libc::SOL_SOCKET, libc::SO_ERROR, 4)?;
    }
    Ok(new)
}

/// Connects, receives, and is reset.
fn end_with(
    new: OwnedFd,
    to: SocketAddr,
    listener: &OwnedFd,
    unread: &[u8],
) -> io::Result<OwnedFd> {
    socket_options::make_room(&new, unread.len())?;
    socket_options::make_room(listener, unread.len())?;
    let (new, far) = meet(new, to, listener)?;
    fill(far.as_fd(), new.as_fd(), unread)?;
    // Closed in this way it sends a reset.
    let at_once = [1i32.to_le_bytes(), 0i32.to_le_bytes()].concat();
    sockopt::set(far.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &at_once)?;
    drop(far);
    wait_until("the end of a connection", || Ok(tcp::info(new.as_fd())?.state == CLOSE))?;
    Ok(new)
}

/// Options of a socket while it gets an address that it does not keep when its connection ends, as one that has bound it would.
#[derive(Debug)]
struct Chosen {
    without_port: Vec<u8>,
}

/// ip(7), since Linux 6.3: the lowest port in the low half, the highest in the other; 0 for what is usual.
const IP_LOCAL_PORT_RANGE: i32 = 51;

/// Has a socket connect from this address.
fn choose(socket: BorrowedFd<'_>, address: SocketAddr) -> io::Result<Chosen> {
    let option = libc::IP_BIND_ADDRESS_NO_PORT;
    let without_port = sockopt::get(socket, libc::SOL_IP, option, 4)?;
    sockopt::set(socket, libc::SOL_IP, option, &1i32.to_le_bytes())?;
    let port = u32::from(address.port());
    let range = port | port << 16;
    sockopt::set(socket, libc::SOL_IP, IP_LOCAL_PORT_RANGE, &range.to_le_bytes())?;
    rustix::net::bind(socket, &SocketAddr::new(address.ip(), 0))?;
    Ok(Chosen { without_port })
}

impl Chosen {
    fn put_back(self, socket: BorrowedFd<'_>) -> io::Result<()> {
        sockopt::set(socket, libc::SOL_IP, IP_LOCAL_PORT_RANGE, &0u32.to_le_bytes())?;
        let option = libc::IP_BIND_ADDRESS_NO_PORT;
        sockopt::set(socket, libc::SOL_IP, option, &self.without_port)
    }
}

/// Lets a socket try to connect where nobody listens, and keeps the error for the program.
fn refuse(socket: OwnedFd, to: SocketAddr) -> io::Result<OwnedFd> {
    start(socket.as_fd(), to)?;
    wait_until("a refusal", || Ok(tcp::info(socket.as_fd())?.state == CLOSE))?;
    Ok(socket)
}

/// A connection that nobody has accepted: made anew with the socket that listens, which lets it wait again.
fn wait_in_line(
    socket: &InternetSocket,
    connection: &Connection,
    addresses: &Addresses,
) -> io::Result<OwnedFd> {
    let address = socket.local.as_ref().map(from_record).transpose()?;
    let to = moved(from_record(&connection.peer)?, addresses);
    let here = address.map(|address| before_connecting(socket, moved(address, addresses), to));
    let new = prepared(socket, 0, here)?;
    start(new.as_fd(), to).map_err(|error| at(to, error))?;
    wait_until("a connection that waits to be accepted", || {
        Ok(tcp::info(new.as_fd())?.state == ESTABLISHED)
    })?;
    shut(new.as_fd(), connection)?;
    Ok(new)
}

/// A connection that was being made: begun anew. Where the new container has no way there, it is refused.
fn begin(socket: &InternetSocket, to: SocketAddr) -> io::Result<OwnedFd> {
    let new = new_socket(socket.domain, socket.kind, socket.protocol)?;
    socket_options::prepare(new.as_fd(), &socket.options)?;
    if start(new.as_fd(), to).is_ok() {
        return Ok(new);
    }
    let spare = new_socket(socket.domain, socket.kind, 0)?;
    rustix::net::bind(&spare, &loopback(socket.domain))?;
    let to = local(spare.as_fd())?.ok_or_else(damaged)?;
    refuse(new_socket(socket.domain, socket.kind, socket.protocol)?, to)
}
