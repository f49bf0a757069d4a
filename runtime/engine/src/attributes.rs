//! Small attributes of threads and processes that `prctl(2)`, `arch_prctl(2)`, `modify_ldt(2)` and `/proc` keep.
//!
//! What this module does not do: attributes that decide what a process may do, which come last ([`crate::process`]).

use std::fs;

use samara_capsule::record::{Alive, Bytes, ThreadAttributes};
use samara_kernel::tape::{Call, End};
use samara_kernel::{Pid, proc};

use crate::process::{low_int, prctl, words};
use crate::restore::{RestoreError, make};
use crate::tracee::{Output, Process, Tape, TraceeError};

/// linux/prctl.h, asm/prctl.h
const PR_MCE_KILL_SET: u64 = 1;
const PR_MCE_KILL_DEFAULT: u32 = 2;
const PR_GET_SPECULATION_CTRL: u64 = 52;
const PR_SET_SPECULATION_CTRL: u64 = 53;
const ARCH_GET_CPUID: u64 = 0x1011;
const ARCH_SET_CPUID: u64 = 0x1012;
/// Store bypass, indirect branches, flushing of the first cache.
const SPECULATIONS: std::ops::Range<u32> = 0..3;
/// Of an answer: the thread itself decides (`PR_SPEC_PRCTL`).
const DECIDES: u32 = 1;

/// How the description ends of the session keyring that a user has who was given no other one.
const USERS_SESSION: &[u8] = b";_uid_ses.";
const DESCRIPTION_BYTES: usize = 128;

/// Bytes of a descriptor in the local table, and of the table.
const DESCRIPTOR_BYTES: usize = 8;
const TABLE_BYTES: usize = 8192 * DESCRIPTOR_BYTES;

/// What a thread has been asked by a tape that is yet to run.
pub(crate) struct Questions {
    time_stamps: Output,
    machine_check: usize,
    cpuid: usize,
    speculation: usize,
    keyrings: usize,
    session_keyring: Output,
    personality: usize,
}

impl Questions {
    pub(crate) fn ask(tape: &mut Tape) -> Questions {
        let time_stamps = tape.output(8);
        prctl(tape, libc::PR_GET_TSC, time_stamps.address);
        let machine_check = tape.len();
        prctl(tape, libc::PR_MCE_KILL_GET, 0);
        let cpuid = tape.len();
        // A processor that can't withhold it answers ENODEV.
        let query = [ARCH_GET_CPUID, 0, 0, 0, 0, 0];
        tape.try_call("ask whether it may use cpuid", libc::SYS_arch_prctl, query);
        let speculation = tape.len();
        for kind in SPECULATIONS {
            let query = [PR_GET_SPECULATION_CTRL, kind.into(), 0, 0, 0, 0];
            tape.try_call("ask how it speculates", libc::SYS_prctl, query);
        }
        const GET_ID: u64 = libc::KEYCTL_GET_KEYRING_ID as u64;
        const DESCRIBE: u64 = libc::KEYCTL_DESCRIBE as u64;
        const READ: u64 = libc::KEYCTL_READ as u64;
        const THREAD: u64 = (libc::KEY_SPEC_THREAD_KEYRING as i64).cast_unsigned();
        const PROCESS: u64 = (libc::KEY_SPEC_PROCESS_KEYRING as i64).cast_unsigned();
        const SESSION: u64 = (libc::KEY_SPEC_SESSION_KEYRING as i64).cast_unsigned();
        let keyrings = tape.len();
        let session_keyring = tape.output(DESCRIPTION_BYTES);
        // Who may not ask has no keys either.
        let mut keys = |arguments: [u64; 4]| {
            let [operation, keyring, buffer, bytes] = arguments;
            let arguments = [operation, keyring, buffer, bytes, 0, 0];
            tape.try_call("ask for its keys", libc::SYS_keyctl, arguments);
        };
        keys([GET_ID, THREAD, 0, 0]);
        keys([GET_ID, PROCESS, 0, 0]);
        keys([READ, SESSION, 0, 0]);
        let bytes = DESCRIPTION_BYTES as u64;
        keys([DESCRIBE, SESSION, session_keyring.address, bytes]);
        let personality = tape.len();
        let ask = u64::from(u32::MAX);
        tape.call("ask for its personality", libc::SYS_personality, [ask, 0, 0, 0, 0, 0]);
        Questions {
            time_stamps,
            machine_check,
            cpuid,
            speculation,
            keyrings,
            session_keyring,
            personality,
        }
    }

