//! `nodectl migrate`: the questions to a node, and what is told of the answers.

mod advice;
pub(crate) mod args;
pub(crate) mod document;
pub(crate) mod human;
mod live;
mod resolve;
pub(crate) mod start;
pub(crate) mod watch;

use std::time::Duration;

use proto::common::clock::millis;
use proto::common::dial::NodeChannel;
use proto::common::error::{Code, Error};
use proto::migration::limits::{LIST_PAGE, MAX_ANSWER_BYTES, MAX_LIST_BYTES, SMALL_LIST_PAGE};
use proto::node::migration_service_client::MigrationServiceClient;
use proto::node::{
    CancelMigrationRequest, CompleteMigrationRequest, GetMigrationProgressRequest, ListMigrationsRequest,
    MigrationProgress, MigrationState,
};
use tonic::Status;

use self::args::{Cancel, Complete, List, Migrate, One};
use self::document::{MigrationDocument, MigrationListDocument};
use crate::address::Address;
use crate::args::{Node, wire_direction};
use crate::call::{self, headed};
use crate::failure::Failure;
use crate::output::Output;
use crate::resume::{program, quoted};
use crate::signals::Signals;

pub(crate) use self::live::Live;

/// A client over a connection of its own.
type Client = MigrationServiceClient<NodeChannel>;

pub(crate) async fn run(command: Migrate, output: &mut Output, signals: &mut Signals) -> Result<(), Failure> {
    let unheard = |what: &str, id: &str, at: &Address| {
        let see = format!("see with: {} migrate progress {id} --at {}", program(), quoted(&at.to_string()));
        let told = format!("interrupted; the node may have heard the {what} or not");
        Failure::interrupted(told).about_migration(id).help(Some(see))
    };
    match command {
        Migrate::Start(command) => start::run(*command, output, signals).await,
        Migrate::List(command) => {
            signals.before(Failure::interrupted("interrupted"), list(command, output)).await
        }
        Migrate::Progress(command) => {
            signals.before(Failure::interrupted("interrupted"), progress(command, output)).await
        }
        Migrate::Watch(command) => {
            let One { id, node, direction } = command.one;
            let interrupted = watch::goes_on(id.as_str(), &node.at, "stopped looking");
            let watched = watch::Watched { id, at: node.at, timeout: node.timeout, direction };
            signals.before(interrupted, watch::run(&watched, command.retry_for, output)).await
        }
        Migrate::Complete(command) => {
            let interrupted = unheard("wish", command.id.as_str(), &command.node.at);
            signals.before(interrupted, complete(command, output)).await
        }
        Migrate::Cancel(command) => {
            let interrupted = unheard("cancel", command.one.id.as_str(), &command.one.node.at);
            signals.before(interrupted, cancel(command, output)).await
        }
        Migrate::Resolve(command) => {
            let interrupted = unheard("decision", command.one.id.as_str(), &command.one.node.at);
            signals.before(interrupted, resolve::run(command, output)).await
        }
    }
}

/// Connects to `at` and asks its migration service, within `limit`.
pub(crate) async fn ask<T>(
    at: &Address,
    limit: Duration,
    question: impl AsyncFnOnce(Client) -> Result<T, Status>,
) -> Result<T, Error> {
    call::ask_over(at, limit, async |channel| {
        question(Client::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)).await
    })
    .await
}

/// A refusal of the node at `at`, with advice.
pub(crate) fn explained(error: Error, at: &Address, id: &str) -> Failure {
    let help = advice::about(&error, &at.to_string(), id);
    let failure = Failure::from(error).help(help);
    if id.is_empty() { failure } else { failure.about_migration(id) }
}

/// Whether it did what it was meant to; the reason and advice if not.
pub(crate) fn outcome(last: &MigrationProgress, at: &Address) -> Result<(), Failure> {
    if last.state() == MigrationState::Completed {
        return Ok(());
    }
    let error = last.progress.as_ref().and_then(|progress| progress.error.clone());
    let error = match (error, last.state()) {
        (Some(error), _) => Error::from(error),
        (None, MigrationState::Cancelled) => {
            let by = &last.cancelled_at_node_id;
            let place = if by.is_empty() { String::new() } else { format!(" at {by}") };
            let reason = if last.cancel_reason.is_empty() { "no reason given" } else { &last.cancel_reason };
            Error::new(proto::migration::Reason::MigrationCancelled, format!("asked for{place}: {reason}"))
        }
        (None, _) => Error::with_code(Code::Aborted, "MIGRATION_ENDED", "it gave no reason"),
    };
    let id = &last.migration_id;
    let what = match last.state() {
        MigrationState::NeedsOperator => format!("{id} needs an operator"),
        _ => format!("{id} is {}", human::state(last)),
    };
    let help = advice::ended(last, &at.to_string()).or_else(|| advice::about(&error, &at.to_string(), id));
    Err(Failure::from(headed(&error, &what)).about_migration(id.as_str()).help(help))
}

