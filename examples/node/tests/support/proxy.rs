//! A proxy between two nodes that swallows or keeps back what goes through it, from a chosen frame of a migration's or a snapshot's stream on.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// What becomes of the bytes of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Way {
    #[default]
    Pass,
    /// They are read and are gone; the connection stays.
    Swallow,
    /// They arrive when the way passes again, even if the sender is gone by then.
    Hold,
}

/// From the source to the target, and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ways {
    pub there: Way,
    pub back: Way,
}

impl Ways {
    /// What the source sends arrives later.
    pub const LATE: Self = Self { there: Way::Hold, back: Way::Pass };
    /// What the target answers is lost.
    pub const LOST: Self = Self { there: Way::Pass, back: Way::Swallow };
}

/// Frames of the source, by their field numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    Bulk = 2,
    /// Of a snapshot.
    Manifest = 3,
    Prepare = 4,
    /// Of a snapshot.
    End = 5,
    Commit = 6,
    Discard = 7,
    Forget = 8,
}

#[derive(Default)]
struct Shared {
    connections: Vec<(watch::Sender<Ways>, CancellationToken)>,
    /// Of connections that come.
    coming: Ways,
    armed: Option<(Frame, Ways)>,
}

/// Bytes, over all connections.
#[derive(Clone, Default)]
struct Counters {
    swallowed: Arc<AtomicUsize>,
    late: Arc<AtomicUsize>,
}

/// A listener in front of a node.
pub struct Proxy {
    address: String,
    shared: Arc<Mutex<Shared>>,
    counters: Counters,
    fired: watch::Receiver<bool>,
    _accepting: AbortOnDropHandle<()>,
}

impl Proxy {
    /// In front of `target`.
    pub async fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (shared, counters) = (Arc::<Mutex<Shared>>::default(), Counters::default());
        let (fire, fired) = watch::channel(false);
        let (target, for_connections, counted) = (target.to_owned(), Arc::clone(&shared), counters.clone());
        let accepting = async move {
            let mut running = tokio::task::JoinSet::new();
            loop {
                let (source, _) = listener.accept().await.unwrap();
                let Ok(target) = TcpStream::connect(&target).await else { continue };
                let closed = CancellationToken::new();
                let ways = {
                    let mut shared = for_connections.lock().unwrap();
                    let ways = watch::Sender::new(shared.coming);
                    shared.connections.push((ways.clone(), closed.clone()));
                    ways
                };
                let (from_source, to_source) = source.into_split();
                let (from_target, to_target) = target.into_split();
                let mut messages = Messages::default();
                let (shared, fire, mine) = (Arc::clone(&for_connections), fire.clone(), ways.clone());
                let look = move |bytes: &[u8]| {
                    for tag in messages.feed(bytes) {
                        let armed = &mut shared.lock().unwrap().armed;
                        if let Some((_, new)) = armed.take_if(|(frame, _)| *frame as u8 == tag) {
                            mine.send_replace(new);
                            fire.send_replace(true);
                        }
                    }
                };
                let there =
                    Direction { ways: ways.subscribe(), way: |ways| ways.there, closed: closed.clone() };
                let back = Direction { ways: ways.subscribe(), way: |ways| ways.back, closed };
                running.spawn(there.pump(from_source, to_target, counted.clone(), look));
                running.spawn(back.pump(from_target, to_source, counted.clone(), |_| {}));
            }
        };
        let accepting = AbortOnDropHandle::new(tokio::spawn(accepting));
        Self { address, shared, counters, fired, _accepting: accepting }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// The next connection that carries `frame` goes these `ways`, the frame included.
    pub fn arm(&self, frame: Frame, ways: Ways) {
        self.shared.lock().unwrap().armed = Some((frame, ways));
    }

    /// Waits until that has happened.
    pub async fn fired(&self) {
        self.fired.clone().wait_for(|fired| *fired).await.unwrap();
    }

    /// All connections go these `ways`, and those that come.
    pub fn go(&self, ways: Ways) {
        let mut shared = self.shared.lock().unwrap();
        shared.coming = ways;
        for (connection, _) in &shared.connections {
            connection.send_replace(ways);
        }
    }

