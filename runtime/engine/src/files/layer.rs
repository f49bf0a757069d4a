//! One entry of a layer: encoding and decoding.
//!
//! The stream is a POSIX.1-2001 (PAX) archive as Go's `archive/tar`, Python's `tarfile`, GNU tar and libarchive read it.
//! What their common ground can't express is in records that other programs skip:
//! - `SAMARA.sockets` on a directory: the unix sockets in it, which have no entry type. Each is
//!   `MODE:UID:GID:SECONDS.NANOSECONDS:ATTRIBUTES:NAME/`, mode in octal. Each extended attribute in it is `NAME=VALUE;`,
//!   with bytes other than letters, digits, `.`, `_` and `-` as `%XX`.
//! - `SAMARA.path`, `SAMARA.linkpath`: the true path, where one of its names begins with `.wh.` and would be taken for a
//!   whiteout. The entry itself has `.samara-literal` before such a name. `SAMARA.directory` is the same for the
//!   directory of a whiteout or opaque mark, and `SAMARA.whiteout` is the name that was removed.
//! - `SAMARA.xattr.NAME`: an extended attribute whose name holds `=`; the name is escaped as above.
//!
//! Sparse files are in GNU's format 1.0, the one that is PAX throughout and whose map is not limited by the header.
//!
//! The decoder reads what the encoder writes, and takes every byte as hostile: lengths are bounded before anything is
//! allocated, numbers are checked, and an archive without its end mark is an error, since an archive that was cut off
//! between two entries would otherwise look like one with fewer files. It knows no GNU long names and no old sparse
//! format: those come from other programs' layers, which nobody passes here.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use tar::{EntryType, Header};

use super::content::{SEGMENTS_MAX, Segment};
use super::metadata::{Metadata, XATTR_BYTES_MAX, XATTR_NAME_BYTES_MAX, is_kept};
use super::tree::{PATH_BYTES_MAX, Time, TreePath};

pub(super) const BLOCK_BYTES: usize = 512;

/// Bound of one entry's PAX records. Paths take little; what remains is a hundred attributes of the largest size, or
/// the sockets of one directory.
const PAX_BYTES_MAX: usize = 8 << 20;

/// What may follow the end mark: padding to a record, as some programs write it.
const TAIL_BYTES_MAX: u64 = 1 << 20;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const LITERAL: &[u8] = b".samara-literal";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) path: TreePath,
    pub(super) content: Content,
    /// Empty for a whiteout and an opaque mark. For a further name, that of the first one again.
    pub(super) metadata: Metadata,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Directory {
        sockets: Vec<Socket>,
    },
    /// Nothing of the lower layers is seen in the directory `path`. Its own entry comes before.
    Opaque,
    /// `path` was removed.
    Whiteout,
    /// The bytes of all segments follow. `segments` is none for a file without holes.
    File {
        size: u64,
        segments: Option<Vec<Segment>>,
    },
    /// Another name of an earlier entry.
    HardLink {
        target: TreePath,
    },
    Symlink {
        target: Vec<u8>,
    },
    Fifo,
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Socket {
    pub(super) name: OsString,
    pub(super) metadata: Metadata,
}

#[derive(Debug)]
pub(super) enum EncodeError {
    Write(io::Error),
    /// The format can't hold it.
    Unfit(&'static str),
}

impl From<io::Error> for EncodeError {
    fn from(e: io::Error) -> Self {
        EncodeError::Write(e)
    }
}

pub(super) struct LayerWriter<'a> {
    out: &'a mut dyn Write,
    pub(super) bytes: u64,
}

