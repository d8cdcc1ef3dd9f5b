//! One write transaction: rows, with the expiry index and the slot counts kept in step.

use std::collections::HashMap;

use bytes::Bytes;
use redb::{ReadableTable as _, Table, WriteTransaction};

use super::ops::{ExpireCondition, Outcome, SetCondition, SetExpiry, WriteOp};
use super::tables::{self, Row, expiry_key, row_key, split_expiry_key, split_row_key};
use super::{SlotCounts, StoreError};
use crate::common::{SlotRange, slot_of};

/// The tables of rows, open in a write transaction.
pub(super) struct RowsTxn<'t> {
    rows: Table<'t, &'static [u8], &'static [u8]>,
    expiry: Table<'t, &'static [u8], ()>,
    counts: Table<'t, u16, u64>,
    deltas: HashMap<u16, i64>,
    now: u64,
}

impl std::fmt::Debug for RowsTxn<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RowsTxn").field("now", &self.now).finish_non_exhaustive()
    }
}

/// What a row was before it changed.
struct Before {
    live: bool,
    expires_at: Option<u64>,
    value: Bytes,
}

impl<'t> RowsTxn<'t> {
    pub(super) fn open(txn: &'t WriteTransaction, now: u64) -> Result<Self, StoreError> {
        Ok(Self {
            rows: txn.open_table(tables::ROWS)?,
            expiry: txn.open_table(tables::EXPIRY)?,
            counts: txn.open_table(tables::SLOT_COUNTS)?,
            deltas: HashMap::new(),
            now,
        })
    }

    /// Writes the slot counts. The result belongs into the counts in memory, after the commit.
    pub(super) fn finish(mut self) -> Result<CountDeltas, StoreError> {
        self.deltas.retain(|_, delta| *delta != 0);
        for (&slot, &delta) in &self.deltas {
            let count = self.counts.get(slot)?.map_or(0, |count| count.value());
            let changed = count
                .checked_add_signed(delta)
                .ok_or_else(|| StoreError::Damaged(format!("slot {slot} counts fewer rows than it has")))?;
            if changed == 0 {
                self.counts.remove(slot)?;
            } else {
                self.counts.insert(slot, changed)?;
            }
        }
        Ok(CountDeltas(self.deltas))
    }

    pub(super) fn apply(&mut self, op: &WriteOp) -> Result<Outcome, StoreError> {
        match op {
            WriteOp::Set { key, value, expiry, condition, want_old } => {
                self.set(key, value, *expiry, *condition, *want_old)
            }
            WriteOp::SetMany { pairs } => {
                for (key, value) in pairs {
                    self.put(&row_key(slot_of(key), key), Row { expires_at: None, value })?;
                }
                Ok(Outcome::Done)
            }
            WriteOp::Delete { keys } => {
                let mut deleted = 0;
                for key in keys {
                    if self.delete(&row_key(slot_of(key), key))? {
                        deleted += 1;
                    }
                }
                Ok(Outcome::Integer(deleted))
            }
            WriteOp::Take { key } => {
                let row = row_key(slot_of(key), key);
                let before = self.before(&row)?;
                if before.is_some() {
                    self.delete(&row)?;
                }
                Ok(Outcome::Old(before.filter(|before| before.live).map(|before| before.value)))
            }
            WriteOp::Expire { key, at, condition } => self.expire(key, *at, *condition),
            WriteOp::Persist { key } => {
                let row = row_key(slot_of(key), key);
                match self.before(&row)? {
                    Some(before) if before.live && before.expires_at.is_some() => {
                        self.put(&row, Row { expires_at: None, value: &before.value })?;
                        Ok(Outcome::Integer(1))
                    }
                    _ => Ok(Outcome::Integer(0)),
                }
            }
            WriteOp::Add { key, delta } => self.add(key, *delta),
        }
    }

    fn set(
        &mut self,
        key: &[u8],
        value: &[u8],
        expiry: SetExpiry,
        condition: SetCondition,
        want_old: bool,
    ) -> Result<Outcome, StoreError> {
        let row = row_key(slot_of(key), key);
        let need_before = want_old || condition != SetCondition::Always || expiry == SetExpiry::Keep;
        let before = if need_before { self.before(&row)?.filter(|before| before.live) } else { None };
        let wanted = match condition {
            SetCondition::Always => true,
            SetCondition::IfAbsent => before.is_none(),
            SetCondition::IfPresent => before.is_some(),
        };
        if wanted {
            let expires_at = match expiry {
                SetExpiry::Never => None,
                SetExpiry::Keep => before.as_ref().and_then(|before| before.expires_at),
                SetExpiry::At(at) => Some(at),
            };
            if expires_at.is_some_and(|at| at <= self.now) {
                self.delete(&row)?;
            } else {
                self.put(&row, Row { expires_at, value })?;
            }
        }
        Ok(match (want_old, wanted) {
            (true, _) => Outcome::Old(before.map(|before| before.value)),
            (false, true) => Outcome::Done,
            (false, false) => Outcome::NotDone,
        })
    }

