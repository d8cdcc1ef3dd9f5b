//! The ownership fence of a shard.

use std::fmt;

use crate::error::{CommonReason, Error};
use crate::ids::ShardId;
use crate::v1;

/// Who may act for a shard: compared by `epoch`, then by `term`.
///
/// A node persists the highest fence that it has seen per shard and refuses anything lower, so that a leader
/// that was deposed without noticing changes nothing. [`Default`] is the lowest fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Fence {
    // The derived order compares the fields from top to bottom.
    /// Configuration epoch of the shard: rises with every change of its range or members.
    pub epoch: u64,
    /// Raft term of the leader that speaks.
    pub term: u64,
}

impl Fence {
    /// A fence from its two parts.
    #[must_use]
    pub const fn new(epoch: u64, term: u64) -> Self {
        Self { epoch, term }
    }

    /// Refuses this fence if it is lower than `current`, the one that the node holds for `shard`.
    ///
    /// # Errors
    ///
    /// `STALE_FENCE` (`FAILED_PRECONDITION`), with `current_epoch`, `current_term`, `epoch`, `term` and
    /// `shard_id` as metadata. Final: the caller is no longer, or not yet, who it believes to be.
    pub fn check(self, current: Self, shard: &ShardId) -> Result<(), Error> {
        if self >= current {
            return Ok(());
        }
        let message = format!(
            "the fence {self} is older than {current}, which this node holds for shard {shard}; \
             learn the shard's current epoch and leader, then start again"
        );
        Err(Error::new(CommonReason::StaleFence, message)
            .metadata("shard_id", shard.as_str())
            .metadata("epoch", self.epoch.to_string())
            .metadata("term", self.term.to_string())
            .metadata("current_epoch", current.epoch.to_string())
            .metadata("current_term", current.term.to_string()))
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "(epoch {}, term {})", self.epoch, self.term)
    }
}

impl From<v1::Fence> for Fence {
    fn from(fence: v1::Fence) -> Self {
        let v1::Fence { epoch, term } = fence;
        Self { epoch, term }
    }
}

impl From<Fence> for v1::Fence {
    fn from(fence: Fence) -> Self {
        let Fence { epoch, term } = fence;
        Self { epoch, term }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Code;

    #[test]
    fn a_lower_fence_is_refused_with_the_current_one() {
        let shard = ShardId::new("s1").unwrap();
        let error = Fence::new(3, 9).check(Fence::new(4, 1), &shard).unwrap_err();
        assert_eq!((error.code(), error.reason()), (Code::FailedPrecondition, "STALE_FENCE"));
        assert!(!error.is_retryable());
        for (key, value) in
            [("epoch", "3"), ("term", "9"), ("current_epoch", "4"), ("current_term", "1"), ("shard_id", "s1")]
        {
            assert_eq!(error.get(key), Some(value));
        }
        assert!(Fence::new(4, 1).check(Fence::new(4, 1), &shard).is_ok());
        assert!(Fence::new(4, 2).check(Fence::new(4, 1), &shard).is_ok());
        assert!(Fence::new(5, 0).check(Fence::new(4, 1), &shard).is_ok());
    }

    proptest! {
        #[test]
        fn ordered_by_epoch_then_term(a in any::<(u64, u64)>(), b in any::<(u64, u64)>()) {
            prop_assert_eq!(Fence::new(a.0, a.1).cmp(&Fence::new(b.0, b.1)), a.cmp(&b));
            let fence = Fence::new(a.0, a.1);
            prop_assert_eq!(Fence::from(v1::Fence::from(fence)), fence);
        }
    }
}
