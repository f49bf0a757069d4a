//! Standard output, the only place that writes to it.

use std::io::{self, Write};

/// Runs `print` on standard output. A reader that has gone away is no error.
pub fn with_stdout<E>(
    print: impl FnOnce(&mut io::StdoutLock<'static>) -> Result<(), E>,
) -> Result<(), E> {
    let mut out = io::stdout().lock();
    print(&mut out)?;
    let _ = out.flush();
    Ok(())
}
