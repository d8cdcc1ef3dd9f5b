//! Writers at a fixed rate, which send what is due, whatever became of what was sent before; and writers as fast as they are answered.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use proto_common::slots::slot_of;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::nodes::Node;

/// Connections to each node of writers at a fixed rate.
const CONNECTIONS: u64 = 16;
/// The same of writers to slots that stay.
const BESIDE_CONNECTIONS: u64 = 2;
/// Writes are sent in groups, this often.
const TICK: Duration = Duration::from_millis(1);

/// What was measured since the last look.
#[derive(Serialize)]
pub(crate) struct Measured {
    pub(crate) moving: Writes,
    pub(crate) staying: Writes,
}

/// One group of writes that were acknowledged.
#[derive(Serialize)]
pub(crate) struct Writes {
    pub(crate) per_s: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
}

impl Writes {
    fn new(micros: &Histogram<u64>, time: Duration) -> Self {
        #[allow(clippy::cast_precision_loss)]
        let millis = |quantile| micros.value_at_quantile(quantile) as f64 / 1000.0;
        #[allow(clippy::cast_precision_loss)]
        let per_s = micros.len() as f64 / time.as_secs_f64();
        Self { per_s, p50_ms: millis(0.5), p99_ms: millis(0.99) }
    }
}

/// Of microseconds, up to two minutes.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(120_000_000, 3).expect("a range and three digits")
}

struct Shared {
    /// Microseconds, of writes to the moving slots and to others.
    measured: Mutex<[Histogram<u64>; 2]>,
    stop: AtomicBool,
    stopped: Notify,
}

/// How much is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    /// So many writes per second, in groups.
    Rate(u64),
    /// As fast as they are answered, with so many unanswered on each of so many connections.
    Closed { connections: u64, unanswered: usize },
}

impl Offer {
    /// What one of all connections writes, and how many there are.
    fn shared(self, connections: u64) -> (Self, u64) {
        match self {
            Self::Rate(rate) => (Self::Rate(rate / connections), connections),
            Self::Closed { connections, .. } => (self, connections),
        }
    }
}

/// Writers that run.
pub(crate) struct Load {
    /// That write to the moving slots.
    pub(crate) connections: u64,
    shared: Arc<Shared>,
    since: Mutex<Instant>,
    tasks: JoinSet<()>,
}

/// A write on its way.
#[derive(Clone, Copy)]
struct Due {
    key: u64,
    at: Instant,
}

impl Load {
    /// Writes `moving` to keys of the moving slots, and `staying` per second to others.
    pub(crate) fn start(
        nodes: [&Node; 2],
        slots: (u16, u16),
        keys: u64,
        moving: Offer,
        staying: u64,
    ) -> Self {
        let measured = Mutex::new([histogram(), histogram()]);
        let shared = Arc::new(Shared { measured, stop: AtomicBool::new(false), stopped: Notify::new() });
        let mut tasks = JoinSet::new();
        let addresses = nodes.map(|node| node.resp.clone());
        let in_range = |key: &u64| (slots.0..slots.1).contains(&slot_of(name(*key).as_bytes()));
        let offers =
            [(true, moving.shared(CONNECTIONS)), (false, Offer::Rate(staying).shared(BESIDE_CONNECTIONS))];
        for (of_moving, (offer, connections)) in offers {
            let keys: Arc<[u64]> = (0..keys).filter(|key| in_range(key) == of_moving).collect();
            for writer in 0..connections {
                let (keys, shared, addresses) = (Arc::clone(&keys), Arc::clone(&shared), addresses.clone());
                tasks.spawn(async move { write(addresses, &keys, writer, offer, of_moving, &shared).await });
            }
        }
        let (_, connections) = moving.shared(CONNECTIONS);
        Self { connections, shared, since: Mutex::new(Instant::now()), tasks }
    }

    /// What was acknowledged since the last call.
    pub(crate) fn take(&self) -> Measured {
        let now = Instant::now();
        let since = std::mem::replace(&mut *self.since.lock().unwrap(), now);
        let fresh = [histogram(), histogram()];
        let measured = std::mem::replace(&mut *self.shared.measured.lock().unwrap(), fresh);
        let [moving, staying] = measured.map(|micros| Writes::new(&micros, now - since));
        Measured { moving, staying }
    }

    pub(crate) async fn stop(mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.stopped.notify_waiters();
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("a writer ends");
        }
    }
}

