//! Random draws that a printed seed repeats.

/// SplitMix64 (Steele, Lea, Flood 2014): one word of state, good enough to draw moments and sizes.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    pub fn new(seed: u64) -> Random {
        Random { state: seed }
    }

    /// A seed from the kernel's generator, for runs that were not given one.
    ///
    /// # Errors
    /// When `/dev/urandom` cannot be read.
    pub fn fresh_seed() -> std::io::Result<u64> {
        let mut bytes = [0; 4];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
        // Half the bits: somebody will type it.
        Ok(u64::from(u32::from_le_bytes(bytes)))
    }

    pub fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform between 0 and 1.
    pub fn fraction(&mut self) -> f64 {
        let top = u32::try_from(self.draw() >> 32).expect("32 bits are left");
        f64::from(top) / 4_294_967_296.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A printed seed would be worthless.
    #[test]
    fn a_seed_repeats_its_draws() {
        let draws = |seed| {
            (0..5)
                .map(|_| 0)
                .scan(Random::new(seed), |random, _: i32| Some(random.draw()))
                .collect::<Vec<_>>()
        };
        assert_eq!(draws(7), draws(7));
        assert_ne!(draws(7), draws(8));
        let mut random = Random::new(1);
        assert!((0..1000).all(|_| (0.0..1.0).contains(&random.fraction())));
    }
}
