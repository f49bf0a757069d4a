//! Capture of a tree, and its application to another one.
//!
//! Capture is a walk, which finds what is to be told ([`Finding`]) in the order of the layer, and a writer, which tells
//! it. A directory comes before what is in it, and all that is in it comes before anything else. Application relies on
//! that order: when a directory has been left, whatever is in it and was not in the layer is put right, and last its
//! own metadata.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use samara_capsule::transfer::{BATCH_BYTES_MAX, SEGMENT_BYTES_MAX};

use super::content::{BUFFER_BYTES, CopyError, Segment, read_segment, segments, write_segment};
use super::known::{Name, Out, Plain, Segments};
use super::layer::{
    BLOCK_BYTES, Content, DecodeError, EncodeError, Entry, LayerReader, LayerWriter, Socket,
    encode_sockets,
};
use super::leased::{self, LeasedFiles};
use super::metadata::{self, Metadata, Object};
use super::moment::{self, LeftAlone};
use super::revert::Base;
use super::root::{
    ENGINE_PATHS, NamesByDirectory, Overlay, RootChanges, add_with_parents, all_names,
};
use super::tree::{
    Kind, Stat, Time, Tree, TreePath, names, open_file, open_subdir, stat_fd, stat_name,
};
use super::{
    ApplyError, ApplyReport, Attempt, CaptureError, DeviceNode, DeviceNodes, GivenNodes, HostError,
    LayerReport, SocketNode,
};

/// Writes what changed in a container's root, or all of it where there is no base image, as a layer.
///
/// The processes that can change the root must be stopped. On success the stream is complete. On failure it ends
/// somewhere and must be dropped; the root is as it was in both cases, access times included but for those of `leased`
/// files, which are not opened.
pub fn capture_root(
    root: &RootChanges,
    leased: &LeasedFiles,
    out: &mut dyn Write,
) -> Result<LayerReport, CaptureError> {
    tell_root(root, leased, &mut Plain::new(out))
}

/// As [`capture_root`], but passes the layer on in segments, and reads only what is not known to be stored. While the container runs
/// ([`super::KnownFiles::ahead`]) what can't be read or changes is passed over, and the report is of no use.
pub fn store_root(
    root: &RootChanges,
    leased: &LeasedFiles,
    segments: &mut Segments<'_>,
) -> Result<LayerReport, CaptureError> {
    tell_root(root, leased, segments)
}

fn tell_root(
    root: &RootChanges,
    leased: &LeasedFiles,
    out: &mut dyn Out,
) -> Result<LayerReport, CaptureError> {
    let merged = root.merged()?;
    let changes = match &root.overlay {
        Some(overlay) => Some(Changes::of(overlay, &merged)?),
        None => None,
    };
    capture(&merged, changes.as_ref(), &GivenNodes::default(), leased, out)
}

/// Writes the whole tree at `dir`, its root's own metadata included, as a layer. Neither what is mounted below nor `given` nodes
/// are part of it. As [`capture_root`] otherwise.
pub fn capture_tree(
    dir: OwnedFd,
    given: &GivenNodes,
    leased: &LeasedFiles,
    out: &mut dyn Write,
) -> Result<LayerReport, CaptureError> {
    let tree = Tree::at(dir).attempt("look up", "/")?;
    capture(&tree, None, given, leased, &mut Plain::new(out))
}

/// As [`capture_tree`], in segments, as [`store_root`].
pub fn store_tree(
    dir: OwnedFd,
    given: &GivenNodes,
    leased: &LeasedFiles,
    segments: &mut Segments<'_>,
) -> Result<LayerReport, CaptureError> {
    let tree = Tree::at(dir).attempt("look up", "/")?;
    capture(&tree, None, given, leased, segments)
}

/// Makes a container's root equal to the one that was captured.
///
/// To be called before anything is mounted over the root and before any process runs in it. `stream` holds either
/// changes to the base image that `target` has ([`super::base_fingerprint`] tells; the caller compares), or a whole
/// tree. On failure the root is in a state between, and must not be used: applying again starts over and is right.
///
/// Device nodes that `devices` does not allow are refused. Whether a container may open one is for its device rules to say; but a
/// volume shows its nodes to others, too.
pub fn apply_root(
    target: &RootChanges,
    devices: &DeviceNodes,
    stream: &mut dyn Read,
) -> Result<ApplyReport, ApplyError> {
    let merged = target.merged()?;
    let base = match &target.overlay {
        Some(overlay) => Some(Base::of(overlay, &merged)?),
        None => None,
    };
    let needs_base = || ApplyError::NeedsBase { root: target.root.clone() };
    let application =
        Application::new(&merged, base.as_ref(), devices, &GivenNodes::default()).run(stream)?;
    application.ok_or_else(needs_base)
}

/// Makes the tree at `dir` equal to the one that was captured. Names that something is mounted on are left alone, and so are
/// `given` nodes that the stream does not have. As [`apply_root`] otherwise.
pub fn apply_tree(
    dir: OwnedFd,
    devices: &DeviceNodes,
    given: &GivenNodes,
    stream: &mut dyn Read,
) -> Result<ApplyReport, ApplyError> {
    let tree = Tree::at(dir).attempt("look up", "/")?;
    Application::new(&tree, None, devices, given)
        .run(stream)?
        .ok_or_else(|| ApplyError::NeedsBase { root: "/".into() })
}

// Capture.

/// What tells the names that differ from the base image.
struct Changes<'a> {
    overlay: &'a Overlay,
    /// None for a mount that can't be written to.
    upper: Option<Tree>,
    /// Names that are told whether they changed or not.
    always: NamesByDirectory,
}

impl<'a> Changes<'a> {
    fn of(overlay: &'a Overlay, merged: &Tree) -> Result<Changes<'a>, CaptureError> {
        let upper = overlay
            .upper
            .as_deref()
            .map(|path| Tree::beneath_mounts(path).attempt("open", path))
            .transpose()?;
        let mut always = match overlay.index {
            true => overlay.indexed_names(merged, &overlay.base_view(&overlay.lowers)?.tree)?,
            false => NamesByDirectory::new(),
        };
        for path in ENGINE_PATHS {
            add_with_parents(&mut always, &TreePath::parse(path.as_bytes()).expect("a fixed path"));
        }
        let mut changes = Changes { overlay, upper, always };
        if overlay.index || overlay.redirects {
            for (dir, names) in changes.untold_names(merged)? {
                changes.always.entry(dir).or_default().extend(names);
            }
        }
        Ok(changes)
    }

    /// The names of those files that would be told under some of their names only: files of the lower layers that
    /// changed under one name and show it under all, or that have a name below a directory that was renamed.
    fn untold_names(&self, merged: &Tree) -> Result<NamesByDirectory, CaptureError> {
        let mut told: HashMap<_, (u32, u32)> = HashMap::new();
        walk(merged, Some(self), None, &mut |_, stat, finding| {
            if matches!(finding, Finding::Object { .. }) && stat.links > 1 {
                told.entry(stat.identity).or_insert((stat.links, 0)).1 += 1;
            }
            Ok(())
        })?;
        let untold = told
            .iter()
            .filter(|(_, (links, told))| told < links)
            .map(|(identity, _)| *identity)
            .collect();
        Ok(all_names(merged, &untold)?)
    }
}

/// What the walk finds, in the order of the layer.
enum Finding<'a> {
    Directory {
        dir: &'a Rc<OwnedFd>,
        opaque: bool,
        sockets: Vec<Socket>,
    },
    /// Anything but directories and sockets.
    Object {
        dir: &'a Rc<OwnedFd>,
        name: &'a OsStr,
    },
    Removed,
    /// Something is mounted there, and what lies below can't be seen.
    Covered,
}

