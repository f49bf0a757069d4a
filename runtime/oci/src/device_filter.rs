//! Which devices a container of cgroup v2 may use, as a program for the kernel.
//!
//! cgroup v2 has no device files; a BPF program is asked instead. Rules are those of the
//! specification, the last that fits counts, and what no rule allows is denied, as in runc.

use std::os::fd::AsFd;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use samara_kernel::bpf::{Instruction, attach_device_program, load_device_program};

#[derive(Debug, thiserror::Error)]
pub enum DeviceFilterError {
    #[error("linux.resources.devices: cannot {attempt}")]
    Call { attempt: &'static str, source: std::io::Error },
    #[error("linux.resources.devices: {0} rules are too many")]
    TooMany(usize),
    #[error("linux.resources.devices: device number {0} is out of range")]
    Number(i64),
}

/// More than any engine sends; keeps the program far below the kernel's limit.
const RULES_MAX: usize = 4096;

/// Puts `rules`, and what every container may use, in force for the cgroup in `folder`.
pub fn attach(folder: &Path, rules: &[LinuxDeviceCgroup]) -> Result<(), DeviceFilterError> {
    let call = |attempt| move |source| DeviceFilterError::Call { attempt, source };
    if rules.len() > RULES_MAX {
        return Err(DeviceFilterError::TooMany(rules.len()));
    }
    let rules = rules
        .iter()
        .map(Rule::new)
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .flatten()
        .chain(ALWAYS.iter().copied())
        .collect::<Vec<_>>();
    let program = load_device_program(&compile(&rules)).map_err(call("load the device filter"))?;
    let cgroup = std::fs::File::open(folder).map_err(call("open the cgroup"))?;
    attach_device_program(cgroup.as_fd(), program.as_fd()).map_err(call("attach the device filter"))
}

// linux/bpf.h: BPF_DEVCG_*.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    access: i32,
    major: Option<i32>,
    minor: Option<i32>,
}

const fn character(major: i32, minor: Option<i32>) -> Rule {
    Rule { allow: true, kind: Some(CHARACTER), access: ALL, major: Some(major), minor }
}

const fn mknod(kind: i32) -> Rule {
    Rule { allow: true, kind: Some(kind), access: MKNOD, major: None, minor: None }
}

/// What every container may: make device files, and use null, zero, full, random, urandom, tty,
/// ptmx, terminals and tun.
const ALWAYS: &[Rule] = &[
    mknod(CHARACTER),
    mknod(BLOCK),
    character(1, Some(3)),
    character(1, Some(5)),
    character(1, Some(7)),
    character(1, Some(8)),
    character(1, Some(9)),
    character(5, Some(0)),
    character(5, Some(2)),
    character(136, None),
    character(10, Some(200)),
];

impl Rule {
    /// None for a rule about something that is no device.
    fn new(spec: &LinuxDeviceCgroup) -> Result<Option<Self>, DeviceFilterError> {
        let kind = match spec.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
            Some(LinuxDeviceType::P) => return Ok(None),
        };
        let access = spec.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm");
        let access = access.chars().fold(0, |access, letter| {
            access
                | match letter {
                    'r' => READ,
                    'w' => WRITE,
                    'm' => MKNOD,
                    _ => 0,
                }
        });
        let number = |number: Option<i64>| match number {
            // Go writes -1 for any.
            None | Some(-1) => Ok(None),
            Some(n) => i32::try_from(n)
                .ok()
                .filter(|&n| n >= 0)
                .map(Some)
                .ok_or(DeviceFilterError::Number(n)),
        };
        // As on v1, a rule about every kind is about every device.
        let (major, minor) = match kind {
            None => (None, None),
            Some(_) => (number(spec.major())?, number(spec.minor())?),
        };
        Ok(Some(Self { allow: spec.allow(), kind, access, major, minor }))
    }

    fn fits_all(&self) -> bool {
        self.access == ALL && self.kind.is_none() && self.major.is_none() && self.minor.is_none()
    }
}

// Registers: 1 is the context on entry, 0 the answer.
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

// Instruction codes (linux/bpf_common.h, linux/bpf.h).
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbc;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const JUMP_REGISTERS_DIFFER: u8 = 0x5d;
const MOVE: u8 = 0xb7;
const EXIT: u8 = 0x95;

fn op(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    let registers = if cfg!(target_endian = "little") { to | from << 4 } else { to << 4 | from };
    Instruction { code, registers, offset, immediate }
}

