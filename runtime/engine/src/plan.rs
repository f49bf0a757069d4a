//! From records to an order of actions: a pure function, so that what can't be built is known before anything exists.
//!
//! A process is in the session of the one that made it until it makes its own; its parent is its maker, the maker's parent
//! (`CLONE_PARENT`), or, once its parent has ended, the nearest subreaper above that one or else init. Every tree that a
//! program can have got came about by these rules, and each case below is one of the ways:
//!
//! - A child in its parent's session is forked there.
//! - A child in a session that its parent was born in and has left since is forked before the parent makes its own.
//! - Any other child is an orphan. Somebody of its session below its parent makes a helper, that one makes the child and ends,
//!   and the parent, as a subreaper for this moment, inherits the child.
//! - The leader of a session whose orphans have a parent below the leader's own is born down there, under a helper, and moves
//!   up when the orphans exist. A leader that has ended is a helper with its number.
//! - So is a process whose descendants are in one session with orphans of another process that is not above it: it was, until
//!   somebody between them ended.
//!
//! A process that shares memory or tables with others is made by one of those.
//!
//! What this module refuses: orphans of a process that was a subreaper and is none any more, and siblings of a leader that has
//! ended and sent another signal than SIGCHLD, both in rare combinations; and sharing that went through a process which has
//! given it up since.

use std::collections::{BTreeMap, BTreeSet};

use samara_capsule::record::{Process, ProcessState, Sharing};

/// A step of building the tree. All numbers are those of the container's pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// `creator` makes process `pid`, as its own child or (`sibling`) as its parent's. `shared`: flags of `clone` for what both
    /// go on to share.
    Fork { creator: i32, pid: i32, sibling: bool, exit_signal: i32, shared: i32 },
    /// The process becomes the leader of a new session, and of a new group.
    NewSession { pid: i32 },
    /// The process joins a group of its session, or makes it.
    JoinGroup { pid: i32, group: i32 },
    /// Orphans below the process become its children from now on, or no longer.
    Adopt { pid: i32, on: bool },
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
    #[error("process {pid} can't be put into session {session} as a child of process {parent}")]
    Session { pid: i32, session: i32, parent: i32 },
    #[error("process {pid} can't be made by one that it shares memory or tables with")]
    Sharing { pid: i32 },
    #[error("process {pid} can't be put into group {group}")]
    Group { pid: i32, group: i32 },
    #[error("the address spaces leave no room for the engine")]
    NoGap,
}

/// The steps that build the tree from its init, which exists and is in session 0 if `init_leads` is false.
pub(crate) fn tree<'a>(
    processes: impl IntoIterator<Item = &'a Process>,
    init_leads: bool,
) -> Result<Vec<Step>, PlanError> {
    let mut records = BTreeMap::new();
    for process in processes {
        if records.insert(process.pid, process).is_some() {
            return Err(PlanError::Twice { pid: process.pid });
        }
    }
    if !records.contains_key(&1) {
        return Err(PlanError::NoInit);
    }
    for process in records.values().filter(|process| process.pid != 1) {
        if !records.contains_key(&process.parent) || process.parent == process.pid {
            return Err(PlanError::NoParent { pid: process.pid, parent: process.parent });
        }
    }
    let mut plan = Planner::new(Wanted::new(records), init_leads);
    plan.build()?;
    plan.groups()?;
    plan.end_helpers();
    Ok(plan.steps)
}

/// The tree as it shall be, and what follows from it for the births.
struct Wanted<'a> {
    records: BTreeMap<i32, &'a Process>,
    children: BTreeMap<i32, Vec<i32>>,
    /// Leaders that have to be born in a session that is not theirs in the end, because children of theirs are in it.
    birth: BTreeMap<i32, i32>,
    /// For a session: the lowest process that has orphans of it as children without having been in it.
    below: BTreeMap<i32, i32>,
    /// Processes that have to be born below another one than their parent, and the session whose orphans that one gets meanwhile.
    under: BTreeMap<i32, Under>,
    /// Processes of each session, by birth, without its leader.
    members: BTreeMap<i32, BTreeSet<i32>>,
    /// Processes that share something, by what it is and who is the first that has it.
    sharers: BTreeMap<(i32, i32), BTreeSet<i32>>,
    /// Numbers that mean something in the container.
    taken: BTreeSet<i32>,
}

/// Where a process is until all of a session exist.
#[derive(Clone, Copy)]
struct Under {
    place: i32,
    session: i32,
}

