//! What a unix socket will receive: bytes and messages, and the descriptors, credentials, senders and marks that come with them.
//!
//! Looking takes nothing: every peek says by `SO_PEEK_OFF` where it begins.
//!
//! Limits: a message without bytes that has been looked at before is seen only at the head of its queue. An error that is
//! pending would be taken by a look at a queue of messages; such a queue is not looked at.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use libc::SOL_SOCKET;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixCredentials, sendmsg};
use samara_kernel::sock_diag::{int_option, set_int_option};
use samara_kernel::unix::{self, Credentials, Message};

/// A message as it was seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) bytes: Vec<u8>,
    pub(crate) rights: Vec<OwnedFd>,
    pub(crate) credentials: Option<Credentials>,
    pub(crate) sender: Option<Vec<u8>>,
    pub(crate) urgent: bool,
    /// Where it begins, as `SO_PEEK_OFF` counts.
    pub(crate) offset: usize,
}

/// `SO_PASSRIGHTS` of linux/socket.h, since Linux 6.16.
const SO_PASSRIGHTS: i32 = 83;
/// Whom the kernel shows for a message without credentials: nobody, of the default of `/proc/sys/fs/overflowuid`.
const UNKNOWN_USER: u32 = 65534;

/// Copies a queue, or says why it can't be.
pub(crate) fn read(
    socket: BorrowedFd<'_>,
    kind: i32,
    has_error: bool,
) -> io::Result<Result<Vec<Seen>, &'static str>> {
    let fd = socket.as_raw_fd();
    // What a queue shows depends on these; they are the program's, and get their values back.
    let options = [
        (libc::SO_PASSCRED, 1),
        (SO_PASSRIGHTS, 1),
        (libc::SO_OOBINLINE, 0),
        (libc::SO_PEEK_OFF, 0),
    ];
    let before: Vec<(i32, i32)> = options
        .iter()
        .filter_map(|(name, _)| Some((*name, int_option(fd, SOL_SOCKET, *name).ok()?)))
        .collect();
    let set = |values: &[(i32, i32)]| {
        values.iter().try_for_each(|(name, value)| set_int_option(fd, SOL_SOCKET, *name, *value))
    };
    let wanted: Vec<(i32, i32)> = options
        .into_iter()
        .filter(|(name, _)| before.iter().any(|(known, _)| known == name))
        .collect();
    let seen = set(&wanted).and_then(|()| match kind {
        libc::SOCK_STREAM => stream(socket),
        _ if has_error && unix::waiting_bytes(socket)? > 0 => {
            Ok(Err("messages behind an error that nobody has taken are not supported"))
        }
        _ if has_error => Ok(Ok(Vec::new())),
        _ => messages(socket).map(Ok),
    });
    set(&before)?;
    seen
}

fn set_place(socket: BorrowedFd<'_>, offset: usize) -> io::Result<()> {
    let place = i32::try_from(offset).map_err(|_| io::ErrorKind::OutOfMemory)?;
    set_int_option(socket.as_raw_fd(), SOL_SOCKET, libc::SO_PEEK_OFF, place)
}

