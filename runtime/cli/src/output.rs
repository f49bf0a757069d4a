//! All that this program prints: the only place with print macros.
//!
//! Results go to standard output, as text or as one JSON value. Progress and errors go to standard error; progress only
//! if that is a terminal.

use std::error::Error;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// How to print.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Output {
        Output { json }
    }

    /// Prints a result: `value` as JSON, or what `text` makes of it.
    pub(crate) fn result<T: Serialize>(&mut self, value: &T, text: impl FnOnce(&T) -> String) {
        let text = match self.json {
            true => {
                serde_json::to_string_pretty(value).expect("our results are maps with text keys")
                    + "\n"
            }
            false => text(value),
        };
        // A reader that has gone away, such as `head`, is no error.
        let _ = std::io::stdout().lock().write_all(text.as_bytes());
    }

    /// Prints an error with its causes in one line.
    pub(crate) fn error(&mut self, error: &(dyn Error + 'static)) {
        let line = chain(error);
        match self.json {
            true => eprintln!("{}", serde_json::json!({ "error": line })),
            false => eprintln!("samara: {line}"),
        }
    }

    /// Says what could not be read without ending for it.
    pub(crate) fn warning(&mut self, error: &(dyn Error + 'static)) {
        eprintln!("samara: warning: {}", chain(error));
    }

    /// A bar for `verb`, hidden unless standard error is a terminal. The function that is returned takes how much is done,
    /// of how much.
    pub(crate) fn progress(
        &self,
        verb: &'static str,
        bytes: bool,
    ) -> impl Fn(u64, u64) + Sync + use<> {
        let visible = !self.json && std::io::stderr().is_terminal();
        let target =
            if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = match bytes {
            true => "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}",
            false => "{msg} {wide_bar} {pos}/{len}",
        };
        let style = ProgressStyle::with_template(style).expect("the template is valid");
        let bar = Cleared(
            ProgressBar::with_draw_target(None, target).with_style(style).with_message(verb),
        );
        move |done, total| {
            bar.0.set_length(total);
            bar.0.set_position(done);
        }
    }

    /// Shows which phase runs, without a measure of how much is left; hidden unless standard error is a terminal.
    pub(crate) fn phases(&self) -> impl Fn(&str) + use<> {
        let visible = !self.json && std::io::stderr().is_terminal();
        let target =
            if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = ProgressStyle::with_template("{msg} {elapsed}").expect("the template is valid");
        let bar = Cleared(ProgressBar::with_draw_target(None, target).with_style(style));
        // Most of a long save is one phase: the time must be seen to go on in it.
        bar.0.enable_steady_tick(Duration::from_millis(500));
        move |phase| bar.0.set_message(phase.to_owned())
    }
}

/// A bar that leaves nothing on the terminal.
struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// An error with its causes. A cause that its error repeats is left out.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
        next = error.source();
    }
    text.replace('\n', " ")
}

/// Rows under headings, columns as wide as they need to be; those whose heading ends in a space are aligned to the right.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells
            .chain([headings.get(column).map_or(0, |heading| heading.trim_end().len())])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &[String]| {
        let mut row = String::new();
        for ((cell, heading), width) in cells.iter().zip(headings).zip(&widths) {
            let padded = match heading.ends_with(' ') {
                true => format!("{cell:>width$}"),
                false => format!("{cell:<width$}"),
            };
            row = if row.is_empty() { padded } else { format!("{row}  {padded}") };
        }
        text.push_str(row.trim_end());
        text.push('\n');
    };
    line(&headings.iter().map(|heading| heading.trim_end().to_owned()).collect::<Vec<_>>());
    rows.iter().for_each(|row| line(row));
    text
}

/// A number of bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", units.get(unit).copied().unwrap_or_default())
}

/// A time in microseconds for people.
pub(crate) fn duration(us: u64) -> String {
    match us {
        0..1000 => format!("{us} us"),
        1000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        1_000_000..120_000_000 => format!("{:.1} s", us as f64 / 1e6),
        _ => format!("{:.0} min", us as f64 / 6e7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit_that_fits() {
        let times = [7, 1500, 999_949, 2_500_000, 600_000_000].map(duration);
        assert_eq!(times, ["7 us", "1.5 ms", "999.9 ms", "2.5 s", "10 min"]);
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1 << 20, "1.0 MiB"),
            (3 << 29, "1.5 GiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(size(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "1".into()], vec!["long".into(), "100".into()]];
        assert_eq!(table(&["NAME", "N "], &rows), "NAME    N\na       1\nlong  100\n");
    }
}
