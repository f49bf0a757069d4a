//! What the monitor and its callers say to each other over the control socket, and what the
//! monitor and a capture's worker say over pipes.
//!
//! A message is its length, four bytes big-endian, and that many bytes of JSON. A request is
//! `{"version": 1, "request": {…}}`; answers have the version too. One connection carries one
//! request and its answers: progress any number of times, then exactly one that ends it.
//!
//! What is not here: sockets and processes; this module only names and bounds messages.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::process::ProcessIdentity;

pub const VERSION: u32 = 1;

/// The hidden verb of `samara-runtime` that carries one capture out. Its standard input is a socket:
/// one message, a `WorkerTask`, the descriptors that the worker before has left, and then it stays open
/// for as long as somebody wants the capture: when it ends, the worker gives up. In the other direction
/// the worker leaves descriptors for the next one. Its standard output is messages, `WorkerReport`.
pub const WORKER_VERB: &str = "capture-worker";

/// The progress of a worker that waits for its turn among the captures of the node. It holds nothing yet.
pub const WAITING: &str = "waiting for other captures";

/// A message is at most this long. Requests are some hundred bytes; a report of what is not
/// supported names processes and descriptors and may grow with their number.
pub const MESSAGE_BYTES_MAX: u32 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("the other side has hung up")]
    HungUp,
    #[error("a message of {0} bytes, {MESSAGE_BYTES_MAX} are allowed")]
    TooLong(u64),
    #[error("a message that is not understood")]
    Json(#[source] serde_json::Error),
    #[error("version {0} of the protocol, this program speaks {VERSION}")]
    Version(u32),
    #[error("the connection fails")]
    Io(#[source] io::Error),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Versioned<T> {
    pub version: u32,
    #[serde(flatten)]
    pub message: T,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    Request(Request),
    Answer(Answer),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Request {
    Status,
    /// The container's init, once there is one: the monitor ends when it does.
    Adopt {
        init: ProcessIdentity,
    },
    /// One capture; `args` is the worker's affair.
    Checkpoint {
        args: serde_json::Value,
    },
    /// The note of captures at intervals has changed.
    Periodic,
    /// Descriptors for the next capture's worker, which follow, this many.
    Keep {
        count: usize,
    },
    /// The monitor ends. A capture that is under way is told to give up.
    Shutdown,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Answer {
    Status(MonitorStatus),
    Adopted,
    Kept,
    Periodic,
    ShuttingDown,
    /// From the worker; more follows.
    Progress {
        progress: serde_json::Value,
    },
    /// From the worker: the capture is done.
    Done {
        result: serde_json::Value,
    },
    Failed {
        error: Failure,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MonitorStatus {
    pub pid: u32,
    pub init: Option<ProcessIdentity>,
    /// Whether a capture is under way.
    pub capturing: bool,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case", tag = "code")]
pub enum Failure {
    #[error("another capture of this container is under way")]
    Busy,
    #[error("the monitor has not been told of the container's init")]
    NoContainer,
    #[error("the monitor watches another process ({0}) already")]
    OtherInit(i32),
    #[error("the request is not understood: {message}")]
    BadRequest { message: String },
    #[error("cannot start the capture: {message}")]
    Spawn { message: String },
    /// The worker's own words.
    #[error("{message}")]
    Capture { message: String },
    #[error("the capture's process was killed by {name} (signal {signal})")]
    WorkerKilled { signal: i32, name: String },
    #[error("the capture's process ended with status {status} and no result")]
    WorkerEnded { status: i32 },
    #[error("the container ended by itself and was removed before the capture was complete")]
    ContainerRemoved,
    #[error("the monitor is shutting down")]
    ShuttingDown,
}

/// What the worker finds on its standard input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerTask {
    /// The container's folder, `<root>/<id>`.
    pub state_dir: std::path::PathBuf,
    pub init: ProcessIdentity,
    pub args: serde_json::Value,
    /// How many descriptors follow: what the worker before has left.
    #[serde(default)]
    pub kept: usize,
}

/// What the worker writes to its standard output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum WorkerReport {
    Progress { progress: serde_json::Value },
    Done { result: serde_json::Value },
    Failed { message: String },
}

/// Encodes `message` with its length.
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, ProtocolError> {
    let text = serde_json::to_vec(message).map_err(ProtocolError::Json)?;
    let len = u32::try_from(text.len())
        .ok()
        .filter(|&len| len <= MESSAGE_BYTES_MAX)
        .ok_or(ProtocolError::TooLong(text.len() as u64))?;
    let mut bytes = len.to_be_bytes().to_vec();
    bytes.extend(text);
    Ok(bytes)
}

/// Writes one message.
pub fn send(to: &mut impl Write, message: &impl Serialize) -> Result<(), ProtocolError> {
    to.write_all(&encode(message)?).and_then(|()| to.flush()).map_err(ProtocolError::Io)
}

/// Reads one message; `HungUp` if there is no more.
pub fn receive<T: DeserializeOwned>(from: &mut impl Read) -> Result<T, ProtocolError> {
    let mut len = [0; 4];
    from.read_exact(&mut len).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => ProtocolError::HungUp,
        _ => ProtocolError::Io(error),
    })?;
    let len = u32::from_be_bytes(len);
    if len > MESSAGE_BYTES_MAX {
        return Err(ProtocolError::TooLong(len.into()));
    }
    let mut text = Vec::new();
    let read = from.take(len.into()).read_to_end(&mut text).map_err(ProtocolError::Io)?;
    if u64::from(len) != read as u64 {
        return Err(ProtocolError::HungUp);
    }
    serde_json::from_slice(&text).map_err(ProtocolError::Json)
}

/// Takes whole messages out of bytes that arrive in pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message; none until more bytes arrive.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ProtocolError> {
        let Some(header) = self.bytes.first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_be_bytes(*header);
        if len > MESSAGE_BYTES_MAX {
            return Err(ProtocolError::TooLong(len.into()));
        }
        let end = 4 + usize::try_from(len).map_err(|_| ProtocolError::TooLong(len.into()))?;
        let Some(text) = self.bytes.get(4..end) else { return Ok(None) };
        let message = serde_json::from_slice(text).map_err(ProtocolError::Json);
        self.bytes.drain(..end);
        message.map(Some)
    }
}

