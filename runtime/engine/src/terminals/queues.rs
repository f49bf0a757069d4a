//! What is under way between the two sides of a terminal, taken out and put back.
//!
//! The kernel lets nobody look into the queues of a terminal: what is in there has to be read, and given back by `TIOCSTI`, which
//! appends a byte as if the other side had written it. For a master that is what the slave has written.
//!
//! A line discipline holds [`ROOM`] bytes, which were echoed, edited and divided into lines when they came. Bytes beyond wait behind
//! it as they were written; they are taken out as they are, and written again by the other side if that is in the container.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use samara_capsule::record::{Bytes, LineEnd, OutputStop, TerminalLine, TerminalQueues};
use samara_kernel::tty::{self, Settings};

/// Bytes that a line discipline takes (drivers/tty/n_tty.c: N_TTY_BUF_SIZE, less the one that stays free).
pub(super) const ROOM: usize = 4095;

/// More than a queue holds: beside the line discipline's, some 8192 bytes on the way there (drivers/tty/pty.c,
/// pty_common_install), or the usual limit of a terminal's.
const QUEUE_BYTES_MAX: usize = (64 << 10) + 2 * ROOM;

/// `VLNEXT` and `VEOF` while input is given back: nobody types then.
const QUOTE: u8 = 0x16;
const END: u8 = 0x04;

/// linux/tty.h: events of packet mode.
const PACKET_FLUSH_READ: u8 = 1;
const PACKET_FLUSH_WRITE: u8 = 2;
const PACKET_START: u8 = 8;
const PACKET_NO_STOP: u8 = 16;

/// Takes out all that is queued and puts it back, so that nothing has changed in the end.
///
/// `slave` is a description of our own that does not block; none where nobody has opened the slave yet. Returns the queues, and
/// the events that wait in packet mode.
pub(super) fn copy(
    slave: Option<BorrowedFd<'_>>,
    master: Option<BorrowedFd<'_>>,
    settings: &Settings,
    packet: bool,
) -> io::Result<(TerminalQueues, Option<u8>)> {
    let mut events = None;
    if let (Some(master), true) = (master, packet) {
        events = Some(take_events(master)?);
        // While it is on, what happens here would be told.
        tty::set_packet(master, false)?;
    }
    let mut queues = TerminalQueues::default();
    if let Some(slave) = slave {
        queues.stopped = start(slave, settings)?;
        (queues.input, queues.raw_input) = divide(take_input(slave, settings)?);
    }
    // After the input, which is echoed when it arrives.
    if let Some(master) = master {
        queues.output = Bytes::from(take_output(master)?);
    }
    put(slave, master, settings, &queues, events)?;
    Ok((queues, events))
}

/// Fills the empty queues of a terminal, and gives it its settings.
pub(super) fn put(
    slave: Option<BorrowedFd<'_>>,
    master: Option<BorrowedFd<'_>>,
    settings: &Settings,
    queues: &TerminalQueues,
    events: Option<u8>,
) -> io::Result<()> {
    let Some(slave) = slave else {
        if let Some(master) = master {
            tty::set_settings(master, settings)?;
            tty::set_packet(master, events.is_some())?;
        }
        return Ok(());
    };
    tty::set_settings(slave, &quiet(settings))?;
    if let (Some(master), Some(events)) = (master, events) {
        tty::set_packet(master, true)?;
        raise_before(slave, events)?;
    }
    put_input(slave, settings, &queues.input)?;
    if let Some(master) = master {
        put_output(slave, master, settings, &queues.output)?;
    }
    tty::set_settings(slave, settings)?;
    if let Some(events) = events {
        raise_after(slave, settings, events)?;
    }
    if let Some(master) = master {
        write_all(master, &queues.raw_input)?;
    }
    match queues.stopped {
        OutputStop::Running => Ok(()),
        OutputStop::Call => tty::stop_output(slave),
        OutputStop::Character => stop_by_character(slave, settings),
    }
}

fn is_canonical(settings: &Settings) -> bool {
    settings.local & libc::ICANON != 0 && settings.local & libc::EXTPROC == 0
}

/// Settings under which input arrives as it is. What tells master and queue of a change stays: canonical mode, flow control.
fn quiet(settings: &Settings) -> Settings {
    let mut quiet = *settings;
    quiet.input &= libc::IXON;
    quiet.output = 0;
    quiet.local &= libc::ICANON | libc::EXTPROC;
    quiet.local |= libc::IEXTEN;
    for (index, character) in quiet.characters.iter_mut().enumerate() {
        if ![libc::VSTART, libc::VSTOP].contains(&index) {
            *character = 0;
        }
    }
    set_character(&mut quiet, libc::VMIN, 1);
    quiet
}

fn character(settings: &Settings, index: usize) -> u8 {
    settings.characters.get(index).copied().unwrap_or(0)
}

