//! The highest fence that was seen of each shard.

use proto::common::fence::Fence;
use proto::common::ids::ShardId;
use redb::{ReadableDatabase as _, ReadableTable as _};

use super::{Store, StoreError, tables};

impl Store {
    /// Remembers `fence` for `shard`, durably, if it is the highest. Returns the highest.
    pub(crate) async fn raise_fence(&self, shard: &ShardId, fence: Fence) -> Result<Fence, StoreError> {
        let name = shard.clone();
        let stored = self
            .blocking(move |shared| {
                let fences = shared.database.begin_read()?.open_table(tables::FENCES)?;
                Ok(fences.get(name.as_str())?.map(|stored| stored.value()))
            })
            .await?;
        let stored = stored.map(|(epoch, term)| Fence::new(epoch, term));
        if let Some(stored) = stored.filter(|stored| *stored >= fence) {
            return Ok(stored);
        }
        let name = shard.clone();
        self.writer()?
            .transact(move |txn, _| {
                let mut fences = txn.open_table(tables::FENCES)?;
                let stored = fences.get(name.as_str())?.map(|stored| stored.value());
                let highest = stored.map_or(fence, |(epoch, term)| fence.max(Fence::new(epoch, term)));
                fences.insert(name.as_str(), (highest.epoch, highest.term))?;
                Ok(highest)
            })
            .await
    }
}