impl Write for LayerWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl<'a> LayerWriter<'a> {
    pub(super) fn new(out: &'a mut dyn Write) -> LayerWriter<'a> {
        LayerWriter { out, bytes: 0 }
    }

    /// Writes an entry's headers. For a file, its segments' bytes are to be written next, then [`LayerWriter::pad`].
    pub(super) fn entry(&mut self, entry: &Entry) -> Result<(), EncodeError> {
        let (header, pax, map) = encode(entry).map_err(EncodeError::Unfit)?;
        if !pax.is_empty() {
            if pax.len() > PAX_BYTES_MAX {
                return Err(EncodeError::Unfit(
                    "its extended attributes, or the sockets in it, take more than 8 MiB",
                ));
            }
            let mut extension = Header::new_ustar();
            extension.set_entry_type(EntryType::XHeader);
            put(&mut extension.as_old_mut().name, b"././@PaxHeader");
            extension.set_size(pax.len() as u64);
            extension.set_cksum();
            self.write_all(extension.as_bytes())?;
            self.write_all(&pax)?;
            self.pad()?;
        }
        self.write_all(header.as_bytes())?;
        self.write_all(&map)?;
        Ok(())
    }

    /// Fills up the current block.
    pub(super) fn pad(&mut self) -> io::Result<()> {
        let zeros = [0; BLOCK_BYTES];
        let used = usize::try_from(self.bytes % BLOCK_BYTES as u64).expect("less than a block");
        if used > 0 { self.write_all(&zeros[used..]) } else { Ok(()) }
    }

    /// Writes the end mark.
    pub(super) fn end(mut self) -> io::Result<u64> {
        self.write_all(&[0; 2 * BLOCK_BYTES])?;
        self.flush()?;
        Ok(self.bytes)
    }
}

impl std::fmt::Debug for LayerWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerWriter").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// Copies as much as fits; the rest stays zero.
fn put(field: &mut [u8], bytes: &[u8]) {
    let length = field.len().min(bytes.len());
    field[..length].copy_from_slice(&bytes[..length]);
}

fn record(pax: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // The length counts its own digits.
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    pax.extend_from_slice(length.to_string().as_bytes());
    pax.push(b' ');
    pax.extend_from_slice(key);
    pax.push(b'=');
    pax.extend_from_slice(value);
    pax.push(b'\n');
}

/// The path as other programs are to see it, with names that look like whiteouts altered.
fn foreign(path: &TreePath) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(path.as_bytes().len() + 1);
    for (i, component) in path.as_bytes().split(|&b| b == b'/').enumerate() {
        if i > 0 {
            bytes.push(b'/');
        }
        if component.starts_with(WHITEOUT) {
            bytes.extend_from_slice(LITERAL);
        }
        bytes.extend_from_slice(component);
    }
    bytes
}

fn timestamp(time: Time) -> String {
    // PAX has signed decimal fractions: half a second before 1970 is -0.5, which files have as -1 s and 500,000,000 ns.
    if time.seconds < 0 && time.nanoseconds > 0 {
        let whole = time.seconds + 1;
        let sign = if whole == 0 { "-" } else { "" };
        format!("{sign}{whole}.{:09}", 1_000_000_000 - time.nanoseconds)
    } else if time.nanoseconds > 0 {
        format!("{}.{:09}", time.seconds, time.nanoseconds)
    } else {
        time.seconds.to_string()
    }
}