/// One writer: a connection to each node, of which one owns its slots.
async fn write(
    addresses: [String; 2],
    keys: &[u64],
    writer: u64,
    offer: Offer,
    moving: bool,
    shared: &Arc<Shared>,
) {
    // Answers go back to the sender of the writes: what was redirected is sent again to the other node.
    let (again, mut redirected) = mpsc::channel(65_536);
    let unanswered = match offer {
        Offer::Rate(_) => Semaphore::MAX_PERMITS / 2,
        Offer::Closed { unanswered, .. } => unanswered,
    };
    let places = Arc::new(Semaphore::new(unanswered));
    let mut outputs = Vec::new();
    let mut readers = JoinSet::new();
    for (node, address) in addresses.iter().enumerate() {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (read, output) = stream.into_split();
        let sent: Arc<Mutex<VecDeque<Due>>> = Arc::default();
        outputs.push((output, Arc::clone(&sent)));
        let (shared, again, places) = (Arc::clone(shared), again.clone(), Arc::clone(&places));
        readers.spawn(async move {
            let mut lines = BufReader::with_capacity(64 << 10, read);
            let mut line = Vec::new();
            loop {
                line.clear();
                if lines.read_until(b'\n', &mut line).await.unwrap_or(0) == 0 {
                    return;
                }
                let due = sent.lock().unwrap().pop_front().expect("an answer to a write");
                if line.starts_with(b"+OK") {
                    let micros = u64::try_from(due.at.elapsed().as_micros()).unwrap_or(u64::MAX);
                    let mut measured = shared.measured.lock().unwrap();
                    measured[usize::from(!moving)].saturating_record(micros);
                    drop(measured);
                    places.add_permits(1);
                } else {
                    let text = String::from_utf8_lossy(&line);
                    let later = text.starts_with("-MOVED")
                        || text.starts_with("-TRYAGAIN")
                        || text.starts_with("-CLUSTERDOWN");
                    assert!(later, "{text}");
                    let owner = text.starts_with("-MOVED").then_some(1 - node);
                    if again.send((due, owner)).await.is_err() {
                        return;
                    }
                }
            }
        });
    }
    let mut owner = 0;
    let began = Instant::now();
    let (mut count, mut buffer) = (0_u64, Vec::new());
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !shared.stop.load(Ordering::SeqCst) {
        let mut batch = Vec::new();
        let due = |count: u64, at| {
            let index = (count * 7919 + writer * 104_729) % keys.len() as u64;
            Due { key: keys[usize::try_from(index).unwrap()], at }
        };
        if let Offer::Rate(rate) = offer {
            tick.tick().await;
            let elapsed = began.elapsed().as_micros();
            let target = u64::try_from(elapsed * u128::from(rate) / 1_000_000).unwrap_or(u64::MAX);
            while count < target {
                batch.push(due(count, began + Duration::from_micros(count * 1_000_000 / rate.max(1))));
                count += 1;
            }
        } else {
            // The tick lets it look for redirected writes, and for its end.
            let mut free = tokio::select! {
                place = places.acquire() => Some(place.unwrap()),
                _ = tick.tick() => None,
            };
            while let Some(place) = free {
                place.forget();
                batch.push(due(count, Instant::now()));
                count += 1;
                free = places.try_acquire().ok();
            }
        }
        while let Ok((due, moved_to)) = redirected.try_recv() {
            batch.push(due);
            owner = moved_to.unwrap_or(owner);
        }
        if batch.is_empty() {
            continue;
        }
        let (output, sent) = &mut outputs[owner];
        buffer.clear();
        for due in &batch {
            let key = name(due.key);
            buffer.extend_from_slice(
                format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n$3\r\nxxx\r\n", key.len()).as_bytes(),
            );
        }
        sent.lock().unwrap().extend(batch);
        output.write_all(&buffer).await.unwrap();
    }
    drop(outputs);
    readers.abort_all();
}

fn name(key: u64) -> String {
    format!("key:{key:012}")
}

/// Writes every key once.
pub(crate) async fn fill(node: &Node, keys: u64) {
    let stream = TcpStream::connect(&node.resp).await.unwrap();
    let (read, mut output) = stream.into_split();
    let answers = tokio::spawn(async move {
        let mut lines = BufReader::new(read);
        let mut line = String::new();
        for _ in 0..keys {
            line.clear();
            lines.read_line(&mut line).await.unwrap();
            assert_eq!(line, "+OK\r\n");
        }
    });
    let mut buffer = Vec::new();
    for key in 0..keys {
        let key = name(key);
        buffer.extend_from_slice(
            format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n$3\r\nxxx\r\n", key.len()).as_bytes(),
        );
        if buffer.len() > 64 << 10 {
            output.write_all(&buffer).await.unwrap();
            buffer.clear();
        }
    }
    output.write_all(&buffer).await.unwrap();
    answers.await.unwrap();
}
