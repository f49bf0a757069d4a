//! Options of sockets: numbers that a program sets and that change how its socket behaves.
//!
//! Each is read as bytes and set again where a new socket has another value, so that what cannot be set by anybody stays in
//! peace as long as nobody has changed it. Only options of the table are set, whatever a capsule says.
//!
//! What this module does not do: whether calls on the socket wait (`O_NONBLOCK`), which is a flag of the open file; addresses;
//! options that the kernel takes and does not tell, such as programs that distribute among sockets of one port
//! (`SO_ATTACH_REUSEPORT_CBPF`) and signatures of TCP (`TCP_MD5SIG`).

use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use libc::{
    IPPROTO_ICMPV6, SOL_IP, SOL_IPV6, SOL_NETLINK, SOL_PACKET, SOL_RAW, SOL_SOCKET, SOL_TCP,
    SOL_UDP,
};
use samara_capsule::record::{Bytes, SocketOption, SocketOptions};
use samara_kernel::sockopt;

/// An option that is kept.
#[derive(Debug)]
struct Known {
    level: i32,
    name: i32,
    /// As its header names it.
    title: &'static str,
    /// The most that its value can have.
    bytes_max: usize,
    when: When,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Decides how the socket is bound and connected.
    Before,
    /// Might get in the way of the data that is put back.
    After,
}

const INT: usize = 4;

macro_rules! known {
    ($($level:ident, $when:ident, $bytes:expr => $($name:ident = $number:expr),+;)+) => {
        &[$($(Known {
            level: $level,
            name: $number,
            title: stringify!($name),
            bytes_max: $bytes,
            when: When::$when,
        }),+),+]
    };
}

const SOL_UDPLITE: i32 = 136;

