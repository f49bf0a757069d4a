//! What an open file description makes the kernel tell its owner by signal (`F_SETOWN`, `F_SETSIG`, `O_ASYNC`), and leases.
//!
//! A signal may tell the descriptor, which the kernel takes from the call that asked for signals. So a process of the
//! container asks for them: the owner, if it has the file open, else the first that has.
//!
//! A lease for writing ends when anybody else opens the file, as a capture would to read it: [`crate::files::LeasedFiles`] says how
//! that is avoided. A restore takes leases when nobody opens files any more.
//!
//! Limits: the kernel does not tell by which of several descriptors of one description a program has asked; the lowest is taken.
//! That a directory is watched with `F_NOTIFY` it does not tell at all.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use samara_capsule::record::{
    Alive, Container, FileKind, Lease, Notices, OpenFile, ProcessState, SignalOwner,
};
use samara_kernel::tape::End;
use samara_kernel::{Pid, fcntl, proc};

use crate::capture::{CaptureError, Tables, inner_pid, read};
use crate::descriptors::Found;
use crate::files::leased;
use crate::restore::{RestoreError, make};
use crate::tracee::Process;
use crate::unsupported::Place;

/// linux/fcntl.h
const F_OWNER_PGRP: i32 = 2;

/// What a description tells whom.
pub(crate) fn collect(
    found: &Found<'_>,
    kind: &FileKind,
    tables: &mut Tables<'_>,
) -> Result<Result<Notices, String>, CaptureError> {
    let file = found.borrow()?;
    let owner = fcntl::owner(file.as_fd()).map_err(read(found.link))?;
    let signal = fcntl::signal(file.as_fd()).map_err(read(found.link))?;
    let mut notices = Notices { signal, ..Notices::default() };
    if owner.id != 0 {
        let Some(id) = inner_owner(owner) else {
            return Ok(Err("its signals go to a process outside the container".to_owned()));
        };
        notices.owner = Some(SignalOwner { kind: owner.kind, id });
    }
    if found.metadata.is_file() {
        notices.write_hint = fcntl::write_hint(file.as_fd()).unwrap_or(0);
        notices.lease = lease(found, &file)?;
    }
    if notices.lease.is_some() && matches!(kind, FileKind::Outside { .. }) {
        return Ok(Err("it holds a lease on a file from outside the container".to_owned()));
    }
    if notices.lease.is_some_and(|lease| lease.kind == libc::F_WRLCK) {
        if matches!(kind, FileKind::Unlinked { .. })
            && !leased::is_readable(&file).map_err(read(found.link))?
        {
            let what = "it holds a lease for writing on a file without a name that it can't read";
            return Ok(Err(what.to_owned()));
        }
        tables.leased.insert(found.metadata, file);
        tables.lease_holders.push((found.identity(), found.pid, found.fd));
    }
    Ok(Ok(notices))
}

/// The lease that a description holds.
///
/// While one is being broken, the kernel tells what it is to become, and not what it was.
fn lease(found: &Found<'_>, file: &OwnedFd) -> Result<Option<Lease>, CaptureError> {
    let lines = found.info.others.iter().filter(|(name, _)| name == "lock");
    let Some(line) = lines.map(|(_, line)| line).find(|line| is_lease(line)) else {
        return Ok(None);
    };
    let kind = fcntl::lease(file.as_fd()).map_err(read(found.link))?;
    if !line.contains("BREAKING") {
        return Ok(Some(Lease { kind, breaking_to: None }));
    }
    // One for reading can't become one for reading, and is not had by who writes.
    let writes = found.info.flags & libc::O_ACCMODE != libc::O_RDONLY;
    let was_for_writing = writes || kind == libc::F_RDLCK || keeps_readers_waiting(found)?;
    let was = if was_for_writing { libc::F_WRLCK } else { libc::F_RDLCK };
    Ok(Some(Lease { kind: was, breaking_to: Some(kind) }))
}

/// Whether a lease that is to end altogether keeps readers waiting until then. Opening the file again breaks it no further.
fn keeps_readers_waiting(found: &Found<'_>) -> Result<bool, CaptureError> {
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(found.link);
    match opened {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(read(found.link)(error)),
    }
}

/// Refuses leases for writing on files that are mapped: the mapping that a restore makes would be somebody else's use of the file.
pub(crate) fn refuse_mapped(tables: &mut Tables<'_>) {
    for (identity, pid, fd) in std::mem::take(&mut tables.lease_holders) {
        if tables.mapped_files.contains(&identity) {
            let what =
                "it holds a lease for writing on a file that is mapped, which is not supported";
            tables.refuse(pid, Place::Descriptor(fd), what);
        }
    }
}

/// Whether a line of `fdinfo` about a lock is about a lease: `1: LEASE  ACTIVE    READ 77 fe:01:1234 0 EOF`.
pub(crate) fn is_lease(line: &str) -> bool {
    line.split_ascii_whitespace().nth(1) == Some("LEASE")
}

