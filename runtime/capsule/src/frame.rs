//! Frames: up to [`BATCH_BYTES_MAX`] bytes of pages, compressed on their own, so that each can be fetched and read alone.
//!
//! A frame has no header. Its codec, lengths and digest stand in the page map, and the first two in the pack's seek
//! table too.
//!
//! A frame of differences ([`Codec::Delta`]) holds what has changed in some pages of one other frame, its *base*, which is
//! plain: no frame depends on more than one other. It names its base by digest, so that equal digests are equal contents for it
//! too, and nothing can be decoded over the wrong one:
//!
//! ```text
//! digest of the base, 32 bytes | for each page its place in the base, a byte, ascending | one zstd frame of the XOR
//! ```

use std::io;

use crate::digest::FrameDigest;
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
    /// What has changed in pages of a base frame, compressed by zstd.
    Delta,
}

/// Why a frame could not be decoded.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error(
        "a frame is stored with the codec {name} ({code}), which this version doesn't read; use a newer samara"
    )]
    UnknownCodec { code: u8, name: &'static str },
    #[error("a frame declares {bytes} bytes, which is not one to {FRAME_PAGES_MAX} whole pages")]
    Length { bytes: usize },
    #[error("a frame holds {found} bytes instead of the declared {declared}")]
    LengthDiffers { declared: usize, found: usize },
    #[error("a frame is no zstd data")]
    Zstd(#[source] io::Error),
    #[error("a frame of differences ends before its {pages} pages are told")]
    Head { pages: usize },
    #[error("a frame of differences tells the pages of its base out of order")]
    Slots,
    #[error("a frame of differences changes page {slot} of its base, which has {base_pages} pages")]
    Slot { slot: u8, base_pages: usize },
    #[error("a frame of differences belongs to the base {wanted}, and not to this one")]
    WrongBase { wanted: FrameDigest },
    #[error("a frame of differences can't be decoded without its base")]
    WithoutBase,
}

/// A plain frame, decoded, over which differences are told.
#[derive(Clone, Copy, Debug)]
pub struct BaseFrame<'a> {
    /// Digest of its stored bytes.
    pub digest: FrameDigest,
    pub raw: &'a [u8],
}

/// What a frame of differences says of its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaHead<'a> {
    pub base: FrameDigest,
    /// For each page of the frame, which of the base's it was; in ascending order.
    pub slots: &'a [u8],
}

impl<'a> DeltaHead<'a> {
    /// The head of a frame of `pages` pages, and the compressed differences behind it.
    pub fn split(stored: &'a [u8], pages: usize) -> Result<(DeltaHead<'a>, &'a [u8]), FrameError> {
        let short = FrameError::Head { pages };
        let Some((base, rest)) = stored.split_first_chunk::<{ FrameDigest::BYTES }>() else {
            return Err(short);
        };
        let Some((slots, compressed)) = rest.split_at_checked(pages) else { return Err(short) };
        if !slots.is_sorted_by(|a, b| a < b) {
            return Err(FrameError::Slots);
        }
        Ok((DeltaHead { base: FrameDigest::from_bytes(*base), slots }, compressed))
    }

    /// Checks that the base is this one, of so many pages.
    pub fn check(&self, base: FrameDigest, base_pages: usize) -> Result<(), FrameError> {
        if self.base != base {
            return Err(FrameError::WrongBase { wanted: self.base });
        }
        match self.slots.last() {
            Some(&slot) if usize::from(slot) >= base_pages => {
                Err(FrameError::Slot { slot, base_pages })
            }
            _ => Ok(()),
        }
    }
}

/// Bytes that a frame of differences takes beside what is compressed: its head, and what a page map and a pack need to name it.
pub fn delta_overhead_bytes(pages: usize) -> usize {
    /// The digest and some numbers in the map, and an entry of the pack's table.
    const NAMING_BYTES: usize = 40 + 16;
    NAMING_BYTES + FrameDigest::BYTES + pages
}

