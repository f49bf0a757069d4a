//! The measured program (`tests/workloads/memory.c`), seen from outside by the file that it shares.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use samara_tests::process::Call;
use samara_tests::until;

/// The words of the program's report, in its order.
#[derive(Clone, Copy, Debug)]
enum Word {
    GapMaxNs = 0,
    Readings = 1,
    Request = 2,
}

/// Filling gigabytes of memory that the machine never used before.
const FILL_TIME_MAX: Duration = Duration::from_secs(300);

/// Compiles the programs that need no image, once per run.
///
/// # Errors
/// When the compiler fails.
pub(crate) fn compile(folder: &Path) -> Result<()> {
    let source = samara_tests::repository().join("tests/workloads/memory.c");
    let gcc = |source: &Path, name: &str| -> Result<()> {
        let target = folder.join(name);
        Call::new("gcc")
            .args(["-O2", "-static", "-pthread", "-x", "c", "-o"])
            .args([&target, source])
            .output()?;
        Ok(())
    };
    gcc(&source, "memory")?;
    let nothing = folder.join("nothing.c");
    std::fs::write(&nothing, "int main(void) { return 0; }\n")?;
    gcc(&nothing, "nothing")
}

/// A running program's report.
#[derive(Debug)]
pub(crate) struct Report {
    path: PathBuf,
}

impl Report {
    /// Waits until the program at this file has filled its memory.
    ///
    /// # Errors
    /// When it does not in time.
    pub(crate) fn wait(path: &Path) -> Result<Report> {
        until(&format!("report in {}", path.display()), FILL_TIME_MAX, || {
            Ok(path.exists().then_some(()))
        })?;
        Ok(Report { path: path.to_path_buf() })
    }

    /// Opened anew for each access: a restore may put another file there under the same name.
    fn file(&self) -> Result<File> {
        File::options()
            .read(true)
            .write(true)
            .open(&self.path)
            .with_context(|| self.path.display().to_string())
    }

    fn read(&self, word: Word) -> Result<u64> {
        let mut bytes = [0; 8];
        self.file()?.read_exact_at(&mut bytes, word as u64 * 8)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, word: Word, value: u64) -> Result<()> {
        Ok(self.file()?.write_all_at(&value.to_le_bytes(), word as u64 * 8)?)
    }

    /// From here on a new largest gap.
    pub(crate) fn forget_gap(&self) -> Result<()> {
        self.write(Word::GapMaxNs, 0)
    }

    /// The largest step of the clock that the program saw, in milliseconds.
    pub(crate) fn gap_ms(&self) -> Result<f64> {
        Ok(Duration::from_nanos(self.read(Word::GapMaxNs)?).as_secs_f64() * 1000.0)
    }

    /// Waits until the program has read the clock again.
    pub(crate) fn wait_running(&self) -> Result<()> {
        let before = self.read(Word::Readings)?;
        until("reading of the clock", Duration::from_secs(120), || {
            Ok((self.read(Word::Readings)? != before).then_some(()))
        })
    }

    /// Lets the program look at its memory: at every word, or at one in each page.
    ///
    /// # Errors
    /// When something differs, or when there is no answer.
    pub(crate) fn check(&self, every_word: bool) -> Result<()> {
        self.write(Word::Request, if every_word { 1 } else { 4 })?;
        let answer =
            until("check of memory", FILL_TIME_MAX, || match self.read(Word::Request)? {
                1 | 4 => Ok(None),
                other => Ok(Some(other)),
            })?;
        if answer != 2 {
            bail!("the program's memory differs from what it was");
        }
        Ok(())
    }
}

/// Lets the machine give memory to this guest that it never used: the first touch is several times slower than later ones.
///
/// # Errors
/// When the program cannot be run.
pub(crate) fn warm(folder: &Path, mebibytes: u64) -> Result<()> {
    let path = folder.join("warm");
    let mut child = std::process::Command::new(folder.join("memory"))
        .args([&mebibytes.to_string(), "1"])
        .arg(&path)
        .spawn()
        .context("the memory program")?;
    let filled = Report::wait(&path);
    samara_tests::process::end(&mut child, Duration::from_secs(10));
    filled?;
    std::fs::remove_file(path)?;
    Ok(())
}
