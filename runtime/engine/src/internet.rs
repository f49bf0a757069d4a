//! Sockets of the internet: what TCP, UDP, ping and raw sockets have in common.
//!
//! A socket that is bound to every address, or to the loopback, is bound so again. One that is bound to an address of the old
//! container goes to the address that the new one has in its place, on the interface of the same name.
//!
//! What this module does not do: multipath TCP beyond listening, SCTP and other protocols. They are refused.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};
use samara_capsule::record::{Bytes, Container, FileKind, InternetSocket, SocketAddress};
use samara_kernel::Pid;
use samara_kernel::setns::{Namespace, Visitor, inside};
use samara_kernel::sock_diag::int_option;
use samara_kernel::sockopt;

use crate::capture::{CaptureError, Tables, read};
use crate::descriptors::Found;
use crate::restore::{RestoreError, make};
use crate::{datagrams, descriptors, netlink, packets, socket_options, tcp};

pub(crate) const TCP: i32 = libc::IPPROTO_TCP;
pub(crate) const MPTCP: i32 = 262;

/// Describes a socket of any family but unix, or says why it can't be saved.
pub(crate) fn note(
    found: &Found<'_>,
    socket: BorrowedFd<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let option =
        |name| int_option(socket.as_raw_fd(), libc::SOL_SOCKET, name).map_err(read(found.link));
    let (domain, kind) = (option(libc::SO_DOMAIN)?, option(libc::SO_TYPE)?);
    let protocol = option(libc::SO_PROTOCOL)?;
    if !is_inside(socket, tables)? {
        return Ok(Err(
            "a socket from outside the container's network namespace is not supported".to_owned()
        ));
    }
    match (domain, kind, protocol) {
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, TCP | MPTCP) => {
            tcp::note(found, socket, (domain, protocol), tables)
        }
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, _) if datagrams::is_kept(protocol) => {
            datagrams::note(found, socket, (domain, kind, protocol), tables)
        }
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_RAW, _) => {
            datagrams::note(found, socket, (domain, kind, protocol), tables)
        }
        (libc::AF_NETLINK, _, _) => netlink::note(found, socket, (kind, protocol)),
        (libc::AF_PACKET, _, _) => packets::note(found, socket, kind, tables.request.init),
        _ => Ok(Err(format!("{} is not supported", family(domain, protocol)))),
    }
}

/// What a user calls a socket that is not kept.
fn family(domain: i32, protocol: i32) -> String {
    let name = match (domain, protocol) {
        (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_SCTP) => "an SCTP socket",
        (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_DCCP) => "a DCCP socket",
        (libc::AF_INET | libc::AF_INET6, _) => {
            return format!("an internet socket of protocol {protocol}");
        }
        (libc::AF_ALG, _) => "a cryptographic socket (AF_ALG)",
        (libc::AF_VSOCK, _) => "a socket to the host of a virtual machine (AF_VSOCK)",
        (libc::AF_XDP, _) => "an express data path socket (AF_XDP)",
        (libc::AF_KEY, _) => "a key management socket (AF_KEY)",
        (libc::AF_CAN, _) => "a CAN socket",
        (libc::AF_BLUETOOTH, _) => "a Bluetooth socket",
        (libc::AF_TIPC, _) => "a TIPC socket",
        (libc::AF_RDS, _) => "an RDS socket",
        _ => return format!("a socket of family {domain}"),
    };
    name.to_owned()
}

/// Whether a socket belongs to the container's network namespace.
fn is_inside(socket: BorrowedFd<'_>, tables: &mut Tables<'_>) -> Result<bool, CaptureError> {
    let cookie =
        |socket: BorrowedFd<'_>| sockopt::get(socket, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, 8);
    let what = || read("the container's network namespace");
    let wanted = match tables.network.take() {
        Some(cookie) => cookie,
        None => inside(tables.request.init, Namespace::Network, || {
            cookie(new_socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?.as_fd())
        })
        .map_err(what())?,
    };
    let same = cookie(socket).map_err(what())? == wanted;
    tables.network = Some(wanted);
    Ok(same)
}

/// A new socket of the calling thread's network namespace, which does not make its caller wait.
pub(crate) fn new_socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidData);
    let family = AddressFamily::from_raw(u16::try_from(domain).map_err(invalid)?);
    let kind = SocketType::from_raw(u32::try_from(kind).map_err(invalid)?);
    let protocol =
        NonZeroU32::new(u32::try_from(protocol).map_err(invalid)?).map(Protocol::from_raw);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, kind, flags, protocol)?)
}

/// Where a socket is bound; none where it is not.
pub(crate) fn local(socket: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
    let address = SocketAddr::try_from(rustix::net::getsockname(socket)?)?;
    Ok((address.port() != 0 || !address.ip().is_unspecified()).then_some(address))
}

