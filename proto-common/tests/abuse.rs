//! Peers that abuse connections and HTTP/2, spoken to byte by byte: each is stopped, counted, and in nobody else's way.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test fails by panicking")]

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::task::{Context, Poll};
use std::time::Duration;

use proto_common::limits::ConnectionLimits;
use proto_common::refusals::count_of;
use proto_common::tuning::{incoming_within, tune_server_within};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};

const PATIENCE: Duration = Duration::from_secs(20);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
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

async fn serve(limits: ConnectionLimits) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tune_server_within(tonic::transport::Server::builder(), &limits).add_service(Refuse);
    tokio::spawn(server.serve_with_incoming(incoming_within(listener, limits)));
    address
}

/// A connection from an address of its own on loopback.
async fn from(host: u8, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
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

/// A header block of literals without indexing; `more` are extra fields.
fn block(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let base = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "n")];
    let rest = [("content-type", "application/grpc"), ("te", "trailers")];
    let mut block = Vec::new();
    for (name, value) in base.iter().chain(&rest).chain(more) {
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
    stream: &mut TcpStream,
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

/// Sends the pieces until the connection breaks or all are sent, while another peer's calls are answered; how it ended.
async fn flood(address: SocketAddr, pieces: impl Iterator<Item = Vec<u8>> + Send + 'static) -> Option<u32> {
    let mut other = hello(2, address).await;
    assert!(answers(&mut other, 1).await);
    let stream = hello(3, address).await;
    let (mut from_server, mut to_server) = stream.into_split();
    let sending = tokio::spawn(async move {
        for piece in pieces {
            if to_server.write_all(&piece).await.is_err() {
                break;
            }
        }
        to_server
    });
    let mut said = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    let mut ended = None;
    let end = tokio::time::Instant::now() + Duration::from_secs(5);
    while let Ok(Ok(read)) = tokio::time::timeout_at(end, from_server.read(&mut buffer)).await {
        if read == 0 {
            break;
        }
        said.extend_from_slice(&buffer[..read]);
        while said.len() >= 9 {
            let len = u32::from_be_bytes([0, said[0], said[1], said[2]]) as usize;
            if said.len() < 9 + len {
                break;
            }
            if said[3] == GOAWAY {
                ended = Some(code(13, &said[..9 + len]));
            }
            said.drain(..9 + len);
        }
        if ended.is_some() {
            break;
        }
    }
    sending.abort();
    assert!(answers(&mut other, 3).await, "another peer is in the way of the flood");
    ended
}

#[tokio::test]
async fn more_connections_than_allowed_are_closed_and_others_go_on() {
    let mut limits = ConnectionLimits::default();
    limits.connections = 3;
    limits.connections_per_peer = 2;
    let address = serve(limits).await;
    let before = (count_of("TOO_MANY_CONNECTIONS"), count_of("TOO_MANY_CONNECTIONS_OF_PEER"));
    let mut first = hello(2, address).await;
    assert!(answers(&mut first, 1).await);
    let mut second = hello(2, address).await;
    assert!(answers(&mut second, 1).await);
    closed(&mut hello(2, address).await).await;
    assert_eq!(count_of("TOO_MANY_CONNECTIONS_OF_PEER"), before.1 + 1);
    let mut other = hello(3, address).await;
    assert!(answers(&mut other, 1).await, "the quota of one peer is not another's");
    closed(&mut hello(4, address).await).await;
    assert_eq!(count_of("TOO_MANY_CONNECTIONS"), before.0 + 1);
    assert!(answers(&mut first, 3).await);
    // A place comes free with a connection.
    drop(second);
    let again = async {
        loop {
            let mut again = hello(2, address).await;
            if answers(&mut again, 1).await {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, again).await.unwrap();
}

#[tokio::test]
async fn a_slow_preface_and_a_silent_connection_are_closed() {
    let mut limits = ConnectionLimits::default();
    limits.preface = Duration::from_millis(200);
    limits.idle = Duration::from_millis(600);
    let address = serve(limits).await;
    let before = (count_of("SLOW_PREFACE"), count_of("IDLE_CONNECTION"));
    let mut slow = from(2, address).await;
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
    assert_eq!(count_of("SLOW_PREFACE"), before.0 + 1);
    let mut silent = hello(2, address).await;
    assert!(answers(&mut silent, 1).await);
    closed(&mut silent).await;
    assert_eq!(count_of("IDLE_CONNECTION"), before.1 + 1);
}

#[tokio::test]
async fn more_streams_than_allowed_are_refused() {
    const REFUSED_STREAM: u32 = 7;
    let mut limits = ConnectionLimits::default();
    limits.streams_per_connection = 4;
    let address = serve(limits).await;
    let mut stream = hello(2, address).await;
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
}

#[tokio::test]
async fn large_headers_are_refused_on_their_stream_alone() {
    let address = serve(ConnectionLimits::default()).await;
    let mut stream = hello(2, address).await;
    let value = "x".repeat(15_000);
    // Two of them are more than 16 KiB, and fit into one frame of ours.
    let large = block("/test.Test/Call", &[("a", &value), ("b", &value)]);
    stream.write_all(&frame(HEADERS, 5, 1, &large)).await.unwrap();
    let refused = read_until(&mut stream, |kind, id, payload| match kind {
        // `:status 431` is no entry of HPACK's table, so its digits are Huffman-coded or plain: that it ends the stream is what counts.
        HEADERS | RST_STREAM if id == 1 => Some(()),
        GOAWAY => panic!("{payload:?}"),
        _ => None,
    });
    assert!(refused.await.is_some());
    assert!(answers(&mut stream, 3).await, "the connection goes on");
}

#[tokio::test]
async fn a_header_block_that_never_ends_ends_its_connection() {
    let address = serve(ConnectionLimits::default()).await;
    let piece = block("/x", &[("a", &"x".repeat(15_000))]);
    let first = frame(HEADERS, 0, 1, &piece);
    let rest = std::iter::repeat_n(frame(CONTINUATION, 0, 1, &piece), 10_000);
    let ended = flood(address, std::iter::once(first).chain(rest)).await;
    assert!(ended.is_some(), "150 MB of one header block were taken");
}

#[tokio::test]
async fn rapid_resets_end_their_connection() {
    let address = serve(ConnectionLimits::default()).await;
    let reset = (0..200_000_u32).map(|number| {
        let id = number * 2 + 1;
        let open = frame(HEADERS, 5, id, &block("/test.Test/Never", &[]));
        [open, frame(RST_STREAM, 0, id, &8_u32.to_be_bytes())].concat()
    });
    // Written in large pieces, as an attacker would.
    let pieces = reset.collect::<Vec<_>>().chunks(500).map(<[_]>::concat).collect::<Vec<_>>();
    assert_eq!(flood(address, pieces.into_iter()).await, Some(ENHANCE_YOUR_CALM));
}

/// Neither is an error to HTTP/2: both are answered, and cost whoever sends them as much.
#[tokio::test]
async fn floods_of_pings_and_settings_are_in_nobodys_way() {
    let address = serve(ConnectionLimits::default()).await;
    for kind in [PING, SETTINGS] {
        let one = frame(kind, 0, 0, if kind == PING { &[7; 8] } else { &[] });
        let piece: Vec<u8> = one.iter().copied().cycle().take(one.len() * 1000).collect();
        let _ = flood(address, std::iter::repeat_n(piece, 200)).await;
    }
}
