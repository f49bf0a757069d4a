//! What libcontainer leaves undone about mounts: propagation, a read-only cgroup tree, tmpfs that
//! begins with what it covers.
//!
//! Runs in the container's init, in its mount namespace and root, before anything of the container
//! does; so it does not matter that it comes after the mounts themselves.
//! What it does not do: mount anything new.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags, OpenTreeFlags};

use crate::bundle::Bundle;

/// runc's and crun's option: copy what the mount point holds into the new tmpfs.
pub(crate) const COPY_UP: &str = "tmpcopyup";

#[derive(Debug, thiserror::Error)]
#[error("mounts: cannot {attempt} {path}")]
pub struct MountError {
    attempt: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The propagation that `option` names, and whether it goes down the tree.
pub(crate) fn propagation(option: &str) -> Option<MountPropagationFlags> {
    let rec = MountPropagationFlags::REC;
    Some(match option {
        "private" => MountPropagationFlags::PRIVATE,
        "rprivate" => MountPropagationFlags::PRIVATE | rec,
        "shared" => MountPropagationFlags::SHARED,
        "rshared" => MountPropagationFlags::SHARED | rec,
        // In the OCI specification and in mount(8) the slave is downstream.
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "rslave" => MountPropagationFlags::DOWNSTREAM | rec,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        "runbindable" => MountPropagationFlags::UNBINDABLE | rec,
        _ => return None,
    })
}

/// The mounts of a bundle, with what must be known of them before they are made.
#[derive(Clone, Debug)]
pub struct Unfinished(Vec<(Mount, Option<u32>)>);

impl Unfinished {
    /// Looks at the mount points of `bundle` before libcontainer makes those that are missing.
    pub fn of(bundle: &Bundle) -> Self {
        let mounts = bundle.spec.mounts().iter().flatten();
        Self(mounts.map(|mount| (mount.clone(), covered_mode(&bundle.rootfs, mount))).collect())
    }

    /// Finishes the mounts, in the container.
    pub fn finish(&self) -> Result<(), MountError> {
        for (mount, covered_mode) in &self.0 {
            finish(mount, *covered_mode)?;
        }
        Ok(())
    }
}

/// As in runc, a tmpfs without a mode of its own has that of the folder that it covers.
fn covered_mode(rootfs: &Path, mount: &Mount) -> Option<u32> {
    let own_mode = mount.options().iter().flatten().any(|option| option.starts_with("mode="));
    if mount.typ().as_deref() != Some("tmpfs") || mount_is_bind(mount) || own_mode {
        return None;
    }
    let root = rustix::fs::open(rootfs, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let inside = mount.destination().strip_prefix("/").ok()?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // An image's symbolic links lead nowhere but into the image.
    let folder =
        rustix::fs::openat2(&root, inside, flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
    let mode = rustix::fs::fstat(&folder).ok()?.st_mode;
    Some(Mode::from_raw_mode(mode).as_raw_mode())
}

fn finish(mount: &Mount, covered_mode: Option<u32>) -> Result<(), MountError> {
    let destination = mount.destination();
    let error = |attempt| {
        move |source: io::Error| MountError { attempt, path: destination.clone(), source }
    };
    let options = || mount.options().iter().flatten().map(String::as_str);
    let read_only = options().any(|option| option == "ro");
    if options().any(|option| option == COPY_UP) && !mount_is_bind(mount) {
        copy_up(destination)?;
    }
    if let Some(mode) = covered_mode.filter(|_| !read_only) {
        std::fs::set_permissions(destination, std::fs::Permissions::from_mode(mode))
            .map_err(error("set the mode of"))?;
    }
    for flags in options().filter_map(propagation) {
        rustix::mount::mount_change(destination, flags)
            .map_err(|errno| error("set the propagation of")(errno.into()))?;
    }
    if mount.typ().as_deref() == Some("cgroup") {
        finish_cgroups(destination, &options().collect::<Vec<_>>())?;
    }
    Ok(())
}

fn mount_is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

/// libcontainer mounts the hierarchies of cgroup v1 writable whatever the options say, and a
/// container that can write there can allow itself every device.
fn finish_cgroups(destination: &Path, options: &[&str]) -> Result<(), MountError> {
    let error = |path: &Path, source| MountError {
        attempt: "set the options of",
        path: path.to_owned(),
        source,
    };
    let flag = |(name, flag): (&str, MountFlags)| {
        if options.contains(&name) { flag } else { MountFlags::empty() }
    };
    let flags = [
        ("ro", MountFlags::RDONLY),
        ("nosuid", MountFlags::NOSUID),
        ("nodev", MountFlags::NODEV),
        ("noexec", MountFlags::NOEXEC),
    ]
    .into_iter()
    .map(flag)
    .fold(MountFlags::BIND, std::ops::BitOr::bitor);
    let mounts = procfs::process::Process::myself()
        .and_then(|me| me.mountinfo())
        .map_err(|source| error(destination, io::Error::other(source)))?;
    for mount in &mounts.0 {
        let under = mount.mount_point.starts_with(destination);
        if under && matches!(mount.fs_type.as_str(), "cgroup" | "cgroup2") {
            rustix::mount::mount_remount(&mount.mount_point, flags, c"")
                .map_err(|errno| error(&mount.mount_point, errno.into()))?;
        }
    }
    Ok(())
}

/// Copies what lies under the mount at `destination` into it.
fn copy_up(destination: &Path) -> Result<(), MountError> {
    let error = |source: io::Error| MountError {
        attempt: "copy the covered files into",
        path: destination.to_owned(),
        source,
    };
    let inside = destination.strip_prefix("/").unwrap_or(destination);
    // A clone of the root's own mount, without those on top of it, shows what they cover.
    let uncovered = rustix::mount::open_tree(
        rustix::fs::CWD,
        "/",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .map_err(|errno| error(errno.into()))?;
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let from = match rustix::fs::openat(&uncovered, inside, flags, Mode::empty()) {
        Ok(from) => from,
        // libcontainer made the mount point, or a symbolic link leads elsewhere: nothing to copy.
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR) => {
            return Ok(());
        }
        Err(errno) => return Err(error(errno.into())),
    };
    copy_folder(from, destination).map_err(error)
}

fn copy_folder(from: OwnedFd, to: &Path) -> io::Result<()> {
    let folder = rustix::fs::Dir::read_from(&from)?;
    for entry in folder {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let target = to.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let stat = rustix::fs::statat(&from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
        let mode = Mode::from_raw_mode(stat.st_mode);
        if kind.is_dir() {
            match std::fs::create_dir(&target) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            copy_folder(rustix::fs::openat(&from, name, flags, Mode::empty())?, &target)?;
        } else if kind.is_symlink() {
            let link = rustix::fs::readlinkat(&from, name, Vec::new())?;
            rustix::fs::symlink(link, &target)?;
        } else if kind.is_file() {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut source =
                std::fs::File::from(rustix::fs::openat(&from, name, flags, Mode::empty())?);
            io::copy(&mut source, &mut std::fs::File::create_new(&target)?)?;
        } else {
            // As runc: devices, sockets and pipes are not copied.
            continue;
        }
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        rustix::fs::chownat(
            rustix::fs::CWD,
            &target,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        if !kind.is_symlink() {
            let permissions = std::fs::Permissions::from_mode(mode.as_raw_mode());
            std::fs::set_permissions(&target, permissions)?;
        }
    }
    Ok(())
}