/// What a socket is connected to.
pub(crate) fn peer(socket: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
    match rustix::net::getpeername(socket) {
        Ok(Some(address)) => Ok(Some(SocketAddr::try_from(address)?)),
        Ok(None) | Err(rustix::io::Errno::NOTCONN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What a socket was connected to, also if the connection has ended: `getpeername` tells only of one that lives.
pub(crate) fn last_peer(socket: BorrowedFd<'_>, domain: i32) -> io::Result<Option<SocketAddr>> {
    const SO_PEERNAME: i32 = 28;
    // The kernel takes room for more than there is for a mistake.
    let bytes = match domain {
        libc::AF_INET6 => size_of::<libc::sockaddr_in6>(),
        _ => size_of::<libc::sockaddr_in>(),
    };
    match sockopt::get(socket, libc::SOL_SOCKET, SO_PEERNAME, bytes) {
        Ok(bytes) => socket_address(&bytes).map(Some).ok_or(io::ErrorKind::InvalidData.into()),
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a `struct sockaddr_in` or `sockaddr_in6` (`ip(7)`, `ipv6(7)`).
fn socket_address(bytes: &[u8]) -> Option<SocketAddr> {
    let (family, rest) = bytes.split_first_chunk::<2>()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let port = u16::from_be_bytes(*port);
    match i32::from(u16::from_le_bytes(*family)) {
        libc::AF_INET => {
            let ip = rest.first_chunk::<4>()?;
            Some((Ipv4Addr::from(*ip), port).into())
        }
        libc::AF_INET6 => {
            let (flow, rest) = rest.split_first_chunk::<4>()?;
            let (ip, rest) = rest.split_first_chunk::<16>()?;
            let scope = u32::from_le_bytes(*rest.first_chunk::<4>()?);
            let flow = u32::from_be_bytes(*flow);
            Some(SocketAddrV6::new(Ipv6Addr::from(*ip), port, flow, scope).into())
        }
        _ => None,
    }
}

pub(crate) fn to_record(address: SocketAddr) -> SocketAddress {
    let (flow, scope) = match address {
        SocketAddr::V4(_) => (0, 0),
        SocketAddr::V6(v6) => (v6.flowinfo(), v6.scope_id()),
    };
    SocketAddress { ip: ip_bytes(address.ip()), port: address.port(), flow, scope }
}

pub(crate) fn from_record(record: &SocketAddress) -> io::Result<SocketAddr> {
    Ok(match ip(&record.ip)? {
        IpAddr::V4(v4) => SocketAddr::from((v4, record.port)),
        IpAddr::V6(v6) => SocketAddrV6::new(v6, record.port, record.flow, record.scope).into(),
    })
}

pub(crate) fn ip_bytes(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(v4) => Bytes::from(v4.octets().to_vec()),
        IpAddr::V6(v6) => Bytes::from(v6.octets().to_vec()),
    }
}

pub(crate) fn ip(bytes: &[u8]) -> io::Result<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Ipv6Addr::from(v6).into())
}

/// An address as IPv4 where it is one of IPv4 in the clothes of IPv6.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The addresses of a network namespace's interfaces.
pub(crate) fn interfaces(init: Pid) -> io::Result<Visitor<Vec<(Bytes, Bytes)>>> {
    let look = |()| {
        let all = own_interfaces()?.into_iter();
        Ok(all.map(|(name, ip)| (Bytes::from(name.into_bytes()), ip_bytes(ip))).collect())
    };
    Visitor::send(init, Namespace::Network, || Ok(()), look)
}

fn own_interfaces() -> io::Result<Vec<(String, IpAddr)>> {
    let mut all = Vec::new();
    for interface in nix::ifaddrs::getifaddrs()? {
        let Some(address) = interface.address else { continue };
        if let Some(v4) = address.as_sockaddr_in() {
            all.push((interface.interface_name, v4.ip().into()));
        } else if let Some(v6) = address.as_sockaddr_in6() {
            all.push((interface.interface_name, v6.ip().into()));
        }
    }
    Ok(all)
}

/// Which address of the new container stands for one of the old.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    here: BTreeSet<IpAddr>,
    moved: BTreeMap<IpAddr, IpAddr>,
}

impl Addresses {
    /// Compares those that were saved with those of the calling thread's network namespace.
    fn compare(saved: &[(Bytes, Bytes)]) -> io::Result<Addresses> {
        let saved = saved
            .iter()
            .map(|(name, bytes)| Ok((String::from_utf8_lossy(name).into_owned(), ip(bytes)?)))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Addresses::between(&saved, &own_interfaces()?))
    }

    fn between(saved: &[(String, IpAddr)], present: &[(String, IpAddr)]) -> Addresses {
        let here: BTreeSet<IpAddr> = present.iter().map(|(_, ip)| *ip).collect();
        let alike = |left: &IpAddr, right: &IpAddr| match (left, right) {
            (IpAddr::V4(_), IpAddr::V4(_)) => true,
            (IpAddr::V6(left), IpAddr::V6(right)) => {
                left.is_unicast_link_local() == right.is_unicast_link_local()
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        };
        // In the order in which each interface has them.
        let of = |list: &[(String, IpAddr)], name: &str, like: &IpAddr| -> Vec<IpAddr> {
            list.iter()
                .filter(|(other, ip)| other == name && alike(ip, like))
                .map(|(_, ip)| *ip)
                .collect()
        };
        let mut moved = BTreeMap::new();
        for (name, old) in saved.iter().filter(|(_, old)| !here.contains(old)) {
            let position = of(saved, name, old).iter().position(|ip| ip == old).unwrap_or(0);
            let candidates = of(present, name, old);
            if let Some(new) = candidates.get(position).or(candidates.first()) {
                moved.insert(*old, *new);
            }
        }
        Addresses { here, moved }
    }

    /// Where a socket that had this address gets it. None: the new container has none in its place.
    pub(crate) fn find(&self, address: SocketAddr) -> Option<SocketAddr> {
        let ip = address.ip().to_canonical();
        let anywhere = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
        if anywhere || self.here.contains(&ip) {
            return Some(address);
        }
        self.moved.get(&ip).map(|new| with_ip(address, *new))
    }

    /// Where a socket goes on that was connected to this address: others than the container's own stay as they are.
    pub(crate) fn follow(&self, address: SocketAddr) -> SocketAddr {
        let new = match self.moved.get(&address.ip().to_canonical()) {
            Some(new) => with_ip(address, *new),
            None => address,
        };
        match on_link(new) {
            // The interface has another number here. The socket is bound to it, as everyone is that has such an address.
            Some(v6) => SocketAddrV6::new(*v6.ip(), v6.port(), v6.flowinfo(), 0).into(),
            None => new,
        }
    }
}

/// The address with another number, in the same clothes.
pub(crate) fn with_ip(address: SocketAddr, ip: IpAddr) -> SocketAddr {
    match (address, ip) {
        (SocketAddr::V6(v6), IpAddr::V4(ip)) => {
            SocketAddrV6::new(ip.to_ipv6_mapped(), v6.port(), v6.flowinfo(), 0).into()
        }
        (SocketAddr::V6(v6), IpAddr::V6(ip)) => {
            SocketAddrV6::new(ip, v6.port(), v6.flowinfo(), v6.scope_id()).into()
        }
        (SocketAddr::V4(v4), ip) => SocketAddr::new(ip, v4.port()),
    }
}

/// Whether the kernel gave an IPv6 socket its address, as `connect` and `accept` do: one that was bound to an address is called
/// `IPV6_V6ONLY`. It is bound to its port alone then.
pub(crate) fn was_given(socket: &InternetSocket, address: SocketAddr) -> bool {
    let only = socket_options::number(&socket.options, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);
    only == Some(0) && address.is_ipv6() && address.ip().to_canonical().is_ipv6()
}

/// The address with its port alone.
pub(crate) fn anywhere(address: SocketAddr) -> SocketAddr {
    with_ip(address, Ipv6Addr::UNSPECIFIED.into())
}

/// Binds a socket where it was, or where the new container has that address.
///
/// An address that nobody has in the new container is bound nevertheless: nothing arrives there, as for any address that its
/// host has lost.
pub(crate) fn bind(
    socket: BorrowedFd<'_>,
    address: SocketAddr,
    addresses: &Addresses,
) -> io::Result<()> {
    if let Some(address) = on_link(addresses.find(address).unwrap_or(address)) {
        return bind_on_link(socket, address).map_err(|error| at(address.into(), error));
    }
    let result = match addresses.find(address) {
        Some(address) => rustix::net::bind(socket, &address),
        None => {
            let before = sockopt::get(socket, libc::SOL_IP, libc::IP_FREEBIND, 4)?;
            sockopt::set(socket, libc::SOL_IP, libc::IP_FREEBIND, &1i32.to_le_bytes())?;
            let result = rustix::net::bind(socket, &address);
            sockopt::set(socket, libc::SOL_IP, libc::IP_FREEBIND, &before)?;
            result
        }
    };
    result.map_err(|error| at(address, error.into()))
}

/// An address that means something together with an interface only.
fn on_link(address: SocketAddr) -> Option<SocketAddrV6> {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => Some(v6),
        SocketAddr::V4(_) | SocketAddr::V6(_) => None,
    }
}

