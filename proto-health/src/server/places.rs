//! Places for watches: so many for the node, so many for each peer, so many for each connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto_common::access::Caller;
use proto_common::error::Error;
use proto_common::peer::{Peer, PeerKey};
use proto_common::shares::{Full, Share, Shares};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::Limits;
use crate::reason::Reason;

/// Tells connections apart, for the limit of watches on each of them. tonic's own server says by itself where a call comes
/// from; behind any other one, put this into the request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId(pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Address(std::net::SocketAddr),
    Id(ConnectionId),
}

/// Open watches by connection.
type Connections = Arc<Mutex<HashMap<Key, usize>>>;

#[derive(Debug)]
pub(crate) struct Places {
    all: Arc<Semaphore>,
    limit: usize,
    per_connection: usize,
    connections: Connections,
    peers: Shares<PeerKey>,
    /// Time between two heartbeats of a peer, of whichever watch.
    pace: Duration,
}

/// One open watch.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
    of_peer: Share<PeerKey>,
    pace: Duration,
    connection: Option<(Key, Connections)>,
}

impl Places {
    pub(crate) fn new(limits: &Limits) -> Self {
        let limit = limits.watches.min(u32::MAX as usize).min(Semaphore::MAX_PERMITS);
        Self {
            all: Arc::new(Semaphore::new(limit)),
            limit,
            per_connection: limits.watches_per_connection,
            connections: Arc::default(),
            peers: Shares::new(u64::MAX, limits.watches_per_peer as u64),
            pace: Duration::from_secs(1) / limits.heartbeats_per_peer.max(1),
        }
    }

    pub(crate) fn open(&self) -> usize {
        self.limit - self.all.available_permits().min(self.limit)
    }

    /// A place for one more watch of the caller with those extensions.
    pub(crate) fn take(&self, extensions: &http::Extensions) -> Result<Place, Error> {
        let full = |limit: u64, of: &str| {
            Reason::TooManyWatchers
                .error(format!("{limit} watches are open {of} already; poll, or try again later"))
                .metadata("limit", limit.to_string())
                .retry_after(Duration::from_secs(1))
        };
        let permit = Arc::clone(&self.all).try_acquire_owned();
        let permit = permit.map_err(|_| full(self.limit as u64, "at this node"))?;
        let peer = extensions.get::<Caller>().map_or_else(Peer::anonymous, |caller| caller.peer().clone());
        let of_peer = self.peers.take(Some(&peer.key()), 1).map_err(|refused: Full| {
            let who = peer.key().to_string();
            full(refused.limit(), &format!("of {who} at this node, which is its share,"))
                .metadata("peer", who)
        })?;
        let Some(key) = key(extensions, &peer) else {
            return Ok(Place { _permit: permit, of_peer, pace: self.pace, connection: None });
        };
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let count = connections.entry(key).or_default();
        if *count >= self.per_connection {
            return Err(full(self.per_connection as u64, "on this connection"));
        }
        *count += 1;
        drop(connections);
        Ok(Place {
            _permit: permit,
            of_peer,
            pace: self.pace,
            connection: Some((key, Arc::clone(&self.connections))),
        })
    }

    /// Returns when no watch is open.
    pub(crate) async fn empty(&self) {
        let all = u32::try_from(self.limit).unwrap_or(u32::MAX);
        // Never closed.
        let _ = self.all.acquire_many(all).await;
    }
}

impl Place {
    /// Shortest time between two heartbeats of this watch, beside the others that its peer has now.
    pub(crate) fn least_heartbeat(&self) -> Duration {
        self.pace.saturating_mul(u32::try_from(self.of_peer.of_peer()).unwrap_or(u32::MAX))
    }
}

fn key(extensions: &http::Extensions, peer: &Peer) -> Option<Key> {
    let id = extensions.get::<ConnectionId>().map(|id| Key::Id(*id));
    id.or_else(|| peer.address().map(Key::Address))
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((key, connections)) = &self.connection else { return };
        let mut connections = connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = connections.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                connections.remove(key);
            }
        }
    }
}
