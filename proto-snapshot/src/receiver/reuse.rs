//! How much a source node has filled from installed files: a few bytes that it says have as much read, hashed and written as it likes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use proto_common::ids::NodeId;
use tokio::time::Instant;

/// Time in which a node has its share again.
const WHOLE: Duration = Duration::from_secs(600);
/// Time after which it has that in any case, whatever it had filled.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// What each source node has used up of its share.
#[derive(Debug)]
pub(super) struct Reuses {
    /// Bytes in [`WHOLE`].
    share: u64,
    /// Nodes that have used up nothing are not in it.
    used: Mutex<HashMap<NodeId, Used>>,
}

#[derive(Debug)]
struct Used {
    /// When it will have used up nothing.
    until: Instant,
    /// The transfer that began to be filled when the node had used up nothing.
    whole: Weak<Ticket>,
}

/// A file that is looked for, and up to when its node's share was used up before.
#[derive(Debug)]
pub(super) struct Begun(Instant);

/// Tells one transfer from all others.
#[derive(Debug)]
pub(super) struct Ticket(());

impl Ticket {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(()))
    }
}

impl Reuses {
    pub(super) fn new(share: u64) -> Self {
        Self { share: share.max(1), used: Mutex::default() }
    }

    fn used(&self) -> MutexGuard<'_, HashMap<NodeId, Used>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long it takes until `bytes` are used up no more.
    fn time(&self, bytes: u64) -> Duration {
        let nanos = WHOLE.as_nanos().saturating_mul(u128::from(bytes)) / u128::from(self.share);
        u64::try_from(nanos).map_or(LONGEST, Duration::from_nanos).min(LONGEST)
    }

    /// Whether a file of `bytes` may be filled for `ticket`, a transfer of `node`: one that begins when the node has used up nothing has all of its files filled, however large
    /// they are; others, as far as the share of the node goes.
    pub(super) fn allows(&self, node: &NodeId, ticket: &Arc<Ticket>, bytes: u64) -> bool {
        let used = self.used();
        let Some(of_node) = used.get(node) else { return true };
        let left = of_node.until.saturating_duration_since(Instant::now());
        let is_whole = std::ptr::eq(of_node.whole.as_ptr(), Arc::as_ptr(ticket));
        left.is_zero() || is_whole || left.saturating_add(self.time(bytes)) <= WHOLE
    }

    /// Uses up `bytes`, if that is [allowed](Self::allows).
    pub(super) fn begin(&self, node: &NodeId, ticket: &Arc<Ticket>, bytes: u64) -> Option<Begun> {
        if !self.allows(node, ticket, bytes) {
            return None;
        }
        let now = Instant::now();
        let mut used = self.used();
        used.retain(|_, used| used.until > now);
        let of_node =
            used.entry(node.clone()).or_insert_with(|| Used { until: now, whole: Arc::downgrade(ticket) });
        let before = of_node.until;
        of_node.until = before.checked_add(self.time(bytes)).unwrap_or(now).min(now + LONGEST);
        Some(Begun(before))
    }

    /// Gives back what `begun` took, of which no more than one is under way for a node: there was no such file.
    pub(super) fn found_nothing(&self, node: &NodeId, begun: &Begun) {
        if let Some(of_node) = self.used().get_mut(node) {
            of_node.until = begun.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[tokio::test(start_paused = true)]
    async fn a_node_has_one_snapshot_filled_and_then_its_share() {
        let reuses = Reuses::new(8 * GIB);
        let (node, other) = (NodeId::new("n9").unwrap(), NodeId::new("n1").unwrap());
        let (first, second) = (Ticket::new(), Ticket::new());
        let begins = |node: &NodeId, ticket: &Arc<Ticket>, bytes| reuses.begin(node, ticket, bytes).is_some();
        // What is not there costs nothing.
        for bytes in [GIB, u64::MAX, 7] {
            let begun = reuses.begin(&node, &second, bytes).unwrap();
            reuses.found_nothing(&node, &begun);
        }
        for _ in 0..3 {
            assert!(begins(&node, &first, 10 * GIB), "all of its files");
        }
        assert!(!begins(&node, &second, 1), "another one, or the same that begins anew");
        // Nor does it pay anything back.
        let begun = reuses.begin(&node, &first, u64::MAX).unwrap();
        reuses.found_nothing(&node, &begun);
        assert!(!begins(&node, &second, 1));
        assert!(begins(&other, &second, 1), "each node has its own");
        // 30 GiB take 37.5 minutes.
        tokio::time::advance(WHOLE * 3).await;
        assert!(begins(&node, &second, GIB) && !begins(&node, &second, 2 * GIB));
        tokio::time::advance(WHOLE).await;
        assert!(begins(&node, &second, 100 * GIB), "it has used up nothing");
        assert!(!begins(&node, &first, 1));
        assert!(begins(&node, &second, u64::MAX));
        tokio::time::advance(LONGEST).await;
        assert!(begins(&node, &first, 1), "that is over");
        assert_eq!(reuses.used().len(), 1, "others are forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn small_files_of_many_transfers_use_up_the_share() {
        let reuses = Reuses::new(1000);
        let node = NodeId::new("n9").unwrap();
        let filled = |_| reuses.begin(&node, &Ticket::new(), 10).is_some();
        assert_eq!((0..1000).filter(|number| filled(*number)).count(), 100);
    }
}
