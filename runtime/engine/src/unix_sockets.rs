//! Unix sockets: names, connections, who made them, and all that waits in queues.
//!
//! The kernel tells who is connected to whom only by `sock_diag(7)`, in the network namespace of the sockets.
//!
//! A restore makes the sockets and their connections while the processes are blank, because some of it is made in them
//! (`makers.rs`), and fills the queues when all files are there, because descriptors may be in flight (`queue.rs`).
//!
//! A connection that leads out of the container is restored as one that the other side has closed: what was received can be
//! read, and the program learns that it has to connect anew.
//!
//! What this module does not do: a socket from another network namespace that is not connected, such as one that a service manager
//! listens on for the container. It is refused. So are data that wait with a connection that nobody has accepted: nothing but accepting shows them.

mod makers;
mod names;
mod queue;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM, SOL_SOCKET};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socket, sockopt};
use samara_capsule::record::{
    Bytes, Container, FileKind, MessageCredentials, PeerCredentials, SocketEnd, SocketOption,
    SocketOptions, SocketPair, UnixMessage, UnixSocket, UnixSocketState, WaitingConnection,
};
use samara_kernel::setns::{Namespace, inside};
use samara_kernel::sock_diag::{self, int_option, set_int_option};
use samara_kernel::tape::{Call, End};
use samara_kernel::{Pid, proc, unix};

use crate::capture::{CaptureError, Tables, index, read};
use crate::descriptors::{Found, register_in_flight};
use crate::process::words;
use crate::restore::{RestoreError, Tree, make};
use crate::root::Root;
use crate::socket_options;
use crate::tracee::{Process, TraceeError};
use crate::unix_sockets::makers::{Makers, inside_number};
use crate::unix_sockets::names::{Address, Names};
use crate::unsupported::{Place, UNACCEPTED_UNIX};

/// The sockets that were found so far.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// What the kernel tells, asked for when the first socket is found.
    kernel: Option<BTreeMap<u32, sock_diag::UnixSocket>>,
    /// The same of other network namespaces that sockets were found to belong to.
    beside: BTreeMap<u32, sock_diag::UnixSocket>,
    records: Vec<UnixSocket>,
    /// Of each record, and as long as this lives, the socket itself.
    open: Vec<Open>,
    by_inode: BTreeMap<u32, u32>,
    /// Records of closed datagram sockets that others are connected to, by name.
    closed_datagrams: BTreeMap<Bytes, u32>,
    /// Descriptors that were in flight: what they refer to is compared with what others do.
    in_flight: Vec<OwnedFd>,
    /// The socket whose queue is being read, by who holds it.
    reading: Option<(Pid, i32)>,
    gone: Vec<Gone>,
}

#[derive(Debug)]
struct Open {
    socket: OwnedFd,
    /// A process that holds it, or in whose socket it is in flight.
    holder: (Pid, i32),
    /// That it is held at all.
    held: bool,
    inode: u32,
    facts: sock_diag::UnixSocket,
    node: Option<(u64, u64)>,
}

/// A process that is gone, whose number only the container's own processes are told.
#[derive(Debug)]
enum Gone {
    Peer { socket: u32 },
    Sender { socket: u32, message: usize, offset: usize },
}

/// Describes a socket that a descriptor refers to, or says why it can't be saved. Its queue is read by [`collect`].
pub(crate) fn note(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let what = || read(found.link);
    let socket = found.borrow()?;
    let inode = u32::try_from(found.identity().1).unwrap_or(0);
    if tables.sockets.kernel.is_none() {
        let all = sock_diag::unix_sockets(tables.request.init)
            .map_err(read("the unix sockets of the container"))?;
        tables.sockets.kernel = Some(all);
    }
    let facts = tables.sockets.kernel.as_ref().and_then(|all| all.get(&inode)).cloned();
    let facts = match facts {
        Some(facts) => facts,
        // A connection belongs to the namespace of who connected, also the end that was accepted inside.
        None => {
            if !tables.sockets.beside.contains_key(&inode) {
                let others = sock_diag::unix_sockets_beside(socket.as_fd()).map_err(what())?;
                tables.sockets.beside.extend(others);
            }
            let facts = tables.sockets.beside.get(&inode).cloned().unwrap_or_default();
            if facts.peer.is_none() {
                return Ok(Err(
                    "a unix socket from outside the container's network namespace is not supported"
                        .to_owned(),
                ));
            }
            facts
        }
    };
    let kind = int_option(socket.as_raw_fd(), SOL_SOCKET, libc::SO_TYPE).map_err(what())?;
    let options =
        match socket_options::capture(socket.as_fd(), found.metadata, &[]).map_err(what())? {
            Ok(options) => options,
            Err(what) => return Ok(Err(what)),
        };
    let name = unix::name(socket.as_fd()).map_err(what())?;
    let node = match names::node(socket.as_fd(), &tables.root).map_err(what())? {
        Ok(node) => node,
        Err(what) => return Ok(Err(what)),
    };
    let reset = has_error(&socket).map_err(what())?;
    if reset && kind == SOCK_DGRAM {
        return Ok(Err("a datagram socket with an error that waits is not supported".to_owned()));
    }
    let number = index(tables.sockets.records.len());
    let peer_credentials = peer(socket.as_fd(), number, tables).map_err(what())?;
    let sockets = &mut tables.sockets;
    sockets.records.push(UnixSocket {
        kind,
        name: name.map(Bytes::from),
        accepted: false,
        node: node.as_ref().map(|(node, _)| node.clone()),
        state: UnixSocketState::Idle,
        peer_credentials,
        queue: Vec::new(),
        read_shut: facts.shutdown & 1 != 0,
        write_shut: facts.shutdown & 2 != 0,
        reset,
        options,
        closed: false,
    });
    let holder = sockets.reading.unwrap_or((found.pid, found.fd));
    let held = sockets.reading.is_none();
    let node = node.map(|(_, identity)| identity);
    sockets.open.push(Open { socket, holder, held, inode, facts, node });
    sockets.by_inode.insert(inode, number);
    Ok(Ok(FileKind::UnixSocket { socket: number }))
}

