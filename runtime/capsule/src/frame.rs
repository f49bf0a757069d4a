//! Frames: up to [`BATCH_BYTES_MAX`] bytes of pages, compressed on their own, so that each can be fetched and read alone.
//!
//! A frame has no header. Its codec, lengths and digest stand in the page map, and the first two in the pack's seek
//! table too.

use std::io;

use crate::transfer::{BATCH_BYTES_MAX, PAGE_BYTES};

/// Pages that a frame holds at most.
pub const FRAME_PAGES_MAX: usize = BATCH_BYTES_MAX / PAGE_BYTES;

/// zstd level of everything in a capsule: the knee of speed against size on real process memory.
pub const ZSTD_LEVEL: i32 = 1;

/// A frame is stored compressed only if that saves at least a sixteenth: less is not worth decoding it.
const SAVING_DIVISOR: usize = 16;

/// How the bytes of a frame are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// As they are.
    Raw,
    /// One zstd frame (RFC 8878) which declares its content size.
    Zstd,
}

/// Why a frame could not be decoded.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("a frame is stored with the codec {name} ({code}), which this version doesn't read; use a newer samara")]
    UnknownCodec { code: u8, name: &'static str },
    #[error("a frame declares {bytes} bytes, which is not one to {FRAME_PAGES_MAX} whole pages")]
    Length { bytes: usize },
    #[error("a frame holds {found} bytes instead of the declared {declared}")]
    LengthDiffers { declared: usize, found: usize },
    #[error("a frame is no zstd data")]
    Zstd(#[source] io::Error),
}

impl Codec {
    /// The byte that stands for this codec.
    pub fn code(self) -> u8 {
        match self {
            Codec::Raw => 0,
            Codec::Zstd => 1,
        }
    }

    /// The inverse of [`Codec::code`]. Codes that are reserved or unknown are refused by name.
    pub fn from_code(code: u8) -> Result<Codec, FrameError> {
        match code {
            0 => Ok(Codec::Raw),
            1 => Ok(Codec::Zstd),
            2 => Err(FrameError::UnknownCodec { code, name: "zstd over XOR with a base frame" }),
            _ => Err(FrameError::UnknownCodec { code, name: "unknown" }),
        }
    }
}

/// `bytes` as a count of pages, if a frame can hold that many bytes.
pub fn frame_pages(bytes: usize) -> Result<usize, FrameError> {
    if bytes == 0 || bytes > BATCH_BYTES_MAX || !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(FrameError::Length { bytes });
    }
    Ok(bytes / PAGE_BYTES)
}

/// Encodes frames, one after another, with one compression context.
pub struct FrameEncoder(zstd::bulk::Compressor<'static>);

impl FrameEncoder {
    /// Fails only where memory for the context can't be had.
    pub fn new() -> io::Result<FrameEncoder> {
        Ok(FrameEncoder(zstd::bulk::Compressor::new(ZSTD_LEVEL)?))
    }

    /// Replaces the content of `stored` by the encoding of `raw`, and says which codec it chose.
    pub fn encode(&mut self, raw: &[u8], stored: &mut Vec<u8>) -> io::Result<Codec> {
        self.compress(raw, stored)?;
        if stored.len() <= raw.len() - raw.len() / SAVING_DIVISOR {
            return Ok(Codec::Zstd);
        }
        stored.clear();
        stored.extend_from_slice(raw);
        Ok(Codec::Raw)
    }

    /// Replaces the content of `stored` by one zstd frame, whether or not that saves anything.
    pub fn compress(&mut self, raw: &[u8], stored: &mut Vec<u8>) -> io::Result<()> {
        stored.clear();
        stored.reserve(zstd::zstd_safe::compress_bound(raw.len()));
        self.0.compress_to_buffer(raw, stored)?;
        Ok(())
    }
}

impl std::fmt::Debug for FrameEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FrameEncoder")
    }
}

