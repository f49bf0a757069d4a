//! Bringing names back to what the base image has, through the merged mount.
//!
//! An engine that starts an old container again hands in a root whose upper layer holds what the container did since the
//! capture. What the captured layer does not speak of must then be as in the base image: files that were made since
//! go, files that were changed or removed since come back as copies from the lower layers. The upper directory only
//! tells where to look; where it can't (a directory that hides or renames the lower one), all names are compared.
//!
//! A file of the base image that has several names, one of which comes back as a copy, comes back under all the names
//! that show it unchanged, so that they stay names of one file.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::changes::{Made, enter, make, make_file, make_node, remove};
use super::content::copy_file;
use super::metadata::{self, Metadata, Object};
use super::root::{BaseView, NamesByDirectory, Overlay, each_name};
use super::tree::{Kind, Stat, Tree, TreePath, names, open_file, stat_fd, stat_name};
use super::{ApplyReport, Attempt, HostError};

/// The views of a target that tell what its base image has, and where the target differs.
pub(super) struct Base<'a> {
    overlay: &'a Overlay,
    merged: &'a Tree,
    view: BaseView,
    upper: Option<Tree>,
    /// Names outside the upper directory that show a file of it.
    indexed: NamesByDirectory,
}

impl<'a> Base<'a> {
    pub(super) fn of(overlay: &'a Overlay, merged: &'a Tree) -> Result<Base<'a>, HostError> {
        let view = overlay.base_view(&overlay.lowers)?;
        let upper = overlay
            .upper
            .as_deref()
            .map(|path| Tree::beneath_mounts(path).attempt("open", path))
            .transpose()?;
        let indexed = overlay.indexed_names(merged, &view.tree)?;
        Ok(Base { overlay, merged, view, upper, indexed })
    }

    pub(super) fn start(&'a self) -> Run<'a> {
        Run { base: self, copied: BTreeMap::new(), copied_names: HashSet::new() }
    }

    /// Whether the target's directory hides the lower one, or shows another one in its place.
    pub(super) fn is_irregular(&self, path: &TreePath) -> Result<bool, HostError> {
        let Some(upper) = &self.upper else { return Ok(false) };
        let Some(dir) = upper.dir_if_any(path).attempt("open the upper layer's", path)? else {
            return Ok(false);
        };
        let marks = self.overlay.marks(dir).attempt("read overlay attributes of", path)?;
        Ok(marks.opaque || marks.redirect)
    }

    /// Whether a file lies in the upper layer and was not copied there from a lower one.
    pub(super) fn is_made_above(&self, path: &TreePath) -> Result<bool, HostError> {
        let (Some(upper), Some((parent, name))) = (&self.upper, path.split()) else {
            return Ok(false);
        };
        let Some(dir) = upper.dir_if_any(&parent).attempt("open the upper layer's", &parent)?
        else {
            return Ok(false);
        };
        if stat_name(&dir, name).attempt("look up in the upper layer", path)?.is_none() {
            return Ok(false);
        }
        let origin = self.overlay.attribute("origin");
        let copied = metadata::xattr(Object::Named(dir.as_fd(), name), &origin)
            .attempt("read overlay attributes of", path)?;
        Ok(copied.is_none())
    }

    /// The names in a directory that may differ from the base image.
    fn suspects(
        &self,
        path: &TreePath,
        dir: BorrowedFd<'_>,
        irregular: bool,
    ) -> Result<BTreeSet<OsString>, HostError> {
        let mut found = BTreeSet::new();
        if irregular {
            found.extend(names(dir).attempt("list", path)?);
            if let Some(base_dir) =
                self.view.tree.dir_if_any(path).attempt("open the base image's", path)?
            {
                found.extend(names(base_dir).attempt("list the base image's", path)?);
            }
        } else if let Some(upper) = &self.upper
            && let Some(upper_dir) =
                upper.dir_if_any(path).attempt("open the upper layer's", path)?
        {
            found.extend(names(upper_dir).attempt("list the upper layer's", path)?);
        }
        found.extend(self.indexed.get(path).into_iter().flatten().cloned());
        Ok(found)
    }
}

/// One application's reverting.
pub(super) struct Run<'a> {
    base: &'a Base<'a>,
    /// Files of the base image with several names, by identity there: the name of their copy.
    copied: BTreeMap<(u32, u32, u64), TreePath>,
    /// All names of such copies.
    copied_names: HashSet<TreePath>,
}

