//! A container on a [`Node`], and what a workload in it said.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::image::Image;
use crate::node::Node;
use crate::process::Ended;
use crate::until;

/// What to start. The same description starts the container again on another node, and there it is restored.
#[derive(Clone, Debug)]
pub struct Launch {
    pub name: String,
    pub image: Image,
    pub command: Vec<String>,
    /// Under the product, else under the engine's own runtime.
    pub product: bool,
    /// The capsule's address.
    pub capsule: Option<String>,
    /// More arguments of `docker run`.
    pub options: Vec<String>,
}

impl Launch {
    /// A command of the test image, under runc.
    pub fn new(name: &str, command: &[&str]) -> Launch {
        Launch {
            name: name.to_owned(),
            image: Image::TestBase,
            command: command.iter().map(|&word| word.to_owned()).collect(),
            product: false,
            capsule: None,
            options: Vec::new(),
        }
    }

    /// The same under the product.
    #[must_use]
    pub fn product(mut self) -> Launch {
        self.product = true;
        self
    }

    /// The same under the product, with this address.
    #[must_use]
    pub fn capsule(mut self, url: String) -> Launch {
        self.product = true;
        self.capsule = Some(url);
        self
    }

    #[must_use]
    pub fn image(mut self, image: Image) -> Launch {
        self.image = image;
        self
    }

    #[must_use]
    pub fn options(mut self, options: &[&str]) -> Launch {
        self.options.extend(options.iter().map(|&option| option.to_owned()));
        self
    }

    /// `docker run -d`.
    ///
    /// # Errors
    /// When the engine refuses, with its words.
    pub fn start<'a>(&self, node: &'a Node) -> Result<Container<'a>> {
        let mut words =
            vec!["run".to_owned(), "-d".to_owned(), "--name".to_owned(), self.name.clone()];
        if self.product {
            words.extend(["--runtime".to_owned(), "samara".to_owned()]);
        }
        if let Some(url) = &self.capsule {
            words.extend(["-e".to_owned(), format!("SAMARA_CAPSULE={url}")]);
        }
        words.extend(self.options.iter().cloned());
        words.push(self.image.tag().to_owned());
        words.extend(self.command.iter().cloned());
        // A restore is part of the start.
        let id =
            node.docker(words).within(Duration::from_secs(600)).output().with_context(|| {
                let logs = node.docker(["logs", &self.name]).run();
                format!(
                    "{} had said: {:?}",
                    self.name,
                    logs.map(|ended| ended.stdout + &ended.stderr)
                )
            })?;
        Ok(Container {
            node,
            id: id.lines().last().unwrap_or_default().to_owned(),
            name: self.name.clone(),
        })
    }
}

/// A container. Removed when dropped.
#[derive(Debug)]
pub struct Container<'a> {
    pub node: &'a Node,
    pub id: String,
    pub name: String,
}

impl Container<'_> {
    /// What it printed so far, in this life.
    ///
    /// # Errors
    /// When the engine does not say.
    pub fn logs(&self) -> Result<String> {
        let ended = self.node.docker(["logs", &self.id]).run()?;
        ended.successful()?;
        Ok(ended.stdout + &ended.stderr)
    }

    /// Whether it runs.
    ///
    /// # Errors
    /// When the engine does not say.
    pub fn runs(&self) -> Result<bool> {
        Ok(self.node.docker(["inspect", "--format", "{{.State.Running}}", &self.id]).output()?
            == "true")
    }

    /// The folder in `/proc` of its first process, which is there as long as it runs: cheaper to look at than to ask the engine.
    ///
    /// # Errors
    /// When the engine does not say, or it does not run.
    pub fn init(&self) -> Result<PathBuf> {
        let pid = self.node.docker(["inspect", "--format", "{{.State.Pid}}", &self.id]).output()?;
        match pid.parse::<u32>()? {
            0 => bail!("{} does not run: {}", self.name, self.logs()?),
            pid => Ok(PathBuf::from(format!("/proc/{pid}"))),
        }
    }

    /// Waits for a line with this beginning, and answers the line.
    ///
    /// # Errors
    /// When the container ends without it, or it does not come within `bound`.
    pub fn wait_for_line(&self, beginning: &str, bound: Duration) -> Result<String> {
        let find =
            |logs: &str| logs.lines().find(|line| line.starts_with(beginning)).map(str::to_owned);
        until(&format!("line '{beginning}' of {}", self.name), bound, || {
            if let Some(line) = find(&self.logs()?) {
                return Ok(Some(line));
            }
            if !self.runs()? {
                // It may have been the last thing that it said.
                let logs = self.logs()?;
                return find(&logs)
                    .map(Some)
                    .with_context(|| format!("it ended, and had said:\n{logs}"));
            }
            std::thread::sleep(Duration::from_millis(50));
            Ok(None)
        })
    }

    /// Waits until the workload's state stands, and answers its nonce.
    ///
    /// # Errors
    /// As [`Container::wait_for_line`].
    pub fn wait_ready(&self) -> Result<String> {
        self.wait_for_line("ready", Duration::from_secs(120))?;
        let line = self.wait_for_line("nonce ", Duration::from_secs(10))?;
        Ok(line.trim_start_matches("nonce ").to_owned())
    }

    /// Tells the workload that it is enough.
    ///
    /// # Errors
    /// When the file cannot be made in the container.
    pub fn finish(&self) -> Result<()> {
        /// A workload may see the file and end before `touch` has, which is then killed with it.
        const KILLED: i32 = 137;
        let ended = self.node.docker(["exec", &self.id, "touch", "/tmp/finish"]).run()?;
        if ended.status.code() == Some(KILLED) {
            return Ok(());
        }
        ended.successful().with_context(|| format!("{} had said: {:?}", self.name, self.logs()))
    }

    /// Waits for its end, and answers its exit status.
    ///
    /// # Errors
    /// When it does not end within `bound`.
    pub fn wait_exit(&self, bound: Duration) -> Result<i32> {
        let status = self.node.docker(["wait", &self.id]).within(bound).output()?;
        status.parse().with_context(|| format!("docker wait says {status}"))
    }

    /// Wants the workload to end as it should, with this nonce, and answers the rest of its `OK` line.
    ///
    /// # Errors
    /// When it says what differs, when the nonce is another, or when it does not end.
    pub fn wait_ok(&self, nonce: &str, bound: Duration) -> Result<String> {
        let status = self.wait_exit(bound)?;
        let logs = self.logs()?;
        let beginning = format!("OK {nonce}");
        match logs.lines().find_map(|line| line.strip_prefix(&beginning)) {
            Some(rest) if status == 0 => Ok(rest.trim().to_owned()),
            Some(_) | None => {
                bail!("{} ended with status {status} and no '{beginning}':\n{logs}", self.name)
            }
        }
    }

    /// `samara save`, with further arguments.
    ///
    /// # Errors
    /// When the call cannot be made; how it ended is the answer.
    pub fn save(&self, url: &str, options: &[&str]) -> Result<Ended> {
        self.node.samara(["save", &self.name, "--to", url])?.args(options).run()
    }

    /// Removes it and all its data from the engine.
    ///
    /// # Errors
    /// When the engine refuses.
    pub fn remove(&self) -> Result<()> {
        self.node.docker(["rm", "-f", "-v", &self.id]).output()?;
        Ok(())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // Mostly it is gone already; what is left goes with the node.
        let _ = self.remove();
    }
}
