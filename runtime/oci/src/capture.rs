//! `checkpoint`: the verb, and the worker that the monitor starts for it.
//!
//! The verb asks the container's monitor, the monitor starts a worker, the worker captures and stores. The worker is a process
//! of its own so that its memory goes when it ends, and so that whoever kills it harms nobody: the kernel lets the container
//! go on.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use oci_spec::runtime::LinuxNamespaceType;
use procfs::FromBufRead as _;
use procfs::process::MountInfos;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use samara_capsule::cbor::{EncodeError, encode_record};
use samara_capsule::config::{Provenance, Report, Requirements};
use samara_capsule::digest::Digest;
use samara_capsule::transfer::Sink;
use samara_engine::capture::{CaptureError, CaptureRequest, Captured, OutsideStream, capture};
use samara_engine::files::{
    self, Fingerprint, FingerprintError, KnownFiles, LeasedFiles, LocateError, Moment, RootChanges,
    Segments,
};
use samara_engine::freeze::FrozenTree;
use samara_engine::names::GivenNames;
use samara_engine::phase::{self, Phase};
use samara_engine::snapshot::SnapshotRequest;
use samara_kernel::mount_namespace;
use samara_store::collect::CollectOptions;
use samara_store::config::{ConfigError, ForkPolicy, PauseConfig};
use samara_store::frames::FrameCounts;
use samara_store::location::{Location, LocationError};
use samara_store::log::LogError;
use samara_store::store::StoreError;
use samara_store::writer::{CapsuleFacts, WriteError};
use samara_store::{CapsuleReader, CapsuleWriter, Lease, Retention, Store};
use serde::{Deserialize, Serialize};

