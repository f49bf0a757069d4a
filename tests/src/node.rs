//! A node: a docker engine with a containerd, data, state, images, bridge, sockets and control group of its own, so that
//! two of them on one machine share nothing but the kernel and, if a test wants it, an object store.
//!
//! Network: the bridge has an address but no way out, and the engine touches neither firewall nor forwarding.
//! Whatever happens, dropping a [`Node`] ends its processes and removes all that it made.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::image::Image;
use crate::object_store::ObjectStore;
use crate::process::{Call, end, of_folder, program_name, with_environment};
use crate::{product, until};

/// Every process of a node has this variable, unless it cleared its environment.
pub const MARK: &str = "SAMARA_TEST_NODE";

/// Which docker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The one installed on this machine (20.10 on Debian 12).
    Installed,
    /// The one of Debian sid, in the peers' root (28 at the time of writing).
    Newer,
}

/// What a node is made of.
#[derive(Clone, Copy, Debug)]
pub struct NodeOptions<'a> {
    pub engine: Engine,
    /// With the product as runtime `samara`, configured for this store; else `runc` is all there is.
    pub product: Option<&'a ObjectStore>,
}

/// A running engine.
#[derive(Debug)]
pub struct Node {
    name: String,
    folder: PathBuf,
    kind: Engine,
    engine: Child,
}

impl Node {
    /// Starts an engine, and waits until it answers.
    ///
    /// # Errors
    /// When a part of it cannot be made or does not answer in time; nothing of it is left then.
    pub fn start(name: &str, options: NodeOptions<'_>) -> Result<Node> {
        sweep()?;
        let runs = runs_folder();
        fs::create_dir_all(&runs)?;
        // The owner's id is in the name: that is how a later run sees that nobody looks after it any more.
        let folder = tempfile::Builder::new()
            .prefix(&format!("{name}-{}-", std::process::id()))
            .rand_bytes(4)
            .tempdir_in(&runs)?
            .keep();
        let made = Node::start_in(name, &folder, options);
        if made.is_err() {
            remove(&folder);
        }
        made
    }

    fn start_in(name: &str, folder: &Path, options: NodeOptions<'_>) -> Result<Node> {
        let bridge = make_bridge()?;
        fs::write(folder.join("bridge"), &bridge)?;
        if let Some(store) = options.product {
            install_product(folder, store)?;
        }
        let at = |part: &str| folder.join(part).to_string_lossy().into_owned();
        fs::write(
            folder.join("containerd.toml"),
            format!(
                "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
                at("containerd"),
                at("containerd-state"),
                at("containerd.sock")
            ),
        )?;
        let mut settings = serde_json::json!({
            "data-root": at("data"), "exec-root": at("exec"), "pidfile": at("docker.pid"),
            "hosts": [format!("unix://{}", at("docker.sock"))], "containerd": at("containerd.sock"),
            "bridge": bridge, "iptables": false, "ip6tables": false, "ip-masq": false, "ip-forward": false,
            "userland-proxy": false, "experimental": true, "storage-driver": "overlay2",
            "cgroup-parent": cgroup_of(folder), "exec-opts": ["native.cgroupdriver=cgroupfs"],
        });
        if options.product.is_some() {
            settings["runtimes"] = serde_json::json!({"samara": {"path": at("samara-runtime")}});
        }
        fs::write(folder.join("daemon.json"), settings.to_string())?;
        // One shell for both daemons, since they must share a mount namespace in the peers' root. dockerd would start
        // a containerd of its own only where the machine's is not running, and share that one otherwise.
        let script = "containerd --config \"$1/containerd.toml\" >\"$1/containerd.log\" 2>&1 &\n\
                      for i in $(seq 400); do [ -S \"$1/containerd.sock\" ] && break; sleep 0.05; done\n\
                      exec dockerd --config-file \"$1/daemon.json\" >\"$1/docker.log\" 2>&1";
        let mut command = match options.engine {
            Engine::Installed => Command::new("bash"),
            Engine::Newer => {
                let mut command = Command::new(crate::repository().join("script/peer-run"));
                command.arg("bash");
                command
            }
        };
        let engine = command
            .args(["-c", script, "node"])
            .arg(folder)
            .env(MARK, folder)
            .stdin(Stdio::null())
            // A group of its own: an interrupt from the keyboard reaches us alone, and we end it in order.
            .process_group(0)
            .spawn()
            .context("starting dockerd")?;
        let mut node = Node {
            name: name.to_owned(),
            folder: folder.to_path_buf(),
            engine,
            kind: options.engine,
        };
        // The peers' root may have to be made first.
        let bound = if options.engine == Engine::Newer {
            Duration::from_secs(900)
        } else {
            Duration::from_secs(60)
        };
        let answers = until("answer of dockerd", bound, || {
            if let Some(status) = node.engine.try_wait()? {
                bail!("dockerd ended: {status}");
            }
            Ok(node.folder.join("docker.sock").exists().then_some(()).filter(|()| {
                node.docker(["version"]).run().is_ok_and(|ended| ended.status.success())
            }))
        });
        if let Err(error) = answers {
            let log = fs::read_to_string(node.folder.join("docker.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            return Err(error.context(format!(
                "dockerd's last lines:\n{}",
                lines[lines.len().saturating_sub(8)..].join("\n")
            )));
        }
        Ok(node)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// A folder that lives as long as the node, for what tests share with containers.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A call of docker's client to this engine.
    pub fn docker<A: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Call {
        self.as_user(Call::new("docker")).args(args)
    }

