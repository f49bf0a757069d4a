//! Who may store to pages through a hold of their own, and so without a trace.
//!
//! Most writes go through a page table, and a page that is armed shows them. Others take hold of a page first, which ends its arming, and
//! store to it later, by way of the kernel's own mapping of it or by a device: process_vm_writev(2), a debugger, `/proc/PID/mem`, direct
//! and asynchronous I/O, io_uring. Armed between the two, a page is written and shows nothing. So whoever arms pages of a program that
//! runs, in order to copy them, does it in this order:
//!
//! 1. the pages are armed;
//! 2. [`settle`] returns, and does not name their memory;
//! 3. they are copied.
//!
//! Who took hold of one of them after 1 has ended its arming: the next scan shows it. Who did before 1 was in a call then, or had a request
//! under way. The calls that [`settle`] knows last for as long as the hold does. Either it was seen outside of that call, after 1, and then
//! what it stored was there before 3, and was copied; or it was not, and its memory is named. The look can't come too early to see the call:
//! both taking hold and arming are done under the page table's lock, or undo what the other has not seen, and a thread shows
//! its call before it does anything in it. Nor can it be put after the copying: a call might end in between.
//!
//! What writes to `/proc/PID/mem` or pokes holds the address space's lock for as long as it holds the page, and so is waited for by taking
//! that lock ([`WriteTracker::await_lock`]).
//!
//! What this does not see: threads of pid namespaces beside or above ours; a descriptor that is closed and used anew, for a pipe or
//! socket, while another thread still reads from the file that it was before; sockets of AF_ALG, with which no container is saved.
//!
//! [`WriteTracker::await_lock`]: samara_kernel::userfaultfd::WriteTracker::await_lock

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use samara_kernel::Pid;
use samara_kernel::task_list::{CallFile, MemoryId, Task, TaskList};

/// Calls that may store to the caller's memory by direct I/O, whose first argument says by which file.
const READS: [i64; 5] =
    [libc::SYS_read, libc::SYS_pread64, libc::SYS_readv, libc::SYS_preadv, libc::SYS_preadv2];

/// process_vm_writev(2) as 64-bit programs call it, those of 32 bits, and those with 32-bit pointers (asm/unistd_*.h).
const WRITES_TO_OTHERS: [i64; 3] = [libc::SYS_process_vm_writev, 348, 0x4000_0000 + 540];

/// For how long calls may go on before what they may store to is named. Nothing stands meanwhile. Longer than reading from a disk that is
/// busy, and than the tick after which a thread that runs shows that it is in no call.
const WAIT_MAX: Duration = Duration::from_millis(50);

/// Between two looks, each of which takes about 0.1 ms.
const BETWEEN_LOOKS: Duration = Duration::from_micros(500);

/// None: this kernel can't tell.
static LIST: OnceLock<Option<TaskList>> = OnceLock::new();

/// Finds out whether this kernel can tell who holds pages, which takes milliseconds.
pub(crate) fn can_be_told() -> bool {
    let list = LIST.get_or_init(|| {
        let calls: Option<Vec<i32>> = READS.iter().map(|call| i32::try_from(*call).ok()).collect();
        TaskList::new(&calls.unwrap_or_default())
            .inspect_err(
                |error| tracing::info!(%error, "this kernel does not tell who holds pages"),
            )
            .ok()
    });
    list.is_some()
}

/// The memory that a process has.
///
/// # Errors
/// Its first thread has ended, or the kernel can't tell.
pub(crate) fn memory(pid: Pid) -> io::Result<MemoryId> {
    let list = LIST.get().and_then(Option::as_ref).ok_or(io::ErrorKind::Unsupported)?;
    list.memory(pid)
}

/// Memory to which somebody may store without a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    memories: BTreeSet<MemoryId>,
    /// A process writes to the memory of another one: which is not known, nor whether it is stopped when a container is.
    pub(crate) by_others: bool,
}

impl Held {
    /// All.
    pub(crate) fn unknown() -> Held {
        Held { memories: BTreeSet::new(), by_others: true }
    }

    pub(crate) fn has(&self, memory: MemoryId) -> bool {
        self.by_others || self.memories.contains(&memory)
    }
}

/// Waits, not for long, until nobody holds pages of these memories who did when it was called; tells of which that can't be said.
pub(crate) fn settle(memories: &BTreeSet<MemoryId>) -> Held {
    let Some(list) = LIST.get().and_then(Option::as_ref) else { return Held::unknown() };
    let look = || list.all().map(|tasks| holds(&tasks, memories));
    let begun = Instant::now();
    let Ok(mut held) = look() else { return Held::unknown() };
    while held.values().any(|hold| hold.ends) && begun.elapsed() < WAIT_MAX {
        thread::sleep(BETWEEN_LOOKS);
        let Ok(now) = look() else { return Held::unknown() };
        held.retain(|tid, before| now.get(tid) == Some(before));
    }
    let mut found = Held::default();
    for hold in held.into_values() {
        match hold.memory {
            Some(memory) => drop(found.memories.insert(memory)),
            None => found.by_others = true,
        }
    }
    found
}

