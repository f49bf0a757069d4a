//! What runs in the monitor: one thread, one poll(2), no timer.
//!
//! It ends when the container's init ends (or, before there is one, when `create` ends), but not
//! while a capture is under way: a container that moves is killed before its capsule is complete. And
//! not before the container's address has been told of the end, by a process of its own.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use samara_kernel::pidfd::PidFd;

use super::client::worker_program;
use super::{MonitorError, standby};
use crate::ending::{self, TELL_VERB};
use crate::hand_over;
use crate::periodic::Periodic;
use crate::process::ProcessIdentity;
use crate::protocol::{
    Answer, Decoder, Failure, Message, MonitorStatus, Request, Versioned, WAITING, WORKER_VERB,
    WorkerReport, WorkerTask, encode, unversioned, versioned,
};
use crate::state_dir::StateDir;

/// Connections at a time: the engine, its user, an agent and some that hang. More wait.
const CLIENTS_MAX: usize = 16;
/// Descriptors that are kept for a capture.
const KEPT_MAX: usize = 512;
/// Answers that a caller does not fetch: then it is taken for dead.
const UNSENT_BYTES_MAX: usize = 4 << 20;
/// Whoever kills every standby this often does not want one.
const STANDBYS_MAX: u32 = 100;
/// The kernel's OOM killer should take a container before its monitor.
const OOM_SCORE: &str = "-500";

/// Runs the monitor of the container in `dir`. The listening socket is standard input; `creator`
/// is the process that starts us.
pub fn serve(dir: &StateDir, creator: i32) -> Result<(), MonitorError> {
    let io = |attempt| move |source: io::Error| MonitorError::Io { attempt, source };
    let listener = detach().map_err(io("detach"))?;
    let init = match dir.load() {
        Ok(record) => match record.init.handle() {
            Some(handle) => Some(Init { identity: record.init, handle: Some(handle) }),
            None => return Ok(()),
        },
        // The container is still being made.
        Err(_) => None,
    };
    let parent_is_creator =
        rustix::process::getppid().is_some_and(|pid| pid.as_raw_nonzero().get() == creator);
    // Once there is an init, `create` may end.
    let creator = Pid::from_raw(creator)
        .filter(|_| parent_is_creator && init.is_none())
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    if creator.is_none() && init.is_none() {
        return Ok(());
    }
    let mut server = Server {
        dir: dir.clone(),
        listener,
        creator,
        init,
        clients: Vec::new(),
        next_client: 0,
        capture: None,
        queued: None,
        periodic: None,
        kept: Vec::new(),
        ended: None,
        telling: None,
        standby: None,
        standbys_left: STANDBYS_MAX,
        stopping: false,
    };
    server.load_periodic();
    let mut moved = false;
    while !server.is_done() {
        if server.init.is_some() && !moved {
            // Only now, since a move makes `create` wait.
            crate::cgroup::leave_all();
            moved = true;
        }
        if moved {
            server.keep_standby();
        }
        server.turn().map_err(io("wait"))?;
    }
    Ok(())
}

/// The listening socket, with everything of the caller's left behind.
fn detach() -> io::Result<UnixListener> {
    samara_kernel::close_range::close_from(3)?;
    let listener = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    leave_caller()?;
    let listener = UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Leaves everything of the caller's behind but descriptors from 3 on: streams, session, working directory.
pub(super) fn leave_caller() -> io::Result<()> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    // Fails only for the leader of a session, which is what is wanted.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    // Without CAP_SYS_RESOURCE the score cannot go down; it then stays the engine's.
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    Ok(())
}

struct Init {
    identity: ProcessIdentity,
    /// None once it has ended.
    handle: Option<PidFd>,
}

/// A process of ours that does one thing and ends.
struct Assistant {
    child: Child,
    handle: PidFd,
}

