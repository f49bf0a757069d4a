//! A program changes files in every way there is, at random, while capsule after capsule is made: each has the files as they are at its
//! instant, whatever was read before it and whatever their times say. On a disk, in an overlay, and in memory.
//!
//! `SAMARA_TEST_FILE_INCREMENTS` says how many capsules (40), `SAMARA_TEST_SEED` where to begin (drawn).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use samara_capsule::cbor::encode_record;
use samara_capsule::config::{Provenance, Requirements};
use samara_capsule::transfer::{Sink as _, Source as _, StreamName};
use samara_engine::capture::{CaptureRequest, Captured, capture};
use samara_engine::files::{
    DeviceNodes, FileNotes, GivenNodes, KnownFiles, LeasedFiles, Moment, RootChanges, Segments,
    apply_root, apply_tree, capture_root, capture_tree, store_root, store_tree,
};
use samara_engine::tracking::Tracking;
use samara_store::config::StoreConfig;
use samara_store::writer::CapsuleFacts;
use samara_store::{CapsuleReader, CapsuleWriter, Lease, Location, Store};

/// Capsules of one run of the program.
const CAPSULES: usize = 20;

/// A root with a folder on the disk, an overlay and a file system in memory.
struct Place {
    folder: tempfile::TempDir,
    mounts: Vec<PathBuf>,
}

impl Place {
    fn new(program: &Path) -> Place {
        // Beside the sources, since a temporary folder may lie in memory.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut place = Place { folder, mounts: Vec::new() };
        let path = |name: &str| place.folder.path().join(name);
        for name in ["root/proc", "root/disk", "root/over", "root/memory", "lower", "upper", "work"]
        {
            fs::create_dir_all(path(name)).unwrap();
        }
        for number in 0..4 {
            fs::write(path(&format!("lower/low{number}")), vec![7; 1 << 20]).unwrap();
        }
        fs::copy(program, path("root/mutate")).unwrap();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            path("lower").display(),
            path("upper").display(),
            path("work").display()
        );
        let (over, memory) = (path("root/over"), path("root/memory"));
        for (kind, at, options) in
            [("overlay", over, options.as_str()), ("tmpfs", memory, "size=600m")]
        {
            let mut mount = Command::new("mount");
            let mounted = mount.args(["-t", kind, "-o", options, kind]).arg(&at).status().unwrap();
            assert!(mounted.success());
            place.mounts.push(at);
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn root(&self, name: &str) -> RootChanges {
        RootChanges::locate(&self.path(name), &fs::read("/proc/self/mountinfo").unwrap()).unwrap()
    }

    fn memory(&self) -> std::os::fd::OwnedFd {
        fs::File::open(self.path("root/memory")).unwrap().into()
    }

    /// Passes one of the trees on.
    fn store(&self, tree: &str, segments: &mut Segments<'_>) -> Result<(), String> {
        let leased = LeasedFiles::default();
        let stored = match tree {
            "memory" => store_tree(self.memory(), &GivenNodes::default(), &leased, segments),
            tree => store_root(&self.root(&format!("root/{tree}")), &leased, segments),
        };
        stored.map(drop).map_err(|error| format!("{tree}: {error:?}"))
    }

    /// All that is seen in a tree, as an archive. (A layer of an overlay need not tell what is again as it was.)
    fn seen(&self, tree: &str) -> Vec<u8> {
        let (leased, mut archive) = (LeasedFiles::default(), Vec::new());
        let folder = fs::File::open(self.path(&format!("root/{tree}"))).unwrap();
        capture_tree(folder.into(), &GivenNodes::default(), &leased, &mut archive).unwrap();
        archive
    }

    /// What is stored of a tree, all of it read.
    fn read(&self, tree: &str) -> Vec<u8> {
        let (leased, mut archive) = (LeasedFiles::default(), Vec::new());
        let read = match tree {
            "memory" => capture_tree(self.memory(), &GivenNodes::default(), &leased, &mut archive),
            tree => capture_root(&self.root(&format!("root/{tree}")), &leased, &mut archive),
        };
        read.unwrap();
        archive
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for at in self.mounts.drain(..).rev() {
            let _ = Command::new("umount").arg("-l").arg(at).status();
        }
    }
}

/// The program as init of its own pid namespace, which ends with this value.
struct Program {
    unshare: Child,
    init: i32,
    said: PathBuf,
}

impl Program {
    fn start(place: &Place, seed: u64) -> Program {
        let said = place.path("said");
        let root = place.path("root");
        let unshare = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "unshare", "--pid", "--fork", "--kill-child"])
            .arg("--mount-proc")
            .arg(format!("--root={}", root.display()))
            .args(["--", "/mutate", &seed.to_string(), "/disk", "/over", "/memory"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&said).unwrap())
            .spawn()
            .unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let mut program = Program { unshare, init: 0, said };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !root.join("memory/ready0").exists() {
            assert!(Instant::now() < deadline, "it does not begin: {:?}", program.complaint());
            std::thread::sleep(Duration::from_millis(5));
        }
        program.init = fs::read_to_string(&children).unwrap().trim().parse().unwrap();
        program
    }

    fn complaint(&self) -> Option<String> {
        let said = fs::read_to_string(&self.said).unwrap();
        (!said.is_empty()).then_some(said)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// Makes one capsule after the other.
struct Saving<'a> {
    place: &'a Place,
    program: &'a Program,
    store: Store,
    lease: Lease,
    notes: FileNotes,
    /// Bytes of streams, and bytes that were uploaded.
    raw_bytes: u64,
    uploaded_bytes: u64,
    /// All that was seen in each tree when the newest capsule was made.
    seen: Vec<Vec<u8>>,
}

