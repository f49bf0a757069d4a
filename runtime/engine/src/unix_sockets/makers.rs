//! Who made a connection: `SO_PEERCRED` tells it for as long as the connection lives, and programs decide by it whom they trust.
//!
//! The kernel writes down who calls `connect`, `listen` or `socketpair`. So these are called again in the process that did, which
//! takes the ids of then for the moment. Where that process is gone, another is made under its number and ends afterwards.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use samara_capsule::record::{MessageCredentials, PeerCredentials};
use samara_kernel::pidfd::PidFd;
use samara_kernel::tape::End;
use samara_kernel::unix::Credentials;
use samara_kernel::{Pid, proc};

use crate::process::{self, prctl, words};
use crate::restore::{RestoreError, Tree, make};
use crate::tracee::{Process, Tape};
use crate::unix_sockets::names::Address;

/// The number that a process has in the container whose init is given: 0 for one from outside. `None`: it is gone.
pub(crate) fn inside_number(pid: Pid, init: Pid) -> Option<i32> {
    if pid == 0 {
        return Some(0);
    }
    let numbers = proc::status(pid).ok()?.nspid;
    let depth = proc::status(init).ok()?.nspid.len();
    // Of a zombie the namespace can't be asked for.
    let strange = match (proc::namespace(pid, "pid"), proc::namespace(init, "pid")) {
        (Ok(its), Ok(own)) => its != own,
        _ => false,
    };
    Some(if strange || numbers.len() != depth { 0 } else { *numbers.last()? })
}

/// The processes in which a restore makes connections.
#[derive(Debug)]
pub(crate) struct Makers {
    /// All processes of the container by their number there, as the engine numbers them.
    numbers: BTreeMap<i32, Pid>,
    /// Those that the container does not have any more.
    gone: BTreeMap<i32, Process>,
}

impl Makers {
    pub(crate) fn new(numbers: &BTreeMap<i32, Pid>) -> Makers {
        Makers { numbers: numbers.clone(), gone: BTreeMap::new() }
    }

