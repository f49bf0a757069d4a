//! Streams: named sequences of bytes beside the pages, such as the layer of changed files.
//!
//! A stream is cut every [`BATCH_BYTES_MAX`](crate::transfer::BATCH_BYTES_MAX) bytes or earlier; each piece becomes one
//! zstd frame, and the frames back to back are again zstd data. These bytes are cut into blobs without regard to frames, but for
//! segments, which are whole frames in one blob of their own: later capsules name it in their streams. The concatenation of a stream's
//! blobs is what `zstd -d` reads.

use crate::transfer::StreamName;

/// Streams of a capsule at most: one for the root's changes, one a volume, tmpfs or file that is carried by name.
pub const STREAMS_MAX: usize = 4096;

/// Bytes of a stream's name at most.
pub const STREAM_NAME_BYTES_MAX: usize = 128;

/// A decoder keeps a window of at most 2 to this power bytes; frames of a mebibyte never need more.
pub const WINDOW_LOG_MAX: u32 = 23;

/// The name is no name of a stream.
#[derive(Debug, thiserror::Error)]
#[error(
    "{name:?} is no name of a stream: 1 to {STREAM_NAME_BYTES_MAX} lower-case letters, digits, '-' and '.' are allowed"
)]
pub struct StreamNameError {
    name: String,
}

/// Checks the name of a stream.
pub fn check_name(name: &StreamName) -> Result<(), StreamNameError> {
    let allowed = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.'
    };
    match name.0.as_bytes() {
        bytes
            if bytes.is_empty()
                || bytes.len() > STREAM_NAME_BYTES_MAX
                || !bytes.iter().copied().all(allowed) =>
        {
            Err(StreamNameError { name: name.0.chars().take(STREAM_NAME_BYTES_MAX).collect() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        for (name, valid) in
            [("root", true), ("volume-0.tar", true), ("", false), ("A", false), ("a/b", false)]
        {
            assert_eq!(check_name(&StreamName(name.into())).is_ok(), valid, "{name}");
        }
        assert!(check_name(&StreamName("a".repeat(129))).is_err());
    }
}
