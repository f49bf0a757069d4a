//! `ptrace(2)`: stopping threads and reading or writing their registers.
//!
//! All calls have to come from the thread that seized the tracee; the kernel answers ESRCH otherwise, as it does for a
//! tracee that is not stopped. When that thread ends, the kernel detaches every tracee and lets it run
//! (unless [`Options::EXIT_KILL`] was set).

use std::io;
use std::mem::size_of;
use std::ptr::{null_mut, without_provenance_mut};

use crate::{Pid, check};

/// Options of `PTRACE_SEIZE` and `PTRACE_SETOPTIONS`, as `ptrace(2)` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options(libc::c_int);

impl Options {
    /// Mark system call stops with bit 7 of the stop signal.
    pub const SYSGOOD: Options = Options(libc::PTRACE_O_TRACESYSGOOD);
    /// Attach to new processes and threads and stop them before their first instruction.
    pub const FOLLOW: Options =
        Options(libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK | libc::PTRACE_O_TRACECLONE);
    /// Stop after a successful `execve`.
    pub const EXEC: Options = Options(libc::PTRACE_O_TRACEEXEC);
    /// Kill the tracee when the tracer ends.
    pub const EXIT_KILL: Options = Options(libc::PTRACE_O_EXITKILL);
    /// Let the tracee make calls that its seccomp filter forbids. Needs CAP_SYS_ADMIN in the initial user namespace and a
    /// tracer without seccomp (kernel/ptrace.c, check_ptrace_options).
    pub const SUSPEND_SECCOMP: Options = Options(libc::PTRACE_O_SUSPEND_SECCOMP);

    /// Both sets of options.
    #[must_use]
    pub const fn and(self, other: Options) -> Options {
        Options(self.0 | other.0)
    }
}

/// The general registers, `struct user_regs_struct` of `<sys/user.h>` field by field.
///
/// `orig_rax` is the number of the system call that the thread is in, or -1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

const _: () = assert!(size_of::<Registers>() == size_of::<libc::user_regs_struct>());

/// Bytes of a `siginfo_t` (`SI_MAX_SIZE` of asm-generic/siginfo.h).
pub const SIGINFO_BYTES: usize = 128;

/// Upper bound of an XSAVE area that is accepted from the kernel: AMX needs 11 008 bytes, Intel documents no more than 12 KiB.
const XSTATE_BYTES_MAX: usize = 64 << 10;

/// A thread's registration of restartable sequences, from `PTRACE_GET_RSEQ_CONFIGURATION` (Linux 5.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rseq {
    pub address: u64,
    pub bytes: u32,
    pub signature: u32,
    pub flags: u32,
}

/// Attaches without stopping.
///
/// # Errors
/// EPERM: already traced, a zombie, or not permitted. ESRCH: gone. EINVAL: an option this kernel does not know.
pub fn seize(tid: Pid, options: Options) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, options.0.unsigned_abs() as usize)
}

/// Asks a seized thread to stop; the stop is reported by `waitpid`.
pub fn interrupt(tid: Pid) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0)
}

/// Replaces the options given to [`seize`].
pub fn set_options(tid: Pid, options: Options) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, options.0.unsigned_abs() as usize)
}

/// Lets a stopped thread run, delivering `signal` if it is not 0.
pub fn cont(tid: Pid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal.unsigned_abs() as usize)
}

/// Lets a stopped thread run up to the next entry to or exit from a system call.
pub fn cont_to_syscall(tid: Pid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, signal.unsigned_abs() as usize)
}

/// Leaves a thread in its group stop while going on to report what happens to it.
pub fn listen(tid: Pid) -> io::Result<()> {
    request(libc::PTRACE_LISTEN, tid, 0, 0)
}

/// Lets go of a stopped thread, delivering `signal` if it is not 0.
pub fn detach(tid: Pid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal.unsigned_abs() as usize)
}

/// The message of the last event stop: the new thread's id for fork events.
pub fn event_message(tid: Pid) -> io::Result<u64> {
    let mut message: libc::c_ulong = 0;
    let data = (&raw mut message).addr();
    request(libc::PTRACE_GETEVENTMSG, tid, 0, data)?;
    Ok(message)
}

/// General registers of a stopped thread.
pub fn registers(tid: Pid) -> io::Result<Registers> {
    let mut registers = Registers::default();
    let data = (&raw mut registers).addr();
    request(libc::PTRACE_GETREGS, tid, 0, data)?;
    Ok(registers)
}

/// Sets the general registers of a stopped thread.
pub fn set_registers(tid: Pid, registers: &Registers) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, std::ptr::from_ref(registers).addr())
}

const NT_X86_XSTATE: usize = 0x202;

/// The XSAVE area of a stopped thread in the standard (uncompacted) layout.
pub fn xstate(tid: Pid) -> io::Result<Vec<u8>> {
    // In most cases enough, and far sooner zeroed than the most that there may be.
    const USUAL_BYTES: usize = 12 << 10;
    let mut bytes = vec![0u8; USUAL_BYTES];
    loop {
        let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, (&raw mut vector).addr())?;
        // The kernel cuts off what does not fit.
        if vector.iov_len < bytes.len() || bytes.len() == XSTATE_BYTES_MAX {
            bytes.truncate(vector.iov_len);
            return Ok(bytes);
        }
        bytes.resize(XSTATE_BYTES_MAX, 0);
    }
}

/// Sets the XSAVE area of a stopped thread.
///
/// # Errors
/// EINVAL: a component that this processor lacks, or that the process has no permission for (AMX).
pub fn set_xstate(tid: Pid, bytes: &[u8]) -> io::Result<()> {
    let mut copy = bytes.to_vec();
    let mut vector = libc::iovec { iov_base: copy.as_mut_ptr().cast(), iov_len: copy.len() };
    request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, (&raw mut vector).addr())
}

