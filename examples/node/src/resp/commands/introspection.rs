//! COMMAND: what the commands are, for clients that route by it.

use std::sync::Arc;

use bytes::Bytes;

use super::table::{COMMANDS, Spec, find};
use super::{Action, Arguments, Context, Parsed, Reply, Session};
use super::{unknown_subcommand, word, wrong_arity};

/// Names that COMMAND INFO and COMMAND DOCS take: what they tell of each takes hundreds of times the memory of its name.
const MAX_NAMES: usize = 1024;

pub(super) fn command(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let Some(subcommand) = arguments.get(1) else {
        return Ok(Action::Reply(Reply::Array(COMMANDS.iter().map(describe).collect())));
    };
    let reply = match word(subcommand).as_slice() {
        b"COUNT" if arguments.len() == 2 => Reply::integer(COMMANDS.len()),
        b"COUNT" => return Err(wrong_arity("command|count")),
        b"LIST" if arguments.len() == 2 => {
            Reply::Array(COMMANDS.iter().map(|spec| Reply::text(spec.name)).collect())
        }
        b"INFO" | b"DOCS" if arguments.len() - 2 > MAX_NAMES => {
            return Err(Reply::error(format!("ERR too many command names, at most {MAX_NAMES} are taken")));
        }
        b"INFO" => Reply::Array(match arguments.len() {
            2 => COMMANDS.iter().map(describe).collect(),
            _ => arguments[2..].iter().map(|name| find(name).map_or(Reply::Null, describe)).collect(),
        }),
        b"DOCS" => Reply::Map(match arguments.len() {
            2 => COMMANDS.iter().map(document).collect(),
            _ => arguments[2..].iter().filter_map(|name| find(name)).map(document).collect(),
        }),
        b"GETKEYS" => get_keys(&arguments[2..])?,
        _ => return Err(unknown_subcommand("command", subcommand)),
    };
    Ok(Action::Reply(reply))
}

fn get_keys(command: &[Bytes]) -> Result<Reply, Reply> {
    let Some(name) = command.first() else { return Err(wrong_arity("command|getkeys")) };
    let spec = find(name).ok_or_else(|| Reply::error("ERR Invalid command specified"))?;
    if !spec.takes(command.len()) {
        return Err(Reply::error("ERR Invalid number of arguments specified for command"));
    }
    let Some(keys) = spec.keys else {
        return Err(Reply::error("ERR The command has no key arguments"));
    };
    let last = if keys.last < 0 { command.len() } else { 2 };
    let step = if keys.step == 2 { 2 } else { 1 };
    Ok(Reply::Array(command[1..last].iter().step_by(step).map(|key| Reply::Bulk(key.clone())).collect()))
}

fn words(words: &[&'static str]) -> Vec<Reply> {
    words.iter().map(|word| Reply::Simple(word)).collect()
}

/// One command as COMMAND INFO tells it.
fn describe(spec: &Spec) -> Reply {
    let pair = |key: &str, value: Reply| (Reply::text(key), value);
    let (first, last, step) = spec.keys.map_or((0, 0, 0), |keys| (1, keys.last, keys.step));
    let key_specs = spec.keys.iter().map(|keys| {
        Reply::Map(vec![
            pair("flags", Reply::Set(words(keys.flags))),
            pair(
                "begin_search",
                Reply::Map(vec![
                    pair("type", Reply::text("index")),
                    pair("spec", Reply::Map(vec![pair("index", Reply::Integer(1))])),
                ]),
            ),
            pair(
                "find_keys",
                Reply::Map(vec![
                    pair("type", Reply::text("range")),
                    pair(
                        "spec",
                        Reply::Map(vec![
                            // Relative to the first key here, unlike above.
                            pair("lastkey", Reply::Integer(if keys.last < 0 { keys.last } else { 0 })),
                            pair("keystep", Reply::Integer(keys.step)),
                            pair("limit", Reply::Integer(0)),
                        ]),
                    ),
                ]),
            ),
        ])
    });
    Reply::Array(vec![
        Reply::text(spec.name),
        Reply::Integer(spec.arity),
        Reply::Set(words(spec.flags)),
        Reply::Integer(first),
        Reply::Integer(last),
        Reply::Integer(step),
        Reply::Set(words(spec.categories)),
        Reply::Array(spec.tips.iter().map(|tip| Reply::text(*tip)).collect()),
        Reply::Array(key_specs.collect()),
        Reply::Array(vec![]),
    ])
}

/// One command as COMMAND DOCS tells it.
fn document(spec: &Spec) -> (Reply, Reply) {
    let pair = |key: &str, value: &str| (Reply::text(key), Reply::text(value));
    (
        Reply::text(spec.name),
        Reply::Map(vec![pair("summary", spec.summary), pair("since", spec.since), pair("group", spec.group)]),
    )
}
