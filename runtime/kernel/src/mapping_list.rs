//! The mappings of a process and their flags, without a walk through its pages.
//!
//! `/proc/PID/smaps` counts pages, 8 to 16 ms for each GiB of small ones, and nothing else of the kernel's files has the flags of `VmFlags`.
//! So a program of eBPF reads them from the kernel's own list (`bpf_iter_task_vma`), and `/proc/PID/maps` has the rest. What the bits
//! mean differs from kernel to kernel: that is learned from mappings of our own, for which both are read.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};

use crate::bpf::{self, Instruction};
use crate::btf::Btf;
use crate::proc::{self, Mapping};
use crate::userfaultfd::WriteTracker;
use crate::{Pid, check, userfaultfd};

/// Reads mappings.
#[derive(Debug)]
pub struct MappingList {
    program: OwnedFd,
    names: FlagNames,
}

/// A mapping as the kernel's own list has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Area {
    start: u64,
    end: u64,
    flags: u64,
    /// It has had memory of its own, and so may have some now.
    has_anonymous: bool,
}

/// Bytes that the program writes for each.
const AREA_BYTES: usize = 32;

impl Area {
    fn of_bytes(bytes: &[u8]) -> Option<Area> {
        let word = |index: usize| {
            bytes.get(8 * index..)?.first_chunk().map(|word| u64::from_le_bytes(*word))
        };
        Some(Area { start: word(0)?, end: word(1)?, flags: word(2)?, has_anonymous: word(3)? != 0 })
    }
}

impl MappingList {
    /// Loads the program and learns what the bits mean.
    ///
    /// # Errors
    /// The kernel does not describe its types, refuses the program (EPERM without CAP_BPF and CAP_PERFMON), or can't restrict it
    /// to one process (before Linux 6.1).
    pub fn new() -> io::Result<MappingList> {
        let btf = Btf::of_kernel()?;
        let program = program(&btf).ok_or(io::ErrorKind::Unsupported)?;
        let function = btf.function("bpf_iter_task_vma").ok_or(io::ErrorKind::Unsupported)?;
        let program = bpf::load_iterator_program(&program, function)?;
        let names = FlagNames::learn(&program)?;
        Ok(MappingList { program, names })
    }

