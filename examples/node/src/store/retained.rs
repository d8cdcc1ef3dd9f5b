//! How much a change log holds: entries and bytes behind what was released, and since when.
//!
//! Kept in memory in steps of some entries and milliseconds, so it takes little however long the log is; of a step that is
//! released in part, all counts.

use std::collections::VecDeque;

/// Entries of a step, at first.
const STEP_ENTRIES: u64 = 64;
/// Milliseconds that a step spans, at first.
const STEP_MS: u64 = 10;
/// Steps that are kept. More are joined to larger ones.
const MAX_STEPS: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Step {
    last_seq: u64,
    entries: u64,
    bytes: u64,
    since_unix_ms: u64,
}

#[derive(Debug)]
pub(super) struct Retained {
    steps: VecDeque<Step>,
    entries: u64,
    bytes: u64,
    /// How much larger than at first steps are.
    scale: u64,
}

impl Retained {
    pub(super) fn new() -> Self {
        Self { steps: VecDeque::new(), entries: 0, bytes: 0, scale: 1 }
    }

    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn oldest_unix_ms(&self) -> Option<u64> {
        self.steps.front().map(|step| step.since_unix_ms)
    }

    /// One more entry; sequences rise.
    pub(super) fn push(&mut self, seq: u64, bytes: u64, unix_ms: u64) {
        self.entries += 1;
        self.bytes += bytes;
        if let Some(step) = self.steps.back_mut()
            && step.entries < STEP_ENTRIES * self.scale
            && unix_ms < step.since_unix_ms.saturating_add(STEP_MS * self.scale)
        {
            *step = Step { last_seq: seq, entries: step.entries + 1, bytes: step.bytes + bytes, ..*step };
            return;
        }
        self.steps.push_back(Step { last_seq: seq, entries: 1, bytes, since_unix_ms: unix_ms });
        if self.steps.len() > MAX_STEPS {
            self.coarsen();
        }
    }

    /// Entries up to `through` are not needed any more.
    pub(super) fn release(&mut self, through: u64) {
        while let Some(step) = self.steps.front().filter(|step| step.last_seq <= through) {
            self.entries -= step.entries;
            self.bytes -= step.bytes;
            self.steps.pop_front();
        }
        if self.steps.is_empty() {
            self.scale = 1;
        }
    }

    fn coarsen(&mut self) {
        self.scale = self.scale.saturating_mul(2);
        let steps: Vec<Step> = self.steps.drain(..).collect();
        self.steps = steps
            .chunks(2)
            .filter_map(|pair| {
                let (first, last) = (pair.first()?, pair.last()?);
                let sum = |of: fn(&Step) -> u64| pair.iter().map(of).sum();
                Some(Step {
                    last_seq: last.last_seq,
                    entries: sum(|step| step.entries),
                    bytes: sum(|step| step.bytes),
                    since_unix_ms: first.since_unix_ms,
                })
            })
            .collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// Never less than what is there, exact when all is released, and no more steps than there may be.
        #[test]
        fn bounds_what_is_there(
            pushes in proptest::collection::vec((1_u64..100, 0_u64..30), 1..300),
            released in 0_u64..400,
        ) {
            let mut retained = Retained::new();
            let mut all = Vec::new();
            let mut now = 0;
            for (seq, (bytes, pause)) in (1..).zip(pushes) {
                now += pause;
                retained.push(seq, bytes, now);
                all.push((seq, bytes, now));
            }
            retained.release(released);
            let left: Vec<_> = all.iter().filter(|(seq, _, _)| *seq > released).collect();
            proptest::prop_assert!(retained.entries() >= left.len() as u64);
            proptest::prop_assert!(retained.entries() < left.len() as u64 + STEP_ENTRIES);
            proptest::prop_assert!(retained.bytes() >= left.iter().map(|(_, bytes, _)| bytes).sum());
            if let Some((_, _, since)) = left.first() {
                let oldest = retained.oldest_unix_ms().unwrap();
                proptest::prop_assert!(oldest <= *since && *since < oldest + STEP_MS);
            }
            retained.release(u64::MAX);
            proptest::prop_assert_eq!((retained.entries(), retained.bytes(), retained.oldest_unix_ms()), (0, 0, None));
        }
    }

    #[test]
    fn a_long_log_takes_no_more_memory() {
        let mut retained = Retained::new();
        for n in 0..1_000_000_u64 {
            retained.push(n + 1, 10, n / 2);
        }
        assert!(retained.steps.len() <= MAX_STEPS);
        assert_eq!((retained.entries(), retained.bytes()), (1_000_000, 10_000_000));
        retained.release(500_000);
        assert!((500_000..600_000).contains(&retained.entries()), "{}", retained.entries());
    }
}
