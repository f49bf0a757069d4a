//! What is mounted for a process, also above a root directory of its own.
//!
//! `/proc/PID/root` and `/proc/PID/mountinfo` begin where the process's root is, which `chroot(2)` moves. The namespace's own root
//! is what a thread gets that enters it.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::setns::in_thread;
use crate::{Pid, check};

/// The root directory of the mount namespace of process `pid`, opened to be read.
///
/// # Errors
/// Of `/proc`, and of `setns(2)` where the process has another root.
pub fn root(pid: Pid) -> io::Result<File> {
    if has_its_root(pid)? {
        return File::open(format!("/proc/{pid}/root"));
    }
    inside(pid, |_| File::open("/"))
}

/// `/proc/PID/mountinfo` with every mount of the namespace of process `pid`.
///
/// # Errors
/// As [`root`].
pub fn mountinfo(pid: Pid) -> io::Result<Vec<u8>> {
    if has_its_root(pid)? {
        return fs::read(format!("/proc/{pid}/mountinfo"));
    }
    inside(pid, mountinfo_of)
}

/// Reads `mountinfo` in the folder of a thread, which must be the calling one's.
fn mountinfo_of(thread: &File) -> io::Result<Vec<u8>> {
    let (name, flags) = (c"mountinfo", libc::O_RDONLY | libc::O_CLOEXEC);
    // SAFETY: the name ends with a zero byte, and the descriptor lives.
    let fd = unsafe { libc::openat(thread.as_raw_fd(), name.as_ptr(), flags) };
    let fd = RawFd::try_from(check(fd.into())?).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    Ok(text)
}

/// Whether the root directory of a process is the one of its mount namespace.
fn has_its_root(pid: Pid) -> io::Result<bool> {
    Ok(fs::read_link(format!("/proc/{pid}/root"))?.as_os_str() == "/")
}

/// Runs `act` in the namespace, with the folder in `/proc` of the thread that runs it.
fn inside<T: Send>(pid: Pid, act: impl FnOnce(&File) -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
    in_thread(|| {
        let thread = File::open("/proc/thread-self")?;
        // SAFETY: the call takes no memory. Root and working directory are this thread's own from here on.
        check(unsafe { libc::unshare(libc::CLONE_FS) }.into())?;
        // SAFETY: the call takes a descriptor that lives, and changes this thread only.
        check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) }.into())?;
        act(&thread)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    /// Root only, who may enter a namespace. A container whose init has another root is a case of `tests/state`.
    #[test]
    fn both_ways_show_the_same() {
        let me = Pid::try_from(std::process::id()).expect("a pid");
        let entered = inside(me, mountinfo_of).expect("mounts");
        assert_eq!(mountinfo(me).expect("own mounts"), entered);
        let entered = inside(me, |_| File::open("/")).expect("a root").metadata();
        let plain = root(me).expect("own root").metadata();
        assert_eq!(plain.expect("metadata").ino(), entered.expect("metadata").ino());
    }
}
