//! What a capture looks at while the container still runs.
//!
//! Two kinds of things: what can't change (the host's own), and places from which the container is looked at once it stands:
//! views, and threads in its namespaces, which take long to make. Nothing is taken from here that the container could change;
//! that it is still in the namespaces that were entered is seen by their numbers.

use std::io;
use std::os::fd::OwnedFd;

use samara_capsule::record::{Bytes, Names, SystemV};
use samara_kernel::Pid;
use samara_kernel::setns::Visitor;

use crate::clocks::{self, TimeOffsets};
use crate::process::Common;
use crate::{descriptors, internet, names, posix_queues, system_v, vdso};

#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) vdso: vdso::Host,
    pub(crate) common: Common,
    pub(crate) own_offsets: TimeOffsets,
    places: Places,
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
pub(crate) struct Awaited(Places);

impl Prepared {
    /// Looks at the host, and sends threads to the namespaces of `init`.
    pub(crate) fn look(init: Pid) -> io::Result<Prepared> {
        // For the container's descriptors, and what is opened beside them.
        descriptors::make_room()?;
        Ok(Prepared {
            vdso: vdso::Host::look()?,
            common: Common::look()?,
            own_offsets: clocks::own_offsets(),
            places: Places::enter(init)?,
        })
    }

    /// The container stands: whoever was sent looks. What was prepared of the host is the rest.
    pub(crate) fn go(self, init: Pid) -> io::Result<(vdso::Host, Common, Awaited)> {
        let Prepared { vdso, common, places, .. } = self;
        // Init may have entered others since.
        let places = if places.hold(init)? { places } else { Places::enter(init)? };
        places.go();
        Ok((vdso, common, Awaited(places)))
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
        self.0.names.take().map(Visitor::found).transpose()
    }

    /// None: the container has no IPC namespace of its own.
    pub(crate) fn system_v(&mut self) -> io::Result<Option<SystemV>> {
        self.0.system_v.take().map(Visitor::found).transpose()
    }

    pub(crate) fn queues(&self) -> Option<&OwnedFd> {
        self.0.queues.as_ref()
    }

    pub(crate) fn interfaces(self) -> io::Result<Vec<(Bytes, Bytes)>> {
        self.0.interfaces.found()
    }
}
