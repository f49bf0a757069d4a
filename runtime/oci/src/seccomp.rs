//! Seccomp profiles of the OCI specification, compiled to a program for the kernel.
//!
//! libseccomp compiles; we put a preamble before its program: a system call newer than every one
//! that the profile names answers ENOSYS, so that a C library falls back to an older call instead
//! of taking the profile's EPERM for the truth. runc does the same.
//!
//! What it does not do: user notification (`SCMP_ACT_NOTIFY`), which is refused.

use std::collections::BTreeMap;

use libseccomp::error::SeccompError as LibraryError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};
use samara_kernel::seccomp::{INSTRUCTIONS_MAX, Instruction, set_mode_filter};

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("linux.seccomp: {0} is not supported")]
    Unsupported(&'static str),
    #[error("linux.seccomp: cannot {attempt}")]
    Library { attempt: &'static str, source: LibraryError },
    #[error("linux.seccomp: the rule for {syscall} is not accepted")]
    Rule { syscall: String, source: LibraryError },
    #[error("linux.seccomp: the errno {0} is out of range")]
    Errno(u32),
    #[error("linux.seccomp: the filter has {0} instructions, the kernel takes {INSTRUCTIONS_MAX}")]
    TooLong(usize),
    #[error("cannot install the seccomp filter")]
    Install(#[source] std::io::Error),
}

/// A filter, ready to be installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    instructions: Vec<Instruction>,
    flags: u32,
}

impl Program {
    /// Compiles `profile`.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self, SeccompError> {
        refuse_notification(profile)?;
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let mut context = ScmpFilterContext::new(default)
            .map_err(|source| SeccompError::Library { attempt: "create a filter", source })?;
        // A binary search over system calls; libseccomp before 2.5 has it not, which is no loss
        // but speed.
        let _ = context.set_ctl_optimize(2);
        let mut architectures = vec![ScmpArch::native()];
        for &arch in profile.architectures().iter().flatten() {
            let arch = architecture(arch);
            context.add_arch(arch).map_err(|source| SeccompError::Library {
                attempt: "add an architecture",
                source,
            })?;
            if !architectures.contains(&arch) {
                architectures.push(arch);
            }
        }
        for rule in profile.syscalls().iter().flatten() {
            let action = action(rule.action(), rule.errno_ret())?;
            if action == default {
                continue;
            }
            for name in rule.names() {
                // A name that libseccomp does not know is a call that no such kernel has; runc
                // skips it as well.
                let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
                for comparisons in comparisons(rule.args().as_deref().unwrap_or_default()) {
                    if comparisons.is_empty() {
                        context.add_rule(action, syscall)
                    } else {
                        context.add_rule_conditional(action, syscall, &comparisons)
                    }
                    .map_err(|source| SeccompError::Rule { syscall: name.clone(), source })?;
                }
            }
        }
        let bytes = export(&context)?;
        let mut instructions = Vec::new();
        let answers_enosys = profile.default_errno_ret() == Some(ENOSYS);
        if !is_permissive(default) && !answers_enosys {
            instructions = enosys_preamble(&newest_calls(profile, &architectures));
        }
        instructions.extend(decode(&bytes));
        if instructions.len() > INSTRUCTIONS_MAX {
            return Err(SeccompError::TooLong(instructions.len()));
        }
        Ok(Self { instructions, flags: flags(profile) })
    }

    /// Installs the filter for the calling thread; without `no_new_privs` that takes
    /// `CAP_SYS_ADMIN`.
    pub fn install(&self) -> Result<(), SeccompError> {
        set_mode_filter(&self.instructions, self.flags).map_err(SeccompError::Install)
    }

    /// The instructions, as `PTRACE_SECCOMP_GET_FILTER` would give them back.
    pub fn instructions(&self) -> &[Instruction] {
        &self.instructions
    }
}

fn refuse_notification(profile: &LinuxSeccomp) -> Result<(), SeccompError> {
    let notifies = profile.default_action() == LinuxSeccompAction::ScmpActNotify
        || profile
            .syscalls()
            .iter()
            .flatten()
            .any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify);
    if notifies {
        return Err(SeccompError::Unsupported("SCMP_ACT_NOTIFY"));
    }
    if profile.listener_path().is_some() {
        return Err(SeccompError::Unsupported("listenerPath"));
    }
    Ok(())
}

