//! Whatever a peer answers to the one that watches it, the watcher goes on: what it tells of the peer is one of the states that there are, short and
//! printable, and an answer of another node than the one that was asked for counts for nothing.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use arbitrary::Unstructured;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, StreamBody};
use prost::Message as _;
use proto_common::connect::connect_fn;
use proto_common::error::Error;
use proto_common::ids::NodeId;
use proto_common::v1::NodeIdentity;
use proto_health::client::{Heartbeats, MonitorOptions, PeerChange, PeerMonitor, Told};
use proto_health::v1::{
    GetNodeStatusResponse, HealthCheckResponse, HealthReport, NodeStatus, PeerState, PeerStatus, ReplyOrigin,
    WatchHealthResponse,
};
use tokio::runtime::Builder;
use tokio_stream::StreamExt as _;
use tonic::body::Body;
use tonic::codegen::http;

use crate::harness::panics;

/// How long the peer is watched, by a clock that does not wait.
const WATCHED: Duration = Duration::from_secs(30);
/// Answers that one input makes; then the peer says nothing any more.
const ANSWERS: usize = 64;
/// Longest text that is shown of a peer, in bytes.
const SHOWN: usize = 1024;

/// What the peer says, one after the other.
#[derive(Debug)]
struct Script {
    answers: std::vec::IntoIter<Say>,
    /// Whoever it claimed to be so far, as far as that can be read.
    claimed: Vec<NodeIdentity>,
}

/// An answer that any method may get.
#[derive(Debug, Clone)]
struct Say {
    origin: ReplyOrigin,
    health: HealthReport,
    last_frame: bool,
    peers: Vec<PeerStatus>,
    next_page_token: String,
    /// Before it.
    pause: Duration,
    /// Instead of what it means: these bytes, as a message or as they are.
    raw: Option<(bool, Vec<u8>)>,
    /// How it is spoilt: a byte, and what is changed in it.
    spoilt: Option<(u16, u8)>,
}

impl Say {
    fn from(data: &mut Unstructured<'_>) -> arbitrary::Result<Self> {
        let names = ["n2", "n2", "n2", "n3", "", "../n2", "n2\u{1b}[2J", "n\u{202e}2"];
        let node_id = match data.int_in_range(0..=9_u8)? {
            9 => "x".repeat(usize::from(data.arbitrary::<u16>()?)),
            at => names.get(usize::from(at)).copied().unwrap_or("n2").to_owned(),
        };
        let identity = NodeIdentity {
            node_id,
            incarnation: if data.ratio(1_u8, 8)? { data.arbitrary()? } else { data.int_in_range(0..=3)? },
            store_id: vec![data.int_in_range(0..=1)?; if data.ratio(1_u8, 8)? { 1000 } else { 16 }].into(),
            ..NodeIdentity::default()
        };
        let origin = ReplyOrigin {
            identity: (!data.ratio(1_u8, 16)?).then_some(identity),
            sequence: data.arbitrary::<u8>()?.into(),
            state: if data.ratio(1_u8, 8)? { data.arbitrary()? } else { data.int_in_range(0..=4)? },
            ..ReplyOrigin::default()
        };
        let peer = PeerStatus {
            node_id: (if data.ratio(1_u8, 2)? { "n1" } else { "n4" }).to_owned(),
            state: data.int_in_range(-1..=6)?,
            last_heard_from_unix_ms: data.arbitrary()?,
            ..PeerStatus::default()
        };
        let raw = if data.ratio(1_u8, 8)? {
            let len = data.int_in_range(0..=64)?;
            Some((data.arbitrary()?, data.bytes(data.len().min(len))?.to_vec()))
        } else {
            None
        };
        let spoilt = if data.ratio(1_u8, 8)? { Some(data.arbitrary()?) } else { None };
        Ok(Self {
            origin,
            health: HealthReport { status: data.int_in_range(-1..=5)?, ..HealthReport::default() },
            last_frame: data.ratio(1_u8, 16)?,
            peers: vec![peer; data.int_in_range(0..=2)?],
            next_page_token: (if data.ratio(1_u8, 2)? { "more" } else { "" }).to_owned(),
            pause: Duration::from_millis(data.int_in_range(0..=1000)?),
            raw,
            spoilt,
        })
    }

