use proptest::prelude::*;
use proto_common::v1::NodeIdentity;

use super::*;
use crate::v1::{NodeState, ReplyOrigin};

const BEAT: u64 = 500;

/// A table and its time.
struct Sim {
    table: Table,
    now: u64,
    sequence: u64,
    events: Vec<PeerEvent>,
}

impl Sim {
    fn new(peers: &[&str]) -> Self {
        let mut table = Table::new(MonitorOptions::default());
        for peer in peers {
            table.add(peer, None, Duration::ZERO, 0);
        }
        Self { table, now: 0, sequence: 0, events: Vec::new() }
    }

    fn time(&self) -> Duration {
        Duration::from_millis(self.now)
    }

    fn say(&mut self, peer: &str, incarnation: u64, state: NodeState, last_frame: bool) {
        self.sequence += 1;
        let origin = ReplyOrigin {
            identity: Some(NodeIdentity { node_id: peer.into(), incarnation, ..Default::default() }),
            sequence: self.sequence,
            state: state.into(),
            ..Default::default()
        };
        let answer = Answer { origin: Some(origin), heartbeat: true, last_frame, ..Answer::default() };
        self.events.extend(self.table.answered(peer, answer, self.time(), self.now));
    }

    fn beat(&mut self, peer: &str) {
        self.say(peer, 1, NodeState::Running, false);
    }

    /// Lets time pass; those peers send heartbeats.
    fn pass(&mut self, ms: u64, beating: &[&str]) {
        for _ in 0..ms / 100 {
            self.now += 100;
            if self.now.is_multiple_of(BEAT) {
                for peer in beating {
                    self.beat(peer);
                }
            }
            self.events.extend(self.table.look(self.time(), self.now));
        }
    }

    /// Which states each of the events led to, for one peer.
    fn states(&self, peer: &str) -> Vec<PeerState> {
        let of = self.events.iter().filter(|event| event.address == peer);
        of.filter_map(|event| match event.change {
            PeerChange::State { to, .. } => Some(to),
            _ => None,
        })
        .collect()
    }
}

use PeerState::{Alive, Dead, Left, Suspect, WarmingUp};

#[test]
fn a_pause_of_three_seconds_is_a_suspicion_and_no_more() {
    let mut sim = Sim::new(&["a", "b", "c"]);
    sim.pass(10_000, &["a", "b", "c"]);
    sim.pass(3000, &["b", "c"]);
    sim.pass(20_000, &["a", "b", "c"]);
    assert_eq!(sim.states("a"), [Alive, Suspect, Alive]);
    assert_eq!(sim.states("b"), [Alive]);
    let suspect =
        &sim.events.iter().find(|event| event.address == "a" && event.reason.starts_with("late")).unwrap();
    assert!(suspect.phi.unwrap() >= 8.0, "{suspect:?}");
}

#[test]
fn a_silence_becomes_a_death_once() {
    let mut sim = Sim::new(&["a", "b", "c"]);
    sim.pass(10_000, &["a", "b", "c"]);
    let died = sim.now;
    sim.pass(60_000, &["b", "c"]);
    assert_eq!(sim.states("a"), [Alive, Suspect, Dead]);
    let at = sim.events.last().unwrap().unix_ms - died;
    assert!((5000..6000).contains(&at), "after {at} ms");
    // And back, as the same process.
    sim.pass(10_000, &["a", "b", "c"]);
    assert_eq!(sim.states("a"), [Alive, Suspect, Dead, Alive]);
}

#[test]
fn a_peer_that_never_answers_dies_without_a_row() {
    let mut sim = Sim::new(&["a", "b", "c"]);
    sim.pass(30_000, &["b", "c"]);
    assert_eq!(sim.states("a"), [Suspect, Dead]);
}

