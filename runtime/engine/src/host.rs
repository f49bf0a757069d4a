//! What can be said of a restore before anything is made for it: whether this host's kernel is the right one, and whether the
//! records make sense.
//!
//! What is not here: what only the blank init can tell; [`crate::restore::restore`] looks at that, and at all of this again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use samara_capsule::record::{Container, ProcessState};
use samara_kernel::proc;
use sha2::{Digest, Sha256};

use crate::restore::RestoreError;
use crate::tracee::PADDING_BYTES;
use crate::{memory, plan};

/// The digest of this host's vdso, as a capture notes it: the code without the padding.
pub fn vdso_sha256() -> io::Result<[u8; 32]> {
    let own = proc::mappings(i32::try_from(std::process::id()).expect("a pid"))?;
    let vdso = own.iter().find(|mapping| mapping.name == "[vdso]");
    let vdso = vdso.ok_or_else(|| io::Error::other("this kernel offers no vdso"))?;
    let bytes = usize::try_from(vdso.bytes()).expect("a vdso has a few pages");
    let mut code = vec![0; bytes.saturating_sub(PADDING_BYTES)];
    File::open("/proc/self/mem")?.read_exact_at(&mut code, vdso.start)?;
    Ok(Sha256::digest(&code).into())
}

/// Finds records that no restore could follow, whatever the host.
///
/// # Errors
/// What is wrong with them.
pub fn check_records(container: &Container) -> Result<(), RestoreError> {
    // The blank init leads a session: libcontainer sees to that.
    plan::tree(&container.processes, true)?;
    for process in &container.processes {
        if let ProcessState::Alive(alive) = &process.state {
            memory::check(alive)?;
        }
    }
    Ok(())
}
