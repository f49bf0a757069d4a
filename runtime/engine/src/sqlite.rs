//! Open SQLite databases, which know their file by device and inode.
//!
//! SQLite keeps both numbers of each database that it has open. Before it writes it looks at the path again: where the inode
//! has changed it takes the database for one that was moved away, and refuses to write (`SQLITE_READONLY_DBMOVED`). Where the
//! device has changed, a second connection is not seen to be one to the same file, and the lock that it gives back is the
//! first one's. A copy of the file on another host has other numbers, and no file system lets us choose them. So this is the
//! one place where the engine writes into a program's memory anything but what was there: the new numbers in the place of
//! the old ones.
//!
//! A place is only taken for SQLite's if all of the chain is there (src/os_unix.c, unchanged since 2010): a `unixFile`, that
//! begins with its methods, its VFS, a pointer to the file's `unixInodeInfo`, and the descriptor of a file that begins as
//! databases do; the methods begin with their version and functions in executable memory, the VFS with its version, and the
//! `unixInodeInfo` with the device and inode that were saved. Equal numbers elsewhere in memory are left alone.
//!
//! What it costs: the saved pages of a process that has a database open are read twice. Others are not looked at.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;

use samara_capsule::record::{Alive, Backing, FileKind, OpenFile};
use samara_capsule::transfer::PageRun;
use samara_kernel::{Pid, process_vm};

use crate::memory::PAGE;

/// Device and inode of a file, in the order and the width of SQLite's `struct unixFileId`.
type Identity = [u64; 2];

/// A descriptor that refers to a database, with the identity that the file had and the one that it has.
struct Database {
    fd: i32,
    was: Identity,
    is: Identity,
}

/// Places that are looked at more closely. A program has one for each database that it opened.
const PLACES_MAX: usize = 1 << 16;

/// Offsets in `unixFile`: pMethod, pVfs, pInode, h.
const FILE_INODE: u64 = 16;
const FILE_BYTES: usize = 28;

/// Gives the databases that a process has open their files' new numbers. Returns how many were found in its memory.
///
/// To be called when memory and descriptors are in place. `runs` are the pages that came from the capsule.
pub(crate) fn follow(
    pid: Pid,
    alive: &Alive,
    files: &[OpenFile],
    runs: &[PageRun],
) -> io::Result<usize> {
    let databases = databases(pid, alive, files)?;
    if databases.is_empty() {
        return Ok(0);
    }
    let mut inodes = Vec::new();
    each_pair(pid, alive, runs, &mut |address, pair| {
        if inodes.len() < PLACES_MAX && databases.iter().any(|database| database.was == pair) {
            inodes.push(address);
        }
    })?;
    inodes.sort_unstable();
    let mut found = Vec::new();
    each_pair(pid, alive, runs, &mut |address, [word, _]| {
        if found.len() < PLACES_MAX && address >= FILE_INODE && inodes.binary_search(&word).is_ok()
        {
            found.push((address - FILE_INODE, word));
        }
    })?;
    let mut patched = BTreeSet::new();
    for (file, info) in found {
        let Some(fd) = unix_file(pid, alive, file) else { continue };
        let Some(database) = databases.iter().find(|database| database.fd == fd) else { continue };
        if words(pid, info) != Some(database.was) {
            continue;
        }
        let [device, inode] = database.is;
        let numbers = [device.to_le_bytes(), inode.to_le_bytes()].concat();
        process_vm::write(
            pid,
            &[process_vm::Range { address: info, bytes: numbers.len() }],
            &numbers,
        )?;
        patched.insert(info);
    }
    Ok(patched.len())
}

/// The descriptors of a process behind which a database is, or a file that may become one.
fn databases(pid: Pid, alive: &Alive, files: &[OpenFile]) -> io::Result<Vec<Database>> {
    const MAGIC: &[u8] = b"SQLite format 3\0";
    let mut databases = Vec::new();
    for descriptor in &alive.descriptors {
        let Some(file) = files.get(descriptor.file as usize) else { continue };
        let FileKind::Regular { device, inode, .. } = file.kind else { continue };
        if file.flags & libc::O_ACCMODE == libc::O_WRONLY {
            continue;
        }
        let file = File::open(format!("/proc/{pid}/fd/{}", descriptor.fd))?;
        let metadata = file.metadata()?;
        let mut begin = Vec::new();
        file.take(MAGIC.len() as u64).read_to_end(&mut begin)?;
        if begin.is_empty() || begin == MAGIC {
            let is = [metadata.dev(), metadata.ino()];
            databases.push(Database { fd: descriptor.fd, was: [device, inode], is });
        }
    }
    Ok(databases)
}