/// Whether an error waits to be told. Asking for it would take it.
fn has_error(socket: &OwnedFd) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut watched = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut watched, PollTimeout::ZERO)?;
    let events = watched.first().and_then(PollFd::revents);
    Ok(events.is_some_and(|events| events.contains(PollFlags::POLLERR)))
}

fn peer(
    socket: BorrowedFd<'_>,
    number: u32,
    tables: &mut Tables<'_>,
) -> io::Result<Option<PeerCredentials>> {
    let Some(found) = unix::peer_credentials(socket)? else { return Ok(None) };
    let pid = inside_number(found.pid, tables.request.init).unwrap_or_else(|| {
        tables.sockets.gone.push(Gone::Peer { socket: number });
        0
    });
    let ids = MessageCredentials { pid, uid: found.uid, gid: found.gid };
    Ok(Some(PeerCredentials { ids, groups: unix::peer_groups(socket)? }))
}

/// Reads the queues, and finds who is connected to whom, after all processes have been seen.
///
/// What is found in flight is described like what processes hold, and may be sockets with queues of their own.
pub(crate) fn collect(tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    let mut number = 0;
    while let Some(open) = tables.sockets.open.get(number) {
        if !open.facts.listens {
            read_queue(number, tables)?;
        }
        number += 1;
    }
    tables.sockets.reading = None;
    let waiting: BTreeSet<u32> =
        tables.sockets.open.iter().flat_map(|open| &open.facts.waiting).copied().collect();
    for number in 0..tables.sockets.open.len() {
        connection(number, &waiting, tables)?;
    }
    tables.sockets.find_accepted();
    Ok(())
}

fn read_queue(number: usize, tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    let init = tables.request.init;
    let sockets = &mut tables.sockets;
    let (Some(open), Some(record)) = (sockets.open.get(number), sockets.records.get(number)) else {
        return Ok(());
    };
    let holder = open.holder;
    let seen = queue::read(open.socket.as_fd(), record.kind, record.reset)
        .map_err(read(format!("the queue of a socket of process {}", holder.0)))?;
    let seen = match seen {
        Ok(seen) => seen,
        Err(what) => {
            tables.refuse(holder.0, Place::Descriptor(holder.1), what);
            return Ok(());
        }
    };
    let mut queue = Vec::with_capacity(seen.len());
    for (position, message) in seen.into_iter().enumerate() {
        let credentials = message.credentials.map(|found| {
            let pid = inside_number(found.pid, init).unwrap_or_else(|| {
                let (socket, offset) = (index(number), message.offset);
                tables.sockets.gone.push(Gone::Sender { socket, message: position, offset });
                0
            });
            MessageCredentials { pid, uid: found.uid, gid: found.gid }
        });
        let mut files = Vec::with_capacity(message.rights.len());
        for file in message.rights {
            tables.sockets.reading = Some(holder);
            match register_in_flight(&file, tables)? {
                Ok(file) => files.push(file),
                Err(what) => {
                    let what = format!("in flight to it: {what}");
                    tables.refuse(holder.0, Place::Descriptor(holder.1), what);
                }
            }
            tables.sockets.in_flight.push(file);
        }
        queue.push(UnixMessage {
            bytes: Bytes::from(message.bytes),
            files,
            credentials,
            sender: message.sender.map(Bytes::from),
            urgent: message.urgent,
        });
    }
    if let Some(record) = tables.sockets.records.get_mut(number) {
        record.queue = queue;
    }
    Ok(())
}

/// Finds what a socket is connected to. `waiting` are the inodes of all that have connected and are not accepted.
fn connection(
    number: usize,
    waiting: &BTreeSet<u32>,
    tables: &mut Tables<'_>,
) -> Result<(), CaptureError> {
    let sockets = &mut tables.sockets;
    let Some(open) = sockets.open.get(number) else { return Ok(()) };
    let holder = open.holder;
    let state = if open.facts.listens {
        let connections = open.facts.waiting.clone();
        let backlog = open.facts.backlog;
        let mut list = Vec::new();
        for inode in connections {
            match sockets.waiting_connection(inode).map_err(read("a waiting connection"))? {
                Ok(connection) => list.extend(connection),
                Err(what) => {
                    tables.refuse(holder.0, Place::Descriptor(holder.1), what);
                    return Ok(());
                }
            }
        }
        UnixSocketState::Listening { backlog, waiting: list }
    } else {
        let known = open.facts.peer.and_then(|peer| sockets.by_inode.get(&peer));
        match (open.facts.peer, known) {
            (None, _) => UnixSocketState::Idle,
            (Some(_), Some(peer)) => UnixSocketState::Connected { peer: *peer },
            (Some(0), None) if waiting.contains(&open.inode) => UnixSocketState::Idle,
            (Some(_), None) => UnixSocketState::Connected { peer: sockets.add_closed(number)? },
        }
    };
    if let Some(record) = sockets.records.get_mut(number) {
        record.state = state;
    }
    Ok(())
}

