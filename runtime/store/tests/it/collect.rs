//! Retention and collection: what goes, what stays, and that nothing a capsule needs ever goes, whoever does what when.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::Read as _;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime};

use samara_capsule::cbor::encode_record;
use samara_capsule::digest::Digest;
use samara_capsule::log::Event;
use samara_capsule::transfer::{Sink as _, Source as _};
use samara_store::collect::{CollectError, CollectOptions, Collected, Retention};
use samara_store::layout::{LayoutError, export, import};
use samara_store::log::LogError;
use samara_store::writer::WriteError;
use samara_store::{CapsuleReader, CapsuleWriter, Lease, Location, Store};

use crate::injected::{Call, Decide, Fate, Injected, NOW};
use crate::sample::{
    batch, chain, check, check_reader, facts, fill, folder_config, name, open, take_epoch, write,
};

fn open_injected(folder: &Path, decide: Decide) -> Store {
    let location = Location::folder(folder).unwrap();
    Store::open_through(&location, &folder_config(), true, |objects| {
        Injected::wrap(objects, decide)
    })
    .unwrap()
}

fn last(count: u32) -> Retention {
    Retention { keep_last: NonZeroU32::new(count), keep_within: None }
}

/// No grace: what is safe without it is safe with it.
const AT_ONCE: CollectOptions = CollectOptions { grace: Duration::ZERO, dry_run: false };

fn collect(store: &Store, keep_last: u32) -> Result<Collected, CollectError> {
    store.collect(&last(keep_last), SystemTime::now(), &AT_ONCE, &|done, total| {
        assert!(done <= total)
    })
}

fn digests(store: &Store) -> Vec<Digest> {
    store.capsules().unwrap().iter().map(|one| one.capsule.digest).collect()
}

/// Every capsule that the address has is whole.
fn assert_whole(store: &Store) {
    for digest in digests(store) {
        let report = CapsuleReader::open_digest(store, digest).unwrap().verify(&|_, _| ());
        assert!(report.faults.is_empty(), "{digest}: {:?}", report.faults);
    }
}

fn stored(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder.join("blobs/sha256")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// What the capsules of an address need, and the lists of its newest collection and of those that did not end.
fn needed(store: &Store) -> BTreeSet<String> {
    let mut needed = BTreeSet::new();
    for digest in digests(store) {
        let reader = CapsuleReader::open_digest(store, digest).unwrap();
        needed.extend(reader.manifest().blobs().map(|(_, blob)| blob.digest.hex()));
        needed.insert(digest.hex());
    }
    if let Some(newest) = store.head().unwrap().state.collection {
        needed.insert(newest.list.hex());
        let list = store.collection_list(newest.list).unwrap();
        needed.extend(list.unfinished.iter().map(|one| one.list.hex()));
    }
    needed
}

fn age(path: &Path, by: Duration) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - by).unwrap();
}

/// Retention would delete what it should keep, or keep everything; and an address would grow for ever.
pub(crate) fn old_capsules_go_and_the_rest_stays_whole(store: &Store, other: &Store) {
    let mut lease = take_epoch(store);
    let committed: Vec<Digest> =
        (1..=5).map(|seed| write(store, &mut lease, seed).unwrap().capsule.digest).collect();
    assert_eq!(digests(other), committed);

    let all = Retention::default();
    let nothing = other.collect(&all, SystemTime::now(), &AT_ONCE, &|_, _| ()).unwrap();
    assert_eq!((nothing.blobs, nothing.kept.len()), (0, 5));
    assert_eq!(other.slots().unwrap().len(), 6, "a collection of nothing leaves no slots");

    let dry = CollectOptions { dry_run: true, ..AT_ONCE };
    let told = other.collect(&last(2), SystemTime::now(), &dry, &|_, _| ()).unwrap();
    assert_eq!(digests(other), committed);
    let done = collect(other, 2).unwrap();
    assert_eq!(told, done, "what was announced is what was done");
    assert_eq!(digests(store), committed[3..]);
    assert_eq!(done.dropped.len(), 3);
    assert!(done.blobs > 9 && done.bytes > 0);
    assert_whole(store);
    for gone in &committed[..3] {
        assert!(
            chain(&CapsuleReader::open_digest(store, *gone).unwrap_err()).contains("not there")
        );
    }
    check(store, 5).unwrap();
    assert_eq!(collect(other, 2).unwrap().blobs, 0);

    // The lease has seen nothing of all that.
    write(store, &mut lease, 6).unwrap();
    check(other, 6).unwrap();
    assert_eq!(collect(other, 1).unwrap().dropped.len(), 2);
    check(store, 6).unwrap();
}

