//! Turns: how many captures are under way at a time on a node, and whose is next.
//!
//! There is no daemon. Captures find out about one another in a folder of files, by locks that the kernel lets go when their holder ends
//! (`flock(2)`), so that nothing stays of one that is killed:
//!
//! - `unit-0` and so on are locked by captures that are under way, and hold the number of that process. `reserve` is one more, for captures
//!   that somebody asks for.
//! - `asked-…` and `periodic-…` are locked by captures that wait; their names sort by arrival.
//! - `queue` is locked by whoever looks or changes something, for as long as that takes.
//!
//! Each capture waits behind those of its kind that came before it: for the lock of the last of these, or, as the first, for the end of a
//! process that has a unit. Nobody is passed by one who came later. One that is asked for has the reserve, and so waits for others of its
//! kind alone; it takes another unit only where no periodic one waits. So neither kind keeps the other from its turn.
//!
//! A capture that is alone takes all units, and gives back what is more than one as soon as somebody waits.
//!
//! What is not here: what a unit is worth, and who may go without a turn (`budget`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags, flock, openat, unlinkat};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use samara_kernel::pidfd::PidFd;

/// Looking at the folder takes well under a millisecond, for each of hundreds. Who holds its lock longer was stopped.
const QUEUE_WITHIN: Duration = Duration::from_secs(5);
const QUEUE_RETRY: Duration = Duration::from_millis(1);
/// Units that are given back without an end of their process are noticed after this.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Containers of one node, and as many again that were killed.
const FILES_MAX: usize = 20_000;
/// A thread that waits for a lock does nothing else.
const STACK_BYTES: usize = 64 << 10;

const RESERVE: &str = "reserve";

#[derive(Debug, thiserror::Error)]
pub enum TurnError {
    #[error("cannot {attempt} {}", folder.display())]
    Io { attempt: &'static str, folder: PathBuf, source: io::Error },
    #[error("{} has to belong to this user, and nobody else may have access to it", folder.display())]
    Exposed { folder: PathBuf },
    #[error("other captures of this node have been under way for {} s", .0.as_secs())]
    Waited(Duration),
    #[error(
        "nobody wants the capture any more: its container has ended, or another one is asked for"
    )]
    GivenUp,
}

/// Why a capture takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Somebody asks for it.
    Asked,
    /// It is time for it.
    Periodic,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Asked => "asked",
            Kind::Periodic => "periodic",
        }
    }
}

/// The folder, and how many units there are beside the reserve.
#[derive(Debug)]
pub(crate) struct Turns {
    path: PathBuf,
    folder: OwnedFd,
    units: usize,
}

/// How long somebody waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Then it is an error.
    pub(crate) whole: Duration,
    /// As the first of its kind; then it begins without a unit.
    pub(crate) as_first: Option<Duration>,
}

/// The right to be under way, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    turns: Turns,
    units: Vec<File>,
}

/// Somebody who waits. The file goes when it is dropped.
#[derive(Debug)]
struct Ticket<'a> {
    turns: &'a Turns,
    name: String,
    kind: Kind,
    _locked: File,
}

/// What somebody who waits does next.
enum Next {
    Begin(Vec<File>),
    /// Wait until this lock is let go.
    Behind(File),
    /// Wait until one of these processes ends.
    First(Vec<PidFd>),
}

