//! `keyctl(2)`: the session keyring, which no namespace separates.

use std::ffi::CStr;
use std::io;

/// Gives the calling process a session keyring of its own, named `name`.
///
/// # Errors
/// ENOSYS on a kernel without keyrings, EDQUOT when the user's key quota is used up.
pub fn join_session_keyring(name: &CStr) -> io::Result<()> {
    // SAFETY: `name` is a NUL-terminated string that outlives the call; the kernel only reads it.
    let result = unsafe {
        libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr())
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