#[test]
fn old_capsules_go() {
    let folder = tempfile::tempdir().unwrap();
    let (store, other) = (open(folder.path()), open(folder.path()));
    old_capsules_go_and_the_rest_stays_whole(&store, &other);
    assert_eq!(stored(folder.path()), needed(&store), "nothing else is left");
}

/// A job could not be resumed because it had not been saved for a while.
#[test]
fn the_newest_capsule_of_the_open_generation_stays_however_old_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    for seed in 1..=3 {
        write(&store, &mut lease, seed).unwrap();
    }
    let day = Duration::from_secs(24 * 3600);
    let within = Retention { keep_last: None, keep_within: Some(day) };
    let collect =
        |now: SystemTime| store.collect(&within, now, &AT_ONCE, &|_, _| ()).unwrap().dropped.len();
    assert_eq!(collect(SystemTime::now()), 0);
    assert_eq!(collect(SystemTime::now() + 2 * day), 2);
    check(&store, 3).unwrap();
    // Once the job has ended, it is as any other.
    store.close(&mut lease).unwrap();
    assert_eq!(collect(SystemTime::now() + 2 * day), 1);
    assert!(store.capsules().unwrap().is_empty());
}

/// What writers that died have left would stay for ever; or what a writer has just stored would go.
#[test]
fn blobs_without_a_name_go_when_they_are_old() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    write(&store, &mut lease, 1).unwrap();
    let before = stored(folder.path());
    let mut writer = CapsuleWriter::new(&store).unwrap();
    fill(&mut writer, 2).unwrap();
    // It fails at the very last moment, when all its blobs are stored.
    take_epoch(&open(folder.path()));
    assert!(writer.commit(&mut lease, b"", facts()).unwrap_err().is_fenced());
    let orphans: Vec<String> = stored(folder.path()).difference(&before).cloned().collect();
    assert!(orphans.len() > 4);
    let half = folder.path().join("blobs/sha256").join(format!("{}#1", orphans[0]));
    let young_half = folder.path().join("blobs/sha256").join(format!("{}#2", orphans[0]));
    for path in [&half, &young_half] {
        fs::write(path, "half").unwrap();
    }
    age(&half, Duration::from_secs(25 * 3600));
    age(&folder.path().join("blobs/sha256").join(&orphans[0]), Duration::from_secs(25 * 3600));

    let collect = |options: &CollectOptions| {
        store.collect(&last(1), SystemTime::now(), options, &|_, _| ()).unwrap()
    };
    let collected = collect(&CollectOptions::default());
    assert_eq!(collected.blobs, 1);
    assert_eq!(collected.young_blobs, orphans.len() as u64 - 1);
    assert!(!half.exists() && young_half.exists());
    assert_eq!(collect(&AT_ONCE).blobs, orphans.len() as u64, "with the list of the one before");
    fs::remove_file(&young_half).unwrap_or_default();
    assert_eq!(stored(folder.path()), needed(&store));
    check(&store, 1).unwrap();
}

