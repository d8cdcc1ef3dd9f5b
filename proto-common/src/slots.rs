//! Hash slots and ranges of them.
//!
//! The key space is cut into [`SLOT_COUNT`] slots exactly as in Redis Cluster, so that its client libraries
//! route correctly: the slot is CRC16/XMODEM of the key's hash tag, modulo 16384.

use std::fmt;
use std::str::FromStr;

use crc16::{State, XMODEM};
use thiserror::Error;

use crate::error::{CommonReason, Error};
use crate::text::printable;
use crate::v1;

/// Number of slots: 16384, from the [Redis Cluster specification](https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/).
pub const SLOT_COUNT: u16 = 16_384;

/// How far above the slot epoch that it had a node claims slots that an operator has it keep: 65536.
///
/// The node that may have taken them over is lost, and may have handed them on before, each time at an epoch 1 higher: two owners at the same
/// epoch would both serve, and neither would ever give way. No chain of moves gets this far while one hand-over waits for its operator.
pub const RECLAIM_STEP: u64 = 1 << 16;

/// The slot of `key`, in `0..SLOT_COUNT`.
///
/// If the key holds `{...}` with something between the first `{` and the first `}` after it, only that part
/// is hashed, so that keys with the same tag share a slot.
///
/// ```
/// use proto_common::slots::slot_of;
/// assert_eq!(slot_of(b"foo"), 12182);
/// assert_eq!(slot_of(b"{user1000}.following"), slot_of(b"{user1000}.followers"));
/// ```
#[must_use]
pub fn slot_of(key: &[u8]) -> u16 {
    State::<XMODEM>::calculate(hash_tag(key)) % SLOT_COUNT
}

/// The part of `key` that is hashed.
fn hash_tag(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|&b| b == b'{') else { return key };
    let tail = &key[open + 1..];
    match tail.iter().position(|&b| b == b'}') {
        // An empty tag `{}` doesn't count: the whole key is hashed.
        None | Some(0) => key,
        Some(close) => &tail[..close],
    }
}

/// A range of slots that is never empty: `start` inclusive, `end` exclusive, `start < end <= SLOT_COUNT`.
///
/// [`Display`](fmt::Display) and [`FromStr`] use the operator's form, which is *inclusive* at both ends as in
/// Redis: `0-8191` is `start 0, end 8192`, and `5` is the one slot 5.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotRange {
    start: u16,
    end: u16,
}

/// Why two numbers, or a text, are not a range of slots.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SlotRangeError {
    /// `start >= end` or `end > SLOT_COUNT`; the numbers as they were given.
    #[error("slot range start {start}, end {end} (exclusive) is not start < end <= {SLOT_COUNT}")]
    Bounds {
        /// First slot.
        start: u32,
        /// One past the last slot.
        end: u32,
    },
    /// The text is not `N` or `N-M` with `N <= M < SLOT_COUNT`.
    #[error("\"{0}\" is not a slot range; write one slot, or first-last as in 0-8191")]
    Syntax(String),
    /// The message has no range where one is needed.
    #[error("the slot range is missing")]
    Missing,
    /// A range can only be split at a slot behind its first and before its end.
    #[error("slot {slot} does not split {range}: it must lie behind the first slot and within the range")]
    Split {
        /// The range to split.
        range: SlotRange,
        /// Where it should have been split.
        slot: u16,
    },
}

impl SlotRangeError {
    /// The error for a caller that sent it in `field` (a path such as `header.slots`).
    #[must_use]
    pub fn at(self, field: impl Into<String>) -> Error {
        Error::from(self.clone()).violation(field, self.to_string())
    }
}

impl From<SlotRangeError> for Error {
    fn from(error: SlotRangeError) -> Self {
        Self::new(CommonReason::InvalidSlotRange, error.to_string())
    }
}

#[allow(clippy::len_without_is_empty, reason = "a slot range is never empty")]
impl SlotRange {
    /// All slots.
    pub const FULL: Self = Self { start: 0, end: SLOT_COUNT };

