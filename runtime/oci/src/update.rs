//! `update`: other limits for a container that exists.

use std::io::Read;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use crate::bundle::{self, Bundle, BundleError};
use crate::cgroup::CgroupError;
use crate::command_line::{UpdateArgs, UpdateFlags};
use crate::state_dir::{StateDir, StateError, Status};

/// Resources are a part of a specification; the same bound.
const RESOURCES_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("container not running")]
    NotRunning,
    #[error("cannot read the resources from {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} does not hold resources")]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("update --{0} is not supported: Intel RDT is not implemented")]
    IntelRdt(&'static str),
}

/// Sets the limits that `args` name and leaves the others.
pub fn update(dir: &StateDir, args: &UpdateArgs) -> Result<(), UpdateError> {
    let record = dir.load()?;
    if record.status() == Status::Stopped {
        return Err(UpdateError::NotRunning);
    }
    let mut resources = match &args.resources {
        Some(path) => read(path)?,
        None => from_flags(&args.flags)?,
    };
    bundle::refuse_unsupported_resources(Some(&resources))?;
    // Which devices a container may use is settled when it is made.
    resources.set_devices(None);
    let resources = bundle::update_for_libcgroups(resources);
    record.cgroup.update(&resources)?;
    // libcgroups has set its own devices again.
    let spec = Bundle::reload(&dir.config())?;
    let made_with = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    Ok(record.cgroup.deny_host_console(made_with)?)
}

fn read(path: &Path) -> Result<LinuxResources, UpdateError> {
    let error = |source| UpdateError::Read { path: path.to_owned(), source };
    let mut text = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().take(RESOURCES_BYTES_MAX).read_to_end(&mut text)
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(RESOURCES_BYTES_MAX).read_to_end(&mut text))
    }
    .map_err(error)?;
    serde_json::from_slice(&text)
        .map_err(|source| UpdateError::Parse { path: path.to_owned(), source })
}

fn from_flags(flags: &UpdateFlags) -> Result<LinuxResources, UpdateError> {
    if flags.l3_cache_schema.is_some() {
        return Err(UpdateError::IntelRdt("l3-cache-schema"));
    }
    if flags.mem_bw_schema.is_some() {
        return Err(UpdateError::IntelRdt("mem-bw-schema"));
    }
    let mut cpu = LinuxCpu::default();
    cpu.set_period(flags.cpu_period);
    cpu.set_quota(flags.cpu_quota);
    cpu.set_burst(flags.cpu_burst);
    cpu.set_shares(flags.cpu_share);
    cpu.set_realtime_period(flags.cpu_rt_period);
    cpu.set_realtime_runtime(flags.cpu_rt_runtime);
    cpu.set_idle(flags.cpu_idle);
    cpu.set_cpus(flags.cpuset_cpus.clone());
    cpu.set_mems(flags.cpuset_mems.clone());
    let mut memory = LinuxMemory::default();
    memory.set_limit(flags.memory_bytes);
    memory.set_reservation(flags.memory_reservation_bytes);
    memory.set_swap(flags.memory_swap_bytes);
    let mut resources = LinuxResources::default();
    resources.set_cpu(Some(cpu));
    resources.set_memory(Some(memory));
    resources.set_block_io(flags.blkio_weight.map(|weight| {
        let mut io = LinuxBlockIo::default();
        io.set_weight(Some(weight));
        io
    }));
    resources.set_pids(flags.pids_limit.map(|limit| {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        pids
    }));
    Ok(resources)
}