fn capture(
    tree: &Tree,
    changes: Option<&Changes<'_>>,
    given: &GivenNodes,
    leased: &LeasedFiles,
    out: &mut dyn Out,
) -> Result<LayerReport, CaptureError> {
    let upper = changes.and_then(|changes| changes.upper.as_ref());
    let keeps_times = match changes {
        Some(_) => upper.is_some_and(moment::keeps_times),
        None => moment::keeps_times(tree),
    };
    let alone = out.left_alone().cloned();
    let mut writing = Writing {
        mapped_in_upper: upper
            .and_then(|upper| upper.stat(&TreePath::root()).ok().flatten())
            .zip(out.moment())
            .is_some_and(|(stat, moment)| {
                let (major, minor, _) = stat.identity;
                moment.maps_some_of((major, minor))
            }),
        out,
        alone: alone.as_ref(),
        keeps_times,
        upper,
        leased,
        report: LayerReport::default(),
        first_names: HashMap::new(),
        run: Run::default(),
        buffer: vec![0; BUFFER_BYTES],
    };
    walk(
        tree,
        changes,
        alone.as_ref(),
        &mut |path, stat, finding| match is_given(given, path, stat) {
            true => Ok(()),
            false => writing.write(path, stat, finding),
        },
    )?;
    writing.end()
}

fn is_given(given: &GivenNodes, path: &TreePath, stat: &Stat) -> bool {
    let (major, minor) = stat.device;
    let block = stat.kind == Kind::BlockDevice;
    (block || stat.kind == Kind::CharDevice)
        && given.contains(&path.absolute(), DeviceNode { block, major, minor })
}

type Visit<'a> = dyn FnMut(&TreePath, &Stat, Finding<'_>) -> Result<(), CaptureError> + 'a;

/// Visits a whole tree, or those parts of it that changed. With `alone`, the tree may change meanwhile: what is gone is passed over,
/// and what is to be left alone is, with all below it.
fn walk(
    tree: &Tree,
    changes: Option<&Changes<'_>>,
    alone: Option<&LeftAlone>,
    visit: &mut Visit<'_>,
) -> Result<(), CaptureError> {
    // With each directory: whether only changes are told below it.
    let mut pending = vec![(TreePath::root(), changes)];
    while let Some((path, changes)) = pending.pop() {
        let visited = visit_directory(tree, &path, changes, alone, visit, &mut pending);
        match visited {
            Err(CaptureError::Host(_) | CaptureError::Changed { .. }) if alone.is_some() => {}
            visited => visited?,
        }
    }
    Ok(())
}

fn visit_directory<'c>(
    tree: &Tree,
    path: &TreePath,
    mut changes: Option<&'c Changes<'c>>,
    alone: Option<&LeftAlone>,
    visit: &mut Visit<'_>,
    pending: &mut Vec<(TreePath, Option<&'c Changes<'c>>)>,
) -> Result<(), CaptureError> {
    if let Some(alone) = alone.filter(|alone| alone.watches_anything()) {
        let stat = tree.stat(path).attempt("look up", path)?;
        if stat.is_none_or(|stat| alone.contains(&stat)) {
            return Ok(());
        }
    }
    let dir = Rc::new(tree.dir(path).attempt("open", path)?);
    let own = stat_fd(&*dir).attempt("look up", path)?;
    let mut opaque = changes.is_none() && path.is_root();
    let mut found: Vec<OsString> = Vec::new();
    if let Some(c) = changes {
        let upper_dir = match &c.upper {
            Some(upper) => upper.dir_if_any(path).attempt("open the upper layer's", path)?,
            None => None,
        };
        if let Some(upper_dir) = upper_dir {
            let marks = c.overlay.marks(&upper_dir).attempt("read overlay attributes of", path)?;
            if marks.opaque || marks.redirect {
                // What lies below has nothing to do with the base image's directory of this name.
                opaque = true;
                changes = None;
            } else {
                found = names(&upper_dir).attempt("list the upper layer's", path)?;
            }
        }
        if let Some(always) = c.always.get(path).filter(|_| !opaque) {
            let all: BTreeSet<_> = found.into_iter().chain(always.iter().cloned()).collect();
            found = all.into_iter().collect();
        }
    }
    if changes.is_none() {
        found = names(&*dir).attempt("list", path)?;
    }

    let mut children = Vec::with_capacity(found.len());
    let mut sockets = Vec::new();
    for name in found {
        let child = path
            .child(&name)
            .map_err(|why| CaptureError::Unsupported { path: path.absolute().join(&name), why })?;
        let stat = stat_name(&*dir, &name).attempt("look up", &child)?;
        if let Some(stat) = stat.filter(|s| s.kind == Kind::Socket && s.mount == tree.mount) {
            let xattrs = metadata::xattrs(Object::Named(dir.as_fd(), &name))
                .attempt("read attributes of", &child)?;
            sockets.push(Socket { name, metadata: Metadata::of(&stat, xattrs) });
        } else {
            children.push((child, stat));
        }
    }
    visit(path, &own, Finding::Directory { dir: &dir, opaque, sockets })?;
    let mut directories = Vec::new();
    for (child, stat) in children {
        let (_, name) = child.split().expect("a child is not the root");
        match stat {
            // Any form of whiteout: the upper layer has a name that the merged view has not.
            None if changes.is_some() => visit(&child, &own, Finding::Removed)?,
            None if alone.is_some() => {}
            None => {
                return Err(CaptureError::Changed {
                    path: child.absolute(),
                    what: "it was removed",
                });
            }
            Some(stat) if stat.mount != tree.mount => visit(&child, &stat, Finding::Covered)?,
            Some(stat) if stat.kind == Kind::Directory => directories.push((child, changes)),
            Some(stat) => visit(&child, &stat, Finding::Object { dir: &dir, name })?,
        }
    }
    pending.extend(directories.into_iter().rev());
    Ok(())
}

/// A file of at least this size is cut out of what is around it: its content makes segments of its own.
const LARGE_BYTES: u64 = 1 << 20;

/// Such content is cut at multiples of this offset, so that what grows or changes in one place is stored anew there. A
/// capsule's manifest has room for 100,000 segments.
const PIECE_BYTES: u64 = 4 << 20;

/// A run of entries ends where its bytes exceed the first of these, and the digest of a path says so, or else at the second.
/// So what is added or removed moves the ends of few others, and a run takes about 1.3 MiB where files are small.
const RUN_BYTES_MIN: u64 = 1 << 20;
const RUN_BYTES_MAX: u64 = 4 << 20;
const RUN_END_MASK: u8 = 63;

/// A run has at most so many entries, and so many directories, which are kept open.
const RUN_ENTRIES_MAX: usize = 4096;
const RUN_DIRECTORIES_MAX: usize = 32;

/// Consecutive entries that are stored together. None of them has been read so far.
#[derive(Default)]
struct Run {
    entries: Vec<RunEntry>,
    directories: usize,
    bytes: u64,
    /// Something in it can't be proven by times.
    is_uncertain: bool,
}

struct RunEntry {
    path: TreePath,
    stat: Stat,
    /// Of a directory itself, of anything else the directory that it is in.
    dir: Option<Rc<OwnedFd>>,
    told: Told,
}

/// What an entry tells.
enum Told {
    Directory {
        sockets: Vec<Socket>,
    },
    Opaque,
    Removed,
    HardLink {
        target: TreePath,
    },
    /// Anything but directories and files.
    Object,
    File,
    /// The headers of a file whose content follows the run.
    Large {
        segments: Option<Vec<Segment>>,
    },
}

