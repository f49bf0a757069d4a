//! Clocks as a container sees them.
//!
//! `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME` have an offset in each time namespace; the restored container gets a namespace in
//! which both go on from where they were.

use std::io;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use samara_capsule::record::Clocks;
use samara_kernel::{Pid, proc};

/// Offsets of a time namespace against the host's clocks, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeOffsets {
    pub monotonic_ns: i64,
    pub boottime_ns: i64,
}

/// The offsets of the engine's own time namespace, which nothing changes.
pub(crate) fn own_offsets() -> TimeOffsets {
    let own = i32::try_from(std::process::id()).expect("pids are ints");
    offsets(&proc::attribute(own, "timens_offsets").unwrap_or_default())
}

/// The clocks of a running or stopped process's time namespace, now. `ours` are [`own_offsets`].
pub(crate) fn of_container(pid: Pid, ours: TimeOffsets) -> io::Result<Clocks> {
    // The offsets in /proc are absolute, so those of our own namespace come off.
    let inside = offsets(&proc::attribute(pid, "timens_offsets").unwrap_or_default());
    Ok(Clocks {
        monotonic_ns: now(ClockId::CLOCK_MONOTONIC)? + inside.monotonic_ns - ours.monotonic_ns,
        boottime_ns: now(ClockId::CLOCK_BOOTTIME)? + inside.boottime_ns - ours.boottime_ns,
        realtime_ns: now(ClockId::CLOCK_REALTIME)?,
        reading_ns: 0,
    })
}

/// The time that has passed on the clocks of a container since its capture, in nanoseconds: they go on while it is restored, so
/// that what it waits for is due on them when it would have been. `pid` is a process of the restored container.
pub(crate) fn passed(pid: Pid, then: &Clocks) -> io::Result<u64> {
    let passed = of_container(pid, own_offsets())?.monotonic_ns.saturating_sub(then.monotonic_ns);
    Ok(u64::try_from(passed).unwrap_or(0))
}

/// The offsets that a time namespace needs for its clocks to go on now from where they were when all of `clocks`' capture had been
/// read: a timer may have expired until then.
pub fn offsets_to_continue(clocks: &Clocks) -> io::Result<TimeOffsets> {
    let reading_ns = i64::try_from(clocks.reading_ns).unwrap_or(0);
    let offset = |then_ns: i64, clock| -> io::Result<i64> {
        Ok(then_ns.saturating_add(reading_ns).saturating_sub(now(clock)?))
    };
    Ok(TimeOffsets {
        monotonic_ns: offset(clocks.monotonic_ns, ClockId::CLOCK_MONOTONIC)?,
        boottime_ns: offset(clocks.boottime_ns, ClockId::CLOCK_BOOTTIME)?,
    })
}

/// Parses `/proc/PID/timens_offsets`: a line a clock, with seconds and nanoseconds.
fn offsets(text: &str) -> TimeOffsets {
    let of = |name: &str| {
        let mut fields = text
            .lines()
            .map(str::split_ascii_whitespace)
            .find_map(|mut fields| (fields.next() == Some(name)).then_some(fields))?;
        let seconds: i64 = fields.next()?.parse().ok()?;
        let ns: i64 = fields.next()?.parse().ok()?;
        seconds.checked_mul(1_000_000_000)?.checked_add(ns)
    };
    TimeOffsets {
        monotonic_ns: of("monotonic").unwrap_or(0),
        boottime_ns: of("boottime").unwrap_or(0),
    }
}

fn now(clock: ClockId) -> io::Result<i64> {
    let time = clock_gettime(clock)?;
    Ok(time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// An instant by the host's `CLOCK_MONOTONIC`, in nanoseconds; [`Instant`] counts by it, and can't be written down.
pub(crate) fn monotonic_ns(instant: Instant) -> Option<u64> {
    let now_ns = now(ClockId::CLOCK_MONOTONIC).ok().and_then(|ns| u64::try_from(ns).ok())?;
    now_ns.checked_sub(u64::try_from(instant.elapsed().as_nanos()).ok()?)
}

/// The inverse of [`monotonic_ns`]. `None`: it lies ahead.
pub(crate) fn instant(monotonic_ns: u64) -> Option<Instant> {
    let now_ns = now(ClockId::CLOCK_MONOTONIC).ok().and_then(|ns| u64::try_from(ns).ok())?;
    Instant::now().checked_sub(Duration::from_nanos(now_ns.checked_sub(monotonic_ns)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A misread offset would make the container's clock jump at each move.
    #[test]
    fn offsets_are_read_by_name() {
        let text = "monotonic           -12         999999999\nboottime             34         5";
        assert_eq!(
            offsets(text),
            TimeOffsets { monotonic_ns: -11_000_000_001, boottime_ns: 34_000_000_005 }
        );
        assert_eq!(offsets(""), TimeOffsets::default());
    }
}
