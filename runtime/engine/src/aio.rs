//! Contexts of asynchronous I/O (`io_setup`), which are known by the address of their ring of completed requests.
//!
//! A request that is under way shows nowhere: neither in `/proc` nor in the ring. But each takes a place in the ring from its
//! submission until its completion has been read, and a context has only so many places. So a capture fills all that are free
//! with requests that complete at once: if as many went in as the context has beside the unread events, none is under way. More
//! of them then go around the ring until the kernel writes next where it did before, and what was there is written again.
//!
//! All this is one tape, which goes on only as long as the numbers are those of an idle context, and leaves the ring as it was
//! whether the engine lives or not. Where they are not, the tape stops and the engine takes its own events out of the ring; only
//! an engine that is killed in that moment, over a context that is busy, leaves them there.
//!
//! A child has the ring of its parent, but not the context, and can do nothing with it: it gets a copy, which does not change as the
//! parent's does.
//!
//! What this module does not do: save requests that are under way.

use std::io;

use samara_capsule::record::{self, Backing, Bytes, ProcessState};
use samara_kernel::tape::{Call, End};
use samara_kernel::{Pid, proc, sched};

use crate::capture::{CaptureError, Tables, inner_pid, read};
use crate::freeze::FrozenTree;
use crate::memory::PAGE;
use crate::restore::{RestoreError, make};
use crate::tracee::{CALLS_MAX, Process, Tape, TraceeError};
use crate::unsupported::{AIO_UNDER_WAY, Place};

/// What `/proc` calls the mapping of a ring.
pub(crate) const MAPPING: &[u8] = b"/[aio]";

/// `struct aio_ring` of the kernel's fs/aio.c, before its events.
const HEADER_BYTES: usize = 32;
const HEAD: u64 = 8;
const TAIL: u64 = 12;
const MAGIC: u32 = 0xa10a_10a1;
/// `struct io_event`: data, request, result, second result.
const EVENT_BYTES: usize = 32;
/// The kernel's bound on the events of one ring (fs/aio.c, ioctx_alloc), which it takes twice and rounds up to pages.
const EVENTS_MAX: u32 = 0x1000_0000 / 32;
/// Requests that one call submits at most.
const AT_ONCE: usize = 4096;
/// So many rounds it takes at least to go around a ring.
const ROUNDS: u32 = 8;
/// Unread events, and processors, for which there is room on a tape.
const UNREAD_MAX: usize = 4096;
const PROCESSORS_MAX: usize = 512;
/// The largest ring of somebody else's whose content is kept in the record.
const INHERITED_BYTES_MAX: usize = 1 << 20;
/// What the engine's requests are known by, beside their address.
const MARK: u64 = 0x5341_4d41_5241_2121;

/// Where a ring stands: which places hold events that nobody has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ring {
    start: u64,
    /// Places.
    events: u32,
    head: u32,
    tail: u32,
}

impl Ring {
    /// The ring in a mapping, if it is a whole one.
    fn read(process: &Process, mapping: &record::Mapping) -> Result<Option<Ring>, TraceeError> {
        let header = process.read(mapping.start, HEADER_BYTES)?;
        let word = |at: usize| -> u32 {
            let bytes = header.get(at..).and_then(|rest| rest.first_chunk::<4>());
            bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        let (events, head, tail, magic) = (word(4), word(8), word(12), word(16));
        let whole = magic == MAGIC
            && (2..=EVENTS_MAX).contains(&events)
            && bytes(events) == mapping.end - mapping.start;
        Ok(whole.then(|| Ring {
            start: mapping.start,
            events,
            head: head % events,
            tail: tail % events,
        }))
    }

    fn unread(&self) -> u32 {
        self.distance(self.head, self.tail)
    }

    /// How many places it is from one to the other.
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { to + self.events - from }
    }

    /// `place` and so many further.
    fn after(&self, place: u32, count: u32) -> u32 {
        let sum = u64::from(place) + u64::from(count);
        u32::try_from(sum % u64::from(self.events)).expect("less than the number of events")
    }

