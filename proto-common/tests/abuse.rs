//! Peers that abuse connections and HTTP/2, spoken to byte by byte: each is stopped, counted, and in nobody else's way.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test fails by panicking")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, StreamBody};
use proto_common::limits::ConnectionLimits;
use proto_common::prompt::Prompt;
use proto_common::refusals::counts;
use proto_common::tuning::{CONNECTION_WINDOW, FRAME_SIZE, incoming_within, tune_server_within};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Mutex, MutexGuard};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};

const PATIENCE: Duration = Duration::from_secs(20);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const FLOW_CONTROL_ERROR: u32 = 3;
const ENHANCE_YOUR_CALM: u32 = 11;

/// Refuses every call, except `/test.Test/Never`, which it never answers.
#[derive(Clone)]
struct Refuse;

impl tonic::server::NamedService for Refuse {
    const NAME: &'static str = "test.Test";
}

impl Service<http::Request<Body>> for Refuse {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            if request.uri().path().ends_with("/Never") {
                std::future::pending::<()>().await;
            }
            Ok(Status::not_found("nothing").into_http())
        })
    }
}

/// Answers as server reflection does: from a task that reads no more while its answers are not taken.
#[derive(Clone)]
struct OneByOne;

impl tonic::server::NamedService for OneByOne {
    const NAME: &'static str = "test.OneByOne";
}

impl Service<http::Request<Body>> for OneByOne {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (answers, rest) = tokio::sync::mpsc::channel(1);
        let mut body = request.into_body();
        tokio::spawn(async move {
            while let Some(Ok(frame)) = body.frame().await {
                if answers.send(Ok::<_, Status>(frame)).await.is_err() {
                    return;
                }
            }
        });
        let answers = tokio_stream::wrappers::ReceiverStream::new(rest);
        std::future::ready(Ok(http::Response::new(Body::new(StreamBody::new(answers)))))
    }
}

async fn serve(limits: ConnectionLimits) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tune_server_within(tonic::transport::Server::builder(), &limits)
        .add_service(Refuse)
        .add_service(Prompt::streaming(OneByOne));
    tokio::spawn(server.serve_with_incoming(incoming_within(listener, limits)));
    address
}

/// A connection from an address of its own on loopback.
async fn from(host: u8, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_nodelay(true).unwrap();
    socket.bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, host)), 0)).unwrap();
    socket.connect(to).await.unwrap()
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = payload.len() as u32;
    let mut frame = len.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The header block of a call; `more` are extra fields.
fn block(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let base = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "n")];
    let rest = [("content-type", "application/grpc"), ("te", "trailers")];
    [fields(&base), fields(&rest), fields(more)].concat()
}

/// A part of a header block: literals without indexing.
fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            let len = text.len();
            if len < 127 {
                block.push(len as u8);
            } else {
                // HPACK's integers (RFC 7541, 5.1), 7-bit prefix.
                block.push(127);
                let mut left = len - 127;
                while left >= 128 {
                    block.push((left % 128 + 128) as u8);
                    left /= 128;
                }
                block.push(left as u8);
            }
            block.extend(text.as_bytes());
        }
    }
    block
}

/// A client that has said hello.
async fn hello(host: u8, to: SocketAddr) -> TcpStream {
    let mut stream = from(host, to).await;
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await.unwrap();
    stream
}

/// Reads frames until `wanted` gives something; `None` when the connection ends first.
async fn read_until<T>(
    stream: &mut (impl AsyncRead + Unpin),
    mut wanted: impl FnMut(u8, u32, &[u8]) -> Option<T>,
) -> Option<T> {
    let read = async {
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.ok()?;
            let len = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; len as usize];
            stream.read_exact(&mut payload).await.ok()?;
            let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            if let Some(found) = wanted(head[3], id, &payload) {
                return Some(found);
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap()
}

fn code(at: usize, payload: &[u8]) -> u32 {
    u32::from_be_bytes(payload[at..at + 4].try_into().unwrap())
}

/// Whether a call on this connection is answered.
async fn answers(stream: &mut TcpStream, id: u32) -> bool {
    let call = frame(HEADERS, 5, id, &block("/test.Test/Call", &[]));
    if stream.write_all(&call).await.is_err() {
        return false;
    }
    read_until(stream, |kind, of, _| (kind == HEADERS && of == id).then_some(())).await.is_some()
}

/// Whether the peer closes; what it says before is not looked at.
async fn closed(stream: &mut TcpStream) {
    assert!(read_until(stream, |_, _, _| None::<()>).await.is_none());
}

/// The same, when the server has not said a word.
async fn closed_at_once(stream: &mut TcpStream) {
    let said = read_until(stream, |kind, _, payload| Some((kind, payload.to_vec()))).await;
    assert_eq!(said, None);
}

/// With which code the server ends the connection.
async fn gone_away(stream: &mut TcpStream) -> Option<u32> {
    read_until(stream, |kind, _, payload| (kind == GOAWAY).then(|| code(4, payload))).await
}

/// How a flood ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flood {
    /// The server has looked at all of it.
    Taken,
    /// The server said so with this code.
    GoneAway(u32),
    Closed,
}