/// Binds a socket to an address of the interface that it has been bound to. Where that does not exist, any will do that takes
/// addresses that are not its own: nothing arrives from that one afterwards.
fn bind_on_link(socket: BorrowedFd<'_>, address: SocketAddrV6) -> io::Result<()> {
    let device = sockopt::get(socket, libc::SOL_SOCKET, socket_options::SO_BINDTOIFINDEX, 4)?;
    let number = device.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let bound = |address: SocketAddrV6, device: u32| -> io::Result<()> {
        let address = SocketAddrV6::new(*address.ip(), address.port(), address.flowinfo(), device);
        Ok(rustix::net::bind(socket, &SocketAddr::from(address))?)
    };
    let exists = nix::net::if_::if_nameindex()?.iter().any(|one| one.index() == number);
    if exists && bound(address, number).is_ok() {
        return Ok(());
    }
    let place = if exists { number } else { nix::net::if_::if_nametoindex("lo")? };
    let before = sockopt::get(socket, libc::SOL_IP, libc::IP_FREEBIND, 4)?;
    sockopt::set(socket, libc::SOL_IP, libc::IP_FREEBIND, &1i32.to_le_bytes())?;
    sockopt::set(socket, libc::SOL_SOCKET, socket_options::SO_BINDTOIFINDEX, &place.to_le_bytes())?;
    let result = bound(address, place);
    sockopt::set(socket, libc::SOL_SOCKET, socket_options::SO_BINDTOIFINDEX, &device)?;
    sockopt::set(socket, libc::SOL_IP, libc::IP_FREEBIND, &before)?;
    result
}