use crate::address::Node;
use crate::budget::{self, Begun, Claim, Pacer, Standing};
use crate::bundle::{Bundle, BundleError};
use crate::capsule_verbs::{CheckpointArgs, ImageArgs};
use crate::cgroup::CgroupError;
use crate::course::{self, Course};
use crate::defect;
use crate::ending;
use crate::fail_point;
use crate::lineage::Lineage;
use crate::monitor::{Client, MonitorError};
use crate::periodic::{Periodic, PeriodicError, Schedule};
use crate::privileges;
use crate::protocol::{self, ProtocolError, WorkerReport, WorkerTask};
use crate::restore::is_restoring;
use crate::saved::{Origin, ROOT_STREAM, Saved, SavedTree};
use crate::state_dir::{Record, StateDir, StateError, Status, replace};
use crate::turns::{Kind, TurnError, is_hung_up};

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(
        "container does not exist: there is no {id} in {}; `samara ps` shows what runs, and --root names another folder", root.display()
    )]
    Missing { id: String, root: PathBuf },
    #[error(
        "another copy of this container was started at {address} since (epoch {newest}; this one has {epoch}), so this one was ended: only the newer one may save"
    )]
    Older { address: String, epoch: u64, newest: u64 },
    #[error("cannot checkpoint a container in the {0} state; it has to run")]
    NotRunning(&'static str),
    #[error("there is no address: give --capsule URL or --image-path DIR")]
    NoTarget,
    #[error("--capsule")]
    Address(#[from] LocationError),
    #[error(
        "--{0} is not supported: every capsule is complete by itself, and stores only what changed since the one before"
    )]
    Flag(&'static str),
    #[error(
        "the container's program has mounted {kind} at {}, which is not supported: unmount it, or let the specification mount it",
        path.display()
    )]
    OwnMount { path: PathBuf, kind: String },
    #[error("the container's program has unmounted {}, which is not supported", path.display())]
    NoMount { path: PathBuf },
    #[error(
        "a container in a user namespace can't be saved yet; start it without (docker: --userns host)"
    )]
    UserNamespace,
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error("cannot tell the capture what to do")]
    Arguments(#[source] serde_json::Error),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error(transparent)]
    Files(#[from] files::CaptureError),
    #[error(transparent)]
    Locate(#[from] LocateError),
    #[error(transparent)]
    Fingerprint(#[from] FingerprintError),
    #[error("cannot encode the records")]
    Records(#[from] EncodeError),
    #[error("cannot {attempt}")]
    Io { attempt: &'static str, source: io::Error },
    #[error("the capsule is stored, but the container could not be let go: {0}")]
    Release(#[source] samara_engine::TraceeError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Periodic(#[from] PeriodicError),
    #[error(transparent)]
    Turn(#[from] TurnError),
}

/// What the verb tells the worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Order {
    /// The address, as a URL.
    target: String,
    /// The node's configuration; none for the default one, if it is there.
    config: Option<PathBuf>,
    leave_running: bool,
    /// Which capsules stay, for captures at intervals: such a one finds out first whether there is anything to capture.
    #[serde(default)]
    retention: Option<String>,
    /// Takes what it can get, whatever the node's budget: it is now or never.
    #[serde(default)]
    now: bool,
    /// Where a test wants the worker to stop.
    #[serde(default)]
    fail_point: Option<String>,
}

impl Order {
    /// Notes for the monitor that this is to be done at intervals, or no more.
    fn note_repetition(self, schedule: &Schedule, dir: &StateDir) -> Result<(), CheckpointError> {
        let retention = Some(schedule.retention.clone());
        let order = Order { leave_running: true, retention, now: false, fail_point: None, ..self };
        let args = serde_json::to_value(&order).map_err(CheckpointError::Arguments)?;
        let periodic = schedule.every.map(|every| Periodic::new(every, args));
        Periodic::note(periodic.as_ref(), dir).map_err(io("note the interval of captures"))
    }
}

/// Has a new container saved at intervals, as its specification asks; it has an address of its own.
pub(crate) fn save_at_intervals(
    dir: &StateDir,
    held: &Held,
    schedule: &Schedule,
) -> Result<(), CheckpointError> {
    let order = Order {
        target: held.address.clone(),
        config: held.config.clone(),
        leave_running: true,
        retention: None,
        now: false,
        fail_point: None,
    };
    order.note_repetition(schedule, dir)
}

/// What the worker answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub target: String,
    pub manifest: String,
    pub processes: usize,
    pub threads: usize,
    pub pause_ms: f64,
    pub seconds: f64,
    pub raw_bytes: u64,
    pub stored_bytes: u64,
    pub uploaded_bytes: u64,
    /// Frames of pages that were not in the capsule before.
    #[serde(default)]
    pub new_frames: FrameCounts,
    /// Processes that had joined from outside (`exec`) and are not in the capsule.
    pub left_out: Vec<String>,
    /// Mount points of volumes that the container may write to and that are not in the capsule: after a resume their content may
    /// be another one than the program remembers.
    #[serde(default)]
    pub unprotected: Vec<String>,
}

/// The address that a container was started with, and the right to commit there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Held {
    pub address: String,
    /// The node configuration that the address is reached with; none for the default one.
    pub config: Option<PathBuf>,
    pub(crate) lease: Lease,
    /// Whether the container's specification names the address: then that is told how the container ends.
    #[serde(default)]
    pub(crate) carried: bool,
    /// What the container was resumed from.
    #[serde(default)]
    pub(crate) resumed: Option<Digest>,
}

impl Held {
    fn path(dir: &StateDir) -> PathBuf {
        dir.path().join("lease.json")
    }

    /// Where the container is saved when nobody says where. A folder that is gone is no such place: docker and containerd restore
    /// from one that they remove at once.
    pub fn usual_target(&self) -> Option<&str> {
        let folder = self.address.strip_prefix("file://").map(Path::new);
        let usual = self.carried || folder.is_none_or(Path::exists);
        usual.then_some(self.address.as_str())
    }

    /// What was kept for a container; none for one without an address.
    pub fn load(dir: &StateDir) -> Option<Held> {
        serde_json::from_slice(&fs::read(Held::path(dir)).ok()?).ok()
    }

    pub(crate) fn save(&self, dir: &StateDir) -> io::Result<()> {
        // As a whole: the monitor may be reading it.
        replace(&Held::path(dir), &serde_json::to_vec(self)?)
    }
}

/// The address that a command line names.
pub fn target(image: &ImageArgs) -> Result<Location, CheckpointError> {
    match (&image.capsule, &image.image_path) {
        (Some(url), _) => Ok(Location::parse(url)?),
        (None, Some(folder)) => {
            let folder =
                std::path::absolute(folder).map_err(io("find the folder of --image-path"))?;
            Ok(Location::folder(&folder)?)
        }
        (None, None) => Err(CheckpointError::NoTarget),
    }
}

/// Saves a container. The store is reached with the node configuration `config`, none for the default one; `progress` gets
/// each phase.
///
/// Success: the capsule is in the store, whole; the container runs on if `leave_running`, else it has ended with status 143.
/// Failure: no capsule is visible, and the container is as it was.
pub fn checkpoint(
    dir: &StateDir,
    args: &CheckpointArgs,
    config: Option<PathBuf>,
    mut progress: impl FnMut(&str),
) -> Result<Summary, CheckpointError> {
    if args.pre_dump {
        return Err(CheckpointError::Flag("pre-dump"));
    }
    if args.page_server.is_some() {
        return Err(CheckpointError::Flag("page-server"));
    }
    if args.image.lazy_pages {
        return Err(CheckpointError::Flag("lazy-pages"));
    }
    let record = dir.load().map_err(|error| match error {
        StateError::Missing => CheckpointError::Missing {
            id: dir.id().to_string(),
            root: dir.path().parent().unwrap_or(dir.path()).to_owned(),
        },
        error => error.into(),
    })?;
    match record.status() {
        Status::Running | Status::Paused => {}
        other => return Err(CheckpointError::NotRunning(other.as_str())),
    }
    // The worker has another working directory.
    let config = config.map(std::path::absolute).transpose();
    let order = Order {
        target: target(&args.image)?.to_string(),
        config: config.map_err(io("find the node's configuration"))?,
        leave_running: args.leave_running || matches!(args.every, Some(Some(_))),
        retention: None,
        now: args.now,
        fail_point: fail_point::wanted(),
    };
    let schedule = args.every.map(|every| -> Result<_, CheckpointError> {
        Ok(Schedule { every, ..Schedule::of(&Bundle::reload(&dir.config())?)? })
    });
    let schedule = schedule.transpose()?;
    let order_text = serde_json::to_value(&order).map_err(CheckpointError::Arguments)?;
    let answer = Client::connect(dir)?.checkpoint(order_text, |phase| {
        if let Some(text) = phase.as_str() {
            progress(text);
        }
    })?;
    if let (None, Some(folder)) = (&args.image.capsule, &args.image.image_path) {
        mark_for_engines(folder);
    }
    if let Some(schedule) = schedule {
        order.note_repetition(&schedule, dir)?;
        Client::connect(dir)?.periodic()?;
    }
    serde_json::from_value(answer).map_err(CheckpointError::Arguments)
}

/// Makes docker's copy of a local image differ from containerd's.
///
/// docker keeps what containerd saved as a folder, and uploads it again when the container is to be started from it. containerd
/// refuses content that it has, and still has this until it collects garbage (moby/moby#42900). A file whose name says that
/// another one was deleted goes into the first archive and is not unpacked from it, so the second one is another.
fn mark_for_engines(folder: &Path) {
    const DELETED: &str = ".wh.saved-by-samara";
    if let Err(error) = File::create(folder.join(DELETED)) {
        tracing::warn!(%error, "docker may refuse to start from this checkpoint at once");
    }
}

impl Summary {
    /// One line for a person.
    pub fn line(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1u32 << 20);
        let ratio = self.raw_bytes as f64 / (self.stored_bytes.max(1)) as f64;
        let rate = mib(self.raw_bytes) / self.seconds.max(0.001);
        let mut line = format!(
            "saved to {}: paused {:.1} ms, {:.1} MiB stored as {:.1} MiB ({ratio:.1}x), {:.1} s, {rate:.0} MiB/s",
            self.target,
            self.pause_ms,
            mib(self.raw_bytes),
            mib(self.stored_bytes),
            self.seconds
        );
        if !self.left_out.is_empty() {
            line.push_str(&format!(
                "; not saved, as they joined by exec: {}",
                self.left_out.join(", ")
            ));
        }
        if !self.unprotected.is_empty() {
            line.push_str(&format!("; {}", self.unprotected()));
        }
        line
    }

    /// Names the volumes that the capsule does not protect.
    pub fn unprotected(&self) -> String {
        let volumes = self.unprotected.join(", ");
        format!("not in the capsule: the content of {volumes} (see {VOLUMES_ANNOTATION})")
    }
}

/// The worker: one task from standard input, reports on standard output.
///
/// When standard input ends, nobody wants the capture any more, and the process ends; the kernel then lets the container go on.
pub fn worker() -> Result<(), ProtocolError> {
    // Without a buffer: what is handed over behind the task must not be read as bytes.
    let input = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3);
    let mut input = UnixStream::from(input.map_err(|e| ProtocolError::Io(e.into()))?);
    let task: WorkerTask = protocol::receive(&mut input)?;
    let lineage = Lineage::receive(&input, task.kept);
    let mut lineage = lineage.map_err(ProtocolError::Io)?;
    let output = input.try_clone().map_err(ProtocolError::Io)?;
    let listener = std::thread::Builder::new().spawn(move || {
        let mut byte = [0];
        loop {
            match input.read(&mut byte) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, "the monitor can't be heard any more");
                    break;
                }
            }
        }
        // Who waits for a turn hears it too, and has something to leave for the next capture.
        if !ENDING.load(Ordering::SeqCst) && !WAITING.load(Ordering::SeqCst) {
            std::process::exit(1);
        }
    });
    if let Err(error) = listener {
        let message = format!("cannot start the thread that listens to the monitor: {error}");
        return protocol::send(&mut io::stdout(), &WorkerReport::Failed { message });
    }
    let outcome = defect::caught(|| work(&task, &mut lineage));
    // After a panic nobody knows what it would be worth.
    if outcome.is_ok()
        && let Err(error) = lineage.leave(&output)
    {
        tracing::warn!(%error, "the next capsule will be a full one");
    }
    let report = match outcome {
        Ok(Ok(summary)) => WorkerReport::Done {
            result: serde_json::to_value(summary).map_err(ProtocolError::Json)?,
        },
        Ok(Err(error)) => WorkerReport::Failed { message: crate::report::chain(&error) },
        Err(defect) => WorkerReport::Failed { message: defect.to_string() },
    };
    protocol::send(&mut io::stdout(), &report)
}

