//! `signal(7)`: dispositions and mask that a program inherits through `execve(2)`.

use std::io;

/// Gives every signal its default action and unblocks all of them.
///
/// Rust's runtime ignores SIGPIPE, and an ignored signal stays ignored through `execve(2)`.
pub fn reset_for_exec() -> io::Result<()> {
    for number in 1..=libc::SIGRTMAX() {
        // Those two cannot be changed; 32 and 33 belong to the C library, which refuses them.
        if matches!(number, libc::SIGKILL | libc::SIGSTOP | 32 | 33) {
            continue;
        }
        // SAFETY: SIG_DFL runs no code of ours.
        let previous = unsafe { libc::signal(number, libc::SIG_DFL) };
        if previous == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    let mut empty = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the pointer is to memory of the type that the call fills.
    unsafe { libc::sigemptyset(empty.as_mut_ptr()) };
    // SAFETY: `empty` was filled by sigemptyset; no old mask is asked for.
    let result =
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, empty.as_ptr(), std::ptr::null_mut()) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
