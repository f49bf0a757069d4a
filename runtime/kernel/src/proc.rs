//! `proc(5)`: what the kernel tells of processes in text.
//!
//! Stat comes from the `procfs` crate. Mappings are parsed here, because names must survive byte by byte and unknown flags must be
//! seen: an unknown flag is a state that nobody would restore. Status is, because it is read of each thread that stands still,
//! and a table of all its lines takes longer than the kernel needs to write them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use procfs::FromRead;
pub use procfs::process::Stat;

use crate::Pid;

/// One mapping of an address space, as `/proc/PID/smaps` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    pub read: bool,
    pub write: bool,
    pub execute: bool,
    pub shared: bool,
    /// Offset in the mapped file, in bytes.
    pub offset: u64,
    /// `(major, minor)` of the mapped file's device; `(0, 0)` for anonymous memory.
    pub device: (u32, u32),
    pub inode: u64,
    /// The path or the name in brackets; empty for anonymous memory. Newlines are escaped as `\012`.
    pub name: OsString,
    /// The two-letter codes of `VmFlags`.
    pub flags: Vec<[u8; 2]>,
    /// The protection key (`pkeys(7)`), 0 where there is none.
    pub protection_key: u32,
    /// It may hold memory that belongs to no file (`Anonymous`).
    pub has_anonymous: bool,
}

impl Mapping {
    #[must_use]
    pub fn has_flag(&self, flag: &[u8; 2]) -> bool {
        self.flags.contains(flag)
    }

    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// The mappings of a process in address order, with their flags.
///
/// # Errors
/// Of the read, and `InvalidData` for a line that is not as `proc_pid_smaps(5)` says.
pub fn mappings(pid: Pid) -> io::Result<Vec<Mapping>> {
    parse_mappings(&fs::read(format!("/proc/{pid}/smaps"))?)
}

/// As [`mappings`], with all but flags, key and `has_anonymous`: for the kernel much less work.
///
/// # Errors
/// As [`mappings`].
pub fn mappings_without_flags(pid: Pid) -> io::Result<Vec<Mapping>> {
    let text = small(pid, "maps")?;
    let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| parse_header(line).ok_or_else(|| malformed(line))).collect()
}

fn parse_mappings(text: &[u8]) -> io::Result<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let last = mappings.last_mut().ok_or_else(|| malformed(line))?;
            last.flags = flags
                .split(|&byte| byte == b' ')
                .filter(|flag| !flag.is_empty())
                .map(|flag| flag.try_into().map_err(|_| malformed(line)))
                .collect::<io::Result<_>>()?;
        } else if let Some(key) = line.strip_prefix(b"ProtectionKey:") {
            let key = std::str::from_utf8(key).ok().and_then(|key| key.trim().parse().ok());
            let last = mappings.last_mut().ok_or_else(|| malformed(line))?;
            last.protection_key = key.ok_or_else(|| malformed(line))?;
        } else if let Some(kilobytes) = line.strip_prefix(b"Anonymous:") {
            let text = std::str::from_utf8(kilobytes)
                .ok()
                .and_then(|text| text.trim().strip_suffix(" kB"));
            let kilobytes: Option<u64> = text.and_then(|text| text.parse().ok());
            let last = mappings.last_mut().ok_or_else(|| malformed(line))?;
            last.has_anonymous = kilobytes.ok_or_else(|| malformed(line))? > 0;
        } else if line
            .first()
            .is_some_and(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase())
        {
            mappings.push(parse_header(line).ok_or_else(|| malformed(line))?);
        }
    }
    Ok(mappings)
}

