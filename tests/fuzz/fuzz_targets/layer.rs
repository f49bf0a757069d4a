//! A layer of changed files, applied to a folder. Nothing may appear beside the folder.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;

use libfuzzer_sys::fuzz_target;
use samara_engine::files::{DeviceNodes, GivenNodes, apply_tree};

fuzz_target!(|bytes: &[u8]| {
    let around = tempfile::tempdir().expect("a folder");
    let inside = around.path().join("tree");
    std::fs::create_dir(&inside).expect("a folder");
    let folder = OwnedFd::from(File::open(&inside).expect("a folder"));
    let mut stream = bytes;
    let _ = apply_tree(folder, &DeviceNodes::Known(Vec::new()), &GivenNodes::default(), &mut stream);
    let names = std::fs::read_dir(around.path()).expect("a folder").count();
    assert_eq!(names, 1, "a layer has left its folder");
});
