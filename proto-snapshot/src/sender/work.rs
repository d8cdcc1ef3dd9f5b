//! What has to be sent, and by whom.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::missing::Span;

/// Largest unit of work, in bytes: small enough that lanes end at about the same time, large enough that opening the source is
/// rare. With two lanes, units of 8, 32 and 128 MiB took 0.43, 0.45 and 0.37 s for 1 GiB (medians of 5 interleaved rounds), which differ by less than
/// rounds with the same units do.
pub(super) const UNIT_BYTES: u64 = 32 << 20;

/// Spans up to this length, as a rule whole files, are taken in runs: a source that reads small files ahead of one who asks for them in
/// order (`source/ahead.rs`, the same length) would read for each of several lanes what the others get.
const SMALL: u64 = 64 << 10;
/// Spans of a run at most. What is read ahead at the end of a run is read in vain, so it is several batches long, and yet takes about as
/// long as a unit.
const RUN: usize = 1024;
/// Bytes of a run at most.
const RUN_BYTES: u64 = 4 << 20;

/// The bytes that no lane has taken.
#[derive(Debug)]
pub(super) struct Work {
    spans: Mutex<VecDeque<Span>>,
    /// Tells when the last one is taken.
    emptied: Notify,
    unit: u64,
}

impl Work {
    /// What is missing, to be taken in units of at most `unit` bytes.
    pub(super) fn new(missing: &[Span], unit: u64) -> Self {
        Self { spans: Mutex::new(missing.iter().copied().collect()), emptied: Notify::new(), unit }
    }

    fn spans(&self) -> MutexGuard<'_, VecDeque<Span>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts off the next unit, or the next run of small ones, and adds it to `taken`; nothing is added when there is no more.
    pub(super) fn take(&self, taken: &mut Vec<Span>) {
        let mut spans = self.spans();
        let Some(next) = spans.front_mut() else { return };
        if let Some(len) = next.len
            && len > self.unit
        {
            taken.push(Span { len: Some(self.unit), ..*next });
            next.offset += self.unit;
            next.len = Some(len - self.unit);
            return;
        }
        let small = |span: &Span| span.len.filter(|len| *len <= SMALL.min(self.unit));
        let mut bytes = 0;
        let run = spans.iter().take(RUN).map_while(small).take_while(|len| {
            bytes += len;
            bytes <= RUN_BYTES
        });
        let count = run.count().max(1);
        taken.extend(spans.drain(..count));
        if spans.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    /// Waits until all is taken.
    pub(super) async fn used_up(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.spans().is_empty()
    }

    pub(super) fn give_back(&self, spans: impl IntoIterator<Item = Span>) {
        self.spans().extend(spans);
    }
}

/// What is left of `units` of known length after their first `bytes` bytes.
pub(super) fn rest(units: &[Span], mut bytes: u64) -> Vec<Span> {
    let cut = |unit: &Span| {
        let done = unit.len.map_or(0, |len| len.min(bytes));
        bytes -= done;
        Span { offset: unit.offset.saturating_add(done), len: unit.len.map(|len| len - done), ..*unit }
    };
    units.iter().map(cut).filter(|left| left.len != Some(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_begins_within_a_unit() {
        let span = |file, offset, len| Span { file, offset, len: Some(len) };
        let units = [span(0, 5, 3), span(1, 0, 4), span(2, 0, 2)];
        assert_eq!(rest(&units, 0), units);
        assert_eq!(rest(&units, 3), units[1..]);
        assert_eq!(rest(&units, 5), [span(1, 2, 2), units[2]]);
        assert_eq!(rest(&units, 9), []);
    }

    #[test]
    fn units_are_cut_when_they_are_taken() {
        let span = |file, offset, len| Span { file, offset, len };
        let huge = i64::MAX.unsigned_abs();
        let work = Work::new(&[span(0, 1, Some(10)), span(1, 0, Some(huge)), span(2, 7, None)], 4);
        let mut taken = Vec::new();
        (0..4).for_each(|_| work.take(&mut taken));
        work.give_back([span(0, 3, Some(5))]);
        work.take(&mut taken);
        let units = [(0, 1, 4), (0, 5, 4), (0, 9, 2), (1, 0, 4), (1, 4, 4)];
        assert_eq!(taken, units.map(|(file, offset, len)| span(file, offset, Some(len))));
        assert_eq!(work.spans().len(), 3);
    }

    #[test]
    fn small_files_are_taken_in_runs() {
        let file = |file, len| Span { file, offset: 0, len: Some(len) };
        let mut files: Vec<Span> = (0..2000).map(|number| file(number, 4096)).collect();
        files.push(file(2000, SMALL + 1));
        files.extend((2001..2100).map(|number| file(number, SMALL)));
        let work = Work::new(&files, UNIT_BYTES);
        let run = || {
            let mut taken = Vec::new();
            work.take(&mut taken);
            taken.first().map(|first| (first.file, taken.len()))
        };
        let runs: Vec<_> = std::iter::from_fn(run).collect();
        assert_eq!(runs, [(0, RUN), (1024, 976), (2000, 1), (2001, 64), (2065, 35)]);
        assert!(work.is_empty());
    }
}
