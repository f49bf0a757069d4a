//! The vdso and its data: what the kernel maps into every process to answer some calls without a call.
//!
//! A kernel makes all parts whole or not at all, and lets a program only move, protect or unmap a whole one
//! (arch/x86/entry/vdso/vma.c, mm/mmap.c: special_mapping_split). Restored is the new host's own, which must be the same to the
//! byte, with each part where it was; parts that the program has unmapped wait out of the way until nothing else is to be done.
//!
//! What this module does not do: save what a program has written over its vdso.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use samara_capsule::record::{Alive, Backing, Bytes};
use samara_kernel::Pid;
use samara_kernel::proc::{self, Mapping};
use samara_kernel::tape::End;
use sha2::{Digest, Sha256};

use crate::capture::{CaptureError, Tables, read};
use crate::restore::{RestoreError, make};
use crate::tracee::{PADDING_BYTES, Process, Room};
use crate::unsupported::Place;

pub(crate) fn is_part(mapping: &Mapping) -> bool {
    mapping.name == "[vdso]" || mapping.name.as_bytes().starts_with(b"[vvar")
}

pub(crate) fn protection(mapping: &Mapping) -> u32 {
    u32::from(mapping.read) | u32::from(mapping.write) << 1 | u32::from(mapping.execute) << 2
}

/// What this host's kernel maps into a new process.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    /// Name and size of each part, in the order of a new process.
    parts: Vec<(OsString, u64)>,
    /// Of the vdso, without the padding.
    code: Vec<u8>,
    sha256: [u8; 32],
}

impl Host {
    /// Looks at the engine's own.
    pub(crate) fn look() -> io::Result<Host> {
        let own = proc::mappings(i32::try_from(std::process::id()).expect("a pid"))?;
        let vdso = own.iter().find(|mapping| mapping.name == "[vdso]");
        let vdso = vdso.ok_or_else(|| io::Error::other("this kernel offers no vdso"))?;
        let mut code = vec![0; code_bytes(vdso)];
        File::open("/proc/self/mem")?.read_exact_at(&mut code, vdso.start)?;
        let parts = own.iter().filter(|mapping| is_part(mapping));
        let parts = parts.map(|part| (part.name.clone(), part.bytes())).collect();
        let sha256 = Sha256::digest(&code).into();
        Ok(Host { parts, code, sha256 })
    }

    pub(crate) fn sha256(&self) -> [u8; 32] {
        self.sha256
    }
}

fn code_bytes(vdso: &Mapping) -> usize {
    usize::try_from(vdso.bytes()).expect("a vdso has a few pages").saturating_sub(PADDING_BYTES)
}

/// The digest of a vdso's code without the padding, where the engine leaves traces.
pub(crate) fn digest(process: &Process, vdso: &Mapping) -> Result<Bytes, RestoreError> {
    let code = process.read(vdso.start, code_bytes(vdso))?;
    Ok(Bytes::from(Sha256::digest(&code).to_vec()))
}

/// Which part a mapping is.
pub(crate) fn describe(
    pid: Pid,
    mapping: &Mapping,
    tables: &mut Tables<'_>,
) -> Result<Result<Backing, String>, CaptureError> {
    let host = &tables.vdso;
    let mut parts = (0u32..).zip(&host.parts);
    let Some((index, _)) =
        parts.find(|(_, (name, bytes))| *name == mapping.name && *bytes == mapping.bytes())
    else {
        return Ok(Err("a part of the vdso in another form than a new process has it".to_owned()));
    };
    if mapping.name == "[vdso]" {
        let mut code = vec![0; code_bytes(mapping)];
        let path = format!("/proc/{pid}/mem");
        let memory = File::open(&path).map_err(read(path.as_str()))?;
        memory.read_exact_at(&mut code, mapping.start).map_err(read(path))?;
        if code != host.code {
            return Ok(Err("a vdso that the program has written to is not supported".to_owned()));
        }
    }
    Ok(Ok(Backing::Vdso { index }))
}

