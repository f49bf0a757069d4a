//! `packet(7)`: sockets of the link layer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::check;

/// Binds a socket to an interface by its number, or to all (0), for what comes under `protocol` (linux/if_ether.h). 0 is nothing,
/// unless the socket was made for some.
pub fn bind(socket: BorrowedFd<'_>, protocol: u16, interface: i32) -> io::Result<()> {
    // SAFETY: all of the structure may be zero.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).expect("families are small");
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = interface;
    let bytes = libc::socklen_t::try_from(size_of_val(&address)).expect("a small structure");
    // SAFETY: the kernel reads `bytes` bytes of the structure.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), bytes) };
    check(result.into()).map(drop)
}

/// Binds a socket of the obsolete type `SOCK_PACKET` to an interface by its name.
pub fn bind_by_name(socket: BorrowedFd<'_>, interface: &[u8]) -> io::Result<()> {
    // SAFETY: all of the structure may be zero.
    let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
    address.sa_family = u16::try_from(libc::AF_PACKET).expect("families are small");
    if interface.len() >= address.sa_data.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in address.sa_data.iter_mut().zip(interface) {
        *place = byte.cast_signed();
    }
    let bytes = libc::socklen_t::try_from(size_of_val(&address)).expect("a small structure");
    // SAFETY: the kernel reads `bytes` bytes of the structure.
    let result = unsafe { libc::bind(socket.as_raw_fd(), &raw const address, bytes) };
    check(result.into()).map(drop)
}
