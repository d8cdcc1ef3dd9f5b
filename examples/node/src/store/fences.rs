//! The highest fence that was seen of each shard.

use proto::common::fence::Fence;
use proto::common::ids::{NodeId, ShardId};
use redb::{ReadableDatabase as _, ReadableTable as _};

use super::{Store, StoreError, tables};

/// Shards that one node may name with a fence before anybody else does: each is remembered for ever, in some 200 bytes, and few nodes split more often.
pub(crate) const SHARDS_PER_PEER: u64 = 1024;

impl Store {
    /// The highest fence that was seen of `shard`; the lowest there is if none was.
    pub(crate) async fn fence(&self, shard: &ShardId) -> Result<Fence, StoreError> {
        let stored = self.stored_fence(shard).await?;
        Ok(stored.unwrap_or_default())
    }

    async fn stored_fence(&self, shard: &ShardId) -> Result<Option<Fence>, StoreError> {
        let name = shard.clone();
        self.blocking(move |shared| {
            let fences = shared.database.begin_read()?.open_table(tables::FENCES)?;
            let stored = fences.get(name.as_str())?.map(|stored| stored.value());
            Ok(stored.map(|(epoch, term)| Fence::new(epoch, term)))
        })
        .await
    }

    /// Remembers `fence` for `shard`, durably, if it is the highest. Returns the highest. `by` is the peer that names it, if one does.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooManyShards`] if nothing is known of the shard, and `by` has named [`SHARDS_PER_PEER`] others.
    pub(crate) async fn raise_fence(
        &self,
        shard: &ShardId,
        fence: Fence,
        by: Option<&NodeId>,
    ) -> Result<Fence, StoreError> {
        let stored = self.stored_fence(shard).await?;
        if let Some(stored) = stored.filter(|stored| *stored >= fence) {
            return Ok(stored);
        }
        let (name, by) = (shard.clone(), by.cloned());
        self.writer()?
            .transact(move |txn, _| {
                let mut fences = txn.open_table(tables::FENCES)?;
                let stored = fences.get(name.as_str())?.map(|stored| stored.value());
                if let (None, Some(by)) = (stored, by) {
                    let mut named = txn.open_table(tables::NAMED_BY)?;
                    let count = named.get(by.as_str())?.map_or(0, |count| count.value());
                    if count >= SHARDS_PER_PEER {
                        return Err(StoreError::TooManyShards { peer: by, limit: SHARDS_PER_PEER });
                    }
                    named.insert(by.as_str(), count + 1)?;
                }
                let highest = stored.map_or(fence, |(epoch, term)| fence.max(Fence::new(epoch, term)));
                fences.insert(name.as_str(), (highest.epoch, highest.term))?;
                Ok(highest)
            })
            .await
    }
}
