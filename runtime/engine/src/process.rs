//! Processes and threads: ids, registers, signals, credentials, scheduling, limits.

use std::collections::BTreeMap;
use std::io;

use samara_capsule::record::{
    self, Alive, AlternateStack, Bytes, Credentials, IntervalTimer, ProcessState, Restart,
    Scheduling, Seccomp, SeccompFilter, SignalAction,
};
use samara_capsule::transfer::SpaceId;
use samara_kernel::proc::Status;
use samara_kernel::ptrace::{self, Queue, Registers};
use samara_kernel::tape::{Call, End};
use samara_kernel::{Pid, proc, sched};

use crate::capture::{CaptureError, Tables, attribute, inner_pid, link, name, read};
use crate::descriptors::Descriptors;
use crate::restart::{self, Goal};
use crate::tracee::{Output, Process, Tape, Thread, TraceeError, failed};
use crate::unsupported::Place;

/// Signals are numbered from 1 to this.
pub(crate) const SIGNALS: u32 = 64;
/// Bytes of the kernel's `struct sigaction`: handler, flags, restorer, mask.
pub(crate) const SIGACTION_BYTES: usize = 32;
/// Bytes of `stack_t`.
pub(crate) const STACK_BYTES: usize = 24;
/// Bytes of `struct itimerval`.
pub(crate) const ITIMERVAL_BYTES: usize = 32;

/// `prctl` operations that libc has no name for on every target.
const PR_GET_TID_ADDRESS: u64 = 40;
const SECCOMP_STRICT: u32 = 1;

/// Describes a stopped process. Its memory has been described already, since this maps the engine's own.
///
/// Every thread is left with the engine's corrections of interrupted calls, ready to be thawed.
pub(crate) fn collect(
    process: &mut Process,
    mappings: Vec<record::Mapping>,
    descriptors: Descriptors,
    space: SpaceId,
    elapsed: &BTreeMap<Pid, u64>,
    tables: &mut Tables<'_>,
) -> Result<record::Process, CaptureError> {
    let pid = process.pid;
    let what = || read(format!("process {pid} in /proc"));
    let stat = proc::stat(pid).map_err(what())?;
    let status = proc::status(pid).map_err(what())?;
    check(pid, &status, tables)?;
    // What the capsule gets is decided before the corrections for the thaw change the registers.
    let restored: Vec<(Registers, Restart)> = process
        .threads
        .iter()
        .map(|thread| corrected(process, thread, Goal::Restore, elapsed))
        .collect();
    mend_for_thaw(process, elapsed)?;
    process.map_arena(None)?;
    let answers = Answers::ask(process, &status)?;
    let mut threads = Vec::new();
    for (index, (registers, restart)) in restored.into_iter().enumerate() {
        threads.push(collect_thread(process, index, registers, restart)?);
    }
    process.unmap_arena()?;

    let layout = proc::layout(&stat);
    let alive = Alive {
        space: space.0,
        mappings,
        layout: record::Layout {
            start_code: layout.start_code,
            end_code: layout.end_code,
            start_data: layout.start_data,
            end_data: layout.end_data,
            start_brk: layout.start_brk,
            brk: answers.brk,
            start_stack: layout.start_stack,
            arg_start: layout.arg_start,
            arg_end: layout.arg_end,
            env_start: layout.env_start,
            env_end: layout.env_end,
        },
        executable: link(pid, "exe")?,
        auxiliary_vector: Bytes::from(proc::auxiliary_vector(pid).map_err(what())?),
        working_directory: link(pid, "cwd")?,
        umask: status.umask.unwrap_or(0o022),
        descriptors: descriptors.list,
        locks: descriptors.locks,
        limits: proc::limits(pid).map_err(what())?,
        actions: answers.actions,
        pending: pending(process.threads.first().map_or(pid, |thread| thread.tid), Queue::Process)?,
        interval_timers: answers.interval_timers,
        stopped: process.threads.iter().any(|thread| thread.group_stop != 0),
        dumpable: answers.dumpable,
        subreaper: answers.subreaper,
        oom_score_adjust: attribute(pid, "oom_score_adj")?.parse().unwrap_or(0),
        personality: u32::from_str_radix(&attribute(pid, "personality")?, 16).unwrap_or(0),
        exit_signal: stat.exit_signal.unwrap_or(libc::SIGCHLD),
        threads,
    };
    Ok(record::Process { state: ProcessState::Alive(Box::new(alive)), ..identity(pid, &status)? })
}

pub(crate) fn collect_zombie(pid: Pid) -> Result<record::Process, CaptureError> {
    let what = || read(format!("process {pid} in /proc"));
    let status = proc::status(pid).map_err(what())?;
    let exit_status = proc::stat(pid).map_err(what())?.exit_code.unwrap_or(0);
    Ok(record::Process { state: ProcessState::Zombie { exit_status }, ..identity(pid, &status)? })
}