/// `start-end perms offset major:minor inode   name`
fn parse_header(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let begin = rest.iter().position(|&byte| byte != b' ')?;
        let tail = rest.get(begin..)?;
        let end = tail.iter().position(|&byte| byte == b' ').unwrap_or(tail.len());
        rest = tail.get(end..)?;
        std::str::from_utf8(tail.get(..end)?).ok()
    };
    let (start, end) = field()?.split_once('-')?;
    let permissions = field()?.as_bytes();
    let offset = field()?;
    let (major, minor) = field()?.split_once(':')?;
    let inode = field()?;
    let name = rest
        .iter()
        .position(|&byte| byte != b' ')
        .and_then(|begin| rest.get(begin..))
        .unwrap_or_default();
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some(Mapping {
        start: hex(start)?,
        end: hex(end)?,
        read: permissions.first() == Some(&b'r'),
        write: permissions.get(1) == Some(&b'w'),
        execute: permissions.get(2) == Some(&b'x'),
        shared: permissions.get(3) == Some(&b's'),
        offset: hex(offset)?,
        device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode: inode.parse().ok()?,
        name: OsString::from_vec(name.to_vec()),
        flags: Vec::new(),
        protection_key: 0,
        has_anonymous: false,
    })
}

/// `/proc/PID/stat`.
pub fn stat(pid: Pid) -> io::Result<Stat> {
    Stat::from_read(single(pid, "stat")?.as_slice()).map_err(into_io)
}

/// A file of `/proc/PID` that the kernel writes at once (`proc_single_operations` of fs/proc/base.c): what leaves room in the
/// buffer is all. A process that is not there is ESRCH.
fn single(pid: Pid, name: &str) -> io::Result<Vec<u8>> {
    read_small(pid, name, true).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::Error::from_raw_os_error(libc::ESRCH),
        _ => error,
    })
}

/// A file of `/proc/PID` that is mostly short. The end is where nothing more comes: the kernel may write a list in parts.
fn small(pid: Pid, name: &str) -> io::Result<Vec<u8>> {
    read_small(pid, name, false)
}

fn read_small(pid: Pid, name: &str, at_once: bool) -> io::Result<Vec<u8>> {
    const AT_ONCE: usize = 4096;
    let mut file = File::open(format!("/proc/{pid}/{name}"))?;
    let mut text = vec![0; AT_ONCE];
    let mut filled = 0;
    loop {
        match file.read(text.get_mut(filled..).unwrap_or_default())? {
            0 => break,
            count => filled += count,
        }
        if filled == text.len() {
            text.resize(2 * filled, 0);
        } else if at_once {
            break;
        }
    }
    text.truncate(filled);
    Ok(text)
}

/// What Samara needs of `/proc/PID/status`, as `proc_pid_status(5)` names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Up to 15 bytes of any kind.
    pub name: Vec<u8>,
    pub umask: Option<u32>,
    pub state: char,
    pub tgid: Pid,
    pub ppid: Pid,
    pub tracerpid: Pid,
    /// Real, effective, saved, of file systems.
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    /// In each namespace from the one of this `/proc` on; empty on kernels without pid namespaces.
    pub nspid: Vec<Pid>,
    pub nspgid: Vec<Pid>,
    pub nssid: Vec<Pid>,
    /// In kibibytes.
    pub vmlck: Option<u64>,
    /// Signals that are pending for the thread, and for the process.
    pub sigpnd: u64,
    pub shdpnd: u64,
    pub sigign: u64,
    pub sigcgt: u64,
    pub capinh: u64,
    pub capprm: u64,
    pub capeff: u64,
    pub capbnd: u64,
    pub capamb: u64,
    pub nonewprivs: bool,
    pub seccomp: u32,
    pub voluntary_switches: Option<u64>,
}

/// `/proc/PID/status`; for a thread pass its own id.
pub fn status(tid: Pid) -> io::Result<Status> {
    parse_status(&single(tid, "status")?)
}

