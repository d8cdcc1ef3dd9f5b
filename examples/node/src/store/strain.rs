//! Whether clients wait longer for their writes than they are used to: then what nobody waits for lets them go first.
//!
//! A delay that grows says that there is too much to do before anything is lost by it, as in LEDBAT (RFC 6817) for a link.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Weight of the newest group of writes in what is felt now, as a power of two: an eighth, so that some ten groups tell.
const NEWEST: u32 = 3;

/// The same in what clients are used to, while nothing moves.
const USUAL: u32 = 8;

/// The same while something moves: what stays for thousands of groups, some ten seconds, is the load that clients bring now, and not what moves.
const MEANWHILE: u32 = 13;

/// What counts as strain beside one and a half of the usual: below it, nobody notices. At 30,000 writes/s, in memory, the p99 of writes to slots that stay
/// is 1.4 to 1.9 times as long during migrations as without them, with twice the usual and 500 µs 1.5 to 3.7, with a quarter more and 100 µs 1.5 to 2.7; where nothing waits 2.9 to 10. On a
/// disk 1.35 to 2 instead of 2.8 to 4.4. A migration takes 1.8 s instead of 1.4.
const NOTICED: Duration = Duration::from_micros(250);

/// Longest wait of one page: what moves has to come to an end however busy clients are. With 100 ms, the p99 is no shorter.
const PATIENCE: Duration = Duration::from_millis(50);

/// Between two looks: about a group of writes.
const LOOK: Duration = Duration::from_millis(1);

/// Microseconds from when a group of writes was asked for until it was durable, on average.
#[derive(Debug, Default)]
pub(super) struct Strain {
    recent: AtomicU64,
    usual: AtomicU64,
}

impl Strain {
    /// A group of writes took so long. In the writer's thread, which alone changes the averages.
    pub(super) fn took(&self, time: Duration, something_moves: bool) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).min(1 << 32) << 8;
        let average = |of: &AtomicU64, weight: u32| {
            let before = of.load(Ordering::Relaxed);
            let now = if before == 0 { micros } else { before - (before >> weight) + (micros >> weight) };
            of.store(now, Ordering::Relaxed);
        };
        average(&self.recent, NEWEST);
        average(&self.usual, if something_moves { MEANWHILE } else { USUAL });
    }

    fn is_felt(&self) -> bool {
        let of = |average: &AtomicU64| Duration::from_micros(average.load(Ordering::Relaxed) >> 8);
        of(&self.recent) > of(&self.usual) * 3 / 2 + NOTICED
    }

    /// Returns when clients do not wait longer than usual, when who waits here is `late`, or after a while.
    pub(super) async fn pass(&self, late: impl Fn() -> bool) {
        let began = Instant::now();
        while self.is_felt() && !late() && began.elapsed() < PATIENCE {
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn what_nobody_waits_for_lets_clients_go_first_but_not_for_good() {
        let strain = Strain::default();
        let took = |time, something_moves| (0..100).for_each(|_| strain.took(time, something_moves));
        let waited = async || {
            let began = Instant::now();
            strain.pass(|| false).await;
            began.elapsed()
        };
        assert_eq!(waited().await, Duration::ZERO, "nobody has written");
        took(2 * MILLI, false);
        assert_eq!(waited().await, Duration::ZERO);
        took(3 * MILLI, true);
        assert_eq!(waited().await, Duration::ZERO, "half as long again is borne");
        took(6 * MILLI, true);
        assert!(waited().await >= PATIENCE);
        let began = Instant::now();
        strain.pass(|| began.elapsed() >= 3 * MILLI).await;
        assert!(began.elapsed() < 5 * MILLI);
        // What they take while something moves is not what they are used to.
        took(6 * MILLI, true);
        assert!(strain.is_felt());
        took(2 * MILLI, true);
        assert_eq!(waited().await, Duration::ZERO);
    }

    #[test]
    fn a_load_that_stays_becomes_the_usual() {
        let strain = Strain::default();
        strain.took(MILLI, true);
        assert!(!strain.is_felt(), "nothing else is known");
        let took = |groups| (0..groups).for_each(|_| strain.took(5 * MILLI, true));
        took(1000);
        assert!(strain.is_felt());
        took(20_000);
        assert!(!strain.is_felt());
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_over_as_soon_as_clients_are_served_as_usual() {
        let strain = std::sync::Arc::new(Strain::default());
        (0..100).for_each(|_| strain.took(MILLI, false));
        (0..100).for_each(|_| strain.took(9 * MILLI, true));
        let waiting = tokio::spawn({
            let strain = std::sync::Arc::clone(&strain);
            async move { strain.pass(|| false).await }
        });
        tokio::time::sleep(5 * MILLI).await;
        assert!(!waiting.is_finished());
        (0..100).for_each(|_| strain.took(MILLI, true));
        tokio::time::sleep(2 * MILLI).await;
        assert!(waiting.is_finished());
    }
}
