//! What a node shares out among transfers: places, and memory for manifests.
//!
//! A free place goes to the most urgent of those who asked lately.
//!
//! A refused sender comes back by itself, so there is no queue to hold its connection: its wish is
//! remembered for as long as it may take to come back, and a place that comes free meanwhile is kept from
//! less urgent ones. No more places are kept for a node than it may have.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto_common::error::Error;
use proto_common::ids::{NodeId, TransferId};
use proto_common::path::Directories;
use proto_common::shares::{Full, Share, Shares};
use proto_common::v1::Priority;
use tokio::time::Instant;

use crate::limits::Limits;
use crate::reason::Reason;
use crate::spec::Manifest;

/// What a refused sender is told to wait.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long a wish is remembered: some times what it was told to wait, as its backoff grows.
const WISH_LIFE: Duration = Duration::from_secs(15);
/// Wishes that are remembered at most.
const MAX_WISHES: usize = 1024;

/// A fixed number of places.
#[derive(Debug, Clone)]
pub(super) struct Admission {
    inner: Arc<Mutex<Places>>,
}

#[derive(Debug)]
struct Places {
    limit: usize,
    limit_per_peer: usize,
    taken: usize,
    /// By source node; those that have none are not in it.
    by_peer: HashMap<NodeId, usize>,
    wishes: HashMap<TransferId, Wish>,
}

/// Of a transfer that was refused.
#[derive(Debug)]
struct Wish {
    peer: NodeId,
    priority: Priority,
    at: Instant,
}

/// One place; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    admission: Admission,
    peer: NodeId,
}

impl Admission {
    pub(super) fn new(limit: usize, limit_per_peer: usize) -> Self {
        let places =
            Places { limit, limit_per_peer, taken: 0, by_peer: HashMap::new(), wishes: HashMap::new() };
        Self { inner: Arc::new(Mutex::new(places)) }
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for `id` of the node `peer`, unless there is none, a more urgent one waits for it, or the node has its share.
    pub(super) fn enter(&self, id: &TransferId, peer: &NodeId, priority: Priority) -> Result<Place, Error> {
        let now = Instant::now();
        let mut places = self.lock();
        places.wishes.retain(|_, wish| now.duration_since(wish.at) < WISH_LIFE);
        // Without a wish: more places do not help it, and must not be kept for it.
        let of_peer = places.held_by(peer);
        if of_peer >= places.limit_per_peer {
            return Err(Reason::TooManyTransfers
                .error(format!(
                    "{of_peer} transfers come from node {peer} already, which is its share; try again"
                ))
                .metadata("limit", places.limit_per_peer.to_string())
                .metadata("peer", peer.as_str())
                .retry_after(RETRY_AFTER));
        }
        let ahead = places.ahead_of(id, priority);
        if places.taken + ahead < places.limit {
            places.wishes.remove(id);
            places.taken += 1;
            *places.by_peer.entry(peer.clone()).or_default() += 1;
            return Ok(Place { admission: self.clone(), peer: peer.clone() });
        }
        places.remember(id, Wish { peer: peer.clone(), priority, at: now });
        Err(Reason::TooManyTransfers
            .error(format!(
                "{} of {} places are taken and {ahead} more urgent transfers wait; try again",
                places.taken, places.limit
            ))
            .metadata("limit", places.limit.to_string())
            .retry_after(RETRY_AFTER))
    }
}

impl Places {
    fn held_by(&self, peer: &NodeId) -> usize {
        self.by_peer.get(peer).copied().unwrap_or(0)
    }

    /// Places that are kept for more urgent transfers than `id`.
    fn ahead_of(&self, id: &TransferId, priority: Priority) -> usize {
        let mut by_peer: HashMap<&NodeId, usize> = HashMap::new();
        for (other, wish) in &self.wishes {
            if other != id && wish.priority > priority {
                *by_peer.entry(&wish.peer).or_default() += 1;
            }
        }
        let kept = |(peer, wishes): (&NodeId, usize)| {
            wishes.min(self.limit_per_peer.saturating_sub(self.held_by(peer)))
        };
        by_peer.into_iter().map(kept).sum()
    }