#[test]
fn when_most_seem_gone_the_verdict_is_held_back() {
    let mut sim = Sim::new(&["a", "b", "c"]);
    sim.pass(10_000, &["a", "b", "c"]);
    sim.pass(60_000, &["c"]);
    assert_eq!(sim.states("a"), [Alive, Suspect]);
    assert_eq!(sim.states("b"), [Alive, Suspect]);
    assert!(sim.table.doubts_itself());
    assert!(sim.table.statuses(sim.time()).iter().all(|peer| peer.self_doubt));
    assert!(sim.events.iter().all(|event| event.address != "b" || !event.reason.starts_with("gone")));
    // The doubt ends with its cause, and then the one that stays away is dead.
    sim.pass(10_000, &["b", "c"]);
    assert_eq!(sim.states("b"), [Alive, Suspect, Alive]);
    assert_eq!(sim.states("a"), [Alive, Suspect, Dead]);
    assert!(!sim.table.doubts_itself());
}

/// Whoever tells of nodes that are not there does not keep the verdict off those that are.
#[test]
fn peers_that_never_answered_cast_no_doubt_on_those_that_have() {
    let mut sim = Sim::new(&["a", "b", "c", "x1", "x2", "x3", "x4"]);
    sim.pass(30_000, &["a", "b", "c"]);
    assert_eq!(sim.states("x1"), [Suspect], "most of all are late");
    assert!(!sim.table.doubts_itself());
    sim.pass(10_000, &["b", "c"]);
    assert_eq!(sim.states("a"), [Alive, Suspect, Dead]);
    assert!(sim.table.statuses(sim.time()).iter().all(|peer| peer.self_doubt == peer.node_id.is_empty()));
}

/// Of a node that starts cut off.
#[test]
fn a_node_that_hears_nobody_declares_nobody_dead() {
    let mut sim = Sim::new(&["a", "b", "c"]);
    sim.pass(60_000, &[]);
    assert_eq!(["a", "b", "c"].map(|peer| sim.states(peer)), [[Suspect], [Suspect], [Suspect]]);
    assert!(sim.table.doubts_itself());
    // Nor when it hears one at last.
    sim.pass(60_000, &["a"]);
    assert_eq!(["b", "c"].map(|peer| sim.states(peer)), [[Suspect], [Suspect]]);
}

#[test]
fn deaths_one_after_the_other_are_no_doubt() {
    let mut sim = Sim::new(&["a", "b", "c"]);
    sim.pass(10_000, &["a", "b", "c"]);
    sim.pass(10_000, &["b", "c"]);
    sim.pass(10_000, &["c"]);
    sim.pass(10_000, &[]);
    for peer in ["a", "b", "c"] {
        assert_eq!(sim.states(peer), [Alive, Suspect, Dead], "{peer}");
    }
}

#[test]
fn a_pause_of_this_process_is_nobodys_fault() {
    let mut sim = Sim::new(&["a"]);
    sim.pass(10_000, &["a"]);
    // Nothing runs for a minute; afterwards the look comes before the heartbeats that have queued up.
    sim.now += 60_000;
    sim.events.extend(sim.table.look(sim.time(), sim.now));
    sim.pass(10_000, &["a"]);
    assert_eq!(sim.states("a"), [Alive]);
}

/// It would be dead to everybody for as long as it lives.
#[test]
fn a_node_that_starts_with_its_clock_set_back_is_known_after_some_answers() {
    let mut sim = Sim::new(&["a", "b", "c"]);
    let others = ["b", "c"];
    let say = |sim: &mut Sim, incarnation| {
        sim.pass(500, &others);
        sim.say("a", incarnation, NodeState::Running, false);
    };
    for _ in 0..20 {
        say(&mut sim, 1000);
    }
    say(&mut sim, 900);
    assert_eq!(sim.table.statuses(sim.time())[0].incarnation, 1000, "that may be a late word");
    for _ in 0..20 {
        say(&mut sim, 900);
    }
    assert_eq!(sim.states("a"), [Alive, Suspect, WarmingUp, Alive]);
    assert_eq!(sim.table.statuses(sim.time())[0].incarnation, 900);
}