fn parse_status(text: &[u8]) -> io::Result<Status> {
    fn number<T: std::str::FromStr>(value: &str) -> Option<T> {
        value.parse().ok()
    }
    fn list<T: std::str::FromStr>(value: &str) -> Option<Vec<T>> {
        value.split_ascii_whitespace().map(|word| word.parse().ok()).collect()
    }
    let four = |value: &str| list(value)?.try_into().ok();
    let hex = |value: &str| u64::from_str_radix(value, 16).ok();
    let mut status = Status::default();
    for line in text.split(|&byte| byte == b'\n') {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
        let (key, value) = line.split_at(colon);
        if key == b"Name" {
            status.name = unescape_name(value.strip_prefix(b":\t").unwrap_or_default());
            continue;
        }
        let value = value.get(1..).and_then(|value| std::str::from_utf8(value).ok());
        let value = value.ok_or_else(|| malformed(line))?.trim();
        let known = match key {
            b"Umask" => u32::from_str_radix(value, 8).ok().map(|umask| status.umask = Some(umask)),
            b"State" => value.chars().next().map(|state| status.state = state),
            b"Tgid" => number(value).map(|tgid| status.tgid = tgid),
            b"PPid" => number(value).map(|ppid| status.ppid = ppid),
            b"TracerPid" => number(value).map(|tracer| status.tracerpid = tracer),
            b"Uid" => four(value).map(|uids| status.uids = uids),
            b"Gid" => four(value).map(|gids| status.gids = gids),
            b"Groups" => list(value).map(|groups| status.groups = groups),
            b"NSpid" => list(value).map(|numbers| status.nspid = numbers),
            b"NSpgid" => list(value).map(|numbers| status.nspgid = numbers),
            b"NSsid" => list(value).map(|numbers| status.nssid = numbers),
            b"VmLck" => number(value.trim_end_matches(" kB")).map(|kib| status.vmlck = Some(kib)),
            b"SigPnd" => hex(value).map(|set| status.sigpnd = set),
            b"ShdPnd" => hex(value).map(|set| status.shdpnd = set),
            b"SigIgn" => hex(value).map(|set| status.sigign = set),
            b"SigCgt" => hex(value).map(|set| status.sigcgt = set),
            b"CapInh" => hex(value).map(|set| status.capinh = set),
            b"CapPrm" => hex(value).map(|set| status.capprm = set),
            b"CapEff" => hex(value).map(|set| status.capeff = set),
            b"CapBnd" => hex(value).map(|set| status.capbnd = set),
            b"CapAmb" => hex(value).map(|set| status.capamb = set),
            b"NoNewPrivs" => number(value).map(|set: u8| status.nonewprivs = set == 1),
            b"Seccomp" => number(value).map(|mode| status.seccomp = mode),
            b"voluntary_ctxt_switches" => {
                number(value).map(|count| status.voluntary_switches = Some(count))
            }
            _ => Some(()),
        };
        known.ok_or_else(|| malformed(line))?;
    }
    Ok(status)
}

/// Undoes what the kernel does to the name in a status: `\n` and `\\` stand for a line feed and a backslash.
fn unescape_name(escaped: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(escaped.len());
    let mut rest = escaped.iter();
    while let Some(&byte) = rest.next() {
        name.push(match byte {
            b'\\' => match rest.next() {
                Some(b'n') => b'\n',
                Some(&other) => other,
                None => byte,
            },
            _ => byte,
        });
    }
    name
}

/// The name of a thread: up to 15 bytes of any kind.
pub fn comm(tid: Pid) -> io::Result<Vec<u8>> {
    let mut name = small(tid, "comm")?;
    name.pop_if(|last| *last == b'\n');
    Ok(name)
}

/// The threads of a process.
pub fn threads(pid: Pid) -> io::Result<Vec<Pid>> {
    numbers(&format!("/proc/{pid}/task"))
}

/// The processes that this `/proc` shows.
pub fn processes() -> io::Result<Vec<Pid>> {
    numbers("/proc")
}

/// The open descriptors of a process, ascending.
pub fn descriptors(pid: Pid) -> io::Result<Vec<i32>> {
    numbers(&format!("/proc/{pid}/fd"))
}

fn numbers(folder: &str) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        if let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Identity of a namespace of a process: `kind` as in `/proc/PID/ns`.
pub fn namespace(pid: Pid, kind: &str) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(format!("/proc/{pid}/ns/{kind}"))?;
    Ok((metadata.dev(), metadata.ino()))
}

/// What a descriptor refers to, as its link in `/proc/PID/fd` says.
pub fn descriptor_target(pid: Pid, fd: i32) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/{pid}/fd/{fd}"))
}

/// The fields of `/proc/PID/fdinfo/FD` that every descriptor has, and the lines that only some have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescriptorInfo {
    pub position: u64,
    /// Flags of `open(2)`, `O_CLOEXEC` among them.
    pub flags: i32,
    pub mount: i32,
    /// Lines that depend on the kind of file, `name:\tvalue`.
    pub others: Vec<(String, String)>,
}

