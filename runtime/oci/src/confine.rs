//! What is taken from a container's process before its program runs: ids, capabilities, limits,
//! new privileges, system calls.
//!
//! libcontainer would do most of it, but not all that runc does, and before our executor runs; so
//! it is handed a process of root with nothing taken away, and this module does the rest in runc's
//! order (docs/decisions/process-confinement.md).
//!
//! Invariant: `apply` is the last thing before `execve`; no code of the container has run yet.

use std::io;

use oci_spec::runtime::{
    Capabilities, LinuxCapabilities, LinuxSeccomp, PosixRlimit, PosixRlimitType, Process,
};
use rustix::io::Errno;
use rustix::process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use crate::seccomp::{Program, SeccompError};

#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error("error setting rlimit type {number} ({name})")]
    Rlimit { number: u32, name: &'static str, source: io::Error },
    #[error("cannot {attempt}")]
    Call { attempt: &'static str, source: io::Error },
    #[error("process.capabilities: {0:?} is not known to this program")]
    Capability(String),
}

/// Everything that `apply` does, decided and checked.
#[derive(Clone, Debug)]
pub struct Confinement {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    caps: CapabilityPlan,
    no_new_privs: bool,
    rlimits: Vec<Limit>,
    seccomp: Option<Program>,
}

/// The five sets; what a specification leaves out is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CapabilityPlan {
    pub(crate) bounding: CapabilitySet,
    effective: CapabilitySet,
    pub(crate) permitted: CapabilitySet,
    inheritable: CapabilitySet,
    ambient: CapabilitySet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    resource: Resource,
    /// RLIMIT_* (asm-generic/resource.h), as runc names it in errors.
    number: u32,
    name: &'static str,
    soft: u64,
    hard: u64,
}

impl Confinement {
    /// Reads the demands of `process` and `seccomp`. Fails for what cannot be carried out at all;
    /// what this host forbids is found by `check`.
    pub fn new(process: &Process, seccomp: Option<&LinuxSeccomp>) -> Result<Self, ConfineError> {
        let user = process.user();
        Ok(Self {
            uid: Uid::from_raw(user.uid()),
            gid: Gid::from_raw(user.gid()),
            groups: user
                .additional_gids()
                .iter()
                .flatten()
                .map(|&gid| Gid::from_raw(gid))
                .collect(),
            caps: CapabilityPlan::new(process.capabilities().as_ref())?,
            no_new_privs: process.no_new_privileges().unwrap_or(false),
            rlimits: process.rlimits().iter().flatten().map(Limit::new).collect(),
            seccomp: seccomp.map(Program::compile).transpose()?,
        })
    }

    pub fn uid(&self) -> Uid {
        self.uid
    }

    /// How many seccomp filters `apply` installs.
    pub fn seccomp_filters(&self) -> u32 {
        u32::from(self.seccomp.is_some())
    }

    /// Finds limits that `apply` could not set, leaving them as they are, so that `create` can
    /// still say so: after `start` nobody listens.
    pub fn check(&self) -> Result<(), ConfineError> {
        for limit in &self.rlimits {
            let before = getrlimit(limit.resource);
            if limit.soft > limit.hard {
                return Err(limit.error(Errno::INVAL));
            }
            if limit.hard > before.maximum.unwrap_or(u64::MAX) {
                // CAP_SYS_RESOURCE of a user namespace does not count, so only trying tells.
                let raised = Rlimit { maximum: finite(limit.hard), ..before };
                setrlimit(limit.resource, raised)
                    .and_then(|()| setrlimit(limit.resource, before))
                    .map_err(|errno| limit.error(errno))?;
            }
        }
        Ok(())
    }

