//! The last moments before a freeze, with writes going on: what a freeze has to drain and to send decides how long it takes.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use super::dial::Dial;
use super::pump::Wish;
use super::task::{Halt, Task};
use super::transfer::Running;
use crate::source::MigrationSource;

/// How long the lag is waited for at most, however much of it a caller bears: meanwhile nobody looks at the log and its cap, nor at how fast writers are. As long as with the
/// default of `ready_lag_ms`.
const LONGEST_WAIT: Duration = Duration::from_millis(250);

/// A round of changes, from being written at the source to being durable at the target, after which writers are slowed: about what it takes to
/// gather, send, store and acknowledge what comes at full speed meanwhile.
const CLOSE: Duration = Duration::from_millis(15);

/// Delays of a write to the moving slots, one for each of the last rounds. At 30,000 writes/s over 16 connections, with the data on a disk and on 2 cores, rounds begin
/// with some 300 changes, then 200, then 100; a freeze takes 7 ms less after them in the median.
const BRAKE: [Duration; 3] = [Duration::from_millis(1), Duration::from_millis(2), Duration::from_millis(4)];

/// Changes during a round that are not worth another one: what they take is little beside what any freeze does.
const FEW: u64 = 64;

/// How long writers are slowed at most for these rounds, whatever is left then, and as long again while the number of the freeze is saved: as long as a long freeze.
const LONGEST_BRAKE: Duration = Duration::from_millis(50);

/// Writers are slowed until this is dropped.
pub(super) struct Slowed {
    by: Box<dyn Fn(Duration) + Send + Sync>,
    /// What the last look at the lag had decided, which stays.
    before: Duration,
}

impl Slowed {
    /// Waits for `work`, and lets the writers go before if that takes long: for a disk that hangs.
    pub(super) async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        if let Ok(done) = timeout(LONGEST_BRAKE, &mut work).await {
            return done;
        }
        (self.by)(self.before);
        work.await
    }
}

impl Drop for Slowed {
    fn drop(&mut self) {
        (self.by)(self.before);
    }
}

impl<S: MigrationSource, D: Dial> Task<S, D> {
    /// Brings the lag down to what a round trip takes, so that the freeze has little to send: each round, what came during the one before becomes durable, which
    /// takes less and less where the target is faster than the writers. Then writers are slowed, if they may be: until the freeze has begun, or the result is
    /// dropped.
    pub(super) async fn come_close(&mut self, running: &mut Running) -> Result<Slowed, Halt> {
        let (source, id) = (Arc::clone(&self.inner.source), self.id.clone());
        let slowed = Slowed {
            by: Box::new(move |delay| source.slow_writers(&id, delay)),
            before: running.pressure.delay(),
        };
        let (log, acked, mut acks) =
            (running.log.clone(), running.link.acks.clone(), running.link.acks.clone());
        let patience = patience(self.limits.ready_lag, self.wanted_within());
        let brake: &[Duration] = if self.limits.slow_writers { &BRAKE } else { &[] };
        let rounds = async {
            let head = || log.borrow().head_seq;
            let mut began_at = head();
            let mut durable = async |seq| {
                let began = Instant::now();
                acks.wait_for(|ack| ack.durable_seq >= seq).await.is_ok().then(|| began.elapsed())
            };
            let close = async {
                while durable(began_at).await.is_some_and(|took| took > CLOSE) {
                    began_at = head();
                }
            };
            // The rest is sent with writes held, if it has to be.
            let _ = timeout(patience, close).await;
            let until = Instant::now() + LONGEST_BRAKE;
            for &delay in brake {
                // Of a group of writes that the source is committing nothing is seen yet: what came during the last round tells more than what is left.
                let came = head().saturating_sub(began_at.min(acked.borrow().durable_seq));
                // Sequences are those of the store; what came to other slots is not in the log.
                let came = came.min(log.borrow().entries);
                if came <= FEW {
                    break;
                }
                (slowed.by)(delay.max(slowed.before));
                began_at = head();
                if !matches!(timeout_at(until, durable(began_at)).await, Ok(Some(_))) {
                    break;
                }
            }
        };
        running.wish.send_replace(Wish::Hurry);
        self.meanwhile(rounds).await?;
        Ok(slowed)
    }
}

/// How long the lag is waited for. Of the time that a caller gave, the freeze needs some, too.
fn patience(ready_lag: Duration, wanted_within: Duration) -> Duration {
    ready_lag.saturating_add(Duration::from_millis(50)).min(LONGEST_WAIT).min(wanted_within / 2)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn writers_are_as_slow_as_before_once_it_is_over_or_takes_too_long() {
        let (before, delays) = (Duration::from_millis(30), Arc::new(Mutex::new(Vec::new())));
        let kept = Arc::clone(&delays);
        let slowed = Slowed { by: Box::new(move |delay| kept.lock().unwrap().push(delay)), before };
        let seen = || delays.lock().unwrap().clone();
        slowed.during(sleep(LONGEST_BRAKE / 2)).await;
        assert_eq!(seen(), []);
        let began = Instant::now();
        let (hung, ()) = tokio::join!(slowed.during(sleep(10 * LONGEST_BRAKE)), async {
            sleep(2 * LONGEST_BRAKE).await;
            assert_eq!(seen(), [before], "while it hangs");
        });
        assert_eq!((hung, began.elapsed()), ((), 10 * LONGEST_BRAKE));
        drop(slowed);
        assert_eq!(seen(), [before; 2]);
    }

    #[test]
    fn the_lag_is_waited_for_by_the_time_that_callers_gave_and_not_by_what_they_bear() {
        let ms = Duration::from_millis;
        assert_eq!(patience(ms(0), Duration::MAX), ms(50));
        assert_eq!(patience(ms(200), Duration::MAX), ms(250));
        for long in [ms(60_000), ms(u64::MAX), Duration::MAX] {
            assert_eq!(patience(long, Duration::MAX), ms(250));
            assert_eq!(patience(long, ms(300)), ms(150));
        }
        assert_eq!(patience(ms(200), Duration::ZERO), Duration::ZERO);
    }
}