impl Run<'_> {
    /// Makes every name of a directory but those in `seen` equal to the base image's.
    pub(super) fn put_right(
        &mut self,
        path: &TreePath,
        dir: &OwnedFd,
        irregular: bool,
        seen: &HashSet<OsString>,
        report: &mut ApplyReport,
    ) -> Result<(), HostError> {
        let mut pending = Vec::new();
        for name in self.base.suspects(path, dir.as_fd(), irregular)? {
            if !seen.contains(&name) {
                pending.push((child(path, &name)?, irregular));
            }
        }
        let mut directories = Vec::new();
        while let Some((path, irregular)) = pending.pop() {
            let (parent, name) = path.split().expect("a child is not the root");
            let dir = self.base.merged.dir(&parent).attempt("open", &parent)?;
            let Some(stat) =
                self.base.view.tree.stat(&path).attempt("look up in the base image", &path)?
            else {
                if stat_name(&dir, name).attempt("look up", &path)?.is_some() {
                    remove(self.base.merged, dir.as_fd(), name, &path)?;
                    report.removed += 1;
                }
                continue;
            };
            report.reverted += 1;
            if stat.kind != Kind::Directory {
                self.copy(&dir, name, &path, &stat)?;
                continue;
            }
            let Some(entered) = enter(self.base.merged, dir.as_fd(), name, &path)? else {
                continue;
            };
            metadata::drop_default_acl(&entered).attempt("drop the default ACL of", &path)?;
            let irregular = irregular || self.base.is_irregular(&path)?;
            for name in self.base.suspects(&path, entered.as_fd(), irregular)? {
                pending.push((child(&path, &name)?, irregular));
            }
            directories.push((path, stat));
        }
        for (path, stat) in directories.iter().rev() {
            let from = self.base.view.tree.dir(path).attempt("open the base image's", path)?;
            let xattrs =
                metadata::xattrs(Object::Open(from.as_fd())).attempt("read attributes of", path)?;
            let to = self.base.merged.dir(path).attempt("open", path)?;
            metadata::set(Object::Open(to.as_fd()), Kind::Directory, &Metadata::of(stat, xattrs))
                .attempt("set metadata of", path)?;
        }
        Ok(())
    }

    fn copy(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &TreePath,
        stat: &Stat,
    ) -> Result<(), HostError> {
        let base = self.base;
        if stat.links > 1 {
            self.copied_names.insert(path.clone());
            if let Some(first) = self.copied.get(&stat.identity) {
                return link(base.merged, first, dir, name, path);
            }
            self.copied.insert(stat.identity, path.clone());
        }
        let (parent, _) = path.split().expect("a child is not the root");
        let from_dir = base.view.tree.dir(&parent).attempt("open the base image's", &parent)?;
        let named = Object::Named(dir.as_fd(), name);
        if stat.kind == Kind::File {
            let from = open_file(&from_dir, name).attempt("open the base image's", path)?;
            let xattrs =
                metadata::xattrs(Object::Open(from.as_fd())).attempt("read attributes of", path)?;
            let made = make_file(base.merged, Some(base), dir.as_fd(), name, path)?;
            let Made::New((to, there)) = made else { return Ok(()) };
            if there > 0 {
                rustix::fs::ftruncate(&to, 0).attempt("empty", path)?;
            }
            copy_file(from.as_fd(), to.as_fd(), stat.size, stat.blocks)
                .attempt("copy from the base image", path)?;
            return metadata::set(
                Object::Open(to.as_fd()),
                Kind::File,
                &Metadata::of(stat, xattrs),
            )
            .attempt("set metadata of", path);
        }
        let xattrs = metadata::xattrs(Object::Named(from_dir.as_fd(), name))
            .attempt("read attributes of", path)?;
        let target = match stat.kind {
            Kind::Symlink => Some(
                rustix::fs::readlinkat(&from_dir, name, Vec::new())
                    .attempt("read the link", path)?,
            ),
            _ => None,
        };
        let made = make(base.merged, dir.as_fd(), name, path, &mut || match &target {
            Some(target) => rustix::fs::symlinkat(target.as_c_str(), dir, name),
            None => make_node(dir.as_fd(), name, stat.kind, stat.device),
        })?;
        match made {
            Made::New(()) => metadata::set(named, stat.kind, &Metadata::of(stat, xattrs))
                .attempt("set metadata of", path),
            Made::Mounted => Ok(()),
        }
    }

    /// Joins the unchanged names of files that came back as copies to those copies.
    pub(super) fn finish(self, report: &mut ApplyReport) -> Result<(), HostError> {
        if self.copied.is_empty() {
            return Ok(());
        }
        let base = self.base;
        let mut names: HashMap<TreePath, Stat> = HashMap::new();
        each_name(&base.view.tree, &mut |dir, name, path, kind| {
            if kind != Kind::Directory
                && !self.copied_names.contains(path)
                && let Some(stat) =
                    stat_name(dir, name)?.filter(|s| self.copied.contains_key(&s.identity))
            {
                names.insert(path.clone(), stat);
            }
            Ok(())
        })?;
        for (path, stat) in names {
            // A name that the upper layer has is what the captured layer wanted it to be.
            let in_upper = match &base.upper {
                Some(upper) => {
                    upper.stat(&path).attempt("look up in the upper layer", &path)?.is_some()
                }
                None => false,
            };
            let Some(shown) = base.merged.stat(&path).attempt("look up", &path)? else { continue };
            // Inode numbers can differ from mount to mount; no change leaves the time of change as it was.
            let unchanged = (shown.kind, shown.changed) == (stat.kind, stat.changed);
            if in_upper || !unchanged {
                continue;
            }
            let (parent, name) = path.split().expect("a file is not the root");
            let dir = base.merged.dir(&parent).attempt("open", &parent)?;
            let before = stat_fd(&dir).attempt("look up", &parent)?;
            link(base.merged, &self.copied[&stat.identity], &dir, name, &path)?;
            metadata::set_modified(Object::Open(dir.as_fd()), before.modified)
                .attempt("set the time of", &parent)?;
            report.reverted += 1;
        }
        Ok(())
    }
}

fn child(path: &TreePath, name: &OsStr) -> Result<TreePath, HostError> {
    path.child(name).map_err(|_| Errno::NAMETOOLONG).attempt("walk", path)
}

fn link(
    tree: &Tree,
    first: &TreePath,
    dir: &OwnedFd,
    name: &OsStr,
    path: &TreePath,
) -> Result<(), HostError> {
    let first_handle = tree.handle(first).attempt("open", first)?;
    make(tree, dir.as_fd(), name, path, &mut || {
        rustix::fs::linkat(&first_handle, "", dir, name, AtFlags::EMPTY_PATH)
    })?;
    Ok(())
}