/// Sends the pieces until the connection breaks or all are sent.
async fn flood_once(address: SocketAddr, pieces: impl Iterator<Item = Vec<u8>> + Send + 'static) -> Flood {
    const LAST: [u8; 8] = [9; 8];
    let (mut from_server, mut to_server) = hello(3, address).await.into_split();
    let sending = tokio::spawn(async move {
        for piece in pieces.chain([frame(PING, 0, 0, &LAST)]) {
            if to_server.write_all(&piece).await.is_err() {
                break;
            }
        }
        to_server
    });
    let ended = read_until(&mut from_server, |kind, _, payload| match kind {
        GOAWAY => Some(Flood::GoneAway(code(4, payload))),
        PING if payload == LAST => Some(Flood::Taken),
        _ => None,
    });
    let ended = ended.await.unwrap_or(Flood::Closed);
    sending.abort();
    ended
}

/// A server whose limit is exceeded, and another peer that is connected to it before. One at a time, so that what is counted is known.
struct Scene {
    address: SocketAddr,
    other: TcpStream,
    call: u32,
    before: BTreeMap<String, u64>,
    _alone: MutexGuard<'static, ()>,
}

impl Scene {
    /// The address of the other peer.
    const OTHER: u8 = 99;

    async fn new(change: impl FnOnce(&mut ConnectionLimits)) -> Self {
        static ALONE: Mutex<()> = Mutex::const_new(());
        let alone = ALONE.lock().await;
        let mut limits = ConnectionLimits::default();
        change(&mut limits);
        let address = serve(limits).await;
        let mut other = hello(Self::OTHER, address).await;
        assert!(answers(&mut other, 1).await);
        Self { address, other, call: 3, before: counts(), _alone: alone }
    }

    /// A call on the connection that the other peer has had all the time.
    async fn goes_on(&mut self) {
        assert!(answers(&mut self.other, self.call).await, "the connection of another peer has suffered");
        self.call += 2;
    }

    /// That, and one on a new connection.
    async fn others_go_on(&mut self) {
        self.goes_on().await;
        assert!(answers(&mut hello(Self::OTHER - 1, self.address).await, 1).await, "nobody else gets in");
    }

    /// Floods again and again, while the calls of the other peer are answered, each in time. Every flood has to end like this; how many
    /// there were.
    async fn flood<P: Iterator<Item = Vec<u8>> + Send + 'static>(
        &mut self,
        pieces: impl Fn() -> P,
        end: Flood,
    ) -> u64 {
        const CALLS: u32 = 20;
        const IN_TIME: Duration = Duration::from_secs(5);
        let address = self.address;
        let answered = Cell::new(0);
        let over = Cell::new(false);
        let calls = async {
            while !over.get() {
                let began = Instant::now();
                self.goes_on().await;
                assert!(began.elapsed() < IN_TIME, "the flood delays another peer by {:?}", began.elapsed());
                answered.set(answered.get() + 1);
            }
        };
        let floods = async {
            let mut floods = 0;
            while floods == 0 || answered.get() < CALLS {
                assert_eq!(flood_once(address, pieces()).await, end);
                floods += 1;
            }
            over.set(true);
            floods
        };
        tokio::join!(floods, calls).0
    }

    /// What was refused since the start.
    fn refused(&self) -> BTreeMap<String, u64> {
        let since = |(reason, count): (String, u64)| {
            let count = count - self.before.get(&reason).copied().unwrap_or(0);
            (count > 0).then_some((reason, count))
        };
        counts().into_iter().filter_map(since).collect()
    }

    /// Exactly this was refused, and nothing else.
    fn has_refused(&self, reason: &str, times: u64) {
        assert_eq!(self.refused(), BTreeMap::from([(reason.to_owned(), times)]));
    }
}

