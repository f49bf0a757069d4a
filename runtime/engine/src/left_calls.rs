//! Calls that the kernel goes on with after a capture, and what the next one has to know of them.
//!
//! A thread that a stop takes from a sleep, a `poll` or a wait for a futex goes on by `restart_syscall`: the kernel has kept what call it
//! is, and when it ends. Another kernel, to which the thread is moved, has not. So each capture notes number and beginning of these calls for
//! the next, which finds them by what stays the same until the call returns: the thread, its stack, its place in the code, its arguments.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use samara_kernel::Pid;
use samara_kernel::ptrace::Registers;
use serde::{Deserialize, Serialize};

use crate::clocks;
use crate::freeze::FrozenTree;
use crate::restart::{self, Slept};

/// A call that a thread goes on with by `restart_syscall`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct LeftCall {
    tid: Pid,
    number: i64,
    /// Instruction pointer behind the call, stack pointer, and the arguments.
    place: [u64; 8],
    /// When it began, by the host's `CLOCK_MONOTONIC` in nanoseconds. `None`: nobody knows.
    since_ns: Option<u64>,
    /// When the thread went on, or later. `None`: it has not yet.
    released_ns: Option<u64>,
}

/// What one capture has left to the kernel, for the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeftCalls {
    calls: Vec<LeftCall>,
}

/// A thread that sleeps since no later than this after it went on has done nothing else in between. One that was stopped by others
/// meanwhile may be in a later call that looks the same.
const BACK_ASLEEP_MAX: Duration = Duration::from_millis(100);

impl LeftCalls {
    pub(crate) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// The threads go on now, unless that was said before.
    pub(crate) fn released(&mut self) {
        let now_ns = clocks::monotonic_ns(Instant::now());
        for call in &mut self.calls {
            call.released_ns = call.released_ns.or(now_ns);
        }
    }

    /// Says of threads that stand in `restart_syscall`, or right before it, what call that is, and in `slept` since when it lasts. Then
    /// notes the calls that are left to the kernel now.
    pub(crate) fn pass_on(&mut self, frozen: &mut FrozenTree, slept: &mut BTreeMap<Pid, Slept>) {
        self.recall(frozen, slept);
        let since_ns = |tid: Pid| clocks::monotonic_ns(slept.get(&tid)?.since?);
        let threads = frozen.processes.values().flat_map(|process| &process.threads);
        let left = threads.filter(|thread| restart::is_left_to_kernel(&thread.stop));
        let calls = left.map(|thread| LeftCall {
            tid: thread.tid,
            number: thread.stop.orig_rax.cast_signed(),
            place: place(&thread.stop),
            since_ns: since_ns(thread.tid),
            released_ns: None,
        });
        let known = calls.filter(|call| call.number != libc::SYS_restart_syscall);
        let known: Vec<LeftCall> = known.collect();
        // What is known of threads that have not been stopped stays.
        let stopped = |tid: Pid| {
            let mut threads = frozen.processes.values().flat_map(|process| &process.threads);
            threads.any(|thread| thread.tid == tid)
        };
        self.calls.retain(|call| frozen.is_part && !stopped(call.tid));
        self.calls.extend(known);
    }

    fn recall(&self, frozen: &mut FrozenTree, slept: &mut BTreeMap<Pid, Slept>) {
        let stopped_at = frozen.stopped_at;
        for process in frozen.processes.values_mut() {
            for index in 0..process.threads.len() {
                let Some(thread) = process.threads.get(index) else { continue };
                let tid = thread.tid;
                let is_call = |address| process.is_call(address);
                let Some(stop) = restart::in_restarted_call(&thread.stop, &is_call) else {
                    continue;
                };
                let known =
                    self.calls.iter().find(|known| known.tid == tid && known.place == place(&stop));
                let code = || process.read(stop.rip - CODE_BYTES as u64, CODE_BYTES).ok();
                let number = known
                    .map(|known| known.number)
                    .or_else(|| frozen.sleepers.get(&tid).map(restart::Sleeper::number))
                    .or_else(|| number_in_code(&code()?));
                let Some(number) = number else {
                    tracing::warn!(
                        tid,
                        "which call a thread goes on with is not known: after a restore it fails with EINTR"
                    );
                    continue;
                };
                if let Some(since) =
                    known.and_then(|known| since(known, slept.get(&tid), stopped_at))
                {
                    let elapsed = stopped_at.saturating_duration_since(since);
                    let slept = slept.entry(tid).or_default();
                    slept.since = Some(since);
                    slept.elapsed_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
                }
                if let Some(thread) = process.threads.get_mut(index) {
                    thread.stop = Registers { orig_rax: number.cast_unsigned(), ..stop };
                }
            }
        }
    }
}

/// When a call began, if it is sure to be the one that was noted.
fn since(known: &LeftCall, slept: Option<&Slept>, stopped_at: Instant) -> Option<Instant> {
    let asleep_since = slept.and_then(|slept| slept.since).unwrap_or(stopped_at);
    let released = clocks::instant(known.released_ns?)?;
    (asleep_since <= released + BACK_ASLEEP_MAX).then_some(())?;
    clocks::instant(known.since_ns?)
}

fn place(stop: &Registers) -> [u64; 8] {
    [stop.rip, stop.rsp, stop.rdi, stop.rsi, stop.rdx, stop.r10, stop.r8, stop.r9]
}

/// `mov $number, %eax` and `syscall`.
const CODE_BYTES: usize = 7;

/// The call that code makes which sets the number right before, as that of C libraries does.
fn number_in_code(code: &[u8]) -> Option<i64> {
    let [0xb8, number @ .., 0x0f, 0x05] = code else { return None };
    let number = i64::from(i32::from_le_bytes(number.try_into().ok()?));
    let restarted =
        [libc::SYS_poll, libc::SYS_futex, libc::SYS_nanosleep, libc::SYS_clock_nanosleep];
    restarted.contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(number: i64, since_ns: Option<u64>, released_ns: u64) -> LeftCall {
        LeftCall { tid: 7, number, place: [0; 8], since_ns, released_ns: Some(released_ns) }
    }

    /// A later call with the same arguments that somebody else has interrupted must not end early.
    #[test]
    fn only_a_sleep_that_went_on_at_once_lasts_since_before() {
        let now = Instant::now();
        let ns = |ago: u64| {
            clocks::monotonic_ns(now - Duration::from_secs(ago)).expect("the machine is older")
        };
        let asleep_since =
            |ago: u64| Slept { since: Some(now - Duration::from_secs(ago)), ..Slept::default() };
        let noted = call(libc::SYS_poll, Some(ns(30)), ns(20));
        let same = since(&noted, Some(&asleep_since(20)), now).expect("the same call");
        let ago = now.duration_since(same);
        assert!(ago.abs_diff(Duration::from_secs(30)) < Duration::from_millis(1), "{ago:?}");
        assert_eq!(since(&noted, Some(&asleep_since(10)), now), None);
        assert_eq!(since(&noted, None, now), None);
        assert_eq!(since(&call(libc::SYS_poll, None, ns(20)), Some(&asleep_since(20)), now), None);
    }

    #[test]
    fn code_tells_its_call() {
        let nanosleep = [0xb8, 35, 0, 0, 0, 0x0f, 0x05];
        assert_eq!(number_in_code(&nanosleep), Some(libc::SYS_nanosleep));
        assert_eq!(number_in_code(&[0xb8, 219, 0, 0, 0, 0x0f, 0x05]), None);
        assert_eq!(number_in_code(&[0x90, 35, 0, 0, 0, 0x0f, 0x05]), None);
    }
}
