//! How many frames there are by codec, and what they take.

use std::collections::BTreeMap;

use samara_capsule::config::FrameReport;
use samara_capsule::frame::Codec;
use serde::{Deserialize, Serialize};

/// Frames of pages, by how they are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameCounts {
    pub raw: FrameCount,
    pub zstd: FrameCount,
    /// What has changed in pages of other frames.
    pub delta: FrameCount,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameCount {
    pub frames: u64,
    /// Pages in them, whether or not a page map names each.
    pub pages: u64,
    pub stored_bytes: u64,
}

impl FrameCounts {
    /// As a report has them.
    pub(crate) fn report(&self) -> BTreeMap<String, FrameReport> {
        let FrameCounts { raw, zstd, delta } = *self;
        let of = |count: FrameCount| FrameReport {
            frames: count.frames,
            pages: count.pages,
            stored_bytes: count.stored_bytes,
        };
        [("raw", raw), ("zstd", zstd), ("differences", delta)]
            .map(|(name, count)| (name.to_owned(), of(count)))
            .into()
    }

    pub(crate) fn add(&mut self, codec: Codec, pages: u64, stored_bytes: u64) {
        let count = match codec {
            Codec::Raw => &mut self.raw,
            Codec::Zstd => &mut self.zstd,
            Codec::Delta => &mut self.delta,
        };
        count.frames += 1;
        count.pages += pages;
        count.stored_bytes += stored_bytes;
    }
}
