//! `nodectl migrate resolve`: a person decides what the nodes cannot know, and is told what that means first.

use proto::common::slots::RECLAIM_STEP;
use proto::common::text::hex;
use proto::node::{Direction, MigrationDecision, MigrationProgress, MigrationState, ResolveMigrationRequest};

use super::args::{One, Resolve};
use super::document::MigrationDocument;
use super::{ask, explained, get, human};
use crate::args::wire_direction;
use crate::failure::Failure;
use crate::human::safe;
use crate::output::Output;
use crate::resume::again;

pub(super) async fn run(command: Resolve, output: &mut Output) -> Result<(), Failure> {
    let Resolve { one, commit, discard: _, reason, attempt, store_id, yes } = command;
    let decision = if commit { MigrationDecision::Committed } else { MigrationDecision::Discarded };
    let seen = get(&one).await?;
    let shown = seen.peer.as_ref().map(|peer| peer.store_id.clone()).unwrap_or_default();
    let confirmed = yes || (attempt.is_some() && store_id.is_some());
    // What is missing in the command line for the same decision about the same facts.
    let mut pinned = String::new();
    if attempt.is_none() {
        pinned.push_str(&format!(" --attempt {}", seen.attempt));
    }
    if store_id.is_none() {
        pinned.push_str(&format!(" --store-id {}", hex(&shown)));
    }
    let attempt = attempt.unwrap_or(seen.attempt);
    let store = store_id.map_or(shown, |store| store.0.into());
    let One { id, node, .. } = &one;
    if store.is_empty() {
        let message = "'--store-id <HEX>': the node has never met the store of the other one: there is none to vouch for";
        return Err(Failure::usage(message).about_migration(id.as_str()));
    }
    // A program reads standard output, a person may still read this.
    anstream::eprintln!("{}", plan(&seen, decision, attempt, &hex(&store)));
    if !confirmed {
        return Err(Failure::usage("nothing was done: without --yes, this only shows what it would do")
            .about_migration(id.as_str())
            .help(Some(format!("if that is what you want: {}{pinned}", again()))));
    }
    let request = ResolveMigrationRequest {
        migration_id: id.to_string(),
        direction: wire_direction(one.direction),
        decision: decision.into(),
        attempt,
        peer_store_id: store,
        reason,
    };
    let asked = ask(&node.at, node.timeout, async |mut client| {
        Ok(client.resolve_migration(request).await?.into_inner().migration)
    });
    let migration = asked.await.map_err(|error| explained(error, &node.at, id.as_str()))?;
    let migration = migration.unwrap_or_default();
    if output.json() {
        output.document(&MigrationDocument::from(&migration));
    } else {
        output.line(&format!("decided: {id} is {}", human::line(&migration)));
    }
    Ok(())
}

/// What will happen, and what the operator vouches for.
fn plan(seen: &MigrationProgress, decision: MigrationDecision, attempt: u64, store: &str) -> String {
    let spec = seen.spec.clone().unwrap_or_default();
    let slots = human::slots(seen);
    let (source, target) = (safe(&spec.source_node_id), safe(&spec.target_node_id));
    let incoming = seen.progress.as_ref().is_some_and(|progress| progress.direction() == Direction::In);
    let committed = decision == MigrationDecision::Committed;
    let confirms = incoming && committed && seen.state() == MigrationState::Committed;
    let what = match (incoming, committed) {
        _ if confirms => format!("{target} owns slots {slots}, and waits no more for {source} to hear of it"),
        (false, true) => format!(
            "{source} gives slots {slots} up for good and redirects clients to {target}; if {target} did not take them over, nobody \
             serves them"
        ),
        (false, false) => format!(
            "{source} takes slots {slots} back, at epoch {}, and serves what it had; writes that {target} acknowledged after a \
             hand-over are lost",
            seen.slot_epoch.saturating_add(RECLAIM_STEP)
        ),
        (true, true) => format!(
            "{target} becomes the owner of slots {slots} with what it has prepared; writes that {source} acknowledged after that \
             are lost"
        ),
        (true, false) => {
            format!("{target} deletes what it has staged of slots {slots}; {source} stays the owner")
        }
    };
    let other = if incoming { source } else { target };
    let able = matches!(
        (incoming, seen.state()),
        (false, MigrationState::Committing | MigrationState::Cancelling | MigrationState::NeedsOperator)
            | (true, MigrationState::Prepared)
    ) || confirms;
    let state = human::state(seen);
    let refused = if able {
        String::new()
    } else {
        format!("\nnow: {state}; in this state the node refuses a decision, and nobody has to decide")
    };
    format!(
        "what will happen: {what}\n\
         you vouch: the store {store} of {other} never serves these slots again, or only after it was told of this decision\n\
         as of: attempt {attempt}, {state}; the node refuses if anything happened since{refused}"
    )
}
