//! `sched(7)`: scheduling attributes of threads, and the scheduler's clock.

use std::io;
use std::mem::size_of;

use crate::{Pid, check, proc};

/// The processors that a thread may run on, ascending.
pub fn affinity(tid: Pid) -> io::Result<Vec<u32>> {
    let mut words = [0u64; 128];
    // SAFETY: the mask is `words`, and its size is passed along.
    let result = unsafe {
        libc::syscall(libc::SYS_sched_getaffinity, tid, size_of_val(&words), words.as_mut_ptr())
    };
    check(result)?;
    let mut processors = Vec::new();
    for (index, word) in (0u32..).zip(words).filter(|(_, word)| *word != 0) {
        processors.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| index * 64 + bit));
    }
    Ok(processors)
}

/// `struct sched_attr` of linux/sched/types.h, as far as its first version goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Attributes {
    size: u32,
    pub policy: u32,
    flags: u64,
    /// 0 for real-time policies, of which the call does not tell it.
    pub nice: i32,
    pub priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}
const ATTRIBUTES_BYTES: u32 = 48;
const _: () = assert!(size_of::<Attributes>() == ATTRIBUTES_BYTES as usize);

impl Attributes {
    /// Whether children begin with the default scheduling policy (`SCHED_RESET_ON_FORK`).
    #[must_use]
    pub fn resets_on_fork(&self) -> bool {
        self.flags & RESET_ON_FORK != 0
    }

    /// The time slice of a thread of `SCHED_OTHER` or `SCHED_BATCH`, in nanoseconds: the kernel's own, or what it has asked for. 0
    /// for other policies, and of kernels before 6.12, where none can be asked for.
    #[must_use]
    pub fn slice_ns(&self) -> u64 {
        if is_fair(self.policy) { self.runtime_ns } else { 0 }
    }
}

/// `SCHED_FLAG_RESET_ON_FORK`
const RESET_ON_FORK: u64 = 1;

/// How a thread is scheduled.
///
/// # Errors
/// ESRCH: no such thread.
pub fn attributes(tid: Pid) -> io::Result<Attributes> {
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes no more than the size that is passed along, which is that of `attributes`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            tid,
            std::ptr::from_mut(&mut attributes),
            ATTRIBUTES_BYTES,
            0,
        )
    };
    check(result)?;
    Ok(attributes)
}

/// Whether threads of this policy can ask for a slice.
#[must_use]
pub fn is_fair(policy: u32) -> bool {
    const OTHER: u32 = libc::SCHED_OTHER.unsigned_abs();
    const BATCH: u32 = libc::SCHED_BATCH.unsigned_abs();
    matches!(policy, OTHER | BATCH)
}

/// What `sched_setattr` takes to give a thread a slice, and, so that they stay, its policy and nice value.
#[must_use]
pub fn slice_words(policy: u32, reset_on_fork: bool, nice: i32, slice_ns: u64) -> [u64; 6] {
    let first = u64::from(ATTRIBUTES_BYTES) | u64::from(policy) << 32;
    let flags = if reset_on_fork { RESET_ON_FORK } else { 0 };
    [first, flags, u64::from(nice.cast_unsigned()), slice_ns, 0, 0]
}

/// Lets a thread run only where nobody else wants to (`SCHED_IDLE`), or as others do (`SCHED_OTHER`). Its nice value stays.
///
/// # Errors
/// EPERM: back from `SCHED_IDLE` without the right to, where the nice value is below what its limit allows. ESRCH: no such thread.
pub fn set_idle(tid: Pid, idle: bool) -> io::Result<()> {
    let policy = if idle { libc::SCHED_IDLE } else { libc::SCHED_OTHER };
    // The only priority of these policies.
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads `parameter`.
    let result =
        unsafe { libc::syscall(libc::SYS_sched_setscheduler, tid, policy, &raw const parameter) };
    check(result).map(drop)
}

