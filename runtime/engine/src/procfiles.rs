//! Files that the kernel makes up: of `/proc` and `/sys`, namespaces, and descriptors of processes.
//!
//! A file of `/proc/PID` belongs to that process wherever its content is read, so it is opened anew when the processes are
//! there. One that has ended and been waited for is made once more, with its number if that is free, and ends again when the
//! descriptors of it have been made.
//!
//! Limits: what a program has read a part of goes on at the same position in content that is made up anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;

use nix::sys::statfs::statfs;
use samara_capsule::record::{Bytes, EndedDirectory, EndedProcess, FileKind};
use samara_kernel::pidfd::PidFd;
use samara_kernel::{Pid, proc};

use crate::capture::{CaptureError, Tables, index, read};
use crate::descriptors::Found;
use crate::memory::Shared;
use crate::nameless;
use crate::restore::{RestoreError, make};
use crate::root::Root;

/// linux/magic.h
const NSFS: i64 = 0x6e73_6673;
const PROC: i64 = 0x9fa0;
const SYSFS: i64 = 0x6265_6572;
const CGROUP: i64 = 0x0027_e0eb;
const CGROUP2: i64 = 0x6367_7270;

/// As `/proc/PID/ns` names them.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// Which of these kinds a file is; `None`: none of them.
pub(crate) fn classify(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Option<Result<FileKind, String>>, CaptureError> {
    let (device, _) = found.identity();
    let magic = match tables.file_systems.get(&device) {
        Some(magic) => *magic,
        None => {
            let it = statfs(found.link).map_err(io::Error::from).map_err(read(found.link))?;
            *tables.file_systems.entry(device).or_insert(it.filesystem_type().0)
        }
    };
    match magic {
        NSFS => Ok(Some(namespace(found, tables)?)),
        PROC | SYSFS | CGROUP | CGROUP2 => {
            let at_its_path = tables.root.identity(found.target).ok() == Some(found.identity());
            if !at_its_path {
                return Ok(Some(ended_file(found, tables)));
            }
            if is_late(found.target) {
                let name = String::from_utf8_lossy(found.target);
                return Ok(Some(Err(format!("{name} is open, which is not supported"))));
            }
            let kind = found.metadata.file_type();
            if !kind.is_file() && !kind.is_dir() {
                return Ok(None);
            }
            let position = found.info.position;
            if position != 0 && kind.is_file() && !is_seekable(found, position) {
                let name = String::from_utf8_lossy(found.target);
                let what = format!("{name} is open, and can't be read on from the middle");
                return Ok(Some(Err(what)));
            }
            Ok(Some(Ok(FileKind::Pseudo { path: Bytes::from(found.target.to_vec()), position })))
        }
        _ => Ok(None),
    }
}

/// Files that are there only once the process has its descriptors and mappings, which are the last that it gets.
fn is_late(target: &[u8]) -> bool {
    let mut parts = target.split(|&byte| byte == b'/').skip(3);
    let mut kind = parts.next();
    if kind == Some(b"task") {
        kind = parts.nth(1);
    }
    matches!(kind, Some(b"fd" | b"fdinfo" | b"map_files")) && parts.next().is_some()
}

fn is_seekable(found: &Found<'_>, position: u64) -> bool {
    let again = File::open(found.link);
    again.is_ok_and(|mut file| match file.seek(SeekFrom::Start(position)) {
        Ok(_) => true,
        Err(error) => error.raw_os_error() == Some(libc::ESPIPE),
    })
}

fn namespace(
    found: &Found<'_>,
    tables: &Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let target = String::from_utf8_lossy(found.target);
    let name = target.split(':').next().unwrap_or_default();
    let init = tables.request.init;
    if NAMESPACES.contains(&name) {
        let own = proc::namespace(init, name).map_err(read("a namespace of the container"))?;
        if own == found.identity() {
            return Ok(Ok(FileKind::Namespace { name: Bytes::from(name.as_bytes().to_vec()) }));
        }
    }
    Ok(Err(format!("the namespace {target}, which is not the container's, is open")))
}

/// `/proc/PID/…` of a process that is gone.
fn ended_file(found: &Found<'_>, tables: &mut Tables<'_>) -> Result<FileKind, String> {
    let EndedDirectory { process, path } = ended_place(found.target, tables)?;
    Ok(FileKind::EndedPseudo { process, path })
}

/// The place below `/proc` that a working directory is, if it belongs to a process that has ended.
pub(crate) fn ended_directory(
    link: &str,
    target: &[u8],
    identity: (u64, u64),
    tables: &mut Tables<'_>,
) -> Result<Option<Result<EndedDirectory, String>>, CaptureError> {
    let magic = statfs(link).map_err(io::Error::from).map_err(read(link))?;
    let is_there = || tables.root.identity(target).ok() == Some(identity);
    if magic.filesystem_type().0 != PROC || is_there() {
        return Ok(None);
    }
    Ok(Some(ended_place(target, tables)))
}

fn ended_place(target: &[u8], tables: &mut Tables<'_>) -> Result<EndedDirectory, String> {
    let name = || String::from_utf8_lossy(target).into_owned();
    let refusal =
        || format!("{} is open, but no longer at its path, or outside the container", name());
    let below = nameless::former_path(target).strip_prefix(b"/proc/").ok_or_else(refusal)?;
    let below = std::str::from_utf8(below).map_err(|_| refusal())?;
    let (pid, below) = below.split_once('/').unwrap_or((below, ""));
    let pid: i32 = pid.parse().map_err(|_| refusal())?;
    // Of a thread that has ended the process may live on: any ended process does for both.
    let mut parts: Vec<&str> = below.split('/').collect();
    if let ["task", _, ..] = parts.as_slice() {
        parts.drain(..2);
    }
    let below = parts.join("/");
    if below.split('/').any(|part| part.starts_with(|first: char| first.is_ascii_digit())) {
        return Err(format!("{} is open, whose process has ended, which is not supported", name()));
    }
    let process =
        *tables.known_ended.entry((0, u64::from(pid.unsigned_abs()))).or_insert_with(|| {
            tables.ended.push(EndedProcess { pid: Some(pid), exit_status: 0 });
            index(tables.ended.len() - 1)
        });
    Ok(EndedDirectory { process, path: Bytes::from(below.into_bytes()) })
}

/// A descriptor of a process.
pub(crate) fn process(found: &Found<'_>, tables: &mut Tables<'_>) -> Result<FileKind, String> {
    let numbers: Vec<i32> = found
        .line("NSpid")
        .unwrap_or_default()
        .split_ascii_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect();
    let thread = found.info.flags & libc::O_EXCL != 0;
    if let [outermost, .., inner] = *numbers.as_slice()
        && outermost > 0
    {
        // Those of the container are numbered in each of its namespaces.
        let levels = proc::status(tables.request.init).ok().map(|status| status.nspid);
        if levels.is_none_or(|levels| levels.len() != numbers.len()) || inner <= 0 {
            return Err("a descriptor of a process outside the container is open".to_owned());
        }
        tables.watched_processes.push((found.pid, found.fd, outermost));
        return Ok(match thread {
            true => FileKind::ThreadFd { tid: inner },
            false => FileKind::PidFd { pid: inner },
        });
    }
    if numbers.as_slice() != [-1] && numbers.as_slice() != [0] && !numbers.is_empty() {
        return Err("a descriptor of a process outside the container is open".to_owned());
    }
    let exit_status = found
        .borrow()
        .ok()
        .and_then(|descriptor| PidFd::from(descriptor).exit_status())
        .unwrap_or(0);
    let process = *tables.known_ended.entry(found.identity()).or_insert_with(|| {
        tables.ended.push(EndedProcess { pid: None, exit_status });
        index(tables.ended.len() - 1)
    });
    Ok(FileKind::EndedPidFd { process, thread })
}

/// Numbers for processes that are made only to end: their own where it is free.
pub(crate) fn numbers(ended: &[EndedProcess], taken: &BTreeSet<i32>) -> Vec<i32> {
    let mut taken = taken.clone();
    ended
        .iter()
        .map(|process| {
            let own = process.pid.filter(|pid| *pid > 1 && !taken.contains(pid));
            let number = own.unwrap_or_else(|| {
                (2..).find(|number| !taken.contains(number)).expect("numbers do not run out")
            });
            taken.insert(number);
            number
        })
        .collect()
}

/// Opens a file that the kernel makes up, below the container's root.
pub(crate) fn open(
    root: &Root,
    path: &[u8],
    flags: i32,
    position: u64,
) -> Result<File, RestoreError> {
    let file = crate::restore::open_below(root, path, flags)?;
    if position != 0
        && let Err(error) = (&file).seek(SeekFrom::Start(position))
        && error.raw_os_error() != Some(libc::ESPIPE)
    {
        let path = String::from_utf8_lossy(path);
        return Err(make(format!("the position of {path}"))(error));
    }
    Ok(file)
}

/// A file of `/proc/PID` of a process that will end, which has the number `pid` in the container.
pub(crate) fn open_ended(
    root: &Root,
    pid: i32,
    below: &[u8],
    flags: i32,
) -> Result<File, RestoreError> {
    let path = [format!("/proc/{pid}/").as_bytes(), below].concat();
    crate::restore::open_below(root, &path, flags)
}

/// A namespace of the container's init, by its name.
pub(crate) fn open_namespace(init: Pid, name: &[u8], flags: i32) -> Result<File, RestoreError> {
    let name = NAMESPACES
        .into_iter()
        .find(|known| known.as_bytes() == name)
        .ok_or_else(|| RestoreError::Damaged("a namespace has no known name".to_owned()))?;
    let what = || make(format!("the {name} namespace"));
    let namespace = File::open(format!("/proc/{init}/ns/{name}")).map_err(what())?;
    Shared::reopen(&namespace, flags).map_err(what())
}

/// Processes and threads by their numbers in the container, as the engine numbers them.
pub(crate) type Numbers = BTreeMap<i32, Pid>;

/// A descriptor of a process or thread.
pub(crate) fn open_process(
    numbers: &Numbers,
    number: i32,
    thread: bool,
) -> Result<OwnedFd, RestoreError> {
    let pid = numbers.get(&number).ok_or_else(|| {
        RestoreError::Damaged("an open file refers to a process that is not there".to_owned())
    })?;
    let open = if thread { PidFd::open_thread } else { PidFd::open };
    Ok(open(*pid).map_err(make("a descriptor of a process"))?.into())
}
