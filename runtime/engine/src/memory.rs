//! Address spaces and shared memory.
//!
//! | mapping | capsule | restore |
//! |---|---|---|
//! | private anonymous | pages that were written | mapped, filled |
//! | private of a file | pages that the process has of its own | file mapped, own pages filled |
//! | shared of a file | nothing: the content belongs to the file | file mapped |
//! | shared anonymous, memfd | pages of the object, once | object made anew, filled, mapped |
//! | vdso and its data | where they were | the new host's own, moved there |
//!
//! Memory is read through `/proc/PID/mem`: `process_vm_readv` pins pages, which makes the kernel copy every page that a
//! forked child still shares with its parent.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use samara_capsule::record::{self, Advice, Backing, FileCheck};
use samara_capsule::transfer::{BATCH_BYTES_MAX, PAGE_BYTES, PageBatch, PageRun, Sink, SpaceId};
use samara_kernel::pagemap::Pagemap;
use samara_kernel::proc::Mapping;
use samara_kernel::{Pid, proc};

use crate::capture::{CaptureError, Tables};
use crate::unsupported::Place;

const PAGE: u64 = PAGE_BYTES as u64;

/// `VmFlags` that a restore brings back, or that follow from what it brings back.
const KNOWN_FLAGS: &[&[u8; 2]] = &[
    b"rd", b"wr", b"ex", b"sh", b"mr", b"mw", b"me", b"ms", b"gd", b"lo", b"lf", b"sr", b"rr",
    b"dc", b"de", b"ac", b"nr", b"sf", b"wf", b"dd", b"sd", b"hg", b"nh", b"mg", b"dw", b"nl",
    b"gu",
];

/// Describes the mappings of a process, and registers the objects that they share.
pub(crate) fn describe(
    pid: Pid,
    mappings: &[Mapping],
    tables: &mut Tables<'_>,
) -> Result<Vec<record::Mapping>, CaptureError> {
    let mut records = Vec::new();
    let mut special = 0;
    for mapping in mappings {
        if mapping.name == "[vsyscall]" {
            continue;
        }
        let protection = u32::from(mapping.read)
            | u32::from(mapping.write) << 1
            | u32::from(mapping.execute) << 2;
        let backing = if is_vdso(mapping) {
            special += 1;
            Backing::Vdso { index: special - 1 }
        } else {
            match backing(pid, mapping, tables)? {
                Ok(backing) => backing,
                Err(what) => {
                    tables.refuse(pid, Place::Mapping(mapping.start), what);
                    continue;
                }
            }
        };
        records.push(record::Mapping {
            start: mapping.start,
            end: mapping.end,
            protection,
            backing,
            advice: advice(mapping),
            guards: Vec::new(),
        });
    }
    Ok(records)
}

pub(crate) fn is_vdso(mapping: &Mapping) -> bool {
    mapping.name == "[vdso]" || mapping.name.as_bytes().starts_with(b"[vvar")
}

fn advice(mapping: &Mapping) -> Advice {
    Advice {
        no_reserve: mapping.has_flag(b"nr"),
        dont_fork: mapping.has_flag(b"dc"),
        dont_dump: mapping.has_flag(b"dd"),
        wipe_on_fork: mapping.has_flag(b"wf"),
        huge_page: mapping.has_flag(b"hg"),
        no_huge_page: mapping.has_flag(b"nh"),
        mergeable: mapping.has_flag(b"mg"),
        sequential: mapping.has_flag(b"sr"),
        random: mapping.has_flag(b"rr"),
        locked: mapping.has_flag(b"lo"),
        locked_on_fault: mapping.has_flag(b"lf"),
        sync_faults: mapping.has_flag(b"sf"),
    }
}