/// A capsule would be committed of which a part is being deleted.
#[test]
fn a_writer_that_relies_on_what_is_condemned_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    write(&store, &mut lease, 1).unwrap();
    write(&store, &mut lease, 2).unwrap();
    // It finds the blobs of the first capsule, and will not store them again.
    let mut writer = CapsuleWriter::new(&store).unwrap();
    fill(&mut writer, 1).unwrap();
    collect(&open(folder.path()), 1).unwrap();
    let before = store.slots().unwrap();
    let refused = writer.commit(&mut lease, b"", facts()).unwrap_err();
    assert!(matches!(refused, WriteError::Log(LogError::Condemned { .. })), "{refused:?}");
    assert!(!refused.is_fenced());
    assert!(chain(&refused).contains("removed sha256:"), "{}", chain(&refused));
    assert_eq!(store.slots().unwrap(), before);
    check(&store, 2).unwrap();
    // The next attempt stores them.
    write(&store, &mut lease, 1).unwrap();
    check(&store, 1).unwrap();
    assert_whole(&store);
}

/// A writer that took longer than the lists of collections are kept would name what they condemned.
#[test]
fn a_writer_that_cannot_know_what_was_condemned_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    for seed in 1..=2 {
        write(&store, &mut lease, seed).unwrap();
    }
    let mut writer = CapsuleWriter::new(&store).unwrap();
    fill(&mut writer, 1).unwrap();
    collect(&store, 1).unwrap();
    // Another one, by which the list of the first is garbage.
    write(&store, &mut lease.clone(), 3).unwrap();
    collect(&store, 1).unwrap();
    let refused = writer.commit(&mut lease, b"", facts()).unwrap_err();
    assert!(matches!(refused, WriteError::Log(LogError::Outlived { .. })), "{refused:?}");
    check(&store, 3).unwrap();
}

/// A lease lies in a file for days; what was collected meanwhile must not keep its holder from saving.
#[test]
fn a_lease_outlives_collections() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    let old = lease.clone();
    for seed in 1..=6 {
        write(&store, &mut lease, seed).unwrap();
        collect(&store, 1).unwrap();
    }
    let text = serde_json::to_string(&old).unwrap();
    let mut old: Lease = serde_json::from_str(&text).unwrap();
    write(&open(folder.path()), &mut old, 1).unwrap();
    check(&store, 1).unwrap();
    assert_whole(&store);
    // Nor must it keep him from telling how the job ended.
    let mut old: Lease = serde_json::from_str(&text).unwrap();
    store.close(&mut old).unwrap();
}

/// A store which is asked to delete something stops until the gate is opened: its collector sleeps for as long.
struct Gate(Arc<(Mutex<(bool, bool)>, Condvar)>);

impl Gate {
    fn before_deletions(folder: &Path) -> (Gate, Store) {
        let gate = Arc::new((Mutex::new((false, false)), Condvar::new()));
        let shared = gate.clone();
        let store = open_injected(
            folder,
            Arc::new(move |call, _| {
                if call == Call::Delete {
                    let mut state = shared.0.lock().unwrap();
                    state.0 = true;
                    shared.1.notify_all();
                    let _open = shared.1.wait_while(state, |(_, open)| !*open).unwrap();
                }
                NOW
            }),
        );
        (Gate(gate), store)
    }

    fn wait_for_the_first(&self) {
        let _reached = self.0.1.wait_while(self.0.0.lock().unwrap(), |(reached, _)| !*reached);
    }

    /// Opens it when dropped, so that a test that fails does not wait for who waits.
    fn opener(&self) -> impl Drop + use<> {
        struct Opener(Arc<(Mutex<(bool, bool)>, Condvar)>);
        impl Drop for Opener {
            fn drop(&mut self) {
                self.0.0.lock().unwrap().1 = true;
                self.0.1.notify_all();
            }
        }
        Opener(self.0.clone())
    }
}

