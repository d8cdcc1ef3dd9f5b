//! The sending side: pushes a snapshot to a receiver, through any number of broken connections.
//!
//! | question | where |
//! |---|---|
//! | when is it tried again, when is it given up? | `sender/task.rs`, `sender/patience.rs` |
//! | what goes over the wire, in which order? | `sender/control.rs`, `sender/lane.rs`, `sender/stream.rs` |
//! | what is believed of the receiver's wishes? | `sender/missing.rs` |
//! | who sends which bytes, and with which checksums? | `sender/work.rs`, `sender/pump.rs`, `sender/checksums.rs` |
//! | what do others see of it? | `sender/shown.rs` |

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use proto_common::connect::Connect;
use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::rate::RateLimiter;
use proto_common::registry::Watch;
use proto_common::retry::Backoff;
use proto_common::slots::SlotRange;
use proto_common::v1::{Direction, Priority};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

mod checksums;
mod control;
mod lane;
mod missing;
mod patience;
mod pump;
mod shown;
mod stream;
mod task;
mod work;

use crate::reason::Reason;
use crate::source::SnapshotSource;
use crate::spec::SnapshotPoint;
use crate::transfers::Transfers;
use crate::v1::TransferProgress;
pub use crate::v1::transfer_split_snapshot_response::Installed;

/// Sends snapshots to one receiver. Cheap to clone.
///
/// It needs new connections, so it takes a factory of them: with the feature `channel`,
/// `SnapshotSender::connect` makes one from an address.
#[derive(Debug)]
pub struct SnapshotSender<C: Connect> {
    connect: Arc<C>,
    options: SenderOptions,
    transfers: Transfers,
}

impl<C: Connect> Clone for SnapshotSender<C> {
    fn clone(&self) -> Self {
        Self {
            connect: Arc::clone(&self.connect),
            options: self.options.clone(),
            transfers: self.transfers.clone(),
        }
    }
}

/// How a sender works. The defaults are right for most.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SenderOptions {
    /// Streams, each on its own connection; the receiver may allow fewer. 0, the default, leaves the choice to the sender: one for every four cores and
    /// every 256 MiB that there are, 1 to 4. More are for where one connection is what limits, such as a long path.
    pub lanes: u32,
    /// Payload bytes per second at most, over all lanes. Default: what the receiver asks for.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Compute BLAKE3 digests before sending, so that the receiver can reuse files that it has. Reads
    /// everything once more. Default: no.
    pub digests: bool,
    /// Pauses between attempts to connect.
    pub backoff: Backoff,
    /// Time spent failing since the last progress after which a retryable error becomes final. Default 5 min; `None`: never.
    ///
    /// It counts from a failure to the next sign of life: while the source is read, or the receiver prepares, takes bytes or
    /// installs, it stands still. Bytes that become durable for the first time set it to 0.
    pub give_up_after: Option<Duration>,
    /// The receiver's [`store_id`](proto_common::v1::NodeIdentity::store_id): another one is refused with `WRONG_NODE` before any byte
    /// is sent. For a caller who must not mistake a node that came back with an empty disk for the one that it began with. Default: any.
    pub target_store: Option<bytes::Bytes>,
}

/// Streams where nobody asks for a number, at most; [`automatic_lanes`] takes fewer where there are few cores.
///
/// One connection moves what one core at each end can push through a socket, 30 Gbit/s on the machine where this was measured, and with
/// more of them the same bytes take more of the processor: from memory to memory on loopback with 2 cores, 3.8 GiB/s and 0.43 CPU seconds per GiB at both
/// ends together with one, 3.75 and 0.49 with two, 3.7 and 0.49 with four; on another day 3.2 and 0.48, 3.2 and 0.50, 2.1 and 0.69. So on few cores there is one. Four are more
/// than 100 Gbit/s.
///
/// On a long path, the credit of a stream limits, and lanes have one each: 256 MiB moved at 461, 684 and 839 MiB/s with one, two and four lanes over 10 ms there and back, at 116,
/// 182 and 278 MiB/s over 50 ms (medians of 3, through a process that holds everything back for so long). Nodes of one store are closer to each other.
const MAX_AUTOMATIC_LANES: u64 = 4;

