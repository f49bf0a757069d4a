//! Containers made with a runtime's own command line, without an engine: a bundle over an overlay, as engines make them.
//!
//! They cost a few tens of milliseconds each, so that hundreds of small states can have one each.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::process::{Call, Ended};
use crate::terminal::Terminal;
use crate::{product, until};

/// What docker gives a container that is not privileged.
const USUAL_CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A folder with the root that containers are made over, the product's configuration, and a store.
#[derive(Debug)]
pub struct Site {
    dir: tempfile::TempDir,
    bin: PathBuf,
}

/// What differs from bundle to bundle.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// All capabilities that this process has.
    pub privileged: bool,
    pub terminal: bool,
    /// More of its environment.
    pub env: Vec<String>,
}

impl Site {
    /// Makes the folder. `fill` puts programs into the root, which has busybox already.
    ///
    /// # Errors
    /// When there is no busybox, or the product has not been built.
    pub fn new(fill: impl FnOnce(&Path) -> Result<()>) -> Result<Site> {
        let dir = tempfile::Builder::new().prefix("samara-site-").tempdir()?;
        let root = dir.path().join("base");
        for folder in ["bin", "proc", "sys", "dev", "tmp", "etc", "root", "var/tmp"] {
            fs::create_dir_all(root.join(folder))?;
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        fs::copy("/bin/busybox", root.join("bin/busybox")).context("busybox-static is missing")?;
        for applet in ["sh", "cat", "sleep", "true", "false", "ls", "stty"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nu:x:1000:1000::/:/bin/sh\n",
        )?;
        fill(&root)?;
        let store = format!("file://{}", dir.path().join("store").display());
        let config = dir.path().join("node.toml");
        let turns = dir.path().join("turns").display().to_string();
        let text =
            format!("[store]\nallowed_prefixes = [\"{store}\"]\n[capture]\nfolder = \"{turns}\"\n");
        fs::write(&config, text)?;
        fs::set_permissions(&config, fs::Permissions::from_mode(0o600))?;
        Ok(Site { dir, bin: product::binaries()? })
    }

    /// The address of a capsule in the site's store.
    pub fn url(&self, name: &str) -> String {
        format!("file://{}", self.dir.path().join("store").join(name).display())
    }

    fn runtime(&self, name: &str) -> PathBuf {
        if name == "runc" { PathBuf::from(name) } else { self.bin.join(name) }
    }

    /// A container of its own root that runs `args`; it is started, or restored from `capsule`.
    ///
    /// # Errors
    /// When it can't be made: with what the runtime said.
    pub fn start(
        &self,
        runtime: &str,
        id: &str,
        args: &[&str],
        options: &Options,
        capsule: Option<&str>,
    ) -> Result<Running<'_>> {
        let folder = self.dir.path().join(id);
        let merged = folder.join("root");
        for part in ["root", "upper", "work"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let layers = format!(
            "lowerdir={},upperdir={},workdir={}",
            self.dir.path().join("base").display(),
            folder.join("upper").display(),
            folder.join("work").display()
        );
        mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
            .context("mounting a root")?;
        let mut running = Running {
            site: self,
            runtime: self.runtime(runtime),
            id: id.to_owned(),
            folder: folder.clone(),
            made: false,
            terminal: None,
        };
        let spec = self.spec(&merged, args, options)?;
        fs::write(folder.join("config.json"), spec.to_string())?;
        let output = fs::File::options().create(true).append(true).open(folder.join("output"))?;
        let errors = fs::File::create(folder.join("errors"))?;
        let socket = folder.join("console.sock");
        let waiting = if options.terminal { Some(Terminal::listen(&socket)?) } else { None };
        let mut command = running.command(match capsule {
            None => &["run", "-d"],
            Some(_) => &["restore", "-d"],
        });
        if let Some(url) = capsule {
            command.args(["--capsule", url]);
        }
        if options.terminal {
            command.arg("--console-socket").arg(&socket);
        }
        let mut child = command
            .arg("-b")
            .arg(&folder)
            .arg(id)
            .stdin(Stdio::null())
            .stdout(if options.terminal { Stdio::null() } else { Stdio::from(output) })
            .stderr(errors)
            .spawn()?;
        running.made = true;
        let status = wait(&mut child)?;
        if !status {
            bail!("{}", fs::read_to_string(folder.join("errors"))?.trim_end());
        }
        if let Some(waiting) = waiting {
            running.terminal = Some(waiting.accept()?);
        }
        Ok(running)
    }

    fn spec(&self, root: &Path, args: &[&str], options: &Options) -> Result<Value> {
        let capabilities: Vec<String> = if options.privileged {
            let status = fs::read_to_string("/proc/self/status")?;
            let bounding = status.lines().find_map(|line| line.strip_prefix("CapBnd:\t"));
            let bounding = u64::from_str_radix(bounding.context("no CapBnd")?, 16)?;
            capability_names(bounding)?
        } else {
            USUAL_CAPABILITIES.map(str::to_owned).to_vec()
        };
        let mut env = vec!["PATH=/bin".to_owned(), "TERM=xterm".to_owned(), "A=1".to_owned()];
        env.extend(options.env.iter().cloned());
        Ok(json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": options.terminal,
                "user": {"uid": 0, "gid": 0, "additionalGids": [0, 7]},
                "args": args,
                "env": env,
                "cwd": "/",
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                },
            },
            "root": {"path": root},
            "hostname": "box",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                 "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]},
            ],
            "linux": {
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "namespaces": [
                    {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                    {"type": "mount"},
                ],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
            },
        }))
    }
}

