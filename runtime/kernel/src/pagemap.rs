//! `PAGEMAP_SCAN(2const)` on `/proc/PID/pagemap`, and the older table of 64-bit entries where it is missing (before Linux 6.7).

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::{Pid, check};

/// What is known of a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Address of the first page.
    pub start: u64,
    /// Address after the last page.
    pub end: u64,
    /// The page belongs to a file or to shared memory, and was not copied on write.
    pub file: bool,
    /// A guard page (`MADV_GUARD_INSTALL`): has no content, and a touch is fatal. Never set on kernels without them.
    pub guard: bool,
    /// The page was armed and not written since. False where nothing is tracked.
    pub clean: bool,
}

/// Reads which pages of a process hold something.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    scan: Scan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scan {
    /// `PAGEMAP_SCAN` with `PAGE_IS_GUARD`.
    Guards,
    /// `PAGEMAP_SCAN` of a kernel without guard pages.
    Plain,
    /// Entries of eight bytes.
    Table,
}

const PAGE: u64 = 4096;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

impl PageRegion {
    fn run(&self, tracked: bool) -> Run {
        Run {
            start: self.start,
            end: self.end,
            file: self.categories & PAGE_IS_FILE != 0,
            guard: self.categories & PAGE_IS_GUARD != 0,
            clean: tracked && self.categories & PAGE_IS_WRITTEN == 0,
        }
    }
}

#[derive(Default)]
#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// What a scan does beside listing pages that are there.
#[derive(Clone, Copy, Default)]
struct Scanning {
    flags: u64,
    /// Pages of these kinds are left out.
    without: u64,
    /// Kinds that are told.
    wanted: u64,
}

const _: () = assert!(size_of::<PmScanArg>() == 96);
/// `_IOWR('f', 16, struct pm_scan_arg)` of linux/fs.h.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_GUARD: u64 = 1 << 8;

/// Regions fetched per call: 96 KiB of buffer, and a bounded hold of the process's mmap lock.
const REGIONS_AT_ONCE: usize = 4096;

/// Entries of the table, admin-guide/mm/pagemap.rst: bits 0-54 are the page's frame, or type and offset in swap.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;
const GUARD: u64 = 1 << 58;
const EXCLUSIVE: u64 = 1 << 56;
const PLACE: u64 = (1 << 55) - 1;

/// Entries fetched per call: 512 KiB of buffer.
const ENTRIES_AT_ONCE: u64 = 64 << 10;

/// Where the content of a page is: a frame of memory, or a place in swap. Processes that have the same one at the same time have
/// the same content there; how long they have it is the kernel's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PhysicalPage(NonZeroU64);

impl PhysicalPage {
    fn of_entry(entry: u64) -> Option<PhysicalPage> {
        let alone = entry & (EXCLUSIVE | GUARD) != 0;
        if alone || entry & (PRESENT | SWAPPED) == 0 || entry & PLACE == 0 {
            return None;
        }
        NonZeroU64::new(entry & (PRESENT | SWAPPED | PLACE)).map(PhysicalPage)
    }
}

