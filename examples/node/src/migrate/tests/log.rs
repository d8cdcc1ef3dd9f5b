//! The source: its change log and digests.

use bytes::Bytes;
use proto::common::fence::Fence;
use proto::migration::digest::SlotDigests;
use proto::migration::entry::Image;
use proto::migration::source::{ChangeCursor, Handover, LogState, PageLimit};
use proto::migration::{MigrationSource as _, MigrationSpec};

use super::support::*;
use crate::common::NodeId;
use crate::store::{WriteOp, test_store};

fn limit(entries: usize) -> PageLimit {
    PageLimit { bytes: 1 << 20, entries }
}

/// Keys of the moving slots.
fn keys(count: usize) -> Vec<String> {
    (0..count).map(|n| key_in(&format!("k{n}"), moving(), true)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_holds_what_changed_in_its_slots_from_when_it_was_opened() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let (id, keys, outside) = (id("m"), keys(3), key_in("o", moving(), false));
    a.set(&keys[0], "before").await;
    let mut states = a.source.watch_log(&id);
    assert!(states.changed().await.is_err(), "there is no log yet");

    let base = a.source.open_log(&id, moving(), None).await.unwrap();
    assert!(base >= 1);
    a.set(&outside, "x").await;
    let nothing = a.source.read_changes(&id, ChangeCursor::at(base), limit(9)).await.unwrap();
    assert_eq!((nothing.entries.len(), nothing.through), (0, Some(base)));

    a.set(&keys[1], "1").await;
    a.set(&keys[1], "22").await;
    a.delete(&keys[0]).await;
    a.delete(&keys[2]).await;
    let states = a.source.watch_log(&id);
    let LogState { head_seq, entries, bytes: size, oldest_unix_ms } = *states.borrow();
    let expected = keys[1].len() * 2 + 3 + keys[0].len();
    assert_eq!(
        (head_seq, entries, size),
        (base + 3, 3, expected as u64),
        "a key that was not there did not change"
    );
    assert!(oldest_unix_ms.is_some_and(|at| at <= crate::store::unix_ms()));

    let page = a.source.read_changes(&id, ChangeCursor::at(base), limit(9)).await.unwrap();
    assert_eq!(page.through, Some(base + 3));
    let found: Vec<_> = page.entries.iter().map(|entry| (&entry.key[..], entry.image.clone())).collect();
    let image = Image { value: bytes("22"), expires_unix_ms: None };
    assert_eq!(found, [(keys[1].as_bytes(), Some(image)), (keys[0].as_bytes(), None)]);

    a.source.release_changes(&id, base + 3).await.unwrap();
    let state = *states.borrow();
    assert_eq!(state, LogState { head_seq: base + 3, ..LogState::default() });
    // They go with the next change.
    assert_eq!(test_store::leftovers(a.node.store())[0], 3);
    a.set(&keys[1], "3").await;
    assert_eq!(test_store::leftovers(a.node.store())[0], 1);
    let lost = a.source.read_changes(&id, ChangeCursor::at(base), limit(9)).await.unwrap_err();
    assert_eq!(lost.reason(), "LOG_LOST");
    a.source.release_changes(&id, base + 4).await.unwrap();
    a.node.store().sweep_once().await.unwrap();
    assert_eq!(test_store::leftovers(a.node.store()), [0; 4]);

    a.source.keep(&id, moving(), None).await.unwrap();
    a.source.keep(&id, moving(), None).await.unwrap();
    assert!(states.has_changed().is_err(), "the log is gone");
    a.set(&keys[1], "4").await;
    assert_eq!(test_store::leftovers(a.node.store()), [0; 4]);
    let lost = a.source.read_changes(&id, ChangeCursor::at(base + 4), limit(9)).await.unwrap_err();
    assert_eq!(lost.reason(), "LOG_LOST");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_goes_on_after_a_crash_as_far_as_it_reaches_back() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let (id, keys) = (id("m"), keys(5));
    let base = a.source.open_log(&id, moving(), None).await.unwrap();
    for key in &keys {
        a.set(key, "x").await;
    }
    let a = a.crash();
    let states = a.source.watch_log(&id);
    assert_eq!((states.borrow().head_seq, states.borrow().entries), (base + 5, 5));
    assert_eq!(a.source.open_log(&id, moving(), Some(base + 2)).await.unwrap(), base + 2);
    a.set(&keys[0], "y").await;
    let page = a.source.read_changes(&id, ChangeCursor::at(base + 2), limit(9)).await.unwrap();
    assert_eq!((page.entries.len(), page.through), (4, Some(base + 6)), "sequences go on rising");
    // What was released is gone with that write.
    for from in [base, base + 1, base + 7] {
        let lost = a.source.open_log(&id, moving(), Some(from)).await.unwrap_err();
        assert_eq!(lost.reason(), "LOG_LOST", "{from}");
    }
    for (name, slots) in [("other", moving()), ("m", range("0-99"))] {
        let lost = a.source.open_log(&super::support::id(name), slots, Some(base + 2)).await.unwrap_err();
        assert_eq!(lost.reason(), "LOG_LOST");
    }
    let busy = a.source.open_log(&super::support::id("other"), range("0-5000"), None).await.unwrap_err();
    assert_eq!(busy.reason(), "RANGE_BUSY");
    // A new copy: an empty log.
    assert_eq!(a.source.open_log(&id, moving(), None).await.unwrap(), base + 6);
    assert_eq!(a.source.watch_log(&id).borrow().entries, 0);
    a.node.store().sweep_once().await.unwrap();
    assert_eq!(test_store::leftovers(a.node.store()), [0; 4]);
}

/// The watermark moves though writers are faster than the reader.
#[tokio::test(flavor = "multi_thread")]
async fn the_watermark_moves_under_writers_that_are_faster() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let keys = keys(40);
    let id = id("m");
    let base = a.source.open_log(&id, moving(), None).await.unwrap();
    let mut mover =
        Mover { id, slots: moving(), cursor: Bytes::new(), copied: false, changes: ChangeCursor::at(base) };
    let (mut moved, mut parts) = (0, 0);
    for n in 0..60 {
        for key in &keys[(n * 7) % 20..][..15] {
            a.set(key, &n.to_string()).await;
        }
        let before = mover.changes.watermark;
        mover.read_changes(&a, limit(4)).await;
        moved += usize::from(mover.changes.watermark > before);
        parts += usize::from(mover.changes.goal != 0);
    }
    // Each time it takes longer, as more has changed meanwhile.
    assert!(moved >= 2 && parts > 20, "moved {moved} times, by {parts} parts");
    // Of a hot key, the last image is enough: what is left takes few reads.
    for n in 0..2000 {
        a.set(&keys[0], &n.to_string()).await;
    }
    let head = a.source.watch_log(&mover.id).borrow().head_seq;
    let mut reads = 0;
    while mover.changes != ChangeCursor::at(head) {
        mover.read_changes(&a, limit(50)).await;
        reads += 1;
    }
    assert!(reads <= 3, "{reads}");
}