/// Reads `/proc/PID/fdinfo/FD`.
pub fn descriptor_info(pid: Pid, fd: i32) -> io::Result<DescriptorInfo> {
    let text = String::from_utf8(small(pid, &format!("fdinfo/{fd}"))?);
    let text = text.map_err(|_| malformed(b"fdinfo"))?;
    let mut info = DescriptorInfo { position: 0, flags: 0, mount: 0, others: Vec::new() };
    for line in text.lines() {
        let (name, value) = line.split_once(':').ok_or_else(|| malformed(line.as_bytes()))?;
        let (name, value) = (name.trim(), value.trim());
        let bad = || malformed(line.as_bytes());
        match name {
            "pos" => info.position = value.parse().map_err(|_| bad())?,
            "flags" => info.flags = i32::from_str_radix(value, 8).map_err(|_| bad())?,
            "mnt_id" => info.mount = value.parse().map_err(|_| bad())?,
            _ => info.others.push((name.to_owned(), value.to_owned())),
        }
    }
    Ok(info)
}

/// The lines of `/proc/PID/limits` in the order of the `RLIMIT_` numbers (fs/proc/base.c, lnames).
const LIMIT_NAMES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// Soft and hard limit of every resource, in the order of the `RLIMIT_` numbers; `u64::MAX` is no limit.
///
/// Read from `/proc`: `prlimit` on another user's process takes CAP_SYS_RESOURCE.
pub fn limits(pid: Pid) -> io::Result<Vec<(u64, u64)>> {
    let text = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    LIMIT_NAMES
        .iter()
        .map(|name| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .ok_or_else(|| malformed(name.as_bytes()))?;
            let mut values = line.split_ascii_whitespace().map(|value| match value {
                "unlimited" => Some(u64::MAX),
                number => number.parse().ok(),
            });
            match (values.next().flatten(), values.next().flatten()) {
                (Some(soft), Some(hard)) => Ok((soft, hard)),
                _ => Err(malformed(line.as_bytes())),
            }
        })
        .collect()
}