fn encode(entry: &Entry) -> Result<(Header, Vec<u8>, Vec<u8>), &'static str> {
    let mut header = Header::new_ustar();
    let mut pax = Vec::new();
    let mut map = Vec::new();
    let mut path = foreign(&entry.path);
    let mut size = 0;
    let mut link: &[u8] = &[];
    let foreign_link;
    let mut sparse = None;
    let kind = match &entry.content {
        Content::Directory { sockets } => {
            path.extend_from_slice(if entry.path.is_root() { b"./" } else { b"/" });
            if !sockets.is_empty() {
                record(&mut pax, b"SAMARA.sockets", &encode_sockets(sockets));
            }
            EntryType::Directory
        }
        Content::Opaque => {
            if !entry.path.is_root() {
                path.push(b'/');
            }
            path.extend_from_slice(OPAQUE);
            EntryType::Regular
        }
        Content::Whiteout => {
            let (parent, name) = entry.path.split().ok_or("the root itself is removed")?;
            path = foreign(&parent);
            if !parent.is_root() {
                path.push(b'/');
            }
            path.extend_from_slice(WHITEOUT);
            if name.as_bytes().starts_with(WHITEOUT) {
                record(&mut pax, b"SAMARA.whiteout", name.as_bytes());
                path.extend_from_slice(LITERAL);
            }
            path.extend_from_slice(name.as_bytes());
            EntryType::Regular
        }
        Content::File { size: whole, segments: None } => {
            size = *whole;
            EntryType::Regular
        }
        Content::File { size: whole, segments: Some(segments) } => {
            sparse = Some(*whole);
            map = encode_map(*whole, segments);
            size = map.len() as u64 + segments.iter().map(|s| s.length).sum::<u64>();
            EntryType::Regular
        }
        Content::HardLink { target } => {
            foreign_link = foreign(target);
            link = &foreign_link;
            if foreign_link != target.as_bytes() {
                record(&mut pax, b"SAMARA.linkpath", target.as_bytes());
            }
            EntryType::Link
        }
        Content::Symlink { target } => {
            link = target;
            EntryType::Symlink
        }
        Content::Fifo => EntryType::Fifo,
        Content::CharDevice { major, minor } | Content::BlockDevice { major, minor } => {
            let unfit = |_| "its device number doesn't fit a layer";
            header.set_device_major(*major).map_err(unfit)?;
            header.set_device_minor(*minor).map_err(unfit)?;
            let block = matches!(entry.content, Content::BlockDevice { .. });
            if block { EntryType::Block } else { EntryType::Char }
        }
    };
    header.set_entry_type(kind);
    // The directory that a mark lies in, for marks; the path itself for everything else.
    let (key, truth): (&[u8], _) = match (&entry.content, entry.path.split()) {
        (Content::Whiteout, Some((parent, _))) => (b"SAMARA.directory", parent),
        (Content::Opaque, _) => (b"SAMARA.directory", entry.path.clone()),
        _ => (b"SAMARA.path", entry.path.clone()),
    };
    if truth.as_bytes().split(|&b| b == b'/').any(|c| c.starts_with(WHITEOUT)) {
        record(&mut pax, key, truth.as_bytes());
    }
    let metadata = &entry.metadata;
    header.set_mode(metadata.mode);
    header.set_uid(metadata.uid.into());
    header.set_gid(metadata.gid.into());
    header.set_size(size);
    // The header's own octal digits; larger numbers are in its binary form as well, which most programs know.
    const OCTAL_7_MAX: u32 = 0o777_7777;
    const OCTAL_11_MAX: u64 = 0o777_7777_7777;
    if metadata.uid > OCTAL_7_MAX {
        record(&mut pax, b"uid", metadata.uid.to_string().as_bytes());
    }
    if metadata.gid > OCTAL_7_MAX {
        record(&mut pax, b"gid", metadata.gid.to_string().as_bytes());
    }
    if size > OCTAL_11_MAX {
        record(&mut pax, b"size", size.to_string().as_bytes());
    }
    let seconds = u64::try_from(metadata.modified.seconds).unwrap_or(0).min(OCTAL_11_MAX);
    header.set_mtime(seconds);
    if i64::try_from(seconds) != Ok(metadata.modified.seconds) || metadata.modified.nanoseconds != 0
    {
        record(&mut pax, b"mtime", timestamp(metadata.modified).as_bytes());
    }
    for (name, value) in &metadata.xattrs {
        let key = if name.contains(&b'=') {
            [b"SAMARA.xattr.", &escape(name)[..]].concat()
        } else {
            [b"SCHILY.xattr.", &name[..]].concat()
        };
        record(&mut pax, &key, value);
    }
    if let Some(whole) = sparse {
        record(&mut pax, b"GNU.sparse.major", b"1");
        record(&mut pax, b"GNU.sparse.minor", b"0");
        record(&mut pax, b"GNU.sparse.name", &path);
        record(&mut pax, b"GNU.sparse.realsize", whole.to_string().as_bytes());
    }
    let names = header.as_old_mut();
    put(&mut names.name, &path);
    if path.len() > names.name.len() && sparse.is_none() {
        record(&mut pax, b"path", &path);
    }
    put(&mut names.linkname, link);
    if link.len() > names.linkname.len() {
        record(&mut pax, b"linkpath", link);
    }
    header.set_cksum();
    Ok((header, pax, map))
}

pub(super) fn encode_sockets(sockets: &[Socket]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Socket { name, metadata: m } in sockets {
        let Time { seconds, nanoseconds } = m.modified;
        bytes.extend_from_slice(
            format!("{:o}:{}:{}:{seconds}.{nanoseconds:09}:", m.mode, m.uid, m.gid).as_bytes(),
        );
        for (name, value) in &m.xattrs {
            bytes.extend_from_slice(&[&escape(name)[..], b"=", &escape(value)[..], b";"].concat());
        }
        bytes.push(b':');
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(b'/');
    }
    bytes
}

