//! What runs beside the monitor of a container with an address: waits for the monitor's end, nothing else.
//!
//! It holds a handle on the container's init. A monitor that dies is replaced while the handle is still there, so that whatever
//! the init does meanwhile, its status is known to somebody. Only if monitor and standby are killed at once is it lost.

use std::process::Command;

use rustix::event::{PollFd, PollFlags, poll};

use super::server::leave_caller;
use super::{Client, MonitorError, beside_us};
use crate::ending;
use crate::process::ProcessIdentity;
use crate::state_dir::StateDir;

/// What starts the standby of the calling process.
pub(super) fn command(dir: &StateDir) -> Option<Command> {
    let us = ProcessIdentity::of(i32::try_from(std::process::id()).ok()?)?;
    let mut command = Command::new(beside_us("samara-monitor"));
    command.arg(dir.path()).arg(us.pid.to_string()).arg(us.start_ticks.to_string()).env_clear();
    Some(command)
}

/// Waits for the end of `monitor`, and takes its place if the container still needs one.
pub fn stand_by(dir: &StateDir, monitor: ProcessIdentity) -> Result<(), MonitorError> {
    let io = |attempt| move |source: std::io::Error| MonitorError::Io { attempt, source };
    samara_kernel::close_range::close_from(3).map_err(io("close descriptors"))?;
    leave_caller().map_err(io("detach"))?;
    let init = dir.load()?.init;
    let handle = init.handle();
    if let Some(monitor) = monitor.handle() {
        while let Err(errno) = poll(&mut [PollFd::new(&monitor, PollFlags::IN)], None) {
            if errno != rustix::io::Errno::INTR {
                return Err(io("wait")(errno.into()));
            }
        }
    }
    // A monitor that ends by itself has seen the container's end.
    if !ending::is_awaited(dir) {
        return Ok(());
    }
    if init.is_alive() {
        // Which starts one, and returns when that has a handle on the init.
        Client::connect(dir)?;
    }
    let (false, Some(handle)) = (init.is_alive(), handle) else { return Ok(()) };
    // It has ended meanwhile. If the new monitor saw it, this finds that out.
    if let Ok(Some(note)) = ending::conclude(dir, init.end_status(&handle)) {
        // One attempt: what fails is left to the next start at the address.
        let _ = ending::tell(&note);
    }
    Ok(())
}