/// A collector sleeps between condemning and deleting, for longer than anybody waits for it. Meanwhile the same content is
/// stored again. When it wakes up it would delete what a capsule needs.
#[test]
fn a_collector_that_wakes_up_late_deletes_what_nobody_needs() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    let first = write(&store, &mut lease, 1).unwrap();
    write(&store, &mut lease, 2).unwrap();
    let (gate, sleepy) = Gate::before_deletions(folder.path());
    std::thread::scope(|scope| {
        let opener = gate.opener();
        let sleeper = scope.spawn(|| collect(&sleepy, 1));
        gate.wait_for_the_first();
        // The same pages, files and records, under the same lease, at the same time of day: not one blob may be the same.
        let again = write(&store, &mut lease, 1).unwrap();
        assert_ne!(again.capsule.digest, first.capsule.digest);
        check(&store, 1).unwrap();
        // Others collect meanwhile, and can't know whether it will wake up.
        collect(&store, 1).unwrap();
        let state = store.head().unwrap().state.collection.unwrap();
        assert_eq!((state.swept, state.unfinished), (true, 1));
        let third = write(&store, &mut lease, 1).unwrap();
        drop(opener);
        let error = sleeper.join().unwrap();
        assert!(error.is_ok(), "{error:?}");
        check(&store, 1).unwrap();
        assert_eq!(store.head().unwrap().state.latest, Some(third.capsule));
    });
    assert_whole(&store);
    collect(&store, 1).unwrap();
    assert_whole(&store);
    assert_eq!(stored(folder.path()), needed(&store));
}

/// What a collection that died has condemned would be avoided for ever, and after 64 of them nothing would be removed.
#[test]
fn a_collection_that_did_not_end_is_given_up_after_a_week() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    write(&store, &mut lease, 1).unwrap();
    write(&store, &mut lease, 2).unwrap();
    let dead = open_injected(
        folder.path(),
        Arc::new(|call, _| if call == Call::Delete { Fate::Lost } else { NOW }),
    );
    assert!(matches!(collect(&dead, 1), Err(CollectError::Store(_))));
    let died = store.head().unwrap();
    assert!(died.state.collection.unwrap().is_open());
    let unfinished = || store.head().unwrap().state.collection.unwrap().unfinished;
    // The next one does what it did not do, and still does not know whether it is over.
    assert!(collect(&store, 1).unwrap().blobs > 4);
    assert_eq!(unfinished(), 1);
    write(&store, &mut lease, 3).unwrap();
    age(
        &folder.path().join(format!("log/{:020}.json", died.slot.unwrap())),
        Duration::from_secs(6 * 24 * 3600),
    );
    collect(&store, 1).unwrap();
    assert_eq!(unfinished(), 1);
    age(
        &folder.path().join(format!("log/{:020}.json", died.slot.unwrap())),
        Duration::from_secs(8 * 24 * 3600),
    );
    collect(&store, 1).unwrap();
    assert_eq!(unfinished(), 0);
    collect(&store, 1).unwrap();
    check(&store, 3).unwrap();
    assert_eq!(stored(folder.path()), needed(&store));
}