/// The capsule is whole and the container is being ended, which makes the engine call for the monitor's end: no reason to stop
/// before the outcome is told.
static ENDING: AtomicBool = AtomicBool::new(false);

/// The capture waits for its turn.
static WAITING: AtomicBool = AtomicBool::new(false);

fn progress(text: &str) {
    // Progress that nobody hears is no failure; an end of the caller is seen on standard input.
    let _ = protocol::send(&mut io::stdout(), &WorkerReport::Progress { progress: text.into() });
}

/// How long a capture is tried again for something that can't be saved and is likely to pass, and after which time. The program
/// runs for as long as it has stood, or it would hardly get any further on a busy machine.
const PASSING_MAX: Duration = Duration::from_secs(3);
const PASSING_PAUSE: Duration = Duration::from_millis(5);

/// The protocol of a capture, in order.
fn work(task: &WorkerTask, lineage: &mut Lineage) -> Result<Summary, CheckpointError> {
    let order: Order =
        serde_json::from_value(task.args.clone()).map_err(CheckpointError::Arguments)?;
    fail_point::arm(order.fail_point.clone());
    let dir = dir_of(&task.state_dir)?;
    let node = match &order.config {
        Some(path) => Node::load_from(path)?,
        None => Node::load()?,
    };
    let turn = wait_for_turn(&order, &dir, &node)?;
    let begun = Instant::now();
    let record = dir.load()?;
    if order.retention.is_some() && (record.status() != Status::Running || is_restoring(&dir)) {
        // Nothing runs that could be saved; the next time something may.
        return Err(CheckpointError::NotRunning(record.status().as_str()));
    }
    let spec = Bundle::reload(&dir.config())?;
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    if namespaces.into_iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User)
    {
        return Err(CheckpointError::UserNamespace);
    }

    progress("preparing");
    let location = Location::parse(&order.target)?;
    let store = Store::open(&location, &node.config.store, true)?.with_share(turn.share());
    let mut held = lease(&dir, &spec, &order, &store)?;
    let head = store.head()?.state;
    let newest = head.epoch;
    if held.carried && newest > held.lease.epoch {
        return Err(end_older_copy(&dir, &record, &held, newest));
    }
    let mountinfo = fs::read("/proc/self/mountinfo").map_err(io("read the mounts"))?;
    let root = RootChanges::locate(&record.rootfs, &mountinfo)?;
    let base = files::base_fingerprint(&root, Path::new(FINGERPRINT_CACHE))?;
    let parent = lineage.parent_at(&store, &order.target, head.latest.map(|latest| latest.digest));
    let mut continued = parent.as_ref().map(CapsuleReader::digest);
    let mut writer = match parent {
        Some(parent) => CapsuleWriter::after(parent)?,
        None => CapsuleWriter::new(&store)?,
    };
    if continued.is_some() && writer.base().map(|base| base.digest) != continued {
        // Somebody has committed since: only the newest capsule is sure to stay.
        continued = None;
        writer = CapsuleWriter::new(&store)?;
    }
    if !order.leave_running {
        writer = writer.as_last();
    }
    let mut course = Course::new(begun, writer.progress());
    let mut about = Report { waited_us: course::us(turn.waited), ..Report::default() };
    let pacer = turn.pace(writer.pace());
    lineage.tracking.begin(continued.is_some(), order.leave_running);
    let mut known = KnownFiles::new(&lineage.files);
    phase::reached(Phase::Prepared);
    course.ended("prepare");

    let paused = record.cgroup.is_frozen();
    let request = CaptureRequest {
        init: record.init.pid,
        outside: outside(&record),
        names: GivenNames { host: spec.hostname().clone(), domain: spec.domainname().clone() },
        snapshot: snapshot(&node.config.pause, &record).filter(|_| order.leave_running && !paused),
    };
    let mounts = mount_text(record.init.pid)?;
    refuse_own_mounts(record.init.pid, &spec, &mounts)?;
    let mut thaw = || match paused {
        true => record.cgroup.thaw().map_err(io::Error::other),
        false => Ok(()),
    };
    if !paused {
        progress("copying files ahead");
        copy_files_ahead(&record, &spec, &mounts, &root, &mut known, &mut writer)?;
        course.ended("files ahead");
        progress("copying memory");
        let ahead = lineage.tracking.copy_ahead(record.init.pid, &mut writer)?;
        tracing::info!(?ahead, "memory was copied while the container ran");
        about.memory.rounds = ahead.rounds.iter().map(|(pages, _)| *pages).collect();
        about.memory.ended = ahead.ended.to_owned();
        about.covering_us = (!ahead.stopped.is_zero()).then(|| course::us(ahead.stopped));
        phase::reached(Phase::CopiedAhead);
        course.ended("memory ahead");
    }
    progress("stopping");
    let urgent = Urgent::begin(&pacer);
    let tried_since = Instant::now();
    let (mut stopped, mut before_stop);
    let captured = loop {
        (stopped, before_stop) = (Instant::now(), SystemTime::now());
        match capture(&request, &mut lineage.tracking, &mut thaw, &mut writer) {
            // Nothing was stored yet, and the container runs.
            Err(CaptureError::Unsupported(list))
                if list.passes() && !paused && tried_since.elapsed() < PASSING_MAX =>
            {
                std::thread::sleep(stopped.elapsed().max(PASSING_PAUSE));
            }
            captured => break captured,
        }
    };
    let refreeze = || {
        if paused && let Err(error) = record.cgroup.freeze() {
            tracing::warn!(%error, "the container was paused, and could not be paused again");
        }
    };
    let Captured { container, frozen, report, leased, mapped, rest } = match captured {
        Ok(captured) => captured,
        Err(error) => {
            refreeze();
            return Err(error.into());
        }
    };
    course.ended("look");
    let mut parts = vec![
        ("stop", report.freeze),
        ("collect", report.collect),
        ("copy memory", report.copy.saturating_sub(report.fork)),
    ];
    if report.forks > 0 {
        parts.push(("fork", report.fork));
    }
    course.divide(&parts);
    (about.memory.copied, about.memory.unchanged) = (report.pages, report.unchanged_pages);
    (about.memory.forked, about.memory.forks) = (report.forked_pages, report.forks as u64);
    about.memory.way = report.way.to_string();
    // An error from here on drops `frozen`, which lets the container go on.
    let mounts_now = mount_text(record.init.pid)?;
    // The same mounts are still no others than the specification's.
    if mounts_now != mounts {
        refuse_own_mounts(record.init.pid, &spec, &mounts_now)?;
    }
    progress("copying files");
    let moment = Moment::of_stop(before_stop, mapped);
    let mut segments = known.into_stream(&mut writer, ROOT_STREAM, &moment);
    files::store_root(&root, &leased, &mut segments)?;
    let trees = travelling_trees(&spec, &mounts_now)?;
    for SavedTree { path, stream } in &trees {
        let mut segments = known.into_stream(&mut writer, stream, &moment);
        store_tree(record.init.pid, &spec, path, &leased, &mut segments)?;
    }
    let travelling: Vec<String> = trees.iter().map(|tree| tree.path.clone()).collect();
    let saved =
        Saved { container, origin: Origin::of(&spec, record.seccomp_filters), trees, root: true };
    let created = SystemTime::now();
    // Where the container stays, it does not wait for this.
    let describe = |report: Report| -> Result<_, CheckpointError> {
        let facts = CapsuleFacts {
            created,
            parent: continued,
            provenance: provenance(&saved, &record),
            requirements: requirements(&base, &saved.container.vdso_sha256),
            report: Some(report),
        };
        Ok((encode_record(&saved)?, facts))
    };
    // The capsule is there by then, and an older lease finds the way to the newest slot by itself: no reason to call it a failure.
    let keep = |held: &Held| {
        if Held::load(&dir).is_some_and(|known| known.address == held.address)
            && let Err(error) = held.save(&dir)
            // Its container may have ended meanwhile.
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "the lease could not be kept");
        }
    };
    phase::reached(Phase::FilesCopied);
    course.ended("copy files");
    // Before it is looked at whether anything runs.
    let stood_since = frozen.stopped_at();
    let (committed, pause) = if order.leave_running {
        match paused {
            true => frozen.thaw_into(&mut || refreeze()),
            false => frozen.thaw(),
        }
        .map_err(CheckpointError::Release)?;
        let pause = stood_since.elapsed();
        lineage.tracking.went_on();
        drop(urgent);
        phase::reached(Phase::Thawed);
        progress("storing");
        course.ended("go on");
        if report.forks > 0 {
            progress("copying from forks");
            rest.drain(&mut lineage.tracking, &mut writer)?;
            phase::reached(Phase::Drained);
            course.ended("memory of forks");
        }
        let pause_us = Some(course::us(pause));
        let (records, facts) =
            describe(Report { phases: course.into_phases(), pause_us, ..about })?;
        let committed = writer.commit(&mut held.lease, &records, facts)?;
        let noted = known.into_notes(&committed.segments);
        lineage.committed(&order.target, committed.capsule.digest, noted);
        keep(&held);
        phase::reached(Phase::Committed);
        if let Some(retention) = &order.retention {
            collect(&store, retention);
        }
        (committed, pause)
    } else {
        progress("storing");
        let (records, facts) = describe(Report { phases: course.into_phases(), ..about })?;
        let committed = writer.commit(&mut held.lease, &records, facts)?;
        keep(&held);
        phase::reached(Phase::Committed);
        ENDING.store(true, Ordering::SeqCst);
        ending::ask(&dir, "checkpoint");
        frozen.end(SAVED_STATUS).map_err(|error| {
            ending::take_back(&dir);
            CheckpointError::Release(error)
        })?;
        (committed, stood_since.elapsed())
    };
    Ok(Summary {
        target: order.target,
        manifest: committed.capsule.digest.to_string(),
        processes: report.processes,
        threads: report.threads,
        pause_ms: pause.as_secs_f64() * 1000.0,
        seconds: begun.elapsed().as_secs_f64(),
        raw_bytes: committed.raw_bytes,
        stored_bytes: committed.stored_bytes,
        uploaded_bytes: committed.uploaded_bytes,
        new_frames: committed.new_frames,
        left_out: report.sessions,
        unprotected: unprotected(&spec, &travelling),
    })
}

