//! A process of a container that our caller waits for: its signals, its terminal, its status.
//!
//! What it does not do: anything for a detached one, whose engine has its own terminal and reaper.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{
    OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};

use crate::process::ProcessIdentity;
use crate::signal_name::SignalNumber;

#[derive(Debug, thiserror::Error)]
pub enum ForegroundError {
    #[error("terminal: cannot {attempt}")]
    Terminal { attempt: &'static str, source: io::Error },
    #[error("the container's init sent no terminal")]
    NoTerminal,
    #[error("cannot {attempt}")]
    Signals { attempt: &'static str, source: nix::Error },
}

/// Every signal, to be read instead of taken. Dropped, the mask stays: this process ends soon.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    pub fn block() -> Result<Self, ForegroundError> {
        let mask = SigSet::all();
        let error = |attempt| move |source| ForegroundError::Signals { attempt, source };
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None).map_err(error("block signals"))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let fd = SignalFd::with_flags(&mask, flags).map_err(error("read signals"))?;
        Ok(Self(fd))
    }
}

/// A console socket of our own, for a terminal that our caller's is connected to.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    folder: PathBuf,
    path: PathBuf,
}

impl Console {
    pub fn listen() -> Result<Self, ForegroundError> {
        let error = |source| ForegroundError::Terminal { attempt: "make a socket", source };
        let name = format!("samara-console-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&folder).map_err(error)?;
        let path = folder.join("socket");
        let listener = UnixListener::bind(&path).map_err(error)?;
        Ok(Self { listener, folder, path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The terminal's master, which the container's init has sent by now.
    fn receive(&self) -> Result<OwnedFd, ForegroundError> {
        let error = |source| ForegroundError::Terminal { attempt: "receive it", source };
        let (stream, _) = self.listener.accept().map_err(error)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0; 256];
        let mut iov = [IoSliceMut::new(&mut name)];
        recvmsg(&stream, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)
            .map_err(|errno| error(errno.into()))?;
        control
            .drain()
            .find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            })
            .ok_or(ForegroundError::NoTerminal)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Only names are left behind where that fails.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Our caller's terminal in raw mode, until dropped.
struct RawMode(Option<Termios>);

impl RawMode {
    fn enter() -> Self {
        let stdin = rustix::stdio::stdin();
        let before = isatty(stdin).then(|| tcgetattr(stdin).ok()).flatten();
        if let Some(mut raw) = before.clone() {
            raw.make_raw();
            let _ = tcsetattr(stdin, OptionalActions::Now, &raw);
        }
        Self(before)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, before);
        }
    }
}

/// Passes signals and terminal on to child `pid` until it ends; `told` hears of each signal before the child does. Returns its
/// status, 128 and the signal's number for one that was killed.
pub fn attend(
    pid: i32,
    signals: Signals,
    console: Option<Console>,
    told: &dyn Fn(SignalNumber),
) -> Result<u8, ForegroundError> {
    let master = console.as_ref().map(Console::receive).transpose()?;
    drop(console);
    let _raw = master.as_ref().map(|_| RawMode::enter());
    if let Some(master) = &master {
        resize(master);
    }
    let identity = ProcessIdentity::of(pid);
    let mut terminal = master.map(Terminal::new);
    loop {
        if let Some(status) = reap(pid)? {
            if let Some(terminal) = &mut terminal {
                terminal.drain();
            }
            return Ok(status);
        }
        let ready = wait(&signals, terminal.as_ref())?;
        if let Some(terminal) = terminal.as_mut().filter(|_| ready.input) {
            terminal.copy_in();
        }
        if let Some(terminal) = terminal.as_mut().filter(|_| ready.output) {
            terminal.copy_out();
        }
        while let Ok(Some(info)) = signals.0.read_signal() {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            forward(number, identity.as_ref(), terminal.as_ref(), told);
        }
    }
}

fn forward(
    number: i32,
    to: Option<&ProcessIdentity>,
    terminal: Option<&Terminal>,
    told: &dyn Fn(SignalNumber),
) {
    use nix::libc::{SIGCHLD, SIGPIPE, SIGURG, SIGWINCH};
    match (number, terminal) {
        // Children are reaped after every turn; the other two concern this process alone.
        (SIGCHLD | SIGPIPE | SIGURG, _) => {}
        (SIGWINCH, Some(terminal)) => resize(&terminal.master),
        _ => {
            if let (Some(process), Some(signal)) = (to, SignalNumber::new(number)) {
                told(signal);
                // Gone meanwhile: the next turn reaps it.
                let _ = process.signal(signal);
            }
        }
    }
}

/// The status of `pid` if it has ended. Reaps every other child on the way: the container's
/// orphans are ours when we are their subreaper.
fn reap(pid: i32) -> Result<Option<u8>, ForegroundError> {
    let mut status = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(who, code)) => {
                if who == Pid::from_raw(pid) {
                    status = Some(u8::try_from(code).unwrap_or(u8::MAX));
                }
            }
            Ok(WaitStatus::Signaled(who, signal, _)) => {
                if who == Pid::from_raw(pid) {
                    status = u8::try_from(128 + signal as i32).ok();
                }
            }
            Ok(WaitStatus::StillAlive) | Err(nix::Error::ECHILD) => return Ok(status),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(source) => {
                return Err(ForegroundError::Signals { attempt: "wait for the process", source });
            }
        }
        if status.is_some() {
            return Ok(status);
        }
    }
}