/// A connection that finds a place, however long it takes until one is free.
async fn served(host: u8, to: SocketAddr) {
    let served = async { while !answers(&mut hello(host, to).await, 1).await {} };
    tokio::time::timeout(PATIENCE, served).await.unwrap();
}

#[tokio::test]
async fn one_connection_more_than_allowed_is_closed() {
    let mut scene = Scene::new(|limits| limits.connections = 2).await;
    let mut last = hello(2, scene.address).await;
    assert!(answers(&mut last, 1).await);
    closed_at_once(&mut hello(3, scene.address).await).await;
    scene.has_refused("TOO_MANY_CONNECTIONS", 1);
    scene.goes_on().await;
    assert!(answers(&mut last, 3).await);
    drop(last);
    served(3, scene.address).await;
}

#[tokio::test]
async fn one_connection_more_than_a_peer_may_have_is_closed() {
    let mut scene = Scene::new(|limits| limits.connections_per_peer = 2).await;
    let (mut first, mut second) = (hello(2, scene.address).await, hello(2, scene.address).await);
    assert!(answers(&mut first, 1).await && answers(&mut second, 1).await);
    closed_at_once(&mut hello(2, scene.address).await).await;
    scene.has_refused("TOO_MANY_CONNECTIONS_OF_PEER", 1);
    scene.others_go_on().await;
    assert!(answers(&mut first, 3).await);
    drop(second);
    served(2, scene.address).await;
}

#[tokio::test]
async fn a_slow_preface_ends_its_connection() {
    let mut scene = Scene::new(|limits| limits.preface = Duration::from_millis(200)).await;
    let mut slow = from(2, scene.address).await;
    // A byte now and then does not help.
    let drip = async {
        for byte in PREFACE {
            if slow.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("all of it was taken");
    };
    tokio::time::timeout(PATIENCE, drip).await.unwrap();
    scene.has_refused("SLOW_PREFACE", 1);
    scene.others_go_on().await;
}

#[tokio::test]
async fn a_silent_connection_is_closed() {
    const IDLE: Duration = Duration::from_secs(2);
    let mut scene = Scene::new(|limits| limits.idle = IDLE).await;
    let mut silent = hello(2, scene.address).await;
    assert!(answers(&mut silent, 1).await);
    let began = Instant::now();
    let over = Cell::new(false);
    let talks = async {
        while !over.get() {
            scene.goes_on().await;
            tokio::time::sleep(IDLE / 40).await;
        }
    };
    let is_silent = async {
        closed(&mut silent).await;
        over.set(true);
    };
    tokio::join!(is_silent, talks);
    assert!(began.elapsed() >= IDLE * 9 / 10, "{:?}", began.elapsed());
    scene.has_refused("IDLE_CONNECTION", 1);
    scene.others_go_on().await;
}

#[tokio::test]
async fn one_stream_more_than_allowed_is_refused() {
    const REFUSED_STREAM: u32 = 7;
    let mut scene = Scene::new(|limits| limits.streams_per_connection = 4).await;
    let mut stream = hello(2, scene.address).await;
    // What the limit is, the server says first; from its acknowledgement on it holds.
    stream.write_all(&frame(SETTINGS, 1, 0, &[])).await.unwrap();
    let said = read_until(&mut stream, |kind, _, payload| {
        let mut settings = payload.chunks_exact(6);
        (kind == SETTINGS).then(|| settings.find(|s| s[..2] == [0, 3]).map(|s| code(2, s)))?
    });
    assert_eq!(said.await, Some(4));
    for id in [1, 3, 5, 7, 9] {
        stream.write_all(&frame(HEADERS, 5, id, &block("/test.Test/Never", &[]))).await.unwrap();
    }
    let refused =
        read_until(&mut stream, |kind, id, payload| (kind == RST_STREAM).then(|| (id, code(0, payload))));
    assert_eq!(refused.await, Some((9, REFUSED_STREAM)));
    scene.has_refused("REFUSED_STREAM", 1);
    scene.others_go_on().await;
    // One that its client gives up makes room on the same connection.
    stream.write_all(&frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes())).await.unwrap();
    assert!(answers(&mut stream, 11).await);
}

