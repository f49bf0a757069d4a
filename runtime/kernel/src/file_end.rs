//! The rest of a file's last page, which only mappings see.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

const PAGE: usize = 4096;

/// The page that a file ends in, mapped. The program may make the file shorter meanwhile, and end whoever looks then: only for
/// files that nobody changes.
struct LastPage {
    address: *mut u8,
    /// Where the file ends in it.
    end: usize,
}

impl LastPage {
    /// `InvalidInput` if the file has no part of a page at its end.
    fn map(file: BorrowedFd<'_>, length: u64, protection: i32) -> io::Result<LastPage> {
        let end = usize::try_from(length % PAGE as u64).expect("less than a page");
        if end == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let offset = libc::off_t::try_from(length - end as u64)
            .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let (hint, flags, file) = (ptr::null_mut(), libc::MAP_SHARED, file.as_raw_fd());
        // SAFETY: a new mapping where the kernel likes.
        let address = unsafe { libc::mmap(hint, PAGE, protection, flags, file, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(LastPage { address: address.cast(), end })
    }
}

impl Drop for LastPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody has a reference to it.
        unsafe { libc::munmap(self.address.cast(), PAGE) };
    }
}

/// What lies behind the end of a file of `length` bytes, up to the end of its last page. The file must be open to be read, and end
/// within a page: `InvalidInput` otherwise.
pub fn read_behind(file: BorrowedFd<'_>, length: u64) -> io::Result<Vec<u8>> {
    let page = LastPage::map(file, length, libc::PROT_READ)?;
    let mut bytes = vec![0; PAGE - page.end];
    // SAFETY: `end` is less than a page.
    let behind = unsafe { page.address.add(page.end) };
    // SAFETY: the rest of the page is as long as `bytes`, which is another memory.
    unsafe { ptr::copy_nonoverlapping(behind, bytes.as_mut_ptr(), bytes.len()) };
    Ok(bytes)
}

/// Puts bytes behind the end of a file of `length` bytes, which stays as long as it is. The file must be open to be read and
/// written, and end within a page that has room for them: `InvalidInput` otherwise.
pub fn write_behind(file: BorrowedFd<'_>, length: u64, bytes: &[u8]) -> io::Result<()> {
    let page = LastPage::map(file, length, libc::PROT_READ | libc::PROT_WRITE)?;
    if bytes.len() > PAGE - page.end {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `end` is less than a page.
    let behind = unsafe { page.address.add(page.end) };
    // SAFETY: the rest of the page has room for `bytes`, which are another memory.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), behind, bytes.len()) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn a_file_stays_as_long_as_it_is() {
        let path = format!("/dev/shm/samara-file-end-{}", std::process::id());
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path).expect("a file");
        std::fs::remove_file(&path).expect("its name");
        file.set_len(4196).expect("a size");
        write_behind(file.as_fd(), 4196, b"behind").expect("a write");
        assert_eq!(file.metadata().expect("metadata").len(), 4196);
        let behind = read_behind(file.as_fd(), 4196).expect("a read");
        assert_eq!((&behind[..7], behind.len()), (&b"behind\0"[..], 3996));
        let too_long = write_behind(file.as_fd(), 4196, &[1; 3997]).expect_err("too long");
        let whole_pages = read_behind(file.as_fd(), 4096).expect_err("whole pages");
        assert_eq!(too_long.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(whole_pages.kind(), io::ErrorKind::InvalidInput);
    }
}
