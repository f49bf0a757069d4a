//! Timers that are read (`timerfd_create(2)`), and timers that send signals (`timer_create(2)`).
//!
//! The container's monotonic clocks stand still while it is stored, its wall clock does not: a timer that was set to an instant of
//! the wall clock expires at that instant, every other one after the rest of its time.
//!
//! A periodic timer whose signal is pending expires once more instead, so that it counts what it misses; what it had missed
//! before is lost.
//!
//! Limits: whether a timer that sends signals was set to an instant the kernel does not tell; it expires after the rest of its time.
//! A periodic timer that has expired and was not read begins its next period at the restore.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use samara_capsule::record::{self, Clocks, PosixTimer};
use samara_kernel::proc::DescriptorInfo;
use samara_kernel::tape::{Call, End};
use samara_kernel::{Pid, timerfd};

use crate::clocks;
use crate::restore::{RestoreError, make};
use crate::tracee::{Process, Tape};

/// What is left of a time now is `rest`; this is what was left `passed` ago, in the same unit. 0 is a timer that is not armed.
pub(crate) fn left(rest: u64, passed: u128) -> u64 {
    match rest {
        0 => 0,
        rest => rest.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX)),
    }
}

/// What `fdinfo` says of a timer; `None` where it does not. It has been read `asked` after the clocks.
pub(crate) fn describe(info: &DescriptorInfo, asked: Duration) -> Option<record::TimerFd> {
    let line = |name: &str| {
        info.others.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    };
    Some(record::TimerFd {
        clock: line("clockid")?.parse().ok()?,
        ticks: line("ticks")?.parse().ok()?,
        flags: i32::from_str_radix(line("settime flags")?, 8).ok()?,
        rest_ns: left(nanoseconds(line("it_value")?)?, asked.as_nanos()),
        interval_ns: nanoseconds(line("it_interval")?)?,
    })
}

/// `(1, 500)`: seconds and nanoseconds.
fn nanoseconds(text: &str) -> Option<u64> {
    let (seconds, ns) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?.checked_add(ns.parse().ok()?)
}

/// What a timer has become after so much time.
fn later(timer: record::TimerFd, passed_ns: u64) -> record::TimerFd {
    let record::TimerFd { ticks, rest_ns, interval_ns, .. } = timer;
    let (ticks, rest_ns) = match passed_ns.checked_sub(rest_ns) {
        _ if rest_ns == 0 => (ticks, 0),
        None => (ticks, rest_ns - passed_ns),
        // It is about to expire, and stands then.
        Some(_) if interval_ns == 0 => (ticks, 1),
        Some(late_ns) => {
            let missed = (late_ns / interval_ns).saturating_add(1);
            (ticks.saturating_add(missed), interval_ns - late_ns % interval_ns)
        }
    };
    record::TimerFd { ticks, rest_ns, ..timer }
}