/// `message` with the version that this program speaks.
pub fn versioned(message: Message) -> Versioned<Message> {
    Versioned { version: VERSION, message }
}

/// The message of `versioned`, if its version is ours.
pub fn unversioned(versioned: Versioned<Message>) -> Result<Message, ProtocolError> {
    if versioned.version == VERSION {
        Ok(versioned.message)
    } else {
        Err(ProtocolError::Version(versioned.version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Versioned<Message> {
        versioned(Message::Request(Request::Checkpoint { args: serde_json::json!({"a": 1}) }))
    }

    #[test]
    fn messages_arrive_whole_in_pieces() {
        let bytes = [encode(&request()).unwrap(), encode(&request()).unwrap()].concat();
        let mut decoder = Decoder::default();
        let mut seen = 0;
        for byte in bytes {
            decoder.feed(&[byte]);
            while let Some(message) = decoder.take::<Versioned<Message>>().unwrap() {
                assert_eq!(unversioned(message).unwrap(), unversioned(request()).unwrap());
                seen += 1;
            }
        }
        assert_eq!(seen, 2);
    }

    #[test]
    fn the_form_on_the_wire_is_fixed() {
        let text = serde_json::to_string(&versioned(Message::Request(Request::Status))).unwrap();
        assert_eq!(text, r#"{"version":1,"request":{"kind":"status"}}"#);
        let busy = Message::Answer(Answer::Failed { error: Failure::Busy });
        let text = serde_json::to_string(&versioned(busy)).unwrap();
        assert_eq!(text, r#"{"version":1,"answer":{"kind":"failed","error":{"code":"busy"}}}"#);
    }

    #[test]
    fn lengths_from_outside_are_bounded() {
        let bytes = [&(MESSAGE_BYTES_MAX + 1).to_be_bytes()[..], b"{}"].concat();
        let error = receive::<Versioned<Message>>(&mut &bytes[..]).unwrap_err();
        assert!(matches!(error, ProtocolError::TooLong(_)));
        let mut decoder = Decoder::default();
        decoder.feed(&bytes);
        assert!(matches!(decoder.take::<Versioned<Message>>(), Err(ProtocolError::TooLong(_))));
    }

    #[test]
    fn another_version_is_not_guessed_at() {
        let newer = Versioned { version: 2, message: Message::Request(Request::Status) };
        assert!(matches!(unversioned(newer), Err(ProtocolError::Version(2))));
    }
}