    /// Which keys the thread keeps in the kernel, if it does. They can't be read, or not by everybody.
    pub(crate) fn kept_keys(
        &self,
        process: &Process,
        results: &[u64],
    ) -> Result<Option<&'static str>, TraceeError> {
        let answer = |index: usize| {
            Call::outcome(results.get(self.keyrings + index).copied().unwrap_or(0)).ok()
        };
        if answer(0).is_some() {
            return Ok(Some("keys in a keyring of the thread are not supported"));
        }
        if answer(1).is_some() {
            return Ok(Some("keys in a keyring of the process are not supported"));
        }
        if answer(2).is_none_or(|bytes| bytes == 0) {
            return Ok(None);
        }
        let description = process.output(self.session_keyring)?;
        let users = description.windows(USERS_SESSION.len()).any(|part| part == USERS_SESSION);
        Ok((!users).then_some("keys in a session keyring are not supported"))
    }

    /// What the calls of the tape have returned. Label and login are told from outside.
    pub(crate) fn answers(
        &self,
        process: &Process,
        results: &[u64],
    ) -> Result<ThreadAttributes, TraceeError> {
        let answer = |index: usize| {
            let result = Call::outcome(results.get(index).copied().unwrap_or(0)).ok();
            result.and_then(|value| u32::try_from(value).ok())
        };
        let [time_stamps] = words(&process.output(self.time_stamps)?);
        let speculation = (self.speculation..).zip(SPECULATIONS).filter_map(|(index, kind)| {
            let state = answer(index).filter(|state| state & DECIDES != 0)?;
            Some((kind, state & !DECIDES))
        });
        Ok(ThreadAttributes {
            personality: answer(self.personality),
            login_user: None,
            no_time_stamps: low_int(time_stamps) == libc::PR_TSC_SIGSEGV,
            no_cpuid: answer(self.cpuid) == Some(0),
            machine_check: answer(self.machine_check).filter(|how| *how != PR_MCE_KILL_DEFAULT),
            speculation: speculation.collect(),
            label: None,
        })
    }
}

/// Who has logged in, for the audit. `None`: nobody, or the kernel has no audit.
pub(crate) fn login_user(tid: Pid) -> Option<u32> {
    let user = proc::attribute(tid, "loginuid").ok()?.trim_end().parse().ok()?;
    (user != u32::MAX).then_some(user)
}

/// Lets a thread write `text` to the first of these files that it can open. False: it could not open or write one.
pub(crate) fn write_own(
    process: &mut Process,
    index: usize,
    paths: &[&str],
    text: &str,
) -> Result<bool, TraceeError> {
    let here = i64::from(libc::AT_FDCWD).cast_unsigned();
    let flags = u64::from((libc::O_WRONLY | libc::O_CLOEXEC).unsigned_abs());
    for path in paths {
        let mut tape = process.tape()?;
        let address = tape.data(format!("{path}\0").as_bytes());
        tape.try_call(format!("open {path}"), libc::SYS_openat, [here, address, flags, 0, 0, 0]);
        let results = process.run_all(index, &tape, End::Breakpoint)?;
        let Some(Ok(file)) = results.first().map(|result| Call::outcome(*result)) else { continue };
        let mut tape = process.tape()?;
        let address = tape.data(text.as_bytes());
        let arguments = [file, address, text.len() as u64, 0, 0, 0];
        tape.try_call(format!("write to {path}"), libc::SYS_write, arguments);
        tape.call(format!("close {path}"), libc::SYS_close, [file, 0, 0, 0, 0, 0]);
        let results = process.run_all(index, &tape, End::Breakpoint)?;
        return Ok(results.first().is_some_and(|result| Call::outcome(*result).is_ok()));
    }
    Ok(false)
}

/// Gives a thread its user for the audit where the new container has none, as programs may do once. Only the thread itself may.
pub(crate) fn restore_login(
    process: &mut Process,
    index: usize,
    attributes: &ThreadAttributes,
) -> Result<(), TraceeError> {
    let Some(user) = attributes.login_user else { return Ok(()) };
    let Some(tid) = process.threads.get(index).map(|thread| thread.tid) else { return Ok(()) };
    if login_user(tid).is_some() {
        return Ok(());
    }
    write_own(process, index, &["/proc/thread-self/loginuid"], &user.to_string())?;
    if login_user(tid) != Some(user) {
        tracing::warn!(tid, user, "the user that has logged in is not restored for the audit");
    }
    Ok(())
}

/// Appends what gives the calling thread its attributes.
pub(crate) fn restore_thread(tape: &mut Tape, attributes: &ThreadAttributes) {
    if attributes.no_time_stamps {
        prctl(tape, libc::PR_SET_TSC, u64::from(libc::PR_TSC_SIGSEGV.unsigned_abs()));
    }
    if attributes.no_cpuid {
        let arguments = [ARCH_SET_CPUID, 0, 0, 0, 0, 0];
        tape.call("give up cpuid", libc::SYS_arch_prctl, arguments);
    }
    if let Some(how) = attributes.machine_check {
        let kill = u64::from(libc::PR_MCE_KILL.unsigned_abs());
        let arguments = [kill, PR_MCE_KILL_SET, how.into(), 0, 0, 0];
        tape.call("choose what a broken page does to it", libc::SYS_prctl, arguments);
    }
    for (kind, state) in &attributes.speculation {
        let arguments = [PR_SET_SPECULATION_CTRL, (*kind).into(), (*state).into(), 0, 0, 0];
        // A processor that does not have the weakness has no such control either.
        tape.try_call("choose how it speculates", libc::SYS_prctl, arguments);
    }
}