struct Writing<'a, 'o> {
    out: &'o mut dyn Out,
    alone: Option<&'a LeftAlone>,
    /// Whether the file system is one on which times prove something.
    keeps_times: bool,
    /// Whether a file of the upper layer's own device is mapped, as older kernels show mapped files of overlays.
    mapped_in_upper: bool,
    upper: Option<&'a Tree>,
    leased: &'a LeasedFiles,
    report: LayerReport,
    /// Files with several names, by identity: the name they were told under.
    first_names: HashMap<(u32, u32, u64), TreePath>,
    run: Run,
    buffer: Vec<u8>,
}

impl<'a> Writing<'a, '_> {
    fn write(
        &mut self,
        path: &TreePath,
        stat: &Stat,
        finding: Finding<'_>,
    ) -> Result<(), CaptureError> {
        match finding {
            Finding::Directory { dir, opaque, sockets } => {
                self.note_flags(path, stat);
                for Socket { name, metadata: Metadata { mode, uid, gid, .. } } in &sockets {
                    let path = path.absolute().join(name);
                    self.report.sockets.push(SocketNode {
                        path,
                        mode: *mode,
                        uid: *uid,
                        gid: *gid,
                    });
                }
                if self.run.directories == RUN_DIRECTORIES_MAX {
                    self.end_run()?;
                }
                self.run.directories += 1;
                self.add(path, stat, Some(dir), Told::Directory { sockets })?;
                if opaque { self.add(path, stat, None, Told::Opaque) } else { Ok(()) }
            }
            Finding::Removed => {
                self.report.whiteouts += 1;
                self.add(path, stat, None, Told::Removed)
            }
            Finding::Covered => {
                self.report.covered.push(path.absolute());
                Ok(())
            }
            Finding::Object { dir, name } => {
                self.note_flags(path, stat);
                if stat.links > 1 {
                    if let Some(target) = self.first_names.get(&stat.identity) {
                        let target = target.clone();
                        return self.add(path, stat, Some(dir), Told::HardLink { target });
                    }
                    self.first_names.insert(stat.identity, path.clone());
                }
                match stat.kind {
                    Kind::File if stat.size >= LARGE_BYTES => self.large(path, stat, dir, name),
                    Kind::File => self.add(path, stat, Some(dir), Told::File),
                    Kind::Symlink | Kind::Fifo | Kind::CharDevice | Kind::BlockDevice => {
                        self.add(path, stat, Some(dir), Told::Object)
                    }
                    Kind::Directory | Kind::Socket => {
                        unreachable!("the walk tells of these in other ways")
                    }
                }
            }
        }
    }

    /// Adds an entry to the run.
    fn add(
        &mut self,
        path: &TreePath,
        stat: &Stat,
        dir: Option<&Rc<OwnedFd>>,
        told: Told,
    ) -> Result<(), CaptureError> {
        self.report.entries += 1;
        let content = if matches!(told, Told::File) { stat.size } else { 0 };
        self.run.bytes += (BLOCK_BYTES as u64) + content.next_multiple_of(BLOCK_BYTES as u64);
        // Of what is removed only the name is told, of a mark nothing at all.
        let by_name = matches!(told, Told::Opaque | Told::Removed);
        self.run.is_uncertain |= !by_name && !self.is_proven(path, stat);
        let (path, stat, dir) = (path.clone(), *stat, dir.cloned());
        let ends = self.run.bytes >= RUN_BYTES_MAX
            || self.run.entries.len() + 1 >= RUN_ENTRIES_MAX
            || (self.run.bytes >= RUN_BYTES_MIN && ends_run(&path));
        self.run.entries.push(RunEntry { path, stat, dir, told });
        if ends { self.end_run() } else { Ok(()) }
    }

    /// Whether an object can't have changed since the moment from which times prove something, if it has the same times later.
    fn is_proven(&self, path: &TreePath, stat: &Stat) -> bool {
        let Some(moment) = self.out.moment() else { return false };
        if !self.keeps_times
            || !moment.proves(stat)
            || self.leased.get(stat.identity).is_some()
            || self.alone.is_some_and(|alone| alone.contains(stat))
        {
            return false;
        }
        if !self.mapped_in_upper || stat.kind != Kind::File {
            return true;
        }
        match self.upper.map(|upper| upper.stat(path)) {
            Some(Ok(Some(stat))) => moment.proves(&stat),
            // It is in a lower layer, which nobody writes to.
            Some(Ok(None)) => true,
            Some(Err(_)) | None => false,
        }
    }

    /// Passes the run on, by its key if that is known.
    fn end_run(&mut self) -> Result<(), CaptureError> {
        let Run { entries, is_uncertain, .. } = std::mem::take(&mut self.run);
        if entries.is_empty() {
            return Ok(());
        }
        let key = key_of_run(&entries);
        if let Some(bytes) = self.out.known(&key, !is_uncertain).map_err(CaptureError::Write)? {
            self.report.stream_bytes += bytes;
            return Ok(());
        }
        if self.alone.is_some() && self.keeps_times && is_uncertain {
            // Something in it has just changed, and is likely to do so again; and it is little.
            return Ok(());
        }
        let told = self.tell(&entries);
        let (parts, is_certain) = match (told, self.alone) {
            // It is read again when it stands.
            (Err(CaptureError::Host(_) | CaptureError::Changed { .. }), Some(_)) => return Ok(()),
            (told, _) => told?,
        };
        self.put(key, is_certain && !is_uncertain, parts)
    }

    fn put(
        &mut self,
        key: Name,
        is_proven: bool,
        mut parts: Vec<Vec<u8>>,
    ) -> Result<(), CaptureError> {
        self.report.stream_bytes += parts.iter().map(|part| part.len() as u64).sum::<u64>();
        // A run with attributes that large is several segments, of which none has the run's key.
        for number in 0_u64.. {
            let rest = parts.split_off(parts.len().min(SEGMENT_BYTES_MAX / BATCH_BYTES_MAX));
            let is_whole = number == 0 && rest.is_empty();
            let key = if is_whole { key } else { key_of_cut(&key, number) };
            self.out.put(key, is_proven && is_whole, parts).map_err(CaptureError::Write)?;
            if rest.is_empty() {
                break;
            }
            parts = rest;
        }
        Ok(())
    }

    /// Reads what a run tells. Whether all of it was read while nobody wrote is the second value.
    fn tell(&mut self, entries: &[RunEntry]) -> Result<(Vec<Vec<u8>>, bool), CaptureError> {
        let mut parts = Parts { out: &mut *self.out, parts: Vec::new() };
        let mut telling = Telling {
            out: LayerWriter::new(&mut parts),
            alone: self.alone,
            upper: self.upper,
            leased: self.leased,
            content_bytes: 0,
            is_certain: true,
            buffer: &mut self.buffer,
        };
        for entry in entries {
            telling.entry(entry)?;
        }
        let (content_bytes, is_certain) = (telling.content_bytes, telling.is_certain);
        self.report.content_bytes += content_bytes;
        Ok((parts.parts, is_certain))
    }

    /// A large file: its headers end the run, and its content follows in pieces.
    fn large(
        &mut self,
        path: &TreePath,
        stat: &Stat,
        dir: &Rc<OwnedFd>,
        name: &OsStr,
    ) -> Result<(), CaptureError> {
        let told = self.large_file(path, stat, dir, name);
        match (told, self.alone) {
            (Err(CaptureError::Host(_) | CaptureError::Changed { .. }), Some(_)) => Ok(()),
            (told, _) => told,
        }
    }

    fn large_file(
        &mut self,
        path: &TreePath,
        stat: &Stat,
        dir: &Rc<OwnedFd>,
        name: &OsStr,
    ) -> Result<(), CaptureError> {
        let reading = Reading { alone: self.alone, upper: self.upper, leased: self.leased };
        let (file, stat) = reading.open(path, stat, dir, name)?;
        let size = stat.size;
        let segments = file.segments(size, stat.blocks).attempt("find the holes of", path)?;
        let whole = [Segment { offset: 0, length: size }];
        let pieces = pieces(segments.as_deref().unwrap_or(&whole));
        self.add(path, &stat, Some(dir), Told::Large { segments })?;
        self.end_run()?;
        let is_proven = self.is_proven(path, &stat);
        // When the first piece has to be read, and not at all where none has.
        let mut is_certain = None;
        for Piece { number, stretches, padding } in pieces {
            let key = key_of_piece(&stat, number, &stretches, padding);
            if let Some(bytes) = self.out.known(&key, is_proven).map_err(CaptureError::Write)? {
                self.report.stream_bytes += bytes;
                continue;
            }
            let is_certain = *is_certain.get_or_insert_with(|| reading.is_certain(&file));
            let mut parts = Parts { out: &mut *self.out, parts: Vec::new() };
            for stretch in stretches {
                parts.read(file.as_fd(), stretch).map_err(|error| copy_error(path, error))?;
                self.report.content_bytes += stretch.length;
            }
            parts.write_all(&[0; BLOCK_BYTES][..padding]).map_err(CaptureError::Write)?;
            let parts = parts.parts;
            self.put(key, is_proven && is_certain, parts)?;
        }
        if stat_fd(&file).attempt("look up", path)?.size != size {
            return Err(CaptureError::Changed { path: path.absolute(), what: "it became longer" });
        }
        Ok(())
    }

    fn note_flags(&mut self, path: &TreePath, stat: &Stat) {
        if stat.flagged {
            self.report.flagged.push(path.absolute());
        }
    }

    fn end(mut self) -> Result<LayerReport, CaptureError> {
        self.end_run()?;
        let mut parts = Parts { out: &mut *self.out, parts: Vec::new() };
        LayerWriter::new(&mut parts).end().map_err(CaptureError::Write)?;
        let parts = parts.parts;
        self.put(KeyHasher::new("end").end(), true, parts)?;
        Ok(self.report)
    }
}

