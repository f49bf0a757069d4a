//! `pid_namespaces(7)`: who is in a pid namespace, without a look at all processes of the host.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::null;

use crate::{Pid, check};

/// A `/proc` of a namespace's own, which nobody has mounted anywhere.
#[derive(Debug)]
pub struct View {
    namespace: File,
    folder: OwnedFd,
}

impl View {
    /// Of the namespace of process `pid`.
    ///
    /// # Errors
    /// EINVAL before Linux 6.18, where a view shows the caller's namespace only. ENOTTY before 6.12, where the kernel does not
    /// translate numbers.
    pub fn of(pid: Pid) -> io::Result<View> {
        const FSOPEN_CLOEXEC: libc::c_uint = 1;
        const FSMOUNT_CLOEXEC: libc::c_uint = 1;
        /// Commands of `fsconfig` (linux/mount.h).
        const SET_STRING: libc::c_uint = 1;
        const SET_FD: libc::c_uint = 5;
        const CREATE: libc::c_uint = 6;
        let namespace = File::open(format!("/proc/{pid}/ns/pid"))?;
        // SAFETY: the name is a string that outlives the call.
        let context =
            check(unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), FSOPEN_CLOEXEC) })?;
        let context = owned(context)?;
        let configure =
            |command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>, aux: RawFd| {
                let text = |text: Option<&CStr>| text.map_or(null(), CStr::as_ptr);
                // SAFETY: key and value are null, or strings that outlive the call.
                check(unsafe {
                    libc::syscall(
                        libc::SYS_fsconfig,
                        context.as_raw_fd(),
                        command,
                        text(key),
                        text(value),
                        aux,
                    )
                })
            };
        configure(SET_FD, Some(c"pidns"), None, namespace.as_raw_fd())?;
        configure(SET_STRING, Some(c"subset"), Some(c"pid"), 0)?;
        configure(CREATE, None, None, 0)?;
        // SAFETY: the call takes numbers only.
        let mount = check(unsafe {
            libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0)
        })?;
        let view = View { namespace, folder: owned(mount)? };
        // A kernel that can't translate is found out here, and not in the middle of a stop.
        view.outside(1)?;
        Ok(view)
    }

    /// The processes of the namespace and of those below it, as the caller's namespace numbers them, ascending by their own
    /// numbers. Those that have ended and were not waited for are among them.
    pub fn processes(&self) -> io::Result<Vec<Pid>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(format!("/proc/self/fd/{}", self.folder.as_raw_fd()))? {
            let name = entry?.file_name();
            let Some(inside) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            match self.outside(inside) {
                Ok(pid) => found.push(pid),
                // Gone since.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// The caller's number of a process that the namespace gives this one.
    fn outside(&self, inside: Pid) -> io::Result<Pid> {
        /// linux/nsfs.h
        const NS_GET_TGID_FROM_PIDNS: libc::Ioctl = 0x8004_b707;
        // SAFETY: the request takes a number.
        let pid = check(
            unsafe { libc::ioctl(self.namespace.as_raw_fd(), NS_GET_TGID_FROM_PIDNS, inside) }
                .into(),
        )?;
        Pid::try_from(pid).map_err(io::Error::other)
    }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
