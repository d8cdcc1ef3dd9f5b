//! The phi-accrual failure detector: how suspicious is a silence, given how regular the heartbeats were?
//!
//! Hayashibara, Défago, Yared, Katayama: *The φ Accrual Failure Detector* (SRDS 2004). Intervals between heartbeats are taken as
//! normally distributed; φ is `-log10` of the probability that the next one is still to come. The normal distribution's tail is
//! the logistic approximation that [Akka](https://github.com/akka/akka/blob/main/akka-remote/src/main/scala/akka/remote/PhiAccrualFailureDetector.scala)
//! uses, `1 / (1 + e^(1.5976 y + 0.070566 y³))`, in a form that does not underflow.
//!
//! Three things keep it honest where heartbeats are not what the model says:
//!
//! - a floor under the deviation, absolute and in proportion to the mean: very regular heartbeats must not make the first
//!   late one look like a death;
//! - a single long interval counts as four deviations at most, so that one pause does not blunt the detector for a whole window;
//! - heartbeats that arrive in a bunch (what a pause has held up) are one heartbeat.

use std::collections::VecDeque;
use std::time::Duration;

/// An interval beyond this many deviations counts as that many.
const OUTLIER_DEVIATIONS: f64 = 4.0;
/// An interval below this part of the mean belongs to the heartbeat before it.
const BUNCH: f64 = 0.1;

/// How a [`Detector`] judges.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DetectorOptions {
    /// Intervals that are remembered, at least 2. Default 200.
    pub window: usize,
    /// Intervals before which it does not judge, at least 2. Default 5.
    pub warm_up: usize,
    /// Least standard deviation. Default 100 ms: what an ordinary scheduler and network may do at any time.
    pub min_deviation: Duration,
    /// Least standard deviation as a part of the mean. Default 0.25, so that one heartbeat may be lost.
    pub min_deviation_ratio: f64,
}

impl Default for DetectorOptions {
    fn default() -> Self {
        Self { window: 200, warm_up: 5, min_deviation: Duration::from_millis(100), min_deviation_ratio: 0.25 }
    }
}

/// Watches one row of heartbeats. Pure: time comes in, suspicion goes out.
#[derive(Debug, Clone)]
pub struct Detector {
    options: DetectorOptions,
    /// Seconds.
    intervals: VecDeque<f64>,
    last: Option<Duration>,
}

impl Detector {
    /// One that has seen nothing.
    #[must_use]
    pub fn new(options: DetectorOptions) -> Self {
        Self { options, intervals: VecDeque::new(), last: None }
    }

    /// A heartbeat arrived at `now`. Returns whether it was on time: within three deviations of the mean.
    pub fn heartbeat(&mut self, now: Duration) -> bool {
        let Some(last) = self.last.replace(now) else { return true };
        let interval = now.saturating_sub(last).as_secs_f64();
        let Some((mean, deviation)) = self.model() else {
            self.remember(interval);
            return true;
        };
        if interval < mean * BUNCH {
            return true;
        }
        self.remember(interval.min(mean + OUTLIER_DEVIATIONS * deviation));
        interval <= mean + 3.0 * deviation
    }

    fn remember(&mut self, interval: f64) {
        self.intervals.push_back(interval);
        if self.intervals.len() > self.options.window.max(2) {
            self.intervals.pop_front();
        }
    }

    /// Mean and standard deviation, in seconds; `None` while warming up.
    #[allow(clippy::cast_precision_loss, reason = "a window is small")]
    fn model(&self) -> Option<(f64, f64)> {
        let count = self.intervals.len();
        if count < self.options.warm_up.max(2) {
            return None;
        }
        let mean = self.intervals.iter().sum::<f64>() / count as f64;
        let variance = self.intervals.iter().map(|one| (one - mean).powi(2)).sum::<f64>() / count as f64;
        let floor = self.options.min_deviation.as_secs_f64().max(mean * self.options.min_deviation_ratio);
        // A floor of nothing would divide by it.
        Some((mean, variance.sqrt().max(floor).max(1e-6)))
    }

    /// The suspicion at `now`, from 0 up; `None` while warming up. 8 means a chance of 10^-8 that the next heartbeat is only late.
    #[must_use]
    pub fn phi(&self, now: Duration) -> Option<f64> {
        let (mean, deviation) = self.model()?;
        let silence = self.silence(now)?.as_secs_f64();
        let y = (silence - mean) / deviation;
        // -log10(1 / (1 + e^x)) = log10(1 + e^x), which is x / ln 10 + log10(1 + e^-x).
        let x = y * (1.5976 + 0.070_566 * y * y);
        let phi = if x > 0.0 {
            x * std::f64::consts::LOG10_E + (-x).exp().ln_1p() * std::f64::consts::LOG10_E
        } else {
            x.exp().ln_1p() * std::f64::consts::LOG10_E
        };
        Some(phi)
    }

