//! Pairs of connected unix sockets that have no name (`socketpair(2)`), with the data in their queues.
//!
//! The kernel tells who is connected to whom only by `sock_diag(7)`, in the network namespace of the sockets.
//!
//! What this module does not do: sockets with names, sockets of the internet, descriptors in flight. They are refused.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, getsockopt, send, setsockopt, shutdown,
    socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use samara_capsule::record::{Bytes, FileKind, SocketEnd, SocketPair};
use samara_kernel::Pid;
use samara_kernel::pidfd::PidFd;
use samara_kernel::sock_diag::{self, UnixSocket, int_option, set_int_option};

use crate::capture::{CaptureError, Tables, index, read};
use crate::descriptors::Found;
use crate::restart::Direction;
use crate::unsupported::Place;

/// Pairs of which at least one end was found.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    /// What the kernel tells, asked for when the first socket is found.
    kernel: Option<BTreeMap<u32, UnixSocket>>,
    pairs: Vec<SocketPair>,
    /// For each inode its pair and end, and who was found holding it.
    ends: BTreeMap<u32, (u32, u32)>,
    holders: BTreeMap<u32, (Pid, i32)>,
}

/// A message can't be larger than the sender's buffer, which root may raise to this (`wmem_max` is an int).
const MESSAGE_BYTES_MAX: usize = i32::MAX as usize;

/// Describes a socket that a descriptor refers to, or says why it can't be saved.
pub(crate) fn note(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let socket = found.borrow()?;
    let fd = socket.as_raw_fd();
    let option = |name| int_option(fd, libc::SOL_SOCKET, name).map_err(read(found.link));
    let domain = option(libc::SO_DOMAIN)?;
    if domain != libc::AF_UNIX {
        let kind = match domain {
            libc::AF_INET | libc::AF_INET6 => "an internet socket".to_owned(),
            libc::AF_NETLINK => "a netlink socket".to_owned(),
            other => format!("a socket of family {other}"),
        };
        return Ok(Err(format!("{kind} is not supported")));
    }
    let inode = u32::try_from(found.identity().1).unwrap_or(0);
    if tables.sockets.kernel.is_none() {
        let all = sock_diag::unix_sockets(tables.request.init)
            .map_err(read("the unix sockets of the container"))?;
        tables.sockets.kernel = Some(all);
    }
    let facts = tables.sockets.kernel.as_ref().and_then(|all| all.get(&inode)).copied();
    let Some(facts) = facts else {
        return Ok(Err(
            "a unix socket from outside the container's network namespace is not supported"
                .to_owned(),
        ));
    };
    if facts.named {
        return Ok(Err("a unix socket with a name is not supported".to_owned()));
    }
    let kind = option(libc::SO_TYPE)?;
    let (queue, descriptors) = queue(fd, kind).map_err(read(found.link))?;
    if descriptors {
        return Ok(Err("descriptors in flight in a unix socket are not supported".to_owned()));
    }
    let end = SocketEnd {
        queue,
        send_buffer: option(libc::SO_SNDBUF)?.unsigned_abs(),
        receive_buffer: option(libc::SO_RCVBUF)?.unsigned_abs(),
        read_shut: facts.shutdown & 1 != 0,
        write_shut: facts.shutdown & 2 != 0,
        pass_credentials: option(libc::SO_PASSCRED)? != 0,
        receive_timeout_us: timeout_us(getsockopt(&socket, sockopt::ReceiveTimeout), found)?,
        send_timeout_us: timeout_us(getsockopt(&socket, sockopt::SendTimeout), found)?,
        closed: false,
    };
    let pairs = &mut tables.sockets;
    pairs.holders.insert(inode, (found.pid, found.fd));
    let (pair, side) = match pairs.ends.get(&inode) {
        Some(known) => *known,
        None => {
            let pair = index(pairs.pairs.len());
            pairs.pairs.push(SocketPair { kind, ends: [closed(), closed()] });
            pairs.ends.insert(inode, (pair, 0));
            if facts.peer != 0 {
                pairs.ends.insert(facts.peer, (pair, 1));
            }
            (pair, 0)
        }
    };
    if let Some(place) =
        pairs.pairs.get_mut(pair as usize).and_then(|pair| pair.ends.get_mut(side as usize))
    {
        *place = end;
    }
    Ok(Ok(FileKind::SocketPair { pair, end: side }))
}

