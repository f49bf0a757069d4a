//! What the kernel keeps of each thread of a process and tells only the thread itself, by one look at all of them.
//!
//! A program of eBPF reads it from the kernel's own list (`bpf_iter_task`). Some of it is what a call would tell ([`ThreadFacts`]), some
//! only serves to find threads that would give the same answers ([`Likeness`]), since what it means differs from kernel to kernel.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};

use crate::Pid;
use crate::bpf::{self, Instruction};
use crate::btf::Btf;

/// Reads threads.
#[derive(Debug)]
pub struct ThreadList {
    program: OwnedFd,
}

/// What is known of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadFacts {
    /// As the first pid namespace numbers it.
    pub tid: Pid,
    /// Start, bytes, and flags of its alternate stack for signals, the latter without those that `sigaltstack(2)` computes.
    pub alternate_stack: (u64, u64, u32),
    pub clear_child_tid: u64,
    pub parent_death_signal: u32,
    pub timer_slack_ns: u64,
    /// How often it has given up its processor by itself.
    pub voluntary_switches: u64,
    pub likeness: Likeness,
}

/// Threads of one process that are equal in this have equal credentials, keys, policies for I/O and memory, personality and mitigations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Likeness([u64; 8]);

/// Members of `struct task_struct`, or of one in it, and their bytes; each becomes a word of what the program writes.
const MEMBERS: [(&[&str], u8); 16] = [
    (&["pid"], 4),
    (&["sas_ss_sp"], 8),
    (&["sas_ss_size"], 8),
    (&["sas_ss_flags"], 4),
    (&["clear_child_tid"], 8),
    (&["pdeath_signal"], 4),
    (&["timer_slack_ns"], 8),
    (&["nvcsw"], 8),
    // From here on for the likeness.
    (&["cred"], 8),
    (&["io_context"], 8),
    (&["mempolicy"], 8),
    (&["atomic_flags"], 8),
    (&["personality"], 4),
    (&["flags"], 4),
    (&["thread_info", "flags"], 8),
    (&["thread_info", "syscall_work"], 8),
];

/// Members that kernels can be built without; who has none is like all others in it.
const OPTIONAL: [&str; 3] = ["io_context", "mempolicy", "syscall_work"];

const WORDS: usize = MEMBERS.len();
const THREAD_BYTES: usize = 8 * WORDS;

impl ThreadFacts {
    fn of_bytes(bytes: &[u8]) -> Option<ThreadFacts> {
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks(8)) {
            *word = u64::from_le_bytes(bytes.try_into().ok()?);
        }
        let [tid, start, stack_bytes, stack_flags, clear, death, slack, switches, likeness @ ..] =
            words;
        /// What a machine check does to it (PF_MCE_PROCESS, PF_MCE_EARLY of linux/sched.h); the rest changes all the time.
        const MACHINE_CHECKS: u64 = 0x80 | 0x0800_0000;
        let mut likeness = Likeness(likeness);
        let [_, _, _, _, _, flags, ..] = &mut likeness.0;
        *flags &= MACHINE_CHECKS;
        Some(ThreadFacts {
            tid: Pid::try_from(tid).ok()?,
            alternate_stack: (start, stack_bytes, u32::try_from(stack_flags).ok()?),
            clear_child_tid: clear,
            parent_death_signal: u32::try_from(death).ok()?,
            timer_slack_ns: slack,
            voluntary_switches: switches,
            likeness,
        })
    }
}

impl ThreadList {
    /// Loads the program.
    ///
    /// # Errors
    /// The kernel does not describe its types, has them in another way, or refuses the program (EPERM without CAP_BPF and CAP_PERFMON).
    pub fn new() -> io::Result<ThreadList> {
        let btf = Btf::of_kernel()?;
        let program = program(&btf).ok_or(io::ErrorKind::Unsupported)?;
        let function = btf.function("bpf_iter_task").ok_or(io::ErrorKind::Unsupported)?;
        Ok(ThreadList { program: bpf::load_iterator_program(&program, function)? })
    }

