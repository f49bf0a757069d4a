//! What a container calls its machine.
//!
//! A container goes on with the names that the new one was given, as it does with its addresses, unless the program has set
//! others than it was given.

use std::io;

use samara_capsule::record::{Bytes, Names};
use samara_kernel::setns::{Namespace, Visitor, inside};
use samara_kernel::{Pid, proc};

/// A thread that will read the names of the container; none where they are the host's.
pub(crate) fn visit(init: Pid) -> io::Result<Option<Visitor<Names>>> {
    if is_ours(init)? {
        return Ok(None);
    }
    Visitor::send(init, Namespace::Uts, || Ok(()), |()| Ok(here())).map(Some)
}

/// The names in the calling thread's namespace.
fn here() -> Names {
    let names = rustix::system::uname();
    Names {
        host: Bytes::from(names.nodename().to_bytes()),
        domain: Bytes::from(names.domainname().to_bytes()),
    }
}

/// The names that the program has set, if it has: `names` are those that the container has, `given` those that it was given.
pub(crate) fn changed(names: Option<Names>, given: &GivenNames) -> Option<Names> {
    let unset = |name: &Bytes| name.as_slice() == b"(none)" || name.is_empty();
    names.filter(|names| {
        let host = given.host.as_ref().is_none_or(|host| host.as_bytes() == names.host.as_slice());
        let domain = match &given.domain {
            Some(domain) => domain.as_bytes() == names.domain.as_slice(),
            // Then it is the host's.
            None => unset(&names.domain) || hosts_domain() == names.domain.as_slice(),
        };
        !(host && domain)
    })
}

/// Sets the names that the program had set.
pub(crate) fn restore(init: Pid, names: &Names) -> io::Result<()> {
    if is_ours(init)? {
        return Ok(());
    }
    inside(init, Namespace::Uts, || {
        rustix::system::sethostname(&names.host)?;
        Ok(rustix::system::setdomainname(&names.domain)?)
    })
}

fn hosts_domain() -> Vec<u8> {
    rustix::system::uname().domainname().to_bytes().to_vec()
}

pub(crate) fn is_ours(init: Pid) -> io::Result<bool> {
    let own = i32::try_from(std::process::id()).expect("pids are ints");
    Ok(proc::namespace(init, "uts")? == proc::namespace(own, "uts")?)
}

/// The names that a container was given; none that were left to the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GivenNames {
    pub host: Option<String>,
    pub domain: Option<String>,
}