    /// Address and bytes of `count` events from a place on: one range, or two around the ring's end.
    fn ranges(&self, from: u32, count: u32) -> Vec<(u64, usize)> {
        let first = count.min(self.events - from);
        let range = |place: u32, count: u32| {
            let address = self.start + HEADER_BYTES as u64 + u64::from(place) * EVENT_BYTES as u64;
            (address, count as usize * EVENT_BYTES)
        };
        let ranges = [range(from, first), range(0, count - first)];
        ranges.into_iter().filter(|(_, bytes)| *bytes > 0).collect()
    }

    fn read_events(
        &self,
        process: &Process,
        from: u32,
        count: u32,
    ) -> Result<Vec<u8>, TraceeError> {
        let mut content = Vec::new();
        for (address, bytes) in self.ranges(from, count) {
            content.extend(process.read(address, bytes)?);
        }
        Ok(content)
    }

    fn write_events(
        &self,
        process: &Process,
        from: u32,
        content: &[u8],
    ) -> Result<(), TraceeError> {
        let mut rest = content;
        for (address, bytes) in self.ranges(from, count_of(content)) {
            let (now, later) = rest.split_at(bytes.min(rest.len()));
            process.write(address, now)?;
            rest = later;
        }
        Ok(())
    }

    /// How many requests an idle context without unread events takes: the kernel hands its places out to the processors in
    /// batches, and leaves a rest that does not make one (fs/aio.c, ioctx_alloc and __get_reqs_available).
    fn capacity(&self, processors: usize) -> u32 {
        let places = self.events - 1;
        let shares = u32::try_from(processors.saturating_mul(4).max(1)).unwrap_or(u32::MAX);
        let batch = (places / shares).max(1);
        places - places % batch
    }

    /// How many requests may be submitted at once, wherever the thread runs: the other processors may have taken aside half of
    /// the places.
    fn step(&self) -> u32 {
        (self.events / ROUNDS).max(1)
    }

    /// Whether all that it takes to find out whether the context is idle goes onto a tape.
    fn fits(&self, processors: usize) -> bool {
        let calls = (self.events as usize).div_ceil(AT_ONCE) + 1;
        let calls = (2 * processors + 4 * ROUNDS as usize).saturating_mul(calls);
        calls < CALLS_MAX && (self.unread() as usize) < UNREAD_MAX && processors < PROCESSORS_MAX
    }
}

fn count_of(content: &[u8]) -> u32 {
    u32::try_from(content.len() / EVENT_BYTES).unwrap_or(u32::MAX)
}

/// The size of a ring's mapping.
fn bytes(events: u32) -> u64 {
    (HEADER_BYTES as u64 + u64::from(events) * EVENT_BYTES as u64).next_multiple_of(PAGE)
}

/// Describes the rings of all processes, which leaves them as they are, and notes contexts that are not idle.
/// Whether a process has a context of asynchronous I/O.
pub(crate) fn has_context(pid: Pid) -> bool {
    let Ok(maps) = std::fs::read(format!("/proc/{pid}/maps")) else { return false };
    let mut lines = maps.split(|byte| *byte == b'\n');
    lines.any(|line| line.windows(MAPPING.len()).any(|name| name == MAPPING))
}

pub(crate) fn ask(
    frozen: &mut FrozenTree,
    records: &mut [(Pid, record::Process)],
    tables: &mut Tables<'_>,
) -> Result<(), CaptureError> {
    for (pid, record) in records {
        let ProcessState::Alive(alive) = &mut record.state else { continue };
        let Some(process) = frozen.processes.get_mut(pid) else { continue };
        let rings = alive
            .mappings
            .iter_mut()
            .filter(|mapping| matches!(mapping.backing, Backing::AsynchronousIo { .. }));
        for mapping in rings {
            process.map_arena(None)?;
            let looked_at = look(process, mapping);
            process.unmap_arena()?;
            if let Err(what) = looked_at? {
                tables.refuse(*pid, Place::Mapping(mapping.start), what);
            }
        }
    }
    Ok(())
}

