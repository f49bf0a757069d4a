//! `fork(2)`: work that goes on when this process is killed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};

use crate::check;

/// Does `work` in a process of its own, to which nobody sends signals, and returns what it returned.
///
/// Whoever kills this process in between does not interrupt the work. It must not take locks that other threads of this process
/// may hold: allocating is allowed, as the C library sees to that, and logging is not.
///
/// # Errors
/// The other process could not be made, or was killed after all.
pub fn aside(work: impl FnOnce() -> Vec<u8>) -> io::Result<Vec<u8>> {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }.into())?;
    // SAFETY: the kernel has just made it for us.
    let reader = unsafe { OwnedFd::from_raw_fd(ends[0]) };
    // SAFETY: as above.
    let writer = unsafe { OwnedFd::from_raw_fd(ends[1]) };
    // SAFETY: the child is a copy of this thread alone; it keeps to what is said above, and ends without unwinding.
    let child = unsafe { libc::fork() };
    if child == 0 {
        in_child(work, writer);
    }
    check(child.into())?;
    drop(writer);
    let mut result = Vec::new();
    let read = File::from(reader).read_to_end(&mut result);
    let mut status = 0;
    // SAFETY: the kernel writes the status.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } == -1
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
    read?;
    if status == 0 {
        Ok(result)
    } else {
        Err(io::Error::other(format!("a process of our own ended with status {status:#x}")))
    }
}

fn in_child(work: impl FnOnce() -> Vec<u8>, writer: OwnedFd) -> ! {
    let mask = u64::MAX;
    // SAFETY: the kernel reads the eight bytes of a signal set.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            std::ptr::null::<u8>(),
            8,
        )
    };
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let result = work();
        // Nobody may be there any more to read it.
        File::from(writer).write_all(&result).is_ok()
    }));
    let status = i32::from(!done.unwrap_or(false));
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(status) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_in_another_process() {
        let own = std::process::id();
        let result = aside(|| std::process::id().to_le_bytes().to_vec()).unwrap();
        assert!(result.len() == 4 && result != own.to_le_bytes());
        let long = aside(|| vec![7; 1 << 20]).unwrap();
        assert!(long.len() == 1 << 20 && long.iter().all(|byte| *byte == 7));
    }
}