/// Waits until it is this capture's turn on the node: nothing is held for the container yet, and the store has not been asked.
fn wait_for_turn(order: &Order, dir: &StateDir, node: &Node) -> Result<Begun, CheckpointError> {
    let stands = dir.load().is_ok_and(|record| record.cgroup.is_frozen());
    let claim = match (order.now, stands, &order.retention) {
        (true, ..) => Claim::Unlimited,
        (false, true, _) => Claim::Stands,
        (false, false, Some(_)) => Claim::Waits(Kind::Periodic),
        (false, false, None) => Claim::Waits(Kind::Asked),
    };
    let stop = rustix::stdio::stdin();
    WAITING.store(true, Ordering::SeqCst);
    let turn = budget::begin(&node.config.capture, claim, stop, || progress(protocol::WAITING));
    WAITING.store(false, Ordering::SeqCst);
    // It may have been given up after the last look, when nothing else would have noticed.
    if is_hung_up(stop).map_err(io("look for the monitor"))? {
        return Err(TurnError::GivenUp.into());
    }
    Ok(turn?)
}

/// Removes what nobody asked to keep. What fails is done by the next capture.
fn collect(store: &Store, retention: &str) {
    let Ok(retention) = retention.parse::<Retention>() else { return };
    let (now, options) = (SystemTime::now(), CollectOptions::default());
    if let Err(error) = store.collect(&retention, now, &options, &|_, _| {}) {
        tracing::warn!(error = crate::report::chain(&error), "old capsules could not be removed");
    }
}

