//! What has to be sent, and by whom.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::missing::Span;

/// Largest unit of work, in bytes: small enough that lanes end at about the same time, large enough that opening the source is
/// rare.
pub(super) const UNIT_BYTES: u64 = 32 << 20;

/// The bytes that no lane has taken.
#[derive(Debug)]
pub(super) struct Work {
    spans: Mutex<VecDeque<Span>>,
    unit: u64,
}

impl Work {
    /// What is missing, to be taken in units of at most `unit` bytes.
    pub(super) fn new(missing: &[Span], unit: u64) -> Self {
        Self { spans: Mutex::new(missing.iter().copied().collect()), unit }
    }

    fn spans(&self) -> MutexGuard<'_, VecDeque<Span>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts off the next unit.
    pub(super) fn take(&self) -> Option<Span> {
        let mut spans = self.spans();
        let next = spans.front_mut()?;
        match next.len {
            Some(len) if len > self.unit => {
                let unit = Span { len: Some(self.unit), ..*next };
                next.offset += self.unit;
                next.len = Some(len - self.unit);
                Some(unit)
            }
            _ => spans.pop_front(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.spans().is_empty()
    }

    pub(super) fn give_back(&self, spans: impl IntoIterator<Item = Span>) {
        self.spans().extend(spans);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_cut_when_they_are_taken() {
        let span = |file, offset, len| Span { file, offset, len };
        let huge = i64::MAX.unsigned_abs();
        let work = Work::new(&[span(0, 1, Some(10)), span(1, 0, Some(huge)), span(2, 7, None)], 4);
        let mut taken: Vec<Span> = std::iter::from_fn(|| work.take()).take(4).collect();
        work.give_back([span(0, 3, Some(5))]);
        taken.extend(work.take());
        let units = [(0, 1, 4), (0, 5, 4), (0, 9, 2), (1, 0, 4), (1, 4, 4)];
        assert_eq!(taken, units.map(|(file, offset, len)| span(file, offset, Some(len))));
        assert_eq!(work.spans().len(), 3);
    }
}
