//! Epoll instances and what they watch.
//!
//! An instance remembers open files, each with the number of the descriptor by which it was registered. The descriptor may be
//! another process's, or have been closed or given to another file since, as long as the file is open somewhere: so files are
//! found by `kcmp(2)`, not by their numbers.
//!
//! A signalfd wakes the process in whose context it was registered, so that is done by a process of the container; every other
//! file is registered by the engine.
//!
//! An entry for edges tells of a file once. The kernel does not say which entries have; but where an instance has nothing to tell,
//! all have whose files are ready. They are used up when they are restored, unless their files are ready for more by then, as a
//! connection is that had to be closed.
//!
//! Limits: where something is due on one entry, edges that others have told of are due again after a restore. A one-shot entry
//! that has fired and was not set up again reports a later hang-up, if its file is ready for nothing when it is restored.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd, RawFd};

use samara_capsule::record::{Container, FileKind, ProcessState, Watch};
use samara_kernel::epoll::{Interest, add};
use samara_kernel::pidfd::PidFd;
use samara_kernel::proc::DescriptorInfo;
use samara_kernel::{Pid, kcmp};

use crate::capture::{CaptureError, Tables, index, read};
use crate::restore::{RestoreError, make};
use crate::tracee::Tape;
use crate::unsupported::Place;

/// An instance that was found, with what `fdinfo` says it watches.
#[derive(Debug)]
pub(crate) struct Instance {
    /// Index into [`Container::files`].
    file: u32,
    pid: Pid,
    fd: i32,
    lines: Vec<Line>,
}

/// `tfd:        4 events: 19 data:                4  pos:0 ino:29755e sdev:f`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line {
    fd: i32,
    events: u32,
    data: u64,
    inode: Option<u64>,
}

/// Notes an instance. What it watches is looked up by [`resolve`] when all descriptors have been seen.
pub(crate) fn note(pid: Pid, fd: i32, info: &DescriptorInfo, tables: &mut Tables<'_>) -> FileKind {
    let lines = info.others.iter().filter(|(name, _)| name == "tfd");
    let parsed: Vec<Option<Line>> = lines.map(|(_, value)| parse(value)).collect();
    match parsed.into_iter().collect::<Option<Vec<Line>>>() {
        Some(lines) => {
            let file = index(tables.files.len());
            tables.epolls.push(Instance { file, pid, fd, lines });
        }
        None => tables.refuse(pid, Place::Descriptor(fd), "what it watches is not understood"),
    }
    FileKind::Epoll { watches: Vec::new() }
}

fn parse(line: &str) -> Option<Line> {
    let mut words = line.split_ascii_whitespace();
    let fd = words.next()?.parse().ok()?;
    let mut after = |name: &str| {
        words.next().filter(|word| *word == name)?;
        u64::from_str_radix(words.next()?, 16).ok()
    };
    let events = u32::try_from(after("events:")?).ok()?;
    let data = after("data:")?;
    let inode = words
        .find_map(|word| word.strip_prefix("ino:"))
        .and_then(|inode| u64::from_str_radix(inode, 16).ok());
    Some(Line { fd, events, data, inode })
}

/// Finds the files that the noted instances watch.
pub(crate) fn resolve(tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    for instance in std::mem::take(&mut tables.epolls) {
        let mut watches: Vec<Watch> = Vec::with_capacity(instance.lines.len());
        let is_quiet = ready_for((instance.pid, instance.fd), libc::EPOLLIN.cast_unsigned())? == 0;
        for (position, line) in instance.lines.iter().enumerate() {
            // Of several under one number the kernel wants to know which.
            let earlier = instance.lines.iter().take(position);
            let nth = index(earlier.filter(|other| other.fd == line.fd).count());
            match find(&instance, line, nth, tables)? {
                Some(Held { file, .. }) if !is_registrable(&instance, line, file, tables) => {
                    let what = format!(
                        "it watches signals, registered as descriptor {}, which is another file now",
                        line.fd
                    );
                    tables.refuse(instance.pid, Place::Descriptor(instance.fd), what);
                }
                Some(Held { holder, file }) => {
                    let Line { fd, events, data, .. } = *line;
                    let told = if is_quiet { ready_edge(holder, events)? } else { 0 };
                    watches.push(Watch { fd, file, events, data, told });
                }
                None => {
                    let what = format!(
                        "it watches a file, registered as descriptor {}, that is open outside the container only",
                        line.fd
                    );
                    tables.refuse(instance.pid, Place::Descriptor(instance.fd), what);
                }
            }
        }
        if let Some(file) = tables.files.get_mut(instance.file as usize) {
            file.kind = FileKind::Epoll { watches };
        }
    }
    Ok(())
}

