//! The writes that clients ask for, and what they answer.

use bytes::Bytes;
use proto::migration::entry::{ENTRY_OVERHEAD, MAX_KEY_BYTES};

/// Bytes of a key and its value together: what fits into a batch of a migration, as targets take it by default. A slot with more in it could not be moved.
pub const MAX_ROW_BYTES: usize = (16 << 20) - ENTRY_OVERHEAD;

/// When a stored value expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetExpiry {
    /// Never; an expiry that the key had is removed.
    Never,
    /// As the key did before.
    Keep,
    /// At this time, in milliseconds since the Unix epoch. In the past: the key is removed.
    At(u64),
}

/// Whether a value is stored at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetCondition {
    /// In any case.
    Always,
    /// Only if the key does not exist.
    IfAbsent,
    /// Only if the key exists.
    IfPresent,
}

/// Whether a new expiry is set: Redis' NX, XX, GT, LT. All that are set must hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExpireCondition {
    /// The key has no expiry.
    pub if_none: bool,
    /// The key has an expiry.
    pub if_some: bool,
    /// Later than the present one; none counts as infinitely late.
    pub if_later: bool,
    /// Earlier than the present one.
    pub if_earlier: bool,
}

/// One write. Its keys are all of one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteOp {
    /// Stores a value.
    Set {
        /// The key.
        key: Bytes,
        /// Its new value.
        value: Bytes,
        /// When it expires.
        expiry: SetExpiry,
        /// Whether it is stored.
        condition: SetCondition,
        /// Answer with the value before.
        want_old: bool,
    },
    /// Stores many values that never expire.
    SetMany {
        /// Keys and values; the last of equal keys wins.
        pairs: Vec<(Bytes, Bytes)>,
    },
    /// Deletes keys; answers how many existed.
    Delete {
        /// The keys.
        keys: Vec<Bytes>,
    },
    /// Deletes a key; answers with the value that it had.
    Take {
        /// The key.
        key: Bytes,
    },
    /// Sets when a key expires; answers 1 if it did, else 0. In the past: deletes the key.
    Expire {
        /// The key.
        key: Bytes,
        /// Milliseconds since the Unix epoch.
        at: u64,
        /// Whether it is set.
        condition: ExpireCondition,
    },
    /// Removes the expiry of a key; answers 1 if it had one, else 0.
    Persist {
        /// The key.
        key: Bytes,
    },
    /// Adds to the integer that the value is (0 if there is none); answers the sum.
    Add {
        /// The key.
        key: Bytes,
        /// What to add.
        delta: i64,
    },
}

impl WriteOp {
    /// Whether it may answer with a value, of any size that a value can have.
    #[must_use]
    pub fn answers_value(&self) -> bool {
        matches!(self, Self::Set { want_old: true, .. } | Self::Take { .. })
    }

    /// Why it is not stored, where a slot could not be moved to another node with it.
    #[must_use]
    pub fn too_large(&self) -> Option<String> {
        match self {
            Self::Set { key, value, .. } => row_too_large(key.len(), value.len()),
            Self::SetMany { pairs } => {
                pairs.iter().find_map(|(key, value)| row_too_large(key.len(), value.len()))
            }
            Self::Add { key, .. } => row_too_large(key.len(), 0),
            Self::Delete { .. } | Self::Take { .. } | Self::Expire { .. } | Self::Persist { .. } => None,
        }
    }
}

/// Why no row has a key and a value of so many bytes, if none has.
pub(super) fn row_too_large(key_len: usize, value_len: usize) -> Option<String> {
    if key_len > MAX_KEY_BYTES {
        return Some(format!("the key has {key_len} bytes; the limit is {MAX_KEY_BYTES}"));
    }
    let len = key_len.saturating_add(value_len);
    (len > MAX_ROW_BYTES)
        .then(|| format!("key and value have {len} bytes together; the limit is {MAX_ROW_BYTES}"))
}

/// What a write answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// Its condition did not hold; nothing was done.
    NotDone,
    /// The value before, where it was asked for.
    Old(Option<Bytes>),
    /// A number.
    Integer(i64),
    /// The value is not an integer of 64 bits; nothing was done.
    NotAnInteger,
    /// The sum would not be an integer of 64 bits; nothing was done.
    Overflow,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_row_is_what_a_migration_takes_by_default() {
        let batch = proto::migration::limits::Limits::default().batch_bytes;
        assert_eq!(MAX_ROW_BYTES + ENTRY_OVERHEAD, usize::try_from(batch).unwrap());
    }
}
