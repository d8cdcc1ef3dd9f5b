//! Places for watches: so many for the node, so many for each connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto_common::error::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::reason::Reason;

/// Tells connections apart, for the limit of watches on each of them. tonic's own server says by itself where a call comes
/// from; behind any other one, put this into the request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId(pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    #[cfg(feature = "listen")]
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
}

/// One open watch.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
    connection: Option<(Key, Connections)>,
}

impl Places {
    pub(crate) fn new(limit: usize, per_connection: usize) -> Self {
        let limit = limit.min(u32::MAX as usize).min(Semaphore::MAX_PERMITS);
        Self { all: Arc::new(Semaphore::new(limit)), limit, per_connection, connections: Arc::default() }
    }

    pub(crate) fn open(&self) -> usize {
        self.limit - self.all.available_permits().min(self.limit)
    }

    /// A place for one more watch of the caller with those extensions.
    pub(crate) fn take(&self, extensions: &http::Extensions) -> Result<Place, Error> {
        let full = |limit: usize, of: &str| {
            Reason::TooManyWatchers
                .error(format!("{limit} watches are open {of} already; poll, or try again later"))
                .metadata("limit", limit.to_string())
                .retry_after(Duration::from_secs(1))
        };
        let permit = Arc::clone(&self.all).try_acquire_owned();
        let permit = permit.map_err(|_| full(self.limit, "at this node"))?;
        let Some(key) = key(extensions) else { return Ok(Place { _permit: permit, connection: None }) };
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let count = connections.entry(key).or_default();
        if *count >= self.per_connection {
            return Err(full(self.per_connection, "on this connection"));
        }
        *count += 1;
        drop(connections);
        Ok(Place { _permit: permit, connection: Some((key, Arc::clone(&self.connections))) })
    }

    /// Returns when no watch is open.
    pub(crate) async fn empty(&self) {
        let all = u32::try_from(self.limit).unwrap_or(u32::MAX);
        // Never closed.
        let _ = self.all.acquire_many(all).await;
    }
}

fn key(extensions: &http::Extensions) -> Option<Key> {
    if let Some(id) = extensions.get::<ConnectionId>() {
        return Some(Key::Id(*id));
    }
    #[cfg(feature = "listen")]
    {
        use tonic::transport::server::TcpConnectInfo;
        let address = extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
        let address = address.or_else(|| extensions.get::<proto_common::peer::Peer>()?.address());
        if let Some(address) = address {
            return Some(Key::Address(address));
        }
    }
    None
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