/// What a file is ready for of what an entry for edges asks, including what every entry is told.
fn ready_edge(holder: (Pid, RawFd), events: u32) -> Result<u32, CaptureError> {
    match events & libc::EPOLLET.cast_unsigned() {
        0 => Ok(0),
        _ => ready_for(holder, events),
    }
}

fn ready_for((pid, fd): (Pid, RawFd), events: u32) -> Result<u32, CaptureError> {
    PidFd::open(pid)
        .and_then(|process| process.get_fd(fd))
        .and_then(|file| samara_kernel::epoll::ready(file.as_fd(), events))
        .map_err(read(format!("what descriptor {fd} of process {pid} is ready for")))
}

/// An open file by its index, and a descriptor of it.
struct Held {
    holder: (Pid, RawFd),
    file: u32,
}

/// The open file that one line means.
fn find(
    instance: &Instance,
    line: &Line,
    nth: u32,
    tables: &Tables<'_>,
) -> Result<Option<Held>, CaptureError> {
    let holders = || {
        tables
            .known_files
            .iter()
            .filter(|((_, inode), _)| line.inode.is_none_or(|wanted| wanted == *inode))
            .flat_map(|(_, holders)| holders)
    };
    // All eventfds, timers and their like have one inode, and the kernel looks through the whole instance for each question: who
    // still has the number is asked first, which mostly is the answer.
    let likely = holders().filter(|(_, fd, _)| *fd == line.fd);
    let others = holders().filter(|(_, fd, _)| *fd != line.fd);
    for (pid, fd, file) in likely.chain(others) {
        let same = kcmp::is_watched((*pid, *fd), (instance.pid, instance.fd), line.fd, nth)
            .map_err(read(format!("what descriptor {} watches", instance.fd)))?;
        if same {
            return Ok(Some(Held { holder: (*pid, *fd), file: *file }));
        }
    }
    Ok(None)
}

/// Whether a restore can register the file again: signals need a process that has both descriptors.
fn is_registrable(instance: &Instance, line: &Line, file: u32, tables: &Tables<'_>) -> bool {
    let is_signals = tables.files.get(file as usize).is_some_and(|file| takes_signals(&file.kind));
    let holders = tables.known_files.values().flatten();
    let same = |pid, fd| kcmp::file((instance.pid, line.fd), (pid, fd)).is_ok_and(|o| o.is_eq());
    !is_signals || holders.filter(|holder| holder.2 == file).any(|(pid, fd, _)| same(*pid, *fd))
}

fn takes_signals(kind: &FileKind) -> bool {
    matches!(kind, FileKind::SignalFd { .. })
}

/// What processes have to register themselves: by process, its descriptor of the instance and the watch.
pub(crate) type OwnWatches = BTreeMap<i32, Vec<(i32, Watch)>>;

/// Signals that instances watch, each with the first process that has both descriptors.
///
/// # Errors
/// There is none: such an instance is not saved.
pub(crate) fn own_watches(container: &Container) -> Result<OwnWatches, RestoreError> {
    let mut own = OwnWatches::new();
    for (epoll, record) in (0u32..).zip(&container.files) {
        let FileKind::Epoll { watches } = &record.kind else { continue };
        for watch in watches.iter().filter(|watch| is_own(container, watch)) {
            let registrar = container.processes.iter().find_map(|process| {
                let ProcessState::Alive(alive) = &process.state else { return None };
                let descriptors = &alive.descriptors;
                let instance = descriptors.iter().find(|descriptor| descriptor.file == epoll)?;
                descriptors
                    .iter()
                    .any(|descriptor| descriptor.file == watch.file && descriptor.fd == watch.fd)
                    .then_some((process.pid, instance.fd))
            });
            let (pid, instance) = registrar.ok_or_else(|| {
                RestoreError::Damaged("an epoll watches signals that no process can".to_owned())
            })?;
            own.entry(pid).or_default().push((instance, *watch));
        }
    }
    Ok(own)
}