    /// Makes a process with a number that the container had, if nobody has it.
    pub(crate) fn need(&mut self, tree: &mut Tree, pid: i32) -> Result<(), RestoreError> {
        if pid <= 1 || self.numbers.contains_key(&pid) {
            return Ok(());
        }
        match tree.fork(1, pid, false, libc::SIGCHLD, 0) {
            Ok(()) => {
                if let Some(process) = tree.processes.remove(&pid) {
                    self.numbers.insert(pid, process.pid);
                    self.gone.insert(pid, process);
                }
                Ok(())
            }
            // A thread or a group has the number now.
            Err(RestoreError::Make { source, .. })
                if source.raw_os_error() == Some(libc::EEXIST) =>
            {
                tracing::warn!(pid, "a socket's peer can't be shown under its number");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// What the engine says for the sender of a message, so that the container sees the one that it was.
    pub(crate) fn sender(&self, saved: &MessageCredentials) -> Credentials {
        let own = Pid::try_from(std::process::id()).expect("pids are ints");
        // The engine is a process from outside.
        let pid = self.numbers.get(&saved.pid).copied().unwrap_or(own);
        Credentials { pid, uid: saved.uid, gid: saved.gid }
    }

    /// Ends the processes that were made.
    pub(crate) fn end(self, tree: &mut Tree) -> Result<(), RestoreError> {
        for (pid, process) in self.gone {
            process::bury(process, &mut tree.channel, b"", 0, 0)?;
            let arguments = [u64::from(pid.unsigned_abs()), 0, 0, 0, 0, 0];
            tree.call(1, "wait for a helper", libc::SYS_wait4, arguments)?;
        }
        Ok(())
    }

    /// Lets the process that has made something before do so again. `files` are given to it for the moment.
    fn act<'a>(
        &'a mut self,
        tree: &'a mut Tree,
        maker: Option<&PeerCredentials>,
        files: &[BorrowedFd<'_>],
        act: impl FnOnce(&mut Tape, &[u64]),
    ) -> Result<&'a mut Process, RestoreError> {
        const KEEP: u64 = u32::MAX as u64;
        /// `SECBIT_NO_SETUID_FIXUP`: capabilities stay whatever the ids are.
        const NO_SETUID_FIXUP: u64 = 1 << 2;
        let wanted = maker.map_or(1, |maker| maker.ids.pid);
        if !tree.processes.contains_key(&wanted) {
            self.need(tree, wanted)?;
        }
        let process = match self.gone.get_mut(&wanted) {
            Some(process) => process,
            None => {
                let pid = if tree.processes.contains_key(&wanted) { wanted } else { 1 };
                tree.processes
                    .get_mut(&pid)
                    .ok_or_else(|| RestoreError::Damaged("a container without init".to_owned()))?
            }
        };
        let numbers: Vec<u64> = tree
            .channel
            .send(process, files)?
            .into_iter()
            .map(|number| u64::from(number.unsigned_abs()))
            .collect();
        let mut tape = process.tape()?;
        let nobody = PeerCredentials {
            ids: MessageCredentials { pid: 0, uid: 0, gid: 0 },
            groups: Vec::new(),
        };
        let PeerCredentials { ids, groups } = maker.unwrap_or(&nobody);
        prctl(&mut tape, libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP);
        let list: Vec<u8> = groups.iter().flat_map(|group| group.to_le_bytes()).collect();
        let address = tape.data(&list);
        let set = [groups.len() as u64, address, 0, 0, 0, 0];
        tape.call("take the groups of then", libc::SYS_setgroups, set);
        let group = [KEEP, ids.gid.into(), KEEP, 0, 0, 0];
        tape.call("take the group of then", libc::SYS_setresgid, group);
        let user = [KEEP, ids.uid.into(), KEEP, 0, 0, 0];
        tape.call("take the user of then", libc::SYS_setresuid, user);
        act(&mut tape, &numbers);
        tape.call("be root again", libc::SYS_setresuid, [KEEP, 0, KEEP, 0, 0, 0]);
        tape.call("be root's group again", libc::SYS_setresgid, [KEEP, 0, KEEP, 0, 0, 0]);
        for number in numbers {
            tape.call("close a descriptor", libc::SYS_close, [number, 0, 0, 0, 0, 0]);
        }
        process.run_all(0, &tape, End::Breakpoint)?;
        Ok(process)
    }

    pub(crate) fn listen(
        &mut self,
        tree: &mut Tree,
        maker: Option<&PeerCredentials>,
        socket: BorrowedFd<'_>,
        backlog: u32,
    ) -> Result<(), RestoreError> {
        self.act(tree, maker, &[socket], |tape, numbers| {
            let socket = numbers.first().copied().unwrap_or(0);
            tape.call("listen", libc::SYS_listen, [socket, backlog.into(), 0, 0, 0, 0]);
        })
        .map(drop)
    }

    pub(crate) fn connect(
        &mut self,
        tree: &mut Tree,
        maker: Option<&PeerCredentials>,
        socket: BorrowedFd<'_>,
        to: &Address,
    ) -> Result<(), RestoreError> {
        let is_outside =
            |maker: &PeerCredentials| maker.ids == MessageCredentials { pid: 0, uid: 0, gid: 0 };
        if maker.is_some_and(is_outside) {
            // Which is what the engine is, for those inside.
            return to
                .reach(|| samara_kernel::unix::connect(socket, to.name()))
                .map_err(make("a unix connection"));
        }
        let address = samara_kernel::unix::address_of(to.name()).map_err(make("an address"))?;
        let files: Vec<BorrowedFd<'_>> = [socket].into_iter().chain(to.directory()).collect();
        self.act(tree, maker, &files, |tape, numbers| {
            if let [_, directory] = *numbers {
                tape.call("change its directory", libc::SYS_fchdir, [directory, 0, 0, 0, 0, 0]);
            }
            let socket = numbers.first().copied().unwrap_or(0);
            let bytes = address.len() as u64;
            let address = tape.data(&address);
            tape.call("connect", libc::SYS_connect, [socket, address, bytes, 0, 0, 0]);
        })
        .map(drop)
    }

    pub(crate) fn pair(
        &mut self,
        tree: &mut Tree,
        maker: Option<&PeerCredentials>,
        kind: i32,
    ) -> Result<[OwnedFd; 2], RestoreError> {
        let mut output = None;
        let kind = u64::from((kind | libc::SOCK_NONBLOCK).unsigned_abs());
        let process = self.act(tree, maker, &[], |tape, _| {
            let pair = tape.output(8);
            let family = u64::from(libc::AF_UNIX.unsigned_abs());
            let arguments = [family, kind, 0, pair.address, 0, 0];
            tape.call("make a socket pair", libc::SYS_socketpair, arguments);
            output = Some(pair);
        })?;
        let output = output.expect("the tape was made");
        let [pair] = words(&process.output(output)?);
        let numbers = [pair & 0xffff_ffff, pair >> 32];
        let handle = PidFd::open(process.pid).map_err(make("a handle on a process"))?;
        let get = |number: u64| -> io::Result<OwnedFd> {
            handle.get_fd(RawFd::try_from(number).map_err(io::Error::other)?)
        };
        let [first, second] = numbers.map(|number| get(number).map_err(make("a pair of sockets")));
        let mut tape = process.tape()?;
        for number in numbers {
            tape.call("close a socket", libc::SYS_close, [number, 0, 0, 0, 0, 0]);
        }
        process.run_all(0, &tape, End::Breakpoint)?;
        Ok([first?, second?])
    }
}
