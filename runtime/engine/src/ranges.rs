//! Sets of addresses.

use serde::{Deserialize, Serialize};

/// A set of addresses, as ascending ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// Every address.
    pub(crate) fn all() -> Ranges {
        Ranges(vec![(0, u64::MAX)])
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds `start..end`. Takes least where it lies behind the others, as it does for who goes through an address space.
    pub(crate) fn add(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        match self.0.last_mut() {
            Some((last_start, last_end)) if start >= *last_start && start <= *last_end => {
                *last_end = end.max(*last_end);
                return;
            }
            Some((_, last_end)) if start < *last_end => {}
            _ => return self.0.push((start, end)),
        }
        let from = self.0.partition_point(|(_, other)| *other < start);
        let until = self.0.partition_point(|(other, _)| *other <= end);
        let touched = self.0.get(from..until).unwrap_or_default();
        let low = touched.first().map_or(start, |(other, _)| start.min(*other));
        let high = touched.last().map_or(end, |(_, other)| end.max(*other));
        self.0.splice(from..until, [(low, high)]);
    }

    /// What is in either set.
    pub(crate) fn union(&self, other: &Ranges) -> Ranges {
        let mut joined = Ranges(Vec::with_capacity(self.0.len() + other.0.len()));
        let (mut these, mut those) = (self.0.iter().peekable(), other.0.iter().peekable());
        loop {
            let next = match (these.peek(), those.peek()) {
                (Some(a), Some(b)) if b < a => those.next(),
                (Some(_), _) => these.next(),
                (None, _) => those.next(),
            };
            let Some((start, end)) = next else { return joined };
            joined.add(*start, *end);
        }
    }

    /// What is in this set and not in the other.
    pub(crate) fn without(&self, other: &Ranges) -> Ranges {
        let mut left = Ranges::default();
        for (start, end) in &self.0 {
            for (start, end, inside) in other.divide(*start, *end) {
                if !inside {
                    left.add(start, end);
                }
            }
        }
        left
    }

    /// Divides `start..end` into the parts that are in the set (true) and those that are not, in ascending order.
    pub(crate) fn divide(&self, start: u64, end: u64) -> Vec<(u64, u64, bool)> {
        let mut parts = Vec::new();
        let mut next = start;
        let from = self.0.partition_point(|(_, other)| *other <= start);
        for (low, high) in self.0.iter().skip(from).take_while(|(low, _)| *low < end) {
            let (low, high) = ((*low).max(start), (*high).min(end));
            if next < low {
                parts.push((next, low, false));
            }
            parts.push((low, high, true));
            next = high;
        }
        if next < end {
            parts.push((next, end, false));
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const ADDRESSES: u64 = 64;

    /// A set, and what is in it.
    fn draw(random: &mut fastrand::Rng, additions: usize) -> (Ranges, BTreeSet<u64>) {
        let (mut ranges, mut addresses) = (Ranges::default(), BTreeSet::new());
        for _ in 0..random.usize(0..additions) {
            let start = random.u64(0..ADDRESSES);
            let end = random.u64(start..=ADDRESSES);
            ranges.add(start, end);
            addresses.extend(start..end);
        }
        (ranges, addresses)
    }

    /// Without this, a page that was written could count as stored.
    #[test]
    fn a_set_holds_what_was_added_and_nothing_else() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..500 {
            let (ranges, addresses) = draw(&mut random, 20);
            let (others, other_addresses) = draw(&mut random, 5);
            for address in 0..ADDRESSES {
                let part = (address, address + 1, true);
                let is_in = |set: &Ranges| set.divide(address, address + 1) == [part];
                let this = addresses.contains(&address);
                let other = other_addresses.contains(&address);
                assert_eq!(is_in(&ranges.union(&others)), this || other);
                assert_eq!(is_in(&ranges.without(&others)), this && !other);
            }
            for window in ranges.0.windows(2) {
                assert!(window[0].1 < window[1].0, "{ranges:?}");
            }
            let start = random.u64(0..ADDRESSES);
            let end = random.u64(start..=ADDRESSES);
            let mut next = start;
            for (low, high, inside) in ranges.divide(start, end) {
                assert_eq!(low, next);
                next = high;
                assert!((low..high).all(|one| addresses.contains(&one) == inside), "{ranges:?}");
            }
            assert_eq!(next, end);
        }
    }
}
