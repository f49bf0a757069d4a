//! From records to an order of actions: a pure function, so that what can't be built is known before anything exists.
//!
//! A process can only be born by another one that is in the session it belongs to, and its parent is whoever made it, or that
//! one's parent (`CLONE_PARENT`). Sessions and groups whose leader has ended need a helper with the leader's number, which
//! ends again when the members have been born.

use std::collections::{BTreeMap, BTreeSet};

use samara_capsule::record::{Process, ProcessState};

/// A step of building the tree. All numbers are those of the container's pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// `creator` makes process `pid`, as its own child or (`sibling`) as its parent's.
    Fork { creator: i32, pid: i32, sibling: bool, exit_signal: i32 },
    /// The process becomes the leader of a new session, and of a new group.
    NewSession { pid: i32 },
    /// The process joins a group of its session, or makes it.
    JoinGroup { pid: i32, group: i32 },
    /// A helper ends, and `reaper` waits for it.
    End { pid: i32, reaper: i32 },
}

/// Why no order exists.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("the capsule has no process 1")]
    NoInit,
    #[error("the capsule has two processes {pid}")]
    Twice { pid: i32 },
    #[error("process {pid} has the parent {parent}, which the capsule does not have")]
    NoParent { pid: i32, parent: i32 },
    #[error("process {pid} can't be put into session {session}")]
    Session { pid: i32, session: i32 },
    #[error("process {pid} can't be put into group {group}")]
    Group { pid: i32, group: i32 },
    #[error("the address spaces leave no room for the engine")]
    NoGap,
}

/// The steps that build the tree from its init, which exists and is in session 0 if `init_leads` is false.
pub(crate) fn tree(processes: &[Process], init_leads: bool) -> Result<Vec<Step>, PlanError> {
    let mut plan = Planner {
        records: BTreeMap::new(),
        session: BTreeMap::new(),
        parent: BTreeMap::new(),
        helpers: BTreeMap::new(),
        steps: Vec::new(),
    };
    for process in processes {
        if plan.records.insert(process.pid, process).is_some() {
            return Err(PlanError::Twice { pid: process.pid });
        }
    }
    let init = plan.records.get(&1).copied().ok_or(PlanError::NoInit)?;
    for process in processes.iter().filter(|process| process.pid != 1) {
        if !plan.records.contains_key(&process.parent) || process.parent == process.pid {
            return Err(PlanError::NoParent { pid: process.pid, parent: process.parent });
        }
    }
    plan.session.insert(1, i32::from(init_leads));
    if init.session == 1 && !init_leads {
        plan.new_session(1);
    }
    plan.build(1)?;
    plan.late()?;
    plan.groups()?;
    plan.end_helpers();
    Ok(plan.steps)
}

struct Planner<'a> {
    records: BTreeMap<i32, &'a Process>,
    /// Of what has been made so far.
    session: BTreeMap<i32, i32>,
    parent: BTreeMap<i32, i32>,
    /// Helpers that live, and who made them.
    helpers: BTreeMap<i32, i32>,
    steps: Vec<Step>,
}