fn set_character(settings: &mut Settings, index: usize, value: u8) {
    if let Some(place) = settings.characters.get_mut(index) {
        *place = value;
    }
}

/// Lets output that was stopped go on, and returns what had stopped it.
fn start(slave: BorrowedFd<'_>, settings: &Settings) -> io::Result<OutputStop> {
    if is_ready(slave, PollFlags::OUT)? {
        return Ok(OutputStop::Running);
    }
    if settings.input & libc::IXON != 0 {
        // The end of flow control starts what a character has stopped, and only that.
        let without = Settings { input: settings.input & !libc::IXON, ..*settings };
        tty::set_settings(slave, &without)?;
        let started = is_ready(slave, PollFlags::OUT)?;
        tty::set_settings(slave, settings)?;
        if started {
            return Ok(OutputStop::Character);
        }
    }
    tty::start_output(slave)?;
    // If it still does not go on, nobody reads it.
    Ok(if is_ready(slave, PollFlags::OUT)? { OutputStop::Call } else { OutputStop::Running })
}

fn stop_by_character(slave: BorrowedFd<'_>, settings: &Settings) -> io::Result<()> {
    let mut stop = character(settings, libc::VSTOP);
    if stop == 0 || settings.input & libc::IXON == 0 {
        // The character was another one then.
        stop = 0x13;
        let mut with = Settings { input: settings.input | libc::IXON, ..*settings };
        set_character(&mut with, libc::VSTOP, stop);
        tty::set_settings(slave, &with)?;
    }
    tty::push(slave, stop)?;
    tty::set_settings(slave, settings)
}

fn take_input(slave: BorrowedFd<'_>, settings: &Settings) -> io::Result<Vec<TerminalLine>> {
    let mut lines = Vec::new();
    // Nothing may happen to what comes after it from behind.
    let mut quiet = quiet(settings);
    tty::set_settings(slave, &quiet)?;
    if is_canonical(settings) {
        while let Some(text) = read_once(slave)? {
            let end = match text.last() {
                Some(b'\n') => LineEnd::NewLine,
                Some(last) if *last != 0 && ends_lines(settings, *last) => LineEnd::Character,
                Some(_) | None => LineEnd::EndOfFile,
            };
            lines.push(TerminalLine { text: Bytes::from(text), end });
        }
        // What no end was typed for is readable without lines only.
        quiet.local &= !libc::ICANON;
        tty::set_settings(slave, &quiet)?;
    }
    let mut rest = Vec::new();
    while let Some(text) = read_once(slave)?.filter(|text| !text.is_empty()) {
        rest.extend(text);
    }
    if !rest.is_empty() {
        lines.push(TerminalLine { text: Bytes::from(rest), end: LineEnd::Open });
    }
    Ok(lines)
}

/// Divides input into what the line discipline had processed, and the rest.
fn divide(lines: Vec<TerminalLine>) -> (Vec<TerminalLine>, Bytes) {
    let mut input = Vec::new();
    let mut rest = Bytes::new();
    let mut room = ROOM;
    for mut line in lines {
        // The end of a file takes a place too.
        let places = line.text.len() + usize::from(line.end == LineEnd::EndOfFile);
        if places <= room {
            room -= places;
            input.push(line);
            continue;
        }
        rest.extend(line.text.split_off(room));
        if room > 0 {
            input.push(TerminalLine { text: line.text, end: LineEnd::Open });
        }
        room = 0;
    }
    (input, rest)
}

fn ends_lines(settings: &Settings, byte: u8) -> bool {
    [libc::VEOL, libc::VEOL2].iter().any(|index| character(settings, *index) == byte)
}

