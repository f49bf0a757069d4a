//! Every thread there is, which call it is in, and whose memory it has: by a program of eBPF that the kernel runs for each of them
//! (`bpf_iter__task`, Linux 5.15 for the helper that finds the registers).
//!
//! `/proc/PID/task/TID/syscall` says nothing of a thread that is on a processor, and takes microseconds for each. What a thread is told to
//! be in is the call that it entered last: one that has just left it, and runs on its own, shows the old one until something interrupts
//! it, a tick at the latest. One that is in a call always shows it.
//!
//! What this does not see: threads of pid namespaces that lie beside or above the caller's.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};

use crate::Pid;
use crate::bpf::{self, Instruction};
use crate::btf::Btf;

/// Lists threads.
#[derive(Debug)]
pub struct TaskList {
    program: OwnedFd,
}

/// Tells memories from each other for as long as they exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemoryId(u64);

impl MemoryId {
    /// For tests of what is decided by lists.
    #[must_use]
    pub fn example(number: u64) -> MemoryId {
        MemoryId(number)
    }
}

/// A thread that has memory of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    pub memory: MemoryId,
    /// As the first pid namespace numbers it.
    pub tid: u64,
    /// Number of the call that it has entered last, as its architecture numbers it; -1 after an interrupt.
    pub call: i64,
    /// How many calls that read it has completed; 0 where the kernel does not count (CONFIG_TASK_XACCT).
    pub reads: u64,
    /// It has made use of io_uring.
    pub io_uring: bool,
    /// Its memory has had a context of asynchronous I/O.
    pub aio: bool,
    /// Of the calls that were asked for, the file that their first argument is.
    pub file: Option<CallFile>,
}

/// What a call is about. Zeros where it could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallFile {
    /// As `open(2)` takes them.
    pub flags: u32,
    /// Kind and permissions, as in `st_mode`.
    pub mode: u32,
    /// Kind of the file system, as in `f_type` of `statfs(2)`.
    pub file_system: u64,
}

/// What the program writes for each: memory, tid, call, reads, io_uring, aio, file, flags and mode, file system.
const TASK_BYTES: usize = 72;

impl Task {
    fn of_bytes(bytes: &[u8]) -> Option<Task> {
        let word = |index: usize| {
            bytes.get(8 * index..)?.first_chunk().map(|word| u64::from_le_bytes(*word))
        };
        let (asked, both) = (word(6)?, word(7)?);
        let file = CallFile {
            flags: u32::try_from(both & 0xffff_ffff).ok()?,
            mode: u32::try_from(both >> 32).ok()?,
            file_system: word(8)?,
        };
        Some(Task {
            memory: MemoryId(word(0)?),
            tid: word(1)?,
            call: word(2)?.cast_signed(),
            reads: word(3)?,
            io_uring: word(4)? != 0,
            aio: word(5)? != 0,
            file: (asked != 0).then_some(file),
        })
    }
}

impl TaskList {
    /// Loads the program. For threads in one of `calls`, it looks at the file that the first argument of the call is.
    ///
    /// # Errors
    /// The kernel does not describe its types, has not what is asked for, or refuses the program (EPERM without CAP_BPF and CAP_PERFMON).
    pub fn new(calls: &[i32]) -> io::Result<TaskList> {
        let btf = Btf::of_kernel()?;
        let program = program(&btf, calls).ok_or(io::ErrorKind::Unsupported)?;
        let function = btf.function("bpf_iter_task").ok_or(io::ErrorKind::Unsupported)?;
        Ok(TaskList { program: bpf::load_iterator_program(&program, function)? })
    }

