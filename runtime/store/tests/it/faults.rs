//! Stores that don't answer, answer nonsense, or are not there.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

use samara_capsule::transfer::Sink as _;
use samara_store::config::{S3Settings, Secret, StoreConfig};
use samara_store::{CapsuleReader, CapsuleWriter, Location, Store};

use crate::sample::{batch, chain, facts, fill, open, take_epoch, write};

/// A TCP relay that can stop to relay: connections stay open, and nothing comes through.
pub(crate) struct Switch {
    address: SocketAddr,
    stalled: Arc<(Mutex<bool>, Condvar)>,
}

impl Switch {
    pub(crate) fn to(target: SocketAddr) -> Switch {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stalled = Arc::new((Mutex::new(false), Condvar::new()));
        let shared = stalled.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(target) else { continue };
                relay(client.try_clone().unwrap(), server.try_clone().unwrap(), shared.clone());
                relay(server, client, shared.clone());
            }
        });
        Switch { address, stalled }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn stall(&self) {
        *self.stalled.0.lock().unwrap() = true;
    }

    pub(crate) fn resume(&self) {
        *self.stalled.0.lock().unwrap() = false;
        self.stalled.1.notify_all();
    }
}

fn relay(mut from: TcpStream, mut to: TcpStream, stalled: Arc<(Mutex<bool>, Condvar)>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 1 << 16];
        while let Ok(bytes @ 1..) = from.read(&mut buffer) {
            let guard =
                stalled.1.wait_while(stalled.0.lock().unwrap(), |stalled| *stalled).unwrap();
            drop(guard);
            if to.write_all(&buffer[..bytes]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

/// A server that answers every connection with `answer`, or not at all.
fn server(answer: Option<&'static str>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for mut client in listener.incoming().map_while(Result::ok) {
            match answer {
                None => held.push(client),
                Some(answer) => {
                    let _ = client.read(&mut [0; 1 << 16]);
                    let _ = client.write_all(answer.as_bytes());
                }
            }
        }
    });
    address
}

fn store_at(address: SocketAddr) -> Store {
    let config = StoreConfig {
        timeout_seconds: Some(1),
        s3: S3Settings {
            endpoint: Some(format!("http://{address}")),
            access_key_id: Some("key".into()),
            secret_access_key: Some(Secret("secret".into())),
            allow_http: true,
            ..S3Settings::default()
        },
        ..StoreConfig::default()
    };
    Store::open(&Location::parse("s3://bucket/x").unwrap(), &config, true).unwrap()
}

fn every_call_fails(store: &Store, expected: &str) {
    let errors = [
        chain(&store.head().unwrap_err()),
        chain(&store.take_epoch(&Default::default()).unwrap_err()),
        chain(&CapsuleWriter::new(store).unwrap_err()),
        chain(&CapsuleReader::open_latest(store).unwrap_err()),
        chain(&store.addresses().unwrap_err()),
        chain(&store.remove(&|_, _| ()).unwrap_err()),
    ];
    for error in errors {
        assert!(error.contains(expected), "{error}");
    }
}

/// What nobody waits for any more is done or taken back: a file that was begun would stay behind when the process ends.
#[test]
fn an_abandoned_writer_leaves_no_file_half_written() {
    for seed in 0..2 {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let mut writer = CapsuleWriter::new(&store).unwrap();
        let begun = || {
            let blobs = std::fs::read_dir(folder.path().join("blobs/sha256")).into_iter().flatten();
            let names = blobs.map(|entry| entry.unwrap().file_name());
            names.filter(|name| name.to_string_lossy().contains('#')).collect::<Vec<_>>()
        };
        for number in 0.. {
            assert!(number < 1000, "no upload was seen");
            writer.pages(batch(seed, &[(number * 256, 256)])).unwrap();
            if !begun().is_empty() {
                break;
            }
        }
        drop((writer, store));
        assert_eq!(begun(), Vec::<OsString>::new(), "seed {seed}");
    }
}

#[test]
fn a_server_that_never_answers_is_given_up() {
    every_call_fails(&store_at(server(None)), "did not answer within 1 s");
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    every_call_fails(&store_at(address), "s3://bucket/x");
}

#[test]
fn nonsense_is_refused() {
    let nonsense = "HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\nnonsense";
    every_call_fails(&store_at(server(Some(nonsense))), "s3://bucket/x");
    every_call_fails(&store_at(server(Some("nonsense\r\n\r\n"))), "s3://bucket/x");
}

#[test]
fn a_folder_that_cannot_be_written_fails_the_commit() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    write(&store, &mut lease, 1).unwrap();
    let mut writer = CapsuleWriter::new(&store).unwrap();
    // A file where the folder of blobs belongs: not even root can write there.
    std::fs::remove_dir_all(folder.path().join("blobs")).unwrap();
    std::fs::write(folder.path().join("blobs"), "").unwrap();
    fill(&mut writer, 2).unwrap();
    let error = writer.commit(&mut lease, b"", facts()).unwrap_err();
    assert!(chain(&error).contains("can't write file://"), "{}", chain(&error));
    assert_eq!(store.slots().unwrap().len(), 2);
}

#[test]
fn a_missing_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let location = Location::folder(&folder.path().join("none")).unwrap();
    let error = Store::open(&location, &StoreConfig::default(), false).unwrap_err();
    assert!(chain(&error).contains("none is not there"), "{}", chain(&error));
}