/// In the order in which they are set: `IP_TOS` changes the priority. Numbers that the libc crate lacks are those of Linux 6.18.
const KNOWN: &[Known] = known! {
    SOL_IP, Before, INT => IP_FREEBIND = 15, IP_TRANSPARENT = 19, IP_BIND_ADDRESS_NO_PORT = 24,
        IP_HDRINCL = 3, IP_LOCAL_PORT_RANGE = 51;
    SOL_IP, After, INT => IP_TOS = 1, IP_TTL = 2, IP_RECVOPTS = 6, IP_RETOPTS = 7, IP_PKTINFO = 8,
        IP_MTU_DISCOVER = 10, IP_RECVERR = 11, IP_RECVTTL = 12, IP_RECVTOS = 13, IP_PASSSEC = 18,
        IP_RECVORIGDSTADDR = 20, IP_MINTTL = 21, IP_NODEFRAG = 22, IP_CHECKSUM = 23,
        IP_RECVFRAGSIZE = 25, IP_RECVERR_RFC4884 = 26, IP_MULTICAST_TTL = 33,
        IP_MULTICAST_LOOP = 34, IP_MULTICAST_ALL = 49, IP_UNICAST_IF = 50;
    SOL_IP, After, 40 => IP_OPTIONS = 4;
    SOL_IPV6, Before, INT => IPV6_V6ONLY = 26, IPV6_TRANSPARENT = 75, IPV6_FREEBIND = 78,
        IPV6_HDRINCL = 36;
    SOL_IPV6, After, INT => IPV6_2292PKTINFO = 2, IPV6_2292HOPOPTS = 3, IPV6_2292DSTOPTS = 4,
        IPV6_2292RTHDR = 5, IPV6_CHECKSUM = 7, IPV6_2292HOPLIMIT = 8, IPV6_FLOWINFO = 11,
        IPV6_UNICAST_HOPS = 16, IPV6_MULTICAST_IF = 17, IPV6_MULTICAST_HOPS = 18,
        IPV6_MULTICAST_LOOP = 19, IPV6_ROUTER_ALERT = 22, IPV6_MTU_DISCOVER = 23, IPV6_RECVERR = 25,
        IPV6_MULTICAST_ALL = 29, IPV6_ROUTER_ALERT_ISOLATE = 30, IPV6_RECVERR_RFC4884 = 31,
        IPV6_FLOWINFO_SEND = 33, IPV6_RECVPKTINFO = 49, IPV6_RECVHOPLIMIT = 51,
        IPV6_RECVHOPOPTS = 53, IPV6_RECVRTHDR = 56, IPV6_RECVDSTOPTS = 58, IPV6_RECVPATHMTU = 60,
        IPV6_DONTFRAG = 62, IPV6_RECVTCLASS = 66, IPV6_TCLASS = 67, IPV6_AUTOFLOWLABEL = 70,
        IPV6_ADDR_PREFERENCES = 72, IPV6_MINHOPCOUNT = 73, IPV6_RECVORIGDSTADDR = 74,
        IPV6_UNICAST_IF = 76, IPV6_RECVFRAGSIZE = 77;
    SOL_TCP, After, INT => TCP_NODELAY = 1, TCP_CORK = 3, TCP_KEEPIDLE = 4, TCP_KEEPINTVL = 5,
        TCP_KEEPCNT = 6, TCP_SYNCNT = 7, TCP_LINGER2 = 8, TCP_DEFER_ACCEPT = 9,
        TCP_WINDOW_CLAMP = 10, TCP_QUICKACK = 12, TCP_THIN_LINEAR_TIMEOUTS = 16,
        TCP_USER_TIMEOUT = 18, TCP_FASTOPEN = 23, TCP_NOTSENT_LOWAT = 25, TCP_SAVE_SYN = 27,
        TCP_FASTOPEN_CONNECT = 30, TCP_FASTOPEN_NO_COOKIE = 34, TCP_INQ = 36, TCP_TX_DELAY = 37,
        TCP_RTO_MAX_MS = 44, TCP_RTO_MIN_US = 45, TCP_DELACK_MAX_US = 46;
    SOL_TCP, Before, 16 => TCP_CONGESTION = 13;
    SOL_UDP, After, INT => UDP_ENCAP = 100, UDP_NO_CHECK6_TX = 101, UDP_NO_CHECK6_RX = 102,
        UDP_SEGMENT = 103, UDP_GRO = 104;
    SOL_UDPLITE, After, INT => UDPLITE_SEND_CSCOV = 10, UDPLITE_RECV_CSCOV = 11;
    SOL_RAW, After, INT => ICMP_FILTER = 1;
    IPPROTO_ICMPV6, After, 32 => ICMPV6_FILTER = 1;
    SOL_NETLINK, After, INT => NETLINK_PKTINFO = 3, NETLINK_BROADCAST_ERROR = 4,
        NETLINK_NO_ENOBUFS = 5, NETLINK_LISTEN_ALL_NSID = 8, NETLINK_CAP_ACK = 10,
        NETLINK_EXT_ACK = 11, NETLINK_GET_STRICT_CHK = 12;
    SOL_PACKET, After, INT => PACKET_AUXDATA = 8, PACKET_ORIGDEV = 9, PACKET_VERSION = 10,
        PACKET_RESERVE = 12, PACKET_LOSS = 14, PACKET_VNET_HDR = 15, PACKET_TIMESTAMP = 17,
        PACKET_TX_HAS_OFF = 19, PACKET_QDISC_BYPASS = 20, PACKET_IGNORE_OUTGOING = 23,
        PACKET_VNET_HDR_SZ = 24;
    SOL_SOCKET, Before, INT => SO_REUSEADDR = 2, SO_REUSEPORT = 15, SO_MARK = 36;
    SOL_SOCKET, Before, 16 => SO_BINDTODEVICE = 25;
    SOL_SOCKET, After, INT => SO_DEBUG = 1, SO_DONTROUTE = 5, SO_BROADCAST = 6, SO_KEEPALIVE = 9,
        SO_OOBINLINE = 10, SO_NO_CHECK = 11, SO_PRIORITY = 12, SO_PASSCRED = 16, SO_RCVLOWAT = 18,
        SO_TIMESTAMP = 29, SO_PASSSEC = 34, SO_TIMESTAMPNS = 35, SO_RXQ_OVFL = 40,
        SO_WIFI_STATUS = 41, SO_PEEK_OFF = 42, SO_NOFCS = 43, SO_SELECT_ERR_QUEUE = 45,
        SO_BUSY_POLL = 46, SO_ZEROCOPY = 60, SO_TIMESTAMP_NEW = 63, SO_TIMESTAMPNS_NEW = 64,
        SO_PREFER_BUSY_POLL = 69, SO_RESERVE_MEM = 73, SO_TXREHASH = 74, SO_RCVMARK = 75,
        SO_PASSPIDFD = 76, SO_RCVPRIORITY = 82, SO_PASSRIGHTS = 83;
    // Structures: linger, two numbers of 32 bits, or one of 64.
    SOL_SOCKET, After, 8 => SO_LINGER = 13, SO_TIMESTAMPING = 37, SO_MAX_PACING_RATE = 47,
        SO_TXTIME = 61, SO_TIMESTAMPING_NEW = 65;
    // `struct timeval`.
    SOL_SOCKET, After, 16 => SO_RCVTIMEO = 20, SO_SNDTIMEO = 21;
};