fn decode_sockets(mut bytes: &[u8]) -> Result<Vec<Socket>, &'static str> {
    const BAD: &str = "its record of sockets is malformed";
    let mut sockets = Vec::new();
    while !bytes.is_empty() {
        let end = bytes.iter().position(|&b| b == b'/').ok_or(BAD)?;
        let mut fields = bytes[..end].splitn(6, |&b| b == b':');
        let mut text = || std::str::from_utf8(fields.next().ok_or(BAD)?).map_err(|_| BAD);
        let mode = u32::from_str_radix(text()?, 8).map_err(|_| BAD)?;
        let uid = text()?.parse().map_err(|_| BAD)?;
        let gid = text()?.parse().map_err(|_| BAD)?;
        let (seconds, nanoseconds) = text()?.split_once('.').ok_or(BAD)?;
        let modified = Time {
            seconds: seconds.parse().map_err(|_| BAD)?,
            nanoseconds: nanoseconds.parse().ok().filter(|&n| n < 1_000_000_000).ok_or(BAD)?,
        };
        let mut xattrs = Vec::new();
        for attribute in fields.next().ok_or(BAD)?.split(|&b| b == b';').filter(|a| !a.is_empty()) {
            let equals = attribute.iter().position(|&b| b == b'=').ok_or(BAD)?;
            let (name, value) =
                (unescape(&attribute[..equals]), unescape(&attribute[equals + 1..]));
            xattrs.push(checked_xattr(name.ok_or(BAD)?, value.ok_or(BAD)?)?);
        }
        let name = OsString::from_vec(fields.next().ok_or(BAD)?.to_vec());
        if mode > 0o7777 {
            return Err(BAD);
        }
        sockets.push(Socket { name, metadata: Metadata { mode, uid, gid, modified, xattrs } });
        bytes = &bytes[end + 1..];
    }
    Ok(sockets)
}

fn encode_map(size: u64, segments: &[Segment]) -> Vec<u8> {
    // GNU tar marks a hole at the end by an empty segment there.
    let end = segments.last().map_or(0, |s| s.offset + s.length);
    let tail = (end < size).then_some(Segment { offset: size, length: 0 });
    let mut map = format!("{}\n", segments.len() + usize::from(tail.is_some())).into_bytes();
    for segment in segments.iter().chain(&tail) {
        map.extend_from_slice(format!("{}\n{}\n", segment.offset, segment.length).as_bytes());
    }
    map.resize(map.len().next_multiple_of(BLOCK_BYTES), 0);
    map
}

#[derive(Debug)]
pub(super) enum DecodeError {
    Read(io::Error),
    Corrupt { path: TreePath, why: &'static str },
}

impl From<io::Error> for DecodeError {
    fn from(e: io::Error) -> Self {
        if e.kind() == io::ErrorKind::UnexpectedEof {
            DecodeError::Corrupt { path: TreePath::root(), why: "the stream ends early" }
        } else {
            DecodeError::Read(e)
        }
    }
}

pub(super) struct LayerReader<'a> {
    stream: &'a mut dyn Read,
    /// Bytes of the current entry that were not read yet, padding not counted.
    left: u64,
    padding: u64,
    /// For messages about an entry whose own path can't be read.
    last: TreePath,
}

impl std::fmt::Debug for LayerReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerReader")
            .field("left", &self.left)
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

/// Reads the current entry's content.
impl Read for LayerReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let take = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let got = self.stream.read(&mut buffer[..take])?;
        self.left -= got as u64;
        Ok(got)
    }
}