/// Makes a timer. `then` are the clocks at the capture, and `passed_ns` has passed on them since.
pub(crate) fn restore(
    record: &record::TimerFd,
    then: &Clocks,
    passed_ns: u64,
) -> io::Result<OwnedFd> {
    let (clock, is_wall) = match record.clock {
        libc::CLOCK_REALTIME => (ClockId::CLOCK_REALTIME, true),
        libc::CLOCK_REALTIME_ALARM => (ClockId::CLOCK_REALTIME_ALARM, true),
        libc::CLOCK_MONOTONIC => (ClockId::CLOCK_MONOTONIC, false),
        libc::CLOCK_BOOTTIME => (ClockId::CLOCK_BOOTTIME, false),
        libc::CLOCK_BOOTTIME_ALARM => (ClockId::CLOCK_BOOTTIME_ALARM, false),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    let timer = TimerFd::new(clock, TimerFlags::TFD_CLOEXEC)?;
    let is_instant = is_wall && record.flags & libc::TFD_TIMER_ABSTIME != 0 && record.rest_ns > 0;
    let record = if is_instant { *record } else { later(*record, passed_ns) };
    let has_expired = record.rest_ns == 0 && record.ticks > 0;
    let armed = record.rest_ns > 0 || record.interval_ns > 0 && has_expired;
    if armed {
        let (flags, value_ns) = if is_instant {
            let then = u64::try_from(then.realtime_ns).unwrap_or(0);
            (record.flags, then.saturating_add(record.rest_ns))
        } else {
            (0, record.rest_ns.max(1))
        };
        let time = |ns: u64| TimeSpec::from_duration(Duration::from_nanos(ns));
        let expiration = match record.interval_ns {
            0 => Expiration::OneShot(time(value_ns)),
            interval_ns => Expiration::IntervalDelayed(time(value_ns), time(interval_ns)),
        };
        timer.set(expiration, TimerSetTimeFlags::from_bits_retain(flags))?;
    } else if record.interval_ns > 0 {
        // It goes nowhere without a first expiration, but is told to whoever asks.
        let interval = Duration::from_nanos(record.interval_ns);
        let it_interval = rustix::time::Timespec::try_from(interval)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        let it_value = rustix::time::Timespec::default();
        let disarmed = rustix::time::Itimerspec { it_interval, it_value };
        let flags = rustix::time::TimerfdTimerFlags::empty();
        rustix::time::timerfd_settime(&timer, flags, &disarmed)?;
    }
    if record.ticks > 0 {
        timerfd::set_ticks(timer.as_fd(), record.ticks)?;
    }
    Ok(timer.into())
}

/// What `/proc/PID/timers` says; `None` where it is not understood, or a timer is of a kind that is not restored.
///
/// `inside` gives the container's number of a thread; `lives` says whether the container has a thread of a number.
pub(crate) fn parse_posix(
    text: &str,
    inside: &dyn Fn(Pid) -> Option<i32>,
    lives: &dyn Fn(i32) -> bool,
) -> Option<Vec<PosixTimer>> {
    let mut timers = Vec::new();
    let mut lines = text.lines();
    while let Some(first) = lines.next() {
        let id = first.strip_prefix("ID: ")?.parse().ok()?;
        let (signal, value) = lines.next()?.strip_prefix("signal: ")?.split_once('/')?;
        let (notify, target) = lines.next()?.strip_prefix("notify: ")?.split_once('/')?;
        let clock: i32 = lines.next()?.strip_prefix("ClockID: ")?.parse().ok()?;
        let notify = match notify {
            "signal" => libc::SIGEV_SIGNAL,
            "none" => libc::SIGEV_NONE,
            "thread" => libc::SIGEV_THREAD,
            _ => return None,
        };
        let thread = match target.split_once('.')? {
            ("tid", thread) => Some(inside(thread.parse().ok()?)?),
            ("pid", _) => None,
            _ => return None,
        };
        if clock < 0 && !clock_owner(clock).is_some_and(|owner| owner == 0 || lives(owner)) {
            return None;
        }
        timers.push(PosixTimer {
            id,
            clock,
            signal: signal.parse().ok()?,
            value: u64::from_str_radix(value.trim_start_matches("0x"), 16).ok()?,
            notify,
            thread,
            rest_ns: 0,
            interval_ns: 0,
        });
    }
    Some(timers)
}

/// The thread or process whose processor time a negative clock counts, as the program numbers it; 0 for who asks.
///
/// The number is the clock's but for three bits, of which the low two are 3 where the clock belongs to a descriptor
/// (linux/posix-timers_types.h).
fn clock_owner(clock: i32) -> Option<i32> {
    const CLOCKFD: i32 = 3;
    (clock & CLOCKFD != CLOCKFD).then_some(!(clock >> 3))
}

/// The timer that has queued a signal.
pub(crate) fn sender(info: &[u8]) -> Option<i32> {
    let int = |at: usize| {
        let bytes = info.get(at..)?.first_chunk::<4>()?;
        Some(i32::from_le_bytes(*bytes))
    };
    // `si_code` and `si_tid` of `siginfo_t`.
    (int(8)? == libc::SI_TIMER).then(|| int(16))?
}

/// Whether a pending signal comes again by itself: its timer is a periodic one, and is made so that it expires at once.
///
/// A timer counts what it has missed as long as its own signal is pending; one that another had queued in its place would not
/// keep it from queueing a second one.
pub(crate) fn comes_again(info: &[u8], timers: &[PosixTimer]) -> bool {
    sender(info).is_some_and(|id| {
        timers.iter().any(|timer| timer.id == id && timer.interval_ns > 0 && timer.rest_ns > 0)
    })
}

/// `struct itimerspec`
pub(crate) const ITIMERSPEC_BYTES: usize = 32;

/// Reads interval and rest from what `timer_gettime` wrote `asked` after the clocks were read.
pub(crate) fn set_times(
    timer: &mut PosixTimer,
    [interval_s, interval, rest_s, rest]: [u64; 4],
    asked: Duration,
) {
    let ns = |seconds: u64, ns: u64| seconds.saturating_mul(1_000_000_000).saturating_add(ns);
    timer.interval_ns = ns(interval_s, interval);
    timer.rest_ns = match counts_processor_time(timer.clock) {
        true => ns(rest_s, rest),
        false => left(ns(rest_s, rest), asked.as_nanos()),
    };
}

/// Such a clock stands as long as the container does.
fn counts_processor_time(clock: i32) -> bool {
    clock < 0 || matches!(clock, libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Makes the timers of a process again, under their numbers. `due` are those that have expired, and whose signal is pending;
/// `then` are the clocks at the capture.
pub(crate) fn restore_posix(
    process: &mut Process,
    timers: &[PosixTimer],
    due: &BTreeSet<i32>,
    then: &Clocks,
) -> Result<(), RestoreError> {
    /// linux/prctl.h, since 6.15: `timer_create` takes the number that it is to give.
    const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
    /// Before, numbers are given in turn; a program that has used up more would take too long to bring back.
    const TURNS_MAX: i32 = 4096;
    let Some(last) = timers.iter().map(|timer| timer.id).max() else { return Ok(()) };
    let mut tape = process.tape()?;
    let choose = |on: u64| [PR_TIMER_CREATE_RESTORE_IDS, on, 0, 0, 0, 0];
    tape.try_call("choose the numbers of timers", libc::SYS_prctl, choose(1));
    let results = process.run(0, &tape, End::Breakpoint)?;
    let chosen = results.first().is_some_and(|result| Call::outcome(*result).is_ok());
    if !chosen && last >= TURNS_MAX {
        let what = format!("a timer with the number {last} on a kernel before 6.15");
        return Err(make(what)(io::ErrorKind::Unsupported.into()));
    }
    let wanted: Vec<Option<&PosixTimer>> = match chosen {
        // The kernel lists the newest first, and so does the record.
        true => timers.iter().rev().map(Some).collect(),
        false => (0..=last).map(|id| timers.iter().find(|timer| timer.id == id)).collect(),
    };
    /// Timers that are made with one tape: each takes some 150 bytes of it.
    const AT_ONCE: usize = 256;
    for (turn, group) in wanted.chunks(AT_ONCE).enumerate() {
        let passed_ns = clocks::passed(process.pid, then).map_err(make("the clocks"))?;
        let mut tape = process.tape()?;
        for (place, timer) in group.iter().enumerate() {
            let number = i32::try_from(turn * AT_ONCE + place).expect("fewer than there are turns");
            match timer {
                Some(timer) => {
                    let is_due = due.contains(&timer.id) && timer.interval_ns > 0;
                    make_posix(&mut tape, timer, next_expiration(timer, is_due, then, passed_ns));
                }
                None => {
                    let id = tape.words(&[0]);
                    tape.call("make a timer", libc::SYS_timer_create, [1, 0, id, 0, 0, 0]);
                    let number = u64::from(number.unsigned_abs());
                    let arguments = [number, 0, 0, 0, 0, 0];
                    tape.call("delete a timer", libc::SYS_timer_delete, arguments);
                }
            }
        }
        process.run_all(0, &tape, End::Breakpoint)?;
    }
    if chosen {
        let mut tape = process.tape()?;
        tape.call("choose the numbers of timers no more", libc::SYS_prctl, choose(0));
        process.run_all(0, &tape, End::Breakpoint)?;
    }
    Ok(())
}

/// `flags` and `value_ns` are for `timer_settime`.
fn make_posix(tape: &mut Tape, timer: &PosixTimer, (flags, value_ns): (u64, u64)) {
    let low = |number: i32| u64::from(number.cast_unsigned());
    let notify = timer.notify | if timer.thread.is_some() { libc::SIGEV_THREAD_ID } else { 0 };
    // `struct sigevent`: value, signal and kind, thread, padding.
    let event = tape.words(&[
        timer.value,
        low(timer.signal) | low(notify) << 32,
        low(timer.thread.unwrap_or(0)),
        0,
        0,
        0,
        0,
        0,
    ]);
    let id = tape.words(&[low(timer.id)]);
    let what = format!("make the timer {}", timer.id);
    tape.call(what, libc::SYS_timer_create, [low(timer.clock), event, id, 0, 0, 0]);
    if timer.rest_ns > 0 {
        let split = |ns: u64| [ns / 1_000_000_000, ns % 1_000_000_000];
        let times = tape.words(&[split(timer.interval_ns), split(value_ns)].concat());
        let what = format!("set the timer {}", timer.id);
        tape.call(what, libc::SYS_timer_settime, [low(timer.id), flags, times, 0, 0, 0]);
    }
}

/// Flags and value of an armed timer: when it would have expired. One that `is_due` expires at once, and from then on when it
/// would have.
fn next_expiration(timer: &PosixTimer, is_due: bool, then: &Clocks, passed_ns: u64) -> (u64, u64) {
    const ABSOLUTE: u64 = libc::TIMER_ABSTIME as u64;
    let clock_ns = match timer.clock {
        libc::CLOCK_MONOTONIC => then.monotonic_ns,
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => then.boottime_ns,
        // Clocks that do not go on from where they were: the period begins anew.
        _ if is_due => return (0, 1),
        clock if counts_processor_time(clock) => return (0, timer.rest_ns),
        _ => return (0, timer.rest_ns.saturating_sub(passed_ns).max(1)),
    };
    let next_ns = u64::try_from(clock_ns).unwrap_or(0).saturating_add(timer.rest_ns);
    let before_ns = if is_due { timer.interval_ns } else { 0 };
    (ABSOLUTE, next_ns.saturating_sub(before_ns).max(1))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use super::*;

    fn described(timer: &OwnedFd) -> record::TimerFd {
        use std::os::fd::AsRawFd;
        let own = i32::try_from(std::process::id()).unwrap();
        describe(
            &samara_kernel::proc::descriptor_info(own, timer.as_raw_fd()).unwrap(),
            Duration::ZERO,
        )
        .unwrap()
    }

    /// A timer that comes back unarmed is waited for for ever.
    #[test]
    fn timers_come_back_as_they_were() {
        let now = Clocks::default();
        let hour = 3_600_000_000_000;
        let clock = libc::CLOCK_MONOTONIC;
        let timer = record::TimerFd { clock, ticks: 0, flags: 0, rest_ns: hour, interval_ns: 7 };
        let made = described(&restore(&timer, &now, 0).unwrap());
        assert!(made.rest_ns <= hour && made.rest_ns > hour / 2, "{made:?}");
        assert_eq!((made.interval_ns, made.ticks), (7, 0));
        // Expired three times, and armed no more.
        let timer = record::TimerFd { ticks: 3, rest_ns: 0, interval_ns: 0, ..timer };
        assert_eq!(described(&restore(&timer, &now, 0).unwrap()), timer);
        // Never armed.
        let timer = record::TimerFd { ticks: 0, ..timer };
        assert_eq!(described(&restore(&timer, &now, 0).unwrap()), timer);
    }

    /// A periodic timer is a clock too: it goes with the container's, which goes on while the container is restored.
    #[test]
    fn a_restore_takes_time() {
        let timer =
            record::TimerFd { clock: 1, ticks: 2, flags: 0, rest_ns: 500, interval_ns: 1000 };
        let became = |timer: record::TimerFd, passed| {
            let made = later(timer, passed);
            (made.ticks, made.rest_ns)
        };
        assert_eq!(became(timer, 499), (2, 1));
        assert_eq!(became(timer, 500), (3, 1000));
        assert_eq!(became(timer, 2600), (5, 900));
        assert_eq!(became(record::TimerFd { rest_ns: 0, ..timer }, 2600), (2, 0));
        assert_eq!(became(record::TimerFd { interval_ns: 0, ..timer }, 2600), (2, 1));
    }

    /// An alarm for an instant that passed while the container was stored is due at once.
    #[test]
    fn instants_of_the_wall_clock_stay() {
        let then = Clocks { realtime_ns: 1_000_000_000_000_000_000, ..Clocks::default() };
        let timer = record::TimerFd {
            clock: libc::CLOCK_REALTIME,
            ticks: 0,
            flags: libc::TFD_TIMER_ABSTIME,
            rest_ns: 1_000_000_000,
            interval_ns: 0,
        };
        let timer = restore(&timer, &then, 5_000_000_000).unwrap();
        let mut count = [0; 8];
        nix::unistd::read(&timer, &mut count).unwrap();
        assert_eq!(u64::from_le_bytes(count), 1);
    }

    /// A timer that is restored as another one sends its signal to the wrong thread, or with the wrong value.
    #[test]
    fn timers_are_read_as_the_kernel_writes_them() {
        let text = "ID: 3\nsignal: 60/00007ffe3c4e5f00\nnotify: signal/tid.77\nClockID: 1\n\
                    ID: 4\nsignal: 14/0000000000000004\nnotify: none/pid.70\nClockID: 0\n";
        let timer = PosixTimer {
            id: 3,
            clock: 1,
            signal: 60,
            value: 0x7ffe_3c4e_5f00,
            notify: libc::SIGEV_SIGNAL,
            thread: Some(7),
            rest_ns: 0,
            interval_ns: 0,
        };
        let other = PosixTimer {
            id: 4,
            clock: 0,
            signal: 14,
            value: 4,
            notify: libc::SIGEV_NONE,
            thread: None,
            ..timer
        };
        assert_eq!(
            parse_posix(text, &|tid| (tid == 77).then_some(7), &|_| false),
            Some(vec![timer, other])
        );
        assert_eq!(parse_posix(text, &|_| None, &|_| false), None);
        // The processor time of thread 9 (6: of a thread, not a process), of who asks, and of a descriptor's clock.
        for (clock, known) in [(!9 << 3 | 6, true), (!8 << 3 | 2, false), (-6, true), (-5, false)] {
            let text = format!("ID: 0\nsignal: 14/0\nnotify: none/pid.70\nClockID: {clock}\n");
            assert_eq!(parse_posix(&text, &|_| None, &|tid| tid == 9).is_some(), known, "{clock}");
        }
        assert_eq!(parse_posix("", &|_| None, &|_| false), Some(Vec::new()));
    }
}