/// Kept as well, and set in another way: by [`set_buffers`] and [`finish`], and where addresses are known.
const SPECIAL: &[Known] = known! {
    SOL_IP, After, INT => IP_MULTICAST_IF = 32;
    SOL_TCP, After, INT => TCP_MAXSEG = 2;
    SOL_SOCKET, After, INT => SO_SNDBUF = 7, SO_RCVBUF = 8, SO_BUF_LOCK = 72, SO_LOCK_FILTER = 44;
};
const SO_BUF_LOCK: i32 = 72;
pub(crate) const SO_BINDTOIFINDEX: i32 = 62;

/// Which levels a family has beside that of all sockets.
pub(crate) const INTERNET: &[i32] =
    &[SOL_IP, SOL_IPV6, SOL_TCP, SOL_UDP, SOL_UDPLITE, SOL_RAW, IPPROTO_ICMPV6];
pub(crate) const NETLINK: &[i32] = &[SOL_NETLINK];
pub(crate) const PACKET: &[i32] = &[SOL_PACKET];

/// Reads the options of a socket: those of all sockets, and of the given levels. Or says what can't be saved.
pub(crate) fn capture(
    socket: BorrowedFd<'_>,
    metadata: &Metadata,
    levels: &[i32],
) -> io::Result<Result<SocketOptions, String>> {
    let mut values = Vec::new();
    let kind = sockopt::get(socket, SOL_SOCKET, libc::SO_TYPE, INT)?;
    let is_stream = kind == libc::SOCK_STREAM.to_le_bytes();
    for known in KNOWN.iter().chain(SPECIAL) {
        // A stream has them, but nobody can set them.
        if is_stream && known.title.contains("_MULTICAST_") {
            continue;
        }
        if known.level != SOL_SOCKET && !levels.contains(&known.level) {
            continue;
        }
        match sockopt::get(socket, known.level, known.name, known.bytes_max) {
            Ok(value) => {
                let Known { level, name, .. } = *known;
                values.push(SocketOption { level, name, value: Bytes::from(value) });
            }
            Err(error) if is_absent(&error) => {}
            // It is bound to an interface that is gone, whose number only is left.
            Err(error) if is_no_device(&error) && known.name == libc::SO_BINDTODEVICE => {
                let value = sockopt::get(socket, SOL_SOCKET, SO_BINDTOIFINDEX, INT)?;
                let (level, name, value) = (SOL_SOCKET, SO_BINDTOIFINDEX, Bytes::from(value));
                values.push(SocketOption { level, name, value });
            }
            Err(error) => return Err(error),
        }
    }
    let filter = match sockopt::filter(socket) {
        Ok(filter) => filter,
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            return Ok(Err("a socket with an extended BPF filter is not supported".to_owned()));
        }
        Err(error) if is_absent(&error) => Vec::new(),
        Err(error) => return Err(error),
    };
    Ok(Ok(SocketOptions {
        values,
        filter: Bytes::from(filter),
        owner: (metadata.uid(), metadata.gid()),
        mode: metadata.mode() & 0o7777,
    }))
}

