//! The order of things after SIGTERM:
//!
//! 1. readiness is withdrawn in every answer;
//! 2. new transfers, splits and migrations are refused; those that run may end, for a while;
//! 3. what still runs is stopped where it can be resumed;
//! 4. every watcher gets the last state, and the watches end;
//! 5. the listeners are closed.
//!
//! All of it within the grace period.

use std::time::Duration;

use proto::common::error::Error;
use proto::common::guard::RangeGuard;
use proto::health::HealthRegistry;
use proto::snapshot::Reason;
use proto::snapshot::hook::{Hold, HookFuture, InstallHook};
use proto::snapshot::spec::TransferPlan;
use proto::snapshot::store::PlacedSnapshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Health;

/// Between two looks at what still runs.
const LOOK: Duration = Duration::from_millis(20);
/// For watches to end: they do at once, but for readers that do not read.
const WATCHES: Duration = Duration::from_millis(500);
/// Kept for what comes after the tasks have had their time, at most half of the grace period.
const RESERVE: Duration = Duration::from_secs(4);
/// Of the reserve, what stopping the tasks must leave to watches, connections and the database.
const LAST_STEPS: Duration = Duration::from_secs(3);

/// A drain under way.
#[derive(Debug)]
pub struct Drain {
    registry: HealthRegistry,
    tasks: super::facts::Tasks,
    tasks_until: Instant,
    until: Instant,
}

impl Drain {
    /// Withdraws readiness, then refuses whatever is new: `draining` and `guard` are where that is asked for.
    #[must_use]
    pub fn begin(
        health: &Health,
        why: &str,
        grace: Duration,
        draining: &CancellationToken,
        guard: &RangeGuard,
    ) -> Self {
        let reserve = RESERVE.min(grace / 2);
        let now = Instant::now();
        let registry = health.registry().clone();
        registry.begin_drain(why, grace - reserve);
        draining.cancel();
        guard.close();
        Self {
            registry,
            tasks: health.tasks.clone(),
            tasks_until: now + (grace - reserve),
            until: now + grace,
        }
    }

    /// Waits until nothing runs, or for as long as tasks may; `hurry` cuts that short. Says what still runs.
    pub async fn tasks_ended(&self, hurry: impl Future<Output = ()>) -> usize {
        let ended = async {
            while self.tasks.running() > 0 {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = ended => {}
            () = hurry => {}
            () = tokio::time::sleep_until(self.tasks_until) => {}
        }
        let running = self.tasks.running();
        if running > 0 {
            self.registry.set_stopping_tasks();
        }
        running
    }

    /// Waits for tasks that were told to stop. One that does not in time is cut off with the process, and resumed as after a crash.
    pub async fn tasks_stopped(&self, stopped: impl Future<Output = ()>) {
        let within = self.left().saturating_sub(LAST_STEPS.min(self.left() / 2));
        if tokio::time::timeout(within, stopped).await.is_err() {
            tracing::warn!("some tasks did not stop in time; they are resumed at the next start");
        }
    }

    /// Sends the last state to all watchers and ends their watches.
    pub async fn shut_down(&self) {
        let open = self.registry.shut_down(WATCHES.min(self.left())).await;
        if open > 0 {
            tracing::warn!(watches = open, "some watchers do not read; they are cut");
        }
    }

    /// What is left of the grace period.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

/// Lets a hook decide until the node drains; then every new transfer is refused.
#[derive(Debug)]
pub struct WhileUp<H> {
    hook: H,
    draining: CancellationToken,
}

impl<H> WhileUp<H> {
    /// `hook`, until `draining`.
    pub fn new(hook: H, draining: CancellationToken) -> Self {
        Self { hook, draining }
    }
}

impl<H: InstallHook> InstallHook for WhileUp<H> {
    fn admit<'a>(&'a self, plan: &'a TransferPlan) -> HookFuture<'a, Hold> {
        if self.draining.is_cancelled() {
            let error: Error = Reason::ShuttingDown
                .error("the node drains and takes nothing new; try again when it is back");
            return Box::pin(std::future::ready(Err(error)));
        }
        self.hook.admit(plan)
    }

    fn readmit<'a>(&'a self, plan: &'a TransferPlan) -> HookFuture<'a, Hold> {
        self.hook.readmit(plan)
    }

    fn lost_by_source(&self, plan: &TransferPlan) -> Option<String> {
        self.hook.lost_by_source(plan)
    }

    fn install<'a>(&'a self, snapshot: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        self.hook.install(snapshot)
    }

    fn keeps_files(&self, plan: &TransferPlan) -> bool {
        self.hook.keeps_files(plan)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use proto::common::ids::{ShardId, TransferId};
    use proto::snapshot::spec::{Manifest, ManifestFile, SnapshotPoint, TransferSpec};

    use super::*;

    /// Tells what it is asked.
    #[derive(Default)]
    struct Asked(Mutex<Vec<&'static str>>);

    impl Asked {
        fn put(&self, what: &'static str) {
            self.0.lock().unwrap().push(what);
        }
    }

    impl InstallHook for Asked {
        fn admit<'a>(&'a self, _: &'a TransferPlan) -> HookFuture<'a, Hold> {
            self.put("admit");
            Box::pin(async { Ok(Box::new(()) as Hold) })
        }

        fn readmit<'a>(&'a self, _: &'a TransferPlan) -> HookFuture<'a, Hold> {
            self.put("readmit");
            Box::pin(async { Ok(Box::new(()) as Hold) })
        }

        fn lost_by_source(&self, _: &TransferPlan) -> Option<String> {
            self.put("lost_by_source");
            Some("lost".to_owned())
        }

        fn install<'a>(&'a self, _: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
            self.put("install");
            Box::pin(async { Ok(()) })
        }

        fn keeps_files(&self, _: &TransferPlan) -> bool {
            self.put("keeps_files");
            false
        }
    }

    #[tokio::test]
    async fn nothing_but_what_is_new_is_kept_from_the_hook() {
        let file = ManifestFile { name: "a".parse().unwrap(), size: Some(1), blake3: None };
        let spec = TransferSpec {
            transfer_id: TransferId::new("t1").unwrap(),
            source_shard: ShardId::new("s1").unwrap(),
            target_shard: ShardId::new("s2").unwrap(),
            source_node: "n1".parse().unwrap(),
            slots: "0-99".parse().unwrap(),
            point: SnapshotPoint { term: 1, index: 1 },
            content_version: String::new(),
        };
        let plan = TransferPlan { spec, manifest: Manifest::new(vec![file]).unwrap() };
        let (asked, draining) = (Arc::new(Asked::default()), CancellationToken::new());
        let hook = WhileUp::new(Arc::clone(&asked), draining.clone());
        hook.admit(&plan).await.unwrap();
        draining.cancel();
        let Err(refused) = hook.admit(&plan).await else { panic!("it is admitted") };
        assert!(refused.is(Reason::ShuttingDown), "{refused:?}");
        hook.readmit(&plan).await.unwrap();
        assert_eq!(hook.lost_by_source(&plan).as_deref(), Some("lost"));
        assert!(!hook.keeps_files(&plan));
        hook.install(&PlacedSnapshot { path: None, plan: plan.clone() }).await.unwrap();
        let all = ["admit", "readmit", "lost_by_source", "keeps_files", "install"];
        assert_eq!(*asked.0.lock().unwrap(), all);
    }
}