/// Changes `page` to what it differs in from `other`, or back.
fn xor(page: &mut [u8], other: &[u8]) {
    for (byte, other) in page.iter_mut().zip(other) {
        *byte ^= other;
    }
}

impl Codec {
    /// The byte that stands for this codec.
    pub fn code(self) -> u8 {
        match self {
            Codec::Raw => 0,
            Codec::Zstd => 1,
            Codec::Delta => 2,
        }
    }

    /// The inverse of [`Codec::code`]. Unknown codes are refused.
    pub fn from_code(code: u8) -> Result<Codec, FrameError> {
        match code {
            0 => Ok(Codec::Raw),
            1 => Ok(Codec::Zstd),
            2 => Ok(Codec::Delta),
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
pub struct FrameEncoder {
    context: zstd::bulk::Compressor<'static>,
    /// Differences, before they are compressed.
    changes: Vec<u8>,
    compressed: Vec<u8>,
}

impl FrameEncoder {
    /// Fails only where memory for the context can't be had.
    pub fn new() -> io::Result<FrameEncoder> {
        let context = zstd::bulk::Compressor::new(ZSTD_LEVEL)?;
        Ok(FrameEncoder { context, changes: Vec::new(), compressed: Vec::new() })
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
        self.context.compress_to_buffer(raw, stored)?;
        Ok(())
    }

    /// Replaces the content of `stored` by what `pages` differ in from those of `base`: each comes with its place there, in
    /// ascending order. At most as many as a frame holds.
    ///
    /// # Panics
    /// If a place is not one of the base's.
    pub fn encode_delta<'a>(
        &mut self,
        pages: impl IntoIterator<Item = (u8, &'a [u8])>,
        base: BaseFrame<'_>,
        stored: &mut Vec<u8>,
    ) -> io::Result<()> {
        stored.clear();
        stored.extend_from_slice(base.digest.as_bytes());
        let mut changes = std::mem::take(&mut self.changes);
        changes.clear();
        for (slot, page) in pages {
            stored.push(slot);
            let from = changes.len();
            changes.extend_from_slice(page);
            let start = usize::from(slot) * PAGE_BYTES;
            let before = base.raw.get(start..start + PAGE_BYTES);
            let changed = changes.get_mut(from..).expect("just appended");
            xor(changed, before.expect("the caller names pages that the base has"));
        }
        let mut compressed = std::mem::take(&mut self.compressed);
        let result = self.compress(&changes, &mut compressed);
        stored.extend_from_slice(&compressed);
        (self.changes, self.compressed) = (changes, compressed);
        result
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

    /// Replaces the content of `raw` by the `raw_bytes` bytes that `stored`, a plain frame, encodes.
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
                    return Err(FrameError::LengthDiffers {
                        declared: raw_bytes,
                        found: stored.len(),
                    });
                }
                raw.extend_from_slice(stored);
            }
            Codec::Zstd => self.decompress(stored, raw_bytes, raw)?,
            Codec::Delta => return Err(FrameError::WithoutBase),
        }
        Ok(())
    }

    /// Replaces the content of `raw` by the pages that `stored`, a frame of differences, makes of those of `base`.
    ///
    /// On error `raw` holds nothing of use.
    pub fn decode_delta(
        &mut self,
        stored: &[u8],
        raw_bytes: usize,
        base: BaseFrame<'_>,
        raw: &mut Vec<u8>,
    ) -> Result<(), FrameError> {
        let head = self.decode_changes(stored, raw_bytes, raw)?;
        head.check(base.digest, base.raw.len() / PAGE_BYTES)?;
        for (page, &slot) in raw.chunks_exact_mut(PAGE_BYTES).zip(head.slots) {
            let start = usize::from(slot) * PAGE_BYTES;
            let before = base.raw.get(start..start + PAGE_BYTES);
            xor(page, before.expect("the last place was checked, and they are in order"));
        }
        Ok(())
    }