/// Whether this kind of socket has no such option, or none in this state.
fn is_absent(error: &io::Error) -> bool {
    let absent =
        [libc::ENOPROTOOPT, libc::EOPNOTSUPP, libc::EINVAL, libc::ENOTCONN, libc::EAFNOSUPPORT];
    error.raw_os_error().is_some_and(|errno| absent.contains(&errno))
}

fn is_no_device(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}

/// The value of an option that was saved as a number.
pub(crate) fn number(options: &SocketOptions, level: i32, name: i32) -> Option<i32> {
    let option = options.values.iter().find(|found| found.level == level && found.name == name)?;
    Some(i32::from_le_bytes(option.value.get(..INT)?.try_into().ok()?))
}

/// Sets what decides how a new socket is bound and connected.
pub(crate) fn prepare(socket: BorrowedFd<'_>, options: &SocketOptions) -> io::Result<()> {
    set(socket, options, When::Before)?;
    match number(options, SOL_SOCKET, SO_BINDTOIFINDEX) {
        Some(_) => bind_to_nothing(socket),
        None => Ok(()),
    }
}

/// Binds a socket to an interface that is not there, as one is whose interface was removed: nothing arrives, and none else may take
/// its place.
fn bind_to_nothing(socket: BorrowedFd<'_>) -> io::Result<()> {
    tracing::warn!("a socket is bound to an interface that the container has no more");
    sockopt::set(socket, SOL_SOCKET, SO_BINDTOIFINDEX, &i32::MAX.to_le_bytes())
}

/// Gives a socket the rest of its options, once it is connected and its queue is filled.
pub(crate) fn finish(socket: BorrowedFd<'_>, options: &SocketOptions) -> io::Result<()> {
    set(socket, options, When::After)?;
    set_buffers(socket, options)?;
    if !options.filter.is_empty() {
        sockopt::attach_filter(socket, &options.filter).map_err(named("SO_ATTACH_FILTER"))?;
    }
    if number(options, SOL_SOCKET, libc::SO_LOCK_FILTER).is_some_and(|locked| locked != 0) {
        sockopt::set(socket, SOL_SOCKET, libc::SO_LOCK_FILTER, &1i32.to_le_bytes())
            .map_err(named("SO_LOCK_FILTER"))?;
    }
    let file = File::from(socket.try_clone_to_owned()?);
    let metadata = file.metadata()?;
    if (metadata.uid(), metadata.gid()) != options.owner {
        let (uid, gid) = options.owner;
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).map_err(named("owner"))?;
    }
    if metadata.mode() & 0o7777 != options.mode {
        file.set_permissions(Permissions::from_mode(options.mode & 0o7777))
            .map_err(named("mode"))?;
    }
    Ok(())
}

fn set(socket: BorrowedFd<'_>, options: &SocketOptions, when: When) -> io::Result<()> {
    for known in KNOWN.iter().filter(|known| known.when == when) {
        let wanted = |found: &&SocketOption| found.level == known.level && found.name == known.name;
        let Some(option) = options.values.iter().find(wanted) else { continue };
        set_one(socket, known, &option.value).map_err(named(known.title))?;
    }
    Ok(())
}

