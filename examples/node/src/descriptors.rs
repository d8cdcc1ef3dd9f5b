//! File descriptors: without one, neither a peer nor a client gets in, and nothing is saved.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::store::MAX_NODES;

/// What the node holds open itself: the database, journals, files that are read and sent, and two connections to each node that it may know, one of those who watch it
/// and one of those who ask for its slot map.
const OWN: u64 = 256 + 2 * MAX_NODES as u64;

/// Takes as many descriptors as the system lets this process have, and returns how many clients there are some for beside `peers` and what the node needs itself:
/// `wanted` at most, as Redis does.
pub(crate) fn clients(wanted: usize, peers: u64) -> usize {
    let before = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: before.maximum, ..before };
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => before.maximum,
        Err(error) => {
            tracing::warn!(%error, "the limit of open files cannot be raised");
            before.current
        }
    };
    // None is no limit.
    let limit = limit.unwrap_or(u64::MAX);
    let clients = fit(wanted, peers.saturating_add(OWN), limit);
    if clients < wanted {
        tracing::warn!(
            limit,
            wanted,
            clients,
            "fewer clients are let in than --max-clients, since the process may have no more files open; raise the hard limit (ulimit -Hn, LimitNOFILE=)"
        );
    }
    clients
}

/// Where `limit` is not enough for all, clients get a quarter of it at least: a node without them is of no use.
fn fit(wanted: usize, beside: u64, limit: u64) -> usize {
    let most = limit.saturating_sub(beside).max(limit / 4);
    wanted.min(usize::try_from(most).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_leave_what_the_node_needs() {
        assert_eq!(fit(10_000, 2000, u64::MAX), 10_000);
        assert_eq!(fit(10_000, 2000, 12_000), 10_000);
        assert_eq!(fit(10_000, 2000, 4096), 2096);
        assert_eq!(fit(10_000, 2000, 1024), 256);
        assert_eq!(fit(100, 2000, 1024), 100);
    }
}