/// The names of the capabilities in a set, by the kernel's numbering (linux/capability.h).
fn capability_names(set: u64) -> Result<Vec<String>> {
    const NAMES: [&str; 41] = [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ];
    let names = NAMES.iter().enumerate().filter(|(number, _)| set >> number & 1 == 1);
    Ok(names.map(|(_, name)| format!("CAP_{name}")).collect())
}

fn wait(child: &mut Child) -> Result<bool> {
    match crate::process::wait_for(child, Duration::from_secs(60))? {
        Some(status) => Ok(status.success()),
        None => {
            let _ = child.kill();
            child.wait()?;
            bail!("a call of the runtime did not end within 60 s")
        }
    }
}

/// A container; dropping it removes it with its mount and folder.
#[derive(Debug)]
pub struct Running<'a> {
    site: &'a Site,
    runtime: PathBuf,
    id: String,
    folder: PathBuf,
    made: bool,
    /// The other side of its terminal.
    pub terminal: Option<Terminal>,
}

impl Running<'_> {
    fn state(&self) -> PathBuf {
        self.site.dir.path().join("state").join(self.runtime.file_name().unwrap_or_default())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.runtime);
        command.arg("--root").arg(self.state()).args(args);
        command.env("SAMARA_CONFIG", self.site.dir.path().join("node.toml"));
        command
    }

    /// A call of the runtime about this container.
    ///
    /// # Errors
    /// When it can't be started or does not end.
    pub fn call(&self, args: &[&str]) -> Result<Ended> {
        Call::new(&self.runtime)
            .args(["--root".as_ref(), self.state().as_os_str()])
            .args(args)
            .args([&self.id])
            .env("SAMARA_CONFIG", self.site.dir.path().join("node.toml"))
            .run()
    }

    /// All that it has written to its standard output.
    pub fn output(&self) -> Result<String> {
        if let Some(terminal) = &self.terminal {
            return Ok(terminal.output());
        }
        Ok(String::from_utf8_lossy(&fs::read(self.folder.join("output"))?).into_owned())
    }

    /// Waits until it has written a line that begins with `wanted`.
    ///
    /// # Errors
    /// When it ends before, or does not within a minute.
    pub fn wait_for(&self, wanted: &str) -> Result<()> {
        let has = |text: &str| text.lines().any(|line| line.trim_end().starts_with(wanted));
        until(&format!("line `{wanted}`"), Duration::from_secs(60), || {
            let ended = self.stopped()?;
            let text = self.output()?;
            if has(&text) {
                return Ok(Some(()));
            }
            ensure!(!ended, "it ended, and had said: {text}");
            Ok(None)
        })
    }

    /// Whether it has ended.
    pub fn stopped(&self) -> Result<bool> {
        let ended = self.call(&["state"])?;
        ended.successful()?;
        let state: Value = serde_json::from_str(&ended.stdout)?;
        Ok(state["status"] == "stopped")
    }

    /// Makes a file in its root.
    ///
    /// # Errors
    /// When the root can't be written to.
    pub fn touch(&self, name: &str) -> Result<()> {
        Ok(fs::write(self.folder.join("root").join(name), "")?)
    }

    /// Waits until it has ended.
    pub fn wait_stopped(&self) -> Result<()> {
        let stopped = || Ok(self.stopped()?.then_some(()));
        until("end of the container", Duration::from_secs(60), stopped)?;
        self.terminal.as_ref().map_or(Ok(()), Terminal::wait_closed)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.made {
            let _ = self.call(&["delete", "--force"]);
        }
        let _ = umount2(&self.folder.join("root"), MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&self.folder);
    }
}