/// Completes the record of one ring, or says why it can't be saved.
fn look(
    process: &mut Process,
    mapping: &mut record::Mapping,
) -> Result<Result<(), String>, CaptureError> {
    const RW: u32 = 3;
    let read_ring = match Ring::read(process, mapping) {
        // Its context has ended with the process that had it, and nothing is behind the mapping any more.
        Err(TraceeError::Memory { source, .. }) if source.raw_os_error() == Some(libc::EIO) => {
            mapping.backing = Backing::InheritedRing { content: Bytes::default() };
            return Ok(Ok(()));
        }
        other => other?,
    };
    let whole = read_ring.filter(|_| mapping.protection == RW);
    let Some(ring) = whole else {
        return Ok(Err("a part of an AIO ring, or a protected one, is not supported".to_owned()));
    };
    if !is_context(process, ring)? {
        let bytes = usize::try_from(bytes(ring.events)).unwrap_or(usize::MAX);
        if bytes > INHERITED_BYTES_MAX {
            let what =
                "so large a ring of an AIO context that the process does not have is not supported";
            return Ok(Err(what.to_owned()));
        }
        let content = Bytes::from(process.read(ring.start, bytes)?);
        mapping.backing = Backing::InheritedRing { content };
        return Ok(Ok(()));
    }
    let processors = sched::possible_processors().map_err(read("the processors"))?;
    if !ring.fits(processors.len()) {
        let what = "an AIO context with so many events is not supported on such a machine";
        return Ok(Err(what.to_owned()));
    }
    let unread = ring.read_events(process, ring.head, ring.unread())?;
    if !is_idle(process, ring, &unread, &processors)? {
        return Ok(Err(AIO_UNDER_WAY.to_owned()));
    }
    mapping.backing = Backing::AsynchronousIo {
        events: ring.events,
        head: ring.head,
        tail: ring.tail,
        unread: Bytes::from(unread),
    };
    Ok(Ok(()))
}

/// Whether a process has the context of a ring that it has mapped.
fn is_context(process: &mut Process, ring: Ring) -> Result<bool, TraceeError> {
    let mut tape = process.tape()?;
    tape.try_call("submit nothing", libc::SYS_io_submit, [ring.start, 0, 0, 0, 0, 0]);
    let results = process.run_all(0, &tape, End::Call)?;
    Ok(results.iter().all(|result| Call::outcome(*result).is_ok()))
}

/// Whether no request is under way. The ring is left as it was, with the same events at the same places.
fn is_idle(
    process: &mut Process,
    ring: Ring,
    unread: &[u8],
    processors: &[u32],
) -> Result<bool, CaptureError> {
    let pid = process.pid;
    let what = || read(format!("the processors of process {pid}"));
    let own = process.threads.first().map_or(pid, |thread| thread.tid);
    let affinity = sched::affinity(own).map_err(what())?;
    let descriptor = lowest_free(proc::descriptors(pid).map_err(what())?);
    let capacity = ring.capacity(processors.len());
    let free = capacity.saturating_sub(ring.unread());
    let mut tape = process.tape()?;
    let requests = Requests::place(&mut tape, ring, descriptor);
    let own_number = inner_pid(pid).map_err(what())?;
    let heads = Writer { ring, own_number };

    requests.fill(&mut tape, processors);
    pin(&mut tape, &affinity);
    let mut at = ring.after(ring.tail, free);
    expect_tail(&mut tape, ring, at);
    // From here on it is known that nothing else is written to the ring. What the kernel takes for read is what lay before the
    // head when it last ran out of places, so the ring ends as it was: as full as it can be, and then read up to the head.
    heads.set_head(&mut tape, at);
    let brim = ring.after(ring.tail, ring.events - capacity);
    while at != brim {
        let count = ring.step().min(ring.distance(at, brim));
        requests.submit(&mut tape, count);
        at = ring.after(at, count);
        expect_tail(&mut tape, ring, at);
        heads.set_head(&mut tape, at);
    }
    requests.fill(&mut tape, processors);
    pin(&mut tape, &affinity);
    expect_tail(&mut tape, ring, ring.tail);
    heads.put_back(&mut tape, unread);
    tape.call("close a descriptor", libc::SYS_close, [descriptor, 0, 0, 0, 0, 0]);
    let results = process.run(0, &tape, End::Call)?;
    if results.last() == Some(&0) {
        return Ok(true);
    }
    let mut tape = process.tape()?;
    pin(&mut tape, &affinity);
    if results.first().is_some_and(|result| *result == descriptor) {
        tape.try_call("close a descriptor", libc::SYS_close, [descriptor, 0, 0, 0, 0, 0]);
    }
    requests.take_out(process, unread)?;
    process.run_all(0, &tape, End::Call)?;
    Ok(false)
}

