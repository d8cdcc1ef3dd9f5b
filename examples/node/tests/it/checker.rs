//! The checker of histories finds every kind of fault that is planted in a toy store, and nothing in a store without one.

use std::collections::HashMap;
use std::time::Duration;

use crate::support::checker::{Act, Answer, Event, Kind, check};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// When the slots move from node 0 to node 1, in milliseconds.
const MOVED: u64 = 10_000;
const LIVES: Duration = Duration::from_millis(300);

/// What the store does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    Nothing,
    /// Since the move, writes of one key are acknowledged and not stored.
    LostWrite,
    /// For a while after the move, reads of one key get its value from before.
    StaleRead,
    /// The first node goes on serving.
    TwoOwners,
    LostIncrement,
    DoubledIncrement,
    /// The move forgets that keys expire.
    Resurrected,
    /// Since the move, keys expire too early.
    Vanished,
}

/// Clients with operations that overlap; each happens at a moment between its times.
fn history(seed: u64, planted: Planted) -> Vec<Event> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut calls = Vec::new();
    for client in 0..4_u64 {
        let (mut now, mut value) = (0, 0);
        while now < 2 * MOVED {
            value += 1;
            let key =
                if random.random_bool(0.5) { format!("plain:{client}") } else { format!("px:{client}") };
            let lives = key.starts_with("px").then_some(LIVES);
            let other = random.random_range(0..4);
            let asked = match random.random_range(0..4) {
                0 => (format!("plain:{other}"), Act::Get),
                1 => (format!("px:{other}"), Act::Get),
                2 => ("counter".to_owned(), if random.random_bool(0.2) { Act::Get } else { Act::Increment }),
                _ => (key, Act::Set { value, lives }),
            };
            let begun = now + random.random_range(1..40);
            let happens = begun + random.random_range(1..40);
            let ended = happens + random.random_range(1..40);
            calls.push((happens, begun, ended, asked, random.random_bool(0.02)));
            now = ended;
        }
    }
    for (n, key) in ["plain:0", "plain:1", "plain:2", "plain:3", "counter"].iter().enumerate() {
        let at = 3 * MOVED + n as u64 * 10;
        calls.push((at + 1, at, at + 2, ((*key).to_owned(), Act::Get), false));
    }
    calls.sort_by_key(|call| call.0);

    let mut rows: HashMap<String, (u64, Option<u64>)> = HashMap::new();
    let mut before = rows.clone();
    let stale = if planted == Planted::StaleRead { MOVED + 3_000..MOVED + 6_000 } else { 0..0 };
    let (mut moved, mut once) = (false, true);
    let mut events = Vec::new();
    for (now, begun, ended, (key, act), broken) in calls {
        if now >= MOVED && !moved {
            moved = true;
            before = rows.clone();
            if planted == Planted::Resurrected {
                rows.values_mut().for_each(|row| row.1 = None);
            }
        }
        if planted != Planted::Resurrected || !moved {
            rows.retain(|_, row| row.1.is_none_or(|at| at > now));
        }
        let here = |row: Option<&(u64, Option<u64>)>| row.map(|row| row.0);
        // Some operations are never answered: half of them do not happen.
        let happens = !broken || now % 2 == 0;
        let answer = match act {
            Act::Get if stale.contains(&now) && key == "plain:1" => Answer::Value(here(before.get(&key))),
            Act::Get => Answer::Value(here(rows.get(&key))),
            Act::Set { value, lives } => {
                let lost = planted == Planted::LostWrite && moved && key == "plain:0";
                if happens && !lost {
                    let early = planted == Planted::Vanished && moved;
                    let lives = lives.map(|lives| if early { Duration::from_millis(10) } else { lives });
                    let at = lives.map(|lives| now + u64::try_from(lives.as_millis()).unwrap());
                    rows.insert(key.clone(), (value, at));
                }
                Answer::Done
            }
            Act::Increment => {
                let mut value = rows.get(&key).map_or(0, |row| row.0) + u64::from(happens);
                let mut stored = value;
                if moved && once && happens && !broken {
                    match planted {
                        Planted::LostIncrement => (once, stored) = (false, value - 1),
                        // Often enough that those without an answer do not account for it.
                        Planted::DoubledIncrement => (stored, value) = (value + 1, value + 1),
                        _ => {}
                    }
                }
                rows.insert(key.clone(), (stored, None));
                Answer::Value(Some(value))
            }
        };
        let node = match planted {
            Planted::TwoOwners => usize::from(moved && now % 3 > 0),
            _ => usize::from(moved),
        };
        let answer = if broken { Answer::Unknown } else { answer };
        let time = Duration::from_millis;
        events.push(Event { key, act, answer, node, begun: time(begun), ended: time(ended) });
    }
    events
}

