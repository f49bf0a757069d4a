//! `bpf(2)`: loading a program for cgroup v2's device checks and attaching it; reading by a program that the kernel runs for each object
//! (Documentation/bpf/bpf_iterators.rst).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::Pid;

/// One instruction of eBPF, laid out as `struct bpf_insn` (linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    pub code: u8,
    /// Destination in the low half, source in the high half, on little-endian machines.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

const _: () = assert!(size_of::<Instruction>() == 8);

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_LINK_CREATE: i32 = 28;
const BPF_ITER_CREATE: i32 = 33;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_TRACE_ITER: u32 = 28;
/// Programs of cgroups above and below are asked too; all must agree.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The part of `union bpf_attr` that BPF_PROG_LOAD needs; the kernel takes the rest as zero.
#[derive(Default)]
#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
    /// Debugging information of the program, of which there is none.
    information: [u64; 4],
    line_count: u32,
    attach_btf_id: u32,
}

const _: () = assert!(std::mem::offset_of!(LoadAttr, attach_btf_id) == 108);

#[repr(C)]
struct LinkAttr {
    program_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    information: u64,
    information_bytes: u32,
    reserved: u32,
}

/// The part of `union bpf_iter_link_info` for the objects of one task.
#[repr(C)]
struct IteratedTask {
    tid: u32,
    pid: u32,
    pid_fd: u32,
    reserved: u32,
}

#[repr(C)]
struct IterateAttr {
    link_fd: u32,
    flags: u32,
}

#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    program_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Loads `program` as a check of device access.
///
/// # Errors
/// EACCES or EINVAL when the kernel's verifier refuses it, EPERM without CAP_BPF.
pub fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    load(
        program,
        c"Apache-2.0",
        LoadAttr { prog_type: BPF_PROG_TYPE_CGROUP_DEVICE, ..LoadAttr::default() },
    )
}

/// Loads `program` to be run for each object over which `function` goes, as the kernel's description of its types numbers it.
///
/// # Errors
/// As [`load_device_program`].
pub(crate) fn load_iterator_program(program: &[Instruction], function: u32) -> io::Result<OwnedFd> {
    let attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_TRACING,
        expected_attach_type: BPF_TRACE_ITER,
        attach_btf_id: function,
        ..LoadAttr::default()
    };
    // What such a program calls the kernel offers to programs under its own licence, which ours is under too.
    load(program, c"Dual MIT/GPL", attr)
}

fn load(program: &[Instruction], license: &CStr, attr: LoadAttr) -> io::Result<OwnedFd> {
    let attr = LoadAttr {
        instruction_count: u32::try_from(program.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..attr
    };
    // SAFETY: `attr` is of the size given; the pointers in it lead to `instruction_count`
    // instructions and a string, which outlive the call; the kernel writes to none of them.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<LoadAttr>())
    };
    new_descriptor(fd)
}

/// What a program for [`load_iterator_program`] writes when it is run for the objects of the first thread of a process, to be read like a
/// file.
///
/// # Errors
/// ESRCH: there is no such process.
pub(crate) fn iterate(program: BorrowedFd<'_>, pid: Pid) -> io::Result<File> {
    let tid = u32::try_from(pid).map_err(io::Error::other)?;
    iterate_over(program, IteratedTask { tid, pid: 0, pid_fd: 0, reserved: 0 })
}

/// As [`iterate`], for all threads of a process.
pub(crate) fn iterate_threads(program: BorrowedFd<'_>, pid: Pid) -> io::Result<File> {
    let pid = u32::try_from(pid).map_err(io::Error::other)?;
    iterate_over(program, IteratedTask { tid: 0, pid, pid_fd: 0, reserved: 0 })
}

/// As [`iterate`], for all threads of the caller's pid namespace and of those below it.
pub(crate) fn iterate_all(program: BorrowedFd<'_>) -> io::Result<File> {
    iterate_over(program, IteratedTask { tid: 0, pid: 0, pid_fd: 0, reserved: 0 })
}

fn iterate_over(program: BorrowedFd<'_>, task: IteratedTask) -> io::Result<File> {
    let number = |fd: BorrowedFd<'_>| u32::try_from(fd.as_raw_fd()).map_err(io::Error::other);
    let attr = LinkAttr {
        program_fd: number(program)?,
        target_fd: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        information: (&raw const task).addr() as u64,
        information_bytes: u32::try_from(size_of::<IteratedTask>()).map_err(io::Error::other)?,
        reserved: 0,
    };
    // SAFETY: `attr` is of the size given; the pointer in it leads to so many bytes, which outlive the call and are only read.
    let link = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attr, size_of::<LinkAttr>())
    };
    let link = new_descriptor(link)?;
    let attr = IterateAttr { link_fd: number(link.as_fd())?, flags: 0 };
    // SAFETY: `attr` is of the size given and holds no pointer.
    let file = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_ITER_CREATE, &raw const attr, size_of::<IterateAttr>())
    };
    new_descriptor(file).map(File::from)
}

/// What a call of `bpf` has returned that makes descriptors, right after it.
fn new_descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the call made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has `program` asked about every device access from `cgroup`, a folder of cgroup v2, and below.
pub fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let number = |fd: BorrowedFd<'_>| u32::try_from(fd.as_raw_fd()).map_err(io::Error::other);
    let attr = AttachAttr {
        target_fd: number(cgroup)?,
        program_fd: number(program)?,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attr` is of the size given and holds no pointer.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<AttachAttr>())
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