    /// Runs `act` with the ids, groups and effective capabilities that the program will have, and
    /// takes root's back afterwards.
    pub fn as_user<T>(&self, act: impl FnOnce() -> T) -> Result<T, ConfineError> {
        let full = capabilities(None).map_err(|e| call("read the capabilities", e))?;
        let groups = rustix::process::getgroups().map_err(|e| call("read the groups", e))?;
        // Only the effective id changes, so root's stays in reach as the saved one.
        set_thread_groups(&self.groups).map_err(|e| call("set the groups", e))?;
        set_thread_res_gid(None, self.gid, None).map_err(|e| call("set the group", e))?;
        set_thread_res_uid(None, self.uid, None).map_err(|e| call("set the user", e))?;
        let effective = self.caps.effective.intersection(full.permitted);
        set_capabilities(None, CapabilitySets { effective, ..full })
            .map_err(|e| call("set the capabilities", e))?;
        let outcome = act();
        set_capabilities(None, full).map_err(|e| call("take back the capabilities", e))?;
        set_thread_res_uid(None, Uid::ROOT, None).map_err(|e| call("take back the user", e))?;
        set_thread_res_gid(None, Gid::ROOT, None).map_err(|e| call("take back the group", e))?;
        set_thread_groups(&groups).map_err(|e| call("take back the groups", e))?;
        // The change to root made every permitted capability effective again.
        set_capabilities(None, full).map_err(|e| call("take back the capabilities", e))?;
        Ok(outcome)
    }

    /// Confines the calling process for good. `before_filter` runs when everything but a seccomp
    /// filter under `no_new_privs` is in force.
    ///
    /// On failure the process is in between and must end.
    pub fn apply(
        &self,
        before_filter: impl FnOnce() -> Result<(), ConfineError>,
    ) -> Result<(), ConfineError> {
        for limit in &self.rlimits {
            let rlimit = Rlimit { current: finite(limit.soft), maximum: finite(limit.hard) };
            setrlimit(limit.resource, rlimit).map_err(|errno| limit.error(errno))?;
        }
        if self.no_new_privs {
            set_no_new_privs(true).map_err(|e| call("set no_new_privs", e))?;
        } else if let Some(program) = &self.seccomp {
            // Without no_new_privs this takes CAP_SYS_ADMIN, which goes next.
            program.install()?;
        }
        self.caps.drop_bounding()?;
        set_keep_capabilities(true).map_err(|e| call("keep capabilities", e))?;
        set_thread_groups(&self.groups).map_err(|e| call("set the groups", e))?;
        set_thread_res_gid(self.gid, self.gid, self.gid).map_err(|e| call("set the group", e))?;
        set_thread_res_uid(self.uid, self.uid, self.uid).map_err(|e| call("set the user", e))?;
        set_keep_capabilities(false).map_err(|e| call("stop keeping capabilities", e))?;
        self.caps.set()?;
        before_filter()?;
        if let Some(program) = self.seccomp.as_ref().filter(|_| self.no_new_privs) {
            program.install()?;
        }
        Ok(())
    }
}

/// The sets that a process's specification gives it.
pub(crate) fn capability_sets(process: &Process) -> Result<CapabilityPlan, ConfineError> {
    CapabilityPlan::new(process.capabilities().as_ref())
}

impl CapabilityPlan {
    fn new(spec: Option<&LinuxCapabilities>) -> Result<Self, ConfineError> {
        let set = |names: Option<&Capabilities>| {
            names.into_iter().flatten().try_fold(CapabilitySet::empty(), |set, name| {
                // The specification's names are the kernel's.
                let text = serde_json::to_value(name)
                    .ok()
                    .and_then(|value| value.as_str().map(str::to_owned))
                    .unwrap_or_default();
                text.strip_prefix("CAP_")
                    .and_then(CapabilitySet::from_name)
                    .map(|cap| set | cap)
                    .ok_or(ConfineError::Capability(text))
            })
        };
        Ok(Self {
            bounding: set(spec.and_then(|spec| spec.bounding().as_ref()))?,
            effective: set(spec.and_then(|spec| spec.effective().as_ref()))?,
            permitted: set(spec.and_then(|spec| spec.permitted().as_ref()))?,
            inheritable: set(spec.and_then(|spec| spec.inheritable().as_ref()))?,
            ambient: set(spec.and_then(|spec| spec.ambient().as_ref()))?,
        })
    }

    fn drop_bounding(&self) -> Result<(), ConfineError> {
        // Bits above the kernel's last capability answer EINVAL.
        for cap in (CapabilitySet::all() - self.bounding).iter() {
            match remove_capability_from_bounding_set(cap) {
                Ok(()) | Err(Errno::INVAL) => {}
                Err(errno) => return Err(call("drop a bounding capability", errno)),
            }
        }
        Ok(())
    }

