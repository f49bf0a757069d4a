//! What is known of threads without asking them, by the way that the kernel has for it.

use std::sync::OnceLock;

use samara_kernel::Pid;
use samara_kernel::thread_list::{ThreadFacts, ThreadList};

/// None: this kernel can't.
static LIST: OnceLock<Option<ThreadList>> = OnceLock::new();

/// Finds out what the kernel can do, which takes milliseconds.
pub(crate) fn prepare() {
    LIST.get_or_init(|| {
        ThreadList::new()
            .inspect_err(
                |error| tracing::info!(%error, "each thread is asked what it alone can tell"),
            )
            .ok()
    });
}

/// Of the threads of a process that stands, as far as they are known. Who has but a few is asked as fast.
pub(crate) fn of(pid: Pid, threads: usize) -> Vec<(Pid, ThreadFacts)> {
    const THREADS_MIN: usize = 3;
    let list = LIST.get().and_then(Option::as_ref).filter(|_| threads >= THREADS_MIN);
    let Some(list) = list else { return Vec::new() };
    match list.of(pid) {
        Ok(threads) => threads.into_iter().map(|facts| (facts.tid, facts)).collect(),
        Err(error) => {
            tracing::debug!(%error, pid, "each of its threads is asked");
            Vec::new()
        }
    }
}
