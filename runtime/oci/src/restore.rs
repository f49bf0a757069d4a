//! Bringing a container back: `restore`, and a start at an address where a capsule is.
//!
//! Both go the same way: `Incoming::open` reads the capsule and prepares the root, `create` makes the container with a blank
//! init, and [`finish`] fills it once it has been started. Between `create` and `start` the capsule that was chosen stands in the
//! container's folder.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::Spec;
use samara_capsule::cbor::{DecodeError, decode_record};
use samara_capsule::digest::Digest;
use samara_capsule::log::LogState;
use samara_capsule::record::{Master, Terminal};
use samara_capsule::transfer::{Source, StreamName};
use samara_engine::clocks::offsets_to_continue;
use samara_engine::files::{self, ApplyError, FingerprintError, LocateError, RootChanges};
use samara_engine::host::{check_records, vdso_sha256};
use samara_engine::labels;
use samara_engine::phase::{self, Phase};
use samara_engine::restore::{RestoreError as EngineError, RestoreRequest, restore};
use samara_engine::{Confinement as EngineConfinement, SeccompPolicy};
use samara_store::config::ConfigError;
use samara_store::location::Location;
use samara_store::log::LogError;
use samara_store::reader::ReadError;
use samara_store::store::StoreError;
use samara_store::{CapsuleReader, Kept, Store};
use serde::{Deserialize, Serialize};