/// Held while somebody looks or changes something.
struct Queue(#[expect(dead_code, reason = "it is locked while it is open")] File);

impl Turns {
    /// Opens the folder, or makes it, for this user alone.
    pub(crate) fn open(path: &Path, units: usize) -> Result<Turns, TurnError> {
        let io = |attempt| move |source| TurnError::Io { attempt, folder: path.to_owned(), source };
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(path).map_err(io("make"))?;
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || -> io::Result<_> {
            let folder = rustix::fs::open(path, flags, Mode::empty())?;
            let stat = rustix::fs::fstat(&folder)?;
            Ok((folder, stat))
        };
        let (folder, stat) = open().map_err(io("open"))?;
        if stat.st_mode & 0o077 != 0 || stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(TurnError::Exposed { folder: path.to_owned() });
        }
        Ok(Turns { path: path.to_owned(), folder, units: units.max(1) })
    }

    /// Takes what units are free, whoever waits for them, and begins also without any.
    pub(crate) fn begin_at_once(self) -> Result<Turn, TurnError> {
        let take = || -> io::Result<Vec<File>> {
            let _queue = self.queue(Instant::now() + QUEUE_WITHIN)?;
            let reserve = self.take(RESERVE)?;
            Ok(reserve.into_iter().chain(self.take_free(usize::MAX)?).collect())
        };
        let units = take().map_err(self.io("look for a turn in"))?;
        Ok(Turn { turns: self, units })
    }

    /// Waits for a turn. `stop` is a socket that is hung up when nobody wants the turn any more; `waiting` is called once, before the first
    /// wait.
    pub(crate) fn wait(
        self,
        kind: Kind,
        patience: Patience,
        stop: BorrowedFd<'_>,
        waiting: impl FnOnce(),
    ) -> Result<Turn, TurnError> {
        let io = self.io("wait for a turn in");
        let ticket = self.enter(kind).map_err(&io)?;
        let end = Instant::now() + patience.whole;
        let (mut waiting, mut first_until) = (Some(waiting), None);
        let units = loop {
            let next = self.next(&ticket).map_err(&io)?;
            if !matches!(next, Next::Begin(_))
                && let Some(waiting) = waiting.take()
            {
                waiting();
            }
            let now = Instant::now();
            let left = end.saturating_duration_since(now);
            match next {
                Next::Begin(units) => break units,
                Next::Behind(file) => {
                    let freed = freed(file).map_err(&io)?;
                    sleep(stop, &[freed.as_fd()], left).map_err(&io)?;
                }
                Next::First(holders) => {
                    let until =
                        *first_until.get_or_insert(patience.as_first.map(|most| now + most));
                    if until.is_some_and(|until| now >= until) {
                        break Vec::new();
                    }
                    let ends: Vec<BorrowedFd<'_>> = holders.iter().map(AsFd::as_fd).collect();
                    sleep(stop, &ends, left.min(LOOK_AGAIN)).map_err(&io)?;
                }
            }
            if is_hung_up(stop).map_err(&io)? {
                return Err(TurnError::GivenUp);
            }
            if left.is_zero() {
                return Err(TurnError::Waited(patience.whole));
            }
        };
        drop(ticket);
        Ok(Turn { turns: self, units })
    }

    fn io(&self, attempt: &'static str) -> impl Fn(io::Error) -> TurnError + use<> {
        let path = self.path.clone();
        move |source| TurnError::Io { attempt, folder: path.clone(), source }
    }

    /// Joins those who wait.
    fn enter(&self, kind: Kind) -> io::Result<Ticket<'_>> {
        let _queue = self.queue(Instant::now() + QUEUE_WITHIN)?;
        let now = clock_gettime(ClockId::Boottime);
        let name =
            format!("{}-{:012}{:09}-{}", kind.name(), now.tv_sec, now.tv_nsec, std::process::id());
        let locked = self.open_file(&name, OFlags::CREATE | OFlags::EXCL | OFlags::RDWR)?;
        // Nobody else looks at it before the queue is free again.
        flock(&locked, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Ticket { turns: self, name, kind, _locked: locked })
    }

    fn next(&self, ticket: &Ticket<'_>) -> io::Result<Next> {
        let _queue = self.queue(Instant::now() + QUEUE_WITHIN)?;
        let waiting = self.waiting()?;
        let own = ticket.kind.name();
        let before = waiting.iter().filter(|name| name.starts_with(own) && **name < ticket.name);
        for name in before.rev() {
            if let Some(file) = self.living(name)? {
                return Ok(Next::Behind(file));
            }
        }
        let anybody = |kind: &str| -> io::Result<bool> {
            let others = waiting.iter().filter(|name| **name != ticket.name);
            for name in others.filter(|name| name.starts_with(kind)) {
                if self.living(name)?.is_some() {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        let mut units = Vec::new();
        match ticket.kind {
            Kind::Periodic => units.extend(self.take_free(1)?),
            Kind::Asked => {
                units.extend(self.take(RESERVE)?);
                if units.is_empty() && !anybody(Kind::Periodic.name())? {
                    units.extend(self.take_free(1)?);
                }
            }
        }
        if units.is_empty() {
            let reserve = (ticket.kind == Kind::Asked).then(|| RESERVE.to_owned());
            let names = (0..self.units).map(unit).chain(reserve);
            return Ok(Next::First(names.filter_map(|name| self.holder(&name)).collect()));
        }
        if !anybody("")? {
            units.extend(self.take_free(usize::MAX)?);
        }
        Ok(Next::Begin(units))
    }

    /// Who waits, by name, those who came first first; also some who don't any more.
    fn waiting(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.folder)?.take(FILES_MAX) {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if [Kind::Asked, Kind::Periodic].iter().any(|kind| name.starts_with(kind.name())) {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// The file of somebody who still waits. Of one who does not, it is removed.
    fn living(&self, name: &str) -> io::Result<Option<File>> {
        let file = match self.open_file(name, OFlags::RDONLY) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // Shared, so that two who look don't take each other for its owner.
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {
                let _ = unlinkat(&self.folder, name, AtFlags::empty());
                Ok(None)
            }
            Err(Errno::WOULDBLOCK) => Ok(Some(file)),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes up to `most` of the units that are free.
    fn take_free(&self, most: usize) -> io::Result<Vec<File>> {
        let mut taken = Vec::new();
        for number in 0..self.units {
            if taken.len() == most {
                break;
            }
            taken.extend(self.take(&unit(number))?);
        }
        Ok(taken)
    }

    /// Takes a unit that is free, and notes who has it.
    fn take(&self, name: &str) -> io::Result<Option<File>> {
        let file = self.open_file(name, OFlags::CREATE | OFlags::RDWR)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        file.set_len(0)?;
        file.write_all_at(std::process::id().to_string().as_bytes(), 0)?;
        Ok(Some(file))
    }

    /// The process that has a unit. None where it can't be told: then it is looked at again soon.
    fn holder(&self, name: &str) -> Option<PidFd> {
        let file = self.open_file(name, OFlags::RDONLY).ok()?;
        let mut text = [0; 16];
        let bytes = file.read_at(&mut text, 0).ok()?;
        let pid: i32 = std::str::from_utf8(text.get(..bytes)?).ok()?.parse().ok()?;
        // One that has ended has none, whatever still stands there. Whoever waits in the same process does not wait for its end.
        let holder = PidFd::open(pid).ok().filter(|_| u32::try_from(pid) != Ok(std::process::id()));
        holder.filter(|holder| happened(holder.as_fd(), PollFlags::IN).is_ok_and(|ended| !ended))
    }

    fn open_file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(File::from(openat(&self.folder, name, flags, Mode::RUSR | Mode::WUSR)?))
    }

    fn queue(&self, until: Instant) -> io::Result<Queue> {
        let file = self.open_file("queue", OFlags::CREATE | OFlags::RDWR)?;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Queue(file)),
                Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(QUEUE_RETRY),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Turn {
    /// How many units it has.
    pub(crate) fn units(&self) -> usize {
        self.units.len()
    }

    /// Gives back what is more than `kept` units where somebody waits, and takes what is free where nobody does. Where somebody else is
    /// at it, it stays as it is.
    pub(crate) fn balance(&mut self, kept: usize) {
        let turns = &self.turns;
        let look = || -> io::Result<Option<Vec<File>>> {
            let _queue = turns.queue(Instant::now())?;
            for name in turns.waiting()? {
                if turns.living(&name)?.is_some() {
                    return Ok(None);
                }
            }
            turns.take_free(usize::MAX).map(Some)
        };
        match look() {
            Ok(Some(free)) => self.units.extend(free),
            Ok(None) => self.units.truncate(kept),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => tracing::debug!(%error, "the turns of captures can't be looked at"),
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        // Before the lock goes: nobody else has this name.
        let _ = unlinkat(&self.turns.folder, self.name.as_str(), AtFlags::empty());
    }
}

fn unit(number: usize) -> String {
    format!("unit-{number}")
}

/// Hung up when the lock of `file` has been let go.
fn freed(file: File) -> io::Result<UnixStream> {
    let (heard, said) = UnixStream::pair()?;
    // It waits for as long as this process lives; the lock is a shared one and let go at once.
    std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
        while flock(&file, FlockOperation::LockShared) == Err(Errno::INTR) {}
        drop(file);
        drop(said);
    })?;
    Ok(heard)
}

/// Waits until something happens to one of the descriptors, at most so long.
fn sleep(stop: BorrowedFd<'_>, others: &[BorrowedFd<'_>], most: Duration) -> io::Result<()> {
    let mut watched: Vec<PollFd<'_>> = others
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .chain([PollFd::from_borrowed_fd(stop, PollFlags::RDHUP)])
        .collect();
    let most = Timespec {
        tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(most.subsec_nanos()),
    };
    match poll(&mut watched, Some(&most)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether the other side of a socket does not say anything any more.
pub(crate) fn is_hung_up(socket: BorrowedFd<'_>) -> io::Result<bool> {
    happened(socket, PollFlags::RDHUP)
}

fn happened(fd: BorrowedFd<'_>, what: PollFlags) -> io::Result<bool> {
    let mut watched = [PollFd::from_borrowed_fd(fd, what)];
    loop {
        match poll(&mut watched, Some(&Timespec::default())) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    const LONG: Patience = Patience { whole: Duration::from_secs(60), as_first: None };
    const ASIDE: &str = "SAMARA_TEST_TURN";

    fn turns(folder: &Path, units: usize) -> Turns {
        Turns::open(folder, units).unwrap()
    }

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        rustix::fs::chmod(folder.path(), Mode::RWXU).unwrap();
        folder
    }

    /// Somebody who does not wait long.
    fn at_once(folder: &Path, units: usize, kind: Kind) -> Option<Turn> {
        let (stop, _open) = UnixStream::pair().unwrap();
        let patience = Patience { whole: Duration::ZERO, as_first: None };
        match turns(folder, units).wait(kind, patience, stop.as_fd(), || ()) {
            Ok(turn) => Some(turn),
            Err(TurnError::Waited(_)) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Waits in a thread, which tells `order` its name when it has its turn, and keeps it until it is told to end. Returns once it
    /// waits.
    fn in_thread(
        turns: Turns,
        kind: Kind,
        name: usize,
        order: &std::sync::mpsc::Sender<usize>,
    ) -> (std::thread::JoinHandle<()>, std::sync::mpsc::Sender<()>) {
        let (waits, waiting) = channel();
        let (end, ended) = channel::<()>();
        let order = order.clone();
        let thread = std::thread::spawn(move || {
            let (stop, _open) = UnixStream::pair().unwrap();
            let said = waits.clone();
            let turn = turns.wait(kind, LONG, stop.as_fd(), move || said.send(()).unwrap());
            let _ = waits.send(());
            let turn = turn.unwrap();
            order.send(name).unwrap();
            let _ = ended.recv();
            drop(turn);
        });
        waiting.recv().unwrap();
        (thread, end)
    }

    /// A process of its own that waits, says that it does and when it has its turn, and keeps it. Started by [`process`].
    #[test]
    fn aside() {
        let Ok(text) = std::env::var(ASIDE) else { return };
        let (units, path) = text.split_once(' ').unwrap();
        let stop = rustix::stdio::stdin();
        let turns = turns(Path::new(path), units.parse().unwrap());
        let turn = turns.wait(Kind::Periodic, LONG, stop, || eprintln!("waits")).unwrap();
        eprintln!("begins {}", turn.units());
        let mut byte = [0];
        let _ = rustix::io::read(stop, &mut byte);
    }

    /// Ends with the test.
    struct Other {
        child: Child,
        said: Receiver<String>,
        _open: UnixStream,
    }

    impl Other {
        #[track_caller]
        fn says(&self, what: &str) {
            loop {
                let line = self.said.recv_timeout(Duration::from_secs(60)).expect(what);
                if line.starts_with(what) {
                    return;
                }
            }
        }

        fn kill(&mut self) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }

    impl Drop for Other {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    fn process(folder: &Path, units: usize) -> Other {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "turns::tests::aside", "--nocapture"])
            .env(ASIDE, format!("{units} {}", folder.display()))
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = io::BufReader::new(child.stderr.take().unwrap());
        let (says, said) = channel();
        std::thread::spawn(move || {
            for line in io::BufRead::lines(output).map_while(Result::ok) {
                let _ = says.send(line);
            }
        });
        Other { child, said, _open: ours }
    }

    /// More would be more memory than the node's owner has allowed.
    #[test]
    fn there_are_as_many_turns_as_units() {
        let folder = folder();
        let mut first = at_once(folder.path(), 2, Kind::Periodic).unwrap();
        assert_eq!(first.units(), 2, "who is alone takes all");
        let (order, ordered) = channel();
        let second = in_thread(turns(folder.path(), 2), Kind::Periodic, 2, &order);
        first.balance(1);
        assert_eq!(first.units(), 1, "who is not gives back");
        assert_eq!(ordered.recv_timeout(Duration::from_secs(60)), Ok(2));
        assert!(at_once(folder.path(), 2, Kind::Periodic).is_none());
        drop(first);
        let mut third = at_once(folder.path(), 2, Kind::Periodic).unwrap();
        assert!(at_once(folder.path(), 2, Kind::Periodic).is_none());
        drop(second.1);
        second.0.join().unwrap();
        third.balance(1);
        assert_eq!(third.units(), 2, "who is alone again takes what is free");
    }

    /// Without this, a container could be passed again and again, and never be saved.
    #[test]
    fn nobody_is_passed_by_who_came_later() {
        let folder = folder();
        let held = at_once(folder.path(), 1, Kind::Periodic).unwrap();
        let (order, ordered) = channel();
        let mut waiting: Vec<_> = (0..20)
            .map(|name| Some(in_thread(turns(folder.path(), 1), Kind::Periodic, name, &order)))
            .collect();
        drop(held);
        for expected in 0..20 {
            assert_eq!(ordered.recv_timeout(Duration::from_secs(60)), Ok(expected));
            assert!(ordered.try_recv().is_err(), "one at a time");
            let (thread, end) = waiting.get_mut(expected).unwrap().take().unwrap();
            drop(end);
            thread.join().unwrap();
        }
    }

    /// A container whose files are being written without end must not keep others from being saved.
    #[test]
    fn who_does_nothing_makes_room() {
        let folder = folder();
        let mut idle = at_once(folder.path(), 1, Kind::Periodic).unwrap();
        let (order, ordered) = channel();
        let other = in_thread(turns(folder.path(), 1), Kind::Periodic, 0, &order);
        idle.balance(0);
        assert_eq!(ordered.recv_timeout(Duration::from_secs(60)), Ok(0));
        drop(other.1);
        other.0.join().unwrap();
        idle.balance(1);
        assert_eq!(idle.units(), 1);
    }

    /// A user who saves one container must not wait until a hundred others have been saved, and these must have their turn all the same.
    #[test]
    fn who_is_asked_for_does_not_wait_for_periodic_ones_nor_they_for_them() {
        let folder = folder();
        let held = at_once(folder.path(), 1, Kind::Periodic).unwrap();
        let (order, ordered) = channel();
        let periodic = in_thread(turns(folder.path(), 1), Kind::Periodic, 0, &order);
        let asked = at_once(folder.path(), 1, Kind::Asked).expect("the reserve");
        let second = in_thread(turns(folder.path(), 1), Kind::Asked, 1, &order);
        drop(held);
        // The unit is not for those who are asked for while a periodic one waits for it.
        assert_eq!(ordered.recv_timeout(Duration::from_secs(60)), Ok(0));
        drop(periodic.1);
        periodic.0.join().unwrap();
        assert_eq!(ordered.recv_timeout(Duration::from_secs(60)), Ok(1), "and then it is");
        drop((asked, second.1));
        second.0.join().unwrap();
    }

    /// A capture that was killed must not take its turn with it: in the end none would be left.
    #[test]
    fn nothing_stays_of_those_who_are_killed() {
        let folder = folder();
        let mut first = process(folder.path(), 1);
        first.says("begins 1");
        let mut second = process(folder.path(), 1);
        second.says("waits");
        let mut third = process(folder.path(), 1);
        third.says("waits");
        let fourth = process(folder.path(), 1);
        fourth.says("waits");
        // Of two who wait behind one another, the middle one.
        third.kill();
        second.kill();
        first.kill();
        fourth.says("begins 1");
        drop(fourth);
        assert!(at_once(folder.path(), 1, Kind::Periodic).is_some());
        let waiting = turns(folder.path(), 1).waiting().unwrap();
        assert!(waiting.is_empty(), "{waiting:?} is left");
    }

    /// A container that ends, or whose user asks for a capsule, must not wait until its periodic capture has its turn.
    #[test]
    fn who_is_not_wanted_any_more_stops_waiting() {
        let folder = folder();
        let _held = at_once(folder.path(), 1, Kind::Periodic).unwrap();
        let (stop, open) = UnixStream::pair().unwrap();
        let stopped = turns(folder.path(), 1).wait(Kind::Periodic, LONG, stop.as_fd(), || {
            open.shutdown(std::net::Shutdown::Write).unwrap();
        });
        assert!(matches!(stopped, Err(TurnError::GivenUp)), "{stopped:?}");
        assert!(turns(folder.path(), 1).waiting().unwrap().is_empty());
    }

    /// A container that stands must not stand longer because others are being saved.
    #[test]
    fn who_can_not_wait_begins() {
        let folder = folder();
        let held = turns(folder.path(), 1).begin_at_once().unwrap();
        assert_eq!(held.units(), 2);
        assert_eq!(turns(folder.path(), 1).begin_at_once().unwrap().units(), 0);
        let (stop, _open) = UnixStream::pair().unwrap();
        let patience = Patience { as_first: Some(Duration::ZERO), ..LONG };
        let begun = turns(folder.path(), 1).wait(Kind::Asked, patience, stop.as_fd(), || ());
        assert_eq!(begun.unwrap().units(), 0);
    }

    /// Others must not be able to hold captures up.
    #[test]
    fn a_folder_that_others_have_access_to_is_refused() {
        let folder = folder();
        rustix::fs::chmod(folder.path(), Mode::from_raw_mode(0o755)).unwrap();
        assert!(matches!(Turns::open(folder.path(), 1), Err(TurnError::Exposed { .. })));
    }
}
