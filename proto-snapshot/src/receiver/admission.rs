//! Who gets a free place: the most urgent of those who asked lately.
//!
//! A refused sender comes back by itself, so there is no queue to hold its connection: its wish is
//! remembered for as long as it may take to come back, and a place that comes free meanwhile is kept from
//! less urgent ones.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto_common::error::Error;
use proto_common::ids::TransferId;
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
    taken: usize,
    wishes: HashMap<TransferId, (Priority, Instant)>,
}

/// One place; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    admission: Admission,
}

impl Admission {
    pub(super) fn new(limit: usize) -> Self {
        Self { inner: Arc::new(Mutex::new(Places { limit, taken: 0, wishes: HashMap::new() })) }
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for `id`, unless there is none or a more urgent one waits for it.
    pub(super) fn enter(&self, id: &TransferId, priority: Priority) -> Result<Place, Error> {
        let now = Instant::now();
        let mut places = self.lock();
        places.wishes.retain(|_, (_, at)| now.duration_since(*at) < WISH_LIFE);
        let ahead =
            places.wishes.iter().filter(|(other, (wish, _))| *other != id && *wish > priority).count();
        if places.taken + ahead < places.limit {
            places.wishes.remove(id);
            places.taken += 1;
            return Ok(Place { admission: self.clone() });
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
    }
}
