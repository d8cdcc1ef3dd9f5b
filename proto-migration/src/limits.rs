//! What a node takes and keeps, in one place.

use std::num::NonZeroU64;
use std::time::Duration;

use proto_common::error::Error;

use crate::{Reason, v1};

/// Largest message of this service beside its payload: what `migration.proto` calls 1 MiB.
pub const MESSAGE_OVERHEAD: usize = 1 << 20;

/// Largest answer that a client has to take, in bytes, of a question about one migration, with all of its incidents. A client should take no more: an empty incident is 3
/// bytes of an answer and some 150 of memory.
pub const MAX_ANSWER_BYTES: usize = 1 << 20;

/// The same of a page of [`LIST_PAGE`] migrations; of [`SMALL_LIST_PAGE`] also where the errors of all of them are as long as errors can be. An empty migration is 2 bytes
/// of an answer and some 1200 of memory.
pub const MAX_LIST_BYTES: usize = 256 << 10;

/// Migrations to ask for in a page of `ListMigrations`.
pub const LIST_PAGE: u32 = 100;

/// To ask for where a page of [`LIST_PAGE`] is refused as larger than [`MAX_LIST_BYTES`].
pub const SMALL_LIST_PAGE: u32 = 10;

/// Largest message where batches have at most `batch_bytes` of payload.
#[cfg(feature = "server")]
pub(crate) fn largest_message(batch_bytes: u32) -> usize {
    usize::try_from(batch_bytes).unwrap_or(usize::MAX).saturating_add(MESSAGE_OVERHEAD)
}

/// Bounds of a batch's payload that a target may declare.
pub const BATCH_BYTES: std::ops::RangeInclusive<u32> = (64 << 10)..=(64 << 20);

/// The longest time that a caller may have writes wait in a freeze (`MigrationLimits.freeze_timeout_ms`).
pub const LONGEST_FREEZE: Duration = Duration::from_secs(60);