impl Sockets {
    /// Whether any socket is bound to a node.
    pub(crate) fn has_node(&self, identity: (u64, u64)) -> bool {
        self.open.iter().any(|open| open.node == Some(identity))
    }

    /// A connection that nobody has accepted, by the inode of the one that connected; none if that is outside: it will connect
    /// elsewhere. Or why it can't be saved.
    fn waiting_connection(
        &self,
        inode: u32,
    ) -> io::Result<Result<Option<WaitingConnection>, &'static str>> {
        if inode == 0 {
            // And whether it had sent something is not to be known.
            return Ok(Err(UNACCEPTED_UNIX));
        }
        let Some(client) = self.by_inode.get(&inode).copied() else { return Ok(Ok(None)) };
        let Some(open) = self.open.get(client as usize) else { return Ok(Ok(None)) };
        if unix::unread_bytes(open.socket.as_fd())? > 0 {
            return Ok(Err(UNACCEPTED_UNIX));
        }
        // The one that will accept it is told who connected; until then nobody is, so it is taken to be the one who holds it.
        let credentials = open.held.then(|| holder_credentials(open.holder.0)).transpose()?;
        Ok(Ok(Some(WaitingConnection { client, credentials, queue: Vec::new() })))
    }

    /// A record for the other end of a connection, which is closed, or outside of the container and will be closed.
    fn add_closed(&mut self, number: usize) -> Result<u32, CaptureError> {
        let what = || read("the peer of a unix socket");
        let closed = index(self.records.len());
        let (Some(open), Some(survivor)) = (self.open.get(number), self.records.get_mut(number))
        else {
            return Ok(closed);
        };
        let name = unix::peer_name(open.socket.as_fd()).unwrap_or(None).map(Bytes::from);
        // Two sockets cannot have one name, so it was one that several were connected to.
        if survivor.kind == SOCK_DGRAM
            && let Some(name) = &name
        {
            match self.closed_datagrams.entry(name.clone()) {
                Entry::Occupied(known) => return Ok(*known.get()),
                Entry::Vacant(place) => place.insert(closed),
            };
        }
        let is_outside =
            survivor.kind != SOCK_DGRAM && !(survivor.read_shut && survivor.write_shut);
        // What the other side has not read, it will not read.
        let unread = unix::unread_bytes(open.socket.as_fd()).map_err(what())?;
        survivor.reset |= is_outside && unread > 0;
        let record = UnixSocket {
            kind: survivor.kind,
            name,
            accepted: false,
            node: None,
            state: if survivor.kind == SOCK_DGRAM {
                UnixSocketState::Idle
            } else {
                UnixSocketState::Connected { peer: index(number) }
            },
            peer_credentials: None,
            queue: Vec::new(),
            read_shut: false,
            write_shut: false,
            reset: false,
            options: SocketOptions::default(),
            closed: true,
        };
        self.records.push(record);
        Ok(closed)
    }

    /// Finds which end of each connection was accepted: it has the name of the socket that listened, and none of its own.
    fn find_accepted(&mut self) {
        let listeners: BTreeSet<_> = self
            .open
            .iter()
            .zip(&self.records)
            .filter(|(open, _)| open.facts.listens)
            .map(|(open, record)| (open.node, record.name.clone()))
            .collect();
        // A name that several have is one that was accepted with.
        let mut shared: BTreeMap<_, usize> = BTreeMap::new();
        for (open, record) in self.open.iter().zip(&self.records) {
            *shared.entry((record.kind, open.node, record.name.clone())).or_default() += 1;
        }
        let mut accepted = Vec::new();
        for (number, record) in self.records.iter().enumerate() {
            let UnixSocketState::Connected { peer } = record.state else { continue };
            let peer_number = peer as usize;
            let Some(peer) = self.records.get(peer_number).filter(|_| number < peer_number) else {
                continue;
            };
            if record.kind == SOCK_DGRAM {
                continue;
            }
            let likelihood = |number: usize, record: &UnixSocket| {
                let node = self.open.get(number).and_then(|open| open.node);
                let same = shared.get(&(record.kind, node, record.name.clone()));
                (listeners.contains(&(node, record.name.clone())), same > Some(&1))
            };
            let first = match (&record.name, &peer.name) {
                (None, None) => continue,
                (Some(_), None) => true,
                (None, Some(_)) => false,
                // Both were bound: the only one of a listener that is closed can't be told from the other.
                (Some(_), Some(_)) => likelihood(number, record) >= likelihood(peer_number, peer),
            };
            accepted.push(if first { number } else { peer_number });
        }
        for number in accepted {
            if let Some(record) = self.records.get_mut(number) {
                record.accepted = true;
                record.node = None;
            }
        }
    }

    pub(crate) fn into_records(self) -> Vec<UnixSocket> {
        self.records
    }
}