/// While it lives, this thread goes before those that compress, and these do not give way to others: somebody's container stands still
/// until it has copied, and where buffers are full until they have compressed. With two processors and two threads that compress it would
/// have two thirds of one.
#[derive(Debug)]
struct Urgent {
    nice_before: i32,
    _standing: Standing,
}

impl Urgent {
    const NICE: i32 = -10;

    /// Where it is not allowed, the container stands still a little longer.
    fn begin(pacer: &Pacer) -> Urgent {
        let standing = pacer.container_stands();
        // No process given means the calling thread (setpriority(2), "C library/kernel differences").
        let nice_before = rustix::process::getpriority_process(None).unwrap_or(0);
        if let Err(error) = rustix::process::setpriority_process(None, Urgent::NICE) {
            tracing::debug!(%error, "copying has no precedence");
        }
        Urgent { nice_before, _standing: standing }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        let _ = rustix::process::setpriority_process(None, self.nice_before);
    }
}

/// The exit status of a container that ended because it was saved, as if by SIGTERM.
pub const SAVED_STATUS: u8 = 143;

/// Where fingerprints of images are kept, so that they are computed once.
pub(crate) const FINGERPRINT_CACHE: &str = "/var/cache/samara/fingerprints";

fn dir_of(path: &Path) -> Result<StateDir, CheckpointError> {
    let id = path
        .file_name()
        .and_then(|name| name.to_str())
        .map(crate::container_id::ContainerId::parse);
    match (path.parent(), id) {
        (Some(root), Some(Ok(id))) => Ok(StateDir::new(root, &id)),
        _ => Err(StateError::Missing.into()),
    }
}