const TREES: [&str; 3] = ["disk", "over", "memory"];

impl Saving<'_> {
    fn save(&mut self, ahead: bool, commits: bool) -> Result<(), String> {
        // As it comes from the process that keeps it.
        let notes = serde_json::to_vec(&self.notes).unwrap();
        let mut known = KnownFiles::new(&serde_json::from_slice(&notes).unwrap());
        let mut writer = match CapsuleReader::open_latest(&self.store) {
            Ok(latest) => CapsuleWriter::after(latest).unwrap(),
            Err(_) => CapsuleWriter::new(&self.store).unwrap(),
        };
        let init = self.program.init;
        if ahead {
            let (moment, alone) = Moment::of_running(init).unwrap().unwrap();
            for tree in TREES {
                self.place.store(tree, &mut known.ahead(&mut writer, &moment, &alone))?;
            }
            writer.settle().unwrap();
        }
        let request = CaptureRequest { init, ..CaptureRequest::default() };
        let mut tracking = Tracking::default();
        let before = SystemTime::now();
        let captured = capture(&request, &mut tracking, &mut || Ok(()), &mut writer);
        let Captured { frozen, mapped, .. } = captured.map_err(|error| format!("{error:?}"))?;
        let moment = Moment::of_stop(before, mapped);
        for tree in TREES {
            self.place.store(tree, &mut known.into_stream(&mut writer, tree, &moment))?;
        }
        if commits {
            let facts = CapsuleFacts {
                created: SystemTime::now(),
                parent: None,
                provenance: Provenance::default(),
                requirements: Requirements::default(),
                report: None,
            };
            let records = encode_record(&"none").unwrap();
            let committed = writer.commit(&mut self.lease, &records, facts).unwrap();
            self.notes = known.into_notes(&committed.segments);
            self.raw_bytes += committed.raw_bytes;
            self.uploaded_bytes += committed.uploaded_bytes;
            for tree in TREES {
                let (stored, there) = (self.stored(tree), self.place.read(tree));
                if stored != there {
                    return Err(format!("{tree} differs: {}", difference(&stored, &there)));
                }
            }
            self.seen = TREES.map(|tree| self.place.seen(tree)).to_vec();
        }
        frozen.thaw().map_err(|error| error.to_string())
    }

    /// What the newest capsule has of a tree.
    fn stored(&self, tree: &str) -> Vec<u8> {
        let reader = CapsuleReader::open_latest(&self.store).unwrap();
        let mut archive = Vec::new();
        let stream = reader.stream(&StreamName(tree.to_owned())).unwrap();
        stream.unwrap().read_to_end(&mut archive).unwrap();
        archive
    }
}

