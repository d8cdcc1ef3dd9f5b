//! Commands on keys, whatever they hold, and reads.

use std::sync::Arc;

use bytes::Bytes;

use super::strings::{EX, EXAT, PX, PXAT, TimeUnit};
use super::{Action, Answer, Arguments, Context, Parsed, Reply, Session};
use super::{common_slot, integer, not_an_integer, syntax_error, word};
use crate::common::{SLOT_COUNT, SlotRange, slot_of};
use crate::gate::{Access, Verdict};
use crate::resp::glob;
use crate::resp::memory::Held;
use crate::resp::reply::ITEM_BYTES;
use crate::store::{ExpireCondition, ReadExtent, Reader, StoreError, WriteOp};

/// A read of keys of one slot.
#[derive(Debug)]
pub(in crate::resp) enum ReadCommand {
    Get(Bytes),
    GetMany(Vec<Bytes>),
    Exists(Vec<Bytes>),
    Length(Bytes),
    Type(Bytes),
    Expiry { key: Bytes, unit: TimeUnitOut },
}

/// How a time is told.
#[derive(Debug, Clone, Copy)]
pub(in crate::resp) struct TimeUnitOut(TimeUnit);

/// Keys that are read in place; more go to a thread that may block.
const POINT_KEYS: usize = 64;
/// Values in the reply to one command.
const MANY_BYTES: usize = 128 << 20;

impl ReadCommand {
    pub(in crate::resp) fn keys(&self) -> usize {
        match self {
            Self::GetMany(keys) | Self::Exists(keys) => keys.len(),
            _ => 1,
        }
    }

    /// How much reading so many keys is.
    pub(in crate::resp) fn extent(keys: usize) -> ReadExtent {
        if keys > POINT_KEYS { ReadExtent::Bulk } else { ReadExtent::Point }
    }

    pub(super) fn run(&self, reader: &Reader, held: &mut Held, before: usize) -> Result<Reply, StoreError> {
        let value = |key: &Bytes| -> Result<Reply, StoreError> {
            Ok(Reply::bulk_or_null(reader.get(key)?.map(|entry| entry.value)))
        };
        let items = if let Self::GetMany(keys) = self { keys.len() } else { 0 };
        // Once more where they are encoded.
        let mut hold = |size: usize| {
            let bytes = 2 * (before + size) + items * ITEM_BYTES;
            held.set(bytes).map_err(|error| Reply::error(format!("ERR {error}")))
        };
        Ok(match self {
            Self::Get(key) => {
                let value = value(key)?;
                hold(value.value_bytes()).err().unwrap_or(value)
            }
            Self::GetMany(keys) => {
                if let Err(reply) = hold(0) {
                    return Ok(reply);
                }
                let (mut values, mut size) = (Vec::with_capacity(keys.len()), 0);
                for key in keys {
                    let value = value(key)?;
                    size += value.value_bytes();
                    if size > MANY_BYTES {
                        return Ok(Reply::error(format!(
                            "ERR the values are larger than {} MiB together; ask for fewer keys at once",
                            MANY_BYTES >> 20
                        )));
                    }
                    if let Err(reply) = hold(size) {
                        return Ok(reply);
                    }
                    values.push(value);
                }
                Reply::Array(values)
            }
            Self::Exists(keys) => {
                let mut found = 0;
                for key in keys {
                    found += i64::from(reader.exists(key)?);
                }
                Reply::Integer(found)
            }
            Self::Length(key) => Reply::integer(reader.get(key)?.map_or(0, |entry| entry.value.len())),
            Self::Type(key) => Reply::Simple(if reader.exists(key)? { "string" } else { "none" }),
            Self::Expiry { key, unit: TimeUnitOut(unit) } => {
                match reader.get(key)?.map(|entry| entry.expires_at) {
                    None => Reply::Integer(-2),
                    Some(None) => Reply::Integer(-1),
                    Some(Some(at)) => {
                        let millis = if unit.absolute { at } else { at.saturating_sub(reader.now()) };
                        // Redis rounds a remaining time to the nearest second, and a moment down.
                        let rounding = if unit.absolute { 0 } else { 500 };
                        Reply::integer(if unit.seconds { (millis + rounding) / 1000 } else { millis })
                    }
                }
            }
        })
    }
}