use crate::address::{AddressError, Node, RestorePolicy};
use crate::bundle::{Bundle, BundleError};
use crate::capture::{CheckpointError, FINGERPRINT_CACHE, Held, cpu_features, open_folder_inside};
use crate::confine::ConfineError;
use crate::container_id::ContainerId;
use crate::create::{ClockOffset, TimeOffsets};
use crate::ending::{self, EndingError};
use crate::lineage::Lineage;
use crate::monitor::{Client, MonitorError};
use crate::periodic::PeriodicError;
use crate::preflight::{self, Host, Needs};
use crate::privileges;
use crate::saved::{Differs, Origin, ROOT_STREAM, Saved};
use crate::seccomp::{Program, SeccompError};
use crate::state_dir::{StateDir, StateError};

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error(transparent)]
    Periodic(#[from] PeriodicError),
    #[error(transparent)]
    Target(#[from] Box<CheckpointError>),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Ending(#[from] EndingError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{}", no_capsule(address, *by_hand, *finished))]
    None { address: String, by_hand: bool, finished: bool },
    #[error(
        "the capsule at {address} failed twice after it was resumed, and is not tried a third time; remove it with `samara capsule rm {address}` to begin anew, or try it by hand with `samara-runtime restore --capsule {address}`"
    )]
    FailedTwice { address: String },
    #[error(
        "the capsule at {address} can't be read whole: see what is missing with `samara capsule verify {address}`, and begin anew with `samara capsule rm {address}`"
    )]
    Damaged { address: String, source: ReadError },
    #[error("cannot read the capsule's records")]
    Records(#[from] DecodeError),
    #[error(transparent)]
    Differs(#[from] Differs),
    #[error("the capsule at {address} does not fit this host: {}", reasons.join("; "))]
    Incompatible { address: String, reasons: Vec<String> },
    #[error(transparent)]
    Locate(#[from] LocateError),
    #[error(transparent)]
    Fingerprint(#[from] FingerprintError),
    #[error("cannot bring back the container's files")]
    Apply(#[from] ApplyError),
    #[error("the capsule has no stream {0}, which its records name")]
    NoStream(String),
    #[error(transparent)]
    Confine(#[from] ConfineError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error("cannot bring the container back")]
    Engine(#[from] EngineError),
    #[error("the container's blank init does not answer")]
    NoInit,
    #[error("cannot {attempt}")]
    Io { attempt: &'static str, source: io::Error },
}

impl RestoreError {
    /// Whether it is the capsule, or what it asks of this host and container, that stands against a restore; and not a store, a
    /// configuration or this host's state.
    pub fn is_refused(&self) -> bool {
        match self {
            RestoreError::None { .. }
            | RestoreError::Damaged { .. }
            | RestoreError::FailedTwice { .. }
            | RestoreError::Differs(_)
            | RestoreError::Incompatible { .. } => true,
            RestoreError::State(_)
            | RestoreError::Address(_)
            | RestoreError::Periodic(_)
            | RestoreError::Target(_)
            | RestoreError::Bundle(_)
            | RestoreError::Config(_)
            | RestoreError::Store(_)
            | RestoreError::Log(_)
            | RestoreError::Ending(_)
            | RestoreError::Locate(_)
            | RestoreError::Fingerprint(_)
            | RestoreError::Confine(_)
            | RestoreError::Seccomp(_)
            | RestoreError::NoInit
            | RestoreError::Io { .. } => false,
            RestoreError::Apply(ApplyError::Device { .. }) => true,
            RestoreError::Read(_)
            | RestoreError::Records(_)
            | RestoreError::Apply(_)
            | RestoreError::NoStream(_)
            | RestoreError::Engine(_) => self.is_capsules_fault(),
        }
    }

    /// Whether another attempt with the same capsule would fail as well, wherever it were made.
    fn is_capsules_fault(&self) -> bool {
        match self {
            RestoreError::Read(error) => error.is_damage(),
            RestoreError::Damaged { .. } | RestoreError::Records(_) | RestoreError::NoStream(_) => {
                true
            }
            RestoreError::Apply(error) => matches!(error, ApplyError::Corrupt { .. }),
            // A store that was away while memory was filled is no fault of the capsule's.
            RestoreError::Engine(EngineError::Fill { source }) => source
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<ReadError>())
                .is_some_and(ReadError::is_damage),
            // A host that does not fit is found before; the rest is between the capsule and our program.
            RestoreError::Engine(error) => !matches!(error, EngineError::Incompatible(_)),
            _ => false,
        }
    }
}

/// A capsule that a container will continue from. Its root has been prepared.
#[derive(Debug)]
pub struct Incoming {
    pub offsets: TimeOffsets,
    pub seccomp_filters: u32,
    held: Held,
    manifest: Digest,
    kept: Kept,
}

/// Where a container starts, and how.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) location: Location,
    pub(crate) policy: RestorePolicy,
    pub(crate) node: Node,
    /// Whether the container's own specification names the address.
    pub(crate) carried: bool,
    /// Whether somebody wants just this capsule, however often it has failed.
    pub(crate) by_hand: bool,
}

/// What stands in the container's folder between `create` and `start`.
#[derive(Debug, Serialize, Deserialize)]
struct Waiting {
    manifest: Digest,
}

impl Start {
    fn none(&self, finished: bool) -> RestoreError {
        let address = self.location.to_string();
        RestoreError::None { address, by_hand: self.by_hand, finished }
    }
}

/// A capsule that is whole and that nothing stands against. Nothing has been made yet.
struct Chosen {
    manifest: Digest,
    reader: CapsuleReader,
    saved: Saved,
    root: RootChanges,
}

impl Chosen {
    /// The capsule that a start continues from; none if it begins anew.
    fn of(
        start: &Start,
        store: &Store,
        state: &LogState,
        bundle: &Bundle,
    ) -> Result<Option<Chosen>, RestoreError> {
        /// A capsule that failed this often is not tried again.
        const FAILED_RESUMES_MAX: u32 = 2;
        let latest = match (start.policy, state.latest) {
            (RestorePolicy::Never, _) | (RestorePolicy::Auto, None) => return Ok(None),
            (RestorePolicy::Require, None) => return Err(start.none(state.generation > 0)),
            (RestorePolicy::Auto | RestorePolicy::Require, Some(latest)) => latest,
        };
        let address = start.location.to_string();
        if state.failed_resumes >= FAILED_RESUMES_MAX && !start.by_hand {
            return Err(RestoreError::FailedTwice { address });
        }
        let mut reader = CapsuleReader::open(store, &latest).map_err(unreadable(&address))?;
        let saved: Saved = decode_record(&reader.records().map_err(unreadable(&address))?)?;
        saved.origin.continues_as(&Origin::of(&bundle.spec, 0))?;
        let mountinfo = fs::read("/proc/self/mountinfo").map_err(io("read the mounts"))?;
        let root = RootChanges::locate(&bundle.rootfs, &mountinfo)?;
        check_host(&reader, &address, &root, bundle, &saved)?;
        check_records(&saved.container)?;
        // Last, since it takes as long as reading the whole capsule does.
        reader.check().map_err(unreadable(&address))?;
        Ok(Some(Chosen { manifest: latest.digest, reader, saved, root }))
    }
}

impl Incoming {
    /// Looks for a capsule to continue from and for what stands against it, takes the next epoch of the address, and makes the
    /// container's root as it was saved.
    ///
    /// No incoming capsule: there is none, or it is not wanted; the container begins anew, and `dir` will hold the lease.
    ///
    /// # Errors
    /// Nothing has been made; the root may have to be discarded.
    pub(crate) fn open(
        start: &Start,
        id: &ContainerId,
        bundle: &Bundle,
    ) -> Result<(Held, Option<Incoming>), RestoreError> {
        // Nothing is left at a place where a capsule was only looked for.
        let required = start.policy == RestorePolicy::Require;
        let store = match Store::open(&start.location, &start.node.config.store, !required) {
            Err(StoreError::NotFound { .. }) if required => return Err(start.none(false)),
            other => other?,
        };
        // Who is refused takes no epoch: that would end the copy that runs.
        let head = store.head()?.state;
        let mut chosen = Chosen::of(start, &store, &head, bundle)?;
        let started = store.take_epoch(&facts(id, &bundle.spec))?;
        let state = started.lease.state();
        if (state.latest, state.failed_resumes) != (head.latest, head.failed_resumes) {
            // Somebody wrote in between; nobody can any more.
            chosen = Chosen::of(start, &store, state, bundle)?;
        }
        // Who reads it later has another working directory.
        let config = std::env::var_os(crate::address::CONFIG_VARIABLE).map(std::path::absolute);
        let config = config.transpose().map_err(io("find the node's configuration"))?;
        let mut held = Held {
            address: start.location.to_string(),
            config,
            lease: started.lease,
            carried: start.carried,
            resumed: None,
        };
        let Some(Chosen { manifest, reader, saved, root }) = chosen else {
            return Ok((held, None));
        };
        phase::reached(Phase::Opened);
        if saved.root {
            let name = StreamName(ROOT_STREAM.to_owned());
            let mut stream = reader
                .stream(&name)
                .map_err(io("read the container's files"))?
                .ok_or_else(|| RestoreError::NoStream(ROOT_STREAM.to_owned()))?;
            files::apply_root(&root, &privileges::device_nodes(&bundle.spec)?, &mut stream)?;
        }
        phase::reached(Phase::RootMade);
        let offsets =
            offsets_to_continue(&saved.container.clocks).map_err(io("read the clocks"))?;
        let offset = |ns: i64| ClockOffset {
            seconds: ns.div_euclid(1_000_000_000),
            nanoseconds: u32::try_from(ns.rem_euclid(1_000_000_000)).expect("less than a second"),
        };
        held.resumed = Some(manifest);
        let incoming = Incoming {
            offsets: TimeOffsets {
                monotonic: offset(offsets.monotonic_ns),
                boottime: offset(offsets.boottime_ns),
            },
            seccomp_filters: u32::from(bundle.linux()?.seccomp().is_some()),
            held: held.clone(),
            manifest,
            kept: reader.kept(),
        };
        Ok((held, Some(incoming)))
    }

    /// What was read of the capsule and need not be read again.
    pub(crate) fn kept(&self) -> Kept {
        self.kept.clone()
    }

    /// Notes in the container's folder what it will be filled with.
    pub(crate) fn keep(&self, dir: &StateDir) -> Result<(), RestoreError> {
        let waiting = serde_json::to_vec(&Waiting { manifest: self.manifest })
            .map_err(|error| io("note the capsule")(error.into()))?;
        fs::write(Waiting::path(dir), waiting).map_err(io("note the capsule"))?;
        self.held.save(dir).map_err(io("keep the lease"))
    }
}

impl Waiting {
    fn path(dir: &StateDir) -> PathBuf {
        dir.path().join("capsule.json")
    }
}

/// Who starts, for whoever reads the log of an address.
pub(crate) fn facts(id: &ContainerId, spec: &Spec) -> BTreeMap<String, String> {
    /// Where podman, CRI-O, containerd's CRI and nerdctl keep the name that their user knows; docker keeps it to itself.
    const NAMES: [&str; 4] = [
        "io.podman.annotations.container.name",
        "io.kubernetes.cri-o.ContainerName",
        "io.kubernetes.cri.container-name",
        "nerdctl/name",
    ];
    let annotations = spec.annotations().as_ref();
    let name = NAMES.iter().find_map(|key| annotations?.get(*key)).cloned();
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut facts =
        BTreeMap::from([("container".to_owned(), id.to_string()), ("host".to_owned(), host)]);
    facts.extend(name.map(|name| ("name".to_owned(), name)));
    facts
}

/// All that the capsule requires of this host and of the new container and does not find. Nothing has been made yet.
fn check_host(
    reader: &CapsuleReader,
    address: &str,
    root: &RootChanges,
    bundle: &Bundle,
    saved: &Saved,
) -> Result<(), RestoreError> {
    let spec = &bundle.spec;
    let wanted = &reader.config().requirements;
    let mut reasons = Vec::new();
    if wanted.architecture != std::env::consts::ARCH {
        reasons.push(format!(
            "it was saved on {}, and this is {}: restore it on a machine of that architecture",
            wanted.architecture,
            std::env::consts::ARCH
        ));
    } else {
        let here = cpu_features();
        let missing: Vec<&str> =
            wanted.cpu_features.difference(&here).map(String::as_str).collect();
        if !missing.is_empty() {
            reasons.push(format!(
                "this processor lacks {}: choose one that has them",
                missing.join(", ")
            ));
        }
        // Of another architecture it would differ, and say nothing.
        if let Some(vdso) = wanted.vdso
            && Digest::from_bytes(vdso_sha256().map_err(io("read the vdso"))?) != vdso
        {
            reasons.push(
                "it was saved under another kernel, and its programs hold addresses in the vdso of that one: restore it on a \
                 host with the same kernel"
                    .to_owned(),
            );
        }
    }
    let base = files::base_fingerprint(root, Path::new(FINGERPRINT_CACHE))?;
    let base = match &base {
        files::Fingerprint::None => None,
        files::Fingerprint::Sha256(_) => Some(base.to_string()),
    };
    if base != wanted.base_image {
        reasons.push(
            "its image is another one: start it with the image that the container was saved from"
                .to_owned(),
        );
    }
    for name in &wanted.kernel_features {
        reasons.push(format!(
            "it requires the kernel feature {name}, which this version does not know: use a newer samara"
        ));
    }
    let host = Host::of(&bundle.rootfs).map_err(io("look at what this host has"))?;
    let needs = Needs::of(saved, &reader.config().statistics);
    reasons.extend(preflight::shortages(spec, &needs, &host));
    let has_terminal = spec.process().as_ref().and_then(|process| process.terminal()) == Some(true);
    let had_terminal = |terminal: &Terminal| terminal.master == Master::Outside;
    if !has_terminal && saved.container.terminals.iter().any(had_terminal) {
        reasons.push("it was saved with a terminal: start it with one (docker: -t)".to_owned());
    }
    if let Some(process) = spec.process() {
        reasons.extend(privileges::beyond(process, &saved.container)?);
        reasons.extend(privileges::raw_sockets(process, &saved.container)?);
        let own = labels::own().map_err(io("read the own security label"))?;
        reasons.extend(privileges::other_labels(process, &saved.container, own.as_deref()));
    }
    for (name, value) in &wanted.other {
        reasons.push(format!(
            "it requires {name} = {value}, which this version does not know: use a newer samara"
        ));
    }
    if reasons.is_empty() {
        Ok(())
    } else {
        Err(RestoreError::Incompatible { address: address.to_owned(), reasons })
    }
}

/// How long the blank init may take from `start` until it waits: it has some mounts to finish.
const BLANK_MAX: Duration = Duration::from_secs(20);

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    pub processes: usize,
    pub threads: usize,
    /// Bytes before compression, and as they are stored.
    pub raw_bytes: u64,
    pub stored_bytes: u64,
}

impl Restored {
    /// One line for a person.
    pub fn line(&self, address: &str, took: Duration) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1u32 << 20);
        let seconds = took.as_secs_f64();
        let (raw, stored) = (mib(self.raw_bytes), mib(self.stored_bytes));
        format!(
            "restored from {address}: {} processes, {} threads, {raw:.1} MiB from {stored:.1} MiB ({:.1}x), {seconds:.1} s, {:.0} MiB/s",
            self.processes,
            self.threads,
            raw / stored.max(f64::EPSILON),
            raw / seconds.max(0.001),
        )
    }
}

/// Whether a container is to be filled, and is not yet.
pub(crate) fn is_restoring(dir: &StateDir) -> bool {
    Waiting::path(dir).exists()
}

/// Fills a container whose blank init has been started, if it waits for a capsule. `None`: it does not. What is in `kept` is not
/// read again.
///
/// # Errors
/// The container has been killed; its folder is still there.
pub fn finish(dir: &StateDir, kept: Kept) -> Result<Option<Restored>, RestoreError> {
    let path = Waiting::path(dir);
    let waiting = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(RestoreError::Io { attempt: "read the capsule's note", source }),
    };
    let waiting: Waiting = serde_json::from_slice(&waiting)
        .map_err(|error| io("read the capsule's note")(error.into()))?;
    let record = dir.load()?;
    ending::ask_while_restoring(dir);
    let filled = fill(dir, &waiting, kept);
    if let Err(error) = &filled {
        // A container that is not what was saved must not run. Its end says nothing of its program.
        ending::ask(dir, "a restore that failed");
        let _ = record.init.signal(crate::signal_name::SignalNumber::KILL);
        if error.is_capsules_fault()
            && let Some(held) = Held::load(dir)
            && let Ok(Some(note)) =
                ending::note_failed_restore(dir, &held, &crate::report::chain(error))
        {
            // What is not told now, the next start at the address tells.
            let _ = ending::tell(&note);
        }
    }
    let restored = filled?;
    fs::remove_file(path).map_err(io("remove the capsule's note"))?;
    Ok(Some(restored))
}

fn fill(dir: &StateDir, waiting: &Waiting, kept: Kept) -> Result<Restored, RestoreError> {
    let record = dir.load()?;
    let spec = Bundle::reload(&dir.config())?;
    let held = Held::load(dir).ok_or(RestoreError::State(StateError::Missing))?;
    let node = match &held.config {
        Some(path) => Node::load_from(path)?,
        None => Node::load()?,
    };
    let location =
        Location::parse(&held.address).map_err(|error| Box::new(CheckpointError::from(error)))?;
    let store = Store::open(&location, &node.config.store, false)?;
    let reader = CapsuleReader::open_digest(&store, waiting.manifest)
        .map_err(unreadable(&held.address))?
        .with_kept(kept);
    let saved: Saved = decode_record(&reader.records().map_err(unreadable(&held.address))?)?;
    let init = record.init.pid;
    wait_for_blank(init)?;
    for tree in &saved.trees {
        let mut stream = reader
            .stream(&StreamName(tree.stream.clone()))
            .map_err(io("read the container's files"))?
            .ok_or_else(|| RestoreError::NoStream(tree.stream.clone()))?;
        let folder =
            open_folder_inside(init, &tree.path).map_err(io("open a mount of the container"))?;
        let given = privileges::given_nodes(&spec, &tree.path);
        files::apply_tree(folder, &privileges::device_nodes(&spec)?, &given, &mut stream)?;
    }
    let confinement = confinement(&spec, &saved.origin)?;
    let request = RestoreRequest { init, container: &saved.container, confinement };
    let report = restore(&request, &reader, &mut || ending::is_restored(dir))?;
    let lineage = Lineage::of_restored(&held.address, waiting.manifest, report.tracking);
    if let Err(error) = leave(dir, lineage) {
        tracing::warn!(error = crate::report::chain(&error), "the next capsule will be a full one");
    }
    let statistics = &reader.config().statistics;
    Ok(Restored {
        processes: report.processes,
        threads: report.threads,
        raw_bytes: statistics.raw_bytes,
        stored_bytes: statistics.stored_bytes,
    })
}

/// Leaves what the next capture needs with the container's monitor.
fn leave(dir: &StateDir, lineage: Lineage) -> Result<(), MonitorError> {
    let io = |source| MonitorError::Io { attempt: "note what is tracked", source };
    let fds = lineage.into_descriptors().map_err(io)?;
    match fds.is_empty() {
        true => Ok(()),
        false => Client::connect(dir)?.keep(&fds),
    }
}

/// Waits until the blank init does nothing but wait.
fn wait_for_blank(init: i32) -> Result<(), RestoreError> {
    /// `pause`, as `/proc/PID/syscall` shows it.
    const PAUSE: &str = "34 ";
    let deadline = Instant::now() + BLANK_MAX;
    while Instant::now() < deadline {
        match fs::read_to_string(format!("/proc/{init}/syscall")) {
            Ok(call) if call.starts_with(PAUSE) => return Ok(()),
            Ok(_) => std::thread::sleep(Duration::from_micros(200)),
            Err(_) => break,
        }
    }
    Err(RestoreError::NoInit)
}

/// What the new container's specification allows.
fn confinement(spec: &Spec, saved: &Origin) -> Result<EngineConfinement, RestoreError> {
    let process = spec.process().as_ref();
    let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    // Never the capsule's word for it: the filter that this specification demands takes the place of the old one's, and is the
    // same to the byte where the profile is.
    let program = match profile {
        None => Vec::new(),
        Some(profile) => Program::compile(profile)?
            .instructions()
            .iter()
            .flat_map(|instruction| instruction.to_bytes())
            .collect(),
    };
    let seccomp = SeccompPolicy { drop: saved.seccomp_filters as usize, program };
    Ok(EngineConfinement {
        bounding: match process {
            Some(process) => crate::confine::capability_sets(process)?.bounding.bits(),
            None => 0,
        },
        no_new_privileges: process.and_then(|process| process.no_new_privileges()).unwrap_or(false),
        seccomp,
        app_armor_profile: process
            .and_then(|process| process.apparmor_profile().clone())
            .unwrap_or_default(),
    })
}

fn no_capsule(address: &str, by_hand: bool, finished: bool) -> String {
    let why = match finished {
        true => ", since its job has ended with success",
        false => "",
    };
    match by_hand {
        true => {
            format!(
                "there is no capsule at {address}{why}: check the address, `samara capsule ls` lists what is there"
            )
        }
        false => {
            format!(
                "there is no capsule at {address}{why}, and dev.samara.restore requires one: `auto` begins anew"
            )
        }
    }
}

/// Says what to do about a capsule that is not whole; a newer format speaks for itself.
fn unreadable(address: &str) -> impl FnOnce(ReadError) -> RestoreError {
    move |error| {
        let newer = matches!(
            error,
            ReadError::Config { source: samara_capsule::config::ConfigError::Version { .. }, .. }
        );
        match error.is_damage() && !newer {
            true => RestoreError::Damaged { address: address.to_owned(), source: error },
            false => error.into(),
        }
    }
}

fn io(attempt: &'static str) -> impl FnOnce(io::Error) -> RestoreError {
    move |source| RestoreError::Io { attempt, source }
}
