//! Protection of this program's file against the containers that it makes.
//!
//! A process that enters a container shows its program as /proc/PID/exe there. Whoever opens that
//! from inside could write to the host's file once the process is gone (CVE-2019-5736). So a verb
//! that enters a container first executes itself again through a read-only view of its own file: a
//! detached, read-only clone of the mount, dissolved by the very execve, so that nobody can make it
//! writable again. Where the kernel or the rights for it are missing, it is a sealed copy in memory.
//! Costs and the choice: docs/decisions/sealed-program.md.

use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mount::OpenTreeFlags;

/// Names the program's file for the sealed instance, whose /proc/self/exe no longer does.
const ORIGINAL: &str = "_SAMARA_SEALED_FROM";
const SELF: &str = "/proc/self/exe";

#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("cannot protect this program's file: cannot {attempt}")]
    Call { attempt: &'static str, source: std::io::Error },
    #[error("{ORIGINAL} is set, but this program does not run sealed")]
    Pretended,
}

/// The file that this program was started from.
pub fn original_program() -> PathBuf {
    match std::env::var_os(ORIGINAL) {
        Some(path) => path.into(),
        None => std::fs::read_link(SELF).unwrap_or_else(|_| PathBuf::from("/")),
    }
}

/// Makes sure that this program runs sealed. Returns in the sealed instance only.
pub fn ensure() -> Result<(), SealError> {
    if std::env::var_os(ORIGINAL).is_some() {
        return if is_sealed() { Ok(()) } else { Err(SealError::Pretended) };
    }
    let program = match read_only_clone() {
        Ok(program) => program,
        Err(_) => sealed_copy()?,
    };
    Err(execute(&program))
}

/// Whether the file that runs cannot be written to through /proc/self/exe.
fn is_sealed() -> bool {
    let read_only = rustix::fs::statvfs(SELF)
        .is_ok_and(|stat| stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    let sealed = std::fs::File::open(SELF)
        .is_ok_and(|file| rustix::fs::fcntl_get_seals(&file).is_ok_and(|s| s.contains(SEALS)));
    read_only || sealed
}

fn read_only_clone() -> std::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(rustix::fs::CWD, SELF, flags)?;
    samara_kernel::mount_setattr::set_read_only(tree.as_fd())?;
    Ok(tree)
}

const SEALS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

fn sealed_copy() -> Result<OwnedFd, SealError> {
    let call = |attempt| move |source: std::io::Error| SealError::Call { attempt, source };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let copy = rustix::fs::memfd_create("samara-runtime", flags)
        .map_err(|errno| call("make a file in memory")(errno.into()))?;
    let mut copy = std::fs::File::from(copy);
    let mut original = std::fs::File::open(SELF).map_err(call("open it"))?;
    std::io::copy(&mut original, &mut copy).map_err(call("copy it"))?;
    rustix::fs::fcntl_add_seals(&copy, SEALS).map_err(|errno| call("seal it")(errno.into()))?;
    Ok(copy.into())
}

/// Becomes `program`, with the same arguments.
fn execute(program: &OwnedFd) -> SealError {
    let call = |source: std::io::Error| SealError::Call { attempt: "execute it", source };
    let original = original_program();
    let string = |text: OsString| CString::new(text.into_vec());
    let args: Result<Vec<_>, _> = std::env::args_os().map(string).collect();
    let own = [CString::new([ORIGINAL.as_bytes(), b"=", original.as_os_str().as_bytes()].concat())];
    let env: Result<Vec<_>, _> = std::env::vars_os()
        .map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            string(name)
        })
        .chain(own)
        .collect();
    let (Ok(args), Ok(env)) = (args, env) else {
        return call(std::io::ErrorKind::InvalidInput.into());
    };
    let flags = nix::fcntl::AtFlags::AT_EMPTY_PATH;
    match nix::unistd::execveat(Some(program.as_raw_fd()), c"", &args, &env, flags) {
        Ok(never) => match never {},
        Err(errno) => call(errno.into()),
    }
}
