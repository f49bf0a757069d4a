//! `checkpoint` and `restore`: what their command lines say. Flags are runc's, and `--capsule URL`.
//!
//! What is not here: anything that acts; see `capture` and `restore`.

use std::path::PathBuf;
use std::time::Duration;

use crate::command_line::{CreateArgs, RunArgs, UsageError, at_most, id_of, path};
use crate::container_id::ContainerId;
use crate::flags::{self, Flag, Order, Parsed, switch, value};
use crate::periodic;

/// What runc's `checkpoint` and `restore` have in common.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ImageArgs {
    /// Address of the capsule; ours.
    pub capsule: Option<String>,
    pub image_path: Option<PathBuf>,
    pub work_path: Option<PathBuf>,
    pub tcp_established: bool,
    pub ext_unix_sk: bool,
    pub shell_job: bool,
    pub file_locks: bool,
    pub lazy_pages: bool,
    pub auto_dedup: bool,
    pub manage_cgroups_mode: Option<String>,
    pub empty_ns: Vec<String>,
}

#[derive(Debug)]
pub struct CheckpointArgs {
    pub id: ContainerId,
    pub image: ImageArgs,
    pub parent_path: Option<PathBuf>,
    pub leave_running: bool,
    /// Save again and again, this often; ours. The inner none: no more.
    pub every: Option<Option<Duration>>,
    /// Whatever the node's budget of captures; ours.
    pub now: bool,
    pub tcp_skip_in_flight: bool,
    pub link_remap: bool,
    pub status_fd: Option<i32>,
    pub page_server: Option<String>,
    pub pre_dump: bool,
}

#[derive(Debug)]
pub struct RestoreArgs {
    pub id: ContainerId,
    pub image: ImageArgs,
    pub bundle: PathBuf,
    pub console_socket: Option<PathBuf>,
    pub pid_file: Option<PathBuf>,
    pub detach: bool,
    pub no_subreaper: bool,
    pub no_pivot: bool,
    pub lsm_profile: Option<String>,
    pub lsm_mount_context: Option<String>,
}

impl RestoreArgs {
    /// A restore is a run that continues from a capsule.
    pub fn as_run(&self) -> RunArgs {
        RunArgs {
            create: CreateArgs {
                id: self.id.clone(),
                bundle: self.bundle.clone(),
                console_socket: self.console_socket.clone(),
                pid_file: self.pid_file.clone(),
                no_pivot: self.no_pivot,
                no_new_keyring: false,
                preserve_fds: 0,
            },
            detach: self.detach,
            keep: false,
            no_subreaper: self.no_subreaper,
        }
    }
}

macro_rules! image_flags {
    ($($own:expr),* $(,)?) => {
        &[
            value(&["capsule"]),
            value(&["image-path"]),
            value(&["work-path"]),
            switch(&["tcp-established"]),
            switch(&["ext-unix-sk"]),
            switch(&["shell-job"]),
            switch(&["file-locks"]),
            switch(&["lazy-pages"]),
            switch(&["auto-dedup"]),
            value(&["manage-cgroups-mode"]),
            value(&["empty-ns"]),
            $($own),*
        ]
    };
}

const CHECKPOINT: &[Flag] = image_flags![
    value(&["parent-path"]),
    switch(&["leave-running"]),
    value(&["every"]),
    switch(&["now"]),
    switch(&["tcp-skip-in-flight"]),
    switch(&["link-remap"]),
    value(&["status-fd"]),
    value(&["page-server"]),
    switch(&["pre-dump"]),
];

const RESTORE: &[Flag] = image_flags![
    value(&["bundle", "b"]),
    value(&["console-socket"]),
    value(&["pid-file"]),
    switch(&["detach", "d"]),
    switch(&["no-subreaper"]),
    switch(&["no-pivot"]),
    value(&["lsm-profile"]),
    value(&["lsm-mount-context"]),
];

/// Parses what stands behind `checkpoint`.
pub fn parse_checkpoint(args: &[String]) -> Result<CheckpointArgs, UsageError> {
    let parsed = flags::parse(CHECKPOINT, Order::Mixed, args)?;
    at_most(1, "checkpoint", &parsed)?;
    let every = parsed.last("every").map(|text| periodic::interval("--every", text));
    Ok(CheckpointArgs {
        id: id_of("checkpoint", &parsed)?,
        image: image_args(&parsed),
        parent_path: path(&parsed, "parent-path"),
        leave_running: parsed.on("leave-running"),
        every: every.transpose().map_err(|error| UsageError::Invalid {
            verb: "checkpoint",
            message: error.to_string(),
        })?,
        now: parsed.on("now"),
        tcp_skip_in_flight: parsed.on("tcp-skip-in-flight"),
        link_remap: parsed.on("link-remap"),
        status_fd: parsed.number("status-fd")?,
        page_server: parsed.last("page-server").filter(|s| !s.is_empty()).map(str::to_owned),
        pre_dump: parsed.on("pre-dump"),
    })
}

/// Parses what stands behind `restore`.
pub fn parse_restore(args: &[String]) -> Result<RestoreArgs, UsageError> {
    let parsed = flags::parse(RESTORE, Order::Mixed, args)?;
    at_most(1, "restore", &parsed)?;
    Ok(RestoreArgs {
        id: id_of("restore", &parsed)?,
        image: image_args(&parsed),
        bundle: path(&parsed, "bundle").unwrap_or_else(|| ".".into()),
        console_socket: path(&parsed, "console-socket"),
        pid_file: path(&parsed, "pid-file"),
        detach: parsed.on("detach"),
        no_subreaper: parsed.on("no-subreaper"),
        no_pivot: parsed.on("no-pivot"),
        lsm_profile: parsed.last("lsm-profile").map(str::to_owned),
        lsm_mount_context: parsed.last("lsm-mount-context").map(str::to_owned),
    })
}

fn image_args(parsed: &Parsed) -> ImageArgs {
    ImageArgs {
        capsule: parsed.last("capsule").map(str::to_owned),
        image_path: path(parsed, "image-path"),
        work_path: path(parsed, "work-path"),
        tcp_established: parsed.on("tcp-established"),
        ext_unix_sk: parsed.on("ext-unix-sk"),
        shell_job: parsed.on("shell-job"),
        file_locks: parsed.on("file-locks"),
        lazy_pages: parsed.on("lazy-pages"),
        auto_dedup: parsed.on("auto-dedup"),
        manage_cgroups_mode: parsed.last("manage-cgroups-mode").map(str::to_owned),
        empty_ns: parsed.all("empty-ns"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    /// docker start --checkpoint calls restore like this, with no create before it.
    #[test]
    fn dockers_restore() {
        let restore = parse_restore(&args(
            "--image-path /c/image --work-path /c/work --bundle /b --pid-file /b/init.pid \
             --detach -no-subreaper --no-pivot abc",
        ))
        .unwrap();
        assert!(restore.detach && restore.no_subreaper && restore.no_pivot);
        assert_eq!(restore.image.image_path, Some("/c/image".into()));
        assert_eq!(restore.id.as_str(), "abc");
    }

    #[test]
    fn ours_names_a_capsule() {
        let checkpoint =
            parse_checkpoint(&args("--capsule s3://b/jobs/42 --leave-running abc")).unwrap();
        assert_eq!(checkpoint.image.capsule.as_deref(), Some("s3://b/jobs/42"));
        assert!(checkpoint.leave_running);
        assert!(parse_checkpoint(&args("--capsule s3://b/jobs/42")).is_err());
    }
}