/// Why a thread may hold pages. One that differs from an earlier one of the same thread is another call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hold {
    /// None: of any memory.
    memory: Option<MemoryId>,
    call: i64,
    reads: u64,
    /// With the call.
    ends: bool,
}

fn holds(tasks: &[Task], memories: &BTreeSet<MemoryId>) -> BTreeMap<u64, Hold> {
    tasks.iter().filter_map(|task| Some((task.tid, hold(task, memories)?))).collect()
}

fn hold(task: &Task, memories: &BTreeSet<MemoryId>) -> Option<Hold> {
    let call = task.call;
    if WRITES_TO_OTHERS.contains(&call) {
        return Some(Hold { memory: None, call, reads: 0, ends: true });
    }
    if !memories.contains(&task.memory) {
        return None;
    }
    let memory = Some(task.memory);
    if task.aio || task.io_uring {
        return Some(Hold { memory, call: -1, reads: 0, ends: false });
    }
    let may_hold = call == libc::SYS_ioctl || task.file.is_some_and(may_be_direct);
    may_hold.then_some(Hold { memory, call, reads: task.reads, ends: true })
}

/// Whether a read may be one by which a device, or a process that serves a file system, stores to the reader's pages itself. Whether it
/// is, file systems decide, some of them without `O_DIRECT` (FUSE's FOPEN_DIRECT_IO).
fn may_be_direct(file: CallFile) -> bool {
    /// ANON_INODE_FS_MAGIC, PIPEFS_MAGIC, SOCKFS_MAGIC, DEVPTS_SUPER_MAGIC of linux/magic.h.
    const OF_THE_KERNEL: [u64; 4] = [0x0904_1934, 0x5049_5045, 0x534f_434b, 0x1cd1];
    let is_fifo = file.mode & libc::S_IFMT == libc::S_IFIFO;
    !is_fifo && !OF_THE_KERNEL.contains(&file.file_system)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIFO: CallFile = CallFile { flags: 0, mode: libc::S_IFIFO | 0o600, file_system: 0xef53 };
    const EVENTS: CallFile = CallFile { flags: 0, mode: 0o600, file_system: 0x0904_1934 };
    const REGULAR: CallFile =
        CallFile { flags: 0, mode: libc::S_IFREG | 0o600, file_system: 0x6573_5546 };
    const UNREADABLE: CallFile = CallFile { flags: 0, mode: 0, file_system: 0 };

    fn task(memory: u64, call: i64, file: Option<CallFile>) -> Task {
        let memory = MemoryId::example(memory);
        Task { memory, tid: 1, call, reads: 0, io_uring: false, aio: false, file }
    }

    /// A hold that counts for none is a write that a capsule lacks; one too many is a longer pause.
    #[test]
    fn what_may_store_without_a_trace_is_told_from_what_can_not() {
        let ours = [MemoryId::example(1)].into();
        let cases = [
            (task(2, libc::SYS_process_vm_writev, None), Some(None)),
            (task(1, libc::SYS_process_vm_readv, None), None),
            (task(1, libc::SYS_read, Some(FIFO)), None),
            (task(1, libc::SYS_read, Some(EVENTS)), None),
            (task(1, libc::SYS_pread64, Some(REGULAR)), Some(Some(MemoryId::example(1)))),
            (task(1, libc::SYS_read, Some(UNREADABLE)), Some(Some(MemoryId::example(1)))),
            (task(2, libc::SYS_read, Some(REGULAR)), None),
            (task(1, libc::SYS_ioctl, None), Some(Some(MemoryId::example(1)))),
            (task(1, libc::SYS_futex, None), None),
            (task(1, -1, None), None),
            (Task { aio: true, ..task(1, -1, None) }, Some(Some(MemoryId::example(1)))),
            (Task { io_uring: true, ..task(2, -1, None) }, None),
        ];
        for (task, expected) in cases {
            assert_eq!(hold(&task, &ours).map(|hold| hold.memory), expected, "{task:?}");
        }
    }

    /// Reads that follow each other would count for one that never ends.
    #[test]
    fn the_next_read_is_another_one() {
        let ours = [MemoryId::example(1)].into();
        let first = task(1, libc::SYS_read, Some(REGULAR));
        let next = Task { reads: 1, ..first };
        assert_eq!(hold(&first, &ours), hold(&first, &ours));
        assert_ne!(hold(&first, &ours), hold(&next, &ours));
    }
}
