//! With tokio's clock paused, all times are exact to its granularity of one millisecond.

use proptest::prelude::*;

use super::*;

const SLACK: Duration = Duration::from_millis(2);

fn rate(bytes_per_second: u64) -> NonZeroU64 {
    NonZeroU64::new(bytes_per_second).unwrap()
}

#[track_caller]
fn assert_close(actual: Duration, expected_ms: u64) {
    let expected = Duration::from_millis(expected_ms);
    assert!(actual.abs_diff(expected) <= SLACK, "{actual:?}, not {expected:?}");
}

#[tokio::test(start_paused = true)]
async fn holds_the_rate_after_the_burst() {
    let limiter = RateLimiter::new(rate(1000));
    let start = Instant::now();
    assert_eq!(limiter.acquire(100).await, Duration::ZERO, "the bucket is full");
    for _ in 0..50 {
        limiter.acquire(100).await;
    }
    assert_close(start.elapsed(), 5000);
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(limiter.acquire(100).await, Duration::ZERO);
    assert_close(limiter.acquire(100).await, 100);
}

#[tokio::test(start_paused = true)]
async fn more_than_the_bucket_holds_waits_for_its_share() {
    let limiter = RateLimiter::new(rate(1000));
    assert_close(limiter.acquire(10_100).await, 10_000);
    assert_close(limiter.acquire(1).await, 1);
}

#[tokio::test(start_paused = true)]
async fn unlimited_never_waits() {
    let limiter = RateLimiter::unlimited();
    limiter.charge(u64::MAX);
    assert_eq!(limiter.acquire(u64::MAX).await, Duration::ZERO);
    assert_eq!(limiter.acquire_urgent(u64::MAX).await, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_new_rate_reaches_whoever_waits() {
    let limiter = RateLimiter::new(rate(10));
    let waiter = tokio::spawn({
        let limiter = limiter.clone();
        async move { limiter.acquire(1001).await }
    });
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(!waiter.is_finished());
    // 101 bytes are there, 900 are missing.
    limiter.set_rate(Some(rate(900)));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!waiter.is_finished());
    limiter.set_rate(None);
    let waited = waiter.await.unwrap();
    assert_close(waited, 10_500);
}

#[tokio::test(start_paused = true)]
async fn waiters_are_served_in_order() {
    let limiter = RateLimiter::new(rate(1000));
    limiter.acquire(100).await;
    let (sender, mut order) = tokio::sync::mpsc::channel(8);
    for (i, bytes) in [3000, 1, 500].into_iter().enumerate() {
        let (limiter, sender) = (limiter.clone(), sender.clone());
        tokio::spawn(async move {
            limiter.acquire(bytes).await;
            sender.send(i).await.unwrap();
        });
        tokio::task::yield_now().await;
    }
    drop(sender);
    let mut got = Vec::new();
    while let Some(i) = order.recv().await {
        got.push(i);
    }
    assert_eq!(got, [0, 1, 2]);
}

#[tokio::test(start_paused = true)]
async fn urgent_callers_pass_ordinary_ones_that_wait() {
    let limiter = RateLimiter::new(rate(1000));
    limiter.acquire(100).await;
    let ordinary = tokio::spawn({
        let limiter = limiter.clone();
        async move { limiter.acquire(2000).await }
    });
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_close(limiter.acquire_urgent(1000).await, 990);
    assert!(!ordinary.is_finished());
    assert_close(ordinary.await.unwrap(), 3000);
}

#[tokio::test(start_paused = true)]
async fn what_is_charged_is_paid_by_the_next() {
    let limiter = RateLimiter::new(rate(1000));
    limiter.charge(1100);
    assert_close(limiter.acquire(1).await, 1001);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_wait_gives_back_and_blocks_nobody() {
    let limiter = RateLimiter::new(rate(1000));
    limiter.acquire(100).await;
    assert!(timeout(Duration::from_secs(1), limiter.acquire(1_000_000)).await.is_err());
    assert!(timeout(Duration::from_secs(1), limiter.acquire_urgent(1_000_000)).await.is_err());
    // What they had gathered is there again, as far as the bucket holds it.
    assert!(limiter.acquire(100).await <= SLACK);
    assert_close(limiter.acquire(100).await, 100);
}

#[tokio::test(start_paused = true)]
async fn many_small_urgent_requests_do_not_starve_a_large_one() {
    let limiter = RateLimiter::new(rate(1000));
    let bulk = tokio::spawn({
        let limiter = limiter.clone();
        async move { limiter.acquire(5000).await }
    });
    // Half of the rate goes to the urgent ones, in pieces of a tenth of the bucket.
    while !bulk.is_finished() {
        limiter.acquire_urgent(10).await;
        limiter.charge(10);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let waited = bulk.await.unwrap();
    assert!(waited < Duration::from_secs(20), "{waited:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn never_more_than_rate_times_time_and_burst(
        bytes_per_second in 1_u64..1_000_000,
        requests in prop::collection::vec((0_u64..200_000, 0_u64..300), 1..30),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let limiter = RateLimiter::new(rate(bytes_per_second));
            let (start, mut total) = (Instant::now(), 0);
            for (bytes, pause) in requests {
                tokio::time::sleep(Duration::from_millis(pause)).await;
                limiter.acquire(bytes).await;
                total += bytes;
                let allowed = (start.elapsed() + BURST).as_secs_f64() * bytes_per_second as f64;
                prop_assert!(total as f64 <= allowed + 1.0, "{total} > {allowed}");
            }
            Ok(())
        })?;
    }
}
