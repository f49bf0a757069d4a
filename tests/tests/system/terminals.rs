//! A person at a terminal: `docker run -it`, and what they find after it has moved.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use samara_tests::image::Image;
use samara_tests::node::Node;
use samara_tests::terminal::Session;
use samara_tests::until;

use crate::{Fixture, trial};

const NAME: &str = "interactive";

/// The exit status of a container that was saved and ended.
const SAVED: i32 = 143;

fn run(node: &Node, url: &str, rows: u16, columns: u16) -> Result<Session> {
    let address = format!("SAMARA_CAPSULE={url}");
    let words = ["run", "-it", "--name", NAME, "--runtime", "samara", "-e", &address];
    let call = node.docker(words).args([Image::TestBase.tag(), "bash", "--norc"]);
    call.in_terminal(rows, columns)
}

fn save(node: &Node, url: &str, mut session: Session) -> Result<()> {
    node.samara(["save", NAME, "--to", url, "--stop"])?.output()?;
    let status = session.wait_exit()?;
    ensure!(status == SAVED, "docker run ended with {status}, and showed: {}", session.shown());
    node.docker(["rm", NAME]).output()?;
    Ok(())
}

/// `stty size` answers this sooner or later: the engine passes sizes on in its own time.
fn wait_size(session: &mut Session, size: &str) -> Result<()> {
    until(&format!("size {size}"), Duration::from_secs(30), || {
        session.type_text("echo si''ze \"<$(stty size)>\"\n")?;
        session.wait_for("size <")?;
        let answer = session.wait_for(">")?;
        session.wait_for("[prompt] ")?;
        Ok((answer.trim_end_matches('>') == size).then_some(()))
    })
}

/// A shell that one works with: its line, its jobs, its history, its settings.
fn interactive(fixture: &Fixture) -> Result<()> {
    let pair = fixture.pair()?;
    let [left, right] = &pair.nodes;
    let url = pair.store.url("terminals/interactive");
    let mut at = run(left, &url, 24, 80)?;
    at.type_text("PS1='[p''rompt] '\n")?;
    at.wait_for("[prompt] ")?;
    at.type_text("sleep 1000 &\n")?;
    at.wait_for("[1] ")?;
    at.type_text("sed -u s/^/got-/\n")?;
    at.type_text("kept\n")?;
    at.wait_for("got-kept")?;
    at.type_text("\x1a")?;
    at.wait_for("Stopped")?;
    at.type_text("stty -echoctl kill ^X; answer=41\n")?;
    at.wait_for("[prompt] ")?;
    wait_size(&mut at, "24 80")?;
    at.type_text("echo half")?;
    at.wait_for("echo half")?;
    save(left, &url, at)?;

    let mut at = run(right, &url, 30, 100)?;
    at.type_text("-done $((answer+1))\n")?;
    at.wait_for("half-done 42")?;
    at.wait_for("[prompt] ")?;
    wait_size(&mut at, "30 100")?;
    at.resize(50, 132)?;
    wait_size(&mut at, "50 132")?;
    at.type_text("jobs\n")?;
    at.wait_for("Running")?;
    at.wait_for("Stopped")?;
    at.type_text("fg\n")?;
    at.type_text("again\n")?;
    at.wait_for("got-again")?;
    at.type_text("\x04")?;
    at.wait_for("[prompt] ")?;
    at.type_text("history\n")?;
    at.wait_for("answer=41")?;
    at.wait_for("[prompt] ")?;
    at.type_text("stty -a\n")?;
    at.wait_for("kill = ^X")?;
    at.wait_for("-echoctl")?;
    at.wait_for("[prompt] ")?;
    // In the foreground while it is saved.
    at.type_text("sed -u s/^/got-/\n")?;
    at.type_text("before\n")?;
    at.wait_for("got-before")?;
    // Ctrl-P Ctrl-Q.
    at.type_text("\x10\x11")?;
    at.wait_exit()?;
    let mut at = right.docker(["attach", NAME]).in_terminal(50, 132)?;
    at.type_text("attached\n")?;
    at.wait_for("got-attached")?;
    save(right, &url, at)?;

    let mut at = run(left, &url, 24, 80)?;
    at.type_text("to the end\n")?;
    at.wait_for("got-to the end")?;
    at.type_text("\x03")?;
    at.wait_for("[prompt] ")?;
    at.type_text("kill %1; exit 7\n")?;
    let status = at.wait_exit()?;
    ensure!(status == 7, "it ended with {status}, and showed: {}", at.shown());
    left.docker(["rm", NAME]).output()?;
    Ok(())
}

pub(crate) fn trials(fixture: &Arc<Fixture>) -> Vec<Trial> {
    vec![trial(fixture, "move/interactive", interactive)]
}
