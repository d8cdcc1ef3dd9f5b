//! Damaged records in the store of a migration's target: none is believed, the slots in doubt go to nobody, and the rest goes on.
//!
//! A record whose checksum is right and whose content makes no sense, as another version of the program may leave it, is refused or understood:
//! it never keeps the node from starting.

use std::sync::{Arc, LazyLock};

use arbitrary::Unstructured;
use bytes::Bytes;
use proto_common::checksum::crc64;
use proto_common::guard::RangeGuard;
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;
use proto_migration::MigrationTarget as _;
use proto_migration::receiver::read_records;
use proto_migration::v1::MigrationState;
use proto_migration::v1::transfer_migration_data_request::{Frame, Header};
use proto_migration::v1::transfer_migration_data_response::Frame as Answer;

use crate::damage::{self, Files};
use crate::harness::{block_on, directory, polite};
use crate::support::frames::{self, COMMIT, Node, row};
use crate::support::memory_target::{Disk, MemoryTarget};

/// Kind, version, length and checksum of a record.
const HEADER_LEN: usize = 16;

/// Migrations, their slots, a key in them, and their states.
const MIGRATIONS: [(&str, u16, u16, &str, MigrationState); 3] = [
    ("m1", 0, 4096, "b", MigrationState::Prepared),
    ("m2", 4096, 8192, "c", MigrationState::Receiving),
    ("m3", 8192, 12288, "foo", MigrationState::Committed),
];

fn id(text: &str) -> MigrationId {
    MigrationId::new(text).unwrap()
}

fn range(start: u16, end: u16) -> SlotRange {
    SlotRange::new(start, end).unwrap()
}

fn header(id: &str, slots: SlotRange, attempt: u64) -> Header {
    let mut header = frames::header(attempt);
    header.migration_id = id.to_owned();
    header.spec.as_mut().unwrap().slots = Some(slots.into());
    header
}

/// A store with all of them.
static WHOLE: LazyLock<MemoryTarget> = LazyLock::new(|| {
    block_on(async {
        let target = MemoryTarget::default();
        let node = Node::over(target.clone(), Arc::new(directory()), |builder| builder).await;
        for (name, start, end, key, state) in MIGRATIONS {
            let (mut source, _) = node.accept(header(name, range(start, end), 1)).await;
            source.bulk(vec![row(10, key)], true).await;
            source.durable().await;
            if state != MigrationState::Receiving {
                let prepare = frames::prepare(1, source.watermark, &target.disk().staged[&id(name)]);
                source.send(Frame::Prepare(prepare)).await;
                assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(_)));
            }
            if state == MigrationState::Committed {
                source.send(COMMIT).await;
                assert!(matches!(source.answer().await.unwrap(), Answer::Committed(_)));
            }
        }
        node.receiver.shutdown().await;
        target
    })
});

/// The same store with other records.
fn store(records: &Files) -> MemoryTarget {
    let target = MemoryTarget::default();
    let whole = WHOLE.disk();
    *target.disk() = Disk {
        records: records.iter().map(|(name, record)| (id(name), Bytes::copy_from_slice(record))).collect(),
        staged: whole.staged.clone(),
        slots: whole.slots.clone(),
        owned: whole.owned.clone(),
        known_epoch: whole.known_epoch,
    };
    target
}

/// A record with the right length and checksum.
fn sealed(kind: [u8; 4], content: &[u8]) -> Vec<u8> {
    let len = u32::try_from(content.len()).unwrap().to_le_bytes();
    let crc = crc64(&[&kind[..], &len, content].concat());
    [&kind[..], &len, &crc.to_le_bytes(), content].concat()
}

/// Damages records as `data` says, from the second byte on; an odd first one makes their checksums right again.
pub fn run(data: &[u8]) {
    let (&how, data) = data.split_first().unwrap_or((&0, &[]));
    let whole: Files =
        WHOLE.disk().records.iter().map(|(id, record)| (id.to_string(), record.to_vec())).collect();
    let mut records = whole.clone();
    let mut data = Unstructured::new(data);
    let resealed = how % 2 == 1;
    // Where the input ends, the damage does.
    if resealed {
        let kind: [u8; 4] = records["m1"][..4].try_into().unwrap();
        for record in records.values_mut() {
            drop(record.drain(..HEADER_LEN));
        }
        let _ = damage::apply(&mut data, &mut records, |_| true);
        for record in records.values_mut() {
            *record = sealed(kind, record);
        }
    } else {
        let _ = damage::apply(&mut data, &mut records, |_| true);
    }
    block_on(judge(&whole, &records, resealed));
}

async fn judge(whole: &Files, records: &Files, resealed: bool) {
    let target = store(records);
    let stored = target.load().await.unwrap();
    let read = read_records(stored);
    let guard = RangeGuard::new();
    let shared = guard.clone();
    let node = Node::over(target.clone(), Arc::new(directory()), |builder| builder.guard(shared)).await;
    for (name, start, end, _, state) in MIGRATIONS {
        let (stored, read) = read.iter().find(|(stored, _)| stored.id.as_str() == name).unwrap();
        match read {
            Ok(progress) if records[name] == whole[name] => assert_eq!(progress.state(), state),
            Ok(progress) => {
                assert!(resealed, "a damaged record was believed: {progress:?}");
                assert_eq!(progress.migration_id, name);
                let told = progress.spec.as_ref().and_then(|spec| SlotRange::from_wire(spec.slots).ok());
                assert!(stored.slots.is_none_or(|staged| told == Some(staged)), "{progress:?}");
            }
            Err(unread) => {
                assert_ne!(records[name], whole[name], "{unread:?}");
                assert!(!unread.problem.chars().any(char::is_control), "{unread:?}");
                assert!(unread.problem.len() <= 1024, "{unread:?}");
                assert!(stored.slots.is_none_or(|staged| unread.slots.contains(&staged)), "{unread:?}");
                let error = node.refused(header(name, range(start, end), 99)).await;
                assert_eq!(polite(&error), "SLOTS_QUARANTINED", "{error:?}");
                assert!(error.message().contains(name) && !error.message().contains('/'), "{error:?}");
                for &slots in &unread.slots {
                    let error = guard.try_acquire(slots, "somebody else").unwrap_err();
                    assert_eq!(error.reason(), "SLOTS_QUARANTINED", "{error:?}");
                }
            }
        }
        assert!(target.disk().records.contains_key(&id(name)), "{name}: it stays where it is");
    }
    if !resealed {
        // Nothing is in doubt but what was damaged.
        for (name, start, end, _, _) in MIGRATIONS.into_iter().filter(|of| records[of.0] == whole[of.0]) {
            let resolve =
                Header { purpose: frames::resolve(99).purpose, ..header(name, range(start, end), 99) };
            let (_, accepted) = node.accept(resolve).await;
            assert!(accepted.known, "{name}");
        }
        let (_, accepted) = node.accept(header("fresh", range(12288, 16384), 1)).await;
        assert!(!accepted.known);
    }
    node.receiver.shutdown().await;
}