/// What is behind a mapping, or why it can't be saved.
fn backing(
    pid: Pid,
    mapping: &Mapping,
    tables: &mut Tables<'_>,
) -> Result<Result<Backing, String>, CaptureError> {
    let refuse = |what: String| Ok(Err(what));
    if let Some(flag) = mapping.flags.iter().find(|flag| !KNOWN_FLAGS.contains(flag)) {
        let flag = String::from_utf8_lossy(flag.as_slice()).into_owned();
        return refuse(format!("memory with the property `{flag}` of VmFlags is not supported"));
    }
    let name = mapping.name.as_bytes();
    let anonymous = mapping.inode == 0 && (name.is_empty() || name.starts_with(b"["));
    if anonymous && !mapping.shared {
        return Ok(Ok(Backing::Anonymous { grows_down: mapping.has_flag(b"gd") }));
    }
    if name.starts_with(b"anon_inode:")
        || name.starts_with(b"/anon_inode:")
        || name.starts_with(b"socket:")
    {
        return refuse(format!("a mapping of {} is not supported", mapping.name.display()));
    }
    if name.starts_with(b"/SYSV") {
        return refuse("System V shared memory is not supported".to_owned());
    }
    if name.starts_with(b"/anon_hugepage") {
        return refuse("explicit huge pages are not supported".to_owned());
    }
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    let metadata =
        fs::metadata(&link).map_err(|source| CaptureError::Read { what: link.clone(), source })?;
    let identity = (metadata.dev(), metadata.ino());
    let may_write = mapping.has_flag(b"mw");
    let offset = mapping.offset;
    if name.starts_with(b"/memfd:") || name == b"/dev/zero (deleted)" {
        let memfd = name
            .strip_prefix(b"/memfd:")
            .map(|name| name.strip_suffix(b" (deleted)").unwrap_or(name));
        if !mapping.shared {
            return refuse("a private mapping of a memfd is not supported".to_owned());
        }
        let memory = tables.shared_memory(identity, &link, memfd)?;
        return Ok(Ok(Backing::Shared { memory, offset, may_write }));
    }
    if metadata.nlink() == 0 {
        let path = fs::read_link(&link)
            .map_err(|source| CaptureError::Read { what: link.clone(), source })?;
        let file = tables.unlinked(identity, &link, &path, &metadata)?;
        return Ok(Ok(if mapping.shared {
            Backing::SharedUnlinked { file, offset, may_write }
        } else {
            Backing::PrivateUnlinked { file, offset }
        }));
    }
    let path = proc::unescape(Path::new(&mapping.name));
    let path = path.as_os_str().as_bytes();
    match tables.root.identity(path) {
        Ok(found) if found == identity => {}
        Ok(_) | Err(_) => {
            let path = String::from_utf8_lossy(path).into_owned();
            return refuse(format!(
                "the mapped file {path} is no longer at its path, or outside the container"
            ));
        }
    }
    let path = record::Path::from(path.to_vec());
    let check = FileCheck { bytes: metadata.size() };
    Ok(Ok(if mapping.shared {
        Backing::SharedFile { path, offset, may_write, check }
    } else {
        Backing::PrivateFile { path, offset, check }
    }))
}

/// Collects page runs of one space into batches.
pub(crate) struct Batcher<'a> {
    sink: &'a mut dyn Sink,
    space: SpaceId,
    runs: Vec<PageRun>,
    bytes: Vec<u8>,
    exact: bool,
    pub(crate) pages: u64,
}

