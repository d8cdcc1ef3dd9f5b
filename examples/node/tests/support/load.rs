//! Clients that write, read and count while slots move, and record what they were answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use node::common::{SlotRange, slot_of};
use node::demo::client::{Client, text};
use node::demo::processes::NodeProcess;
use redis_protocol::resp2::types::BytesFrame;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::checker::{Act, Answer, Event};
use super::until;

/// Clients at the same time.
const CLIENTS: usize = 4;
/// Plain keys of each client.
const PLAIN: usize = 6;
/// Keys with an expiry of each client.
const EXPIRING: usize = 3;
/// Counters of all clients.
const COUNTERS: usize = 3;
const PAUSE: Duration = Duration::from_millis(10);

/// Clients that run.
pub struct Load {
    stop: CancellationToken,
    clients: JoinSet<Vec<Event>>,
    keys: Vec<String>,
    link: Link,
}

impl Load {
    /// Starts clients of keys in `slots`, which know the Redis ports of `nodes`.
    pub fn start(nodes: &[&NodeProcess], slots: SlotRange) -> Self {
        let addresses = nodes.iter().map(|node| node.addresses().resp.clone()).collect();
        let link = Link { addresses, at: 0, client: None, epoch: Instant::now(), answered: Arc::default() };
        let mut all = (0..)
            .map(|n| format!("checked:{n}"))
            .filter(|key| slots.contains(slot_of(key.as_bytes())))
            .take(CLIENTS * (PLAIN + EXPIRING) + COUNTERS);
        let counters: Vec<_> = all.by_ref().take(COUNTERS).collect();
        let all: Vec<_> = all.collect();
        let keys: Vec<_> = counters.iter().chain(&all).cloned().collect();
        let (stop, mut clients) = (CancellationToken::new(), JoinSet::new());
        for mine in all.chunks(PLAIN + EXPIRING) {
            let (mine, keys, counters) = (mine.to_vec(), keys.clone(), counters.clone());
            clients.spawn(run(link.fresh(), mine, counters, keys, stop.clone()));
        }
        clients.spawn(watch(link.fresh(), keys.clone(), stop.clone()));
        Self { stop, clients, keys, link }
    }

    /// The time since which events count.
    pub fn now(&self) -> Duration {
        self.link.epoch.elapsed()
    }

    /// Waits until the clients were answered a few times for each key, counted from now.
    pub async fn going(&self) {
        let wanted = self.link.answered.load(Ordering::Relaxed) + 2 * self.keys.len();
        until("clients are answered", async || self.link.answered.load(Ordering::Relaxed) > wanted).await;
    }

    /// Lets the clients go on for a moment, ends them, reads all keys once more, and returns what all were answered.
    pub async fn finish(mut self) -> Vec<Event> {
        self.going().await;
        self.stop.cancel();
        let mut events: Vec<_> = self.clients.join_all().await.into_iter().flatten().collect();
        for key in &self.keys {
            let read = self.link.call(key, Act::Get).await;
            assert_ne!(read.answer, Answer::Unknown, "{read:?}");
            events.push(read);
        }
        events
    }
}

async fn run(
    mut link: Link,
    mine: Vec<String>,
    counters: Vec<String>,
    keys: Vec<String>,
    stop: CancellationToken,
) -> Vec<Event> {
    let mut events = Vec::new();
    for turn in 0_u64.. {
        if stop.is_cancelled() {
            break;
        }
        let at = rand::random_range(0..mine.len());
        let lives = (at >= PLAIN).then(|| Duration::from_millis(rand::random_range(50..600)));
        events.push(link.call(&mine[at], Act::Set { value: turn + 1, lives }).await);
        events.push(link.call(&counters[rand::random_range(0..COUNTERS)], Act::Increment).await);
        for _ in 0..2 {
            events.push(link.call(&keys[rand::random_range(0..keys.len())], Act::Get).await);
        }
    }
    events
}

/// Reads alone, which never waits for a write.
async fn watch(mut link: Link, keys: Vec<String>, stop: CancellationToken) -> Vec<Event> {
    let mut events = Vec::new();
    while !stop.is_cancelled() {
        events.push(link.call(&keys[rand::random_range(0..keys.len())], Act::Get).await);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    events
}

/// A connection to whichever node serves.
struct Link {
    addresses: Vec<String>,
    at: usize,
    client: Option<Client>,
    epoch: Instant,
    /// Over all connections.
    answered: Arc<AtomicUsize>,
}

impl Link {
    fn fresh(&self) -> Self {
        let (addresses, answered) = (self.addresses.clone(), Arc::clone(&self.answered));
        Self { addresses, at: 0, client: None, epoch: self.epoch, answered }
    }

    /// Asks until there is an answer, or the connection breaks.
    async fn call(&mut self, key: &str, act: Act) -> Event {
        let command = match act {
            Act::Set { value, lives: None } => format!("SET {key} {value}"),
            Act::Set { value, lives: Some(lives) } => format!("SET {key} {value} PX {}", lives.as_millis()),
            Act::Get => format!("GET {key}"),
            Act::Increment => format!("INCR {key}"),
        };
        let command: Vec<_> = command.split(' ').collect();
        loop {
            let mut client = match self.client.take() {
                Some(client) => client,
                None => match Client::connect(&self.addresses[self.at]).await {
                    Ok(client) => client,
                    Err(_) => {
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                },
            };
            let begun = self.epoch.elapsed();
            let replied = client.call(&command).await;
            let ended = self.epoch.elapsed();
            let answer = match &replied {
                Err(_) => Answer::Unknown,
                Ok(BytesFrame::Integer(number)) => Answer::Value(u64::try_from(*number).ok()),
                Ok(BytesFrame::Null) => Answer::Value(None),
                Ok(BytesFrame::SimpleString(_)) => Answer::Done,
                Ok(BytesFrame::BulkString(value)) => {
                    Answer::Value(Some(str::from_utf8(value).unwrap().parse().unwrap()))
                }
                Ok(frame) => {
                    let error = text(frame).unwrap_or_default();
                    if let Some(moved) = error.strip_prefix("MOVED ") {
                        let to = moved.split_whitespace().nth(1).unwrap();
                        self.at = self.addresses.iter().position(|address| address == to).unwrap();
                        continue;
                    }
                    if error.starts_with("TRYAGAIN") || error.starts_with("CLUSTERDOWN") {
                        self.client = Some(client);
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                    let unread =
                        act == Act::Get && error.starts_with("ERR database: a write to the disk failed");
                    assert!(
                        unread || error.contains("outcome of this write is unknown"),
                        "{command:?}: {error}"
                    );
                    Answer::Unknown
                }
            };
            if answer == Answer::Unknown {
                tokio::time::sleep(PAUSE).await;
            } else {
                self.client = Some(client);
                self.answered.fetch_add(1, Ordering::Relaxed);
            }
            return Event { key: key.to_owned(), act, answer, node: self.at, begun, ended };
        }
    }
}