impl<'a> LayerReader<'a> {
    pub(super) fn new(stream: &'a mut dyn Read) -> LayerReader<'a> {
        LayerReader { stream, left: 0, padding: 0, last: TreePath::root() }
    }

    /// The next entry, or none after the end mark. What was not read of the entry before is skipped.
    pub(super) fn entry(&mut self) -> Result<Option<Entry>, DecodeError> {
        self.skip()?;
        let mut pax = None;
        loop {
            let Some(header) = self.header()? else {
                if pax.is_some() {
                    return Err(self.corrupt("the archive ends after an entry's records"));
                }
                self.end()?;
                return Ok(None);
            };
            if header.entry_type() == EntryType::XHeader {
                if pax.is_some() {
                    return Err(self.corrupt("two sets of records stand before one entry"));
                }
                let size = header.entry_size().map_err(|_| self.corrupt("a size is no number"))?;
                let size = usize::try_from(size).ok().filter(|&s| s <= PAX_BYTES_MAX);
                let size =
                    size.ok_or_else(|| self.corrupt("an entry's records are larger than 8 MiB"))?;
                let mut bytes = vec![0; size];
                self.stream.read_exact(&mut bytes)?;
                self.padding = padding(size as u64);
                self.skip()?;
                pax = Some(Pax::decode(&bytes).map_err(|why| self.corrupt(why))?);
                continue;
            }
            return self.decode(&header, pax.unwrap_or_default()).map(Some);
        }
    }

    fn corrupt(&self, why: &'static str) -> DecodeError {
        DecodeError::Corrupt { path: self.last.clone(), why }
    }

    fn skip(&mut self) -> Result<(), DecodeError> {
        let left = self
            .left
            .checked_add(self.padding)
            .ok_or_else(|| self.corrupt("a size is too large"))?;
        let skipped = io::copy(&mut (&mut *self.stream).take(left), &mut io::sink())?;
        (self.left, self.padding) = (0, 0);
        if skipped < left { Err(self.corrupt("the stream ends early")) } else { Ok(()) }
    }

    fn header(&mut self) -> Result<Option<Header>, DecodeError> {
        let mut header = Header::new_old();
        self.stream.read_exact(header.as_mut_bytes())?;
        let bytes = header.as_bytes();
        if bytes.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        // The sum is over all bytes, its own field (148..156) taken as spaces.
        let sum = bytes
            .iter()
            .enumerate()
            .map(|(i, &b)| u32::from(if (148..156).contains(&i) { b' ' } else { b }))
            .sum();
        if header.cksum().ok() != Some(sum) {
            return Err(self.corrupt("a header's checksum is wrong"));
        }
        if header.as_ustar().is_none() {
            return Err(self.corrupt("a header is not in ustar form"));
        }
        Ok(Some(header))
    }

    /// After the first zero block: the second one, and nothing but zeros behind it.
    fn end(&mut self) -> Result<(), DecodeError> {
        let mut block = [0; BLOCK_BYTES];
        self.stream.read_exact(&mut block)?;
        let mut tail = 0;
        loop {
            if block.iter().any(|&b| b != 0) {
                return Err(self.corrupt("something follows the end mark"));
            }
            match self.stream.read(&mut block) {
                Ok(0) => return Ok(()),
                Ok(got) => tail += got as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
            if tail > TAIL_BYTES_MAX {
                return Err(self.corrupt("too much follows the end mark"));
            }
        }
    }

    fn decode(&mut self, header: &Header, pax: Pax) -> Result<Entry, DecodeError> {
        let size = match pax.size {
            Some(size) => size,
            None => header.entry_size().map_err(|_| self.corrupt("a size is no number"))?,
        };
        let old = header.as_old();
        let path = pax.sparse_name.or(pax.path).unwrap_or_else(|| until_nul(&old.name).to_vec());
        let link = pax.true_link.or(pax.link).unwrap_or_else(|| until_nul(&old.linkname).to_vec());
        let (directory, last) = match path.iter().rposition(|&b| b == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&b""[..], &path[..]),
        };
        let is_mark = pax.true_path.is_none() && last.starts_with(WHITEOUT);
        let mut entry = Entry {
            path: TreePath::root(),
            content: Content::Fifo,
            metadata: Metadata {
                mode: header.mode().map_err(|_| self.corrupt("a mode is no number"))?,
                uid: number(pax.uid, header.uid()).map_err(|why| self.corrupt(why))?,
                gid: number(pax.gid, header.gid()).map_err(|why| self.corrupt(why))?,
                modified: match pax.modified {
                    Some(time) => time,
                    None => Time {
                        seconds: header
                            .mtime()
                            .ok()
                            .and_then(|s| i64::try_from(s).ok())
                            .ok_or_else(|| self.corrupt("a time is no number"))?,
                        nanoseconds: 0,
                    },
                },
                xattrs: pax.xattrs,
            },
        };
        if entry.metadata.mode > 0o7777 {
            return Err(self.corrupt("a mode has unknown bits"));
        }
        let directory = pax.directory.as_deref().unwrap_or(directory);
        let parse = |bytes: &[u8]| TreePath::parse(bytes).map_err(|why| self.corrupt(why));
        let bare = header.entry_type() != EntryType::Regular || is_mark;
        if is_mark {
            entry.metadata = Metadata::default();
            if last == OPAQUE {
                entry.path = parse(directory)?;
                entry.content = Content::Opaque;
            } else {
                let name = &last[WHITEOUT.len()..];
                if name.starts_with(WHITEOUT) {
                    return Err(self.corrupt("an unknown mark"));
                }
                let name = OsStr::from_bytes(pax.whiteout.as_deref().unwrap_or(name));
                entry.path = parse(directory)?.child(name).map_err(|why| self.corrupt(why))?;
                entry.content = Content::Whiteout;
            }
            if header.entry_type() != EntryType::Regular {
                return Err(self.corrupt("a whiteout is not a regular file"));
            }
        } else {
            entry.path = parse(pax.true_path.as_deref().unwrap_or(&path))?;
            entry.content = match header.entry_type() {
                EntryType::Directory => Content::Directory {
                    sockets: decode_sockets(&pax.sockets).map_err(|why| self.corrupt(why))?,
                },
                EntryType::Regular => match pax.sparse_size {
                    None => Content::File { size, segments: None },
                    // The map is read below.
                    Some(size) => Content::File { size, segments: Some(Vec::new()) },
                },
                EntryType::Link => Content::HardLink { target: parse(&link)? },
                EntryType::Symlink => {
                    if link.is_empty() || link.len() > PATH_BYTES_MAX || link.contains(&0) {
                        return Err(self.corrupt(
                            "a symbolic link's target is empty, too long or holds a NUL",
                        ));
                    }
                    Content::Symlink { target: link }
                }
                EntryType::Fifo => Content::Fifo,
                kind @ (EntryType::Char | EntryType::Block) => {
                    let bad = || self.corrupt("a device number is no number");
                    let major = header.device_major().ok().flatten().ok_or_else(bad)?;
                    let minor = header.device_minor().ok().flatten().ok_or_else(bad)?;
                    if kind == EntryType::Char {
                        Content::CharDevice { major, minor }
                    } else {
                        Content::BlockDevice { major, minor }
                    }
                }
                _ => return Err(self.corrupt("an entry of unknown type")),
            };
        }
        if bare && size != 0 {
            return Err(self.corrupt("an entry that is no file has content"));
        }
        if entry.path.is_root()
            && !matches!(entry.content, Content::Directory { .. } | Content::Opaque)
        {
            return Err(self.corrupt("the root is not a directory"));
        }
        self.last = entry.path.clone();
        (self.left, self.padding) = (size, padding(size));
        if let Content::File { size, segments: Some(segments) } = &mut entry.content {
            *segments = self.map(*size)?;
        }
        Ok(entry)
    }

    /// Reads a sparse file's map, whose segments' bytes are then exactly what is left of the entry.
    fn map(&mut self, size: u64) -> Result<Vec<Segment>, DecodeError> {
        const BAD: &str = "a sparse file's map is malformed";
        let mut block = [0; BLOCK_BYTES];
        let mut at = BLOCK_BYTES;
        let mut next = |reader: &mut Self| -> Result<u64, DecodeError> {
            let mut value: Option<u64> = None;
            loop {
                if at == BLOCK_BYTES {
                    if reader.left < BLOCK_BYTES as u64 {
                        return Err(reader.corrupt(BAD));
                    }
                    reader.stream.read_exact(&mut block)?;
                    reader.left -= BLOCK_BYTES as u64;
                    at = 0;
                }
                let byte = block[at];
                at += 1;
                match (byte, value) {
                    (b'0'..=b'9', _) => {
                        let digit = u64::from(byte - b'0');
                        let more =
                            value.unwrap_or(0).checked_mul(10).and_then(|v| v.checked_add(digit));
                        value = Some(more.ok_or_else(|| reader.corrupt(BAD))?);
                    }
                    (b'\n', Some(value)) => return Ok(value),
                    _ => return Err(reader.corrupt(BAD)),
                }
            }
        };
        let count = usize::try_from(next(self)?).ok().filter(|&c| c <= SEGMENTS_MAX + 1);
        let count = count.ok_or_else(|| self.corrupt("a sparse file has too many segments"))?;
        let mut segments = Vec::new();
        let (mut end, mut bytes) = (0, 0_u64);
        for _ in 0..count {
            let segment = Segment { offset: next(self)?, length: next(self)? };
            let segment_end = segment.offset.checked_add(segment.length).filter(|&e| e <= size);
            if segment.offset < end {
                return Err(self.corrupt(BAD));
            }
            end = segment_end.ok_or_else(|| self.corrupt(BAD))?;
            bytes += segment.length;
            if segment.length > 0 {
                segments.push(segment);
            }
        }
        if bytes != self.left {
            return Err(self.corrupt("a sparse file's map and content differ in size"));
        }
        Ok(segments)
    }
}

fn padding(size: u64) -> u64 {
    const BLOCK: u64 = BLOCK_BYTES as u64;
    (BLOCK - size % BLOCK) % BLOCK
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or_default()
}

fn number(record: Option<u32>, field: io::Result<u64>) -> Result<u32, &'static str> {
    match record {
        Some(number) => Ok(number),
        None => field.ok().and_then(|n| u32::try_from(n).ok()).ok_or("an owner is no number"),
    }
}