/// One rule per list: libseccomp takes an argument once per rule, so several conditions on the
/// same argument become rules of their own, as in runc.
fn comparisons(args: &[LinuxSeccompArg]) -> Vec<Vec<ScmpArgCompare>> {
    let all: Vec<ScmpArgCompare> = args.iter().map(comparison).collect();
    let mut indexes: Vec<usize> = args.iter().map(LinuxSeccompArg::index).collect();
    indexes.sort_unstable();
    indexes.dedup();
    if indexes.len() == args.len() { vec![all] } else { all.into_iter().map(|c| vec![c]).collect() }
}

fn comparison(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let (op, datum) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // The specification's `value` is the mask, `valueTwo` what must remain.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0))
        }
    };
    // Six arguments exist; libseccomp refuses an index beyond.
    ScmpArgCompare::new(u32::try_from(arg.index()).unwrap_or(u32::MAX), op, datum)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, SeccompError> {
    // What runc returns where a profile names no errno.
    const EPERM: u32 = 1;
    let errno = errno.unwrap_or(EPERM);
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => {
            ScmpAction::Errno(i32::try_from(errno).map_err(|_| SeccompError::Errno(errno))?)
        }
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(errno).map_err(|_| SeccompError::Errno(errno))?)
        }
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(SeccompError::Unsupported("SCMP_ACT_NOTIFY"));
        }
    })
}

fn is_permissive(action: ScmpAction) -> bool {
    matches!(action, ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_))
}

/// `SECCOMP_FILTER_FLAG_*` (linux/seccomp.h).
fn flags(profile: &LinuxSeccomp) -> u32 {
    profile.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 1,
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => 1 << 1,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 1 << 2,
                // Only means something with a listener, which is refused above.
                LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
            }
    })
}

/// libseccomp writes to a descriptor only (`seccomp_export_bpf_mem` is newer than 2.5).
fn export(context: &ScmpFilterContext) -> Result<Vec<u8>, SeccompError> {
    use std::io::{Read, Seek};
    let exported = (|| {
        let fd = rustix::fs::memfd_create("seccomp", rustix::fs::MemfdFlags::CLOEXEC)?;
        let mut file = std::fs::File::from(fd);
        context.export_bpf(&file).map_err(std::io::Error::other)?;
        file.rewind()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    })();
    exported.map_err(SeccompError::Install)
}

/// libseccomp writes instructions in this machine's byte order.
fn decode(bytes: &[u8]) -> impl Iterator<Item = Instruction> + '_ {
    let little = cfg!(target_endian = "little");
    bytes.chunks_exact(size_of::<Instruction>()).map(move |chunk| {
        let byte = |at: usize| chunk.get(at).copied().unwrap_or(0);
        let code = [byte(0), byte(1)];
        let value = [byte(4), byte(5), byte(6), byte(7)];
        Instruction {
            code: if little { u16::from_le_bytes(code) } else { u16::from_be_bytes(code) },
            jump_true: byte(2),
            jump_false: byte(3),
            value: if little { u32::from_le_bytes(value) } else { u32::from_be_bytes(value) },
        }
    })
}

const ENOSYS: u32 = 38;

// linux/bpf_common.h and linux/filter.h.
const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_NOT_LESS: u16 = 0x35;
const RETURN: u16 = 0x06;
// Offsets in `struct seccomp_data`, and SECCOMP_RET_ERRNO (linux/seccomp.h).
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const RETURN_ERRNO: u32 = 0x0005_0000;
/// Set in the numbers of x32 calls, which share their architecture with x86-64.
const X32_BIT: u32 = 0x4000_0000;

/// The highest call number that `profile` names, by the kernel's audit architecture.
fn newest_calls(profile: &LinuxSeccomp, architectures: &[ScmpArch]) -> BTreeMap<u32, u32> {
    let mut newest = BTreeMap::new();
    for &arch in architectures {
        let Some(audit) = audit_architecture(arch) else { continue };
        for name in profile.syscalls().iter().flatten().flat_map(|rule| rule.names()) {
            let Ok(syscall) = ScmpSyscall::from_name_by_arch(name, arch) else { continue };
            // Negative numbers are libseccomp's names for calls that this architecture lacks.
            let Ok(number) = u32::try_from(i32::from(syscall)) else { continue };
            let entry = newest.entry(audit).or_insert(0);
            *entry = (*entry).max(number);
        }
    }
    newest
}

