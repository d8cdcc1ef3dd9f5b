//! A journal that a bad disk has damaged: its slots are quarantined, and the rest of the node starts and serves.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::sync::Arc;

use proto_common::error::Error;
use proto_common::slots::{SlotRange, slot_of};
use proto_migration::Reason;
use proto_migration::hold::HoldMode;
use support::memory_source::{Answer, MemorySource};
use support::pair::{Pair, driver};

/// A journal with the record of one migration of the slot of `held`, and that file's name.
async fn journal_of_one() -> (tempfile::TempDir, String, Vec<u8>) {
    let mut pair = Pair::start().await;
    let slot = slot_of(b"held");
    let only = SlotRange::new(slot, slot + 1).unwrap();
    pair.target_down().await;
    pair.begin(|request| request.spec.as_mut().unwrap().slots = Some(only.into())).await.unwrap();
    pair.source_down().await;
    let file = format!("source/active/{slot:05}-{slot:05}.m1.task");
    let record = std::fs::read(pair.dir.path().join(&file)).unwrap();
    (pair.dir, file, record)
}

/// Starts a driver over the journal in `dir`: the slot of `held` is quarantined and says why, another is served.
async fn quarantined(dir: &tempfile::TempDir, file: &str, how: &str) {
    let source = MemorySource::default();
    let (client, stop) = driver(dir, &source, &Arc::default()).await;
    assert_eq!(source.write(b"free", Some(b"1")).await, Answer::Done, "{how}");
    assert_eq!(source.held(), Some(HoldMode::All), "{how}");
    let error = Error::from(client.clone().start_migration(Pair::request("m7")).await.unwrap_err());
    assert!(error.is(Reason::SlotsQuarantined), "{how}: {error:?}");
    assert!(error.get("holder").unwrap().contains(file.strip_prefix("source/").unwrap()), "{how}: {error:?}");
    let slots = SlotRange::new(slot_of(b"free"), slot_of(b"free") + 1).unwrap();
    let mut other = Pair::request("m8");
    other.spec.as_mut().unwrap().slots = Some(slots.into());
    client.clone().start_migration(other).await.unwrap_or_else(|status| panic!("{how}: {status:?}"));
    stop().await;
    std::fs::remove_dir_all(dir.path().join("source")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flipped_bit_and_every_cut_of_a_record_quarantines_its_slots_and_nothing_else() {
    let (dir, file, record) = journal_of_one().await;
    let path = dir.path().join(&file);
    // The control: whole, it is gone on with and holds nothing.
    let source = MemorySource::default();
    let (_, stop) = driver(&dir, &source, &Arc::default()).await;
    assert_eq!(source.held(), None);
    stop().await;
    let flips = (0..record.len() * 8).map(|bit| {
        let mut flipped = record.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        (format!("bit {bit} flipped"), flipped)
    });
    let cuts = (0..record.len()).map(|len| (format!("cut to {len} bytes"), record[..len].to_vec()));
    for (how, content) in flips.chain(cuts) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        quarantined(&dir, &file, &how).await;
    }
}

#[tokio::test]
async fn a_record_that_overlaps_a_damaged_one_does_not_keep_the_node_from_starting() {
    let (dir, file, record) = journal_of_one().await;
    let damaged = file.replace("m1", "m0");
    std::fs::write(dir.path().join(&damaged), &record[1..]).unwrap();
    quarantined(&dir, &damaged, "with another of the same slots").await;
}