/// The number that the next descriptor gets.
fn lowest_free(mut taken: Vec<i32>) -> u64 {
    taken.sort_unstable();
    let without_gap = (0i32..).zip(&taken).take_while(|(number, fd)| number == *fd);
    without_gap.count() as u64
}

fn pin(tape: &mut Tape, processors: &[u32]) {
    let mut words = sched::affinity_words(processors);
    words.truncate(words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1));
    let address = tape.words(&words);
    let arguments = [0, words.len() as u64 * 8, address, 0, 0, 0];
    // A processor that the thread may not use keeps what it has.
    tape.try_call("choose a processor", libc::SYS_sched_setaffinity, arguments);
}

/// Ends the tape unless the kernel has written up to here.
fn expect_tail(tape: &mut Tape, ring: Ring, tail: u32) {
    // Wakes nobody and moves nobody, but only if the word is as it should be.
    let operation = u64::from((libc::FUTEX_CMP_REQUEUE | libc::FUTEX_PRIVATE_FLAG).unsigned_abs());
    let word = ring.start + TAIL;
    let arguments = [word, operation, 0, 0, word, u64::from(tail)];
    tape.call("find its AIO context idle", libc::SYS_futex, arguments);
}

/// Requests of the engine's, which complete while they are submitted: to be told when an event counter takes a number.
#[derive(Clone, Copy, Debug)]
struct Requests {
    ring: Ring,
    request: u64,
    list: u64,
}

impl Requests {
    /// Puts the counter as `descriptor`, a request, and a list of as many references to it as go into one call on a tape.
    fn place(tape: &mut Tape, ring: Ring, descriptor: u64) -> Requests {
        const IOCB_CMD_POLL: u64 = 5;
        const WRITABLE: u64 = libc::POLLOUT as u64;
        let flags = u64::from((libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).unsigned_abs());
        tape.call("make an event counter", libc::SYS_eventfd2, [0, flags, 0, 0, 0, 0]);
        // `struct iocb`: data; key and flags; operation and descriptor; buffer, which is the events here; the rest is not used.
        let request =
            tape.words(&[MARK, 0, IOCB_CMD_POLL | descriptor << 32, WRITABLE, 0, 0, 0, 0]);
        let list = tape.words(&vec![request; AT_ONCE]);
        Requests { ring, request, list }
    }

    /// Submits requests; fewer, or none, where the context has no room.
    fn submit(self, tape: &mut Tape, count: u32) {
        let mut left = count as usize;
        while left > 0 {
            let now = left.min(AT_ONCE);
            let arguments = [self.ring.start, now as u64, self.list, 0, 0, 0];
            tape.try_call("submit requests", libc::SYS_io_submit, arguments);
            left -= now;
        }
    }

    /// Submits as many requests as go into the ring. Free places wait with the processor that has freed them.
    fn fill(self, tape: &mut Tape, processors: &[u32]) {
        for processor in processors {
            pin(tape, &[*processor]);
            self.submit(tape, self.ring.events);
        }
    }

    /// Takes the completions of these requests out of a ring that had `unread` before, and leaves those of the program's.
    fn take_out(self, process: &Process, unread: &[u8]) -> Result<(), TraceeError> {
        let ring = self.ring;
        let tail = process.read(ring.start + TAIL, 4)?;
        let tail = tail.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)) % ring.events;
        let new = ring.read_events(process, ring.tail, ring.distance(ring.tail, tail))?;
        let mark = [MARK.to_le_bytes(), self.request.to_le_bytes()].concat();
        let foreign = new.chunks_exact(EVENT_BYTES).filter(|event| !event.starts_with(&mark));
        let content = [unread, &foreign.flatten().copied().collect::<Vec<u8>>()].concat();
        let head = ring.after(tail, ring.events - count_of(&content) % ring.events);
        ring.write_events(process, head, &content)?;
        process.write(ring.start + HEAD, &head.to_le_bytes())
    }
}