fn read(key: &Bytes, read: impl FnOnce(Bytes) -> ReadCommand) -> Action {
    Action::Read { slot: slot_of(key), read: read(key.clone()) }
}

pub(super) fn get(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    Ok(read(&arguments[1], ReadCommand::Get))
}

pub(super) fn strlen(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    Ok(read(&arguments[1], ReadCommand::Length))
}

pub(super) fn kind(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    Ok(read(&arguments[1], ReadCommand::Type))
}

fn time_left(arguments: &[Bytes], unit: TimeUnit) -> Parsed {
    Ok(read(&arguments[1], |key| ReadCommand::Expiry { key, unit: TimeUnitOut(unit) }))
}

pub(super) fn ttl(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    time_left(&arguments, EX)
}

pub(super) fn pttl(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    time_left(&arguments, PX)
}

pub(super) fn expiretime(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    time_left(&arguments, EXAT)
}

pub(super) fn pexpiretime(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    time_left(&arguments, PXAT)
}

pub(super) fn mget(_: &Arc<Context>, _: &mut Session, mut arguments: Arguments) -> Parsed {
    let keys = arguments.split_off(1);
    Ok(Action::Read { slot: common_slot(&keys)?, read: ReadCommand::GetMany(keys) })
}

pub(super) fn exists(_: &Arc<Context>, _: &mut Session, mut arguments: Arguments) -> Parsed {
    let keys = arguments.split_off(1);
    Ok(Action::Read { slot: common_slot(&keys)?, read: ReadCommand::Exists(keys) })
}

pub(super) fn del(_: &Arc<Context>, _: &mut Session, mut arguments: Arguments) -> Parsed {
    let keys = arguments.split_off(1);
    Ok(Action::Write { slot: common_slot(&keys)?, op: WriteOp::Delete { keys }, answer: Answer::Plain })
}

pub(super) fn persist(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let key = arguments[1].clone();
    Ok(Action::Write { slot: slot_of(&key), op: WriteOp::Persist { key }, answer: Answer::Plain })
}

pub(super) fn expire(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    set_expiry("expire", EX, &arguments)
}

pub(super) fn pexpire(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    set_expiry("pexpire", PX, &arguments)
}

pub(super) fn expireat(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    set_expiry("expireat", EXAT, &arguments)
}

pub(super) fn pexpireat(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    set_expiry("pexpireat", PXAT, &arguments)
}

fn set_expiry(command: &str, unit: TimeUnit, arguments: &[Bytes]) -> Parsed {
    let mut condition = ExpireCondition::default();
    for option in &arguments[3..] {
        match word(option).as_slice() {
            b"NX" => condition.if_none = true,
            b"XX" => condition.if_some = true,
            b"GT" => condition.if_later = true,
            b"LT" => condition.if_earlier = true,
            _ => {
                let shown = String::from_utf8_lossy(&option[..option.len().min(128)]);
                return Err(Reply::error(format!("ERR Unsupported option {shown}")));
            }
        }
    }
    if condition.if_none && (condition.if_some || condition.if_later || condition.if_earlier) {
        return Err(Reply::error("ERR NX and XX, GT or LT options at the same time are not compatible"));
    }
    if condition.if_later && condition.if_earlier {
        return Err(Reply::error("ERR GT and LT options at the same time are not compatible"));
    }
    let at = unit
        .at(integer(&arguments[2])?)
        .ok_or_else(|| Reply::error(format!("ERR invalid expire time in '{command}' command")))?;
    let key = arguments[1].clone();
    Ok(Action::Write {
        slot: slot_of(&key),
        op: WriteOp::Expire { key, at, condition },
        answer: Answer::Plain,
    })
}