/// The ids of a process in the innermost namespace; the state is the caller's to set.
fn identity(pid: Pid, status: &Status) -> Result<record::Process, CaptureError> {
    let last =
        |list: &Option<Vec<i32>>| list.as_ref().and_then(|list| list.last().copied()).unwrap_or(0);
    let inner = last(&status.nspid);
    let parent =
        if inner == 1 { 0 } else { inner_pid(status.ppid).map_err(read("a parent process"))? };
    Ok(record::Process {
        pid: inner,
        parent,
        group: last(&status.nspgid),
        session: last(&status.nssid),
        name: Bytes::from(name(pid).into_bytes()),
        state: ProcessState::Zombie { exit_status: 0 },
    })
}

/// Sorts processes so that each comes after its parent.
pub(crate) fn parents_first(mut processes: Vec<record::Process>) -> Vec<record::Process> {
    processes.sort_by_key(|process| process.pid);
    let mut sorted: Vec<record::Process> = Vec::with_capacity(processes.len());
    while !processes.is_empty() {
        let (ready, waiting): (Vec<_>, Vec<_>) = processes.into_iter().partition(|process| {
            process.parent == 0 || sorted.iter().any(|earlier| earlier.pid == process.parent)
        });
        if ready.is_empty() {
            // Only a broken capsule has processes whose parents are missing; they are kept for whoever checks.
            sorted.extend(waiting);
            break;
        }
        sorted.extend(ready);
        processes = waiting;
    }
    sorted
}

/// Notes what of a process can't be saved.
fn check(pid: Pid, status: &Status, tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    if !attribute(pid, "timers").unwrap_or_default().is_empty() {
        tables.refuse(pid, Place::Process, "POSIX timers (timer_create) are not supported");
    }
    for kind in ["ipc", "mnt", "net", "uts", "user", "cgroup", "time"] {
        let (Ok(own), Ok(init)) =
            (proc::namespace(pid, kind), proc::namespace(tables.request.init, kind))
        else {
            continue;
        };
        if own != init {
            tables.refuse(
                pid,
                Place::Process,
                format!("it has a {kind} namespace of its own, which is not supported"),
            );
        }
    }
    let root = link(pid, "root")?;
    if root.as_slice() != b"/" {
        tables.refuse(
            pid,
            Place::Process,
            format!("its root directory is {}", String::from_utf8_lossy(&root)),
        );
    }
    let layers = status.nspid.as_ref().map_or(0, Vec::len);
    let inits = proc::status(tables.request.init)
        .ok()
        .and_then(|status| status.nspid)
        .map_or(0, |pids| pids.len());
    if layers != inits {
        tables.refuse(pid, Place::Process, "it is in a nested pid namespace");
    }
    Ok(())
}

/// Corrects the interrupted calls of all threads of a process that will be thawed.
pub(crate) fn mend_for_thaw(
    process: &mut Process,
    elapsed: &BTreeMap<Pid, u64>,
) -> Result<(), TraceeError> {
    let corrections: Vec<(Registers, Restart)> = process
        .threads
        .iter()
        .map(|thread| corrected(process, thread, Goal::Thaw, elapsed))
        .collect();
    let places = process.scratch_for(corrections.iter().map(|(_, restart)| *restart))?;
    for (thread, ((mut registers, restart), place)) in
        process.threads.iter_mut().zip(corrections.into_iter().zip(places))
    {
        if let (Restart::Timespec { argument, .. }, Some(address)) = (restart, place) {
            restart::point_at(&mut registers, argument, address);
        }
        if registers != thread.stop {
            thread.stop = registers;
            let tid = thread.tid;
            ptrace::set_registers(tid, &registers).map_err(failed("set the registers of", tid))?;
        }
    }
    Ok(())
}

fn corrected(
    process: &Process,
    thread: &Thread,
    goal: Goal,
    elapsed: &BTreeMap<Pid, u64>,
) -> (Registers, Restart) {
    let mut registers = thread.stop;
    let elapsed_ns = elapsed.get(&thread.tid).copied().unwrap_or(0);
    let read = |address| process.read(address, 16).ok().and_then(|bytes| bytes.try_into().ok());
    let restart = restart::shorten(&mut registers, goal, elapsed_ns, &read);
    (registers, restart)
}

/// What only the process itself can ask the kernel.
struct Answers {
    actions: Vec<SignalAction>,
    interval_timers: [IntervalTimer; 3],
    brk: u64,
    dumpable: bool,
    subreaper: bool,
}