    /// What the host itself lacks cannot be given and is left out, as runc does.
    fn set(&self) -> Result<(), ConfineError> {
        let host = capabilities(None).map_err(|e| call("read the capabilities", e))?.permitted;
        let permitted = self.permitted & host;
        let sets = CapabilitySets {
            effective: self.effective & permitted,
            permitted,
            inheritable: self.inheritable & host,
        };
        set_capabilities(None, sets).map_err(|e| call("set the capabilities", e))?;
        match clear_ambient_capability_set() {
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => return Err(call("clear the ambient capabilities", errno)),
        }
        for cap in (self.ambient & sets.permitted & sets.inheritable).iter() {
            configure_capability_in_ambient_set(cap, true)
                .map_err(|e| call("raise an ambient capability", e))?;
        }
        Ok(())
    }
}

impl Limit {
    fn new(spec: &PosixRlimit) -> Self {
        let (resource, number, name) = match spec.typ() {
            PosixRlimitType::RlimitCpu => (Resource::Cpu, 0, "RLIMIT_CPU"),
            PosixRlimitType::RlimitFsize => (Resource::Fsize, 1, "RLIMIT_FSIZE"),
            PosixRlimitType::RlimitData => (Resource::Data, 2, "RLIMIT_DATA"),
            PosixRlimitType::RlimitStack => (Resource::Stack, 3, "RLIMIT_STACK"),
            PosixRlimitType::RlimitCore => (Resource::Core, 4, "RLIMIT_CORE"),
            PosixRlimitType::RlimitRss => (Resource::Rss, 5, "RLIMIT_RSS"),
            PosixRlimitType::RlimitNproc => (Resource::Nproc, 6, "RLIMIT_NPROC"),
            PosixRlimitType::RlimitNofile => (Resource::Nofile, 7, "RLIMIT_NOFILE"),
            PosixRlimitType::RlimitMemlock => (Resource::Memlock, 8, "RLIMIT_MEMLOCK"),
            PosixRlimitType::RlimitAs => (Resource::As, 9, "RLIMIT_AS"),
            PosixRlimitType::RlimitLocks => (Resource::Locks, 10, "RLIMIT_LOCKS"),
            PosixRlimitType::RlimitSigpending => (Resource::Sigpending, 11, "RLIMIT_SIGPENDING"),
            PosixRlimitType::RlimitMsgqueue => (Resource::Msgqueue, 12, "RLIMIT_MSGQUEUE"),
            PosixRlimitType::RlimitNice => (Resource::Nice, 13, "RLIMIT_NICE"),
            PosixRlimitType::RlimitRtprio => (Resource::Rtprio, 14, "RLIMIT_RTPRIO"),
            PosixRlimitType::RlimitRttime => (Resource::Rttime, 15, "RLIMIT_RTTIME"),
        };
        Self { resource, number, name, soft: spec.soft(), hard: spec.hard() }
    }

    fn error(&self, errno: Errno) -> ConfineError {
        ConfineError::Rlimit { number: self.number, name: self.name, source: errno.into() }
    }
}

/// RLIM_INFINITY is the largest number.
fn finite(limit: u64) -> Option<u64> {
    (limit != u64::MAX).then_some(limit)
}

fn call(attempt: &'static str, errno: Errno) -> ConfineError {
    ConfineError::Call { attempt, source: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_names_become_bits() {
        let spec: LinuxCapabilities = serde_json::from_str(
            r#"{"bounding": ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"], "permitted": ["CAP_CHOWN"]}"#,
        )
        .unwrap();
        let plan = CapabilityPlan::new(Some(&spec)).unwrap();
        assert_eq!(plan.bounding, CapabilitySet::CHOWN | CapabilitySet::CHECKPOINT_RESTORE);
        assert_eq!(plan.permitted, CapabilitySet::CHOWN);
        assert_eq!(plan.ambient, CapabilitySet::empty());
    }

    /// runc gives a process without `capabilities` none.
    #[test]
    fn no_capabilities_means_none() {
        let plan = CapabilityPlan::new(None).unwrap();
        assert!(plan.bounding.is_empty() && plan.effective.is_empty());
    }

    #[test]
    fn a_soft_limit_above_the_hard_one_is_found_before_start() {
        let mut process = Process::default();
        let limit: PosixRlimit =
            serde_json::from_str(r#"{"type": "RLIMIT_NOFILE", "soft": 20, "hard": 10}"#).unwrap();
        process.set_rlimits(Some(vec![limit]));
        let error = Confinement::new(&process, None).unwrap().check().unwrap_err();
        assert!(error.to_string().contains("rlimit type 7"), "{error}");
    }
}
