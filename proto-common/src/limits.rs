//! What a peer may take of a node before any service is asked: connections, streams, headers, resets.
//!
//! What a service takes of a peer is in the `Limits` of its crate; `docs/limits.md` in the repository has the table of all of them.

use std::time::Duration;

/// Limits of the connections of a node. Each default is safe for a node with 4 GiB of memory and 4096 file descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionLimits {
    /// Open connections. Default 1024. One more is closed at once; counted as `TOO_MANY_CONNECTIONS`.
    pub connections: usize,
    /// Open connections of one peer: of the owner of a certificate, wherever it is connected from, and without one of an address. Default 256: a
    /// few peers behind one address, with the lanes of their transfers. One more is closed at once; counted as `TOO_MANY_CONNECTIONS_OF_PEER`.
    pub connections_per_peer: usize,
    /// Time for the first 24 bytes, which every HTTP/2 client sends first. Default 10 s. After that the connection is closed; counted as
    /// `SLOW_PREFACE`.
    pub preface: Duration,
    /// Silence after which a connection is closed. Default 90 s, three times [`KEEPALIVE_INTERVAL`](crate::tuning::KEEPALIVE_INTERVAL): a live peer
    /// answers pings. Counted as `IDLE_CONNECTION`. In plaintext, what is left of a long frame, of up to [`FRAME_SIZE`](crate::tuning::FRAME_SIZE), counts when it is there as a whole.
    pub idle: Duration,
    /// Streams at once on one connection. Default 320: the 256 watches that a connection may have, and calls beside them. A client waits with
    /// more; one that does not is told `REFUSED_STREAM`, which is counted.
    pub streams_per_connection: u32,
    /// Calls of one peer in a second, over all of its connections, once [`calls_burst_per_peer`](Self::calls_burst_per_peer) were made at once. Default 1000. Those beyond
    /// them are not refused: a connection that brings one isn't read any further until it is its turn, which comes after at most
    /// [`connections_per_peer`](Self::connections_per_peer) calls of others. Counted as `TOO_MANY_CALLS_OF_PEER`, each time. 0 is as 1, and [`u32::MAX`] no limit. Not counted is
    /// what comes by HTTP/1, where a server takes that.
    pub calls_per_peer: u32,
    /// Calls that a peer may make at once when it has made none for a while, which is as long as that many calls take at
    /// [`calls_per_peer`](Self::calls_per_peer). Default 2000: 200 transfers that begin at once, with 8 lanes each, are 1600, and some are left for other calls. A node that opens more than that
    /// at once, thousands of watches say, waits for seconds.
    pub calls_burst_per_peer: u32,
    /// Frames of one peer in a second that begin no call, over all of its connections, once [`frames_burst_per_peer`](Self::frames_burst_per_peer) came at once: pings, settings, window updates, resets, what
    /// has no meaning, and data of less than 4 KiB in a frame. As many small frames of data as there are larger ones come on top. Default 20,000, which take 0.05 to 0.06 of a core, on 240 connections and whatever they are. Those beyond them wait as calls do, counted as `TOO_MANY_FRAMES_OF_PEER`. 0 is as 1, and
    /// [`u32::MAX`] no limit.
    pub frames_per_peer: u32,
    /// Such frames that come at once when there were none for a while. Default 40,000: messages of some bytes, each in a frame of its own, that come at twice
    /// [`frames_per_peer`](Self::frames_per_peer) are taken as they come for two seconds.
    pub frames_burst_per_peer: u32,
    /// Headers of a request, in bytes, as HTTP/2 counts them. Default 16 KiB. More are answered with status 431, counted as
    /// `REQUEST_HEADER_FIELDS_TOO_LARGE`; far more, or a frame of twice as much, end the connection with `ENHANCE_YOUR_CALM`.
    pub header_bytes: u32,
    /// Streams that a client has reset before they were looked at, per connection. Default 20. More end the connection with
    /// `ENHANCE_YOUR_CALM`, which is counted: the defence against rapid resets (CVE-2023-44487).
    pub pending_resets: usize,
    /// Streams that this side has reset because of the client's errors, per connection. Default 1024. More end the connection with
    /// `ENHANCE_YOUR_CALM`, which is counted (CVE-2025-8671).
    pub error_resets: usize,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            connections_per_peer: 256,
            preface: Duration::from_secs(10),
            idle: Duration::from_secs(90),
            streams_per_connection: 320,
            calls_per_peer: 1000,
            calls_burst_per_peer: 2000,
            frames_per_peer: 20_000,
            frames_burst_per_peer: 40_000,
            header_bytes: 16 << 10,
            pending_resets: 20,
            error_resets: 1024,
        }
    }
}