    /// A call of `samara` as somebody on this node makes it.
    ///
    /// # Errors
    /// When the node was started without the product.
    pub fn samara<A: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Call> {
        self.samara_with(&self.folder.join("config.toml"), args)
    }

    /// The same with another node configuration.
    ///
    /// # Errors
    /// When the node was started without the product.
    pub fn samara_with<A: AsRef<std::ffi::OsStr>>(
        &self,
        config: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Call> {
        let program = self.folder.join("bin/samara");
        if !program.exists() {
            bail!("node {} was started without the product", self.name);
        }
        let call = match self.kind {
            Engine::Installed => Call::new(program),
            // Where the engine is, paths are the engine's.
            Engine::Newer => Call::new("nsenter")
                .args(["--mount", "--target", &self.engine.id().to_string(), "--"])
                .args([program]),
        };
        let call = call.args(["--config".as_ref(), config.as_os_str()]);
        // A save lasts as long as its upload: gigabytes at two cores' rate of compression.
        Ok(self.as_user(call).args(args).within(Duration::from_secs(600)))
    }

    fn as_user(&self, call: Call) -> Call {
        call.env("DOCKER_HOST", format!("unix://{}", self.folder.join("docker.sock").display()))
            .env("DOCKER_CONFIG", self.folder.join("client"))
            .env(MARK, &self.folder)
    }

    /// Loads an image, and answers its id.
    ///
    /// # Errors
    /// When it cannot be made or loaded.
    pub fn load(&self, image: Image) -> Result<String> {
        let archive = image.archive()?;
        self.docker(["load".as_ref(), "-q".as_ref(), "-i".as_ref(), archive.as_os_str()])
            .within(Duration::from_secs(300))
            .output()?;
        self.docker(["image", "inspect", "--format", "{{.Id}}", image.tag()]).output()
    }

    /// CPU time of all containers that ever ran here, those removed included: the control group above them keeps the sum.
    ///
    /// # Errors
    /// When no container ran here, or the kernel shows no such figure.
    pub fn cpu_time(&self) -> Result<Duration> {
        let group = cgroup_of(&self.folder);
        let v1 = PathBuf::from(format!("/sys/fs/cgroup/cpuacct{group}/cpuacct.usage"));
        if v1.exists() {
            return Ok(Duration::from_nanos(
                fs::read_to_string(&v1)?
                    .trim()
                    .parse()
                    .with_context(|| v1.display().to_string())?,
            ));
        }
        let v2 = PathBuf::from(format!("/sys/fs/cgroup{group}/cpu.stat"));
        let text = fs::read_to_string(&v2)
            .with_context(|| format!("neither {} nor {}", v1.display(), v2.display()))?;
        let micros = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "))
            .context("no usage_usec in cpu.stat")?;
        Ok(Duration::from_micros(micros.trim().parse()?))
    }

    /// Processes of ours that run on this node, with the name of their program.
    pub fn product_processes(&self) -> Vec<(Pid, &'static str)> {
        processes_of(&self.folder)
            .into_iter()
            .filter_map(|pid| Some((pid, program_name(Path::new(&format!("/proc/{pid}")))?)))
            .collect()
    }

    /// Freezer states of this node's containers that are not `THAWED` (cgroup v1), or frozen (v2).
    pub fn frozen(&self) -> Vec<String> {
        let group = cgroup_of(&self.folder);
        let mut frozen = Vec::new();
        for (root, file, free) in [
            ("/sys/fs/cgroup/freezer", "freezer.state", "THAWED"),
            ("/sys/fs/cgroup", "cgroup.freeze", "0"),
        ] {
            for entry in fs::read_dir(format!("{root}{group}")).into_iter().flatten().flatten() {
                let path = entry.path().join(file);
                if let Ok(state) = fs::read_to_string(&path)
                    && state.trim() != free
                {
                    frozen.push(format!("{}: {}", path.display(), state.trim()));
                }
            }
        }
        frozen
    }

    /// Stops the engine and deletes everything it held, as when a machine is taken away.
    ///
    /// # Errors
    /// When a process or mount of it could not be removed.
    pub fn wipe(self) -> Result<()> {
        let folder = self.folder.clone();
        drop(self);
        let left = processes_of(&folder);
        if folder.exists() || !left.is_empty() {
            bail!(
                "of {} there are left: processes {left:?}, folder {}",
                folder.display(),
                folder.exists()
            );
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Containers first, while there is somebody to do it in order. They get no grace: nobody wants their output now.
        if let Ok(all) = self.docker(["ps", "-aq"]).within(Duration::from_secs(20)).output()
            && !all.is_empty()
        {
            let call = self.docker(["rm", "-f", "-v"]).args(all.split_whitespace());
            let _ = call.within(Duration::from_secs(60)).run();
        }
        end(&mut self.engine, Duration::from_secs(20));
        remove(&self.folder);
    }
}

/// Every process that a node started and that is still there, but for those in containers.
pub fn processes_of(folder: &Path) -> Vec<Pid> {
    let mut all = with_environment(MARK, folder);
    all.extend(of_folder(folder).into_iter().filter(|pid| !all.contains(pid)).collect::<Vec<_>>());
    all
}

fn runs_folder() -> PathBuf {
    crate::cache().join("run")
}

/// The control group above a node's containers.
fn cgroup_of(folder: &Path) -> String {
    format!(
        "/samara-test-{}",
        folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    )
}

/// Removes what a node made: processes, control groups, mounts, bridge, folder. Takes each step whatever became of the others.
fn remove(folder: &Path) {
    for _ in 0..50 {
        kill_cgroup(folder);
        let processes = processes_of(folder);
        if processes.is_empty() {
            break;
        }
        for pid in processes {
            let _ = kill(pid, Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    for _ in 0..3 {
        for mounted in mounts_below(folder) {
            let _ = umount2(&mounted, MntFlags::MNT_DETACH);
        }
    }
    remove_cgroup(folder);
    if let Ok(bridge) = fs::read_to_string(folder.join("bridge")) {
        let _ = Call::new("ip").args(["link", "delete", bridge.trim()]).run();
    }
    if let Err(error) = fs::remove_dir_all(folder)
        && folder.exists()
    {
        eprintln!("samara-tests: {} is left: {error}", folder.display());
    }
}

/// Removes what runs that were killed have left behind.
///
/// # Errors
/// When the folder of runs cannot be read.
pub fn sweep() -> Result<()> {
    sweep_in(&runs_folder())
}

/// The same for another folder with a folder for each run ([`is_abandoned`] says how they are named): processes that name it
/// or bear its [`MARK`], mounts below it, and the folder itself.
///
/// # Errors
/// When the folder cannot be read.
pub fn sweep_in(runs: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(runs) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        if is_abandoned(&path) {
            eprintln!("samara-tests: removing what a killed run left in {}", path.display());
            remove(&path);
        }
    }
    Ok(())
}

/// Whether the process that made this folder is gone: its id is the last part but one of the name.
pub fn is_abandoned(folder: &Path) -> bool {
    let name =
        folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let owner = name.rsplit('-').nth(1).and_then(|pid| pid.parse::<u32>().ok());
    owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut below: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|path| path.starts_with(folder))
        .collect();
    // Innermost first.
    below.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    below
}

/// All folders of a node's control group, in every hierarchy, innermost first.
fn cgroup_folders(folder: &Path) -> Vec<PathBuf> {
    fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&entry.path(), into);
            }
        }
        into.push(folder.to_path_buf());
    }
    let group = cgroup_of(folder);
    let mut all = Vec::new();
    let hierarchies =
        fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    for root in hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]) {
        let top = root.join(group.trim_start_matches('/'));
        if top.is_dir() {
            walk(&top, &mut all);
        }
    }
    all
}