/// The blocked signals of a stopped thread; inside `sigsuspend` and its like, those that it returns to.
pub fn signal_mask(tid: Pid) -> io::Result<u64> {
    let mut mask = 0u64;
    request(
        libc::PTRACE_GETSIGMASK as libc::c_uint,
        tid,
        size_of::<u64>(),
        (&raw mut mask).addr(),
    )?;
    Ok(mask)
}

/// Sets the blocked signals of a stopped thread.
pub fn set_signal_mask(tid: Pid, mask: u64) -> io::Result<()> {
    request(
        libc::PTRACE_SETSIGMASK as libc::c_uint,
        tid,
        size_of::<u64>(),
        (&raw const mask).addr(),
    )
}

/// Which queue of pending signals to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    Thread,
    Process,
}

/// Copies the pending signals of a stopped thread, or of its process, oldest first, without taking them.
pub fn pending(tid: Pid, queue: Queue) -> io::Result<Vec<[u8; SIGINFO_BYTES]>> {
    const AT_ONCE: usize = 8;
    let mut all = Vec::new();
    loop {
        let mut batch = [[0u8; SIGINFO_BYTES]; AT_ONCE];
        let mut arguments = libc::ptrace_peeksiginfo_args {
            off: all.len() as u64,
            flags: match queue {
                Queue::Thread => 0,
                Queue::Process => libc::PTRACE_PEEKSIGINFO_SHARED,
            },
            nr: 8,
        };
        let address = (&raw mut arguments).addr();
        let count =
            request_counting(libc::PTRACE_PEEKSIGINFO, tid, address, batch.as_mut_ptr().addr())?;
        all.extend(batch.iter().take(count));
        if count < AT_ONCE {
            return Ok(all);
        }
    }
}

/// The restartable sequences registration of a stopped thread; `None` where it has none.
pub fn rseq(tid: Pid) -> io::Result<Option<Rseq>> {
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        address: u64,
        bytes: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
    let mut configuration = Configuration::default();
    let data = (&raw mut configuration).addr();
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size_of::<Configuration>(), data)?;
    let Configuration { address, bytes, signature, flags, pad: _ } = configuration;
    Ok((address != 0).then_some(Rseq { address, bytes, signature, flags }))
}

/// Whether a stopped thread has its system calls handed back to it (`PR_SET_SYSCALL_USER_DISPATCH`). False before Linux 6.4,
/// which does not tell.
pub fn dispatches_calls(tid: Pid) -> io::Result<bool> {
    const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
    // Mode, address of the selector, start and length of the range that is exempt.
    let mut configuration = [0u64; 4];
    let data = configuration.as_mut_ptr().addr();
    let bytes = size_of_val(&configuration);
    match request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, bytes, data) {
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(false),
        other => other.map(|()| configuration[0] != 0),
    }
}

/// Whether a stopped thread may use I/O ports (`ioperm`).
pub fn uses_ports(tid: Pid) -> io::Result<bool> {
    const NT_386_IOPERM: usize = 0x201;
    // Any part of the map tells that there is one.
    let mut word = [0u8; 8];
    let mut vector = libc::iovec { iov_base: word.as_mut_ptr().cast(), iov_len: word.len() };
    let data = (&raw mut vector).addr();
    match request(libc::PTRACE_GETREGSET, tid, NT_386_IOPERM, data) {
        // ENXIO: it has none. EINVAL: this kernel gives them to nobody.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::EINVAL)) => Ok(false),
        other => other.map(|()| true),
    }
}

/// The `index`-th seccomp filter of a stopped thread as an array of `struct sock_filter` (8 bytes each), 0 being the oldest;
/// `None` past the newest.
///
/// # Errors
/// EMEDIUMTYPE: the filter was not installed in the classic form. EACCES: the tracer is filtered itself.
pub fn seccomp_filter(tid: Pid, index: usize) -> io::Result<Option<Vec<u8>>> {
    const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
    const INSTRUCTION_BYTES: usize = 8;
    let count = match request_counting(PTRACE_SECCOMP_GET_FILTER, tid, index, 0) {
        Ok(count) => count,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut program = vec![0u8; count * INSTRUCTION_BYTES];
    request_counting(PTRACE_SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr().addr())?;
    Ok(Some(program))
}

/// Flags that a filter was installed with, from `PTRACE_SECCOMP_GET_METADATA` (bit 1: log).
pub fn seccomp_filter_flags(tid: Pid, index: usize) -> io::Result<u64> {
    const PTRACE_SECCOMP_GET_METADATA: libc::c_uint = 0x420d;
    let mut metadata = [index as u64, 0];
    let data = metadata.as_mut_ptr().addr();
    request_counting(PTRACE_SECCOMP_GET_METADATA, tid, size_of_val(&metadata), data)?;
    Ok(metadata[1])
}

fn request(request: libc::c_uint, tid: Pid, address: usize, data: usize) -> io::Result<()> {
    request_counting(request, tid, address, data).map(drop)
}

fn request_counting(
    request: libc::c_uint,
    tid: Pid,
    address: usize,
    data: usize,
) -> io::Result<usize> {
    let address =
        if address == 0 { null_mut::<libc::c_void>() } else { without_provenance_mut(address) };
    // SAFETY: each caller passes in `data` either a number or the address of a live buffer with the layout and size that its
    // request documents; the kernel reads and writes no other memory of ours.
    let result = unsafe {
        libc::ptrace(request, tid, address, without_provenance_mut::<libc::c_void>(data))
    };
    let result = check(result)?;
    Ok(usize::try_from(result).expect("a ptrace request that succeeds returns no negative number"))
}
