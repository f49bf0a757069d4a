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

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::content::{BUFFER_BYTES, CopyError, Segment, read_segment, segments, write_segment};
use super::layer::{Content, DecodeError, EncodeError, Entry, LayerReader, LayerWriter, Socket};
use super::leased::{self, LeasedFiles};
use super::metadata::{self, Metadata, Object};
use super::revert::Base;
use super::root::{
    ENGINE_PATHS, NamesByDirectory, Overlay, RootChanges, add_with_parents, all_names,
};
use super::tree::{Kind, Stat, Tree, TreePath, names, open_file, open_subdir, stat_fd, stat_name};
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
    capture(&tree, None, given, leased, out)
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
        walk(merged, Some(self), &mut |_, stat, finding| {
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
        dir: BorrowedFd<'a>,
        opaque: bool,
        sockets: Vec<Socket>,
    },
    /// Anything but directories and sockets.
    Object {
        dir: BorrowedFd<'a>,
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
    out: &mut dyn Write,
) -> Result<LayerReport, CaptureError> {
    let mut writing = Writing {
        out: LayerWriter::new(out),
        upper: changes.and_then(|changes| changes.upper.as_ref()),
        leased,
        report: LayerReport::default(),
        first_names: HashMap::new(),
        buffer: vec![0; BUFFER_BYTES],
    };
    walk(tree, changes, &mut |path, stat, finding| match is_given(given, path, stat) {
        true => Ok(()),
        false => writing.write(path, stat, finding),
    })?;
    writing.end()
}

fn is_given(given: &GivenNodes, path: &TreePath, stat: &Stat) -> bool {
    let (major, minor) = stat.device;
    let block = stat.kind == Kind::BlockDevice;
    (block || stat.kind == Kind::CharDevice)
        && given.contains(&path.absolute(), DeviceNode { block, major, minor })
}

type Visit<'a> = dyn FnMut(&TreePath, &Stat, Finding<'_>) -> Result<(), CaptureError> + 'a;

/// Visits a whole tree, or those parts of it that changed.
fn walk(
    tree: &Tree,
    changes: Option<&Changes<'_>>,
    visit: &mut Visit<'_>,
) -> Result<(), CaptureError> {
    // With each directory: whether only changes are told below it.
    let mut pending = vec![(TreePath::root(), changes)];
    while let Some((path, mut changes)) = pending.pop() {
        let dir = tree.dir(&path).attempt("open", &path)?;
        let own = stat_fd(&dir).attempt("look up", &path)?;
        let mut opaque = changes.is_none() && path.is_root();
        let mut found: Vec<OsString> = Vec::new();
        if let Some(c) = changes {
            let upper_dir = match &c.upper {
                Some(upper) => upper.dir_if_any(&path).attempt("open the upper layer's", &path)?,
                None => None,
            };
            if let Some(upper_dir) = upper_dir {
                let marks =
                    c.overlay.marks(&upper_dir).attempt("read overlay attributes of", &path)?;
                if marks.opaque || marks.redirect {
                    // What lies below has nothing to do with the base image's directory of this name.
                    opaque = true;
                    changes = None;
                } else {
                    found = names(&upper_dir).attempt("list the upper layer's", &path)?;
                }
            }
            if let Some(always) = c.always.get(&path).filter(|_| !opaque) {
                let all: BTreeSet<_> = found.into_iter().chain(always.iter().cloned()).collect();
                found = all.into_iter().collect();
            }
        }
        if changes.is_none() {
            found = names(&dir).attempt("list", &path)?;
        }

        let mut children = Vec::with_capacity(found.len());
        let mut sockets = Vec::new();
        for name in found {
            let child = path.child(&name).map_err(|why| CaptureError::Unsupported {
                path: path.absolute().join(&name),
                why,
            })?;
            let stat = stat_name(&dir, &name).attempt("look up", &child)?;
            if let Some(stat) = stat.filter(|s| s.kind == Kind::Socket && s.mount == tree.mount) {
                let xattrs = metadata::xattrs(Object::Named(dir.as_fd(), &name))
                    .attempt("read attributes of", &child)?;
                sockets.push(Socket { name, metadata: Metadata::of(&stat, xattrs) });
            } else {
                children.push((child, stat));
            }
        }
        visit(&path, &own, Finding::Directory { dir: dir.as_fd(), opaque, sockets })?;
        let mut directories = Vec::new();
        for (child, stat) in children {
            let (_, name) = child.split().expect("a child is not the root");
            match stat {
                // Any form of whiteout: the upper layer has a name that the merged view has not.
                None if changes.is_some() => visit(&child, &own, Finding::Removed)?,
                None => {
                    return Err(CaptureError::Changed {
                        path: child.absolute(),
                        what: "it was removed",
                    });
                }
                Some(stat) if stat.mount != tree.mount => visit(&child, &stat, Finding::Covered)?,
                Some(stat) if stat.kind == Kind::Directory => directories.push((child, changes)),
                Some(stat) => visit(&child, &stat, Finding::Object { dir: dir.as_fd(), name })?,
            }
        }
        pending.extend(directories.into_iter().rev());
    }
    Ok(())
}