fn look(socket: BorrowedFd<'_>, offset: usize, buffer: &mut [u8]) -> io::Result<Message> {
    set_place(socket, offset)?;
    let message = unix::peek(socket, buffer, 0)?;
    if message.cut {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(message)
}

fn known(credentials: Option<Credentials>) -> Option<Credentials> {
    // What was sent while neither side asked for credentials has none, which shows as nobody's.
    credentials.filter(|found| found.pid != 0 || found.uid != UNKNOWN_USER)
}

fn stream(socket: BorrowedFd<'_>) -> io::Result<Result<Vec<Seen>, &'static str>> {
    let all = unix::waiting_bytes(socket)?;
    let mut buffer = vec![0u8; all];
    let Ok(mark) = mark(socket, &mut buffer)? else {
        return Ok(Err("an urgent byte (MSG_OOB) behind descriptors is not supported"));
    };
    let mut seen: Vec<Seen> = Vec::new();
    let mut offset = 0;
    while offset < all {
        let end = match mark {
            Some(mark) if offset < mark => mark,
            Some(mark) if offset == mark => mark + 1,
            Some(_) | None => all,
        };
        let urgent = mark == Some(offset);
        // At the head of a queue the kernel passes over it, and does not count it.
        let place = offset - usize::from(mark == Some(0) && offset > 0);
        let part = buffer.get_mut(..end - offset).unwrap_or_default();
        let message = if urgent && offset == 0 {
            unix::peek(socket, part, libc::MSG_OOB)?
        } else {
            look(socket, place, part)?
        };
        let count = message.bytes.min(part.len());
        if count == 0 {
            break;
        }
        let bytes = part.get(..count).unwrap_or_default();
        let credentials = known(message.credentials);
        // What was sent at once takes another part of the sender's memory than what was sent in pieces.
        let mut starts = if urgent { vec![0] } else { parts(socket, place, count)? };
        let mut rights = message.rights;
        let mut end = count;
        let first = seen.len();
        while let Some(start) = starts.pop() {
            let bytes = bytes.get(start..end).unwrap_or_default().to_vec();
            // Descriptors end what the kernel gives at once.
            let rights = std::mem::take(&mut rights);
            let offset = place + start;
            seen.push(Seen { bytes, rights, credentials, urgent, offset, sender: None });
            end = start;
        }
        seen.get_mut(first..).unwrap_or_default().reverse();
        offset += count;
    }
    Ok(Ok(seen))
}

/// Where the byte that was sent with `MSG_OOB` is. An error: descriptors are right before it, so that it can't be told.
fn mark(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Result<Option<usize>, ()>> {
    if buffer.is_empty() || unix::peek(socket, &mut [0], libc::MSG_OOB).is_err() {
        return Ok(Ok(None));
    }
    if unix::at_mark(socket)? {
        return Ok(Ok(Some(0)));
    }
    // Without credentials only descriptors and the mark end what is returned at once.
    set_int_option(socket.as_raw_fd(), SOL_SOCKET, libc::SO_PASSCRED, 0)?;
    let mut offset = 0;
    let mut found = None;
    while offset < buffer.len() && found.is_none() {
        let rest = buffer.get_mut(offset..).unwrap_or_default();
        let message = look(socket, offset, rest)?;
        if message.bytes == 0 {
            break;
        }
        offset += message.bytes;
        if message.rights.is_empty() && offset < buffer.len() {
            found = Some(offset);
        }
    }
    set_int_option(socket.as_raw_fd(), SOL_SOCKET, libc::SO_PASSCRED, 1)?;
    Ok(found.map(Some).ok_or(()))
}

/// Where the parts of a stream begin as they were sent, ascending: `count` bytes from an offset that is the beginning of one.
fn parts(socket: BorrowedFd<'_>, offset: usize, count: usize) -> io::Result<Vec<usize>> {
    let mut starts = Vec::new();
    let mut end = count;
    while end > 0 {
        set_place(socket, offset)?;
        let start = match unix::whole_parts(socket, end - 1) {
            Ok(start) => start.min(end - 1),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => 0,
            Err(error) => return Err(error),
        };
        starts.push(start);
        end = start;
    }
    starts.reverse();
    Ok(starts)
}

fn messages(socket: BorrowedFd<'_>) -> io::Result<Vec<Seen>> {
    let mut buffer = vec![0u8; 64 << 10];
    let mut seen: Vec<Seen> = Vec::new();
    let mut offset = 0;
    // One without bytes that was looked at before is passed over from now on, unless it is the first.
    set_int_option(socket.as_raw_fd(), SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
    let head = match unix::peek(socket, &mut buffer, 0) {
        Ok(head) => head,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(seen),
        // Packets come by a connection only.
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => return Ok(seen),
        Err(error) => return Err(error),
    };
    if head.bytes == 0 && head.credentials.is_some() {
        seen.push(taken(head, &buffer, 0));
    }
    loop {
        match look(socket, offset, &mut buffer) {
            // The end of what is connected, not a message.
            Ok(message) if message.bytes == 0 && message.credentials.is_none() => break,
            Ok(message) if message.bytes > buffer.len() => buffer.resize(message.bytes, 0),
            Ok(message) => {
                let bytes = message.bytes;
                seen.push(taken(message, &buffer, offset));
                offset += bytes;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(seen)
}

fn taken(message: Message, buffer: &[u8], offset: usize) -> Seen {
    Seen {
        bytes: buffer.get(..message.bytes).unwrap_or_default().to_vec(),
        rights: message.rights,
        credentials: known(message.credentials),
        sender: message.sender,
        urgent: false,
        offset,
    }
}

/// Sends a message as it was saved to whom `sender` is connected, or to an address.
pub(crate) fn send(
    sender: BorrowedFd<'_>,
    message: &samara_capsule::record::UnixMessage,
    files: &[OwnedFd],
    credentials: Option<Credentials>,
    to: Option<&nix::sys::socket::UnixAddr>,
) -> io::Result<()> {
    let rights = message
        .files
        .iter()
        .map(|file| files.get(*file as usize).map(|file| file.as_fd().as_raw_fd()))
        .collect::<Option<Vec<RawFd>>>()
        .ok_or(io::ErrorKind::InvalidData)?;
    let credentials = credentials.map(|found| {
        UnixCredentials::from(libc::ucred { pid: found.pid, uid: found.uid, gid: found.gid })
    });
    let mut rest = message.bytes.as_slice();
    let mut first = true;
    while first || !rest.is_empty() {
        let mut control = Vec::new();
        if first && !rights.is_empty() {
            control.push(ControlMessage::ScmRights(&rights));
        }
        if let Some(credentials) = &credentials {
            control.push(ControlMessage::ScmCredentials(credentials));
        }
        let mut flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        if message.urgent {
            flags |= MsgFlags::MSG_OOB;
        }
        let count = sendmsg(sender.as_raw_fd(), &[IoSlice::new(rest)], &control, flags, to)?;
        rest = rest.get(count..).unwrap_or_default();
        first = false;
    }
    Ok(())
}

/// How much of a sender's memory messages take at most.
pub(crate) fn room(queue: &[samara_capsule::record::UnixMessage]) -> usize {
    queue.iter().map(|message| message.bytes.len().saturating_add(4096)).sum()
}
