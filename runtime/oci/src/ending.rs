//! How a container ended, and what its address is told of it.
//!
//! The program's own exit 0 closes the generation of the address, so that the next start begins anew. A failure after a resume is
//! noted there, so that a capsule is not tried for ever. The monitor learns the end; what is to be told becomes a note beside the
//! containers' folders before anybody talks to a store, and a process of its own does the talking.
//!
//! Invariant: a note outlives container, monitor and teller. Until a store took it, each start at that address on this node tells
//! it first, so a start never finds an older state than the end that its engine has seen.
//!
//! What is not here: containers without an address, and those restored by hand somewhere else than their specification says: they
//! tell nobody. An end that the engine or the user asked for tells nothing either.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use samara_capsule::digest::Digest;
use samara_store::config::ConfigError;
use samara_store::location::{Location, LocationError};
use samara_store::log::LogError;
use samara_store::store::StoreError;
use samara_store::{NodeConfig, Store};
use serde::{Deserialize, Serialize};

use crate::capture::Held;
use crate::signal_name::{self, SignalNumber};
use crate::state_dir::{StateDir, replace};

/// The hidden verb of `samara-runtime` that tells a store what a note says.
pub const TELL_VERB: &str = "tell-end";

/// The folder of notes, among those of containers; no container can have this name.
const NOTES: &str = "@ends";
/// A note is a lease and a reason; a lease has less than 1 KiB.
const NOTE_BYTES_MAX: u64 = 64 << 10;
/// Stands in a container's folder once somebody asked its program to end.
const ASKED: &str = "asked-to-end";
/// What stands there while a container is filled.
const RESTORING: &str = "a restore under way";
/// Stands in a container's folder once its end was seen, with what was known of it.
const ENDED: &str = "ended";

