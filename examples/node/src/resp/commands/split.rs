//! SPLIT, the operator's command for moving slots to another node. Not part of Redis.
//!
//! ```text
//! SPLIT slot target-id target-grpc target-resp [RATE bytes-per-second]   -> the id of the transfer
//! SPLIT LIST                                                            -> what became of splits
//! SPLIT RESOLVE transfer KEEP|GIVE                                      -> OK, once that is durable
//! ```

use std::sync::Arc;

use bytes::Bytes;

use super::{Action, Arguments, Context, Parsed, Reply, Session};
use super::{integer, syntax_error, word, wrong_arity};
use crate::common::{NodeId, SLOT_COUNT};
use crate::resp::reply::OK;
use crate::split::{Resolution, SplitRequest, SplitStatus};
use crate::store::NodeAddresses;

pub(super) fn split(context: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    if arguments.len() == 2 && word(&arguments[1]) == b"LIST" {
        let splits = context.splits.list();
        return Ok(Action::Reply(Reply::Array(splits.iter().map(describe).collect())));
    }
    if word(&arguments[1]) == b"RESOLVE" {
        let [_, _, transfer, resolution] = arguments.as_slice() else {
            return Err(wrong_arity("split|resolve"));
        };
        let resolution = match word(resolution).as_slice() {
            b"KEEP" => Resolution::Keep,
            b"GIVE" => Resolution::Give,
            _ => return Err(syntax_error()),
        };
        return Ok(Action::Split(SplitCommand::Resolve { transfer: text(transfer)?.to_owned(), resolution }));
    }
    let [_, slot, target, grpc, resp, options @ ..] = arguments.as_slice() else {
        return Err(wrong_arity("split"));
    };
    let slot = u16::try_from(integer(slot)?).ok().filter(|&slot| slot < SLOT_COUNT);
    let bytes_per_second = match options {
        [] => None,
        [option, rate] if word(option) == b"RATE" => {
            Some(u64::try_from(integer(rate)?).ok().filter(|&rate| rate > 0).ok_or_else(syntax_error)?)
        }
        _ => return Err(syntax_error()),
    };
    Ok(Action::Split(SplitCommand::Begin(SplitRequest {
        slot: slot.ok_or_else(|| Reply::error("ERR Invalid slot"))?,
        target: text(target).and_then(|id| {
            NodeId::new(id).map_err(|error| Reply::error(format!("ERR target-id: {error}")))
        })?,
        target_addresses: NodeAddresses { grpc: address(grpc)?, resp: address(resp)? },
        bytes_per_second,
    })))
}

fn text(argument: &Bytes) -> Result<&str, Reply> {
    std::str::from_utf8(argument).map_err(|_| syntax_error())
}

fn address(argument: &Bytes) -> Result<String, Reply> {
    let address = text(argument)?;
    match address.rsplit_once(':').map(|(host, port)| (host.is_empty(), port.parse::<u16>())) {
        Some((false, Ok(_))) => Ok(address.to_owned()),
        _ => Err(Reply::error("ERR an address is HOST:PORT")),
    }
}

/// What takes its time.
#[derive(Debug)]
pub(in crate::resp) enum SplitCommand {
    Begin(SplitRequest),
    Resolve { transfer: String, resolution: Resolution },
}

impl SplitCommand {
    pub(in crate::resp) async fn run(self, context: &Context) -> Reply {
        let done = match self {
            Self::Begin(request) => context.splits.start(request).await.map(|id| Reply::text(id.as_str())),
            Self::Resolve { transfer, resolution } => {
                context.splits.resolve(&transfer, resolution).await.map(|()| OK)
            }
        };
        done.unwrap_or_else(|error| Reply::error(format!("ERR {error}")))
    }
}

fn describe(split: &SplitStatus) -> Reply {
    let SplitStatus { transfer, range, target, phase, phases, error, rows, bytes } = split;
    let pair = |key: &str, value: Reply| (Reply::text(key), value);
    let number = |number: &Option<u64>| number.map_or(Reply::Null, Reply::integer);
    Reply::Map(vec![
        pair("transfer", Reply::text(transfer.as_str())),
        pair("slots", Reply::text(range.to_string())),
        pair("target", Reply::text(target.as_str())),
        pair("phase", Reply::text(phase.as_str())),
        pair(
            "phases",
            Reply::Map(
                phases.iter().map(|(phase, at)| (Reply::text(phase.as_str()), Reply::integer(*at))).collect(),
            ),
        ),
        pair("rows", number(rows)),
        pair("bytes", number(bytes)),
        pair("error", error.as_ref().map_or(Reply::Null, |error| Reply::text(error.as_str()))),
    ])
}