/// Lets a process write to its own ring, by the number that it has for itself.
#[derive(Clone, Copy, Debug)]
struct Writer {
    ring: Ring,
    own_number: i32,
}

impl Writer {
    /// Has all events before a place read.
    fn set_head(self, tape: &mut Tape, head: u32) {
        let local = tape.data(&head.to_le_bytes());
        self.write(tape, &[(local, 4)], &[(self.ring.start + HEAD, 4)]);
    }

    /// Writes the events that were there, and where they begin.
    fn put_back(self, tape: &mut Tape, unread: &[u8]) {
        let ring = self.ring;
        let events = tape.data(unread);
        let head = tape.data(&ring.head.to_le_bytes());
        let mut to = ring.ranges(ring.head, ring.unread());
        to.push((ring.start + HEAD, 4));
        self.write(tape, &[(events, unread.len()), (head, 4)], &to);
    }

    fn write(self, tape: &mut Tape, from: &[(u64, usize)], to: &[(u64, usize)]) {
        let vectors = |tape: &mut Tape, ranges: &[(u64, usize)]| {
            let words: Vec<u64> =
                ranges.iter().flat_map(|(address, bytes)| [*address, *bytes as u64]).collect();
            (tape.words(&words), ranges.len() as u64)
        };
        let ((local, locals), (remote, remotes)) = (vectors(tape, from), vectors(tape, to));
        let pid = u64::from(self.own_number.unsigned_abs());
        let arguments = [pid, local, locals, remote, remotes, 0];
        tape.call("write to its AIO ring", libc::SYS_process_vm_writev, arguments);
    }
}

/// Makes the context of a ring again, with what nobody has read.
pub(crate) fn restore(
    process: &mut Process,
    mapping: &record::Mapping,
) -> Result<(), RestoreError> {
    let (events, head, tail, unread) = match &mapping.backing {
        Backing::AsynchronousIo { events, head, tail, unread } => (events, head, tail, unread),
        Backing::InheritedRing { content } => return restore_inherited(process, mapping, content),
        _ => return Ok(()),
    };
    let ring = Ring { start: mapping.start, events: *events, head: *head, tail: *tail };
    let sound = (2..=EVENTS_MAX).contains(events)
        && head < events
        && tail < events
        && bytes(*events) == mapping.end - mapping.start
        && unread.len() == ring.unread() as usize * EVENT_BYTES;
    if !sound {
        return Err(RestoreError::Damaged(format!("the AIO ring at {:#x}", mapping.start)));
    }
    set_up(process, mapping)?;
    match Ring::read(process, mapping)? {
        Some(made) if made.events == ring.events => {}
        _ => {
            return Err(RestoreError::Incompatible(format!(
                "its kernel can't make an AIO ring of {events} events"
            )));
        }
    }
    advance(process, ring)?;
    ring.write_events(process, ring.head, unread)?;
    process.write(ring.start + HEAD, &ring.head.to_le_bytes())?;
    Ok(())
}