fn holder_credentials(pid: Pid) -> io::Result<PeerCredentials> {
    let status = proc::status(pid)?;
    let pid = status.nspid.last().copied().unwrap_or(0);
    let ([_, uid, ..], [_, gid, ..]) = (status.uids, status.gids);
    let ids = MessageCredentials { pid, uid, gid };
    Ok(PeerCredentials { ids, groups: status.groups })
}

/// Asks the container's processes for the numbers of processes that are gone.
pub(crate) fn ask(
    processes: &mut BTreeMap<Pid, Process>,
    tables: &mut Tables<'_>,
) -> Result<(), TraceeError> {
    for gone in std::mem::take(&mut tables.sockets.gone) {
        let (Gone::Peer { socket } | Gone::Sender { socket, .. }) = gone;
        let (Some(open), Some(record)) = (
            tables.sockets.open.get(socket as usize).filter(|open| open.held),
            tables.sockets.records.get_mut(socket as usize),
        ) else {
            continue;
        };
        let Some(process) = processes.get_mut(&open.holder.0) else { continue };
        process.map_arena(None)?;
        let pid = match gone {
            Gone::Peer { .. } => ask_for_peer(process, open.holder.1),
            Gone::Sender { offset, .. } => ask_for_sender(process, open.holder.1, offset),
        };
        process.unmap_arena()?;
        let ids = match gone {
            Gone::Peer { .. } => record.peer_credentials.as_mut().map(|peer| &mut peer.ids),
            Gone::Sender { message, .. } => {
                record.queue.get_mut(message).and_then(|message| message.credentials.as_mut())
            }
        };
        if let (Some(ids), Some(pid)) = (ids, pid?) {
            ids.pid = pid;
        }
    }
    Ok(())
}

fn ask_for_peer(process: &mut Process, fd: i32) -> Result<Option<i32>, TraceeError> {
    let mut tape = process.tape()?;
    let found = tape.output(16);
    let bytes = tape.words(&[12]);
    let [level, name] = [SOL_SOCKET, libc::SO_PEERCRED].map(|n| u64::from(n.unsigned_abs()));
    let arguments = [u64::from(fd.unsigned_abs()), level, name, found.address, bytes, 0];
    tape.call("ask who is connected", libc::SYS_getsockopt, arguments);
    process.run_all(0, &tape, End::Call)?;
    let [first, _] = words(&process.output(found)?);
    Ok(i32::try_from(first & 0xffff_ffff).ok())
}

/// Looks at the first byte of a message, for its credentials; there is no room for descriptors, so none are made.
fn ask_for_sender(
    process: &mut Process,
    fd: i32,
    offset: usize,
) -> Result<Option<i32>, TraceeError> {
    const CONTROL_BYTES: usize = 32;
    let mut tape = process.tape()?;
    let fd = u64::from(fd.unsigned_abs());
    let level = u64::from(SOL_SOCKET.unsigned_abs());
    let names = [libc::SO_PASSCRED, libc::SO_PEEK_OFF].map(|name| u64::from(name.unsigned_abs()));
    let before = names.map(|_| tape.output(8));
    let four = tape.words(&[4]);
    for (name, before) in names.iter().zip(before) {
        let arguments = [fd, level, *name, before.address, four, 0];
        tape.call("read an option", libc::SYS_getsockopt, arguments);
    }
    for (name, value) in names.iter().zip([1, offset as u64]) {
        let value = tape.words(&[value]);
        tape.call("set an option", libc::SYS_setsockopt, [fd, level, *name, value, 4, 0]);
    }
    let byte = tape.output(8);
    let vector = tape.words(&[byte.address, 1]);
    let control = tape.output(CONTROL_BYTES);
    let header = tape.words(&[0, 0, vector, 1, control.address, CONTROL_BYTES as u64, 0]);
    let flags = u64::from((libc::MSG_PEEK | libc::MSG_DONTWAIT).unsigned_abs());
    tape.try_call("look at a message", libc::SYS_recvmsg, [fd, header, flags, 0, 0, 0]);
    let looked = tape.len() - 1;
    for (name, before) in names.iter().zip(before) {
        let arguments = [fd, level, *name, before.address, 4, 0];
        tape.call("set an option back", libc::SYS_setsockopt, arguments);
    }
    let results = process.run_all(0, &tape, End::Call)?;
    if results.get(looked).is_none_or(|result| Call::outcome(*result).is_err()) {
        return Ok(None);
    }
    let [bytes, kind, first, _] = words(&process.output(control)?);
    let credentials = u64::from(SOL_SOCKET.unsigned_abs())
        | u64::from(libc::SCM_CREDENTIALS.unsigned_abs()) << 32;
    Ok((bytes >= 28 && kind == credentials)
        .then_some(first & 0xffff_ffff)
        .and_then(|pid| i32::try_from(pid).ok()))
}