fn kill_cgroup(folder: &Path) {
    for group in cgroup_folders(folder) {
        // A frozen task takes no signal.
        let _ = fs::write(group.join("freezer.state"), "THAWED");
        let _ = fs::write(group.join("cgroup.freeze"), "0");
        for line in fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().lines() {
            if let Ok(pid) = line.parse::<i32>()
                && pid > 1
            {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

fn remove_cgroup(folder: &Path) {
    // A killed task leaves its group a moment later.
    let _ = until("empty control groups", Duration::from_secs(5), || {
        for group in cgroup_folders(folder) {
            let _ = fs::remove_dir(group);
        }
        Ok(cgroup_folders(folder).is_empty().then_some(()))
    });
}

/// A bridge with an address in a network that nobody here uses yet.
fn make_bridge() -> Result<String> {
    for subnet in 0..250 {
        let network = format!("10.213.{subnet}.");
        let used = Call::new("ip").args(["-o", "-4", "address"]).output()?;
        if used.contains(&network) {
            continue;
        }
        let bridge = format!("samara-t{subnet}");
        // Fails when another run was faster: then the next one.
        if Call::new("ip").args(["link", "add", &bridge, "type", "bridge"]).run()?.status.success()
        {
            Call::new("ip")
                .args(["address", "add", &format!("{network}1/24"), "dev", &bridge])
                .output()?;
            Call::new("ip").args(["link", "set", &bridge, "up"]).output()?;
            return Ok(bridge);
        }
    }
    bail!("no free bridge among samara-t0 to samara-t249");
}

/// Copies the binaries, so that a build during a test changes nothing, and so that the peers' root sees them; writes the
/// configuration, and the runtime that the engine calls: ours, told where this node's configuration is.
fn install_product(folder: &Path, store: &ObjectStore) -> Result<()> {
    let binaries = product::binaries()?;
    fs::create_dir_all(folder.join("bin"))?;
    for name in product::NAMES {
        fs::copy(binaries.join(name), folder.join("bin").join(name))?;
    }
    let config = folder.join("config.toml");
    // Captures of other nodes are none of its concern.
    let turns = format!("\n[capture]\nfolder = \"{}\"\n", folder.join("captures").display());
    fs::write(&config, store.node_config() + &turns)?;
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600))?;
    let runtime = folder.join("samara-runtime");
    let folder = folder.display();
    fs::write(
        &runtime,
        format!(
            "#!/bin/sh\nSAMARA_CONFIG={folder}/config.toml {MARK}={folder} exec {folder}/bin/samara-runtime \"$@\"\n"
        ),
    )?;
    fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
