//! The code that runs inside a tracee.
//!
//! Two pieces of position-independent x86-64 code. Both end by themselves with the registers and the instruction pointer that
//! they were given, so a tracer that dies while they run costs the tracee nothing. Neither touches the stack of the tracee
//! (a goroutine's stack has other objects right below it) nor its floating point and vector state; the kernel keeps all
//! registers over a system call but `rax`, `rcx` and `r11`.
//!
//! - [`once`] makes a single system call, and holds everything it restores as immediate operands. It fits into the padding at
//!   the end of the vdso, and makes the first mapping. [`opening`] and [`closing`] do with a single stop what takes several.
//! - [`interpreter`] lives in a mapping of its own and makes the calls of a table, the *tape*.

use std::arch::global_asm;

use crate::ptrace::Registers;

/// One system call of a tape: 64 bytes that the interpreter reads and, in `result`, writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Call {
    /// Number of the system call, plus [`STOP_ON_ERROR`].
    pub number: u64,
    pub arguments: [u64; 6],
    /// What the call returned, or [`NOT_RUN`].
    pub result: u64,
}

/// Flag in [`Call::number`]: if the call fails, the tape ends after it.
pub const STOP_ON_ERROR: u64 = 1 << 32;
/// [`Call::result`] of a call that the tape did not reach.
pub const NOT_RUN: u64 = u64::MAX / 2;
pub const CALL_BYTES: usize = 64;

/// Offset, from the start of the interpreter, of the block with the registers to return to.
///
/// The interpreter addresses it relative to itself, and uses it as a stack for one `popfq`. The memory from the code's page up
/// to the block is writable and no longer needed by then, so that a signal in that very instruction finds room for its frame.
pub const RETURN_BLOCK: u64 = SLOTS as u64 * SLOT_BYTES + BELOW_BLOCK;
/// Copies of the interpreter that there is room for, each with a block of its own, so that as many threads can run tapes at once.
pub const SLOTS: usize = 8;
/// From one copy to the next, and from one block to the next.
pub const SLOT_BYTES: u64 = 16 << 10;
/// Of a slot, what lies below its block. A frame with the largest vector state (AMX) takes 11 KiB.
const BELOW_BLOCK: u64 = 12 << 10;
/// Size of the return block.
pub const RETURN_BLOCK_BYTES: usize = 19 * 8;

impl Call {
    #[must_use]
    pub fn new(number: libc::c_long, arguments: [u64; 6]) -> Call {
        Call { number: number.unsigned_abs(), arguments, result: NOT_RUN }
    }

    /// The call ends the tape if it fails.
    #[must_use]
    pub fn required(mut self) -> Call {
        self.number |= STOP_ON_ERROR;
        self
    }

    /// Whether the tape ends if the call fails.
    #[must_use]
    pub fn is_required(&self) -> bool {
        self.number & STOP_ON_ERROR != 0
    }

