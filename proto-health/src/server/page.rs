//! The lists of a node's status, page by page: shards, slot owners, transfers, migrations, peers, in this order.

use prost::Message;
use proto_common::error::Error;

use crate::reason::Reason;
use crate::server::core::Inner;
use crate::server::facts::{Facts, Sections};
use crate::v1::{NodeStatus, NodeStatusSection};

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

/// What of the lists, one behind the other, stands on one page.
struct Window {
    /// Entries that stand on pages before it.
    skip: usize,
    /// Entries that it may still take, and bytes.
    left: usize,
    bytes_left: usize,
    taken: usize,
    total: usize,
}

impl Window {
    /// Takes what belongs on the page of the next list: one entry at least, if there is one.
    fn take<T: Message + Clone>(&mut self, entries: &[T]) -> Vec<T> {
        self.total += entries.len();
        let (skipped, rest) = entries.split_at(self.skip.min(entries.len()));
        self.skip -= skipped.len();
        let mut page = Vec::new();
        for entry in rest {
            // Tag and length beside it.
            let bytes = 8 + entry.encoded_len();
            if self.left == 0 || (self.taken > 0 && bytes > self.bytes_left) {
                self.left = 0;
                break;
            }
            self.left -= 1;
            self.bytes_left = self.bytes_left.saturating_sub(bytes);
            self.taken += 1;
            page.push(entry.clone());
        }
        page
    }
}

/// Puts one page of the lists that were asked for into `status`; returns the token of the next one. Costs what the page costs, however long the slot map is.
pub(crate) fn fill(
    facts: &Facts,
    status: &mut NodeStatus,
    from: Position,
    page_size: u32,
    inner: &Inner,
    sections: Sections,
) -> String {
    let most = inner.limits.page.max(1);
    let left = match usize::try_from(page_size) {
        Ok(size) if size > 0 => size.min(most),
        _ => most,
    };
    let bytes_left = inner.limits.page_bytes.saturating_sub(status.encoded_len());
    let mut window = Window { skip: from.0, left, bytes_left, taken: 0, total: 0 };
    let Facts { shards, slot_owners, transfers, migrations, peers, .. } = facts;
    if sections.contains(NodeStatusSection::Shards) {
        status.shards = window.take(shards);
    }
    if sections.contains(NodeStatusSection::SlotOwners) {
        status.slot_owners = window.take(slot_owners);
    }
    if sections.contains(NodeStatusSection::Tasks) {
        status.transfers = window.take(transfers);
        status.migrations = window.take(migrations);
    }
    if sections.contains(NodeStatusSection::Peers) {
        status.peers = window.take(peers);
    }
    let next = from.0.saturating_add(window.taken);
    if next < window.total { Position(next).token(sections, inner) } else { String::new() }
}
