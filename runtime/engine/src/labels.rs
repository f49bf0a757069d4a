//! Labels that a security module (AppArmor, SELinux) gives to threads.
//!
//! A restored thread gets the label that the new container's configuration gives it, never one by the capsule's word; where that
//! is another than it had, nothing of the container runs.

use std::fs;
use std::io;

use samara_capsule::record::{Process as Record, ProcessState};
use samara_kernel::Pid;

use crate::attributes;
use crate::restore::{RestoreError, Tree, make};
use crate::tracee::Process;

/// Where a thread asks for another profile: of AppArmor by name, and of whichever module came first, before Linux 5.8.
const REQUESTS: [&str; 2] =
    ["/proc/thread-self/attr/apparmor/current", "/proc/thread-self/attr/current"];

/// What AppArmor calls a thread that it lets do everything, as it may without the module.
const UNCONFINED: &[u8] = b"unconfined";

/// The label of a thread. `None`: no security module gives labels here.
///
/// # Errors
/// Those of reading `/proc/TID/attr/current`.
pub(crate) fn of_thread(tid: Pid) -> io::Result<Option<Vec<u8>>> {
    match fs::read(format!("/proc/{tid}/attr/current")) {
        Ok(mut label) => {
            // SELinux ends it with a zero, AppArmor with a newline.
            while label.pop_if(|last| matches!(last, 0 | b'\n')).is_some() {}
            Ok(Some(label).filter(|label| !label.is_empty()))
        }
        // A kernel without modules, or with none that gives labels.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The label of the calling thread. `None`: no security module gives labels here.
///
/// # Errors
/// Those of reading `/proc/TID/attr/current`.
pub fn own() -> io::Result<Option<Vec<u8>>> {
    of_thread(rustix::thread::gettid().as_raw_nonzero().get())
}

/// Puts a thread under a profile of AppArmor, by name; an empty one leaves it as it is.
///
/// It comes last: what the engine lets the thread do before, the profile may forbid.
pub(crate) fn enter_profile(
    process: &mut Process,
    index: usize,
    profile: &str,
) -> Result<(), RestoreError> {
    if profile.is_empty() {
        return Ok(());
    }
    if attributes::write_own(process, index, &REQUESTS, &format!("changeprofile {profile}"))? {
        return Ok(());
    }
    let what = format!("the AppArmor profile {profile} of process {}", process.pid);
    Err(make(what)(io::Error::other("the kernel does not let it enter it")))
}

/// Compares the labels of all threads, which are confined and yet to run, with those that they had.
pub(crate) fn check(tree: &Tree, records: &[Record]) -> Result<(), RestoreError> {
    let mut differing = Vec::new();
    for record in records {
        let ProcessState::Alive(alive) = &record.state else { continue };
        let Some(process) = tree.processes.get(&record.pid) else { continue };
        for (made, thread) in process.threads.iter().zip(&alive.threads) {
            let here = of_thread(made.tid).map_err(make("the security label of a thread"))?;
            let had = thread.attributes.label.as_deref().map(Vec::as_slice);
            if !same(here.as_deref(), had) {
                differing.push(format!(
                    "thread {} of process {} ({}) had the security label {} and would have {}",
                    thread.tid,
                    record.pid,
                    String::from_utf8_lossy(&record.name),
                    shown(had),
                    shown(here.as_deref())
                ));
            }
        }
    }
    if differing.is_empty() {
        return Ok(());
    }
    Err(RestoreError::Incompatible(format!(
        "{}: start it under the profile or label that it was saved with",
        differing.join("; ")
    )))
}

/// Whether two labels let a thread do the same.
#[must_use]
pub fn same(one: Option<&[u8]>, other: Option<&[u8]>) -> bool {
    one.unwrap_or(UNCONFINED) == other.unwrap_or(UNCONFINED)
}

fn shown(label: Option<&[u8]>) -> String {
    label.map_or_else(|| "of no module".to_owned(), |label| String::from_utf8_lossy(label).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A container that was confined must not come back unconfined, and one from a host without a security module not be refused
    /// where nothing confines it.
    #[test]
    fn labels_are_the_same_where_they_allow_the_same() {
        let docker = Some(b"docker-default (enforce)".as_slice());
        assert!(same(docker, docker));
        assert!(same(None, Some(b"unconfined")));
        assert!(!same(docker, None));
        assert!(!same(docker, Some(b"unconfined")));
        assert!(!same(docker, Some(b"docker-default (complain)")));
    }
}
