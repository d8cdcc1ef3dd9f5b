//! Whether what nodes tell of a migration is so: compared with what their clients get at that moment.

use std::time::Duration;

use node::demo::processes::NodeProcess;
use proto::node::{Direction, MigrationDecision, MigrationGate, MigrationProgress, MigrationState};

use super::migration::{ID, Pair, progress};
use super::{call, client, until};

/// A request that is not answered by then is held.
const HELD: Duration = Duration::from_millis(200);

/// What a read of a slot that moves gets from `node`; none if it is not answered, or told to try again.
async fn read(node: &NodeProcess) -> Option<String> {
    let mut client = client(node).await;
    let answer = tokio::time::timeout(HELD, call(&mut client, "GET foo")).await.ok()?;
    (!answer.starts_with("-TRYAGAIN")).then_some(answer)
}

/// The gates that can be in a state, at either end.
fn gates(direction: Direction, state: MigrationState) -> &'static [MigrationGate] {
    use MigrationGate::{Closed, Moved, Open, WritesHeld};
    use MigrationState as S;
    match (direction, state) {
        (Direction::Out, S::Pending | S::Copying | S::CatchingUp | S::Ready) => &[Open],
        (Direction::Out, S::Freezing) => &[WritesHeld],
        // Clients are redirected before that is durable.
        (Direction::Out, S::Committing) => &[Closed, Moved],
        (Direction::Out, S::Completed) => &[Moved],
        (Direction::Out, S::Cancelling | S::Cancelled | S::Failed) => &[Open],
        (Direction::Out, S::NeedsOperator) => &[Open, Closed],
        (Direction::In, S::Receiving | S::Cancelled) => &[Moved],
        (Direction::In, S::Prepared) => &[Closed],
        (Direction::In, S::Committed | S::Completed) => &[Open],
        _ => &[],
    }
}

/// What one node tells is what its clients get, and agrees with itself. Returns it: none where the node knows of no migration, and serves nothing
/// of it.
async fn told_by(pair: &Pair, direction: Direction, what: &str) -> Option<MigrationProgress> {
    let node = if direction == Direction::Out { &pair.n1 } else { &pair.n2 };
    let brief = |told: &Option<MigrationProgress>| {
        told.as_ref().map(|told| (told.state(), told.gate(), told.decision(), told.attempt))
    };
    let mut found = None;
    until(&format!("{} stays as it is for one read, after {what}", node.id()), async || {
        let told = progress(node, ID, direction).await;
        let answer = read(node).await;
        // Otherwise it went on meanwhile.
        if brief(&told) != brief(&progress(node, ID, direction).await) {
            return false;
        }
        // Only what is held need not be answered in time; whoever is slow is asked again.
        let held = told.as_ref().is_some_and(|told| told.gate() == MigrationGate::Closed);
        if answer.is_none() && !held {
            return false;
        }
        let seen = format!("{what}: {} tells {:?} and answers {answer:?}", node.id(), brief(&told));
        let is = |wanted: &str| answer.as_ref().is_some_and(|answer| answer.starts_with(wanted));
        let Some(shown) = &told else {
            // A source that died before it was asked for anything, or a target that was not asked yet.
            assert!(if direction == Direction::Out { is("nil") } else { is("-") }, "{seen}");
            found = Some(None);
            return true;
        };
        assert!(gates(direction, shown.state()).contains(&shown.gate()), "{seen}");
        let so = match shown.gate() {
            MigrationGate::Open | MigrationGate::WritesHeld => is("nil"),
            // Other nodes tell a source who owns its slots by now, and then it redirects, whether its own stream has brought the answer or not.
            MigrationGate::Closed if direction == Direction::Out && is("-MOVED") => {
                if !matches!(pair.target().await, MigrationState::Committed | MigrationState::Completed) {
                    return false;
                }
                true
            }
            MigrationGate::Closed => answer.is_none(),
            MigrationGate::Moved => is("-MOVED") || is("-CLUSTERDOWN"),
            MigrationGate::Unspecified => false,
        };
        assert!(so, "{seen}");
        let decision = match shown.state() {
            MigrationState::Committed | MigrationState::Completed => MigrationDecision::Committed,
            MigrationState::Cancelled | MigrationState::Failed => MigrationDecision::Discarded,
            _ => MigrationDecision::Undecided,
        };
        assert_eq!(shown.decision(), decision, "{seen}");
        assert_eq!(shown.reporter.clone().unwrap().node_id, node.id(), "{seen}");
        found = Some(told);
        true
    })
    .await;
    found.unwrap()
}

impl Pair {
    /// The source tells the truth, while the target runs or does not.
    pub async fn source_is_honest(&self, what: &str) -> Option<MigrationProgress> {
        told_by(self, Direction::Out, what).await
    }

    /// The target tells the truth, while the source runs or does not.
    pub async fn target_is_honest(&self, what: &str) -> Option<MigrationProgress> {
        told_by(self, Direction::In, what).await
    }

    /// Both tell the truth, and not both that they serve.
    pub async fn both_are_honest(&self, what: &str) {
        // In this order: once the target serves, the source does not do so any more.
        let into = self.target_is_honest(what).await;
        let out = self.source_is_honest(what).await;
        let serves = |told: &Option<MigrationProgress>| {
            told.as_ref()
                .is_some_and(|told| matches!(told.gate(), MigrationGate::Open | MigrationGate::WritesHeld))
        };
        assert!(!(serves(&into) && serves(&out)), "{what}: both say that they serve: {into:?} {out:?}");
    }
}