/// Where two archives part: the entry before that, and the block.
fn difference(one: &[u8], other: &[u8]) -> String {
    let at = one.iter().zip(other).position(|(one, other)| one != other);
    let at = at.unwrap_or(one.len().min(other.len()));
    let blocks = one[..at].chunks(512).enumerate();
    let header = blocks.rev().find(|(_, block)| block.get(257..262) == Some(b"ustar"));
    let name = header.map_or(String::new(), |(number, block)| {
        let name = String::from_utf8_lossy(&block[..100]).trim_end_matches('\0').to_owned();
        format!("{} bytes behind the header of {name}", at - number * 512)
    });
    format!("{} and {} bytes, from {at} on, {name}", one.len(), other.len())
}

fn run(program: &Path, seed: u64, capsules: usize) -> Result<(u64, u64), String> {
    let place = Place::new(program);
    let program = Program::start(&place, seed);
    let location = Location::parse(&format!("file://{}", place.path("capsules").display()));
    let mut config = StoreConfig::default();
    config.file.sync = false;
    let store = Store::open(&location.unwrap(), &config, true).unwrap();
    let lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
    let mut saving = Saving {
        place: &place,
        program: &program,
        store,
        lease,
        notes: FileNotes::default(),
        raw_bytes: 0,
        uploaded_bytes: 0,
        seen: Vec::new(),
    };
    for number in 0..capsules {
        let pause = seed.wrapping_mul(31).wrapping_add(number as u64 * 7919) % 200;
        std::thread::sleep(Duration::from_millis(pause));
        let (ahead, commits) = (number % 4 != 3, number % 7 != 5);
        let saved = saving.save(ahead, commits);
        saved.map_err(|error| format!("seed {seed}, capsule {number}: {error}"))?;
        if let Some(complaint) = program.complaint() {
            return Err(format!("seed {seed}: a call failed: {complaint}"));
        }
    }
    let (raw_bytes, uploaded_bytes) = (saving.raw_bytes, saving.uploaded_bytes);
    let stored = TREES.map(|tree| saving.stored(tree));
    let seen = saving.seen;
    let init = program.init;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(init).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    // All of it comes back, onto what has changed since.
    drop(program);
    for ((tree, stored), seen) in TREES.iter().zip(&stored).zip(&seen) {
        let devices = DeviceNodes::Any;
        match *tree {
            "memory" => {
                apply_tree(place.memory(), &devices, &GivenNodes::default(), &mut &stored[..])
            }
            tree => apply_root(&place.root(&format!("root/{tree}")), &devices, &mut &stored[..]),
        }
        .map_err(|error| format!("seed {seed}, {tree} can't be applied: {error:?}"))?;
        let there = place.seen(tree);
        if *seen != there {
            let difference = difference(seen, &there);
            return Err(format!("seed {seed}, {tree} comes back as another: {difference}"));
        }
    }
    Ok((raw_bytes, uploaded_bytes))
}

/// Without this, a file would come back with bytes that it never had, or had at another time.
#[test]
fn every_capsule_has_the_files_of_its_instant() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("mutate");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/file_increments/mutate.c");
    let compiled = Command::new("gcc")
        .args(["-O1", "-static", "-pthread", "-o"])
        .args([&program, &source])
        .status()
        .unwrap();
    assert!(compiled.success());
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let capsules = number("SAMARA_TEST_FILE_INCREMENTS").unwrap_or(40);
    let drawn = u64::from(SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos() % 1_000_000);
    let first = number("SAMARA_TEST_SEED").unwrap_or(drawn);
    let (mut raw, mut uploaded) = (0, 0);
    for seed in first..first + capsules.div_ceil(CAPSULES as u64) {
        match run(&program, seed, CAPSULES) {
            Ok((raw_bytes, uploaded_bytes)) => {
                raw += raw_bytes;
                uploaded += uploaded_bytes;
            }
            Err(error) => panic!("{error}"),
        }
    }
    eprintln!("{} MiB in streams, {} MiB uploaded", raw >> 20, uploaded >> 20);
    assert!(uploaded < raw / 2, "{uploaded} of {raw} bytes were uploaded");
}
