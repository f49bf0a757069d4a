//! The life of a container under an OCI engine: `samara-runtime`, which has runc's command line,
//! and `samara-monitor`, which watches a container for captures.
//!
//! libcontainer sets up namespaces, cgroups and root; this crate is what is around it.
//! What is absent: how memory is captured or restored (samara-engine), and where it goes
//! (samara-store).

pub mod address;
mod budget;
pub mod bundle;
pub mod capsule_verbs;
pub mod capture;
pub mod cause;
pub mod cgroup;
pub mod command_line;
pub mod confine;
pub mod container_id;
mod course;
pub mod create;
mod defect;
pub mod device_filter;
pub mod ending;
pub mod events;
pub mod exec;
pub mod fail_point;
pub mod features;
pub mod flags;
pub mod foreground;
mod hand_over;
pub mod hooks;
pub mod init;
pub mod lifecycle;
mod lineage;
pub mod monitor;
pub mod mounts;
pub mod output;
pub mod periodic;
mod plain_dev;
mod preflight;
mod privileges;
pub mod process;
pub mod protocol;
pub mod report;
pub mod restore;
pub mod run;
pub mod saved;
pub mod sealed;
pub mod seccomp;
pub mod signal_name;
pub mod spec_template;
pub mod state_dir;
mod turns;
pub mod update;