#[derive(Debug, thiserror::Error)]
pub enum EndingError {
    #[error("cannot {attempt} {}", path.display())]
    Io { attempt: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is no note of a container's end", path.display())]
    Malformed { path: PathBuf, source: serde_json::Error },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Address(#[from] LocationError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Log(#[from] LogError),
}

/// What an address is to be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum News {
    /// The program ended by itself with success.
    Finished,
    /// The container that was resumed from this capsule failed.
    FailedResume { manifest: Digest, reason: String },
}

#[derive(Debug, Serialize, Deserialize)]
struct Note {
    held: Held,
    news: News,
}

/// Remembers that the end of the container's program is somebody's wish from here on.
///
/// Failing to is no reason not to end it: then the end may count as the program's own.
pub fn ask(dir: &StateDir, whose: &str) {
    if let Err(error) = fs::write(dir.path().join(ASKED), whose) {
        tracing::warn!(%error, "the wish to end the container is not remembered");
    }
}

/// Takes [`ask`] back: the container goes on.
pub(crate) fn take_back(dir: &StateDir) {
    let _ = fs::remove_file(dir.path().join(ASKED));
}

/// [`ask`], for as long as a container is being filled: whoever fills it kills what is half there if that fails, and a monitor may
/// see this end before anything else can be said of it.
pub(crate) fn ask_while_restoring(dir: &StateDir) {
    ask(dir, RESTORING);
}

/// Takes [`ask_while_restoring`] back, unless somebody else has asked meanwhile: from here on the program runs.
pub(crate) fn is_restored(dir: &StateDir) {
    if fs::read(dir.path().join(ASKED)).is_ok_and(|whose| whose == RESTORING.as_bytes()) {
        take_back(dir);
    }
}

/// [`ask`], if `signal` is one that programs are ended with.
pub fn ask_by_signal(dir: &StateDir, signal: SignalNumber) {
    /// What engines stop systemd with: SIGRTMIN+3.
    const HALT: i32 = 37;
    // The others end no program that did not ask for it, or are used to have a program that goes on say something.
    let ends = [1, 2, 3, 9, 15, HALT].contains(&signal.get());
    if ends {
        ask(dir, &signal_name::name(signal.get()));
    }
}

/// Whether the container's end was seen by a monitor.
pub(crate) fn was_seen(dir: &StateDir) -> bool {
    dir.path().join(ENDED).exists()
}

/// What an end means for the address. `status` is as `wait` encodes it; none if nobody knows it.
fn news(held: &Held, asked: bool, status: Option<i32>) -> Option<News> {
    match (status?, held.resumed) {
        _ if asked || !held.carried => None,
        (0, _) => Some(News::Finished),
        (status, Some(manifest)) => {
            let reason = match status & 0x7f {
                0 => format!("it ended with status {}", status >> 8 & 0xff),
                signal => format!("it was killed by {}", signal_name::name(signal)),
            };
            Some(News::FailedResume { manifest, reason })
        }
        (_, None) => None,
    }
}

/// Whether somebody will want to know how the container ended, and nobody does yet.
pub(crate) fn is_awaited(dir: &StateDir) -> bool {
    Held::load(dir).is_some_and(|held| held.carried) && !was_seen(dir)
}

/// Concludes the life of a container that has ended: notes what its address is to be told, if anything.
///
/// On success the note is on the disk, to be told by [`tell`]. None also if somebody else has concluded it.
pub(crate) fn conclude(
    dir: &StateDir,
    status: Option<i32>,
) -> Result<Option<PathBuf>, EndingError> {
    let lock = dir.path().join("ended.lock");
    let file = File::create(&lock).map_err(io("create", &lock))?;
    flock(&file, FlockOperation::LockExclusive).map_err(|errno| io("lock", &lock)(errno.into()))?;
    let Some(held) = Held::load(dir).filter(|_| !was_seen(dir)) else { return Ok(None) };
    let asked = dir.path().join(ASKED).exists();
    let note =
        news(&held, asked, status).map(|news| write(dir, Note { held, news })).transpose()?;
    // Last, since it says that nobody else need conclude.
    let path = dir.path().join(ENDED);
    let known = status.map_or_else(|| "unknown".to_owned(), |status| status.to_string());
    fs::write(&path, known).map_err(io("write", &path))?;
    Ok(note)
}

/// Notes that the capsule which a container was to be resumed from did not come to run, for the reason given.
pub(crate) fn note_failed_restore(
    dir: &StateDir,
    held: &Held,
    reason: &str,
) -> Result<Option<PathBuf>, EndingError> {
    match held.resumed {
        Some(manifest) if held.carried => {
            let news = News::FailedResume { manifest, reason: reason.to_owned() };
            write(dir, Note { held: held.clone(), news }).map(Some)
        }
        _ => Ok(None),
    }
}

fn write(dir: &StateDir, note: Note) -> Result<PathBuf, EndingError> {
    let folder = dir.path().with_file_name(NOTES);
    DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(io("create", &folder))?;
    let address = Digest::of(note.held.address.as_bytes()).to_string().replace(':', "-");
    let path = folder.join(format!("{address}-{}.json", note.held.lease.epoch));
    let text = serde_json::to_vec(&note)
        .map_err(|source| EndingError::Malformed { path: path.clone(), source })?;
    replace(&path, &text).map_err(io("write", &path))?;
    Ok(path)
}

/// Tells a store what the note at `path` says, and removes the note. One that is gone has been told.
///
/// A store that knows better (a newer epoch, a generation that is closed, a removed address) need not be told.
///
/// # Errors
/// The note stays, and the store may or may not have been told.
pub fn tell(path: &Path) -> Result<(), EndingError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(io("read", path)(source)),
    };
    // Two tellers would count a failure twice. Whoever waited here finds the note gone.
    flock(&file, FlockOperation::LockExclusive).map_err(|errno| io("lock", path)(errno.into()))?;
    if file.metadata().map_err(io("read", path))?.nlink() == 0 {
        return Ok(());
    }
    let mut text = Vec::new();
    Read::by_ref(&mut file)
        .take(NOTE_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(io("read", path))?;
    let Note { mut held, news } = serde_json::from_slice(&text)
        .map_err(|source| EndingError::Malformed { path: path.to_owned(), source })?;
    let config = match &held.config {
        Some(path) => NodeConfig::load_from(path)?,
        None => NodeConfig::load()?,
    };
    let store = match Store::open(&Location::parse(&held.address)?, &config.store, false) {
        // The folder was removed, with all that was there.
        Err(StoreError::NotFound { .. }) => {
            return fs::remove_file(path).map_err(io("remove", path));
        }
        other => other?,
    };
    let told = match &news {
        News::Finished => store.close(&mut held.lease),
        News::FailedResume { manifest, reason } => {
            store.note_failed_resume(&mut held.lease, *manifest, reason)
        }
    };
    match told {
        Ok(()) | Err(LogError::Refused { .. } | LogError::Removed { .. }) => {
            fs::remove_file(path).map_err(io("remove", path))
        }
        Err(error) => Err(error.into()),
    }
}