/// Waits for the child `pid`, which has been killed, ten seconds at most.
///
/// All that can be waited for is, on the way: the init of a pid namespace ends after every process in there, and those that the
/// engine traced until a restore failed are ours to wait for.
pub fn reap_killed(pid: i32) {
    const TURNS_MAX: u32 = 10_000;
    for _ in 0..TURNS_MAX {
        match reap(pid) {
            Ok(None) => std::thread::sleep(std::time::Duration::from_millis(1)),
            Ok(Some(_)) | Err(_) => return,
        }
    }
}

#[derive(Default)]
struct Ready {
    input: bool,
    output: bool,
}

fn wait(signals: &Signals, terminal: Option<&Terminal>) -> Result<Ready, ForegroundError> {
    let stdin = rustix::stdio::stdin();
    let mut fds = vec![PollFd::new(&signals.0, PollFlags::IN)];
    let (mut input, mut output) = (None, None);
    if let Some(terminal) = terminal {
        if !terminal.output_ended {
            output = Some(fds.len());
            fds.push(PollFd::new(&terminal.master, PollFlags::IN));
        }
        if !terminal.input_ended {
            input = Some(fds.len());
            fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
        }
    }
    match poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => {
            return Err(ForegroundError::Terminal { attempt: "wait", source: errno.into() });
        }
    }
    let ready = |index: Option<usize>| {
        index.and_then(|i| fds.get(i)).is_some_and(|fd| !fd.revents().is_empty())
    };
    Ok(Ready { input: ready(input), output: ready(output) })
}

struct Terminal {
    master: OwnedFd,
    input_ended: bool,
    output_ended: bool,
}

impl Terminal {
    fn new(master: OwnedFd) -> Self {
        Self { master, input_ended: false, output_ended: false }
    }

    fn copy_in(&mut self) {
        let mut buffer = [0; 4096];
        match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
            Ok(0) => self.input_ended = true,
            Ok(count) => {
                let mut rest = buffer.get(..count).unwrap_or_default();
                while !rest.is_empty() {
                    match rustix::io::write(&self.master, rest) {
                        Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                        Err(_) => return self.input_ended = true,
                    }
                }
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => self.input_ended = true,
        }
    }

    /// A master answers EIO when the last slave is closed: that is the end.
    fn copy_out(&mut self) {
        let mut buffer = [0; 4096];
        match rustix::io::read(&self.master, &mut buffer) {
            Ok(count) if count > 0 => {
                let mut out = io::stdout().lock();
                let text = buffer.get(..count).unwrap_or_default();
                if out.write_all(text).and_then(|()| out.flush()).is_err() {
                    self.output_ended = true;
                }
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Ok(_) | Err(_) => self.output_ended = true,
        }
    }

    /// What the process wrote before it ended.
    fn drain(&mut self) {
        while !self.output_ended {
            let mut fds = [PollFd::from_borrowed_fd(self.master.as_fd(), PollFlags::IN)];
            let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            match poll(&mut fds, Some(&none)) {
                Ok(ready) if ready > 0 => self.copy_out(),
                _ => return,
            }
        }
    }
}

fn resize(master: &OwnedFd) {
    // A caller without a terminal has no size to pass on.
    if let Ok(size) = tcgetwinsize(rustix::stdio::stdin()) {
        let _ = tcsetwinsize(master, size);
    }
}
