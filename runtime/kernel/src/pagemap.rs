//! `PAGEMAP_SCAN(2const)` on `/proc/PID/pagemap`, and the older table of 64-bit entries where it is missing (before Linux 6.7).

use std::fs::File;
use std::io;
use std::mem::size_of;
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

const _: () = assert!(size_of::<PmScanArg>() == 96);
/// `_IOWR('f', 16, struct pm_scan_arg)` of linux/fs.h.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_GUARD: u64 = 1 << 8;

/// Regions fetched per call: 96 KiB of buffer, and a bounded hold of the process's mmap lock.
const REGIONS_AT_ONCE: usize = 4096;

impl Pagemap {
    /// Opens the pagemap of a process and finds out what the kernel can tell.
    pub fn open(pid: Pid) -> io::Result<Pagemap> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut pagemap = Pagemap { file, scan: Scan::Guards };
        for scan in [Scan::Guards, Scan::Plain] {
            pagemap.scan = scan;
            if pagemap.scan_once(0, PAGE, &mut [PageRegion::default(); 1]).is_ok() {
                return Ok(pagemap);
            }
        }
        pagemap.scan = Scan::Table;
        Ok(pagemap)
    }

    /// The runs of pages in `start..end` that are in memory or swapped out, less those that still are the shared page of zeros.
    pub fn populated(&self, start: u64, end: u64) -> io::Result<Vec<Run>> {
        match self.scan {
            Scan::Table => self.populated_by_table(start, end),
            Scan::Guards | Scan::Plain => self.populated_by_scan(start, end),
        }
    }

    fn populated_by_scan(&self, start: u64, end: u64) -> io::Result<Vec<Run>> {
        let mut regions = vec![PageRegion::default(); REGIONS_AT_ONCE];
        let mut runs = Vec::new();
        let mut next = start;
        while next < end {
            let (count, walk_end) = self.scan_once(next, end, &mut regions)?;
            for region in regions.iter().take(count) {
                runs.push(Run {
                    start: region.start,
                    end: region.end,
                    file: region.categories & PAGE_IS_FILE != 0,
                    guard: region.categories & PAGE_IS_GUARD != 0,
                });
            }
            if walk_end <= next {
                break;
            }
            next = walk_end;
        }
        Ok(runs)
    }

    fn scan_once(
        &self,
        start: u64,
        end: u64,
        regions: &mut [PageRegion],
    ) -> io::Result<(usize, u64)> {
        let guard = if self.scan == Scan::Guards { PAGE_IS_GUARD } else { 0 };
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags: 0,
            start,
            end,
            walk_end: 0,
            vec: regions.as_mut_ptr().addr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_PFNZERO,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_FILE | guard,
        };
        // SAFETY: the argument has the size and layout that PAGEMAP_SCAN documents (asserted above), and its vector is `regions`.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        let count = check(result.into())?;
        Ok((usize::try_from(count).expect("a count"), argument.walk_end))
    }

    fn populated_by_table(&self, start: u64, end: u64) -> io::Result<Vec<Run>> {
        const ENTRY: usize = 8;
        const ENTRIES_AT_ONCE: u64 = 64 << 10;
        let mut runs: Vec<Run> = Vec::new();
        let mut next = start;
        while next < end {
            let pages = ((end - next) / PAGE).min(ENTRIES_AT_ONCE);
            let mut bytes = vec![0u8; usize::try_from(pages).expect("bounded above") * ENTRY];
            self.file.read_exact_at(&mut bytes, next / PAGE * ENTRY as u64)?;
            for (index, entry) in bytes.chunks_exact(ENTRY).enumerate() {
                let entry = u64::from_le_bytes(entry.try_into().expect("chunks of eight bytes"));
                if entry >> 62 == 0 {
                    continue;
                }
                let (address, file) = (next + index as u64 * PAGE, entry >> 61 & 1 == 1);
                match runs.last_mut() {
                    Some(last) if last.end == address && last.file == file => last.end += PAGE,
                    _ => runs.push(Run { start: address, end: address + PAGE, file, guard: false }),
                }
            }
            next += pages * PAGE;
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without this, a page that was written could be missing from a capsule, or one that was not could be stored.
    #[test]
    fn finds_written_pages_and_no_others_both_ways() {
        let bytes = 64 * 4096;
        let mut memory = vec![0u8; bytes + 4096];
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
}
