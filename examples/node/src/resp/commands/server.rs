//! Commands about the node as a whole.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Action, Arguments, Context, Parsed, Reply, Session};
use super::{unknown_subcommand, word, wrong_arity};
use crate::resp::glob;

/// The version of Redis whose commands these are, for clients that ask before they use something.
pub(super) const REDIS_VERSION: &str = "7.0.15";

/// Patterns of one `CONFIG GET`: more than there are parameters.
const MAX_CONFIG_PATTERNS: usize = 64;

pub(super) fn dbsize(context: &Arc<Context>, _: &mut Session, _: Arguments) -> Parsed {
    Ok(Action::Reply(Reply::integer(context.node.key_count())))
}

pub(super) fn config(_: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    if word(&arguments[1]) != b"GET" {
        return Err(unknown_subcommand("config", &arguments[1]));
    }
    if arguments.len() < 3 {
        return Err(wrong_arity("config|get"));
    }
    if arguments.len() > 2 + MAX_CONFIG_PATTERNS {
        return Err(Reply::error(format!("ERR more than {MAX_CONFIG_PATTERNS} patterns")));
    }
    let patterns: Vec<_> = arguments[2..]
        .iter()
        .map(|pattern| glob::checked(pattern).map(|pattern| pattern.to_ascii_lowercase()))
        .collect::<Result<_, _>>()?;
    // What tools ask for before they start. Every write is durable when it is answered, as with
    // appendonly and appendfsync always.
    let known = [
        ("save", ""),
        ("appendonly", "yes"),
        ("appendfsync", "always"),
        ("databases", "1"),
        ("cluster-enabled", "yes"),
        ("maxmemory", "0"),
        ("timeout", "0"),
    ];
    let asked = |name: &str| patterns.iter().any(|pattern| glob::matches(pattern, name.as_bytes()));
    let found = known.iter().filter(|(name, _)| asked(name));
    Ok(Action::Reply(Reply::Map(
        found.map(|(name, value)| (Reply::text(*name), Reply::text(*value))).collect(),
    )))
}

pub(super) fn info(context: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let wanted: Vec<_> = arguments[1..].iter().map(|section| word(section)).collect();
    let all = wanted.is_empty()
        || wanted.iter().any(|section| matches!(section.as_slice(), b"ALL" | b"DEFAULT" | b"EVERYTHING"));
    let mut text = String::new();
    for (title, section) in sections(context) {
        if all || wanted.iter().any(|wanted| wanted.eq_ignore_ascii_case(title.as_bytes())) {
            if !text.is_empty() {
                text += "\r\n";
            }
            // Writing into a string cannot fail.
            let _ = write!(text, "# {title}\r\n");
            for (name, value) in section {
                let _ = write!(text, "{name}:{value}\r\n");
            }
        }
    }
    Ok(Action::Reply(Reply::text(text)))
}

type Section = Vec<(&'static str, String)>;

fn sections(context: &Context) -> Vec<(&'static str, Section)> {
    let node = &context.node;
    let ownership = node.gate().ownership();
    let slots: usize = node.own_ranges().iter().map(|range| usize::from(range.len())).sum();
    let keys = node.key_count();
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed).to_string();
    vec![
        (
            "Server",
            vec![
                ("redis_version", REDIS_VERSION.into()),
                ("redis_mode", "cluster".into()),
                ("server_name", "node".into()),
                ("server_version", env!("CARGO_PKG_VERSION").into()),
                ("node_id", node.id().to_string()),
                ("process_id", std::process::id().to_string()),
                ("tcp_port", context.port.to_string()),
                ("uptime_in_seconds", node.started().elapsed().as_secs().to_string()),
            ],
        ),
        (
            "Clients",
            vec![
                ("connected_clients", context.clients.load(Ordering::Relaxed).to_string()),
                ("maxclients", context.max_clients.to_string()),
                ("blocked_clients", node.gate().waiting().to_string()),
            ],
        ),
        (
            "Persistence",
            vec![
                ("loading", "0".into()),
                ("aof_enabled", "1".into()),
                ("database_file_bytes", node.store().file_bytes().to_string()),
            ],
        ),
        (
            "Stats",
            vec![
                ("total_connections_received", load(&context.connections)),
                ("total_commands_processed", load(&context.commands)),
            ],
        ),
        ("Replication", vec![("role", "master".into()), ("connected_slaves", "0".into())]),
        (
            "Cluster",
            vec![
                ("cluster_enabled", "1".into()),
                ("cluster_owned_slots", slots.to_string()),
                (
                    "cluster_highest_epoch",
                    ownership.highest_epoch(crate::common::SlotRange::FULL).to_string(),
                ),
            ],
        ),
        (
            "Keyspace",
            if keys > 0 { vec![("db0", format!("keys={keys},expires=0,avg_ttl=0"))] } else { vec![] },
        ),
    ]
}
