//! Where a test may stop a process of ours: at one edge between phases, named by [`VARIABLE`].
//!
//! Only builds with debug assertions listen. The process stops itself as by SIGSTOP, and whoever stopped it decides which process
//! is to be killed, and whether this one goes on.

use samara_engine::phase::Phase;

/// The environment variable with the name of the edge.
pub const VARIABLE: &str = "SAMARA_FAIL_POINT";

/// The edge at which a process that was started with this environment is to stop.
pub fn wanted() -> Option<String> {
    if cfg!(debug_assertions) { std::env::var(VARIABLE).ok() } else { None }
}

/// Has this process stop when it reaches `wanted`.
pub fn arm(wanted: Option<String>) {
    let Some(wanted) = wanted.filter(|_| cfg!(debug_assertions)) else { return };
    samara_engine::phase::watch(move |phase: Phase| {
        if phase.name() == wanted {
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::STOP,
            );
        }
    });
}
