//! A root whose /dev is a folder of the root itself, and still has what an earlier container in it was given.
//!
//! libcontainer makes the default links and device nodes and takes none that is there, so those are removed before, each only if
//! it is exactly what will be made. Anything else stays, and libcontainer names it.
//!
//! What it does not do: touch a /dev that something is mounted on, or follow a link out of the root.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceType, LinuxNamespaceType};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::bundle::Bundle;

/// What libcontainer makes of links in every container.
const LINKS: [(&str, &str); 5] = [
    ("kcore", "/proc/kcore"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// What it makes of character devices, beside those of the specification: by name in /dev and number.
pub(crate) const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Makes room in the root's /dev for what libcontainer will make there.
///
/// # Errors
/// What could not be looked at or removed. /dev being a link is one: it would lead libcontainer out of the root.
pub(crate) fn make_room(bundle: &Bundle) -> io::Result<()> {
    let mounted = |at: &str| {
        bundle.spec.mounts().iter().flatten().any(|mount| mount.destination() == Path::new(at))
    };
    if mounted("/dev") {
        return Ok(());
    }
    let root = rustix::fs::open(
        &bundle.rootfs,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let dev = match rustix::fs::openat2(&root, "dev", flags, Mode::empty(), resolve) {
        // Not there, or a mount of the host's that somebody prepared.
        Err(Errno::NOENT | Errno::XDEV) => return Ok(()),
        other => other?,
    };
    for (name, target) in LINKS {
        let found = rustix::fs::readlinkat(&dev, name, Vec::new());
        if found.is_ok_and(|found| found.to_bytes() == target.as_bytes()) {
            rustix::fs::unlinkat(&dev, name, AtFlags::empty())?;
        }
    }
    let linux = bundle.spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    if namespaces.into_iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User)
    {
        // There the host's devices are mounted over whatever lies at their place.
        return Ok(());
    }
    let given = linux.and_then(|linux| linux.devices().as_ref()).into_iter().flatten();
    let given: Vec<(&OsStr, FileType, u32, u32)> = given
        .filter_map(|device| {
            let name = device.path().strip_prefix("/dev").ok()?;
            let kind = match device.typ() {
                LinuxDeviceType::B => FileType::BlockDevice,
                LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
                LinuxDeviceType::P | LinuxDeviceType::A => return None,
            };
            let number = |number: i64| u32::try_from(number).ok();
            // In a folder below, libcontainer's error has to do.
            let plain = name.components().count() == 1;
            plain.then_some((
                name.as_os_str(),
                kind,
                number(device.major())?,
                number(device.minor())?,
            ))
        })
        .collect();
    for (name, kind, major, minor) in &given {
        remove_device(&dev, name, *kind, (*major, *minor))?;
    }
    for (name, major, minor) in DEVICES {
        let name = OsStr::new(name);
        if !given.iter().any(|(other, ..)| *other == name) {
            remove_device(&dev, name, FileType::CharacterDevice, (major, minor))?;
        }
    }
    Ok(())
}

fn remove_device(
    dev: &OwnedFd,
    name: &OsStr,
    kind: FileType,
    number: (u32, u32),
) -> io::Result<()> {
    let Ok(found) = rustix::fs::statat(dev, name, AtFlags::SYMLINK_NOFOLLOW) else { return Ok(()) };
    let (major, minor) = (rustix::fs::major(found.st_rdev), rustix::fs::minor(found.st_rdev));
    if FileType::from_raw_mode(found.st_mode) == kind && (major, minor) == number {
        rustix::fs::unlinkat(dev, name, AtFlags::empty())?;
    }
    Ok(())
}