/// All migrations of a node, active ones first.
pub(crate) async fn list_all(
    node: &Node,
    active_only: bool,
    direction: i32,
) -> Result<Vec<MigrationProgress>, Error> {
    ask(&node.at, node.timeout, async |client| {
        let mut client = client.max_decoding_message_size(MAX_LIST_BYTES);
        call::all_pages("migrations", [LIST_PAGE, SMALL_LIST_PAGE], async |page_size, page_token| {
            let request = ListMigrationsRequest { page_size, page_token, direction, active_only };
            let page = client.list_migrations(request).await?.into_inner();
            Ok((page.migrations, page.next_page_token))
        })
        .await
    })
    .await
}

async fn list(command: List, output: &mut Output) -> Result<(), Failure> {
    let List { node, active, direction } = command;
    let listed = list_all(&node, active, wire_direction(direction)).await;
    let migrations = listed.map_err(|error| explained(error, &node.at, ""))?;
    if output.json() {
        output.document(&MigrationListDocument { migrations: migrations.iter().map(Into::into).collect() });
    } else if !output.terminal() {
        output.text(&human::lines(&migrations));
    } else if migrations.is_empty() {
        output.line(&format!("{} has no {}migrations", node.at, if active { "active " } else { "" }));
    } else {
        let (_, width) = console::Term::stdout().size();
        output.text(&human::table(&migrations, width));
    }
    Ok(())
}

/// What the node knows of one migration now.
async fn get(one: &One) -> Result<MigrationProgress, Failure> {
    let request = GetMigrationProgressRequest {
        migration_id: one.id.to_string(),
        direction: wire_direction(one.direction),
    };
    let asked = ask(&one.node.at, one.node.timeout, async |mut client| {
        Ok(client.get_migration_progress(request).await?.into_inner().migration)
    });
    let migration = asked.await.map_err(|error| explained(error, &one.node.at, one.id.as_str()))?;
    Ok(migration.unwrap_or_default())
}

async fn progress(command: One, output: &mut Output) -> Result<(), Failure> {
    let migration = get(&command).await?;
    if output.json() {
        output.document(&MigrationDocument::from(&migration));
    } else {
        output.text(&human::facts(&migration));
    }
    Ok(())
}

async fn complete(command: Complete, output: &mut Output) -> Result<(), Failure> {
    let Complete { id, node, deadline } = command;
    let request = CompleteMigrationRequest {
        migration_id: id.to_string(),
        deadline_ms: Some(millis(deadline)),
        fence: None,
    };
    let asked = ask(&node.at, node.timeout, async |mut client| {
        Ok(client.complete_migration(request).await?.into_inner().migration)
    });
    let migration = asked.await.map_err(|error| explained(error, &node.at, id.as_str()))?;
    let migration = migration.unwrap_or_default();
    if output.json() {
        output.document(&MigrationDocument::from(&migration));
    } else if migration.state() == MigrationState::Completed {
        output.line(&human::completed(&migration));
    } else {
        output.line(&format!(
            "{id} will be handed over within {}, or go on following changes; now: {}",
            humantime::format_duration(deadline),
            human::line(&migration)
        ));
    }
    Ok(())
}

async fn cancel(command: Cancel, output: &mut Output) -> Result<(), Failure> {
    let Cancel { one, reason } = command;
    let One { id, node, direction } = one;
    let request = CancelMigrationRequest {
        migration_id: id.to_string(),
        direction: wire_direction(direction),
        reason,
        fence: None,
    };
    let asked = ask(&node.at, node.timeout, async |mut client| {
        Ok(client.cancel_migration(request).await?.into_inner().migration)
    });
    let migration = asked.await.map_err(|error| explained(error, &node.at, id.as_str()))?;
    let migration = migration.unwrap_or_default();
    if output.json() {
        output.document(&MigrationDocument::from(&migration));
        return Ok(());
    }
    let slots = human::slots(&migration);
    output.line(&match migration.state() {
        MigrationState::Cancelled => format!("{id} is cancelled; slots {slots} stay where they were"),
        MigrationState::Cancelling => format!(
            "{id} is being cancelled; the source serves slots {slots} on, the target still has to drop its copy"
        ),
        _ => format!("{id}: {}", human::line(&migration)),
    });
    Ok(())
}
