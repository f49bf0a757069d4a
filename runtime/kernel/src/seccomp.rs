//! `seccomp(2)`: installing a filter program.

use std::io;

/// One instruction of classic BPF, laid out as `struct sock_filter` (linux/filter.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    pub code: u16,
    pub jump_true: u8,
    pub jump_false: u8,
    pub value: u32,
}

const _: () = assert!(size_of::<Instruction>() == size_of::<libc::sock_filter>());

/// The kernel refuses longer programs (BPF_MAXINSNS in linux/bpf_common.h).
pub const INSTRUCTIONS_MAX: usize = 4096;

/// Installs `program` for the calling thread, with `flags` of `SECCOMP_SET_MODE_FILTER`.
///
/// # Errors
/// EINVAL for a malformed or overlong program, EACCES without `CAP_SYS_ADMIN` and without
/// `no_new_privs`.
pub fn set_mode_filter(program: &[Instruction], flags: u32) -> io::Result<()> {
    let len = u16::try_from(program.len())
        .ok()
        .filter(|&len| usize::from(len) <= INSTRUCTIONS_MAX)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    let header =
        libc::sock_fprog { len, filter: program.as_ptr().cast::<libc::sock_filter>().cast_mut() };
    // SAFETY: `header` names `len` instructions that live until the call returns; the kernel
    // copies them and writes to none.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const header)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