/// What lies between two multiples of [`PIECE_BYTES`] of a file's content.
struct Piece {
    number: u64,
    stretches: Vec<Segment>,
    /// Bytes of zeros behind the last one, which fill up a block.
    padding: usize,
}

fn pieces(stretches: &[Segment]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for Segment { mut offset, mut length } in stretches.iter().copied() {
        while length > 0 {
            let number = offset / PIECE_BYTES;
            let now = length.min((number + 1) * PIECE_BYTES - offset);
            let stretch = Segment { offset, length: now };
            match pieces.last_mut() {
                Some(last) if last.number == number => last.stretches.push(stretch),
                _ => pieces.push(Piece { number, stretches: vec![stretch], padding: 0 }),
            }
            offset += now;
            length -= now;
        }
    }
    let bytes: u64 = stretches.iter().map(|stretch| stretch.length).sum();
    if let Some(last) = pieces.last_mut() {
        let padding = bytes.next_multiple_of(BLOCK_BYTES as u64) - bytes;
        last.padding = usize::try_from(padding).expect("less than a block");
    }
    pieces
}

/// Whether a run may end behind an entry of this path.
fn ends_run(path: &TreePath) -> bool {
    let [first, ..] = *blake3::hash(path.as_bytes()).as_bytes();
    first & RUN_END_MASK == 0
}

/// Digests what can be said of a segment without reading it.
struct KeyHasher(blake3::Hasher);

impl KeyHasher {
    /// Other programs may tell the same in other bytes.
    fn new(kind: &str) -> KeyHasher {
        let mut hasher = KeyHasher(blake3::Hasher::new());
        hasher.bytes(concat!("samara ", env!("CARGO_PKG_VERSION"), " 1").as_bytes());
        hasher.bytes(kind.as_bytes());
        hasher
    }

    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.update(bytes);
    }

    fn time(&mut self, time: Time) {
        self.number(time.seconds.cast_unsigned());
        self.number(time.nanoseconds.into());
    }

    fn stat(&mut self, stat: &Stat) {
        let Stat { kind, mode, uid, gid, size, identity, device, modified, changed, .. } = stat;
        self.number(match kind {
            Kind::File => 0,
            Kind::Directory => 1,
            Kind::Symlink => 2,
            Kind::Fifo => 3,
            Kind::Socket => 4,
            Kind::CharDevice => 5,
            Kind::BlockDevice => 6,
        });
        for number in [*mode, *uid, *gid, identity.0, identity.1, device.0, device.1] {
            self.number(number.into());
        }
        self.number(identity.2);
        // Of a directory it says nothing that is told.
        self.number(if *kind == Kind::Directory { 0 } else { *size });
        self.time(*modified);
        self.time(*changed);
    }

    fn stretches(&mut self, stretches: &[Segment]) {
        self.number(stretches.len() as u64);
        for Segment { offset, length } in stretches {
            self.number(*offset);
            self.number(*length);
        }
    }

    fn end(self) -> Name {
        Name(*self.0.finalize().as_bytes())
    }
}

fn key_of_run(entries: &[RunEntry]) -> Name {
    let mut hasher = KeyHasher::new("run");
    for RunEntry { path, stat, told, .. } in entries {
        hasher.bytes(path.as_bytes());
        match told {
            Told::Opaque => hasher.number(0),
            Told::Removed => hasher.number(1),
            Told::Directory { sockets } => {
                hasher.number(2);
                hasher.bytes(&encode_sockets(sockets));
            }
            Told::HardLink { target } => {
                hasher.number(3);
                hasher.bytes(target.as_bytes());
            }
            Told::Object => hasher.number(4),
            Told::File => hasher.number(5),
            Told::Large { segments: None } => hasher.number(6),
            Told::Large { segments: Some(segments) } => {
                hasher.number(7);
                hasher.stretches(segments);
            }
        }
        if !matches!(told, Told::Opaque | Told::Removed) {
            hasher.stat(stat);
        }
    }
    hasher.end()
}

fn key_of_piece(stat: &Stat, number: u64, stretches: &[Segment], padding: usize) -> Name {
    let mut hasher = KeyHasher::new("piece");
    hasher.stat(stat);
    hasher.number(number);
    hasher.stretches(stretches);
    hasher.number(padding as u64);
    hasher.end()
}

/// Of a part of what would have this key as a whole.
fn key_of_cut(key: &Name, number: u64) -> Name {
    let mut hasher = KeyHasher::new("cut");
    hasher.bytes(&key.0);
    hasher.number(number);
    hasher.end()
}

/// Collects the parts of a segment.
struct Parts<'o> {
    out: &'o mut dyn Out,
    parts: Vec<Vec<u8>>,
}

