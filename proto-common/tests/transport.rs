//! Errors and connections over a real connection on loopback, by way of a client that is generic as the runtimes are.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use proto_common::connect::{Connect, connect_fn};
use proto_common::error::{Code, CommonReason, Error};
use proto_common::{tuning, v1};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use tokio_stream::{Stream, StreamExt as _};
use tonic::body::Body;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

/// What the server does, by the `term` of the request.
const REFUSE: u64 = 0;
const NEVER_ANSWER: u64 = 1;
const ONE_THEN_NOTHING: u64 = 2;
const UNKNOWN: u64 = 3;
const NO_STATUS: u64 = 4;

fn refusal() -> Error {
    Error::new(CommonReason::RangeBusy, "slots 0-5 are moving: \u{fc}ber 100 %")
        .metadata("holder", "migration m1")
        .violation("header.slots", "overlaps 0-5")
        .retry_after(Duration::from_millis(1500))
}

/// Is told when a call arrives that is never answered.
#[derive(Clone)]
struct Handler(Arc<Notify>);

type Fences = Pin<Box<dyn Stream<Item = Result<v1::Fence, Status>> + Send>>;

impl tonic::server::ServerStreamingService<v1::Fence> for Handler {
    type Response = v1::Fence;
    type ResponseStream = Fences;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Fences>, Status>> + Send>>;

    fn call(&mut self, request: Request<v1::Fence>) -> Self::Future {
        let arrived = Arc::clone(&self.0);
        Box::pin(async move {
            match request.into_inner().term {
                NEVER_ANSWER => {
                    arrived.notify_one();
                    std::future::pending().await
                }
                ONE_THEN_NOTHING => {
                    let one = tokio_stream::once(Ok(v1::Fence::default()));
                    Ok(Response::new(Box::pin(one.chain(tokio_stream::pending())) as Fences))
                }
                UNKNOWN => Err(Status::unknown("h2 protocol error")),
                _ => Err(refusal().into()),
            }
        })
    }
}

#[derive(Clone)]
struct Service(Handler);

impl tonic::server::NamedService for Service {
    const NAME: &'static str = "test.Test";
}

impl tonic::codegen::Service<http::Request<Body>> for Service {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let handler = self.0.clone();
        Box::pin(async move {
            if request.uri().path().ends_with(&NO_STATUS.to_string()) {
                let response = http::Response::builder().header("content-type", "application/grpc");
                return Ok(response.body(Body::empty()).unwrap());
            }
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<v1::Fence, v1::Fence>::default());
            Ok(grpc.server_streaming(handler, request).await)
        })
    }
}

/// Ends everything in it when dropped.
struct Network {
    tasks: JoinSet<()>,
    unanswered: Arc<Notify>,
}

impl Network {
    fn new() -> Self {
        Self { tasks: JoinSet::new(), unanswered: Arc::new(Notify::new()) }
    }

    async fn server(&mut self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = tuning::incoming(listener);
        let service = Service(Handler(Arc::clone(&self.unanswered)));
        let server = tuning::tune_server(tonic::transport::Server::builder()).add_service(service);
        self.tasks.spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        address
    }

    /// Passes one connection on, until it is aborted.
    async fn proxy(&mut self, to: SocketAddr) -> (SocketAddr, AbortHandle) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = self.tasks.spawn(async move {
            let (mut inside, _) = listener.accept().await.unwrap();
            let mut outside = TcpStream::connect(to).await.unwrap();
            // A broken connection ends the copy with an error, which is what we are here for.
            let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
        });
        (address, task)
    }
}

/// Written as a runtime would be: nothing but `C: Connect` is known of the transport.
async fn open<C: Connect>(connect: &C, behaviour: u64) -> Result<tonic::Streaming<v1::Fence>, Error> {
    let mut grpc = tonic::client::Grpc::new(connect.connect().await?);
    grpc.ready().await.map_err(|error| {
        let error: Box<dyn std::error::Error + Send + Sync> = error.into();
        Error::new(CommonReason::Unavailable, error.to_string())
    })?;
    let path = PathAndQuery::try_from(format!("/test.Test/{behaviour}")).unwrap();
    let codec = ProstCodec::<v1::Fence, v1::Fence>::default();
    let request = Request::new(v1::Fence { epoch: 0, term: behaviour });
    Ok(grpc.server_streaming(request, path, codec).await?.into_inner())
}

/// The future of a generic runtime can be spawned.
fn spawn_open<C: Connect>(
    connect: C,
    behaviour: u64,
) -> tokio::task::JoinHandle<Result<tonic::Streaming<v1::Fence>, Error>> {
    tokio::spawn(async move { open(&connect, behaviour).await })
}

#[tokio::test]
async fn a_refusal_arrives_as_it_was_meant() {
    let mut network = Network::new();
    let address = network.server().await.to_string();
    let endpoint = tuning::endpoint(&address).unwrap();
    assert_eq!(open(&endpoint, REFUSE).await.unwrap_err(), refusal());

    let by_closure = connect_fn(move || {
        let endpoint = endpoint.clone();
        async move { Connect::connect(&endpoint).await }
    });
    assert_eq!(open(&Arc::new(by_closure), REFUSE).await.unwrap_err(), refusal());
}

#[tokio::test]
async fn a_connection_that_breaks_before_the_answer_is_retryable() {
    let mut network = Network::new();
    let server = network.server().await;
    let (address, proxy) = network.proxy(server).await;
    let call = spawn_open(tuning::endpoint(&address.to_string()).unwrap(), NEVER_ANSWER);
    network.unanswered.notified().await;
    assert!(!call.is_finished());
    proxy.abort();
    let error = call.await.unwrap().unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    assert_eq!(error.reason(), "UNAVAILABLE");
}

