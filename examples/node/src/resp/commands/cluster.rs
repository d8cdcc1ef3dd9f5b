//! CLUSTER: who owns which slots, as clients of a Redis cluster ask for it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use super::{Action, Arguments, Context, Parsed, Reply, Session};
use super::{integer, unknown_subcommand, word, wrong_arity};
use crate::common::{NodeId, SLOT_COUNT, SlotRange, slot_of};
use crate::node::Node;
use crate::store::NodeAddresses;

pub(super) fn cluster(context: &Arc<Context>, _: &mut Session, arguments: Arguments) -> Parsed {
    let node = &context.node;
    let exactly = |count: usize, name: &str| {
        if arguments.len() == count { Ok(()) } else { Err(wrong_arity(&format!("cluster|{name}"))) }
    };
    let reply = match word(&arguments[1]).as_slice() {
        b"KEYSLOT" => {
            exactly(3, "keyslot")?;
            Reply::integer(slot_of(&arguments[2]))
        }
        b"COUNTKEYSINSLOT" => {
            exactly(3, "countkeysinslot")?;
            let slot = integer(&arguments[2])?;
            let slot = u16::try_from(slot).ok().filter(|&slot| slot < SLOT_COUNT);
            let slot = slot.ok_or_else(|| Reply::error("ERR Invalid slot"))?;
            let mine = node.own_ranges().iter().any(|range| range.contains(slot));
            let range = SlotRange::new(slot, slot + 1).ok().filter(|_| mine);
            Reply::integer(range.map_or(0, |range| node.store().rows_in(range)))
        }
        b"MYID" => {
            exactly(2, "myid")?;
            Reply::text(node.id().as_str())
        }
        b"SLOTS" => {
            exactly(2, "slots")?;
            slots(node)
        }
        b"SHARDS" => {
            exactly(2, "shards")?;
            shards(node)
        }
        b"NODES" => {
            exactly(2, "nodes")?;
            Reply::text(nodes(node))
        }
        b"INFO" => {
            exactly(2, "info")?;
            Reply::text(info(node))
        }
        _ => return Err(unknown_subcommand("cluster", &arguments[1])),
    };
    Ok(Action::Reply(reply))
}

/// Host and port of an address; brackets of an IPv6 address are left out, as in Redis.
fn host_port(address: &str) -> (&str, i64) {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, "0"));
    (host.trim_start_matches('[').trim_end_matches(']'), port.parse().unwrap_or(0))
}

fn addresses(node: &Node, id: &NodeId) -> NodeAddresses {
    node.addresses(id).unwrap_or_default()
}

fn slots(node: &Node) -> Reply {
    let ownership = node.gate().ownership();
    let ranges = ownership.claims().iter().map(|claim| {
        let addresses = addresses(node, &claim.owner);
        let (host, port) = host_port(&addresses.resp);
        Reply::Array(vec![
            Reply::integer(claim.range.start()),
            Reply::integer(claim.range.end() - 1),
            Reply::Array(vec![
                Reply::text(host),
                Reply::Integer(port),
                Reply::text(claim.owner.as_str()),
                Reply::Array(vec![]),
            ]),
        ])
    });
    Reply::Array(ranges.collect())
}

/// All known nodes with their slots, also those without.
fn slots_by_node(node: &Node) -> BTreeMap<NodeId, Vec<SlotRange>> {
    let mut all: BTreeMap<NodeId, Vec<SlotRange>> = node.nodes().into_keys().map(|id| (id, vec![])).collect();
    all.entry(node.id().clone()).or_default();
    for claim in node.gate().ownership().claims() {
        all.entry(claim.owner.clone()).or_default().push(claim.range);
    }
    all
}

fn shards(node: &Node) -> Reply {
    let pair = |key: &str, value: Reply| (Reply::text(key), value);
    let shards = slots_by_node(node).into_iter().map(|(id, ranges)| {
        let addresses = addresses(node, &id);
        let (host, port) = host_port(&addresses.resp);
        let bounds = ranges.iter().flat_map(|range| [range.start(), range.end() - 1]).map(Reply::integer);
        Reply::Map(vec![
            pair("slots", Reply::Array(bounds.collect())),
            pair(
                "nodes",
                Reply::Array(vec![Reply::Map(vec![
                    pair("id", Reply::text(id.as_str())),
                    pair("port", Reply::Integer(port)),
                    pair("ip", Reply::text(host)),
                    pair("endpoint", Reply::text(host)),
                    pair("role", Reply::text("master")),
                    pair("replication-offset", Reply::Integer(0)),
                    pair("health", Reply::text("online")),
                ])]),
            ),
        ])
    });
    Reply::Array(shards.collect())
}

fn nodes(node: &Node) -> String {
    let ownership = node.gate().ownership();
    let mut text = String::new();
    for (id, ranges) in slots_by_node(node) {
        let addresses = addresses(node, &id);
        let (_, grpc_port) = host_port(&addresses.grpc);
        let flags = if id == *node.id() { "myself,master" } else { "master" };
        let epoch = ranges.iter().map(|&range| ownership.highest_epoch(range)).max().unwrap_or(0);
        // Where Redis has the port of its cluster bus, this has the gRPC port.
        let _ = write!(text, "{id} {}@{grpc_port} {flags} - 0 0 {epoch} connected", addresses.resp);
        for range in ranges {
            let _ = write!(text, " {range}");
        }
        text.push('\n');
    }
    text
}

fn info(node: &Node) -> String {
    let ownership = node.gate().ownership();
    let assigned: usize = ownership.claims().iter().map(|claim| usize::from(claim.range.len())).sum();
    let state = if assigned == usize::from(SLOT_COUNT) { "ok" } else { "fail" };
    let by_node = slots_by_node(node);
    let size = by_node.values().filter(|ranges| !ranges.is_empty()).count();
    let mine = node.own_ranges().iter().map(|&range| ownership.highest_epoch(range)).max().unwrap_or(0);
    format!(
        "cluster_state:{state}\r\ncluster_slots_assigned:{assigned}\r\ncluster_slots_ok:{assigned}\r\n\
         cluster_slots_pfail:0\r\ncluster_slots_fail:0\r\ncluster_known_nodes:{}\r\ncluster_size:{size}\r\n\
         cluster_current_epoch:{}\r\ncluster_my_epoch:{mine}\r\n",
        by_node.len(),
        ownership.highest_epoch(SlotRange::FULL),
    )
}

#[cfg(test)]
mod tests {
    use super::host_port;

    #[test]
    fn addresses_of_all_kinds() {
        assert_eq!(host_port("127.0.0.1:7001"), ("127.0.0.1", 7001));
        assert_eq!(host_port("[::1]:7001"), ("::1", 7001));
        assert_eq!(host_port("node-1.example:7001"), ("node-1.example", 7001));
        assert_eq!(host_port(""), ("", 0));
    }
}