impl Answers {
    fn ask(process: &mut Process, status: &Status) -> Result<Answers, TraceeError> {
        let mut tape = process.tape()?;
        // Signals that are neither caught nor ignored have no action worth a call.
        let interesting: Vec<u32> = (1..=SIGNALS)
            .filter(|signal| (status.sigcgt | status.sigign) >> (signal - 1) & 1 == 1)
            .collect();
        let actions: Vec<Output> = interesting
            .iter()
            .map(|signal| {
                let output = tape.output(SIGACTION_BYTES);
                let arguments = [u64::from(*signal), 0, output.address, 8, 0, 0];
                tape.call("ask for a signal action", libc::SYS_rt_sigaction, arguments);
                output
            })
            .collect();
        let timers: Vec<Output> = (0..3)
            .map(|which| {
                let output = tape.output(ITIMERVAL_BYTES);
                tape.call(
                    "ask for an interval timer",
                    libc::SYS_getitimer,
                    [which, output.address, 0, 0, 0, 0],
                );
                output
            })
            .collect();
        let subreaper = tape.output(8);
        prctl(&mut tape, libc::PR_GET_CHILD_SUBREAPER, subreaper.address);
        let dumpable = tape.len();
        prctl(&mut tape, libc::PR_GET_DUMPABLE, 0);
        let brk = tape.len();
        tape.call("ask for its break", libc::SYS_brk, [0; 6]);
        let results = process.run_all(0, &tape, End::Call)?;
        let result = |index: usize| results.get(index).copied().unwrap_or(0);

        let mut table = vec![SignalAction::default(); SIGNALS as usize];
        for (signal, output) in interesting.iter().zip(actions) {
            let [handler, flags, restorer, mask] = words(&process.output(output)?);
            if let Some(entry) = table.get_mut(*signal as usize - 1) {
                *entry = SignalAction { handler, flags, restorer, mask };
            }
        }
        let mut interval_timers = [IntervalTimer::default(); 3];
        for (timer, output) in interval_timers.iter_mut().zip(timers) {
            let [interval_s, interval_us, rest_s, rest_us] = words(&process.output(output)?);
            let us = |seconds: u64, us: u64| seconds.saturating_mul(1_000_000).saturating_add(us);
            *timer = IntervalTimer {
                interval_us: us(interval_s, interval_us),
                rest_us: us(rest_s, rest_us),
            };
        }
        let [subreaper] = words(&process.output(subreaper)?);
        Ok(Answers {
            actions: table,
            interval_timers,
            brk: result(brk),
            // 2 (root only) can't be set by anybody but the kernel; it counts as not dumpable.
            dumpable: result(dumpable) == 1,
            subreaper: subreaper & 0xffff_ffff != 0,
        })
    }
}

fn collect_thread(
    process: &mut Process,
    index: usize,
    registers: Registers,
    restart: Restart,
) -> Result<record::Thread, CaptureError> {
    let mut tape = process.tape()?;
    let stack = tape.output(STACK_BYTES);
    tape.call("ask for its alternate stack", libc::SYS_sigaltstack, [0, stack.address, 0, 0, 0, 0]);
    let clear = tape.output(8);
    prctl(
        &mut tape,
        libc::c_int::try_from(PR_GET_TID_ADDRESS).expect("a small number"),
        clear.address,
    );
    let death = tape.output(8);
    prctl(&mut tape, libc::PR_GET_PDEATHSIG, death.address);
    let slack = tape.len();
    prctl(&mut tape, libc::PR_GET_TIMERSLACK, 0);
    let bits = tape.len();
    prctl(&mut tape, libc::PR_GET_SECUREBITS, 0);
    let results = process.run_all(index, &tape, End::Call)?;
    let result = |index: usize| results.get(index).copied().unwrap_or(0);
    let [address, flags, bytes] = words(&process.output(stack)?);
    let [clear_child_tid] = words(&process.output(clear)?);
    let [death] = words(&process.output(death)?);

    let pid = process.pid;
    let Some(thread) = process.threads.get(index) else {
        return Err(TraceeError::NoRoom { pid, why: "it has no such thread" }.into());
    };
    let tid = thread.tid;
    let what = || read(format!("thread {tid} in /proc"));
    let status = proc::status(tid).map_err(what())?;
    let stat = proc::stat(tid).map_err(what())?;
    let online = sched::affinity(0).map_err(what())?;
    let affinity = sched::affinity(tid).map_err(what())?;
    let policy = stat.policy.unwrap_or(0);
    Ok(record::Thread {
        tid: inner_pid(tid).map_err(what())?,
        name: Bytes::from(attribute(tid, "comm")?.into_bytes()),
        registers: to_record(&registers),
        xstate: Bytes::from(
            ptrace::xstate(tid).map_err(failed("read the vector registers of", tid))?,
        ),
        signal_mask: thread.mask,
        pending: pending(tid, Queue::Thread)?,
        alternate_stack: AlternateStack { address, flags: low_int(flags), bytes },
        clear_child_tid,
        robust_list: samara_kernel::robust_list::get(tid).map_err(what())?,
        rseq: ptrace::rseq(tid).map_err(failed("read the rseq registration of", tid))?.map(
            |rseq| record::Rseq {
                address: rseq.address,
                bytes: rseq.bytes,
                signature: rseq.signature,
            },
        ),
        credentials: Credentials {
            uids: [status.ruid, status.euid, status.suid, status.fuid],
            gids: [status.rgid, status.egid, status.sgid, status.fgid],
            groups: status.groups.clone(),
            inheritable: status.capinh,
            permitted: status.capprm,
            effective: status.capeff,
            bounding: status.capbnd.unwrap_or(0),
            ambient: status.capamb.unwrap_or(0),
            secure_bits: u32::try_from(result(bits)).unwrap_or(0),
        },
        scheduling: Scheduling {
            policy,
            priority: stat.rt_priority.unwrap_or(0),
            nice: i32::try_from(stat.nice).unwrap_or(0),
            reset_on_fork: false,
            affinity: if affinity == online { Vec::new() } else { affinity },
        },
        parent_death_signal: low_int(death),
        timer_slack_ns: result(slack),
        seccomp: seccomp(tid, &status)?,
        no_new_privileges: status.nonewprivs == Some(1),
        restart,
    })
}