/// `AUDIT_ARCH_*` (linux/audit.h) of the architectures that this program is built for and their
/// older siblings. An architecture that is missing here keeps the profile's own answer.
fn audit_architecture(arch: ScmpArch) -> Option<u32> {
    match arch {
        ScmpArch::X8664 => Some(0xc000_003e),
        ScmpArch::X86 => Some(0x4000_0003),
        ScmpArch::Aarch64 => Some(0xc000_00b7),
        ScmpArch::Arm => Some(0x4000_0028),
        _ => None,
    }
}

/// Falls through to what follows it, except for calls newer than `newest` of their architecture.
fn enosys_preamble(newest: &BTreeMap<u32, u32>) -> Vec<Instruction> {
    let op =
        |code, jump_true, jump_false, value| Instruction { code, jump_true, jump_false, value };
    let mut program = Vec::new();
    for (&audit, &number) in newest {
        program.extend([
            op(LOAD_WORD, 0, 0, OFFSET_ARCH),
            op(JUMP_EQUAL, 0, 4, audit),
            op(LOAD_WORD, 0, 0, OFFSET_NUMBER),
            op(JUMP_NOT_LESS, 2, 0, X32_BIT),
            op(JUMP_GREATER, 0, 1, number),
            op(RETURN, 0, 0, RETURN_ERRNO | ENOSYS),
        ]);
    }
    program
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(json: &str) -> LinuxSeccomp {
        serde_json::from_str(json).unwrap()
    }

    /// Runs `program` as the kernel does; enough of classic BPF for what is emitted here.
    fn answer(program: &Program, arch: u32, number: u32) -> u32 {
        let mut at = 0;
        let mut accumulator = 0;
        loop {
            let op = program.instructions[at];
            at += 1;
            let mut jump = |taken: bool| {
                at += usize::from(if taken { op.jump_true } else { op.jump_false });
            };
            match op.code {
                LOAD_WORD => {
                    accumulator = match op.value {
                        OFFSET_NUMBER => number,
                        OFFSET_ARCH => arch,
                        _ => 0,
                    }
                }
                JUMP_EQUAL => jump(accumulator == op.value),
                JUMP_GREATER => jump(accumulator > op.value),
                JUMP_NOT_LESS => jump(accumulator >= op.value),
                0x05 => at += op.value as usize,
                RETURN => return op.value,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const X86_64: u32 = 0xc000_003e;
    const ALLOW: u32 = 0x7fff_0000;

    /// A program of tomorrow's C library must see ENOSYS for a call that the profile is too old
    /// to know, not EPERM.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn calls_newer_than_the_profile_do_not_exist() {
        let program = Program::compile(&profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["read", "write", "getpid"], "action": "SCMP_ACT_ALLOW"}]}"#,
        ))
        .unwrap();
        assert_eq!(answer(&program, X86_64, 0), ALLOW);
        assert_eq!(answer(&program, X86_64, 39), ALLOW);
        assert_eq!(answer(&program, X86_64, 2), RETURN_ERRNO | 1);
        assert_eq!(answer(&program, X86_64, 40), RETURN_ERRNO | ENOSYS);
        assert_eq!(answer(&program, X86_64, 999), RETURN_ERRNO | ENOSYS);
    }

    #[test]
    fn a_permissive_profile_gets_no_preamble() {
        let program = Program::compile(&profile(
            r#"{"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7}]}"#,
        ))
        .unwrap();
        assert_eq!(answer(&program, X86_64, 39), RETURN_ERRNO | 7);
        assert_eq!(answer(&program, X86_64, 999), ALLOW);
    }

    #[test]
    fn notification_is_refused_by_name() {
        let error = Program::compile(&profile(
            r#"{"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}"#,
        ))
        .unwrap_err();
        assert!(error.to_string().contains("SCMP_ACT_NOTIFY"), "{error}");
    }
}
