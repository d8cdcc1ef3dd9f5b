use super::*;
use crate::v1::HealthStatus;

async fn run(check: &Check) -> CheckResult {
    check.start().await.unwrap()
}

#[tokio::test]
async fn a_slow_disk_is_degraded_with_the_number() {
    let dir = tempfile::tempdir().unwrap();
    let probe = SyncedWrite::new(dir.path());
    assert_eq!(probe.last(), None);
    let result = run(&probe.clone().bounds(Duration::from_secs(60), None).check()).await;
    assert_eq!(result.status, HealthStatus::Healthy, "{result:?}");
    assert!(probe.last().unwrap().latency.is_some());
    // Any disk is slower than this.
    let result = run(&probe.clone().bounds(Duration::ZERO, None).check()).await;
    assert_eq!(result.status, HealthStatus::Degraded);
    let measurement = result.measurement.unwrap();
    assert!(measurement.value > 0.0 && measurement.unit == "ms", "{measurement:?}");
    assert!(result.message.contains("a synced write to"), "{}", result.message);
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(files.len(), 1, "it writes one file, over and over");
}

#[tokio::test]
async fn a_disk_that_cannot_be_written_is_unhealthy() {
    let dir = tempfile::tempdir().unwrap();
    // A directory that is gone fails for root as well.
    let probe = SyncedWrite::new(&dir.path().join("gone"));
    let result = run(&probe.check()).await;
    assert_eq!(result.status, HealthStatus::Unhealthy);
    assert!(result.message.contains("cannot write to"), "{}", result.message);
    assert_eq!(probe.last(), Some(WriteProbe { latency: None }));
}

#[tokio::test]
async fn free_space_has_two_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let status = async |degraded, unhealthy| run(&free_space(dir.path(), degraded, unhealthy)).await.status;
    assert_eq!(status(0.0, 0.0).await, HealthStatus::Healthy);
    assert_eq!(status(100.0, 0.0).await, HealthStatus::Degraded);
    assert_eq!(status(100.0, 100.0).await, HealthStatus::Unhealthy);
    let gone = run(&free_space(&dir.path().join("gone"), 10.0, 1.0)).await;
    assert_eq!(gone.status, HealthStatus::Undecided);
}

#[tokio::test]
async fn a_blocked_runtime_has_lag() {
    let check = event_loop_lag(Duration::from_millis(100));
    let running = check.start();
    // The only thread of this runtime: nothing else can run meanwhile.
    tokio::task::yield_now().await;
    std::thread::sleep(Duration::from_millis(300));
    let result = running.await.unwrap();
    assert_eq!(result.status, HealthStatus::Degraded, "{result:?}");
    assert!(result.measurement.unwrap().value >= 100.0);
}

#[tokio::test]
async fn failures_are_counted_within_the_window() {
    let now = unix_ms(SystemTime::now());
    let count =
        move |since: u64| [now, now - 5000, now - 90_000].iter().filter(|at| **at >= since).count() as u64;
    let result = run(&recent_failures("transfers", Duration::from_secs(60), 2, count)).await;
    assert_eq!(result.status, HealthStatus::Degraded);
    assert_eq!(result.message, "2 transfers failed in the last 1 min");
    let result = run(&recent_failures("transfers", Duration::from_secs(60), 3, count)).await;
    assert_eq!(result.status, HealthStatus::Healthy);
}