#[tokio::test]
async fn calls_beyond_those_that_a_peer_may_make_wait() {
    const BURST: u32 = 10;
    const EVERY: Duration = Duration::from_millis(50);
    let mut scene =
        Scene::new(|limits| (limits.calls_per_peer, limits.calls_burst_per_peer) = (20, BURST)).await;
    let mut streams = [hello(2, scene.address).await, hello(2, scene.address).await];
    let began = Instant::now();
    let calls: Vec<u8> = (0..BURST)
        .flat_map(|number| frame(HEADERS, 5, 2 * number + 1, &block("/test.Test/Call", &[])))
        .collect();
    for stream in &mut streams {
        stream.write_all(&calls).await.unwrap();
    }
    let [first, second] = &mut streams;
    let answered = async |stream: &mut TcpStream| {
        let mut left = BURST;
        let answers = read_until(stream, |kind, _, _| {
            left -= u32::from(kind == HEADERS);
            (left == 0).then_some(())
        });
        answers.await.unwrap();
    };
    // With the one that it has made, fewer calls than it may make at once.
    let others = async {
        for _ in 0..BURST - 2 {
            scene.goes_on().await;
        }
    };
    tokio::join!(answered(first), answered(second), others);
    assert!(began.elapsed() >= EVERY * BURST, "{:?}", began.elapsed());
    // Those that had to wait, but for one whose turn had come when it was looked at: none of another peer, which goes on all the same.
    let refused = scene.refused();
    assert!(refused.keys().eq(["TOO_MANY_CALLS_OF_PEER"]), "{refused:?}");
    assert!(refused.values().all(|times| (1..=u64::from(BURST)).contains(times)), "{refused:?}");
    scene.others_go_on().await;
}

/// Each takes some work, and carries nothing.
#[tokio::test]
async fn frames_beyond_those_that_a_peer_may_send_wait() {
    const BURST: u32 = 30;
    const EVERY: Duration = Duration::from_millis(20);
    const UNKNOWN: u8 = 0xfa;
    for of_no_use in [
        frame(PING, 1, 0, &[7; 8]),
        frame(SETTINGS, 0, 0, &[]),
        frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes()),
        frame(UNKNOWN, 0, 0, &[0; 5000]),
        frame(DATA, 0, 1, b"x"),
    ] {
        let mut scene =
            Scene::new(|limits| (limits.frames_per_peer, limits.frames_burst_per_peer) = (50, BURST)).await;
        let began = Instant::now();
        let mut streams = [hello(2, scene.address).await, hello(2, scene.address).await];
        let open = frame(HEADERS, 4, 1, &block("/test.Test/Never", &[]));
        let last = frame(PING, 0, 0, &[9; 8]);
        let sent = [open, of_no_use.repeat(BURST as usize), last].concat();
        for stream in &mut streams {
            stream.write_all(&sent).await.unwrap();
        }
        let [first, second] = &mut streams;
        let taken = async |stream: &mut TcpStream| {
            let last = |kind, _, payload: &[u8]| (kind == PING && payload == [9; 8]).then_some(());
            read_until(stream, last).await.unwrap();
        };
        // Each has no body, so with its hello it has sent three frames, or four.
        let others = async {
            for _ in 0..BURST / 4 {
                scene.goes_on().await;
            }
        };
        tokio::join!(taken(first), taken(second), others);
        assert!(began.elapsed() >= EVERY * BURST, "{:?}", began.elapsed());
        let refused = scene.refused();
        assert!(refused.keys().eq(["TOO_MANY_FRAMES_OF_PEER"]), "{refused:?}");
        // What a hello and its end have is not a burst.
        assert!(refused.values().all(|times| (1..=u64::from(BURST + 10)).contains(times)), "{refused:?}");
        scene.others_go_on().await;
    }
}