impl<'a> Batcher<'a> {
    pub(crate) fn new(sink: &'a mut dyn Sink, space: SpaceId) -> Batcher<'a> {
        let bytes = sink.buffer();
        Batcher { sink, space, runs: Vec::new(), bytes, exact: false, pages: 0 }
    }

    /// Adds the pages of `start..end`, whose content `read` supplies: it is given an address and a buffer to fill.
    ///
    /// `exact`: pages of zeros count too.
    pub(crate) fn add(
        &mut self,
        start: u64,
        end: u64,
        exact: bool,
        read: &dyn Fn(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        if exact != self.exact {
            self.flush()?;
            self.exact = exact;
        }
        let mut next = start;
        while next < end {
            let room = (BATCH_BYTES_MAX - self.bytes.len()) as u64;
            let bytes = (end - next).min(room);
            let from = self.bytes.len();
            self.bytes.resize(from + usize::try_from(bytes).expect("at most a batch"), 0);
            read(next, self.bytes.get_mut(from..).expect("just resized"))?;
            self.runs.push(PageRun { first: next / PAGE, count: bytes / PAGE });
            self.pages += bytes / PAGE;
            next += bytes;
            if self.bytes.len() == BATCH_BYTES_MAX {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.runs.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::replace(&mut self.bytes, self.sink.buffer());
        let batch = PageBatch { space: self.space, runs: std::mem::take(&mut self.runs), bytes };
        if self.exact { self.sink.exact_pages(batch) } else { self.sink.pages(batch) }
    }

    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.flush()?;
        Ok(self.pages)
    }
}

/// Copies the private memory of a stopped process, and fills in the guard ranges of its records.
pub(crate) fn copy_private(
    pid: Pid,
    memory: &File,
    space: SpaceId,
    mappings: &mut [record::Mapping],
    sink: &mut dyn Sink,
) -> Result<u64, CaptureError> {
    let failed = |source| CaptureError::Read { what: format!("/proc/{pid}/pagemap"), source };
    let pagemap = Pagemap::open(pid).map_err(failed)?;
    let mut batcher = Batcher::new(sink, space);
    for mapping in mappings {
        let own_only = match mapping.backing {
            Backing::Anonymous { .. } => false,
            Backing::PrivateFile { .. } | Backing::PrivateUnlinked { .. } => true,
            Backing::SharedFile { .. }
            | Backing::SharedUnlinked { .. }
            | Backing::Shared { .. }
            | Backing::Vdso { .. } => continue,
        };
        for run in pagemap.populated(mapping.start, mapping.end).map_err(failed)? {
            if run.guard {
                mapping.guards.push((run.start, run.end));
            } else if !(own_only && run.file) {
                batcher
                    .add(run.start, run.end, own_only, &|address, buffer| {
                        memory.read_exact_at(buffer, address)
                    })
                    .map_err(|source| CaptureError::Pages {
                        pid,
                        start: run.start,
                        end: run.end,
                        source,
                    })?;
            }
        }
    }
    batcher.finish().map_err(|source| CaptureError::Sink { source })
}

/// Copies the data of a file, leaving out its holes.
pub(crate) fn copy_file(
    file: &File,
    space: SpaceId,
    bytes: u64,
    sink: &mut dyn Sink,
) -> Result<u64, CaptureError> {
    use nix::errno::Errno;
    use nix::unistd::{Whence, lseek};
    let failed =
        |source| CaptureError::Read { what: "a shared or unlinked file".to_owned(), source };
    let mut batcher = Batcher::new(sink, space);
    let mut next = 0u64;
    while next < bytes {
        let at = i64::try_from(next).map_err(|_| failed(io::ErrorKind::FileTooLarge.into()))?;
        let data = match lseek(file, at, Whence::SeekData) {
            Ok(data) => data.unsigned_abs(),
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(failed(error.into())),
        };
        let hole = lseek(file, data.cast_signed(), Whence::SeekHole)
            .map_err(|error| failed(error.into()))?;
        let (start, end) =
            (data / PAGE * PAGE, hole.unsigned_abs().min(bytes).next_multiple_of(PAGE));
        let start = start.max(next.next_multiple_of(PAGE));
        if start < end {
            batcher
                .add(start, end, false, &|address, buffer| read_padded(file, buffer, address))
                .map_err(|source| CaptureError::Sink { source })?;
        }
        next = end.max(next + 1);
    }
    batcher.finish().map_err(|source| CaptureError::Sink { source })
}

/// Reads from a file; what lies behind its end is zeros.
fn read_padded(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The mappings of a process less the engine's own, in case an engine that died has left one behind.
pub(crate) fn own_mappings(pid: Pid) -> io::Result<Vec<Mapping>> {
    let mut mappings = proc::mappings(pid)?;
    mappings.sort_by_key(|mapping| mapping.start);
    Ok(mappings)
}
