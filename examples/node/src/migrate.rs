//! Migrations: the node's database as the source and as the target of slots that move while clients write.
//!
//! [`NodeSource`] gives slots away, [`NodeTarget`] takes them over; the runtime of [`proto::migration`] decides when. What is durable is the
//! store's: generations of rows, the change log, staging. What clients feel is the gate's: holds and delays.

mod room;
mod run;
pub(crate) mod slot_map;
mod source;
mod target;
#[cfg(test)]
mod tests;

use std::time::Duration;

use proto::common::error::Error;
use proto::migration::hold::Held;
use proto::migration::{MigrationSpec, Reason};

pub use run::{Migrating, told};
pub use slot_map::LearningDial;
pub use source::NodeSource;
pub use target::NodeTarget;

use crate::gate::GateHold;
use crate::store::{ExpiryPause, StoreError};

/// How migrations treat clients.
#[derive(Debug, Clone, Copy)]
pub struct MigrateOptions {
    /// How long a request waits for slots that change hands, at most, before it is told to try again.
    pub patience: Duration,
    /// Silence after which the stream of a migration to this node is given up; 3 s or more.
    pub idle: Duration,
    /// Of the room on the disk, what one node may stage, in percent; 1 to 100. Of the room that there would be without it, so that some is
    /// left to others.
    pub percent_per_peer: u8,
}

impl Default for MigrateOptions {
    /// 5 s, 30 s, and 75 %.
    fn default() -> Self {
        Self { patience: Duration::from_secs(5), idle: Duration::from_secs(30), percent_per_peer: 75 }
    }
}

/// Requests that wait, and expired rows that stay.
#[derive(Debug)]
struct NodeHold {
    hold: GateHold,
    _expiry: Option<ExpiryPause>,
}

impl Held for NodeHold {
    fn held_requests(&self) -> u64 {
        self.hold.waited()
    }
}

/// Values are the bytes that a client sees, and nothing else.
fn check_value_format(spec: &MigrationSpec) -> Result<(), Error> {
    let format = &spec.value_format;
    if format.is_empty() {
        return Ok(());
    }
    let sentence =
        format!("this node moves values as clients see them; it knows no value format \"{format}\"");
    Err(Reason::UnsupportedValueFormat.error(sentence).metadata("value_format", format))
}

/// What a peer learns of a failed store: no paths; the log has the rest.
fn failed(error: StoreError) -> Error {
    let sentence = error.to_string();
    match error {
        StoreError::LogLost(_) => Reason::LogLost.error(sentence),
        StoreError::Busy(_) => Reason::RangeBusy.error(sentence),
        StoreError::KeyTooLong { slot, bytes } => Reason::EntryTooLarge
            .error(sentence)
            .metadata("slot", slot.to_string())
            .metadata("size", bytes.to_string()),
        StoreError::Outdated { slot, epoch } | StoreError::NotTheirs { slot, epoch, .. } => {
            Reason::StaleSlotEpoch
                .error(sentence)
                .metadata("slot", slot.to_string())
                .metadata("slot_epoch", epoch.to_string())
        }
        StoreError::NoSpace { needed, available, .. } => Reason::InsufficientDisk
            .error(format!("the disk has {available} bytes left, of {needed} that are needed"))
            .metadata("needed_bytes", needed.to_string())
            .metadata("available_bytes", available.to_string()),
        StoreError::TooManyShards { peer, limit } => Reason::TooManyShards
            .error(sentence)
            .metadata("limit", limit.to_string())
            .metadata("peer", peer.as_str()),
        StoreError::Closed => Reason::ShuttingDown.error(sentence),
        StoreError::Refused(_) => Reason::Internal.error(sentence),
        error => {
            tracing::warn!(%error, "the database failed a migration");
            let sentence = if error.is_for_good() {
                "its disk failed the node's database, which takes no more writes: make sure that there is room, then restart the node"
            } else {
                "the node cannot read or write its database"
            };
            Reason::StorageFailed.error(sentence).caused_by(error)
        }
    }
}
