//! `nodectl drain`: everything off a node, and when it is safe to stop it.

mod args;
mod document;
mod plan;

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use indicatif::MultiProgress;
use proto::common::error::{Code, Error};
use proto::common::ids::NodeId;
use proto::migration::Reason;
use proto::node::{Direction, MigrationProgress, MigrationState, NodeStatus};

use self::document::{DrainDocument, DrainPlanDocument};
use self::plan::Move;
use crate::args::Node;
use crate::call::headed;
use crate::failure::Failure;
use crate::follow::Follow as _;
use crate::human::safe;
use crate::migrate::start::{Order, Started, order};
use crate::migrate::watch::{Watched, to_the_end};
use crate::migrate::{self, Live, explained, human, list_all, outcome};
use crate::node_document::blocker_word;
use crate::output::Output;
use crate::resume::again;
use crate::signals::Signals;
use crate::status;

pub(crate) use self::args::{DRAIN_EXAMPLES, Drain};

/// Rounds of looking what is left; slots that come in as fast as they go out end it.
const ROUNDS: usize = 8;
/// IDs that are tried for one move; each one before ended without moving anything.
const TRIES: u32 = 100;
/// Between two looks at a node that is not safe to remove yet.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub(crate) async fn run(command: Drain, output: &mut Output, signals: &mut Signals) -> Result<(), Failure> {
    let interrupted = Failure::interrupted("stopped waiting; migrations that were started go on")
        .help(Some(format!("see them with: nodectl migrate list --at {} --active", command.address)))
        .resume(again());
    signals.before(interrupted, drain(&command, output)).await
}

