//! How often a node is let in: each stream, and each freeze, has the store write records that the writes of its clients wait for.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use proto_common::error::Error;
use proto_common::ids::NodeId;
use tokio::time::Instant;

use super::places::COME_BACK;
use crate::Reason;

/// As many turns as come within this time may be taken at once.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How long a stream waits for its turn at most: a few at a time do, and the others are told to come back.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// The turns of all nodes, of each so many in a second.
#[derive(Debug)]
pub(super) struct Turns {
    per_second: u32,
    /// Up to when all turns of a node are taken; in the past, and so left out, where none are.
    taken: Mutex<HashMap<NodeId, Instant>>,
}

impl Turns {
    pub(super) fn new(per_second: u32) -> Self {
        Self { per_second: per_second.max(1), taken: Mutex::default() }
    }

    /// Takes the next turn of `node`; returns how long it has to be waited for, within `patience`.
    pub(super) fn take(&self, node: &NodeId, patience: Duration) -> Result<Duration, Error> {
        let now = Instant::now();
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|_, until| *until > now);
        let until = taken.get(node).copied().unwrap_or(now) + AT_ONCE / self.per_second;
        let wait = until.saturating_duration_since(now + AT_ONCE);
        if wait > patience {
            return Err(Reason::TooManyMigrations
                .error(format!(
                    "node {node} comes more than {} times in a second; it is tried again",
                    self.per_second
                ))
                .metadata("limit", self.per_second.to_string())
                .metadata("peer", node.as_str())
                .retry_after(COME_BACK));
        }
        taken.insert(node.clone(), until);
        Ok(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_second_of_turns_may_be_taken_at_once_and_then_each_in_its_time() {
        let turns = Turns::new(4);
        let [n1, n2] = ["n1", "n2"].map(|id| NodeId::new(id).unwrap());
        let ms = Duration::from_millis;
        for _ in 0..4 {
            assert_eq!(turns.take(&n1, PATIENCE).unwrap(), ms(0));
        }
        assert_eq!(turns.take(&n1, PATIENCE).unwrap(), ms(250));
        let refused = turns.take(&n1, ms(499)).unwrap_err();
        assert_eq!((refused.reason(), refused.get("peer")), ("TOO_MANY_MIGRATIONS", Some("n1")));
        assert!(refused.is_retryable());
        // What was refused took nothing, and nobody else waits.
        assert_eq!(turns.take(&n1, ms(500)).unwrap(), ms(500));
        assert_eq!(turns.take(&n2, ms(0)).unwrap(), ms(0));
        tokio::time::advance(ms(1500)).await;
        for _ in 0..4 {
            assert_eq!(turns.take(&n1, PATIENCE).unwrap(), ms(0));
        }
        tokio::time::advance(ms(3000)).await;
        turns.take(&n2, PATIENCE).unwrap();
        assert_eq!(turns.taken.lock().unwrap().len(), 1, "nobody is remembered for ever");
    }
}
