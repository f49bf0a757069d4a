//! `userfaultfd(2)`, `ioctl_userfaultfd(2)`: here only to learn which pages are written (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7).
//!
//! A descriptor belongs to the memory of the process that made it, whoever holds it. So the call itself is made in a tracee, and
//! the descriptor taken out of it with `pidfd_getfd(2)`. Nobody has to read from it: with that feature the kernel resolves the
//! faults by itself, and `PAGEMAP_SCAN` tells which there were.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::check;
use crate::pagemap::Pagemap;

/// Flags of `userfaultfd(2)` in the tracee. Faults of the kernel need no handling either, so that of user mode is enough, which every
/// process may have.
pub const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | USER_MODE_ONLY;
const USER_MODE_ONLY: u64 = 1;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Register {
    start: u64,
    bytes: u64,
    mode: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<Api>() == 24);
const _: () = assert!(size_of::<Register>() == 32);

/// Numbers and constants of linux/userfaultfd.h.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFD_API: u64 = 0xaa;
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_ASYNC: u64 = 1 << 15;
const MODE_WP: u64 = 1 << 1;

/// Finds out, on memory of its own, whether this kernel tells of all that is written. Before Linux 6.13 pages that were moved
/// (mremap(2)) stay armed, without anything that would take note of a write to them.
///
/// # Errors
/// What could not be done; `Unsupported` where a moved page passes for one that is as it was.
pub fn probe() -> io::Result<()> {
    let tracker = of_this_process()?;
    let memory = Scratch::new()?;
    let moved = Scratch::new()?;
    let pagemap = Pagemap::open(i32::try_from(std::process::id()).map_err(io::Error::other)?)?;
    let clean = |memory: &Scratch| -> io::Result<Vec<bool>> {
        let (start, end) = (memory.0 as u64, memory.0 as u64 + PAGE as u64);
        tracker.cover(start, end)?;
        let (runs, _) = pagemap.tracked_some(start, end, 1, false)?;
        Ok(runs.iter().map(|run| run.clean).collect())
    };
    memory.write();
    let new = clean(&memory)?;
    let armed = clean(&memory)?;
    memory.write();
    let written = clean(&memory)?;
    memory.move_to(&moved)?;
    let seen = [new, armed, written, clean(&moved)?];
    match seen.concat().as_slice() {
        [false, true, false, false] => Ok(()),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// A tracker of the caller's own memory.
pub(crate) fn of_this_process() -> io::Result<WriteTracker> {
    // SAFETY: the call takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    let fd = i32::try_from(check(fd)?).map_err(io::Error::other)?;
    // SAFETY: the descriptor was made right above, and nobody else knows of it.
    WriteTracker::new(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// One page.
struct Scratch(usize);

const PAGE: usize = 4096;

impl Scratch {
    fn new() -> io::Result<Scratch> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, where the kernel likes.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, -1, 0) };
        match page == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(Scratch(page.expose_provenance())),
        }
    }

    fn write(&self) {
        let byte = std::ptr::with_exposed_provenance_mut::<u8>(self.0);
        // SAFETY: the page is mapped for writing for as long as this value lives, and nobody else knows of it.
        unsafe { byte.write_volatile(1) };
    }

    /// Moves the content, in place of that of `to`. What is left is unmapped.
    fn move_to(&self, to: &Scratch) -> io::Result<()> {
        let (from, to) = (
            std::ptr::with_exposed_provenance_mut(self.0),
            std::ptr::with_exposed_provenance_mut::<libc::c_void>(to.0),
        );
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both are pages of this type's, which nothing refers to.
        let moved = unsafe { libc::mremap(from, PAGE, PAGE, flags, to) };
        if moved == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: a page of this value's own, or nothing any more.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(self.0), PAGE) };
    }
}

/// Tells which pages of one address space are written. When it is dropped, nothing is tracked any more.
#[derive(Debug)]
pub struct WriteTracker(OwnedFd);

impl WriteTracker {
    /// Takes over a descriptor that has just been made.
    ///
    /// # Errors
    /// EINVAL where the kernel can't do it.
    pub fn new(fd: OwnedFd) -> io::Result<WriteTracker> {
        let features = WP_ASYNC | WP_UNPOPULATED | WP_HUGETLBFS_SHMEM;
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the request takes and fills a `struct uffdio_api`, whose size is asserted above.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
        check(result.into())?;
        Ok(WriteTracker(fd))
    }

    /// A descriptor that was made ready before, by another process perhaps.
    #[must_use]
    pub fn from_ready(fd: OwnedFd) -> WriteTracker {
        WriteTracker(fd)
    }

    /// Covers a range, which has to consist of whole mappings. That of one that is covered already changes nothing.
    ///
    /// Pages are not tracked before they were armed (`Pagemap::scan`).
    ///
    /// # Errors
    /// EBUSY: the process handles faults there itself. EINVAL, EPERM: memory of this kind can't be tracked.
    /// ENOMEM: the address space is gone.
    pub fn cover(&self, start: u64, end: u64) -> io::Result<()> {
        let mut register = Register { start, bytes: end - start, mode: MODE_WP, ioctls: 0 };
        // SAFETY: the request takes and fills a `struct uffdio_register`, whose size is asserted above.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
        check(result.into()).map(drop)
    }
}

impl WriteTracker {
    /// Returns when everybody has let go of the address space who held its lock, to read or to change it, at some moment since the call.
    ///
    /// `special` is a mapping that can't be covered, of the clock's data for instance: the kernel takes the lock for itself before it finds
    /// that out (fs/userfaultfd.c, userfaultfd_register), and nothing changes.
    ///
    /// # Errors
    /// The mapping is none of that kind, or the address space is gone.
    pub fn await_lock(&self, special: (u64, u64)) -> io::Result<()> {
        match self.cover(special.0, special.1) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl AsFd for WriteTracker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<WriteTracker> for OwnedFd {
    fn from(tracker: WriteTracker) -> OwnedFd {
        tracker.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What can be covered is no fence: it would be covered by using it as one.
    #[test]
    fn the_clock_is_a_fence_and_memory_is_none() {
        let tracker = of_this_process().expect("a tracker");
        let own = i32::try_from(std::process::id()).expect("a pid");
        let mappings = crate::proc::mappings_without_flags(own).expect("mappings");
        let clock = mappings.iter().find(|mapping| mapping.name == "[vvar]").expect("a clock");
        tracker.await_lock((clock.start, clock.end)).expect("a fence");
        let memory = Scratch::new().expect("a page");
        let page = (memory.0 as u64, memory.0 as u64 + PAGE as u64);
        tracker.await_lock(page).expect_err("no fence");
    }

    /// Whoever trusted a kernel that does not tell would store old content for new.
    #[test]
    fn this_kernel_tells_of_writes() {
        probe().expect("Linux 6.13 or newer, where tests run");
    }
}
