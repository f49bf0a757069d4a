//! Which segments of a container's files are stored already: by the capsule before, or ahead while the container ran.
//!
//! A segment is known by two names. Its *content* is the digest of its bytes: who has read it again need not store it again. Its *key*
//! is the digest of all that can be said of it without reading: names, metadata, times. A key is *proven* where the times prove that
//! equal keys are equal bytes ([`super::moment`]); then nothing is read. Where they never will, a key that is known says that it's not
//! worth while to read the segment ahead: nothing speaks for a change, and in the pause it is read anyway.
//!
//! What this module does not do: decide what a segment is, which the walk does ([`super::changes`]).

use std::collections::{HashMap, HashSet};
use std::io;

use samara_capsule::transfer::{SegmentId, Sink, StoredSegment, StreamName};
use serde::{Deserialize, Serialize};

use super::moment::{Clocks, LeftAlone, Moment};

/// Segments that are noted for the next capsule at most: 80 GiB of large files, in about 7 MiB of notes. What is beyond them is read
/// again, and not stored again.
const NOTED_MAX: usize = 20_000;

/// The digest of a segment's bytes, or of what is known of it without them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name(pub(super) [u8; 32]);

impl Serialize for Name {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Name, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        let hash = blake3::Hash::from_hex(text.as_bytes()).map_err(serde::de::Error::custom)?;
        Ok(Name(*hash.as_bytes()))
    }
}

/// Where the layer's segments go.
pub(super) trait Out {
    /// Takes a segment of which the key is known, and tells its length. None: it has to be read. `is_provable`: the key will be a proven one
    /// if it is read now.
    fn known(&mut self, key: &Name, is_provable: bool) -> io::Result<Option<u64>>;

    /// An empty buffer with room for a part of a segment.
    fn buffer(&mut self) -> Vec<u8>;

    /// Takes a segment that was read. `is_proven`: equal keys are equal bytes from now on.
    fn put(&mut self, key: Name, is_proven: bool, parts: Vec<Vec<u8>>) -> io::Result<()>;

    /// Since when times prove something; none: never.
    fn moment(&self) -> Option<&Moment>;

    /// What must not be read, where the container runs.
    fn left_alone(&self) -> Option<&LeftAlone>;
}

/// What one capture leaves for the next.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FileNotes {
    clocks: Option<Clocks>,
    segments: Vec<Noted>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Noted {
    stored: StoredSegment,
    content: Name,
    key: Name,
    is_proven: bool,
}

impl FileNotes {
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }
}

/// All that is known while a capsule is made.
#[derive(Debug)]
pub struct KnownFiles {
    clocks: Clocks,
    segments: Vec<Known>,
    by_content: HashMap<Name, usize>,
    /// And whether the key is proven.
    by_key: HashMap<Name, (usize, bool)>,
    /// What stands in the capsule, by number, and under which key.
    placed: Vec<(usize, Name)>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    content: Name,
    place: Place,
    bytes: u64,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Stored(StoredSegment),
    Taken(SegmentId),
    /// The capsule before has it no more.
    Gone,
}

impl KnownFiles {
    /// What the capsule before has left.
    pub fn new(notes: &FileNotes) -> KnownFiles {
        let mut known = KnownFiles {
            clocks: Clocks::now(),
            segments: Vec::new(),
            by_content: HashMap::new(),
            by_key: HashMap::new(),
            placed: Vec::new(),
        };
        let clock_ran_on = notes.clocks.is_some_and(|then| then.ran_on(known.clocks));
        for Noted { stored, content, key, is_proven } in &notes.segments {
            let number = match known.by_content.get(content) {
                Some(number) => *number,
                None => {
                    let bytes = stored.raw_bytes;
                    known.add(Known { content: *content, place: Place::Stored(*stored), bytes })
                }
            };
            if clock_ran_on {
                known.by_key.insert(*key, (number, *is_proven));
            }
        }
        known
    }

    fn add(&mut self, known: Known) -> usize {
        self.by_content.insert(known.content, self.segments.len());
        self.segments.push(known);
        self.segments.len() - 1
    }

