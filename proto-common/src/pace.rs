//! The least that a peer must bring to keep a place: silence is found by an idle timeout, a byte now and then is not. And the most signs of life that are worth reading.

use std::num::NonZeroU64;
use std::time::Duration;

use tokio::time::Instant;

/// Watches a count of bytes that has to rise by at least so many within each span of time.
#[derive(Debug)]
pub struct Pace {
    least: u64,
    within: Duration,
    since: Instant,
    bytes: u64,
    /// What had come at the end of the span, where not all of it was taken.
    doubt: Option<u64>,
    /// Some of what had come before the span was not taken when it began.
    held_up: bool,
}

impl Pace {
    /// Expects `least` bytes more than `bytes` within `within`, and so on. Of a peer that is asked for no more than `asked` bytes per second,
    /// half of that is enough.
    #[must_use]
    pub fn new(least: u64, within: Duration, asked: Option<NonZeroU64>, bytes: u64) -> Self {
        let half = asked.map_or(u64::MAX, |asked| {
            u64::try_from(u128::from(asked.get()) * within.as_millis() / 2000).unwrap_or(u64::MAX)
        });
        Self { least: least.min(half), within, since: Instant::now(), bytes, doubt: None, held_up: false }
    }

    /// When to [look](Self::look) next.
    #[must_use]
    pub fn due(&self) -> Instant {
        let end = self.since + self.within;
        if self.doubt.is_some() { end + self.patience() } else { end }
    }

    /// How long what came is given to be taken: long enough for anything but a store that does not keep up.
    fn patience(&self) -> Duration {
        (self.within / 8).min(Duration::from_secs(1))
    }

    /// Ends the span, in which `brought` bytes in all have come, of which `taken` are taken from the peer's hands; whether enough came in it.
    ///
    /// Where something waits to be taken, it may be that the peer could bring no more. It is looked at once more, and not held against the peer if what
    /// waited still does. To look once would not do: whoever has something come at the end of each span could take as long as it likes. A span that begins like
    /// that is not held against it either, for it may be over as soon as the store goes on.
    pub fn look(&mut self, brought: u64, taken: u64) -> bool {
        match self.doubt.take() {
            None if self.held_up => {
                let still = taken < self.bytes;
                self.restart(brought);
                self.held_up = still;
            }
            None if taken < brought => self.doubt = Some(brought),
            Some(waited) if taken < waited => {
                self.restart(brought);
                self.held_up = true;
            }
            _ => return self.is_kept(brought),
        }
        true
    }

    /// Begins the next span with `bytes`; whether enough came in the last one.
    fn is_kept(&mut self, bytes: u64) -> bool {
        let brought = bytes.saturating_sub(self.bytes);
        self.restart(bytes);
        brought >= self.least
    }

    /// Begins anew with `bytes`, whatever came: the peer is not to blame for the time until now.
    pub fn restart(&mut self, bytes: u64) {
        (self.since, self.bytes, self.doubt, self.held_up) = (Instant::now(), bytes, None, false);
    }

    /// In words, for the peer.
    #[must_use]
    pub fn expected(&self) -> String {
        format!("{} bytes within {:?}", self.least, self.within)
    }
}

/// Holds back who sends one sign of life behind the other. Honest peers send one when they have said nothing for seconds.
#[derive(Debug, Default)]
pub struct Signs {
    last_was_one: bool,
    rest: Option<Instant>,
}

impl Signs {
    /// Behind the second sign of life on end, and each that follows on it, nothing is read for this long. What comes then may be urgent, as the last changes of a migration are, for which clients
    /// wait; and whoever fills a connection with signs of life has 200 of them looked at in a second.
    pub const REST: Duration = Duration::from_millis(5);

    /// Until the next frame is to be read. Cancel safe.
    pub async fn rest(&self) {
        if let Some(until) = self.rest {
            tokio::time::sleep_until(until).await;
        }
    }

    /// A frame has come: a sign of life, or something else.
    pub fn came(&mut self, is_sign: bool) {
        self.rest = (is_sign && self.last_was_one).then(|| Instant::now() + Self::REST);
        self.last_was_one = is_sign;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn signs_of_life_on_end_are_held_back_and_nothing_else() {
        let began = Instant::now();
        let mut signs = Signs::default();
        for (is_sign, waited) in
            [(false, 0), (true, 0), (false, 0), (true, 0), (true, 0), (true, 5), (false, 10), (false, 10)]
        {
            signs.rest().await;
            assert_eq!(began.elapsed().as_millis(), waited);
            signs.came(is_sign);
        }
        signs.rest().await;
        assert_eq!(began.elapsed().as_millis(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn each_span_has_to_bring_its_share() {
        let mut pace = Pace::new(100, Duration::from_secs(10), None, 7);
        assert_eq!(pace.due() - Instant::now(), Duration::from_secs(10));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(pace.is_kept(107));
        assert_eq!(pace.due() - Instant::now(), Duration::from_secs(10));
        assert!(!pace.is_kept(206));
        pace.restart(300);
        assert!(!pace.is_kept(399));
        // Who is asked for 8 bytes per second brings 80 in ten of them.
        let mut slow = Pace::new(100, Duration::from_secs(10), NonZeroU64::new(8), 0);
        assert_eq!(slow.expected(), "40 bytes within 10s");
        assert!(slow.is_kept(40) && !slow.is_kept(79));
        let short = Pace::new(100, Duration::from_millis(500), NonZeroU64::new(80), 0);
        assert_eq!(short.expected(), "20 bytes within 500ms");
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_at_the_end_of_a_span_excuses_nobody_but_who_waits_for_the_store() {
        let span = Duration::from_secs(80);
        let next = async |pace: &Pace| {
            let wait = pace.due() - Instant::now();
            tokio::time::advance(wait).await;
            wait
        };
        let mut timed = Pace::new(100, span, None, 0);
        assert_eq!(next(&timed).await, span);
        assert!(timed.look(5, 4), "it may wait for the store");
        assert_eq!(next(&timed).await, Duration::from_secs(1));
        assert!(!timed.look(9, 8), "what waited was taken");

        let mut held_up = Pace::new(100, span, None, 0);
        assert_eq!(next(&held_up).await, span);
        assert!(held_up.look(5, 4));
        assert_eq!(next(&held_up).await, Duration::from_secs(1));
        assert!(held_up.look(9, 4), "the store has not taken it");
        for _ in 0..3 {
            assert_eq!(next(&held_up).await, span);
            assert!(held_up.look(9, 4), "nor in all of this span");
        }
        assert_eq!(next(&held_up).await, span);
        assert!(held_up.look(9, 9), "it may have been taken just now");
        assert_eq!(next(&held_up).await, span);
        assert!(!held_up.look(9, 9), "nothing came in all of a span");

        let mut enough = Pace::new(100, span, None, 0);
        assert_eq!(next(&enough).await, span);
        assert!(enough.look(200, 4));
        assert_eq!(next(&enough).await, Duration::from_secs(1));
        assert!(enough.look(200, 200), "enough came");
    }
}