struct Writing<'a> {
    out: LayerWriter<'a>,
    upper: Option<&'a Tree>,
    leased: &'a LeasedFiles,
    report: LayerReport,
    /// Files with several names, by identity: the name they were told under.
    first_names: HashMap<(u32, u32, u64), TreePath>,
    buffer: Vec<u8>,
}

impl<'a> Writing<'a> {
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
                let xattrs =
                    metadata::xattrs(Object::Open(dir)).attempt("read attributes of", path)?;
                self.entry(path, Content::Directory { sockets }, Metadata::of(stat, xattrs))?;
                if opaque { self.entry(path, Content::Opaque, Metadata::default()) } else { Ok(()) }
            }
            Finding::Removed => {
                self.report.whiteouts += 1;
                self.entry(path, Content::Whiteout, Metadata::default())
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
                        // Other programs set an entry's metadata whatever its type.
                        let xattrs = metadata::xattrs(Object::Named(dir, name))
                            .attempt("read attributes of", path)?;
                        return self.entry(
                            path,
                            Content::HardLink { target },
                            Metadata::of(stat, xattrs),
                        );
                    }
                    self.first_names.insert(stat.identity, path.clone());
                }
                self.object(path, stat, dir, name)
            }
        }
    }

    fn object(
        &mut self,
        path: &TreePath,
        stat: &Stat,
        dir: BorrowedFd<'_>,
        name: &OsStr,
    ) -> Result<(), CaptureError> {
        let (major, minor) = stat.device;
        let content = match stat.kind {
            Kind::File => return self.file(path, stat, dir, name),
            Kind::Symlink => {
                let target =
                    rustix::fs::readlinkat(dir, name, Vec::new()).attempt("read the link", path)?;
                Content::Symlink { target: target.into_bytes() }
            }
            Kind::Fifo => Content::Fifo,
            Kind::CharDevice => Content::CharDevice { major, minor },
            Kind::BlockDevice => Content::BlockDevice { major, minor },
            Kind::Directory | Kind::Socket => unreachable!("the walk tells of these in other ways"),
        };
        let xattrs =
            metadata::xattrs(Object::Named(dir, name)).attempt("read attributes of", path)?;
        self.entry(path, content, Metadata::of(stat, xattrs))
    }

    fn file(
        &mut self,
        path: &TreePath,
        stat: &Stat,
        dir: BorrowedFd<'_>,
        name: &OsStr,
    ) -> Result<(), CaptureError> {
        let changed = |what| CaptureError::Changed { path: path.absolute(), what };
        let leased = self.leased.get(stat.identity);
        let (file, opened) = match leased {
            Some(description) => (self.open_leased(path, description)?, *stat),
            None => {
                let file = open_file(dir, name).attempt("open", path)?;
                let opened = stat_fd(&file).attempt("look up", path)?;
                if (opened.identity, opened.kind) != (stat.identity, Kind::File) {
                    return Err(changed("another object took its name"));
                }
                (Source::Own(file), opened)
            }
        };
        let size = opened.size;
        let object =
            if leased.is_some() { Object::Named(dir, name) } else { Object::Open(file.as_fd()) };
        let xattrs = metadata::xattrs(object).attempt("read attributes of", path)?;
        let segments = file.segments(size, opened.blocks).attempt("find the holes of", path)?;
        let whole = [Segment { offset: 0, length: size }];
        let content = Content::File { size, segments };
        self.entry_headers(path, content.clone(), Metadata::of(&opened, xattrs))?;
        let Content::File { segments, .. } = content else { unreachable!("made above") };
        for segment in segments.as_deref().unwrap_or(&whole) {
            read_segment(file.as_fd(), *segment, &mut self.out, &mut self.buffer).map_err(|e| {
                match e {
                    CopyError::From(source) => {
                        HostError { action: "read", path: path.into(), source }.into()
                    }
                    CopyError::To(source) => CaptureError::Write(source),
                    CopyError::Short => changed("it became shorter"),
                }
            })?;
            self.report.content_bytes += segment.length;
        }
        self.out.pad().map_err(CaptureError::Write)?;
        if stat_fd(&file).attempt("look up", path)?.size != size {
            return Err(changed("it became longer"));
        }
        Ok(())
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

    fn note_flags(&mut self, path: &TreePath, stat: &Stat) {
        if stat.flagged {
            self.report.flagged.push(path.absolute());
        }
    }

    fn entry(
        &mut self,
        path: &TreePath,
        content: Content,
        metadata: Metadata,
    ) -> Result<(), CaptureError> {
        self.entry_headers(path, content, metadata)?;
        self.out.pad().map_err(CaptureError::Write)
    }

    fn entry_headers(
        &mut self,
        path: &TreePath,
        content: Content,
        metadata: Metadata,
    ) -> Result<(), CaptureError> {
        self.report.entries += 1;
        self.out.entry(&Entry { path: path.clone(), content, metadata }).map_err(|e| match e {
            EncodeError::Write(source) => CaptureError::Write(source),
            EncodeError::Unfit(why) => CaptureError::Unsupported { path: path.absolute(), why },
        })
    }

    fn end(mut self) -> Result<LayerReport, CaptureError> {
        self.report.stream_bytes = self.out.end().map_err(CaptureError::Write)?;
        Ok(self.report)
    }
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
