//! All transfers of a node, incoming and outgoing: the one registry that `GetTransferProgress`, `WatchTransferProgress`
//! and `ListTransfers` answer from.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use prost::Message as _;
use proto_common::ids::TransferId;
use proto_common::registry::{Registry, RegistryLimits};
#[cfg(feature = "server")]
use proto_common::v1::Direction;
use tokio_util::sync::CancellationToken;

use crate::limits::Limits;
use crate::v1::{PhaseStart, TransferPhase, TransferProgress};
use proto_common::clock::now_unix_ms;

/// Transfers in one page of a list; a page of that many stays well below the largest message.
const MAX_PAGE: usize = 1000;

/// Phases that a progress remembers.
const MAX_PHASES: usize = 32;

/// Keeps finished transfers across restarts; the receiver's store is one.
pub trait HistorySink: Send + Sync + 'static {
    /// Makes `record` durable. A failure is the sink's to log: the transfer itself has ended.
    fn record(&self, record: Vec<u8>) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// All transfers of a node; cheap to clone. Give `SnapshotReceiver::transfers` to the
/// node's senders, and its service answers for both directions.
#[derive(Clone)]
pub struct Transfers {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry<TransferProgress>,
    outgoing: Mutex<HashMap<TransferId, Outgoing>>,
    sink: OnceLock<Arc<dyn HistorySink>>,
}

struct Outgoing {
    cancel: CancellationToken,
    /// It was cancelled, and its receiver says that it is too late for that.
    too_late: bool,
}

impl std::fmt::Debug for Transfers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transfers").finish_non_exhaustive()
    }
}

impl Default for Transfers {
    fn default() -> Self {
        Self::new(&Limits::default())
    }
}

impl Transfers {
    /// None yet; finished ones are remembered as `limits` say.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let registry = Registry::new(RegistryLimits {
            finished: limits.history,
            watchers: limits.watchers,
            watchers_per_peer: limits.watchers_per_peer,
            page: MAX_PAGE,
            // What is staged here, connected or not, takes no place of what this node sends.
            active: limits.staged.saturating_add(RegistryLimits::default().active),
            ..RegistryLimits::default()
        });
        Self { inner: Arc::new(Inner { registry, outgoing: Mutex::default(), sink: OnceLock::new() }) }
    }

    /// The registry behind it.
    #[must_use]
    pub fn registry(&self) -> &Registry<TransferProgress> {
        &self.inner.registry
    }

    /// Reads finished transfers of an earlier process, oldest first, and keeps new ones in `sink`.
    /// Records that do not decode are left out.
    #[cfg(feature = "server")]
    pub(crate) fn persist_in(&self, finished: &[Vec<u8>], sink: Arc<dyn HistorySink>) {
        let seed = finished.iter().filter_map(|record| {
            let transfer = TransferProgress::decode(record.as_slice()).ok()?;
            Some((direction(&transfer), transfer.transfer_id.clone(), transfer))
        });
        self.inner.registry.seed(seed);
        // A second receiver on the same registry would be a second home of the history: the first stays it.
        let _ = self.inner.sink.set(sink);
    }

    /// Makes a finished transfer durable, where there is a sink.
    pub(crate) async fn record(&self, transfer: &TransferProgress) {
        if let Some(sink) = self.inner.sink.get() {
            sink.record(transfer.encode_to_vec()).await;
        }
    }

    fn outgoing(&self) -> MutexGuard<'_, HashMap<TransferId, Outgoing>> {
        self.inner.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `CancelTransfer` reach an outgoing transfer.
    #[cfg(feature = "client")]
    pub(crate) fn register_outgoing(&self, id: &TransferId, cancel: CancellationToken) {
        self.outgoing().insert(id.clone(), Outgoing { cancel, too_late: false });
    }

    /// The outgoing transfer that was registered with `cancel` has ended; another may have its ID by now.
    #[cfg(feature = "client")]
    pub(crate) fn forget_outgoing(&self, id: &TransferId, cancel: &CancellationToken) {
        let mut outgoing = self.outgoing();
        if outgoing.get(id).is_some_and(|known| known.cancel == *cancel) {
            outgoing.remove(id);
        }
    }

    /// The receiver of the transfer that was registered with `cancel` does not let it be cancelled any more.
    #[cfg(feature = "client")]
    pub(crate) fn is_too_late(&self, id: &TransferId, cancel: &CancellationToken) {
        if let Some(known) = self.outgoing().get_mut(id).filter(|known| known.cancel == *cancel) {
            known.too_late = true;
        }
    }

    /// Asks an outgoing transfer that runs to stop, as `CancelTransfer` does, without waiting for what comes of it. Whether there is one.
    pub fn cancel(&self, id: &TransferId) -> bool {
        self.outgoing().get(id).inspect(|known| known.cancel.cancel()).is_some()
    }

    /// Whether an outgoing transfer goes on although it was cancelled, since its receiver says that it is too late for that.
    #[must_use]
    pub fn cannot_be_cancelled(&self, id: &TransferId) -> bool {
        self.outgoing().get(id).is_some_and(|known| known.too_late)
    }

    /// The switch of an outgoing transfer that runs.
    #[cfg(feature = "server")]
    pub(crate) fn outgoing_cancel(&self, id: &TransferId) -> Option<CancellationToken> {
        self.outgoing().get(id).map(|known| known.cancel.clone())
    }
}

/// The direction of a transfer, as the registry keys it.
#[cfg(feature = "server")]
fn direction(transfer: &TransferProgress) -> Direction {
    let direction = transfer.progress.as_ref().map(proto_common::v1::Progress::direction);
    if direction == Some(Direction::Out) { Direction::Out } else { Direction::In }
}

impl TransferPhase {
    /// The phase as people write it: `INSTALLED`.
    #[must_use]
    pub fn short_name(self) -> &'static str {
        self.as_str_name().trim_start_matches("TRANSFER_PHASE_")
    }
}

impl TransferProgress {
    /// Whether the transfer has ended: nothing about it changes any more.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.progress.as_ref().is_some_and(|progress| progress.finished_unix_ms.is_some())
    }

    /// Enters a phase, now.
    pub(crate) fn enter(&mut self, phase: TransferPhase) {
        let now = now_unix_ms();
        if self.phase() != phase {
            self.set_phase(phase);
            if self.phases.len() == MAX_PHASES {
                self.phases.remove(0);
            }
            self.phases.push(PhaseStart { phase: phase.into(), started_unix_ms: now });
            self.progress.get_or_insert_default().phase_started_unix_ms = now;
        }
        self.progress.get_or_insert_default().last_activity_unix_ms = now;
    }

    /// Enters a phase that nothing follows.
    pub(crate) fn finish(&mut self, phase: TransferPhase) {
        self.enter(phase);
        self.expires_unix_ms = None;
        let progress = self.progress.get_or_insert_default();
        progress.finished_unix_ms = Some(now_unix_ms());
        progress.bytes_per_second = None;
        progress.eta_ms = None;
    }
}

#[cfg(all(test, feature = "client", feature = "server"))]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_transfer_leaves_the_switch_of_the_next_one_alone() {
        let (transfers, id) = (Transfers::default(), TransferId::new("t").unwrap());
        let (first, second) = (CancellationToken::new(), CancellationToken::new());
        transfers.register_outgoing(&id, first.clone());
        transfers.register_outgoing(&id, second.clone());
        transfers.forget_outgoing(&id, &first);
        assert!(transfers.outgoing_cancel(&id) == Some(second.clone()));
        transfers.forget_outgoing(&id, &second);
        assert!(transfers.outgoing_cancel(&id).is_none());
    }
}