impl Parts<'_> {
    /// The last part, with room.
    fn last(&mut self) -> &mut Vec<u8> {
        if self.parts.last().is_none_or(|part| part.len() >= BATCH_BYTES_MAX) {
            let mut buffer = self.out.buffer();
            buffer.reserve_exact(BATCH_BYTES_MAX);
            self.parts.push(buffer);
        }
        self.parts.last_mut().expect("there is one now")
    }

    /// Reads one stretch of a file.
    fn read(&mut self, file: BorrowedFd<'_>, stretch: Segment) -> Result<(), CopyError> {
        let (mut at, mut left) = (stretch.offset, stretch.length);
        while left > 0 {
            let part = self.last();
            let before = part.len();
            match rustix::io::pread(file, rustix::buffer::spare_capacity(part), at) {
                Ok(0) => return Err(CopyError::Short),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(e) => return Err(CopyError::From(e.into())),
            }
            let room = (BATCH_BYTES_MAX - before) as u64;
            part.truncate(before + usize::try_from(left.min(room)).expect("at most a batch"));
            let got = (part.len() - before) as u64;
            at += got;
            left -= got;
        }
        Ok(())
    }
}

impl Write for Parts<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let part = self.last();
        let now = bytes.get(..BATCH_BYTES_MAX - part.len()).unwrap_or(bytes);
        part.extend_from_slice(now);
        Ok(now.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn copy_error(path: &TreePath, error: CopyError) -> CaptureError {
    match error {
        CopyError::From(source) => HostError { action: "read", path: path.into(), source }.into(),
        CopyError::To(source) => CaptureError::Write(source),
        CopyError::Short => {
            CaptureError::Changed { path: path.absolute(), what: "it became shorter" }
        }
    }
}

/// How files are read.
#[derive(Clone, Copy)]
struct Reading<'a> {
    alone: Option<&'a LeftAlone>,
    upper: Option<&'a Tree>,
    leased: &'a LeasedFiles,
}

impl<'a> Reading<'a> {
    /// The file of that name, which was found to be as `stat` says, and what it is now.
    fn open(
        &self,
        path: &TreePath,
        stat: &Stat,
        dir: &OwnedFd,
        name: &OsStr,
    ) -> Result<(Source<'a>, Stat), CaptureError> {
        let changed = |what| CaptureError::Changed { path: path.absolute(), what };
        if let Some(description) = self.leased.get(stat.identity) {
            return Ok((self.open_leased(path, description)?, *stat));
        }
        if self.alone.is_some_and(|alone| alone.contains(stat)) {
            return Err(changed("it is left alone while the container runs"));
        }
        let file = open_file(dir, name).attempt("open", path)?;
        let opened = stat_fd(&file).attempt("look up", path)?;
        if (opened.identity, opened.kind) != (stat.identity, Kind::File) {
            return Err(changed("another object took its name"));
        }
        let times = |stat: &Stat| (stat.size, stat.modified, stat.changed);
        if self.alone.is_some() && times(&opened) != times(stat) {
            return Err(changed("it is being written"));
        }
        Ok((Source::Own(file), opened))
    }

    /// Whether nobody can be in the midst of a write to an open file.
    fn is_certain(&self, file: &Source<'_>) -> bool {
        self.alone.is_none() || moment::let_writes_end(file)
    }

    /// What a leased file can be read by.
    fn open_leased(
        &self,
        path: &TreePath,
        description: &'a File,
    ) -> Result<Source<'a>, CaptureError> {
        if let Some(file) = self.upper_file(path)? {
            return Ok(Source::Own(file));
        }
        if !leased::is_readable(description).attempt("look up", path)? {
            return Err(CaptureError::Unsupported {
                path: path.absolute(),
                why: "it is open for writing only, with a lease that would end if it was opened to be read",
            });
        }
        Ok(Source::Program(description))
    }

    /// The file of the upper layer that has the content of `path`.
    fn upper_file(&self, path: &TreePath) -> Result<Option<OwnedFd>, CaptureError> {
        let (Some(upper), Some((parent, name))) = (self.upper, path.split()) else {
            return Ok(None);
        };
        let action = "open the upper layer's";
        let Some(dir) = upper.dir_if_any(&parent).attempt(action, path)? else { return Ok(None) };
        let is_file = stat_name(&dir, name)
            .attempt(action, path)?
            .is_some_and(|stat| stat.kind == Kind::File);
        if !is_file {
            return Ok(None);
        }
        let file = open_file(&dir, name).attempt(action, path)?;
        let holds_metadata_only = is_metacopy(&file).attempt(action, path)?;
        Ok((!holds_metadata_only).then_some(file))
    }
}

/// Reads the entries of a run.
struct Telling<'a, 'w> {
    out: LayerWriter<'w>,
    alone: Option<&'a LeftAlone>,
    upper: Option<&'a Tree>,
    leased: &'a LeasedFiles,
    content_bytes: u64,
    /// All files so far were read while nobody wrote.
    is_certain: bool,
    buffer: &'w mut [u8],
}

impl Telling<'_, '_> {
    fn entry(&mut self, entry: &RunEntry) -> Result<(), CaptureError> {
        let RunEntry { path, stat, dir, told } = entry;
        let plain = |content| (content, Metadata::default());
        let (content, metadata) = match told {
            Told::Opaque => plain(Content::Opaque),
            Told::Removed => plain(Content::Whiteout),
            Told::Directory { sockets } => {
                let dir = dir.as_ref().expect("a directory comes with itself");
                let xattrs = metadata::xattrs(Object::Open(dir.as_fd()))
                    .attempt("read attributes of", path)?;
                let sockets = sockets.clone();
                (Content::Directory { sockets }, Metadata::of(stat, xattrs))
            }
            Told::HardLink { .. } | Told::Object | Told::File | Told::Large { .. } => {
                let dir = dir.as_ref().expect("an object comes with its directory");
                let (_, name) = path.split().expect("only a directory is the root");
                match told {
                    Told::File => return self.file(path, stat, dir, name),
                    // Other programs set an entry's metadata whatever its type.
                    Told::HardLink { target } => (
                        Content::HardLink { target: target.clone() },
                        named(path, stat, dir, name)?,
                    ),
                    Told::Large { segments } => {
                        let content = Content::File { size: stat.size, segments: segments.clone() };
                        let metadata = named(path, stat, dir, name)?;
                        // Its content comes in other segments.
                        return self.headers(path, content, metadata);
                    }
                    _ => (object(path, stat, dir, name)?, named(path, stat, dir, name)?),
                }
            }
        };
        self.headers(path, content, metadata)?;
        self.out.pad().map_err(CaptureError::Write)
    }

    fn file(
        &mut self,
        path: &TreePath,
        stat: &Stat,
        dir: &OwnedFd,
        name: &OsStr,
    ) -> Result<(), CaptureError> {
        let reading = Reading { alone: self.alone, upper: self.upper, leased: self.leased };
        let (file, opened) = reading.open(path, stat, dir, name)?;
        self.is_certain &= reading.is_certain(&file);
        let size = opened.size;
        let leased = self.leased.get(stat.identity).is_some();
        let object =
            if leased { Object::Named(dir.as_fd(), name) } else { Object::Open(file.as_fd()) };
        let xattrs = metadata::xattrs(object).attempt("read attributes of", path)?;
        let segments = file.segments(size, opened.blocks).attempt("find the holes of", path)?;
        let whole = [Segment { offset: 0, length: size }];
        let content = Content::File { size, segments };
        self.headers(path, content.clone(), Metadata::of(&opened, xattrs))?;
        let Content::File { segments, .. } = content else { unreachable!("made above") };
        for segment in segments.as_deref().unwrap_or(&whole) {
            read_segment(file.as_fd(), *segment, &mut self.out, self.buffer)
                .map_err(|error| copy_error(path, error))?;
            self.content_bytes += segment.length;
        }
        self.out.pad().map_err(CaptureError::Write)?;
        if stat_fd(&file).attempt("look up", path)?.size != size {
            return Err(CaptureError::Changed { path: path.absolute(), what: "it became longer" });
        }
        Ok(())
    }

