//! The object store of tests: a real S3 server on the loopback, or a folder.

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::process::Call;

/// The server takes this port and the four after it, and each plus 10,000 (`script/s3-server`).
const PORTS: std::ops::RangeInclusive<u16> = 20_000..=20_400;

/// A running S3 server. Stopped, and its data deleted, when dropped.
#[derive(Debug)]
pub struct ObjectStore {
    folder: tempfile::TempDir,
    port: u16,
    pub endpoint: String,
    pub region: String,
    pub access_key_id: String,
    pub secret_access_key: String,
    pub bucket: String,
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn free_ports() -> Result<u16> {
    // From where others would not start as well, when several runs start at once.
    let start = u16::try_from(std::process::id() % 40).expect("below 40") * 10;
    for offset in (0..400).step_by(10) {
        let port = PORTS.start() + (start + offset) % 400;
        if (port..port + 5).all(|port| is_free(port) && is_free(port + 10_000)) {
            return Ok(port);
        }
    }
    bail!("no five free ports in {PORTS:?}")
}

impl ObjectStore {
    /// # Errors
    /// When the server does not answer in time: `script/s3-server` says why.
    pub fn start() -> Result<ObjectStore> {
        let runs = crate::cache().join("s3");
        std::fs::create_dir_all(&runs)?;
        for entry in std::fs::read_dir(&runs)?
            .flatten()
            .filter(|entry| crate::node::is_abandoned(&entry.path()))
        {
            let path = entry.path();
            Call::new(crate::repository().join("script/s3-server"))
                .args(["stop".as_ref(), path.as_os_str(), "0".as_ref()])
                .run()?;
            std::fs::remove_dir_all(path)?;
        }
        let folder = tempfile::Builder::new()
            .prefix(&format!("s3-{}-", std::process::id()))
            .rand_bytes(4)
            .tempdir_in(&runs)?;
        let port = free_ports()?;
        let mut store = ObjectStore {
            folder,
            port,
            endpoint: String::new(),
            region: String::new(),
            access_key_id: String::new(),
            secret_access_key: String::new(),
            bucket: String::new(),
        };
        // It may have to install the server first.
        let said = store
            .script("start")
            .within(Duration::from_secs(600))
            .output()
            .context("starting an S3 server")?;
        for line in said.lines() {
            let Some((name, value)) = line.split_once('=') else { continue };
            match name {
                "endpoint" => value.clone_into(&mut store.endpoint),
                "region" => value.clone_into(&mut store.region),
                "access_key_id" => value.clone_into(&mut store.access_key_id),
                "secret_access_key" => value.clone_into(&mut store.secret_access_key),
                "bucket" => value.clone_into(&mut store.bucket),
                _ => {}
            }
        }
        if store.endpoint.is_empty() || store.bucket.is_empty() {
            bail!("script/s3-server start named no endpoint and bucket, but: {said}");
        }
        Ok(store)
    }

    fn script(&self, verb: &str) -> Call {
        let folder = self.folder.path().as_os_str();
        Call::new(crate::repository().join("script/s3-server")).args([
            verb.as_ref(),
            folder,
            self.port.to_string().as_ref(),
        ])
    }

    /// Lets the server run only where nobody else wants a processor, or as everybody: on one machine with what is measured, it
    /// takes time that a server elsewhere would not.
    ///
    /// # Errors
    /// When its priority cannot be set.
    pub fn step_back(&self, on: bool) -> Result<()> {
        let pid = std::fs::read_to_string(self.folder.path().join("pid"))?;
        let policy = if on { "--idle" } else { "--other" };
        Call::new("chrt").args(["--all-tasks", policy, "--pid", "0", pid.trim()]).output()?;
        Ok(())
    }

    /// An address in this store.
    pub fn url(&self, path: &str) -> String {
        format!("s3://{}/{path}", self.bucket)
    }

    /// The node configuration that reaches this store (`/etc/samara/config.toml`).
    pub fn node_config(&self) -> String {
        format!(
            "[store]\nallowed_prefixes = [\"s3://{}/\"]\n\n[store.s3]\nendpoint = \"{}\"\nregion = \"{}\"\nallow_http = true\n\
             access_key_id = \"{}\"\nsecret_access_key = \"{}\"\n",
            self.bucket, self.endpoint, self.region, self.access_key_id, self.secret_access_key
        )
    }

    /// Puts a file there with curl, as a peer without a store of its own does.
    ///
    /// # Errors
    /// When the server refuses it.
    pub fn put(&self, file: &std::path::Path, path: &str) -> Result<()> {
        let target = format!("{}/{}/{path}", self.endpoint, self.bucket);
        self.curl().args(["--upload-file".as_ref(), file.as_os_str(), target.as_ref()]).output()?;
        Ok(())
    }

    /// Fetches an object into a file with curl.
    ///
    /// # Errors
    /// When it is not there.
    pub fn get(&self, path: &str, file: &std::path::Path) -> Result<()> {
        let source = format!("{}/{}/{path}", self.endpoint, self.bucket);
        self.curl().args(["--output".as_ref(), file.as_os_str(), source.as_ref()]).output()?;
        Ok(())
    }

    fn curl(&self) -> Call {
        let signing = format!("aws:amz:{}:s3", self.region);
        let user = format!("{}:{}", self.access_key_id, self.secret_access_key);
        Call::new("curl")
            .args(["--silent", "--show-error", "--fail", "--aws-sigv4", &signing, "--user", &user])
            .within(Duration::from_secs(600))
    }

    /// How many bytes the objects under `path` take.
    ///
    /// # Errors
    /// When the listing cannot be had or read.
    pub fn bytes_under(&self, path: &str) -> Result<u64> {
        // curl signs a query as it is written, and the server as S3 wants it, without a bare slash.
        let prefix = path.replace('/', "%2F");
        let url =
            format!("{}/{}?list-type=2&max-keys=1000&prefix={prefix}", self.endpoint, self.bucket);
        let listing = self.curl().args([&url]).output()?;
        if listing.contains("<IsTruncated>true") {
            bail!("more than 1000 objects under {path}");
        }
        listing
            .split("<Size>")
            .skip(1)
            .map(|rest| {
                rest.split('<')
                    .next()
                    .unwrap_or_default()
                    .parse::<u64>()
                    .context("an object's size in a listing")
            })
            .sum()
    }

    /// The folder with the server's data.
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_path_buf()
    }
}

impl Drop for ObjectStore {
    fn drop(&mut self) {
        if let Err(error) = self.script("stop").output() {
            eprintln!("samara-tests: the S3 server was not stopped: {error:#}");
        }
    }
}