/// Sets one limit of another process.
pub fn set_limit(pid: Pid, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` outlives the call; a null old limit means that it is not asked for.
    let result = unsafe { libc::prlimit(pid, resource, &raw const limit, std::ptr::null_mut()) };
    crate::check(result.into()).map(drop)
}

/// The auxiliary vector as the kernel holds it for `/proc/PID/auxv`.
pub fn auxiliary_vector(pid: Pid) -> io::Result<Vec<u8>> {
    fs::read(format!("/proc/{pid}/auxv"))
}

/// The layout of the address space that `/proc/PID/stat` shows and `PR_SET_MM_MAP` takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// The layout part of a stat.
#[must_use]
pub fn layout(stat: &Stat) -> Layout {
    Layout {
        start_code: stat.startcode,
        end_code: stat.endcode,
        start_data: stat.start_data.unwrap_or_default(),
        end_data: stat.end_data.unwrap_or_default(),
        start_brk: stat.start_brk.unwrap_or_default(),
        start_stack: stat.startstack,
        arg_start: stat.arg_start.unwrap_or_default(),
        arg_end: stat.arg_end.unwrap_or_default(),
        env_start: stat.env_start.unwrap_or_default(),
        env_end: stat.env_end.unwrap_or_default(),
    }
}

/// When the scheduler last accounted for a thread, in nanoseconds of its processor's task clock, and how often the thread has gone
/// to sleep: for a sleeping thread, when it did so. `None` where the kernel does not tell (`CONFIG_SCHED_DEBUG`).
#[must_use]
pub fn scheduled(tid: Pid) -> Option<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{tid}/sched")).ok()?;
    let field = |name: &str| {
        text.lines()
            .find(|line| line.split([' ', ':']).next() == Some(name))
            .and_then(|line| line.rsplit(' ').next())
    };
    let (ms, fraction) = field("se.exec_start")?.split_once('.')?;
    let ns = ms.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_add(fraction.parse().ok()?)?;
    Some((ns, field("nr_voluntary_switches")?.parse().ok()?))
}

/// A small file of `/proc/PID` as text without its final newline.
pub fn attribute(pid: Pid, name: &str) -> io::Result<String> {
    let mut text = String::from_utf8(small(pid, name)?).map_err(|_| malformed(name.as_bytes()))?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// Undoes the escaping that `/proc` applies to newlines and backslashes in the names of mappings.
#[must_use]
pub fn unescape(name: &Path) -> PathBuf {
    let bytes = name.as_os_str().as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, tail)) = rest.split_first() {
        if let (b'\\', Some(b"012")) = (first, tail.get(..3)) {
            out.push(b'\n');
            rest = tail.get(3..).unwrap_or_default();
        } else {
            out.push(first);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

fn malformed(line: &[u8]) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("unexpected line in /proc: {:?}", String::from_utf8_lossy(line)),
    )
}

fn into_io(error: procfs::ProcError) -> io::Error {
    match error {
        procfs::ProcError::Io(error, _) => error,
        procfs::ProcError::NotFound(_) => io::Error::from_raw_os_error(libc::ESRCH),
        procfs::ProcError::PermissionDenied(_) => io::Error::from_raw_os_error(libc::EPERM),
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name that was cut or trimmed would make a restore map another file.
    #[test]
    fn mapping_names_survive_spaces_and_escapes() {
        let text = b"00400000-00401000 r-xp 00001000 fe:01 77       /a b/c\\012d (deleted)\nSize: 4 kB\nVmFlags: rd ex mr \n\
            7f0000000000-7f0000001000 rw-s 00000000 00:00 0 \nVmFlags: rd wr sh mr mw me ms sd \n";
        let mappings = parse_mappings(text).expect("well formed");
        assert_eq!(mappings.len(), 2);
        assert_eq!(mappings[0].name, "/a b/c\\012d (deleted)");
        assert_eq!(unescape(Path::new(&mappings[0].name)), Path::new("/a b/c\nd (deleted)"));
        assert_eq!(
            (mappings[0].offset, mappings[0].device, mappings[0].inode),
            (0x1000, (0xfe, 1), 77)
        );
        assert!(mappings[0].execute && !mappings[0].write && !mappings[0].shared);
        assert!(mappings[1].name.is_empty() && mappings[1].shared && mappings[1].has_flag(b"sd"));
    }

    /// A limit in the wrong place would end a restored program, or let it do what it may not.
    #[test]
    fn limits_are_those_that_the_kernel_tells_their_owner() {
        let own = limits(i32::try_from(std::process::id()).expect("a pid")).expect("own limits");
        for (resource, (soft, hard)) in (0u32..).zip(own) {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: `limit` outlives the call.
            assert_eq!(unsafe { libc::getrlimit(resource, &raw mut limit) }, 0);
            assert_eq!((soft, hard), (limit.rlim_cur, limit.rlim_max), "limit {resource}");
        }
    }

    #[test]
    fn own_status_is_what_its_owner_knows() {
        let own = status(i32::try_from(std::process::id()).expect("a pid")).expect("own status");
        // SAFETY: the calls take nothing and always succeed.
        let uid = unsafe { libc::geteuid() };
        assert_eq!(own.uids[1], uid);
        assert_eq!(own.nspid.first(), Some(&own.tgid));
        assert!(own.umask.is_some() && own.vmlck.is_some() && own.voluntary_switches.is_some());
    }

    /// A name that was read wrongly is another one after a restore.
    #[test]
    fn names_survive_the_escapes_of_a_status() {
        let text = b"Name:\ta\\nb\\\\n: c\xff\nUid:\t1\t2\t3\t4\nGroups:\t \n";
        let status = parse_status(text).expect("well formed");
        assert_eq!(status.name, b"a\nb\\n: c\xff");
        assert_eq!((status.uids, status.groups), ([1, 2, 3, 4], Vec::new()));
        assert!(parse_status(b"Uid:\t1\t2\n").is_err());
    }

    #[test]
    fn own_mappings_parse() {
        let own = mappings(i32::try_from(std::process::id()).expect("a pid")).expect("own smaps");
        assert!(own.iter().any(|mapping| mapping.name == "[stack]"));
        assert!(
            own.iter().all(|mapping| mapping.name == "[vsyscall]" || !mapping.flags.is_empty())
        );
    }
}
