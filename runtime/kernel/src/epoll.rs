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
    /// What the file may be ready for without an event: the entry is one for edges, and has told of it. 0: nothing.
    pub told: u32,
}

/// What of `events` a file is ready for now, errors and a hang-up always among them.
///
/// # Errors
/// Those of `poll`.
pub fn ready(file: BorrowedFd<'_>, events: u32) -> io::Result<u32> {
    // The bits of poll and epoll are the same ones, those of epoll alone being above.
    let events = (events & 0x7fff) as libc::c_short;
    let mut polled = libc::pollfd { fd: file.as_raw_fd(), events, revents: 0 };
    // SAFETY: the kernel writes to the one structure.
    check(unsafe { libc::poll(&raw mut polled, 1, 0) }.into())?;
    Ok(u32::from(polled.revents.cast_unsigned()))
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
        let add = || add_in_own_table(epoll, interests);
        let thread = std::thread::Builder::new().spawn_scoped(scope, add)?;
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
    // Those that are used up first: while they are being used up, nothing else must be due.
    let (used_up, others): (Vec<_>, Vec<_>) = interests
        .iter()
        .zip(files)
        .partition(|(interest, _)| is_used_up(interest.events) || has_told(interest));
    for (interest, file) in used_up {
        place(file, interest.number)?;
        match has_told(interest) {
            true => {
                control(epoll, libc::EPOLL_CTL_ADD, interest, interest.events)?;
                take_event(epoll)?;
            }
            false => use_up(epoll, interest)?,
        }
    }
    for (interest, file) in others {
        place(file, interest.number)?;
        control(epoll, libc::EPOLL_CTL_ADD, interest, interest.events)?;
    }
    Ok(())
}

/// One-shot entries that have fired are left without the events that they were for.
fn is_used_up(events: u32) -> bool {
    const FLAGS: i32 =
        libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLWAKEUP | libc::EPOLLEXCLUSIVE;
    events & libc::EPOLLONESHOT.cast_unsigned() != 0 && events & !FLAGS.cast_unsigned() == 0
}

/// Whether a file is ready for nothing but what its entry has told of.
fn has_told(interest: &Interest<'_>) -> bool {
    interest.told != 0
        && ready(interest.file, interest.events).is_ok_and(|ready| ready & !interest.told == 0)
}

/// Takes the event that is due, if one is.
fn take_event(epoll: RawFd) -> io::Result<bool> {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: the kernel writes at most the one event.
    let count = unsafe { libc::epoll_wait(epoll, &raw mut event, 1, 0) };
    Ok(check(count.into())? > 0)
}

/// Registers a one-shot entry and lets it fire. One whose file is ready for nothing stays, for errors and a hang-up.
fn use_up(epoll: RawFd, interest: &Interest<'_>) -> io::Result<()> {
    let ready = (libc::EPOLLIN | libc::EPOLLOUT).cast_unsigned();
    control(epoll, libc::EPOLL_CTL_ADD, interest, interest.events | ready)?;
    if !take_event(epoll)? {
        control(epoll, libc::EPOLL_CTL_MOD, interest, interest.events)?;
    }
    Ok(())
}

fn control(epoll: RawFd, operation: i32, interest: &Interest<'_>, events: u32) -> io::Result<()> {
    let mut event = libc::epoll_event { events, u64: interest.data };
    // SAFETY: `event` lives through the call.
    let done = unsafe { libc::epoll_ctl(epoll, operation, interest.number, &raw mut event) };
    check(done.into()).map(drop)
}

/// Gives a file the number under which it is registered.
fn place(file: RawFd, number: RawFd) -> io::Result<()> {
    // SAFETY: takes numbers only, and what it closes is this thread's copy of a descriptor.
    check(unsafe { libc::dup3(file, number, libc::O_CLOEXEC) }.into()).map(drop)
}

/// A copy at the first free number from `from` on, in the calling thread's table; it is closed with the table.
fn duplicate(file: BorrowedFd<'_>, from: RawFd) -> io::Result<RawFd> {
    // SAFETY: takes numbers only.
    let number = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, from) };
    check(number.into())?;
    Ok(number)
}