async fn drain(command: &Drain, output: &mut Output) -> Result<(), Failure> {
    args::check(command)?;
    let (node_id, _) = look(command).await?;
    if let Some(target) = command.to.iter().find(|target| target.node == node_id) {
        return Err(Failure::usage(format!(
            "'--to <NODE_ID=ADDR>': {} is the node that is drained",
            target.node
        )));
    }
    for round in 0..ROUNDS {
        let at = Node { at: command.address.clone(), timeout: command.asking.timeout };
        let running = running(command, &at, output).await?;
        if let Some(stuck) = running.iter().find(|migration| never_ends(migration)) {
            return Err(stuck_failure(stuck, command));
        }
        // After what runs was listed, so that what has ended meanwhile is not moved once more.
        let status = look_again(command, &node_id).await?;
        let claims = plan::claims(&node_id, &status);
        let moves = plan::moves(&claims, &running, &command.to);
        announce(command, &node_id, &status, &running, &moves, round, output);
        if command.dry_run {
            return Ok(());
        }
        if running.is_empty() && moves.is_empty() {
            if status.slots_owned > 0 {
                let message = format!("{node_id} owns {} slots and does not say which", status.slots_owned);
                return Err(Failure::failed(message));
            }
            return settle(command, &node_id, output).await;
        }
        carry_out(command, &node_id, running, moves, output).await?;
        if round > 0 {
            // What it owns may change a little later than what it moves.
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
    Err(Failure::failed(format!("slots keep coming in: {ROUNDS} rounds did not empty the node"))
        .help(Some("see that nothing moves slots to it, then run this command again".to_owned())))
}

/// Who the node is, and what it has.
async fn look(command: &Drain) -> Result<(NodeId, NodeStatus), Failure> {
    let asked = status::ask(command.address.clone(), command.asking.timeout).await;
    let answer = asked.map_err(|error| explained(error, &command.address, ""))?;
    let identity = answer.origin.and_then(|origin| origin.identity).unwrap_or_default();
    let node_id = NodeId::new(&identity.node_id)
        .map_err(|error| Failure::failed(format!("{} does not say who it is: {error}", command.address)))?;
    Ok((node_id, answer.status.unwrap_or_default()))
}

/// What the node has now, if it is still the same.
async fn look_again(command: &Drain, node_id: &NodeId) -> Result<NodeStatus, Failure> {
    let (now_id, status) = look(command).await?;
    if now_id != *node_id {
        return Err(Failure::failed(format!("{} is {now_id} now, and was {node_id}", command.address)));
    }
    Ok(status)
}

/// What leaves the node, once nothing is being cancelled: the slots of that are busy until its target has answered.
async fn running(command: &Drain, at: &Node, output: &mut Output) -> Result<Vec<MigrationProgress>, Failure> {
    let (began, mut told) = (Instant::now(), output.json());
    loop {
        let running = list_all(at, true, Direction::Out.into())
            .await
            .map_err(|error| explained(error, &command.address, ""))?;
        match running.iter().find(|migration| migration.state() == MigrationState::Cancelling) {
            None => return Ok(running),
            Some(_) if command.dry_run => return Ok(running),
            Some(stuck) if began.elapsed() >= command.settle => return Err(stuck_failure(stuck, command)),
            Some(waited_for) => {
                if !std::mem::replace(&mut told, true) {
                    let id = safe(&waited_for.migration_id);
                    output.line(&format!("waiting for the migration {id}, which is being cancelled"));
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
    }
}

/// Somebody has to do something before it goes on.
fn never_ends(migration: &MigrationProgress) -> bool {
    let by_hand = migration.spec.as_ref().is_some_and(|spec| !spec.auto_complete);
    let asked = migration.complete_deadline_unix_ms.is_some();
    // Behind the decision, and where it is cancelled, nobody has to do anything.
    let open = !matches!(
        migration.state(),
        MigrationState::Committing
            | MigrationState::Cancelling
            | MigrationState::Completed
            | MigrationState::Cancelled
            | MigrationState::Failed
    );
    migration.state() == MigrationState::NeedsOperator || (by_hand && open && !asked)
}

fn stuck_failure(migration: &MigrationProgress, command: &Drain) -> Failure {
    let (id, at) = (safe(&migration.migration_id), &command.address);
    if migration.state() == MigrationState::NeedsOperator {
        return outcome(migration, at).err().unwrap_or_else(|| Failure::failed("it needs an operator"));
    }
    if migration.state() == MigrationState::Cancelling {
        let target = migration.spec.as_ref().map_or("?", |spec| &spec.target_node_id);
        let target = safe(target);
        return Failure::failed(format!("the migration {id} is being cancelled, and {target} has not confirmed that"))
            .about_migration(&migration.migration_id)
            .help(Some(format!(
                "its slots are busy until {target} is back; if its store is gone for good: nodectl migrate resolve {id} --at {at} \
                 --discard --reason WHY; then run this command again"
            )))
            .resume(again());
    }
    Failure::failed(format!("the migration {id} waits for somebody to complete it"))
        .about_migration(&migration.migration_id)
        .help(Some(format!(
            "complete it with: nodectl migrate complete {id} --at {at}, or cancel it; then run this command again"
        )))
}

fn announce(
    command: &Drain,
    node_id: &NodeId,
    status: &NodeStatus,
    running: &[MigrationProgress],
    moves: &[Move<'_>],
    round: usize,
    output: &mut Output,
) {
    if output.json() {
        output.document(&DrainPlanDocument::new(node_id, status, running, moves));
        return;
    }
    if round > 0 && running.is_empty() && moves.is_empty() {
        return;
    }
    output.line(&format!(
        "{node_id} at {} owns {} slots; {} migrations run, {} are to be started",
        command.address,
        status.slots_owned,
        running.len(),
        moves.len()
    ));
    if command.dry_run {
        for one in moves {
            output
                .line(&format!("would move {} to {} at {}", one.slots, one.target.node, one.target.address));
        }
    }
}

/// Follows what runs, and starts and follows the rest, so many at a time. The first one that fails ends it; those that
/// run beside it go on by themselves.
async fn carry_out(
    command: &Drain,
    node_id: &NodeId,
    running: Vec<MigrationProgress>,
    moves: Vec<Move<'_>>,
    output: &mut Output,
) -> Result<(), Failure> {
    let bars = MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::stdout_with_hz(10));
    let output = &RefCell::new(output);
    let bars = &bars;
    let going = &Cell::new(0_usize);
    let joining = running.into_iter().map(|migration| (Some(migration), None));
    let starting = moves.into_iter().map(|one| (None, Some(one)));
    let mut work = futures::stream::iter(joining.chain(starting))
        .map(|(migration, one)| async move {
            let migration = match (migration, one) {
                (Some(migration), _) => migration,
                (None, Some(one)) => begin(command, node_id, &one, bars, output).await?,
                (None, None) => return Ok(()),
            };
            going.set(going.get() + 1);
            let finished = finish(command, migration, bars, output).await;
            going.set(going.get() - 1);
            finished
        })
        .buffer_unordered(command.parallel);
    while let Some(done) = work.next().await {
        if let Err(failure) = done {
            let mut output = output.borrow_mut();
            if going.get() > 0 && !output.json() {
                let (others, at) = (going.get(), &command.address);
                output.line(&format!(
                    "{others} other migrations go on; see them with: nodectl migrate list --at {at} --active"
                ));
            }
            return Err(failure.resume(again()));
        }
    }
    Ok(())
}

/// Starts a move, or joins it. What ended earlier without moving anything is tried again under the next ID.
async fn begin(
    command: &Drain,
    node_id: &NodeId,
    one: &Move<'_>,
    bars: &MultiProgress,
    output: &RefCell<&mut Output>,
) -> Result<MigrationProgress, Failure> {
    let mut told = output.borrow().json();
    for attempt in 1..=TRIES {
        let id = one.id(node_id, attempt).map_err(|error| Failure::failed(error.to_string()))?;
        let wish = Order {
            id: &id,
            slots: one.slots,
            target: one.target,
            source_node: Some(node_id),
            source_shard: &one.shard,
            target_shard: &one.shard,
            auto_complete: true,
            limits: command.limits,
            priority: command.priority,
        };
        let Started { migration, joined } = loop {
            match order(&command.address, command.asking, &wish).await {
                // The node lets fewer go at once than were asked for; one that ends makes room.
                Err(error) if error.is(Reason::TooManyMigrations) => {
                    if !std::mem::replace(&mut told, true) {
                        let why = safe(error.message());
                        bars.suspend(|| {
                            output.borrow_mut().line(&format!("{} wait for a place: {why}", one.slots))
                        });
                    }
                    tokio::time::sleep(error.retry_after_hint().unwrap_or(LOOK_AGAIN)).await;
                }
                started => {
                    break started.map_err(|error| explained(error, &command.address, id.as_str()))?;
                }
            }
        };
        let over = matches!(migration.state(), MigrationState::Cancelled | MigrationState::Failed);
        if !(joined && over) {
            return Ok(migration);
        }
    }
    let message = format!("{TRIES} migrations of slots {} to {} failed", one.slots, one.target.node);
    Err(Failure::failed(message))
}

async fn finish(
    command: &Drain,
    migration: MigrationProgress,
    bars: &MultiProgress,
    output: &RefCell<&mut Output>,
) -> Result<(), Failure> {
    let id = migration.migration_id.parse().map_err(|error| {
        Failure::failed(format!("{} names a migration that cannot be: {error}", command.address))
    })?;
    let at = &command.address;
    let watched = Watched {
        id,
        at: at.clone(),
        timeout: command.asking.timeout,
        direction: Some(crate::args::Direction::Out),
    };
    let name = human::slots(&migration);
    let mut live = Live::among(&output.borrow(), bars, at, &name);
    let mut stuck = None;
    let mut cancelling: Option<Instant> = None;
    let followed = if migration.has_ended() {
        Ok(Some(migration))
    } else {
        to_the_end(&watched, command.asking.retry_for, |seen, wait| {
            // Nobody else runs while it is borrowed. A drain goes on when nobody reads what it says.
            live.show(&mut output.borrow_mut(), seen, wait);
            // One that was asked to complete by a time waits for somebody again once that has passed.
            let lasts = match seen.state() {
                MigrationState::Cancelling => cancelling.get_or_insert_with(Instant::now).elapsed(),
                _ => Duration::ZERO,
            };
            let is_stuck = never_ends(seen) || lasts > command.settle;
            stuck = is_stuck.then(|| seen.clone()).filter(|_| wait.is_none());
            stuck.is_none()
        })
        .await
    };
    let last = followed.map_err(|error| explained(error, at, watched.id.as_str()))?;
    drop(live);
    if let Some(stuck) = stuck {
        return Err(stuck_failure(&stuck, command));
    }
    let last = last.unwrap_or_default();
    outcome(&last, at)?;
    let mut output = output.borrow_mut();
    if output.json() {
        output.document(&migrate::document::MigrationEventDocument {
            event: "moved",
            migration: (&last).into(),
        });
    } else {
        // Below the bars of those that run beside it.
        bars.suspend(|| output.line(&human::completed(&last)));
    }
    Ok(())
}

/// Waits until the node says that it can be stopped, and says why not as long as it cannot.
async fn settle(command: &Drain, node_id: &NodeId, output: &mut Output) -> Result<(), Failure> {
    let began = Instant::now();
    let mut told = String::new();
    loop {
        let status = look_again(command, node_id).await?;
        let safe_now = status.safe_to_remove
            && status.removal_blockers.is_empty()
            && status.removal_blockers_omitted == 0
            && status.slots_owned == 0;
        let why = blockers(&status);
        if safe_now {
            if output.json() {
                output.document(&DrainDocument {
                    event: "drained",
                    node_id: node_id.as_str(),
                    safe_to_remove: true,
                });
            } else {
                output.line(&format!("{node_id} owns no slots and nothing moves: it is safe to stop it"));
            }
            return Ok(());
        }
        if began.elapsed() >= command.settle {
            let error = Error::with_code(Code::FailedPrecondition, "NOT_SAFE_TO_REMOVE", why);
            let what = format!("all slots that {node_id} had were moved, but it is not safe to stop it");
            return Err(Failure::from(headed(&error, &what))
                .help(Some(
                    "see to what it names, then run this command again; do not stop the node".to_owned(),
                ))
                .resume(again()));
        }
        if told != why {
            if !output.json() {
                output.line(&format!("not safe to stop yet: {why}"));
            }
            told = why;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn blockers(status: &NodeStatus) -> String {
    let mut why: Vec<String> = status
        .removal_blockers
        .iter()
        .map(|blocker| {
            let kind = blocker_word(blocker.kind).replace('_', " ");
            if blocker.message.is_empty() { kind } else { format!("{kind}: {}", safe(&blocker.message)) }
        })
        .collect();
    if why.is_empty() {
        why.push(match status.slots_owned {
            0 => "it does not say why".to_owned(),
            owned => format!("it owns {owned} slots"),
        });
    }
    why.join("; ")
}

#[cfg(test)]
mod tests {
    use proto::node::MigrationSpec;

    use super::*;

    #[test]
    fn what_waits_for_a_person_never_ends_and_what_has_ended_waits_for_nobody() {
        for (state, by_itself, by_hand, asked) in [
            (MigrationState::Pending, false, true, false),
            (MigrationState::Ready, false, true, false),
            (MigrationState::Freezing, false, true, false),
            (MigrationState::Committing, false, false, false),
            (MigrationState::Cancelling, false, false, false),
            (MigrationState::NeedsOperator, true, true, true),
            (MigrationState::Completed, false, false, false),
            (MigrationState::Cancelled, false, false, false),
            (MigrationState::Failed, false, false, false),
        ] {
            let seen = |auto_complete, complete_deadline_unix_ms| MigrationProgress {
                state: state.into(),
                spec: Some(MigrationSpec { auto_complete, ..MigrationSpec::default() }),
                complete_deadline_unix_ms,
                ..MigrationProgress::default()
            };
            assert_eq!(never_ends(&seen(true, None)), by_itself, "{state:?}");
            assert_eq!(never_ends(&seen(false, None)), by_hand, "{state:?}");
            assert_eq!(never_ends(&seen(false, Some(1))), asked, "{state:?}");
        }
    }
}
