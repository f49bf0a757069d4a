//! Epoll instances and what they watch.
//!
//! An instance remembers open files, each with the number of the descriptor by which it was registered. The descriptor may be
//! another process's, or have been closed or given to another file since, as long as the file is open somewhere: so files are
//! found by `kcmp(2)`, not by their numbers.
//!
//! Limits: an event that was due on an edge is due again after a restore, as is a hang-up of a one-shot entry that has fired and
//! was not set up again.

use std::os::fd::{AsFd, OwnedFd};

use samara_capsule::record::{Container, FileKind, Watch};
use samara_kernel::epoll::{Interest, add};
use samara_kernel::proc::DescriptorInfo;
use samara_kernel::{Pid, kcmp};

use crate::capture::{CaptureError, Tables, index, read};
use crate::restore::{RestoreError, make};
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
        for (position, line) in instance.lines.iter().enumerate() {
            // Of several under one number the kernel wants to know which.
            let earlier = instance.lines.iter().take(position);
            let nth = index(earlier.filter(|other| other.fd == line.fd).count());
            match find(&instance, line, nth, tables)? {
                Some(file) => {
                    let Line { fd, events, data, .. } = *line;
                    watches.push(Watch { fd, file, events, data });
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

/// The index of the open file that one line means.
fn find(
    instance: &Instance,
    line: &Line,
    nth: u32,
    tables: &Tables<'_>,
) -> Result<Option<u32>, CaptureError> {
    let holders = tables
        .known_files
        .iter()
        .filter(|((_, inode), _)| line.inode.is_none_or(|wanted| wanted == *inode))
        .flat_map(|(_, holders)| holders);
    for (pid, fd, file) in holders {
        let same = kcmp::is_watched((*pid, *fd), (instance.pid, instance.fd), line.fd, nth)
            .map_err(read(format!("what descriptor {} watches", instance.fd)))?;
        if same {
            return Ok(Some(*file));
        }
    }
    Ok(None)
}

/// Lets restored instances watch what they watched. `files` are [`Container::files`].
pub(crate) fn restore(container: &Container, files: &[OwnedFd]) -> Result<(), RestoreError> {
    for (epoll, record) in files.iter().zip(&container.files) {
        let FileKind::Epoll { watches } = &record.kind else { continue };
        let interests = watches
            .iter()
            .map(|watch| {
                let file = files.get(watch.file as usize).filter(|_| watch.fd >= 0);
                let file = file.ok_or_else(|| {
                    RestoreError::Damaged("an epoll watches a file that is not there".to_owned())
                })?;
                let Watch { fd: number, events, data, .. } = *watch;
                Ok(Interest { file: file.as_fd(), number, events, data })
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
