//! Descriptors that go from one process to another over a socket (`unix(7)`, `SCM_RIGHTS`).
//!
//! A message carries one byte and as many descriptors as the kernel lets it. The receiver knows how many there are, or reads until the end.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Of one message, below the kernel's `SCM_MAX_FD` of 253.
pub(crate) const AT_ONCE: usize = 128;

/// Sends at most [`AT_ONCE`] descriptors.
pub(crate) fn send(socket: impl AsFd, fds: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(AT_ONCE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives the descriptors of one message; none at the end.
pub(crate) fn receive(socket: impl AsFd) -> io::Result<Vec<OwnedFd>> {
    let mut received = Vec::new();
    read(socket, &mut [0], &mut received)?;
    Ok(received)
}

/// Reads bytes, and appends the descriptors that come with them to `received`. None at the end.
///
/// The byte that carries descriptors is none of those that are read. It is the last one that the kernel passes at a time.
pub(crate) fn read(
    socket: impl AsFd,
    buffer: &mut [u8],
    received: &mut Vec<OwnedFd>,
) -> io::Result<Option<usize>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(AT_ONCE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let slices = &mut [IoSliceMut::new(buffer)];
    let count = recvmsg(socket, slices, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let before = received.len();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            received.extend(fds);
        }
    }
    let carriers = usize::from(received.len() > before);
    Ok((count > 0).then(|| count.saturating_sub(carriers)))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Without this, a tracker would be taken for that of another process.
    #[test]
    fn all_arrive_in_order() {
        let (here, there) = UnixStream::pair().unwrap();
        let (fds, mut others): (Vec<OwnedFd>, Vec<UnixStream>) =
            (0..300).map(|_| UnixStream::pair().unwrap()).map(|(a, b)| (a.into(), b)).unzip();
        for some in fds.chunks(AT_ONCE) {
            send(&here, some).unwrap();
        }
        drop((here, fds));
        let mut arrived = Vec::new();
        loop {
            let some = receive(&there).unwrap();
            if some.is_empty() {
                break;
            }
            arrived.extend(some);
        }
        assert_eq!(arrived.len(), 300);
        for (number, fd) in arrived.into_iter().enumerate() {
            io::Write::write_all(&mut UnixStream::from(fd), &number.to_le_bytes()).unwrap();
        }
        for (number, other) in others.iter_mut().enumerate() {
            let mut said = [0; 8];
            other.read_exact(&mut said).unwrap();
            assert_eq!(usize::from_le_bytes(said), number);
        }
    }
}
