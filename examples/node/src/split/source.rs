//! The snapshot file as it is sent: its last piece leaves only when nobody reads the slots here any more.
//!
//! Without that piece the target cannot take over. So from the moment that it could serve the slots, this node does not,
//! not even reads: nobody sees a value here that is older than one that the target has acknowledged.

use std::sync::Arc;

use futures::StreamExt as _;
use proto::snapshot::source::{Description, FileSource, PieceStream, SnapshotSource, SourceError};
use tokio::sync::Mutex;

use crate::common::SlotRange;
use crate::gate::{Gate, GateHold, HoldMode};

/// Holds reads, once.
#[derive(Debug)]
pub(super) struct Closing {
    gate: Gate,
    range: SlotRange,
    hold: Mutex<Option<GateHold>>,
}

impl Closing {
    pub(super) fn new(gate: Gate, range: SlotRange) -> Arc<Self> {
        Arc::new(Self { gate, range, hold: Mutex::new(None) })
    }

    /// Returns when reads and writes of the slots wait, and none is under way.
    pub(super) async fn close(&self) {
        let mut hold = self.hold.lock().await;
        if hold.is_none() {
            *hold = Some(self.gate.hold(self.range, HoldMode::All).await);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct ClosingSource {
    file: FileSource,
    bytes: u64,
    closing: Arc<Closing>,
}

impl ClosingSource {
    /// `bytes` is the size of the file.
    pub(super) fn new(file: FileSource, bytes: u64, closing: Arc<Closing>) -> Self {
        Self { file, bytes, closing }
    }
}

impl SnapshotSource for ClosingSource {
    async fn describe(&self, digests: bool) -> Result<Description, SourceError> {
        self.file.describe(digests).await
    }

    async fn open(
        &self,
        file: u32,
        offset: u64,
        len: Option<u64>,
        piece: usize,
    ) -> Result<PieceStream, SourceError> {
        let pieces = self.file.open(file, offset, len, piece).await?;
        let (closing, bytes) = (Arc::clone(&self.closing), self.bytes);
        let mut at = offset;
        let pieces = pieces.then(move |piece| {
            if let Ok(piece) = &piece {
                at = at.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
            }
            let closing = (at >= bytes).then(|| Arc::clone(&closing));
            async move {
                if let Some(closing) = closing {
                    closing.close().await;
                }
                piece
            }
        });
        Ok(Box::pin(pieces))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::common::NodeId;
    use crate::gate::{Access, Verdict};
    use crate::store::{Claim, Ownership};

    #[tokio::test]
    async fn reads_wait_before_the_last_piece_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [7; 25]).unwrap();
        let me = NodeId::new("n1").unwrap();
        let mut ownership = Ownership::default();
        ownership.adopt(&Claim { range: SlotRange::FULL, owner: me.clone(), epoch: 1 });
        let gate = Gate::new(me, ownership, 1);
        let source =
            ClosingSource::new(FileSource::new(&path), 25, Closing::new(gate.clone(), SlotRange::FULL));
        source.describe(false).await.unwrap();

        let mut reading = gate.permits(Access::Read);
        assert_eq!(reading.enter(5), Verdict::Pass);
        let mut pieces = source.open(0, 0, None, 10).await.unwrap();
        for _ in 0..2 {
            assert_eq!(pieces.next().await.unwrap().unwrap().len(), 10);
        }
        assert_eq!(gate.verdict(5, Access::Read), Verdict::Pass);
        // The read that is under way keeps the last piece back.
        tokio::time::timeout(Duration::from_millis(50), pieces.next()).await.unwrap_err();
        assert_eq!(gate.verdict(5, Access::Read), Verdict::Held);
        drop(reading);
        assert_eq!(pieces.next().await.unwrap().unwrap().len(), 5);
        assert!(pieces.next().await.is_none());
        assert_eq!(gate.verdict(5, Access::Read), Verdict::Held);
    }
}
