//! The other side of a terminal: of a container's, as engines hold it, with a console socket and the master that comes through
//! it; and of one in which a program runs as if a person had started it.

use std::fs::File;
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, accept_with, recvmsg,
};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::process::wait_for;
use crate::until;

/// A console socket that nobody has connected to yet.
#[derive(Debug)]
pub struct Waiting {
    listener: UnixListener,
}

/// The master of a container's terminal. What the container writes is collected.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    collected: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Terminal {
    /// Makes the socket.
    ///
    /// # Errors
    /// When the path is taken or too long for a socket.
    pub fn listen(socket: &Path) -> Result<Waiting> {
        let listener = UnixListener::bind(socket).context("making a console socket")?;
        listener.set_nonblocking(true)?;
        Ok(Waiting { listener })
    }

    /// All that the container has written so far.
    pub fn output(&self) -> String {
        let collected = self.collected.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&collected).into_owned()
    }

    /// Waits until the container has closed the terminal, and all that it has written is collected.
    ///
    /// # Errors
    /// When it is still open after ten seconds.
    pub fn wait_closed(&self) -> Result<()> {
        let closed = || Ok(self.reader.is_finished().then_some(()));
        until("end of the terminal", Duration::from_secs(10), closed)
    }

    /// Types.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn write(&self, text: &str) -> io::Result<()> {
        (&self.master).write_all(text.as_bytes())
    }

    /// Resizes the terminal, as an engine does.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.master, size)?)
    }
}

impl Waiting {
    /// Takes the master from the runtime, which has returned already.
    ///
    /// # Errors
    /// When none comes within ten seconds.
    pub fn accept(self) -> Result<Terminal> {
        let connection = until("console", Duration::from_secs(10), || {
            match accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Ok(connection) => Ok(Some(connection)),
                Err(rustix::io::Errno::AGAIN) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })?;
        Terminal::over(File::from(receive(&connection)?))
    }
}

impl Terminal {
    /// Collects what is written to a terminal.
    fn over(master: File) -> Result<Terminal> {
        let collected: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (mut reader, into) = (master.try_clone()?, Arc::clone(&collected));
        // Ends with the terminal: a read fails when the last slave is closed.
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                let mut collected = into.lock().unwrap_or_else(PoisonError::into_inner);
                collected.extend_from_slice(buffer.get(..count).unwrap_or_default());
            }
        });
        Ok(Terminal { master, collected, reader })
    }
}

/// A program in a terminal of ours. It is killed when dropped.
#[derive(Debug)]
pub struct Session {
    terminal: Terminal,
    child: Child,
    /// How much of what it has shown was waited for.
    seen: usize,
}

/// Ample for what a person waits for.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

impl Session {
    pub(crate) fn start(command: &Command, rows: u16, columns: u16) -> Result<Session> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        unlockpt(&master)?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(ptsname(&master, Vec::new())?, flags, Mode::empty())?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&slave, size)?;
        // It becomes the program, with the terminal as the one that controls it.
        let mut inside = Command::new("setsid");
        inside.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        let child = inside
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave)
            .spawn()
            .context("starting a program in a terminal")?;
        // Its copies of the slave would keep the terminal open.
        drop(inside);
        Ok(Session { terminal: Terminal::over(File::from(master))?, child, seen: 0 })
    }

    /// Types.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn type_text(&self, text: &str) -> io::Result<()> {
        self.terminal.write(text)
    }

    /// Resizes the terminal.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        self.terminal.resize(rows, columns)
    }

    /// All that it has shown.
    pub fn shown(&self) -> String {
        self.terminal.output()
    }

    /// Waits until it has shown `text` since the last that was waited for; answers all since then.
    ///
    /// # Errors
    /// When it does not within a minute, with what it has shown.
    pub fn wait_for(&mut self, text: &str) -> Result<String> {
        let (terminal, seen) = (&self.terminal, self.seen);
        let found = until(&format!("{text:?}"), ANSWER_TIME_MAX, || {
            let shown = terminal.output();
            let rest = shown.get(seen..).unwrap_or_default();
            Ok(rest.find(text).and_then(|at| rest.get(..at + text.len())).map(str::to_owned))
        });
        let found = found.with_context(|| format!("it has shown: {}", terminal.output()))?;
        self.seen += found.len();
        Ok(found)
    }

    /// Waits for its end, and answers its exit status.
    ///
    /// # Errors
    /// When it does not end within a minute, or is killed.
    pub fn wait_exit(&mut self) -> Result<i32> {
        let status = wait_for(&mut self.child, ANSWER_TIME_MAX)?;
        let status = status.with_context(|| format!("it runs on, and showed: {}", self.shown()))?;
        status.code().context("it was killed")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Mostly it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn receive(connection: &OwnedFd) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut text = [0; 256];
    recvmsg(
        connection,
        &mut [IoSliceMut::new(&mut text)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .context("the console socket brought no descriptor")
}
