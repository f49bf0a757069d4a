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

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags, OpenTreeFlags};

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

/// Finishes the mounts of `spec`.
pub fn finish(spec: &Spec) -> Result<(), MountError> {
    for mount in spec.mounts().iter().flatten() {
        let destination = mount.destination();
        let options = || mount.options().iter().flatten().map(String::as_str);
        if options().any(|option| option == COPY_UP) && !mount_is_bind(mount) {
            copy_up(destination)?;
        }
        for flags in options().filter_map(propagation) {
            rustix::mount::mount_change(destination, flags).map_err(|errno| MountError {
                attempt: "set the propagation of",
                path: destination.clone(),
                source: errno.into(),
            })?;
        }
        if mount.typ().as_deref() == Some("cgroup") && options().any(|option| option == "ro") {
            make_cgroups_read_only(destination)?;
        }
    }
    Ok(())
}

fn mount_is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

/// libcontainer mounts the hierarchies of cgroup v1 writable whatever the options say, and a
/// container that can write there can allow itself every device.
fn make_cgroups_read_only(destination: &Path) -> Result<(), MountError> {
    let error = |path: &Path, source| MountError {
        attempt: "make read-only",
        path: path.to_owned(),
        source,
    };
    let below = procfs::process::Process::myself()
        .and_then(|me| me.mountinfo())
        .map_err(|source| error(destination, io::Error::other(source)))?;
    for mount in &below.0 {
        let under = mount.mount_point.starts_with(destination);
        if under && matches!(mount.fs_type.as_str(), "cgroup" | "cgroup2") {
            let flags = MountFlags::BIND
                | MountFlags::RDONLY
                | MountFlags::NOSUID
                | MountFlags::NODEV
                | MountFlags::NOEXEC;
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
            let mut source = std::fs::File::from(rustix::fs::openat(
                &from,
                name,
                flags,
                Mode::empty(),
            )?);
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
