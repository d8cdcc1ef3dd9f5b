//! `PeerMonitor` over real processes: paused, killed, restarted, drained, cut off in one direction.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proto_common::clock::now_unix_ms;
use proto_common::ids::NodeId;
use proto_common::tuning::{endpoint, tune_server};
use proto_common::v1::NodeIdentity;
use proto_health::HealthRegistry;
use proto_health::client::{
    Heartbeats, MonitorOptions, PeerChange, PeerEvent, PeerEvents, PeerMonitor, Told,
};
use proto_health::limits::MAX_HEARTBEAT_BYTES;
use proto_health::server::{Facts, FactsFuture, NodeFacts, Sections};
use proto_health::v1::health_service_server::{HealthService, HealthServiceServer};
use proto_health::v1::{
    ActiveTask, ComponentHealth, GetNodeStatusRequest, GetNodeStatusResponse, HealthCheckRequest,
    HealthCheckResponse, HealthReport, HealthStatus, NodeState, NodeStatus, PeerState, PeerStatus,
    ReplyOrigin, WatchHealthRequest, WatchHealthResponse,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

const CHILD_ADDRESS: &str = "PROTO_HEALTH_TEST_CHILD_ADDRESS";
const CHILD_ID: &str = "PROTO_HEALTH_TEST_CHILD_ID";
const PATIENCE: Duration = Duration::from_secs(60);

use PeerState::{Alive, Dead, Left, Suspect, WarmingUp};

/// A node that watches `peer`, if it has one, and tells what it thinks of it.
struct Watching(Option<PeerMonitor>);

impl NodeFacts for Watching {
    fn facts(&self, _: Sections) -> FactsFuture<'_> {
        let peers = self.0.as_ref().map(PeerMonitor::statuses).unwrap_or_default();
        Box::pin(std::future::ready(Facts { peers, ..Facts::default() }))
    }
}

/// Not a test by itself: a node in a process of its own. It drains when its standard input ends.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the other tests"]
async fn child_node() {
    let Ok(address) = std::env::var(CHILD_ADDRESS) else { return };
    let id = std::env::var(CHILD_ID).unwrap();
    let listener = loop {
        match TcpListener::bind(&address).await {
            Ok(listener) => break listener,
            // The process before is still going away.
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    let identity = NodeIdentity { node_id: id, incarnation: now_unix_ms(), ..Default::default() };
    let health = HealthRegistry::builder(identity).facts(Watching(None)).build();
    health.set_running();
    println!("LISTENING {}", listener.local_addr().unwrap());
    let draining = health.clone();
    tune_server(Server::builder())
        .add_service(health.service())
        .serve_with_incoming_shutdown(TcpIncoming::from(listener), async move {
            let _ = tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())).await;
            draining.begin_drain("told to", Duration::from_secs(1));
            tokio::time::sleep(Duration::from_millis(300)).await;
            draining.shut_down(Duration::from_secs(5)).await;
        })
        .await
        .unwrap();
}

/// A process of this test binary that is a node; killed when dropped.
struct Node {
    child: Child,
    stdin: ChildStdin,
    /// Open, or the harness could not print its last line.
    _stdout: BufReader<ChildStdout>,
    id: String,
    address: SocketAddr,
}

impl Node {
    fn start(id: &str) -> Self {
        Self::start_on(id, "127.0.0.1:0")
    }

