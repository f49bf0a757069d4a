//! The caller's side of the control protocol.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::{MonitorError, beside_us, open_folder, short_path, spawn};
use crate::hand_over;
use crate::process::ProcessIdentity;
use crate::protocol::{
    Answer, Message, MonitorStatus, ProtocolError, Request, Versioned, receive, send, unversioned,
    versioned,
};
use crate::state_dir::StateDir;

/// How long a monitor may take for what it answers at once. It has nothing else to do; only a
/// machine in deep trouble takes this long.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// One connection: one request.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects to the monitor of the container, starting one where there is none. Fails for a
    /// container that does not exist.
    pub fn connect(dir: &StateDir) -> Result<Self, MonitorError> {
        let io = |source| MonitorError::Io { attempt: "take the monitor's lock", source };
        let record = dir.load()?;
        // Two callers that find no monitor must not start two.
        let lock = std::fs::File::create(dir.path().join("monitor.lock")).map_err(io)?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|errno| io(errno.into()))?;
        match Self::connect_existing(dir) {
            Err(MonitorError::Io { source, .. }) if is_absent(&source) => {
                let spawned = spawn(dir)?;
                spawned.adopt(record.init)?;
                spawned.reap_later();
                Self::connect_existing(dir)
            }
            other => other,
        }
    }

    /// Connects to a monitor that runs.
    pub(super) fn connect_existing(dir: &StateDir) -> Result<Self, MonitorError> {
        let io = |source| MonitorError::Io { attempt: "connect", source };
        let folder = open_folder(dir.path()).map_err(io)?;
        let stream = UnixStream::connect(short_path(&folder)).map_err(io)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(io)?;
        Ok(Self { stream })
    }

    /// Has questions answered within `time`, or fail.
    pub(super) fn wait_at_most(&mut self, time: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(time))
    }

    pub fn status(&mut self) -> Result<MonitorStatus, MonitorError> {
        match self.ask(Request::Status)? {
            Answer::Status(status) => Ok(status),
            other => Err(unexpected(other)),
        }
    }

    pub fn adopt(&mut self, init: ProcessIdentity) -> Result<(), MonitorError> {
        match self.ask(Request::Adopt { init })? {
            Answer::Adopted => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    pub fn shutdown(&mut self) -> Result<(), MonitorError> {
        match self.ask(Request::Shutdown)? {
            Answer::ShuttingDown => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Tells of a new note of captures at intervals.
    pub(crate) fn periodic(&mut self) -> Result<(), MonitorError> {
        match self.ask(Request::Periodic)? {
            Answer::Periodic => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Leaves descriptors for the next capture.
    pub(crate) fn keep(&mut self, fds: &[OwnedFd]) -> Result<(), MonitorError> {
        let request = Request::Keep { count: fds.len() };
        send(&mut self.stream, &versioned(Message::Request(request)))?;
        let io = |source| MonitorError::Io { attempt: "hand over descriptors", source };
        fds.chunks(hand_over::AT_ONCE)
            .try_for_each(|some| hand_over::send(&self.stream, some))
            .map_err(io)?;
        match self.answer()? {
            Answer::Kept => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Has the container captured. `progress` gets what the worker says meanwhile; the worker's
    /// result is returned. Dropping the client while this runs (in another thread, or by ending)
    /// tells the worker to give up.
    pub fn checkpoint(
        &mut self,
        args: serde_json::Value,
        mut progress: impl FnMut(serde_json::Value),
    ) -> Result<serde_json::Value, MonitorError> {
        let io = |source| MonitorError::Io { attempt: "wait for the capture", source };
        // A capture takes as long as it takes; a monitor that dies closes the connection.
        self.stream.set_read_timeout(None).map_err(io)?;
        let mut answer = self.ask(Request::Checkpoint { args })?;
        loop {
            match answer {
                Answer::Progress { progress: report } => progress(report),
                Answer::Done { result } => return Ok(result),
                other => return Err(unexpected(other)),
            }
            answer = self.answer()?;
        }
    }

    fn ask(&mut self, request: Request) -> Result<Answer, MonitorError> {
        send(&mut self.stream, &versioned(Message::Request(request)))?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Answer, MonitorError> {
        let message: Versioned<Message> = receive(&mut self.stream)?;
        match unversioned(message)? {
            Message::Answer(answer) => Ok(answer),
            Message::Request(_) => Err(MonitorError::OffTopic),
        }
    }
}

fn unexpected(answer: Answer) -> MonitorError {
    match answer {
        Answer::Failed { error } => error.into(),
        Answer::Status(_)
        | Answer::Adopted
        | Answer::Kept
        | Answer::Periodic
        | Answer::ShuttingDown
        | Answer::Progress { .. }
        | Answer::Done { .. } => MonitorError::OffTopic,
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

impl MonitorError {
    /// Whether another capture of the container is under way.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Refused(crate::protocol::Failure::Busy))
    }

    /// Whether the monitor ended while it was asked.
    pub fn is_hung_up(&self) -> bool {
        matches!(self, Self::Protocol(ProtocolError::HungUp))
    }
}

/// Where the monitor looks for the program of a capture.
pub(super) fn worker_program() -> std::path::PathBuf {
    beside_us("samara-runtime")
}