    /// The slots from `start` up to, but not including, `end`.
    ///
    /// # Errors
    ///
    /// [`SlotRangeError::Bounds`] unless `start < end <= SLOT_COUNT`.
    pub fn new(start: u16, end: u16) -> Result<Self, SlotRangeError> {
        if start < end && end <= SLOT_COUNT {
            Ok(Self { start, end })
        } else {
            Err(SlotRangeError::Bounds { start: start.into(), end: end.into() })
        }
    }

    /// Reads a range from a message in which the field may be unset.
    ///
    /// # Errors
    ///
    /// [`SlotRangeError::Missing`] if it is, or [`SlotRangeError::Bounds`].
    pub fn from_wire(range: Option<v1::SlotRange>) -> Result<Self, SlotRangeError> {
        range.ok_or(SlotRangeError::Missing)?.try_into()
    }

    /// First slot.
    #[must_use]
    pub const fn start(self) -> u16 {
        self.start
    }

    /// One past the last slot.
    #[must_use]
    pub const fn end(self) -> u16 {
        self.end
    }

    /// Number of slots, at least 1.
    #[must_use]
    pub const fn len(self) -> u16 {
        self.end - self.start
    }

    /// Whether `slot` lies in the range.
    #[must_use]
    pub const fn contains(self, slot: u16) -> bool {
        self.start <= slot && slot < self.end
    }

    /// Whether all of `other` lies in the range.
    #[must_use]
    pub const fn contains_range(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether the two share a slot.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The slots that both hold.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end)).ok()
    }

    /// The slots of `self` that `other` does not hold: none, one or two ranges, in order.
    #[must_use]
    pub fn difference(self, other: Self) -> Vec<Self> {
        [Self::new(self.start, self.end.min(other.start)), Self::new(self.start.max(other.end), self.end)]
            .into_iter()
            .flatten()
            .collect()
    }

    /// `[start, slot)` and `[slot, end)`.
    ///
    /// # Errors
    ///
    /// [`SlotRangeError::Split`] unless `start < slot < end`.
    pub fn split_at(self, slot: u16) -> Result<(Self, Self), SlotRangeError> {
        if self.start < slot && slot < self.end {
            Ok((Self { start: self.start, end: slot }, Self { start: slot, end: self.end }))
        } else {
            Err(SlotRangeError::Split { range: self, slot })
        }
    }

    /// The slot at which the range splits into halves; equal to `start` if there is one slot only.
    #[must_use]
    pub const fn middle(self) -> u16 {
        self.start + self.len() / 2
    }

    /// The slots in order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = u16> + ExactSizeIterator {
        self.start..self.end
    }
}

impl fmt::Display for SlotRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.len() == 1 {
            f.pad(&self.start.to_string())
        } else {
            f.pad(&format!("{}-{}", self.start, self.end - 1))
        }
    }
}

impl fmt::Debug for SlotRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotRange({}..{})", self.start, self.end)
    }
}

impl FromStr for SlotRange {
    type Err = SlotRangeError;

    fn from_str(text: &str) -> Result<Self, SlotRangeError> {
        let syntax = || SlotRangeError::Syntax(printable(text, 32));
        // `u16::from_str` also takes a leading `+`.
        let slot = |digits: &str| {
            let digits = digits.trim();
            let all_digits = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            all_digits.then(|| digits.parse::<u16>().ok()).flatten().filter(|&slot| slot < SLOT_COUNT)
        };
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (slot(first), slot(last)),
            None => (slot(text), slot(text)),
        };
        let (Some(first), Some(last)) = (first, last) else { return Err(syntax()) };
        Self::new(first, last + 1).map_err(|_| syntax())
    }
}

impl TryFrom<v1::SlotRange> for SlotRange {
    type Error = SlotRangeError;

    fn try_from(range: v1::SlotRange) -> Result<Self, SlotRangeError> {
        let v1::SlotRange { start, end } = range;
        let bounds = SlotRangeError::Bounds { start, end };
        let (Ok(start), Ok(end)) = (u16::try_from(start), u16::try_from(end)) else { return Err(bounds) };
        Self::new(start, end)
    }
}

impl From<SlotRange> for v1::SlotRange {
    fn from(range: SlotRange) -> Self {
        let SlotRange { start, end } = range;
        Self { start: start.into(), end: end.into() }
    }
}

#[cfg(test)]
#[path = "slots_tests.rs"]
mod tests;