    /// Mean time between heartbeats; `None` while warming up.
    #[must_use]
    pub fn mean(&self) -> Option<Duration> {
        self.model().map(|(mean, _)| Duration::from_secs_f64(mean))
    }

    /// Time since the last heartbeat; `None` if there was none.
    #[must_use]
    pub fn silence(&self, now: Duration) -> Option<Duration> {
        self.last.map(|last| now.saturating_sub(last))
    }

    /// It was this process that did not run for `pause`: the silence was not the peer's.
    pub fn forgive(&mut self, pause: Duration) {
        if let Some(last) = &mut self.last {
            *last += pause;
        }
    }

    /// What follows is not in the row of what came before: the peer was restarted.
    pub fn reset(&mut self) {
        self.intervals.clear();
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// With heartbeats every 500 ms, the last of them at the returned time.
    fn regular(count: u64) -> (Detector, Duration) {
        let mut detector = Detector::new(DetectorOptions::default());
        for n in 0..=count {
            assert!(detector.heartbeat(ms(n * 500)));
        }
        (detector, ms(count * 500))
    }

    #[test]
    fn warms_up_before_it_judges() {
        let (detector, last) = regular(4);
        assert_eq!(detector.phi(last + ms(100_000)), None);
        let (detector, last) = regular(5);
        assert!(detector.phi(last + ms(100_000)).is_some());
        assert_eq!(detector.mean(), Some(ms(500)));
    }

    /// Against the tail of the normal distribution, from tables.
    #[test]
    fn phi_is_the_tail_of_the_normal_distribution() {
        let (detector, last) = regular(50);
        // The floor: a deviation of 125 ms.
        for (deviations, probability) in
            [(0.0, 0.5), (1.0, 0.158_655), (2.0, 0.022_750), (3.0, 0.001_350), (4.0, 3.167e-5)]
        {
            let at = last + Duration::from_secs_f64(0.5 + 0.125 * deviations);
            let (phi, exact) = (detector.phi(at).unwrap(), -f64::log10(probability));
            assert!((phi - exact).abs() < 0.06 * exact.max(0.1), "{deviations}: {phi} for {exact}");
        }
        assert!(detector.phi(last + ms(1_000_000_000)).unwrap().is_finite());
    }

    #[test]
    fn one_lost_heartbeat_is_no_death_and_three_are() {
        let (detector, last) = regular(100);
        assert!(detector.phi(last + ms(500)).unwrap() < 0.5);
        assert!(detector.phi(last + ms(1000)).unwrap() < 8.0);
        assert!(detector.phi(last + ms(1500)).unwrap() > 8.0);
    }

    #[test]
    fn one_pause_does_not_blunt_it() {
        let (mut detector, last) = regular(100);
        let before = detector.phi(last + ms(2000)).unwrap();
        assert!(!detector.heartbeat(last + ms(60_000)), "that was not on time");
        let mut last = last + ms(60_000);
        for _ in 0..20 {
            last += ms(500);
            detector.heartbeat(last);
        }
        let after = detector.phi(last + ms(2000)).unwrap();
        assert!(after > before / 2.0, "{before} -> {after}");
    }

    #[test]
    fn a_bunch_is_one_heartbeat() {
        let (mut detector, last) = regular(100);
        for _ in 0..1000 {
            detector.heartbeat(last + ms(5000));
        }
        assert!(detector.mean().unwrap() >= ms(500));
    }

    #[test]
    fn a_slower_rhythm_is_learned() {
        let (mut detector, mut last) = regular(200);
        for _ in 0..200 {
            last += ms(2000);
            detector.heartbeat(last);
        }
        let mean = detector.mean().unwrap();
        assert!(mean > ms(1800), "{mean:?}");
        assert!(detector.phi(last + ms(2000)).unwrap() < 1.0);
    }

    #[test]
    fn a_pause_of_this_process_is_forgiven() {
        let (mut detector, last) = regular(20);
        let now = last + ms(10_500);
        assert!(detector.phi(now).unwrap() > 8.0);
        detector.forgive(ms(10_000));
        assert!(detector.phi(now).unwrap() < 1.0);
    }

    proptest! {
        /// Suspicion only grows while nothing arrives, and is never negative or no number.
        #[test]
        fn phi_grows_with_silence(gaps in prop::collection::vec(0_u64..100_000, 6..300), step in 1_u64..10_000) {
            let mut detector = Detector::new(DetectorOptions::default());
            let mut now = Duration::ZERO;
            for gap in gaps {
                now += ms(gap);
                detector.heartbeat(now);
            }
            let mut before = 0.0;
            for n in 0..50 {
                let Some(phi) = detector.phi(now + ms(n * step)) else { break };
                prop_assert!(phi.is_finite() && phi >= before, "{before} -> {phi}");
                before = phi;
            }
        }
    }
}
