//! How many migrations come in at the same time, and who gets a free place first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto_common::error::Error;
use proto_common::ids::MigrationId;
use proto_common::v1::Priority;

use crate::Reason;

/// How long a place is kept for one that was told to come back; longer than the longest backoff of a source.
const REMEMBERED: Duration = Duration::from_secs(15);
/// What one that was refused is told to wait.
const COME_BACK: Duration = Duration::from_secs(1);
/// Refused ones that are remembered.
const MAX_WAITING: usize = 1024;

/// The places of a node. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Places {
    limit: usize,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    taken: usize,
    waiting: HashMap<MigrationId, (Priority, Instant)>,
}

/// A place, until dropped.
#[derive(Debug)]
pub(super) struct Place(Places);

impl Places {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, shared: Arc::default() }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for one that is there already, whether one is free or not.
    pub(super) fn take(&self) -> Place {
        self.shared().taken += 1;
        Place(self.clone())
    }

    /// Takes a free place, unless those that are free are kept for others of a higher priority that were refused a short time ago.
    pub(super) fn enter(&self, id: &MigrationId, priority: Priority) -> Result<Place, Error> {
        let now = Instant::now();
        let mut shared = self.shared();
        shared.waiting.retain(|_, (_, since)| now.saturating_duration_since(*since) < REMEMBERED);
        let free = self.limit.saturating_sub(shared.taken);
        let first = shared.waiting.iter().filter(|(other, (wanted, _))| *other != id && *wanted > priority);
        if first.count() < free {
            shared.waiting.remove(id);
            shared.taken += 1;
            drop(shared);
            return Ok(Place(self.clone()));
        }
        if shared.waiting.len() < MAX_WAITING {
            shared.waiting.insert(id.clone(), (priority, now));
        }
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
        let mut shared = self.0.shared();
        shared.taken = shared.taken.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_place_is_kept_for_whoever_needs_it_more() {
        let places = Places::new(1);
        let id = |text| MigrationId::new(text).unwrap();
        let first = places.enter(&id("a"), Priority::Rebalance).unwrap();
        let refused = places.enter(&id("b"), Priority::Recovery).unwrap_err();
        assert_eq!(refused.reason(), "TOO_MANY_MIGRATIONS");
        assert!(refused.is_retryable());
        drop(first);
        assert!(places.enter(&id("c"), Priority::Rebalance).is_err());
        let second = places.enter(&id("b"), Priority::Recovery).unwrap();
        drop(second);
        assert!(places.enter(&id("c"), Priority::Rebalance).is_ok());
    }
}