    /// As the body of an answer to `path`.
    fn body(self, path: &str) -> Bytes {
        let (origin, health) = (Some(self.origin), Some(self.health));
        let meant = if path.ends_with("/WatchHealth") {
            WatchHealthResponse { origin, health, last_frame: self.last_frame }.encode_to_vec()
        } else if path.ends_with("/HealthCheck") {
            HealthCheckResponse { origin, health }.encode_to_vec()
        } else {
            let status = NodeStatus { peers: self.peers, ..NodeStatus::default() };
            let next_page_token = self.next_page_token;
            GetNodeStatusResponse { origin, status: Some(status), next_page_token }.encode_to_vec()
        };
        let (framed, mut message) = self.raw.unwrap_or((true, meant));
        if let Some((at, change)) = self.spoilt
            && !message.is_empty()
        {
            let at = usize::from(at) % message.len();
            message[at] ^= change;
        }
        if !framed {
            return message.into();
        }
        let len = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[0], &len[..], &message].concat().into()
    }
}

/// The peer, in this process.
#[derive(Debug, Clone)]
struct Peer(Arc<Mutex<Script>>);

impl Peer {
    /// The next answer to `path`; whoever it claims to be is noted.
    fn next(&self, path: &str) -> Option<(Duration, Bytes)> {
        let mut script = self.0.lock().unwrap();
        let say = script.answers.next()?;
        let pause = say.pause;
        let body = say.body(path);
        let message = body.get(5..).unwrap_or_default();
        let origin = if path.ends_with("/WatchHealth") {
            WatchHealthResponse::decode(message).map(|answer| answer.origin)
        } else if path.ends_with("/HealthCheck") {
            HealthCheckResponse::decode(message).map(|answer| answer.origin)
        } else {
            GetNodeStatusResponse::decode(message).map(|answer| answer.origin)
        };
        script.claimed.extend(origin.ok().flatten().and_then(|origin| origin.identity));
        Some((pause, body))
    }
}

impl Peer {
    /// Whether the node may be taken for one that started earlier than it said: it has another disk, or has said so several times.
    fn may_be_set_back(&self, status: &PeerStatus) -> bool {
        /// As many times.
        const OLDER: usize = 4;
        let script = self.0.lock().unwrap();
        let said = script.claimed.iter().filter(|identity| identity.node_id == status.node_id);
        let later = said.clone().filter(|identity| identity.incarnation > status.incarnation);
        let with_another_disk = |identity: &NodeIdentity| {
            identity.incarnation == status.incarnation
                && later.clone().any(|later| later.store_id != identity.store_id)
        };
        let highest = later.clone().map(|identity| identity.incarnation).max().unwrap_or(0);
        said.clone().any(with_another_disk)
            || said.filter(|identity| identity.incarnation < highest).count() >= OLDER
    }
}

impl tonic::client::GrpcService<Body> for Peer {
    type ResponseBody = Body;
    type Error = Infallible;
    type Future = Ready<Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (peer, path) = (self.clone(), request.uri().path().to_owned());
        let body = if path.ends_with("/WatchHealth") {
            let frames = tokio_stream::iter(std::iter::from_fn(move || peer.next(&path)));
            let frames = frames.then(|(pause, body)| async move {
                tokio::time::sleep(pause).await;
                Ok::<_, Infallible>(http_body::Frame::data(body))
            });
            Body::new(StreamBody::new(frames))
        } else {
            let answer = peer.next(&path).map_or_else(Bytes::new, |(_, body)| body);
            Body::new(Full::new(answer).with_trailers(ready(Some(Ok(well())))))
        };
        ready(Ok(http::Response::builder().header("content-type", "application/grpc").body(body).unwrap()))
    }
}

