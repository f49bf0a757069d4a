//! How much of its node a writer takes: threads, memory, bandwidth.
//!
//! Whoever knows of the other writers of the node sets it, before the writer is made and while it works. What is not here: how much that
//! should be, and the threads' priority, which is the business of whoever knows processes.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use samara_capsule::transfer::BATCH_BYTES_MAX;

use crate::writer::{PACK_BYTES, Shared};

/// What a writer may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// That compress, at least one.
    pub threads: usize,
    /// Of batches and packs that wait, at least 32 MiB. The process takes some tens of MiB beside.
    pub bytes: usize,
}

impl Share {
    /// As much as one writer can use.
    pub const WHOLE: Share = Share { threads: THREADS_MAX, bytes: BYTES_MAX };
}

/// More threads than this don't compress faster than one thread can place their results.
pub(crate) const THREADS_MAX: usize = 16;

/// Blobs that are hashed or uploaded at a time. One request to S3 carries 85-90 MB/s, so eight fill 5 Gbit/s.
pub(crate) const UPLOADS_MAX: usize = 8;

/// Batches that wait uncompressed, and the packs that wait behind slow uploads, take at most about this much together. The
/// caller may be holding a container still while it passes batches: what fits need not be compressed before it goes on.
pub(crate) const BUFFERS_BYTES_MAX: usize = 128 << 20;

/// What 16 threads and eight uploads take. 256 MiB are promised for the whole process, of which 32 are for compression, page maps,
/// connections.
const BYTES_MAX: usize = 224 << 20;

/// How a writer of some share is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// That compress at a time.
    pub(crate) threads: usize,
    /// Jobs that may wait or be worked on, of at most [`BATCH_BYTES_MAX`] each.
    pub(crate) in_flight_max: usize,
}

impl Plan {
    /// For a writer that uploads so many blobs at a time.
    pub(crate) fn of(share: Share, uploads: usize) -> Plan {
        let fits = |threads: &usize| {
            packs_bytes(*threads, uploads) + jobs_min(*threads) * BATCH_BYTES_MAX <= share.bytes
        };
        let threads = (1..=share.threads.min(THREADS_MAX)).rev().find(fits).unwrap_or(1);
        let room = BUFFERS_BYTES_MAX.min(share.bytes);
        let backlog = room.saturating_sub(packs_bytes(threads, uploads)) / BATCH_BYTES_MAX;
        Plan { threads, in_flight_max: jobs_min(threads).max(backlog) }
    }
}

/// Uploads at a time of a writer that begins with so many bytes.
pub(crate) fn uploads(bytes: usize) -> usize {
    (bytes / (BUFFERS_BYTES_MAX / UPLOADS_MAX)).clamp(2, UPLOADS_MAX)
}

/// Each worker may hold a full pack until there is room to upload it.
fn packs_bytes(threads: usize, uploads: usize) -> usize {
    (uploads + threads) * PACK_BYTES
}

/// At least enough for every worker to have a job and the next one; with many workers the next ones are shared.
fn jobs_min(threads: usize) -> usize {
    threads + threads.min(6) + 2
}

/// What all writers of a node upload together.
pub trait UploadLimit: Debug + Send + Sync {
    /// Notes that so many bytes are going to be uploaded, and answers after which time they may be. May wait for other processes.
    fn note(&self, bytes: u64) -> Duration;
    /// Whether nobody is to wait now.
    fn is_lifted(&self) -> bool;
}

/// A hold on a writer, from any thread. It does not keep the writer at work.
#[derive(Clone, Debug)]
pub struct Pace(pub(crate) Arc<Shared>);

/// What a writer has done, for whoever judges whether it gets on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// Batches of at most a MiB that have been compressed so far.
    pub batches: u64,
    /// Those that wait or are worked on.
    pub waiting: usize,
    /// Blobs that are being hashed or uploaded.
    pub uploading: usize,
    /// Threads that may work on them.
    pub threads: usize,
}

impl Pace {
    /// From now on the writer takes this much. What it has taken above that is given back as it is used up.
    pub fn set_share(&self, share: Share) {
        self.0.set_share(share);
    }

    /// Bytes are uploaded as this limit lets them. The first limit stays.
    pub fn limit_uploads(&self, limit: Arc<dyn UploadLimit>) {
        let _ = self.0.upload_limit.set(limit);
    }

    /// The threads that compress, by their number in the system.
    pub fn threads(&self) -> Vec<i32> {
        self.0.lock().thread_ids.clone()
    }

    pub fn pulse(&self) -> Pulse {
        let (batches, threads) = (&self.0.batches, &self.0.threads_max);
        let state = self.0.lock();
        Pulse {
            batches: batches.load(Relaxed),
            waiting: state.in_flight,
            uploading: state.uploading,
            threads: threads.load(Relaxed).min(state.thread_ids.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is promised for the whole process is 256 MiB; 32 of it are for compression, page maps, connections. And what a node gives
    /// its captures is what they take.
    #[test]
    fn buffers_stay_within_a_share() {
        for mebibytes in [32, 40, 64, 96, 128, 200, 224, 1024] {
            for wanted in 1..=64 {
                let share = Share { threads: wanted, bytes: mebibytes << 20 };
                let uploads = uploads(share.bytes);
                let Plan { threads, in_flight_max } = Plan::of(share, uploads);
                assert!(threads >= 1 && threads <= wanted);
                assert!(in_flight_max > threads, "a worker without a job waits for its caller");
                assert!(in_flight_max <= BUFFERS_BYTES_MAX / BATCH_BYTES_MAX, "the queue's length");
                let bytes = packs_bytes(threads, uploads) + in_flight_max * BATCH_BYTES_MAX;
                assert!(bytes <= share.bytes.min(BYTES_MAX), "{mebibytes} MiB: {}", bytes >> 20);
            }
        }
    }

    #[test]
    fn a_whole_share_is_what_one_writer_can_use() {
        assert_eq!(Plan::of(Share::WHOLE, UPLOADS_MAX).threads, THREADS_MAX);
        let two = Plan::of(Share { threads: 2, ..Share::WHOLE }, UPLOADS_MAX);
        assert_eq!(two, Plan { threads: 2, in_flight_max: 48 });
    }
}
