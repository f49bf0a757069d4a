//! Packs: blobs of at most [`BLOB_BYTES_MAX`] bytes that hold frames back to back, with a seek table at the end.
//!
//! ```text
//! "SamaraPK" | frame 0 | frame 1 | ... | seek table: 16 bytes a frame | count u32 | version u32 | "SamaraPE"
//! ```
//!
//! A pack stands for itself: its frames can be found and decoded without any page map, but for those of differences, which need
//! a base that may lie in another pack. A reader that fetches single frames by range uses the page map instead, which also has
//! each frame's digest.

use crate::frame::{Codec, FrameError, frame_pages};
use crate::{BLOB_BYTES_MAX, FORMAT_VERSION};

const HEAD_MAGIC: &[u8; 8] = b"SamaraPK";
const TAIL_MAGIC: &[u8; 8] = b"SamaraPE";
const ENTRY_BYTES: usize = 16;
const FOOTER_BYTES: usize = 16;

/// Where a frame lies in its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedFrame {
    pub offset: u32,
    pub stored_bytes: u32,
    pub raw_bytes: u32,
    pub codec: Codec,
}

/// Why bytes are no pack.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error(
        "a pack of {bytes} bytes is shorter than its fixed parts, or longer than {BLOB_BYTES_MAX}"
    )]
    Size { bytes: usize },
    #[error("the blob is no pack")]
    Magic,
    #[error(
        "the pack has format version {found}, this samara reads up to {FORMAT_VERSION}; use a newer one"
    )]
    Version { found: u32 },
    #[error("the pack's seek table is damaged at frame {frame}")]
    Table { frame: usize },
    #[error("frame {frame} of the pack")]
    Frame { frame: usize, source: FrameError },
}

/// Puts frames into a pack.
#[derive(Debug)]
pub struct PackBuilder {
    bytes: Vec<u8>,
    frames: Vec<PackedFrame>,
}

impl PackBuilder {
    /// An empty pack in `buffer`, whose content is dropped and whose memory is kept.
    pub fn new(mut buffer: Vec<u8>) -> PackBuilder {
        buffer.clear();
        buffer.extend_from_slice(HEAD_MAGIC);
        PackBuilder { bytes: buffer, frames: Vec::new() }
    }

    /// Bytes of the pack if it were finished now.
    pub fn finished_bytes(&self) -> usize {
        self.bytes.len() + self.frames.len() * ENTRY_BYTES + FOOTER_BYTES
    }

    /// Whether a frame of `stored_bytes` still fits into a pack of `pack_bytes_max`.
    pub fn has_room(&self, stored_bytes: usize, pack_bytes_max: usize) -> bool {
        self.finished_bytes() + ENTRY_BYTES + stored_bytes <= pack_bytes_max.min(BLOB_BYTES_MAX)
    }

    /// Whether no frame was added yet.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Appends a frame, and tells where it lies.
    ///
    /// # Panics
    /// If there is no room; ask [`PackBuilder::has_room`] before.
    pub fn push(&mut self, codec: Codec, stored: &[u8], raw_bytes: u32) -> PackedFrame {
        assert!(self.has_room(stored.len(), BLOB_BYTES_MAX), "a frame was pushed into a full pack");
        let frame = PackedFrame {
            offset: u32::try_from(self.bytes.len()).expect("a pack is smaller than 4 GiB"),
            stored_bytes: u32::try_from(stored.len()).expect("a frame is smaller than 4 GiB"),
            raw_bytes,
            codec,
        };
        self.bytes.extend_from_slice(stored);
        self.frames.push(frame);
        frame
    }

    /// Closes the pack and returns its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.reserve_exact(self.frames.len() * ENTRY_BYTES + FOOTER_BYTES);
        for frame in &self.frames {
            self.bytes.extend_from_slice(&frame.offset.to_le_bytes());
            self.bytes.extend_from_slice(&frame.stored_bytes.to_le_bytes());
            self.bytes.extend_from_slice(&frame.raw_bytes.to_le_bytes());
            self.bytes.extend_from_slice(&[frame.codec.code(), 0, 0, 0]);
        }
        let count = u32::try_from(self.frames.len()).expect("a pack holds fewer than 2^32 frames");
        self.bytes.extend_from_slice(&count.to_le_bytes());
        self.bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        self.bytes.extend_from_slice(TAIL_MAGIC);
        self.bytes
    }
}