/// Says in an error which address it is about.
pub(crate) fn at(address: SocketAddr, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{address}: {error}"))
}

/// Sockets of the internet that have been made, by the index of their file.
pub(crate) type Made = BTreeMap<u32, OwnedFd>;

/// Makes all sockets of the internet, of netlink and of the link layer: connections first, because a port that somebody listens on can't be bound again.
pub(crate) fn restore(init: Pid, container: &Container) -> Result<Made, RestoreError> {
    let sockets: Vec<(u32, &InternetSocket)> = (0u32..)
        .zip(&container.files)
        .filter_map(|(file, record)| match &record.kind {
            FileKind::Internet(socket) => Some((file, socket.as_ref())),
            _ => None,
        })
        .collect();
    descriptors::make_room().map_err(make("room for the container's descriptors"))?;
    let mut others = Made::new();
    for (file, record) in (0u32..).zip(&container.files) {
        let made = match &record.kind {
            FileKind::Netlink(record) => {
                netlink::restore(init, record).map_err(make("a netlink socket"))?
            }
            FileKind::Packet(record) => {
                packets::restore(init, record).map_err(make("a packet socket"))?
            }
            _ => continue,
        };
        others.insert(file, made);
    }
    if sockets.is_empty() {
        return Ok(others);
    }
    let made = inside(init, Namespace::Network, || {
        let addresses = Addresses::compare(&container.addresses)?;
        let mut made = tcp::restore(&sockets, &addresses)?;
        datagrams::restore(&sockets, &addresses, &mut made)?;
        Ok(made)
    });
    let mut made = made.map_err(make("its sockets"))?;
    made.append(&mut others);
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that keeps an address which its machine has not is reached by nobody.
    #[test]
    fn own_addresses_follow_their_interface() {
        let list = |entries: &[(&str, &str)]| -> Vec<(String, IpAddr)> {
            entries.iter().map(|(n, ip)| ((*n).to_owned(), ip.parse().expect("an ip"))).collect()
        };
        let saved = list(&[
            ("lo", "127.0.0.1"),
            ("eth0", "10.0.0.2"),
            ("eth0", "10.0.0.3"),
            ("eth1", "10.9.0.1"),
            ("eth0", "fe80::1"),
            ("eth0", "2001:db8::1"),
        ]);
        let present = list(&[
            ("lo", "127.0.0.1"),
            ("eth0", "10.1.0.7"),
            ("eth0", "10.1.0.8"),
            ("eth0", "fe80::7"),
            ("eth0", "2001:db8::7"),
        ]);
        let addresses = Addresses::between(&saved, &present);
        for (old, new) in [
            ("0.0.0.0:80", Some("0.0.0.0:80")),
            ("127.0.0.2:80", Some("127.0.0.2:80")),
            ("10.0.0.2:80", Some("10.1.0.7:80")),
            ("10.0.0.3:80", Some("10.1.0.8:80")),
            ("10.9.0.1:80", None),
            ("192.0.2.1:80", None),
            ("[::ffff:10.0.0.3]:80", Some("[::ffff:10.1.0.8]:80")),
            ("[2001:db8::1]:80", Some("[2001:db8::7]:80")),
            ("[fe80::1]:80", Some("[fe80::7]:80")),
        ] {
            let found = addresses.find(old.parse().expect("an address"));
            assert_eq!(found, new.map(|new| new.parse().expect("an address")), "{old}");
        }
        let outside = "192.0.2.1:80".parse().expect("an address");
        assert_eq!(addresses.follow(outside), outside);
    }
}
