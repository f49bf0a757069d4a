//! The process that watches one container; `samara-runtime create` starts it.

use std::process::ExitCode;

use samara_oci::container_id::ContainerId;
use samara_oci::monitor;
use samara_oci::process::ProcessIdentity;
use samara_oci::state_dir::StateDir;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let folder = args.next().map(std::path::PathBuf::from);
    let pid = args.next().and_then(|pid| pid.parse().ok());
    let (Some(folder), Some(pid)) = (folder, pid) else {
        eprintln!("samara-monitor is started by samara-runtime");
        return ExitCode::FAILURE;
    };
    let id = folder.file_name().and_then(|name| name.to_str()).map(ContainerId::parse);
    let (Some(root), Some(Ok(id))) = (folder.parent(), id) else { return ExitCode::FAILURE };
    let dir = StateDir::new(root, &id);
    let ended = match args.next().map(|ticks| ticks.parse()) {
        None => monitor::serve(&dir, pid),
        Some(Ok(start_ticks)) => monitor::stand_by(&dir, ProcessIdentity { pid, start_ticks }),
        Some(Err(_)) => return ExitCode::FAILURE,
    };
    // Standard error is /dev/null; the status is for whoever runs it by hand.
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
