//! State that no restore would bring back: found before anything is touched, and named.

use std::fmt;

use samara_kernel::Pid;

/// One object that stands in the way of a capsule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// The process as its container numbers it.
    pub pid: Pid,
    pub process: String,
    pub place: Place,
    pub what: String,
}

/// Where in a process the object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Process,
    Thread(Pid),
    Descriptor(i32),
    Mapping(u64),
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.process)?;
        match self.place {
            Place::Process => {}
            Place::Thread(tid) => write!(f, ", thread {tid}")?,
            Place::Descriptor(fd) => write!(f, ", descriptor {fd}")?,
            Place::Mapping(address) => write!(f, ", mapping at {address:#x}")?,
        }
        write!(f, ": {}", self.what)
    }
}

/// Data that were sent before the other side has accepted the connection.
pub(crate) const UNACCEPTED_UNIX: &str =
    "data in a unix connection that nobody has accepted are not supported";
pub(crate) const UNACCEPTED_TCP: &str =
    "data in a TCP connection that nobody has accepted is not supported";
pub(crate) const AIO_UNDER_WAY: &str =
    "asynchronous requests (io_submit) that are under way are not supported";
/// How the refusal of an inotify instance ends that has something to tell.
pub(crate) const UNREAD_EVENTS: &str = "events that nobody has read, which are not supported";

impl Unsupported {
    /// Whether it passes as soon as the program does what it is about to do, as a rule.
    fn passes(&self) -> bool {
        [UNACCEPTED_UNIX, UNACCEPTED_TCP, AIO_UNDER_WAY, UNREAD_EVENTS]
            .iter()
            .any(|passing| self.what.ends_with(passing))
    }
}

impl UnsupportedList {
    /// Whether all of it is likely to be gone in a moment.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.0.iter().all(Unsupported::passes)
    }
}

/// A list of them, as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnsupportedList(pub Vec<Unsupported>);

impl fmt::Display for UnsupportedList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// More would not help anybody to see what the matter is.
        const SHOWN: usize = 8;
        for (index, one) in self.0.iter().take(SHOWN).enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            one.fmt(f)?;
        }
        if self.0.len() > SHOWN {
            write!(f, "; and {} more", self.0.len() - SHOWN)?;
        }
        Ok(())
    }
}
