//! What is checked in the background.

use std::time::Duration;

use proto::common::guard::RangeGuard;
use proto::common::ids::ComponentName;
use proto::health::HealthRegistry;
use proto::health::server::checks::{SyncedWrite, event_loop_lag, free_space, recent_failures};
use proto::health::server::{Check, CheckResult, Component, Schedule};
use proto::node::HealthProbe::{Readiness, Startup};
use proto::node::TransferPhase;
use proto::snapshot::transfers::Transfers;

use crate::gate::Gate;
use crate::node::Node;

/// A disk that needs longer than this for 4 KiB is as good as gone.
const DISK_TIMEOUT: Duration = Duration::from_secs(5);
/// Free space in percent of the disk: DEGRADED and UNHEALTHY.
const LITTLE_SPACE: (f64, f64) = (5.0, 1.0);
/// Tasks that wait so long for a thread are what clients notice.
const LAG: Duration = Duration::from_millis(250);
/// So many failed transfers within that time are more than bad luck.
const FAILED_TRANSFERS: (u32, Duration) = (3, Duration::from_secs(600));
/// An import holds the database for a while; that is no failure.
const DATABASE_PATIENCE: Duration = Duration::from_secs(2);

/// Adds all checks. None of them counts for liveness: a restart cures neither the disk nor load.
pub(super) fn add(
    registry: &HealthRegistry,
    node: &Node,
    transfers: &Transfers,
    guard: &RangeGuard,
    write: &SyncedWrite,
) -> anyhow::Result<()> {
    let component = |name: &str| ComponentName::new(name).map(Component::new);
    let default = Schedule::default;

    let disk = component("disk")?.critical().counts_for([Readiness, Startup]);
    registry.check(disk, Schedule { timeout: DISK_TIMEOUT, ..default() }, write.check())?;

    let (degraded, unhealthy) = LITTLE_SPACE;
    let space = free_space(node.store().directory(), degraded, unhealthy);
    registry.check(component("space")?.critical(), default(), space)?;

    let quarantined = quarantined(node.gate().clone(), guard.clone());
    registry.check(component("quarantine")?, Schedule { failure_threshold: 1, ..default() }, quarantined)?;

    let owner = node.clone();
    let contested = Check::new(move || {
        let contested = owner.contested();
        async move {
            match contested.first() {
                None => CheckResult::healthy(),
                Some(what) => CheckResult::degraded(format!(
                    "{what}; one that came back without its data is to be started anew with --slots none"
                )),
            }
        }
    });
    registry.check(component("owners")?, default(), contested)?;

    let node = node.clone();
    let database = Check::new(move || {
        let node = node.clone();
        async move {
            // A transaction without changes: it fails where a write would.
            match tokio::time::timeout(DATABASE_PATIENCE, node.store().adopt(Vec::new())).await {
                Ok(Ok(_)) => CheckResult::healthy(),
                Ok(Err(error)) => {
                    CheckResult::unhealthy(format!("it takes no writes: {error}; restart the node"))
                }
                Err(_) => CheckResult::undecided("it is busy with a long transaction"),
            }
        }
    });
    let timeout = DATABASE_PATIENCE * 2;
    let critical = component("database")?.critical().counts_for([Readiness, Startup]);
    registry.check(critical, Schedule { timeout, ..default() }, database)?;

    registry.check(component("runtime")?, default(), event_loop_lag(LAG))?;

    let (count, window) = FAILED_TRANSFERS;
    let registered = transfers.clone();
    let failures = recent_failures("transfers", window, count, move |since| failed(&registered, since));
    registry.check(component("transfers")?, Schedule { failure_threshold: 1, ..default() }, failures)?;
    Ok(())
}

/// Slots that are not served because a damaged record leaves open whose they are, or that nobody may move because of one. The others are: the node is
/// degraded, not down.
fn quarantined(gate: Gate, guard: RangeGuard) -> Check {
    Check::new(move || {
        let mut all: Vec<_> =
            gate.quarantines().into_iter().map(|(slots, why)| (slots, why, "not served")).collect();
        for (slots, why) in guard.quarantines() {
            if !all.iter().any(|(other, because, _)| *other == slots && *because == why) {
                all.push((slots, why, "not moved"));
            }
        }
        async move {
            match all.first() {
                None => CheckResult::healthy(),
                Some((slots, why, what)) => {
                    let more = match all.len() {
                        1 => String::new(),
                        all => format!(", and {} more", all - 1),
                    };
                    CheckResult::degraded(format!(
                        "slots {slots} are {what} because of {why}{more}; stop the node, and see what node check says"
                    ))
                }
            }
        }
    })
}

/// Transfers that have failed since then.
fn failed(transfers: &Transfers, since_unix_ms: u64) -> u64 {
    let failed = transfers.registry().list(
        |_, transfer| {
            let ended = transfer.progress.as_ref().and_then(|progress| progress.finished_unix_ms);
            transfer.phase() == TransferPhase::Failed && ended.is_some_and(|at| at >= since_unix_ms)
        },
        0,
        "",
    );
    failed.map_or(0, |page| page.items.len() as u64)
}
