//! How many migrations come in at the same time, and who gets a free place first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto_common::error::Error;
use proto_common::ids::{MigrationId, NodeId};
use proto_common::v1::Priority;

use crate::Reason;

/// How long a place is kept for one that was told to come back; longer than the longest backoff of a source.
const REMEMBERED: Duration = Duration::from_secs(15);
/// What one that was refused is told to wait.
pub(super) const COME_BACK: Duration = Duration::from_secs(1);
/// Refused ones that are remembered.
const MAX_WAITING: usize = 1024;

/// The places of a node. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Places {
    limit: usize,
    /// Of one source node.
    share: usize,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    taken: usize,
    /// Of them, by source node.
    of_peer: HashMap<NodeId, usize>,
    waiting: HashMap<MigrationId, Waiting>,
}

/// One that was refused.
#[derive(Debug)]
struct Waiting {
    source: NodeId,
    priority: Priority,
    since: Instant,
}

impl Shared {
    /// Places that are kept for more urgent ones than `id`: for each node, no more than it may have.
    fn ahead_of(&self, id: &MigrationId, priority: Priority, share: usize) -> usize {
        let mut wanted: HashMap<&NodeId, usize> = HashMap::new();
        for (other, waiting) in &self.waiting {
            if other != id && waiting.priority > priority {
                *wanted.entry(&waiting.source).or_default() += 1;
            }
        }
        let has = |source| self.of_peer.get(source).copied().unwrap_or(0);
        wanted.into_iter().map(|(source, wanted)| wanted.min(share.saturating_sub(has(source)))).sum()
    }

    /// Remembers one that was refused: of a node, as many as it may have places, the most urgent ones.
    fn remember(&mut self, id: &MigrationId, waiting: Waiting, share: usize) {
        if !self.waiting.contains_key(id) {
            let of_source = || self.waiting.iter().filter(|(_, other)| other.source == waiting.source);
            if of_source().count() >= share {
                let least = of_source().min_by_key(|(_, other)| other.priority);
                let least = least.filter(|(_, other)| other.priority < waiting.priority);
                let Some(least) = least.map(|(id, _)| id.clone()) else { return };
                self.waiting.remove(&least);
            }
            if self.waiting.len() >= MAX_WAITING {
                return;
            }
        }
        self.waiting.insert(id.clone(), waiting);
    }
}

/// A place, until dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    source: NodeId,
}

impl Places {
    pub(super) fn new(limit: usize, share: usize) -> Self {
        Self { limit, share, shared: Arc::default() }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for one that is there already, whether one is free or not.
    pub(super) fn take(&self, source: &NodeId) -> Place {
        self.place(&mut self.shared(), source)
    }

    fn place(&self, shared: &mut Shared, source: &NodeId) -> Place {
        shared.taken += 1;
        *shared.of_peer.entry(source.clone()).or_default() += 1;
        Place { places: self.clone(), source: source.clone() }
    }

    /// Takes a free place, unless those that are free are kept for others of a higher priority that were refused a short time ago.
    pub(super) fn enter(
        &self,
        id: &MigrationId,
        source: &NodeId,
        priority: Priority,
    ) -> Result<Place, Error> {
        let now = Instant::now();
        let mut shared = self.shared();
        shared.waiting.retain(|_, waiting| now.saturating_duration_since(waiting.since) < REMEMBERED);
        let of_peer = shared.of_peer.get(source).copied().unwrap_or(0);
        if of_peer >= self.share {
            return Err(Reason::TooManyMigrations
                .error(format!(
                    "no place is free for migration {id}: the {of_peer} that node {source} has are its share; it is tried again"
                ))
                .metadata("limit", self.share.to_string())
                .metadata("peer", source.as_str())
                .retry_after(COME_BACK));
        }
        let free = self.limit.saturating_sub(shared.taken);
        if shared.ahead_of(id, priority, self.share) < free {
            shared.waiting.remove(id);
            return Ok(self.place(&mut shared, source));
        }
        shared.remember(id, Waiting { source: source.clone(), priority, since: now }, self.share);
        Err(Reason::TooManyMigrations
            .error(format!(
                "no place is free for migration {id}: {} of {} are taken; it is tried again",
                shared.taken, self.limit
            ))
            .metadata("limit", self.limit.to_string())
            .retry_after(COME_BACK))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut shared = self.places.shared();
        shared.taken = shared.taken.saturating_sub(1);
        if let Some(of_peer) = shared.of_peer.get_mut(&self.source) {
            *of_peer -= 1;
            if *of_peer == 0 {
                shared.of_peer.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_place_is_kept_for_whoever_needs_it_more() {
        let places = Places::new(1, 2);
        let n1 = NodeId::new("n1").unwrap();
        let id = |text| MigrationId::new(text).unwrap();
        let first = places.enter(&id("a"), &n1, Priority::Rebalance).unwrap();
        let refused = places.enter(&id("b"), &n1, Priority::Recovery).unwrap_err();
        assert_eq!(refused.reason(), "TOO_MANY_MIGRATIONS");
        assert!(refused.is_retryable());
        drop(first);
        assert!(places.enter(&id("c"), &n1, Priority::Rebalance).is_err());
        let second = places.enter(&id("b"), &n1, Priority::Recovery).unwrap();
        drop(second);
        assert!(places.enter(&id("c"), &n1, Priority::Rebalance).is_ok());
    }

    #[test]
    fn a_node_gets_its_share_and_leaves_the_rest_to_others() {
        let places = Places::new(3, 2);
        let node = |text: &str| NodeId::new(text).unwrap();
        let enter = |id: &str, source: &str| {
            places.enter(&MigrationId::new(id).unwrap(), &node(source), Priority::Rebalance)
        };
        let first = enter("a", "n1").unwrap();
        // One that was there before the start counts, too.
        let _second = places.take(&node("n1"));
        let refused = enter("c", "n1").unwrap_err();
        assert_eq!((refused.get("limit"), refused.get("peer")), (Some("2"), Some("n1")));
        // A refusal of its share keeps no place from others.
        let _third = enter("d", "n2").unwrap();
        drop(first);
        let _fourth = enter("c", "n1").unwrap();
        assert_eq!(enter("e", "n3").unwrap_err().get("limit"), Some("3"));
    }

    #[test]
    fn whoever_asks_for_much_keeps_no_more_places_from_others_than_it_may_have() {
        let places = Places::new(4, 2);
        let node = |text: &str| NodeId::new(text).unwrap();
        let enter = |id: &str, source: &str, priority| {
            places.enter(&MigrationId::new(id).unwrap(), &node(source), priority).ok()
        };
        let held = ["a1", "a2", "b1", "b2"].map(|id| enter(id, &id[..1], Priority::Rebalance).unwrap());
        for number in 0..2 * MAX_WAITING {
            assert!(enter(&format!("g{number}"), "g", Priority::Rebalance).is_none());
            assert!(enter(&format!("h{number}"), "g", Priority::Recovery).is_none());
        }
        assert!(enter("d1", "d", Priority::Split).is_none(), "it is remembered, too");
        drop(held);
        let _first = enter("c1", "c", Priority::Split).expect("two of four are kept");
        let _second = enter("d1", "d", Priority::Split).expect("and one is free");
        assert!(enter("c2", "c", Priority::Split).is_none());
        let _third = enter("h0", "g", Priority::Recovery).expect("the first ones are remembered");
        assert!(enter("c2", "c", Priority::Split).is_none());
        let _fourth = enter("h1", "g", Priority::Recovery).expect("its share");
    }
}
