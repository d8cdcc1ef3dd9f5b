//! What clients can do in each state of a migration: keys expire and counters grow in all of them, but where requests have to wait.

use std::ops::Range;
use std::time::Duration;

use crate::support::checker::{self, Act, Answer, Event};
use crate::support::load::Load;
use crate::support::migration::{ID, Pair, Slow, begin, complete, limits, manual, reaches};
use crate::support::proxy::{Frame, Way, Ways};
use crate::support::until;
use proto::node::{Direction, MigrationState, StartMigrationRequest};

/// Long enough for keys to be written and to expire in it.
const WINDOW: Duration = Duration::from_millis(900);

/// The time that a migration spends in one state at least.
async fn window(pair: &Pair, load: &Load, state: MigrationState) -> Range<Duration> {
    reaches(&pair.n1, ID, Direction::Out, state).await;
    let from = load.now();
    tokio::time::sleep(WINDOW).await;
    assert_eq!(pair.source().await, state, "the whole window");
    from..load.now()
}

/// Operations that were asked for and answered in a window.
fn answered<'a>(events: &'a [Event], window: &'a Range<Duration>) -> impl Iterator<Item = &'a Event> {
    let within = |event: &&Event| event.begun >= window.start && event.ended <= window.end;
    events.iter().filter(within).filter(|event| event.answer != Answer::Unknown)
}

/// Keys whose time came in a window, and which a read did not find in it.
fn expired(events: &[Event], window: &Range<Duration>) -> usize {
    let gone = |event: &&Event| (event.act, event.answer) == (Act::Get, Answer::Value(None));
    let read = answered(events, window).filter(gone);
    let timed_out = |read: &&Event| {
        events.iter().any(|write| match write.act {
            Act::Set { lives: Some(lives), .. } => {
                write.key == read.key
                    && write.answer == Answer::Done
                    && window.start < write.begun + lives
                    && write.ended + lives < read.ended
            }
            _ => false,
        })
    };
    read.filter(timed_out).count()
}

#[tokio::test]
async fn keys_expire_and_counters_grow_in_each_state() {
    use MigrationState::{CatchingUp, Committing, Completed, Copying, Freezing, Ready};
    let pair = Pair::start(6000, 1000).await;
    let load = pair.load();
    let (proxy, asked) = pair.behind(manual(ID, &pair.n2)).await;
    let with = |slow| StartMigrationRequest { limits: limits(slow), ..asked.clone() };
    let mut windows = Vec::new();

    begin(&pair.n1, with(Slow::Copying)).await.unwrap();
    windows.push((Copying, window(&pair, &load, Copying).await));
    begin(&pair.n1, with(Slow::Freezing)).await.unwrap();
    windows.push((Ready, window(&pair, &load, Ready).await));
    // No acknowledgement arrives for a while.
    proxy.go(Ways { there: Way::Pass, back: Way::Hold });
    begin(&pair.n1, with(Slow::CatchingUp)).await.unwrap();
    windows.push((CatchingUp, window(&pair, &load, CatchingUp).await));
    proxy.go(Ways::default());
    begin(&pair.n1, with(Slow::Freezing)).await.unwrap();
    proxy.arm(Frame::Prepare, Ways::LATE);
    complete(&pair.n1, ID).await.unwrap();
    windows.push((Freezing, window(&pair, &load, Freezing).await));
    // The next stream gets as far as the commit.
    proxy.arm(Frame::Commit, Ways::LATE);
    proxy.cut();
    windows.push((Committing, window(&pair, &load, Committing).await));
    proxy.cut();
    reaches(&pair.n1, ID, Direction::Out, Completed).await;
    windows.push((Completed, window(&pair, &load, Completed).await));
    until("the target's end", async || pair.target().await == Completed).await;

    let events = load.finish().await;
    let faults = checker::check(&events, 1);
    assert!(faults.is_empty(), "{faults:?}");
    for (state, window) in &windows {
        let grown = answered(&events, window).filter(|event| matches!(event.act, Act::Increment)).count();
        let read = answered(&events, window).filter(|event| event.act == Act::Get).count();
        let expired = expired(&events, window);
        let seen = format!("{state:?}: {grown} increments, {read} reads, {expired} of keys that had expired");
        match state {
            // Reads go on, and find no key whose time has come, though none is removed.
            Freezing => assert!(grown == 0 && read > 0 && expired > 0, "{seen}"),
            Committing => assert!(grown == 0 && read == 0, "{seen}"),
            _ => assert!(grown > 0 && read > 0 && expired > 0, "{seen}"),
        }
    }
    pair.owner(true).await;
    pair.nothing_is_left().await;
}