/// The right to commit at the target: the container's own, or a new epoch.
fn lease(
    dir: &StateDir,
    spec: &oci_spec::runtime::Spec,
    order: &Order,
    store: &Store,
) -> Result<Held, CheckpointError> {
    if let Some(held) = Held::load(dir).filter(|held| held.address == order.target) {
        return Ok(held);
    }
    let lease = store.take_epoch(&crate::restore::facts(dir.id(), spec))?.lease;
    Ok(Held {
        address: order.target.clone(),
        config: order.config.clone(),
        lease,
        carried: false,
        resumed: None,
    })
}

/// Ends a container of which another copy was started: two would do the same work, and only the newer one's counts.
fn end_older_copy(dir: &StateDir, record: &Record, held: &Held, newest: u64) -> CheckpointError {
    let address = held.address.clone();
    let mut thaw = || match record.cgroup.is_frozen() {
        true => record.cgroup.thaw().map_err(io::Error::other),
        false => Ok(()),
    };
    ENDING.store(true, Ordering::SeqCst);
    ending::ask(dir, "a newer copy");
    let ended = match FrozenTree::stop(record.init.pid, &mut thaw) {
        Ok(frozen) => frozen.end(SAVED_STATUS).map_err(CheckpointError::Release),
        Err(error) => Err(CaptureError::from(error).into()),
    };
    match ended {
        Ok(()) => CheckpointError::Older { address, epoch: held.lease.epoch, newest },
        Err(error) => {
            ending::take_back(dir);
            error
        }
    }
}

/// When forks may be made.
fn snapshot(config: &PauseConfig, record: &Record) -> Option<SnapshotRequest> {
    let always = match config.fork {
        ForkPolicy::Never => return None,
        ForkPolicy::Auto => false,
        ForkPolicy::Always => true,
    };
    let spare_bytes = record.cgroup.spare_memory();
    Some(SnapshotRequest { budget: config.budget(), always, spare_bytes })
}

fn outside(record: &Record) -> Vec<OutsideStream> {
    record
        .stdio
        .iter()
        .map(|stream| match stream {
            Some(file) => OutsideStream { device: file.device, inode: file.inode },
            // No file has inode 0 on device 0.
            None => OutsideStream { device: 0, inode: 0 },
        })
        .collect()
}

