//! UDP, ping and raw sockets: addresses, multicast groups, and datagrams that nobody has read.
//!
//! Datagrams are put back by sending them again with the addresses that they had, as raw packets over the loopback.
//!
//! Limits: an error that nobody has fetched is lost, as its datagram is; an empty datagram is lost that a save has already seen
//! while the container stayed, because the kernel passes over it; a multicast interface that was set by number only
//! (`IP_MULTICAST_IF`) is not told by the kernel.
//!
//! What this module does not do: datagrams in ping and raw sockets, of which the kernel shows the first only; corked datagrams.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, Shutdown};
use samara_capsule::record::{
    Bytes, Datagram, Datagrams, FileKind, InternetSocket, InternetState, Membership,
};
use samara_kernel::{Pid, sock_diag, sockopt};

use crate::capture::{CaptureError, Tables, read};
use crate::descriptors::Found;
use crate::internet::{
    Addresses, Made, anywhere, at, bind, from_record, ip, ip_bytes, local, new_socket, peer,
    to_record, was_given,
};
use crate::socket_options;

/// Datagrams that an IPv4 packet and one of IPv6 over the loopback can carry whole.
const DATAGRAM_BYTES_MAX: usize = 65_487;
/// `UDP_CORK` of linux/udp.h.
const UDP_CORK: i32 = 1;

/// Whether a protocol's datagram sockets are kept.
pub(crate) fn is_kept(protocol: i32) -> bool {
    [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE, libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6]
        .contains(&protocol)
}

/// Describes a socket, or says why it can't be saved.
pub(crate) fn note(
    found: &Found<'_>,
    socket: BorrowedFd<'_>,
    (domain, kind, protocol): (i32, i32, i32),
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let what = || read(found.link);
    let options = socket_options::capture(socket, found.metadata, socket_options::INTERNET);
    let options = match options.map_err(what())? {
        Ok(options) => options,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let is_udp = protocol == libc::IPPROTO_UDP && kind == libc::SOCK_DGRAM;
    let corked = is_udp
        && sockopt::get(socket, libc::SOL_UDP, UDP_CORK, 4)
            .map_err(what())?
            .iter()
            .any(|byte| *byte != 0);
    if corked {
        return Ok(Err("a corked UDP socket (UDP_CORK) is not supported".to_owned()));
    }
    let mut local = local(socket).map_err(what())?;
    if kind == libc::SOCK_RAW {
        // The number of a raw socket is its protocol.
        local = local
            .filter(|address| !address.ip().is_unspecified())
            .map(|address| SocketAddr::new(address.ip(), 0));
    }
    let peer = match peer(socket).map_err(what())? {
        None if !is_udp => connected_to(found, domain, kind, tables.request.init),
        peer => peer,
    };
    let events = events(socket).map_err(what())?;
    let mut datagrams = Vec::new();
    if events.contains(PollFlags::IN) && !events.contains(PollFlags::RDHUP) {
        if !is_udp {
            return Ok(Err("unread packets in a raw or ping socket are not supported".to_owned()));
        }
        // Reading would take the error away.
        if events.contains(PollFlags::ERR) {
            return Ok(Err(
                "an error that nobody has fetched from a UDP socket with data is not supported"
                    .to_owned(),
            ));
        }
        match queue(socket).map_err(what())? {
            Ok(_) if local.is_some_and(|address| address.ip().is_multicast()) => {
                return Ok(Err(
                    "unread datagrams in a socket that is bound to a multicast group are not supported"
                        .to_owned(),
                ));
            }
            Ok(queue) => datagrams = queue,
            Err(refusal) => return Ok(Err(refusal)),
        }
    }
    let groups = match tables.groups.take() {
        Some(groups) => groups,
        None => {
            Group::all(tables.request.init).map_err(read("the container's multicast groups"))?
        }
    };
    let memberships = memberships(socket, domain, &groups);
    tables.groups = Some(groups);
    // What is shut for writing only shows nowhere else.
    let init = tables.request.init;
    let shutdowns = tables
        .shutdowns
        .get_or_insert_with(|| sock_diag::datagram_shutdowns(init).unwrap_or_default());
    let told = u32::try_from(found.identity().1).ok().and_then(|inode| shutdowns.get(&inode));
    let write_shut = told.is_some_and(|bits| bits & sock_diag::SHUT_FOR_SENDING != 0);
    Ok(Ok(FileKind::Internet(Box::new(InternetSocket {
        domain,
        kind,
        protocol,
        options,
        local: local.map(to_record),
        memberships: memberships.map_err(what())?,
        state: InternetState::Datagrams(Box::new(Datagrams {
            peer: peer.map(to_record),
            queue: datagrams,
            read_shut: events.contains(PollFlags::RDHUP),
            write_shut: write_shut || events.contains(PollFlags::HUP),
        })),
    }))))
}

/// What a raw or ping socket is connected to: `getpeername` tells it only with a port, which such addresses rarely have.
fn connected_to(found: &Found<'_>, domain: i32, kind: i32, init: Pid) -> Option<SocketAddr> {
    let table = match (domain, kind) {
        (libc::AF_INET, libc::SOCK_RAW) => "raw",
        (libc::AF_INET, _) => "icmp",
        (_, libc::SOCK_RAW) => "raw6",
        (_, _) => "icmp6",
    };
    let text = fs::read_to_string(format!("/proc/{init}/net/{table}")).ok()?;
    let inode = found.identity().1.to_string();
    let mut rows = text.lines().skip(1).map(|line| line.split_ascii_whitespace());
    let mut row = rows.find(|row| row.clone().nth(9) == Some(&inode))?;
    let (ip, port) = row.nth(2)?.split_once(':')?;
    let address = SocketAddr::new(parse_ip(ip)?, u16::from_str_radix(port, 16).ok()?);
    (!address.ip().is_unspecified()).then_some(address)
}

/// Words of 32 bits in hexadecimal, as this architecture reads them from an address.
fn parse_ip(text: &str) -> Option<IpAddr> {
    let mut bytes = Vec::with_capacity(16);
    for word in text.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_le_bytes());
    }
    ip(&bytes).ok()
}