/// A lane keeps a core busy, and a node has other work for its cores: a quarter of them is for one transfer. With more than two cores this was not measured.
const CORES_PER_LANE: u64 = 4;

/// What one lane moves in 0.1 s, so that to connect, which takes a millisecond, is nothing beside it.
const BYTES_PER_LANE: u64 = 256 << 20;

/// Streams for a snapshot of so many bytes, where they are known, on a machine with so many cores.
fn automatic_lanes(total_bytes: Option<u64>, cores: usize) -> u32 {
    let by_cores = u64::try_from(cores).unwrap_or(u64::MAX) / CORES_PER_LANE;
    let lanes = by_cores.min(total_bytes.unwrap_or(0) / BYTES_PER_LANE);
    u32::try_from(lanes.clamp(1, MAX_AUTOMATIC_LANES)).unwrap_or(1)
}

impl SenderOptions {
    fn streams(&self, total_bytes: Option<u64>) -> u32 {
        match self.lanes {
            0 => automatic_lanes(
                total_bytes,
                std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            ),
            lanes => lanes,
        }
    }
}

impl Default for SenderOptions {
    fn default() -> Self {
        Self {
            lanes: 0,
            bytes_per_second: None,
            digests: false,
            backoff: Backoff::default(),
            give_up_after: Some(Duration::from_secs(5 * 60)),
            target_store: None,
        }
    }
}

/// What to send, and to whom it belongs. The files come from the source.
#[derive(Debug, Clone)]
pub struct SnapshotToSend {
    /// Made by the caller: the same ID with the same specification continues a transfer.
    pub transfer_id: TransferId,
    /// The shard that is split.
    pub source_shard: ShardId,
    /// The shard that the snapshot becomes.
    pub target_shard: ShardId,
    /// The node that sends.
    pub source_node: NodeId,
    /// The node that must answer; `None`: whoever does.
    pub target_node: Option<NodeId>,
    /// The slots that move.
    pub slots: SlotRange,
    /// Where in the Raft log the snapshot was taken.
    pub point: SnapshotPoint,
    /// Fence of the target shard; `None`: "current", for operators.
    pub fence: Option<Fence>,
    /// Who gets a free place first.
    pub priority: Priority,
}

/// A transfer that runs in a task of its own.
///
/// Dropping the handle stops the sending; what is durable at the receiver stays, and the same [`SnapshotToSend`] continues it. Where
/// the transfer had not ended, it is shown as `FAILED` from then on, with the retryable error `STREAM_ENDED_EARLY`; that is not
/// written to the history on disk. [`cancel`](Self::cancel) stops it and discards what is staged.
#[derive(Debug)]
pub struct TransferHandle {
    id: TransferId,
    transfers: Transfers,
    cancel: CancellationToken,
    task: Option<JoinHandle<Result<Installed, Error>>>,
}

#[cfg(feature = "channel")]
impl SnapshotSender<proto_common::dial::Dial> {
    /// A sender to `address` (`host:port` or a URI), over connections tuned for bulk. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// `INVALID_FIELD` when the address cannot be one.
    pub fn connect(address: &str) -> Result<Self, Error> {
        Ok(Self::new(proto_common::dial::Dialer::plaintext().to(address, None)?))
    }
}

impl<C: Connect> SnapshotSender<C> {
    /// A sender over the connections that `connect` makes.
    pub fn new(connect: C) -> Self {
        Self {
            connect: Arc::new(connect),
            options: SenderOptions::default(),
            transfers: Transfers::default(),
        }
    }

    /// Other options than the default ones.
    #[must_use]
    pub fn options(mut self, options: SenderOptions) -> Self {
        self.options = options;
        self
    }

