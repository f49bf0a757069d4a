//! What is known of files, and what only seems to be: on a disk, in memory, and in an overlay. Needs root.
//!
//! What would be lost if these failed: a capsule would have bytes of another time, or all of an unchanged file would be read again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use samara_capsule::manifest::BlobRef;
use samara_capsule::transfer::{
    BaseId, PageBatch, PageRun, SegmentId, Sink, SpaceId, StoredSegment, StreamName,
};
use samara_engine::files::{
    FileNotes, KnownFiles, LayerReport, LeasedFiles, MappedFiles, Moment, RootChanges,
    capture_root, store_root,
};

/// Keeps segments, and whatever was placed in the one stream.
#[derive(Default)]
struct Segments {
    taken: Vec<Vec<u8>>,
    /// What the capsule before has.
    before: HashMap<BlobRef, Vec<u8>>,
    passed_bytes: usize,
    stream: Vec<u8>,
}

impl Segments {
    /// After a commit.
    fn stored(&self) -> HashMap<SegmentId, StoredSegment> {
        let numbered = self.taken.iter().enumerate();
        let stored = numbered.map(|(number, bytes)| {
            let stored = StoredSegment { blob: BlobRef::to(bytes), raw_bytes: bytes.len() as u64 };
            (SegmentId(u32::try_from(number).unwrap()), stored)
        });
        stored.collect()
    }
}

impl Sink for Segments {
    fn buffer(&mut self) -> Vec<u8> {
        Vec::new()
    }

    fn pages(&mut self, _: PageBatch) -> io::Result<()> {
        unreachable!("files only")
    }

    fn exact_pages(&mut self, _: PageBatch) -> io::Result<()> {
        unreachable!("files only")
    }

    fn base(&mut self, _: Option<SpaceId>) -> io::Result<BaseId> {
        unreachable!("files only")
    }

    fn draft(&mut self, _: BaseId, _: bool, _: Vec<PageRun>, _: Vec<u8>) -> io::Result<()> {
        unreachable!("files only")
    }

    fn unchanged(&mut self, _: &Arc<[SpaceId]>, _: BaseId, _: PageRun, _: bool) -> io::Result<()> {
        unreachable!("files only")
    }

    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn append(&mut self, _: &StreamName, _: &[u8]) -> io::Result<()> {
        unreachable!("files come in segments")
    }

    fn segment(&mut self, parts: Vec<Vec<u8>>) -> io::Result<SegmentId> {
        let bytes = parts.concat();
        self.passed_bytes += bytes.len();
        self.taken.push(bytes);
        Ok(SegmentId(u32::try_from(self.taken.len() - 1).unwrap()))
    }

    fn stored_segment(&mut self, stored: &StoredSegment) -> io::Result<Option<SegmentId>> {
        let Some(bytes) = self.before.get(&stored.blob) else { return Ok(None) };
        assert_eq!(stored.raw_bytes, bytes.len() as u64);
        self.taken.push(bytes.clone());
        Ok(Some(SegmentId(u32::try_from(self.taken.len() - 1).unwrap())))
    }

    fn place(&mut self, _: &StreamName, segment: SegmentId) -> io::Result<()> {
        self.stream.extend_from_slice(&self.taken[segment.0 as usize]);
        Ok(())
    }
}

/// Makes one capsule after the other of a root.
struct Saving {
    root: PathBuf,
    notes: FileNotes,
    before: HashMap<BlobRef, Vec<u8>>,
}

/// What a capsule took: bytes of content that were read while all stood, and bytes that had to be stored.
struct Took {
    stream: Vec<u8>,
    read: u64,
    passed: usize,
}

impl Saving {
    fn new(root: &Path) -> Saving {
        Saving { root: root.to_owned(), notes: FileNotes::default(), before: HashMap::new() }
    }

    fn root(&self) -> RootChanges {
        RootChanges::locate(&self.root, &fs::read("/proc/self/mountinfo").unwrap()).unwrap()
    }

    /// As of a stop at `at`; what is mapped then is found by looking at the processes of `program`.
    fn save_at(&mut self, at: SystemTime, mapped: MappedFiles, ahead: Option<&dyn Fn()>) -> Took {
        let notes = serde_json::to_string(&self.notes).unwrap();
        let mut known = KnownFiles::new(&serde_json::from_str(&notes).unwrap());
        let mut sink = Segments { before: std::mem::take(&mut self.before), ..Segments::default() };
        let none = LeasedFiles::default();
        if let Some(then) = ahead {
            let (moment, alone) = Moment::of_running(own()).unwrap().unwrap();
            store_root(&self.root(), &none, &mut known.ahead(&mut sink, &moment, &alone)).unwrap();
            then();
        }
        sink.passed_bytes = 0;
        let moment = Moment::of_stop(at, mapped);
        let mut segments = known.into_stream(&mut sink, "root", &moment);
        let LayerReport { content_bytes, stream_bytes, .. } =
            store_root(&self.root(), &none, &mut segments).unwrap();
        assert_eq!(stream_bytes, sink.stream.len() as u64);
        self.notes = known.into_notes(&sink.stored());
        self.before = sink.taken.iter().map(|bytes| (BlobRef::to(bytes), bytes.clone())).collect();
        Took { stream: sink.stream, read: content_bytes, passed: sink.passed_bytes }
    }

