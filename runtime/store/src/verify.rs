//! Verifying capsules: every blob is read again, its digest checked, and its content decoded to the end.
//!
//! Of differences the base must be the one that they name, and have the pages that they change: then nothing can go wrong in putting
//! both together, which is not done here.
//!
//! All damage is reported, not only the first. What is not checked is whether the records make sense to an engine.

use std::collections::{BTreeSet, HashMap};
use std::io;

use futures::StreamExt as _;
use samara_capsule::cbor::{self, decode_record};
use samara_capsule::digest::{Digest, FrameDigest};
use samara_capsule::frame::{Codec, FrameDecoder, FrameError};
use samara_capsule::manifest::BlobRef;
use samara_capsule::pack::{PackError, PackedFrame, read_pack};
use samara_capsule::transfer::{PAGE_BYTES, Source as _, SpaceId};

use crate::reader::{CapsuleReader, ReadError};
use crate::store::{Store, StoreError};

/// Packs in memory at a time.
const PACKS_MAX: usize = 4;

/// One fault of a capsule.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the pack {pack} is damaged")]
    Pack { pack: Digest, source: PackError },
    #[error("the pack {pack} is damaged in frame {frame}")]
    PackFrame { pack: Digest, frame: usize, source: FrameError },
    #[error(
        "the page map of {space} names a frame at {offset} of the pack {pack} which is not there, or is another"
    )]
    Reference { space: SpaceId, pack: Digest, offset: u32 },
    #[error(
        "the page map of {space} names a wrong base for the frame at {offset} of the pack {pack}"
    )]
    Base { space: SpaceId, pack: Digest, offset: u32 },
    #[error("the records {records} are damaged")]
    Records { records: Digest, source: cbor::DecodeError },
    #[error("the stream {name} is damaged")]
    Stream { name: String, source: io::Error },
    #[error("the config tells of {told} pages, the page maps of {found}")]
    Pages { told: u64, found: u64 },
    #[error("can't decompress")]
    Decompress(#[source] io::Error),
    #[error("a thread of the verification ended unexpectedly")]
    Panicked,
}

/// What was checked, and what is wrong with it.
#[derive(Debug, Default)]
pub struct Report {
    pub blobs: u64,
    pub bytes: u64,
    pub pages: u64,
    pub faults: Vec<Fault>,
}

/// The frames of a pack in order.
type Frames = Vec<CheckedFrame>;

#[derive(Clone, Copy, Debug)]
struct CheckedFrame {
    packed: PackedFrame,
    /// Of what it stores.
    digest: FrameDigest,
    /// What it needs: the base's digest, and how many pages that must have.
    base: Option<(FrameDigest, u16)>,
}

impl CapsuleReader {
    /// Checks all blobs of this capsule. `progress` is told how many bytes are done, of how many.
    pub fn verify(&self, progress: &(dyn Fn(u64, u64) + Sync)) -> Report {
        let total = self.manifest().stored_bytes();
        let mut report =
            Report { blobs: 2, bytes: self.manifest().config.bytes, ..Report::default() };
        let mut done = |report: &mut Report, blob: &BlobRef| {
            report.blobs += 1;
            report.bytes += blob.bytes;
            progress(report.bytes, total);
        };
        let packs = self.verify_packs(&mut report, &mut done);
        self.verify_maps(&packs, &mut report, &mut done);
        for (name, parts) in &self.manifest().streams {
            let result = self.stream(name).and_then(|stream| match stream {
                Some(mut stream) => io::copy(&mut stream, &mut io::sink()),
                None => Ok(0),
            });
            if let Err(source) = result {
                report.faults.push(Fault::Stream { name: name.0.clone(), source });
            }
            parts.iter().for_each(|part| done(&mut report, part));
        }
        match self.records() {
            Ok(records) => {
                if let Err(source) = decode_record::<serde::de::IgnoredAny>(&records) {
                    report
                        .faults
                        .push(Fault::Records { records: self.manifest().records.digest, source });
                }
            }
            Err(error) => report.faults.push(error.into()),
        }
        done(&mut report, &self.manifest().records);
        report
    }