    /// Shows its transfers in the node's registry, whose service then answers for them and can cancel them.
    #[must_use]
    pub fn transfers(mut self, transfers: Transfers) -> Self {
        self.transfers = transfers;
        self
    }

    /// Starts to send `source`; must be called in a tokio runtime.
    ///
    /// Retries from the durable point with growing pauses until it is installed, until an error is final
    /// ([`Error::is_retryable`] is false: a stale fence, another sender's attempt, a changed source), or until nothing has moved for
    /// [`give_up_after`](SenderOptions::give_up_after).
    ///
    /// # Errors
    ///
    /// `ALREADY_EXISTS` when this node is sending under that ID already.
    pub fn send<S: SnapshotSource>(
        &self,
        snapshot: SnapshotToSend,
        source: S,
    ) -> Result<TransferHandle, Error> {
        let id = snapshot.transfer_id.clone();
        let tracker = self.transfers.registry().insert(
            Direction::Out,
            id.as_str(),
            shown::initial_progress(&snapshot),
        )?;
        let cancel = CancellationToken::new();
        self.transfers.register_outgoing(&id, cancel.clone());
        let limiter = RateLimiter::with_rate(self.options.bytes_per_second);
        let task = task::Task::new(self.clone(), snapshot, source, tracker, limiter, cancel.clone());
        Ok(TransferHandle {
            id,
            transfers: self.transfers.clone(),
            cancel,
            task: Some(tokio::spawn(task.run())),
        })
    }
}

impl TransferHandle {
    /// The transfer's ID.
    #[must_use]
    pub fn id(&self) -> &TransferId {
        &self.id
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Option<TransferProgress> {
        self.transfers.registry().get(Some(Direction::Out), self.id.as_str())
    }

    /// Its changes, as `WatchTransferProgress` gives them.
    ///
    /// # Errors
    ///
    /// When too many watch already.
    pub fn watch(&self) -> Result<Watch<TransferProgress>, Error> {
        self.transfers.registry().watch(Some(Direction::Out), self.id.as_str())
    }

    /// Stops the transfer and has the receiver discard what is staged. [`join`](Self::join) then returns `TRANSFER_CANCELLED`, or
    /// what becomes of it where it was too late: the receiver has everything and installs it.
    ///
    /// The receiver is waited for at most 30 s; the message of the error says if it could not be told. Nothing is sent meanwhile. Keep
    /// the handle: dropping it stops the cancelling too.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Waits for the end. Cancel safe: it may be called again after its future was dropped.
    ///
    /// # Errors
    ///
    /// The error that ended the transfer.
    pub async fn join(&mut self) -> Result<Installed, Error> {
        let Some(task) = &mut self.task else {
            return Err(Reason::Internal.error("the transfer was joined before"));
        };
        let result = task.await;
        self.task = None;
        result.unwrap_or_else(|error| {
            Err(Reason::Internal.error("the sending task ended early").caused_by(error))
        })
    }
}

impl Drop for TransferHandle {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_chosen_by_size_and_cores() {
        const GIB: u64 = 1 << 30;
        for (bytes, cores, lanes) in [
            (Some(8 * GIB), 1, 1),
            (Some(8 * GIB), 2, 1),
            (Some(8 * GIB), 7, 1),
            (Some(8 * GIB), 8, 2),
            (Some(8 * GIB), 16, 4),
            (Some(u64::MAX), usize::MAX, 4),
            (Some(GIB / 2), 64, 2),
            (Some(GIB / 2 - 1), 64, 1),
            (Some(0), 64, 1),
            (None, 64, 1),
        ] {
            assert_eq!(automatic_lanes(bytes, cores), lanes, "{bytes:?} bytes, {cores} cores");
        }
        let asked = SenderOptions { lanes: 7, ..SenderOptions::default() };
        assert_eq!(asked.streams(Some(1)), 7);
    }
}
