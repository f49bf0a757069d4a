//! Digests: SHA-256 names blobs, in the notation of OCI; BLAKE3 stands for the frames inside of packs.
//!
//! A capture hashes every stored byte twice, once for its pack and once for its frame. The first has to be SHA-256, as
//! registries know nothing else; BLAKE3 costs a quarter of that, also where the processor has no SHA instructions.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

/// The SHA-256 of some stored bytes, which is also the name of a blob.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// The BLAKE3 digest of a frame's stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameDigest([u8; 32]);

impl fmt::Display for FrameDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("blake3:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FrameDigest {
    /// Bytes of a digest.
    pub const BYTES: usize = 32;

    /// The digest of `stored`.
    pub fn of(stored: &[u8]) -> FrameDigest {
        FrameDigest(*blake3::hash(stored).as_bytes())
    }

    /// The digest whose value is `bytes`.
    pub fn from_bytes(bytes: [u8; 32]) -> FrameDigest {
        FrameDigest(bytes)
    }

    /// The value as bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// The text is no digest in this crate's notation.
#[derive(Debug, thiserror::Error)]
#[error("not a digest of the form sha256:<64 lower-case hexadecimal digits>")]
pub struct ParseDigestError;

impl Digest {
    /// Bytes of a digest.
    pub const BYTES: usize = 32;

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(sha2::Sha256::digest(bytes).into())
    }

    /// The digest whose value is `bytes`.
    pub fn from_bytes(bytes: [u8; 32]) -> Digest {
        Digest(bytes)
    }

    /// The value as bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits without the algorithm's name, as in a blob's path.
    pub fn hex(&self) -> String {
        let mut hex = String::with_capacity(64);
        for byte in self.0 {
            for digit in [byte >> 4, byte & 15] {
                hex.push(
                    char::from_digit(u32::from(digit), 16)
                        .expect("a nibble is a hexadecimal digit"),
                );
            }
        }
        hex
    }

    /// The inverse of [`Digest::hex`].
    pub fn from_hex(hex: &str) -> Result<Digest, ParseDigestError> {
        let mut value = [0; 32];
        let digits = hex.as_bytes();
        if digits.len() != 64 {
            return Err(ParseDigestError);
        }
        for (byte, pair) in value.iter_mut().zip(digits.chunks_exact(2)) {
            for digit in pair {
                let digit = match digit {
                    b'0'..=b'9' => digit - b'0',
                    b'a'..=b'f' => digit - b'a' + 10,
                    _ => return Err(ParseDigestError),
                };
                *byte = *byte << 4 | digit;
            }
        }
        Ok(Digest(value))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Digest, ParseDigestError> {
        Digest::from_hex(text.strip_prefix("sha256:").ok_or(ParseDigestError)?)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_nothing_is_the_published_value() {
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), text);
        assert_eq!(text.parse::<Digest>().unwrap(), Digest::of(b""));
    }

    #[test]
    fn other_notations_are_refused() {
        let hex = Digest::of(b"").hex();
        for text in [
            "",
            "sha256:",
            &hex,
            &format!("sha512:{hex}"),
            &format!("sha256:{}", hex.to_uppercase()),
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }
}
