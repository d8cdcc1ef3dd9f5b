//! Who the node of a data directory is. Made once; every later start is compared with it.

use std::collections::BTreeMap;
use std::path::Path;

use redb::{Database, ReadableDatabase as _, WriteTransaction};

use super::generations::{self, Generations};
use super::ownership::{self, Claim, NodeAddresses, Ownership};
use super::{StoreError, counters, tables};
use crate::common::{NodeId, SlotRange};

const FORMAT: u64 = 2;
const KEY_FORMAT: &str = "format";
const KEY_NODE: &str = "node_id";
const KEY_STORE: &str = "store_id";
const KEY_SLOTS: &str = "initial_slots";

/// What a fresh data directory is made with.
#[derive(Debug, Clone)]
pub struct Init {
    /// The node.
    pub node: NodeId,
    /// Slots that it owns from the start; `Some(empty)` is none. `None` takes what the directory says, and none where it is fresh.
    pub slots: Option<Vec<SlotRange>>,
    /// What other nodes own from the start.
    pub others: Vec<Claim>,
}

/// What the data directory says.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The node.
    pub node: NodeId,
    /// 16 random bytes made with the directory: tells an emptied node from a restarted one.
    pub store_id: [u8; 16],
    /// Who owns which slots.
    pub ownership: Ownership,
    /// Where nodes can be reached, as far as is known.
    pub nodes: BTreeMap<NodeId, NodeAddresses>,
    /// The directory was made just now.
    pub fresh: bool,
}

/// The epoch of the slots that a directory is made with.
const FIRST_EPOCH: u64 = 1;

/// The node that a database belongs to.
pub(super) fn node(database: &Database) -> Result<NodeId, StoreError> {
    let txn = database.begin_read()?;
    let stored = txn.open_table(tables::META)?.get(KEY_NODE)?.map(|value| value.value().to_vec());
    let name = String::from_utf8(stored.unwrap_or_default());
    let node = name.ok().and_then(|name| NodeId::new(name).ok());
    node.ok_or_else(|| StoreError::Damaged("it does not say which node's it is".into()))
}

/// Reads who the node of `directory` is, and compares it with what was asked for.
pub(super) fn load(database: &Database, directory: &Path, init: &Init) -> Result<Identity, StoreError> {
    let mismatch = |what: String| StoreError::Mismatch { path: directory.to_path_buf(), what };
    let txn = database.begin_read()?;
    let meta = txn.open_table(tables::META)?;
    let stored = |key: &str| -> Result<Option<Vec<u8>>, StoreError> {
        Ok(meta.get(key)?.map(|value| value.value().to_vec()))
    };
    let format = stored(KEY_FORMAT)?.ok_or_else(|| StoreError::Damaged("it has no format".into()))?;
    if format != FORMAT.to_be_bytes() {
        let found =
            format.try_into().map_or_else(|_| "unknown".into(), |n| u64::from_be_bytes(n).to_string());
        return Err(mismatch(format!(
            "its format is {found}, and this program reads format {FORMAT}; use the version that made it, or another --data"
        )));
    }
    let node = stored(KEY_NODE)?.unwrap_or_default();
    if node != init.node.as_str().as_bytes() {
        return Err(mismatch(format!(
            "belongs to node {}, not to {}; use its --id, or another --data",
            String::from_utf8_lossy(&node),
            init.node
        )));
    }
    let ownership = ownership::load(&txn.open_table(tables::OWNERSHIP)?)?;
    if let Some(wanted) = &init.slots {
        let initial = stored(KEY_SLOTS)?.unwrap_or_default();
        let present: Vec<_> = ownership.ranges_of(&init.node).collect();
        let (wanted, present) = (show(wanted), show(&present));
        if wanted.as_bytes() != initial && wanted != present {
            return Err(mismatch(format!(
                "was made with --slots {} and owns {present} now; --slots {wanted} contradicts both. Slots of an existing \
                 directory change only by moving them: leave the flag out",
                String::from_utf8_lossy(&initial)
            )));
        }
    }
    let nodes = ownership::load_nodes(&txn.open_table(tables::NODES)?)?;
    let store_id = stored(KEY_STORE)?
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| StoreError::Damaged("it has no identity".into()))?;
    Ok(Identity { node: init.node.clone(), store_id, ownership, nodes, fresh: false })
}

/// Makes a database that of `init`, in one transaction.
pub(super) fn init(database: &Database, init: &Init) -> Result<(), StoreError> {
    let txn = database.begin_write()?;
    let store_id: [u8; 16] = rand::random();
    let slots = init.slots.clone().unwrap_or_default();
    let own = slots.iter().map(|&range| Claim { range, owner: init.node.clone(), epoch: FIRST_EPOCH });
    let claims: Vec<_> = own.chain(init.others.iter().cloned()).collect();
    make_tables(&txn)?;
    {
        let mut meta = txn.open_table(tables::META)?;
        meta.insert(KEY_FORMAT, FORMAT.to_be_bytes().as_slice())?;
        meta.insert(KEY_NODE, init.node.as_str().as_bytes())?;
        meta.insert(KEY_STORE, store_id.as_slice())?;
        meta.insert(KEY_SLOTS, show(&slots).as_bytes())?;
    }
    ownership::adopt_all(&txn, &claims)?;
    txn.commit()?;
    Ok(())
}

/// Every table exists from the start, so that readers need not care.
fn make_tables(txn: &WriteTransaction) -> Result<(), StoreError> {
    txn.open_table(tables::ROWS)?;
    txn.open_table(tables::EXPIRY)?;
    txn.open_table(tables::SLOT_COUNTS)?;
    txn.open_table(tables::GARBAGE)?;
    txn.open_table(tables::NODES)?;
    txn.open_table(tables::SPLITS)?;
    txn.open_table(tables::LEASES)?;
    txn.open_table(tables::CHANGES)?;
    txn.open_table(tables::MIGRATIONS)?;
    txn.open_table(tables::TOMBSTONES)?;
    txn.open_table(tables::STAGED)?;
    txn.open_table(tables::FENCES)?;
    txn.open_table(tables::NAMED_BY)?;
    Generations::first().store(txn)?;
    counters::set(txn, counters::GENERATION, generations::FIRST.into())?;
    // A row that never changed is read at this sequence; 0 would be none.
    counters::set(txn, counters::SEQUENCE, 1)
}

/// Slot ranges as the operator writes them.
pub(super) fn show(ranges: &[SlotRange]) -> String {
    if ranges.is_empty() {
        return "none".into();
    }
    ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Store, StoreOptions, test_store};

    #[test]
    fn a_directory_of_another_format_is_refused_by_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let (store, identity) = test_store::open(dir.path(), "n1", "0-16383");
        store.close();
        drop(store);
        let database = Database::create(dir.path().join("node.redb")).unwrap();
        let txn = database.begin_write().unwrap();
        txn.open_table(tables::META).unwrap().insert(KEY_FORMAT, 1_u64.to_be_bytes().as_slice()).unwrap();
        txn.commit().unwrap();
        drop(database);
        let init = Init { node: identity.node, slots: None, others: vec![] };
        let refused = Store::open(dir.path(), &init, &StoreOptions::default()).unwrap_err().to_string();
        assert!(refused.contains("its format is 1, and this program reads format 2"), "{refused}");
    }
}