/// A collector that dies at any of its requests, or whose answer is lost there, harms nothing that is to stay, and the next
/// one leaves nothing that is to go.
#[test]
fn a_collection_that_fails_at_any_request_is_completed_by_the_next() {
    for fate in [Fate::Lost, Fate::Unanswered] {
        let mut failed = 0;
        for nth in 0.. {
            assert!(nth < 500, "the collection never succeeds");
            let folder = tempfile::tempdir().unwrap();
            let store = open(folder.path());
            let mut lease = take_epoch(&store);
            for seed in [1, 2, 1, 3] {
                write(&store, &mut lease, seed).unwrap();
            }
            let before = digests(&store);
            let count = AtomicU64::new(0);
            let dying = open_injected(
                folder.path(),
                Arc::new(move |call, _| {
                    let earlier = if call == Call::Deleting { 0 } else { 1 };
                    match count.fetch_add(earlier, Relaxed).cmp(&nth) {
                        std::cmp::Ordering::Less => NOW,
                        std::cmp::Ordering::Equal => fate,
                        std::cmp::Ordering::Greater => Fate::Lost,
                    }
                }),
            );
            let result = collect(&dying, 2);
            drop(dying);
            // Whatever has happened: the newest is there, and all that are told of are whole.
            check(&store, 3).unwrap();
            assert_whole(&store);
            let now = digests(&store);
            assert!(now == before || now == before[before.len() - 2..], "{nth}: {now:?}");
            // Saving goes on.
            write(&store, &mut lease, 2).unwrap();
            check(&store, 2).unwrap();
            collect(&store, 2).unwrap();
            collect(&store, 2).unwrap();
            assert_eq!(digests(&store).len(), 2);
            assert_whole(&store);
            assert_eq!(stored(folder.path()), needed(&store), "{fate:?} {nth}");
            if result.is_ok() {
                break;
            }
            failed += 1;
        }
        assert!(failed > 20, "{failed}");
    }
}

/// A capsule can't be altered when it is imported, so it may not be stored while somebody may still delete what it needs.
#[test]
fn an_import_waits_for_the_end_of_a_collection() {
    let folder = tempfile::tempdir().unwrap();
    let layout = folder.path().join("layout");
    let store = open(&folder.path().join("store"));
    let mut lease = take_epoch(&store);
    write(&store, &mut lease, 1).unwrap();
    export(&CapsuleReader::open_latest(&store).unwrap(), &layout, &|_, _| ()).unwrap();
    write(&store, &mut lease, 2).unwrap();
    let (gate, sleepy) = Gate::before_deletions(&folder.path().join("store"));
    std::thread::scope(|scope| {
        let opener = gate.opener();
        let sleeper = scope.spawn(|| collect(&sleepy, 1));
        gate.wait_for_the_first();
        let refused = import(&layout, &store, &|_, _| ()).unwrap_err();
        assert!(matches!(refused, LayoutError::Condemned { .. }), "{refused:?}");
        drop(opener);
        sleeper.join().unwrap().unwrap();
    });
    import(&layout, &store, &|_, _| ()).unwrap();
    check(&store, 1).unwrap();
    assert_whole(&store);
}

/// A collector would go on deleting at an address that has been removed and belongs to somebody else by now.
#[test]
fn a_collection_ends_when_its_address_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    write(&store, &mut lease, 1).unwrap();
    write(&store, &mut lease, 2).unwrap();
    let removed = AtomicBool::new(false);
    let path = folder.path().to_owned();
    let slow = open_injected(
        folder.path(),
        Arc::new(move |call, object| {
            // Right after its slot was written.
            if call == Call::Get && object.ends_with("3.json") && !removed.swap(true, Relaxed) {
                let path = path.clone();
                std::thread::spawn(move || open(&path).remove(&|_, _| ())).join().unwrap().unwrap();
            }
            NOW
        }),
    );
    let ended = collect(&slow, 1);
    assert!(matches!(ended, Err(CollectError::Log(LogError::Removed { .. }))), "{ended:?}");
    assert!(store.slots().unwrap().is_empty(), "{:?}", store.slots());
    assert!(matches!(collect(&store, 1), Err(CollectError::None { .. })));
}

/// Each list of an address's capsules would read its whole log, which grows with every save.
#[test]
fn a_long_log_is_read_only_from_its_last_catalogue_on() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    for seed in 1..=3 {
        write(&store, &mut lease, seed).unwrap();
    }
    for _ in 0..600 {
        take_epoch(&store);
    }
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = requests.clone();
    let counting = open_injected(
        folder.path(),
        Arc::new(move |_, _| {
            counted.fetch_add(1, Relaxed);
            NOW
        }),
    );
    let count = || {
        requests.store(0, Relaxed);
        assert_eq!(digests(&counting).len(), 3);
        requests.load(Relaxed)
    };
    assert!(count() > 600);
    let kept = counting.collect(
        &Retention::default(),
        SystemTime::now(),
        &CollectOptions::default(),
        &|_, _| (),
    );
    assert_eq!(kept.unwrap().blobs, 0);
    assert!(count() < 10);
    let head = store.slot(store.head().unwrap().slot.unwrap()).unwrap();
    assert!(matches!(head.event, Event::Collect { .. }));
}