struct Server {
    dir: StateDir,
    listener: UnixListener,
    creator: Option<OwnedFd>,
    init: Option<Init>,
    clients: Vec<Client>,
    next_client: u64,
    capture: Option<Capture>,
    /// Whose request waits until a capture of our own is done.
    queued: Option<(u64, serde_json::Value)>,
    periodic: Option<Due>,
    /// What the last worker has left for the next one: nobody else knows what it is.
    kept: Vec<OwnedFd>,
    /// The init's end, until it is concluded: its status, if that is known.
    ended: Option<Option<i32>>,
    /// Who tells the address of the end.
    telling: Option<Assistant>,
    standby: Option<Assistant>,
    standbys_left: u32,
    stopping: bool,
}

/// Captures at intervals.
struct Due {
    periodic: Periodic,
    at: Instant,
    /// When the capture that is under way began.
    began: Instant,
}

struct Client {
    id: u64,
    stream: UnixStream,
    decoder: Decoder,
    /// Descriptors that came, and how many are to come.
    received: Vec<OwnedFd>,
    expected: Option<usize>,
    unsent: Vec<u8>,
    /// Has asked for the monitor's end, and gets an answer when the container's end has been told.
    waits_for_end: bool,
    /// Whether its last answer is in `unsent`.
    answered: bool,
    gone: bool,
}

/// The client of captures that nobody asked for at that moment.
const NOBODY: u64 = 0;

struct Capture {
    client: u64,
    child: Child,
    ended: OwnedFd,
    /// Shut down when nobody wants the capture any more.
    stdin: UnixStream,
    wanted: bool,
    /// Its worker waits for others of the node, and holds nothing yet.
    waits: bool,
    /// The task, until the worker has read it, and what is handed over behind it.
    untold: Vec<u8>,
    handed: Vec<OwnedFd>,
    stdout: ChildStdout,
    stdout_ended: bool,
    decoder: Decoder,
    outcome: Option<Answer>,
}

/// Who a descriptor of the poll set belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Listener,
    Creator,
    Init,
    WorkerOutput,
    WorkerInput,
    WorkerEnded,
    Told,
    StandbyEnded,
    Client(usize),
}

impl Server {
    fn is_done(&self) -> bool {
        let unwatched = match &self.init {
            Some(init) => init.handle.is_none(),
            None => self.creator.is_none(),
        };
        let silent =
            self.clients.iter().all(|client| client.unsent.is_empty() && !client.waits_for_end);
        self.is_told() && silent && (self.stopping || unwatched)
    }

    /// Whether nothing is under way that outlives the container.
    fn is_told(&self) -> bool {
        self.capture.is_none() && self.ended.is_none() && self.telling.is_none()
    }

    /// Waits for events and handles them.
    fn turn(&mut self) -> io::Result<()> {
        for event in self.wait()? {
            match event {
                Event::Listener => self.accept(),
                Event::Creator => self.creator = None,
                Event::Init => {
                    if let Some(init) = &mut self.init
                        && let Some(handle) = init.handle.take()
                    {
                        self.ended = Some(init.identity.end_status(&handle));
                    }
                }
                Event::WorkerInput => self.tell_worker(),
                Event::WorkerOutput => self.hear_worker(),
                Event::WorkerEnded => self.worker_ended(),
                Event::Told => Assistant::reap(&mut self.telling),
                Event::StandbyEnded => Assistant::reap(&mut self.standby),
                Event::Client(index) => self.client_event(index),
            }
        }
        // A capture that is under way may be what ended the container, and changes its lease.
        if self.capture.is_none()
            && let Some(status) = self.ended.take()
        {
            self.conclude(status);
        }
        if self.stopping && self.is_told() {
            for index in 0..self.clients.len() {
                if let Some(client) = self.clients.get_mut(index).filter(|c| c.waits_for_end) {
                    client.waits_for_end = false;
                    let id = client.id;
                    self.answer(id, &Answer::ShuttingDown, true);
                }
            }
        }
        for client in &mut self.clients {
            client.flush();
        }
        if let Some(capture) = &mut self.capture {
            // One that has not begun is in vain if the container has ended; and a periodic one gives way to one that is asked for.
            let begins = !capture.waits || self.ended.is_none();
            let wanted = begins
                && match capture.client {
                    NOBODY => !capture.waits || self.queued.is_none(),
                    client => self.clients.iter().any(|c| c.id == client && !c.gone),
                };
            if !wanted || self.stopping {
                capture.give_up();
            }
        }
        self.clients.retain(|client| !client.gone);
        self.capture_if_due();
        Ok(())
    }

