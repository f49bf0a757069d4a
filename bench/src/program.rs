//! The measured programs (`tests/workloads/memory.c`, and `heap.py`, `Heap.java`, `heap.js` of `tests/programs`), seen from
//! outside by the file that they share.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use samara_tests::process::Call;
use samara_tests::until;

use crate::subject::{MOUNT_POINTS, plain_root};

/// Where programs have their report.
pub(crate) const REPORT: &str = "/control/report";

/// Pages in a MiB.
pub(crate) const PAGES: u64 = 256;

/// The words of a program's report, in their order.
#[derive(Clone, Copy, Debug)]
enum Word {
    GapMaxNs = 0,
    Readings = 1,
    Request = 2,
    Argument = 4,
    Rate = 5,
    Written = 6,
    PagesOfWork = 7,
    WorkNs = 8,
    WithoutClock = 9,
}

/// What a program can be asked for. Programs of `tests/programs` know `CheckAll` and `Update` alone.
#[derive(Clone, Copy, Debug)]
enum Request {
    CheckAll = 1,
    CheckPages = 4,
    WritePages = 5,
    WriteFiles = 6,
    Work = 7,
    Update = 8,
}

const DONE: u64 = 2;
const DIFFERS: u64 = 3;

/// Filling gigabytes of memory that the machine never used before, or a minute of work on a busy machine.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(300);

/// Compiles the programs that need no image into a root of their own, once per run.
///
/// # Errors
/// When the compiler fails.
pub(crate) fn compile(folder: &Path) -> Result<()> {
    let root = plain_root(folder);
    for name in MOUNT_POINTS {
        std::fs::create_dir_all(root.join(name))?;
    }
    let gcc = |source: &Path, name: &str| -> Result<()> {
        Call::new("gcc")
            .args(["-O2", "-static", "-pthread", "-x", "c", "-o"])
            .args([&root.join(name), source])
            .output()?;
        Ok(())
    };
    gcc(&samara_tests::repository().join("tests/workloads/memory.c"), "memory")?;
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
    /// Waits until the program with this process id has filled its memory, and made this file.
    ///
    /// # Errors
    /// When it does not in time, or has ended.
    pub(crate) fn wait(path: PathBuf, pid: &str) -> Result<Report> {
        let process = Path::new("/proc").join(pid);
        until(&format!("report in {}", path.display()), ANSWER_TIME_MAX, || {
            ensure!(process.exists(), "the program has ended");
            Ok(path.exists().then_some(()))
        })?;
        Ok(Report { path })
    }

    /// Opened anew for each access: a restore puts another file there under the same name.
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

    /// Whether the clock is read without pause, which takes a processor, or every few milliseconds.
    pub(crate) fn watch_clock(&self, on: bool) -> Result<()> {
        self.write(Word::WithoutClock, u64::from(!on))?;
        self.wait_running()
    }

    /// How many pages the program writes each second from now on.
    pub(crate) fn set_rate(&self, pages: u64) -> Result<()> {
        self.write(Word::Rate, pages)
    }

    /// Pages that it has written since it filled its memory.
    pub(crate) fn written(&self) -> Result<u64> {
        self.read(Word::Written)
    }

    /// Lets it write on at this rate until so many pages more were written, and afterwards.
    ///
    /// # Errors
    /// When it does not reach them in a few times what they should take.
    pub(crate) fn write_on(&self, pages: u64, pages_a_second: u64) -> Result<()> {
        let goal = self.written()? + pages;
        self.set_rate(pages_a_second)?;
        let bound = Duration::from_secs(30 + 10 * pages / pages_a_second.max(1));
        until("pages written", bound, || Ok((self.written()? >= goal).then_some(())))
    }

    /// Lets it write so many pages at once.
    pub(crate) fn write_pages(&self, pages: u64) -> Result<()> {
        self.ask(Request::WritePages, pages)
    }

    /// Lets it write so many MiB to new files.
    pub(crate) fn write_files(&self, mebibytes: u64) -> Result<()> {
        self.ask(Request::WriteFiles, mebibytes)
    }

    /// Lets it change what it has for a second.
    pub(crate) fn update(&self) -> Result<()> {
        self.ask(Request::Update, 0)
    }

    /// Lets it work on every processor, and write so many pages meanwhile; `meanwhile` is called once it has begun. Answers what
    /// the work took by the program's own clock.
    ///
    /// # Errors
    /// When `meanwhile` fails, or the work does not end.
    pub(crate) fn work(
        &self,
        units: u64,
        pages: u64,
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<Duration> {
        self.write(Word::PagesOfWork, pages)?;
        self.begin(Request::Work, units)?;
        meanwhile()?;
        self.answer(Request::Work)?;
        Ok(Duration::from_nanos(self.read(Word::WorkNs)?))
    }

    /// Waits until the program has read the clock again.
    pub(crate) fn wait_running(&self) -> Result<()> {
        let before = self.read(Word::Readings)?;
        until("reading of the clock", Duration::from_secs(120), || {
            Ok((self.read(Word::Readings)? != before).then_some(()))
        })
    }

    /// Lets the program look at its memory and files: at every word, or at one in each page of memory.
    ///
    /// # Errors
    /// When something differs, or when there is no answer.
    pub(crate) fn check(&self, every_word: bool) -> Result<()> {
        self.ask(if every_word { Request::CheckAll } else { Request::CheckPages }, 0)
    }

    /// As [`Report::check`], and that it has not fallen behind what it had written when it was saved: an older capsule of
    /// the same program is whole as well.
    ///
    /// # Errors
    /// When something differs.
    pub(crate) fn check_since(&self, written: u64) -> Result<()> {
        self.check(true)?;
        let now = self.written()?;
        ensure!(now >= written, "it is back at {now} pages written, and had written {written}");
        Ok(())
    }

    fn ask(&self, request: Request, argument: u64) -> Result<()> {
        self.begin(request, argument)?;
        self.answer(request)
    }

    fn begin(&self, request: Request, argument: u64) -> Result<()> {
        self.write(Word::Argument, argument)?;
        self.write(Word::Request, request as u64)
    }

    fn answer(&self, request: Request) -> Result<()> {
        let answer = until(&format!("answer to {request:?}"), ANSWER_TIME_MAX, || {
            Ok(Some(self.read(Word::Request)?).filter(|word| *word != request as u64))
        })?;
        match answer {
            DONE => Ok(()),
            DIFFERS => bail!("the program's memory or files differ from what they were"),
            other => bail!("the program answered {other} to {request:?}"),
        }
    }
}

/// Lets the machine give memory to this guest that it never used: the first touch is several times slower than later ones.
///
/// # Errors
/// When the program cannot be run.
pub(crate) fn warm(folder: &Path, mebibytes: u64) -> Result<()> {
    let path = folder.join("warm");
    let mut child = std::process::Command::new(plain_root(folder).join("memory"))
        .args([&mebibytes.to_string(), "1"])
        .arg(&path)
        .spawn()
        .context("the memory program")?;
    let filled = Report::wait(path.clone(), &child.id().to_string());
    samara_tests::process::end(&mut child, Duration::from_secs(10));
    filled?;
    std::fs::remove_file(path)?;
    Ok(())
}
