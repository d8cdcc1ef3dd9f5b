//! What a node shares out among transfers: places, and memory for manifests.
//!
//! A free place goes to the most urgent of those who asked lately.
//!
//! A refused sender comes back by itself, so there is no queue to hold its connection: its wish is
//! remembered for as long as it may take to come back, and a place that comes free meanwhile is kept from
//! less urgent ones.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto_common::error::Error;
use proto_common::ids::{NodeId, TransferId};
use proto_common::v1::Priority;
use tokio::time::Instant;

use crate::reason::Reason;

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
    wishes: HashMap<TransferId, (Priority, Instant)>,
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
        places.wishes.retain(|_, (_, at)| now.duration_since(*at) < WISH_LIFE);
        // Without a wish: more places do not help it, and must not be kept for it.
        let of_peer = places.by_peer.get(peer).copied().unwrap_or(0);
        if of_peer >= places.limit_per_peer {
            return Err(Reason::TooManyTransfers
                .error(format!(
                    "{of_peer} transfers come from node {peer} already, which is its share; try again"
                ))
                .metadata("limit", places.limit_per_peer.to_string())
                .metadata("peer", peer.as_str())
                .retry_after(RETRY_AFTER));
        }
        let ahead =
            places.wishes.iter().filter(|(other, (wish, _))| *other != id && *wish > priority).count();
        if places.taken + ahead < places.limit {
            places.wishes.remove(id);
            places.taken += 1;
            *places.by_peer.entry(peer.clone()).or_default() += 1;
            return Ok(Place { admission: self.clone(), peer: peer.clone() });
        }
        if places.wishes.len() < MAX_WISHES || places.wishes.contains_key(id) {
            places.wishes.insert(id.clone(), (priority, now));
        }
        Err(Reason::TooManyTransfers
            .error(format!(
                "{} of {} places are taken and {ahead} more urgent transfers wait; try again",
                places.taken, places.limit
            ))
            .metadata("limit", places.limit.to_string())
            .retry_after(RETRY_AFTER))
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
    limit: u64,
    used: Arc<AtomicU64>,
}

/// Memory of one manifest; given back when dropped.
#[derive(Debug)]
pub(super) struct Charge {
    bytes: u64,
    used: Arc<AtomicU64>,
}

impl Manifests {
    /// Name, size, digest and the books of one file, without the bytes of its name: a generous estimate.
    const FILE_BYTES: u64 = 512;

    pub(super) fn new(limit: u64) -> Self {
        Self { limit, used: Arc::default() }
    }

    fn cost(files: u64, name_bytes: u64) -> u64 {
        files.saturating_mul(Self::FILE_BYTES).saturating_add(name_bytes.saturating_mul(2))
    }

    /// Charges for a manifest before it is read.
    pub(super) fn charge(&self, files: u64, name_bytes: u64) -> Result<Charge, Error> {
        let charge = self.take(files, name_bytes);
        // One manifest alone is always taken, whatever the limit.
        let used = self.used.load(Ordering::Relaxed);
        if used > self.limit && used > charge.bytes {
            return Err(Reason::TooManyTransfers
                .error("the manifests of the transfers that are staged here fill the memory set aside for them; try again later")
                .metadata("limit", self.limit.to_string())
                .retry_after(Duration::from_secs(10)));
        }
        Ok(charge)
    }

    /// Charges for one that is in memory already.
    pub(super) fn take(&self, files: u64, name_bytes: u64) -> Charge {
        let bytes = Self::cost(files, name_bytes);
        self.used.fetch_add(bytes, Ordering::Relaxed);
        Charge { bytes, used: Arc::clone(&self.used) }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