    fn headers(
        &mut self,
        path: &TreePath,
        content: Content,
        metadata: Metadata,
    ) -> Result<(), CaptureError> {
        self.out.entry(&Entry { path: path.clone(), content, metadata }).map_err(|e| match e {
            EncodeError::Write(source) => CaptureError::Write(source),
            EncodeError::Unfit(why) => CaptureError::Unsupported { path: path.absolute(), why },
        })
    }
}

/// The metadata of an object that is not opened.
fn named(
    path: &TreePath,
    stat: &Stat,
    dir: &OwnedFd,
    name: &OsStr,
) -> Result<Metadata, CaptureError> {
    let xattrs = metadata::xattrs(Object::Named(dir.as_fd(), name));
    Ok(Metadata::of(stat, xattrs.attempt("read attributes of", path)?))
}

fn object(
    path: &TreePath,
    stat: &Stat,
    dir: &OwnedFd,
    name: &OsStr,
) -> Result<Content, CaptureError> {
    let (major, minor) = stat.device;
    Ok(match stat.kind {
        Kind::Symlink => {
            let target =
                rustix::fs::readlinkat(dir, name, Vec::new()).attempt("read the link", path)?;
            Content::Symlink { target: target.into_bytes() }
        }
        Kind::Fifo => Content::Fifo,
        Kind::CharDevice => Content::CharDevice { major, minor },
        Kind::BlockDevice => Content::BlockDevice { major, minor },
        Kind::File | Kind::Directory | Kind::Socket => {
            unreachable!("these are told in other ways")
        }
    })
}

/// What the content of a file is read from.
enum Source<'a> {
    Own(OwnedFd),
    /// A description that is the program's, and has a position that it may rely on.
    Program(&'a File),
}

impl AsFd for Source<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Source::Own(file) => file.as_fd(),
            Source::Program(file) => file.as_fd(),
        }
    }
}

impl Source<'_> {
    /// As [`segments`].
    fn segments(&self, size: u64, blocks: u64) -> Result<Option<Vec<Segment>>, std::io::Error> {
        match self {
            Source::Own(file) => Ok(segments(file, size, blocks)?),
            Source::Program(_) if blocks.saturating_mul(512) >= size => Ok(None),
            Source::Program(file) => leased::segments_by_content(file, size).map(Some),
        }
    }
}

