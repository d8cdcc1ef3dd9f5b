//! Damaged files of a snapshot store: none keeps it from opening, no byte is believed that was not written, and the rest goes on.

use std::sync::LazyLock;

use arbitrary::Unstructured;
use proto_common::checksum::crc64;
use proto_snapshot::store::{SnapshotStore as _, Staging as _, StoreError};
use proto_snapshot::v1::transfer_split_snapshot_request::Frame;

use crate::damage::{self, Files};
use crate::harness::{block_on, directory, polite};
use crate::sender::{Snapshot, Stream, client, open, receiver};

/// Two that are under way, and one that is installed.
fn snapshot(id: &'static str, shard: &'static str) -> Snapshot {
    let content = |seed: usize, len: usize| {
        (0..len).map(|at| u8::try_from((at * 31 + seed + at / 13) % 251).unwrap()).collect()
    };
    let seed = id.len() * 13 + usize::from(id.as_bytes()[0]);
    Snapshot {
        id,
        shard,
        index: 2,
        files: vec![("a".to_owned(), content(seed, 200)), ("d/b".to_owned(), content(seed + 1, 100))],
    }
}

fn under_way() -> [Snapshot; 2] {
    [snapshot("open", "s2"), snapshot("other", "s3")]
}

static WHOLE: LazyLock<Files> = LazyLock::new(|| {
    let dir = directory();
    block_on(async {
        let node = receiver(open(dir.path()).unwrap()).await;
        let client = client(&node);
        let done = Snapshot { index: 1, ..snapshot("done", "s2") };
        done.send(&client).await.unwrap();
        for snapshot in under_way() {
            let mut stream = Stream::open(&client, snapshot.header(1, 1)).await;
            stream.say(Frame::Manifest(snapshot.manifest())).await;
            stream.accepted().await.unwrap();
            stream.say(Frame::Chunk(snapshot.chunk(0, 10, 64))).await;
            stream.say(Frame::Chunk(snapshot.chunk(1, 0, 50))).await;
            stream.half_close();
            stream.installed().await.unwrap_err();
        }
        drop(client);
        node.shutdown().await;
    });
    crate::tree::tree(dir.path())
});

/// Damages the store's own files as `data` says, opens it, and goes on with every transfer.
pub fn run(data: &[u8]) {
    let mut files = WHOLE.clone();
    let mut data = Unstructured::new(data);
    let records = |name: &str| !name.contains("/tree/") && !name.starts_with("installed/") && name != "LOCK";
    // Where the input ends, the damage does.
    let _ = damage::apply(&mut data, &mut files, records);
    let dir = directory();
    damage::write(dir.path(), &files);
    block_on(async {
        let store = match open(dir.path()) {
            Ok(store) => store,
            Err(StoreError::Damaged { file, .. }) => {
                assert_eq!(file, "FORMAT", "only a store of an unknown layout does not open");
                assert_ne!(files["FORMAT"], WHOLE["FORMAT"]);
                return;
            }
            Err(error) => panic!("{error:?}"),
        };
        let recovered = store.recover().await.expect("damage is no error");
        for staging in &recovered.staged {
            let id = staging.plan().spec.transfer_id.to_string();
            let sent = under_way().into_iter().find(|sent| sent.id == id).expect("nothing else was staged");
            for record in staging.records() {
                let content = &sent.files[record.extent.file as usize].1;
                let range = usize::try_from(record.extent.offset).unwrap()
                    ..usize::try_from(record.extent.end()).unwrap();
                if files[&format!("staging/{id}/records")] == WHOLE[&format!("staging/{id}/records")] {
                    assert_eq!(record.crc, crc64(&content[range]), "a record that was never written");
                }
            }
        }
        drop((recovered, store));

        let store = open(dir.path()).unwrap();
        let node = receiver(store).await;
        let client = client(&node);
        // The rest of the node serves.
        let fresh = snapshot("fresh", "s9");
        fresh.send(&client).await.unwrap();
        assert!(fresh.is_installed_in(dir.path()));
        for snapshot in under_way() {
            // A record of one area in the place of another's is found out by the checksums of the whole.
            let swapped = files[&format!("staging/{}/records", snapshot.id)]
                != WHOLE[&format!("staging/{}/records", snapshot.id)];
            let sent = snapshot.send(&client).await;
            let shard = format!("shards/{}/CURRENT", snapshot.shard);
            match sent {
                Ok(()) => assert!(
                    snapshot.is_installed_in(dir.path()),
                    "{} was installed as it is not",
                    snapshot.id
                ),
                Err(error) => {
                    let reason = polite(&error);
                    let shard_damaged = files.get(&shard) != WHOLE.get(&shard);
                    assert!(
                        shard_damaged && reason == "INSTALL_REFUSED"
                            || swapped && reason == "FILE_CHECKSUM_MISMATCH",
                        "{error:?}"
                    );
                    assert!(!snapshot.is_installed_in(dir.path()));
                }
            }
        }
        drop(client);
        node.shutdown().await;
    });
}