    fn verify_packs(
        &self,
        report: &mut Report,
        done: &mut impl FnMut(&mut Report, &BlobRef),
    ) -> HashMap<Digest, Frames> {
        let store = self.store();
        let checks = futures::stream::iter(&self.manifest().packs).map(|&pack| async move {
            let checking = store.clone();
            let content = store.get_blob_unchecked(pack, Vec::new()).await?;
            let checked =
                tokio::task::spawn_blocking(move || check_pack(&checking, pack, &content));
            Ok((pack, checked.await.map_err(|_| Fault::Panicked)??))
        });
        let mut checks = checks.buffered(PACKS_MAX);
        let mut frames = HashMap::new();
        store.block_on(async {
            while let Some(result) = checks.next().await {
                match result {
                    Ok((pack, found)) => {
                        frames.insert(pack.digest, found);
                        done(report, &pack);
                    }
                    Err(fault) => report.faults.push(fault),
                }
            }
        });
        frames
    }

    fn verify_maps(
        &self,
        packs: &HashMap<Digest, Frames>,
        report: &mut Report,
        done: &mut impl FnMut(&mut Report, &BlobRef),
    ) {
        for (&space, blobs) in &self.manifest().maps {
            let (mut wrong, mut wrong_bases) = (BTreeSet::new(), BTreeSet::new());
            let mut pages = 0;
            let result = self.segments(space, |segment| {
                pages += segment.runs().iter().map(|run| u64::from(run.count)).sum::<u64>();
                for frame in segment.frames() {
                    let Some(&pack) = segment.packs().get(frame.pack as usize) else { continue };
                    // A pack that could not be read was reported as such.
                    let Some(frames) = packs.get(&pack) else { continue };
                    let found =
                        frames.binary_search_by_key(&frame.offset, |found| found.packed.offset);
                    let found = found.ok().and_then(|index| frames.get(index));
                    let fitting = found.filter(|CheckedFrame { packed, digest, .. }| {
                        packed.stored_bytes == frame.stored_bytes
                            && packed.raw_bytes as usize == usize::from(frame.pages) * PAGE_BYTES
                            && packed.codec == frame.codec
                            && *digest == frame.digest
                    });
                    let Some(CheckedFrame { base, .. }) = fitting else {
                        wrong.insert((pack, frame.offset));
                        continue;
                    };
                    // That there is one where one is needed follows from the codec.
                    let named = frame.base.and_then(|base| segment.frames().get(base as usize));
                    if let (Some((digest, pages_min)), Some(named)) = (base, named)
                        && (*digest != named.digest || *pages_min > named.pages)
                    {
                        wrong_bases.insert((pack, frame.offset));
                    }
                }
                Ok(())
            });
            report.pages += pages;
            let reference = |(pack, offset)| Fault::Reference { space, pack, offset };
            report.faults.extend(wrong.into_iter().map(reference));
            let base = |(pack, offset)| Fault::Base { space, pack, offset };
            report.faults.extend(wrong_bases.into_iter().map(base));
            if let Err(error) = result {
                report.faults.push(error.into());
            }
            blobs.iter().for_each(|blob| done(report, blob));
        }
        let told = self.config().statistics.pages;
        if told != report.pages && report.faults.is_empty() {
            report.faults.push(Fault::Pages { told, found: report.pages });
        }
    }
}

fn check_pack(store: &Store, pack: BlobRef, content: &[u8]) -> Result<Frames, Fault> {
    store.check_blob(pack, content)?;
    let damaged = |source| Fault::Pack { pack: pack.digest, source };
    let mut decoder = FrameDecoder::new().map_err(Fault::Decompress)?;
    let mut raw = Vec::new();
    let mut frames = Vec::new();
    for (index, frame) in read_pack(content).map_err(damaged)?.into_iter().enumerate() {
        let start = frame.offset as usize;
        let stored = content.get(start..start + frame.stored_bytes as usize);
        let stored = stored.expect("the frames of a pack that was read lie inside of it");
        let raw_bytes = frame.raw_bytes as usize;
        let decoded = match frame.codec {
            Codec::Raw | Codec::Zstd => {
                decoder.decode(frame.codec, stored, raw_bytes, &mut raw).map(|()| None)
            }
            Codec::Delta => decoder.decode_changes(stored, raw_bytes, &mut raw).map(|head| {
                let pages_min = head.slots.last().map_or(0, |slot| u16::from(*slot) + 1);
                Some((head.base, pages_min))
            }),
        };
        let base = decoded.map_err(|source| Fault::PackFrame {
            pack: pack.digest,
            frame: index,
            source,
        })?;
        frames.push(CheckedFrame { packed: frame, digest: FrameDigest::of(stored), base });
    }
    Ok(frames)
}
