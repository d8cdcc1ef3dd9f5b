//! How long writes took, by the part of the run in which they began.
//!
//! Writers are a closed loop: each sends its next write when the last is acknowledged. So the quantiles are those of the writes that were
//! made, not of a fixed rate: a writer that is held for 100 ms has one slow write then, and not all those that it would have begun.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use hdrhistogram::Histogram;

/// A part of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Period {
    /// Before the slots begin to move.
    #[default]
    Before,
    /// While they move.
    During,
    /// Afterwards.
    After,
}

impl Period {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::Before, Self::During, Self::After];
}

/// Digits of a time that are kept; so a quantile is off by 0.1 % at most.
const DIGITS: u8 = 3;

/// Times of writes by period, in microseconds, each rounded up.
#[derive(Debug, Default)]
pub struct Latencies {
    periods: BTreeMap<Period, Histogram<u64>>,
}

impl Latencies {
    /// Takes down a write that began in `period`.
    ///
    /// # Errors
    ///
    /// The time does not fit into a histogram.
    pub fn record(&mut self, period: Period, time: Duration) -> anyhow::Result<()> {
        let micros = u64::try_from(time.as_nanos().div_ceil(1000))?;
        self.period(period)?.record(micros).context("a latency is too long to be recorded")
    }

    /// Takes over what another writer took down.
    ///
    /// # Errors
    ///
    /// The times do not fit into a histogram.
    pub fn add(&mut self, other: &Self) -> anyhow::Result<()> {
        for (period, histogram) in &other.periods {
            self.period(*period)?.add(histogram).context("latencies cannot be summed up")?;
        }
        Ok(())
    }

    /// Writes that began in `period`.
    #[must_use]
    pub fn count(&self, period: Period) -> u64 {
        self.periods.get(&period).map_or(0, Histogram::len)
    }

    /// The time within which the part `quantile`, 0.0..=1.0, of the writes that began in `period` was acknowledged; none if there were none.
    #[must_use]
    pub fn quantile(&self, period: Period, quantile: f64) -> Option<Duration> {
        let histogram = self.periods.get(&period).filter(|histogram| !histogram.is_empty())?;
        Some(Duration::from_micros(histogram.value_at_quantile(quantile)))
    }

    /// The longest of them.
    #[must_use]
    pub fn longest(&self, period: Period) -> Option<Duration> {
        self.quantile(period, 1.0)
    }

    fn period(&mut self, period: Period) -> anyhow::Result<&mut Histogram<u64>> {
        use std::collections::btree_map::Entry;
        Ok(match self.periods.entry(period) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Histogram::new(DIGITS)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `found` is `expected` to the digits that are kept.
    fn close(found: Option<Duration>, expected: Duration) -> bool {
        found.is_some_and(|found| {
            let tolerance = expected.as_secs_f64() / 1000.0 + 1e-6;
            (found.as_secs_f64() - expected.as_secs_f64()).abs() <= tolerance
        })
    }

    #[test]
    fn quantiles_are_those_of_what_was_recorded_in_the_period() {
        let mut latencies = Latencies::default();
        for ms in 1..=1000 {
            latencies.record(Period::Before, Duration::from_millis(ms)).unwrap();
        }
        latencies.record(Period::During, Duration::from_secs(70)).unwrap();
        assert_eq!(Period::ALL.map(|period| latencies.count(period)), [1000, 1, 0]);
        for (quantile, ms) in [(0.5, 500), (0.99, 990), (0.999, 999)] {
            let found = latencies.quantile(Period::Before, quantile);
            assert!(close(found, Duration::from_millis(ms)), "{quantile}: {found:?}");
        }
        assert!(close(latencies.longest(Period::Before), Duration::from_secs(1)));
        assert!(close(latencies.longest(Period::During), Duration::from_secs(70)));
        assert!(close(latencies.quantile(Period::During, 0.5), Duration::from_secs(70)), "of one, each");
        assert_eq!(latencies.quantile(Period::After, 0.5), None);
        assert_eq!(latencies.longest(Period::After), None);
    }

    #[test]
    fn writers_are_summed_up_by_period() {
        let mut all = Latencies::default();
        for (period, ms) in [(Period::Before, 1), (Period::Before, 3), (Period::After, 90_000)] {
            let mut one = Latencies::default();
            one.record(period, Duration::from_millis(ms)).unwrap();
            all.add(&one).unwrap();
        }
        assert_eq!(Period::ALL.map(|period| all.count(period)), [2, 0, 1]);
        assert!(close(all.quantile(Period::Before, 0.5), Duration::from_millis(1)));
        assert!(close(all.longest(Period::Before), Duration::from_millis(3)));
        assert!(close(all.longest(Period::After), Duration::from_millis(90_000)));
    }

    #[test]
    fn no_write_takes_no_time() {
        let mut latencies = Latencies::default();
        latencies.record(Period::Before, Duration::from_nanos(1)).unwrap();
        assert_eq!(latencies.longest(Period::Before), Some(Duration::from_micros(1)));
    }
}