/// Decodes frames, one after another, with one decompression context.
pub struct FrameDecoder(zstd::bulk::Decompressor<'static>);

impl FrameDecoder {
    /// Fails only where memory for the context can't be had.
    pub fn new() -> io::Result<FrameDecoder> {
        Ok(FrameDecoder(zstd::bulk::Decompressor::new()?))
    }

    /// Replaces the content of `raw` by the `raw_bytes` bytes that `stored` encodes.
    ///
    /// On error `raw` holds nothing of use.
    pub fn decode(
        &mut self,
        codec: Codec,
        stored: &[u8],
        raw_bytes: usize,
        raw: &mut Vec<u8>,
    ) -> Result<(), FrameError> {
        frame_pages(raw_bytes)?;
        raw.clear();
        match codec {
            Codec::Raw => {
                if stored.len() != raw_bytes {
                    return Err(FrameError::LengthDiffers { declared: raw_bytes, found: stored.len() });
                }
                raw.extend_from_slice(stored);
            }
            Codec::Zstd => {
                raw.reserve(raw_bytes);
                self.0.decompress_to_buffer(stored, raw).map_err(FrameError::Zstd)?;
            }
        }
        if raw.len() != raw_bytes {
            return Err(FrameError::LengthDiffers { declared: raw_bytes, found: raw.len() });
        }
        Ok(())
    }
}

impl std::fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FrameDecoder")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(raw: &[u8], codec: Codec) {
        let mut stored = Vec::new();
        assert_eq!(FrameEncoder::new().unwrap().encode(raw, &mut stored).unwrap(), codec);
        let mut back = Vec::new();
        FrameDecoder::new().unwrap().decode(codec, &stored, raw.len(), &mut back).unwrap();
        assert!(back == raw);
    }

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 1u64;
        (0..bytes)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                state.to_le_bytes()[7]
            })
            .collect()
    }

    #[test]
    fn content_decides_the_codec() {
        check(&vec![7; BATCH_BYTES_MAX], Codec::Zstd);
        check(&noise(BATCH_BYTES_MAX), Codec::Raw);
        check(&noise(PAGE_BYTES), Codec::Raw);
    }

    #[test]
    fn a_frame_that_is_larger_than_declared_is_refused() {
        let mut stored = Vec::new();
        FrameEncoder::new().unwrap().compress(&vec![0; BATCH_BYTES_MAX], &mut stored).unwrap();
        let mut raw = Vec::new();
        assert!(FrameDecoder::new().unwrap().decode(Codec::Zstd, &stored, PAGE_BYTES, &mut raw).is_err());
        // A buffer recycled from a larger frame has the room, and the length still has to be right.
        let mut roomy = Vec::with_capacity(BATCH_BYTES_MAX);
        let refused = FrameDecoder::new().unwrap().decode(Codec::Zstd, &stored, PAGE_BYTES, &mut roomy);
        assert!(matches!(refused, Err(FrameError::LengthDiffers { .. })));
    }

    #[test]
    fn reserved_codecs_are_refused_by_name() {
        assert!(Codec::from_code(2).unwrap_err().to_string().contains("XOR"));
        assert!(Codec::from_code(9).unwrap_err().to_string().contains("unknown"));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), raw_bytes in 0usize..10000) {
            let _ = FrameDecoder::new().unwrap().decode(Codec::Zstd, &bytes, raw_bytes, &mut Vec::new());
        }

        #[test]
        fn mutated_frames_never_panic(at in 0usize..400, flip in 1u8..) {
            let raw: Vec<u8> = (0..4 * PAGE_BYTES).map(|i| (i / 64 % 251) as u8).collect();
            let mut stored = Vec::new();
            FrameEncoder::new().unwrap().compress(&raw, &mut stored).unwrap();
            let at = at % stored.len();
            stored[at] ^= flip;
            let _ = FrameDecoder::new().unwrap().decode(Codec::Zstd, &stored, raw.len(), &mut Vec::new());
        }
    }
}