    fn expire(&mut self, key: &[u8], at: u64, condition: ExpireCondition) -> Result<Outcome, StoreError> {
        let row = row_key(slot_of(key), key);
        let Some(before) = self.before(&row)?.filter(|before| before.live) else {
            return Ok(Outcome::Integer(0));
        };
        let ExpireCondition { if_none, if_some, if_later, if_earlier } = condition;
        let refused = (if_none && before.expires_at.is_some())
            || (if_some && before.expires_at.is_none())
            || (if_later && before.expires_at.is_none_or(|present| at <= present))
            || (if_earlier && before.expires_at.is_some_and(|present| at >= present));
        if refused {
            return Ok(Outcome::Integer(0));
        }
        if at <= self.now {
            self.delete(&row)?;
        } else {
            self.put(&row, Row { expires_at: Some(at), value: &before.value })?;
        }
        Ok(Outcome::Integer(1))
    }

    fn add(&mut self, key: &[u8], delta: i64) -> Result<Outcome, StoreError> {
        let row = row_key(slot_of(key), key);
        let before = self.before(&row)?.filter(|before| before.live);
        let Some(present) = before.as_ref().map_or(Some(0), |before| parse_integer(&before.value)) else {
            return Ok(Outcome::NotAnInteger);
        };
        let Some(sum) = present.checked_add(delta) else {
            return Ok(Outcome::Overflow);
        };
        let expires_at = before.and_then(|before| before.expires_at);
        self.put(&row, Row { expires_at, value: sum.to_string().as_bytes() })?;
        Ok(Outcome::Integer(sum))
    }

    fn before(&self, row: &[u8]) -> Result<Option<Before>, StoreError> {
        let Some(stored) = self.rows.get(row)? else {
            return Ok(None);
        };
        let decoded = Row::decode(stored.value())?;
        Ok(Some(Before {
            live: decoded.is_live(self.now),
            expires_at: decoded.expires_at,
            value: Bytes::copy_from_slice(decoded.value),
        }))
    }

    /// Stores a row, whatever was there.
    pub(super) fn put(&mut self, row: &[u8], new: Row<'_>) -> Result<(), StoreError> {
        let old = self.rows.insert(row, new.encode().as_slice())?;
        let is_new = old.is_none();
        let old_expiry =
            old.map(|old| Row::decode(old.value()).map(|old| old.expires_at)).transpose()?.flatten();
        if is_new {
            self.count(row, 1)?;
        }
        if old_expiry != new.expires_at {
            if let Some(at) = old_expiry {
                self.expiry.remove(expiry_key(at, row).as_slice())?;
            }
            if let Some(at) = new.expires_at {
                self.expiry.insert(expiry_key(at, row).as_slice(), ())?;
            }
        }
        Ok(())
    }

    /// Removes a row; true if a live one was there.
    fn delete(&mut self, row: &[u8]) -> Result<bool, StoreError> {
        let (live, expires_at) = match self.rows.remove(row)? {
            None => return Ok(false),
            Some(old) => {
                let old = Row::decode(old.value())?;
                (old.is_live(self.now), old.expires_at)
            }
        };
        self.count(row, -1)?;
        if let Some(at) = expires_at {
            self.expiry.remove(expiry_key(at, row).as_slice())?;
        }
        Ok(live)
    }

    fn count(&mut self, row: &[u8], delta: i64) -> Result<(), StoreError> {
        let (slot, _) = split_row_key(row)?;
        *self.deltas.entry(slot).or_default() += delta;
        Ok(())
    }

    /// Removes at most `limit` rows whose time has come; returns how many there were.
    pub(super) fn delete_expired(&mut self, limit: usize) -> Result<usize, StoreError> {
        let due = {
            let mut due = Vec::new();
            for entry in self.expiry.iter()? {
                let (entry, _) = entry?;
                let (at, row) = split_expiry_key(entry.value())?;
                if at > self.now || due.len() == limit {
                    break;
                }
                due.push(row.to_vec());
            }
            due
        };
        for row in &due {
            self.delete(row)?;
        }
        Ok(due.len())
    }

    /// Removes at most `limit` rows of `range`; returns how many there were.
    pub(super) fn delete_range(&mut self, range: SlotRange, limit: usize) -> Result<usize, StoreError> {
        let (start, end) = tables::range_bounds(range);
        let doomed: Vec<Vec<u8>> = self
            .rows
            .range(start.as_slice()..end.as_slice())?
            .take(limit)
            .map(|entry| entry.map(|(row, _)| row.value().to_vec()))
            .collect::<Result<_, _>>()?;
        for row in &doomed {
            self.delete(row)?;
        }
        Ok(doomed.len())
    }
}

/// How slot counts changed in a transaction.
#[derive(Debug, Default)]
pub(super) struct CountDeltas(HashMap<u16, i64>);

impl CountDeltas {
    pub(super) fn publish(&self, counts: &SlotCounts) {
        for (&slot, &delta) in &self.0 {
            counts.add(slot, delta);
        }
    }
}

/// An integer as Redis stores it: no spaces, no plus, no leading zeros.
pub(crate) fn parse_integer(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    let number: i64 = text.parse().ok()?;
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain =
        digits.starts_with(|c: char| c.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    (plain && text != "-0").then_some(number)
}

#[cfg(test)]
mod tests {
    use super::parse_integer;

    #[test]
    fn integers_are_read_as_redis_does() {
        for (text, number) in [
            ("0", Some(0)),
            ("-1", Some(-1)),
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("", None),
            ("-", None),
            ("-0", None),
            ("+1", None),
            (" 5", None),
            ("05", None),
            ("1e3", None),
        ] {
            assert_eq!(parse_integer(text.as_bytes()), number, "{text:?}");
        }
    }
}
