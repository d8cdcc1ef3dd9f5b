//! A journal that a bad disk has damaged: its slots are quarantined, and the rest of the node starts and serves.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::sync::Arc;

use proto_common::error::Error;
use proto_common::guard::RangeGuard;
use proto_common::ids::NodeId;
use proto_common::slots::{SlotRange, slot_of};
use proto_migration::driver::{Doubt, Sorted, sort};
use proto_migration::hold::HoldMode;
use proto_migration::journal::Journal;
use proto_migration::{MigrationSource as _, Reason, v1};
use support::memory_source::{Answer, MemorySource};
use support::pair::{Pair, driver, id};

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
    // The file's name, for the operator, and no directory of it: whoever asks is told this.
    let name = file.strip_prefix("source/active/").unwrap();
    let holder = error.get("holder").unwrap();
    assert!(holder.ends_with(&format!("record {name}")), "{how}: {error:?}");
    assert!(error.message().contains(holder) && !error.message().contains('/'), "{how}: {error:?}");
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

/// What makes a tool that looks at the journal see what [`quarantined`] sees: the file, and why it is in doubt.
async fn sorted(dir: &tempfile::TempDir, source: &MemorySource) -> Vec<(String, Doubt)> {
    let (_, recovered) = Journal::open(dir.path().join("source"), 10).unwrap();
    let logs = source.logs().await.unwrap();
    let Sorted { doubtful, .. } = sort(recovered, &NodeId::new("n1").unwrap(), &logs, &RangeGuard::new());
    doubtful.into_iter().map(|doubtful| (doubtful.file.file, doubtful.doubt)).collect()
}

#[tokio::test]
async fn a_whole_record_that_cannot_be_gone_on_with_is_told_by_the_same_check() {
    type Spoil = fn(&mut v1::MigrationProgress);
    let spoils: [(&str, Spoil); 5] = [
        ("another node", |progress| progress.spec.as_mut().unwrap().source_node_id = "other".to_owned()),
        ("the specification", |progress| progress.spec.as_mut().unwrap().value_format = "Rows".to_owned()),
        ("the limits", |progress| {
            progress.limits = Some(v1::MigrationLimits { freeze_timeout_ms: Some(0), ..Default::default() });
        }),
        ("a state of a target", |progress| progress.set_state(v1::MigrationState::Receiving)),
        ("a state that nobody knows", |progress| progress.state = 999),
    ];
    let (dir, file, whole) = journal_of_one().await;
    // The control.
    assert_eq!(sorted(&dir, &MemorySource::default()).await, []);
    for (how, spoil) in spoils {
        std::fs::create_dir_all(dir.path().join("source/active")).unwrap();
        std::fs::write(dir.path().join(&file), &whole).unwrap();
        let (journal, recovered) = Journal::open(dir.path().join("source"), 10).unwrap();
        let (id, mut record) = recovered.active.into_iter().next().unwrap();
        let progress = record.progress.as_mut().unwrap();
        spoil(progress);
        let slots = SlotRange::from_wire(progress.spec.as_ref().unwrap().slots).unwrap();
        journal.save(&id, slots, &record).await.unwrap();
        let shown = file.strip_prefix("source/").unwrap().to_owned();
        assert_eq!(sorted(&dir, &MemorySource::default()).await, [(shown, Doubt::NotUnderstood)], "{how}");
        quarantined(&dir, &file, how).await;
    }
}

/// Puts the record of `file` under the same ID and other slots, as one that was restored may be; returns its file's name.
async fn of_other_slots(dir: &tempfile::TempDir) -> String {
    let (journal, recovered) = Journal::open(dir.path().join("source"), 10).unwrap();
    let (id, mut record) = recovered.active.into_iter().next().unwrap();
    let slots = SlotRange::new(0, 1).unwrap();
    record.progress.as_mut().unwrap().spec.as_mut().unwrap().slots = Some(slots.into());
    journal.save(&id, slots, &record).await.unwrap();
    Journal::file_of(slots, &id)
}

#[tokio::test]
async fn whole_records_with_one_id_are_all_in_doubt() {
    let (dir, file, _) = journal_of_one().await;
    let other = of_other_slots(&dir).await;
    let shown = file.strip_prefix("source/").unwrap().to_owned();
    let found = sorted(&dir, &MemorySource::default()).await;
    assert_eq!(found, [(other.clone(), Doubt::Damaged), (shown, Doubt::Damaged)]);
    quarantined(&dir, &format!("source/{other}"), "two of one ID").await;
}