/// Restricts a thread to `processors`.
///
/// # Errors
/// EINVAL: none of them is one that the thread's cpuset allows.
pub fn set_affinity(tid: Pid, processors: &[u32]) -> io::Result<()> {
    let words = affinity_words(processors);
    // SAFETY: the mask is `words`, and its size is passed along.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            tid,
            words.len() * size_of::<u64>(),
            words.as_ptr(),
        )
    };
    check(result).map(drop)
}

/// The bit mask that `sched_setaffinity` takes.
#[must_use]
pub fn affinity_words(processors: &[u32]) -> Vec<u64> {
    let mut words = vec![0u64; 128];
    for processor in processors {
        if let Some(word) = words.get_mut(*processor as usize / 64) {
            *word |= 1 << (processor % 64);
        }
    }
    words
}

/// The processors that the kernel has made room for, whether they are there or not (cputopology.rst).
///
/// # Errors
/// The file can't be read, or holds no list ([`io::ErrorKind::InvalidData`]).
pub fn possible_processors() -> io::Result<Vec<u32>> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    parse_list(text.trim()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A list of processors or memory nodes: `0-2,7` as 0, 1, 2, 7.
pub fn parse_list(text: &str) -> Option<Vec<u32>> {
    /// `NR_CPUS` of x86-64 is 8192 at most, and there are fewer nodes.
    const NUMBER_END: u32 = 8192;
    let mut numbers = Vec::new();
    for range in text.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        (last < NUMBER_END).then_some(())?;
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// The scheduler's task clock of one processor, in nanoseconds: the clock of [`proc::scheduled`].
///
/// Visits the processor. `None` where the kernel does not tell, or the processor is not ours to visit.
#[must_use]
pub fn task_clock_on(processor: i32) -> Option<u64> {
    let before = affinity(0).ok()?;
    set_affinity(0, &[u32::try_from(processor).ok()?]).ok()?;
    // Yielding makes the scheduler account for this thread up to now.
    std::thread::yield_now();
    // SAFETY: the call takes nothing and always succeeds.
    let tid = unsafe { libc::syscall(libc::SYS_gettid) };
    let clock = Pid::try_from(tid).ok().and_then(proc::scheduled);
    set_affinity(0, &before).ok()?;
    clock.map(|(ns, _)| ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If a list were misread, an asynchronous context that is idle would be taken for busy.
    #[test]
    fn lists_of_processors_are_read() {
        assert_eq!(parse_list("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parse_list("7"), Some(vec![7]));
        assert_eq!(parse_list("0-4294967295"), None);
        assert_eq!(parse_list(""), None);
    }

    /// If a thread stayed idle, whoever waits for it on a busy machine would wait for ever.
    #[test]
    fn a_thread_is_idle_and_back() {
        let policy = || attributes(0).expect("own attributes").policy;
        let before = policy();
        set_idle(0, true).expect("everybody may");
        assert_eq!(policy(), libc::SCHED_IDLE.unsigned_abs());
        set_idle(0, false).expect("its nice value is no lower than before");
        assert_eq!(policy(), libc::SCHED_OTHER.unsigned_abs());
        assert_eq!(before, policy());
    }

    /// If the clock could not be read or ran at another rate, interrupted timeouts would be wrong after a restore.
    #[test]
    fn the_task_clock_advances_like_time() {
        let Some(processor) = affinity(0).expect("own affinity").first().copied() else {
            panic!("no processor")
        };
        let processor = i32::try_from(processor).expect("few processors");
        let first = task_clock_on(processor).expect("this kernel tells");
        let began = std::time::Instant::now();
        while began.elapsed().as_millis() < 20 {
            std::hint::spin_loop();
        }
        let second = task_clock_on(processor).expect("this kernel tells");
        // Stolen time is missing from the task clock; more than was measured can't be there.
        assert!(
            second > first
                && second - first < 2 * u64::try_from(began.elapsed().as_nanos()).expect("short")
        );
    }
}