/// All filters of a thread, oldest first.
fn seccomp(tid: Pid, status: &Status) -> Result<Seccomp, CaptureError> {
    /// The kernel bounds the sum of all filters to 32768 instructions (kernel/seccomp.c, MAX_INSNS_PER_PATH).
    const FILTERS_MAX: usize = 32 << 10;
    match status.seccomp {
        None | Some(0) => return Ok(Seccomp::Off),
        Some(SECCOMP_STRICT) => return Ok(Seccomp::Strict),
        Some(_) => {}
    }
    let mut filters = Vec::new();
    for index in 0..FILTERS_MAX {
        let program = ptrace::seccomp_filter(tid, index)
            .map_err(failed("read the seccomp filters of", tid))?;
        let Some(program) = program else { break };
        let flags = ptrace::seccomp_filter_flags(tid, index)
            .map_err(failed("read the seccomp filters of", tid))?;
        filters.push(SeccompFilter { program: Bytes::from(program), flags });
    }
    filters.reverse();
    Ok(Seccomp::Filters(filters))
}

fn pending(tid: Pid, queue: Queue) -> Result<Vec<Bytes>, TraceeError> {
    let signals =
        ptrace::pending(tid, queue).map_err(failed("read the pending signals of", tid))?;
    Ok(signals.into_iter().map(|info| Bytes::from(info.to_vec())).collect())
}

/// Appends `prctl(operation, argument)`.
pub(crate) fn prctl(tape: &mut Tape, operation: libc::c_int, argument: u64) {
    let arguments = [u64::from(operation.unsigned_abs()), argument, 0, 0, 0, 0];
    tape.call(format!("do prctl {operation}"), libc::SYS_prctl, arguments);
}

pub(crate) fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().expect("chunks of eight bytes"));
    }
    words
}

/// The `int` in the low half of a word.
fn low_int(word: u64) -> i32 {
    let [a, b, c, d, ..] = word.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}

macro_rules! copy_registers {
    ($from:expr => $to:path) => {{
        let from = $from;
        $to {
            r15: from.r15,
            r14: from.r14,
            r13: from.r13,
            r12: from.r12,
            rbp: from.rbp,
            rbx: from.rbx,
            r11: from.r11,
            r10: from.r10,
            r9: from.r9,
            r8: from.r8,
            rax: from.rax,
            rcx: from.rcx,
            rdx: from.rdx,
            rsi: from.rsi,
            rdi: from.rdi,
            orig_rax: from.orig_rax,
            rip: from.rip,
            cs: from.cs,
            eflags: from.eflags,
            rsp: from.rsp,
            ss: from.ss,
            fs_base: from.fs_base,
            gs_base: from.gs_base,
            ds: from.ds,
            es: from.es,
            fs: from.fs,
            gs: from.gs,
        }
    }};
}

fn to_record(registers: &Registers) -> record::Registers {
    copy_registers!(registers => record::Registers)
}

pub(crate) fn from_record(registers: &record::Registers) -> Registers {
    copy_registers!(registers => Registers)
}

/// The outcome of a call that is allowed to fail with the given errors.
pub(crate) fn tolerate(result: u64, tolerated: &[i32]) -> io::Result<()> {
    match Call::outcome(result) {
        Ok(_) => Ok(()),
        Err(errno) if tolerated.contains(&errno) => Ok(()),
        Err(errno) => Err(io::Error::from_raw_os_error(errno)),
    }
}
