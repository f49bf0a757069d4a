//! `ioctl_tty(2)`: terminals and pseudo-terminals.
//!
//! An operation on the master of a pseudo-terminal concerns the slave where nothing else is said: its settings, its size, its lock.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::check;

/// The kernel's `struct termios2` (asm-generic/termbits.h): modes, line discipline, special characters, speeds in baud.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    pub input: u32,
    pub output: u32,
    pub control: u32,
    pub local: u32,
    pub line: u8,
    pub characters: [u8; 19],
    pub input_speed: u32,
    pub output_speed: u32,
}

const _: () = assert!(size_of::<Settings>() == 44);

/// `struct winsize`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    pub rows: u16,
    pub columns: u16,
    pub x_pixels: u16,
    pub y_pixels: u16,
}

/// Bytes of the kernel's `struct termios`.
const TERMIOS_BYTES: usize = 36;

const TCGETS2: libc::Ioctl = 0x802C_542A;
const TCSETS2: libc::Ioctl = 0x402C_542B;
const TIOCGDEV: libc::Ioctl = 0x8004_5432;
const TIOCGPTN: libc::Ioctl = 0x8004_5430;
const TIOCSPTLCK: libc::Ioctl = 0x4004_5431;
const TIOCGPKT: libc::Ioctl = 0x8004_5438;
const TIOCGPTLCK: libc::Ioctl = 0x8004_5439;
const TIOCGEXCL: libc::Ioctl = 0x8004_5440;
const TIOCGPTPEER: libc::Ioctl = 0x5441;
const TIOCGLCKTRMIOS: libc::Ioctl = 0x5456;

/// # Errors
/// EIO: the terminal was hung up.
pub fn settings(tty: impl AsFd) -> io::Result<Settings> {
    read(tty, TCGETS2)
}

/// Sets them at once; what is queued stays.
pub fn set_settings(tty: impl AsFd, settings: &Settings) -> io::Result<()> {
    write(tty, TCSETS2, settings)
}

pub fn size(tty: impl AsFd) -> io::Result<Size> {
    read(tty, libc::TIOCGWINSZ)
}

/// Sets the size. If it is another one, the foreground group gets SIGWINCH.
pub fn set_size(tty: impl AsFd, size: &Size) -> io::Result<()> {
    write(tty, libc::TIOCSWINSZ, size)
}

/// The line discipline, 0 for the usual one (`N_TTY`).
pub fn discipline(tty: impl AsFd) -> io::Result<i32> {
    read(tty, libc::TIOCGETD)
}

/// Whether another process may not change some of the settings.
pub fn has_locked_settings(tty: impl AsFd) -> io::Result<bool> {
    let bytes: [u8; TERMIOS_BYTES] = read(tty, TIOCGLCKTRMIOS)?;
    Ok(bytes.iter().any(|byte| *byte != 0))
}

/// Major and minor number of the terminal that the descriptor leads to, `/dev/tty` resolved.
pub fn device(tty: impl AsFd) -> io::Result<(u32, u32)> {
    let number: u32 = read(tty, TIOCGDEV)?;
    Ok((libc::major(number.into()), libc::minor(number.into())))
}

/// The number of a master's slave in its devpts.
pub fn number(master: impl AsFd) -> io::Result<u32> {
    read(master, TIOCGPTN)
}

/// Whether a master's slave can't be opened yet.
pub fn is_locked(master: impl AsFd) -> io::Result<bool> {
    Ok(read::<i32>(master, TIOCGPTLCK)? != 0)
}

pub fn set_locked(master: impl AsFd, locked: bool) -> io::Result<()> {
    write(master, TIOCSPTLCK, &i32::from(locked))
}

/// Whether reads of a master tell events too (`TIOCPKT`).
pub fn is_packet(master: impl AsFd) -> io::Result<bool> {
    Ok(read::<i32>(master, TIOCGPKT)? != 0)
}

/// Events that nobody has read are forgotten.
pub fn set_packet(master: impl AsFd, packet: bool) -> io::Result<()> {
    write(master, libc::TIOCPKT, &i32::from(packet))
}