/// What [`Sharing`] lists, with the flag of `clone` for each.
fn shared_things(sharing: &Sharing) -> [(i32, Option<i32>); 4] {
    [
        (libc::CLONE_VM, sharing.memory),
        (libc::CLONE_FILES, sharing.descriptors),
        (libc::CLONE_FS, sharing.directory),
        (libc::CLONE_SIGHAND, sharing.actions),
    ]
}

impl<'a> Wanted<'a> {
    fn new(records: BTreeMap<i32, &'a Process>) -> Wanted<'a> {
        let mut wanted = Wanted {
            records,
            children: BTreeMap::new(),
            birth: BTreeMap::new(),
            below: BTreeMap::new(),
            under: BTreeMap::new(),
            members: BTreeMap::new(),
            sharers: BTreeMap::new(),
            taken: BTreeSet::from([0, 1]),
        };
        for process in wanted.records.values() {
            wanted.taken.extend([process.pid, process.group, process.session]);
            if process.pid != 1 {
                wanted.children.entry(process.parent).or_default().push(process.pid);
            }
            if process.session != process.pid {
                wanted.members.entry(process.session).or_default().insert(process.pid);
            }
            if let ProcessState::Alive(alive) = &process.state {
                wanted.taken.extend(alive.threads.iter().map(|thread| thread.tid));
                for (kind, first) in shared_things(&alive.sharing) {
                    if let Some(first) = first {
                        wanted
                            .sharers
                            .entry((kind, first))
                            .or_default()
                            .extend([first, process.pid]);
                    }
                }
            }
        }
        wanted.decide_births();
        wanted
    }

    fn session(&self, pid: i32) -> i32 {
        self.records.get(&pid).map_or(0, |process| process.session)
    }

    fn parent(&self, pid: i32) -> i32 {
        self.records.get(&pid).map_or(0, |process| process.parent)
    }

    fn leads(&self, pid: i32) -> bool {
        self.session(pid) == pid
    }

    /// The session that a process has to be born in; none where any will do.
    fn birth_session(&self, pid: i32) -> Option<i32> {
        if self.leads(pid) { self.birth.get(&pid).copied() } else { Some(self.session(pid)) }
    }

    fn is_above(&self, ancestor: i32, pid: i32) -> bool {
        let mut current = pid;
        // A chain is no longer than there are processes, and in a damaged capsule it may be a ring.
        for _ in 0..self.records.len() {
            current = self.parent(current);
            if current == ancestor {
                return true;
            }
            if current == 0 {
                return false;
            }
        }
        false
    }

    fn depth(&self, pid: i32) -> usize {
        let mut current = pid;
        let steps = (0..self.records.len()).take_while(|_| {
            current = self.parent(current);
            current != 0
        });
        steps.count()
    }

    /// For every session: which parents of its processes were born in it, and which have adopted.
    fn decide_births(&mut self) {
        let sessions: Vec<i32> = self.members.keys().copied().collect();
        for session in sessions {
            let mut above = BTreeSet::new();
            let mut pending: Vec<i32> =
                self.members.get(&session).into_iter().flatten().copied().collect();
            // Below what is found to have been born in it, more have been.
            while let Some(pid) = pending.pop().or_else(|| self.overlooked(session, &mut above)) {
                let parent = self.parent(pid);
                if self.session(parent) == session
                    || self.birth.get(&parent) == Some(&session)
                    || above.contains(&parent)
                {
                    continue;
                }
                if self.was_born_in(parent, session, pid) {
                    self.set_birth(parent, session);
                    pending.push(parent);
                } else {
                    above.insert(parent);
                }
            }
            // Adoptive parents are one above the other, since each was above the session's leader. What is not has been born in it.
            while let Some(lowest) = above.iter().copied().max_by_key(|pid| self.depth(*pid)) {
                let strays = || {
                    let strays = above.iter().copied();
                    strays.filter(|pid| *pid != lowest && !self.is_first_above(*pid, lowest))
                };
                let Some(stray) = strays().find(|pid| self.may_be_born_in(*pid)) else {
                    // What is not above it now has been so once.
                    if let Some((pid, place)) =
                        strays().find_map(|stray| Some((self.movable(lowest, stray)?, stray)))
                    {
                        self.under.insert(pid, Under { place, session });
                        continue;
                    }
                    self.below.insert(session, lowest);
                    break;
                };
                above.remove(&stray);
                self.set_birth(stray, session);
                let parent = self.parent(stray);
                if self.session(parent) != session && self.birth.get(&parent) != Some(&session) {
                    above.insert(parent);
                }
            }
        }
    }

    /// One of `above` that is below a member of a session whose leader has ended: nobody there can be above that leader.
    fn overlooked(&mut self, session: i32, above: &mut BTreeSet<i32>) -> Option<i32> {
        if self.records.contains_key(&session) {
            return None;
        }
        let members = self.members.get(&session)?;
        let found = above.iter().copied().find(|pid| {
            self.may_be_born_in(*pid) && members.iter().any(|member| self.is_above(*member, *pid))
        })?;
        above.remove(&found);
        self.set_birth(found, session);
        Some(found)
    }

    /// The parent that a process has at first.
    fn first_parent(&self, pid: i32) -> i32 {
        self.under.get(&pid).map_or_else(|| self.parent(pid), |under| under.place)
    }

    fn is_first_above(&self, ancestor: i32, pid: i32) -> bool {
        let mut current = pid;
        // As in `is_above`.
        for _ in 0..self.records.len() {
            current = self.first_parent(current);
            if current == ancestor {
                return true;
            }
            if current == 0 {
                return false;
            }
        }
        false
    }

    /// Which of `pid` and what is above it can be born below `place` and move to its parent later: the highest that has its
    /// parent in common with `place` or something above that.
    fn movable(&self, pid: i32, place: i32) -> Option<i32> {
        let mut current = pid;
        for _ in 0..self.records.len() {
            let parent = self.first_parent(current);
            if parent == 0 {
                return None;
            }
            if self.is_first_above(parent, place) {
                let orphan = self.exit_signal(current) == libc::SIGCHLD;
                return (orphan && !self.under.contains_key(&current)).then_some(current);
            }
            current = parent;
        }
        None
    }

    fn exit_signal(&self, pid: i32) -> i32 {
        match self.records.get(&pid).map(|process| &process.state) {
            Some(ProcessState::Alive(alive)) => alive.exit_signal,
            Some(ProcessState::Zombie { exit_signal, .. }) => *exit_signal,
            None => libc::SIGCHLD,
        }
    }

    fn set_birth(&mut self, pid: i32, session: i32) {
        self.birth.insert(pid, session);
        self.members.entry(session).or_default().insert(pid);
    }

    fn may_be_born_in(&self, pid: i32) -> bool {
        pid != 1 && self.leads(pid) && !self.birth.contains_key(&pid)
    }

    /// Whether the parent of a process of a session is its parent because it was born in that session.
    fn was_born_in(&self, parent: i32, session: i32, child: i32) -> bool {
        if !self.may_be_born_in(parent) {
            return false;
        }
        if self.records.contains_key(&session) {
            return !self.is_above(parent, session);
        }
        // All orphans send the same.
        if self.exit_signal(child) != libc::SIGCHLD {
            return true;
        }
        // Below a process of the session nobody is above its leader.
        let members = self.members.get(&session);
        if members.is_some_and(|members| members.iter().any(|pid| self.is_above(*pid, parent))) {
            return true;
        }
        // Nothing else adopts.
        let adopts = self.records.get(&parent).is_some_and(|process| match &process.state {
            ProcessState::Alive(alive) => alive.subreaper,
            ProcessState::Zombie { .. } => false,
        });
        !adopts
    }
}

/// A process that has been made.
#[derive(Clone, Copy)]
struct Made {
    parent: i32,
    session: i32,
    exit_signal: i32,
}

/// How a process is made.
struct Birth {
    creator: i32,
    way: Way,
}

enum Way {
    Child,
    Sibling,
    /// By a helper that ends at once.
    Orphan,
    /// By a helper that lives until the session's other processes exist.
    Low,
}

struct Planner<'a> {
    wanted: Wanted<'a>,
    made: BTreeMap<i32, Made>,
    in_session: BTreeMap<i32, BTreeSet<i32>>,
    /// Leaders and groups that have ended.
    helpers: BTreeSet<i32>,
    /// Those that were born too low, with the helper above them.
    low: BTreeMap<i32, i32>,
    steps: Vec<Step>,
}

