//! Lists of mappings, by the fastest way that the kernel has.

use std::io;
use std::sync::OnceLock;

use samara_kernel::mapping_list::MappingList;
use samara_kernel::proc::Mapping;
use samara_kernel::{Pid, proc};

/// None: this kernel can't.
static LIST: OnceLock<Option<MappingList>> = OnceLock::new();

/// Finds out what the kernel can do, which takes milliseconds.
pub(crate) fn prepare() {
    LIST.get_or_init(|| {
        MappingList::new()
            .inspect_err(
                |error| tracing::info!(%error, "mappings are read with a count of their pages"),
            )
            .ok()
    });
}

/// The mappings of a process in address order, with their flags. Of one that runs, what it was at different moments.
///
/// # Errors
/// As [`proc::mappings`].
pub(crate) fn of(pid: Pid) -> io::Result<Vec<Mapping>> {
    if let Some(list) = LIST.get().and_then(Option::as_ref) {
        match list.of(pid) {
            Ok(mappings) => return Ok(mappings),
            Err(error) => {
                tracing::debug!(%error, pid, "its mappings are read with a count of their pages")
            }
        }
    }
    proc::mappings(pid)
}
