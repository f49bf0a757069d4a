//! What a capture looks at while the container still runs.
//!
//! Two kinds of things: what can't change (the host's own), and places from which the container is looked at once it stands:
//! views, and threads in its namespaces, which take long to make. Nothing is taken from here that the container could change;
//! that it is still in the namespaces that were entered is seen by their numbers.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use samara_capsule::record::{Bytes, Names, SystemV};
use samara_kernel::Pid;
use samara_kernel::proc::Mapping;
use samara_kernel::setns::Visitor;

use crate::clocks::{self, TimeOffsets};
use crate::process::{Common, ThreadFiles};
use crate::tracee::Process;
use crate::{descriptors, internet, memory, names, posix_queues, system_v, vdso};

#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) vdso: vdso::Host,
    pub(crate) common: Common,
    pub(crate) own_offsets: TimeOffsets,
    places: Places,
    reader: Reader,
}

/// A thread that reads files in `/proc` beside the one that traces: as long as the container stands, there is a processor for it.
#[derive(Debug)]
struct Reader {
    /// Processes whose mappings are wanted, and threads.
    ask: SyncSender<(Vec<Pid>, Vec<Pid>)>,
    told: Told,
}

#[derive(Debug)]
struct Told {
    mappings: Receiver<BTreeMap<Pid, io::Result<Vec<Mapping>>>>,
    threads: Receiver<BTreeMap<Pid, io::Result<ThreadFiles>>>,
}

impl Reader {
    fn start(common: Common) -> io::Result<Reader> {
        let (ask, asked) = sync_channel::<(Vec<Pid>, Vec<Pid>)>(1);
        let (tell_mappings, mappings) = sync_channel(1);
        let (tell_threads, threads) = sync_channel(1);
        std::thread::Builder::new().spawn(move || {
            let Ok((processes, tids)) = asked.recv() else { return };
            let look = |pid| (pid, memory::own_mappings(pid));
            let _ = tell_mappings.send(processes.into_iter().map(look).collect());
            let look = |tid| (tid, ThreadFiles::read(tid, &common));
            let _ = tell_threads.send(tids.into_iter().map(look).collect());
        })?;
        Ok(Reader { ask, told: Told { mappings, threads } })
    }

    fn go(self, processes: &BTreeMap<Pid, Process>) -> Told {
        /// Of so few threads the files have been read before another thread has woken.
        const THREADS_MIN: usize = 8;
        let tids = processes.values().flat_map(|process| &process.threads).map(|thread| thread.tid);
        let mut tids: Vec<Pid> = tids.collect();
        if tids.len() < THREADS_MIN {
            tids.clear();
        }
        // A reader that is not there any more has nothing to tell.
        let _ = self.ask.try_send((processes.keys().copied().collect(), tids));
        self.told
    }
}

/// Where a container is looked at.
#[derive(Debug)]
struct Places {
    names: Option<Visitor<Names>>,
    system_v: Option<Visitor<SystemV>>,
    queues: Option<OwnedFd>,
    interfaces: Visitor<Vec<(Bytes, Bytes)>>,
}

/// What those find who were sent.
#[derive(Debug)]
pub(crate) struct Awaited {
    places: Places,
    told: Told,
}

impl Prepared {
    /// Looks at the host, and sends threads to the namespaces of `init`.
    pub(crate) fn look(init: Pid) -> io::Result<Prepared> {
        // For the container's descriptors, and what is opened beside them.
        descriptors::make_room()?;
        let common = Common::look()?;
        Ok(Prepared {
            vdso: vdso::Host::look()?,
            reader: Reader::start(common.clone())?,
            common,
            own_offsets: clocks::own_offsets(),
            places: Places::enter(init)?,
        })
    }

    /// The container stands: whoever was sent looks. What was prepared of the host is the rest.
    pub(crate) fn go(
        self,
        init: Pid,
        processes: &BTreeMap<Pid, Process>,
    ) -> io::Result<(vdso::Host, Common, Awaited)> {
        let Prepared { vdso, common, places, reader, .. } = self;
        let told = reader.go(processes);
        // Init may have entered others since.
        let places = if places.hold(init)? { places } else { Places::enter(init)? };
        places.go();
        Ok((vdso, common, Awaited { places, told }))
    }
}

impl Places {
    fn enter(init: Pid) -> io::Result<Places> {
        Ok(Places {
            names: names::visit(init)?,
            system_v: system_v::visit(init)?,
            queues: posix_queues::view(init)?,
            interfaces: internet::interfaces(init)?,
        })
    }

    /// Whether they are still those of `init`. Without a visitor a namespace is shared with the host.
    fn hold(&self, init: Pid) -> io::Result<bool> {
        let names = match &self.names {
            Some(visitor) => visitor.is_with(init),
            None => names::is_ours(init)?,
        };
        let system_v = match &self.system_v {
            Some(visitor) => visitor.is_with(init),
            None => system_v::shares_namespace(init)?,
        };
        Ok(names && system_v && self.interfaces.is_with(init))
    }

    fn go(&self) {
        if let Some(visitor) = &self.names {
            visitor.go();
        }
        if let Some(visitor) = &self.system_v {
            visitor.go();
        }
        self.interfaces.go();
    }
}

impl Awaited {
    pub(crate) fn names(&mut self) -> io::Result<Option<Names>> {
        self.places.names.take().map(Visitor::found).transpose()
    }

    /// None: the container has no IPC namespace of its own.
    pub(crate) fn system_v(&mut self) -> io::Result<Option<SystemV>> {
        self.places.system_v.take().map(Visitor::found).transpose()
    }

    pub(crate) fn queues(&self) -> Option<&OwnedFd> {
        self.places.queues.as_ref()
    }

    pub(crate) fn interfaces(self) -> io::Result<Vec<(Bytes, Bytes)>> {
        self.places.interfaces.found()
    }

    /// The mappings of each process. They are told once.
    pub(crate) fn mappings(&self) -> BTreeMap<Pid, io::Result<Vec<Mapping>>> {
        self.told.mappings.recv().unwrap_or_default()
    }

    /// What files tell of threads, of which there may be none here. They are told once.
    pub(crate) fn threads(&self) -> BTreeMap<Pid, io::Result<ThreadFiles>> {
        self.told.threads.recv().unwrap_or_default()
    }
}