/// Whether a file of an upper layer has its content in a lower one.
fn is_metacopy(file: &OwnedFd) -> Result<bool, Errno> {
    for name in ["trusted.overlay.metacopy", "user.overlay.metacopy"] {
        match rustix::fs::fgetxattr(file, name, &mut [] as &mut [u8]) {
            Ok(_) => return Ok(true),
            Err(Errno::NODATA | Errno::NOTSUP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

// Application.

/// A directory that entries are still coming for.
struct Open {
    path: TreePath,
    /// Dropped while many directories below it are open, and then opened again.
    dir: Option<OwnedFd>,
    metadata: Metadata,
    /// Names that the layer spoke of.
    seen: HashSet<OsString>,
    /// Nothing of the base image is seen here.
    whole: bool,
    /// The target shows names here that can't be told from its upper directory alone.
    irregular: bool,
    /// Something is mounted on it: its entries are passed over.
    mounted: bool,
    entered: bool,
}

/// More directories than this do not keep their descriptors while others below them are worked on.
const OPEN_DIRECTORIES_MAX: usize = 64;

struct Application<'a> {
    tree: &'a Tree,
    base: Option<&'a Base<'a>>,
    devices: &'a DeviceNodes,
    given: &'a GivenNodes,
    open: Vec<Open>,
    report: ApplyReport,
    buffer: Vec<u8>,
    /// What a file had where `buffer` is to be written.
    old: Vec<u8>,
}

impl<'a> Application<'a> {
    fn new(
        tree: &'a Tree,
        base: Option<&'a Base<'a>>,
        devices: &'a DeviceNodes,
        given: &'a GivenNodes,
    ) -> Application<'a> {
        let report = ApplyReport::default();
        let (buffer, old) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
        Application { tree, base, devices, given, open: Vec::new(), report, buffer, old }
    }

    /// None if the layer holds changes only and there is no base. Nothing was changed then.
    fn run(mut self, stream: &mut dyn Read) -> Result<Option<ApplyReport>, ApplyError> {
        let mut layer = LayerReader::new(stream);
        let mut base_run = self.base.map(Base::start);
        while let Some(entry) = layer.entry().map_err(decode_error)? {
            self.report.entries += 1;
            let opaque_root = entry.path.is_root() && entry.content == Content::Opaque;
            if self.report.entries == 2 && self.base.is_none() && !opaque_root {
                return Ok(None);
            }
            let corrupt = |why| ApplyError::Corrupt { path: entry.path.absolute(), why };
            match (&entry.content, entry.path.split()) {
                (Content::Opaque, _) => self.make_opaque(&entry.path).map_err(corrupt)?,
                (Content::Directory { .. }, None) if self.report.entries == 1 => {
                    self.enter_root(entry)?
                }
                (_, None) => return Err(corrupt("the root comes twice")),
                (_, Some((parent, name))) => {
                    let depth = self.open.iter().position(|d| d.path == parent);
                    let depth =
                        depth.ok_or_else(|| corrupt("its directory did not come before it"))?;
                    while self.open.len() > depth + 1 {
                        self.leave(&mut base_run)?;
                    }
                    self.resume()?;
                    let top = self.open.last_mut().expect("its directory is open");
                    if !top.seen.insert(name.to_owned()) {
                        return Err(corrupt("its name comes twice"));
                    }
                    top.entered = true;
                    if top.mounted {
                        self.pass_over(entry);
                    } else {
                        let name = name.to_owned();
                        self.apply(entry, &name, &mut layer)?;
                    }
                }
            }
        }
        if self.open.is_empty() {
            return Err(ApplyError::Corrupt { path: "/".into(), why: "it has no entries" });
        }
        if self.base.is_none() && self.report.entries < 2 {
            return Ok(None);
        }
        while !self.open.is_empty() {
            self.leave(&mut base_run)?;
        }
        if let Some(run) = base_run {
            run.finish(&mut self.report)?;
        }
        Ok(Some(self.report))
    }

    fn make_opaque(&mut self, path: &TreePath) -> Result<(), &'static str> {
        match self.open.last_mut() {
            Some(top) if top.path == *path && !top.entered => {
                top.whole = true;
                top.entered = true;
                Ok(())
            }
            _ => Err("an opaque mark does not follow its directory"),
        }
    }

    fn enter_root(&mut self, entry: Entry) -> Result<(), ApplyError> {
        let path = entry.path;
        let dir = self.tree.dir(&path).attempt("open", &path)?;
        self.push(path, Some(dir), entry.content, entry.metadata)
    }

    /// Opens the top directory again if it was let go.
    fn resume(&mut self) -> Result<(), HostError> {
        let top = self.open.last_mut().expect("a directory is open");
        if top.dir.is_none() && !top.mounted {
            top.dir = Some(self.tree.dir(&top.path).attempt("open", &top.path)?);
        }
        Ok(())
    }

    fn pass_over(&mut self, entry: Entry) {
        if let Content::Directory { .. } = entry.content {
            self.open.push(Open {
                path: entry.path,
                dir: None,
                metadata: entry.metadata,
                seen: HashSet::new(),
                whole: false,
                irregular: false,
                mounted: true,
                entered: false,
            });
        }
    }

    fn top(&self) -> BorrowedFd<'_> {
        let top = self.open.last().expect("a directory is open");
        top.dir.as_ref().expect("the top directory is open").as_fd()
    }

    fn push(
        &mut self,
        path: TreePath,
        dir: Option<OwnedFd>,
        content: Content,
        metadata: Metadata,
    ) -> Result<(), ApplyError> {
        let Content::Directory { sockets } = content else {
            unreachable!("only directories are entered")
        };
        let mut irregular = self.open.last().is_some_and(|d| d.irregular);
        let whole = self.open.last().is_some_and(|d| d.whole);
        if let (Some(dir), Some(base)) = (&dir, self.base) {
            metadata::drop_default_acl(dir).attempt("drop the default ACL of", &path)?;
            irregular = irregular || base.is_irregular(&path)?;
        } else if let Some(dir) = &dir {
            metadata::drop_default_acl(dir).attempt("drop the default ACL of", &path)?;
        }
        if self.open.len() >= OPEN_DIRECTORIES_MAX {
            let upper = self.open.len() - OPEN_DIRECTORIES_MAX;
            self.open[upper].dir = None;
        }
        let mounted = dir.is_none();
        self.open.push(Open {
            path,
            dir,
            metadata,
            seen: HashSet::new(),
            whole,
            irregular,
            mounted,
            entered: false,
        });
        for Socket { name, metadata } in sockets {
            self.socket(name, &metadata)?;
        }
        Ok(())
    }

    fn socket(&mut self, name: OsString, metadata: &Metadata) -> Result<(), ApplyError> {
        let top = self.open.last_mut().expect("just entered");
        let bad = |why| ApplyError::Corrupt { path: top.path.absolute().join(&name), why };
        let path = top.path.child(&name).map_err(bad)?;
        if !top.seen.insert(name.clone()) {
            return Err(bad("its name comes twice"));
        }
        let Metadata { mode, uid, gid, .. } = *metadata;
        self.report.sockets.push(SocketNode { path: path.absolute(), mode, uid, gid });
        if top.mounted {
            return Ok(());
        }
        if !self.node(Kind::Socket, &name, &path, metadata, (0, 0))? {
            self.report.mounted.push(path.absolute());
        }
        Ok(())
    }

    fn apply(
        &mut self,
        entry: Entry,
        name: &OsStr,
        layer: &mut LayerReader<'_>,
    ) -> Result<(), ApplyError> {
        let Entry { path, content, metadata } = entry;
        let dir = self.top();
        let done = match &content {
            Content::Opaque => unreachable!("handled by the caller"),
            Content::Directory { .. } => {
                let dir = enter(self.tree, dir, name, &path)?;
                if dir.is_none() {
                    self.report.mounted.push(path.absolute());
                }
                return self.push(path, dir, content, metadata);
            }
            Content::Whiteout => remove(self.tree, dir, name, &path)?,
            Content::File { size, segments } => {
                self.file(name, &path, *size, segments.as_deref(), &metadata, layer)?
            }
            Content::HardLink { target } => self.hard_link(name, &path, target)?,
            Content::Symlink { target } => {
                self.named(Kind::Symlink, name, &path, &metadata, &mut || {
                    rustix::fs::symlinkat(OsStr::from_bytes(target), dir, name)
                })?
            }
            Content::Fifo => self.node(Kind::Fifo, name, &path, &metadata, (0, 0))?,
            Content::CharDevice { major, minor } => {
                self.check_device(Kind::CharDevice, name, &path, (*major, *minor))?;
                self.node(Kind::CharDevice, name, &path, &metadata, (*major, *minor))?
            }
            Content::BlockDevice { major, minor } => {
                self.check_device(Kind::BlockDevice, name, &path, (*major, *minor))?;
                self.node(Kind::BlockDevice, name, &path, &metadata, (*major, *minor))?
            }
        };
        if !done {
            self.report.mounted.push(path.absolute());
        }
        Ok(())
    }

    // The following return false where something is mounted on the name, which they leave alone.

    fn file(
        &mut self,
        name: &OsStr,
        path: &TreePath,
        size: u64,
        segments: Option<&[Segment]>,
        metadata: &Metadata,
        layer: &mut LayerReader<'_>,
    ) -> Result<bool, ApplyError> {
        let made = make_file(self.tree, self.base, self.top(), name, path)?;
        let Made::New((file, mut there)) = made else { return Ok(false) };
        if segments.is_some() && there > 0 {
            // Holes are to be holes.
            rustix::fs::ftruncate(&file, 0).attempt("empty", path)?;
            there = 0;
        }
        for segment in segments.unwrap_or(&[Segment { offset: 0, length: size }]) {
            let old = if there > 0 { Some(&mut self.old[..]) } else { None };
            let written = write_segment(file.as_fd(), *segment, layer, &mut self.buffer, old);
            written.map_err(|e| match e {
                CopyError::From(source) => ApplyError::Read(source),
                CopyError::To(source) => {
                    HostError { action: "write", path: path.into(), source }.into()
                }
                CopyError::Short => {
                    ApplyError::Corrupt { path: path.absolute(), why: "the stream ends early" }
                }
            })?;
            self.report.content_bytes += segment.length;
        }
        if segments.is_some() || there > size {
            rustix::fs::ftruncate(&file, size).attempt("size", path)?;
        }
        metadata::set(Object::Open(file.as_fd()), Kind::File, metadata)
            .attempt("set metadata of", path)?;
        Ok(true)
    }

    fn hard_link(
        &self,
        name: &OsStr,
        path: &TreePath,
        target: &TreePath,
    ) -> Result<bool, ApplyError> {
        let corrupt = |why| ApplyError::Corrupt { path: path.absolute(), why };
        let found = match self.tree.handle(target) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                return Err(corrupt("it is another name of something that is not there"));
            }
            // Something is mounted over the first name.
            Err(Errno::XDEV) => return Ok(false),
            other => other.attempt("open", target)?,
        };
        if stat_fd(&found).attempt("look up", target)?.kind == Kind::Directory {
            return Err(corrupt("it is another name of a directory"));
        }
        let dir = self.top();
        let made = make(self.tree, dir, name, path, &mut || {
            rustix::fs::linkat(&found, "", dir, name, AtFlags::EMPTY_PATH)
        })?;
        Ok(matches!(made, Made::New(())))
    }

    /// An object that is not opened to set its metadata.
    fn named(
        &self,
        kind: Kind,
        name: &OsStr,
        path: &TreePath,
        metadata: &Metadata,
        create: &mut dyn FnMut() -> Result<(), Errno>,
    ) -> Result<bool, HostError> {
        let dir = self.top();
        if let Made::Mounted = make(self.tree, dir, name, path, create)? {
            return Ok(false);
        }
        metadata::set(Object::Named(dir, name), kind, metadata).attempt("set metadata of", path)?;
        Ok(true)
    }

    fn check_device(
        &self,
        kind: Kind,
        name: &OsStr,
        path: &TreePath,
        (major, minor): (u32, u32),
    ) -> Result<(), ApplyError> {
        let DeviceNodes::Known(known) = self.devices else { return Ok(()) };
        let node = DeviceNode { block: kind == Kind::BlockDevice, major, minor };
        if known.contains(&node) {
            return Ok(());
        }
        let there = stat_name(self.top(), name).attempt("look up", path)?;
        match there.is_some_and(|stat| stat.kind == kind && stat.device == (major, minor)) {
            true => Ok(()),
            false => Err(ApplyError::Device { path: path.absolute(), major, minor }),
        }
    }

    fn node(
        &self,
        kind: Kind,
        name: &OsStr,
        path: &TreePath,
        metadata: &Metadata,
        device: (u32, u32),
    ) -> Result<bool, HostError> {
        let dir = self.top();
        self.named(kind, name, path, metadata, &mut || make_node(dir, name, kind, device))
    }

    /// Puts right what is in the top directory and was not in the layer, then its own metadata.
    fn leave(&mut self, base_run: &mut Option<super::revert::Run<'a>>) -> Result<(), ApplyError> {
        if !self.open.last().expect("a directory is open").mounted {
            self.resume()?;
        }
        let top = self.open.pop().expect("a directory is open");
        let Some(dir) = &top.dir else { return Ok(()) };
        match base_run {
            Some(run) if !top.whole => {
                run.put_right(&top.path, dir, top.irregular, &top.seen, &mut self.report)?;
            }
            _ => {
                for name in names(dir).attempt("list", &top.path)? {
                    if !top.seen.contains(&name) {
                        let path = top
                            .path
                            .child(&name)
                            .map_err(|_| Errno::NAMETOOLONG)
                            .attempt("walk", &top.path)?;
                        if !self.given.0.is_empty() {
                            let stat = stat_name(dir, &name).attempt("look up", &path)?;
                            if stat.is_some_and(|stat| is_given(self.given, &path, &stat))
                                || self.given.reach_below(&path.absolute())
                            {
                                continue;
                            }
                        }
                        if remove(self.tree, dir.as_fd(), &name, &path)? {
                            self.report.removed += 1;
                        } else {
                            self.report.mounted.push(path.absolute());
                        }
                    }
                }
            }
        }
        metadata::set(Object::Open(dir.as_fd()), Kind::Directory, &top.metadata)
            .attempt("set metadata of", &top.path)?;
        Ok(())
    }
}