/// What one read returns; nothing if it would wait.
fn read_once(tty: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = vec![0; 2 * ROOM];
    match rustix::io::read(tty, &mut buffer) {
        Ok(count) => {
            buffer.truncate(count);
            Ok(Some(buffer))
        }
        Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads what a master would. Its description is the container's, and may block.
fn take_output(master: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    while output.len() < QUEUE_BYTES_MAX && is_ready(master, PollFlags::IN)? {
        match read_once(master)? {
            Some(text) if !text.is_empty() => output.extend(text),
            Some(_) | None => break,
        }
    }
    Ok(output)
}

fn take_events(master: BorrowedFd<'_>) -> io::Result<u8> {
    if !is_ready(master, PollFlags::PRI)? {
        return Ok(0);
    }
    let mut event = [0; 1];
    rustix::io::read(master, &mut event)?;
    let [event] = event;
    Ok(event)
}

/// Gives input back under [`quiet`] settings.
fn put_input(slave: BorrowedFd<'_>, settings: &Settings, lines: &[TerminalLine]) -> io::Result<()> {
    let quiet = quiet(settings);
    let canonical = is_canonical(settings);
    let flow = [libc::VSTART, libc::VSTOP].map(|index| character(&quiet, index));
    let is_flow = |byte: u8| quiet.input & libc::IXON != 0 && byte != 0 && flow.contains(&byte);
    let mut quoting = quiet;
    set_character(&mut quoting, libc::VLNEXT, QUOTE);
    for line in lines {
        let mut text = line.text.as_slice();
        let mut last = None;
        if let (LineEnd::NewLine | LineEnd::Character, [before @ .., end]) = (line.end, text) {
            (text, last) = (before, Some(*end));
        }
        for &byte in text {
            let needs_quote = canonical && (byte == b'\n' || is_flow(byte));
            if needs_quote {
                tty::set_settings(slave, &quoting)?;
                tty::push(slave, QUOTE)?;
                tty::push(slave, byte)?;
                tty::set_settings(slave, &quiet)?;
            } else if is_flow(byte) {
                let without = Settings { input: 0, ..quiet };
                tty::set_settings(slave, &without)?;
                tty::push(slave, byte)?;
                tty::set_settings(slave, &quiet)?;
            } else {
                tty::push(slave, byte)?;
            }
        }
        let mut ending = quiet;
        match (line.end, last) {
            (LineEnd::Open, _) => {}
            (LineEnd::NewLine, _) => tty::push(slave, b'\n')?,
            (LineEnd::Character, Some(end)) => {
                set_character(&mut ending, libc::VEOL, end);
                tty::set_settings(slave, &ending)?;
                tty::push(slave, end)?;
                tty::set_settings(slave, &quiet)?;
            }
            (LineEnd::EndOfFile, _) | (LineEnd::Character, None) => {
                set_character(&mut ending, libc::VEOF, END);
                tty::set_settings(slave, &ending)?;
                tty::push(slave, END)?;
                tty::set_settings(slave, &quiet)?;
            }
        }
    }
    Ok(())
}

/// Lets a master have what the slave has written. The slave has [`quiet`] settings.
fn put_output(
    slave: BorrowedFd<'_>,
    master: BorrowedFd<'_>,
    settings: &Settings,
    output: &[u8],
) -> io::Result<()> {
    let (first, rest) = output.split_at(output.len().min(ROOM));
    for byte in first {
        tty::push(master, *byte)?;
    }
    if !rest.is_empty() {
        // Not what the settings would make of it once more.
        tty::set_settings(slave, &quiet(settings))?;
        write_all(slave, rest)?;
    }
    Ok(())
}

/// Writes what there was room for before it was taken out. The kernel makes that room again in a thread of its own, which may have
/// to wait for a processor.
fn write_all(tty: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    /// What fits when there is room at all, more or less: a description that blocks must not.
    const AT_ONCE: usize = 256;
    const ROOM_MAX: Duration = Duration::from_secs(2);
    let deadline = Instant::now() + ROOM_MAX;
    for mut part in bytes.chunks(AT_ONCE) {
        while !part.is_empty() {
            if !is_ready(tty, PollFlags::OUT)? {
                if Instant::now() > deadline {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            let count = rustix::io::write(tty, part)?;
            part = part.get(count..).unwrap_or_default();
        }
    }
    Ok(())
}

/// Events that come of what must not happen to a filled queue.
fn raise_before(slave: BorrowedFd<'_>, events: u8) -> io::Result<()> {
    if events & PACKET_FLUSH_READ != 0 {
        tty::flush(slave, libc::TCIFLUSH)?;
    }
    if events & PACKET_FLUSH_WRITE != 0 {
        tty::flush(slave, libc::TCOFLUSH)?;
    }
    if events & PACKET_START != 0 {
        tty::stop_output(slave)?;
        tty::start_output(slave)?;
    }
    Ok(())
}

/// Events that tell of the settings: that flow control begins to use the usual characters, or ends.
fn raise_after(slave: BorrowedFd<'_>, settings: &Settings, events: u8) -> io::Result<()> {
    const PACKET_DO_STOP: u8 = 32;
    let mut usual = Settings { input: settings.input | libc::IXON, ..*settings };
    set_character(&mut usual, libc::VSTART, 0x11);
    set_character(&mut usual, libc::VSTOP, 0x13);
    let without = Settings { input: settings.input & !libc::IXON, ..*settings };
    let via = match events & (PACKET_NO_STOP | PACKET_DO_STOP) {
        PACKET_NO_STOP => usual,
        PACKET_DO_STOP => without,
        _ => return Ok(()),
    };
    tty::set_settings(slave, &via)?;
    tty::set_settings(slave, settings)
}

pub(super) fn is_ready(tty: impl AsFd, events: PollFlags) -> io::Result<bool> {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut polled = [PollFd::new(&tty, events)];
    poll(&mut polled, Some(&now))?;
    let [polled] = polled;
    Ok(polled.revents().intersects(events))
}

/// Whether a master has no slave any more.
pub(super) fn is_hung_up(master: &OwnedFd) -> io::Result<bool> {
    is_ready(master, PollFlags::HUP)
}
