//! Rate and expected time of a task, from a sliding window.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::clock::millis;
use crate::v1;

/// The window is kept as this many samples at most.
const SAMPLES: u32 = 64;

/// Measures how fast a total grows over the last seconds. Reads no clock: every call is told the time.
///
/// 64 samples of memory at most, however often it is called.
#[derive(Debug, Clone)]
pub struct Meter {
    window: Duration,
    /// Oldest first. Times and totals never fall. The first is the last one at or before the start of the window.
    samples: VecDeque<Sample>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    total: u64,
}

impl Meter {
    /// Smooth enough to read, quick enough to show a stall.
    pub const DEFAULT_WINDOW: Duration = Duration::from_secs(10);

    /// A meter over the last `window`, which should be a second at least.
    #[must_use]
    pub fn new(window: Duration) -> Self {
        Self { window, samples: VecDeque::new() }
    }

    /// Takes note that `bytes_done_total` bytes are done by `now`.
    ///
    /// The first call is where measuring starts: what was done by then, as before a restart, is not counted. A total
    /// that falls, as when a copy starts over, makes it start again.
    pub fn record(&mut self, now: Instant, bytes_done_total: u64) {
        let sample = Sample { at: now, total: bytes_done_total };
        match self.samples.back() {
            Some(last) if bytes_done_total < last.total => self.samples.clear(),
            Some(last) if now < last.at => return,
            _ => {}
        }
        let resolution = self.window / SAMPLES;
        let len = self.samples.len();
        // The last sample moves on until it is far enough from the one before it.
        match len.checked_sub(2).map(|before| self.samples[before].at) {
            Some(before) if now.saturating_duration_since(before) < resolution => {
                self.samples[len - 1] = sample;
            }
            _ => self.samples.push_back(sample),
        }
        while self
            .samples
            .get(1)
            .is_some_and(|second| now.saturating_duration_since(second.at) >= self.window)
        {
            self.samples.pop_front();
        }
        while self.samples.len() > 2 + usize::try_from(SAMPLES).unwrap_or(64) {
            self.samples.pop_front();
        }
    }

    /// Bytes per second over the window that ends `now`; over the time since the start if that is shorter.
    ///
    /// `None` before a tenth of a window has passed since the start; `Some(0)` if nothing moved for a whole window.
    #[must_use]
    pub fn rate(&self, now: Instant) -> Option<u64> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        let from = now.checked_sub(self.window).map_or(first.at, |start| start.max(first.at));
        let span = now.saturating_duration_since(from);
        if span < self.window / 10 || span.is_zero() {
            return None;
        }
        let moved = last.total.saturating_sub(self.total_at(from));
        let rate = u128::from(moved) * 1_000_000_000 / span.as_nanos();
        Some(u64::try_from(rate).unwrap_or(u64::MAX))
    }

    /// How long the `remaining` bytes will take at the current rate; `None` while that is unknown or 0.
    ///
    /// Nothing remaining takes no time, whatever the rate.
    #[must_use]
    pub fn eta(&self, now: Instant, remaining: u64) -> Option<Duration> {
        if remaining == 0 {
            return Some(Duration::ZERO);
        }
        let rate = self.rate(now).filter(|&rate| rate > 0)?;
        Some(Duration::from_millis(
            u64::try_from(u128::from(remaining) * 1000 / u128::from(rate)).unwrap_or(u64::MAX),
        ))
    }

    /// Sets `bytes_per_second` and `eta_ms` of `progress` from its `bytes_done` and `bytes_total`, after recording them.
    ///
    /// A total that is an estimate and was reached was too low: how much remains is not known then.
    pub fn measure(&mut self, now: Instant, progress: &mut v1::Progress) {
        self.record(now, progress.bytes_done);
        progress.bytes_per_second = self.rate(now);
        let remaining = progress
            .bytes_total
            .map(|total| total.saturating_sub(progress.bytes_done))
            .filter(|&remaining| remaining > 0 || !progress.total_is_estimate);
        progress.eta_ms = remaining.and_then(|remaining| self.eta(now, remaining)).map(millis);
    }

    /// The total at `from`, between the samples around it as if bytes had moved evenly.
    fn total_at(&self, from: Instant) -> u64 {
        let after = self.samples.partition_point(|sample| sample.at <= from);
        let (before, after) = match (after.checked_sub(1), self.samples.get(after)) {
            (Some(before), Some(after)) => (self.samples[before], *after),
            (Some(before), None) => return self.samples[before].total,
            (None, after) => return after.map_or(0, |sample| sample.total),
        };
        let span = after.at.saturating_duration_since(before.at).as_nanos();
        let part = from.saturating_duration_since(before.at).as_nanos();
        let moved = u128::from(after.total - before.total) * part / span.max(1);
        before.total.saturating_add(u64::try_from(moved).unwrap_or(u64::MAX))
    }
}