/// The sockets of a restore under way.
#[derive(Debug)]
pub(crate) struct Made {
    records: Vec<UnixSocket>,
    /// Where the sockets of [`Container::socket_pairs`] begin.
    pairs: usize,
    sockets: Vec<OwnedFd>,
    addresses: Vec<Option<Address>>,
    /// The other end of a pair that was made as one: a socket of this restore, or one that is closed at once.
    partners: BTreeMap<usize, Partner>,
    init: Pid,
    names: Names,
    makers: Makers,
}

#[derive(Debug)]
enum Partner {
    Socket(usize),
    Closed(OwnedFd),
}

/// Makes all sockets, their names and connections, in processes that are still blank.
///
/// `numbers` are the container's processes by their number there.
pub(crate) fn restore(
    tree: &mut Tree,
    container: &Container,
    root: &Root,
    numbers: &BTreeMap<i32, Pid>,
) -> Result<Made, RestoreError> {
    let mut records = container.unix_sockets.clone();
    let pairs = records.len();
    for pair in &container.socket_pairs {
        records.extend(of_pair(pair, index(records.len())));
    }
    check(&records, container.files.len())?;
    let init = tree.process(1)?.pid;
    let mut makers = Makers::new(numbers);
    for message in records.iter().flat_map(all_messages) {
        if let Some(credentials) = message.credentials {
            makers.need(tree, credentials.pid)?;
        }
    }
    let plan = Plan::of(&records);
    let mut sockets: Vec<Option<OwnedFd>> = records.iter().map(|_| None).collect();
    let mut partners = BTreeMap::new();
    for (first, second) in &plan.pairs {
        let Some(record) = records.get(*first) else { continue };
        let maker = record.peer_credentials.as_ref().or_else(|| {
            records.get((*second)?).and_then(|second| second.peer_credentials.as_ref())
        });
        let [left, right] = makers.pair(tree, maker, record.kind)?;
        put(&mut sockets, *first, left);
        match second {
            Some(second) => {
                put(&mut sockets, *second, right);
                partners.insert(*first, Partner::Socket(*second));
                partners.insert(*second, Partner::Socket(*first));
            }
            None => {
                partners.insert(*first, Partner::Closed(right));
            }
        }
    }
    let accepted: BTreeSet<usize> = plan.connections.values().flatten().map(|(s, _)| *s).collect();
    for (number, record) in records.iter().enumerate() {
        if sockets.get(number).is_some_and(Option::is_none) && !accepted.contains(&number) {
            put(&mut sockets, number, new_socket(init, record.kind)?);
        }
    }
    let mut names = Names::default();
    for ((kind, name), connections) in &plan.connections {
        // As long as nobody else has the name.
        let listener = new_socket(init, *kind)?;
        let mut names = Names::default();
        let address =
            names.bind(listener.as_fd(), name, None, root).map_err(make("a unix socket's name"))?;
        for (server, client) in connections {
            let credentials = |number: usize| records.get(number)?.peer_credentials.as_ref();
            let Some(Some(socket)) = sockets.get(*client) else {
                return Err(RestoreError::Damaged("a connection without a client".to_owned()));
            };
            makers.listen(tree, credentials(*client), listener.as_fd(), 1)?;
            makers.connect(tree, credentials(*server), socket.as_fd(), &address)?;
            let socket = unix::accept(listener.as_fd()).map_err(make("a unix connection"))?;
            put(&mut sockets, *server, socket);
        }
    }
    let sockets: Vec<OwnedFd> = sockets
        .into_iter()
        .collect::<Option<_>>()
        .ok_or_else(|| RestoreError::Damaged("a unix socket can't be made".to_owned()))?;
    let mut addresses: Vec<Option<Address>> = records.iter().map(|_| None).collect();
    for closed in [false, true] {
        for ((record, socket), address) in records.iter().zip(&sockets).zip(&mut addresses) {
            let name = record.name.as_ref().filter(|_| !record.accepted);
            let Some(name) = name.filter(|_| record.closed == closed) else { continue };
            *address = match names.bind(socket.as_fd(), name, record.node.as_ref(), root) {
                // Somebody has taken the name since it was closed: the one that sent to it must not reach that one.
                Err(error) if closed && error.kind() == io::ErrorKind::AddrInUse => {
                    unix::bind_anywhere(socket.as_fd())
                        .and_then(|()| unix::name(socket.as_fd()))
                        .map(|name| name.map(Address::Abstract))
                }
                bound => bound.map(Some),
            }
            .map_err(make("a unix socket's name"))?;
        }
    }
    for ((record, socket), address) in records.iter().zip(&sockets).zip(&addresses) {
        let UnixSocketState::Listening { backlog, waiting } = &record.state else { continue };
        let Some(address) = address else {
            return Err(RestoreError::Damaged("a socket without a name listens".to_owned()));
        };
        for connection in waiting {
            let client = connection.client as usize;
            let (Some(to), Some(client)) = (records.get(client), sockets.get(client)) else {
                continue;
            };
            makers.listen(tree, to.peer_credentials.as_ref(), socket.as_fd(), *backlog)?;
            makers.connect(tree, connection.credentials.as_ref(), client.as_fd(), address)?;
        }
        makers.listen(tree, record.peer_credentials.as_ref(), socket.as_fd(), *backlog)?;
    }
    Ok(Made { records, pairs, sockets, addresses, partners, init, names, makers })
}