/// Gives a process a copy of a ring that is not its own; or what raises SIGBUS when it is touched, as the rest of an ended one.
fn restore_inherited(
    process: &mut Process,
    mapping: &record::Mapping,
    content: &[u8],
) -> Result<(), RestoreError> {
    const OWN: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
    const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let bytes = mapping.end - mapping.start;
    if content.is_empty() {
        const SHARED: u64 = (libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE) as u64;
        let descriptor = lowest_free(proc::descriptors(process.pid).map_err(make("an AIO ring"))?);
        let mut tape = process.tape()?;
        let name = tape.data(b"aio\0");
        tape.call("make an empty file", libc::SYS_memfd_create, [name, 0, 0, 0, 0, 0]);
        let arguments = [mapping.start, bytes, RW, SHARED, descriptor, 0];
        tape.call("map the rest of an AIO ring", libc::SYS_mmap, arguments);
        tape.call("close a descriptor", libc::SYS_close, [descriptor, 0, 0, 0, 0, 0]);
        process.run_all(0, &tape, End::Breakpoint)?;
        return Ok(());
    }
    if content.len() as u64 != bytes {
        return Err(RestoreError::Damaged(format!("the AIO ring at {:#x}", mapping.start)));
    }
    let mut tape = process.tape()?;
    let arguments = [mapping.start, bytes, RW, OWN, u64::MAX, 0];
    tape.call("map a copy of an AIO ring", libc::SYS_mmap, arguments);
    process.run_all(0, &tape, End::Breakpoint)?;
    process.write(mapping.start, content)?;
    Ok(())
}

/// Makes a context whose ring has as many pages, and moves it to its place.
fn set_up(process: &mut Process, mapping: &record::Mapping) -> Result<(), RestoreError> {
    const RESERVED: u64 =
        (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
    const MOVE: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    let (start, bytes) = (mapping.start, mapping.end - mapping.start);
    // The kernel takes twice as many and two, and rounds up to pages: the lowest that gives so many pages.
    let wanted = (bytes / PAGE * (PAGE / EVENT_BYTES as u64 / 2)).saturating_sub(65).max(1);
    let mut tape = process.tape()?;
    let context = tape.output(8);
    // So that the kernel does not choose a place that overlaps this one.
    let arguments = [start, bytes, 0, RESERVED, u64::MAX, 0];
    tape.call("reserve room for an AIO ring", libc::SYS_mmap, arguments);
    let arguments = [wanted, context.address, 0, 0, 0, 0];
    tape.call("make an AIO context", libc::SYS_io_setup, arguments);
    process.run_all(0, &tape, End::Breakpoint)?;
    let [made] = crate::process::words(&process.output(context)?);
    let mut tape = process.tape()?;
    let arguments = [made, bytes, bytes, MOVE, start, 0];
    tape.call("move an AIO ring", libc::SYS_mremap, arguments);
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

/// Brings the places where the kernel reads and writes next to where they were, by requests that complete at once.
fn advance(process: &mut Process, ring: Ring) -> Result<(), RestoreError> {
    let what = || make(format!("the AIO context at {:#x}", ring.start));
    let tid = process.threads.first().map_or(process.pid, |thread| thread.tid);
    let affinity = sched::affinity(tid).map_err(what())?;
    let mut at = 0;
    while at != ring.head {
        let count = ring.step().min(ring.head - at);
        if submit(process, ring, count)? != count {
            return Err(what()(io::ErrorKind::Other.into()));
        }
        at += count;
        process.write(ring.start + HEAD, &at.to_le_bytes())?;
    }
    let mut left = ring.unread();
    for processor in &affinity {
        if left > 0 {
            sched::set_affinity(tid, &[*processor]).map_err(what())?;
            left -= submit(process, ring, left)?.min(left);
        }
    }
    sched::set_affinity(tid, &affinity).map_err(what())?;
    if left > 0 {
        return Err(what()(io::ErrorKind::Other.into()));
    }
    Ok(())
}

/// Submits requests that complete at once, and says how many the context took.
fn submit(process: &mut Process, ring: Ring, count: u32) -> Result<u32, RestoreError> {
    let taken = proc::descriptors(process.pid).map_err(make("an AIO context"))?;
    let descriptor = lowest_free(taken);
    let mut tape = process.tape()?;
    let requests = Requests::place(&mut tape, ring, descriptor);
    let before = tape.len();
    requests.submit(&mut tape, count);
    let calls = tape.len() - before;
    tape.call("close a descriptor", libc::SYS_close, [descriptor, 0, 0, 0, 0, 0]);
    let results = process.run_all(0, &tape, End::Breakpoint)?;
    let taken = results.iter().skip(before).take(calls);
    Ok(taken.filter_map(|result| u32::try_from(Call::outcome(*result).ok()?).ok()).sum())
}