#[derive(Debug, Default)]
struct Pax {
    path: Option<Vec<u8>>,
    true_path: Option<Vec<u8>>,
    directory: Option<Vec<u8>>,
    whiteout: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    true_link: Option<Vec<u8>>,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    modified: Option<Time>,
    sockets: Vec<u8>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Pax {
    fn decode(mut bytes: &[u8]) -> Result<Pax, &'static str> {
        const BAD: &str = "an entry's records are malformed";
        fn parsed<T: std::str::FromStr>(value: &[u8]) -> Result<Option<T>, &'static str> {
            std::str::from_utf8(value)
                .ok()
                .and_then(|v| v.parse().ok())
                .map(Some)
                .ok_or("a record is no number")
        }
        let mut pax = Pax::default();
        while !bytes.is_empty() {
            // 20 digits hold every length there is.
            let space = bytes.iter().take(20).position(|&b| b == b' ').ok_or(BAD)?;
            let length: usize = parsed(&bytes[..space])?.ok_or(BAD)?;
            if length > bytes.len() || length < space + 3 || bytes[length - 1] != b'\n' {
                return Err(BAD);
            }
            let line = &bytes[space + 1..length - 1];
            bytes = &bytes[length..];
            let equals = line.iter().position(|&b| b == b'=').ok_or(BAD)?;
            let (key, value) = (&line[..equals], &line[equals + 1..]);
            match key {
                b"path" => pax.path = Some(value.to_vec()),
                b"SAMARA.path" => pax.true_path = Some(value.to_vec()),
                b"SAMARA.whiteout" => pax.whiteout = Some(value.to_vec()),
                b"SAMARA.directory" => pax.directory = Some(value.to_vec()),
                b"linkpath" => pax.link = Some(value.to_vec()),
                b"SAMARA.linkpath" => pax.true_link = Some(value.to_vec()),
                b"GNU.sparse.name" => pax.sparse_name = Some(value.to_vec()),
                b"GNU.sparse.realsize" => pax.sparse_size = parsed(value)?,
                b"GNU.sparse.major" if value != b"1" => {
                    return Err("an unknown format of sparse files");
                }
                b"GNU.sparse.minor" if value != b"0" => {
                    return Err("an unknown format of sparse files");
                }
                b"GNU.sparse.major" | b"GNU.sparse.minor" => {}
                b"size" => pax.size = parsed(value)?,
                b"uid" => pax.uid = parsed(value)?,
                b"gid" => pax.gid = parsed(value)?,
                b"mtime" => pax.modified = Some(decode_time(value)?),
                b"SAMARA.sockets" => pax.sockets = value.to_vec(),
                _ => {
                    let name = if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        name.to_vec()
                    } else if let Some(name) = key.strip_prefix(b"SAMARA.xattr.") {
                        unescape(name).ok_or(BAD)?
                    } else {
                        return Err("a record of unknown kind");
                    };
                    pax.xattrs.push(checked_xattr(name, value.to_vec())?);
                }
            }
        }
        Ok(pax)
    }
}

