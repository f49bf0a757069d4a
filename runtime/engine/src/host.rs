//! What can be said of a restore before anything is made for it: whether this host's kernel is the right one, and whether the
//! records make sense.
//!
//! What is not here: what only the blank init can tell; [`crate::restore::restore`] looks at that, and at all of this again.

use std::io;

use samara_capsule::record::{Container, ProcessState};

use crate::restore::RestoreError;
use crate::{memory, plan, vdso};

/// The digest of this host's vdso, as a capture notes it: the code without the padding.
pub fn vdso_sha256() -> io::Result<[u8; 32]> {
    Ok(vdso::Host::look()?.sha256())
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