/// However small the chunks are: what carries data pays for the frames that come with it.
#[tokio::test]
async fn frames_with_data_pay_for_as_many_without() {
    const FRAMES: usize = 500;
    let scene = Scene::new(|limits| (limits.frames_per_peer, limits.frames_burst_per_peer) = (1, 20)).await;
    for (len, waits) in [(4096, false), (4095, true)] {
        let (mut from_server, mut to_server) = hello(2, scene.address).await.into_split();
        // The windows of the server hold once its settings are acknowledged.
        read_until(&mut from_server, |kind, _, _| (kind == SETTINGS).then_some(())).await.unwrap();
        to_server.write_all(&frame(SETTINGS, 1, 0, &[])).await.unwrap();
        let open = frame(HEADERS, 4, 1, &block("/test.Test/Never", &[]));
        let pair = [frame(DATA, 0, 1, &[1; 60]), frame(DATA, 0, 1, &vec![1; len])].concat();
        let sending = tokio::spawn(async move {
            let sent = [open, pair.repeat(FRAMES), frame(PING, 0, 0, &[9; 8])].concat();
            to_server.write_all(&sent).await.map(|()| to_server)
        });
        let last = |kind, _, payload: &[u8]| (kind == PING && payload == [9; 8]).then_some(());
        if waits {
            let early =
                tokio::time::timeout(Duration::from_secs(2), read_until(&mut from_server, last)).await;
            assert!(early.is_err(), "{len}: 980 s have gone");
            assert!(scene.refused().contains_key("TOO_MANY_FRAMES_OF_PEER"));
        } else {
            read_until(&mut from_server, last).await.unwrap();
            assert_eq!(scene.refused(), BTreeMap::new());
        }
        sending.abort();
    }
}

#[tokio::test]
async fn large_headers_are_refused_on_their_stream_alone() {
    // hyper's own default is the same as ours.
    let mut scene = Scene::new(|limits| limits.header_bytes = 4 << 10).await;
    let mut stream = hello(2, scene.address).await;
    let value = "x".repeat(3_000);
    // Never answered once it is let in.
    let large = block("/test.Test/Never", &[("a", &value), ("b", &value)]);
    stream.write_all(&frame(HEADERS, 5, 1, &large)).await.unwrap();
    let answer = read_until(&mut stream, |kind, id, payload| match kind {
        HEADERS if id == 1 => Some(payload.to_vec()),
        RST_STREAM | GOAWAY => panic!("{payload:?}"),
        _ => None,
    });
    // `:status` (the 8th name of HPACK's table) with a literal of three bytes: 431 by Huffman's code.
    assert_eq!(answer.await.as_deref(), Some(&[0x48, 0x83, 0x69, 0x90, 0xff][..]));
    const REASON: &str = "REQUEST_HEADER_FIELDS_TOO_LARGE";
    scene.has_refused(REASON, 1);
    scene.others_go_on().await;
    assert!(answers(&mut stream, 3).await, "the connection goes on");
    // Each is counted, although it is written otherwise than the first, and no answer between them.
    for call in 1..4 {
        let id = call * 4 + 1;
        stream.write_all(&frame(HEADERS, 5, id, &large)).await.unwrap();
        let answer = read_until(&mut stream, |kind, of, payload| {
            (kind == HEADERS && of == id).then_some(payload.len())
        });
        assert_eq!(answer.await, Some(1), "it is in the table");
        scene.has_refused(REASON, u64::from(call) + 1);
        assert!(answers(&mut stream, id + 2).await);
        scene.has_refused(REASON, u64::from(call) + 1);
    }
}

#[tokio::test]
async fn far_too_large_headers_end_their_connection() {
    let mut scene = Scene::new(|limits| limits.header_bytes = 4 << 10).await;
    let mut stream = hello(2, scene.address).await;
    let field = fields(&[("a", "x".repeat(3_000).as_str())]);
    // Put into HPACK's table, and then said again by its index there, which is a byte.
    let again = [&[0x40][..], &field[1..], &[0x80 | 62; 20]].concat();
    stream.write_all(&frame(HEADERS, 5, 1, &[block("/test.Test/Never", &[]), again].concat())).await.unwrap();
    assert_eq!(gone_away(&mut stream).await, Some(ENHANCE_YOUR_CALM));
    scene.has_refused("ENHANCE_YOUR_CALM", 1);
    scene.others_go_on().await;
    // A frame that is far too large is not even read.
    let mut stream = hello(2, scene.address).await;
    let large = block("/test.Test/Never", &[("a", "x".repeat(8_200).as_str())]);
    stream.write_all(&frame(HEADERS, 5, 1, &large)).await.unwrap();
    closed(&mut stream).await;
    scene.has_refused("ENHANCE_YOUR_CALM", 2);
    scene.others_go_on().await;
}