    /// The threads of a process that stands.
    ///
    /// # Errors
    /// ESRCH; those of reading.
    pub fn of(&self, pid: Pid) -> io::Result<Vec<ThreadFacts>> {
        /// The kernel gives no more at once.
        const AT_ONCE: usize = 32 << 10;
        let mut file = bpf::iterate_threads(self.program.as_fd(), pid)?;
        let mut bytes = Vec::new();
        let mut chunk = vec![0; AT_ONCE];
        loop {
            match file.read(&mut chunk)? {
                0 => break,
                count => bytes.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            }
        }
        let threads = bytes.chunks(THREAD_BYTES).map(ThreadFacts::of_bytes);
        threads.collect::<Option<Vec<_>>>().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// The program: writes [`MEMBERS`] of the thread that it is run for.
fn program(btf: &Btf) -> Option<Vec<Instruction>> {
    /// `bpf_seq_write(seq, data, length)`.
    const SEQ_WRITE: i32 = 127;
    const LOAD: u8 = 0x79;
    const LOAD_HALF: u8 = 0x61;
    const STORE: u8 = 0x7b;
    const MOVE: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const ADD: u8 = 0x07;
    const CALL: u8 = 0x85;
    const UNLESS_EQUAL: u8 = 0x55;
    const EXIT: u8 = 0x95;
    const FRAME: u8 = 10;
    let bytes = i32::try_from(THREAD_BYTES).ok()?;
    let step = |code, to: u8, from: u8, offset, immediate| Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    };
    let context = |member| btf.member("bpf_iter__task", member);
    let offset = |path: &[&str]| {
        let structures = ["task_struct"].into_iter().chain(path.iter().copied());
        let steps = structures.zip(path).map(|(structure, member)| btf.member(structure, member));
        steps.sum::<Option<i16>>()
    };
    let mut program = vec![
        step(MOVE, 6, 1, 0, 0),
        step(LOAD, 7, 6, context("task")?, 0),
        // The end of the list.
        step(UNLESS_EQUAL, 7, 0, 2, 0),
        step(SET, 0, 0, 0, 0),
        step(EXIT, 0, 0, 0, 0),
        step(LOAD, 8, 6, context("meta")?, 0),
        step(LOAD, 1, 8, btf.member("bpf_iter_meta", "seq")?, 0),
    ];
    for ((path, width), place) in MEMBERS.iter().zip((1..=WORDS).rev()) {
        let load = if *width == 4 { LOAD_HALF } else { LOAD };
        match (offset(path), path.last()) {
            (Some(offset), _) => program.push(step(load, 2, 7, offset, 0)),
            (None, Some(last)) if OPTIONAL.contains(last) => program.push(step(SET, 2, 0, 0, 0)),
            (None, _) => return None,
        }
        let place = -8 * i16::try_from(place).ok()?;
        program.push(step(STORE, FRAME, 2, place, 0));
    }
    program.extend([
        step(MOVE, 2, FRAME, 0, 0),
        step(ADD, 2, 0, 0, -bytes),
        step(SET, 3, 0, 0, bytes),
        step(CALL, 0, 0, 0, SEQ_WRITE),
        step(SET, 0, 0, 0, 0),
        step(EXIT, 0, 0, 0, 0),
    ]);
    Some(program)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn own() -> Pid {
        Pid::try_from(std::process::id()).expect("a pid")
    }

    /// A thread that would be taken to be like another one would come back with that one's state.
    #[test]
    fn threads_differ_in_what_they_have_changed() {
        let list = ThreadList::new().expect("Linux 6.1 or newer with BTF, where tests run");
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // SAFETY: takes numbers only, and returns one.
            let tid = unsafe { libc::gettid() };
            tell.send(tid).expect("the test waits");
            ended.recv().expect("a word");
            let changes = [
                (libc::PR_SET_TIMERSLACK, 1234),
                (libc::PR_SET_PDEATHSIG, libc::SIGUSR1),
                // Its own copy of the credentials.
                (libc::PR_SET_SECUREBITS, 1 << 5),
            ];
            for (change, value) in changes {
                // SAFETY: takes numbers only; concerns this thread alone.
                unsafe { libc::prctl(change, libc::c_ulong::from(value.unsigned_abs()), 0, 0, 0) };
            }
            tell.send(tid).expect("the test waits");
            let _ = ended.recv();
        });
        let tid: Pid = told.recv().expect("a number");
        let look = |tid: Pid| {
            let threads = list.of(own()).expect("a list");
            threads.into_iter().find(|facts| facts.tid == tid).expect("the thread")
        };
        // SAFETY: takes nothing, and returns a number.
        let this = unsafe { libc::gettid() };
        assert_eq!(look(tid).likeness.0[0], look(this).likeness.0[0], "the same credentials");
        // Rust gives its threads such stacks.
        assert_ne!(look(tid).alternate_stack, look(this).alternate_stack);
        assert_ne!(look(tid).clear_child_tid, look(this).clear_child_tid);
        end.send(()).expect("the thread waits");
        told.recv().expect("a word");
        let changed = look(tid);
        assert_eq!(changed.timer_slack_ns, 1234);
        assert_eq!(changed.parent_death_signal, libc::SIGUSR1.unsigned_abs());
        assert_ne!(changed.likeness.0[0], look(this).likeness.0[0], "other credentials");
        drop(end);
        thread.join().expect("its end");
    }
}
