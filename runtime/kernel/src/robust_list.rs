//! `get_robust_list(2)`: where a thread keeps the mutexes that the kernel hands on when it dies.

use std::io;

use crate::{Pid, check};

/// Address and size of a thread's robust list head; address 0 for none.
pub fn get(tid: Pid) -> io::Result<(u64, u64)> {
    let mut head = 0u64;
    let mut bytes = 0u64;
    // SAFETY: both results outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut bytes) };
    check(result)?;
    Ok((head, bytes))
}