    /// Every thread of the caller's pid namespace and of those below it, less those of the kernel and those that have ended. One that
    /// exists from before the call until after it is in the list.
    ///
    /// # Errors
    /// Those of reading.
    pub fn all(&self) -> io::Result<Vec<Task>> {
        /// More than any kernel has threads (PID_MAX_LIMIT of linux/threads.h).
        const BYTES_MAX: u64 = (4 << 20) * TASK_BYTES as u64;
        let mut bytes = Vec::new();
        let mut file = bpf::iterate_all(self.program.as_fd())?;
        // The kernel fills what it is given by 32 KiB.
        let mut chunk = vec![0; 32 << 10];
        loop {
            let count = file.read(&mut chunk)?;
            bytes.extend_from_slice(chunk.get(..count).unwrap_or_default());
            if count == 0 {
                break;
            }
            if bytes.len() as u64 > BYTES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        let tasks = bytes.chunks(TASK_BYTES).map(Task::of_bytes);
        tasks.collect::<Option<Vec<Task>>>().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The memory of a process.
    ///
    /// # Errors
    /// ESRCH, also where its first thread has ended. Unsupported: the kernel can't list one alone (before Linux 6.1).
    pub fn memory(&self, pid: Pid) -> io::Result<MemoryId> {
        let mut bytes = [0; 2 * TASK_BYTES];
        let mut file = bpf::iterate(self.program.as_fd(), pid)?;
        match file.read(&mut bytes)? {
            0 => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            TASK_BYTES => {
                let task = Task::of_bytes(&bytes).ok_or(io::ErrorKind::InvalidData)?;
                Ok(task.memory)
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// Appends instructions.
struct Assembler<'a> {
    btf: &'a Btf,
    steps: Vec<Instruction>,
}

/// Registers: 1 to 5 are arguments and lost in calls, 6 to 9 are kept.
const CONTEXT: u8 = 6;
const TASK: u8 = 7;
const KEPT: u8 = 8;
const CALL_NUMBER: u8 = 9;
const FRAME: u8 = 10;
/// Eight bytes.
const LOAD: u8 = 0x79;
/// Places in the frame: what is written for a task, and room for a pointer.
const MEMORY: i16 = -72;
const TID: i16 = -64;
const CALL: i16 = -56;
const READS: i16 = -48;
const IO_URING: i16 = -40;
const AIO: i16 = -32;
const FILE: i16 = -24;
const FLAGS: i16 = -16;
const MODE: i16 = -12;
const FILE_SYSTEM: i16 = -8;
const POINTER: i16 = -80;

impl Assembler<'_> {
    fn step(&mut self, code: u8, to: u8, from: u8, offset: i16, immediate: i32) {
        self.steps.push(Instruction { code, registers: to | from << 4, offset, immediate });
    }

    /// Eight bytes of a member.
    fn load(&mut self, to: u8, from: u8, structure: &str, member: &str) -> Option<()> {
        let offset = self.btf.member(structure, member)?;
        self.step(LOAD, to, from, offset, 0);
        Some(())
    }

    fn load_place(&mut self, to: u8, place: i16) {
        self.step(LOAD, to, FRAME, place, 0);
    }

    fn store(&mut self, place: i16, from: u8) {
        self.step(0x7b, FRAME, from, place, 0);
    }

    fn copy(&mut self, to: u8, from: u8) {
        self.step(0xbf, to, from, 0, 0);
    }

    fn set(&mut self, to: u8, value: i32) {
        self.step(0xb7, to, 0, 0, value);
    }

    fn add(&mut self, to: u8, value: i32) {
        self.step(0x07, to, 0, 0, value);
    }

    fn call(&mut self, helper: i32) {
        self.step(0x85, 0, 0, 0, helper);
    }

    /// Ends where a register is zero.
    fn end_unless(&mut self, register: u8) {
        const UNLESS_EQUAL: u8 = 0x55;
        self.step(UNLESS_EQUAL, register, 0, 2, 0);
        self.end();
    }

    fn end(&mut self) {
        self.set(0, 0);
        self.step(0x95, 0, 0, 0, 0);
    }

    /// Copies bytes of the kernel from the address in register 3 to a place; zeros if there is nothing.
    fn read(&mut self, place: i16, bytes: i32) {
        const PROBE_READ_KERNEL: i32 = 113;
        self.copy(1, FRAME);
        self.add(1, place.into());
        self.set(2, bytes);
        self.call(PROBE_READ_KERNEL);
    }

    /// As [`Assembler::read`], of a member of the structure whose address is in a place.
    fn read_member(
        &mut self,
        place: i16,
        bytes: i32,
        of: i16,
        (structure, member): (&str, &str),
    ) -> Option<()> {
        let offset = self.btf.member(structure, member)?;
        self.load_place(3, of);
        self.add(3, offset.into());
        self.read(place, bytes);
        Some(())
    }
}

/// The program: writes what [`Task::of_bytes`] reads of the thread that it is run for.
fn program(btf: &Btf, calls: &[i32]) -> Option<Vec<Instruction>> {
    /// `bpf_seq_write(seq, data, length)`, `bpf_task_pt_regs(task)`.
    const SEQ_WRITE: i32 = 127;
    const TASK_PT_REGS: i32 = 175;
    const JUMP: u8 = 0x05;
    const IF_EQUAL: u8 = 0x15;
    const LOAD_WORD: u8 = 0x61;
    let mut to = Assembler { btf, steps: Vec::new() };
    to.copy(CONTEXT, 1);
    to.load(TASK, CONTEXT, "bpf_iter__task", "task")?;
    // The end of the list.
    to.end_unless(TASK);
    to.load(KEPT, TASK, "task_struct", "mm")?;
    to.end_unless(KEPT);
    to.store(MEMORY, KEPT);
    to.step(LOAD_WORD, 1, TASK, btf.member("task_struct", "pid")?, 0);
    to.store(TID, 1);
    to.set(1, 0);
    for place in [READS, IO_URING, AIO, FILE, FLAGS, FILE_SYSTEM] {
        to.store(place, 1);
    }
    // Kernels without them have no such members.
    let counted = btf.member("task_struct", "ioac").zip(btf.member("task_io_accounting", "syscr"));
    if let Some(offset) = counted.and_then(|(outer, inner)| outer.checked_add(inner)) {
        to.step(LOAD, 1, TASK, offset, 0);
        to.store(READS, 1);
    }
    if to.load(1, TASK, "task_struct", "io_uring").is_some() {
        to.store(IO_URING, 1);
    }
    if to.load(1, KEPT, "mm_struct", "ioctx_table").is_some() {
        to.store(AIO, 1);
    }
    to.copy(1, TASK);
    to.call(TASK_PT_REGS);
    to.load(CALL_NUMBER, 0, "pt_regs", "orig_ax")?;
    to.store(CALL, CALL_NUMBER);
    to.load(KEPT, 0, "pt_regs", "di")?;

    let mut of_file = Assembler { btf, steps: Vec::new() };
    of_file.set(1, 1);
    of_file.store(FILE, 1);
    // The number of a descriptor is an int.
    of_file.step(0x67, KEPT, 0, 0, 32);
    of_file.step(0x77, KEPT, 0, 0, 32 - 3);
    of_file.load(3, TASK, "task_struct", "files")?;
    of_file.store(POINTER, 3);
    of_file.read_member(POINTER, 8, POINTER, ("files_struct", "fdt"))?;
    of_file.read_member(POINTER, 8, POINTER, ("fdtable", "fd"))?;
    of_file.load_place(3, POINTER);
    of_file.step(0x0f, 3, KEPT, 0, 0);
    of_file.read(POINTER, 8);
    of_file.read_member(FLAGS, 4, POINTER, ("file", "f_flags"))?;
    of_file.read_member(POINTER, 8, POINTER, ("file", "f_inode"))?;
    of_file.read_member(MODE, 2, POINTER, ("inode", "i_mode"))?;
    of_file.read_member(POINTER, 8, POINTER, ("inode", "i_sb"))?;
    of_file.read_member(FILE_SYSTEM, 8, POINTER, ("super_block", "s_magic"))?;

    // Into it from any of the calls; over it from the others.
    for (index, call) in calls.iter().enumerate() {
        let rest = i16::try_from(calls.len() - index).ok()?;
        to.step(IF_EQUAL, CALL_NUMBER, 0, rest, *call);
    }
    to.step(JUMP, 0, 0, i16::try_from(of_file.steps.len()).ok()?, 0);
    to.steps.extend(of_file.steps);

    to.load(1, CONTEXT, "bpf_iter__task", "meta")?;
    to.load(1, 1, "bpf_iter_meta", "seq")?;
    to.copy(2, FRAME);
    to.add(2, MEMORY.into());
    to.set(3, i32::try_from(TASK_BYTES).ok()?);
    to.call(SEQ_WRITE);
    to.end();
    Some(to.steps)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    fn list() -> TaskList {
        let calls = [libc::SYS_read, libc::SYS_pread64];
        let calls = calls.map(|call| i32::try_from(call).expect("a small number"));
        TaskList::new(&calls).expect("Linux 6.1 or newer with BTF, where tests run")
    }

    /// A call that is not seen may be one that writes to memory without a trace.
    #[test]
    fn a_thread_is_seen_in_its_call_with_its_file() {
        let list = list();
        let own = list.memory(Pid::try_from(std::process::id()).expect("a pid")).expect("own");
        let (reader, writer) = io::pipe().expect("a pipe");
        let number = reader.as_raw_fd();
        let thread = std::thread::spawn(move || {
            let mut reader = reader;
            let _ = reader.read(&mut [0]);
        });
        let is_reader = |task: &&Task| {
            task.memory == own
                && task.call == libc::SYS_read
                && task.file.is_some_and(|file| file.mode & libc::S_IFMT == libc::S_IFIFO)
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let tasks = list.all().expect("a list");
            if let Some(task) = tasks.iter().find(is_reader) {
                let file = task.file.expect("asked for");
                // PIPEFS_MAGIC of linux/magic.h.
                assert_eq!(file.file_system, 0x5049_5045, "{number}");
                assert!(!task.io_uring);
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{tasks:?}");
        }
        drop(writer);
        thread.join().expect("its end");
    }

    #[test]
    fn memories_differ() {
        let list = list();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let memory = |pid: u32| list.memory(Pid::try_from(pid).expect("a pid")).expect("there");
        let both = [memory(child.id()), memory(std::process::id())];
        child.kill().expect("kill");
        child.wait().expect("its end");
        assert_ne!(both[0], both[1]);
    }
}
