//! System tests: containers on real engines.
//!
//! `workload/…`: each workload passes undisturbed under runc, and notices each way of spoiling its state. Without this, a
//! workload that passes after a restore would show nothing.
//! `node/…`: what the harness itself promises.
//! `run/…`: the workloads under the product as a plain runtime.
//! `move/…`, `capture/…`, `harm/…`, `refusal/…`: what the product is for.
//!
//! Engines are started on first use, kept for all tests, and stopped at the end. Sizes: `SAMARA_TEST_CAPTURES` (20),
//! `SAMARA_TEST_MOVES` (2), `SAMARA_TEST_LONG_MOVES` (5) and `SAMARA_TEST_KILLS` (10) make the long runs longer.

#[path = "system/moves.rs"]
mod moves;
#[path = "system/terminals.rs"]
mod terminals;
#[path = "system/workloads.rs"]
mod workloads;

use std::sync::{Arc, Mutex};

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};
use samara_tests::image::Image;
use samara_tests::node::{Engine, Node, NodeOptions};
use samara_tests::object_store::ObjectStore;

/// What tests share. Each field is made by the first test that asks for it.
#[derive(Debug, Default)]
pub(crate) struct Fixture {
    plain: Mutex<Option<Arc<Node>>>,
    // Nodes before the store: fields are dropped in order, and a container may still be writing there.
    pair: Mutex<Option<Arc<Pair>>>,
}

/// Two engines with the product and nothing in common but the store.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) nodes: [Node; 2],
    pub(crate) store: ObjectStore,
}

impl Fixture {
    /// An engine without the product, with the test image.
    pub(crate) fn plain(&self) -> Result<Arc<Node>> {
        let mut slot = self.plain.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if slot.is_none() {
            let node =
                Node::start("plain", NodeOptions { engine: Engine::Installed, product: None })?;
            node.load(Image::TestBase)?;
            *slot = Some(Arc::new(node));
        }
        Ok(Arc::clone(slot.as_ref().expect("made above")))
    }

    /// Two engines with the product and the test image.
    pub(crate) fn pair(&self) -> Result<Arc<Pair>> {
        let mut slot = self.pair.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if slot.is_none() {
            let store = ObjectStore::start()?;
            let start = |name, engine| -> Result<Node> {
                let node = Node::start(name, NodeOptions { engine, product: Some(&store) })?;
                node.load(Image::TestBase)?;
                Ok(node)
            };
            let nodes = [start("left", Engine::Installed)?, start("right", Engine::Installed)?];
            *slot = Some(Arc::new(Pair { nodes, store }));
        }
        Ok(Arc::clone(slot.as_ref().expect("made above")))
    }
}

/// A test: its error, with all causes, is the failure's text.
pub(crate) fn trial(
    fixture: &Arc<Fixture>,
    name: &str,
    run: impl FnOnce(&Fixture) -> Result<()> + Send + 'static,
) -> Trial {
    let fixture = Arc::clone(fixture);
    Trial::test(name, move || run(&fixture).map_err(|error| Failed::from(format!("{error:#}"))))
}

/// A number from the environment that makes a test longer or shorter.
pub(crate) fn size(name: &str, default: u32) -> Result<u32> {
    match std::env::var(name) {
        Ok(text) => Ok(text.parse()?),
        Err(_) => Ok(default),
    }
}

fn main() -> std::process::ExitCode {
    let mut arguments = Arguments::from_args();
    // Two cores, and workloads that keep several threads busy: side by side they would test the scheduler.
    arguments.test_threads.get_or_insert(1);
    let fixture = Arc::new(Fixture::default());
    let mut trials = workloads::trials(&fixture);
    trials.extend(moves::trials(&fixture));
    trials.extend(terminals::trials(&fixture));
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Before the process ends without running destructors.
    drop(fixture);
    conclusion.exit_code()
}