/// A kept capsule of which the manifest can't be read needs nobody knows what: all its blobs would go.
#[test]
fn nothing_goes_while_it_is_not_known_what_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    let committed: Vec<Digest> =
        (1..=3).map(|seed| write(&store, &mut lease, seed).unwrap().capsule.digest).collect();
    let path = |digest: &Digest| folder.path().join("blobs/sha256").join(digest.hex());
    let manifest = fs::read(path(&committed[1])).unwrap();
    fs::write(path(&committed[1]), "damaged").unwrap();
    let before = stored(folder.path());
    let error = collect(&store, 2).unwrap_err();
    assert!(chain(&error).starts_with("nothing was removed"), "{}", chain(&error));
    assert_eq!(stored(folder.path()), before);
    fs::write(path(&committed[1]), manifest).unwrap();
    // One that is to go may be damaged.
    fs::write(path(&committed[0]), "damaged").unwrap();
    collect(&store, 2).unwrap();
    assert_whole(&store);
    assert_eq!(stored(folder.path()), needed(&store));
}

/// One of few contents, so that equal ones come up again and again.
fn content(pick: u64) -> Vec<u8> {
    format!("content {pick} ").repeat(300).into_bytes()
}

const STREAMS: usize = 4;
const PICKS: u64 = 8;

/// A deletion that its collector has given up is carried out within so many pauses: many saves later.
const LATE_PAUSES: u64 = 100;

/// xorshift64*: the moments of a race are drawn, and can be drawn again.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}

/// A capsule of streams and pages that are drawn from few, most of them those of the capsule before.
fn write_picks(
    store: &Store,
    lease: &mut Lease,
    picks: &[u64],
    record: u64,
    pause: Duration,
) -> Result<Digest, WriteError> {
    let mut writer = CapsuleWriter::new(store)?;
    std::thread::sleep(pause);
    let mut append = || {
        writer.pages(batch(0, &[(picks[0] * 100, 2)]))?;
        for (number, pick) in picks.iter().enumerate() {
            writer.append(&name(&format!("s{number}")), &content(*pick))?;
        }
        std::io::Result::Ok(())
    };
    // What fails here fails the commit.
    let _ = append();
    let committed = writer.commit(lease, &encode_record(&record).unwrap(), facts())?;
    Ok(committed.capsule.digest)
}

fn check_picks(store: &Store, digest: Digest, picks: &[u64]) {
    let reader = CapsuleReader::open_digest(store, digest).unwrap();
    let report = reader.verify(&|_, _| ());
    assert!(report.faults.is_empty(), "{digest}: {:?}", report.faults);
    for (number, pick) in picks.iter().enumerate() {
        let mut found = Vec::new();
        let stream = reader.stream(&name(&format!("s{number}"))).unwrap();
        stream.unwrap().read_to_end(&mut found).unwrap();
        assert!(found == content(*pick));
    }
}

/// What a race came to.
#[derive(Debug, Default)]
pub(crate) struct Score {
    committed: AtomicU64,
    refused: AtomicU64,
    fenced: AtomicU64,
    failed: AtomicU64,
    collected: AtomicU64,
    died: AtomicU64,
}

/// The capsule of the address that names the blob at `path`, if there is one.
fn holder(store: &Store, path: &str) -> Option<String> {
    let (_, name) = path.rsplit_once('/')?;
    // Lists of collections and catalogues come and go; what counts is what is told at this moment.
    let capsules = store.capsules().ok()?;
    capsules.into_iter().find_map(|one| {
        let digest = one.capsule.digest;
        let reader = CapsuleReader::open_digest(store, digest).ok()?;
        let is_named = reader.manifest().blobs().any(|(_, blob)| blob.digest.hex() == name);
        (is_named || digest.hex() == name).then(|| format!("{digest} loses {name}"))
    })
}