/// Reads the seek table of a pack. The frames it returns lie inside of `pack`, back to back and in order.
pub fn read_pack(pack: &[u8]) -> Result<Vec<PackedFrame>, PackError> {
    let size = || PackError::Size { bytes: pack.len() };
    if pack.len() > BLOB_BYTES_MAX {
        return Err(size());
    }
    let (head, _) = pack.split_first_chunk::<8>().ok_or_else(size)?;
    let (rest, tail) = pack.split_last_chunk::<8>().ok_or_else(size)?;
    if head != HEAD_MAGIC || tail != TAIL_MAGIC {
        return Err(PackError::Magic);
    }
    let (rest, version) = rest.split_last_chunk::<4>().ok_or_else(size)?;
    let (rest, count) = rest.split_last_chunk::<4>().ok_or_else(size)?;
    let version = u32::from_le_bytes(*version);
    if version != FORMAT_VERSION {
        return Err(PackError::Version { found: version });
    }
    let count = usize::try_from(u32::from_le_bytes(*count)).map_err(|_| size())?;
    let table_bytes = count.checked_mul(ENTRY_BYTES).ok_or_else(size)?;
    let table_at = rest.len().checked_sub(table_bytes).ok_or_else(size)?;
    if table_at < HEAD_MAGIC.len() {
        return Err(size());
    }
    let (_, table) = rest.split_at(table_at);
    let (entries, _) = table.as_chunks::<ENTRY_BYTES>();

    let mut frames = Vec::with_capacity(entries.len());
    let mut end = HEAD_MAGIC.len();
    for (index, entry) in entries.iter().enumerate() {
        let damaged = || PackError::Table { frame: index };
        let [o0, o1, o2, o3, s0, s1, s2, s3, r0, r1, r2, r3, codec, 0, 0, 0] = *entry else {
            return Err(damaged());
        };
        let frame = PackedFrame {
            offset: u32::from_le_bytes([o0, o1, o2, o3]),
            stored_bytes: u32::from_le_bytes([s0, s1, s2, s3]),
            raw_bytes: u32::from_le_bytes([r0, r1, r2, r3]),
            codec: Codec::from_code(codec)
                .map_err(|source| PackError::Frame { frame: index, source })?,
        };
        if usize::try_from(frame.offset).map_err(|_| damaged())? != end {
            return Err(damaged());
        }
        let stored_bytes = usize::try_from(frame.stored_bytes).map_err(|_| damaged())?;
        end = end.checked_add(stored_bytes).filter(|&end| end <= table_at).ok_or_else(damaged)?;
        frame_pages(usize::try_from(frame.raw_bytes).map_err(|_| damaged())?)
            .map_err(|source| PackError::Frame { frame: index, source })?;
        frames.push(frame);
    }
    if end != table_at {
        return Err(PackError::Table { frame: count });
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> (Vec<PackedFrame>, Vec<u8>) {
        let mut pack = PackBuilder::new(vec![1, 2, 3]);
        let frames =
            vec![pack.push(Codec::Raw, &[5; 4096], 4096), pack.push(Codec::Zstd, &[6; 100], 8192)];
        let finished = pack.finished_bytes();
        let bytes = pack.finish();
        assert_eq!(bytes.len(), finished);
        (frames, bytes)
    }

    #[test]
    fn frames_are_found_again() {
        let (frames, bytes) = sample();
        assert_eq!(read_pack(&bytes).unwrap(), frames);
        assert_eq!(read_pack(&PackBuilder::new(Vec::new()).finish()).unwrap(), []);
    }

    #[test]
    fn room_ends_at_the_bound() {
        let pack = PackBuilder::new(Vec::new());
        let room = BLOB_BYTES_MAX - pack.finished_bytes() - ENTRY_BYTES;
        assert!(pack.has_room(room, usize::MAX));
        assert!(!pack.has_room(room + 1, usize::MAX));
    }

    #[test]
    fn damage_is_refused_by_name() {
        let (_, bytes) = sample();
        let check = |at: usize, value: u8, expected: &str| {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            let found = format!("{:?}", read_pack(&bytes).unwrap_err());
            assert!(found.contains(expected), "{found}");
        };
        let len = bytes.len();
        check(0, b'X', "Magic");
        check(len - 1, b'X', "Magic");
        check(len - 12, 2, "Version");
        check(len - 16, 1, "Table");
        check(len - 16 - 4, 3, "UnknownCodec");
        check(len - 16 - 3, 1, "Table");
        check(len - 16 - 8, 1, "Length");
        check(len - 16 - 32, 9, "Table");
        assert!(matches!(read_pack(&bytes[..20]), Err(PackError::Magic)));
        assert!(matches!(read_pack(&[]), Err(PackError::Size { .. })));
    }

    proptest! {
        #[test]
        fn mutated_packs_never_panic(at in 0usize..5000, value: u8, cut in 0usize..5000) {
            let (_, mut bytes) = sample();
            let at = at % bytes.len();
            bytes[at] = value;
            for frame in read_pack(&bytes).unwrap_or_default() {
                let end = frame.offset as usize + frame.stored_bytes as usize;
                prop_assert!(end <= bytes.len());
            }
            bytes.truncate(cut);
            let _ = read_pack(&bytes);
        }
    }
}
