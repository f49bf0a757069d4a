//! Buffers of packs, for use again.
//!
//! Packs are large, and pass from thread to thread. Given back to the allocator, they stay in the arena of whichever
//! thread made them: with sixteen workers that was 200 MiB of nothing.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use samara_capsule::BLOB_BYTES_MAX;

/// Buffers that are kept; as many as are in use at a time by a writer or a reader.
const BUFFERS_MAX: usize = 12;

/// Clones share their buffers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pool(Arc<Mutex<Vec<Vec<u8>>>>);

impl Pool {
    /// An empty buffer, with room if there is one that has.
    pub(crate) fn take(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Takes a buffer back.
    pub(crate) fn give(&self, mut buffer: Vec<u8>) {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.len() < BUFFERS_MAX && buffer.capacity() >= BLOB_BYTES_MAX / 16 {
            buffer.clear();
            buffers.push(buffer);
        }
    }

    /// The content of a buffer, which comes back when nobody needs it any more.
    pub(crate) fn lend(&self, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { buffer, pool: self.clone() })
    }
}

struct Lent {
    buffer: Vec<u8>,
    pool: Pool,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.pool.give(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_empty() {
        let pool = Pool::default();
        let buffer = Vec::from([7; BLOB_BYTES_MAX]);
        let place = buffer.as_ptr();
        let lent = pool.lend(buffer);
        assert_eq!(lent.len(), BLOB_BYTES_MAX);
        assert!(pool.take().capacity() == 0);
        drop(lent);
        let back = pool.take();
        assert!(back.is_empty());
        assert_eq!(back.as_ptr(), place);
    }
}
