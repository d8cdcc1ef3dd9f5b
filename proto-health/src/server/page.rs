//! The lists of a node's status, page by page: shards, slot owners, transfers, migrations, peers, in this order.

use prost::Message;
use proto_common::error::Error;

use crate::reason::Reason;
use crate::server::core::Inner;
use crate::server::facts::{Facts, Sections};
use crate::v1::{ActiveTask, NodeStatus, NodeStatusSection, PeerStatus, ShardStatus, SlotOwner};

/// Where a page begins: so many entries were on those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position(usize);

impl Position {
    /// From the token of the page before. It holds for the same process and the same sections.
    pub(crate) fn parse(token: &str, sections: Sections, inner: &Inner) -> Result<Self, Error> {
        if token.is_empty() {
            return Ok(Self(0));
        }
        let mut numbers = token.splitn(3, '.').map(|number| u64::from_str_radix(number, 16).ok());
        let mut next = || numbers.next().flatten();
        let parsed = (next(), next(), next());
        match parsed {
            (Some(made), Some(of), Some(at))
                if made == inner.identity.incarnation && of == u64::from(sections.bits()) =>
            {
                Ok(Self(usize::try_from(at).unwrap_or(usize::MAX)))
            }
            _ => {
                let why = "is not a token of this list, or for other sections, or from before a restart; \
                           ask again from the start";
                Err(Reason::InvalidField.field("page_token", why))
            }
        }
    }

    fn token(self, sections: Sections, inner: &Inner) -> String {
        format!("{:x}.{:x}.{:x}", inner.identity.incarnation, sections.bits(), self.0)
    }
}

enum Entry {
    Shard(ShardStatus),
    SlotOwner(SlotOwner),
    Transfer(ActiveTask),
    Migration(ActiveTask),
    Peer(PeerStatus),
}

impl Entry {
    fn encoded_len(&self) -> usize {
        // Tag and length beside it.
        8 + match self {
            Self::Shard(one) => one.encoded_len(),
            Self::SlotOwner(one) => one.encoded_len(),
            Self::Transfer(one) | Self::Migration(one) => one.encoded_len(),
            Self::Peer(one) => one.encoded_len(),
        }
    }
}

/// All lists that were asked for.
pub(crate) struct Lists(Vec<Entry>);

impl Lists {
    pub(crate) fn new(facts: Facts, sections: Sections) -> Self {
        let Facts { shards, slot_owners, transfers, migrations, peers, .. } = facts;
        let mut all = Vec::new();
        if sections.contains(NodeStatusSection::Shards) {
            all.extend(shards.into_iter().map(Entry::Shard));
        }
        if sections.contains(NodeStatusSection::SlotOwners) {
            all.extend(slot_owners.into_iter().map(Entry::SlotOwner));
        }
        if sections.contains(NodeStatusSection::Tasks) {
            all.extend(transfers.into_iter().map(Entry::Transfer));
            all.extend(migrations.into_iter().map(Entry::Migration));
        }
        if sections.contains(NodeStatusSection::Peers) {
            all.extend(peers.into_iter().map(Entry::Peer));
        }
        Self(all)
    }

    /// Puts one page into `status`; returns the token of the next one. A page has one entry at least, if there is one.
    pub(crate) fn fill(
        self,
        status: &mut NodeStatus,
        from: Position,
        page_size: u32,
        inner: &Inner,
        sections: Sections,
    ) -> String {
        let most = inner.limits.page.max(1);
        let size = match usize::try_from(page_size) {
            Ok(size) if size > 0 => size.min(most),
            _ => most,
        };
        let mut bytes = status.encoded_len();
        let total = self.0.len();
        let mut taken = 0;
        for entry in self.0.into_iter().skip(from.0).take(size) {
            bytes += entry.encoded_len();
            if taken > 0 && bytes > inner.limits.page_bytes {
                break;
            }
            taken += 1;
            match entry {
                Entry::Shard(one) => status.shards.push(one),
                Entry::SlotOwner(one) => status.slot_owners.push(one),
                Entry::Transfer(one) => status.transfers.push(one),
                Entry::Migration(one) => status.migrations.push(one),
                Entry::Peer(one) => status.peers.push(one),
            }
        }
        let next = from.0.saturating_add(taken);
        if next < total { Position(next).token(sections, inner) } else { String::new() }
    }
}