    /// As of a stop so late that all times prove something.
    fn save(&mut self) -> Took {
        self.save_at(SystemTime::now() + Duration::from_secs(1), MappedFiles::default(), None)
    }

    fn all(&self) -> Vec<u8> {
        let mut archive = Vec::new();
        capture_root(&self.root(), &LeasedFiles::default(), &mut archive).unwrap();
        archive
    }

    #[track_caller]
    fn check(&self, took: &Took) {
        assert!(took.stream == self.all(), "not what is there");
    }
}

/// This process, in whose pid namespace processes are looked at.
fn own() -> i32 {
    i32::try_from(std::process::id()).unwrap()
}

/// A folder on a disk.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Content without repetitions.
fn content(seed: u64, bytes: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| rng.u8(..)).take(bytes).collect()
}

/// A program that maps a file, and stores to it when it is told to.
struct Mapper {
    program: Child,
    told: ChildStdin,
    answers: BufReader<ChildStdout>,
}

const MAPPER: &str = r#"
import mmap, sys
mapped = None
for line in sys.stdin:
    what, *words = line.split()
    if what == "map":
        with open(words[0], "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        seen = sum(mapped[at] for at in range(0, len(mapped), 4096))
    elif what == "store":
        mapped[int(words[0])] = int(words[1])
    elif what == "unmap":
        mapped.close()
    print("done", flush=True)
"#;

impl Mapper {
    fn new() -> Mapper {
        let mut program = Command::new("python3")
            .args(["-c", MAPPER])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let told = program.stdin.take().unwrap();
        let answers = BufReader::new(program.stdout.take().unwrap());
        Mapper { program, told, answers }
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.told, "{what}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        assert_eq!(answer, "done\n");
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

fn changed(path: &Path) -> (i64, i64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.ctime(), metadata.ctime_nsec())
}

/// Without this, an unchanged file would be read in each pause, or stored with each capsule.
#[test]
fn what_has_not_changed_is_not_read() {
    let folder = folder();
    let file = folder.path().join("large");
    fs::write(&file, content(1, 30 << 20)).unwrap();
    for number in 0..500 {
        fs::write(folder.path().join(format!("small{number}")), content(number, 5000)).unwrap();
    }
    let mut saving = Saving::new(folder.path());
    let took = saving.save();
    saving.check(&took);
    assert_eq!(took.read, (30 << 20) + 500 * 5000);
    let took = saving.save();
    saving.check(&took);
    assert_eq!((took.read, took.passed), (0, 0));

    // In one place.
    File::options().write(true).open(&file).unwrap().write_all_at(b"x", 13 << 20).unwrap();
    let took = saving.save();
    saving.check(&took);
    assert!((4 << 20..7 << 20).contains(&took.passed), "{} bytes", took.passed);
    // At its end.
    let end = fs::metadata(&file).unwrap().len();
    File::options().write(true).open(&file).unwrap().write_all_at(b"a line", end).unwrap();
    let took = saving.save();
    saving.check(&took);
    assert!(took.passed < 5 << 20, "{} bytes", took.passed);
    // A name more, and one less.
    fs::hard_link(&file, folder.path().join("another")).unwrap();
    fs::remove_file(folder.path().join("small77")).unwrap();
    let took = saving.save();
    saving.check(&took);
    assert!(took.passed < 8 << 20, "{} bytes", took.passed);
    let took = saving.save();
    assert_eq!((took.read, took.passed), (0, 0));
}

/// Without this, all that is new would be compressed in the pause; or a file that has changed since would come as it was before.
#[test]
fn what_was_stored_ahead_is_what_counts_if_it_stays() {
    let folder = folder();
    for name in ["stays", "changes", "goes", "grows"] {
        fs::write(folder.path().join(name), content(1, 9 << 20)).unwrap();
    }
    fs::write(folder.path().join("small"), "one").unwrap();
    let mut saving = Saving::new(folder.path());
    std::thread::sleep(Duration::from_millis(100));
    let then = || {
        let path = |name: &str| folder.path().join(name);
        let open = |name: &str| File::options().write(true).open(path(name)).unwrap();
        open("changes").write_all_at(b"another byte", 5 << 20).unwrap();
        open("grows").write_all_at(b"more", 9 << 20).unwrap();
        fs::remove_file(path("goes")).unwrap();
        fs::write(path("new"), content(2, 3 << 20)).unwrap();
        fs::write(path("small"), "two").unwrap();
        fs::rename(path("new"), path("took its place")).unwrap();
    };
    let took = saving.save_at(SystemTime::now(), MappedFiles::default(), Some(&then));
    saving.check(&took);
    // What changed is read to its end, and a piece of it is stored.
    assert_eq!(took.read >> 20, 9 + 9 + 3);
    assert!(took.passed < 10 << 20, "{} bytes", took.passed);
}

/// When something is stored to a mapped file, and how that is kept from being overlooked.
#[derive(Clone, Copy, Debug)]
enum Store {
    /// After a capsule that did not know that the file was mapped.
    Naive,
    /// After a capsule.
    Later,
    /// After the file was stored ahead, and before the stop; then it is not mapped any more.
    Meanwhile,
}

/// Stores to a mapped file. None if its times tell of that, as they do when the kernel has written it to the disk meanwhile; else
/// whether the next capsule has what is there.
fn store_to_mapped(store: Store) -> Option<bool> {
    let folder = folder();
    let file = folder.path().join("mapped");
    fs::write(&file, content(1, 5 << 20)).unwrap();
    let mapper = std::cell::RefCell::new(Mapper::new());
    mapper.borrow_mut().tell(&format!("map {}", file.display()));
    mapper.borrow_mut().tell("store 5000 1");
    let before = changed(&file);
    let late = SystemTime::now() + Duration::from_secs(1);
    let mut saving = Saving::new(folder.path());
    let store_and_forget = || {
        mapper.borrow_mut().tell("store 5000 2");
        mapper.borrow_mut().tell("unmap");
    };
    std::thread::sleep(Duration::from_millis(100));
    let took = match store {
        Store::Naive | Store::Later => {
            let (moment, _) = Moment::of_running(own()).unwrap().unwrap();
            let mapped = match store {
                Store::Later => moment.mapped().clone(),
                Store::Naive | Store::Meanwhile => MappedFiles::default(),
            };
            saving.save_at(late, mapped, None);
            store_and_forget();
            saving.save()
        }
        Store::Meanwhile => saving.save_at(late, MappedFiles::default(), Some(&store_and_forget)),
    };
    (changed(&file) == before).then(|| took.stream == saving.all())
}

/// Without this, a store through a mapping would be lost: it leaves the times of the file as they were.
#[test]
fn files_that_are_mapped_are_read_again() {
    for (store, is_whole) in [(Store::Naive, false), (Store::Later, true), (Store::Meanwhile, true)]
    {
        let found = (0..20).find_map(|_| store_to_mapped(store));
        assert_eq!(found, Some(is_whole), "{store:?}");
    }
}

/// Without this, files in memory would come back as they were before a store through a mapping that nothing tells of.
#[test]
fn times_in_memory_prove_nothing() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = folder.path().join("file");
    fs::write(&file, content(1, 5 << 20)).unwrap();
    let mut saving = Saving::new(folder.path());
    let took = saving.save();
    saving.check(&took);
    let before = changed(&file);
    let mut mapper = Mapper::new();
    mapper.tell(&format!("map {}", file.display()));
    mapper.tell("store 5000 1");
    mapper.tell("store 5001 2");
    mapper.tell("unmap");
    assert_eq!(changed(&file), before, "a time tells of the store: nothing is tested");
    let took = saving.save();
    saving.check(&took);
    // But what was read is stored only where it is another.
    assert!(took.passed <= 4 << 20, "{} bytes", took.passed);
    let took = saving.save();
    assert_eq!(took.passed, 0);
}

/// Without this, a change within the tick of the last one would not be seen.
#[test]
fn what_has_just_been_written_is_read_again() {
    let folder = folder();
    let file = folder.path().join("file");
    fs::write(&file, content(1, 2 << 20)).unwrap();
    let mut saving = Saving::new(folder.path());
    let written = SystemTime::UNIX_EPOCH
        + Duration::new(changed(&file).0.cast_unsigned(), u32::try_from(changed(&file).1).unwrap());
    let took = saving.save_at(written + Duration::from_millis(20), MappedFiles::default(), None);
    saving.check(&took);
    let took = saving.save();
    saving.check(&took);
    assert_eq!(took.read, 2 << 20, "it could have changed without a trace");
    let took = saving.save();
    assert_eq!(took.read, 0);
}

/// Without this, a clock that was set back would hide changes.
#[test]
fn a_clock_that_was_set_back_voids_all_proofs() {
    let folder = folder();
    fs::write(folder.path().join("file"), content(1, 2 << 20)).unwrap();
    let mut saving = Saving::new(folder.path());
    saving.save();
    let mut notes: serde_json::Value = serde_json::to_value(&saving.notes).unwrap();
    let real = notes["clocks"]["real_ns"].as_i64().unwrap();
    notes["clocks"]["real_ns"] = (real + 3_600_000_000_000).into();
    saving.notes = serde_json::from_value(notes).unwrap();
    let took = saving.save();
    saving.check(&took);
    assert_eq!((took.read, took.passed), (2 << 20, 0));
}

/// Without this, holes would be filled, or be taken for content.
#[test]
fn holes_are_part_of_what_is_known() {
    let folder = folder();
    let path = folder.path().join("sparse");
    let file = File::create(&path).unwrap();
    file.set_len(100 << 20).unwrap();
    for at in [3 << 20, 7 << 20, (64 << 20) + 5, (99 << 20) + 77] {
        file.write_all_at(&content(at, 100_000), at).unwrap();
    }
    let mut saving = Saving::new(folder.path());
    let took = saving.save();
    saving.check(&took);
    assert!(took.read < 1 << 20, "{} bytes", took.read);
    let took = saving.save();
    assert_eq!((took.read, took.passed), (0, 0));
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, 7 << 20, 1 << 20).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 20 << 20, 1 << 20).unwrap();
    file.set_len(80 << 20).unwrap();
    let took = saving.save();
    saving.check(&took);
    file.set_len(0).unwrap();
    let took = saving.save();
    saving.check(&took);
}