/// Which sockets are made together.
#[derive(Debug, Default)]
struct Plan {
    /// By `socketpair`; the second is closed at once where nobody is meant.
    pairs: Vec<(usize, Option<usize>)>,
    /// By a socket that listens, of that kind and name: who is accepted, and who connects.
    connections: BTreeMap<(i32, Bytes), Vec<(usize, usize)>>,
}

impl Plan {
    fn of(records: &[UnixSocket]) -> Plan {
        let mut plan = Plan::default();
        let mut paired = BTreeSet::new();
        plan.pair_datagrams(records, &mut paired, true);
        plan.pair_datagrams(records, &mut paired, false);
        for (number, record) in records.iter().enumerate() {
            let peer = peer_of(record);
            let other = peer.and_then(|peer| records.get(peer));
            if record.kind == SOCK_DGRAM {
                continue;
            }
            let (Some(peer), Some(other)) = (peer.filter(|peer| number < *peer), other) else {
                continue;
            };
            let (server, client) = if record.accepted { (number, peer) } else { (peer, number) };
            let name = if record.accepted { &record.name } else { &other.name };
            match name {
                Some(name) if record.accepted || other.accepted => plan
                    .connections
                    .entry((record.kind, name.clone()))
                    .or_default()
                    .push((server, client)),
                Some(_) | None => plan.pairs.push((number, Some(peer))),
            }
        }
        plan
    }

    /// Those of a pair know who made them, and nothing else reaches a socket without a name. Since then each may have been connected
    /// elsewhere, so that those which are connected to one without a name come first.
    fn pair_datagrams(
        &mut self,
        records: &[UnixSocket],
        paired: &mut BTreeSet<usize>,
        nameless: bool,
    ) {
        for (number, record) in records.iter().enumerate() {
            if record.kind != SOCK_DGRAM || paired.contains(&number) {
                continue;
            }
            let peer = peer_of(record).filter(|peer| *peer != number);
            let other = peer.and_then(|peer| records.get(peer));
            let reaches_nameless = other.is_some_and(|other| other.name.is_none());
            if nameless != reaches_nameless || (!nameless && record.peer_credentials.is_none()) {
                continue;
            }
            let second = peer.filter(|peer| !paired.contains(peer)).filter(|_| {
                nameless || other.is_some_and(|other| other.peer_credentials.is_some())
            });
            paired.extend(second.into_iter().chain([number]));
            self.pairs.push((number, second));
        }
    }
}

fn peer_of(record: &UnixSocket) -> Option<usize> {
    match record.state {
        UnixSocketState::Connected { peer } => Some(peer as usize),
        UnixSocketState::Idle | UnixSocketState::Listening { .. } => None,
    }
}

/// Whether all that records refer to is there and can be.
fn check(records: &[UnixSocket], files: usize) -> Result<(), RestoreError> {
    let damaged = || RestoreError::Damaged("a unix socket's record contradicts itself".to_owned());
    let mut clients = BTreeSet::new();
    for (number, record) in records.iter().enumerate() {
        let is_stream = match record.kind {
            SOCK_STREAM | SOCK_SEQPACKET => true,
            SOCK_DGRAM => false,
            _ => return Err(damaged()),
        };
        let same = |other: u32| records.get(other as usize).filter(|o| o.kind == record.kind);
        let possible = match &record.state {
            UnixSocketState::Idle => true,
            UnixSocketState::Connected { peer } => same(*peer).is_some_and(|peer| {
                let back = UnixSocketState::Connected { peer: index(number) };
                !is_stream || (peer.state == back && !(record.accepted && peer.accepted))
            }),
            UnixSocketState::Listening { waiting, .. } => {
                is_stream
                    && waiting.iter().all(|connection| {
                        let client = same(connection.client);
                        client.is_some_and(|client| client.state == UnixSocketState::Idle)
                            && clients.insert(connection.client)
                    })
            }
        };
        let found = all_messages(record)
            .all(|message| message.files.iter().all(|file| (*file as usize) < files));
        let named = record.name.as_ref().is_none_or(|name| !name.is_empty());
        if !possible || !found || !named || (record.accepted && record.name.is_none()) {
            return Err(damaged());
        }
    }
    Ok(())
}

fn all_messages(record: &UnixSocket) -> impl Iterator<Item = &UnixMessage> {
    let waiting = match &record.state {
        UnixSocketState::Listening { waiting, .. } => waiting.as_slice(),
        UnixSocketState::Idle | UnixSocketState::Connected { .. } => &[],
    };
    record.queue.iter().chain(waiting.iter().flat_map(|connection| &connection.queue))
}

fn put(sockets: &mut [Option<OwnedFd>], number: usize, socket: OwnedFd) {
    if let Some(place) = sockets.get_mut(number) {
        *place = Some(socket);
    }
}