    #[must_use]
    pub fn to_bytes(self) -> [u8; CALL_BYTES] {
        let mut bytes = [0u8; CALL_BYTES];
        let words = [self.number].into_iter().chain(self.arguments).chain([self.result]);
        for (target, word) in bytes.chunks_exact_mut(8).zip(words) {
            target.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// What the call returned: a value, or the error number.
    pub fn outcome(result: u64) -> Result<u64, i32> {
        match result.cast_signed() {
            error @ -4095..=-1 => Err(i32::try_from(-error).expect("at most 4095")),
            _ => Ok(result),
        }
    }
}

/// How a tape ends where its tracer lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With a system call at which the tracer takes over. Without a tracer it is harmless.
    Call,
    /// With a breakpoint, so that the tape runs without a stop up to there. Without a tracer it is deadly.
    Breakpoint,
    /// With a signal that the thread sends to itself, so that the tape runs without a stop up to there. It has to be one that the
    /// process ignores and the thread has not blocked: the kernel drops it at once where there is no tracer, and tells a tracer
    /// of it (kernel/signal.c, sig_ignored).
    Signal(i32),
}

/// The bit of the flags with which the processor sends SIGTRAP after every instruction. A program may have set it for itself; code
/// that a tracer has it run goes without.
pub const TRAP_FLAG: u64 = 1 << 8;

/// Registers with which a thread starts to run `calls` calls at `tape`, with the interpreter mapped at `interpreter`.
#[must_use]
pub fn start(interpreter: u64, tape: u64, calls: u64, end: End, from: &Registers) -> Registers {
    let breakpoint = u64::from(end == End::Breakpoint);
    let signal = match end {
        End::Signal(signal) => u64::from(signal.unsigned_abs()),
        End::Call | End::Breakpoint => 0,
    };
    Registers {
        rip: interpreter,
        rbx: tape,
        rbp: calls,
        r12: breakpoint,
        r13: signal,
        orig_rax: u64::MAX,
        eflags: from.eflags & !TRAP_FLAG,
        ..*from
    }
}

/// The block at [`RETURN_BLOCK`], in the order in which the interpreter loads it: registers, and the signal mask.
#[must_use]
pub fn return_block(to: &Registers, mask: u64) -> [u8; RETURN_BLOCK_BYTES] {
    let words = [
        to.eflags, to.rsp, to.rax, to.rbx, to.rcx, to.rdx, to.rsi, to.rdi, to.rbp, to.r8, to.r9,
        to.r10, to.r11, to.r12, to.r13, to.r14, to.r15, to.rip, mask,
    ];
    let mut bytes = [0u8; RETURN_BLOCK_BYTES];
    for (target, word) in bytes.chunks_exact_mut(8).zip(words) {
        target.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Bytes of the code that [`once`] makes.
pub const ONCE_BYTES: usize = ONCE_PREFIX.len() + 9 * 10 + 14 + 8;

/// Code for one system call after which the thread has the general registers of `to` and the signal mask `mask`.
///
/// The call's number and arguments are in the registers with which the thread starts at the first byte.
/// Flags need no restoring: `syscall` keeps them, `mov` and `lea` do not change them. Only [`TRAP_FLAG`], without which the thread
/// starts, stays away: the code can't load flags without a stack.
#[must_use]
pub fn once(to: &Registers, mask: u64) -> [u8; ONCE_BYTES] {
    let loads: [([u8; 2], u64); 9] = [
        ([0x48, 0xb8], to.rax),
        ([0x48, 0xb9], to.rcx),
        ([0x48, 0xba], to.rdx),
        ([0x48, 0xbe], to.rsi),
        ([0x48, 0xbf], to.rdi),
        ([0x49, 0xb8], to.r8),
        ([0x49, 0xb9], to.r9),
        ([0x49, 0xba], to.r10),
        ([0x49, 0xbb], to.r11),
    ];
    let mut code = Vec::with_capacity(ONCE_BYTES);
    code.extend(ONCE_PREFIX);
    for (opcode, value) in loads {
        code.extend(opcode);
        code.extend(value.to_le_bytes());
    }
    // jmp *0(%rip), its target, and the mask.
    code.extend([0xff, 0x25, 0, 0, 0, 0]);
    code.extend(to.rip.to_le_bytes());
    code.extend(mask.to_le_bytes());
    code.try_into().expect("the parts add up to ONCE_BYTES")
}

/// Offset in [`opening`]'s and [`closing`]'s code of the instruction after the call that sends the signal.
const fn signal_offset(first: usize) -> u64 {
    (first + 21) as u64
}

/// Code that maps memory with the call in the registers with which the thread starts, and over its first `code_bytes` a second
/// mapping that can be run; then it sends `signal` to its own thread ([`End::Signal`]) and ends as [`once`] does, in all without a
/// stop but that for the signal. There `r8` is what the first call has returned, `r9` what the second has. The second number is
/// the offset of that stop.
#[must_use]
pub fn opening(to: &Registers, mask: u64, signal: i32, code_bytes: u32) -> (Vec<u8>, u64) {
    const FLAGS: u32 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED).unsigned_abs();
    const PROTECTION: u32 = (libc::PROT_READ | libc::PROT_EXEC).unsigned_abs();
    let mut code = vec![0x0f, 0x05]; // syscall
    // Where the first has failed, the second does too: no page begins at the number of an error.
    code.extend([0x48, 0x89, 0xc7]); // mov %rax, %rdi
    code.push(0xbe); // mov $code_bytes, %esi
    code.extend(code_bytes.to_le_bytes());
    code.push(0xba); // mov $PROTECTION, %edx
    code.extend(PROTECTION.to_le_bytes());
    code.extend([0x41, 0xba]); // mov $FLAGS, %r10d
    code.extend(FLAGS.to_le_bytes());
    code.extend([0x49, 0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff]); // mov $-1, %r8
    code.extend([0x41, 0xb9, 0, 0, 0, 0]); // mov $0, %r9d
    code.extend([0xb8, 9, 0, 0, 0, 0x0f, 0x05]); // mmap
    code.extend([0x49, 0x89, 0xf8]); // mov %rdi, %r8
    code.extend([0x49, 0x89, 0xc1]); // mov %rax, %r9
    by_signal(code, to, mask, signal)
}

/// As [`opening`], with the one call alone, whose result is in `r8`.
#[must_use]
pub fn closing(to: &Registers, mask: u64, signal: i32) -> (Vec<u8>, u64) {
    let mut code = vec![0x0f, 0x05]; // syscall
    code.extend([0x49, 0x89, 0xc0]); // mov %rax, %r8
    by_signal(code, to, mask, signal)
}

/// Code that makes a process which shares nothing with its maker but what it has not written yet, by the `clone` in the registers with
/// which the thread starts; the thread ends as [`once`] does. The new process lets go of all descriptors, calls itself `name`, and ends:
/// its tracer stops it at the last of its [`FORK_CALLS`] calls.
#[must_use]
pub fn forking(to: &Registers, mask: u64, name: &[u8; 16]) -> Vec<u8> {
    const CLOSE_RANGE_UNSHARE: u32 = 2;
    let mut child = vec![0xb8, 0xb4, 1, 0, 0]; // mov $436, %eax: close_range
    child.extend([0x31, 0xff]); // xor %edi, %edi
    child.extend([0xbe, 0xff, 0xff, 0xff, 0xff]); // mov $-1, %esi
    child.push(0xba); // mov $CLOSE_RANGE_UNSHARE, %edx
    child.extend(CLOSE_RANGE_UNSHARE.to_le_bytes());
    child.extend([0x0f, 0x05]); // syscall
    child.extend([0xb8, 157, 0, 0, 0]); // mov $157, %eax: prctl
    child.extend([0xbf, 15, 0, 0, 0]); // mov $15, %edi: PR_SET_NAME
    child.extend([0x48, 0x8d, 0x35, 12, 0, 0, 0]); // lea 12(%rip), %rsi: the name
    child.extend([0x0f, 0x05]); // syscall
    child.extend([0xb8, 231, 0, 0, 0]); // mov $231, %eax: exit_group
    child.extend([0x31, 0xff]); // xor %edi, %edi
    child.extend([0x0f, 0x05]); // syscall
    child.push(0xf4); // hlt
    child.extend(name);

    let mut code = vec![0x0f, 0x05]; // syscall
    // Without changing the flags, as all of `once`.
    code.extend([0x48, 0x89, 0xc1]); // mov %rax, %rcx
    code.extend([0xe3, 2]); // jrcxz over the next
    code.extend([0xeb, u8::try_from(child.len()).expect("a short jump")]); // jmp behind the child's
    code.extend(child);
    code.extend(once(to, mask).iter().skip(2));
    assert!(code.len() <= OPENING_BYTES, "the largest is the one that opens");
    code
}

/// How many calls a process makes that [`forking`]'s code has made, the one by which it ends included.
pub const FORK_CALLS: usize = 3;

fn by_signal(mut code: Vec<u8>, to: &Registers, mask: u64, signal: i32) -> (Vec<u8>, u64) {
    let offset = signal_offset(code.len());
    code.extend([0xb8, 186, 0, 0, 0, 0x0f, 0x05]); // gettid
    code.extend([0x89, 0xc7]); // mov %eax, %edi
    code.push(0xbe); // mov $signal, %esi
    code.extend(signal.to_le_bytes());
    code.extend([0xb8, 200, 0, 0, 0, 0x0f, 0x05]); // tkill
    assert_eq!(code.len() as u64, offset, "the instructions add up");
    // All of `once` but its first call.
    code.extend(once(to, mask).iter().skip(2));
    assert!(code.len() <= OPENING_BYTES, "the largest is the one that opens");
    (code, offset)
}

/// Bytes of the code that [`opening`] makes.
pub const OPENING_BYTES: usize = 224;

/// How [`once`]'s code begins: the call, and `rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8)`.
pub const ONCE_PREFIX: [u8; 32] = [
    0x0f, 0x05, // syscall
    0xb8, 14, 0, 0, 0, // mov $14, %eax
    0xbf, 2, 0, 0, 0, // mov $2, %edi
    0x48, 0x8d, 0x35, 0x75, 0, 0, 0, // lea 117(%rip), %rsi: the mask behind the jump
    0xba, 0, 0, 0, 0, // mov $0, %edx
    0x41, 0xba, 8, 0, 0, 0, // mov $8, %r10d
    0x0f, 0x05, // syscall
];

global_asm!(
    ".pushsection .rodata.samara_tape, \"a\"",
    ".globl samara_tape_begin",
    "samara_tape_begin:",
    "2:",
    "test rbp, rbp",
    "jz 3f",
    "mov eax, dword ptr [rbx]",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "syscall",
    "mov [rbx + 56], rax",
    "cmp rax, -4095",
    "jb 4f",
    "cmp dword ptr [rbx + 4], 0",
    "jne 3f",
    "4:",
    "add rbx, 64",
    "dec rbp",
    "jmp 2b",
    "3:",
    "test r12, r12",
    "jz 5f",
    "int3",
    // One more call, at which the tracer takes over.
    "5:",
    "mov eax, 186", // gettid
    "syscall",
    ".globl samara_tape_marker",
    "samara_tape_marker:",
    "test r13d, r13d",
    "jz 6f",
    "mov edi, eax",
    "mov esi, r13d",
    "mov eax, 200", // tkill
    "syscall",
    ".globl samara_tape_signal",
    "samara_tape_signal:",
    "6:",
    // From here on there is no tracer: the signal mask was its doing.
    "mov eax, 14", // rt_sigprocmask
    "mov edi, 2",  // SIG_SETMASK
    "lea rsi, [rip + samara_tape_begin + {block} + 144]",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    // Flags come back through a stack; for two instructions it is our own block.
    "lea rsp, [rip + samara_tape_begin + {block}]",
    "popfq",
    "mov rsp, [rip + samara_tape_begin + {block} + 8]",
    "mov rax, [rip + samara_tape_begin + {block} + 16]",
    "mov rbx, [rip + samara_tape_begin + {block} + 24]",
    "mov rcx, [rip + samara_tape_begin + {block} + 32]",
    "mov rdx, [rip + samara_tape_begin + {block} + 40]",
    "mov rsi, [rip + samara_tape_begin + {block} + 48]",
    "mov rdi, [rip + samara_tape_begin + {block} + 56]",
    "mov rbp, [rip + samara_tape_begin + {block} + 64]",
    "mov r8, [rip + samara_tape_begin + {block} + 72]",
    "mov r9, [rip + samara_tape_begin + {block} + 80]",
    "mov r10, [rip + samara_tape_begin + {block} + 88]",
    "mov r11, [rip + samara_tape_begin + {block} + 96]",
    "mov r12, [rip + samara_tape_begin + {block} + 104]",
    "mov r13, [rip + samara_tape_begin + {block} + 112]",
    "mov r14, [rip + samara_tape_begin + {block} + 120]",
    "mov r15, [rip + samara_tape_begin + {block} + 128]",
    "jmp [rip + samara_tape_begin + {block} + 136]",
    ".globl samara_tape_end",
    "samara_tape_end:",
    ".popsection",
    block = const RETURN_BLOCK,
);

/// The number of the call that ends every tape.
pub const END_CALL: u64 = 186;

/// Offset of the instruction after the call that ends a tape.
#[must_use]
pub fn interpreter_marker() -> u64 {
    unsafe extern "C" {
        static samara_tape_begin: u8;
        static samara_tape_marker: u8;
    }
    ((&raw const samara_tape_marker).addr() - (&raw const samara_tape_begin).addr()) as u64
}

/// Offset of the instruction after the call by which a tape that ends with [`End::Signal`] sends it.
#[must_use]
pub fn interpreter_signal() -> u64 {
    unsafe extern "C" {
        static samara_tape_begin: u8;
        static samara_tape_signal: u8;
    }
    ((&raw const samara_tape_signal).addr() - (&raw const samara_tape_begin).addr()) as u64
}

/// The interpreter's code.
#[must_use]
pub fn interpreter() -> &'static [u8] {
    unsafe extern "C" {
        static samara_tape_begin: u8;
        static samara_tape_end: u8;
    }
    let begin = &raw const samara_tape_begin;
    let bytes = (&raw const samara_tape_end).addr() - begin.addr();
    // SAFETY: both symbols delimit the bytes that the assembler wrote between them into read-only data.
    unsafe { std::slice::from_raw_parts(begin, bytes) }
}