/// Without this, reading ahead would copy files up, change when they were read, or leave attributes.
#[test]
fn reading_ahead_leaves_no_trace() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    for name in ["lower/etc", "upper", "work", "merged"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    fs::write(path("lower/etc/hosts"), content(1, 2 << 20)).unwrap();
    fs::write(path("lower/other"), "x").unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={},strictatime",
        path("lower").display(),
        path("upper").display(),
        path("work").display()
    );
    let mounted = Command::new("mount")
        .args(["-t", "overlay", "-o", &options, "overlay"])
        .arg(path("merged"))
        .status()
        .unwrap();
    assert!(mounted.success());
    fs::write(path("merged/new"), content(2, 3 << 20)).unwrap();
    let look = || -> Vec<String> {
        let names = ["upper", "upper/new", "lower/etc/hosts", "lower/other", "lower/etc"];
        let mut listed = Command::new("stat");
        listed.args(["-c", "%n %i %s %x %y %z"]).args(names).current_dir(folder.path());
        let output = listed.output().unwrap();
        let attributes = Command::new("getfattr")
            .args(["-R", "-d", "-m", "-", "upper"])
            .current_dir(folder.path())
            .output();
        let mut lines = vec![String::from_utf8(output.stdout).unwrap()];
        lines.extend(attributes.ok().map(|output| String::from_utf8(output.stdout).unwrap()));
        let entries = fs::read_dir(path("upper")).unwrap();
        lines.extend(entries.map(|entry| entry.unwrap().path().display().to_string()));
        lines
    };
    std::thread::sleep(Duration::from_millis(100));
    // To look changes the time of access, once.
    look();
    let before = look();
    let mut saving = Saving::new(&path("merged"));
    let seen = std::cell::Cell::new(None);
    let then = || seen.set(Some(look()));
    let took = saving.save_at(SystemTime::now(), MappedFiles::default(), Some(&then));
    saving.check(&took);
    let all = [seen.take().unwrap(), look()];
    let unmounted = Command::new("umount").arg(path("merged")).status().unwrap();
    assert!(unmounted.success());
    for after in all {
        assert_eq!(after, before);
    }
    assert_eq!(took.passed, 0, "all of it was stored ahead");
}

/// Without this, a program that watches its files would be told of a capture that it must not notice.
#[test]
fn what_is_watched_is_left_alone_ahead() {
    use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir_all(path("watched/below")).unwrap();
    for name in ["watched/file", "watched/below/file", "alone", "other"] {
        fs::write(path(name), content(1, 2 << 20)).unwrap();
    }
    let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    for name in ["watched", "alone"] {
        inotify::add_watch(&watch, path(name), WatchFlags::ALL_EVENTS).unwrap();
    }
    std::thread::sleep(Duration::from_millis(100));
    let told = || assert_eq!(rustix::io::ioctl_fionread(&watch).unwrap(), 0, "it was told");
    let mut saving = Saving::new(folder.path());
    let took = saving.save_at(SystemTime::now(), MappedFiles::default(), Some(&told));
    saving.check(&took);
    assert_eq!(took.read >> 20, 3 * 2, "watched files are read in the pause, and no others");
}