/// Counts a thread off that has ended, also by a panic.
struct Ended<'a>(&'a AtomicUsize);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Writers and collectors against each other, each with a client of its own, which `open` makes of its decisions. Calls are
/// drawn out, deletions are carried out after their collector has failed, collectors die between any two calls. No blob is
/// ever deleted that a capsule of the address names, though the next save would bring it back; and after all that every
/// capsule which was committed and not dropped is whole.
pub(crate) fn race(open: &dyn Fn(Decide) -> Store, rounds: u64, pause_ms: u64, seed: u64) -> Score {
    let plain = open(Arc::new(|_, _| NOW));
    let lease = Mutex::new(take_epoch(&plain));
    let picks = Mutex::new(vec![0; STREAMS]);
    let expected: Mutex<HashMap<Digest, Vec<u64>>> = Mutex::default();
    let (score, running) = (Score::default(), AtomicUsize::new(3));
    let lost: Arc<Mutex<Vec<String>>> = Arc::default();
    let slow = |seed: u64, late: bool| -> (Store, Arc<AtomicBool>) {
        let (watcher, lost) = (plain.clone(), lost.clone());
        let random = Mutex::new(Random(seed));
        let dead = Arc::new(AtomicBool::new(false));
        let shared = dead.clone();
        let store = open(Arc::new(move |call, path| {
            if call == Call::Deleting {
                let (watcher, path) = (watcher.clone(), path.to_owned());
                // From a thread of its own, as this one may not wait for a store.
                let holder = std::thread::spawn(move || holder(&watcher, &path)).join().unwrap();
                lost.lock().unwrap().extend(holder);
                return NOW;
            }
            let mut random = random.lock().unwrap();
            if shared.load(Relaxed) {
                return Fate::Lost;
            }
            match random.below(120) {
                0..4 if late && call == Call::Delete => {
                    Fate::Late(Duration::from_millis(random.below(LATE_PAUSES * pause_ms)))
                }
                4 if late => {
                    shared.store(true, Relaxed);
                    Fate::Unanswered
                }
                2..5 => Fate::After(Duration::from_millis(random.below(10 * pause_ms))),
                5..40 => Fate::After(Duration::from_millis(random.below(pause_ms))),
                _ => NOW,
            }
        }));
        (store, dead)
    };
    let writers: Vec<_> = (0..3).map(|number| slow(seed * 100 + number + 1, false).0).collect();
    let collectors: Vec<_> = (0..2).map(|number| slow(seed * 100 + number + 51, true)).collect();
    std::thread::scope(|scope| {
        for (number, store) in writers.iter().enumerate() {
            let (lease, picks, expected, score, running) =
                (&lease, &picks, &expected, &score, &running);
            scope.spawn(move || {
                let _ended = Ended(running);
                let mut random = Random(seed * 100 + number as u64 + 11);
                for round in 0..rounds {
                    if random.below(12) == 0 {
                        *lease.lock().unwrap() = take_epoch(store);
                    }
                    let mut mine = lease.lock().unwrap().clone();
                    let mut wanted = picks.lock().unwrap().clone();
                    let changed = usize::try_from(random.below(STREAMS as u64)).unwrap();
                    wanted[changed] = random.below(PICKS);
                    let record = round * 10 + number as u64;
                    let pause = Duration::from_millis(random.below(15 * pause_ms));
                    match write_picks(store, &mut mine, &wanted, record, pause) {
                        Ok(digest) => {
                            score.committed.fetch_add(1, Relaxed);
                            expected.lock().unwrap().insert(digest, wanted.clone());
                            *picks.lock().unwrap() = wanted;
                        }
                        Err(error) if error.is_fenced() => {
                            score.fenced.fetch_add(1, Relaxed);
                        }
                        Err(
                            WriteError::Log(LogError::Condemned { .. } | LogError::Outlived { .. })
                            | WriteError::Unknown { .. },
                        ) => {
                            score.refused.fetch_add(1, Relaxed);
                        }
                        Err(error) => panic!("{}", chain(&error)),
                    }
                }
            });
        }
        for (number, (store, dead)) in collectors.iter().enumerate() {
            let (score, running) = (&score, &running);
            scope.spawn(move || {
                let mut random = Random(seed * 100 + number as u64 + 61);
                while running.load(Relaxed) > 0 {
                    // Lists must outlive a writer's attempt, or each would be refused.
                    let grace = Duration::from_millis(100 * pause_ms);
                    let options = CollectOptions { grace, dry_run: false };
                    let keep = last(1 + u32::try_from(random.below(2)).unwrap());
                    match store.collect(&keep, SystemTime::now(), &options, &|_, _| ()) {
                        Ok(_) => score.collected.fetch_add(1, Relaxed),
                        Err(CollectError::Unfinished { .. }) => break,
                        Err(_) if dead.swap(false, Relaxed) => score.died.fetch_add(1, Relaxed),
                        Err(_) => score.failed.fetch_add(1, Relaxed),
                    };
                }
            });
        }
        // Whatever the newest is at any moment, it is whole for as long as it has not been dropped.
        let (plain, running) = (&plain, &running);
        scope.spawn(move || {
            while running.load(Relaxed) > 0 {
                let Some(latest) = plain.head().unwrap().state.latest else { continue };
                let reader = CapsuleReader::open(plain, &latest);
                let faults = reader.map(|reader| format!("{:?}", reader.verify(&|_, _| ()).faults));
                if !matches!(faults.as_deref(), Ok("[]")) {
                    let kept = digests(plain).contains(&latest.digest);
                    assert!(!kept, "{}: {faults:?}", latest.digest);
                }
            }
        });
    });
    // Until the last deletion that was under way has been carried out.
    std::thread::sleep(Duration::from_millis((LATE_PAUSES + 10) * pause_ms));
    assert_eq!(*lost.lock().unwrap(), [""; 0], "seed {seed}");
    let expected = expected.into_inner().unwrap();
    let kept = digests(&plain);
    assert!(!kept.is_empty());
    for digest in &kept {
        check_picks(&plain, *digest, &expected[digest]);
    }
    score
}

