//! Terminals: the container's own, and pseudo-terminals that programs have made.
//!
//! The container's own terminal has its master with whoever runs the container, and is made anew by them; the engine gives it the
//! settings, size and input of the old one. Others are made anew with the number that they had, since programs know their
//! terminals by name. Sessions get their controlling terminal right after they have begun, so that members inherit it.
//!
//! To read a queue is to empty it, see [`queues`]. It is done last, when nothing stands against a save any more, and in a process
//! of its own, which ends the work when somebody kills the engine.
//!
//! What is absent: what the program had written to the container's own terminal, which whoever holds the master has or will get.

mod queues;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use samara_capsule::cbor::{decode_record, encode_record};
use samara_capsule::record::{
    Bytes, Container, FileKind, Master, ProcessState, Terminal, TerminalQueues, TerminalSettings,
};
use samara_kernel::pidfd::PidFd;
use samara_kernel::tape::End;
use samara_kernel::tty::{self, Settings, Size};
use samara_kernel::{Pid, fork, proc};

use crate::capture::{CaptureError, OutsideStream, Tables, index, inner_pid, read};
use crate::descriptors::{Found, set_flags};
use crate::restore::{RestoreError, Tree, make, open_checked};
use crate::root::Root;
use crate::unsupported::Place;

/// Device numbers (Documentation/admin-guide/devices.txt).
const CONTROLLING: (u32, u32) = (5, 0);
const CONSOLE: (u32, u32) = (5, 1);
const MULTIPLEXER: (u32, u32) = (5, 2);
const SLAVE_MAJOR: u32 = 136;
const VIRTUAL_MAJOR: u32 = 4;
/// From this minor number on, devices of [`VIRTUAL_MAJOR`] are serial lines.
const SERIAL_MINOR: u32 = 64;

const MULTIPLEXER_PATH: &[u8] = b"/dev/pts/ptmx";

/// How the engine opens a slave for itself.
const OWN_FLAGS: i32 = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;

/// A terminal that a descriptor or a process has led to.
#[derive(Debug)]
pub(crate) struct Noted {
    number: u32,
    /// Who led to it first.
    holder: (Pid, Place),
    master: Option<OwnedFd>,
    /// A process of the container has the slave open.
    open: bool,
    /// It is the container's own.
    own: bool,
    /// It is hung up for ever.
    closed: bool,
    slave: Option<OwnedFd>,
    record: Option<Terminal>,
}

fn device_of(metadata: &fs::Metadata) -> (u32, u32) {
    (libc::major(metadata.rdev()), libc::minor(metadata.rdev()))
}

fn slave_path(number: u32) -> String {
    format!("/dev/pts/{number}")
}

