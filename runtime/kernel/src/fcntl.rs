//! `fcntl(2)`: the operations that libraries lack.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::check;

/// `struct f_owner_ex`: who gets the signals of an open file description.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// As the caller's pid namespace numbers it; 0 where there is none.
    pub id: i32,
}

const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_GETSIG: i32 = 11;
const F_GET_RW_HINT: i32 = 1035;
const F_SET_RW_HINT: i32 = 1036;

/// linux/fcntl.h has no numbers of its own for these in libraries.
pub const SET_OWNER: i32 = F_SETOWN_EX;
pub const SET_SIGNAL: i32 = 10;

/// `F_GETOWN_EX`
pub fn owner(file: BorrowedFd<'_>) -> io::Result<Owner> {
    let mut owner = Owner::default();
    // SAFETY: the kernel writes the eight bytes of `owner`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), F_GETOWN_EX, &raw mut owner) };
    check(result.into())?;
    Ok(owner)
}

/// `F_GETSIG`: 0 is SIGIO without information.
pub fn signal(file: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: takes numbers only.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), F_GETSIG) };
    check(result.into())?;
    Ok(result)
}

/// `F_GETLEASE`: `F_RDLCK`, `F_WRLCK` or `F_UNLCK`; while somebody waits for it, what it is to become.
pub fn lease(file: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: takes numbers only.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) };
    check(result.into())?;
    Ok(result)
}

/// `F_GET_RW_HINT`: how long what is written to a file is expected to live; 0 is not set.
///
/// # Errors
/// EINVAL: the file has no such hint.
pub fn write_hint(file: BorrowedFd<'_>) -> io::Result<u64> {
    let mut hint = 0u64;
    // SAFETY: the kernel writes the eight bytes of `hint`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), F_GET_RW_HINT, &raw mut hint) };
    check(result.into())?;
    Ok(hint)
}

/// `F_SET_RW_HINT`
pub fn set_write_hint(file: BorrowedFd<'_>, hint: u64) -> io::Result<()> {
    // SAFETY: the kernel reads the eight bytes of `hint`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), F_SET_RW_HINT, &raw const hint) };
    check(result.into()).map(drop)
}