/// Limits of a node. Each default is safe for a node with 4 GiB of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Migrations that leave the node at the same time. Default 4.
    pub outgoing: usize,
    /// Migrations that come to the node at the same time. Default 4.
    pub incoming: usize,
    /// Of them, from one source node. Default 3, so that no node takes the places of all others.
    pub incoming_per_peer: usize,
    /// Streams of one source node, over all of its migrations, that are let in at once, and in each second after that; and apart from them, as many freezes. Default 10. Of
    /// those that come faster, some wait for up to a second, and the others are told to come back. Each has the store write records, which writes of
    /// clients wait for. 0 counts as 1.
    pub streams_per_peer: u32,
    /// Payload of a batch that is taken, in bytes. Default 16 MiB.
    pub batch_bytes: u32,
    /// Payload of a batch that is sent, in bytes, unless one entry is larger. Default 512 KiB, one frame of HTTP/2: each is a write and wakes the
    /// receiver, and 1 MiB no longer stays in the processor's second-level cache from where it is encoded to where it is sent.
    pub sent_batch_bytes: usize,
    /// Payload bytes that a source may have on the way, per migration. Default 32 MiB.
    pub credit_bytes: u64,
    /// Payload bytes that the store is given to stage and to make durable at once. Default 1 MiB: one sync for a thousand small entries and
    /// more, and little enough that what a disk has to keep at once holds clients of other slots up for milliseconds.
    pub apply_bytes: u64,
    /// Least time between the beginnings of two such parts, unless `apply_bytes` are there, the source is short of credit, or somebody waits: for the
    /// last row of a copy, or for changes, at the source. So what comes meanwhile is staged together, and a page in which several changes lie is written
    /// once. It is part of the lag; keep it below `ready_lag_ms`. Default 100 ms: with `examples/node` on a disk the p99 of other clients' writes is 11 to
    /// 15 ms meanwhile, instead of 13 to 17.
    pub apply_every: Duration,
    /// Payload bytes per second that sources are asked for, per migration. Default: no limit.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Silence after which a stream is given up. Default 30 s; 3 s or more. Sources give one up after an hour in any case.
    pub idle: Duration,
    /// Payload bytes that the stream of a migration has to bring within [`slowest_time`](Self::slowest_time), until all rows were copied.
    /// After that, it may wait for as long as its operator wants. Default 64 KiB.
    pub slowest_bytes: u64,
    /// Time within which these have to come. Default 10 min.
    pub slowest_time: Duration,
    /// How long the record of a migration that was cancelled is kept at the target after its last stream. Default 1 h. One of which nothing is staged is kept
    /// for twice [`idle`](Self::idle), if that is less: it keeps others off the slots, and its source may never have heard that it was accepted.
    pub record_kept: Duration,
    /// Records of cancelled migrations from one source node that are kept for so long at the target. Default 64. Before one more migration begins, the oldest
    /// of what is beyond is dropped; the history knows of it. Streams about such records are ended for that, and until they are, nothing begins.
    pub cancelled_per_peer: usize,
    /// Migrations from one source node that are committed at the target and that their source has not taken note of. Default 64. Such a record stays until it
    /// does, or an operator resolves it; with so many, nothing else of that source begins.
    pub committed_per_peer: usize,
    /// Migrations that ended and are remembered. Default 1000.
    pub history: usize,
    /// Open watches of the node. Default 1024.
    pub watchers: usize,
    /// Of them, of one peer: the owner of a certificate, else an address ([`Peer::key`](proto_common::peer::Peer::key)). Default 256, so that
    /// none takes the places of all others.
    pub watchers_per_peer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            outgoing: 4,
            incoming: 4,
            incoming_per_peer: 3,
            streams_per_peer: 10,
            batch_bytes: 16 << 20,
            sent_batch_bytes: 512 << 10,
            credit_bytes: 32 << 20,
            apply_bytes: 1 << 20,
            apply_every: Duration::from_millis(100),
            bytes_per_second: None,
            idle: Duration::from_secs(30),
            slowest_bytes: 64 << 10,
            slowest_time: Duration::from_secs(600),
            record_kept: Duration::from_secs(3600),
            cancelled_per_peer: 64,
            committed_per_peer: 64,
            history: 1000,
            watchers: 1024,
            watchers_per_peer: 256,
        }
    }
}

/// Limits of one migration, with the defaults of the contract filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskLimits {
    /// Payload bytes per second, rows and changes together.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Longest time that writes are held before the freeze is given up.
    pub freeze_timeout: Duration,
    /// READY needs a lag of at most this many changes.
    pub ready_lag_entries: u64,
    /// READY needs a lag of at most this.
    pub ready_lag: Duration,
    /// Unacknowledged changes that the source retains, in bytes.
    pub log_bytes_cap: u64,
    /// Slow the writers of the moving slots: where the target does not keep up, and for a moment before a freeze.
    pub slow_writers: bool,
    /// How long the target may take to accept for the first time.
    pub accept_timeout: Duration,
}

