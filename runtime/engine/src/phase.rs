//! The edges between the phases of a checkpoint and of a restore, by name.
//!
//! Whoever wants to stand at one says so with [`watch`], once a process: tests end processes there. What this module does not
//! do: anything, where nobody watches.

use std::sync::OnceLock;

/// A phase that has ended. What comes before it has been done, what comes after it has not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Of a checkpoint: the configuration, the store, the lease, the root.
    Prepared,
    /// All memory is tracked, and the container stands for it. Only where much of it was not.
    Covered,
    /// Only where the container was not paused.
    CopiedAhead,
    Stopped,
    Collected,
    /// Memory is left in forks, to be read when the container runs. Only where there are any.
    Forked,
    Copied,
    FilesCopied,
    /// Only where the container stays.
    Thawed,
    /// The forks have been read and have ended. Only where there were any.
    Drained,
    /// The manifest and the slot of the log.
    Committed,
    /// Of a restore: a capsule that nothing stands against; its epoch has been taken.
    Opened,
    RootMade,
    /// A container with a blank init.
    Created,
    /// The blank init is the engine's.
    Begun,
    Spawned,
    Mapped,
    Filled,
    Furnished,
    Confined,
    Resumed,
}

impl Phase {
    /// Those of every checkpoint of a container that runs, in order.
    pub const CHECKPOINT: [Phase; 8] = [
        Phase::Prepared,
        Phase::CopiedAhead,
        Phase::Stopped,
        Phase::Collected,
        Phase::Copied,
        Phase::FilesCopied,
        Phase::Thawed,
        Phase::Committed,
    ];

    /// Those of a restore, in order.
    pub const RESTORE: [Phase; 10] = [
        Phase::Opened,
        Phase::RootMade,
        Phase::Created,
        Phase::Begun,
        Phase::Spawned,
        Phase::Mapped,
        Phase::Filled,
        Phase::Furnished,
        Phase::Confined,
        Phase::Resumed,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Phase::Prepared => "prepared",
            Phase::Covered => "covered",
            Phase::CopiedAhead => "copied-ahead",
            Phase::Stopped => "stopped",
            Phase::Collected => "collected",
            Phase::Forked => "forked",
            Phase::Copied => "copied",
            Phase::FilesCopied => "files-copied",
            Phase::Thawed => "thawed",
            Phase::Drained => "drained",
            Phase::Committed => "committed",
            Phase::Opened => "opened",
            Phase::RootMade => "root-made",
            Phase::Created => "created",
            Phase::Begun => "begun",
            Phase::Spawned => "spawned",
            Phase::Mapped => "mapped",
            Phase::Filled => "filled",
            Phase::Furnished => "furnished",
            Phase::Confined => "confined",
            Phase::Resumed => "resumed",
        }
    }
}

type Watcher = Box<dyn Fn(Phase) + Send + Sync>;

static WATCHER: OnceLock<Watcher> = OnceLock::new();

/// Has `watcher` called at each edge that this process reaches. Only the first call counts.
pub fn watch(watcher: impl Fn(Phase) + Send + Sync + 'static) {
    let _ = WATCHER.set(Box::new(watcher));
}

/// Says that a phase has ended.
pub fn reached(phase: Phase) {
    if let Some(watcher) = WATCHER.get() {
        watcher(phase);
    }
}
