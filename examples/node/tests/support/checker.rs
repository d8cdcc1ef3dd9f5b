//! Decides from what clients saw whether a store kept its promises while slots moved between its nodes.
//!
//! Every operation is recorded with the times at which it was sent and answered. Values of a plain key come from one writer and rise,
//! so "older" is "lower"; counters have many writers. An operation without an answer may or may not have happened. It cannot happen
//! later: clients give a connection up only when the node's process is gone.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

/// An expiry is rounded to milliseconds, and read from another clock than the times here.
const SLACK: Duration = Duration::from_millis(5);

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    Set { value: u64, lives: Option<Duration> },
    Get,
    Increment,
}

/// What came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Done,
    Value(Option<u64>),
    Unknown,
}

/// One operation; times count from the start of the recording.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub key: String,
    pub act: Act,
    pub answer: Answer,
    /// Who answered.
    pub node: usize,
    pub begun: Duration,
    pub ended: Duration,
}

/// A promise that was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The last read finds less than what was acknowledged.
    LostWrite,
    /// A read finds less than an operation that was answered before it began.
    WentBack,
    /// A read finds what nobody wrote.
    NeverWritten,
    /// The slots changed hands more often than they were moved.
    TwoOwners,
    LostIncrement,
    DoubledIncrement,
    /// Seen after it expired.
    Resurrected,
    /// Gone before it expired.
    Vanished,
}

/// A broken promise, and where it shows.
#[derive(Debug, Clone)]
pub struct Fault {
    pub kind: Kind,
    #[allow(dead_code, reason = "for people")]
    pub text: String,
}

/// All faults in `events`, whose keys all lie in slots that were moved `migrations` times.
pub fn check(events: &[Event], migrations: usize) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut keys: BTreeMap<&str, Vec<&Event>> = BTreeMap::new();
    for event in events {
        keys.entry(&event.key).or_default().push(event);
    }
    for of_key in keys.values_mut() {
        of_key.sort_by_key(|event| event.begun);
        if of_key.iter().any(|event| event.act == Act::Increment) {
            check_counter(of_key, &mut faults);
        } else {
            check_values(of_key, &mut faults);
        }
    }
    let switches = fewest_switches(events, migrations + 1);
    if switches > migrations {
        let text = format!("the slots changed hands {switches} times or more in {migrations} migrations");
        faults.push(Fault { kind: Kind::TwoOwners, text });
    }
    faults
}

/// The highest number that anybody knew before a time.
struct Known(Vec<(Duration, u64)>);

impl Known {
    fn new(events: &[&Event]) -> Self {
        let mut known: Vec<_> = events
            .iter()
            .filter_map(|event| match (event.act, event.answer) {
                (Act::Set { value, .. }, Answer::Done) => Some((event.ended, value)),
                (_, Answer::Value(Some(value))) => Some((event.ended, value)),
                _ => None,
            })
            .collect();
        known.sort_unstable();
        let mut highest = 0;
        for (_, value) in &mut known {
            highest = highest.max(*value);
            *value = highest;
        }
        Self(known)
    }

    fn before(&self, time: Duration) -> u64 {
        let next = self.0.partition_point(|(ended, _)| *ended < time);
        next.checked_sub(1).map_or(0, |last| self.0[last].1)
    }
}

fn check_values(events: &[&Event], faults: &mut Vec<Fault>) {
    let known = Known::new(events);
    let mut writes = BTreeMap::new();
    for event in events {
        if let Act::Set { value, lives } = event.act {
            writes.insert(value, (*event, lives));
        }
    }
    let last = events.last().map(|event| event.begun);
    for read in events {
        let Answer::Value(found) = read.answer else { continue };
        let floor = known.before(read.begun);
        let older = if Some(read.begun) == last { Kind::LostWrite } else { Kind::WentBack };
        let mut broken = |kind| faults.push(Fault { kind, text: format!("{floor} was known: {read:?}") });
        match found {
            Some(value) => match writes.get(&value) {
                Some((write, _)) if write.begun > read.ended => broken(Kind::NeverWritten),
                None => broken(Kind::NeverWritten),
                Some(_) if value < floor => broken(older),
                Some((write, Some(lives))) if read.begun > write.ended + *lives + SLACK => {
                    broken(Kind::Resurrected);
                }
                Some(_) => {}
            },
            None => {
                // A later write whose answer was lost, or is still to come, may have replaced what was known, and expired since.
                let expired = writes.range(floor..).any(|(_, (write, lives))| {
                    lives.is_some_and(|lives| write.begun + lives <= read.ended + SLACK)
                });
                match writes.get(&floor) {
                    Some((_, None)) if !expired => broken(older),
                    Some((_, Some(_))) if !expired => broken(Kind::Vanished),
                    _ => {}
                }
            }
        }
    }
}

fn check_counter(events: &[&Event], faults: &mut Vec<Fault>) {
    let known = Known::new(events);
    let increments: Vec<_> = events.iter().filter(|event| event.act == Act::Increment).collect();
    let mut acknowledged: Vec<_> =
        increments.iter().filter(|event| event.answer != Answer::Unknown).map(|event| event.ended).collect();
    acknowledged.sort_unstable();
    let mut results = HashSet::new();
    for event in events {
        let Answer::Value(found) = event.answer else { continue };
        let own = u64::from(event.act == Act::Increment);
        let found = found.unwrap_or(0);
        let done = acknowledged.partition_point(|ended| *ended < event.begun) as u64;
        // In order of their beginnings.
        let tried = increments.partition_point(|increment| increment.begun <= event.ended) as u64;
        let least = done.max(known.before(event.begun)) + own;
        if found < least || (own == 1 && !results.insert(found)) {
            let text = format!("at least {least}, and once: {event:?}");
            faults.push(Fault { kind: Kind::LostIncrement, text });
        }
        if found > tried {
            faults
                .push(Fault { kind: Kind::DoubledIncrement, text: format!("{tried} were tried: {event:?}") });
        }
    }
}

/// How often the owner changed at least, counted up to `enough`: each answer was made by the owner at some moment between its times.
fn fewest_switches(events: &[Event], enough: usize) -> usize {
    let answered: Vec<_> = events
        .iter()
        .filter(|event| event.answer != Answer::Unknown)
        .map(|event| (event.node, event.begun, event.ended))
        .collect();
    let nodes: HashSet<_> = answered.iter().map(|(node, ..)| *node).collect();
    assert!(nodes.len() <= 2, "slots move between two nodes");
    let from = |first: usize| {
        let (mut left, mut owner, mut switches) = (answered.clone(), first, 0);
        loop {
            // The owner stays until another answer had to be made.
            let others = left.iter().filter(|(node, ..)| *node != owner);
            let Some((next, until)) =
                others.map(|(node, _, ended)| (*node, *ended)).min_by_key(|(_, ended)| *ended)
            else {
                return switches;
            };
            left.retain(|(node, begun, _)| *node != owner || *begun > until);
            (owner, switches) = (next, switches + 1);
            if switches >= enough {
                return switches;
            }
        }
    };
    nodes.iter().map(|node| from(*node)).min().unwrap_or(0)
}
