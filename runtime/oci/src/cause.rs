//! Why a container could not be made, told across forks.
//!
//! libcontainer passes only the outermost words of an error from the container's init to us; the
//! rest it logs where it happens. This file in memory, shared by every process of one call, takes
//! those log lines and our executor's own errors.

use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::report::Log;

/// What one call collects; more would be no message for a person.
const BYTES_MAX: usize = 64 << 10;

/// A place for error messages that survives a fork.
#[derive(Clone, Debug)]
pub struct Cause(Rc<OwnedFd>);

const OURS: char = '!';
const THEIRS: char = '-';

impl Cause {
    pub fn new() -> std::io::Result<Self> {
        let fd = rustix::fs::memfd_create("cause", rustix::fs::MemfdFlags::CLOEXEC)?;
        Ok(Self(Rc::new(fd)))
    }

    /// Adds an error of ours, which outweighs every log line.
    pub fn tell(&self, text: &str) {
        write_line(&self.0, OURS, text);
    }

    /// Sends libcontainer's error lines here, and with `debug` all its lines to the log.
    pub fn listen(&self, log: Log, debug: bool) -> std::io::Result<()> {
        let fd = self.0.try_clone()?;
        *listener() = Some(Listener { fd, log, debug });
        // Fails when the forwarder is in place already, from an earlier call in this process.
        let _ = tracing::subscriber::set_global_default(Forwarder);
        Ok(())
    }

    /// The best explanation so far: our own last words, else the first of libcontainer's.
    pub fn best(&self) -> Option<String> {
        let mut bytes = vec![0; BYTES_MAX];
        let len = rustix::io::pread(&*self.0, &mut bytes, 0).ok()?;
        bytes.truncate(len);
        let text = String::from_utf8_lossy(&bytes);
        let ours = text.lines().rev().find_map(|line| line.strip_prefix(OURS));
        let theirs = || text.lines().find_map(|line| line.strip_prefix(THEIRS));
        ours.or_else(theirs).map(str::to_owned)
    }
}

fn write_line(fd: &OwnedFd, mark: char, text: &str) {
    let mut line = format!("{mark}{}", text.replace('\n', " "));
    let end = (0..=4096.min(line.len())).rev().find(|&end| line.is_char_boundary(end));
    line.truncate(end.unwrap_or(0));
    line.push('\n');
    // Written in one call, so that lines of several processes do not mix. Losing it costs words.
    let _ = rustix::io::write(fd, line.as_bytes());
}

static LISTENER: Mutex<Option<Listener>> = Mutex::new(None);

/// The place of the latest `listen`.
fn listener() -> MutexGuard<'static, Option<Listener>> {
    // Nothing that holds it can panic half-way through a change.
    LISTENER.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Listener {
    fd: OwnedFd,
    log: Log,
    debug: bool,
}

struct Forwarder;

impl Subscriber for Forwarder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR || listener().as_ref().is_some_and(|l| l.debug)
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        use tracing::level_filters::LevelFilter;
        Some(if listener().as_ref().is_some_and(|l| l.debug) {
            LevelFilter::DEBUG
        } else {
            LevelFilter::ERROR
        })
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let listener = listener();
        let Some(listener) = listener.as_ref() else { return };
        let mut words = Words::default();
        event.record(&mut words);
        let text = format!("{}{}", words.message, words.fields);
        if *event.metadata().level() == Level::ERROR {
            write_line(&listener.fd, THEIRS, &text);
        }
        if listener.debug {
            listener.log.debug(&text);
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string does not fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}