/// A socket of the container's network namespace, which does not wait.
fn new_socket(init: Pid, kind: i32) -> Result<OwnedFd, RestoreError> {
    let kind = match kind {
        SOCK_STREAM => SockType::Stream,
        SOCK_SEQPACKET => SockType::SeqPacket,
        _ => SockType::Datagram,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    inside(init, Namespace::Network, || Ok(socket(AddressFamily::Unix, kind, flags, None)?))
        .map_err(make("a unix socket"))
}

/// The two sockets of a pair as older capsules have it; the first has the number `first`.
fn of_pair(pair: &SocketPair, first: u32) -> [UnixSocket; 2] {
    let [left, right] = &pair.ends;
    [(left, first + 1), (right, first)].map(|(end, peer)| UnixSocket {
        kind: pair.kind,
        name: None,
        accepted: false,
        node: None,
        state: UnixSocketState::Connected { peer },
        peer_credentials: None,
        queue: end
            .queue
            .iter()
            .map(|bytes| UnixMessage { bytes: bytes.clone(), ..UnixMessage::default() })
            .collect(),
        read_shut: end.read_shut,
        write_shut: end.write_shut,
        reset: false,
        options: options_of_pair(end),
        closed: end.closed,
    })
}

fn options_of_pair(end: &SocketEnd) -> SocketOptions {
    let option = |name, value: &[u8]| SocketOption {
        level: SOL_SOCKET,
        name,
        value: Bytes::from(value.to_vec()),
    };
    let time = |us: u64| [us / 1_000_000, us % 1_000_000].map(u64::to_le_bytes).concat();
    SocketOptions {
        values: vec![
            option(libc::SO_SNDBUF, &end.send_buffer.to_le_bytes()),
            option(libc::SO_RCVBUF, &end.receive_buffer.to_le_bytes()),
            option(libc::SO_PASSCRED, &u32::from(end.pass_credentials).to_le_bytes()),
            option(libc::SO_RCVTIMEO, &time(end.receive_timeout_us)),
            option(libc::SO_SNDTIMEO, &time(end.send_timeout_us)),
        ],
        filter: Bytes::new(),
        owner: (0, 0),
        mode: 0o777,
    }
}

impl Made {
    /// The socket of a file: index into [`Container::unix_sockets`].
    pub(crate) fn file(&self, socket: u32) -> Option<io::Result<OwnedFd>> {
        self.sockets.get(socket as usize).map(OwnedFd::try_clone)
    }

    /// An end of a pair: index into [`Container::socket_pairs`], and 0 or 1.
    pub(crate) fn pair_end(&self, pair: u32, end: u32) -> Option<io::Result<OwnedFd>> {
        let number = (pair as usize).checked_mul(2)?.checked_add(end as usize)?;
        self.sockets.get(self.pairs.checked_add(number)?).map(OwnedFd::try_clone)
    }

    /// Puts everything into the queues and gives the sockets the rest of their state. `files` are [`Container::files`].
    pub(crate) fn fill(&mut self, files: &[OwnedFd], root: &Root) -> Result<(), RestoreError> {
        let what = || make("what waits in a unix socket");
        for number in 0..self.records.len() {
            self.reconnect(number, true).map_err(make("a connection of a unix socket"))?;
        }
        for number in 0..self.records.len() {
            self.fill_queue(number, files, root).map_err(what())?;
        }
        for number in 0..self.records.len() {
            self.reconnect(number, false).map_err(make("a connection of a unix socket"))?;
        }
        for record in self.records.iter().filter(|record| record.reset) {
            // Whoever closes a socket with bytes that it has not read resets the connection.
            if let UnixSocketState::Connected { peer } = record.state
                && let Some(peer) = self.records.get(peer as usize).filter(|peer| peer.closed)
                && let UnixSocketState::Connected { peer: survivor } = peer.state
                && let Some(survivor) = self.sockets.get(survivor as usize)
            {
                let byte = UnixMessage { bytes: Bytes::from(vec![0]), ..UnixMessage::default() };
                queue::send(survivor.as_fd(), &byte, files, None, None).map_err(what())?;
            }
        }
        for (record, socket) in self.records.iter().zip(&self.sockets) {
            let how = match (record.read_shut, record.write_shut) {
                (false, false) => continue,
                (true, false) => Shutdown::Read,
                (false, true) => Shutdown::Write,
                (true, true) => Shutdown::Both,
            };
            shutdown(socket.as_raw_fd(), how)
                .map_err(io::Error::from)
                .map_err(make("the end of a unix connection"))?;
        }
        self.partners.clear();
        let sockets = std::mem::take(&mut self.sockets);
        let mut open = Vec::with_capacity(sockets.len());
        // Those that nobody holds are closed first: it shows at the other end.
        for (record, socket) in self.records.iter().zip(sockets) {
            if !record.closed {
                open.push((record, socket));
            }
        }
        for (record, socket) in open {
            if record.kind == SOCK_DGRAM {
                // What came of the making.
                nix::sys::socket::getsockopt(&socket, sockopt::SocketError)
                    .map_err(io::Error::from)
                    .map_err(make("a unix socket"))?;
            }
            socket_options::finish(socket.as_fd(), &record.options)
                .map_err(make("the options of a unix socket"))?;
        }
        Ok(())
    }

    /// Connects a datagram socket to whom it sends, if it is not. Those that were `paired` lose what is in their queue by that,
    /// and are connected before it is filled; others may have been sent something by somebody else before.
    fn reconnect(&self, number: usize, paired: bool) -> io::Result<()> {
        let (Some(record), Some(socket)) = (self.records.get(number), self.sockets.get(number))
        else {
            return Ok(());
        };
        let partner = self.partners.get(&number);
        if record.kind != SOCK_DGRAM || record.closed || partner.is_some() != paired {
            return Ok(());
        }
        match (&record.state, partner) {
            (UnixSocketState::Connected { peer }, Some(Partner::Socket(partner)))
                if partner == &(*peer as usize) =>
            {
                Ok(())
            }
            (UnixSocketState::Connected { peer }, partner) => {
                match (self.addresses.get(*peer as usize), partner) {
                    (Some(Some(address)), _) => {
                        address.reach(|| unix::connect(socket.as_fd(), address.name()))
                    }
                    // The one that is closed at once.
                    (_, Some(Partner::Closed(_))) => Ok(()),
                    _ => Err(io::ErrorKind::InvalidData.into()),
                }
            }
            (UnixSocketState::Idle, Some(_)) => unix::disconnect(socket.as_fd()),
            (UnixSocketState::Idle | UnixSocketState::Listening { .. }, _) => Ok(()),
        }
    }

    fn fill_queue(&self, number: usize, files: &[OwnedFd], root: &Root) -> io::Result<()> {
        let Some(record) = self.records.get(number) else { return Ok(()) };
        if record.kind == SOCK_DGRAM {
            return self.fill_datagrams(number, record, files, root);
        }
        let queues: Vec<(u32, &[UnixMessage])> = match &record.state {
            UnixSocketState::Idle => Vec::new(),
            UnixSocketState::Connected { peer } => vec![(*peer, &record.queue)],
            UnixSocketState::Listening { waiting, .. } => waiting
                .iter()
                .map(|connection| (connection.client, connection.queue.as_slice()))
                .collect(),
        };
        for (sender, queue) in queues.into_iter().filter(|(_, queue)| !queue.is_empty()) {
            let Some(sender) = self.sockets.get(sender as usize) else { continue };
            make_room(sender, queue)?;
            for message in queue {
                let credentials = message.credentials.map(|saved| self.makers.sender(&saved));
                queue::send(sender.as_fd(), message, files, credentials, None)?;
            }
        }
        Ok(())
    }

    fn fill_datagrams(
        &self,
        number: usize,
        record: &UnixSocket,
        files: &[OwnedFd],
        root: &Root,
    ) -> io::Result<()> {
        let partner = match self.partners.get(&number) {
            Some(Partner::Socket(partner)) => self
                .sockets
                .get(*partner)
                .map(|socket| (self.records.get(*partner).and_then(|p| p.name.clone()), socket)),
            Some(Partner::Closed(partner)) => Some((None, partner)),
            None => None,
        };
        let address = self.addresses.get(number).and_then(Option::as_ref);
        // Senders that nobody holds, by name.
        let mut strangers: BTreeMap<Option<Bytes>, OwnedFd> = BTreeMap::new();
        let mut names = Names::default();
        // Whom a socket is connected to may send it more than others, and nobody else from then on.
        let peer = peer_of(record).and_then(|peer| self.records.get(peer));
        let from_others = |message: &UnixMessage| peer.is_none_or(|p| p.name != message.sender);
        let connected_at = record.queue.iter().rposition(from_others).map_or(0, |last| last + 1);
        for (position, message) in record.queue.iter().enumerate() {
            if position == connected_at {
                self.reconnect(number, false)?;
            }
            let credentials = message.credentials.map(|saved| self.makers.sender(&saved));
            if let Some((name, partner)) = &partner
                && *name == message.sender
            {
                make_room(partner, &record.queue)?;
                queue::send(partner.as_fd(), message, files, credentials, None)?;
                continue;
            }
            let known = self.records.iter().zip(&self.sockets).find(|(other, _)| {
                other.kind == SOCK_DGRAM && other.name.is_some() && other.name == message.sender
            });
            if known.is_none() && !strangers.contains_key(&message.sender) {
                let socket = new_socket(self.init, SOCK_DGRAM).map_err(io::Error::other)?;
                if let Some(name) = &message.sender {
                    names.bind(socket.as_fd(), name, None, root)?;
                }
                strangers.insert(message.sender.clone(), socket);
            }
            let sender = known.map(|(_, socket)| socket).or(strangers.get(&message.sender));
            let (Some(sender), Some(address)) = (sender, address) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            make_room(sender, &record.queue)?;
            let to = address.socket_address()?;
            address
                .reach(|| queue::send(sender.as_fd(), message, files, credentials, Some(&to)))?;
        }
        Ok(())
    }

    /// Ends what was made for the moment.
    pub(crate) fn end(self, tree: &mut Tree) -> Result<(), RestoreError> {
        drop(self.names);
        self.makers.end(tree)
    }
}

/// Root may exceed the limit on buffers; what was in the queue has to fit at once.
fn make_room(sender: &OwnedFd, queue: &[UnixMessage]) -> io::Result<()> {
    let room = i32::try_from(queue::room(queue).saturating_mul(2)).unwrap_or(i32::MAX);
    let fd = sender.as_raw_fd();
    let has = int_option(fd, SOL_SOCKET, libc::SO_SNDBUF)?;
    if has < room {
        set_int_option(fd, SOL_SOCKET, libc::SO_SNDBUFFORCE, room)?;
    }
    Ok(())
}
