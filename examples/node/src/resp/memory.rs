//! What clients make the node hold: requests that are not all there or not done, and replies that were not taken; of each with what arguments and values take
//! beside their bytes, which for empty ones is thirty times as much.
//!
//! Each is bounded by itself, but ten thousand clients may come with one each. So all together have a limit, and who brings much when little is left is
//! refused. What every connection has, buffers of up to some 200 KiB, is not counted.

use proto::common::shares::{Share, Shares};

/// What one connection may hold in each direction without being counted, in bytes; also the steps in which it is counted.
pub(super) const STEP: usize = 16 << 10;

/// Of all clients of a server. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Memory {
    shares: Shares<u64>,
}

/// Others hold so much that there is no room for more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the memory for what clients send and do not take is used up; try again later")]
pub(super) struct UsedUp;

impl Memory {
    /// `bytes` for all. Half of it for one that is alone, and less the less is left, so that there is always something for the next one.
    pub(super) fn new(bytes: usize) -> Self {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        Self { shares: Shares::graded(bytes, bytes / 2) }
    }

    /// Of the connection with this number.
    pub(super) fn of(&self, connection: u64) -> Held {
        Held { memory: self.clone(), connection, shares: Vec::new(), bytes: 0 }
    }
}

/// What a connection holds in one direction.
#[derive(Debug)]
pub(super) struct Held {
    memory: Memory,
    connection: u64,
    shares: Vec<Share<u64>>,
    /// In `shares`.
    bytes: usize,
}

impl Held {
    /// It holds `bytes` now.
    pub(super) fn set(&mut self, bytes: usize) -> Result<(), UsedUp> {
        if bytes <= STEP {
            self.shares.clear();
            self.bytes = 0;
            return Ok(());
        }
        if bytes > self.bytes {
            // In larger steps the more it is, so that there are few of them, as long as there is room for that.
            let more = bytes - self.bytes;
            let steps = [more.max(self.bytes / 8).next_multiple_of(STEP), more];
            let take = |more: usize| {
                self.memory.shares.take(Some(&self.connection), more as u64).ok().map(|share| (share, more))
            };
            let (share, more) = steps.into_iter().find_map(take).ok_or(UsedUp)?;
            self.shares.push(share);
            self.bytes += more;
        } else if bytes < self.bytes / 2 {
            self.shares.clear();
            self.bytes = bytes.next_multiple_of(STEP);
            self.shares.push(self.memory.shares.adopt(Some(&self.connection), self.bytes as u64));
        }
        Ok(())
    }

    /// It holds `bytes` now, if that is more than before.
    pub(super) fn grow(&mut self, bytes: usize) -> Result<(), UsedUp> {
        if bytes > self.bytes { self.set(bytes) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn many_that_hold_little_are_counted() {
        let memory = Memory::new(64 * MIB);
        let mut all: Vec<_> = (0..1000).map(|number| memory.of(number)).collect();
        let taken = all.iter_mut().filter_map(|held| held.set(200 << 10).ok()).count();
        assert!((256..64 * MIB / (200 << 10)).contains(&taken), "{taken}");
    }

    #[test]
    fn many_that_hold_much_leave_something_and_give_it_back() {
        let memory = Memory::new(64 * MIB);
        let mut large: Vec<_> = (0..100).map(|number| memory.of(number)).collect();
        let taken = large.iter_mut().filter_map(|held| held.set(8 * MIB).ok()).count();
        assert!((5..8).contains(&taken), "{taken}");
        let mut small = memory.of(100);
        small.set(2 * MIB).unwrap();
        assert_eq!(large[99].set(8 * MIB), Err(UsedUp));
        large[99].set(STEP).unwrap();
        large.iter_mut().for_each(|held| held.set(0).unwrap());
        assert_eq!(memory.shares.taken(), 2 * MIB as u64);
        let mut alone = memory.of(101);
        (1..=28 * MIB).step_by(64 << 10).for_each(|bytes| alone.set(bytes).unwrap());
        assert!(alone.shares.len() < 64, "{}", alone.shares.len());
        assert_eq!(alone.set(33 * MIB), Err(UsedUp), "half of all at most");
        alone.set(MIB).unwrap();
        assert_eq!(memory.shares.taken(), 3 * MIB as u64, "it holds less now");
        drop((small, alone));
        assert_eq!(memory.shares.taken(), 0);
    }
}