    /// Connections that come go these `ways`.
    pub fn go_next(&self, ways: Ways) {
        self.shared.lock().unwrap().coming = ways;
    }

    /// Closes all connections. What is held for the target is kept.
    pub fn cut(&self) {
        for (_, closed) in &self.shared.lock().unwrap().connections {
            closed.cancel();
        }
    }

    /// Bytes that were swallowed or are held.
    pub fn swallowed(&self) -> usize {
        self.counters.swallowed.load(Ordering::SeqCst)
    }

    /// Bytes that were held, and have arrived late.
    pub fn late(&self) -> usize {
        self.counters.late.load(Ordering::SeqCst)
    }
}

struct Direction {
    ways: watch::Receiver<Ways>,
    way: fn(&Ways) -> Way,
    closed: CancellationToken,
}

impl Direction {
    async fn pump(
        mut self,
        mut from: OwnedReadHalf,
        mut to: OwnedWriteHalf,
        Counters { swallowed, late }: Counters,
        mut look: impl FnMut(&[u8]),
    ) {
        let mut held = Vec::new();
        let mut bytes = vec![0; 64 << 10];
        loop {
            let read = tokio::select! {
                biased;
                () = self.closed.cancelled() => break,
                changed = self.ways.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if (self.way)(&self.ways.borrow()) == Way::Pass {
                        if to.write_all(&held).await.is_err() {
                            break;
                        }
                        late.fetch_add(held.len(), Ordering::SeqCst);
                        held.clear();
                    }
                    continue;
                }
                read = from.read(&mut bytes) => read,
            };
            let Some(read) = read.ok().filter(|read| *read > 0) else { break };
            look(&bytes[..read]);
            let way = (self.way)(&self.ways.borrow());
            match way {
                Way::Pass => {
                    if to.write_all(&bytes[..read]).await.is_err() {
                        break;
                    }
                }
                Way::Swallow => {}
                Way::Hold => held.extend_from_slice(&bytes[..read]),
            }
            if way != Way::Pass {
                swallowed.fetch_add(read, Ordering::SeqCst);
            }
        }
        self.closed.cancel();
        drop(from);
        if !held.is_empty()
            && self.ways.wait_for(|ways| (self.way)(ways) == Way::Pass).await.is_ok()
            && to.write_all(&held).await.is_ok()
        {
            late.fetch_add(held.len(), Ordering::SeqCst);
        }
    }
}

/// Finds gRPC messages in what an HTTP/2 client sends.
struct Messages {
    preface: usize,
    bytes: Vec<u8>,
    /// By the stream's number: messages so far, and the beginning of the next one.
    streams: HashMap<u32, (usize, Vec<u8>)>,
}

impl Default for Messages {
    fn default() -> Self {
        Self {
            preface: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len(),
            bytes: Vec::new(),
            streams: HashMap::new(),
        }
    }
}

impl Messages {
    /// The first field of each message that ends in `bytes`, but for the first message of each stream.
    fn feed(&mut self, bytes: &[u8]) -> Vec<u8> {
        const HEAD: usize = 9;
        const PREFIX: usize = 5;
        let skipped = self.preface.min(bytes.len());
        self.preface -= skipped;
        self.bytes.extend_from_slice(&bytes[skipped..]);
        let mut found = Vec::new();
        while let Some(&[a, b, c, kind, _, d, e, f, g]) = self.bytes.first_chunk::<HEAD>() {
            let end = HEAD + u32::from_be_bytes([0, a, b, c]) as usize;
            if self.bytes.len() < end {
                break;
            }
            if kind == 0 {
                let (count, data) = self.streams.entry(u32::from_be_bytes([d, e, f, g])).or_default();
                data.extend_from_slice(&self.bytes[HEAD..end]);
                while let Some(&[_, a, b, c, d]) = data.first_chunk::<PREFIX>() {
                    let end = PREFIX + u32::from_be_bytes([a, b, c, d]) as usize;
                    if data.len() < end {
                        break;
                    }
                    *count += 1;
                    if *count > 1 && end > PREFIX {
                        found.push(data[PREFIX] >> 3);
                    }
                    data.drain(..end);
                }
            }
            self.bytes.drain(..end);
        }
        found
    }
}
