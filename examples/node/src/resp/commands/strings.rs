//! Commands that store and count.

use std::sync::Arc;

use bytes::Bytes;

use super::{Action, Answer, Arguments, Context, Parsed, Reply, Session};
use super::{common_slot, integer, not_an_integer, syntax_error, word, wrong_arity};
use crate::common::slot_of;
use crate::store::{SetCondition, SetExpiry, WriteOp, unix_ms};

/// How a time is given.
#[derive(Debug, Clone, Copy)]
pub(super) struct TimeUnit {
    pub(super) seconds: bool,
    pub(super) absolute: bool,
}

pub(super) const EX: TimeUnit = TimeUnit { seconds: true, absolute: false };
pub(super) const PX: TimeUnit = TimeUnit { seconds: false, absolute: false };
pub(super) const EXAT: TimeUnit = TimeUnit { seconds: true, absolute: true };
pub(super) const PXAT: TimeUnit = TimeUnit { seconds: false, absolute: true };

impl TimeUnit {
    /// Milliseconds since the Unix epoch, 0 for what is before it; `None` if it does not fit into 64 bits with a sign.
    pub(super) fn at(self, amount: i64) -> Option<u64> {
        let millis = if self.seconds { amount.checked_mul(1000)? } else { amount };
        let at = if self.absolute {
            millis
        } else {
            millis.checked_add(i64::try_from(unix_ms()).unwrap_or(i64::MAX))?
        };
        Some(u64::try_from(at).unwrap_or(0))
    }
}

/// A time that has to be positive.
fn expiry(command: &str, unit: TimeUnit, amount: &Bytes) -> Result<SetExpiry, Reply> {
    let amount = integer(amount)?;
    let at = if amount > 0 { unit.at(amount) } else { None };
    at.map(SetExpiry::At)
        .ok_or_else(|| Reply::error(format!("ERR invalid expire time in '{command}' command")))
}

pub(super) fn set(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let mut arguments = arguments.into_iter().skip(1);
    let (key, value) = arguments.next().zip(arguments.next()).ok_or_else(syntax_error)?;
    let mut expires = None;
    let mut condition = SetCondition::Always;
    let mut want_old = false;
    while let Some(option) = arguments.next() {
        let mut once = |unit: Option<TimeUnit>, amount: Option<Bytes>| {
            if expires.is_some() {
                return Err(syntax_error());
            }
            expires = Some(match unit {
                None => SetExpiry::Keep,
                Some(unit) => expiry("set", unit, &amount.ok_or_else(syntax_error)?)?,
            });
            Ok(())
        };
        match word(&option).as_slice() {
            b"EX" => once(Some(EX), arguments.next())?,
            b"PX" => once(Some(PX), arguments.next())?,
            b"EXAT" => once(Some(EXAT), arguments.next())?,
            b"PXAT" => once(Some(PXAT), arguments.next())?,
            b"KEEPTTL" => once(None, None)?,
            b"GET" => want_old = true,
            b"NX" if condition != SetCondition::IfPresent => condition = SetCondition::IfAbsent,
            b"XX" if condition != SetCondition::IfAbsent => condition = SetCondition::IfPresent,
            _ => return Err(syntax_error()),
        }
    }
    let expiry = expires.unwrap_or(SetExpiry::Never);
    Ok(Action::Write {
        slot: slot_of(&key),
        op: WriteOp::Set { key, value, expiry, condition, want_old },
        answer: Answer::Status,
    })
}

fn plain_set(key: &Bytes, value: &Bytes, expiry: SetExpiry, answer: Answer) -> Action {
    let condition = if answer == Answer::Flag { SetCondition::IfAbsent } else { SetCondition::Always };
    let op = WriteOp::Set {
        key: key.clone(),
        value: value.clone(),
        expiry,
        condition,
        want_old: answer == Answer::Plain,
    };
    Action::Write { slot: slot_of(key), op, answer }
}

pub(super) fn setex(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let expiry = expiry("setex", EX, &arguments[2])?;
    Ok(plain_set(&arguments[1], &arguments[3], expiry, Answer::Status))
}

pub(super) fn psetex(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let expiry = expiry("psetex", PX, &arguments[2])?;
    Ok(plain_set(&arguments[1], &arguments[3], expiry, Answer::Status))
}

pub(super) fn setnx(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    Ok(plain_set(&arguments[1], &arguments[2], SetExpiry::Never, Answer::Flag))
}

pub(super) fn getset(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    Ok(plain_set(&arguments[1], &arguments[2], SetExpiry::Never, Answer::Plain))
}

pub(super) fn getdel(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let key = arguments[1].clone();
    Ok(Action::Write { slot: slot_of(&key), op: WriteOp::Take { key }, answer: Answer::Plain })
}

pub(super) fn mset(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let (pairs, rest) = arguments[1..].as_chunks::<2>();
    let slot = common_slot(arguments[1..].iter().step_by(2))?;
    if !rest.is_empty() {
        return Err(wrong_arity("mset"));
    }
    let pairs = pairs.iter().map(|[key, value]| (key.clone(), value.clone())).collect();
    Ok(Action::Write { slot, op: WriteOp::SetMany { pairs }, answer: Answer::Status })
}

fn add(key: &Bytes, delta: i64) -> Action {
    Action::Write { slot: slot_of(key), op: WriteOp::Add { key: key.clone(), delta }, answer: Answer::Plain }
}

pub(super) fn incr(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    Ok(add(&arguments[1], 1))
}

pub(super) fn decr(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    Ok(add(&arguments[1], -1))
}

pub(super) fn incrby(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    Ok(add(&arguments[1], integer(&arguments[2])?))
}

pub(super) fn decrby(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let delta = super::parse_integer(&arguments[2]).ok_or_else(not_an_integer)?;
    let delta = delta.checked_neg().ok_or_else(|| Reply::error("ERR decrement would overflow"))?;
    Ok(add(&arguments[1], delta))
}
