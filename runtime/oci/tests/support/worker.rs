//! A capture worker for the tests of the monitor: does as its task says.

use std::io::Read;

use samara_oci::protocol::{WorkerReport, WorkerTask, receive, send};

pub(crate) fn run() {
    let task: WorkerTask = receive(&mut std::io::stdin()).expect("a task");
    let say = |report| send(&mut std::io::stdout(), &report).expect("a reader");
    let progress = |step: u32| {
        say(WorkerReport::Progress { progress: serde_json::json!({ "step": step }) });
    };
    match task.args["do"].as_str().expect("what to do") {
        "succeed" => {
            (1..=3).for_each(progress);
            let result = serde_json::json!({"pid": task.init.pid, "dir": task.state_dir});
            say(WorkerReport::Done { result });
        }
        "fail" => say(WorkerReport::Failed { message: "the store is full".to_owned() }),
        "die" => {
            progress(1);
            let me = rustix::process::getpid();
            rustix::process::kill_process(me, rustix::process::Signal::KILL).expect("suicide");
        }
        "vanish" => std::process::exit(5),
        "wait" => {
            progress(1);
            let mut rest = Vec::new();
            std::io::stdin().read_to_end(&mut rest).expect("an end");
            let mark = task.args["mark"].as_str().expect("where to leave a mark");
            std::fs::write(mark, "gave up").expect("a place for the mark");
        }
        other => panic!("{other}"),
    }
}