fn is_own(container: &Container, watch: &Watch) -> bool {
    container.files.get(watch.file as usize).is_some_and(|file| takes_signals(&file.kind))
}

/// Lets a process register what it has to register itself.
pub(crate) fn register(tape: &mut Tape, watches: &[(i32, Watch)]) {
    for (instance, watch) in watches {
        // `struct epoll_event` is packed: the data follow the events at once.
        let event = [&watch.events.to_le_bytes()[..], &watch.data.to_le_bytes()].concat();
        let event = tape.data(&event);
        let add = u64::from(libc::EPOLL_CTL_ADD.unsigned_abs());
        let [instance, fd] = [*instance, watch.fd].map(|fd| u64::from(fd.unsigned_abs()));
        tape.call("watch signals", libc::SYS_epoll_ctl, [instance, add, fd, event, 0, 0]);
    }
}

/// The instances among [`Container::files`], each with what it watches, and after those that it watches.
fn inner_first(container: &Container) -> Vec<(usize, &[Watch])> {
    /// More than the kernel allows (EP_MAX_NESTS of fs/eventpoll.c).
    const DEPTH_MAX: usize = 8;
    fn visit<'a>(
        container: &'a Container,
        file: usize,
        depth: usize,
        seen: &mut BTreeSet<usize>,
        order: &mut Vec<(usize, &'a [Watch])>,
    ) {
        let record = container.files.get(file);
        let Some(FileKind::Epoll { watches }) = record.map(|file| &file.kind) else { return };
        if depth < DEPTH_MAX && seen.insert(file) {
            for watch in watches {
                visit(container, watch.file as usize, depth + 1, seen, order);
            }
            order.push((file, watches));
        }
    }
    let (mut seen, mut order) = (BTreeSet::new(), Vec::new());
    for file in 0..container.files.len() {
        visit(container, file, 0, &mut seen, &mut order);
    }
    order
}

/// Lets restored instances watch what they watched. `files` are [`Container::files`].
pub(crate) fn restore(container: &Container, files: &[OwnedFd]) -> Result<(), RestoreError> {
    for (epoll, watches) in inner_first(container) {
        let Some(epoll) = files.get(epoll) else { continue };
        let interests = watches
            .iter()
            .filter(|watch| !is_own(container, watch))
            .map(|watch| {
                let file = files.get(watch.file as usize).filter(|_| watch.fd >= 0);
                let file = file.ok_or_else(|| {
                    RestoreError::Damaged("an epoll watches a file that is not there".to_owned())
                })?;
                let Watch { fd: number, events, data, told, .. } = *watch;
                Ok(Interest { file: file.as_fd(), number, events, data, told })
            })
            .collect::<Result<Vec<_>, RestoreError>>()?;
        add(epoll.as_fd(), &interests).map_err(make("what an epoll watches"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry that is misread wakes a program for another file, or never.
    #[test]
    fn lines_are_read_as_the_kernel_writes_them() {
        let line = "       4 events: 40000019 data: ffffffff00000004  pos:0 ino:29755e sdev:f";
        let expected =
            Line { fd: 4, events: 0x4000_0019, data: 0xffff_ffff_0000_0004, inode: Some(0x29755e) };
        assert_eq!(parse(line), Some(expected));
        assert_eq!(
            parse("4 events: 1 data: 2"),
            Some(Line { fd: 4, events: 1, data: 2, inode: None })
        );
        assert_eq!(parse("4 data: 2 events: 1"), None);
    }
}
