use proptest::prelude::*;

use super::*;

const H: HealthStatus = HealthStatus::Healthy;
const D: HealthStatus = HealthStatus::Degraded;
const F: HealthStatus = HealthStatus::Unhealthy;
const U: HealthStatus = HealthStatus::Undecided;

fn cell(failure_threshold: u32, success_threshold: u32) -> Cell {
    let schedule = Schedule { failure_threshold, success_threshold, ..Schedule::default() };
    Cell::checked(Component::new(ComponentName::new("c").unwrap()), schedule, None)
}

fn feed(cell: &mut Cell, result: HealthStatus) -> HealthStatus {
    let result = CheckResult { status: result, ..CheckResult::healthy() };
    let outcome = Outcome { result, took: Duration::ZERO, timed_out: false, panicked: false };
    let now = Instant::now();
    cell.record(outcome, now, 1024);
    cell.verdict(now).0
}

fn states(cell: &mut Cell, results: &[HealthStatus]) -> Vec<HealthStatus> {
    results.iter().map(|result| feed(cell, *result)).collect()
}

#[test]
fn a_status_changes_after_so_many_results_in_a_row() {
    let mut one = cell(3, 2);
    assert_eq!(states(&mut one, &[H, H, F, F, H, F, F, F, H, H]), [U, H, H, H, H, H, H, F, F, H]);
    // A result that could not decide is no failure, and no success either.
    let mut two = cell(2, 1);
    assert_eq!(states(&mut two, &[H, U, F, F, U, U, F, U, H]), [H, H, U, F, F, U, F, F, H]);
    let mut three = cell(2, 2);
    assert_eq!(states(&mut three, &[H, H, D, H, D, D, H, H, D, F, F]), [U, H, H, H, H, D, D, H, H, D, F]);
    let mut four = cell(2, 2);
    assert_eq!(states(&mut four, &[F, F, D, H, H]), [U, F, F, D, H]);
}

#[tokio::test(start_paused = true)]
async fn what_is_old_is_undecided() {
    let mut cell = cell(1, 1);
    feed(&mut cell, H);
    let interval = Schedule::default().interval;
    tokio::time::advance(interval * 3).await;
    assert_eq!(cell.verdict(Instant::now()).0, H);
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(cell.verdict(Instant::now()).0, U);
    let wire = cell.to_wire(Instant::now());
    assert!(wire.stale && wire.status() == U && wire.last_result() == H, "{wire:?}");
    assert_eq!(wire.age_ms, Some(millis(interval * 3) + 1));
    assert_eq!(feed(&mut cell, H), H);
}

#[test]
fn the_last_error_outlives_the_recovery() {
    let mut cell = cell(1, 1);
    let long = CheckResult::unhealthy("x".repeat(5000));
    let outcome = Outcome { result: long, took: Duration::from_millis(7), timed_out: true, panicked: false };
    cell.record(outcome, Instant::now(), 1024);
    let wire = cell.to_wire(Instant::now());
    assert!(wire.timed_out && wire.message.len() == 1024, "{wire:?}");
    assert_eq!(feed(&mut cell, H), H);
    let wire = cell.to_wire(Instant::now());
    assert_eq!(wire.last_error.unwrap().message.len(), 1024);
    assert!(!wire.timed_out && wire.message.is_empty());
    assert_eq!((wire.consecutive_failures, wire.consecutive_successes), (0, 1));
}

fn any_result() -> impl Strategy<Value = HealthStatus> {
    prop_oneof![Just(H), Just(D), Just(F), Just(U)]
}

proptest! {
    /// Whatever the results, a status is never better or worse than the last `threshold` of them allow.
    #[test]
    fn no_status_without_its_results(
        results in prop::collection::vec(any_result(), 1..60),
        bad in 1_u32..5,
        good in 1_u32..5,
    ) {
        let mut cell = cell(bad, good);
        let mut before = U;
        for (at, result) in results.iter().enumerate() {
            let status = feed(&mut cell, *result);
            let last = |n: u32| {
                results[..=at].iter().rev().take(usize::try_from(n).unwrap()).copied().collect::<Vec<_>>()
            };
            if status != before {
                let better = status.works() && status.severity() < before.severity();
                let (ours, needed) = if better { (last(good), good) } else { (last(bad), bad) };
                prop_assert_eq!(ours.len(), needed as usize, "{:?} -> {:?}", before, status);
                match status {
                    H => prop_assert!(ours.iter().all(|one| *one == H)),
                    D if !before.works() => prop_assert!(ours.iter().all(|one| one.works())),
                    D => prop_assert!(ours.iter().all(|one| *one != H)),
                    F => prop_assert!(*result == F),
                    _ => prop_assert!(!result.works()),
                }
            }
            before = status;
        }
    }

    /// Flapping below the threshold is no change.
    #[test]
    fn no_flapping(rounds in 1_usize..50) {
        let mut cell = cell(3, 1);
        feed(&mut cell, H);
        for _ in 0..rounds {
            prop_assert_eq!(states(&mut cell, &[F, F, H]), vec![H, H, H]);
        }
    }
}
