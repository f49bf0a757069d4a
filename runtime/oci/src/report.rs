//! What a call tells its caller beside its output: the log that `--log` names, and standard error.
//!
//! Engines show their users the last line of level "error" in a JSON log, so a failed call writes
//! exactly one such line, and the same words to standard error.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use crate::command_line::{Global, LogFormat};

/// The log of one call; without `--log` there is none.
#[derive(Clone, Debug)]
pub struct Log {
    path: Option<PathBuf>,
    format: LogFormat,
    debug: bool,
}

impl Log {
    pub fn new(global: &Global) -> Self {
        Self { path: global.log.clone(), format: global.log_format, debug: global.debug }
    }

    /// Why the call failed.
    pub fn failure(&self, message: &str) {
        self.line("error", message);
        // Nothing is left to do where even that fails.
        let _ = writeln!(std::io::stderr(), "{message}");
    }

    pub fn warning(&self, message: &str) {
        self.line("warning", message);
        if self.path.is_none() {
            let _ = writeln!(std::io::stderr(), "warning: {message}");
        }
    }

    /// What the call's standard output says as well.
    pub fn note(&self, message: &str) {
        self.line("warning", message);
    }

    /// Written only with `--debug`.
    pub fn debug(&self, message: &str) {
        if !self.debug {
            return;
        }
        self.line("debug", message);
        if self.path.is_none() {
            let _ = writeln!(std::io::stderr(), "{message}");
        }
    }

    fn line(&self, level: &str, message: &str) {
        let Some(path) = &self.path else { return };
        let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
        let text = match self.format {
            LogFormat::Json => {
                serde_json::json!({"level": level, "msg": message, "time": time}).to_string()
            }
            LogFormat::Text => format!("time={time:?} level={level} msg={message:?}"),
        };
        // An engine that cannot be told by its log is told by standard error.
        if let Ok(mut file) = OpenOptions::new().append(true).create(true).open(path) {
            let _ = file.write_all(format!("{text}\n").as_bytes());
        }
    }
}

/// The whole chain of an error in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Libraries repeat their cause in their own words.
        if !text.contains(&cause_text) {
            let _ = write!(text, ": {cause_text}");
        }
        source = cause.source();
    }
    text
}