impl Pagemap {
    /// Opens the pagemap of a process and finds out what the kernel can tell.
    pub fn open(pid: Pid) -> io::Result<Pagemap> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut pagemap = Pagemap { file, scan: Scan::Guards };
        for scan in [Scan::Guards, Scan::Plain] {
            pagemap.scan = scan;
            if pagemap
                .scan_once(0, PAGE, &mut [PageRegion::default(); 1], Scanning::default())
                .is_ok()
            {
                return Ok(pagemap);
            }
        }
        pagemap.scan = Scan::Table;
        Ok(pagemap)
    }

    /// The runs of pages in `start..end` that are in memory or swapped out, less those that still are the shared page of zeros.
    pub fn populated(&self, start: u64, end: u64) -> io::Result<Vec<Run>> {
        let mut runs = Vec::new();
        let mut next = start;
        while next < end {
            let (some, walk_end) = self.populated_some(next, end, REGIONS_AT_ONCE)?;
            runs.extend(some);
            next = walk_end;
        }
        Ok(runs)
    }

    /// The first of the runs that [`Pagemap::populated`] would tell, about `runs_max` of them, and the address to go on from.
    pub fn populated_some(
        &self,
        start: u64,
        end: u64,
        runs_max: usize,
    ) -> io::Result<(Vec<Run>, u64)> {
        match self.scan {
            Scan::Table => {
                let part_end = end.min(start.saturating_add(ENTRIES_AT_ONCE * PAGE));
                Ok((self.populated_by_table(start, part_end)?, part_end))
            }
            Scan::Guards | Scan::Plain => self.populated_by_scan(start, end, runs_max),
        }
    }

    fn populated_by_scan(
        &self,
        start: u64,
        end: u64,
        runs_max: usize,
    ) -> io::Result<(Vec<Run>, u64)> {
        let mut regions = vec![PageRegion::default(); runs_max.clamp(1, REGIONS_AT_ONCE)];
        let scanning = Scanning { wanted: PAGE_IS_FILE, ..Scanning::default() };
        let (count, walk_end) = self.scan_once(start, end, &mut regions, scanning)?;
        let runs = regions.iter().take(count).map(|region| region.run(false));
        Ok((runs.collect(), walk_end))
    }

    /// As [`Pagemap::populated_some`], in a part of one mapping that a [`WriteTracker`](crate::userfaultfd::WriteTracker) covers: pages that
    /// were written count as clean from now on, in the same instant.
    ///
    /// With `of_file`, in a private mapping of a file, pages that still are the file's are left out. They are not armed: where the kernel
    /// drops such a page it leaves a marker, as it does where the program drops a changed one, and the marker looks like a page in swap. So what
    /// is in swap does not count as clean there. Without it the mapping is none of a file: the kernel is not asked whose each page is, which
    /// takes it five times as long as all the rest.
    ///
    /// # Errors
    /// EPERM: nothing covers the mapping. EINVAL, ENOTTY: the kernel has no such scan.
    pub fn tracked_some(
        &self,
        start: u64,
        end: u64,
        runs_max: usize,
        of_file: bool,
    ) -> io::Result<(Vec<Run>, u64)> {
        let mut regions = vec![PageRegion::default(); runs_max.clamp(1, REGIONS_AT_ONCE)];
        let flags = PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING;
        let (without, swapped) = if of_file { (PAGE_IS_FILE, PAGE_IS_SWAPPED) } else { (0, 0) };
        let wanted = PAGE_IS_WRITTEN | swapped;
        let scanning = Scanning { flags, without, wanted };
        let (count, walk_end) = self.scan_once(start, end, &mut regions, scanning)?;
        let runs = regions.iter().take(count).map(|region| {
            let run = region.run(true);
            Run { clean: run.clean && region.categories & swapped == 0, ..run }
        });
        Ok((runs.collect(), walk_end))
    }

    /// As [`Pagemap::tracked_some`] of a mapping that is none of a file, where nothing runs that could write to it: in a third of the time.
    ///
    /// The kernel is asked for what is not there or was written, so that it need not tell of each page that is as it was; what it does not
    /// name is clean. Then what was written is armed.
    ///
    /// # Errors
    /// As there.
    pub fn tracked_of_stopped(
        &self,
        start: u64,
        end: u64,
        runs_max: usize,
    ) -> io::Result<(Vec<Run>, u64)> {
        /// For more runs than these, one more scan is faster than a call for each.
        const ARMED_ALONE_MAX: usize = 64;
        let mut regions = vec![PageRegion::default(); runs_max.clamp(1, REGIONS_AT_ONCE)];
        let told = PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO;
        let argument = PmScanArg {
            flags: PM_SCAN_CHECK_WPASYNC,
            start,
            end,
            category_inverted: PAGE_IS_PRESENT,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_WRITTEN,
            return_mask: told | self.guard(),
            ..PmScanArg::default()
        };
        let (count, walk_end) = self.scan_by(argument, &mut regions)?;
        let mut runs = Vec::new();
        let mut next = start;
        for region in regions.iter().take(count) {
            if next < region.start {
                runs.push(Run {
                    start: next,
                    end: region.start,
                    file: false,
                    guard: false,
                    clean: true,
                });
            }
            next = region.end;
            let is_there = region.categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED) != 0;
            if is_there && region.categories & PAGE_IS_PFNZERO == 0 {
                runs.push(region.run(true));
            }
        }
        if next < walk_end {
            runs.push(Run { start: next, end: walk_end, file: false, guard: false, clean: true });
        }
        let written = || runs.iter().filter(|run| !run.clean && !run.guard);
        if written().count() <= ARMED_ALONE_MAX {
            for run in written() {
                self.arm(run.start, run.end)?;
            }
        } else if let (Some(first), Some(last)) = (written().next(), written().next_back()) {
            self.arm(first.start, last.end)?;
        }
        Ok((runs, walk_end))
    }

    /// Arms what was written in a range.
    fn arm(&self, start: u64, end: u64) -> io::Result<()> {
        let mut next = start;
        while next < end {
            (_, next) = self.tracked_some(next, end, REGIONS_AT_ONCE, false)?;
        }
        Ok(())
    }

    /// For each page of `start..end` where its content is, as far as others may have it too. Replaces what `pages` holds.
    ///
    /// None for a page that nobody else has, that has no content, or of which the kernel does not tell: it wants a reader that
    /// had CAP_SYS_ADMIN in the first user namespace when the pagemap was opened.
    pub fn shared(
        &self,
        start: u64,
        end: u64,
        pages: &mut Vec<Option<PhysicalPage>>,
    ) -> io::Result<()> {
        pages.clear();
        self.entries(start, end, &mut |_, entry| pages.push(PhysicalPage::of_entry(entry)))
    }

    /// Passes address and entry of each page.
    fn entries(&self, start: u64, end: u64, take: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        const ENTRY: usize = 8;
        let mut next = start;
        while next < end {
            let pages = ((end - next) / PAGE).min(ENTRIES_AT_ONCE);
            let mut bytes = vec![0u8; usize::try_from(pages).expect("bounded above") * ENTRY];
            self.file.read_exact_at(&mut bytes, next / PAGE * ENTRY as u64)?;
            for (index, entry) in bytes.chunks_exact(ENTRY).enumerate() {
                let entry = u64::from_le_bytes(entry.try_into().expect("chunks of eight bytes"));
                take(next + index as u64 * PAGE, entry);
            }
            next += pages * PAGE;
        }
        Ok(())
    }

    fn scan_once(
        &self,
        start: u64,
        end: u64,
        regions: &mut [PageRegion],
        Scanning { flags, without, wanted }: Scanning,
    ) -> io::Result<(usize, u64)> {
        let argument = PmScanArg {
            flags,
            start,
            end,
            category_inverted: PAGE_IS_PFNZERO | without,
            category_mask: PAGE_IS_PFNZERO | without,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: self.guard() | wanted,
            ..PmScanArg::default()
        };
        self.scan_by(argument, regions)
    }

    fn guard(&self) -> u64 {
        if self.scan == Scan::Guards { PAGE_IS_GUARD } else { 0 }
    }

    /// Returns the number of regions that were found, and where the walk has ended.
    ///
    /// Where the kernel has had to walk in several parts (its own buffer has 512 regions) it tells the end of the last part but one if the
    /// last one was walked to its end (fs/proc/task_mmu.c, `do_pagemap_scan`). So what is left of `regions` tells whether all was walked.
    fn scan_by(&self, argument: PmScanArg, regions: &mut [PageRegion]) -> io::Result<(usize, u64)> {
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            vec: regions.as_mut_ptr().addr() as u64,
            vec_len: regions.len() as u64,
            ..argument
        };
        // SAFETY: the argument has the size and layout that PAGEMAP_SCAN documents (asserted above), and its vector is `regions`.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        let count = usize::try_from(check(result.into())?).expect("a count");
        let walk_end = match regions.get(..count).and_then(<[_]>::last) {
            Some(last) if count == regions.len() => argument.walk_end.max(last.end),
            _ => argument.end,
        };
        Ok((count, walk_end))
    }

    fn populated_by_table(&self, start: u64, end: u64) -> io::Result<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        self.entries(start, end, &mut |address, entry| {
            if entry & (PRESENT | SWAPPED) == 0 {
                return;
            }
            let file = entry & FILE != 0;
            match runs.last_mut() {
                Some(last) if last.end == address && last.file == file => last.end += PAGE,
                _ => runs.push(Run {
                    start: address,
                    end: address + PAGE,
                    file,
                    guard: false,
                    clean: false,
                }),
            }
        })?;
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without this, a page that was written could be missing from a capsule, or one that was not could be stored.
    #[test]
    fn finds_written_pages_and_no_others_both_ways() {
        // So much the allocator takes from the kernel, and not from what others have freed.
        let mut memory = vec![0u8; 40 << 20];
        let base = (memory.as_ptr().addr() + 4095) & !4095;
        let offset = base - memory.as_ptr().addr();
        for page in [3usize, 4, 5, 9] {
            memory[offset + page * 4096] = 1;
        }
        let base = base as u64;
        let mut pagemap =
            Pagemap::open(i32::try_from(std::process::id()).expect("a pid")).expect("own pagemap");
        let first = pagemap.scan;
        for scan in [first, Scan::Table] {
            pagemap.scan = scan;
            let mut pages = Vec::new();
            for run in pagemap.populated(base + 4096, base + 32 * 4096).expect("scan") {
                assert!(!run.file);
                pages.extend(
                    (run.start..run.end).step_by(4096).map(|address| (address - base) / 4096),
                );
            }
            assert_eq!(pages, [3, 4, 5, 9], "{scan:?}");
        }
    }

    /// What is told twice is told as clean the second time, and so would not be stored.
    #[test]
    fn no_page_is_told_twice_however_many_runs_there_are() {
        let mut memory = vec![0u8; 40 << 20];
        let base = (memory.as_ptr().addr() + 4095) & !4095;
        let offset = base - memory.as_ptr().addr();
        let start = base as u64;
        let tracker = crate::userfaultfd::of_this_process().expect("a tracker");
        let pagemap =
            Pagemap::open(i32::try_from(std::process::id()).expect("a pid")).expect("own pagemap");
        // Around the number of regions that the kernel passes at once.
        for (count, runs_max) in [
            (400, 2048),
            (512, 2048),
            (513, 2048),
            (900, 2048),
            (1024, 2048),
            (3000, 2048),
            (900, 700),
        ] {
            let end = start + 2 * count as u64 * PAGE;
            tracker.cover(start, end).expect("covered");
            for of_stopped in [false, true] {
                for run in 0..count {
                    memory[offset + 2 * run * 4096] += 1;
                }
                let mut told = Vec::new();
                let mut next = start;
                while next < end {
                    let found = match of_stopped {
                        false => pagemap.tracked_some(next, end, runs_max, false),
                        true => pagemap.tracked_of_stopped(next, end, runs_max),
                    };
                    let (runs, after) = found.expect("Linux 6.7 or newer");
                    told.extend(runs.iter().map(|run| (run.start, run.clean)));
                    next = after;
                }
                let expected = (0..count as u64).map(|run| (start + 2 * run * PAGE, false));
                assert_eq!(told, expected.collect::<Vec<_>>(), "{count} {runs_max} {of_stopped}");
            }
        }
        drop(tracker);
    }

    /// A child that never returns to the test's code; ended with the value.
    struct Fork(Pid);

    impl Fork {
        fn new(change: *mut u8) -> Fork {
            // SAFETY: the child makes no call but `pause`, which is async-signal-safe.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                // SAFETY: the byte is in a buffer of the parent, which the child has a copy of.
                unsafe { change.write_volatile(7) };
                loop {
                    // SAFETY: takes nothing.
                    unsafe { libc::pause() };
                }
            }
            assert!(pid > 0, "fork failed");
            Fork(pid)
        }
    }

    impl Drop for Fork {
        fn drop(&mut self) {
            // SAFETY: a child of this process that nobody has waited for.
            unsafe { libc::kill(self.0, libc::SIGKILL) };
            // SAFETY: as above; no status is asked for.
            unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
        }
    }

    /// Without this, pages that differ could be taken for the same, or what a fork shares be stored twice. Needs root.
    #[test]
    fn tells_what_a_fork_has_left_in_common() {
        let mut memory = vec![1u8; 8 * 4096];
        let base = memory.as_ptr().addr().next_multiple_of(4096);
        let offset = base - memory.as_ptr().addr();
        let (start, end) = (base as u64, base as u64 + 4 * 4096);
        let own = Pagemap::open(i32::try_from(std::process::id()).expect("a pid")).expect("open");
        let child = Fork::new(&raw mut memory[offset + 2 * 4096]);
        let other = Pagemap::open(child.0).expect("open");
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for _ in 0..1000 {
            own.shared(start, end, &mut here).expect("entries");
            other.shared(start, end, &mut there).expect("entries");
            if there[2].is_none() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(there[2], None, "the child's own page");
        for page in [0, 1, 3] {
            assert!(
                here[page].is_some() && here[page] == there[page],
                "{page}: {here:?} {there:?}"
            );
        }
        assert_ne!(here[0], here[1]);
    }

    /// A page that is gone and counted as clean would come back from an older capsule.
    #[test]
    fn a_stopped_process_tells_what_is_gone_and_what_was_written() {
        let mut memory = vec![0u8; 40 << 20];
        let base = (memory.as_ptr().addr() + 4095) & !4095;
        let offset = base - memory.as_ptr().addr();
        let (start, end) = (base as u64, base as u64 + 256 * PAGE);
        let at = |page: usize| offset + page * 4096;
        for page in 10..200 {
            memory[at(page)] = 1;
        }
        let tracker = crate::userfaultfd::of_this_process().expect("a tracker");
        tracker.cover(start, end).expect("covered");
        let pagemap =
            Pagemap::open(i32::try_from(std::process::id()).expect("a pid")).expect("own pagemap");
        let tell = |runs_max| {
            let mut told = std::collections::BTreeMap::new();
            let mut next = start;
            while next < end {
                let (runs, after) =
                    pagemap.tracked_of_stopped(next, end, runs_max).expect("Linux 6.7 or newer");
                for run in runs {
                    told.extend((run.start..run.end).step_by(4096).map(|address| {
                        (usize::try_from((address - start) / PAGE).expect("256"), run.clean)
                    }));
                }
                next = after;
            }
            told
        };
        assert_eq!(tell(8), (10..200).map(|page| (page, false)).collect());
        assert_eq!(tell(8), (10..200).map(|page| (page, true)).collect());
        // SAFETY: the range lies in `memory`, to which nothing else refers; bytes that are dropped read as zeros, which are bytes too.
        let dropped = unsafe {
            libc::madvise(
                std::ptr::with_exposed_provenance_mut(
                    memory[at(50)..].as_ptr().expose_provenance(),
                ),
                20 * 4096,
                libc::MADV_DONTNEED,
            )
        };
        assert_eq!(dropped, 0);
        // One of zeros, which is the kernel's own page.
        assert_eq!(std::hint::black_box(&memory)[at(60)], 0);
        // Enough runs for both ways of arming them.
        for runs_max in [8, 512] {
            let written =
                |page: usize| page == 3 || page == 65 || page >= 70 && page.is_multiple_of(2);
            let there = (10..200).filter(|page| !(50..70).contains(page) || *page == 65);
            let there: Vec<usize> = there.chain([3]).collect();
            for page in there.iter().filter(|page| written(**page)) {
                memory[at(*page)] = 2;
            }
            assert_eq!(tell(runs_max), there.iter().map(|page| (*page, !written(*page))).collect());
            assert_eq!(tell(runs_max), there.iter().map(|page| (*page, true)).collect());
        }
        drop(tracker);
    }
}