fn set_one(socket: BorrowedFd<'_>, known: &Known, value: &[u8]) -> io::Result<()> {
    let now = sockopt::get(socket, known.level, known.name, known.bytes_max);
    if now.is_ok_and(|now| now == value) || value.len() > known.bytes_max {
        return Ok(());
    }
    match sockopt::set(socket, known.level, known.name, value) {
        Err(error) if is_no_device(&error) && known.name == libc::SO_BINDTODEVICE => {
            bind_to_nothing(socket)
        }
        result => result,
    }
}

/// Gives a socket its buffers' sizes, and whether the kernel may change them.
pub(crate) fn set_buffers(socket: BorrowedFd<'_>, options: &SocketOptions) -> io::Result<()> {
    for (name, force) in
        [(libc::SO_SNDBUF, libc::SO_SNDBUFFORCE), (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE)]
    {
        if let Some(bytes) = number(options, SOL_SOCKET, name) {
            // The kernel doubles what it is given, and had doubled what it told.
            sockopt::set(socket, SOL_SOCKET, force, &(bytes / 2).to_le_bytes())
                .map_err(named("buffer"))?;
        }
    }
    let Some(lock) = number(options, SOL_SOCKET, SO_BUF_LOCK) else { return Ok(()) };
    match sockopt::set(socket, SOL_SOCKET, SO_BUF_LOCK, &lock.to_le_bytes()) {
        // Multipath TCP.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        result => result.map_err(named("SO_BUF_LOCK")),
    }
}

/// Makes room in a socket for data that is put back, whatever its own buffers are.
pub(crate) fn make_room(socket: impl AsFd, bytes: usize) -> io::Result<()> {
    // What the kernel keeps beside each packet can be several times the data of a small one.
    let room = i32::try_from(bytes.saturating_mul(2)).unwrap_or(i32::MAX / 2).max(1 << 20);
    for name in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
        sockopt::set(socket.as_fd(), SOL_SOCKET, name, &room.min(i32::MAX / 2).to_le_bytes())?;
    }
    Ok(())
}

/// Says in an error which option it is about.
fn named(what: &'static str) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("its {what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    /// A socket that forgets its options waits too long, or lets in what it must not.
    #[test]
    fn options_are_the_same_after_a_restore() {
        let metadata = |socket: &UdpSocket| {
            File::from(socket.as_fd().try_clone_to_owned().expect("dup")).metadata().expect("fstat")
        };
        let (old, new) = (UdpSocket::bind("[::1]:0"), UdpSocket::bind("[::1]:0"));
        let (old, new) = (old.expect("socket"), new.expect("socket"));
        let unchanged = capture(new.as_fd(), &metadata(&new), INTERNET).expect("read");
        for (level, name, value) in [
            (SOL_SOCKET, libc::SO_BROADCAST, 1),
            (SOL_SOCKET, libc::SO_TIMESTAMPNS, 1),
            (SOL_SOCKET, libc::SO_RCVBUF, 10_001),
            (SOL_SOCKET, libc::SO_RCVLOWAT, 7),
            (SOL_IPV6, libc::IPV6_TCLASS, 8),
            (SOL_IP, libc::IP_TOS, 16),
            (SOL_UDP, libc::UDP_GRO, 1),
        ] {
            sockopt::set(old.as_fd(), level, name, &i32::to_le_bytes(value)).expect("set");
        }
        let accept_all = [6, 0, 0, 0, 0xff, 0xff, 0, 0];
        sockopt::attach_filter(old.as_fd(), &accept_all).expect("attach");
        let options = capture(old.as_fd(), &metadata(&old), INTERNET).expect("read");
        let options = options.expect("all is supported");
        assert_ne!(Ok(&options), unchanged.as_ref());
        prepare(new.as_fd(), &options).expect("before");
        finish(new.as_fd(), &options).expect("after");
        assert_eq!(capture(new.as_fd(), &metadata(&new), INTERNET).expect("read"), Ok(options));
    }
}