/// Notes a process that has a part more than once, which no kernel makes.
pub(crate) fn check(pid: Pid, mappings: &[Mapping], tables: &mut Tables<'_>) {
    let parts: Vec<&Mapping> = mappings.iter().filter(|mapping| is_part(mapping)).collect();
    if (1..parts.len()).any(|end| {
        parts
            .get(end)
            .is_some_and(|part| parts.iter().take(end).any(|other| other.name == part.name))
    }) {
        tables.refuse(pid, Place::Process, "it has a part of its vdso twice");
    }
}

/// The parts of a process that is being made, in the order of a new one: they are one block until each is moved to its place.
fn parts(process: &Process) -> Result<Vec<Mapping>, RestoreError> {
    let mappings = proc::mappings(process.pid).map_err(make("a list of mappings"))?;
    Ok(mappings.into_iter().filter(is_part).collect())
}

/// Moves all parts to one block at `address`.
pub(crate) fn park(process: &mut Process, address: u64) -> Result<(), RestoreError> {
    let mut next = address;
    let parts = parts(process)?;
    let places: Vec<Option<u64>> = parts
        .iter()
        .map(|part| {
            next += part.bytes();
            Some(next - part.bytes())
        })
        .collect();
    move_parts(process, &parts, &places)
}

/// Moves each part that a process had to where it was; no part may lie where another one is going.
pub(crate) fn place(process: &mut Process, alive: &Alive) -> Result<(), RestoreError> {
    let parts = parts(process)?;
    let mut places = vec![None; parts.len()];
    for mapping in &alive.mappings {
        let Backing::Vdso { index } = mapping.backing else { continue };
        let bytes = parts.get(index as usize).map(Mapping::bytes);
        match places.get_mut(index as usize) {
            Some(place) if bytes == Some(mapping.end - mapping.start) => {
                *place = Some(mapping.start);
            }
            Some(_) | None => {
                return Err(RestoreError::Incompatible(format!(
                    "its vdso has {} parts, and none like the capsule's at {:#x}",
                    parts.len(),
                    mapping.start
                )));
            }
        }
    }
    move_parts(process, &parts, &places)
}

fn move_parts(
    process: &mut Process,
    parts: &[Mapping],
    places: &[Option<u64>],
) -> Result<(), RestoreError> {
    const MOVE: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    let moves = || {
        let moves = parts.iter().zip(places).filter_map(|(part, place)| Some((part, (*place)?)));
        moves.filter(|(part, place)| part.start != *place)
    };
    let mut tape = process.tape()?;
    for (part, place) in moves() {
        let bytes = part.bytes();
        let arguments = [part.start, bytes, bytes, MOVE, place, 0];
        tape.call("move its vdso", libc::SYS_mremap, arguments);
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    if let Some((vdso, place)) = moves().find(|(part, _)| part.name == "[vdso]") {
        process.set_room(Some(Room::in_vdso(place + vdso.bytes())));
    }
    Ok(())
}

/// Removes parts that a process did not have any more, and protects the others as they were. The engine goes on in another
/// place than the vdso where it has to.
pub(crate) fn finish(process: &mut Process, alive: &Alive) -> Result<(), RestoreError> {
    let mappings = proc::mappings(process.pid).map_err(make("a list of mappings"))?;
    let record = |part: &Mapping| {
        let is_it = |record: &&samara_capsule::record::Mapping| record.start == part.start;
        alive
            .mappings
            .iter()
            .find(is_it)
            .filter(|record| matches!(record.backing, Backing::Vdso { .. }))
    };
    let mut tape = process.tape()?;
    let mut left = Vec::new();
    for mapping in mappings {
        if !is_part(&mapping) {
            left.push(mapping);
            continue;
        }
        let (start, bytes) = (mapping.start, mapping.bytes());
        match record(&mapping) {
            None => tape.call("unmap its vdso", libc::SYS_munmap, [start, bytes, 0, 0, 0, 0]),
            Some(record) => {
                if record.protection != protection(&mapping) {
                    let arguments = [start, bytes, record.protection.into(), 0, 0, 0];
                    tape.call("protect its vdso", libc::SYS_mprotect, arguments);
                }
                left.push(Mapping { execute: record.protection & 4 != 0, ..mapping });
            }
        }
    }
    if tape.len() == 0 {
        return Ok(());
    }
    process.run_all(0, &tape, End::Call)?;
    process.find_room(&left);
    Ok(())
}