#[test]
fn a_store_without_a_fault_gives_no_finding() {
    for seed in 0..40 {
        let faults = check(&history(seed, Planted::Nothing), 1);
        assert!(faults.is_empty(), "seed {seed}: {faults:?}");
    }
}

#[test]
fn every_planted_fault_is_found() {
    for (planted, kinds) in [
        (Planted::LostWrite, [Kind::LostWrite, Kind::WentBack].as_slice()),
        (Planted::StaleRead, &[Kind::WentBack]),
        (Planted::TwoOwners, &[Kind::TwoOwners]),
        (Planted::LostIncrement, &[Kind::LostIncrement]),
        (Planted::DoubledIncrement, &[Kind::DoubledIncrement]),
        (Planted::Resurrected, &[Kind::Resurrected]),
        (Planted::Vanished, &[Kind::Vanished]),
    ] {
        for seed in 0..20 {
            let faults = check(&history(seed, planted), 1);
            assert!(
                faults.iter().any(|fault| kinds.contains(&fault.kind)),
                "seed {seed}: {planted:?}: {faults:?}"
            );
            let only = faults.iter().all(|fault| kinds.contains(&fault.kind));
            assert!(only || planted == Planted::LostWrite, "seed {seed}: {planted:?}: {faults:?}");
        }
    }
}

fn time(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// An operation on the one key, answered after a millisecond.
fn event(act: Act, answer: Answer, begun: u64) -> Event {
    Event { key: "k".to_owned(), act, answer, node: 0, begun: time(begun), ended: time(begun + 1) }
}

#[test]
fn a_write_that_only_the_last_read_misses_is_lost() {
    for (found, kind) in [
        (Some(1), Some(Kind::LostWrite)),
        (None, Some(Kind::LostWrite)),
        (Some(2), None),
        (Some(3), None),
        (Some(4), Some(Kind::NeverWritten)),
    ] {
        let events = [
            event(Act::Set { value: 1, lives: None }, Answer::Done, 1),
            event(Act::Set { value: 2, lives: None }, Answer::Done, 5),
            event(Act::Set { value: 3, lives: None }, Answer::Unknown, 10),
            event(Act::Get, Answer::Value(found), 20),
        ];
        let faults: Vec<_> = check(&events, 0).iter().map(|fault| fault.kind).collect();
        assert_eq!(faults, kind.into_iter().collect::<Vec<_>>(), "{found:?}");
    }
}

#[test]
fn a_key_is_gone_when_a_write_without_an_answer_has_expired() {
    for (lives, kind) in [(50, None), (500, Some(Kind::Vanished))] {
        let events = [
            event(Act::Set { value: 1, lives: Some(time(500)) }, Answer::Done, 1),
            event(Act::Set { value: 2, lives: Some(time(lives)) }, Answer::Unknown, 5),
            event(Act::Get, Answer::Value(None), 100),
            event(Act::Get, Answer::Value(None), 600),
        ];
        let faults: Vec<_> = check(&events, 0).iter().map(|fault| fault.kind).collect();
        assert_eq!(faults, kind.into_iter().collect::<Vec<_>>(), "{lives}");
    }
}