impl Default for Meter {
    fn default() -> Self {
        Self::new(Self::DEFAULT_WINDOW)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Records `rate` bytes per second every 10 ms from `from` to `to` milliseconds after `start`.
    fn run(meter: &mut Meter, start: Instant, from: u64, to: u64, rate: u64, total: &mut u64) {
        for at in (from..=to).step_by(10) {
            meter.record(start + ms(at), *total);
            *total += rate / 100;
        }
    }

    #[test]
    fn follows_the_last_window() {
        let (mut meter, start, mut total) = (Meter::default(), Instant::now(), 0);
        assert_eq!(meter.rate(start), None);
        run(&mut meter, start, 0, 500, 100 * MIB, &mut total);
        assert_eq!(meter.rate(start + ms(500)), None, "too early to tell");
        run(&mut meter, start, 510, 20_000, 100 * MIB, &mut total);
        let rate = meter.rate(start + ms(20_000)).unwrap();
        assert!(rate.abs_diff(100 * MIB) < MIB, "{rate}");
        run(&mut meter, start, 20_010, 30_010, 10 * MIB, &mut total);
        let rate = meter.rate(start + ms(30_010)).unwrap();
        assert!(rate.abs_diff(10 * MIB) < MIB, "{rate}");
    }

    #[test]
    fn a_stall_has_rate_zero_and_no_eta() {
        let (mut meter, start, mut total) = (Meter::default(), Instant::now(), 0);
        run(&mut meter, start, 0, 10_000, 100 * MIB, &mut total);
        let eta = meter.eta(start + ms(10_000), 1000 * MIB).unwrap();
        assert!(eta.abs_diff(ms(10_000)) < ms(200), "{eta:?}");
        let rate = meter.rate(start + ms(15_000)).unwrap();
        assert!(rate.abs_diff(50 * MIB) < MIB, "half of the window is empty: {rate}");
        assert_eq!(meter.rate(start + ms(20_000)), Some(0));
        assert_eq!(meter.eta(start + ms(20_000), 1), None);
        assert_eq!(meter.eta(start + ms(20_000), 0), Some(Duration::ZERO));
    }

    #[test]
    fn what_was_done_before_the_start_is_not_speed() {
        let (mut meter, start, mut total) = (Meter::default(), Instant::now(), 1 << 40);
        run(&mut meter, start, 0, 2000, MIB, &mut total);
        let rate = meter.rate(start + ms(2000)).unwrap();
        assert!(rate.abs_diff(MIB) < MIB / 10, "{rate}");
    }

    #[test]
    fn starting_over_starts_over() {
        let (mut meter, start, mut total) = (Meter::default(), Instant::now(), 0);
        run(&mut meter, start, 0, 5000, 100 * MIB, &mut total);
        total = 0;
        run(&mut meter, start, 5010, 5200, 100 * MIB, &mut total);
        assert_eq!(meter.rate(start + ms(5200)), None);
        run(&mut meter, start, 5210, 8010, 100 * MIB, &mut total);
        let rate = meter.rate(start + ms(8010)).unwrap();
        assert!(rate.abs_diff(100 * MIB) < 2 * MIB, "{rate}");
    }

    #[test]
    fn fills_a_progress() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        let mut progress = v1::Progress { bytes_total: Some(100 * MIB), ..Default::default() };
        meter.measure(start, &mut progress);
        assert_eq!((progress.bytes_per_second, progress.eta_ms), (None, None));
        progress.bytes_done = 20 * MIB;
        meter.measure(start + ms(2000), &mut progress);
        assert_eq!((progress.bytes_per_second, progress.eta_ms), (Some(10 * MIB), Some(8000)));
        progress.bytes_total = None;
        meter.measure(start + ms(2000), &mut progress);
        assert_eq!(progress.eta_ms, None);
    }

    #[test]
    fn an_estimate_that_was_reached_says_nothing_of_what_remains() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        let mut progress =
            v1::Progress { bytes_total: Some(30 * MIB), total_is_estimate: true, ..Default::default() };
        meter.measure(start, &mut progress);
        progress.bytes_done = 20 * MIB;
        meter.measure(start + ms(2000), &mut progress);
        assert_eq!(progress.eta_ms, Some(1000));
        // Totals are never lower than what is done.
        (progress.bytes_done, progress.bytes_total) = (40 * MIB, Some(40 * MIB));
        meter.measure(start + ms(4000), &mut progress);
        assert_eq!((progress.bytes_per_second, progress.eta_ms), (Some(10 * MIB), None));
        progress.total_is_estimate = false;
        meter.measure(start + ms(4000), &mut progress);
        assert_eq!(progress.eta_ms, Some(0));
    }

    proptest! {
        #[test]
        fn bounded_and_never_faster_than_the_fastest_step(
            steps in prop::collection::vec((1_u64..3000, 0_u64..1_000_000), 1..400),
        ) {
            let start = Instant::now();
            let (mut meter, mut at, mut total, mut fastest) = (Meter::default(), 0, 0, 0);
            meter.record(start, 0);
            for (wait, bytes) in steps {
                at += wait;
                total += bytes;
                fastest = fastest.max(bytes * 1000 / wait + 1);
                meter.record(start + ms(at), total);
                prop_assert!(meter.samples.len() <= 66);
                if let Some(rate) = meter.rate(start + ms(at)) {
                    prop_assert!(rate <= fastest, "{rate} > {fastest}");
                }
            }
        }
    }
}
