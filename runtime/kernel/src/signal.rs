//! `signal(7)`: dispositions and mask that a program inherits through `execve(2)`.

use std::io;

/// Gives every signal its default action and unblocks all of them.
///
/// Rust's runtime ignores SIGPIPE, and an ignored signal stays ignored through `execve(2)`.
pub fn reset_for_exec() -> io::Result<()> {
    // As the kernel takes it (asm/signal.h): handler, flags, restorer, mask. Zeros are SIG_DFL.
    let default = [0_u64; 4];
    for number in 1..=64 {
        if matches!(number, libc::SIGKILL | libc::SIGSTOP) {
            continue;
        }
        // The C library's function would refuse 32 and 33, which a caller may ignore all the same.
        // SAFETY: `default` is as long as a struct sigaction of the kernel and outlives the call;
        // SIG_DFL runs no code of ours; the old action is not asked for.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                number,
                default.as_ptr(),
                std::ptr::null_mut::<libc::c_void>(),
                size_of::<u64>(),
            )
        };
        if result == -1 {
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
