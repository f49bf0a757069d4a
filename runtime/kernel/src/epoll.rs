//! `epoll_ctl(2)` on behalf of others.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use crate::check;

/// What an epoll instance watches: a file, under the number that its descriptor had in the process that registered it.
#[derive(Clone, Copy, Debug)]
pub struct Interest<'a> {
    pub file: BorrowedFd<'a>,
    pub number: RawFd,
    pub events: u32,
    pub data: u64,
}

/// Registers files under numbers that they need not have here.
///
/// It is done in a thread with a table of descriptors of its own, since any of the numbers may be in use here.
///
/// # Errors
/// Those of `epoll_ctl`. EMFILE, EBADF: a number is above this process's limit on descriptors.
pub fn add(epoll: BorrowedFd<'_>, interests: &[Interest<'_>]) -> io::Result<()> {
    if interests.is_empty() {
        return Ok(());
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| add_in_own_table(epoll, interests));
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread for epoll has panicked")))
    })
}

fn add_in_own_table(epoll: BorrowedFd<'_>, interests: &[Interest<'_>]) -> io::Result<()> {
    // SAFETY: takes a number only; the thread ends without touching descriptors of others.
    check(unsafe { libc::unshare(libc::CLONE_FILES) }.into())?;
    // First away from all numbers that will be overwritten.
    let above =
        interests.iter().map(|interest| interest.number).max().unwrap_or(0).saturating_add(1);
    let epoll = duplicate(epoll, above)?;
    let files = interests
        .iter()
        .map(|interest| duplicate(interest.file, above))
        .collect::<io::Result<Vec<RawFd>>>()?;
    for (interest, file) in interests.iter().zip(files) {
        let mut event = libc::epoll_event { events: interest.events, u64: interest.data };
        // SAFETY: takes numbers only, and what it closes is this thread's copy of a descriptor.
        check(unsafe { libc::dup3(file, interest.number, libc::O_CLOEXEC) }.into())?;
        // SAFETY: `event` lives through the call.
        let added =
            unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, interest.number, &raw mut event) };
        check(added.into())?;
    }
    Ok(())
}

/// A copy at the first free number from `from` on, in the calling thread's table; it is closed with the table.
fn duplicate(file: BorrowedFd<'_>, from: RawFd) -> io::Result<RawFd> {
    // SAFETY: takes numbers only.
    let number = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, from) };
    check(number.into())?;
    Ok(number)
}
