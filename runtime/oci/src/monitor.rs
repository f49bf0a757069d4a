//! The monitor: one process per container, from `create` to the container's end.
//!
//! It answers on `<root>/<id>/monitor.sock` and starts the short-lived process of each capture.
//! It does not capture, holds no data of the container, and nothing that the container needs: it
//! can be killed at any instant, and the next caller starts another one (`Client::connect`).
//!
//! A container with an address has a second process, which does nothing until the monitor dies and then sees to it that there is
//! another one (`standby`): somebody has to see how the container ends, and nobody could look it up later.
//!
//! `server` is what runs in it; here is how it comes to be and how others talk to it.

mod client;
mod server;
mod standby;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::{Mode, OFlags};

pub use client::Client;
pub use server::serve;
pub use standby::stand_by;

use crate::process::ProcessIdentity;
use crate::protocol::{Failure, ProtocolError};
use crate::state_dir::{StateDir, StateError};

#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    #[error("cannot start the monitor {program}")]
    Spawn { program: PathBuf, source: io::Error },
    #[error("monitor: cannot {attempt}")]
    Io { attempt: &'static str, source: io::Error },
    #[error("cannot talk to the monitor")]
    Protocol(#[from] ProtocolError),
    #[error("the monitor gave an answer to another question")]
    OffTopic,
    #[error(transparent)]
    Refused(#[from] Failure),
    #[error(transparent)]
    State(#[from] StateError),
}

const SOCKET: &str = "monitor.sock";

/// A monitor that has just been started.
#[derive(Debug)]
pub struct Spawned {
    dir: StateDir,
    child: Child,
}

impl Spawned {
    /// Tells the monitor whom it watches. Also proves that it runs.
    pub fn adopt(&self, init: ProcessIdentity) -> Result<(), MonitorError> {
        Client::connect_existing(&self.dir)?.adopt(init)
    }

    /// Waits for its end in a thread, for a caller that may live longer: there it would stay a zombie. Not for one that forks,
    /// and none is needed where the caller ends soon: whoever inherits the monitor reaps it.
    fn reap_later(mut self) {
        std::thread::spawn(move || self.child.wait());
    }
}

/// Starts a monitor for the container of `dir`, which listens before this returns.
///
/// It is the caller's child and outlives it; until it is told of an init it ends with the caller.
pub(crate) fn spawn(dir: &StateDir) -> Result<Spawned, MonitorError> {
    let listener = listen(dir)?;
    let program = beside_us("samara-monitor");
    // The socket is its standard input, so that nothing else need be inherited.
    let child = Command::new(&program)
        .arg(dir.path())
        .arg(std::process::id().to_string())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| MonitorError::Spawn { program, source })?;
    Ok(Spawned { dir: dir.clone(), child })
}

/// Ends the monitor of `dir`, if there is one. It answers when the container's address has been told of the end; one that does
/// not within a second is left: it ends with the container, or when the store has answered.
pub fn stop(dir: &StateDir) {
    /// dockerd waits for a `delete` for two seconds.
    const TOLD_WITHIN: std::time::Duration = std::time::Duration::from_secs(1);
    if let Ok(mut client) = Client::connect_existing(dir)
        && client.wait_at_most(TOLD_WITHIN).is_ok()
    {
        let _ = client.shutdown();
    }
}

fn listen(dir: &StateDir) -> Result<UnixListener, MonitorError> {
    let io = |source| MonitorError::Io { attempt: "listen", source };
    // What a killed monitor leaves behind.
    match std::fs::remove_file(dir.path().join(SOCKET)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io(e)),
        _ => {}
    }
    let folder = open_folder(dir.path()).map_err(io)?;
    let path = short_path(&folder);
    let listener = UnixListener::bind(&path).map_err(io)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
    Ok(listener)
}

fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// A socket's address holds 108 bytes, a container's folder may have a longer name.
fn short_path(folder: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()))
}

/// Our programs are installed side by side. A sealed copy of this one knows where it came from.
pub(crate) fn beside_us(name: &str) -> PathBuf {
    let own = crate::sealed::original_program();
    own.parent().unwrap_or_else(|| Path::new("/")).join(name)
}
