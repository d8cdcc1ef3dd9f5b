//! What each command means: from its arguments to what has to be done.

mod cluster;
mod connection;
mod introspection;
mod keys;
mod server;
mod split;
mod strings;
mod table;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use bytes::Bytes;

use super::memory::{Held, Memory};
use super::reply::{OK, Reply, Version};
use super::scan::Cursors;
use crate::common::slot_of;
use crate::node::Node;
use crate::split::Splits;
use crate::store::{Outcome, Reader, StoreError, WriteOp, parse_integer};

pub(super) use keys::{ReadCommand, Step};
pub(super) use split::SplitCommand;

/// What all connections of a server share.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) node: Node,
    pub(super) splits: Splits,
    pub(super) cursors: Cursors,
    pub(super) clients: AtomicUsize,
    pub(super) connections: AtomicU64,
    pub(super) commands: AtomicU64,
    pub(super) max_clients: usize,
    pub(super) memory: Memory,
    pub(super) port: u16,
}

/// What a connection remembers between its commands.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: u64,
    pub(super) name: Bytes,
    pub(super) version: Version,
}

/// What has to be done for a command.
#[derive(Debug)]
pub(super) enum Action {
    /// Reply this.
    Reply(Reply),
    /// Reply this and close the connection.
    Close(Reply),
    /// Read, where the slot is this node's.
    Read { slot: u16, read: ReadCommand },
    /// Write, where the slot is this node's.
    Write { slot: u16, op: WriteOp, answer: Answer },
    /// Look at all keys of this node.
    Scan(keys::ScanCommand),
    /// Begin a split, or end one.
    Split(SplitCommand),
}

/// How the outcome of a write is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// OK, or null if it was not done.
    Status,
    /// 1, or 0 if it was not done.
    Flag,
    /// The outcome as it is.
    Plain,
}

impl Answer {
    pub(super) fn reply(self, outcome: Outcome) -> Reply {
        match (self, outcome) {
            (Self::Flag, Outcome::Done) => Reply::Integer(1),
            (Self::Flag, Outcome::NotDone) => Reply::Integer(0),
            (_, Outcome::Done) => OK,
            (_, Outcome::NotDone) => Reply::Null,
            (_, Outcome::Old(value)) => Reply::bulk_or_null(value),
            (_, Outcome::Integer(number)) => Reply::Integer(number),
            (_, Outcome::NotAnInteger) => not_an_integer(),
            (_, Outcome::Overflow) => Reply::error("ERR increment or decrement would overflow"),
        }
    }
}

/// The arguments of a command, its name included.
type Arguments = Vec<Bytes>;
/// An error is a reply too.
type Parsed = Result<Action, Reply>;

/// Finds out what has to be done for `arguments`, of which there is at least one.
pub(super) fn parse(context: &Arc<Context>, session: &mut Session, arguments: Arguments) -> Action {
    // As Redis: a web page that has a browser send its requests here gets no further than the first lines.
    if arguments.first().is_some_and(|name| [b"POST".as_slice(), b"HOST:"].contains(&word(name).as_slice())) {
        return Action::Close(Reply::error("ERR this is not an HTTP server; the connection is closed"));
    }
    let Some(spec) = arguments.first().and_then(|name| table::find(name)) else {
        return Action::Reply(unknown_command(&arguments));
    };
    if !spec.takes(arguments.len()) {
        return Action::Reply(wrong_arity(spec.name));
    }
    let action = (spec.parse)(context, session, arguments).unwrap_or_else(Action::Reply);
    if let Action::Write { op, .. } = &action
        && let Some(why) = op.too_large()
    {
        return Action::Reply(Reply::error(format!("ERR {why}")));
    }
    action
}

fn unknown_command(arguments: &[Bytes]) -> Reply {
    // As in Redis: at most 128 bytes of each, and of all arguments.
    const SHOWN: usize = 128;
    let show =
        |text: &[u8], limit: usize| String::from_utf8_lossy(&text[..text.len().min(limit)]).into_owned();
    let name = arguments.first().map(|name| show(name, SHOWN)).unwrap_or_default();
    let mut shown = String::new();
    for argument in arguments.iter().skip(1) {
        if shown.len() >= SHOWN {
            break;
        }
        shown += &format!("'{}' ", show(argument, SHOWN - shown.len()));
    }
    Reply::error(format!("ERR unknown command '{name}', with args beginning with: {shown}"))
}

fn wrong_arity(command: &str) -> Reply {
    Reply::error(format!("ERR wrong number of arguments for '{command}' command"))
}

fn unknown_subcommand(command: &str, given: &[u8]) -> Reply {
    let shown = String::from_utf8_lossy(&given[..given.len().min(128)]);
    Reply::error(format!("ERR unknown subcommand '{shown}'. Try {} HELP.", command.to_ascii_uppercase()))
}

fn syntax_error() -> Reply {
    Reply::error("ERR syntax error")
}

fn not_an_integer() -> Reply {
    Reply::error("ERR value is not an integer or out of range")
}

/// What a failed database means for a client that reads.
pub(super) fn store_error(error: &StoreError) -> Reply {
    Reply::error(format!("ERR {error}"))
}

/// The same for one that writes. A commit that failed may be found whole when the database is opened again.
pub(super) fn write_error(error: &StoreError) -> Reply {
    match error {
        StoreError::Closed | StoreError::Database(_) => {
            Reply::error(format!("ERR {error}; the outcome of this write is unknown"))
        }
        error => store_error(error),
    }
}

fn integer(argument: &[u8]) -> Result<i64, Reply> {
    parse_integer(argument).ok_or_else(not_an_integer)
}

/// The one slot of all keys.
fn common_slot<'a>(keys: impl IntoIterator<Item = &'a Bytes>) -> Result<u16, Reply> {
    let mut slots = keys.into_iter().map(|key| slot_of(key));
    let first = slots.next().ok_or_else(syntax_error)?;
    if slots.all(|slot| slot == first) {
        Ok(first)
    } else {
        Err(Reply::error("CROSSSLOT Keys in request don't hash to the same slot"))
    }
}

/// The upper-case word that an option is. Options are short; what is longer is none.
fn word(argument: &[u8]) -> Vec<u8> {
    argument.iter().take(32).map(u8::to_ascii_uppercase).collect()
}

impl ReadCommand {
    /// Runs it; a database that fails is a reply too, and so is a lack of memory for what is read. `held` counts that behind `before` bytes.
    pub(super) fn reply(&self, reader: &Reader, held: &mut Held, before: usize) -> Reply {
        self.run(reader, held, before).unwrap_or_else(|error| store_error(&error))
    }
}
