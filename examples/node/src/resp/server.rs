//! The Redis port: accepts connections, no more than there may be, and ends them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::commands::Context;
use super::connection::Connection;
use super::memory::Memory;
use super::request::Limits;
use super::scan::Cursors;
use crate::node::Node;
use crate::split::Splits;

/// Redis' own default.
const MAX_CLIENTS: usize = 10_000;

/// Serves a node on a listening socket.
#[derive(Debug)]
pub struct RespServer {
    listener: TcpListener,
    address: SocketAddr,
    context: Arc<Context>,
    limits: Limits,
}

impl RespServer {
    /// At most `max_clients` connections, Redis' default of 10000 if `None`.
    ///
    /// # Errors
    ///
    /// The socket does not know its address.
    pub fn new(
        node: Node,
        splits: Splits,
        listener: TcpListener,
        limits: Limits,
        max_clients: Option<usize>,
    ) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        let context = Context {
            node,
            splits,
            cursors: Cursors::default(),
            clients: AtomicUsize::new(0),
            connections: AtomicU64::new(0),
            commands: AtomicU64::new(0),
            max_clients: max_clients.unwrap_or(MAX_CLIENTS),
            memory: Memory::new(limits.memory_bytes),
            port: address.port(),
        };
        Ok(Self { listener, address, context: Arc::new(context), limits })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`; then connections finish what they do, for at most `grace`.
    pub async fn serve(self, stop: CancellationToken, grace: Duration) {
        let connections = TaskTracker::new();
        let cut = CancellationToken::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => self.welcome(stream, peer, &connections, &stop, &cut),
                Err(error) => {
                    // Out of file descriptors, most likely: that does not get better by asking at once.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        drop(self.listener);
        connections.close();
        if tokio::time::timeout(grace, connections.wait()).await.is_err() {
            tracing::warn!(connections = connections.len(), "connections did not end in time; they are cut");
            cut.cancel();
            connections.wait().await;
        }
    }

    fn welcome(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        connections: &TaskTracker,
        stop: &CancellationToken,
        cut: &CancellationToken,
    ) {
        let context = Arc::clone(&self.context);
        let id = context.connections.fetch_add(1, Ordering::Relaxed) + 1;
        let place = Place::take(&context);
        let limits = self.limits;
        let (stop, cut) = (stop.clone(), cut.clone());
        connections.spawn(async move {
            let Some(_place) = place else {
                return refuse(stream).await;
            };
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%peer, %error, "cannot set TCP_NODELAY");
            }
            tokio::select! {
                () = cut.cancelled() => {}
                served = Connection::new(stream, context, id, limits, stop).serve() => {
                    if let Err(error) = served {
                        tracing::debug!(%peer, %error, "a connection broke");
                    }
                }
            }
        });
    }
}

async fn refuse(mut stream: TcpStream) {
    // The client may be gone already.
    let _ = tokio::time::timeout(
        Duration::from_secs(1),
        stream.write_all(b"-ERR max number of clients reached\r\n"),
    )
    .await;
}

/// A connection's place among those that there may be.
struct Place(Arc<Context>);

impl Place {
    fn take(context: &Arc<Context>) -> Option<Self> {
        let place = Self(Arc::clone(context));
        (context.clients.fetch_add(1, Ordering::Relaxed) < context.max_clients).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proto::common::guard::RangeGuard;
    use redis_protocol::resp2::types::BytesFrame;

    use super::*;
    use crate::common::{NodeId, SlotRange, slot_of};
    use crate::demo::client::Client;
    use crate::gate::HoldMode;
    use crate::store::{Init, StoreOptions};

    async fn scan(client: &mut Client, cursor: &str) -> (String, Vec<String>) {
        let text = |frame: &BytesFrame| match frame {
            BytesFrame::BulkString(text) => String::from_utf8_lossy(text).into_owned(),
            other => panic!("{other:?}"),
        };
        let reply = client.call(&["SCAN", cursor, "COUNT", "1000"]).await.unwrap();
        let BytesFrame::Array(parts) = &reply else { panic!("{reply:?}") };
        let [next, BytesFrame::Array(keys)] = parts.as_slice() else { panic!("{reply:?}") };
        (text(next), keys.iter().map(text).collect())
    }

    struct Served {
        node: Node,
        address: String,
        stop: CancellationToken,
        serving: tokio::task::JoinHandle<()>,
        _directory: tempfile::TempDir,
    }

    impl Served {
        /// A node that owns all slots.
        async fn start(limits: Limits) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let all = vec![SlotRange::FULL];
            let init = Init { node: NodeId::new("n1").unwrap(), slots: Some(all), others: vec![] };
            let node = Node::open(directory.path(), &init, &StoreOptions::default()).unwrap();
            let stop = CancellationToken::new();
            let splits =
                Splits::new(node.clone(), Default::default(), RangeGuard::new(), stop.clone()).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let server = RespServer::new(node.clone(), splits, listener, limits, None).unwrap();
            let address = server.address().to_string();
            let serving = tokio::spawn(server.serve(stop.clone(), Duration::from_secs(5)));
            Self { node, address, stop, serving, _directory: directory }
        }

        async fn client(&self) -> Client {
            Client::connect(&self.address).await.unwrap()
        }

        async fn waiting(&self, count: usize) {
            while self.node.gate().waiting() != count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }

        async fn end(self) {
            self.stop.cancel();
            self.serving.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_scan_waits_where_reads_do() {
        let served = Served::start(Limits::default()).await;
        let node = &served.node;
        let mut client = served.client().await;
        for n in 0..100 {
            client.call(&["SET".to_owned(), format!("key:{n}"), "v".to_owned()]).await.unwrap();
        }
        let moving = SlotRange::new(4096, 8192).unwrap();
        let has =
            |keys: &[String]| keys.iter().filter(|key| moving.contains(slot_of(key.as_bytes()))).count();

        let writes = node.gate().hold(moving, HoldMode::Writes).await;
        let (end, keys) = scan(&mut client, "0").await;
        assert_eq!((end.as_str(), keys.len()), ("0", 100), "reads go on");
        assert!(has(&keys) > 0);

        let reads = node.gate().hold(moving, HoldMode::All).await;
        let (next, before) = scan(&mut client, "0").await;
        assert_eq!(has(&before), 0, "it ends where slots are held");
        let waiting = node.gate().waiting();
        let mut rest = Box::pin(scan(&mut client, &next));
        tokio::select! {
            early = &mut rest => panic!("{early:?}"),
            () = served.waiting(waiting + 1) => {}
        }
        drop((reads, writes));
        let (end, after) = rest.await;
        assert_eq!((end.as_str(), before.len() + after.len()), ("0", 100));
        drop(client);
        served.end().await;
    }

    const USED_UP: &str = "ERR the memory for what clients send and do not take is used up; try again later";

    /// An empty key is 6 bytes of a request, and its value 5 of the reply, or 3.
    #[tokio::test]
    async fn empty_keys_and_values_that_are_not_there_count_with_what_they_take() {
        let served = Served::start(Limits { memory_bytes: 4 << 20, ..Limits::default() }).await;
        let mut client = served.client().await;
        let ask = async |client: &mut Client, command: &'static str, keys: usize| {
            let keys = std::iter::repeat_n("", keys);
            let arguments: Vec<&str> = [command].into_iter().chain(keys).collect();
            client.call(&arguments).await
        };
        for _ in 0..10 {
            let BytesFrame::Array(values) = ask(&mut client, "MGET", 4000).await.unwrap() else { panic!() };
            assert_eq!(values.len(), 4000);
            // What was done is counted no more.
            assert_eq!(ask(&mut client, "DEL", 10_000).await.unwrap(), BytesFrame::Integer(0));
        }
        // The request has room, and the reply has none beside it.
        assert_eq!(ask(&mut client, "MGET", 10_000).await.unwrap(), BytesFrame::Error(USED_UP.into()));
        assert_eq!(ask(&mut client, "DEL", 10_000).await.unwrap(), BytesFrame::Integer(0));
        // The request has none. One that is refused is closed, perhaps before it has read why.
        if let Ok(reply) = ask(&mut client, "DEL", 17_000).await {
            assert_eq!(reply, BytesFrame::Error(USED_UP.into()));
        }
        ask(&mut client, "DEL", 1).await.unwrap_err();
        served.end().await;
    }

    /// Nobody knows for how long.
    #[tokio::test]
    async fn a_write_that_waits_for_its_slot_is_counted() {
        let served = Served::start(Limits { memory_bytes: 4 << 20, ..Limits::default() }).await;
        let held = served.node.gate().hold(SlotRange::FULL, HoldMode::Writes).await;
        let value = vec![b'x'; 3 << 19];
        let set = [b"SET".as_slice(), b"key", &value];
        let (mut first, mut second) = (served.client().await, served.client().await);
        let mut one = Box::pin(first.call(&set));
        tokio::select! {
            early = &mut one => panic!("{early:?}"),
            () = served.waiting(1) => {}
        }
        // It may have half of what the other one leaves.
        tokio::select! {
            refused = second.call(&set) => if let Ok(reply) = refused {
                assert_eq!(reply, BytesFrame::Error(USED_UP.into()));
            },
            () = served.waiting(2) => panic!("both are taken"),
        }
        drop(held);
        assert!(matches!(one.await.unwrap(), BytesFrame::SimpleString(ok) if ok == "OK"));
        served.end().await;
    }
}