#[test]
fn a_restart_is_known_at_once_and_voids_what_was() {
    let mut sim = Sim::new(&["a", "b", "c"]);
    sim.pass(10_000, &["a", "b", "c"]);
    sim.say("a", 2, NodeState::Starting, false);
    assert_eq!(sim.states("a"), [Alive, WarmingUp]);
    let restarted =
        sim.events.iter().find(|event| matches!(event.change, PeerChange::Restarted { .. })).unwrap();
    assert_eq!(restarted.change, PeerChange::Restarted { from: 1, to: 2, new_store: false });
    // What the process before had sent arrives now; it is not a restart, and no sign of life.
    let before = sim.events.len();
    sim.beat("a");
    sim.beat("a");
    assert_eq!(sim.events.len(), before);
    assert_eq!(sim.table.statuses(sim.time())[0].incarnation, 2);
    for _ in 0..10 {
        sim.pass(500, &["b", "c"]);
        sim.say("a", 2, NodeState::Running, false);
    }
    assert_eq!(sim.states("a"), [Alive, WarmingUp, Alive]);
}

#[test]
fn a_drain_is_no_death() {
    let mut sim = Sim::new(&["a", "b", "c"]);
    sim.pass(10_000, &["a", "b", "c"]);
    sim.say("a", 1, NodeState::Draining, false);
    sim.say("a", 1, NodeState::ShuttingDown, true);
    sim.pass(600_000, &["b", "c"]);
    assert_eq!(sim.states("a"), [Alive, Left]);
    sim.say("a", 2, NodeState::Running, false);
    assert_eq!(sim.states("a"), [Alive, Left, WarmingUp]);
}

#[test]
fn an_older_state_that_arrives_later_is_dropped() {
    let mut sim = Sim::new(&["a"]);
    sim.say("a", 1, NodeState::Running, false);
    sim.sequence = 10;
    sim.say("a", 1, NodeState::Maintenance, false);
    sim.sequence = 4;
    sim.say("a", 1, NodeState::Running, false);
    assert_eq!(sim.table.statuses(sim.time())[0].node_state(), NodeState::Maintenance);
}

#[test]
fn another_node_at_the_address_is_not_the_peer() {
    let mut sim = Sim::new(&["a", "b", "c"]);
    sim.table.add("x", Some(NodeId::new("n9").unwrap()), Duration::ZERO, 0);
    for _ in 0..100 {
        sim.pass(500, &["a", "b", "c"]);
        sim.beat("x");
    }
    assert_eq!(sim.states("x"), [Suspect, Dead]);
    let status = sim.table.statuses(sim.time()).remove(3);
    assert_eq!(status.node_id, "n9");
    assert!(status.message.contains("it is node x that answers there, not n9"), "{status:?}");
}

proptest! {
    /// Heartbeats that are late by up to 100 ms, and one in twenty lost: no verdict but alive, ever.
    #[test]
    fn jitter_is_no_news(delays in prop::collection::vec((0_u64..100, 0_u8..20), 100..400)) {
        let mut table = Table::new(MonitorOptions::default());
        table.add("a", None, Duration::ZERO, 0);
        let mut arrivals: Vec<u64> = Vec::new();
        let mut lost_before = false;
        for (n, (delay, loss)) in delays.iter().enumerate() {
            // Never two in a row: that is for the benchmark, which counts.
            let lost = *loss == 0 && !lost_before && n > 10;
            lost_before = lost;
            if !lost {
                arrivals.push(n as u64 * BEAT + delay);
            }
        }
        let mut sim = Sim { table, now: 0, sequence: 0, events: Vec::new() };
        let mut arrivals = arrivals.into_iter().peekable();
        while arrivals.peek().is_some() {
            sim.now += 100;
            while arrivals.next_if(|at| *at <= sim.now).is_some() {
                sim.beat("a");
            }
            let events = sim.table.look(sim.time(), sim.now);
            sim.events.extend(events);
        }
        prop_assert_eq!(sim.states("a"), vec![Alive]);
    }
}
