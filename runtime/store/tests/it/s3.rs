//! The store against a real S3 server, started by `script/s3-server`.
//!
//! One test, so that one server serves all cases and is stopped at the end, come what may.

use std::collections::HashMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use samara_store::config::{PacksSettings, S3Settings, Secret, StoreConfig};
use samara_store::{CapsuleWriter, Location, Store};

use crate::faults::Switch;
use crate::injected::Injected;
use crate::sample::{chain, check, facts, fill, take_epoch, write};
use crate::{collect, log, manage, round_trip};

/// A running server; it ends with this value.
struct Server {
    folder: tempfile::TempDir,
    settings: HashMap<String, String>,
}

fn script() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../script/s3-server")
}

/// A port which, with all that the server derives from it, is free now.
fn free_port() -> u16 {
    let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    let start = 20_000 + u16::try_from(std::process::id() % 1000).unwrap() * 10;
    let mut candidates = (start..45_000).step_by(10);
    candidates
        .find(|port| (0..5).all(|i| free(port + i) && free(port + 10_000 + i)))
        .expect("there are free ports")
}

impl Server {
    fn start() -> Server {
        let folder = tempfile::tempdir().unwrap();
        let output = Command::new(script())
            .args(["start", folder.path().to_str().unwrap(), &free_port().to_string()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let settings = text.lines().filter_map(|line| line.split_once('='));
        Server {
            folder,
            settings: settings.map(|(key, value)| (key.into(), value.into())).collect(),
        }
    }

    fn config(&self) -> StoreConfig {
        let setting = |key: &str| self.settings[key].clone();
        StoreConfig {
            timeout_seconds: Some(20),
            // Nothing of a test in the node's folder.
            packs: PacksSettings { folder: None, mebibytes_max: Some(0) },
            s3: S3Settings {
                endpoint: Some(setting("endpoint")),
                region: Some(setting("region")),
                access_key_id: Some(setting("access_key_id")),
                secret_access_key: Some(Secret(setting("secret_access_key"))),
                allow_http: true,
                ..S3Settings::default()
            },
            ..StoreConfig::default()
        }
    }

    fn open(&self, path: &str) -> Store {
        Store::open(&self.location(path), &self.config(), true).unwrap()
    }

    fn location(&self, path: &str) -> Location {
        Location::parse(&format!("s3://{}/{path}", self.settings["bucket"])).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let stopped = Command::new(script()).arg("stop").arg(self.folder.path()).status();
        assert!(stopped.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
fn a_real_server() {
    let server = Server::start();
    round_trip::everything_comes_back_from(&server.open("trip"), &server.open("trip"));
    let stores: Vec<Store> = (0..4).map(|_| server.open("race")).collect();
    log::racing_starts_get_epochs_of_their_own(&stores, 10);
    log::an_older_epoch_cannot_commit(&server.open("fence"), &server.open("fence"));
    manage::addresses_are_listed_and_removed(|path| server.open(&format!("list{path}")));
    collect::old_capsules_go_and_the_rest_stays_whole(&server.open("keep"), &server.open("keep"));
    let open = |decide| {
        let wrap = |objects| Injected::wrap(objects, decide);
        Store::open_through(&server.location("collect"), &server.config(), true, wrap).unwrap()
    };
    collect::race(&open, 12, 8, 1);
    wrong_settings_are_named(&server);
    a_server_that_stops_answering_leaves_nothing_visible(&server);
}

fn wrong_settings_are_named(server: &Server) {
    let refused = |location: &Location, config: &StoreConfig, expected: &str| {
        let store = Store::open(location, config, true).unwrap();
        let error = store.take_epoch(&Default::default()).unwrap_err();
        assert!(chain(&error).contains(expected), "{}", chain(&error));
        let error = CapsuleWriter::new(&store).unwrap_err();
        assert!(chain(&error).contains(expected), "{}", chain(&error));
    };
    let mut config = server.config();
    config.s3.secret_access_key = Some(Secret("wrong".into()));
    refused(&server.location("x"), &config, "the store refuses the credentials");
    config.s3.access_key_id = Some("nobody".into());
    refused(&server.location("x"), &config, "the store refuses the credentials");
    let nowhere = Location::parse("s3://no-such-bucket/x").unwrap();
    refused(&nowhere, &server.config(), "there is no such bucket");
}

/// The network stops while a capsule is being written: the writer fails within its bound, nothing is visible, and when
/// the network is back everything goes on.
fn a_server_that_stops_answering_leaves_nothing_visible(server: &Server) {
    let target = server.settings["endpoint"].strip_prefix("http://").unwrap().parse().unwrap();
    let switch = Switch::to(target);
    let mut config = server.config();
    config.timeout_seconds = Some(2);
    config.s3.endpoint = Some(format!("http://{}", switch.address()));
    let through = Store::open(&server.location("stall"), &config, true).unwrap();

    let mut lease = take_epoch(&through);
    write(&through, &mut lease, 1).unwrap();
    let mut writer = CapsuleWriter::new(&through).unwrap();
    fill(&mut writer, 2).unwrap();
    switch.stall();
    let error = writer.commit(&mut lease, b"", facts()).unwrap_err();
    assert!(chain(&error).contains("did not answer within 2 s"), "{}", chain(&error));
    check(&server.open("stall"), 1).unwrap();
    assert_eq!(server.open("stall").slots().unwrap().len(), 2);

    switch.resume();
    let through = Store::open(&server.location("stall"), &config, true).unwrap();
    write(&through, &mut lease, 3).unwrap();
    check(&through, 3).unwrap();
}