#[tokio::test]
async fn a_connection_that_breaks_in_the_stream_is_retryable() {
    let mut network = Network::new();
    let server = network.server().await;
    let (address, proxy) = network.proxy(server).await;
    let mut stream = open(&tuning::endpoint(&address.to_string()).unwrap(), ONE_THEN_NOTHING).await.unwrap();
    assert!(stream.message().await.unwrap().is_some());
    proxy.abort();
    let error = Error::from(stream.message().await.unwrap_err());
    assert!(error.is_retryable(), "{error:?}");
    assert_eq!(error.reason(), "UNAVAILABLE");
}

#[tokio::test]
async fn the_same_words_from_a_server_are_final() {
    let mut network = Network::new();
    let endpoint = tuning::endpoint(&network.server().await.to_string()).unwrap();
    let error = open(&endpoint, UNKNOWN).await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::Unknown, "UNKNOWN"));
    assert!(!error.is_retryable());
}

#[tokio::test]
async fn an_answer_that_was_cut_off_before_its_status_is_retryable() {
    let mut network = Network::new();
    let endpoint = tuning::endpoint(&network.server().await.to_string()).unwrap();
    let mut stream = open(&endpoint, NO_STATUS).await.unwrap();
    let error = Error::from(stream.message().await.unwrap_err());
    assert_eq!(error.code(), Code::Unknown);
    assert!(error.is_retryable(), "{error:?}");
}

#[tokio::test]
async fn nobody_listens() {
    // Bound and closed again: nobody else gets this port so soon.
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let error = Connect::connect(&tuning::endpoint(&address).unwrap()).await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::Unavailable, "UNAVAILABLE"));
    assert_eq!(error.get("address"), Some(&*address));
    assert!(error.message().contains("refused"), "{error}");
}

#[tokio::test]
async fn accepted_connections_do_not_wait_for_delayed_acknowledgements() {
    async fn nodelay<I>(
        address: SocketAddr,
        mut incoming: impl Stream<Item = std::io::Result<I>> + Unpin,
        of: impl Fn(&I) -> &TcpStream,
    ) -> bool {
        let (client, accepted) = tokio::join!(TcpStream::connect(address), incoming.next());
        client.unwrap();
        of(&accepted.unwrap().unwrap()).nodelay().unwrap()
    }
    let listener = async || {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        (listener.local_addr().unwrap(), listener)
    };
    // The kernel's default, so that the other one says something.
    let (address, plain) = listener().await;
    assert!(!nodelay(address, tonic::transport::server::TcpIncoming::from(plain), |stream| stream).await);
    let (address, tuned) = listener().await;
    assert!(nodelay(address, tuning::incoming(tuned), |limited| limited.get_ref()).await);
}

/// Nobody accepts, so each connection needs room that waits; one without would come again for ever.
#[tokio::test]
async fn many_connections_may_wait_to_be_accepted() {
    const CONNECTIONS: usize = 300;
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn");
    if most.is_ok_and(|most| most.trim().parse::<usize>().unwrap() < CONNECTIONS) {
        return eprintln!("SKIPPED: the system lets fewer than {CONNECTIONS} wait");
    }
    let listener = tuning::listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let mut open = Vec::new();
    for number in 0..CONNECTIONS {
        let connecting = tokio::time::timeout(Duration::from_secs(20), TcpStream::connect(address));
        open.push(connecting.await.unwrap_or_else(|_| panic!("connection {number} found no room")).unwrap());
    }
    // The address is another's while it is held, and free right after.
    assert_eq!(tuning::listen(address).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    drop((listener, open));
    tuning::listen(address).unwrap();
}

/// What h2 keeps of a header block is as large as the longest frame before it makes it, a hundred times for each connection, and it is the server that sends both.
#[tokio::test]
async fn a_client_takes_no_long_frames() {
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;
    const UNKNOWN: u8 = 0xfa;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = tuning::endpoint(&listener.local_addr().unwrap().to_string()).unwrap();
    for (over, answer) in [(0, PING), (1, GOAWAY)] {
        let connecting = tokio::spawn({
            let endpoint = endpoint.clone();
            async move { endpoint.connect().await.unwrap() }
        });
        let (mut server, _) = listener.accept().await.unwrap();
        server.read_exact(&mut [0; 24]).await.unwrap();
        let [_, a, b, c] = (tuning::ANSWER_FRAME_SIZE + over).to_be_bytes();
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let long =
            [&[a, b, c, UNKNOWN, 0, 0, 0, 0, 0][..], &[0; (16 << 10) + 1][..(16 << 10) + over as usize]];
        let ping = [0, 0, 8, PING, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        server.write_all(&[&settings[..], &long.concat(), &ping].concat()).await.unwrap();
        let answered = async {
            loop {
                let mut head = [0; 9];
                server.read_exact(&mut head).await.unwrap();
                let mut payload = vec![0; usize::from(head[2]) | usize::from(head[1]) << 8];
                server.read_exact(&mut payload).await.unwrap();
                if matches!(head[3], PING | GOAWAY) {
                    break head[3];
                }
            }
        };
        let answered = tokio::time::timeout(Duration::from_secs(60), answered).await.unwrap();
        assert_eq!(answered, answer, "{over}");
        drop(connecting.await.unwrap());
    }
}