/// What a descriptor of a terminal refers to, or why it can't be saved. `None`: it is no terminal, or a stream from outside.
pub(crate) fn note(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Option<Result<FileKind, String>>, CaptureError> {
    let (device, inode) = found.identity();
    let is_outside = tables.request.outside.contains(&OutsideStream { device, inode });
    let number = device_of(found.metadata);
    let name = String::from_utf8_lossy(found.target).into_owned();
    let kind = match number {
        MULTIPLEXER => note_master(found, tables)?,
        CONTROLLING => note_controlling(found, tables)?,
        (SLAVE_MAJOR, number) => match note_slave(found, number, is_outside, tables)? {
            None if is_outside => return Ok(None),
            None => Err(format!("{name} is a terminal outside of the container")),
            Some(kind) => kind,
        },
        _ if is_outside => return Ok(None),
        CONSOLE => Err(format!("{name} is the console of its machine, which is not supported")),
        (VIRTUAL_MAJOR, SERIAL_MINOR..) => {
            Err(format!("{name} is a serial line, which is not supported"))
        }
        (VIRTUAL_MAJOR, _) => Err(format!("{name} is a virtual terminal, which is not supported")),
        _ => return Ok(None),
    };
    Ok(Some(kind))
}

fn note_master(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    if tables.root.identity(found.target).ok() != Some(found.identity()) {
        return Ok(Err("the master of a terminal outside of the container".to_owned()));
    }
    let master = found.borrow()?;
    let number = tty::number(&master).map_err(read(found.link))?;
    let (terminal, noted) = tables.terminals.entry(number, found);
    noted.master = Some(master);
    Ok(Ok(FileKind::TerminalMaster { terminal, path: Bytes::from(found.target.to_vec()) }))
}

/// `None`: it is in another devpts than the container's.
fn note_slave(
    found: &Found<'_>,
    number: u32,
    is_outside: bool,
    tables: &mut Tables<'_>,
) -> Result<Option<Result<FileKind, String>>, CaptureError> {
    let slave = found.borrow()?;
    let hung_up = tty::settings(&slave).is_err_and(|error| is_io_error(&error));
    let usual = slave_path(number).into_bytes();
    let here = tables.root.identity(&usual).ok() == Some(found.identity());
    let path = |path: &[u8]| Bytes::from(path.to_vec());
    if hung_up && is_outside {
        // Whoever had its master is gone; the new container has another one.
        return Ok(None);
    }
    if hung_up {
        if here {
            let what = "it was hung up, and its terminal lives, which is not supported";
            return Ok(Some(Err(what.to_owned())));
        }
        let (terminal, noted) = tables.terminals.entry(number, found);
        noted.closed = true;
        return Ok(Some(Ok(FileKind::Terminal { terminal, path: path(&usual) })));
    }
    if !here {
        return Ok(None);
    }
    // /dev/console is the same device, by another name.
    let by_name = tables.root.identity(found.target).ok() == Some(found.identity());
    let name = if by_name { path(found.target) } else { path(&usual) };
    let (terminal, noted) = tables.terminals.entry(number, found);
    noted.open = true;
    noted.own |= is_outside;
    Ok(Some(Ok(FileKind::Terminal { terminal, path: name })))
}

fn note_controlling(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let tty = found.borrow()?;
    let number = match tty::device(&tty) {
        Ok((SLAVE_MAJOR, number)) => number,
        Ok(_) => {
            let what =
                "its controlling terminal is a device of its machine, which is not supported";
            return Ok(Err(what.to_owned()));
        }
        Err(error) if is_io_error(&error) => {
            let what =
                "/dev/tty is open and leads to a terminal that was hung up, which is not supported";
            return Ok(Err(what.to_owned()));
        }
        Err(error) => return Err(read(found.link)(error)),
    };
    if tables.root.identity(found.target).ok() != Some(found.identity()) {
        return Ok(Err("/dev/tty is open, but no longer at its path".to_owned()));
    }
    let own = is_own(number, tables);
    let (terminal, noted) = tables.terminals.entry(number, found);
    noted.open = true;
    noted.own |= own;
    Ok(Ok(FileKind::Terminal { terminal, path: Bytes::from(found.target.to_vec()) }))
}

fn is_own(number: u32, tables: &Tables<'_>) -> bool {
    tables.root.identity(slave_path(number).as_bytes()).is_ok_and(|(device, inode)| {
        tables.request.outside.contains(&OutsideStream { device, inode })
    })
}

fn is_io_error(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

/// The terminals that were found. Their order is that of the records.
#[derive(Debug, Default)]
pub(crate) struct Terminals(Vec<Noted>);

impl Terminals {
    fn entry(&mut self, number: u32, found: &Found<'_>) -> (u32, &mut Noted) {
        self.entry_of(number, (found.pid, Place::Descriptor(found.fd)))
    }

    /// A number is free again when nobody has the terminal open any more.
    fn entry_of(&mut self, number: u32, holder: (Pid, Place)) -> (u32, &mut Noted) {
        let position = self.0.iter().position(|it| it.number == number);
        let position = position.unwrap_or_else(|| {
            self.0.push(Noted {
                number,
                holder,
                master: None,
                open: false,
                own: false,
                closed: false,
                slave: None,
                record: None,
            });
            self.0.len() - 1
        });
        (index(position), self.0.get_mut(position).expect("it is there or was just added"))
    }
}

/// Process groups and controlling terminals of all processes.
struct Control {
    /// Numbers of groups in the container, by the engine's.
    groups: BTreeMap<i32, i32>,
    /// By terminal number: members by their number in the container, session, and foreground group as the engine numbers it.
    terminals: BTreeMap<u32, (Vec<i32>, i32, i32)>,
}

/// Completes what is known of the terminals but their queues, and notes those that can't be saved.
///
/// `pids` are all processes that live, `zombies` those that are in groups only.
pub(crate) fn resolve(
    pids: &[Pid],
    zombies: &[Pid],
    tables: &mut Tables<'_>,
) -> Result<(), CaptureError> {
    let control = control(pids, zombies, tables)?;
    let mut terminals = std::mem::take(&mut tables.terminals);
    for noted in &mut terminals.0 {
        if noted.closed {
            noted.record = Some(unknown(noted.number, Master::Closed));
            continue;
        }
        let described = describe(noted, &control, tables)
            .map_err(read(format!("the terminal {}", slave_path(noted.number))))?;
        match described {
            Ok(record) => noted.record = Some(record),
            Err(what) => {
                let what = format!("{} {what}", slave_path(noted.number));
                tables.refuse(noted.holder.0, noted.holder.1, what);
            }
        }
    }
    tables.terminals = terminals;
    Ok(())
}

fn control(
    pids: &[Pid],
    zombies: &[Pid],
    tables: &mut Tables<'_>,
) -> Result<Control, CaptureError> {
    let mut control = Control { groups: BTreeMap::new(), terminals: BTreeMap::new() };
    let last = |list: Vec<i32>| list.last().copied().unwrap_or(0);
    for pid in pids.iter().chain(zombies) {
        let what = || read(format!("process {pid} in /proc"));
        let stat = proc::stat(*pid).map_err(what())?;
        let status = proc::status(*pid).map_err(what())?;
        control.groups.insert(stat.pgrp, last(status.nspgid));
        let device = u64::from(stat.tty_nr.cast_unsigned());
        if device == 0 || !pids.contains(pid) {
            continue;
        }
        let (major, number) = (libc::major(device), libc::minor(device));
        let known = tables.terminals.0.iter().any(|it| it.number == number && !it.closed);
        if major != SLAVE_MAJOR || !known && !is_own(number, tables) {
            let what = "its controlling terminal is outside of the container";
            tables.refuse(*pid, Place::Process, what);
            continue;
        }
        let own = is_own(number, tables);
        let (_, noted) = tables.terminals.entry_of(number, (*pid, Place::Process));
        noted.own |= own;
        let entry = control.terminals.entry(number).or_insert((Vec::new(), 0, 0));
        entry.0.push(inner_pid(*pid).map_err(what())?);
        entry.1 = last(status.nssid);
        entry.2 = stat.tpgid;
    }
    Ok(control)
}

/// A terminal of which nothing is known yet.
fn unknown(number: u32, master: Master) -> Terminal {
    Terminal {
        number,
        master,
        settings: TerminalSettings::default(),
        size: [0; 4],
        owner: (0, 0),
        mode: 0,
        session: 0,
        foreground: 0,
        members: Vec::new(),
        opened: true,
        locked: false,
        exclusive: false,
        packet: None,
        queues: TerminalQueues::default(),
    }
}

/// The record of a terminal without its queues, or why it can't be saved.
fn describe(
    noted: &mut Noted,
    control: &Control,
    tables: &Tables<'_>,
) -> io::Result<Result<Terminal, String>> {
    let path = slave_path(noted.number);
    let master = if noted.master.is_some() { Master::Inside } else { Master::Outside };
    let mut record = unknown(noted.number, master);
    if let Some(master) = &noted.master {
        // Opening the slave of a master for the first time could not be undone.
        record.opened = noted.open || queues::is_hung_up(master)?;
        record.locked = tty::is_locked(master)?;
        record.packet = tty::is_packet(master)?.then_some(0);
        if record.opened {
            if record.locked {
                tty::set_locked(master, false)?;
            }
            let slave = tty::peer(master, OWN_FLAGS);
            if record.locked {
                tty::set_locked(master, true)?;
            }
            noted.slave = Some(slave?);
        }
    } else if noted.own {
        noted.slave = Some(tables.root.open(path.as_bytes(), OWN_FLAGS)?);
    } else {
        return Ok(Err("has its other side outside of the container only".to_owned()));
    }
    let (Some(tty), metadata) = (
        noted.slave.as_ref().or(noted.master.as_ref()),
        File::from(tables.root.open(path.as_bytes(), libc::O_PATH)?).metadata()?,
    ) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    if tty::discipline(tty)? != 0 {
        return Ok(Err("has a line discipline that is not supported".to_owned()));
    }
    if tty::has_locked_settings(tty)? {
        return Ok(Err("has locked settings, which are not supported".to_owned()));
    }
    let settings = tty::settings(tty)?;
    if let Some(slave) = &noted.slave {
        record.exclusive = tty::is_exclusive(slave)?;
        // What waits behind a full line discipline could not be written again. A line that has no end yet is not counted.
        if noted.master.is_none() && tty::readable(slave)? > queues::ROOM / 2 {
            return Ok(Err("has more input waiting than can be saved".to_owned()));
        }
    }
    record.settings = to_record(&settings);
    let size = tty::size(tty)?;
    record.size = [size.rows, size.columns, size.x_pixels, size.y_pixels];
    record.owner = (metadata.uid(), metadata.gid());
    record.mode = metadata.mode() & 0o7777;
    if let Some((members, session, foreground)) = control.terminals.get(&noted.number) {
        record.members.clone_from(members);
        record.session = *session;
        // A group that has no members any more is no longer to be found.
        record.foreground = control.groups.get(foreground).copied().unwrap_or(0);
    }
    Ok(Ok(record))
}

fn to_record(settings: &Settings) -> TerminalSettings {
    TerminalSettings {
        input: settings.input,
        output: settings.output,
        control: settings.control,
        local: settings.local,
        line: settings.line,
        characters: Bytes::from(settings.characters.to_vec()),
        input_speed: settings.input_speed,
        output_speed: settings.output_speed,
    }
}

fn from_record(record: &TerminalSettings) -> Settings {
    let mut characters = [0; 19];
    for (place, character) in characters.iter_mut().zip(record.characters.iter()) {
        *place = *character;
    }
    Settings {
        input: record.input,
        output: record.output,
        control: record.control,
        local: record.local,
        line: record.line,
        characters,
        input_speed: record.input_speed,
        output_speed: record.output_speed,
    }
}

/// The records of all terminals with what their queues hold, which are as before.
pub(crate) fn collect(tables: &mut Tables<'_>) -> Result<Vec<Terminal>, CaptureError> {
    let noted = std::mem::take(&mut tables.terminals).0;
    if noted.is_empty() {
        return Ok(Vec::new());
    }
    let what = "what is queued on the container's terminals";
    let answer = fork::aside(|| {
        let copied: Result<Vec<_>, String> =
            noted.iter().map(|noted| copy(noted).map_err(|error| error.to_string())).collect();
        encode_record(&copied).unwrap_or_default()
    })
    .map_err(read(what))?;
    let copied: Result<Vec<(TerminalQueues, Option<u8>)>, String> =
        decode_record(&answer).map_err(io::Error::other).map_err(read(what))?;
    let copied = copied.map_err(io::Error::other).map_err(read(what))?;
    let records = noted.into_iter().filter_map(|noted| noted.record).zip(copied);
    Ok(records.map(|(record, (queues, packet))| Terminal { queues, packet, ..record }).collect())
}

fn copy(noted: &Noted) -> io::Result<(TerminalQueues, Option<u8>)> {
    let (false, Some(record)) = (noted.closed, &noted.record) else {
        return Ok((TerminalQueues::default(), None));
    };
    let settings = from_record(&record.settings);
    let slave = noted.slave.as_ref().map(OwnedFd::as_fd);
    let master = noted.master.as_ref().map(OwnedFd::as_fd);
    queues::copy(slave, master, &settings, record.packet.is_some())
}

/// The terminals of a container that is being restored.
#[derive(Debug, Default)]
pub(crate) struct Made {
    terminals: Vec<MadeTerminal>,
    /// Open file descriptions by index into [`Container::files`].
    files: BTreeMap<u32, OwnedFd>,
}

#[derive(Debug, Default)]
struct MadeTerminal {
    /// The engine's own, which keeps the terminal from being hung up.
    slave: Option<OwnedFd>,
    master: Option<OwnedFd>,
    /// The size that whoever runs the new container has given it.
    new_size: Option<Size>,
}

fn what(number: u32) -> String {
    format!("the terminal {}", slave_path(number))
}

/// Makes all terminals, and those open file descriptions that need no process to be opened.
///
/// `outside` are the new container's own standard streams.
pub(crate) fn restore(
    container: &Container,
    root: &Root,
    outside: &[Option<OwnedFd>],
) -> Result<Made, RestoreError> {
    check(container)?;
    let mut made = Made::default();
    made.terminals.resize_with(container.terminals.len(), MadeTerminal::default);
    let mut order: Vec<(u32, &Terminal)> = (0u32..).zip(&container.terminals).collect();
    order.sort_by_key(|(_, record)| record.number);
    // Opened for the numbers in between only.
    let mut fillers = Vec::new();
    for (terminal, record) in order {
        let result = match record.master {
            Master::Closed => {
                made.make_closed(terminal, record, container, root, &mut fillers)?;
                continue;
            }
            Master::Inside => make_pair(terminal, record, container, root, &mut fillers)?,
            Master::Outside => find_own(record, root, outside)?,
        };
        let (mut one, file) = result;
        one.furnish(record, root).map_err(make(what(record.number)))?;
        made.files.extend(file);
        if let Some(place) = made.terminals.get_mut(terminal as usize) {
            *place = one;
        }
    }
    Ok(made)
}

/// Refuses records that no capture makes.
fn check(container: &Container) -> Result<(), RestoreError> {
    let damaged = |what: &str| Err(RestoreError::Damaged(what.to_owned()));
    let mut numbers = BTreeSet::new();
    let mut sessions = BTreeSet::new();
    for record in &container.terminals {
        if !numbers.insert(record.number) {
            return damaged("two terminals have the same number");
        }
        if record.session != 0 && (!sessions.insert(record.session) || !record.opened) {
            return damaged("a session has two terminals, or one that nobody has opened");
        }
    }
    let mut masters = BTreeSet::new();
    for file in &container.files {
        let (FileKind::Terminal { terminal, .. } | FileKind::TerminalMaster { terminal, .. }) =
            &file.kind
        else {
            continue;
        };
        let Some(record) = container.terminals.get(*terminal as usize) else {
            return damaged("an open file refers to a terminal that is not there");
        };
        let is_master = matches!(file.kind, FileKind::TerminalMaster { .. });
        if is_master && (record.master != Master::Inside || !masters.insert(*terminal)) {
            return damaged("a terminal has two masters, or one that it can't have");
        }
        if !is_master && !record.opened {
            return damaged("a terminal is open that nobody has opened");
        }
    }
    let inside = container.terminals.iter().filter(|it| it.master == Master::Inside).count();
    if inside == masters.len() { Ok(()) } else { damaged("a terminal has no master") }
}

/// Makes a pair with this number. What was opened on the way to it goes to `fillers`.
fn open_numbered(
    root: &Root,
    path: &[u8],
    flags: i32,
    wanted: u32,
    fillers: &mut Vec<OwnedFd>,
) -> Result<OwnedFd, RestoreError> {
    loop {
        let (master, number) = open_master(root, path, flags)?;
        if number == wanted {
            return Ok(master);
        }
        // The kernel gives the lowest free number.
        if number > wanted {
            let source = io::ErrorKind::AddrInUse.into();
            return Err(RestoreError::Make { what: what(wanted), source });
        }
        fillers.push(master);
    }
}

/// Makes a new pair; the slave can be opened.
fn open_master(root: &Root, path: &[u8], flags: i32) -> Result<(OwnedFd, u32), RestoreError> {
    let expected = |metadata: &fs::Metadata| device_of(metadata) == MULTIPLEXER;
    open_checked(root, path, libc::O_PATH, &expected)?;
    let opened = || -> io::Result<(OwnedFd, u32)> {
        let master = root.open(path, flags | libc::O_NOCTTY)?;
        tty::set_locked(&master, false)?;
        let number = tty::number(&master)?;
        Ok((master, number))
    };
    opened().map_err(make("a pseudo-terminal"))
}

fn make_pair(
    terminal: u32,
    record: &Terminal,
    container: &Container,
    root: &Root,
    fillers: &mut Vec<OwnedFd>,
) -> Result<(MadeTerminal, Option<(u32, OwnedFd)>), RestoreError> {
    let file = (0u32..).zip(&container.files).find_map(|(number, file)| match &file.kind {
        FileKind::TerminalMaster { terminal: of, path } if *of == terminal => {
            Some((number, file.flags, path))
        }
        _ => None,
    });
    let Some((file, flags, path)) = file else {
        return Err(RestoreError::Damaged("a terminal has no master".to_owned()));
    };
    let master = open_numbered(root, path, flags, record.number, fillers)?;
    set_flags(&master, flags)?;
    let made = || -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        let slave = record.opened.then(|| tty::peer(&master, OWN_FLAGS)).transpose()?;
        Ok((master.try_clone()?, slave))
    };
    let (ours, slave) = made().map_err(make(what(record.number)))?;
    let made = MadeTerminal { slave, master: Some(ours), new_size: None };
    Ok((made, Some((file, master))))
}

/// The new container's own terminal.
fn find_own(
    record: &Terminal,
    root: &Root,
    outside: &[Option<OwnedFd>],
) -> Result<(MadeTerminal, Option<(u32, OwnedFd)>), RestoreError> {
    let path = slave_path(record.number);
    let here = root.identity(path.as_bytes()).ok();
    let identity = |file: &OwnedFd| {
        let metadata = File::from(file.try_clone().ok()?).metadata().ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    if here.is_none() || !outside.iter().flatten().any(|stream| identity(stream) == here) {
        return Err(RestoreError::Incompatible(format!(
            "it was saved with the terminal {path}; start it with one (docker: -t)"
        )));
    }
    let opened = || -> io::Result<MadeTerminal> {
        let slave = root.open(path.as_bytes(), OWN_FLAGS)?;
        let size = tty::size(&slave)?;
        let new_size = ((size.rows, size.columns) != (0, 0)).then_some(size);
        Ok(MadeTerminal { slave: Some(slave), master: None, new_size })
    };
    Ok((opened().map_err(make(what(record.number)))?, None))
}

impl MadeTerminal {
    fn furnish(&mut self, record: &Terminal, root: &Root) -> io::Result<()> {
        let slave = self.slave.as_ref().map(OwnedFd::as_fd);
        let master = self.master.as_ref().map(OwnedFd::as_fd);
        let Some(tty) = slave.or(master) else { return Ok(()) };
        queues::put(slave, master, &from_record(&record.settings), &record.queues, record.packet)?;
        let [rows, columns, x_pixels, y_pixels] = record.size;
        tty::set_size(tty, &Size { rows, columns, x_pixels, y_pixels })?;
        let node = root.open(slave_path(record.number).as_bytes(), libc::O_PATH)?;
        let link = format!("/proc/self/fd/{}", node.as_raw_fd());
        let (user, group) = record.owner;
        std::os::unix::fs::chown(&link, Some(user), Some(group))?;
        fs::set_permissions(link, fs::Permissions::from_mode(record.mode & 0o7777))
    }
}

impl Made {
    /// Opens all slaves of a terminal that is hung up, and hangs it up.
    fn make_closed(
        &mut self,
        terminal: u32,
        record: &Terminal,
        container: &Container,
        root: &Root,
        fillers: &mut Vec<OwnedFd>,
    ) -> Result<(), RestoreError> {
        let master = open_numbered(root, MULTIPLEXER_PATH, libc::O_RDWR, record.number, fillers)?;
        for (number, file) in (0u32..).zip(&container.files) {
            if matches!(&file.kind, FileKind::Terminal { terminal: of, .. } if *of == terminal) {
                let slave = tty::peer(&master, file.flags | libc::O_NOCTTY)
                    .map_err(make(what(record.number)))?;
                set_flags(&slave, file.flags)?;
                self.files.insert(number, slave);
            }
        }
        Ok(())
    }

    /// Gives a process that has just begun a session the terminal that the session had.
    pub(crate) fn take_control(
        &self,
        pid: i32,
        container: &Container,
        tree: &mut Tree,
    ) -> Result<(), RestoreError> {
        match self.of_session(pid, container) {
            None => Ok(()),
            Some(slave) => call(tree, pid, slave, "take its terminal", libc::TIOCSCTTY, 0),
        }
    }

    /// As [`Made::take_control`], for the blank init, which may have been given the container's own terminal.
    pub(crate) fn take_control_of_init(
        &self,
        container: &Container,
        tree: &mut Tree,
    ) -> Result<(), RestoreError> {
        let init = tree.process(1)?.pid;
        let stat = proc::stat(init).map_err(make("the terminal of the blank init"))?;
        if stat.tty_nr != 0 {
            let device = u64::from(stat.tty_nr.cast_unsigned());
            let wanted = container.terminals.iter().any(|record| {
                record.session == 1
                    && record.master == Master::Outside
                    && record.number == libc::minor(device)
            });
            if wanted {
                return Ok(());
            }
            let own = tree.outside.iter().flatten().find(|file| tty::settings(file).is_ok());
            let own = own.map(OwnedFd::try_clone).transpose();
            if let Some(own) = own.map_err(make("the container's terminal"))? {
                call(tree, 1, &own, "give its terminal up", libc::TIOCNOTTY, 0)?;
            }
        }
        self.take_control(1, container, tree)
    }

    /// Sets the foreground groups, and takes terminals from processes that had given them up.
    ///
    /// All processes are there, those too that have ended.
    pub(crate) fn share_control(
        &self,
        container: &Container,
        tree: &mut Tree,
    ) -> Result<(), RestoreError> {
        for record in container.terminals.iter().filter(|record| record.session != 0) {
            let Some(slave) = self.of_session(record.session, container) else { continue };
            let session = || container.processes.iter().filter(|it| it.session == record.session);
            if session().any(|process| process.group == record.foreground) {
                let group = record.foreground;
                let leader = record.session;
                let what = "set the foreground group of its terminal";
                call(tree, leader, slave, what, libc::TIOCSPGRP, group)?;
            }
            for process in session() {
                let alive = matches!(process.state, ProcessState::Alive(_));
                if alive && process.pid != record.session && !record.members.contains(&process.pid)
                {
                    let what = "give its terminal up";
                    call(tree, process.pid, slave, what, libc::TIOCNOTTY, 0)?;
                }
            }
        }
        Ok(())
    }

    /// The terminal that a session has.
    fn of_session(&self, session: i32, container: &Container) -> Option<&OwnedFd> {
        let position = container.terminals.iter().position(|it| it.session == session)?;
        self.terminals.get(position)?.slave.as_ref()
    }

    /// Opens the terminals that processes had open: by their names, and `/dev/tty` in the session that has it.
    pub(crate) fn open_files(
        &mut self,
        container: &Container,
        root: &Root,
        tree: &mut Tree,
    ) -> Result<(), RestoreError> {
        for (number, file) in (0u32..).zip(&container.files) {
            let FileKind::Terminal { terminal, path } = &file.kind else { continue };
            let Some(record) = container.terminals.get(*terminal as usize) else { continue };
            if record.master == Master::Closed {
                continue;
            }
            let is_slave = |metadata: &fs::Metadata| {
                device_of(metadata) == (SLAVE_MAJOR, record.number)
                    || device_of(metadata) == CONTROLLING
            };
            let handle = open_checked(root, path, libc::O_PATH, &is_slave)?;
            let device = handle.metadata().map_err(make(what(record.number)))?;
            let usual = slave_path(record.number).into_bytes();
            let opened = match (device_of(&device) == CONTROLLING, record.session) {
                (false, _) => root.open(path, file.flags | libc::O_NOCTTY),
                // Nobody could open it by this name any more.
                (true, 0) => root.open(&usual, file.flags | libc::O_NOCTTY),
                (true, session) => Ok(open_inside(tree, session, path, file.flags)?),
            };
            let opened = opened.map_err(make(what(record.number)))?;
            set_flags(&opened, file.flags)?;
            self.files.insert(number, opened);
        }
        Ok(())
    }

    /// The open file description with this index.
    pub(crate) fn take(&mut self, file: u32) -> Option<OwnedFd> {
        self.files.remove(&file)
    }

    /// Leaves the terminals to the processes, which have not been let go yet.
    pub(crate) fn hand_over(&mut self, container: &Container) -> Result<(), RestoreError> {
        for (made, record) in self.terminals.iter_mut().zip(&container.terminals) {
            let finish = || -> io::Result<()> {
                if let (Some(slave), true) = (&made.slave, record.exclusive) {
                    tty::set_exclusive(slave)?;
                }
                match &made.master {
                    Some(master) => tty::set_locked(master, record.locked),
                    None => Ok(()),
                }
            };
            finish().map_err(make(what(record.number)))?;
            if made.master.take().is_some() {
                made.slave = None;
            }
        }
        Ok(())
    }

    /// Gives the container's own terminal the size that it came with, of which its programs hear now that they run.
    pub(crate) fn resize(self) {
        for made in self.terminals {
            if let (Some(slave), Some(size)) = (made.slave, made.new_size)
                && let Err(error) = tty::set_size(slave, &size)
            {
                tracing::warn!(%error, "the container's terminal has its old size");
            }
        }
    }
}

/// Lets a process do something with a terminal that it has not open.
fn call(
    tree: &mut Tree,
    pid: i32,
    slave: &OwnedFd,
    what: &str,
    request: libc::Ioctl,
    argument: i32,
) -> Result<(), RestoreError> {
    let numbers = tree.send(pid, &[slave.as_fd()])?;
    let fd = numbers.first().map_or(0, |number| u64::from(number.unsigned_abs()));
    let process = tree.process(pid)?;
    let mut tape = process.tape()?;
    let argument = match request {
        libc::TIOCSPGRP => tape.words(&[u64::from(argument.unsigned_abs())]),
        _ => u64::from(argument.unsigned_abs()),
    };
    tape.call(what.to_owned(), libc::SYS_ioctl, [fd, request, argument, 0, 0, 0]);
    tape.call("close a terminal", libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

/// Opens a file as a process sees it.
fn open_inside(
    tree: &mut Tree,
    pid: i32,
    path: &[u8],
    flags: i32,
) -> Result<OwnedFd, RestoreError> {
    let process = tree.process(pid)?;
    let mut tape = process.tape()?;
    if !tape.has_room(1, path.len() + 1) {
        return Err(RestoreError::Damaged("the path of a terminal is too long".to_owned()));
    }
    let address = tape.data(&[path, &[0]].concat());
    let flags = u64::from((flags | libc::O_NOCTTY | libc::O_CLOEXEC).unsigned_abs());
    tape.call("open its terminal", libc::SYS_open, [address, flags, 0, 0, 0, 0]);
    let results = process.run_all(0, &tape, End::Breakpoint)?;
    let fd = results.first().and_then(|fd| RawFd::try_from(*fd).ok()).unwrap_or(-1);
    let handle = PidFd::open(process.pid).map_err(make("a handle on a process"))?;
    let opened = handle.get_fd(fd).map_err(make("an open terminal"))?;
    let mut tape = process.tape()?;
    let fd = u64::from(fd.unsigned_abs());
    tape.call("close a terminal", libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(opened)
}