#[tokio::test]
async fn a_frame_larger_than_allowed_ends_its_connection() {
    const FRAME_SIZE_ERROR: u32 = 6;
    let mut scene = Scene::new(|_| {}).await;
    for (over, expected) in [(0, None), (1, Some(FRAME_SIZE_ERROR))] {
        let mut stream = hello(2, scene.address).await;
        stream.write_all(&frame(HEADERS, 4, 1, &block("/test.Test/Never", &[]))).await.unwrap();
        let (mut from_server, mut to_server) = stream.split();
        // It is refused by its head; the rest may find nobody.
        let data = frame(DATA, 0, 1, &vec![0; FRAME_SIZE as usize + over]);
        let send = async {
            let _ = to_server.write_all(&[data, frame(PING, 0, 0, &[9; 8])].concat()).await;
        };
        let answer = read_until(&mut from_server, |kind, _, payload| match kind {
            GOAWAY => Some(Some(code(4, payload))),
            PING if payload == [9; 8] => Some(None),
            _ => None,
        });
        let (answer, ()) = tokio::join!(answer, send);
        assert_eq!(answer, Some(expected), "{over} bytes more");
    }
    scene.has_refused("FRAME_SIZE_ERROR", 1);
    scene.others_go_on().await;
}

#[tokio::test]
async fn a_header_block_that_never_ends_ends_its_connection() {
    let mut scene = Scene::new(|_| {}).await;
    let pieces = || {
        let piece = fields(&[("a", &"x".repeat(15_000))]);
        let rest = std::iter::repeat_n(frame(CONTINUATION, 0, 1, &piece), 10_000);
        std::iter::once(frame(HEADERS, 0, 1, &block("/x", &[]))).chain(rest)
    };
    // 150 MB of one header block, if they were taken.
    let floods = scene.flood(pieces, Flood::GoneAway(ENHANCE_YOUR_CALM)).await;
    scene.has_refused("ENHANCE_YOUR_CALM", floods);
    scene.others_go_on().await;
}

/// Nobody reads what comes for the stream.
#[tokio::test]
async fn one_unread_frame_of_little_data_more_than_allowed_ends_its_connection() {
    let of_one_byte = CONNECTION_WINDOW as usize / 2 / 255;
    for (data, most) in [(&[][..], 100), (&[7][..], of_one_byte)] {
        for over in [0, 1] {
            let mut scene = Scene::new(|_| {}).await;
            let mut stream = hello(2, scene.address).await;
            stream.write_all(&frame(HEADERS, 4, 1, &block("/test.Test/Never", &[]))).await.unwrap();
            stream.write_all(&frame(DATA, 0, 1, data).repeat(most + over)).await.unwrap();
            if over == 0 {
                assert!(answers(&mut stream, 3).await, "{most} frames of {data:?}");
                assert_eq!(scene.refused(), BTreeMap::new());
            } else {
                assert_eq!(gone_away(&mut stream).await, Some(ENHANCE_YOUR_CALM), "{most} and one");
                scene.has_refused("ENHANCE_YOUR_CALM", 1);
            }
            scene.others_go_on().await;
        }
    }
}

/// Streams that their client resets as soon as it has opened them.
fn resets(numbers: std::ops::Range<u32>) -> Vec<u8> {
    let reset = |number| {
        let id = number * 2 + 1;
        let open = frame(HEADERS, 5, id, &block("/test.Test/Never", &[]));
        [open, frame(RST_STREAM, 0, id, &8_u32.to_be_bytes())].concat()
    };
    numbers.flat_map(reset).collect()
}

#[tokio::test]
async fn rapid_resets_end_their_connection() {
    // However many calls and frames that are.
    let unlimited = |limits: &mut ConnectionLimits| {
        (limits.calls_per_peer, limits.frames_per_peer) = (u32::MAX, u32::MAX);
    };
    let mut scene = Scene::new(unlimited).await;
    // Written in large pieces, as an attacker would.
    let pieces = || (0..400).map(|piece| resets(piece * 500..(piece + 1) * 500));
    let floods = scene.flood(pieces, Flood::GoneAway(ENHANCE_YOUR_CALM)).await;
    scene.has_refused("ENHANCE_YOUR_CALM", floods);
    scene.others_go_on().await;
}