#[test]
fn writers_and_collectors_race() {
    let seed = std::env::var("SAMARA_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut total = Score::default();
    for seed in seed.map_or(1..=8, |seed| seed..=seed) {
        let folder = tempfile::tempdir().unwrap();
        let score = race(&|decide| open_injected(folder.path(), decide), 25, 3, seed);
        for (sum, part) in [
            (&mut total.committed, score.committed),
            (&mut total.refused, score.refused),
            (&mut total.fenced, score.fenced),
            (&mut total.failed, score.failed),
            (&mut total.collected, score.collected),
            (&mut total.died, score.died),
        ] {
            *sum.get_mut() += part.into_inner();
        }
    }
    println!("{total:?}");
    // A race in which nobody met anybody would show nothing.
    for met in [&total.committed, &total.refused, &total.collected, &total.died] {
        assert!(met.load(Relaxed) > 0, "{total:?}");
    }
}

/// What was saved before there were collections can be collected, and saved on.
#[test]
fn a_log_without_collections_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    write(&store, &mut lease, 1).unwrap();
    for slot in store.slots().unwrap() {
        let path = folder.path().join(format!("log/{slot:020}.json"));
        assert!(!fs::read_to_string(path).unwrap().contains("collection"));
    }
    let reader = CapsuleReader::open_latest(&store).unwrap();
    check_reader(&reader, 1).unwrap();
}
