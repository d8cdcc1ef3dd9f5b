//! What to do about an error of a migration.

use proto::common::error::Error;
use proto::migration::Reason;
use proto::node::{MigrationProgress, MigrationState};

use crate::advice::general;
use crate::human::safe;
use crate::resume::program;

/// Advice about a migration that did not end as it was meant to.
pub(super) fn ended(migration: &MigrationProgress, at: &str) -> Option<String> {
    let id = safe(&migration.migration_id);
    match migration.state() {
        MigrationState::NeedsOperator => Some(format!(
            "the nodes cannot find out by themselves whether the slots were handed over. Bring the other node back with its data if \
             you can; if its store is gone for good, decide with: {} migrate resolve {id} --at {at} --discard --reason WHY",
            program()
        )),
        MigrationState::Cancelled => Some(
            "the source serves the slots on. The ID is spent: to move them after all, choose a new --id"
                .to_owned(),
        ),
        _ => None,
    }
}

/// Advice about `error` of the node at `at`; none where its own sentence says all.
pub(super) fn about(error: &Error, at: &str, id: &str) -> Option<String> {
    let Some(reason) = Reason::parse(error.reason()) else { return general(error, at) };
    let fact = |name: &str| error.get(name).unwrap_or("?");
    let program = program();
    let advice = match reason {
        Reason::SelfMigration => "name another node in --to".to_owned(),
        Reason::InvalidSlotRange => "see --slots".to_owned(),
        Reason::SpecificationMismatch => format!(
            "that ID stands for something else, which differs in {}: \
             repeat the options that it was started with, or choose another --id",
            option_of(fact("field"))
        ),
        Reason::NotSlotOwner => format!(
            "slot {} belongs to {}: see who owns what with: {program} status {at}, and start at the owner",
            fact("slot"),
            fact("owner")
        ),
        Reason::RangeBusy | Reason::TooManyMigrations => {
            format!("see what moves there with: {program} migrate list --at {at} --active")
        }
        Reason::WrongNode => format!(
            "it is node {} that answered: see that the address leads to the node that you mean",
            fact("node_id")
        ),
        Reason::WrongCluster => "the two nodes belong to different clusters; see the address in --to".to_owned(),
        Reason::StaleFence => "somebody with a higher epoch or term has taken the shard over: see who leads it".to_owned(),
        Reason::StoreChanged => {
            "the other node came back with another data directory; nothing was handed over to it".to_owned()
        }
        Reason::TargetUnreachable => {
            "the source cannot reach the address in --to: see that the node runs, and that the address is one that the source \
             can dial. To try again, choose a new --id"
                .to_owned()
        }
        Reason::InsufficientDisk if fact("peer") != "?" => format!(
            "it needs {} bytes at the target, and migrations from {} have {} left of their share: see what else comes from it there, make \
             room, or raise the target's --disk-percent-per-peer",
            fact("needed_bytes"),
            fact("peer"),
            fact("available_bytes")
        ),
        Reason::InsufficientDisk => format!(
            "the target needs {} bytes and has {}: make room there",
            fact("needed_bytes"),
            fact("available_bytes")
        ),
        Reason::DigestMismatch => format!(
            "the two nodes hold different data in slot {}; the source serves on, nothing was lost. Keep the logs of both, and \
             start again with a new --id",
            fact("slot")
        ),
        Reason::NotReady => format!(
            "rows are still copied: {program} migrate watch {id} --at {at} shows how far it is; then complete it again"
        ),
        Reason::CompleteDeadline => format!(
            "the lag never was small enough: see {program} migrate progress {id} --at {at}, then complete it again, with a longer \
             --deadline"
        ),
        Reason::OutcomePending => format!(
            "the hand-over is being committed, and its outcome found out: {program} migrate watch {id} --at {at} tells"
        ),
        Reason::AlreadyCommitted => {
            "the slots were handed over; to bring them back, start a migration at their new owner".to_owned()
        }
        Reason::MigrationEnded => format!("see how with: {program} migrate progress {id} --at {at}"),
        Reason::MigrationCancelled => "the source serves the slots on; to move them after all, choose a new --id".to_owned(),
        Reason::MigrationNotFound => {
            format!("see what the node knows with: {program} migrate list --at {at}")
        }
        Reason::OutcomeLost => format!(
            "the other node has no record of what it had prepared: see {program} migrate progress {id} --at {at}, and `{program} \
             migrate resolve --help`"
        ),
        Reason::ResolveRefused => format!(
            "something happened since, or it is not at a point where a person decides: see {program} migrate progress {id} --at {at}"
        ),
        Reason::Superseded => {
            "two processes drove this migration, such as a node and its restored copy: stop one of them".to_owned()
        }
        Reason::UnsupportedValueFormat | Reason::UnsupportedFeature => {
            "the two nodes run versions that do not understand each other: bring them to the same one".to_owned()
        }
        Reason::StorageFailed => "see the disk and the log of the node".to_owned(),
        Reason::ShuttingDown => "wait until the node is back".to_owned(),
        Reason::Internal => "this is a bug; the log of the node may say more".to_owned(),
        _ => return general(error, at),
    };
    Some(advice)
}

/// What a person gave that became the field of the specification.
fn option_of(field: &str) -> &str {
    match field.rsplit('.').next().unwrap_or(field) {
        "source_shard_id" => "--source-shard",
        "target_shard_id" => "--target-shard",
        "source_node_id" => "--from",
        "target_node_id" => "--to",
        "slots" => "--slots",
        "auto_complete" => "--manual",
        _ => field,
    }
}