/// What a dump of a process has. `None` on a kernel that makes no dumps.
pub(crate) fn dump_filter(pid: Pid) -> Option<u32> {
    let filter = proc::attribute(pid, "coredump_filter").ok()?;
    u32::from_str_radix(&filter, 16).ok()
}

/// The nice value of a process's session among others; 0 on a kernel that does not group by sessions.
pub(crate) fn autogroup_nice(pid: Pid) -> i32 {
    let group = proc::attribute(pid, "autogroup").unwrap_or_default();
    group.rsplit(' ').next().and_then(|nice| nice.parse().ok()).unwrap_or(0)
}

const READ_TABLE: u64 = 0;

/// Asks whether the process has a local descriptor table: how many of the bytes of a descriptor there are.
pub(crate) fn ask_for_descriptor(tape: &mut Tape) {
    let descriptor = tape.output(DESCRIPTOR_BYTES);
    let arguments = [READ_TABLE, descriptor.address, DESCRIPTOR_BYTES as u64, 0, 0, 0];
    // A kernel may have no such tables.
    tape.try_call("read its descriptor table", libc::SYS_modify_ldt, arguments);
}

/// The local descriptor table of a process that has one.
pub(crate) fn descriptor_table(process: &mut Process) -> Result<Bytes, TraceeError> {
    let mut tape = process.tape()?;
    let table = tape.output(TABLE_BYTES);
    let arguments = [READ_TABLE, table.address, TABLE_BYTES as u64, 0, 0, 0];
    tape.call("read its descriptor table", libc::SYS_modify_ldt, arguments);
    process.run_all(0, &tape, End::Call)?;
    let mut table = process.output(table)?;
    let used = table.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    table.truncate(used.next_multiple_of(DESCRIPTOR_BYTES));
    Ok(Bytes::from(table))
}

/// Gives a process what its threads have in common.
pub(crate) fn restore_process(process: &mut Process, alive: &Alive) -> Result<(), RestoreError> {
    let pid = process.pid;
    if let Some(filter) = alive.dump_filter
        && dump_filter(pid).is_some_and(|current| current != filter)
    {
        fs::write(format!("/proc/{pid}/coredump_filter"), format!("{filter:#x}"))
            .map_err(make("the dump filter of a process"))?;
    }
    // A new session has 0.
    if alive.autogroup_nice != 0 && autogroup_nice(pid) != alive.autogroup_nice {
        fs::write(format!("/proc/{pid}/autogroup"), alive.autogroup_nice.to_string())
            .map_err(make("the nice value of a session"))?;
    }
    const WRITE: u64 = 0x11;
    if alive.descriptor_table.len() > TABLE_BYTES {
        return Err(RestoreError::Damaged("a descriptor table is too long".to_owned()));
    }
    let mut tape = process.tape()?;
    for (number, descriptor) in (0u32..).zip(alive.descriptor_table.chunks_exact(DESCRIPTOR_BYTES))
    {
        let [descriptor] = words(descriptor);
        let Some(description) = describe(number, descriptor) else { continue };
        if !tape.has_room(1, description.len()) {
            process.run_all(0, &tape, End::Breakpoint)?;
            tape = process.tape()?;
        }
        let address = tape.data(&description);
        let arguments = [WRITE, address, description.len() as u64, 0, 0, 0];
        tape.call("fill its descriptor table", libc::SYS_modify_ldt, arguments);
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

/// `struct user_desc` (asm/ldt.h) of a descriptor as the processor has it (Intel SDM volume 3, 3.4.5). `None`: an empty one.
fn describe(number: u32, descriptor: u64) -> Option<Vec<u8>> {
    if descriptor == 0 {
        return None;
    }
    let bits = |from: u32, count: u32| {
        u32::try_from(descriptor >> from & ((1 << count) - 1)).expect("at most 24 bits")
    };
    let base = bits(16, 24) | bits(56, 8) << 24;
    let limit = bits(0, 16) | bits(48, 4) << 16;
    let (wide, contents) = (bits(54, 1), bits(42, 2));
    let (read_or_execute_only, in_pages) = (bits(41, 1) ^ 1, bits(55, 1));
    let (not_present, usable) = (bits(47, 1) ^ 1, bits(52, 1));
    let flags = wide
        | contents << 1
        | read_or_execute_only << 3
        | in_pages << 4
        | not_present << 5
        | usable << 6;
    Some([number, base, limit, flags].iter().flat_map(|word| word.to_le_bytes()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A segment with another base makes a program read the wrong memory.
    #[test]
    fn descriptors_are_described_as_the_kernel_takes_them() {
        // Base 0x12345678, limit 0xabcde pages, 32 bits, data, writable, accessed, present, privilege 3.
        let descriptor = 0x12ca_f334_5678_bcde;
        let words: Vec<u8> = [5u32, 0x1234_5678, 0xa_bcde, 0b1_0001]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        assert_eq!(describe(5, descriptor), Some(words));
        assert_eq!(describe(5, 0), None);
    }
}
