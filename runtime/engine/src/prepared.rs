//! What a capture looks at while the container still runs.
//!
//! Two kinds of things: what can't change (the host's own), and places from which the container is looked at once it stands:
//! views, and threads in its namespaces, which take long to make. Nothing is taken from here that the container could change;
//! that it is still in the namespaces that were entered is seen by their numbers.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use samara_capsule::record::{Bytes, Names, SystemV};
use samara_kernel::Pid;
use samara_kernel::proc::Mapping;
use samara_kernel::setns::Visitor;

use crate::clocks::{self, TimeOffsets};
use crate::process::{Common, Told};
use crate::tracee::Process;
use crate::{descriptors, internet, mappings, names, posix_queues, system_v, thread_facts, vdso};

#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) vdso: vdso::Host,
    pub(crate) common: Common,
    pub(crate) own_offsets: TimeOffsets,
    places: Places,
    reader: Reader,
}

/// A thread that asks what needs no tracer, beside the one that traces: as long as the container stands, there is a processor for it.
#[derive(Debug)]
struct Reader {
    ask: SyncSender<(Vec<Pid>, Arc<Wanted>)>,
    mappings: Receiver<BTreeMap<Pid, io::Result<Vec<Mapping>>>>,
    threads: Receiver<Threads>,
}

/// What was asked of threads.
pub(crate) type Threads = BTreeMap<Pid, io::Result<Told>>;

/// Threads of which is asked what a tracer is not needed for, by whoever has time.
#[derive(Debug)]
struct Wanted {
    tids: Vec<Pid>,
    next: AtomicUsize,
    common: Common,
}

impl Wanted {
    /// Asks of those that nobody has begun with.
    fn ask(&self) -> Threads {
        let mut threads = Threads::new();
        while let Some(tid) = self.tids.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            threads.insert(*tid, Told::of(*tid, &self.common));
        }
        threads
    }
}

/// What a [`Reader`] is going to tell.
#[derive(Debug)]
struct Answers {
    wanted: Arc<Wanted>,
    mappings: Receiver<BTreeMap<Pid, io::Result<Vec<Mapping>>>>,
    threads: Receiver<Threads>,
}

impl Reader {
    fn start() -> io::Result<Reader> {
        let (ask, asked) = sync_channel::<(Vec<Pid>, Arc<Wanted>)>(1);
        let (tell_mappings, mappings) = sync_channel(1);
        let (tell_threads, threads) = sync_channel(1);
        std::thread::Builder::new().spawn(move || {
            let Ok((processes, wanted)) = asked.recv() else { return };
            let look = |pid| (pid, mappings::of(pid));
            let _ = tell_mappings.send(processes.into_iter().map(look).collect());
            let _ = tell_threads.send(wanted.ask());
        })?;
        Ok(Reader { ask, mappings, threads })
    }

    fn go(self, processes: &BTreeMap<Pid, Process>, common: &Common) -> Answers {
        let tids = processes.values().flat_map(|process| &process.threads).map(|thread| thread.tid);
        let (tids, next) = (tids.collect(), AtomicUsize::new(0));
        let wanted = Arc::new(Wanted { tids, next, common: common.clone() });
        let Reader { ask, mappings, threads } = self;
        // Of a reader that is not there any more nothing is heard, and all is read here.
        let _ = ask.try_send((processes.keys().copied().collect(), wanted.clone()));
        Answers { wanted, mappings, threads }
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
    told: Answers,
}

impl Prepared {
    /// Looks at the host, and sends threads to the namespaces of `init`.
    pub(crate) fn look(init: Pid) -> io::Result<Prepared> {
        // For the container's descriptors, and what is opened beside them.
        descriptors::make_room()?;
        mappings::prepare();
        thread_facts::prepare();
        let common = Common::look()?;
        Ok(Prepared {
            vdso: vdso::Host::look()?,
            reader: Reader::start()?,
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
        let told = reader.go(processes, &common);
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

    /// What was asked of the threads of all processes. It is told once.
    pub(crate) fn threads(&self) -> Threads {
        let mut threads = self.told.wanted.ask();
        threads.extend(self.told.threads.recv().unwrap_or_default());
        threads
    }
}
