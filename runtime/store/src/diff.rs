//! What differs between the pages of two capsules, as far as their page maps tell.
//!
//! Pages are the same if they lie in equal frames, at the same place within; frames of differences name their bases by digest, and
//! so are equal only over the same one. Pages that were stored anew count as changed,
//! though their content may be the same: the packs are not read.

use std::collections::HashMap;

use samara_capsule::digest::FrameDigest;
use samara_capsule::transfer::SpaceId;

use crate::reader::{CapsuleReader, ReadError};

/// Pages of a space in two capsules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageChanges {
    pub unchanged: u64,
    pub changed: u64,
    pub added: u64,
    pub removed: u64,
}

/// A run of pages, and where their content lies: equal numbers are equal frames.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u64,
    count: u64,
    frame: usize,
    page: u64,
}

impl Run {
    fn end(&self) -> u64 {
        self.first + self.count
    }

    /// Without its first pages.
    fn from(self, first: u64) -> Run {
        let skipped = first - self.first;
        Run { first, count: self.count - skipped, page: self.page + skipped, ..self }
    }
}

/// Compares a space of one capsule with one of another; where either has none, all pages of the other are new or gone.
pub fn compare_pages(
    from: Option<(&CapsuleReader, SpaceId)>,
    to: Option<(&CapsuleReader, SpaceId)>,
) -> Result<PageChanges, ReadError> {
    let mut frames = HashMap::new();
    let mut runs = |side: Option<(&CapsuleReader, SpaceId)>| match side {
        Some((reader, space)) => runs_of(reader, space, &mut frames),
        None => Ok(Vec::new()),
    };
    Ok(compare(&runs(from)?, &runs(to)?))
}

fn runs_of(
    reader: &CapsuleReader,
    space: SpaceId,
    frames: &mut HashMap<FrameDigest, usize>,
) -> Result<Vec<Run>, ReadError> {
    let mut runs = Vec::new();
    reader.segments(space, |segment| {
        let number = |digest| {
            let next = frames.len();
            *frames.entry(digest).or_insert(next)
        };
        let numbers: Vec<usize> =
            segment.frames().iter().map(|frame| frame.digest).map(number).collect();
        runs.extend(segment.runs().iter().map(|run| Run {
            first: run.first,
            count: run.count.into(),
            frame: *numbers.get(run.frame as usize).expect("a segment's indices were checked"),
            page: run.page.into(),
        }));
        Ok(())
    })?;
    Ok(runs)
}

/// Both in ascending order, and without overlaps of their own.
fn compare(from: &[Run], to: &[Run]) -> PageChanges {
    let (mut from, mut to) = (from.iter().copied(), to.iter().copied());
    let (mut old, mut new) = (from.next(), to.next());
    let mut changes = PageChanges::default();
    loop {
        match (old, new) {
            (None, None) => return changes,
            (Some(run), None) => {
                changes.removed += run.count;
                old = from.next();
            }
            (None, Some(run)) => {
                changes.added += run.count;
                new = to.next();
            }
            (Some(left), Some(right)) => {
                let first = left.first.max(right.first);
                let end = left.end().min(right.end());
                // What lies before the other begins.
                changes.removed += first.min(left.end()) - left.first;
                changes.added += first.min(right.end()) - right.first;
                if first < end {
                    let (left, right) = (left.from(first), right.from(first));
                    let is_same = left.frame == right.frame && left.page == right.page;
                    *if is_same { &mut changes.unchanged } else { &mut changes.changed } +=
                        end - first;
                }
                let done = end.max(first);
                let rest = |run: Run, runs: &mut dyn Iterator<Item = Run>| match run.end() > done {
                    true => Some(run.from(done.max(run.first))),
                    false => runs.next(),
                };
                (old, new) = (rest(left, &mut from), rest(right, &mut to));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    type Pages = BTreeMap<u64, (usize, u64)>;

    fn runs(pages: &Pages) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (&first, &(frame, page)) in pages {
            match runs.last_mut() {
                Some(last)
                    if last.end() == first
                        && last.frame == frame
                        && last.page + last.count == page =>
                {
                    last.count += 1;
                }
                _ => runs.push(Run { first, count: 1, frame, page }),
            }
        }
        runs
    }

    fn pages() -> impl Strategy<Value = Pages> {
        proptest::collection::btree_map(0u64..60, 0usize..3, 0..50).prop_map(|pages| {
            pages.into_iter().map(|(page, frame)| (page, (frame, page))).collect()
        })
    }

    proptest! {
        /// Runs that are cut differently would be told as differences, or differences be overlooked.
        #[test]
        fn runs_are_compared_page_by_page(from in pages(), to in pages()) {
            let mut expected = PageChanges::default();
            for page in 0..60 {
                match (from.get(&page), to.get(&page)) {
                    (None, None) => {}
                    (Some(_), None) => expected.removed += 1,
                    (None, Some(_)) => expected.added += 1,
                    (Some(a), Some(b)) if a == b => expected.unchanged += 1,
                    (Some(_), Some(_)) => expected.changed += 1,
                }
            }
            prop_assert_eq!(compare(&runs(&from), &runs(&to)), expected);
        }
    }
}