    /// Reads what captures are wanted at intervals, and begins to count.
    fn load_periodic(&mut self) {
        let now = Instant::now();
        let periodic = Periodic::load(&self.dir);
        self.periodic =
            periodic.map(|periodic| Due { at: now + periodic.every(), periodic, began: now });
    }

    /// How long nothing has to be done; none for ever.
    fn idle(&self) -> Option<Duration> {
        let alive = self.init.as_ref().is_some_and(|init| init.handle.is_some());
        let due = self.periodic.as_ref().filter(|_| alive && !self.stopping)?;
        self.capture.is_none().then(|| due.at.saturating_duration_since(Instant::now()))
    }

    fn capture_if_due(&mut self) {
        if self.idle() != Some(Duration::ZERO) {
            return;
        }
        let Some(due) = &mut self.periodic else { return };
        let now = Instant::now();
        (due.at, due.began) = (now + due.periodic.every(), now);
        let args = due.periodic.args.clone();
        // What fails is tried again at the next time, and said in the folder's log by the worker.
        let _ = self.start_capture(NOBODY, args);
    }

    fn wait(&self) -> io::Result<Vec<Event>> {
        let mut watched = Vec::new();
        if self.clients.len() < CLIENTS_MAX && !self.stopping {
            watched.push((Event::Listener, self.listener.as_fd(), PollFlags::IN));
        }
        if let Some(creator) = self.creator.as_ref().filter(|_| self.init.is_none()) {
            watched.push((Event::Creator, creator.as_fd(), PollFlags::IN));
        }
        // Before clients: who asks for the monitor's end knows that the container has ended.
        if let Some(handle) = self.init.as_ref().and_then(|init| init.handle.as_ref()) {
            watched.push((Event::Init, handle.as_fd(), PollFlags::IN));
        }
        if let Some(telling) = &self.telling {
            watched.push((Event::Told, telling.handle.as_fd(), PollFlags::IN));
        }
        if let Some(standby) = &self.standby {
            watched.push((Event::StandbyEnded, standby.handle.as_fd(), PollFlags::IN));
        }
        if let Some(capture) = &self.capture {
            watched.push((Event::WorkerEnded, capture.ended.as_fd(), PollFlags::IN));
            if !capture.stdout_ended {
                watched.push((Event::WorkerOutput, capture.stdout.as_fd(), PollFlags::IN));
            }
            if capture.has_more_to_tell() {
                watched.push((Event::WorkerInput, capture.stdin.as_fd(), PollFlags::OUT));
            }
        }
        for (index, client) in self.clients.iter().enumerate() {
            let write = if client.unsent.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            let flags = PollFlags::IN | write;
            watched.push((Event::Client(index), client.stream.as_fd(), flags));
        }
        let mut fds: Vec<PollFd<'_>> =
            watched.iter().map(|&(_, fd, flags)| PollFd::from_borrowed_fd(fd, flags)).collect();
        let idle = self.idle().map(|idle| Timespec {
            tv_sec: i64::try_from(idle.as_secs()).unwrap_or(i64::MAX),
            // Not before it is due.
            tv_nsec: i64::from(idle.subsec_nanos()),
        });
        loop {
            match poll(&mut fds, idle.as_ref()) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let happened = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(watched.iter().zip(&fds).filter(|(_, fd)| happened(fd)).map(|(w, _)| w.0).collect())
    }

    fn accept(&mut self) {
        // A caller that has hung up meanwhile is no concern of the others.
        let Ok((stream, _)) = self.listener.accept() else { return };
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        self.next_client += 1;
        self.clients.push(Client {
            id: self.next_client,
            stream,
            decoder: Decoder::default(),
            received: Vec::new(),
            expected: None,
            unsent: Vec::new(),
            waits_for_end: false,
            answered: false,
            gone: false,
        });
    }

    fn client_event(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        client.fill();
        if client.gone || client.answered {
            return;
        }
        let id = client.id;
        if client.expected.is_some() {
            return self.take_kept(index);
        }
        let request = match client
            .decoder
            .take::<Versioned<Message>>()
            .and_then(|message| message.map(unversioned).transpose())
        {
            Ok(None) => return,
            Ok(Some(Message::Request(request))) => request,
            Ok(Some(Message::Answer(_))) => {
                return self.fail(id, Failure::BadRequest { message: "an answer".to_owned() });
            }
            Err(error) => {
                return self.fail(id, Failure::BadRequest { message: error.to_string() });
            }
        };
        let has_asked = self.queued.as_ref().is_some_and(|(client, _)| *client == id)
            || self.capture.as_ref().is_some_and(|capture| capture.client == id);
        if has_asked {
            return self.fail(id, Failure::BadRequest { message: "one request each".to_owned() });
        }
        match request {
            Request::Status => {
                let status = MonitorStatus {
                    pid: std::process::id(),
                    init: self.init.as_ref().map(|init| init.identity),
                    capturing: self.capture.is_some(),
                };
                self.answer(id, &Answer::Status(status), true);
            }
            Request::Adopt { init } => match self.adopt(init) {
                Ok(()) => self.answer(id, &Answer::Adopted, true),
                Err(failure) => self.fail(id, failure),
            },
            Request::Checkpoint { args } => {
                if let Err(failure) = self.start_capture(id, args) {
                    self.fail(id, failure);
                }
            }
            Request::Periodic => {
                self.load_periodic();
                self.answer(id, &Answer::Periodic, true);
            }
            Request::Keep { count } => {
                client.expected = Some(count);
                self.take_kept(index);
            }
            Request::Shutdown => {
                self.stopping = true;
                client.waits_for_end = true;
            }
        }
    }

    /// Keeps what a caller hands over for the next capture, once all of it has come.
    fn take_kept(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        let id = client.id;
        if client.received.len() > KEPT_MAX || client.expected.is_some_and(|n| n > KEPT_MAX) {
            let message = format!("more than {KEPT_MAX} descriptors");
            return self.fail(id, Failure::BadRequest { message });
        }
        if client.expected == Some(client.received.len()) {
            self.kept = std::mem::take(&mut client.received);
            self.answer(id, &Answer::Kept, true);
        }
    }

    /// The container has ended: notes what its address is to be told, and has it told.
    ///
    /// What fails here is made good by the next start at the address, which finds the note; or, where there is no note, by nobody,
    /// and `delete` says so.
    fn conclude(&mut self, status: Option<i32>) {
        let Ok(Some(note)) = ending::conclude(&self.dir, status) else { return };
        self.telling = Assistant::spawn(Command::new(worker_program()).arg(TELL_VERB).arg(note));
    }

    /// Has somebody watch this process, if the container's end matters.
    fn keep_standby(&mut self) {
        let alive = self.init.as_ref().is_some_and(|init| init.handle.is_some());
        if self.standby.is_some() || self.standbys_left == 0 || !alive || self.stopping {
            return;
        }
        if !ending::is_awaited(&self.dir) {
            self.standbys_left = 0;
            return;
        }
        self.standbys_left -= 1;
        self.standby = standby::command(&self.dir).and_then(|mut c| Assistant::spawn(&mut c));
    }

    fn adopt(&mut self, identity: ProcessIdentity) -> Result<(), Failure> {
        match &self.init {
            Some(init) if init.identity == identity => Ok(()),
            Some(init) => Err(Failure::OtherInit(init.identity.pid)),
            None => {
                // Gone already: then so are we, after this answer.
                self.init = Some(Init { identity, handle: identity.handle() });
                self.creator = None;
                self.load_periodic();
                Ok(())
            }
        }
    }

    fn start_capture(&mut self, client: u64, args: serde_json::Value) -> Result<(), Failure> {
        if self.stopping {
            return Err(Failure::ShuttingDown);
        }
        match &self.capture {
            None => {}
            Some(Capture { client: NOBODY, .. }) if self.queued.is_none() => {
                self.queued = Some((client, args));
                return Ok(());
            }
            Some(_) => return Err(Failure::Busy),
        }
        let init = self.init.as_ref().ok_or(Failure::NoContainer)?.identity;
        let kept = self.kept.len();
        let task = WorkerTask { state_dir: self.dir.path().to_owned(), init, args, kept };
        let untold = encode(&task).map_err(|e| Failure::BadRequest { message: e.to_string() })?;
        let handed = std::mem::take(&mut self.kept);
        let capture = Capture::spawn(self.dir.path(), client, untold, handed)
            .map_err(|e| Failure::Spawn { message: e.to_string() })?;
        self.capture = Some(capture);
        Ok(())
    }

    fn tell_worker(&mut self) {
        if let Some(capture) = &mut self.capture
            && let Err(error) = capture.tell()
            && !is_later(&error)
        {
            // A worker that reads no task ends, and its end tells the caller.
            capture.give_up();
        }
    }

    fn hear_worker(&mut self) {
        let Some(capture) = &mut self.capture else { return };
        let client = capture.client;
        let mut said = Vec::new();
        capture.hear(&mut said);
        for report in said {
            match report {
                WorkerReport::Progress { progress } => {
                    self.note_turn(progress == WAITING);
                    self.answer(client, &Answer::Progress { progress }, false);
                }
                WorkerReport::Done { result } => self.outcome(Answer::Done { result }),
                WorkerReport::Failed { message } => {
                    self.outcome(Answer::Failed { error: Failure::Capture { message } });
                }
            }
        }
    }

    /// Notes whether the worker waits for others of the node. That is no time that saving takes.
    fn note_turn(&mut self, waits: bool) {
        let Some(capture) = &mut self.capture else { return };
        if std::mem::replace(&mut capture.waits, waits)
            && !waits
            && let Some(due) = &mut self.periodic
        {
            due.began = Instant::now();
        }
    }

    /// Kept until the worker is gone: then nothing of the capture is under way any more.
    fn outcome(&mut self, answer: Answer) {
        if let Some(capture) = &mut self.capture {
            capture.outcome.get_or_insert(answer);
        }
    }

    fn worker_ended(&mut self) {
        // What it said last may still be in the pipe.
        self.hear_worker();
        let Some(mut capture) = self.capture.take() else { return };
        self.kept = capture.take_left();
        let failure = match capture.child.wait() {
            Ok(status) => match status.signal() {
                Some(signal) => {
                    Failure::WorkerKilled { signal, name: crate::signal_name::name(signal) }
                }
                None if self.stopping => Failure::ContainerRemoved,
                None => Failure::WorkerEnded { status: status.code().unwrap_or(-1) },
            },
            Err(e) => Failure::Spawn { message: e.to_string() },
        };
        let answer = capture.outcome.take().unwrap_or(Answer::Failed { error: failure });
        self.answer(capture.client, &answer, true);
        if let Some(due) = &mut self.periodic {
            let now = Instant::now();
            due.at = match capture.client {
                // Half of the time at most.
                NOBODY => due.at.max(now + now.duration_since(due.began)),
                _ => now + due.periodic.every(),
            };
        }
        if let Some((client, args)) = self.queued.take()
            && self.clients.iter().any(|other| other.id == client && !other.gone)
            && let Err(failure) = self.start_capture(client, args)
        {
            self.fail(client, failure);
        }
    }

    fn fail(&mut self, client: u64, error: Failure) {
        self.answer(client, &Answer::Failed { error }, true);
    }

    fn answer(&mut self, client: u64, answer: &Answer, last: bool) {
        let Some(client) = self.clients.iter_mut().find(|c| c.id == client) else { return };
        match encode(&versioned(Message::Answer(answer.clone()))) {
            Ok(bytes) => client.unsent.extend(bytes),
            // Too long to be said; the caller sees the connection end.
            Err(_) => client.gone = true,
        }
        client.answered |= last;
        if client.unsent.len() > UNSENT_BYTES_MAX {
            client.gone = true;
        }
    }
}

impl Assistant {
    /// None where the process cannot be started or watched: then it is done without.
    fn spawn(command: &mut Command) -> Option<Assistant> {
        let streams = [Stdio::null(), Stdio::null(), Stdio::null()];
        let [stdin, stdout, stderr] = streams;
        let mut child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn().ok()?;
        match i32::try_from(child.id()).ok().and_then(|pid| PidFd::open(pid).ok()) {
            Some(handle) => Some(Assistant { child, handle }),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                None
            }
        }
    }