impl Planner<'_> {
    fn children(&self, parent: i32) -> Vec<i32> {
        self.records
            .values()
            .filter(|process| process.parent == parent && process.pid != 1)
            .map(|process| process.pid)
            .collect()
    }

    fn wanted_session(&self, pid: i32) -> i32 {
        self.records.get(&pid).map_or(0, |process| process.session)
    }

    fn current_session(&self, pid: i32) -> i32 {
        self.session.get(&pid).copied().unwrap_or(0)
    }

    fn new_session(&mut self, pid: i32) {
        self.steps.push(Step::NewSession { pid });
        self.session.insert(pid, pid);
    }

    fn fork(&mut self, creator: i32, pid: i32, sibling: bool) {
        let exit_signal = match self.records.get(&pid).map(|process| &process.state) {
            Some(ProcessState::Alive(alive)) => alive.exit_signal,
            Some(ProcessState::Zombie { .. }) | None => libc::SIGCHLD,
        };
        self.steps.push(Step::Fork { creator, pid, sibling, exit_signal });
        self.session.insert(pid, self.current_session(creator));
        let parent =
            if sibling { self.parent.get(&creator).copied().unwrap_or(1) } else { creator };
        self.parent.insert(pid, parent);
    }

    /// Makes the descendants of `parent` that can be made where they stand.
    fn build(&mut self, parent: i32) -> Result<(), PlanError> {
        // Depth is bounded by the number of processes; an explicit stack keeps a hostile capsule from using up ours.
        let mut stack = vec![parent];
        while let Some(parent) = stack.pop() {
            let inherited = self.current_session(parent);
            let leads = self.wanted_session(parent) == parent && inherited != parent;
            let (before, after): (Vec<i32>, Vec<i32>) = self
                .children(parent)
                .into_iter()
                .partition(|child| leads && self.wanted_session(*child) == inherited);
            for child in before {
                self.fork(parent, child, false);
                stack.push(child);
            }
            if leads {
                self.new_session(parent);
            }
            let current = self.current_session(parent);
            for child in after {
                let wanted = self.wanted_session(child);
                if wanted == current || wanted == child {
                    self.fork(parent, child, false);
                    if wanted == child && self.children(child).is_empty() {
                        self.new_session(child);
                    }
                    stack.push(child);
                }
            }
        }
        Ok(())
    }

    /// Makes the processes whose session is not their parent's: orphans of sessions that began elsewhere.
    fn late(&mut self) -> Result<(), PlanError> {
        loop {
            let missing: Vec<i32> = self
                .records
                .keys()
                .copied()
                .filter(|pid| !self.session.contains_key(pid))
                .filter(|pid| {
                    self.records
                        .get(pid)
                        .is_some_and(|process| self.session.contains_key(&process.parent))
                })
                .collect();
            if missing.is_empty() {
                return match self.records.keys().find(|pid| !self.session.contains_key(pid)) {
                    None => Ok(()),
                    Some(pid) => {
                        Err(PlanError::Session { pid: *pid, session: self.wanted_session(*pid) })
                    }
                };
            }
            for pid in missing {
                let parent = self.records.get(&pid).map_or(1, |process| process.parent);
                let session = self.wanted_session(pid);
                let sibling = self.session.iter().find(|(other, of)| {
                    **of == session && self.parent.get(*other) == Some(&parent) && **other != 1
                });
                match sibling.map(|(other, _)| *other) {
                    Some(creator) => self.fork(creator, pid, true),
                    None if self.session.values().any(|of| *of == session)
                        || self.records.contains_key(&session) =>
                    {
                        return Err(PlanError::Session { pid, session });
                    }
                    // The leader has ended: a helper takes its number, and its sibling is born.
                    None => {
                        self.fork(parent, session, false);
                        self.new_session(session);
                        self.helpers.insert(session, parent);
                        self.fork(session, pid, true);
                    }
                }
                self.build(pid)?;
            }
        }
    }

    fn groups(&mut self) -> Result<(), PlanError> {
        let wanted: Vec<(i32, i32, i32)> = self
            .records
            .values()
            .map(|process| (process.pid, process.group, process.session))
            .collect();
        // A session's leader leads its group, and nothing can change that.
        let moves: Vec<(i32, i32, i32)> = wanted
            .iter()
            .copied()
            .filter(|(pid, group, _)| {
                *group != 0 && self.session.get(pid) != Some(pid) && *pid != *group
            })
            .collect();
        for (pid, group, _) in &wanted {
            if pid == group && self.session.get(pid) != Some(pid) {
                self.steps.push(Step::JoinGroup { pid: *pid, group: *group });
            }
        }
        let mut leaders: BTreeSet<i32> =
            wanted.iter().filter(|(pid, group, _)| pid == group).map(|(pid, _, _)| *pid).collect();
        leaders.extend(self.helpers.keys());
        for (pid, group, session) in moves {
            if session == 0 || group == session && !self.session.contains_key(&group) {
                continue;
            }
            if !leaders.contains(&group) {
                if self.records.contains_key(&group) {
                    return Err(PlanError::Group { pid, group });
                }
                // The group's leader has ended: a helper with its number makes the group.
                self.fork(pid, group, false);
                self.helpers.insert(group, pid);
                self.steps.push(Step::JoinGroup { pid: group, group });
                leaders.insert(group);
            }
            self.steps.push(Step::JoinGroup { pid, group });
        }
        Ok(())
    }

    fn end_helpers(&mut self) {
        for (pid, reaper) in std::mem::take(&mut self.helpers) {
            self.steps.push(Step::End { pid, reaper });
        }
    }
}