fn events(socket: BorrowedFd<'_>) -> io::Result<PollFlags> {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN | PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(fds.iter().fold(PollFlags::empty(), |events, fd| events | fd.revents()))
}

/// Copies the datagrams that a UDP socket will receive, without taking them.
fn queue(socket: BorrowedFd<'_>) -> io::Result<Result<Vec<Datagram>, String>> {
    let offset = |value: &[u8]| sockopt::set(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, value);
    let before = sockopt::get(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 4)?;
    let look_at_all = || {
        let mut queue = Vec::new();
        // A look from an offset passes over an empty datagram that has been looked at before, as the first one may have been by
        // the program. A look without one does not.
        offset(&(-1i32).to_le_bytes())?;
        if let Some(Ok(first)) = look(socket)?
            && first.data.is_empty()
        {
            queue.push(first);
        }
        // Each look moves on by a datagram.
        offset(&0i32.to_le_bytes())?;
        loop {
            match look(socket)? {
                Some(Ok(datagram)) => queue.push(datagram),
                Some(Err(refusal)) => return Ok(Err(refusal)),
                None => return Ok(Ok(queue)),
            }
        }
    };
    let result = look_at_all();
    offset(&before)?;
    result
}

fn look(socket: BorrowedFd<'_>) -> io::Result<Option<Result<Datagram, String>>> {
    let mut buffer = vec![0u8; 1 << 16];
    let mut control = vec![0u8; 1024];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
    let mut vector = [IoSliceMut::new(&mut buffer)];
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut vector, Some(&mut control), flags);
    let message = match message {
        Ok(message) => message,
        Err(Errno::EAGAIN) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let Some(source) = message.address.as_ref().and_then(socket_address) else {
        return Err(io::Error::other("a datagram without a source"));
    };
    let (mut destination, mut hops, mut class) = (None, None, None);
    for part in message.cmsgs()? {
        let byte = |number: i32| u8::try_from(number).ok();
        match part {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                destination = Some(IpAddr::from(info.ipi_addr.s_addr.to_le_bytes()));
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                destination = Some(IpAddr::from(info.ipi6_addr.s6_addr));
            }
            ControlMessageOwned::Ipv4Ttl(number) | ControlMessageOwned::Ipv6HopLimit(number) => {
                hops = byte(number);
            }
            ControlMessageOwned::Ipv4Tos(tos) => class = Some(tos),
            ControlMessageOwned::Ipv6TClass(number) => class = byte(number),
            ControlMessageOwned::UdpGroSegments(_) => {
                return Ok(Some(Err(
                    "datagrams that were received as one (UDP_GRO) are not supported".to_owned(),
                )));
            }
            _ => {}
        }
    }
    let bytes = message.bytes;
    if bytes > DATAGRAM_BYTES_MAX && source.is_ipv6() {
        return Ok(Some(Err(format!("an unread datagram of {bytes} bytes is not supported"))));
    }
    buffer.truncate(bytes);
    Ok(Some(Ok(Datagram {
        source: to_record(source),
        destination: destination.map(|ip| ip_bytes(ip.to_canonical())),
        hops,
        class,
        data: Bytes::from(buffer),
    })))
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddrV4::from(*v4).into());
    }
    address.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into())
}