impl TaskLimits {
    /// Reads the limits in field `path` of a request.
    ///
    /// # Errors
    ///
    /// `INVALID_FIELD`, naming the field that is out of bounds.
    pub fn from_wire(limits: Option<v1::MigrationLimits>, path: &str) -> Result<Self, Error> {
        let v1::MigrationLimits {
            max_bytes_per_second,
            freeze_timeout_ms,
            ready_lag_entries,
            ready_lag_ms,
            log_bytes_cap,
            slow_writers,
            accept_timeout_ms,
        } = limits.unwrap_or_default();
        let bad =
            |field: &str, problem: String| Reason::InvalidField.field(&format!("{path}.{field}"), problem);
        let freeze = freeze_timeout_ms.unwrap_or(500);
        let longest = proto_common::clock::millis(LONGEST_FREEZE);
        if !(1..=longest).contains(&freeze) {
            return Err(bad("freeze_timeout_ms", format!("is {freeze}; it takes 1 to {longest}")));
        }
        let cap = log_bytes_cap.unwrap_or(256 << 20);
        if cap < 1 << 20 {
            return Err(bad("log_bytes_cap", format!("is {cap}; it takes 1048576 (1 MiB) or more")));
        }
        let accept = accept_timeout_ms.unwrap_or(30_000);
        if accept == 0 {
            return Err(bad("accept_timeout_ms", "is 0; it takes 1 or more".to_owned()));
        }
        Ok(Self {
            bytes_per_second: max_bytes_per_second.and_then(NonZeroU64::new),
            freeze_timeout: Duration::from_millis(freeze),
            ready_lag_entries: ready_lag_entries.unwrap_or(10_000),
            ready_lag: Duration::from_millis(ready_lag_ms.unwrap_or(200)),
            log_bytes_cap: cap,
            slow_writers: slow_writers.unwrap_or(true),
            accept_timeout: Duration::from_millis(accept),
        })
    }
}

impl From<TaskLimits> for v1::MigrationLimits {
    fn from(limits: TaskLimits) -> Self {
        let TaskLimits {
            bytes_per_second,
            freeze_timeout,
            ready_lag_entries,
            ready_lag,
            log_bytes_cap,
            slow_writers,
            accept_timeout,
        } = limits;
        let millis = proto_common::clock::millis;
        Self {
            max_bytes_per_second: bytes_per_second.map(NonZeroU64::get),
            freeze_timeout_ms: Some(millis(freeze_timeout)),
            ready_lag_entries: Some(ready_lag_entries),
            ready_lag_ms: Some(millis(ready_lag)),
            log_bytes_cap: Some(log_bytes_cap),
            slow_writers: Some(slow_writers),
            accept_timeout_ms: Some(millis(accept_timeout)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_contract() {
        const PROTO: &str = include_str!("../proto/node/migration/v1/migration.proto");
        let limits = v1::MigrationLimits::from(TaskLimits::from_wire(None, "limits").unwrap());
        assert_eq!(limits.max_bytes_per_second, None);
        for (field, default) in [
            ("freeze_timeout_ms", limits.freeze_timeout_ms),
            ("ready_lag_entries", limits.ready_lag_entries),
            ("ready_lag_ms", limits.ready_lag_ms),
            ("accept_timeout_ms", limits.accept_timeout_ms),
        ] {
            let (before, _) = PROTO.split_once(&format!("optional uint64 {field} =")).unwrap();
            let comment = &before[before.len() - 120..];
            assert!(comment.contains(&format!("default {}.", default.unwrap())), "{field}: {comment}");
        }
        assert!(PROTO.contains("1 MiB or more, default 256 MiB"));
        assert_eq!(limits.log_bytes_cap, Some(256 << 20));
        assert_eq!(limits.slow_writers, Some(true));
        let again = TaskLimits::from_wire(Some(limits), "limits").unwrap();
        assert_eq!(v1::MigrationLimits::from(again), limits);
    }

    #[test]
    fn what_is_out_of_bounds_is_named() {
        let none = v1::MigrationLimits::default();
        for (field, limits) in [
            ("freeze_timeout_ms", v1::MigrationLimits { freeze_timeout_ms: Some(0), ..none }),
            ("freeze_timeout_ms", v1::MigrationLimits { freeze_timeout_ms: Some(60_001), ..none }),
            ("log_bytes_cap", v1::MigrationLimits { log_bytes_cap: Some(1000), ..none }),
            ("accept_timeout_ms", v1::MigrationLimits { accept_timeout_ms: Some(0), ..none }),
        ] {
            let error = TaskLimits::from_wire(Some(limits), "limits").unwrap_err();
            assert_eq!(error.violations()[0].field, format!("limits.{field}"));
        }
    }
}
