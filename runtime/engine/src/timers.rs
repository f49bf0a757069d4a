//! Timers that are read (`timerfd_create(2)`).
//!
//! The container's monotonic clocks stand still while it is stored, its wall clock does not: a timer that was set to an instant of
//! the wall clock expires at that instant, every other one after the rest of its time.
//!
//! Limits: a periodic timer that has expired and was not read begins its next period at the restore.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use samara_capsule::record::{self, Clocks};
use samara_kernel::proc::DescriptorInfo;
use samara_kernel::timerfd;

/// What `fdinfo` says of a timer; `None` where it does not.
pub(crate) fn describe(info: &DescriptorInfo) -> Option<record::TimerFd> {
    let line = |name: &str| {
        info.others.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    };
    Some(record::TimerFd {
        clock: line("clockid")?.parse().ok()?,
        ticks: line("ticks")?.parse().ok()?,
        flags: i32::from_str_radix(line("settime flags")?, 8).ok()?,
        rest_ns: nanoseconds(line("it_value")?)?,
        interval_ns: nanoseconds(line("it_interval")?)?,
    })
}

/// `(1, 500)`: seconds and nanoseconds.
fn nanoseconds(text: &str) -> Option<u64> {
    let (seconds, ns) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?.checked_add(ns.parse().ok()?)
}

/// Makes a timer. `then` are the clocks at the capture.
pub(crate) fn restore(record: &record::TimerFd, then: &Clocks) -> io::Result<OwnedFd> {
    let (clock, is_wall) = match record.clock {
        libc::CLOCK_REALTIME => (ClockId::CLOCK_REALTIME, true),
        libc::CLOCK_REALTIME_ALARM => (ClockId::CLOCK_REALTIME_ALARM, true),
        libc::CLOCK_MONOTONIC => (ClockId::CLOCK_MONOTONIC, false),
        libc::CLOCK_BOOTTIME => (ClockId::CLOCK_BOOTTIME, false),
        libc::CLOCK_BOOTTIME_ALARM => (ClockId::CLOCK_BOOTTIME_ALARM, false),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    let timer = TimerFd::new(clock, TimerFlags::TFD_CLOEXEC)?;
    let has_expired = record.rest_ns == 0 && record.ticks > 0;
    let armed = record.rest_ns > 0 || record.interval_ns > 0 && has_expired;
    if armed {
        let instant = is_wall && record.flags & libc::TFD_TIMER_ABSTIME != 0 && record.rest_ns > 0;
        let (flags, value_ns) = if instant {
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
    }
    if record.ticks > 0 && !(armed && has_expired) {
        timerfd::set_ticks(timer.as_fd(), record.ticks)?;
    }
    Ok(timer.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use super::*;

    fn described(timer: &OwnedFd) -> record::TimerFd {
        use std::os::fd::AsRawFd;
        let own = i32::try_from(std::process::id()).unwrap();
        describe(&samara_kernel::proc::descriptor_info(own, timer.as_raw_fd()).unwrap()).unwrap()
    }

    /// A timer that comes back unarmed is waited for for ever.
    #[test]
    fn timers_come_back_as_they_were() {
        let now = Clocks { monotonic_ns: 0, boottime_ns: 0, realtime_ns: 0 };
        let hour = 3_600_000_000_000;
        let clock = libc::CLOCK_MONOTONIC;
        let timer = record::TimerFd { clock, ticks: 0, flags: 0, rest_ns: hour, interval_ns: 7 };
        let made = described(&restore(&timer, &now).unwrap());
        assert!(made.rest_ns <= hour && made.rest_ns > hour / 2, "{made:?}");
        assert_eq!((made.interval_ns, made.ticks), (7, 0));
        // Expired three times, and armed no more.
        let timer = record::TimerFd { ticks: 3, rest_ns: 0, interval_ns: 0, ..timer };
        assert_eq!(described(&restore(&timer, &now).unwrap()), timer);
        // Never armed.
        let timer = record::TimerFd { ticks: 0, ..timer };
        assert_eq!(described(&restore(&timer, &now).unwrap()), timer);
    }

    /// An alarm for an instant that passed while the container was stored is due at once.
    #[test]
    fn instants_of_the_wall_clock_stay() {
        let then =
            Clocks { monotonic_ns: 0, boottime_ns: 0, realtime_ns: 1_000_000_000_000_000_000 };
        let timer = record::TimerFd {
            clock: libc::CLOCK_REALTIME,
            ticks: 0,
            flags: libc::TFD_TIMER_ABSTIME,
            rest_ns: 1_000_000_000,
            interval_ns: 0,
        };
        let timer = restore(&timer, &then).unwrap();
        let mut count = [0; 8];
        nix::unistd::read(&timer, &mut count).unwrap();
        assert_eq!(u64::from_le_bytes(count), 1);
    }
}
