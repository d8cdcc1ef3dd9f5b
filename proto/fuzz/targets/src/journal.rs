//! Damaged files of a migration journal: each is named with its slots, none is believed, and none keeps the journal from opening.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use arbitrary::Unstructured;
use prost::Message as _;
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;
use proto_migration::journal::{Journal, SourceRecord};
use proto_migration::v1::{MigrationProgress, MigrationSpec};

use crate::damage::{self, Files};
use crate::harness::{block_on, directory};

/// Migrations that ended, and are remembered.
const FINISHED: usize = 10;

static WHOLE: LazyLock<Files> = LazyLock::new(|| {
    let dir = directory();
    let (journal, _) = Journal::open(dir.path(), FINISHED).unwrap();
    block_on(async {
        for (number, id) in (1..).zip(["m1", "m2"]) {
            let (slots, record) = record(number, id);
            journal.save(&MigrationId::new(id).unwrap(), slots, &record).await.unwrap();
        }
        for (number, id) in (3..).zip(["m3", "m4", "m5"]) {
            let (slots, record) = record(number, id);
            journal.finish(&MigrationId::new(id).unwrap(), slots, &record.progress.unwrap()).await.unwrap();
        }
    });
    crate::tree::tree(dir.path())
});

fn record(number: u16, id: &str) -> (SlotRange, SourceRecord) {
    let slots = SlotRange::new(number * 100, number * 100 + 50).unwrap();
    let spec =
        MigrationSpec { slots: Some(slots.into()), source_node_id: "n1".into(), ..MigrationSpec::default() };
    let progress = MigrationProgress {
        migration_id: id.into(),
        spec: Some(spec),
        attempt: u64::from(number),
        ..MigrationProgress::default()
    };
    (slots, SourceRecord { progress: Some(progress), base_seq: 7, ..SourceRecord::default() })
}

fn file_of(slots: SlotRange, id: &str) -> String {
    format!("active/{:05}-{:05}.{id}.task", slots.start(), slots.end() - 1)
}

/// A hand that gives the file of a migration another name.
struct Renamed {
    id: &'static str,
    /// What it says then.
    slots: SlotRange,
    to: &'static str,
}

/// Gives the file of a migration other slots, or another ID.
fn renamed(data: &mut Unstructured<'_>, files: &mut Files) -> arbitrary::Result<Option<Renamed>> {
    if data.int_in_range(0..=3_u8)? != 3 {
        return Ok(None);
    }
    let (number, id) = *data.choose(&[(1, "m1"), (2, "m2")])?;
    let (slots, _) = record(number, id);
    let to = if data.arbitrary()? { id } else { "m9" };
    let other = if to != id && data.arbitrary()? {
        slots
    } else {
        let (start, len) = (data.int_in_range(0..=16_000_u16)?, data.int_in_range(1..=300)?);
        SlotRange::new(start, start + len).unwrap()
    };
    if (other, to) == (slots, id) {
        return Ok(None);
    }
    let content = files.remove(&file_of(slots, id)).unwrap();
    files.insert(file_of(other, to), content);
    Ok(Some(Renamed { id, slots: other, to }))
}

/// The slots of a record that was written.
fn record_of(id: &MigrationId) -> Option<SlotRange> {
    (1..)
        .zip(["m1", "m2"])
        .find(|(_, known)| id.as_str() == *known)
        .map(|(number, known)| record(number, known).0)
}

/// Damages files as `data` says, and opens the journal.
pub fn run(data: &[u8]) {
    let mut files = WHOLE.clone();
    let mut data = Unstructured::new(data);
    // Where the input ends, the damage does.
    let _ = damage::apply(&mut data, &mut files, |_| true);
    let renamed = renamed(&mut data, &mut files).unwrap_or(None);
    let dir = directory();
    damage::write(dir.path(), &files);
    let (_, recovered) = Journal::open(dir.path(), FINISHED).expect("damage is no error");
    let active: BTreeMap<&str, &SourceRecord> =
        recovered.active.iter().map(|(id, record)| (id.as_str(), record)).collect();
    for (number, id) in (1..).zip(["m1", "m2"]) {
        let (slots, written) = record(number, id);
        let file = file_of(slots, id);
        if let Some(&Renamed { slots: other, to, .. }) = renamed.as_ref().filter(|renamed| renamed.id == id) {
            assert_eq!(active.get(id), None, "a record was believed of other slots than its own");
            assert_eq!(active.get(to), None, "a record was believed of another migration");
            let file = file_of(other, to);
            let damaged = recovered.damaged.iter().find(|damaged| damaged.file == file).expect("it is named");
            assert_eq!(damaged.slots.first(), Some(&other));
            if files[&file] == WHOLE[&file_of(slots, id)] && other != slots {
                assert!(damaged.slots.contains(&slots), "{damaged:?}");
            }
            continue;
        }
        if files[&file] == WHOLE[&file] {
            assert_eq!(active.get(id), Some(&&written));
            continue;
        }
        assert_eq!(active.get(id), None, "a damaged record was believed");
        let damaged = recovered.damaged.iter().find(|damaged| damaged.file == file).expect("it is named");
        // And those of another record that lies there now, where that is nowhere else.
        assert_eq!(damaged.slots.first(), Some(&slots));
        let others = damaged.slots[1..].iter();
        assert!(
            others.clone().all(|other| !recovered.active.iter().any(|(id, _)| record_of(id) == Some(*other))),
            "{damaged:?}"
        );
        assert_eq!(std::fs::read(dir.path().join(&file)).unwrap(), files[&file], "it stays as it was found");
    }
    // What is cut between two records looks as if the later ones had never been there; of all other damage, no more is lost than what lies behind it.
    let (ended, whole) = damage::records(&files["history"]);
    let ended: Vec<_> = ended.into_iter().filter_map(|ended| MigrationProgress::decode(ended).ok()).collect();
    assert!(recovered.finished == ended[ended.len().saturating_sub(FINISHED)..], "{recovered:?}");
    let (history, other): (Vec<_>, Vec<_>) =
        recovered.damaged.iter().cloned().partition(|damaged| damaged.file == "history");
    assert_eq!(history.len(), usize::from(!whole), "{history:?}");
    assert!(history.iter().all(|damaged| damaged.slots.is_empty() && !damaged.is_of_a_migration()));
    assert!(other.iter().all(|damaged| files.get(&damaged.file) != WHOLE.get(&damaged.file)), "{other:?}");
    if let Ok(kept) = std::fs::read(dir.path().join("history.damaged")) {
        assert!(!whole && files["history"].ends_with(&kept), "something else was set aside");
    }
    let (_, again) = Journal::open(dir.path(), FINISHED).expect("still no error");
    assert_eq!(again.active, recovered.active);
    assert_eq!(again.finished, recovered.finished);
    assert_eq!(again.damaged, other, "a history that was cut is whole");
}