    /// Replaces the content of `raw` by the differences that `stored`, a frame of them, tells, and says to what they apply: all that
    /// can be checked of it without its base.
    ///
    /// On error `raw` holds nothing of use.
    pub fn decode_changes<'a>(
        &mut self,
        stored: &'a [u8],
        raw_bytes: usize,
        raw: &mut Vec<u8>,
    ) -> Result<DeltaHead<'a>, FrameError> {
        let (head, compressed) = DeltaHead::split(stored, frame_pages(raw_bytes)?)?;
        raw.clear();
        self.decompress(compressed, raw_bytes, raw)?;
        Ok(head)
    }

    fn decompress(
        &mut self,
        stored: &[u8],
        raw_bytes: usize,
        raw: &mut Vec<u8>,
    ) -> Result<(), FrameError> {
        raw.reserve(raw_bytes);
        self.0.decompress_to_buffer(stored, raw).map_err(FrameError::Zstd)?;
        match raw.len() == raw_bytes {
            true => Ok(()),
            false => Err(FrameError::LengthDiffers { declared: raw_bytes, found: raw.len() }),
        }
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
        assert!(
            FrameDecoder::new()
                .unwrap()
                .decode(Codec::Zstd, &stored, PAGE_BYTES, &mut raw)
                .is_err()
        );
        // A buffer recycled from a larger frame has the room, and the length still has to be right.
        let mut roomy = Vec::with_capacity(BATCH_BYTES_MAX);
        let refused =
            FrameDecoder::new().unwrap().decode(Codec::Zstd, &stored, PAGE_BYTES, &mut roomy);
        assert!(matches!(refused, Err(FrameError::LengthDiffers { .. })));
    }

    #[test]
    fn unknown_codecs_are_refused() {
        assert!(Codec::from_code(9).unwrap_err().to_string().contains("unknown"));
    }

    fn base_of(raw: &[u8]) -> BaseFrame<'_> {
        BaseFrame { digest: FrameDigest::of(raw), raw }
    }

    /// A base of five pages, and one changed word in its pages 1 and 4.
    fn delta() -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let base = noise(5 * PAGE_BYTES);
        let mut raw = [&base[PAGE_BYTES..2 * PAGE_BYTES], &base[4 * PAGE_BYTES..]].concat();
        raw[100] ^= 1;
        raw[PAGE_BYTES + 7] ^= 0x80;
        let pages = [1, 4].into_iter().zip(raw.chunks(PAGE_BYTES));
        let mut stored = Vec::new();
        FrameEncoder::new().unwrap().encode_delta(pages, base_of(&base), &mut stored).unwrap();
        (base, raw, stored)
    }

    #[test]
    fn differences_are_small_and_come_back() {
        let (base, raw, stored) = delta();
        assert!(stored.len() < 100, "{} bytes", stored.len());
        let mut back = Vec::new();
        let mut decoder = FrameDecoder::new().unwrap();
        decoder.decode_delta(&stored, raw.len(), base_of(&base), &mut back).unwrap();
        assert!(back == raw);
    }

    /// Over another base, or as a plain frame, differences would be pages that never were.
    #[test]
    fn differences_are_refused_by_name_where_they_do_not_belong() {
        let (base, raw, stored) = delta();
        let refused = |stored: &[u8], base: BaseFrame<'_>, raw_bytes: usize| {
            let mut decoder = FrameDecoder::new().unwrap();
            let refused = decoder.decode_delta(stored, raw_bytes, base, &mut Vec::new());
            format!("{:?}", refused.unwrap_err())
        };
        let mut other = base.clone();
        other[0] ^= 1;
        assert!(refused(&stored, base_of(&other), raw.len()).contains("WrongBase"));
        let shorter = BaseFrame { raw: &base[..4 * PAGE_BYTES], ..base_of(&base) };
        assert!(refused(&stored, shorter, raw.len()).contains("Slot { slot: 4, base_pages: 4 }"));
        let mut unordered = stored.clone();
        unordered.swap(FrameDigest::BYTES, FrameDigest::BYTES + 1);
        assert!(refused(&unordered, base_of(&base), raw.len()).contains("Slots"));
        let mut twice = stored.clone();
        twice[FrameDigest::BYTES + 1] = 1;
        assert!(refused(&twice, base_of(&base), raw.len()).contains("Slots"));
        assert!(
            refused(&stored[..FrameDigest::BYTES + 1], base_of(&base), raw.len()).contains("Head")
        );
        assert!(refused(&stored[..9], base_of(&base), raw.len()).contains("Head"));
        assert!(refused(&stored, base_of(&base), 1000 * PAGE_BYTES).contains("Length"));
        let mut back = Vec::new();
        let plain =
            FrameDecoder::new().unwrap().decode(Codec::Delta, &stored, raw.len(), &mut back);
        assert!(matches!(plain, Err(FrameError::WithoutBase)));
    }

    proptest! {
        #[test]
        fn any_pages_come_back_from_their_differences(
            base_pages in 1usize..20,
            changes in proptest::collection::vec((0usize..20 * PAGE_BYTES, any::<u8>()), 0..200),
            wanted in proptest::collection::btree_set(0u8..20, 1..20),
        ) {
            let base = noise(base_pages * PAGE_BYTES);
            let mut changed = base.clone();
            for (at, value) in changes {
                let at = at % changed.len();
                changed[at] = value;
            }
            let slots: Vec<u8> =
                wanted.into_iter().filter(|slot| usize::from(*slot) < base_pages).collect();
            prop_assume!(!slots.is_empty());
            let page = |slot: u8| &changed[usize::from(slot) * PAGE_BYTES..][..PAGE_BYTES];
            let pages = slots.iter().map(|slot| (*slot, page(*slot)));
            let mut stored = Vec::new();
            let mut encoder = FrameEncoder::new().unwrap();
            encoder.encode_delta(pages, base_of(&base), &mut stored).unwrap();
            let mut back = Vec::new();
            let mut decoder = FrameDecoder::new().unwrap();
            let raw_bytes = slots.len() * PAGE_BYTES;
            decoder.decode_delta(&stored, raw_bytes, base_of(&base), &mut back).unwrap();
            prop_assert!(back == slots.iter().flat_map(|slot| page(*slot).to_vec()).collect::<Vec<u8>>());
        }

        #[test]
        fn mutated_differences_never_panic(at in 0usize..200, flip in 1u8.., cut in 0usize..200) {
            let (base, raw, mut stored) = delta();
            let at = at % stored.len();
            stored[at] ^= flip;
            let mut decoder = FrameDecoder::new().unwrap();
            let _ = decoder.decode_delta(&stored, raw.len(), base_of(&base), &mut Vec::new());
            stored.truncate(cut);
            let _ = decoder.decode_delta(&stored, raw.len(), base_of(&base), &mut Vec::new());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), raw_bytes in 0usize..10000) {
            let _ = FrameDecoder::new().unwrap().decode(Codec::Zstd, &bytes, raw_bytes, &mut Vec::new());
        }

        #[test]
        fn mutated_frames_never_panic(at in 0usize..400, flip in 1u8..) {
            let raw: Vec<u8> = (0..4 * PAGE_BYTES).map(|i| u8::try_from(i / 64 % 251).unwrap()).collect();
            let mut stored = Vec::new();
            FrameEncoder::new().unwrap().compress(&raw, &mut stored).unwrap();
            let at = at % stored.len();
            stored[at] ^= flip;
            let _ = FrameDecoder::new().unwrap().decode(Codec::Zstd, &stored, raw.len(), &mut Vec::new());
        }
    }
}
