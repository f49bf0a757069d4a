//! The bytes of version 1, written down by hand from `docs/capsule-format.md`.
//!
//! If one of these fails, capsules that exist can no longer be read: change the version, not the test.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use samara_capsule::collection::{Catalogued, CollectionList, Unfinished};
use samara_capsule::digest::{Digest, FrameDigest};
use samara_capsule::frame::{BaseFrame, Codec, FrameDecoder};
use samara_capsule::log::{CapsuleRef, Collection, Event, LogState, Slot};
use samara_capsule::manifest::{BlobRef, Manifest};
use samara_capsule::pack::{PackBuilder, read_pack};
use samara_capsule::pagemap::{MapBuilder, MapFrame, Segment};
use samara_capsule::transfer::{PAGE_BYTES, PageRun, SpaceId, StreamName};

#[test]
fn a_pack() {
    let page = [7; PAGE_BYTES];
    let mut builder = PackBuilder::new(Vec::new());
    builder.push(Codec::Raw, &page, 4096);
    builder.push(Codec::Zstd, b"zstd", 8192);
    let pack = builder.finish();

    let mut expected = b"SamaraPK".to_vec();
    expected.extend_from_slice(&page);
    expected.extend_from_slice(b"zstd");
    expected.extend_from_slice(&[8, 0, 0, 0, 0, 0x10, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
    expected.extend_from_slice(&[8, 0x10, 0, 0, 4, 0, 0, 0, 0, 0x20, 0, 0, 1, 0, 0, 0]);
    expected.extend_from_slice(&[2, 0, 0, 0, 1, 0, 0, 0]);
    expected.extend_from_slice(b"SamaraPE");
    assert!(pack == expected);
    assert_eq!(read_pack(&pack).unwrap().len(), 2);
}

/// Runs: pages 256-258 and 300 in frame 0 (pages 0-2 and 3), page 1000 in frame 1 (page 9), page 2000 in frame 0 (page 5).
#[test]
fn a_segment() {
    let (pack, digest) = (Digest::of(b"pack"), FrameDigest::of(b"frame"));
    let mut map = MapBuilder::default();
    let number = map.add_pack();
    map.set_pack(number, pack);
    let frame = MapFrame {
        pack: number,
        offset: 8,
        stored_bytes: 300,
        pages: 200,
        codec: Codec::Zstd,
        base: None,
        digest,
    };
    let frames = [map.add_frame(frame), map.add_frame(MapFrame { offset: 308, ..frame })];
    for (first, count, frame, page) in
        [(256, 3, 0, 0), (300, 1, 0, 3), (1000, 1, 1, 9), (2000, 1, 0, 5)]
    {
        map.add_run(SpaceId(0), PageRun { first, count }, frames[frame], page).unwrap();
    }
    let mut segments = Vec::new();
    map.complete()
        .unwrap()
        .emit(|_, segment| -> Result<(), ()> {
            segments.push(segment);
            Ok(())
        })
        .unwrap();

    let mut body = vec![1];
    body.extend_from_slice(pack.as_bytes());
    // 300 is ac 02, 308 is b4 02, 200 is c8 01.
    body.extend_from_slice(&[2, 0, 8, 0xac, 2, 0xc8, 1, 1]);
    body.extend_from_slice(digest.as_bytes());
    body.extend_from_slice(&[0, 0xb4, 2, 0xac, 2, 0xc8, 1, 1]);
    body.extend_from_slice(digest.as_bytes());
    // Gaps: 256 is 80 02; 41; 699 is bb 05; 999 is e7 07. Frame differences 1 and -1 are 1 + 2 and 1 + 1.
    body.extend_from_slice(&[4, 0x80, 2, 3, 0, 41, 1, 0, 0xbb, 5, 1, 3, 9, 0xe7, 7, 1, 2, 5]);
    let mut blob = b"SamaraPM".to_vec();
    blob.extend_from_slice(&[1, 0, 0, 0]);
    blob.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
    let encoded = segments[0].encode().unwrap();
    assert_eq!(&encoded[..16], blob);
    assert_eq!(zstd::bulk::decompress(&encoded[16..], 1000).unwrap(), body);
    // Other versions of zstd make other bytes of the same body; all are read.
    blob.extend_from_slice(&zstd::bulk::compress(&body, 19).unwrap());
    assert_eq!(Segment::decode(&blob).unwrap(), segments[0]);
}

/// Differences over pages 1 and 4 of a base of five pages, of which nothing else is named: pages 16 and 17 of the space.
#[test]
fn a_frame_of_differences() {
    let base: Vec<u8> = (0..5 * PAGE_BYTES).map(|at| u8::try_from(at % 251).unwrap()).collect();
    let mut pages = [&base[PAGE_BYTES..2 * PAGE_BYTES], &base[4 * PAGE_BYTES..]].concat();
    pages[5] ^= 0x11;
    pages[2 * PAGE_BYTES - 1] ^= 0x22;
    let base_digest = FrameDigest::of(&base);
    let mut changes = vec![0; 2 * PAGE_BYTES];
    changes[5] = 0x11;
    changes[2 * PAGE_BYTES - 1] = 0x22;
    let mut stored = base_digest.as_bytes().to_vec();
    stored.extend_from_slice(&[1, 4]);
    stored.extend_from_slice(&zstd::bulk::compress(&changes, 19).unwrap());
    let mut decoder = FrameDecoder::new().unwrap();
    let mut raw = Vec::new();
    let over = BaseFrame { digest: base_digest, raw: &base };
    decoder.decode_delta(&stored, 2 * PAGE_BYTES, over, &mut raw).unwrap();
    assert!(raw == pages);

    let mut builder = PackBuilder::new(Vec::new());
    builder.push(Codec::Delta, b"changes", 8192);
    let pack = builder.finish();
    let entry = [8, 0, 0, 0, 7, 0, 0, 0, 0, 0x20, 0, 0, 2, 0, 0, 0];
    assert_eq!(pack[15..31], entry);

    let digests = [FrameDigest::of(b"base"), FrameDigest::of(b"changes")];
    let mut map = MapBuilder::default();
    let packs = [b"old", b"new"].map(|name| {
        let pack = map.add_pack();
        map.set_pack(pack, Digest::of(name));
        pack
    });
    let plain = MapFrame {
        pack: packs[0],
        offset: 8,
        stored_bytes: 100,
        pages: 5,
        codec: Codec::Zstd,
        base: None,
        digest: digests[0],
    };
    let base = map.add_frame(plain);
    let delta = map.add_frame(MapFrame {
        pack: packs[1],
        stored_bytes: 7,
        pages: 2,
        codec: Codec::Delta,
        base: Some(base),
        digest: digests[1],
        ..plain
    });
    map.add_run(SpaceId(0), PageRun { first: 16, count: 2 }, delta, 0).unwrap();
    let mut segments = Vec::new();
    map.complete()
        .unwrap()
        .emit(|_, segment| -> Result<(), ()> {
            segments.push(segment);
            Ok(())
        })
        .unwrap();
    let mut body = vec![2];
    body.extend_from_slice(Digest::of(b"old").as_bytes());
    body.extend_from_slice(Digest::of(b"new").as_bytes());
    // Pack, offset, stored bytes, pages, codec; for differences the base.
    body.extend_from_slice(&[2, 0, 8, 100, 5, 1]);
    body.extend_from_slice(digests[0].as_bytes());
    body.extend_from_slice(&[1, 8, 7, 2, 2, 0]);
    body.extend_from_slice(digests[1].as_bytes());
    // One run, in frame 1: the difference 1 is 1 + 2.
    body.extend_from_slice(&[1, 16, 2, 3, 0]);
    let encoded = segments[0].encode().unwrap();
    assert_eq!(zstd::bulk::decompress(&encoded[16..], 1000).unwrap(), body);
    assert_eq!(Segment::decode(&encoded).unwrap(), segments[0]);
}

#[test]
fn a_slot() {
    let zeros = "0".repeat(64);
    let capsule =
        CapsuleRef { digest: format!("sha256:{zeros}").parse().unwrap(), bytes: 9, slot: 4 };
    let slot = |event, latest, failed_resumes| Slot {
        format: 1,
        nonce: "n".into(),
        created: "2026-01-02T03:04:05Z".into(),
        event,
        state: LogState { epoch: 3, generation: 1, latest, failed_resumes, collection: None },
    };
    let head = r#"{"format":1,"nonce":"n","created":"2026-01-02T03:04:05Z","event":"#;
    let latest = format!(r#"{{"digest":"sha256:{zeros}","bytes":9,"slot":4}}"#);
    let with =
        format!(r#","state":{{"epoch":3,"generation":1,"latest":{latest},"failed_resumes":2}}}}"#);
    let without = r#","state":{"epoch":3,"generation":1,"failed_resumes":0}}"#;
    let facts = BTreeMap::from([("a".into(), "b".into())]);
    let failed = Event::FailedResume { manifest: capsule.digest, reason: "r".into() };
    for (slot, text) in [
        (
            slot(Event::Start { facts }, None, 0),
            format!(r#"{head}{{"start":{{"facts":{{"a":"b"}}}}}}{without}"#),
        ),
        (slot(Event::Close, None, 0), format!(r#"{head}"close"{without}"#)),
        (
            slot(Event::Capsule { manifest: capsule }, Some(capsule), 2),
            format!(r#"{head}{{"capsule":{{"manifest":{latest}}}}}{with}"#),
        ),
        (
            slot(failed, Some(capsule), 2),
            format!(
                r#"{head}{{"failed-resume":{{"manifest":"sha256:{zeros}","reason":"r"}}}}{with}"#
            ),
        ),
    ] {
        assert_eq!(String::from_utf8(slot.encode().unwrap()).unwrap(), text);
        assert_eq!(Slot::decode(text.as_bytes()).unwrap(), slot);
    }
}

#[test]
fn a_collection() {
    let digest: Digest = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
    let collection = Collection { list: digest, bytes: 9, slot: 4, swept: false, unfinished: 1 };
    let collecting = Slot {
        format: 1,
        nonce: "n".into(),
        created: "2026-01-02T03:04:05Z".into(),
        event: Event::Collect { collection },
        state: LogState { epoch: 3, collection: Some(collection), ..LogState::default() },
    };
    let swept = Slot {
        event: Event::Swept { collection: 4 },
        state: LogState {
            collection: Some(Collection { swept: true, ..collection }),
            ..collecting.state
        },
        ..collecting.clone()
    };
    let head = r#"{"format":1,"nonce":"n","created":"2026-01-02T03:04:05Z","event":"#;
    let text = |swept| {
        format!(r#"{{"list":"{digest}","bytes":9,"slot":4,"swept":{swept},"unfinished":1}}"#)
    };
    let state = |swept| {
        let collection = text(swept);
        format!(
            r#""state":{{"epoch":3,"generation":0,"failed_resumes":0,"collection":{collection}}}}}"#
        )
    };
    for (slot, text) in [
        (
            collecting,
            format!(r#"{head}{{"collect":{{"collection":{}}}}},{}"#, text(false), state(false)),
        ),
        (swept, format!(r#"{head}{{"swept":{{"collection":4}}}},{}"#, state(true))),
    ] {
        assert_eq!(String::from_utf8(slot.encode().unwrap()).unwrap(), text);
        assert_eq!(Slot::decode(text.as_bytes()).unwrap(), slot);
    }

    let list = CollectionList {
        format: 1,
        nonce: "n".into(),
        capsules: vec![Catalogued {
            capsule: CapsuleRef { digest, bytes: 9, slot: 4 },
            committed: "2026-01-02T03:04:05Z".into(),
        }],
        condemned: vec![digest],
        unfinished: vec![Unfinished { list: digest, bytes: 7, slot: 2 }],
    };
    let text = format!(
        r#"{{"format":1,"nonce":"n","capsules":[{{"capsule":{{"digest":"{digest}","bytes":9,"slot":4}},"committed":"2026-01-02T03:04:05Z"}}],"condemned":["{digest}"],"unfinished":[{{"list":"{digest}","bytes":7,"slot":2}}]}}"#
    );
    assert_eq!(String::from_utf8(list.encode().unwrap()).unwrap(), text);
    assert_eq!(CollectionList::decode(text.as_bytes()).unwrap(), list);
}

#[test]
fn a_manifest() {
    let blob = BlobRef::to(b"");
    let manifest = Manifest {
        created: "2026-01-02T03:04:05Z".into(),
        epoch: 3,
        config: blob,
        records: blob,
        maps: BTreeMap::from([(SpaceId(12), vec![blob])]),
        packs: vec![blob],
        streams: BTreeMap::from([(StreamName("root".into()), vec![blob])]),
    };
    let digest = format!(r#""digest":"{}""#, blob.digest);
    let prefix = "application/vnd.samara.capsule";
    let layer = |annotations: &str, kind: &str| {
        format!(r#"{{{annotations}{digest},"mediaType":"{prefix}.{kind}","size":0}}"#)
    };
    let layers = [
        layer("", "records.v1.cbor+zstd"),
        layer(r#""annotations":{"dev.samara.space":"12"},"#, "pagemap.v1"),
        layer("", "pack.v1"),
        layer(
            r#""annotations":{"dev.samara.part":"0","dev.samara.stream":"root"},"#,
            "stream.v1+zstd",
        ),
    ];
    let annotations =
        r#"{"dev.samara.epoch":"3","org.opencontainers.image.created":"2026-01-02T03:04:05Z"}"#;
    let expected = format!(
        r#"{{"annotations":{annotations},"artifactType":"{prefix}.v1","config":{},"layers":[{}],"mediaType":"application/vnd.oci.image.manifest.v1+json","schemaVersion":2}}"#,
        layer("", "config.v1+json"),
        layers.join(",")
    );
    assert_eq!(String::from_utf8(manifest.encode().unwrap()).unwrap(), expected);
    assert_eq!(Manifest::decode(expected.as_bytes()).unwrap(), manifest);
}
