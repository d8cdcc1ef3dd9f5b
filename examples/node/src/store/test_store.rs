//! Stores for tests.

use std::path::Path;

use bytes::Bytes;
use redb::{ReadableDatabase as _, ReadableTableMetadata as _};

use super::{Identity, Init, Outcome, SetCondition, SetExpiry, Store, StoreOptions, WriteOp};
use crate::common::NodeId;
use crate::gate::{Access, Gate, Permits};

pub(crate) fn open(directory: &Path, node: &str, slots: &str) -> (Store, Identity) {
    let slots = if slots == "none" { vec![] } else { vec![slots.parse().unwrap()] };
    let init = Init { node: NodeId::new(node).unwrap(), slots: Some(slots), others: vec![] };
    Store::open(directory, &init, &StoreOptions::default()).unwrap()
}

/// Permits for writes that no gate is asked about.
pub(crate) fn ungated() -> Permits {
    Gate::new(NodeId::new("test").unwrap(), super::Ownership::default(), 0).permits(Access::Write)
}

pub(crate) async fn set(store: &Store, key: &str, value: &str) {
    let op = WriteOp::Set {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
        expiry: SetExpiry::Never,
        condition: SetCondition::Always,
        want_old: false,
    };
    assert_eq!(store.write(vec![op], ungated()).await.unwrap(), [Outcome::Done]);
}

/// Rows in the database, visible or not.
pub(crate) fn stored_rows(store: &Store) -> u64 {
    let txn = store.inner.shared.database.begin_read().unwrap();
    txn.open_table(super::tables::ROWS).unwrap().len().unwrap()
}