/// A name that is now there.
pub(super) enum Made<T> {
    New(T),
    /// Something is mounted on the name, and it was left alone.
    Mounted,
}

/// Makes an object with `create`, in place of whatever has its name.
pub(super) fn make<T>(
    tree: &Tree,
    dir: BorrowedFd<'_>,
    name: &OsStr,
    path: &TreePath,
    create: &mut dyn FnMut() -> Result<T, Errno>,
) -> Result<Made<T>, HostError> {
    match create() {
        Err(Errno::EXIST) => {}
        other => return other.map(Made::New).attempt("make", path),
    }
    if !remove(tree, dir, name, path)? {
        return Ok(Made::Mounted);
    }
    create().map(Made::New).attempt("make", path)
}

/// Opens a file to be written, in place of whatever has its name, with the number of bytes that it has already.
///
/// A file with one name is kept, to be overwritten where it differs: that is quick where it does not, and on ext4, where
/// 100,000 files that were applied over themselves took 2 s to make at first, it took 110 s to remove and make each
/// (an inode is searched for among all that were freed in the last seconds) and 40 to 260 s to empty and fill each (the
/// data of an emptied file is written to disk when it is closed). Not kept is a file that was copied from a lower
/// layer: a second name of it can show another inode number than the first.
pub(super) fn make_file(
    tree: &Tree,
    base: Option<&Base<'_>>,
    dir: BorrowedFd<'_>,
    name: &OsStr,
    path: &TreePath,
) -> Result<Made<(OwnedFd, u64)>, HostError> {
    let plain = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut create = || {
        let new = OFlags::CREATE | OFlags::EXCL;
        rustix::fs::openat(dir, name, plain | new, Mode::RUSR | Mode::WUSR)
    };
    match create() {
        Err(Errno::EXIST) => {}
        other => return other.map(|file| Made::New((file, 0))).attempt("make", path),
    }
    let there = stat_name(dir, name).attempt("look up", path)?;
    let single = there.filter(|s| s.kind == Kind::File && s.links == 1 && s.mount == tree.mount);
    let own = match base {
        Some(base) => single.is_some() && base.is_made_above(path)?,
        None => true,
    };
    if let Some(stat) = single.filter(|_| own) {
        let file = rustix::fs::openat(dir, name, plain, Mode::empty());
        return file.map(|file| Made::New((file, stat.size))).attempt("open", path);
    }
    Ok(match make(tree, dir, name, path, &mut create)? {
        Made::New(file) => Made::New((file, 0)),
        Made::Mounted => Made::Mounted,
    })
}

/// Makes a FIFO, socket or device node.
pub(super) fn make_node(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    kind: Kind,
    (major, minor): (u32, u32),
) -> Result<(), Errno> {
    let kind = match kind {
        Kind::Fifo => FileType::Fifo,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharacterDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::File | Kind::Directory | Kind::Symlink => unreachable!("made by other calls"),
    };
    rustix::fs::mknodat(dir, name, kind, Mode::empty(), rustix::fs::makedev(major, minor))
}

/// Opens the directory of that name, made in place of whatever else had the name. None if something is mounted on it.
pub(super) fn enter(
    tree: &Tree,
    dir: BorrowedFd<'_>,
    name: &OsStr,
    path: &TreePath,
) -> Result<Option<OwnedFd>, HostError> {
    let there = stat_name(dir, name).attempt("look up", path)?;
    match there {
        Some(stat) if stat.mount != tree.mount => return Ok(None),
        Some(stat) if stat.kind == Kind::Directory => {}
        Some(_) => {
            rustix::fs::unlinkat(dir, name, AtFlags::empty()).attempt("remove", path)?;
            rustix::fs::mkdirat(dir, name, Mode::RWXU).attempt("make", path)?;
        }
        None => rustix::fs::mkdirat(dir, name, Mode::RWXU).attempt("make", path)?,
    }
    open_subdir(dir, name).map(Some).attempt("open", path)
}

/// Removes whatever has that name, with all that is in it. False if something that is mounted there or below was left.
pub(super) fn remove(
    tree: &Tree,
    dir: BorrowedFd<'_>,
    name: &OsStr,
    path: &TreePath,
) -> Result<bool, HostError> {
    let Some(stat) = stat_name(dir, name).attempt("look up", path)? else { return Ok(true) };
    if stat.mount != tree.mount {
        return Ok(false);
    }
    if stat.kind != Kind::Directory {
        rustix::fs::unlinkat(dir, name, AtFlags::empty()).attempt("remove", path)?;
        return Ok(true);
    }
    let mut all_gone = true;
    let mut emptied = Vec::new();
    let mut pending = vec![path.clone()];
    while let Some(path) = pending.pop() {
        let dir = tree.dir(&path).attempt("open", &path)?;
        for name in names(&dir).attempt("list", &path)? {
            let child =
                path.child(&name).map_err(|_| Errno::NAMETOOLONG).attempt("remove from", &path)?;
            match stat_name(&dir, &name).attempt("look up", &child)? {
                None => {}
                Some(stat) if stat.mount != tree.mount => all_gone = false,
                Some(stat) if stat.kind == Kind::Directory => pending.push(child),
                Some(_) => {
                    rustix::fs::unlinkat(&dir, &name, AtFlags::empty()).attempt("remove", &child)?
                }
            }
        }
        emptied.push(path);
    }
    for path in emptied.iter().rev() {
        let (parent, name) = path.split().expect("the root is not removed");
        let dir = tree.dir(&parent).attempt("open", &parent)?;
        match rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR) {
            Ok(()) => {}
            Err(Errno::NOTEMPTY | Errno::BUSY) if !all_gone => {}
            Err(e) => return Err(e).attempt("remove", path),
        }
    }
    Ok(all_gone)
}

fn decode_error(error: DecodeError) -> ApplyError {
    match error {
        DecodeError::Read(source) => ApplyError::Read(source),
        DecodeError::Corrupt { path, why } => ApplyError::Corrupt { path: path.absolute(), why },
    }
}