/// The descriptor that a `unixFile` at this address holds, if one is there.
fn unix_file(pid: Pid, alive: &Alive, address: u64) -> Option<i32> {
    /// `sqlite3_io_methods` and `sqlite3_vfs` are at versions 3 and 3.
    const VERSION_MAX: u64 = 8;
    let mut file = [0; FILE_BYTES];
    read(pid, address, &mut file)?;
    let word = |at: usize| {
        file.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes)
    };
    let [version, close] = words(pid, word(0)?)?;
    // The version is an int with padding behind it.
    let is_version = |word: u64| (1..=VERSION_MAX).contains(&(word & u64::from(u32::MAX)));
    let [vfs, _] = words(pid, word(8)?)?;
    let is_code = alive.mappings.iter().any(|mapping| {
        mapping.start <= close
            && close < mapping.end
            && mapping.protection & libc::PROT_EXEC.unsigned_abs() != 0
    });
    let fd = file.get(24..28).and_then(|bytes| bytes.try_into().ok()).map(i32::from_le_bytes)?;
    (is_version(version) && is_version(vfs) && is_code).then_some(fd)
}

fn words(pid: Pid, address: u64) -> Option<Identity> {
    let mut bytes = [0; 16];
    read(pid, address, &mut bytes)?;
    let (first, second) = bytes.split_at(8);
    Some([u64::from_le_bytes(first.try_into().ok()?), u64::from_le_bytes(second.try_into().ok()?)])
}

/// `None` where there is no memory.
fn read(pid: Pid, address: u64, buffer: &mut [u8]) -> Option<()> {
    let range = process_vm::Range { address, bytes: buffer.len() };
    let got = process_vm::read(pid, &[range], buffer).ok()?;
    (got == buffer.len()).then_some(())
}

/// Passes each two aligned words that follow one another in the saved pages of private, writable memory, with their address.
fn each_pair(
    pid: Pid,
    alive: &Alive,
    runs: &[PageRun],
    visit: &mut dyn FnMut(u64, [u64; 2]),
) -> io::Result<()> {
    const AT_ONCE: u64 = 1 << 20;
    let mut buffer = vec![0; usize::try_from(AT_ONCE).expect("a mebibyte")];
    let mappings = alive.mappings.iter().filter(|mapping| {
        let private =
            matches!(mapping.backing, Backing::Anonymous { .. } | Backing::PrivateFile { .. });
        private && mapping.protection & libc::PROT_WRITE.unsigned_abs() != 0
    });
    for mapping in mappings {
        let next = runs.partition_point(|run| (run.first + run.count) * PAGE <= mapping.start);
        let (mut before, mut reached) = (0, 0);
        for run in runs.iter().skip(next) {
            let start = (run.first * PAGE).max(mapping.start);
            let end = ((run.first + run.count) * PAGE).min(mapping.end);
            if start >= end {
                break;
            }
            if start != reached {
                before = 0;
            }
            reached = end;
            let mut address = start;
            while address < end {
                let bytes = usize::try_from((end - address).min(AT_ONCE)).expect("a mebibyte");
                let chunk = buffer.get_mut(..bytes).unwrap_or_default();
                let range = process_vm::Range { address, bytes };
                let got = process_vm::read(pid, &[range], chunk)?;
                if got != bytes {
                    let what = format!("only {got} of {bytes} bytes could be read at {address:#x}");
                    return Err(io::Error::other(what));
                }
                for (word, place) in chunk.chunks_exact(8).zip((address..).step_by(8)) {
                    let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
                    visit(place.wrapping_sub(8), [before, word]);
                    before = word;
                }
                address += bytes as u64;
            }
        }
    }
    Ok(())
}