/// A step of a scan over all keys of this node.
#[derive(Debug)]
pub(in crate::resp) struct ScanCommand {
    cursor: u64,
    pattern: Option<Bytes>,
    count: usize,
    /// TYPE was given, and is not the one that there is.
    nothing: bool,
}

/// Rows that one step looks at, at most. Redis does as many as it is told and blocks; this node rather answers with a cursor.
const MAX_COUNT: usize = 10_000;

pub(super) fn scan(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let cursor = std::str::from_utf8(&arguments[1]).ok().and_then(|text| text.parse().ok());
    let cursor = cursor.ok_or_else(|| Reply::error("ERR invalid cursor"))?;
    let mut scan = ScanCommand { cursor, pattern: None, count: 10, nothing: false };
    let mut options = arguments[2..].iter();
    while let Some(option) = options.next() {
        let value = options.next().ok_or_else(syntax_error)?;
        match word(option).as_slice() {
            b"MATCH" => scan.pattern = Some(glob::checked(value)?),
            b"COUNT" => {
                let count = super::parse_integer(value).ok_or_else(not_an_integer)?;
                if count < 1 {
                    return Err(syntax_error());
                }
                scan.count = usize::try_from(count).unwrap_or(MAX_COUNT).min(MAX_COUNT);
            }
            b"TYPE" => scan.nothing = !value.eq_ignore_ascii_case(b"string"),
            _ => return Err(syntax_error()),
        }
    }
    Ok(Action::Scan(scan))
}

/// What came of a step.
pub(in crate::resp) enum Step {
    Done(Reply),
    /// The next slot is held: somebody else may own it already. To be tried again when it is not.
    Held(u16),
}

impl ScanCommand {
    /// Looks at some keys of the slots that this node serves at this moment.
    pub(in crate::resp) async fn step(&self, context: &Context) -> Result<Step, StoreError> {
        use crate::store::ScanPosition;
        let node = &context.node;
        let position = context.cursors.decode(self.cursor);
        let mut slot = match &position {
            ScanPosition::Slot(slot) => *slot,
            ScanPosition::After(key) => slot_of(key),
        };
        let first = slot;
        let end = loop {
            if slot >= SLOT_COUNT {
                return Ok(Step::Done(Reply::Array(vec![Reply::text("0"), Reply::Array(vec![])])));
            }
            match node.gate().verdicts_from(slot, Access::Read) {
                (Verdict::Pass, end) => break end,
                (Verdict::Held, _) => return Ok(Step::Held(slot)),
                (Verdict::Moved | Verdict::Unowned | Verdict::Quarantined, end) => slot = end,
            }
        };
        let Ok(range) = SlotRange::new(slot, end) else { return Ok(Step::Held(slot)) };
        // A range that was given up meanwhile is left out.
        let position = if slot == first { position } else { ScanPosition::Slot(slot) };
        let (count, nothing, pattern) = (self.count, self.nothing, self.pattern.clone());
        let wanted =
            move |key: &Bytes| !nothing && pattern.as_ref().is_none_or(|pattern| glob::matches(pattern, key));
        // Long keys take long to be compared, so that is done there, too.
        let scan = move |reader: &Reader| {
            let mut scanned = reader.scan(&position, range, count)?;
            scanned.keys.retain(wanted);
            Ok(scanned)
        };
        let scanned = node.store().read(ReadExtent::Bulk, scan).await?;
        let more = || node.own_ranges().into_iter().map(|own| own.end()).max() > Some(end);
        let next = scanned.next.or_else(|| more().then_some(ScanPosition::Slot(end)));
        let cursor = match next {
            None => 0,
            Some(next) => {
                let slot = match &next {
                    ScanPosition::Slot(slot) => *slot,
                    ScanPosition::After(key) => slot_of(key),
                };
                context.cursors.encode(next, slot)
            }
        };
        let keys = scanned.keys.into_iter().map(Reply::Bulk).collect();
        Ok(Step::Done(Reply::Array(vec![Reply::text(cursor.to_string()), Reply::Array(keys)])))
    }
}