#[tokio::test(flavor = "multi_thread")]
async fn digests_are_those_of_the_store_and_survive_a_crash_by_a_scan() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "0-16383");
    let (id, keys) = (id("m"), keys(30));
    for key in &keys {
        a.set(key, "x").await;
    }
    let counted = async |a: &TestNode| {
        let mut digests = SlotDigests::new();
        for (key, (value, expires_unix_ms)) in a.rows(moving()).await {
            digests.add(&key, &Image { value, expires_unix_ms });
        }
        digests.of(moving())
    };
    a.source.open_log(&id, moving(), None).await.unwrap();
    // By the pages of the copy.
    let mut mover = Mover {
        id: id.clone(),
        slots: moving(),
        cursor: Bytes::new(),
        copied: false,
        changes: ChangeCursor::at(0),
    };
    while !mover.copied {
        mover.read_rows(&a, limit(7)).await;
        a.write(WriteOp::Add { key: bytes("n:{k}"), delta: 1 }).await.unwrap();
        a.set(&keys[3], "changed").await;
        a.set(&keys[20], "changed").await;
    }
    a.delete(&keys[4]).await;
    assert_eq!(a.source.digests(&id).await.unwrap(), counted(&a).await);
    let a = a.crash();
    a.set(&keys[5], "after").await;
    a.source.prepare_digests(&id).await.unwrap();
    a.set(&keys[6], "after").await;
    assert_eq!(a.source.digests(&id).await.unwrap(), counted(&a).await);
    assert_eq!(a.source.digests(&super::support::id("other")).await.unwrap_err().reason(), "LOG_LOST");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_node_cannot_give_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let a = TestNode::open(&dir.path().join("a"), "n1", "4096-16383");
    for n in 0..200 {
        let key = format!("{{{}}}:{n}", key_in("k", moving(), true));
        a.set(&key, "twelve bytes").await;
    }
    let terms = a.source.admit(&spec(moving()), Some(Fence::new(4, 0))).await.unwrap();
    assert_eq!((terms.slot_epoch, terms.estimated_keys), (1, Some(200)));
    assert!((200 * 15..200 * 25).contains(&terms.estimated_bytes.unwrap()), "{terms:?}");
    let refused = a.source.admit(&spec(moving()), Some(Fence::new(3, 9))).await.unwrap_err();
    assert_eq!(refused.reason(), "STALE_FENCE");
    let refused = a.source.admit(&spec(range("4095-5000")), None).await.unwrap_err();
    assert_eq!(
        (refused.reason(), refused.get("slot"), refused.get("owner")),
        ("NOT_SLOT_OWNER", Some("4095"), None)
    );
    let format = MigrationSpec { value_format: "other.v1".into(), ..spec(moving()) };
    assert_eq!(a.source.admit(&format, None).await.unwrap_err().reason(), "UNSUPPORTED_VALUE_FORMAT");

    let owner = NodeId::new("n2").unwrap();
    let handover = |slot_epoch| Handover {
        id: id("m"),
        slots: moving(),
        owner: owner.clone(),
        address: "127.0.0.1:1".into(),
        slot_epoch,
    };
    a.source.open_log(&id("m"), moving(), None).await.unwrap();
    assert_eq!(a.source.give_up(&handover(1)).await.unwrap_err().reason(), "INTERNAL", "no higher epoch");
    assert_eq!((a.node.key_count(), a.source.watch_log(&id("m")).borrow().entries), (200, 0));
    for _ in 0..2 {
        a.source.give_up(&handover(2)).await.unwrap();
    }
    assert_eq!(a.node.key_count(), 0);
    let refused = a.source.admit(&spec(moving()), None).await.unwrap_err();
    assert_eq!((refused.reason(), refused.get("owner")), ("NOT_SLOT_OWNER", Some("n2")));
    // An operator decides otherwise.
    a.source.keep(&id("m"), moving(), Some(3)).await.unwrap();
    assert_eq!(a.source.admit(&spec(moving()), None).await.unwrap().slot_epoch, 3);
}
