//! What a receiver takes, in one place.

use std::time::Duration;

/// Limits of a receiver. Each default is safe for a node with 4 GiB of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Transfers with a connected sender at once, or one that is in its handshake. Default 256: at one receive budget for all of
    /// them, more senders make each slower, not the node larger. In each of these places, the handshake of one more stream may be under way, which may take over.
    pub transfers: usize,
    /// Of them, from one source node. Default 64, so that no node takes the places of all others.
    pub transfers_per_peer: usize,
    /// Transfers with staged data, connected or not. Default 1024.
    pub staged: usize,
    /// Of them, from one source node. Default 256.
    pub staged_per_peer: usize,
    /// Streams of one transfer, control stream included; fewer where [`receive_budget_bytes`](Self::receive_budget_bytes) has no chunk for each. Default 8.
    pub lanes: u32,
    /// Payload of a chunk, in bytes. Default 1 MiB. Senders of this crate refuse less than [`MIN_CHUNK_BYTES`], for good.
    pub chunk_bytes: u32,
    /// Files in a manifest. Default 131072.
    pub files: u64,
    /// Names of a manifest, in bytes. Default 64 MiB.
    pub name_bytes: u64,
    /// Directories that the files of a manifest lie in. Default 131072, as many as files: each is an inode of the disk, and its name is kept in memory.
    pub directories: u64,
    /// Memory for the manifests of all staged transfers, their directories and the pieces that they may come in ([`extents`](Self::extents)), in bytes, by
    /// estimate. Default 512 MiB: two snapshots at the limits above, or 2000 ordinary ones.
    pub manifest_memory_bytes: u64,
    /// Of that, for those of one source node. Default 256 MiB, so that no node takes all of it. The only manifest of a node is always taken.
    pub manifest_memory_per_peer: u64,
    /// Pieces with gaps between them, per transfer, beside one per file. Default 1024: a sender leaves a gap for each lane, and one more where a
    /// stream breaks, which it fills first; so do bytes that were damaged. The memory for all of them, 256 bytes each, is charged to
    /// [`manifest_memory_bytes`](Self::manifest_memory_bytes) for as long as the transfer is staged.
    pub extents: usize,
    /// Size of a snapshot, in bytes. Default 2^63 - 1.
    pub snapshot_bytes: u64,
    /// Payload bytes on their way from the sockets to the store, over all transfers; shared out as
    /// credit, in equal parts to the source nodes that send, and to the streams of each. Each stream gets at least one chunk, so there are no more lanes than there are chunks
    /// in it: a node may have half as many streams with lanes as others leave of them, and one for each transfer. Default 128 MiB.
    pub receive_budget_bytes: u64,
    /// Credit of one stream at most, in bytes. Default 8 MiB: what fills a 10 Gbit/s link at 5 ms, and
    /// the size of the HTTP/2 stream window. It begins with 1 MiB, or a chunk, and gets as much more as the stream has brought.
    pub stream_credit_bytes: u64,
    /// Payload bytes per second that senders are asked for, per transfer. Default: no limit.
    pub bytes_per_second: Option<std::num::NonZeroU64>,
    /// Silence after which a stream is given up. Default 30 s.
    pub idle: Duration,
    /// Payload bytes that a transfer has to bring within [`slowest_time`](Self::slowest_time) to keep its place, over all its streams.
    /// Default 64 KiB: a thousandth of what a slow link carries.
    pub slowest_bytes: u64,
    /// Time within which these have to come. A sender to which nothing is missing has, beside that, as long as it takes to
    /// read its snapshot at 16 MiB/s. Default 10 min.
    pub slowest_time: Duration,
    /// Time that a sender has for its header, and for each page of its manifest; for the whole manifest it has ten
    /// times that. Default 30 s.
    pub first_frame: Duration,
    /// Bytes that may be received but not durable yet, per transfer. Default 64 MiB, as the protocol
    /// promises; lower ones are kept too. Each chunk counts as 4 KiB at least.
    pub unsynced_bytes: u64,
    /// Time after which received bytes are made durable at the latest. Default 500 ms, so that with the
    /// sync itself the protocol's 1 s is kept on an ordinary disk.
    pub unsynced_time: Duration,
    /// Bytes of files that are filled from installed ones, in 10 minutes, for one source node. A transfer that begins when its node has used up nothing has all of its files filled,
    /// however large they are; that counts, for a day at most, against those that follow. What is beyond is asked of the sender. Default 8 GiB.
    pub reuse_bytes_per_peer: u64,
    /// Age at which staged data that nobody resumes is collected. Default 24 h.
    pub stale_after: Duration,
    /// Finished transfers that are remembered. Default 1000.
    pub history: usize,
    /// Open watches. Default 1024.
    pub watchers: usize,
    /// Of them, of one peer: the owner of a certificate, else an address ([`Peer::key`](proto_common::peer::Peer::key)). Default 256, so that
    /// none takes the places of all others.
    pub watchers_per_peer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            transfers: 256,
            transfers_per_peer: 64,
            staged: 1024,
            staged_per_peer: 256,
            lanes: 8,
            chunk_bytes: 1 << 20,
            files: 131_072,
            name_bytes: 64 << 20,
            directories: 131_072,
            manifest_memory_bytes: 512 << 20,
            manifest_memory_per_peer: 256 << 20,
            extents: 1024,
            snapshot_bytes: i64::MAX.unsigned_abs(),
            receive_budget_bytes: 128 << 20,
            stream_credit_bytes: 8 << 20,
            bytes_per_second: None,
            idle: Duration::from_secs(30),
            slowest_bytes: 64 << 10,
            slowest_time: Duration::from_secs(600),
            first_frame: Duration::from_secs(30),
            unsynced_bytes: 64 << 20,
            unsynced_time: Duration::from_millis(500),
            reuse_bytes_per_peer: 8 << 30,
            stale_after: Duration::from_secs(24 * 60 * 60),
            history: 1000,
            watchers: 1024,
            watchers_per_peer: 256,
        }
    }
}

/// Least payload of a chunk that a receiver may ask for, in bytes: a sender reads, sums up and frames each for itself, so that one who asked for less would have it work for hours.
pub const MIN_CHUNK_BYTES: u32 = 1 << 10;

/// Largest message on a stream, in bytes, whatever [`Limits::chunk_bytes`] is. A receiver takes less: a page of [`MAX_PAGE_BYTES`] and, once it has accepted the
/// transfer, a chunk and 16 KiB around it. What is larger is refused with `CHUNK_TOO_LARGE` before it is read.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Largest message with a page of the manifest or of the end that a receiver takes, and largest answer that a sender takes, in bytes: an honest page, of [`PAGE_BYTES`],
/// and a third more. A file of a page is 2 bytes at least, and 72 in memory; a missing extent is 2, and 40.
pub const MAX_PAGE_BYTES: usize = 1 << 20;

/// Largest answer that a client has to take, in bytes, of a question or with a page of [`LIST_PAGE`] transfers; with [`SMALL_LIST_PAGE`] also where the errors of all of them
/// are as long as errors can be. A client should take no more: an empty entry is 2 bytes of an answer and some 500 of memory.
pub const MAX_ANSWER_BYTES: usize = 256 << 10;

/// Transfers to ask for in a page of `ListTransfers`.
pub const LIST_PAGE: u32 = 100;

/// To ask for where a page of [`LIST_PAGE`] is refused as larger than [`MAX_ANSWER_BYTES`].
pub const SMALL_LIST_PAGE: u32 = 10;

/// Encoded size at which a page of a list is closed.
pub const PAGE_BYTES: usize = 768 << 10;