/// The number in the container of a process, thread or group.
fn inner_owner(owner: fcntl::Owner) -> Option<i32> {
    let levels = |pid: Pid| proc::status(pid).ok().map(|status| status.nspid);
    if let Some(numbers) = levels(owner.id) {
        // A process of the engine's own namespace has one number.
        return (numbers.len() > 1).then(|| numbers.last().copied()).flatten();
    }
    if owner.kind != F_OWNER_PGRP {
        return inner_pid(owner.id).ok();
    }
    // Its leader has ended.
    proc::processes().ok()?.into_iter().find_map(|pid| {
        let stat = proc::stat(pid).ok().filter(|stat| stat.pgrp == owner.id)?;
        proc::status(stat.pid).ok()?.nspgid.last().copied()
    })
}

/// Who asks for the signals of each description: its index, by process with the descriptor there.
pub(crate) fn registrars(container: &Container) -> BTreeMap<i32, Vec<(i32, u32)>> {
    let mut chosen: BTreeMap<u32, (i32, i32)> = BTreeMap::new();
    for process in &container.processes {
        let ProcessState::Alive(alive) = &process.state else { continue };
        for descriptor in &alive.descriptors {
            let Some(file) = container.files.get(descriptor.file as usize) else { continue };
            if !has_notices(file) {
                continue;
            }
            let owner = file.notices.owner.map(|owner| owner.id);
            let place = (process.pid, descriptor.fd);
            let known = chosen.entry(descriptor.file).or_insert(place);
            if Some(known.0) != owner && Some(process.pid) == owner {
                *known = place;
            }
        }
    }
    let mut registrars: BTreeMap<i32, Vec<(i32, u32)>> = BTreeMap::new();
    for (file, (pid, fd)) in chosen {
        registrars.entry(pid).or_default().push((fd, file));
    }
    registrars
}

/// Whether a process has to ask for what a description sends.
pub(crate) fn has_notices(file: &OpenFile) -> bool {
    let Notices { owner, signal, lease, write_hint: _ } = file.notices;
    let is_outside = matches!(file.kind, FileKind::Outside { .. });
    let is_async = file.flags & libc::O_ASYNC != 0;
    !is_outside && (owner.is_some() || signal != 0 || lease.is_some() || is_async)
}

/// Lets a process ask for the signals that it is to ask for: its descriptors, and the files as the engine has them.
pub(crate) fn restore(
    process: &mut Process,
    asks: &[(i32, u32)],
    container: &Container,
    files: &[OwnedFd],
) -> Result<(), RestoreError> {
    /// Files for which one tape asks: each takes some calls, and a few words of data.
    const AT_ONCE: usize = 256;
    for group in asks.chunks(AT_ONCE) {
        let records = || {
            group.iter().filter_map(|(fd, file)| {
                let record = container.files.get(*file as usize)?;
                Some((u64::from(fd.unsigned_abs()), record, files.get(*file as usize)?))
            })
        };
        let command = |number: i32| u64::from(number.unsigned_abs());
        let mut tape = process.tape()?;
        for (fd, record, _) in records() {
            let Some(lease) = record.notices.lease else { continue };
            let set = [fd, command(libc::F_SETLEASE), command(lease.kind), 0, 0, 0];
            tape.call("take a lease again", libc::SYS_fcntl, set);
            // That it is broken below is no news to whom the signals would go by default.
            let nobody = tape.words(&[1]);
            let set = [fd, command(fcntl::SET_OWNER), nobody, 0, 0, 0];
            tape.call("silence a lease", libc::SYS_fcntl, set);
        }
        process.run_all(0, &tape, End::Breakpoint)?;
        for (_, record, file) in records() {
            if let Some(Lease { breaking_to: Some(kind), .. }) = record.notices.lease {
                begin_break(file, kind).map_err(make("the break of a lease"))?;
            }
        }
        let mut tape = process.tape()?;
        for (fd, record, _) in records() {
            let Notices { owner, signal, .. } = record.notices;
            if let Some(owner) = owner {
                let [kind, id] = [owner.kind, owner.id].map(|n| u64::from(n.cast_unsigned()));
                let owner = tape.words(&[kind | id << 32]);
                let set = [fd, command(fcntl::SET_OWNER), owner, 0, 0, 0];
                // Whoever it was may have ended.
                tape.try_call("set the owner of a file", libc::SYS_fcntl, set);
            }
            if signal != 0 {
                let set = [fd, command(fcntl::SET_SIGNAL), command(signal), 0, 0, 0];
                tape.call("set the signal of a file", libc::SYS_fcntl, set);
            }
            if record.flags & libc::O_ASYNC != 0 {
                let set = [fd, command(libc::F_SETFL), command(record.flags), 0, 0, 0];
                tape.call("ask for the signals of a file", libc::SYS_fcntl, set);
            }
        }
        process.run_all(0, &tape, End::Breakpoint)?;
    }
    Ok(())
}

/// Opens a file as whoever waits for its lease to become `kind`, without waiting.
fn begin_break(file: &OwnedFd, kind: i32) -> io::Result<()> {
    let opened = File::options()
        .read(kind == libc::F_RDLCK)
        .write(kind != libc::F_RDLCK)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    match opened {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other.map(drop),
    }
}

/// Whether a process is to ask for anything.
pub(crate) fn of_process<'a>(
    registrars: &'a BTreeMap<i32, Vec<(i32, u32)>>,
    alive: &Alive,
) -> &'a [(i32, u32)] {
    let pid = alive.threads.first().map_or(0, |leader| leader.tid);
    registrars.get(&pid).map_or(&[], Vec::as_slice)
}