fn compile(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: access above kind, then major, then minor.
    let mut program = vec![
        op(LOAD_WORD, KIND, 1, 0, 0),
        op(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        op(AND, KIND, 0, 0, 0xffff),
        op(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        op(LOAD_WORD, MAJOR, 1, 4, 0),
        op(LOAD_WORD, MINOR, 1, 8, 0),
    ];
    // The last rule counts most, so it is asked first.
    for rule in rules.iter().rev() {
        program.extend(one(rule));
        if rule.fits_all() {
            // The verifier refuses what can never run.
            return program;
        }
    }
    program.extend([op(MOVE, 0, 0, 0, 0), op(EXIT, 0, 0, 0, 0)]);
    program
}

fn one(rule: &Rule) -> Vec<Instruction> {
    let mut tests = Vec::new();
    if let Some(kind) = rule.kind {
        tests.push(op(JUMP_NOT_EQUAL, KIND, 0, 0, kind));
    }
    if rule.access != ALL {
        tests.push(op(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0));
        tests.push(op(AND, SCRATCH, 0, 0, rule.access));
        tests.push(if rule.allow {
            // Allowed if nothing else is wanted.
            op(JUMP_REGISTERS_DIFFER, SCRATCH, ACCESS, 0, 0)
        } else {
            // Denied if any of it is wanted.
            op(JUMP_EQUAL, SCRATCH, 0, 0, 0)
        });
    }
    if let Some(major) = rule.major {
        tests.push(op(JUMP_NOT_EQUAL, MAJOR, 0, 0, major));
    }
    if let Some(minor) = rule.minor {
        tests.push(op(JUMP_NOT_EQUAL, MINOR, 0, 0, minor));
    }
    // A test that fails skips the rest of the rule, its two last instructions included.
    let len = tests.len();
    for (index, test) in tests.iter_mut().enumerate() {
        if matches!(test.code, JUMP_NOT_EQUAL | JUMP_EQUAL | JUMP_REGISTERS_DIFFER) {
            // At most seven tests stand behind one.
            test.offset = i16::try_from(len - index + 1).unwrap_or(i16::MAX);
        }
    }
    tests.extend([op(MOVE, 0, 0, 0, i32::from(rule.allow)), op(EXIT, 0, 0, 0, 0)]);
    tests
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel does.
    fn allowed(rules: &str, kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let specs: Vec<LinuxDeviceCgroup> = serde_json::from_str(rules).unwrap();
        let rules: Vec<Rule> = specs.iter().filter_map(|s| Rule::new(s).unwrap()).collect();
        let program = compile(&rules);
        let mut r = [0_i32; 16];
        let mut at = 0;
        loop {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            let jump = match i.code {
                LOAD_WORD => {
                    r[to] = match i.offset {
                        0 => access << 16 | kind,
                        4 => major,
                        _ => minor,
                    };
                    false
                }
                MOVE_REGISTER => {
                    r[to] = r[from];
                    false
                }
                AND => {
                    r[to] &= i.immediate;
                    false
                }
                SHIFT_RIGHT => {
                    r[to] >>= i.immediate;
                    false
                }
                MOVE => {
                    r[to] = i.immediate;
                    false
                }
                JUMP_NOT_EQUAL => r[to] != i.immediate,
                JUMP_EQUAL => r[to] == i.immediate,
                JUMP_REGISTERS_DIFFER => r[to] != r[from],
                EXIT => return r[0] == 1,
                other => panic!("{other:#x}"),
            };
            if jump {
                at += usize::try_from(i.offset).unwrap();
            }
        }
    }

    #[test]
    fn the_last_rule_that_fits_counts_and_the_rest_is_denied() {
        let rules = r#"[{"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"},
            {"allow": true, "type": "b", "major": 8, "access": "r"},
            {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "r"}]"#;
        assert!(allowed(rules, CHARACTER, READ | WRITE, 1, 3));
        assert!(!allowed(rules, CHARACTER, READ | MKNOD, 1, 3));
        assert!(!allowed(rules, BLOCK, READ, 1, 3));
        assert!(allowed(rules, BLOCK, READ, 8, 7));
        assert!(!allowed(rules, BLOCK, READ, 8, 1));
        assert!(!allowed(rules, BLOCK, WRITE, 8, 7));
        assert!(!allowed("[]", CHARACTER, READ, 1, 3));
        assert!(allowed(r#"[{"allow": true, "type": "a", "access": "rwm"}]"#, BLOCK, ALL, 9, 9));
    }

    /// The kernel's verifier and its checks: a process in a real cgroup.
    #[test]
    fn the_kernel_enforces_it() {
        let mounts = procfs::process::Process::myself().unwrap().mountinfo().unwrap();
        let root = mounts.0.iter().find(|mount| mount.fs_type == "cgroup2").expect("no cgroup v2");
        let folder = root.mount_point.join(format!("samara-test-filter-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let rules = r#"[{"allow": true, "type": "c", "major": 9, "access": "r"},
            {"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "access": "w"}]"#;
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(rules).unwrap();
        let attached = attach(&folder, &rules);
        let script = format!(
            "echo 0 > {}/cgroup.procs; head -c1 /dev/zero >/dev/null && echo zero; \
             head -c1 /dev/kmsg >/dev/null 2>&1 && echo kmsg; true",
            folder.display()
        );
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let removed = (0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            std::fs::remove_dir(&folder).is_ok()
        });
        attached.unwrap();
        assert!(removed);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "zero\n");
    }
}