/// Stores what is new or has changed in the container's files while it runs. What can't be read now is read when it stands.
///
/// # Errors
/// Those of the store.
fn copy_files_ahead(
    record: &Record,
    spec: &oci_spec::runtime::Spec,
    mounts: &[u8],
    root: &RootChanges,
    known: &mut KnownFiles,
    writer: &mut CapsuleWriter,
) -> Result<(), CheckpointError> {
    let init = record.init.pid;
    let begun = Instant::now();
    let (moment, alone) = match Moment::of_running(init) {
        Ok(Some(found)) => found,
        Ok(None) => {
            tracing::info!("files are not copied ahead: it would be noticed by the container");
            return Ok(());
        }
        Err(error) => {
            tracing::info!(%error, "files are not copied ahead");
            return Ok(());
        }
    };
    let none = LeasedFiles::default();
    let mut segments = known.ahead(writer, &moment, &alone);
    unless_of_store(files::store_root(root, &none, &mut segments).map_err(Into::into))?;
    for SavedTree { path, .. } in travelling_trees(spec, mounts)? {
        let mut segments = known.ahead(writer, &moment, &alone);
        unless_of_store(store_tree(init, spec, &path, &none, &mut segments))?;
    }
    writer.settle().map_err(files::CaptureError::Write)?;
    tracing::info!(took = ?begun.elapsed(), "files were copied while the container ran");
    Ok(())
}

/// Lets go of the errors of files that may be gone when the container stands.
fn unless_of_store<T>(result: Result<T, CheckpointError>) -> Result<(), CheckpointError> {
    match result {
        Err(error @ CheckpointError::Files(files::CaptureError::Write(_))) => Err(error),
        Err(error) => {
            tracing::info!(error = crate::report::chain(&error), "a tree is not copied ahead");
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

/// What is saved of the container's own file systems in memory, and of volumes.
fn travelling_trees(
    spec: &oci_spec::runtime::Spec,
    mounts: &[u8],
) -> Result<Vec<SavedTree>, CheckpointError> {
    let paths = travelling_mounts(spec, mounts)?.into_iter().enumerate();
    Ok(paths.map(|(number, path)| SavedTree { path, stream: format!("tree-{number}") }).collect())
}

fn store_tree(
    init: i32,
    spec: &oci_spec::runtime::Spec,
    path: &str,
    leased: &LeasedFiles,
    segments: &mut Segments<'_>,
) -> Result<(), CheckpointError> {
    let folder = open_folder_inside(init, path).map_err(io("open a mount of the container"))?;
    let given = privileges::given_nodes(spec, path);
    files::store_tree(folder, &given, leased, segments)?;
    Ok(())
}

/// What is mounted in the container, whatever root its init has by now, as the kernel writes it.
fn mount_text(init: i32) -> Result<Vec<u8>, CheckpointError> {
    mount_namespace::mountinfo(init).map_err(io("read the container's mounts"))
}

fn parse_mounts(text: &[u8]) -> Result<MountInfos, CheckpointError> {
    let what = io("read the container's mounts");
    MountInfos::from_buf_read(text).map_err(io::Error::other).map_err(what)
}

/// Refuses mounts that the specification does not have, and the want of those that it has: the program has made them, or removed
/// them, and a new container would have what the specification says.
fn refuse_own_mounts(
    init: i32,
    spec: &oci_spec::runtime::Spec,
    mounts: &[u8],
) -> Result<(), CheckpointError> {
    let mounts = parse_mounts(mounts)?;
    let root = mount_namespace::root(init).map_err(io("open the container's root"))?;
    // A mount point is where the links on its path lead to.
    let place = |path: &Path| {
        open_below(&root, path, OFlags::PATH)
            .and_then(|folder| fs::read_link(format!("/proc/self/fd/{}", folder.as_raw_fd())))
            .unwrap_or_else(|_| path.to_owned())
    };
    let mut wanted: Vec<(PathBuf, bool)> = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        let place = place(mount.destination());
        // With everything below it, which comes and goes with what is outside.
        let whole = mount.options().iter().flatten().any(|option| {
            matches!(option.as_str(), "rbind" | "rslave" | "rshared" | "slave" | "shared")
        });
        wanted.push((place, whole || mount.typ().as_deref() == Some("cgroup")));
    }
    let present: Vec<&Path> = mounts.0.iter().map(|mount| mount.mount_point.as_path()).collect();
    let count = |path: &Path| present.iter().filter(|present| **present == path).count();
    let lists =
        spec.linux().iter().flat_map(|linux| [linux.masked_paths(), linux.readonly_paths()]);
    let masked: Vec<PathBuf> = lists
        .flatten()
        .flatten()
        .flat_map(|path| [PathBuf::from(path), place(Path::new(path))])
        .collect();
    for mount in &mounts.0 {
        let path = mount.mount_point.as_path();
        let specified = wanted.iter().filter(|(place, _)| place == path).count();
        // The engine's own; what it masks or makes read-only it mounts there.
        let engines = ["/", "/dev/console"].map(Path::new).contains(&path);
        let masked = masked.iter().any(|masked| masked == path);
        let below = wanted.iter().any(|(place, whole)| *whole && path.starts_with(place));
        if !engines && !masked && !below && (specified == 0 || count(path) > specified) {
            return Err(CheckpointError::OwnMount {
                path: path.to_owned(),
                kind: mount.fs_type.clone(),
            });
        }
    }
    match wanted.into_iter().find(|(place, _)| count(place) == 0) {
        Some((path, _)) => Err(CheckpointError::NoMount { path }),
        None => Ok(()),
    }
}

/// The annotation that says which volumes travel: `PATH=include` or `PATH=external`, separated by commas.
pub const VOLUMES_ANNOTATION: &str = "dev.samara.volumes";

/// Mount points whose content travels: file systems in memory that can be written to, and volumes for which it is asked.
fn travelling_mounts(
    spec: &oci_spec::runtime::Spec,
    mounts: &[u8],
) -> Result<Vec<String>, CheckpointError> {
    let wish = spec
        .annotations()
        .as_ref()
        .and_then(|all| all.get(VOLUMES_ANNOTATION))
        .cloned()
        .unwrap_or_default();
    let wish = |path: &str| {
        wish.split(',').rev().find_map(|entry| {
            let (of, policy) = entry.trim().split_once('=')?;
            (of == path).then_some(policy == "include")
        })
    };
    let mounts = parse_mounts(mounts)?;
    let specified: Vec<&Path> =
        spec.mounts().iter().flatten().map(|mount| mount.destination().as_path()).collect();
    let mut paths = Vec::new();
    for mount in mounts.0 {
        let Some(path) = mount.mount_point.to_str() else { continue };
        let masked = path.starts_with("/proc") || path.starts_with("/sys") || path == "/";
        // A mount that the specification does not have hides something (a masked path), or was made by the program.
        let known = specified.contains(&Path::new(path));
        let in_memory = mount.fs_type == "tmpfs"
            && mount.root == "/"
            && !mount.mount_options.contains_key("ro");
        if !masked && known && wish(path).unwrap_or(in_memory) {
            paths.push(path.to_owned());
        }
    }
    paths.sort();
    paths.dedup();
    Ok(paths)
}

/// Volumes that the container may write to and that do not travel.
fn unprotected(spec: &oci_spec::runtime::Spec, travelling: &[String]) -> Vec<String> {
    /// Files that engines mount for each container and write themselves.
    const ENGINES: [&str; 6] = [
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/run/.containerenv",
        "/run/secrets",
        "/dev/",
    ];
    let volumes = spec.mounts().iter().flatten().filter_map(|mount| {
        let path = mount.destination().to_str()?;
        let options = || mount.options().iter().flatten().map(String::as_str);
        let bind = mount.typ().as_deref() == Some("bind")
            || options().any(|option| matches!(option, "bind" | "rbind"));
        let fixed = options().any(|option| option == "ro")
            || ENGINES.iter().any(|engines| path.starts_with(engines))
            || travelling.iter().any(|travels| travels == path);
        (bind && !fixed).then(|| path.to_owned())
    });
    volumes.collect()
}

/// Opens a folder as the container sees it; no link leads out of its root.
pub(crate) fn open_folder_inside(init: i32, path: &str) -> io::Result<OwnedFd> {
    open_below(&mount_namespace::root(init)?, Path::new(path), OFlags::RDONLY | OFlags::DIRECTORY)
}

fn open_below(root: &File, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)?)
}