/// A multicast group that an interface has joined, for whatever socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    index: u32,
    interface: String,
    ip: IpAddr,
}

impl Group {
    fn all(init: Pid) -> io::Result<Vec<Group>> {
        let table = |name| match fs::read_to_string(format!("/proc/{init}/net/{name}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            text => text,
        };
        let mut groups = Group::parse_v4(&table("igmp")?);
        groups.extend(table("igmp6")?.lines().filter_map(Group::parse_v6));
        Ok(groups)
    }

    /// A line an interface, and indented below it one a group, that begins with its address: `010000E0`.
    fn parse_v4(text: &str) -> Vec<Group> {
        let mut groups = Vec::new();
        let mut interface = None;
        for line in text.lines().skip(1) {
            let mut words = line.split_ascii_whitespace();
            if line.starts_with(char::is_whitespace) {
                let number = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
                if let (Some(number), Some((index, name))) = (number, &interface) {
                    let (index, interface) = (*index, String::clone(name));
                    // Printed as a number of this architecture, which holds the bytes in the order of the network.
                    let ip = Ipv4Addr::from(number.to_le_bytes()).into();
                    groups.push(Group { index, interface, ip });
                }
            } else {
                let index = words.next().and_then(|word| word.parse().ok());
                let name = words.next().map(|name| name.trim_end_matches(':').to_owned());
                interface = index.zip(name);
            }
        }
        groups
    }

    /// `1    lo              ff020000000000000000000000000001     1 0000000C 0`
    fn parse_v6(line: &str) -> Option<Group> {
        let mut words = line.split_ascii_whitespace();
        let index = words.next()?.parse().ok()?;
        let interface = words.next()?.to_owned();
        let ip = u128::from_str_radix(words.next()?, 16).ok()?;
        Some(Group { index, interface, ip: Ipv6Addr::from(ip).into() })
    }
}

/// `MCAST_` options of linux/in.h.
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_BLOCK_SOURCE: i32 = 43;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;
const MCAST_MSFILTER: i32 = 48;
const MCAST_EXCLUDE: u32 = 0;
/// `sizeof(struct sockaddr_storage)`.
const STORAGE_BYTES: usize = 128;
/// More than a socket may have by `igmp_max_msf` and `mld_max_msf`, unless root has raised them.
const SOURCES_MAX: usize = 256;

/// Which of the groups a socket has joined: the kernel tells for a group only, not which ones.
fn memberships(
    socket: BorrowedFd<'_>,
    domain: i32,
    groups: &[Group],
) -> io::Result<Vec<Membership>> {
    let mut memberships = Vec::new();
    for group in groups {
        let level = match group.ip {
            IpAddr::V4(_) => libc::SOL_IP,
            IpAddr::V6(_) if domain == libc::AF_INET6 => libc::SOL_IPV6,
            IpAddr::V6(_) => continue,
        };
        // `struct group_filter`: interface, group, mode, number of sources, sources.
        let mut filter = [group.index.to_le_bytes(), [0; 4]].concat();
        filter.extend(storage(group.ip));
        filter.extend([0; 4]);
        filter.extend(u32::try_from(SOURCES_MAX).expect("a small number").to_le_bytes());
        let header = filter.len();
        filter.resize(header + SOURCES_MAX * STORAGE_BYTES, 0);
        match sockopt::get_into(socket, level, MCAST_MSFILTER, &mut filter) {
            Ok(_) => {}
            Err(error)
                if [Some(libc::EADDRNOTAVAIL), Some(libc::ENOPROTOOPT), Some(libc::EINVAL)]
                    .contains(&error.raw_os_error()) =>
            {
                continue;
            }
            Err(error) => return Err(error),
        }
        let word = |at: usize| {
            let word = filter.get(at..at + 4).and_then(|word| word.try_into().ok());
            word.map_or(0, u32::from_le_bytes)
        };
        let count = word(header - 4) as usize;
        if count > SOURCES_MAX {
            return Err(io::Error::other("a multicast group with more sources than can be kept"));
        }
        let sources = filter
            .get(header..)
            .unwrap_or_default()
            .chunks_exact(STORAGE_BYTES)
            .take(count)
            .filter_map(|source| match group.ip {
                IpAddr::V4(_) => source.get(4..8),
                IpAddr::V6(_) => source.get(8..24),
            })
            .map(|source| Bytes::from(source.to_vec()))
            .collect();
        memberships.push(Membership {
            group: ip_bytes(group.ip),
            interface: Bytes::from(group.interface.clone().into_bytes()),
            exclude: word(header - 8) == MCAST_EXCLUDE,
            sources,
        });
    }
    Ok(memberships)
}

/// `struct sockaddr_storage` with an address without a port.
fn storage(ip: IpAddr) -> Vec<u8> {
    let mut bytes = match ip {
        IpAddr::V4(v4) => {
            let family = u16::try_from(libc::AF_INET).expect("a small number");
            [&family.to_le_bytes()[..], &[0; 2], &v4.octets()].concat()
        }
        IpAddr::V6(v6) => {
            let family = u16::try_from(libc::AF_INET6).expect("a small number");
            [&family.to_le_bytes()[..], &[0; 6], &v6.octets()].concat()
        }
    };
    bytes.resize(STORAGE_BYTES, 0);
    bytes
}

fn join(socket: BorrowedFd<'_>, membership: &Membership) -> io::Result<()> {
    let group = ip(&membership.group)?;
    let level = if group.is_ipv4() { libc::SOL_IP } else { libc::SOL_IPV6 };
    let name = String::from_utf8_lossy(&membership.interface).into_owned();
    let index = nix::net::if_::if_nametoindex(name.as_str()).map_err(|error| {
        let kind = io::Error::from(error).kind();
        io::Error::new(kind, format!("the interface {name} of a multicast group: {error}"))
    })?;
    // `struct group_req`, which `struct group_source_req` begins with.
    let request = [&index.to_le_bytes()[..], &[0; 4], &storage(group)].concat();
    if membership.exclude {
        sockopt::set(socket, level, MCAST_JOIN_GROUP, &request)?;
    }
    for source in &membership.sources {
        let option = if membership.exclude { MCAST_BLOCK_SOURCE } else { MCAST_JOIN_SOURCE_GROUP };
        let request = [&request[..], &storage(ip(source)?)].concat();
        sockopt::set(socket, level, option, &request)?;
    }
    Ok(())
}

/// Makes all sockets but those of TCP again.
pub(crate) fn restore(
    sockets: &[(u32, &InternetSocket)],
    addresses: &Addresses,
    made: &mut Made,
) -> io::Result<()> {
    let mut raw = RawSockets::default();
    for (file, socket) in sockets {
        let InternetState::Datagrams(state) = &socket.state else { continue };
        let shared = sockets.iter().any(|(other, record)| {
            let port = |socket: &InternetSocket| socket.local.as_ref().map(|local| local.port);
            other != file && record.protocol == socket.protocol && port(record) == port(socket)
        });
        let new = make(socket, state, shared, addresses, &mut raw)?;
        made.insert(*file, new);
    }
    Ok(())
}

/// Binds a socket and connects it to its peer.
fn place(
    socket: &InternetSocket,
    state: &Datagrams,
    shared: bool,
    addresses: &Addresses,
) -> io::Result<OwnedFd> {
    let placed = |port_alone: bool| -> io::Result<OwnedFd> {
        let new = permitted(socket)?;
        socket_options::prepare(new.as_fd(), &socket.options)?;
        if shared {
            reuse(new.as_fd(), 1)?;
        }
        if let Some(address) = &socket.local {
            let address = from_record(address)?;
            let address = if port_alone { anywhere(address) } else { address };
            bind(new.as_fd(), address, addresses)?;
        }
        if let Some(peer) = &state.peer {
            let peer = addresses.follow(from_record(peer)?);
            // Without a way there, sending fails, as it does in any container without a network.
            if let Err(error) = rustix::net::connect(&new, &peer) {
                tracing::warn!("a datagram socket is not connected to {peer} any more: {error}");
            }
        }
        Ok(new)
    };
    if let Some(address) = &socket.local
        && state.peer.is_some()
        && let address = from_record(address)?
        && was_given(socket, address)
    {
        let new = placed(true)?;
        if local(new.as_fd())? == Some(addresses.follow(address)) {
            return Ok(new);
        }
    }
    placed(false)
}

fn reuse(socket: BorrowedFd<'_>, value: i32) -> io::Result<()> {
    sockopt::set(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, &value.to_le_bytes())
}

fn make(
    socket: &InternetSocket,
    state: &Datagrams,
    shared: bool,
    addresses: &Addresses,
    raw: &mut RawSockets,
) -> io::Result<OwnedFd> {
    let new = place(socket, state, shared, addresses)?;
    for membership in &socket.memberships {
        join(new.as_fd(), membership)?;
    }
    if let Some(address) = local(new.as_fd())?
        && !state.queue.is_empty()
    {
        let option = socket_options::SO_BINDTOIFINDEX;
        let device = sockopt::get(new.as_fd(), libc::SOL_SOCKET, option, 4)?;
        let to_device = |number: &[u8]| sockopt::set(new.as_fd(), libc::SOL_SOCKET, option, number);
        let is_bound = device.iter().any(|byte| *byte != 0);
        if is_bound {
            to_device(&0i32.to_le_bytes())?;
        }
        let chosen = shared && state.peer.is_none();
        refill(new.as_fd(), address, &state.queue, chosen, addresses, raw)?;
        if is_bound {
            to_device(&device)?;
        }
    }
    let shut = match (state.read_shut, state.write_shut) {
        (false, false) => Ok(()),
        (true, false) => rustix::net::shutdown(&new, Shutdown::Read),
        (false, true) => rustix::net::shutdown(&new, Shutdown::Write),
        (true, true) => rustix::net::shutdown(&new, Shutdown::Both),
    };
    // A socket that is not connected is shut, and then called not connected.
    if let Err(error) = shut
        && error != rustix::io::Errno::NOTCONN
    {
        return Err(error.into());
    }
    if shared {
        let options = &socket.options;
        let was = socket_options::number(options, libc::SOL_SOCKET, libc::SO_REUSEADDR);
        reuse(new.as_fd(), was.unwrap_or(0))?;
    }
    set_multicast_interface(new.as_fd(), socket, addresses)?;
    socket_options::finish(new.as_fd(), &socket.options)?;
    Ok(new)
}

/// A new socket, also of pings where the new container lets none of its groups have some.
fn permitted(socket: &InternetSocket) -> io::Result<OwnedFd> {
    const RANGE: &str = "/proc/sys/net/ipv4/ping_group_range";
    let InternetSocket { domain, kind, protocol, .. } = *socket;
    let is_ping =
        kind == libc::SOCK_DGRAM && [libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6].contains(&protocol);
    match new_socket(domain, kind, protocol) {
        Err(error) if is_ping && error.kind() == io::ErrorKind::PermissionDenied => {
            let before = fs::read_to_string(RANGE)?;
            fs::write(RANGE, "0 0")?;
            let made = new_socket(domain, kind, protocol);
            fs::write(RANGE, before)?;
            made
        }
        other => other,
    }
}

/// The interface is told by its address.
fn set_multicast_interface(
    socket: BorrowedFd<'_>,
    record: &InternetSocket,
    addresses: &Addresses,
) -> io::Result<()> {
    let number = socket_options::number(&record.options, libc::SOL_IP, libc::IP_MULTICAST_IF);
    let Some(number) = number.filter(|number| *number != 0) else { return Ok(()) };
    let address = SocketAddr::from((Ipv4Addr::from(number.to_le_bytes()), 0));
    match addresses.follow(address).ip() {
        IpAddr::V4(v4) => sockopt::set(socket, libc::SOL_IP, libc::IP_MULTICAST_IF, &v4.octets())
            .map_err(|error| at(address, error)),
        IpAddr::V6(_) => Ok(()),
    }
}

/// Sends a socket what was in its queue. `chosen`: others have the same port, so it is connected to each source in turn, which
/// makes the kernel choose it.
fn refill(
    socket: BorrowedFd<'_>,
    address: SocketAddr,
    queue: &[Datagram],
    chosen: bool,
    addresses: &Addresses,
    raw: &mut RawSockets,
) -> io::Result<()> {
    /// The loopback delivers within microseconds.
    const ARRIVAL_MAX: Duration = Duration::from_secs(10);
    let bytes = queue.iter().map(|datagram| datagram.data.len() + 4096).sum();
    socket_options::make_room(socket, bytes)?;
    for datagram in queue {
        let source = from_record(&datagram.source)?;
        if chosen {
            rustix::net::connect(socket, &source).map_err(|error| at(source, error.into()))?;
        }
        let is_v4 = source.ip().to_canonical().is_ipv4();
        let own = address.ip().to_canonical();
        let told = datagram.destination.as_deref().map(|bytes| ip(bytes)).transpose()?;
        let told = told
            .map(|ip| addresses.follow(SocketAddr::new(ip, 0)).ip())
            .filter(|ip| addresses.find(SocketAddr::new(*ip, 0)).is_some() && !ip.is_multicast());
        let destination = match (own.is_unspecified(), told) {
            (false, _) => own,
            (true, Some(told)) if told.is_ipv4() == is_v4 => told,
            (true, _) if is_v4 => Ipv4Addr::LOCALHOST.into(),
            (true, _) => Ipv6Addr::LOCALHOST.into(),
        };
        let to = SocketAddr::new(destination, address.port());
        let before = received_bytes(socket)?;
        raw.send(source, to, datagram)?;
        let deadline = Instant::now() + ARRIVAL_MAX;
        // Not by looking at the datagram: an empty one that was looked at is passed over by the next look.
        while received_bytes(socket)? == before {
            if Instant::now() > deadline {
                return Err(at(address, io::Error::other("its datagrams did not arrive")));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    if chosen {
        rustix::net::connect_unspec(socket)?;
    }
    Ok(())
}

/// Bytes of memory that what a socket has received takes.
fn received_bytes(socket: BorrowedFd<'_>) -> io::Result<u32> {
    /// `SO_MEMINFO`, whose first number is `SK_MEMINFO_RMEM_ALLOC`.
    const SO_MEMINFO: i32 = 55;
    let numbers = sockopt::get(socket, libc::SOL_SOCKET, SO_MEMINFO, 36)?;
    let first = numbers.get(..4).and_then(|number| number.try_into().ok());
    Ok(first.map_or(0, u32::from_le_bytes))
}

/// Sockets that send packets with headers of the engine's making, by family.
#[derive(Debug, Default)]
struct RawSockets(BTreeMap<i32, OwnedFd>);

impl RawSockets {
    fn send(&mut self, from: SocketAddr, to: SocketAddr, datagram: &Datagram) -> io::Result<()> {
        let packet = packet(from, to, datagram)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a datagram is damaged"))?;
        let domain = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let socket = match self.0.remove(&domain) {
            Some(socket) => socket,
            None => new_socket(domain, libc::SOCK_RAW, libc::IPPROTO_RAW)?,
        };
        socket_options::make_room(&socket, packet.len())?;
        let address = SocketAddr::new(to.ip(), 0);
        let sent = rustix::net::sendto(&socket, &packet, SendFlags::DONTWAIT, &address);
        self.0.insert(domain, socket);
        sent.map(drop).map_err(|error| at(to, error.into()))
    }
}

/// A packet with its UDP and IP headers. The kernel completes that of IPv4.
fn packet(from: SocketAddr, to: SocketAddr, datagram: &Datagram) -> Option<Vec<u8>> {
    const UDP: u8 = 17;
    const HOPS: u8 = 64;
    let length = u16::try_from(datagram.data.len().checked_add(8)?).ok()?;
    let hops = datagram.hops.unwrap_or(HOPS);
    let class = datagram.class.unwrap_or(0);
    let mut udp = Vec::with_capacity(usize::from(length));
    for word in [from.port(), to.port(), length, 0] {
        udp.extend(word.to_be_bytes());
    }
    udp.extend_from_slice(&datagram.data);
    let mut packet = Vec::new();
    match (from.ip().to_canonical(), to.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            // Version and header length, class, length, number, offset, hops, protocol, checksum. Without a checksum of UDP.
            packet.extend([0x45, class, 0, 0, 0, 0, 0, 0, hops, UDP, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend([0x60 | class >> 4, class << 4, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([UDP, hops]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            let sum = checksum(&from, &to, length, &udp);
            udp.get_mut(6..8)?.copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    }
    packet.extend(udp);
    Some(packet)
}

/// The checksum of UDP over IPv6 (RFC 8200, 8.1).
fn checksum(from: &Ipv6Addr, to: &Ipv6Addr, length: u16, udp: &[u8]) -> u16 {
    let mut sum = u32::from(length) + 17;
    for bytes in [&from.octets()[..], &to.octets(), udp] {
        for pair in bytes.chunks(2) {
            let high = pair.first().copied().unwrap_or(0);
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([high, low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = u16::try_from(sum).expect("was folded to 16 bits");
    // Zero would say that there is none.
    if sum == 0xffff { 0xffff } else { !sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A raw socket that is not connected again has nowhere to send to.
    #[test]
    fn addresses_are_read_as_the_kernel_writes_them() {
        let v6 = "B80D0120000000000000000001000000";
        for (text, ip) in [("0100007F", "127.0.0.1"), (v6, "2001:db8::1")] {
            assert_eq!(parse_ip(text), ip.parse().ok(), "{text}");
        }
        assert_eq!(parse_ip("7F0000010"), None);
    }

    /// A group that is not found is not joined again, and its packets never come.
    #[test]
    fn groups_are_read_as_the_kernel_writes_them() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     1      V3\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n\
                    7\teth0      :     2      V3\n\
                    \t\t\t\tFB0000E0     1 0:00000000\t\t0\n";
        let group = |index, interface: &str, ip: &str| Group {
            index,
            interface: interface.to_owned(),
            ip: ip.parse().expect("an ip"),
        };
        assert_eq!(
            Group::parse_v4(text),
            [group(1, "lo", "224.0.0.1"), group(7, "eth0", "224.0.0.251")]
        );
        let line = "2    eth0            ff0200000000000000000000000000fb     1 00000004 0";
        assert_eq!(Group::parse_v6(line), Some(group(2, "eth0", "ff02::fb")));
    }
}
