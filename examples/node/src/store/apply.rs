//! What each write of a client does to rows.

use super::StoreError;
use super::ops::{ExpireCondition, Outcome, SetCondition, SetExpiry, WriteOp};
use super::tables::Row;
use super::txn::RowsTxn;

impl RowsTxn<'_> {
    pub(super) fn apply(&mut self, op: &WriteOp) -> Result<Outcome, StoreError> {
        match op {
            WriteOp::Set { key, value, expiry, condition, want_old } => {
                self.set(key, value, *expiry, *condition, *want_old)
            }
            WriteOp::SetMany { pairs } => {
                for (key, value) in pairs {
                    let place = self.visible(key);
                    self.put(place, Row::new(value, None))?;
                }
                Ok(Outcome::Done)
            }
            WriteOp::Delete { keys } => {
                let mut deleted = 0;
                for key in keys {
                    let place = self.visible(key);
                    if self.delete(place)? {
                        deleted += 1;
                    }
                }
                Ok(Outcome::Integer(deleted))
            }
            WriteOp::Take { key } => {
                let place = self.visible(key);
                let before = self.before(place)?;
                if before.is_some() {
                    self.delete(place)?;
                }
                Ok(Outcome::Old(before.filter(|before| before.live).map(|before| before.value)))
            }
            WriteOp::Expire { key, at, condition } => self.expire(key, *at, *condition),
            WriteOp::Persist { key } => {
                let place = self.visible(key);
                match self.before(place)? {
                    Some(before) if before.live && before.expires_at.is_some() => {
                        self.put(place, Row::new(&before.value, None))?;
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
        let place = self.visible(key);
        let need_before = want_old || condition != SetCondition::Always || expiry == SetExpiry::Keep;
        let before = if need_before { self.before(place)?.filter(|before| before.live) } else { None };
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
            if expires_at.is_some_and(|at| at <= self.now()) {
                self.delete(place)?;
            } else {
                self.put(place, Row::new(value, expires_at))?;
            }
        }
        Ok(match (want_old, wanted) {
            (true, _) => Outcome::Old(before.map(|before| before.value)),
            (false, true) => Outcome::Done,
            (false, false) => Outcome::NotDone,
        })
    }

    fn expire(&mut self, key: &[u8], at: u64, condition: ExpireCondition) -> Result<Outcome, StoreError> {
        let place = self.visible(key);
        let Some(before) = self.before(place)?.filter(|before| before.live) else {
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
        if at <= self.now() {
            self.delete(place)?;
        } else {
            self.put(place, Row::new(&before.value, Some(at)))?;
        }
        Ok(Outcome::Integer(1))
    }

    fn add(&mut self, key: &[u8], delta: i64) -> Result<Outcome, StoreError> {
        let place = self.visible(key);
        let before = self.before(place)?.filter(|before| before.live);
        let Some(present) = before.as_ref().map_or(Some(0), |before| parse_integer(&before.value)) else {
            return Ok(Outcome::NotAnInteger);
        };
        let Some(sum) = present.checked_add(delta) else {
            return Ok(Outcome::Overflow);
        };
        let expires_at = before.and_then(|before| before.expires_at);
        self.put(place, Row::new(sum.to_string().as_bytes(), expires_at))?;
        Ok(Outcome::Integer(sum))
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