    /// Remembers a wish. Of one node, as many as it may have places, the most urgent ones: it leaves room for those of others.
    fn remember(&mut self, id: &TransferId, wish: Wish) {
        if !self.wishes.contains_key(id) {
            let of_peer = || self.wishes.iter().filter(|(_, other)| other.peer == wish.peer);
            if of_peer().count() >= self.limit_per_peer {
                let least = of_peer().min_by_key(|(_, other)| other.priority);
                let least = least.filter(|(_, other)| other.priority < wish.priority);
                let Some(least) = least.map(|(id, _)| id.clone()) else { return };
                self.wishes.remove(&least);
            }
            if self.wishes.len() >= MAX_WISHES {
                return;
            }
        }
        self.wishes.insert(id.clone(), wish);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.admission.lock();
        places.taken = places.taken.saturating_sub(1);
        if let Some(of_peer) = places.by_peer.get_mut(&self.peer) {
            *of_peer -= 1;
            if *of_peer == 0 {
                places.by_peer.remove(&self.peer);
            }
        }
    }
}

/// The memory for manifests, shared out by what headers declare.
#[derive(Debug, Clone)]
pub(super) struct Manifests {
    shares: Shares<NodeId>,
    /// Of the pieces that a transfer may come in.
    pieces: u64,
}

/// Memory of one manifest, for all who hold it; given back when the last drops it.
pub(super) type Charge = Arc<Share<NodeId>>;

impl Manifests {
    /// Name, size, digest and the books of one file, without the bytes of its name: a generous estimate. A directory is no less: the store
    /// knows its path as made, and for a while as not synced.
    const FILE_BYTES: u64 = 512;
    /// A piece beside the one of its file, in each of the books: what is claimed, written, durable, recorded, and left by an earlier process.
    const PIECE_BYTES: u64 = 256;

    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            shares: Shares::new(limits.manifest_memory_bytes, limits.manifest_memory_per_peer),
            pieces: (limits.extents as u64).saturating_mul(Self::PIECE_BYTES),
        }
    }

    fn cost(files: u64, name_bytes: u64) -> u64 {
        files.saturating_mul(Self::FILE_BYTES).saturating_add(name_bytes.saturating_mul(2))
    }

    fn cost_of_directories(manifest: &Manifest) -> u64 {
        let Directories { count, name_bytes } = manifest.directories();
        Self::cost(count, name_bytes)
    }

    /// Charges for a manifest of the node `peer` before it is read, and for all pieces that its files may come in: they come later, and stay for as long. The only one of a node, and the only one of all, is taken whatever the limit.
    pub(super) fn charge(&self, peer: &NodeId, files: u64, name_bytes: u64) -> Result<Share<NodeId>, Error> {
        let cost = Self::cost(files, name_bytes).saturating_add(self.pieces);
        let taken = self.shares.take_first(Some(peer), cost);
        taken.map_err(|full| refused(peer, full))
    }

    /// Charges for its directories as well, which no header declares.
    pub(super) fn charge_directories(
        &self,
        mut share: Share<NodeId>,
        peer: &NodeId,
        manifest: &Manifest,
    ) -> Result<Charge, Error> {
        let grown = self.shares.grow_first(&mut share, Self::cost_of_directories(manifest));
        grown.map(|()| Arc::new(share)).map_err(|full| refused(peer, full))
    }

    /// Charges for one that is in memory already.
    pub(super) fn take(&self, peer: &NodeId, manifest: &Manifest) -> Charge {
        let cost = Self::cost(manifest.file_count(), manifest.name_bytes());
        let cost = cost.saturating_add(Self::cost_of_directories(manifest)).saturating_add(self.pieces);
        Arc::new(self.shares.adopt(Some(peer), cost))
    }
}

/// There is no memory for a manifest of the node `peer`.
fn refused(peer: &NodeId, full: Full) -> Error {
    let message = match full {
        Full::All { .. } => {
            "the manifests of the transfers that are staged here fill the memory set aside for them; try again later"
                .to_owned()
        }
        Full::Peer { .. } => format!(
            "the manifests of the transfers of node {peer} that are staged here fill its share of the memory set aside for them; cancel some, or try again later"
        ),
    };
    let refused = Reason::TooManyTransfers
        .error(message)
        .metadata("limit", full.limit().to_string())
        .retry_after(Duration::from_secs(10));
    match full {
        Full::All { .. } => refused,
        Full::Peer { .. } => refused.metadata("peer", peer.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn enter(places: &Admission, id: &str, peer: &str, priority: Priority) -> Option<Place> {
        places.enter(&TransferId::new(id).unwrap(), &node(peer), priority).ok()
    }

    #[test]
    fn the_wishes_of_one_node_keep_no_more_places_than_it_may_have() {
        let places = Admission::new(4, 2);
        let held = ["a1", "a2", "b1", "b2"].map(|id| enter(&places, id, &id[..1], Priority::Split).unwrap());
        // More urgent than all others, and more than it gets.
        for number in 0..10 {
            assert!(enter(&places, &format!("g{number}"), "g", Priority::Recovery).is_none());
        }
        drop(held);
        let _first = enter(&places, "c1", "c", Priority::Rebalance).expect("two places are kept, not ten");
        let _second = enter(&places, "c2", "c", Priority::Rebalance).expect("two are free");
        assert!(enter(&places, "d1", "d", Priority::Rebalance).is_none(), "two are kept");
        let _third = enter(&places, "g1", "g", Priority::Recovery).expect("one of them");
        assert!(enter(&places, "d1", "d", Priority::Rebalance).is_none(), "one is kept");
        let _fourth = enter(&places, "g7", "g", Priority::Recovery).expect("the other");
        // It has its share now, so nothing is kept for it.
        assert_eq!(places.lock().ahead_of(&TransferId::new("d1").unwrap(), Priority::Rebalance), 0);
    }

    #[test]
    fn the_wishes_of_one_node_leave_room_for_those_of_others_and_the_most_urgent_stay() {
        let places = Admission::new(2, 1);
        let _held = ["a", "b"].map(|id| enter(&places, id, id, Priority::Split).unwrap());
        for number in 0..2 * MAX_WISHES {
            assert!(enter(&places, &format!("g{number}"), "g", Priority::Rebalance).is_none());
        }
        assert!(enter(&places, "urgent", "g", Priority::Recovery).is_none());
        assert!(enter(&places, "h", "h", Priority::Split).is_none());
        let mut wishes: Vec<_> = places.lock().wishes.keys().map(ToString::to_string).collect();
        wishes.sort_unstable();
        assert_eq!(wishes, ["h", "urgent"]);
    }
}