/// How long a call that waits for a socket does so at most; zero is for ever.
pub(crate) fn timeout(pid: Pid, fd: RawFd, direction: Direction) -> io::Result<Duration> {
    let socket = PidFd::open(pid)?.get_fd(fd)?;
    let value = match direction {
        Direction::Receive => getsockopt(&socket, sockopt::ReceiveTimeout),
        Direction::Send => getsockopt(&socket, sockopt::SendTimeout),
    }?;
    Ok(Duration::from_micros(value.num_microseconds().unsigned_abs()))
}

fn timeout_us(timeout: nix::Result<TimeVal>, found: &Found<'_>) -> Result<u64, CaptureError> {
    let timeout = timeout.map_err(io::Error::from).map_err(read(found.link))?;
    Ok(timeout.num_microseconds().unsigned_abs())
}

fn closed() -> SocketEnd {
    SocketEnd {
        queue: Vec::new(),
        send_buffer: 0,
        receive_buffer: 0,
        read_shut: false,
        write_shut: false,
        pass_credentials: false,
        receive_timeout_us: 0,
        send_timeout_us: 0,
        closed: true,
    }
}

/// The pairs, after all processes have been seen. A socket whose other end is open somewhere else is refused.
pub(crate) fn collect(tables: &mut Tables<'_>) -> Vec<SocketPair> {
    let strangers: Vec<(Pid, i32)> = tables
        .sockets
        .ends
        .keys()
        .filter(|inode| !tables.sockets.holders.contains_key(inode))
        .filter_map(|inode| {
            let (pair, _) = tables.sockets.ends.get(inode)?;
            let (holder, _) = tables
                .sockets
                .ends
                .iter()
                .find(|(other, (of, _))| of == pair && *other != inode)?;
            tables.sockets.holders.get(holder).copied()
        })
        .collect();
    for (pid, fd) in strangers {
        tables.refuse(
            pid,
            Place::Descriptor(fd),
            "a unix socket that is connected to a process outside is not supported",
        );
    }
    std::mem::take(&mut tables.sockets.pairs)
}