    fn reap(assistant: &mut Option<Assistant>) {
        if let Some(mut assistant) = assistant.take() {
            let _ = assistant.child.wait();
        }
    }
}

impl Client {
    /// Reads what has arrived; notices that the caller is gone.
    fn fill(&mut self) {
        let mut buffer = [0; 4096];
        loop {
            match hand_over::read(&self.stream, &mut buffer, &mut self.received) {
                Ok(None) => return self.gone = true,
                Ok(Some(count)) => self.decoder.feed(buffer.get(..count).unwrap_or_default()),
                Err(e) if is_later(&e) => return,
                Err(_) => return self.gone = true,
            }
            if self.received.len() > KEPT_MAX {
                return;
            }
        }
    }

    fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => {
                    self.unsent.drain(..count);
                }
                Err(e) if is_later(&e) => return,
                Err(_) => return self.gone = true,
            }
        }
        if self.answered {
            self.gone = true;
        }
    }
}

impl Capture {
    fn spawn(dir: &Path, client: u64, untold: Vec<u8>, handed: Vec<OwnedFd>) -> io::Result<Self> {
        // What the worker says beside its reports, for whoever looks for a fault.
        let log = std::fs::File::create(dir.join("capture.log"))?;
        let (stdin, input) = UnixStream::pair()?;
        let mut child = Command::new(worker_program())
            .arg(WORKER_VERB)
            .stdin(OwnedFd::from(input))
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let opened = pid
            .ok_or(io::Error::from(ErrorKind::NotFound))
            .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
        let (Ok(ended), Some(stdout)) = (opened, child.stdout.take()) else {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::other("the new process cannot be watched"));
        };
        stdin.set_nonblocking(true)?;
        rustix::io::ioctl_fionbio(&stdout, true)?;
        Ok(Self {
            client,
            child,
            ended,
            stdin,
            wanted: true,
            waits: false,
            untold,
            handed,
            stdout,
            stdout_ended: false,
            decoder: Decoder::default(),
            outcome: None,
        })
    }

    fn has_more_to_tell(&self) -> bool {
        self.wanted && !(self.untold.is_empty() && self.handed.is_empty())
    }

    /// Tells the worker its task, and hands over what follows.
    fn tell(&mut self) -> io::Result<()> {
        while !self.untold.is_empty() {
            let count = self.stdin.write(&self.untold)?;
            self.untold.drain(..count);
        }
        while !self.handed.is_empty() {
            let count = self.handed.len().min(hand_over::AT_ONCE);
            hand_over::send(&self.stdin, self.handed.get(..count).unwrap_or_default())?;
            self.handed.drain(..count);
        }
        Ok(())
    }

    fn give_up(&mut self) {
        self.wanted = false;
        let _ = self.stdin.shutdown(Shutdown::Write);
    }

    /// What a worker that has ended left behind.
    fn take_left(&mut self) -> Vec<OwnedFd> {
        let mut left = Vec::new();
        while let Ok(some) = hand_over::receive(&self.stdin)
            && !some.is_empty()
        {
            left.extend(some);
        }
        left
    }

    fn hear(&mut self, said: &mut Vec<WorkerReport>) {
        let mut buffer = [0; 4096];
        loop {
            match self.stdout.read(&mut buffer) {
                Ok(0) => self.stdout_ended = true,
                Ok(count) => {
                    self.decoder.feed(buffer.get(..count).unwrap_or_default());
                    loop {
                        match self.decoder.take() {
                            Ok(Some(report)) => said.push(report),
                            Ok(None) => break,
                            // A worker that speaks nonsense is not listened to again.
                            Err(_) => {
                                self.stdout_ended = true;
                                break;
                            }
                        }
                    }
                }
                Err(e) if is_later(&e) => return,
                Err(_) => self.stdout_ended = true,
            }
            if self.stdout_ended {
                return;
            }
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // After `wait` this is an error and means nothing; before it, no worker may go on alone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
