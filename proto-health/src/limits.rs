//! What a node takes and sends, in one place. The defaults are those of `health.proto`.

#[cfg(feature = "server")]
use std::ops::RangeInclusive;
#[cfg(feature = "server")]
use std::time::Duration;

/// Limits of a [`HealthRegistry`](crate::server::HealthRegistry).
#[cfg(feature = "server")]
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Components of the node. Default 256.
    pub components: usize,
    /// Message of a component, and of its last error, in bytes; longer ones are cut. Default 1024; [`MAX_HEARTBEAT_BYTES`] / 2 at most, whatever is set.
    pub message_bytes: usize,
    /// Watches that are open at once, of both protocols. Default 16384.
    pub watches: usize,
    /// Of them, on one connection. Default 256. See [`ConnectionId`](crate::server::ConnectionId).
    pub watches_per_connection: usize,
    /// Of them, of one peer: the owner of a certificate, else an address ([`Peer::key`](proto_common::peer::Peer::key)). Default 4096.
    pub watches_per_peer: usize,
    /// Shortest time between two frames of a watch, apart from the last one. Default 100 ms.
    pub watch_interval: Duration,
    /// Heartbeats that a watch may ask for, in milliseconds. Default 100..=60000.
    pub heartbeat_ms: RangeInclusive<u32>,
    /// Heartbeats of one peer in a second, over all of its watches of both protocols, at least 1: with `n` watches, each has a heartbeat every
    /// `n / heartbeats_per_peer` seconds and no more often. Default 1000, so that up to 100 watches have what they ask for, and up to 500 with the 500 ms of a monitor.
    pub heartbeats_per_peer: u32,
    /// Entries of all lists together in one page of `GetNodeStatus`. Default [`PAGE`], 1000; more are refused by clients that keep to that.
    pub page: usize,
    /// Encoded size of such a page, in bytes. Default 1 MiB; what is above [`MAX_ANSWER_BYTES`] is refused by clients that keep to that.
    pub page_bytes: usize,
    /// How long the node may take to say what it has, for `GetNodeStatus`; after that the answer goes without. Default 2 s.
    pub facts_timeout: Duration,
    /// Callers that are remembered by their `from`. Default 4096.
    pub callers: usize,
}

#[cfg(feature = "server")]
impl Default for Limits {
    fn default() -> Self {
        Self {
            components: 256,
            message_bytes: 1024,
            watches: 16_384,
            watches_per_connection: 256,
            watches_per_peer: 4096,
            watch_interval: Duration::from_millis(100),
            heartbeat_ms: 100..=60_000,
            heartbeats_per_peer: 1000,
            page: PAGE,
            page_bytes: 1 << 20,
            facts_timeout: Duration::from_secs(2),
            callers: 4096,
        }
    }
}

/// Names in one answer of the standard `List`, as its specification says.
pub const STANDARD_LIST: usize = 100;

/// Reasons in `NodeStatus.removal_blockers`.
pub const REMOVAL_BLOCKERS: usize = 64;

/// Largest answer, in bytes: a page, and what stands in every page.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Largest answer that a client has to take of a node with default limits, in bytes: a page of 1 MiB, and an entry too many, or what it says of 256 components.
/// A client should take no more: an empty entry of a list is 3 bytes of an answer and some 340 of memory.
pub const MAX_ANSWER_BYTES: usize = (1 << 20) + (64 << 10);

/// Entries of all lists together in a page of `GetNodeStatus` of a node with default limits: it gives no more, whatever is asked for.
pub const PAGE: usize = 1000;

/// Entries that a node asks another one for in a page of `GetNodeStatus`.
pub const PEER_PAGE: u32 = 400;

/// Largest answer that a node takes of another one that it asks for one list, or for no list, in bytes: [`PEER_PAGE`] owners of slots, or peers, with identifiers, addresses and
/// messages as long as they can be.
pub const MAX_PEER_ANSWER_BYTES: usize = 512 << 10;

/// Largest heartbeat, or answer to a check, that a node takes of another one, in bytes. It asks for no components, so an honest one has who answers and a message of
/// [`message_bytes`](Limits::message_bytes). An empty component is 2 bytes, and takes more than a hundred in memory.
pub const MAX_HEARTBEAT_BYTES: usize = 16 << 10;