/// A range of `bytes` bytes that none of `occupied` (start, end; in any order) touches, with some distance all around.
pub(crate) fn gap(occupied: &[(u64, u64)], bytes: u64) -> Result<u64, PlanError> {
    /// Above what `vm.mmap_min_addr` and non-position-independent programs use.
    const LOWEST: u64 = 0x1_0000_0000;
    /// Below the top of a process's half with 47 bits, where stacks are.
    const HIGHEST: u64 = 0x7fff_0000_0000;
    /// Stacks may grow, and keep this much free below them (stack_guard_gap).
    const DISTANCE: u64 = 16 << 20;
    let mut ranges = occupied.to_vec();
    ranges.sort_unstable();
    let mut candidate = LOWEST;
    for (start, end) in ranges {
        if start >= candidate.saturating_add(bytes.saturating_add(DISTANCE)) {
            break;
        }
        candidate = candidate.max(end.saturating_add(DISTANCE)).next_multiple_of(4096);
    }
    if candidate.saturating_add(bytes) <= HIGHEST { Ok(candidate) } else { Err(PlanError::NoGap) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use samara_capsule::record::Bytes;

    fn process(pid: i32, parent: i32, group: i32, session: i32) -> Process {
        let state = ProcessState::Zombie { exit_status: 0 };
        Process { pid, parent, group, session, name: Bytes::new(), state }
    }

    /// Carries the steps out on a model of the kernel and compares what comes of them.
    fn check(processes: &[Process]) {
        let steps = tree(processes, true).expect("a plan");
        let mut model: BTreeMap<i32, (i32, i32, i32)> = BTreeMap::from([(1, (0, 1, 1))]);
        for step in &steps {
            match *step {
                Step::Fork { creator, pid, sibling, .. } => {
                    let (parent, group, session) = model[&creator];
                    assert!(!sibling || creator != 1, "init has no siblings");
                    let parent = if sibling { parent } else { creator };
                    assert!(model.insert(pid, (parent, group, session)).is_none(), "{pid} exists");
                }
                Step::NewSession { pid } => {
                    let entry = model.get_mut(&pid).expect("exists");
                    assert_ne!(entry.1, pid, "setsid fails for a group leader");
                    (entry.1, entry.2) = (pid, pid);
                }
                Step::JoinGroup { pid, group } => {
                    let session = model[&pid].2;
                    assert_ne!(session, pid, "a session leader can't change its group");
                    assert!(
                        pid == group
                            || model.values().any(|(_, of, its)| *of == group && *its == session),
                        "group {group} does not exist in the session"
                    );
                    model.get_mut(&pid).expect("exists").1 = group;
                }
                Step::End { pid, reaper } => {
                    assert_eq!(model.remove(&pid).expect("exists").0, reaper);
                    assert!(
                        !model.values().any(|(parent, _, _)| *parent == pid),
                        "{pid} has children"
                    );
                }
            }
        }
        let wanted: BTreeMap<i32, (i32, i32, i32)> = processes
            .iter()
            .map(|process| (process.pid, (process.parent, process.group, process.session)))
            .collect();
        assert_eq!(model, wanted, "{steps:?}");
    }

    /// A job in the wrong session or group loses its terminal or its signals.
    #[test]
    fn trees_are_built_as_recorded() {
        check(&[process(1, 0, 1, 1)]);
        // A shell pipeline, in groups of its own.
        check(&[
            process(1, 0, 1, 1),
            process(7, 1, 7, 1),
            process(8, 1, 7, 1),
            process(9, 8, 7, 1),
        ]);
        // A leader of a session with a child that was made before it became one.
        check(&[
            process(1, 0, 1, 1),
            process(5, 1, 5, 5),
            process(6, 5, 1, 1),
            process(7, 5, 5, 5),
        ]);
        // A daemon whose session's leader has ended.
        check(&[
            process(1, 0, 1, 1),
            process(9, 1, 8, 8),
            process(10, 9, 8, 8),
            process(11, 1, 8, 8),
        ]);
        // A group whose leader has ended.
        check(&[process(1, 0, 1, 1), process(12, 1, 11, 1), process(13, 1, 11, 1)]);
        // An orphan of a session whose leader lives beside it.
        check(&[process(1, 0, 1, 1), process(3, 1, 3, 3), process(4, 1, 3, 3)]);
    }

    #[test]
    fn broken_trees_are_refused() {
        assert_eq!(tree(&[process(2, 1, 1, 1)], true), Err(PlanError::NoInit));
        let orphan = [process(1, 0, 1, 1), process(3, 2, 1, 1)];
        assert_eq!(tree(&orphan, true), Err(PlanError::NoParent { pid: 3, parent: 2 }));
        let twice = [process(1, 0, 1, 1), process(3, 1, 1, 1), process(3, 1, 1, 1)];
        assert_eq!(tree(&twice, true), Err(PlanError::Twice { pid: 3 }));
    }

    #[test]
    fn gaps_avoid_everything() {
        let occupied = [(0x7000_0000_0000, 0x7000_1000_0000), (0x1_0000_0000, 0x1_0010_0000)];
        let found = gap(&occupied, 1 << 20).expect("room");
        assert!(occupied.iter().all(|(start, end)| found + (1 << 20) <= *start || found >= *end));
        assert_eq!(gap(&[(0, 0x7fff_0000_0000)], 4096), Err(PlanError::NoGap));
    }
}