/// Whether only root may open the terminal once more. Of a pair each side has its own.
pub fn is_exclusive(tty: impl AsFd) -> io::Result<bool> {
    Ok(read::<i32>(tty, TIOCGEXCL)? != 0)
}

pub fn set_exclusive(tty: impl AsFd) -> io::Result<()> {
    plain(tty, libc::TIOCEXCL, 0).map(drop)
}

/// Opens a master's slave, wherever its devpts is mounted, and to be closed by `exec`.
///
/// # Errors
/// EIO: it is locked.
pub fn peer(master: impl AsFd, flags: i32) -> io::Result<OwnedFd> {
    // Unlike open, it would keep O_CLOEXEC among the flags of the description.
    let fd = plain(master, TIOCGPTPEER, flags & !libc::O_CLOEXEC)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    let slave = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the descriptor is open, and no memory is passed.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }.into())?;
    Ok(slave)
}

/// How many bytes a read would return, or in canonical mode the reads of all whole lines.
pub fn readable(tty: impl AsFd) -> io::Result<usize> {
    Ok(usize::try_from(read::<i32>(tty, libc::FIONREAD)?).unwrap_or(0))
}

/// Gives the terminal a byte as if its other side had written it (`TIOCSTI`); for a master that is the slave.
///
/// # Errors
/// EIO, EPERM: the caller lacks CAP_SYS_ADMIN.
pub fn push(tty: impl AsFd, byte: u8) -> io::Result<()> {
    write(tty, libc::TIOCSTI, &byte)
}

/// Stops the terminal's output until [`start_output`].
pub fn stop_output(tty: impl AsFd) -> io::Result<()> {
    plain(tty, libc::TCXONC, libc::TCOOFF).map(drop)
}

pub fn start_output(tty: impl AsFd) -> io::Result<()> {
    plain(tty, libc::TCXONC, libc::TCOON).map(drop)
}

/// Drops what is queued: `TCIFLUSH`, `TCOFLUSH` or `TCIOFLUSH`.
pub fn flush(tty: impl AsFd, queue: i32) -> io::Result<()> {
    plain(tty, libc::TCFLSH, queue).map(drop)
}

fn read<T: Plain>(tty: impl AsFd, request: libc::Ioctl) -> io::Result<T> {
    let mut value = T::ZERO;
    // SAFETY: each request above writes as many bytes as the type has that it is called with, of which any are valid.
    let result =
        unsafe { libc::ioctl(tty.as_fd().as_raw_fd(), request, std::ptr::from_mut(&mut value)) };
    check(result.into())?;
    Ok(value)
}

fn write<T: Plain>(tty: impl AsFd, request: libc::Ioctl, value: &T) -> io::Result<()> {
    // SAFETY: each request above reads as many bytes as the type has that it is called with.
    let result =
        unsafe { libc::ioctl(tty.as_fd().as_raw_fd(), request, std::ptr::from_ref(value)) };
    check(result.into()).map(drop)
}

/// For requests that take a number instead of an address.
fn plain(tty: impl AsFd, request: libc::Ioctl, argument: i32) -> io::Result<RawFd> {
    // SAFETY: the request takes numbers only.
    let result = unsafe { libc::ioctl(tty.as_fd().as_raw_fd(), request, argument) };
    check(result.into())?;
    Ok(result)
}

/// Types of which any bytes are a value.
trait Plain {
    const ZERO: Self;
}

impl Plain for u8 {
    const ZERO: u8 = 0;
}

impl Plain for i32 {
    const ZERO: i32 = 0;
}

impl Plain for u32 {
    const ZERO: u32 = 0;
}

impl Plain for [u8; TERMIOS_BYTES] {
    const ZERO: Self = [0; TERMIOS_BYTES];
}

impl Plain for Size {
    const ZERO: Size = Size { rows: 0, columns: 0, x_pixels: 0, y_pixels: 0 };
}

impl Plain for Settings {
    const ZERO: Settings = Settings {
        input: 0,
        output: 0,
        control: 0,
        local: 0,
        line: 0,
        characters: [0; 19],
        input_speed: 0,
        output_speed: 0,
    };
}
