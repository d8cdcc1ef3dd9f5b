//! Both sides of migrations at this node, from start to stop.

use std::sync::Arc;

use anyhow::Context as _;
use proto::common::dial::Dialer;
use proto::common::guard::RangeGuard;
use proto::migration::journal::Journal;
use proto::migration::limits::Limits;
use proto::migration::migrations::Migrations;
use proto::migration::service::MigrationService;
use proto::migration::{MigrationDriver, MigrationReceiver};
use proto::node::{
    ActiveTask, Direction, MigrationProgress, MigrationState, RemovalBlocker, RemovalBlockerKind, TaskKind,
};

use super::slot_map::LearningDial;
use super::{MigrateOptions, NodeSource, NodeTarget};
use crate::grpc::identity;
use crate::health;
use crate::node::Node;

/// The node's migrations. Clones are the same.
#[derive(Debug, Clone)]
pub struct Migrating {
    node: Node,
    driver: MigrationDriver<NodeSource, LearningDial<Dialer>>,
    receiver: MigrationReceiver<NodeTarget>,
}

impl Migrating {
    /// Goes on with what an earlier process left. When it returns, the slots of every undecided migration are held: serve clients
    /// after that. `guard` keeps migrations and splits off each other's slots.
    ///
    /// # Errors
    ///
    /// The journal or the database cannot be read.
    pub async fn start(
        node: &Node,
        guard: RangeGuard,
        options: MigrateOptions,
        mut limits: Limits,
    ) -> anyhow::Result<Self> {
        limits.idle = options.idle;
        let (directory, history) = (node.store().directory().join("migrations"), limits.history);
        let opening = tokio::task::spawn_blocking(move || Journal::open(directory, history));
        let (journal, recovered) = opening.await?.context("cannot read the journal of migrations")?;
        let migrations = Migrations::new(&limits);
        let source = NodeSource::new(node.clone(), options);
        let dial = LearningDial::new(node.clone(), node.trust().dialer());
        let driver = MigrationDriver::builder(identity(node), source, journal.clone(), dial)
            .limits(limits.clone())
            .migrations(migrations.clone())
            .guard(guard.clone())
            .start(recovered)
            .await
            .context("cannot go on with migrations that leave this node")?;
        let target = NodeTarget::new(node.clone(), options);
        let receiver = MigrationReceiver::builder(identity(node), target, journal)
            .limits(limits)
            .migrations(migrations)
            .guard(guard)
            .start()
            .await
            .context("cannot go on with migrations that come to this node")?;
        Ok(Self { node: node.clone(), driver, receiver })
    }

    /// The service of both sides.
    #[must_use]
    pub fn service(&self) -> MigrationService {
        self.driver.node().and(self.receiver.node()).access(self.node.trust().access()).into_service()
    }

    /// Takes no new ones; those under way go on.
    pub fn drain(&self) {
        self.driver.drain();
        self.receiver.drain();
    }

    /// Stops all of them where they are; they go on after the next start. What is undecided is not served by this process any more.
    pub async fn shutdown(&self) {
        self.node.gate().seal();
        self.driver.shutdown().await;
        self.receiver.shutdown().await;
    }
}

impl health::Migrations for Migrating {
    fn active(&self) -> Vec<ActiveTask> {
        self.driver.migrations().active(None).iter().map(task).collect()
    }

    fn removal_blockers(&self) -> Vec<RemovalBlocker> {
        self.driver.unconfirmed().iter().map(unconfirmed).collect()
    }
}

fn unconfirmed(migration: &MigrationProgress) -> RemovalBlocker {
    let target = migration.spec.as_ref().map_or("", |spec| &spec.target_node_id);
    RemovalBlocker {
        kind: RemovalBlockerKind::UnconfirmedCommit.into(),
        subject: migration.migration_id.clone(),
        count: 1,
        message: format!(
            "migration {} is completed, and node {target} still has to confirm that it knows; wait until it answers, or decide COMMITTED there \
             if this node is gone by then",
            migration.migration_id
        ),
    }
}

fn task(migration: &MigrationProgress) -> ActiveTask {
    let peer = migration.spec.as_ref().map(|spec| match migration.direction() {
        Direction::In => spec.source_node_id.clone(),
        Direction::Out | Direction::Unspecified => spec.target_node_id.clone(),
    });
    ActiveTask {
        kind: TaskKind::Migration.into(),
        id: migration.migration_id.clone(),
        phase: migration.state().short_name().to_owned(),
        peer_node_id: peer.unwrap_or_default(),
        slots: migration.spec.as_ref().and_then(|spec| spec.slots),
        progress: migration.progress.clone(),
        needs_operator: migration.state() == MigrationState::NeedsOperator,
    }
}

/// As `Health` takes it.
#[must_use]
pub fn told(migrating: &Migrating) -> Arc<dyn health::Migrations> {
    Arc::new(migrating.clone())
}
