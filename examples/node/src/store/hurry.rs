//! Migrations that clients of another node wait for: they go before what nobody waits for.

use std::collections::HashSet;
use std::sync::Mutex;
use std::time::Duration;

use proto::common::ids::MigrationId;
use tokio::time::Instant;

use super::lock;

/// How long after the last hurry nobody hurries any more: there are pauses of some milliseconds between the batches of one.
const LATELY: Duration = Duration::from_millis(50);

/// Longest wait of what nobody waits for: a peer must not hold it up for good.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who hurries now, and who did.
#[derive(Debug, Default)]
pub(super) struct Hurry(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    ids: HashSet<MigrationId>,
    last: Option<Instant>,
}

impl Hurry {
    pub(super) fn set(&self, id: &MigrationId, wanted: bool) {
        let mut state = lock(&self.0);
        if wanted {
            state.ids.insert(id.clone());
        } else {
            state.ids.remove(id);
        }
        state.last = Some(Instant::now());
    }

    pub(super) fn contains(&self, id: &MigrationId) -> bool {
        lock(&self.0).ids.contains(id)
    }

    /// Returns when nobody hurries, or has for a while.
    pub(super) async fn pass(&self) {
        let began = Instant::now();
        while self.is_felt() && began.elapsed() < PATIENCE {
            tokio::time::sleep(LATELY).await;
        }
    }

    fn is_felt(&self) -> bool {
        let state = lock(&self.0);
        !state.ids.is_empty() || state.last.is_some_and(|last| last.elapsed() < LATELY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_nobody_waits_for_waits_for_a_hurry_to_pass_but_not_for_good() {
        let (hurry, id) = (Hurry::default(), MigrationId::new("m1").unwrap());
        assert!(!hurry.is_felt());
        hurry.set(&id, true);
        assert!(hurry.contains(&id) && hurry.is_felt());
        hurry.set(&id, false);
        assert!(!hurry.contains(&id) && hurry.is_felt(), "the next batch may come");
        hurry.pass().await;
        assert!(!hurry.is_felt());
        hurry.set(&id, true);
        hurry.pass().await;
        assert!(hurry.is_felt(), "it did not wait for its end");
    }
}