#[tokio::test]
async fn one_stream_more_than_allowed_is_reset_before_it_is_looked_at() {
    // Ten in one write, so that none of them is looked at before all have come.
    for (pending_resets, ended) in [(10, Flood::Taken), (9, Flood::GoneAway(ENHANCE_YOUR_CALM))] {
        let mut scene = Scene::new(|limits| limits.pending_resets = pending_resets).await;
        let pieces = std::iter::once(resets(0..10));
        assert_eq!(flood_once(scene.address, pieces).await, ended, "{pending_resets}");
        match ended {
            Flood::GoneAway(_) => scene.has_refused("ENHANCE_YOUR_CALM", 1),
            _ => assert_eq!(scene.refused(), BTreeMap::new()),
        }
        scene.others_go_on().await;
    }
}

#[tokio::test]
async fn one_stream_more_than_allowed_is_reset_because_of_errors() {
    let mut scene = Scene::new(|limits| limits.error_resets = 3).await;
    let mut stream = hello(2, scene.address).await;
    for id in [1, 3, 5, 7] {
        // An open stream whose window becomes larger than HTTP/2 allows.
        let open = frame(HEADERS, 5, id, &block("/test.Test/Never", &[]));
        let wrong = frame(WINDOW_UPDATE, 0, id, &0x7fff_ffff_u32.to_be_bytes());
        stream.write_all(&[open, wrong].concat()).await.unwrap();
        let answer = read_until(&mut stream, |kind, of, payload| match kind {
            RST_STREAM if of == id => Some((RST_STREAM, code(0, payload))),
            GOAWAY => Some((GOAWAY, code(4, payload))),
            _ => None,
        });
        let expected = if id < 7 { (RST_STREAM, FLOW_CONTROL_ERROR) } else { (GOAWAY, ENHANCE_YOUR_CALM) };
        assert_eq!(answer.await, Some(expected), "stream {id}");
    }
    scene.has_refused("ENHANCE_YOUR_CALM", 1);
    scene.others_go_on().await;
}

/// Neither is an error to HTTP/2: both are answered, and cost whoever sends them as much.
#[tokio::test]
async fn floods_of_pings_and_settings_are_in_nobodys_way() {
    // Whatever their number.
    let mut scene = Scene::new(|limits| limits.frames_per_peer = u32::MAX).await;
    for kind in [PING, SETTINGS] {
        let one = frame(kind, 0, 0, if kind == PING { &[7; 8] } else { &[] });
        let piece: Vec<u8> = one.iter().copied().cycle().take(one.len() * 1000).collect();
        let pieces = || std::iter::repeat_n(piece.clone(), 200);
        scene.flood(pieces, Flood::Taken).await;
    }
    assert_eq!(scene.refused(), BTreeMap::new());
    scene.others_go_on().await;
}

/// The requests of a client that takes no answers would lie in the buffers of its connection, 16 MiB of them.
#[tokio::test]
async fn requests_whose_answers_nobody_takes_are_not_kept() {
    let scene = Scene::new(|_| {}).await;
    let mut evil = from(5, scene.address).await;
    // SETTINGS_INITIAL_WINDOW_SIZE 0: no room for any answer.
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
    evil.write_all(&[PREFACE, &settings].concat()).await.unwrap();
    let window = i64::from(CONNECTION_WINDOW);
    let mut room = 65_535;
    while room < window {
        let grown = read_until(&mut evil, |kind, id, payload| {
            (kind == WINDOW_UPDATE && id == 0).then(|| i64::from(code(0, payload)))
        });
        room += grown.await.unwrap();
    }
    // Acknowledged, the server's windows of streams are as large as it says.
    evil.write_all(&frame(SETTINGS, 1, 0, &[])).await.unwrap();
    // On four streams what there is room for in all.
    let piece = vec![0; 16 << 10];
    for id in [1, 3, 5, 7] {
        evil.write_all(&frame(HEADERS, 4, id, &block("/test.OneByOne/Call", &[]))).await.unwrap();
        for _ in 0..CONNECTION_WINDOW as usize / 4 / piece.len() {
            evil.write_all(&frame(DATA, 0, id, &piece)).await.unwrap();
        }
    }
    let mut free = 0;
    while free < window / 2 {
        let grown = read_until(&mut evil, |kind, id, payload| {
            assert!(kind != RST_STREAM || code(0, payload) != FLOW_CONTROL_ERROR, "stream {id}");
            (kind == WINDOW_UPDATE && id == 0).then(|| i64::from(code(0, payload)))
        });
        free += grown.await.expect("what was sent is let go of");
    }
}
