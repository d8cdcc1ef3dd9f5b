//! `nodectl migrate watch`, and what others do to follow a migration.

use std::time::Duration;

use proto::common::error::Error;
use proto::common::ids::MigrationId;
use proto::node::{
    MigrationProgress, MigrationState, WatchMigrationProgressRequest, WatchMigrationProgressResponse,
};

use super::live::Live;
use super::{ask, explained, human, outcome};
use crate::address::Address;
use crate::args::{Direction, Patience, wire_direction};
use crate::dial::Wait;
use crate::failure::Failure;
use crate::follow::{Follow, follow};
use crate::output::Output;
use crate::resume::{program, quoted};

/// What is followed, and where.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    pub(crate) id: MigrationId,
    pub(crate) at: Address,
    pub(crate) timeout: Duration,
    pub(crate) direction: Option<Direction>,
}

impl Follow for MigrationProgress {
    type Message = WatchMigrationProgressResponse;

    fn unpack(message: Self::Message) -> Self {
        message.migration.unwrap_or_default()
    }

    /// It is over, or goes nowhere by itself.
    fn has_ended(&self) -> bool {
        matches!(
            self.state(),
            MigrationState::Completed
                | MigrationState::Cancelled
                | MigrationState::Failed
                | MigrationState::NeedsOperator
        )
    }
}

/// Follows it to its end; see [`follow`].
pub(crate) async fn to_the_end(
    watched: &Watched,
    patience: Patience,
    show: impl FnMut(&MigrationProgress, Option<&Wait>) -> bool,
) -> Result<Option<MigrationProgress>, Error> {
    let Watched { id, at, timeout, direction } = watched;
    let open = async || {
        let request = WatchMigrationProgressRequest {
            migration_id: id.to_string(),
            direction: wire_direction(*direction),
        };
        ask(at, *timeout, async |mut client| Ok(client.watch_migration_progress(request).await?.into_inner()))
            .await
    };
    follow(patience, open, show).await
}

/// Shows it until it has ended, and says whether it did what it was meant to.
pub(crate) async fn run(watched: &Watched, patience: Patience, output: &mut Output) -> Result<(), Failure> {
    let mut live = Live::new(output, &watched.at);
    let followed = to_the_end(watched, patience, |seen, wait| {
        live.show(output, seen, wait);
        !output.is_broken()
    });
    let last = followed.await.map_err(|error| explained(error, &watched.at, watched.id.as_str()))?;
    drop(live);
    let Some(last) = last else { return Ok(()) };
    outcome(&last, &watched.at)?;
    if !output.json() {
        output.line(&human::completed(&last));
    }
    Ok(())
}

/// A signal came; the migration does not mind.
pub(crate) fn goes_on(id: &str, at: &Address, what: &str) -> Failure {
    let (program, at) = (program(), quoted(&at.to_string()));
    Failure::interrupted(format!("{what}; the migration {id} goes on"))
        .about_migration(id)
        .help(Some(format!("to stop it: {program} migrate cancel {id} --at {at}")))
        .resume(format!("{program} migrate watch {id} --at {at}"))
}