    /// Where a container's files go while it runs: what is new or has changed is stored, and stands nowhere.
    pub fn ahead<'a>(
        &'a mut self,
        sink: &'a mut dyn Sink,
        moment: &'a Moment,
        alone: &'a LeftAlone,
    ) -> Segments<'a> {
        Segments { known: self, sink, stream: None, moment, alone: Some(alone), spare: Vec::new() }
    }

    /// Where the files of a container that stands go: into a stream.
    pub fn into_stream<'a>(
        &'a mut self,
        sink: &'a mut dyn Sink,
        stream: &str,
        moment: &'a Moment,
    ) -> Segments<'a> {
        let now = Clocks::now();
        if !self.clocks.ran_on(now) {
            self.by_key.clear();
        }
        self.clocks = now;
        let stream = Some(StreamName(stream.to_owned()));
        Segments { known: self, sink, stream, moment, alone: None, spare: Vec::new() }
    }

    /// What the next capsule may build on, when this one was committed with these segments.
    pub fn into_notes(self, committed: &HashMap<SegmentId, StoredSegment>) -> FileNotes {
        let mut segments = Vec::new();
        let mut noted = HashSet::new();
        for (number, key) in self.placed {
            let Some(Known { content, place: Place::Taken(id), .. }) = self.segments.get(number)
            else {
                continue;
            };
            let Some(stored) = committed.get(id) else { continue };
            let is_proven =
                matches!(self.by_key.get(&key), Some((known, true)) if *known == number);
            if segments.len() < NOTED_MAX && noted.insert((number, key)) {
                segments.push(Noted { stored: *stored, content: *content, key, is_proven });
            }
        }
        FileNotes { clocks: Some(self.clocks), segments }
    }
}

/// Takes the segments of one layer.
pub struct Segments<'a> {
    known: &'a mut KnownFiles,
    sink: &'a mut dyn Sink,
    /// None while the container runs.
    stream: Option<StreamName>,
    moment: &'a Moment,
    alone: Option<&'a LeftAlone>,
    spare: Vec<Vec<u8>>,
}

impl std::fmt::Debug for Segments<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Segments").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl Segments<'_> {
    /// The sink's number for a segment, if it can be had.
    fn id(&mut self, number: usize) -> io::Result<Option<SegmentId>> {
        let Some(known) = self.known.segments.get_mut(number) else { return Ok(None) };
        if let Place::Stored(stored) = known.place {
            known.place = match self.sink.stored_segment(&stored)? {
                Some(id) => Place::Taken(id),
                None => Place::Gone,
            };
        }
        match known.place {
            Place::Taken(id) => Ok(Some(id)),
            Place::Stored(_) | Place::Gone => Ok(None),
        }
    }

    fn place(&mut self, number: usize, id: SegmentId, key: Name) -> io::Result<()> {
        let Some(stream) = &self.stream else { return Ok(()) };
        self.known.placed.push((number, key));
        self.sink.place(stream, id)
    }
}

impl Out for Segments<'_> {
    fn known(&mut self, key: &Name, is_provable: bool) -> io::Result<Option<u64>> {
        let Some((number, is_proven)) = self.known.by_key.get(key).copied() else {
            return Ok(None);
        };
        if !is_proven && (is_provable || self.stream.is_some()) {
            return Ok(None);
        }
        let Some(id) = self.id(number)? else { return Ok(None) };
        self.place(number, id, *key)?;
        Ok(self.known.segments.get(number).map(|known| known.bytes))
    }

    fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_else(|| self.sink.buffer())
    }

    fn put(&mut self, key: Name, is_proven: bool, parts: Vec<Vec<u8>>) -> io::Result<()> {
        let mut hasher = blake3::Hasher::new();
        for part in &parts {
            hasher.update(part);
        }
        let content = Name(*hasher.finalize().as_bytes());
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        let known = self.known.by_content.get(&content).copied();
        let found = match known {
            Some(number) => self.id(number)?.map(|id| (number, id)),
            None => None,
        };
        let (number, id) = match found {
            Some(found) => {
                self.spare.extend(parts.into_iter().map(|mut part| {
                    part.clear();
                    part
                }));
                found
            }
            None => {
                let id = self.sink.segment(parts)?;
                (self.known.add(Known { content, place: Place::Taken(id), bytes }), id)
            }
        };
        self.known.by_key.insert(key, (number, is_proven));
        self.place(number, id, key)
    }

    fn moment(&self) -> Option<&Moment> {
        Some(self.moment)
    }

    fn left_alone(&self) -> Option<&LeftAlone> {
        self.alone
    }
}

/// Takes a layer as a sequence of bytes, and knows nothing.
pub(super) struct Plain<'a> {
    out: &'a mut dyn io::Write,
    spare: Vec<Vec<u8>>,
}

impl<'a> Plain<'a> {
    pub(super) fn new(out: &'a mut dyn io::Write) -> Plain<'a> {
        Plain { out, spare: Vec::new() }
    }
}

impl Out for Plain<'_> {
    fn known(&mut self, _: &Name, _: bool) -> io::Result<Option<u64>> {
        Ok(None)
    }

    fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    fn put(&mut self, _: Name, _: bool, parts: Vec<Vec<u8>>) -> io::Result<()> {
        for mut part in parts {
            self.out.write_all(&part)?;
            part.clear();
            self.spare.push(part);
        }
        Ok(())
    }

    fn moment(&self) -> Option<&Moment> {
        None
    }

    fn left_alone(&self) -> Option<&LeftAlone> {
        None
    }
}