    fn start_on(id: &str, address: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_node", "--nocapture", "--ignored"])
            .env(CHILD_ADDRESS, address)
            .env(CHILD_ID, id)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let address = loop {
            let mut line = String::new();
            assert!(output.read_line(&mut line).unwrap() > 0, "the child ended before it served");
            // The test harness prints the name of the test without a line break.
            if let Some((_, address)) = line.split_once("LISTENING ") {
                break address.trim().parse().unwrap();
            }
        };
        let stdin = child.stdin.take().unwrap();
        Self { child, stdin, _stdout: output, id: id.into(), address }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        *self = Self::start_on(&self.id.clone(), &self.address.to_string());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As by default, but for what makes a test long, and with more patience: the machine may be busy with other tests.
fn options() -> MonitorOptions {
    let mut options = MonitorOptions::default();
    options.detector.min_deviation = Duration::from_millis(250);
    options.opinions_interval = Some(Duration::from_millis(500));
    options.reconnect_max = Duration::from_millis(500);
    options
}

/// A monitor and all that it has said.
struct Observer {
    monitor: PeerMonitor,
    events: PeerEvents,
    seen: Vec<PeerEvent>,
}

impl Observer {
    fn of(nodes: &[&Node], options: MonitorOptions) -> Self {
        let monitor = PeerMonitor::start(NodeId::new("observer").unwrap(), options);
        let events = monitor.events();
        for node in nodes {
            let address = node.address.to_string();
            monitor.add(&address, Some(NodeId::new(&node.id).unwrap()), endpoint(&address).unwrap()).unwrap();
        }
        Self { monitor, events, seen: Vec::new() }
    }

    /// Listens until `node` is in that state.
    async fn until(&mut self, node: &str, state: PeerState) -> PeerEvent {
        let waiting = async {
            loop {
                let Some(Told::Event(event)) = self.events.next().await else { panic!("events are missing") };
                self.seen.push(event.clone());
                let is = matches!(event.change, PeerChange::State { to, .. } if to == state);
                if is && event.node_id.as_ref().is_some_and(|id| id.as_str() == node) {
                    return event;
                }
            }
        };
        let waited = tokio::time::timeout(PATIENCE, waiting).await;
        waited.unwrap_or_else(|_| {
            panic!("{node} is not {state:?}: {:?} {:?}", self.seen, self.monitor.statuses())
        })
    }

    /// Listens for that long.
    async fn listen(&mut self, time: Duration) {
        let _ = tokio::time::timeout(time, async {
            while let Some(Told::Event(event)) = self.events.next().await {
                self.seen.push(event);
            }
        })
        .await;
    }

    /// All states that `node` was in.
    fn states(&self, node: &str) -> Vec<PeerState> {
        let of = |event: &&PeerEvent| event.node_id.as_ref().is_some_and(|id| id.as_str() == node);
        let states = self.seen.iter().filter(of).filter_map(|event| match event.change {
            PeerChange::State { to, .. } => Some(to),
            _ => None,
        });
        states.collect()
    }

    fn status(&self, node: &str) -> PeerStatus {
        self.monitor.statuses().into_iter().find(|peer| peer.node_id == node).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_stands_still_for_three_seconds_is_suspect_and_comes_back() {
    let nodes = [Node::start("a"), Node::start("b"), Node::start("c")];
    let mut observer = Observer::of(&nodes.each_ref(), options());
    for node in ["a", "b", "c"] {
        if observer.states(node).is_empty() {
            observer.until(node, Alive).await;
        }
    }
    nodes[0].signal(Signal::STOP);
    let stopped = Instant::now();
    let suspect = observer.until("a", Suspect).await;
    assert!(suspect.phi >= Some(8.0), "{suspect:?}");
    observer.listen(Duration::from_secs(3).saturating_sub(stopped.elapsed())).await;
    nodes[0].signal(Signal::CONT);
    observer.until("a", Alive).await;
    observer.listen(Duration::from_secs(4)).await;
    assert_eq!(observer.states("a"), [Alive, Suspect, Alive], "{:?}", observer.seen);
    for other in ["b", "c"] {
        assert_eq!(observer.states(other), [Alive], "{:?}", observer.seen);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_is_dead_and_a_restart_is_another_incarnation() {
    let mut nodes = [Node::start("a"), Node::start("b"), Node::start("c")];
    let mut observer = Observer::of(&nodes.each_ref(), options());
    for node in ["a", "b", "c"] {
        if observer.states(node).is_empty() {
            observer.until(node, Alive).await;
        }
    }
    let before = observer.status("a").incarnation;
    assert!(before > 0);
    nodes[0].kill();
    let dead = observer.until("a", Dead).await;
    assert!(dead.reason.starts_with("gone: no heartbeat for"), "{dead:?}");
    assert!(dead.reason.contains("refused") || dead.reason.contains("connect"), "{dead:?}");
    assert_eq!(observer.states("a"), [Alive, Suspect, Dead]);

    nodes[0].restart();
    observer.until("a", WarmingUp).await;
    let restarted =
        observer.seen.iter().find(|event| matches!(event.change, PeerChange::Restarted { .. })).unwrap();
    let after = observer.status("a").incarnation;
    let change = PeerChange::Restarted { from: before, to: after, new_store: false };
    assert_eq!((restarted.change, restarted.reason.as_str()), (change, "it was restarted"));
    observer.until("a", Alive).await;

    // Fast enough that nobody has become suspicious yet: still another incarnation, at once.
    nodes[1].kill();
    nodes[1].restart();
    observer.until("b", WarmingUp).await;
    assert!(!observer.states("b").contains(&Dead), "{:?}", observer.seen);
    observer.until("b", Alive).await;
    observer.listen(Duration::from_secs(3)).await;
    assert_eq!(observer.states("a"), [Alive, Suspect, Dead, WarmingUp, Alive]);
    assert_eq!(observer.states("c"), [Alive]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_drains_says_so_and_is_not_dead() {
    let mut nodes = [Node::start("a"), Node::start("b"), Node::start("c")];
    let mut observer = Observer::of(&nodes.each_ref(), options());
    for node in ["a", "b", "c"] {
        if observer.states(node).is_empty() {
            observer.until(node, Alive).await;
        }
    }
    nodes[0].stdin.write_all(b"drain\n").unwrap();
    let left = observer.until("a", Left).await;
    assert_eq!(left.reason, "it said that it drains");
    assert!(nodes[0].child.wait().unwrap().success());
    assert_eq!(observer.status("a").node_state(), NodeState::ShuttingDown, "its last word");
    // Longer than a silent node has to live.
    observer.listen(Duration::from_secs(7)).await;
    assert_eq!(observer.states("a"), [Alive, Left]);
    nodes[0].restart();
    observer.until("a", Alive).await;
    assert_eq!(observer.states("a"), [Alive, Left, WarmingUp, Alive]);
}

/// A proxy in front of `to` that drops what comes back once it is told to: requests still get through.
async fn one_way(to: SocketAddr, cut: Arc<AtomicBool>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (here, _) = listener.accept().await.unwrap();
            let cut = Arc::clone(&cut);
            tokio::spawn(async move {
                let there = TcpStream::connect(to).await.unwrap();
                let (mut from_here, mut to_here) = here.into_split();
                let (mut from_there, mut to_there) = there.into_split();
                let forth = async { tokio::io::copy(&mut from_here, &mut to_there).await.map(drop) };
                let back = async {
                    let mut bytes = vec![0; 64 << 10];
                    loop {
                        let read = from_there.read(&mut bytes).await?;
                        if read == 0 {
                            return Ok(());
                        }
                        if !cut.load(Ordering::SeqCst) {
                            to_here.write_all(&bytes[..read]).await?;
                        }
                    }
                };
                let _: Result<((), ()), std::io::Error> = tokio::try_join!(forth, back);
            });
        }
    });
    address
}

/// A node in this process.
async fn local(id: &str, monitor: Option<PeerMonitor>) -> (HealthRegistry, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let identity = NodeIdentity { node_id: id.into(), incarnation: now_unix_ms(), ..Default::default() };
    let health = HealthRegistry::builder(identity).facts(Watching(monitor)).build();
    health.set_running();
    let server = tune_server(Server::builder()).add_service(health.service());
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    (health, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_is_cut_in_one_direction_shows_at_both_ends() {
    // `a` and `b` watch each other, and both watch two others, so that nobody doubts itself.
    let others = [Node::start("c"), Node::start("d")];
    let mut at_a = Observer::of(&others.each_ref(), options());
    // In the name of `a` from here on.
    at_a.monitor = PeerMonitor::start(NodeId::new("a").unwrap(), options());
    at_a.events = at_a.monitor.events();
    let at_b = PeerMonitor::start(NodeId::new("b").unwrap(), options());
    let (_, a) = local("a", Some(at_a.monitor.clone())).await;
    let (health_b, b) = local("b", Some(at_b.clone())).await;
    let cut = Arc::new(AtomicBool::new(false));
    let b_from_a = one_way(b, Arc::clone(&cut)).await;
    for (monitor, peer, id) in [(&at_a.monitor, b_from_a, "b"), (&at_b, a, "a")] {
        monitor
            .add(&peer.to_string(), Some(NodeId::new(id).unwrap()), endpoint(&peer.to_string()).unwrap())
            .unwrap();
        for other in &others {
            let address = other.address.to_string();
            monitor.add(&address, None, endpoint(&address).unwrap()).unwrap();
        }
    }
    for node in ["b", "c", "d"] {
        if at_a.states(node).is_empty() {
            at_a.until(node, Alive).await;
        }
    }
    let a_id = NodeId::new("a").unwrap();
    let reach = |monitor: &PeerMonitor, node: &str| {
        monitor
            .reach()
            .into_iter()
            .find(|reach| reach.node_id.as_ref().is_some_and(|id| id.as_str() == node))
            .unwrap()
    };
    until("both say that they reach each other", || {
        [reach(&at_a.monitor, "b"), reach(&at_b, "a")].iter().all(|reach| {
            reach.state == Alive
                && reach.opinion.is_some_and(|opinion| opinion.state == Alive)
                && !reach.is_one_way()
        })
    })
    .await;

    cut.store(true, Ordering::SeqCst);
    at_a.until("b", Suspect).await;
    at_a.until("b", Dead).await;
    // `b` hears `a` all the time, and reads in its status that `a` does not hear it.
    let heard = health_b.last_heard_from(&a_id).unwrap();
    assert!(now_unix_ms() - heard < 5000, "requests get through");
    until("b knows that it goes one way only", || {
        let reach = reach(&at_b, "a");
        reach.is_one_way() && reach.opinion.is_some_and(|opinion| opinion.state == Dead)
    })
    .await;
    at_a.listen(Duration::from_secs(2)).await;
    assert_eq!(at_a.states("b"), [Alive, Suspect, Dead], "{:?}", at_a.seen);

    cut.store(false, Ordering::SeqCst);
    at_a.until("b", Alive).await;
    at_a.listen(Duration::from_secs(3)).await;
    assert_eq!(at_a.states("b"), [Alive, Suspect, Dead, Alive], "{:?}", at_a.seen);
    for other in ["c", "d"] {
        assert_eq!(at_a.states(other), [Alive], "{:?}", at_a.seen);
    }
}

/// A node that is well, and says so with so many components; and what it thinks of the observer on pages that hold so many tasks. Nobody asked for either. How often it was asked.
#[derive(Clone, Default)]
struct Floods {
    components: usize,
    tasks: usize,
    asked: Arc<AtomicUsize>,
}

impl Floods {
    fn origin() -> Option<ReplyOrigin> {
        let identity = NodeIdentity { node_id: "f".into(), incarnation: 1, ..Default::default() };
        Some(ReplyOrigin { identity: Some(identity), state: NodeState::Running.into(), ..Default::default() })
    }

    fn health(&self) -> Option<HealthReport> {
        let components = vec![ComponentHealth::default(); self.components];
        Some(HealthReport { status: HealthStatus::Healthy.into(), components, ..Default::default() })
    }

    /// At which address it answers.
    async fn serve(&self) -> (String, tokio::task::JoinHandle<Result<(), tonic::transport::Error>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tune_server(Server::builder()).add_service(HealthServiceServer::new(self.clone()));
        (address, tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener))))
    }
}

#[tonic::async_trait]
impl HealthService for Floods {
    type WatchHealthStream = tokio_stream::Once<Result<WatchHealthResponse, tonic::Status>>;

    async fn health_check(
        &self,
        _: tonic::Request<HealthCheckRequest>,
    ) -> Result<tonic::Response<HealthCheckResponse>, tonic::Status> {
        Ok(tonic::Response::new(HealthCheckResponse { origin: Self::origin(), health: self.health() }))
    }

    async fn watch_health(
        &self,
        _: tonic::Request<WatchHealthRequest>,
    ) -> Result<tonic::Response<Self::WatchHealthStream>, tonic::Status> {
        let (origin, health) = (Self::origin(), self.health());
        let heartbeat = WatchHealthResponse { origin, health, ..Default::default() };
        Ok(tonic::Response::new(tokio_stream::once(Ok(heartbeat))))
    }

    async fn get_node_status(
        &self,
        _: tonic::Request<GetNodeStatusRequest>,
    ) -> Result<tonic::Response<GetNodeStatusResponse>, tonic::Status> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let me = PeerStatus { node_id: "observer".into(), state: Alive.into(), ..Default::default() };
        let status = NodeStatus {
            transfers: vec![ActiveTask::default(); self.tasks],
            peers: vec![me],
            ..Default::default()
        };
        let origin = Self::origin();
        let answer = GetNodeStatusResponse { origin, status: Some(status), ..Default::default() };
        Ok(tonic::Response::new(answer))
    }
}

/// Each empty task is three bytes of an answer and some 340 of memory.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_larger_than_any_honest_one_is_no_opinion() {
    for (tasks, believed) in [(1000, true), (180_000, false)] {
        let floods = Floods { tasks, ..Floods::default() };
        let (address, serving) = floods.serve().await;
        let mut options = options();
        options.heartbeats = Heartbeats::Poll;
        let monitor = PeerMonitor::start(NodeId::new("observer").unwrap(), options);
        monitor.add(&address, None, endpoint(&address).unwrap()).unwrap();
        // The third question comes when the second one was answered.
        until("it is asked", || floods.asked.load(Ordering::Relaxed) >= 3).await;
        let opinion = || monitor.reach().iter().any(|reach| reach.opinion.is_some());
        assert_eq!(opinion(), believed, "{tasks} tasks");
        monitor.stop().await;
        serving.abort();
    }
}

/// Each empty component is two bytes of a heartbeat, and more than a hundred of memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_larger_than_any_honest_one_is_none() {
    for heartbeats in [Heartbeats::Watch, Heartbeats::Poll] {
        for (components, is_heard) in [(1000, true), (10_000, false)] {
            let (address, serving) = Floods { components, ..Floods::default() }.serve().await;
            let mut options = options();
            (options.heartbeats, options.opinions_interval) = (heartbeats, None);
            let monitor = PeerMonitor::start(NodeId::new("observer").unwrap(), options);
            monitor.add(&address, None, endpoint(&address).unwrap()).unwrap();
            let status = || monitor.statuses().remove(0);
            if is_heard {
                until("it is heard", || status().last_reply_unix_ms.is_some()).await;
            } else {
                let too_large = format!("the limit is: {MAX_HEARTBEAT_BYTES} bytes");
                until("it is refused", || status().message.contains(&too_large)).await;
                assert_eq!(status().last_reply_unix_ms, None, "{:?}", status());
            }
            monitor.stop().await;
            serving.abort();
        }
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn polling_is_as_good_for_one_call_each_time() {
    let mut nodes = [Node::start("a"), Node::start("b"), Node::start("c")];
    let mut options = options();
    options.heartbeats = Heartbeats::Poll;
    options.concurrency = 1;
    let mut observer = Observer::of(&nodes.each_ref(), options);
    for node in ["a", "b", "c"] {
        if observer.states(node).is_empty() {
            observer.until(node, Alive).await;
        }
    }
    assert!(observer.status("a").round_trip_ms > Some(0.0));
    nodes[0].kill();
    observer.until("a", Dead).await;
    assert!(observer.monitor.remove(&nodes[0].address.to_string()));
    assert!(!observer.monitor.remove(&nodes[0].address.to_string()));
    observer.monitor.stop().await;
    let refused = observer.monitor.add("127.0.0.1:1", None, endpoint("127.0.0.1:1").unwrap());
    assert!(refused.is_err());
    assert_eq!(observer.states("b"), [Alive]);
}