/// The trailers of a call that ends well.
fn well() -> http::HeaderMap {
    http::HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        http::HeaderValue::from_static("0"),
    )])
}

/// Watches a peer that answers as `data` says; the first byte says how it is watched, and whether it has to be `n2`.
pub fn run(data: &[u8]) {
    let (&how, data) = data.split_first().unwrap_or((&0, &[]));
    let mut data = Unstructured::new(data);
    let mut answers = Vec::new();
    while answers.len() < ANSWERS && !data.is_empty() {
        answers.extend(Say::from(&mut data));
    }
    let script = Script { answers: answers.into_iter(), claimed: Vec::new() };
    let before = panics();
    // One of its own, whose clock goes on when there is nothing to do.
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(watch(how, Peer(Arc::new(Mutex::new(script)))));
    drop(runtime);
    assert_eq!(panics(), before, "a task panicked");
}

async fn watch(how: u8, peer: Peer) {
    let mut options = MonitorOptions::default();
    options.heartbeats = if how & 1 == 0 { Heartbeats::Watch } else { Heartbeats::Poll };
    options.opinions_interval = Some(Duration::from_secs(1));
    let expected = (how & 2 == 0).then(|| NodeId::new("n2").unwrap());
    let monitor = PeerMonitor::start(NodeId::new("n1").unwrap(), options);
    let mut events = monitor.events();
    let channel = peer.clone();
    monitor
        .add("peer", expected.clone(), connect_fn(move || ready(Ok::<_, Error>(channel.clone()))))
        .unwrap();
    let began = tokio::time::Instant::now();
    let mut state = PeerState::WarmingUp;
    let mut last = 0;
    while began.elapsed() < WATCHED {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let [status] = &monitor.statuses()[..] else { panic!("one peer is watched") };
        let reach = monitor.reach();
        judge(status, expected.as_ref(), &peer);
        assert_eq!((reach[0].state, reach[0].address.as_str()), (status.state(), "peer"));
        assert!(
            expected.is_none() || status.incarnation >= last || peer.may_be_set_back(status),
            "{status:?} after {last}"
        );
        last = status.incarnation;
        while let Ok(Some(told)) = tokio::time::timeout(Duration::ZERO, events.next()).await {
            let Told::Event(event) = told else { panic!("few events: {told:?}") };
            shown(&event.reason);
            if let PeerChange::State { from, to } = event.change {
                assert_eq!(from, state, "{event:?}");
                state = to;
            }
        }
        assert_eq!(state, status.state(), "every change is told");
    }
    monitor.stop().await;
}

/// A text for people.
fn shown(text: &str) {
    assert!(text.len() <= SHOWN, "{} bytes", text.len());
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

fn judge(status: &PeerStatus, expected: Option<&NodeId>, peer: &Peer) {
    shown(&status.message);
    let known = PeerState::try_from(status.state).expect("a state that there is");
    assert_ne!(known, PeerState::Unspecified, "{status:?}");
    let numbers = [status.phi, status.heartbeat_mean_ms, status.round_trip_ms].into_iter().flatten();
    assert!(numbers.into_iter().all(|number| number.is_finite() && number >= 0.0), "{status:?}");
    let script = peer.0.lock().unwrap();
    // Who answered, of those that it may be: whoever is known has said so.
    let mut believable = script.claimed.iter().filter(|identity| {
        expected.map_or_else(|| NodeId::new(&identity.node_id).is_ok(), |id| identity.node_id == id.as_str())
    });
    if status.last_reply_unix_ms.is_none() {
        assert_eq!(status.incarnation, 0, "{status:?}");
        assert_eq!(status.node_id, expected.map_or("", NodeId::as_str), "{status:?}");
        assert!(matches!(known, PeerState::WarmingUp | PeerState::Suspect | PeerState::Dead), "{status:?}");
    } else {
        let said = |identity: &NodeIdentity| {
            (&identity.node_id, identity.incarnation) == (&status.node_id, status.incarnation)
        };
        assert!(believable.any(said), "{status:?} of {:?}", script.claimed);
    }
}
