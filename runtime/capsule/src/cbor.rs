//! Records as CBOR (RFC 8949): self-describing, so that a capsule can be inspected by a program that does not know them.
//!
//! What the records are is not known here. Byte strings need `serde_bytes` or a type of their own on the record's side:
//! a plain `Vec<u8>` becomes an array of numbers.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Records of one capsule take at most this many bytes before compression.
///
/// A process with 10,000 mappings and as many descriptors takes about 3 MiB; the bound is what a thousand of such would
/// need if they shared nothing, less what would not fit into memory beside the packs in flight.
pub const RECORDS_BYTES_MAX: usize = 64 << 20;

/// Values may be nested this deep. Records are flat; the bound protects the decoder's stack.
pub const RECORDS_DEPTH_MAX: usize = 64;

/// Why records could not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("the records take more than {RECORDS_BYTES_MAX} bytes")]
    TooLarge,
    #[error("a record can't be expressed in CBOR")]
    Inexpressible(#[source] ciborium::ser::Error<io::Error>),
}

/// Why bytes are no records.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("the records take {bytes} bytes, of at most {RECORDS_BYTES_MAX}")]
    TooLarge { bytes: usize },
    #[error("the records are nested deeper than {RECORDS_DEPTH_MAX}")]
    TooDeep,
    #[error("the records are malformed")]
    Malformed(#[source] ciborium::de::Error<io::Error>),
    #[error("{bytes} bytes follow the records")]
    Trailing { bytes: usize },
}

/// Encodes one value as CBOR.
pub fn encode_record<T: Serialize + ?Sized>(record: &T) -> Result<Vec<u8>, EncodeError> {
    let mut sink = Bounded(Vec::new());
    match ciborium::into_writer(record, &mut sink) {
        Ok(()) => Ok(sink.0),
        Err(ciborium::ser::Error::Io(_)) => Err(EncodeError::TooLarge),
        Err(error) => Err(EncodeError::Inexpressible(error)),
    }
}

/// Decodes one value that takes up all of `bytes`.
pub fn decode_record<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > RECORDS_BYTES_MAX {
        return Err(DecodeError::TooLarge { bytes: bytes.len() });
    }
    let mut rest = bytes;
    let value = ciborium::de::from_reader_with_recursion_limit(&mut rest, RECORDS_DEPTH_MAX).map_err(|error| {
        match error {
            ciborium::de::Error::RecursionLimitExceeded => DecodeError::TooDeep,
            error => DecodeError::Malformed(error),
        }
    })?;
    match rest.len() {
        0 => Ok(value),
        bytes => Err(DecodeError::Trailing { bytes }),
    }
}

/// A writer that fails instead of growing past [`RECORDS_BYTES_MAX`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > RECORDS_BYTES_MAX - self.0.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ciborium::Value;
    use proptest::prelude::*;

    #[test]
    fn a_value_comes_back() {
        let value = vec![("fd".to_owned(), 3u64), ("pos".to_owned(), u64::MAX)];
        let bytes = encode_record(&value).unwrap();
        assert_eq!(decode_record::<Vec<(String, u64)>>(&bytes).unwrap(), value);
    }

    #[test]
    fn bounds_hold() {
        let deep = vec![0x81; RECORDS_DEPTH_MAX + 10];
        assert!(matches!(decode_record::<Value>(&deep), Err(DecodeError::TooDeep)));
        assert!(matches!(decode_record::<Value>(&[1, 1]), Err(DecodeError::Trailing { bytes: 1 })));
        let long = vec![0u8; RECORDS_BYTES_MAX + 1];
        assert!(matches!(decode_record::<Value>(&long), Err(DecodeError::TooLarge { .. })));
        assert!(matches!(encode_record(&Value::Bytes(long)), Err(EncodeError::TooLarge)));
    }

    #[test]
    fn a_length_that_lies_takes_no_memory() {
        // An array of 2^62 numbers, a string of 2^62 bytes: both in nine bytes.
        for lie in [[0x9b, 0x40, 0, 0, 0, 0, 0, 0, 0], [0x5b, 0x40, 0, 0, 0, 0, 0, 0, 0]] {
            assert!(decode_record::<Vec<u64>>(&lie).is_err());
            assert!(decode_record::<Value>(&lie).is_err());
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = decode_record::<Value>(&bytes);
        }
    }
}
