//! A panic is a defect of Samara. Where nobody reads a process's standard error, it is told like any other failure, with its place.

use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::{Arc, Mutex, PoisonError};

/// What the process's first panic said.
#[derive(Debug, thiserror::Error)]
#[error("a defect of Samara, please report it: {0}")]
pub(crate) struct Defect(String);

/// Runs `work`, for which the calling process exists. Its panic unwinds it, so that whatever it holds is let go, and comes back as
/// an error.
///
/// The first panic is told, since those of other threads follow from it. What `work` shares with the caller may be half done then.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, Defect> {
    let first: Arc<Mutex<Option<String>>> = Arc::default();
    let kept = Arc::clone(&first);
    panic::set_hook(Box::new(move |info| {
        kept.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| describe(info));
    }));
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    drop(panic::take_hook());
    outcome.map_err(|_| {
        let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
        Defect(first.unwrap_or_else(|| "a panic without words".into()))
    })
}

fn describe(info: &PanicHookInfo<'_>) -> String {
    let said = info.payload_as_str().unwrap_or("a panic without words");
    match info.location() {
        Some(place) => format!("{said} ({place})"),
        None => said.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, since the hook is the process's.
    #[test]
    fn a_panic_is_told_with_its_place() {
        assert_eq!(caught(|| 7).unwrap(), 7);
        let defect = caught(|| {
            let thread = std::thread::spawn(|| panic!("number {}", 5));
            thread.join().expect("a thread");
        })
        .unwrap_err();
        let told = defect.to_string();
        assert!(told.contains("number 5 (") && told.contains("defect.rs:"), "{told}");
    }
}