fn checked_xattr(name: Vec<u8>, value: Vec<u8>) -> Result<(Vec<u8>, Vec<u8>), &'static str> {
    if name.len() > XATTR_NAME_BYTES_MAX || name.contains(&0) || !is_kept(&name) {
        return Err("an extended attribute's name is too long or not one that is kept");
    }
    if value.len() > XATTR_BYTES_MAX {
        return Err("an extended attribute is larger than 64 KiB");
    }
    Ok((name, value))
}

fn escape(bytes: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(bytes.len());
    for &b in bytes {
        if b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-') {
            escaped.push(b);
        } else {
            escaped.extend_from_slice(format!("%{b:02X}").as_bytes());
        }
    }
    escaped
}

fn unescape(escaped: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some((&b, tail)) = rest.split_first() {
        if b == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(b);
            rest = tail;
        }
    }
    Some(bytes)
}

fn decode_time(value: &[u8]) -> Result<Time, &'static str> {
    const BAD: &str = "a time is no number";
    let text = std::str::from_utf8(value).map_err(|_| BAD)?;
    let (text, negative) = text.strip_prefix('-').map_or((text, false), |t| (t, true));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return Err(BAD);
    }
    let seconds: i64 = whole.parse().map_err(|_| BAD)?;
    let nanoseconds: u32 = format!("{fraction:0<9}").parse().map_err(|_| BAD)?;
    Ok(match (negative, nanoseconds) {
        (false, _) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds: 0 },
        (true, _) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(entry: &Entry, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = LayerWriter::new(&mut bytes);
        writer.entry(entry).unwrap();
        writer.write_all(content).unwrap();
        writer.pad().unwrap();
        writer.end().unwrap();
        bytes
    }

    fn decoded(bytes: &[u8]) -> Result<Entry, DecodeError> {
        let mut stream = bytes;
        let mut reader = LayerReader::new(&mut stream);
        let entry = reader.entry()?.expect("one entry");
        assert!(reader.entry()?.is_none());
        Ok(entry)
    }

    fn path(text: &str) -> TreePath {
        TreePath::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn every_entry_comes_back_as_it_went() {
        let metadata = |seconds, nanoseconds| Metadata {
            mode: 0o6755,
            uid: u32::MAX - 1,
            gid: 2_097_152,
            modified: Time { seconds, nanoseconds },
            xattrs: vec![
                (b"user.a=b%".to_vec(), b"\n\0".to_vec()),
                (b"user.c".to_vec(), vec![7; 1000]),
            ],
        };
        let socket = Socket { name: "s:;=\n".into(), metadata: metadata(-5, 7) };
        let long = format!(".wh.d/{}", "long/".repeat(60));
        let contents = [
            Content::Directory { sockets: vec![socket.clone(), socket] },
            Content::HardLink { target: path(&long) },
            Content::Symlink { target: vec![b'x'; 4095] },
            Content::Fifo,
            Content::CharDevice { major: 4095, minor: 1_048_575 },
            Content::BlockDevice { major: 0, minor: 0 },
        ];
        let times =
            [(0, 0), (0, 1), (-1, 0), (-1, 999_999_999), (-7, 1), (1 << 40, 5), (i64::MIN + 1, 0)];
        for content in contents {
            for (seconds, nanoseconds) in times {
                for name in ["a", ".wh.a", &long] {
                    let metadata = metadata(seconds, nanoseconds);
                    let entry = Entry { path: path(name), content: content.clone(), metadata };
                    assert_eq!(decoded(&encoded(&entry, b"")).unwrap(), entry);
                }
            }
        }
        for content in [Content::Whiteout, Content::Opaque] {
            for name in ["a", "d/a", ".wh.a", ".wh..wh..opq", ".wh.d/a", &long] {
                let metadata = Metadata::default();
                let entry = Entry { path: path(name), content: content.clone(), metadata };
                assert_eq!(decoded(&encoded(&entry, b"")).unwrap(), entry);
            }
        }
        let segments =
            vec![Segment { offset: 4096, length: 3 }, Segment { offset: 1 << 50, length: 4 }];
        let content = Content::File { size: 1 << 60, segments: Some(segments) };
        let entry = Entry { path: path(&long), content, metadata: metadata(1, 2) };
        assert_eq!(decoded(&encoded(&entry, b"1234567")).unwrap(), entry);
    }

    /// A sparse file with this map.
    fn with_map(size: u64, map: &str, content: usize) -> Vec<u8> {
        let segments = Some(Vec::new());
        let entry = Entry {
            path: path("f"),
            content: Content::File { size, segments },
            metadata: Metadata::default(),
        };
        let (mut header, pax, _) = encode(&entry).unwrap();
        let mut map = map.as_bytes().to_vec();
        map.resize(map.len().next_multiple_of(BLOCK_BYTES), 0);
        header.set_size((map.len() + content) as u64);
        header.set_cksum();
        let mut bytes = Vec::new();
        let mut writer = LayerWriter::new(&mut bytes);
        let mut extension = Header::new_ustar();
        extension.set_entry_type(EntryType::XHeader);
        extension.set_size(pax.len() as u64);
        extension.set_cksum();
        writer.write_all(extension.as_bytes()).unwrap();
        writer.write_all(&pax).unwrap();
        writer.pad().unwrap();
        writer.write_all(header.as_bytes()).unwrap();
        writer.write_all(&map).unwrap();
        writer.write_all(&vec![1; content]).unwrap();
        writer.pad().unwrap();
        writer.end().unwrap();
        bytes
    }

    #[test]
    fn maps_of_holes_that_lie_are_refused() {
        assert!(decoded(&with_map(100, "1\n0\n10\n", 10)).is_ok());
        for (size, map, content) in [
            (100, "1\n0\n10\n", 9),
            (100, "1\n0\n10\n", 11),
            (100, "2\n0\n10\n5\n10\n", 20),
            (100, "2\n50\n10\n0\n10\n", 20),
            (100, "1\n95\n10\n", 10),
            (100, "1\n18446744073709551615\n10\n", 10),
            (100, "1\n99999999999999999999999\n10\n", 10),
            (100, "4000000000\n0\n1\n", 1),
            (100, "-1\n", 0),
            (100, "\n\n\n", 0),
            (100, "3\n", 0),
            (100, "", 0),
        ] {
            assert!(decoded(&with_map(size, map, content)).is_err(), "{map:?}");
        }
    }

    #[test]
    fn records_that_lie_are_refused() {
        for bad in [
            "5 a=b\n",
            "7 a=b\n",
            "999999999999999999999999 path=x\n",
            "0 \n",
            "4 =\n",
            "6 a=b",
            "11 uid=-1a\n",
            "14 mtime=1.x\n",
            "26 SCHILY.xattr.evil.x=yy\n",
            "12 unknown=\n",
        ] {
            assert!(Pax::decode(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