/// The process that the monitor starts for a note: tries again for some minutes. After that the next start at the address tells it.
pub fn teller(path: &Path) -> Result<(), EndingError> {
    /// A store that is away for longer is not waited for; each attempt has the store's own bound.
    const PAUSES_SECONDS: [u64; 5] = [1, 4, 16, 64, 256];
    for pause in PAUSES_SECONDS {
        if tell(path).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(pause));
    }
    tell(path)
}

/// Tells whatever is still to be told to `address` by containers under `root`: before another container starts there.
pub(crate) fn tell_all(root: &Path, address: &Location) -> Result<(), EndingError> {
    let folder = root.join(NOTES);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(io("list", &folder)(source)),
    };
    let digest = Digest::of(address.to_string().as_bytes()).to_string().replace(':', "-");
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(&digest) && name.ends_with(".json") {
            tell(&entry.path())?;
        }
    }
    Ok(())
}

fn io<'a>(attempt: &'static str, path: &'a Path) -> impl Fn(io::Error) -> EndingError + use<'a> {
    move |source| EndingError::Io { attempt, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container_id::ContainerId;
    use samara_store::config::StoreConfig;

    fn held(folder: &Path, resumed: Option<Digest>) -> (Held, Store) {
        let location = Location::folder(folder).unwrap();
        let store = Store::open(&location, &StoreConfig::default(), true).unwrap();
        let lease = store.take_epoch(&Default::default()).unwrap().lease;
        (Held { address: location.to_string(), config: None, lease, carried: true, resumed }, store)
    }

    /// A finished job that were not closed would be done again; one that was only stopped and closed would be lost.
    #[test]
    fn only_the_programs_own_success_closes() {
        let folder = tempfile::tempdir().unwrap();
        let capsule = Digest::of(b"capsule");
        let (held, _) = held(folder.path(), Some(capsule));
        assert_eq!(news(&held, false, Some(0)), Some(News::Finished));
        assert_eq!(news(&held, true, Some(0)), None, "asked to end");
        assert_eq!(news(&held, false, None), None, "nobody knows");
        for (status, words) in [(3 << 8, "status 3"), (11, "SIGSEGV")] {
            let Some(News::FailedResume { manifest, reason }) = news(&held, false, Some(status))
            else {
                panic!("{status}")
            };
            assert!(manifest == capsule && reason.contains(words), "{reason}");
        }
        let anew = Held { resumed: None, ..held.clone() };
        assert_eq!(news(&anew, false, Some(3 << 8)), None, "there is no capsule to blame");
        let elsewhere = Held { carried: false, ..held };
        assert_eq!(news(&elsewhere, false, Some(0)), None, "the address is not the container's");
    }

    /// The store was away when the container ended; the next start must not continue what is finished.
    #[test]
    fn a_note_waits_until_the_store_took_it() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("place");
        let dir = StateDir::claim(root.path(), &ContainerId::parse("a").unwrap()).unwrap();
        let (held, store) = held(&place, None);
        let location = Location::parse(&held.address).unwrap();
        held.save(&dir).unwrap();
        let path = conclude(&dir, Some(0)).unwrap().unwrap();
        assert!(was_seen(&dir));

        let away = root.path().join("away");
        fs::rename(&place, &away).unwrap();
        fs::write(&place, "").unwrap();
        assert!(tell(&path).is_err());
        fs::remove_file(&place).unwrap();
        fs::rename(&away, &place).unwrap();
        tell_all(root.path(), &location).unwrap();
        assert_eq!(store.head().unwrap().state.generation, 1);
        assert!(!path.exists());
        tell(&path).unwrap();
    }

    /// Whoever removes an address wants to begin anew, not to be stopped by what was to be told there.
    #[test]
    fn a_removed_address_is_told_nothing() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("place");
        let dir = StateDir::claim(root.path(), &ContainerId::parse("a").unwrap()).unwrap();
        let (held, _) = held(&place, None);
        held.save(&dir).unwrap();
        let note = conclude(&dir, Some(0)).unwrap().unwrap();
        fs::remove_dir_all(&place).unwrap();
        tell_all(root.path(), &Location::parse(&held.address).unwrap()).unwrap();
        assert!(!note.exists() && !place.exists());
    }

    /// Another copy of the job has taken over: what became of this one concerns nobody.
    #[test]
    fn a_fenced_copy_tells_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::claim(root.path(), &ContainerId::parse("a").unwrap()).unwrap();
        let (held, store) = held(&root.path().join("place"), None);
        held.save(&dir).unwrap();
        store.take_epoch(&Default::default()).unwrap();
        tell(&conclude(&dir, Some(0)).unwrap().unwrap()).unwrap();
        assert_eq!(store.head().unwrap().state.generation, 0);
    }
}