impl<'a> Planner<'a> {
    fn new(wanted: Wanted<'a>, init_leads: bool) -> Planner<'a> {
        let mut plan = Planner {
            wanted,
            made: BTreeMap::new(),
            in_session: BTreeMap::new(),
            helpers: BTreeSet::new(),
            low: BTreeMap::new(),
            steps: Vec::new(),
        };
        let init = Made { parent: 0, session: i32::from(init_leads), exit_signal: libc::SIGCHLD };
        plan.note(1, init);
        plan
    }

    fn note(&mut self, pid: i32, made: Made) {
        self.made.insert(pid, made);
        self.in_session.entry(made.session).or_default().insert(pid);
    }

    fn forget(&mut self, pid: i32) {
        if let Some(made) = self.made.remove(&pid)
            && let Some(members) = self.in_session.get_mut(&made.session)
        {
            members.remove(&pid);
        }
    }

    fn current_session(&self, pid: i32) -> Option<i32> {
        self.made.get(&pid).map(|made| made.session)
    }

    fn current_parent(&self, pid: i32) -> i32 {
        self.made.get(&pid).map_or(0, |made| made.parent)
    }

    fn is_made(&self, pid: i32) -> bool {
        self.made.contains_key(&pid)
    }

    fn is_now_above(&self, ancestor: i32, pid: i32) -> bool {
        let mut current = self.current_parent(pid);
        while current != 0 {
            if current == ancestor {
                return true;
            }
            current = self.current_parent(current);
        }
        false
    }

    /// A number that means nothing in the container.
    fn free_number(&self) -> i32 {
        (2..)
            .find(|number| !self.wanted.taken.contains(number) && !self.is_made(*number))
            .expect("the kernel has fewer processes than numbers")
    }

    /// Makes all processes in their sessions.
    fn build(&mut self) -> Result<(), PlanError> {
        let mut pending: Vec<i32> =
            self.wanted.records.keys().copied().filter(|pid| *pid != 1).collect();
        loop {
            let before = self.steps.len();
            self.make_sessions();
            let mut waiting = Vec::new();
            for pid in std::mem::take(&mut pending) {
                match self.way_to_make(pid) {
                    Some(birth) => {
                        self.make(pid, &birth);
                        self.make_session_of(pid);
                        self.make_session_of(self.wanted.parent(pid));
                    }
                    None => waiting.push(pid),
                }
            }
            pending = waiting;
            self.lift();
            if self.steps.len() == before {
                break;
            }
        }
        let stuck = pending.first().copied().or_else(|| {
            // An init that can't be in another session than its blank one is.
            self.wanted
                .records
                .keys()
                .copied()
                .find(|pid| self.current_session(*pid) != Some(self.wanted.session(*pid)))
        });
        match stuck {
            None => Ok(()),
            Some(pid) if self.makers(pid).is_some_and(|makers| !makers.is_empty()) => {
                Err(PlanError::Sharing { pid })
            }
            Some(pid) => Err(PlanError::Session {
                pid,
                session: self.wanted.session(pid),
                parent: self.wanted.parent(pid),
            }),
        }
    }

    /// Lets leaders make their sessions, and makes helpers for leaders that have ended.
    fn make_sessions(&mut self) {
        self.make_session_of(1);
        let ended: Vec<(i32, i32)> = self
            .wanted
            .below
            .iter()
            .map(|(session, below)| (*session, *below))
            .filter(|(session, below)| {
                *session != 0
                    && !self.wanted.records.contains_key(session)
                    && !self.is_made(*session)
                    && self.is_made(*below)
            })
            .collect();
        for (session, below) in ended {
            // What a sibling of the leader sends in the end is what the leader would have sent; an orphan sends SIGCHLD.
            let exit_signal = self
                .wanted
                .members
                .get(&session)
                .into_iter()
                .flatten()
                .filter(|pid| self.wanted.parent(**pid) == below)
                .map(|pid| self.wanted.exit_signal(*pid))
                .find(|signal| *signal != libc::SIGCHLD)
                .unwrap_or(libc::SIGCHLD);
            self.fork(below, session, false, exit_signal, 0);
            self.new_session(session);
            self.helpers.insert(session);
        }
    }

    /// Lets a leader make its session once the children exist that it had before.
    fn make_session_of(&mut self, pid: i32) {
        let Some(current) = self.current_session(pid) else { return };
        if current == pid || !self.wanted.leads(pid) {
            return;
        }
        let waits = self.wanted.children.get(&pid).into_iter().flatten().any(|child| {
            !self.is_made(*child) && self.wanted.birth_session(*child) == Some(current)
        });
        if !waits {
            self.new_session(pid);
        }
    }

    fn new_session(&mut self, pid: i32) {
        self.steps.push(Step::NewSession { pid });
        if let Some(made) = self.made.get(&pid).copied() {
            self.forget(pid);
            self.note(pid, Made { session: pid, ..made });
        }
    }

    /// Those that may make a process because it shares something with each of them; none where anybody may.
    fn makers(&self, pid: i32) -> Option<BTreeSet<i32>> {
        let mut makers: Option<BTreeSet<i32>> = None;
        for sharers in self.wanted.sharers.values().filter(|sharers| sharers.contains(&pid)) {
            let made: BTreeSet<i32> =
                sharers.iter().copied().filter(|sharer| self.is_made(*sharer)).collect();
            if made.is_empty() {
                continue;
            }
            makers = Some(match makers {
                None => made,
                Some(others) => others.intersection(&made).copied().collect(),
            });
        }
        makers
    }

    /// How a process can be made as things stand, if it can.
    fn way_to_make(&self, pid: i32) -> Option<Birth> {
        let parent = self.wanted.parent(pid);
        let session = self.wanted.birth_session(pid);
        if !self.is_made(parent) {
            return None;
        }
        let makers = self.makers(pid);
        let suits = |creator: i32| {
            session.is_none_or(|session| self.current_session(creator) == Some(session))
                && makers.as_ref().is_none_or(|makers| makers.contains(&creator))
        };
        let candidates = || -> Vec<i32> {
            let everybody = || self.made.keys().copied().collect();
            match (&makers, session) {
                (Some(makers), _) => makers.iter().copied().collect(),
                (None, Some(session)) => {
                    self.in_session.get(&session).into_iter().flatten().copied().collect()
                }
                (None, None) => everybody(),
            }
        };
        if let Some(below) = self.low_place(pid) {
            let creator = candidates().into_iter().find(|creator| {
                suits(*creator) && (*creator == below || self.is_now_above(below, *creator))
            })?;
            return Some(Birth { creator, way: Way::Low });
        }
        if suits(parent) {
            return Some(Birth { creator: parent, way: Way::Child });
        }
        let candidates = candidates();
        let exit_signal = self.wanted.exit_signal(pid);
        // Init has no siblings.
        let sibling = candidates.iter().copied().find(|creator| {
            *creator != 1
                && suits(*creator)
                && self
                    .made
                    .get(creator)
                    .is_some_and(|made| made.parent == parent && made.exit_signal == exit_signal)
        });
        if let Some(creator) = sibling {
            return Some(Birth { creator, way: Way::Sibling });
        }
        // The kernel lets all orphans send the same.
        if exit_signal != libc::SIGCHLD {
            return None;
        }
        let creator = candidates
            .into_iter()
            .find(|creator| suits(*creator) && self.is_now_above(parent, *creator))?;
        Some(Birth { creator, way: Way::Orphan })
    }

    /// Below which process another one has to be born, if that is not where it belongs.
    fn low_place(&self, pid: i32) -> Option<i32> {
        if let Some(under) = self.wanted.under.get(&pid) {
            return Some(under.place);
        }
        if !self.wanted.leads(pid) {
            return None;
        }
        let below = *self.wanted.below.get(&pid)?;
        let parent = self.wanted.parent(pid);
        (below != parent && !self.wanted.is_above(below, parent)).then_some(below)
    }

    /// The flags of `clone` for all that two processes share.
    fn shared(&self, creator: i32, pid: i32) -> i32 {
        self.wanted
            .sharers
            .iter()
            .filter(|(_, sharers)| sharers.contains(&creator) && sharers.contains(&pid))
            .fold(0, |flags, ((kind, _), _)| flags | kind)
    }

    fn fork(&mut self, creator: i32, pid: i32, sibling: bool, exit_signal: i32, shared: i32) {
        self.steps.push(Step::Fork { creator, pid, sibling, exit_signal, shared });
        let parent = if sibling { self.current_parent(creator) } else { creator };
        let session = self.current_session(creator).unwrap_or(0);
        self.note(pid, Made { parent, session, exit_signal });
    }

    fn make(&mut self, pid: i32, birth: &Birth) {
        let creator = birth.creator;
        let exit_signal = self.wanted.exit_signal(pid);
        let shared = self.shared(creator, pid);
        match birth.way {
            Way::Child => self.fork(creator, pid, false, exit_signal, shared),
            Way::Sibling => self.fork(creator, pid, true, exit_signal, shared),
            Way::Orphan => {
                let helper = self.free_number();
                self.fork(creator, helper, false, libc::SIGCHLD, shared);
                self.fork(helper, pid, false, libc::SIGCHLD, shared);
                self.adopt(self.wanted.parent(pid), pid, helper);
            }
            Way::Low => {
                let helper = self.free_number();
                self.fork(creator, helper, false, libc::SIGCHLD, shared);
                self.fork(helper, pid, false, libc::SIGCHLD, shared);
                self.low.insert(pid, helper);
            }
        }
    }

    /// A helper ends, and its child becomes another one's.
    fn adopt(&mut self, parent: i32, child: i32, helper: i32) {
        // Init adopts without being told.
        if parent != 1 {
            self.steps.push(Step::Adopt { pid: parent, on: true });
        }
        self.steps.push(Step::End { pid: helper, reaper: self.current_parent(helper) });
        if parent != 1 {
            self.steps.push(Step::Adopt { pid: parent, on: false });
        }
        self.forget(helper);
        if let Some(made) = self.made.get_mut(&child) {
            made.parent = parent;
        }
    }

    /// Moves those up to where they belong on whom no session waits any more.
    fn lift(&mut self) {
        let complete: Vec<(i32, i32)> = self
            .low
            .iter()
            .map(|(pid, helper)| (*pid, *helper))
            .filter(|(pid, _)| {
                let awaited = self.wanted.under.get(pid).map(|under| under.session);
                // A leader that is low for its own session has it by then.
                awaited.or(self.current_session(*pid).filter(|session| session == pid)).is_some_and(
                    |session| {
                        self.wanted.members.get(&session).is_none_or(|members| {
                            members.iter().all(|member| self.is_made(*member))
                        })
                    },
                )
            })
            .collect();
        for (pid, helper) in complete {
            self.low.remove(&pid);
            self.adopt(self.wanted.parent(pid), pid, helper);
        }
    }

    /// Puts all processes into their groups.
    ///
    /// All of a group are in one session, and so is the process whose number it has, if that lives.
    fn groups(&mut self) -> Result<(), PlanError> {
        // A session's leader leads its group, and nothing can change that.
        let mut members: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
        for process in self.wanted.records.values() {
            let from_outside = process.group == 0 || process.session == 0;
            if !self.wanted.leads(process.pid) && !from_outside {
                members.entry(process.group).or_default().push(process.pid);
            }
        }
        let mut leaving = Vec::new();
        for (group, members) in members {
            let Some(first) = members.first().copied() else { continue };
            let session = self.wanted.session(first);
            if let Some(stranger) = members.iter().find(|pid| self.wanted.session(**pid) != session)
            {
                return Err(PlanError::Group { pid: *stranger, group });
            }
            // The session's own group exists with the session.
            if group != session {
                match self.current_session(group) {
                    Some(of) if of == session && group != 1 => {}
                    Some(_) => return Err(PlanError::Group { pid: first, group }),
                    // The group's leader has ended: a helper with its number makes the group.
                    None => {
                        self.fork(first, group, false, libc::SIGCHLD, 0);
                        self.helpers.insert(group);
                    }
                }
                self.steps.push(Step::JoinGroup { pid: group, group });
            }
            leaving.extend(members.into_iter().filter(|pid| *pid != group).map(|pid| (pid, group)));
        }
        // Those whose number a group has leave it last, and only when others are in it already whom the rest can join.
        let groups: BTreeSet<i32> = leaving.iter().map(|(_, group)| *group).collect();
        let (mut leaders, others) =
            leaving.into_iter().partition::<Vec<_>, _>(|(pid, _)| groups.contains(pid));
        let mut inside: BTreeSet<i32> = others.iter().map(|(_, group)| *group).collect();
        let join = |(pid, group)| Step::JoinGroup { pid, group };
        self.steps.extend(others.into_iter().map(join));
        while let Some(last) = leaders.last().copied() {
            let free = leaders.iter().position(|(pid, _)| {
                inside.contains(pid) || leaders.iter().all(|(_, group)| group != pid)
            });
            let Some(free) = free else {
                return Err(PlanError::Group { pid: last.0, group: last.1 });
            };
            let (pid, group) = leaders.remove(free);
            inside.insert(group);
            self.steps.push(join((pid, group)));
        }
        Ok(())
    }

    fn end_helpers(&mut self) {
        for pid in std::mem::take(&mut self.helpers) {
            self.steps.push(Step::End { pid, reaper: self.current_parent(pid) });
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
    use samara_capsule::record::{Alive, Bytes};

    fn zombie(pid: i32, parent: i32, group: i32, session: i32, exit_signal: i32) -> Process {
        let state = ProcessState::Zombie { exit_status: 0, exit_signal, uid: 0 };
        Process { pid, parent, group, session, name: Bytes::new(), state }
    }

    fn process(pid: i32, parent: i32, group: i32, session: i32) -> Process {
        zombie(pid, parent, group, session, libc::SIGCHLD)
    }

    fn alive(subreaper: bool, exit_signal: i32, sharing: Sharing) -> ProcessState {
        let blank = Alive::default();
        ProcessState::Alive(Box::new(Alive { subreaper, exit_signal, sharing, ..blank }))
    }

    /// What the kernel knows of a process.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Task {
        parent: i32,
        group: i32,
        session: i32,
        exit_signal: i32,
        /// Descriptors and the like, by the first process that had them.
        table: i32,
    }

    #[derive(Clone, Debug, Default)]
    struct Kernel {
        tasks: BTreeMap<i32, Task>,
        subreapers: BTreeSet<i32>,
        zombies: BTreeSet<i32>,
    }

    impl Kernel {
        fn new() -> Kernel {
            let init =
                Task { parent: 0, group: 1, session: 1, exit_signal: libc::SIGCHLD, table: 1 };
            Kernel { tasks: BTreeMap::from([(1, init)]), ..Kernel::default() }
        }

        fn fork(&mut self, creator: i32, pid: i32, sibling: bool, exit_signal: i32, shares: bool) {
            let maker = self.tasks[&creator].clone();
            assert!(!sibling || creator != 1, "init has no siblings");
            let (parent, exit_signal) =
                if sibling { (maker.parent, maker.exit_signal) } else { (creator, exit_signal) };
            let table = if shares { maker.table } else { pid };
            let task = Task { parent, exit_signal, table, ..maker };
            assert!(self.tasks.insert(pid, task).is_none(), "{pid} exists");
        }

        fn setsid(&mut self, pid: i32) -> bool {
            let may = !self.tasks.values().any(|task| task.group == pid);
            if may && let Some(task) = self.tasks.get_mut(&pid) {
                (task.group, task.session) = (pid, pid);
            }
            may
        }

        fn setpgid(&mut self, pid: i32, group: i32) -> bool {
            let session = self.tasks[&pid].session;
            let exists =
                self.tasks.values().any(|task| task.group == group && task.session == session);
            let may = session != pid && (pid == group || exists);
            if may && let Some(task) = self.tasks.get_mut(&pid) {
                task.group = group;
            }
            may
        }

        fn exit(&mut self, pid: i32) {
            let mut heir = self.tasks[&pid].parent;
            while heir != 1 && !self.subreapers.contains(&heir) {
                heir = self.tasks[&heir].parent;
            }
            for task in self.tasks.values_mut().filter(|task| task.parent == pid) {
                (task.parent, task.exit_signal) = (heir, libc::SIGCHLD);
            }
            self.subreapers.remove(&pid);
            self.zombies.insert(pid);
        }

        fn reap(&mut self, pid: i32) {
            self.zombies.remove(&pid);
            self.tasks.remove(&pid);
        }
    }

    /// Carries the steps out on a model of the kernel and compares what comes of them.
    fn check(processes: &[Process]) {
        let steps = tree(processes, true);
        let steps = steps.unwrap_or_else(|error| panic!("{error}: {}", list(processes)));
        let mut kernel = Kernel::new();
        for step in &steps {
            match *step {
                Step::Fork { creator, pid, sibling, exit_signal, shared } => {
                    kernel.fork(creator, pid, sibling, exit_signal, shared != 0);
                }
                Step::NewSession { pid } => assert!(kernel.setsid(pid), "{pid}: {steps:?}"),
                Step::JoinGroup { pid, group } => {
                    assert!(kernel.setpgid(pid, group), "{pid} {group}: {steps:?}");
                }
                Step::Adopt { pid, on: true } => _ = kernel.subreapers.insert(pid),
                Step::Adopt { pid, on: false } => _ = kernel.subreapers.remove(&pid),
                Step::End { pid, reaper } => {
                    assert_eq!(kernel.tasks[&pid].parent, reaper);
                    kernel.exit(pid);
                    kernel.reap(pid);
                }
            }
        }
        let wanted: BTreeMap<i32, Task> = processes
            .iter()
            .map(|process| {
                let (exit_signal, sharing) = match &process.state {
                    ProcessState::Alive(alive) => (alive.exit_signal, alive.sharing),
                    ProcessState::Zombie { exit_signal, .. } => (*exit_signal, Sharing::default()),
                };
                let table = sharing.descriptors.unwrap_or(process.pid);
                let (parent, group, session) = (process.parent, process.group, process.session);
                (process.pid, Task { parent, group, session, exit_signal, table })
            })
            .collect();
        for (pid, task) in &wanted {
            assert_eq!(kernel.tasks.get(pid), Some(task), "{pid} of {}", list(processes));
        }
        assert_eq!(kernel.tasks.len(), wanted.len(), "{}", list(processes));
    }

    fn list(processes: &[Process]) -> String {
        let all: Vec<(i32, i32, i32, i32)> =
            processes.iter().map(|p| (p.pid, p.parent, p.group, p.session)).collect();
        format!("pid, parent, group, session: {all:?}")
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
        // An orphan of a session whose leader lives further down.
        check(&[
            process(1, 0, 1, 1),
            process(3, 1, 1, 1),
            process(4, 3, 4, 4),
            process(6, 1, 4, 4),
        ]);
        // A group whose first process has gone to another one.
        check(&[process(1, 0, 1, 1), process(3, 1, 1, 1), process(4, 1, 3, 1)]);
        // Two daemons that had children in a session whose leader has ended, before they made their own.
        check(&[
            process(1, 0, 1, 1),
            process(5, 1, 5, 5),
            process(6, 1, 6, 6),
            process(7, 5, 4, 4),
            process(8, 6, 4, 4),
        ]);
        // A process that was below another one, whose orphan it has left there when it was adopted itself.
        check(&[
            process(1, 0, 1, 1),
            process(4, 1, 4, 4),
            process(5, 4, 5, 5),
            process(7, 5, 6, 6),
            process(9, 4, 9, 9),
            process(10, 9, 6, 6),
            process(12, 9, 11, 11),
            process(14, 5, 11, 11),
        ]);
        // A child that ends with another signal, or none.
        check(&[process(1, 0, 1, 1), zombie(3, 1, 1, 1, 0), zombie(4, 1, 4, 4, libc::SIGUSR1)]);
    }

    /// A process with tables of its own no longer sees what the others open.
    #[test]
    fn sharers_are_made_by_each_other() {
        let shared = |pid, parent, with: Option<i32>| {
            let sharing = Sharing { descriptors: with, ..Sharing::default() };
            let state = alive(false, libc::SIGCHLD, sharing);
            Process { state, ..process(pid, parent, 1, 1) }
        };
        // Parent and child.
        check(&[shared(1, 0, None), shared(2, 1, Some(1)), shared(3, 2, Some(1))]);
        // Siblings.
        check(&[shared(1, 0, None), shared(2, 1, None), shared(3, 1, Some(2))]);
        // An orphan with init, and one with a process further down.
        check(&[
            shared(1, 0, None),
            shared(2, 1, None),
            shared(3, 2, None),
            shared(4, 1, Some(3)),
            shared(5, 2, Some(3)),
        ]);
        let through = [shared(1, 0, None), shared(2, 1, None), shared(3, 2, Some(1))];
        assert_eq!(tree(&through, true), Err(PlanError::Sharing { pid: 3 }));
    }

    struct Draw(u64);

    impl Draw {
        /// Below `end`, by splitmix64.
        fn below(&mut self, end: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            usize::try_from((word ^ (word >> 31)) % end as u64).expect("below a usize")
        }

        fn of(&mut self, list: &[i32]) -> i32 {
            list[self.below(list.len())]
        }
    }

    /// Whatever tree programs can get can be restored: here they do what comes to their minds.
    #[test]
    fn whatever_tree_comes_about_can_be_built() {
        for seed in 0..4000 {
            let mut draw = Draw(seed);
            let mut kernel = Kernel::new();
            let mut next = 1;
            for _ in 0..draw.below(120) {
                let running: Vec<i32> =
                    kernel.tasks.keys().copied().filter(|p| !kernel.zombies.contains(p)).collect();
                let pid = draw.of(&running);
                match draw.below(16) {
                    0..=5 => {
                        let used = |number: i32| {
                            kernel.tasks.iter().any(|(pid, task)| {
                                [*pid, task.group, task.session].contains(&number)
                            })
                        };
                        // Numbers begin anew now and then.
                        let lowest = if draw.below(8) == 0 { 2 } else { next + 1 };
                        next = (lowest..).find(|number| !used(*number)).expect("there are many");
                        // Siblings that do not send SIGCHLD are only made where their maker's session is certain.
                        let usual = kernel.tasks[&pid].exit_signal == libc::SIGCHLD;
                        let sibling = pid != 1 && usual && draw.below(6) == 0;
                        let signal = draw.of(&[libc::SIGCHLD, libc::SIGCHLD, libc::SIGUSR1, 0]);
                        kernel.fork(pid, next, sibling, signal, false);
                    }
                    6..=8 => _ = kernel.setsid(pid),
                    9 => _ = kernel.setpgid(pid, pid),
                    10..=11 => {
                        let groups: Vec<i32> =
                            kernel.tasks.values().map(|task| task.group).collect();
                        let group = draw.of(&groups);
                        kernel.setpgid(pid, group);
                    }
                    12 if draw.below(2) == 0 => _ = kernel.subreapers.remove(&pid),
                    12 => _ = kernel.subreapers.insert(pid),
                    _ if pid == 1 => {}
                    13 => kernel.exit(pid),
                    _ => {
                        kernel.exit(pid);
                        kernel.reap(pid);
                    }
                }
            }
            let processes: Vec<Process> = kernel
                .tasks
                .iter()
                .map(|(pid, task)| {
                    let dead =
                        zombie(*pid, task.parent, task.group, task.session, task.exit_signal);
                    if kernel.zombies.contains(pid) {
                        return dead;
                    }
                    let adopts = kernel.subreapers.contains(pid);
                    let state = alive(adopts, task.exit_signal, Sharing::default());
                    Process { state, ..dead }
                })
                .collect();
            check(&processes);
        }
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
