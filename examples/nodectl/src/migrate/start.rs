//! `nodectl migrate start`.

use proto::common::error::Error;
use proto::common::ids::{IdError, MigrationId, NodeId, ShardId};
use proto::common::slots::SlotRange;
use proto::node::{MigrationProgress, MigrationSpec, StartMigrationRequest};

use super::args::{Asking, Limits, Start, Target};
use super::document::{MigrationDocument, MigrationEventDocument};
use super::watch::{self, Watched};
use super::{ask, explained, human};
use crate::address::Address;
use crate::args::{Direction, Priority};
use crate::failure::Failure;
use crate::output::Output;
use crate::resume::{program, quoted};
use crate::signals::Signals;

/// What a node is asked to move.
#[derive(Debug)]
pub(crate) struct Order<'a> {
    pub(crate) id: &'a MigrationId,
    pub(crate) slots: SlotRange,
    pub(crate) target: &'a Target,
    pub(crate) source_node: Option<&'a NodeId>,
    pub(crate) source_shard: &'a ShardId,
    pub(crate) target_shard: &'a ShardId,
    pub(crate) auto_complete: bool,
    pub(crate) limits: Limits,
    pub(crate) priority: Priority,
}

/// The migration, and whether it was there before.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) migration: MigrationProgress,
    pub(crate) joined: bool,
}

/// What the store of the example calls the shard that holds these slots.
pub(crate) fn shard_of(slots: SlotRange) -> Result<ShardId, IdError> {
    ShardId::new(format!("slots-{slots}"))
}

/// Asks the node at `at` to begin, or to go on.
pub(crate) async fn order(at: &Address, asking: Asking, order: &Order<'_>) -> Result<Started, Error> {
    let request = StartMigrationRequest {
        migration_id: order.id.to_string(),
        spec: Some(MigrationSpec {
            slots: Some(order.slots.into()),
            source_shard_id: order.source_shard.to_string(),
            target_shard_id: order.target_shard.to_string(),
            source_node_id: order.source_node.map(ToString::to_string).unwrap_or_default(),
            target_node_id: order.target.node.to_string(),
            auto_complete: order.auto_complete,
            value_format: String::new(),
        }),
        target_address: order.target.address.to_string(),
        fence: None,
        priority: proto::node::Priority::from(order.priority).into(),
        limits: Some(order.limits.into()),
    };
    ask(at, asking.timeout, async |mut client| {
        let response = client.start_migration(request).await?.into_inner();
        Ok(Started { migration: response.migration.unwrap_or_default(), joined: response.joined })
    })
    .await
}

pub(super) async fn run(command: Start, output: &mut Output, signals: &mut Signals) -> Result<(), Failure> {
    let id = match &command.id {
        Some(id) => id.clone(),
        None => MigrationId::new(format!("m-{:016x}", fastrand::u64(..)))
            .map_err(|error| Failure::failed(error.to_string()))?,
    };
    let shard = shard_of(command.slots).map_err(|error| Failure::failed(error.to_string()))?;
    let (at, asking) = (&command.from, command.asking);
    let (program, place) = (program(), quoted(&at.to_string()));
    let wish = Order {
        id: &id,
        slots: command.slots,
        target: &command.to,
        source_node: command.source_node.as_ref(),
        source_shard: command.source_shard.as_ref().unwrap_or(&shard),
        target_shard: command.target_shard.as_ref().unwrap_or(&shard),
        auto_complete: !command.manual,
        limits: command.limits,
        priority: command.priority,
    };
    let unheard = Failure::interrupted("interrupted; the node may have heard the wish or not")
        .about_migration(id.as_str())
        .help(Some(format!("see with: {program} migrate progress {id} --at {place}")));
    let Started { migration, joined } = tokio::select! {
        started = order(at, asking, &wish) => started.map_err(|error| explained(error, at, id.as_str()))?,
        () = signals.interrupted() => return Err(unheard),
    };
    if output.json() {
        let event = if joined { "joined" } else { "started" };
        output.document(&MigrationEventDocument { event, migration: MigrationDocument::from(&migration) });
    } else {
        let how = if joined { "joined" } else { "started" };
        output.line(&format!(
            "{how} migration {id} of slots {} to {} at {}: {}",
            command.slots,
            command.to.node,
            command.to.address,
            human::line(&migration)
        ));
        if command.manual {
            output.line(&format!("hand over with: {program} migrate complete {id} --at {place}"));
        }
        if !command.wait {
            output.line(&format!("follow it with: {program} migrate watch {id} --at {place}"));
        }
    }
    if !command.wait {
        return Ok(());
    }
    let interrupted = watch::goes_on(id.as_str(), at, "stopped waiting");
    let watched =
        Watched { id: id.clone(), at: at.clone(), timeout: asking.timeout, direction: Some(Direction::Out) };
    signals.before(interrupted, watch::run(&watched, asking.retry_for, output)).await
}