fn provenance(saved: &Saved, record: &Record) -> Provenance {
    let image = record.annotations.get("org.opencontainers.image.ref.name").cloned();
    let mut workload = std::collections::BTreeMap::from([
        ("id".to_owned(), record.id.clone()),
        ("args".to_owned(), saved.origin.args.join(" ")),
    ]);
    workload.extend(image.map(|image| ("image".to_owned(), image)));
    Provenance { producer: format!("samara {}", env!("CARGO_PKG_VERSION")), workload }
}

fn requirements(base: &Fingerprint, vdso_sha256: &[u8]) -> Requirements {
    Requirements {
        vdso: <[u8; 32]>::try_from(vdso_sha256).ok().map(Digest::from_bytes),
        architecture: std::env::consts::ARCH.to_owned(),
        cpu_features: cpu_features(),
        base_image: match base {
            Fingerprint::None => None,
            Fingerprint::Sha256(_) => Some(base.to_string()),
        },
        ..Requirements::default()
    }
}

/// What `/proc/cpuinfo` says of the processor.
pub(crate) fn cpu_features() -> std::collections::BTreeSet<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
    flags
        .map(|(_, flags)| flags.split_ascii_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

fn io(attempt: &'static str) -> impl FnOnce(io::Error) -> CheckpointError {
    move |source| CheckpointError::Io { attempt, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A user must learn that a volume's content is not what it was at the capsule's instant.
    #[test]
    fn volumes_that_do_not_travel_are_named() {
        let spec = serde_json::from_str(
            r#"{"ociVersion": "1.0.2", "mounts": [
                {"destination": "/data", "type": "bind", "source": "/d", "options": ["rbind", "rw"]},
                {"destination": "/kept", "source": "/k", "options": ["rbind"]},
                {"destination": "/input", "type": "bind", "source": "/i", "options": ["rbind", "ro"]},
                {"destination": "/etc/hosts", "type": "bind", "source": "/h", "options": ["rbind"]},
                {"destination": "/dev/shm", "type": "bind", "source": "/s", "options": ["rbind"]},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}]}"#,
        )
        .unwrap();
        assert_eq!(unprotected(&spec, &["/kept".to_owned()]), ["/data"]);
    }
}
