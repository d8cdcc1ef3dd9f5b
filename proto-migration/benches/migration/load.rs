//! Writers at a fixed rate: what is due is sent, whatever became of what was sent before.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proto_common::slots::slot_of;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

use crate::nodes::Node;

/// Connections to each node.
const CONNECTIONS: u64 = 16;
/// Writes are sent in groups, this often.
const TICK: Duration = Duration::from_millis(1);

/// Latencies of one group of writes.
#[derive(Default, Clone)]
struct Latencies {
    micros: Vec<u32>,
}

/// What was measured since the last look.
pub(crate) struct Measured {
    moving: Latencies,
    staying: Latencies,
    time: Duration,
}

impl Measured {
    pub(crate) fn moving_rate(&self) -> u64 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let rate = (self.moving.micros.len() as f64 / self.time.as_secs_f64()) as u64;
        rate
    }

    pub(crate) fn moving_p99_ms(&self) -> f64 {
        self.moving.p99_ms()
    }

    pub(crate) fn staying_p99_ms(&self) -> f64 {
        self.staying.p99_ms()
    }
}

impl Latencies {
    fn p99_ms(&self) -> f64 {
        let mut micros = self.micros.clone();
        micros.sort_unstable();
        let index = micros.len().saturating_sub(1) * 99 / 100;
        f64::from(micros.get(index).copied().unwrap_or(0)) / 1000.0
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{{\"moving_per_s\":{},\"moving_p99_ms\":{:.3},\"staying_p99_ms\":{:.3}}}",
            self.moving_rate(),
            self.moving_p99_ms(),
            self.staying_p99_ms()
        )
    }
}

#[derive(Default)]
struct Shared {
    measured: Mutex<(Latencies, Latencies)>,
    stop: AtomicBool,
    stopped: Notify,
}

/// Writers that run.
pub(crate) struct Load {
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
    /// `moving` writes per second to keys of the moving slots, `staying` to others.
    pub(crate) fn start(nodes: [&Node; 2], slots: (u16, u16), keys: u64, moving: u64, staying: u64) -> Self {
        let shared: Arc<Shared> = Arc::default();
        let mut tasks = JoinSet::new();
        let addresses = nodes.map(|node| node.resp.clone());
        let in_range = |key: &u64| (slots.0..slots.1).contains(&slot_of(name(*key).as_bytes()));
        for (of_moving, rate, connections) in [(true, moving, CONNECTIONS), (false, staying, 2)] {
            let keys: Arc<[u64]> = (0..keys).filter(|key| in_range(key) == of_moving).collect();
            for writer in 0..connections {
                let rate = rate / connections;
                let (keys, shared, addresses) = (Arc::clone(&keys), Arc::clone(&shared), addresses.clone());
                tasks.spawn(async move { write(addresses, &keys, writer, rate, of_moving, &shared).await });
            }
        }
        Self { shared, since: Mutex::new(Instant::now()), tasks }
    }

    /// What was acknowledged since the last call.
    pub(crate) fn take(&self) -> Measured {
        let now = Instant::now();
        let since = std::mem::replace(&mut *self.since.lock().unwrap(), now);
        let (moving, staying) = std::mem::take(&mut *self.shared.measured.lock().unwrap());
        Measured { moving, staying, time: now - since }
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
    rate: u64,
    moving: bool,
    shared: &Arc<Shared>,
) {
    // Answers go back to the sender of the writes: what was redirected is sent again to the other node.
    let (again, mut redirected) = mpsc::channel(65_536);
    let mut outputs = Vec::new();
    let mut readers = JoinSet::new();
    for (node, address) in addresses.iter().enumerate() {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (read, output) = stream.into_split();
        let sent: Arc<Mutex<VecDeque<Due>>> = Arc::default();
        outputs.push((output, Arc::clone(&sent)));
        let (shared, again) = (Arc::clone(shared), again.clone());
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
                    let micros = u32::try_from(due.at.elapsed().as_micros()).unwrap_or(u32::MAX);
                    let mut measured = shared.measured.lock().unwrap();
                    let latencies = if moving { &mut measured.0 } else { &mut measured.1 };
                    latencies.micros.push(micros);
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
    while !shared.stop.load(Ordering::SeqCst) {
        tick.tick().await;
        let mut batch = Vec::new();
        while let Ok((due, moved_to)) = redirected.try_recv() {
            batch.push(due);
            owner = moved_to.unwrap_or(owner);
        }
        let elapsed = began.elapsed().as_micros();
        let target = u64::try_from(elapsed * u128::from(rate) / 1_000_000).unwrap_or(u64::MAX);
        while count < target {
            let key = keys[usize::try_from((count * 7919 + writer * 104_729) % keys.len() as u64).unwrap()];
            let at = began + Duration::from_micros(count * 1_000_000 / rate.max(1));
            batch.push(Due { key, at });
            count += 1;
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