    /// As [`proc::mappings`], of a process that stands.
    ///
    /// # Errors
    /// ESRCH; Unsupported where a flag is not known, or the two lists are not of the same mappings: it runs.
    pub fn of(&self, pid: Pid) -> io::Result<Vec<Mapping>> {
        let mut mappings = proc::mappings_without_flags(pid)?;
        let areas = areas(&self.program, pid)?;
        let mut areas = areas.iter();
        for mapping in &mut mappings {
            // The same in all processes, and not in the list.
            if mapping.name == "[vsyscall]" {
                continue;
            }
            let area = areas
                .next()
                .filter(|area| (area.start, area.end) == (mapping.start, mapping.end))
                .ok_or(io::ErrorKind::Unsupported)?;
            mapping.flags = self.names.of(area.flags).ok_or(io::ErrorKind::Unsupported)?;
            mapping.has_anonymous = area.has_anonymous;
        }
        match areas.next() {
            None => Ok(mappings),
            Some(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// The program: writes start, end, flags and `anon_vma` of the mapping that it is run for.
fn program(btf: &Btf) -> Option<Vec<Instruction>> {
    /// `bpf_seq_write(seq, data, length)`.
    const SEQ_WRITE: i32 = 127;
    const LOAD: u8 = 0x79;
    const STORE: u8 = 0x7b;
    const MOVE: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const ADD: u8 = 0x07;
    const CALL: u8 = 0x85;
    const UNLESS_EQUAL: u8 = 0x55;
    const EXIT: u8 = 0x95;
    const FRAME: u8 = 10;
    let step = |code, to: u8, from: u8, offset, immediate| Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    };
    let context = |member| btf.member("bpf_iter__task_vma", member);
    let of_area = |member| btf.member("vm_area_struct", member);
    let members = ["vm_start", "vm_end", "vm_flags", "anon_vma"];
    let mut program = vec![
        step(MOVE, 6, 1, 0, 0),
        step(LOAD, 7, 6, context("vma")?, 0),
        // The end of the list.
        step(UNLESS_EQUAL, 7, 0, 2, 0),
        step(SET, 0, 0, 0, 0),
        step(EXIT, 0, 0, 0, 0),
        step(LOAD, 8, 6, context("meta")?, 0),
        step(LOAD, 1, 8, btf.member("bpf_iter_meta", "seq")?, 0),
    ];
    for (member, place) in members.into_iter().zip([-32, -24, -16, -8]) {
        program.push(step(LOAD, 2, 7, of_area(member)?, 0));
        program.push(step(STORE, FRAME, 2, place, 0));
    }
    program.extend([
        step(MOVE, 2, FRAME, 0, 0),
        step(ADD, 2, 0, 0, -32),
        step(SET, 3, 0, 0, 32),
        step(CALL, 0, 0, 0, SEQ_WRITE),
        step(SET, 0, 0, 0, 0),
        step(EXIT, 0, 0, 0, 0),
    ]);
    Some(program)
}

fn areas(program: &OwnedFd, pid: Pid) -> io::Result<Vec<Area>> {
    /// For most processes, and for this one, whose own mappings a buffer that grows would change while they are listed.
    const AT_ONCE: usize = 4096 * AREA_BYTES;
    /// No process has more mappings.
    const BYTES_MAX: usize = 256 * AT_ONCE;
    let mut file = bpf::iterate(program.as_fd(), pid)?;
    let mut bytes = vec![0; AT_ONCE];
    let mut filled = 0;
    let start = |bytes: &[u8], at: usize| Area::of_bytes(bytes.get(at..)?).map(|area| area.start);
    loop {
        let before = filled;
        match file.read(bytes.get_mut(filled..).unwrap_or_default())? {
            0 => break,
            count => filled += count,
        }
        // Where a list did not fit into the buffer that the kernel has for it (32 KiB), what comes after its end is the last part again
        // (kernel/bpf/task_iter.c: `task_vma_seq_stop` does not note that it was the end).
        if before > 0 && start(&bytes, before) <= start(&bytes, before - AREA_BYTES) {
            filled = before;
            break;
        }
        if filled == BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if filled == bytes.len() {
            bytes.resize(2 * filled, 0);
        }
    }
    bytes.truncate(filled);
    let areas = bytes.chunks(AREA_BYTES).map(Area::of_bytes);
    let areas = areas.collect::<Option<Vec<Area>>>().ok_or(io::ErrorKind::InvalidData)?;
    // Kernels that do not know the restriction to one process list those of all.
    match areas.is_sorted_by(|one, next| one.end <= next.start) {
        true => Ok(areas),
        false => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// The two letters of `VmFlags` for each bit.
#[derive(Debug, PartialEq, Eq)]
struct FlagNames([Option<[u8; 2]>; 64]);

impl FlagNames {
    /// Reads mappings of this process by both ways, among them some that are made for it.
    fn learn(program: &OwnedFd) -> io::Result<FlagNames> {
        let _examples = Examples::make();
        let own = Pid::try_from(std::process::id()).map_err(io::Error::other)?;
        let areas = areas(program, own)?;
        let mappings = proc::mappings(own)?;
        let mut names = FlagNames([None; 64]);
        for area in areas {
            let same = |mapping: &&Mapping| (mapping.start, mapping.end) == (area.start, area.end);
            // Others of our threads map and unmap too.
            let Some(mapping) = mappings.iter().find(same) else { continue };
            names.add(area.flags, &mapping.flags).ok_or(io::ErrorKind::Unsupported)?;
        }
        Ok(names)
    }

    /// Learns from an example: letters are in the order of the bits (fs/proc/task_mmu.c, `show_smap_vma_flags`). Bits without letters, those
    /// of protection keys for one, stay unknown. None: it contradicts what is known.
    fn add(&mut self, flags: u64, letters: &[[u8; 2]]) -> Option<()> {
        if flags.count_ones() as usize != letters.len() {
            return Some(());
        }
        let bits = (0..64).filter(|bit| flags >> bit & 1 != 0);
        for (bit, letters) in bits.zip(letters) {
            let name: &mut Option<[u8; 2]> = self.0.get_mut(bit)?;
            (*name.get_or_insert(*letters) == *letters).then_some(())?;
        }
        Some(())
    }

    /// None: a bit is not known.
    fn of(&self, flags: u64) -> Option<Vec<[u8; 2]>> {
        let bits = (0..64usize).filter(|bit| flags >> bit & 1 != 0);
        bits.map(|bit| *self.0.get(bit)?).collect()
    }
}

/// Mappings of a page that have the flags which programs give to theirs. What a kernel does not have is left out.
struct Examples {
    pages: Vec<usize>,
    _tracker: Option<WriteTracker>,
}

const PAGE: usize = 4096;

impl Examples {
    fn make() -> Examples {
        const ADVICE: [i32; 9] = [
            libc::MADV_NORMAL,
            libc::MADV_RANDOM,
            libc::MADV_SEQUENTIAL,
            libc::MADV_DONTFORK,
            libc::MADV_DONTDUMP,
            libc::MADV_WIPEONFORK,
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_MERGEABLE,
        ];
        /// Not in the libc crate (linux/mman.h, asm/unistd_64.h).
        const MAP_DROPPABLE: i32 = 8;
        const SYS_MSEAL: libc::c_long = 462;
        const MLOCK_ONFAULT: libc::c_int = 1;
        const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let mut examples = Examples { pages: Vec::new(), _tracker: None };
        for advice in ADVICE {
            let Some(page) = examples.add(PRIVATE) else { continue };
            // SAFETY: a page of our own, which nothing refers to; no advice of the list takes it away.
            let _ = unsafe { libc::madvise(pointer(page), PAGE, advice) };
        }
        let kinds = [
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            PRIVATE | libc::MAP_NORESERVE,
            PRIVATE | libc::MAP_GROWSDOWN,
            libc::MAP_ANONYMOUS | MAP_DROPPABLE,
        ];
        for kind in kinds {
            examples.add(kind);
        }
        for on_fault in [0, MLOCK_ONFAULT] {
            let Some(page) = examples.add(PRIVATE) else { continue };
            // SAFETY: a page of our own.
            let _ = unsafe { libc::syscall(libc::SYS_mlock2, page, PAGE, on_fault) };
        }
        if let Some(page) = examples.add(PRIVATE)
            && let Ok(tracker) = userfaultfd::of_this_process()
        {
            let _ = tracker.cover(page as u64, (page + PAGE) as u64);
            examples._tracker = Some(tracker);
        }
        // Stays for as long as the process lives: what is sealed can't be unmapped.
        if let Some(page) = examples.add(PRIVATE) {
            // SAFETY: a page of our own, which nothing refers to.
            let _ = unsafe { libc::syscall(SYS_MSEAL, page, PAGE, 0) };
        }
        examples
    }

    fn add(&mut self, flags: i32) -> Option<usize> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, where the kernel likes.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, -1, 0) };
        if page == libc::MAP_FAILED {
            return None;
        }
        self.pages.push(page.expose_provenance());
        self.pages.last().copied()
    }
}

fn pointer(page: usize) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(page)
}

impl Drop for Examples {
    fn drop(&mut self) {
        for page in &self.pages {
            // SAFETY: a page of this value's own, which nothing refers to.
            let result = unsafe { libc::munmap(pointer(*page), PAGE) };
            // Fails for the sealed one alone.
            let _ = check(result.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the list says must be what smaps says, or a capsule would have other mappings than its program.
    #[test]
    fn the_list_says_what_smaps_says() {
        let list = MappingList::new().expect("Linux 6.1 or newer with BTF, where tests run");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = Pid::try_from(child.id()).expect("a pid");
        // Until it waits: it maps nothing more.
        let sleeps = |call: String| ["35 ", "230 "].iter().any(|number| call.starts_with(number));
        while !proc::attribute(pid, "syscall").is_ok_and(sleeps) {
            std::thread::yield_now();
        }
        let listed = list.of(pid).expect("a list");
        let mut expected = proc::mappings(pid).expect("smaps");
        child.kill().expect("kill");
        child.wait().expect("its end");
        assert_eq!(listed.len(), expected.len());
        for (listed, expected) in listed.iter().zip(&mut expected) {
            // One that had memory of its own once need not have any now.
            assert!(listed.has_anonymous || !expected.has_anonymous, "{listed:?}");
            expected.has_anonymous = listed.has_anonymous;
            if listed.name == "[vsyscall]" {
                expected.flags.clear();
            }
            assert_eq!(listed, expected);
        }
    }

    /// Without this, a process with many mappings would be looked at for half a second while it stands, and then in the slow way.
    #[test]
    fn a_list_ends_however_long_it_is() {
        const PAGES: usize = 3000;
        let list = MappingList::new().expect("Linux 6.1 or newer with BTF, where tests run");
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, which nothing else refers to.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), PAGES * PAGE, libc::PROT_READ, flags, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        for page in (0..PAGES).step_by(2) {
            let page = start.wrapping_byte_add(page * PAGE);
            // SAFETY: a page of the mapping above.
            assert_eq!(unsafe { libc::mprotect(page, PAGE, libc::PROT_NONE) }, 0);
        }
        let own = Pid::try_from(std::process::id()).expect("a pid");
        let range = start.addr() as u64..(start.addr() + PAGES * PAGE) as u64;
        let areas = areas(&list.program, own).expect("a list");
        let found = areas.iter().filter(|area| range.contains(&area.start)).count();
        // SAFETY: the mapping above.
        assert_eq!(unsafe { libc::munmap(start, PAGES * PAGE) }, 0);
        assert_eq!(found, PAGES);
    }

    #[test]
    fn every_flag_of_an_example_is_known() {
        let list = MappingList::new().expect("Linux 6.1 or newer with BTF, where tests run");
        let known = list.names.0.iter().flatten().collect::<Vec<_>>();
        for letters in [
            b"rd", b"wr", b"ex", b"mr", b"mw", b"me", b"sh", b"ms", b"gd", b"dd", b"dc", b"wf",
            b"sr", b"rr", b"lo", b"nr", b"uw",
        ] {
            assert!(
                known.contains(&letters),
                "{:?} of {known:?}",
                letters.as_slice().escape_ascii()
            );
        }
    }

    #[test]
    fn bits_without_letters_stay_unknown() {
        let mut names = FlagNames([None; 64]);
        assert_eq!(names.add(0b101, &[*b"rd", *b"ex"]), Some(()));
        assert_eq!(names.add(0b1101, &[*b"rd", *b"ex"]), Some(()));
        assert_eq!(names.of(0b101), Some(vec![*b"rd", *b"ex"]));
        assert_eq!(names.of(0b1101), None);
        assert_eq!(names.add(0b1, &[*b"wr"]), None);
    }
}