#[tokio::test]
async fn a_record_of_other_slots_does_not_stand_for_the_one_that_is_gone() {
    let (dir, file, _) = journal_of_one().await;
    let other = of_other_slots(&dir).await;
    std::fs::remove_file(dir.path().join(&file)).unwrap();
    let slot = slot_of(b"held");
    let source = MemorySource::default();
    source.open_log(&id(), SlotRange::new(slot, slot + 1).unwrap(), None).await.unwrap();
    let shown = file.strip_prefix("source/").unwrap().to_owned();
    assert_eq!(sorted(&dir, &source).await, [(shown, Doubt::Missing), (other, Doubt::Damaged)]);
}

#[tokio::test]
async fn a_whole_record_whose_slots_are_in_doubt_waits() {
    let (dir, file, record) = journal_of_one().await;
    let damaged = file.replace("m1", "m0");
    std::fs::write(dir.path().join(&damaged), &record[1..]).unwrap();
    let [damaged, whole] = [damaged, file].map(|file| file.strip_prefix("source/").unwrap().to_owned());
    let found = sorted(&dir, &MemorySource::default()).await;
    assert_eq!(found, [(damaged, Doubt::Damaged), (whole, Doubt::Held)]);
}

#[tokio::test]
async fn a_file_with_another_name_quarantines_what_its_content_says() {
    let (dir, file, record) = journal_of_one().await;
    std::fs::remove_file(dir.path().join(file)).unwrap();
    for name in ["16383-16383.m1.task", "what.bak"] {
        let other = format!("source/active/{name}");
        std::fs::create_dir_all(dir.path().join("source/active")).unwrap();
        std::fs::write(dir.path().join(&other), &record).unwrap();
        quarantined(&dir, &other, name).await;
    }
}

#[tokio::test]
async fn a_copy_beside_a_whole_record_holds_nothing_back() {
    let (dir, file, record) = journal_of_one().await;
    std::fs::write(dir.path().join(format!("{file}.bak")), &record).unwrap();
    let (_, recovered) = Journal::open(dir.path().join("source"), 10).unwrap();
    assert_eq!(recovered.active.len(), 1);
    let [copy] = recovered.damaged.as_slice() else { panic!("{recovered:?}") };
    assert!(copy.is_copy && !copy.is_of_a_migration() && copy.slots.is_empty(), "{copy:?}");
    let shown = file.strip_prefix("source/").unwrap();
    assert!(copy.problem.contains(shown), "{copy:?}");
    let sorted = sort(recovered, &NodeId::new("n1").unwrap(), &[], &RangeGuard::new());
    assert_eq!(sorted.sound.len(), 1, "its slots are its own");
    // Under the name of another record, it leaves those slots in doubt, and not its own.
    let (other, name) = (SlotRange::new(0, 1).unwrap(), "active/00000-00000.m0.task");
    std::fs::rename(dir.path().join(format!("{file}.bak")), dir.path().join("source").join(name)).unwrap();
    let (_, recovered) = Journal::open(dir.path().join("source"), 10).unwrap();
    assert_eq!((recovered.active.len(), recovered.damaged[0].slots.as_slice()), (1, &[other][..]));
    std::fs::rename(dir.path().join("source").join(name), dir.path().join(format!("{file}.bak"))).unwrap();
    // Without the record, it is what is left of that.
    std::fs::remove_file(dir.path().join(&file)).unwrap();
    quarantined(&dir, &format!("{file}.bak"), "a copy alone").await;
}

#[tokio::test]
async fn a_record_that_is_gone_quarantines_the_slots_that_are_logged() {
    let mut pair = Pair::start().await;
    let slot = slot_of(b"held");
    let only = SlotRange::new(slot, slot + 1).unwrap();
    pair.begin(|request| {
        let spec = request.spec.as_mut().unwrap();
        (spec.slots, spec.auto_complete) = (Some(only.into()), false);
    })
    .await
    .unwrap();
    pair.reaches(v1::MigrationState::Ready).await;
    pair.source_down().await;
    let source = pair.source.restarted();
    assert_eq!(sorted(&pair.dir, &source).await, [], "the control");
    let file = format!("active/{slot:05}-{slot:05}.m1.task");
    std::fs::remove_file(pair.dir.path().join("source").join(&file)).unwrap();
    assert_eq!(sorted(&pair.dir, &source).await, [(file.clone(), Doubt::Missing)]);
    let (client, stop) = driver(&pair.dir, &source, &Arc::default()).await;
    assert_eq!((source.held(), source.write(b"free", Some(b"1")).await), (Some(HoldMode::All), Answer::Done));
    let error = Error::from(client.clone().start_migration(Pair::request("m7")).await.unwrap_err());
    assert!(error.is(Reason::SlotsQuarantined), "{error:?}");
    let name = file.strip_prefix("active/").unwrap();
    assert_eq!(error.get("holder"), Some(format!("the missing record {name}").as_str()));
    stop().await;
}
