//! Splits that are under way, so that a node that was restarted goes on with them before it serves.

use redb::{ReadableDatabase as _, ReadableTable as _, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::ownership::{adopt_all, from_json, to_json};
use super::{Claim, NodeAddresses, Ownership, Store, StoreError, tables};

/// A split that this node has begun: what is needed to go on with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitIntent {
    /// The id of its transfer.
    pub transfer: String,
    /// First slot that moves.
    pub start: u16,
    /// One past the last one.
    pub end: u16,
    /// The node that gets them.
    pub target: String,
    /// Where that is.
    pub target_addresses: NodeAddresses,
    /// The [store id](crate::node::Node::store_id) that it had when the split began.
    #[serde(default)]
    pub target_store: Vec<u8>,
    /// The epoch with which it owns them.
    pub epoch: u64,
    /// The shard that is split: its slots, before.
    pub source_start: u16,
    /// One past the last one.
    pub source_end: u16,
    /// When it was begun, in milliseconds since the Unix epoch.
    pub begun_unix_ms: u64,
    /// Bytes per second at most.
    pub bytes_per_second: Option<u64>,
}

impl Store {
    /// Remembers a split, durably.
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    pub async fn put_split(&self, intent: SplitIntent) -> Result<(), StoreError> {
        self.writer()?
            .transact(move |txn, _| {
                let mut table = txn.open_table(tables::SPLITS)?;
                table.insert(intent.transfer.as_str(), to_json(&intent)?.as_slice())?;
                Ok(())
            })
            .await
    }

    /// Forgets a split, durably.
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    pub async fn remove_split(&self, transfer: String) -> Result<(), StoreError> {
        self.writer()?.transact(move |txn, _| remove(txn, &transfer)).await
    }

    /// Takes `claim` over and forgets the split `finished`, durably, in one transaction.
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    pub(crate) async fn keep(&self, claim: Claim, finished: String) -> Result<Ownership, StoreError> {
        self.writer()?
            .transact(move |txn, _| {
                remove(txn, &finished)?;
                adopt_all(txn, &[claim])
            })
            .await
    }

    /// The splits that were begun and neither finished nor abandoned.
    ///
    /// # Errors
    ///
    /// The database could not be read.
    pub fn splits(&self) -> Result<Vec<SplitIntent>, StoreError> {
        let table = self.inner.shared.database.begin_read()?.open_table(tables::SPLITS)?;
        table.iter()?.map(|entry| from_json(entry?.1.value(), "splits")).collect()
    }
}

pub(super) fn remove(txn: &WriteTransaction, transfer: &str) -> Result<(), StoreError> {
    txn.open_table(tables::SPLITS)?.remove(transfer)?;
    Ok(())
}
