//! The kernel's description of its own types, as far as programs need it that read a few members (Documentation/bpf/btf.rst).
//!
//! Own code, because the libraries that read this format first make an index of all 130,000 types, which takes longer than a capture.

use std::fs;
use std::io;

/// Where the kernel shows it (CONFIG_DEBUG_INFO_BTF).
const OF_KERNEL: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;

const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;

/// Structures without a name in each other at most.
const DEPTH_MAX: u32 = 8;

/// Types and functions.
#[derive(Debug)]
pub(crate) struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
}

/// A type: what all have, and what comes behind that.
#[derive(Clone, Copy)]
struct Type<'a> {
    name: u32,
    kind: u32,
    /// Offsets of members have a width in their highest byte.
    with_widths: bool,
    rest: &'a [u8],
}

impl Btf {
    /// That of the kernel that runs.
    ///
    /// # Errors
    /// NotFound where the kernel does not show it, InvalidData where it is not understood.
    pub(crate) fn of_kernel() -> io::Result<Btf> {
        Btf::parse(&fs::read(OF_KERNEL)?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(bytes: &[u8]) -> Option<Btf> {
        let magic = u16::from_le_bytes(*bytes.first_chunk()?);
        let header = word(bytes, 1)? as usize;
        let part = |offset: usize, length: usize| {
            let start = header.checked_add(word(bytes, offset)? as usize)?;
            Some(bytes.get(start..start.checked_add(word(bytes, length)? as usize)?)?.to_vec())
        };
        (magic == MAGIC).then_some(())?;
        Some(Btf { types: part(2, 3)?, strings: part(4, 5)? })
    }

    /// The number of a function.
    pub(crate) fn function(&self, name: &str) -> Option<u32> {
        let found =
            self.types().position(|found| found.kind == KIND_FUNC && self.is(found.name, name));
        Some(u32::try_from(found?).ok()? + 1)
    }

    /// The offset of a member of a structure in bytes. Members of structures without a name in it count as its own.
    pub(crate) fn member(&self, structure: &str, member: &str) -> Option<i16> {
        let all: Vec<Type<'_>> = self.types().collect();
        let outer =
            all.iter().find(|found| found.kind == KIND_STRUCT && self.is(found.name, structure))?;
        let bits = self.bits_of(&all, *outer, member, DEPTH_MAX)?;
        bits.is_multiple_of(8).then_some(())?;
        i16::try_from(bits / 8).ok()
    }

    fn bits_of(&self, all: &[Type<'_>], outer: Type<'_>, member: &str, depth: u32) -> Option<u32> {
        outer.rest.chunks_exact(12).find_map(|found| {
            let (name, kind, offset) = (word(found, 0)?, word(found, 1)?, word(found, 2)?);
            let offset = if outer.with_widths { offset & 0x00ff_ffff } else { offset };
            if self.is(name, member) {
                return Some(offset);
            }
            let inner = all.get((kind as usize).checked_sub(1)?)?;
            if depth == 0 || !self.is(name, "") || !matches!(inner.kind, KIND_STRUCT | KIND_UNION) {
                return None;
            }
            offset.checked_add(self.bits_of(all, *inner, member, depth - 1)?)
        })
    }

    /// Whether the string at an offset is this one.
    fn is(&self, offset: u32, name: &str) -> bool {
        let text = self.strings.get(offset as usize..).unwrap_or_default();
        text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    /// All types, from number 1. It ends before one that is not understood.
    fn types(&self) -> impl Iterator<Item = Type<'_>> {
        let mut left = self.types.as_slice();
        std::iter::from_fn(move || {
            let (name, info) = (word(left, 0)?, word(left, 1)?);
            let (kind, count) = (info >> 24 & 0x1f, info as usize & 0xffff);
            let bytes = match kind {
                KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                KIND_ARRAY => 12,
                KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12 * count,
                KIND_ENUM | KIND_FUNC_PROTO => 8 * count,
                _ => 0,
            };
            let rest = left.get(12..)?.get(..bytes)?;
            left = left.get(12 + bytes..)?;
            Some(Type { name, kind, with_widths: info >> 31 != 0, rest })
        })
    }
}

fn word(bytes: &[u8], index: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(4 * index..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header, the strings `"" s x y f`, and the types: 1 `struct s { union { int x; }; y:8 }`, 2 the union, 3 the function `f`.
    fn small() -> Vec<u8> {
        let strings = b"\0s\0x\0y\0f\0";
        let info = |kind: u32, count: u32, widths: u32| kind << 24 | count | widths << 31;
        let types: [&[u32]; 3] = [
            &[1, info(KIND_STRUCT, 2, 1), 16, 0, 2, 64, 5, 9, 8 << 24 | 96],
            &[0, info(KIND_UNION, 1, 0), 4, 3, 9, 32],
            &[7, info(KIND_FUNC, 0, 0), 9],
        ];
        let types: Vec<u8> = types.concat().iter().flat_map(|word| word.to_le_bytes()).collect();
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a few");
        let header = [24, 0, length(&types), length(&types), length(strings)];
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        bytes.extend(header.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(types);
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn members_are_found_through_structures_without_a_name() {
        let btf = Btf::parse(&small()).expect("well formed");
        assert_eq!(btf.member("s", "x"), Some(12));
        assert_eq!(btf.member("s", "y"), Some(12));
        assert_eq!(btf.member("s", "z"), None);
        assert_eq!(btf.function("f"), Some(3));
        assert_eq!(btf.function("s"), None);
    }

    #[test]
    fn what_is_cut_off_is_no_panic() {
        let whole = small();
        for length in 0..whole.len() {
            let cut = whole.get(..length).expect("shorter");
            if let Some(btf) = Btf::parse(cut) {
                let _ = (btf.member("s", "x"), btf.function("f"));
            }
        }
    }
}
