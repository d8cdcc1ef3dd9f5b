//! What only the node itself knows of what it has and does.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use proto_common::ids::NodeId;

use crate::v1::{
    ActiveTask, NodeStatusSection, PeerStatus, RemovalBlocker, RemovalBlockerKind, ShardStatus, SlotOwner,
};

/// The node's own part of `NodeStatus`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    /// `host:port` at which other nodes reach its gRPC services.
    pub node_address: String,
    /// `host:port` at which clients reach it; empty if they do not.
    pub client_address: String,
    /// Slots that it owns.
    pub slots_owned: u32,
    /// Live keys in them; `None` is unknown.
    pub keys: Option<u64>,
    /// Bytes of their keys and values; `None` is unknown.
    pub bytes: Option<u64>,
    /// Rises with each change of `slot_owners` in this process.
    pub slot_map_revision: u64,
    /// Shards of which it has a replica.
    pub shards: Vec<ShardStatus>,
    /// Who owns which slots, as far as it knows. Shared, since it may be long, is asked for page by page and changes seldom: keep it from one question to the next.
    pub slot_owners: Arc<[SlotOwner]>,
    /// Active transfers, in and out. Each keeps the node from being removed.
    pub transfers: Vec<ActiveTask>,
    /// Active migrations, in and out, also those whose outcome is not known. Each keeps the node from being removed.
    pub migrations: Vec<ActiveTask>,
    /// What it thinks of its peers. `last_heard_from_unix_ms` is filled in by the registry.
    pub peers: Vec<PeerStatus>,
    /// Why it can't be removed, beside slots, transfers and migrations: unconfirmed commits, a quorum, what it could not find out.
    pub removal_blockers: Vec<RemovalBlocker>,
}

/// A future of [`NodeFacts::facts`].
pub type FactsFuture<'a> = Pin<Box<dyn Future<Output = Facts> + Send + 'a>>;

/// The node, as the registry asks it for those who call `GetNodeStatus`.
///
/// It runs in a task of its own, so it may panic, and is cut off after
/// [`facts_timeout`](crate::limits::Limits::facts_timeout): the answer then goes out without it, says so, and is not
/// `safe_to_remove`.
pub trait NodeFacts: Send + Sync + 'static {
    /// What it has and does now, for all who call at a time: it is asked 200 times a second at most, also while an earlier question is not answered.
    /// Lists of `sections` that nobody asked for may be left out; those of tasks must not be, since `safe_to_remove` follows from them.
    fn facts(&self, sections: Sections) -> FactsFuture<'_>;
}

/// Parts of the status that a caller asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sections(u32);

impl Sections {
    /// Those of a request; no value means all.
    ///
    /// # Errors
    ///
    /// The position and the value of one that is not known.
    pub(crate) fn from_wire(values: &[i32]) -> Result<Self, (usize, i32)> {
        let mut bits = 0;
        for (at, value) in values.iter().enumerate() {
            match NodeStatusSection::try_from(*value) {
                Ok(NodeStatusSection::Unspecified) | Err(_) => return Err((at, *value)),
                Ok(section) => bits |= Self::bit(section),
            }
        }
        Ok(if values.is_empty() { Self(u32::MAX) } else { Self(bits) })
    }

    /// These and those.
    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn bit(section: NodeStatusSection) -> u32 {
        1 << i32::from(section).unsigned_abs()
    }

    /// Whether it was asked for.
    #[must_use]
    pub fn contains(self, section: NodeStatusSection) -> bool {
        self.0 & Self::bit(section) != 0
    }

    pub(crate) fn bits(self) -> u32 {
        self.0
    }
}

/// All reasons why the node can't be removed.
pub(crate) fn blockers(facts: &mut Facts) -> Vec<RemovalBlocker> {
    let mut all = Vec::new();
    if facts.slots_owned > 0 {
        all.push(RemovalBlocker {
            kind: RemovalBlockerKind::OwnsSlots.into(),
            subject: String::new(),
            count: facts.slots_owned.into(),
            message: format!("it owns {} slots; migrate them to other nodes", facts.slots_owned),
        });
    }
    let tasks = [
        (RemovalBlockerKind::ActiveTransfer, "transfer", &facts.transfers),
        (RemovalBlockerKind::ActiveMigration, "migration", &facts.migrations),
    ];
    for (kind, what, tasks) in tasks {
        all.extend(tasks.iter().map(|task| RemovalBlocker {
            kind: kind.into(),
            subject: task.id.clone(),
            count: 1,
            message: if task.needs_operator {
                format!("{what} {} waits for an operator's decision", task.id)
            } else {
                format!("{what} {} is {}; wait until it ends, or cancel it", task.id, task.phase)
            },
        }));
    }
    all.append(&mut facts.removal_blockers);
    all
}

/// What is said when the node did not say what it has.
pub(crate) fn unknown(why: &str) -> Facts {
    let blocker = RemovalBlocker {
        kind: RemovalBlockerKind::Unknown.into(),
        subject: String::new(),
        count: 1,
        message: format!("{why}; it is not known what it owns and moves. Ask again"),
    };
    Facts { removal_blockers: vec![blocker], ..Facts::default() }
}

/// When each peer was last heard from, which the node itself cannot know.
pub(crate) fn fill_heard_from(facts: &mut Facts, heard: impl Fn(&NodeId) -> Option<u64>) {
    for peer in &mut facts.peers {
        if let Ok(id) = NodeId::new(&peer.node_id) {
            peer.last_heard_from_unix_ms = heard(&id);
        }
    }
}