/// Copies what a socket will receive: one entry a message, or all bytes of a stream as one. And whether descriptors are among it.
fn queue(socket: RawFd, kind: i32) -> io::Result<(Vec<Bytes>, bool)> {
    let mut buffer = vec![0u8; 64 << 10];
    let whole = |buffer: &mut Vec<u8>| -> io::Result<Option<(usize, bool)>> {
        loop {
            match sock_diag::peek(socket, buffer) {
                // A stream reports no more than fits, so a full buffer may not be all.
                Ok((count, _)) if count >= buffer.len() && buffer.len() < MESSAGE_BYTES_MAX / 2 => {
                    buffer.resize(count.max(buffer.len()) * 2, 0);
                    if kind != libc::SOCK_STREAM {
                        set_int_option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
                        return Err(io::ErrorKind::Interrupted.into());
                    }
                }
                Ok(found) => return Ok(Some(found)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    };
    if kind == libc::SOCK_STREAM {
        return Ok(match whole(&mut buffer)? {
            None | Some((0, _)) => (Vec::new(), false),
            Some((count, descriptors)) => {
                buffer.truncate(count);
                (vec![Bytes::from(buffer)], descriptors)
            }
        });
    }
    // Each look moves on by a message while SO_PEEK_OFF is set.
    let before = int_option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    let result = loop {
        set_int_option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
        let mut messages = Vec::new();
        let mut descriptors = false;
        let one_pass = loop {
            match whole(&mut buffer) {
                Ok(None) => break Ok(()),
                Ok(Some((count, with))) => {
                    messages.push(Bytes::from(buffer.get(..count).unwrap_or_default().to_vec()));
                    descriptors |= with;
                }
                Err(error) => break Err(error),
            }
        };
        match one_pass {
            Ok(()) => break Ok((messages, descriptors)),
            // The buffer has grown: look again from the start.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
    };
    set_int_option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, before)?;
    result
}

/// Makes a pair as it was saved. An end that nobody held any more is closed again.
pub(crate) fn restore(pair: &SocketPair) -> io::Result<[Option<OwnedFd>; 2]> {
    let kind = match pair.kind {
        libc::SOCK_STREAM => SockType::Stream,
        libc::SOCK_DGRAM => SockType::Datagram,
        libc::SOCK_SEQPACKET => SockType::SeqPacket,
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    let (first, second) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
    let sockets = [first, second];
    let [left, right] = &pair.ends;
    let [first, second] = &sockets;
    for (receiver, sender) in [(left, second), (right, first)] {
        // Root may exceed the limit on buffers; what was in the queue has to fit at once.
        let room: usize = receiver.queue.iter().map(|message| message.len() + 4096).sum();
        let room = i32::try_from(room.saturating_mul(2)).unwrap_or(i32::MAX);
        set_int_option(sender.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, room)?;
        for message in &receiver.queue {
            let mut rest = message.as_slice();
            loop {
                let count = send(
                    sender.as_raw_fd(),
                    rest,
                    MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
                )?;
                rest = rest.get(count..).unwrap_or_default();
                if rest.is_empty() {
                    break;
                }
            }
        }
    }
    for (end, socket) in pair.ends.iter().zip(&sockets).filter(|(end, _)| !end.closed) {
        let fd = socket.as_raw_fd();
        // The kernel doubles what it is given, and had doubled what it told.
        let half = |bytes: u32| i32::try_from(bytes / 2).unwrap_or(i32::MAX);
        set_int_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, half(end.send_buffer))?;
        set_int_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, half(end.receive_buffer))?;
        set_int_option(fd, libc::SOL_SOCKET, libc::SO_PASSCRED, i32::from(end.pass_credentials))?;
        let timeout = |us: u64| TimeVal::microseconds(i64::try_from(us).unwrap_or(0));
        setsockopt(socket, sockopt::ReceiveTimeout, &timeout(end.receive_timeout_us))?;
        setsockopt(socket, sockopt::SendTimeout, &timeout(end.send_timeout_us))?;
        match (end.read_shut, end.write_shut) {
            (false, false) => {}
            (true, false) => shutdown(fd, Shutdown::Read)?,
            (false, true) => shutdown(fd, Shutdown::Write)?,
            (true, true) => shutdown(fd, Shutdown::Both)?,
        }
    }
    let [first, second] = sockets;
    Ok([(!left.closed).then_some(first), (!right.closed).then_some(second)])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lost or merged messages break whoever speaks a protocol over the pair.
    #[test]
    fn queues_survive_for_every_kind() {
        for kind in [SockType::Stream, SockType::Datagram, SockType::SeqPacket] {
            let (left, right) =
                socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).expect("pair");
            let sizes = if kind == SockType::Stream { vec![150_000] } else { vec![3, 100_000, 1] };
            let messages: Vec<Vec<u8>> =
                sizes.into_iter().zip(1u8..).map(|(size, fill)| vec![fill; size]).collect();
            for message in &messages {
                assert_eq!(
                    send(left.as_raw_fd(), message, MsgFlags::MSG_DONTWAIT).expect("send"),
                    message.len()
                );
            }
            let (seen, descriptors) = queue(right.as_raw_fd(), kind as i32).expect("peek");
            assert!(!descriptors);
            assert_eq!(seen, messages, "{kind:?}");
            let open = |queue| SocketEnd {
                queue,
                send_buffer: 212_992,
                receive_buffer: 212_992,
                closed: false,
                ..closed()
            };
            let pair = SocketPair { kind: kind as i32, ends: [open(Vec::new()), open(seen)] };
            let restored = restore(&pair).expect("restore");
            let [_, Some(right)] = &restored else { panic!("both ends are open") };
            assert_eq!(
                queue(right.as_raw_fd(), kind as i32).expect("peek").0,
                messages,
                "{kind:?}"
            );
        }
    }
}
