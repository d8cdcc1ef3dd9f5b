//! Every limit of `docs/limits.md`: a node that exceeds it gets the error that is said there, which is counted under its reason, and while it
//! holds whatever it got, the migrations of other nodes go on and begin.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

#[path = "support/hostile_target.rs"]
mod hostile_target;
#[path = "../../proto-common/tests/support/refusals.rs"]
mod refusals;
mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use proto_common::error::{Code, Error};
use proto_common::ids::MigrationId;
use proto_common::refusals::counts;
use proto_common::slots::{SlotRange, slot_of};
use proto_common::tuning::{endpoint, tune_server};
use proto_common::v1::Direction;
use proto_migration::Reason;
use proto_migration::entry::{Entry, Image, MAX_ENTRIES};
use proto_migration::journal::{Journal, SourceRecord};
use proto_migration::limits::{Limits, MESSAGE_OVERHEAD};
use proto_migration::migrations::Migrations;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::transfer_migration_data_request::{
    Bulk, Discard, Forget, Frame, Header, Heartbeat, Purpose, Release,
};
use proto_migration::v1::transfer_migration_data_response::Frame as Answer;
use proto_migration::v1::{
    MigrationDecision, MigrationGate, MigrationLimits, MigrationProgress, MigrationState,
    WatchMigrationProgressRequest, WatchMigrationProgressResponse,
};
use refusals::{ALONE, Abuse, Refusal, counted, limits_of};
use support::frames::{
    COMMIT, Node, PATIENCE, Source, bulk, delta, eventually, header, identity, prepare, row,
};
use support::memory_source::Answer as Read;
use support::memory_target::Fault;
use support::pair::{Pair, driver, driver_within, error_of, id, manual};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// The node that exceeds limits.
const OFFENDER: &str = "n9";

const TOO_MANY: Refusal = Refusal::too_many("TOO_MANY_MIGRATIONS");
const TOO_LARGE: Refusal = Refusal::invalid("BATCH_TOO_LARGE");
const IDLE: Refusal = Refusal { code: Code::DeadlineExceeded, reason: "IDLE_TIMEOUT", ..TOO_MANY };
/// What the older one of two streams is told.
const SUPERSEDED: Refusal = Refusal { code: Code::FailedPrecondition, ..Refusal::invalid("SUPERSEDED") };
/// What a stream is told whose source hangs up.
const USUAL: [&str; 1] = ["STREAM_ENDED_EARLY"];

/// One limit.
struct Case {
    limits: Limits,
    /// Whether nodes are served that come meanwhile; not where the node as a whole is full.
    newcomers: bool,
    /// Whether one comes at the same moment as the offender; not where the next call of the store is meant for that one.
    beside: bool,
    /// Whether a migration is under way when it begins; not where that would have to hurry.
    ongoing: bool,
    /// Whether each stream has a connection of its own; not where the clock stands still, which sockets do not heed.
    sockets: bool,
}

/// A target, and what others send there.
struct Bench {
    node: Node,
    address: Option<SocketAddr>,
    come: AtomicU16,
}

impl Case {
    fn new(lower: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = Limits::default();
        lower(&mut limits);
        Self { limits, newcomers: true, beside: true, ongoing: true, sockets: true }
    }

    /// Of the whole node: nobody gets more while it is full.
    fn of_all(lower: impl FnOnce(&mut Limits)) -> Self {
        Self { newcomers: false, beside: false, ..Self::new(lower) }
    }

    async fn check(self, exceed: impl AsyncFnOnce(&Bench) -> Abuse) {
        let Self { limits, newcomers, beside, ongoing, sockets } = self;
        let _alone = ALONE.lock().await;
        let migrations = Migrations::new(&limits);
        let node = Node::with(|builder| builder.limits(limits).migrations(migrations)).await;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let mut serving = None;
        let address = if sockets {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = tune_server(tonic::transport::Server::builder())
                .add_service(node.receiver.clone().into_service())
                .serve_with_incoming_shutdown(
                    tokio_stream::wrappers::TcpListenerStream::new(listener),
                    async move {
                        let _ = stopped.await;
                    },
                );
            serving = Some(tokio::spawn(server));
            Some(address)
        } else {
            None
        };
        let bench = Bench { node, address, come: AtomicU16::new(0) };
        let before = counts();

        let ongoing = if ongoing { Some(Ongoing::begin(&bench).await) } else { None };
        let newcomer = async {
            if beside {
                bench.another_migrates().await;
            }
        };
        let (abuse, ()) = tokio::join!(exceed(&bench), newcomer);
        if newcomers {
            bench.another_migrates().await;
        }
        if let Some(ongoing) = ongoing {
            ongoing.complete(&bench).await;
        }
        let Abuse { refused, held, others } = abuse;
        for other in others {
            tokio::time::timeout(PATIENCE, other).await.expect("others go on").unwrap();
        }
        counted(&before, &refused, &USUAL);
        drop(held);
        bench.node.receiver.shutdown().await;
        drop((bench, stop));
        if let Some(serving) = serving {
            tokio::time::timeout(PATIENCE, serving).await.expect("the server stops").unwrap().unwrap();
        }
    }
}

/// What a source says first that is the node `node` and moves `slots`.
fn header_of(id: &str, node: &str, slots: SlotRange, attempt: u64) -> Header {
    let mut header = Header { migration_id: id.to_owned(), ..header(attempt) };
    let spec = header.spec.as_mut().unwrap();
    (spec.source_node_id, spec.slots) = (node.to_owned(), Some(slots.into()));
    header.source = Some(identity(node, 9));
    header
}

fn one_slot(slot: u16) -> SlotRange {
    SlotRange::new(slot, slot + 1).unwrap()
}

/// The offender's migration number `number`: of the slot of the key of the same name.
fn offered(number: u16) -> Header {
    again(number, 1)
}

/// The same at a later attempt.
fn again(number: u16, attempt: u64) -> Header {
    let id = format!("x{number}");
    header_of(&id, OFFENDER, one_slot(slot_of(id.as_bytes())), attempt)
}

/// A key of a slot of nobody else, for the migration number `number` of the others.
fn key_of(number: u16) -> String {
    let mut keys =
        (0..).map(|n| format!("k{n}")).filter(|key| (1000..8000).contains(&slot_of(key.as_bytes())));
    keys.nth(number.into()).unwrap()
}

/// An entry of the offender's migration number 1, with so many bytes.
fn large(bytes: usize) -> Entry {
    let image = Image { value: vec![0; bytes].into(), expires_unix_ms: None };
    Entry { image: Some(image), ..row(10, "x1") }
}

impl Bench {
    async fn connect(&self, from: [u8; 4]) -> MigrationServiceClient<Channel> {
        let address = self.address.expect("it has sockets").to_string();
        let endpoint = endpoint(&address).unwrap().local_address(Some(from.into()));
        MigrationServiceClient::new(endpoint.connect().await.unwrap())
    }

    /// A stream on a connection of its own that has said nothing.
    async fn silent(&self) -> Source {
        match self.address {
            Some(_) => Source::silent(self.connect([127, 0, 0, 1]).await).await,
            None => Source::silent(self.node.client.clone()).await,
        }
    }

    async fn open(&self, header: Header) -> Source {
        let source = self.silent().await;
        source.send(Frame::Header(header)).await;
        source
    }

    async fn accept(&self, header: Header) -> Source {
        let mut source = self.open(header).await;
        source.accepted().await.unwrap();
        source
    }

    async fn refuses(&self, header: Header) -> Error {
        self.open(header).await.next().await.unwrap_err()
    }

    /// Another node, which nobody has heard of, migrates a slot, from the beginning to the end.
    async fn another_migrates(&self) {
        let number = self.come.fetch_add(1, Ordering::SeqCst);
        let (id, key) = (format!("m{number}"), key_of(number));
        let slots = one_slot(slot_of(key.as_bytes()));
        let source = self.accept(header_of(&id, &format!("other-{number}"), slots, 1)).await;
        self.complete(source, &id, &key).await;
    }

    /// The rest of a migration of one key.
    async fn complete(&self, mut source: Source, id: &str, key: &str) {
        source.bulk(vec![row(10, key)], true).await;
        source.delta(12, vec![row(11, key)]).await;
        source.prepare_of(id, 1, &self.node.target).await;
        let prepared = source.answer().await.unwrap();
        assert!(matches!(prepared, Answer::Prepared(_)), "{prepared:?}");
        source.send(COMMIT).await;
        let committed = source.answer().await.unwrap();
        assert!(matches!(committed, Answer::Committed(_)), "{committed:?}");
        source.send(Frame::Forget(Forget {})).await;
        assert!(matches!(source.answer().await.unwrap(), Answer::Forgotten(_)));
        source.end().await;
        let has_it = |rows: &support::memory_target::Rows| rows.contains_key(key.as_bytes());
        assert!(self.node.target.disk().owned.iter().any(|(_, _, rows)| has_it(rows)));
    }

    fn shown(&self, id: &str) -> Option<MigrationProgress> {
        self.node.receiver.migrations().get(Some(Direction::In), &MigrationId::new(id).unwrap()).ok()
    }
}

/// A migration of another node that is under way.
struct Ongoing {
    source: Source,
    beating: JoinHandle<()>,
}

impl Ongoing {
    const ID: &str = "ongoing";
    const KEY: &str = "a";

    async fn begin(bench: &Bench) -> Self {
        let slots = one_slot(slot_of(Self::KEY.as_bytes()));
        let source = bench.accept(header_of(Self::ID, "n1", slots, 1)).await;
        let frames = source.frames.clone();
        let beating = tokio::spawn(async move {
            loop {
                let beat = Frame::Heartbeat(Heartbeat::default());
                let beat = proto_migration::v1::TransferMigrationDataRequest { frame: Some(beat) };
                if frames.send(beat).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
        Self { source, beating }
    }

    async fn complete(self, bench: &Bench) {
        self.beating.abort();
        bench.complete(self.source, Self::ID, Self::KEY).await;
    }
}

// ---- Places.

#[tokio::test]
async fn incoming() {
    let full = Refusal { facts: &[("limit", Some("2")), ("peer", None)], ..TOO_MANY };
    let case = Case::of_all(|limits| limits.incoming = 2);
    case.check(async |bench| {
        let held = bench.accept(offered(1)).await;
        Abuse::default().refused(bench.refuses(offered(2)).await, full).holds(held)
    })
    .await;
}

#[tokio::test]
async fn incoming_per_peer() {
    let full = Refusal { facts: &[("limit", Some("2")), ("peer", Some(OFFENDER))], ..TOO_MANY };
    let case = Case::new(|limits| (limits.incoming, limits.incoming_per_peer) = (4, 2));
    case.check(async |bench| {
        let held = [bench.accept(offered(1)).await, bench.accept(offered(2)).await];
        let mut abuse = Abuse::default().holds(held);
        for number in [3, 4] {
            abuse = abuse.refused(bench.refuses(offered(number)).await, full);
        }
        abuse
    })
    .await;
}

#[tokio::test]
async fn outgoing() {
    let full = Refusal { facts: &[("limit", Some("1"))], ..TOO_MANY };
    let _alone = ALONE.lock().await;
    let mut limits = Limits::default();
    limits.outgoing = 1;
    let mut pair = Pair::start().await;
    pair.source_down().await;
    pair.source_up_within(limits).await;
    pair.begin(manual).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    let before = counts();
    let refused = pair.client.clone().start_migration(Pair::request("m2")).await.unwrap_err();
    // The one that is there is asked for again, which takes no place, and goes to its end.
    let joined = pair.begin(manual).await.unwrap();
    assert_eq!(joined.state(), MigrationState::Ready);
    pair.complete(None).await.unwrap();
    pair.reaches(MigrationState::Completed).await;
    counted(&before, &[(Error::from(refused), full)], &USUAL);
    pair.source_down().await;
}

// ---- Batches.

#[tokio::test]
async fn batch_bytes() {
    let of = |field| Refusal { field: Some(field), ..TOO_LARGE };
    let case = Case::new(|limits| limits.batch_bytes = 64 << 10);
    case.check(async |bench| {
        let [mut rows, mut changes, mut message] = [1, 2, 3].map(|_| None);
        let payload = |bytes: usize| Bytes::from(vec![0; bytes]);
        for (attempt, slot) in [&mut rows, &mut changes, &mut message].into_iter().enumerate() {
            let attempt = attempt as u64 + 1;
            let mut source = bench.accept(again(1, attempt)).await;
            source
                .send(match attempt {
                    1 => Frame::Bulk(Bulk { payload: payload((64 << 10) + 1), ..bulk(1, vec![], false) }),
                    2 => {
                        let mut delta = delta(1, 10, 12, vec![]);
                        delta.payload = payload((64 << 10) + 1);
                        Frame::Delta(delta)
                    }
                    _ => {
                        let payload = payload((64 << 10) + MESSAGE_OVERHEAD);
                        Frame::Bulk(Bulk { payload, ..bulk(1, vec![], false) })
                    }
                })
                .await;
            *slot = Some(source.error().await);
        }
        Abuse::default()
            .refused(rows, of("bulk.payload"))
            .refused(changes, of("delta.payload"))
            .refused(message, TOO_LARGE)
    })
    .await;
}

#[tokio::test]
async fn entries_of_a_batch() {
    assert_eq!(MAX_ENTRIES, 65_536);
    let too_many = Refusal { field: Some("bulk.entry_count"), ..TOO_LARGE };
    Case::new(|_| {})
        .check(async |bench| {
            let mut source = bench.accept(offered(1)).await;
            source.send(Frame::Bulk(Bulk { entry_count: 65_537, ..bulk(1, vec![], false) })).await;
            Abuse::default().refused(source.error().await, too_many).holds(source)
        })
        .await;
}

#[tokio::test]
async fn credit_bytes() {
    let beyond = Refusal { reason: "CREDIT_EXCEEDED", field: Some("bulk.payload"), ..TOO_LARGE };
    let mut case = Case::new(|limits| (limits.batch_bytes, limits.credit_bytes) = (64 << 10, 64 << 10));
    case.beside = false;
    case.check(async |bench| {
        let mut source = bench.open(offered(1)).await;
        assert_eq!(source.accepted().await.unwrap().credit_limit, 64 << 10);
        // Of the offender's rows: its store takes what it may send, and no more of it comes back.
        let gate = Arc::new(Semaphore::new(0));
        bench.node.target.fault("apply", Fault::Wait(Arc::clone(&gate)));
        source.bulk(vec![large(40_000)], false).await;
        eventually("the store is asked", || bench.node.target.calls("apply") == 1).await;
        source.bulk(vec![large(40_000)], false).await;
        bench.another_migrates().await;
        gate.add_permits(1);
        Abuse::default().refused(source.error().await, beyond).holds(source)
    })
    .await;
}

// ---- Time, on a clock that jumps when everybody waits.

#[tokio::test(start_paused = true)]
async fn first_frame() {
    let mut case = Case::new(|_| {});
    case.sockets = false;
    case.check(async |bench| {
        let began = tokio::time::Instant::now();
        let mut silent = bench.silent().await;
        let refused = silent.answers.message().await.unwrap_err();
        assert_eq!(began.elapsed().as_secs(), 30);
        Abuse::default().refused(Error::from(refused), IDLE).holds(silent)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn idle() {
    let mut case = Case::new(|limits| limits.idle = Duration::from_secs(5));
    case.sockets = false;
    case.check(async |bench| {
        let began = tokio::time::Instant::now();
        let mut source = bench.accept(offered(1)).await;
        let refused = source.error().await;
        assert_eq!(began.elapsed().as_secs(), 5);
        Abuse::default().refused(refused, IDLE).holds(source)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn slowest() {
    /// So that one comes at the very moment at which the target looks.
    const EVERY: Duration = Duration::from_secs(10);
    let slow = Refusal { code: Code::DeadlineExceeded, reason: "TOO_SLOW", ..TOO_MANY };
    let mut case = Case::new(|limits| {
        assert_eq!((limits.slowest_bytes, limits.slowest_time), (64 << 10, Duration::from_secs(600)));
    });
    (case.sockets, case.ongoing) = (false, false);
    case.check(async |bench| {
        let began = tokio::time::Instant::now();
        let mut source = bench.accept(offered(1)).await;
        let trickle = async |source: &mut Source| {
            source.bulk(vec![large(1)], false).await;
            source.send(Frame::Heartbeat(Heartbeat::default())).await;
            tokio::time::timeout(EVERY, source.answer()).await.ok().map(Result::unwrap_err)
        };
        let refused = loop {
            if let Some(refused) = trickle(&mut source).await {
                break refused;
            }
            assert!(source.number < 1000, "nobody minds");
        };
        // What came last was staged at once, so it excuses nothing.
        assert_eq!(began.elapsed().as_secs(), 601, "{} batches", source.number);
        assert!(source.number > 50, "it was refused for its rate, not for its silence");

        // What it brought is there, and once all rows are, it may wait for as long as it wants.
        let mut resumed = bench.open(again(1, 2)).await;
        assert_eq!(resumed.accepted().await.unwrap().resume.unwrap().staged_keys, 1);
        resumed.bulk(vec![large(1)], true).await;
        resumed.durable().await;
        for _ in 0..200 {
            resumed.send(Frame::Heartbeat(Heartbeat::default())).await;
            let answer = tokio::time::timeout(EVERY, resumed.answer()).await;
            assert!(answer.is_err(), "{answer:?}");
        }
        Abuse::default().refused(refused, slow).holds((source, resumed))
    })
    .await;
}

// ---- The disk.

#[tokio::test]
async fn the_disk_of_the_target() {
    let full = Refusal { reason: "INSUFFICIENT_DISK", facts: &[("needed_bytes", Some("9"))], ..TOO_MANY };
    let mut case = Case::new(|_| {});
    case.beside = false;
    case.check(async |bench| {
        let fail = |call| {
            let error = Reason::InsufficientDisk.error("full").metadata("needed_bytes", "9");
            bench.node.target.fault(call, Fault::Fail(error));
        };
        fail("admit");
        let announced = bench.refuses(offered(1)).await;
        assert_eq!(bench.shown("x1"), None, "nothing was begun");
        let mut source = bench.accept(offered(1)).await;
        fail("apply");
        source.bulk(vec![large(1)], false).await;
        let midway = source.error().await;
        Abuse::default().refused(announced, full).refused(midway, full).holds(source)
    })
    .await;
}

// ---- What is remembered, and who looks.

#[tokio::test]
async fn history() {
    let case = Case::new(|limits| limits.history = 2);
    case.check(async |bench| {
        for number in 100..103 {
            let (id, key) = (format!("x{number}"), key_of(number));
            let slots = one_slot(slot_of(key.as_bytes()));
            let source = bench.accept(header_of(&id, OFFENDER, slots, 1)).await;
            bench.complete(source, &id, &key).await;
        }
        eventually("the oldest is forgotten", || bench.shown("x100").is_none()).await;
        assert_eq!(bench.shown("x102").unwrap().state(), MigrationState::Completed);
        let active = bench.node.receiver.migrations().active(None);
        assert!(
            active.iter().any(|running| running.migration_id == Ongoing::ID),
            "what runs is never forgotten"
        );
        // A journal that is opened for two remembers two.
        let (_, recovered) = Journal::open(bench.node.dir.path(), 2).unwrap();
        assert_eq!(recovered.finished.len(), 2);
        Abuse::default()
    })
    .await;
}

/// Begun and cancelled again and again, it leaves no more than its share behind.
#[tokio::test]
async fn cancelled_per_peer() {
    let case = Case::new(|limits| limits.cancelled_per_peer = 2);
    case.check(async |bench| {
        let discards = async |header: Header| {
            let mut source = bench.accept(header).await;
            source.send(Frame::Discard(Discard { reason: "enough".to_owned() })).await;
            let answer = source.answer().await.unwrap();
            assert!(matches!(answer, Answer::Discarded(_)), "{answer:?}");
            source.end().await;
        };
        let records = || -> Vec<String> {
            let disk = bench.node.target.disk();
            disk.records.keys().map(ToString::to_string).filter(|id| !id.starts_with("other")).collect()
        };
        let theirs = header_of("theirs", "n5", one_slot(slot_of(b"theirs")), 1);
        discards(theirs).await;
        for number in 1..=6 {
            discards(offered(number)).await;
            // Room was made before it began.
            let left = records();
            assert!(left.iter().filter(|id| id.starts_with('x')).count() <= 3, "{left:?}");
        }
        let held = bench.accept(offered(7)).await;
        let left = records();
        assert!(!left.contains(&"x1".to_owned()) && left.contains(&"x6".to_owned()), "{left:?}");
        assert!(left.contains(&"theirs".to_owned()), "that of another node stays: {left:?}");
        // What was dropped is known by the history: it does not begin anew.
        let mut again = bench.open(again(1, 2)).await;
        let accepted = again.accepted().await.unwrap();
        assert_eq!(accepted.decision(), MigrationDecision::Discarded);
        Abuse::default().holds(held)
    })
    .await;
}

/// What is committed stays until its source knows of it: one that never takes note has no more than its share of such records.
#[tokio::test]
async fn committed_per_peer() {
    let full = Refusal { facts: &[("limit", Some("2")), ("peer", Some(OFFENDER))], ..TOO_MANY };
    let case = Case::new(|limits| limits.committed_per_peer = 2);
    case.check(async |bench| {
        let commits = async |number| {
            let mut source = bench.accept(offered(number)).await;
            source.bulk(Vec::new(), true).await;
            source.prepare_of(&format!("x{number}"), 1, &bench.node.target).await;
            let prepared = source.answer().await.unwrap();
            assert!(matches!(prepared, Answer::Prepared(_)), "{prepared:?}");
            source.send(COMMIT).await;
            assert!(matches!(source.answer().await.unwrap(), Answer::Committed(_)));
        };
        commits(1).await;
        commits(2).await;
        let abuse = Abuse::default().refused(bench.refuses(offered(3)).await, full);
        // One that takes note may begin another one.
        let mut source = bench.accept(again(1, 2)).await;
        source.send(Frame::Forget(Forget {})).await;
        assert!(matches!(source.answer().await.unwrap(), Answer::Forgotten(_)));
        source.end().await;
        commits(3).await;
        abuse.refused(bench.refuses(offered(4)).await, full)
    })
    .await;
}

/// Nor does it by streams that it holds open about each of them.
#[tokio::test]
async fn streams_about_cancelled_migrations_keep_no_more_records_than_there_may_be() {
    let full = Refusal { facts: &[("limit", Some("2")), ("peer", Some(OFFENDER))], ..TOO_MANY };
    let case = Case::new(|limits| (limits.cancelled_per_peer, limits.streams_per_peer) = (2, 1000));
    case.check(async |bench| {
        let records =
            || bench.node.target.disk().records.keys().filter(|id| id.as_str().starts_with('x')).count();
        let (mut abuse, mut held, mut ended) = (Abuse::default(), Vec::new(), 0);
        for number in 1..=12 {
            let mut source = bench.open(offered(number)).await;
            match source.accepted().await {
                Ok(_) => {
                    source.send(Frame::Discard(Discard::default())).await;
                    assert!(matches!(source.answer().await.unwrap(), Answer::Discarded(_)));
                    held.push((number, bench.accept(again(number, 2)).await));
                }
                Err(error) => {
                    abuse = abuse.refused(error, full);
                    // The oldest of its streams ends for it.
                    let (oldest, mut stream) = held.remove(0);
                    assert!(matches!(stream.answer().await.unwrap(), Answer::Discarded(_)), "x{oldest}");
                    stream.end().await;
                    ended += 1;
                }
            }
            assert!(records() <= 3, "{} records", records());
        }
        assert!(ended >= 4, "{ended} streams ended");
        abuse.holds(held)
    })
    .await;
}

/// Opened again and again, and prepared again and again, it has the store write no more than its share.
#[tokio::test(start_paused = true)]
async fn streams_per_peer() {
    let often = Refusal { facts: &[("limit", Some("10")), ("peer", Some(OFFENDER))], ..TOO_MANY };
    let mut case = Case::new(|limits| assert_eq!(limits.streams_per_peer, 10));
    case.sockets = false;
    case.check(async |bench| {
        let saves = || bench.node.target.calls("save");
        let began = tokio::time::Instant::now();
        let mut source = bench.accept(offered(1)).await;
        let mut abuse = Abuse::default();
        for attempt in 2..=60 {
            let mut older = std::mem::replace(&mut source, bench.accept(again(1, attempt)).await);
            abuse = abuse.refused(older.error().await, SUPERSEDED);
            let waited = began.elapsed();
            assert!(attempt > 10 || waited.is_zero(), "one that comes back waits: {waited:?}");
        }
        assert!(began.elapsed() >= Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(saves() <= 60 + 5, "{}", saves());

        // Those that have not come to their turn within a second have to come back.
        let unknown = |number| Header { purpose: Purpose::Resolve.into(), ..offered(number) };
        let all = (100..130).map(|number| async move {
            let mut stream = bench.open(unknown(number)).await;
            stream.accepted().await.map(|_| stream)
        });
        let mut held = Vec::new();
        for answer in futures::future::join_all(all).await {
            match answer {
                Ok(stream) => held.push(stream),
                Err(error) => abuse = abuse.refused(error, often),
            }
        }
        assert!((8..=12).contains(&held.len()), "{} had a turn", held.len());

        // A freeze is refused at once, and changes go on.
        source.bulk(vec![row(10, "x1")], true).await;
        source.durable().await;
        let before = saves();
        let mut refused = 0;
        for freeze in 1..=50 {
            let prepare = prepare(freeze, source.watermark, &bench.node.target.disk().staged[&x1()]);
            source.send(Frame::Prepare(prepare)).await;
            if let Answer::PrepareRefused(why) = source.answer().await.unwrap() {
                let why = Error::from(why.error.unwrap());
                assert_eq!((why.reason(), why.get("peer")), ("TOO_MANY_MIGRATIONS", Some(OFFENDER)));
                assert!(why.is_retryable());
                refused += 1;
            } else {
                source.send(Frame::Release(Release { freeze })).await;
            }
        }
        assert_eq!(refused, 40);
        assert!(saves() - before <= 20, "{}", saves() - before);
        source.delta(12, vec![row(11, "x1")]).await;
        source.durable().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let last = prepare(51, source.watermark, &bench.node.target.disk().staged[&x1()]);
        source.send(Frame::Prepare(last)).await;
        assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(_)));
        source.send(Frame::Release(Release { freeze: 51 })).await;
        // One that does not wait longer each time has 64 of them refused, and then its stream.
        for freeze in 52.. {
            let prepare = prepare(freeze, source.watermark, &bench.node.target.disk().staged[&x1()]);
            source.send(Frame::Prepare(prepare)).await;
            match source.answer().await {
                Ok(Answer::PrepareRefused(_)) => refused += 1,
                Ok(_) => source.send(Frame::Release(Release { freeze })).await,
                Err(error) => {
                    abuse = abuse.refused(error, often);
                    break;
                }
            }
            assert!(refused <= 64, "it goes on");
        }
        assert_eq!(refused, 64);
        abuse.holds(held)
    })
    .await;
}

/// What was cancelled is not written anew for each stream.
#[tokio::test]
async fn a_stream_about_a_cancelled_migration_has_nothing_written() {
    let case = Case::new(|limits| limits.streams_per_peer = 1000);
    case.check(async |bench| {
        let mut source = bench.accept(offered(1)).await;
        source.send(Frame::Discard(Discard::default())).await;
        assert!(matches!(source.answer().await.unwrap(), Answer::Discarded(_)));
        let record = bench.node.target.disk().records[&x1()].clone();
        source.end().await;
        let (mut abuse, mut last) = (Abuse::default(), None);
        for attempt in 2..=20 {
            let mut source = bench.open(again(1, attempt)).await;
            assert_eq!(source.accepted().await.unwrap().decision(), MigrationDecision::Discarded);
            if let Some(mut older) = last.replace(source) {
                abuse = abuse.refused(older.error().await, SUPERSEDED);
            }
        }
        assert_eq!(bench.node.target.disk().records[&x1()], record);
        // An older one is refused all the same.
        let stale = Refusal { code: Code::Aborted, reason: "STALE_ATTEMPT", ..TOO_MANY };
        abuse.refused(bench.refuses(again(1, 20)).await, stale).holds(last)
    })
    .await;
}

fn x1() -> MigrationId {
    MigrationId::new("x1").unwrap()
}

type Watch = tonic::Streaming<WatchMigrationProgressResponse>;

/// A watch of the migration that is under way. In plaintext, a peer is an address, whatever it opens.
async fn watch_from(bench: &Bench, address: [u8; 4]) -> Result<Watch, Error> {
    let request = WatchMigrationProgressRequest {
        migration_id: Ongoing::ID.to_owned(),
        direction: Direction::In.into(),
    };
    let mut client = bench.connect(address).await;
    let mut watch = client.watch_migration_progress(request).await?.into_inner();
    assert!(watch.message().await.unwrap().is_some());
    Ok(watch)
}

/// Watches until it ends.
fn watches_on(mut watch: Watch) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut last = None;
        while let Some(next) = watch.message().await.unwrap() {
            last = next.migration;
        }
        assert_eq!(last.unwrap().state(), MigrationState::Completed);
    })
}

#[tokio::test]
async fn watchers() {
    let full =
        Refusal { reason: "TOO_MANY_WATCHERS", facts: &[("limit", Some("3")), ("peer", None)], ..TOO_MANY };
    let case = Case::new(|limits| limits.watchers = 3);
    case.check(async |bench| {
        let other = watches_on(watch_from(bench, [127, 0, 0, 2]).await.unwrap());
        let held = [watch_from(bench, [127, 0, 0, 1]).await, watch_from(bench, [127, 0, 0, 1]).await];
        let held = held.map(Result::unwrap);
        let refused = watch_from(bench, [127, 0, 0, 1]).await.err();
        Abuse { others: vec![other], ..Abuse::default() }.refused(refused, full).holds(held)
    })
    .await;
}

#[tokio::test]
async fn watchers_per_peer() {
    let full = Refusal {
        reason: "TOO_MANY_WATCHERS",
        facts: &[("limit", Some("2")), ("peer", Some("127.0.0.1"))],
        ..TOO_MANY
    };
    let case = Case::new(|limits| (limits.watchers, limits.watchers_per_peer) = (3, 2));
    case.check(async |bench| {
        let first = watch_from(bench, [127, 0, 0, 1]).await.unwrap();
        let second = watch_from(bench, [127, 0, 0, 1]).await.unwrap();
        let mut abuse = Abuse::default().refused(watch_from(bench, [127, 0, 0, 1]).await.err(), full);
        let other = watches_on(watch_from(bench, [127, 0, 0, 2]).await.unwrap());
        // A place comes back with its watch.
        drop(first);
        let again = loop {
            match watch_from(bench, [127, 0, 0, 1]).await {
                Ok(watch) => break watch,
                Err(error) => abuse = abuse.refused(error, full),
            }
        };
        abuse.others.push(other);
        abuse.holds((second, again))
    })
    .await;
}

// ---- The journal.

/// The file of a record: kind and version, length, checksum of all other bytes, and the record.
fn file(record: &[u8]) -> Vec<u8> {
    let head = [&b"NMJ\x01"[..], &u32::try_from(record.len()).unwrap().to_le_bytes()].concat();
    let crc = proto_common::checksum::crc64(&[&head[..], record].concat());
    [&head[..], &crc.to_le_bytes(), record].concat()
}

/// A record of exactly `bytes` that is whole.
fn record_of(slots: SlotRange, bytes: usize) -> Vec<u8> {
    let mut record = SourceRecord::default();
    let mut spec = Pair::request("m9").spec.unwrap();
    spec.slots = Some(slots.into());
    let mut progress =
        MigrationProgress { migration_id: "m9".into(), spec: Some(spec), ..Default::default() };
    progress.set_state(MigrationState::Pending);
    record.progress = Some(progress);
    // The lengths before the text grow with it.
    while record.encoded_len() < bytes {
        let missing = bytes - record.encoded_len();
        let more = if missing > 64 { missing - 32 } else { missing.min(1) };
        record.progress.as_mut().unwrap().copy_reason.push_str(&"x".repeat(more));
    }
    assert_eq!(record.encoded_len(), bytes);
    record.encode_to_vec()
}

#[tokio::test]
async fn a_record_of_the_journal() {
    const LARGEST: usize = 4 << 20;
    let dir = tempfile::tempdir().unwrap();
    let slots = one_slot(slot_of(b"held"));
    let name = Journal::file_of(slots, &MigrationId::new("m9").unwrap());
    let path = dir.path().join("source").join(&name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let open = || Journal::open(dir.path().join("source"), 10).unwrap().1;
    // The control: one that is as large as a record may be.
    std::fs::write(&path, file(&record_of(slots, LARGEST))).unwrap();
    let whole = open();
    assert_eq!((whole.active.len(), whole.damaged), (1, vec![]));

    std::fs::write(&path, file(&record_of(slots, LARGEST + 1))).unwrap();
    let beyond = open();
    let [damaged] = beyond.damaged.as_slice() else { panic!("{:?}", beyond.damaged) };
    assert_eq!((damaged.file.as_str(), damaged.slots.as_slice()), (name.as_str(), &[slots][..]));
    assert!(damaged.problem.contains("4194321 bytes, more than any record"), "{damaged:?}");
    assert!(beyond.active.is_empty());

    // Its slots wait for somebody to look, and are counted for each who asks; others move.
    let _alone = ALONE.lock().await;
    let source = support::memory_source::MemorySource::default();
    let (client, stop) = driver(&dir, &source, &Arc::default()).await;
    let before = counts();
    let mut request = Pair::request("m7");
    request.spec.as_mut().unwrap().slots = Some(slots.into());
    let refused = Error::from(client.clone().start_migration(request).await.unwrap_err());
    let bare = path.file_name().unwrap().to_str().unwrap();
    assert!(refused.get("holder").unwrap().contains(bare), "{refused:?}");
    let mut other = Pair::request("m8");
    other.spec.as_mut().unwrap().slots = Some(one_slot(1).into());
    client.clone().start_migration(other).await.unwrap();
    let quarantined = Refusal { code: Code::FailedPrecondition, reason: "SLOTS_QUARANTINED", ..TOO_LARGE };
    counted(&before, &[(refused, quarantined)], &USUAL);
    stop().await;
}

#[tokio::test]
async fn a_record_beyond_the_largest_is_not_written() {
    let _alone = ALONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path(), 10).unwrap();
    let (slots, id) = (one_slot(5), MigrationId::new("m9").unwrap());
    let read = |bytes| SourceRecord::decode(record_of(slots, bytes).as_slice()).unwrap();
    journal.save(&id, slots, &read(4 << 20)).await.unwrap();
    let refused = journal.save(&id, slots, &read((4 << 20) + 1)).await.unwrap_err();
    assert_eq!(refused.reason(), "INTERNAL", "{refused:?}");
    let (_, recovered) = Journal::open(dir.path(), 10).unwrap();
    assert_eq!((recovered.active.len(), recovered.damaged), (1, vec![]), "the old one is there");
}

/// Everything that a target says of itself, of what went wrong and of what differs is cut before it is kept.
#[tokio::test]
async fn no_target_makes_a_source_write_a_record_that_it_cannot_read() {
    let _alone = ALONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let source = support::memory_source::MemorySource::default();
    source.write(b"key", Some(b"value")).await;
    let hostile = hostile_target::HostileTarget::default();
    let (mut client, stop) = driver_within(&dir, &source, hostile.dial(), Limits::default()).await;
    client.start_migration(Pair::request("m1")).await.unwrap();
    eventually("it has said all that it can", || hostile.refused() >= 3).await;
    stop().await;
    assert!(hostile.streams() >= 3, "a store ID, a lost log, and refusals");
    let file = std::fs::read_dir(dir.path().join("source/active")).unwrap().next().unwrap().unwrap();
    let bytes = file.metadata().unwrap().len();
    let (_, recovered) = Journal::open(dir.path().join("source"), 10).unwrap();
    assert_eq!(recovered.damaged, []);
    let [(_, record)] = recovered.active.as_slice() else { panic!("{recovered:?}") };
    let progress = record.progress.as_ref().unwrap();
    assert!(progress.copy > 1 && !progress.copy_reason.is_empty(), "the log was lost");
    assert!(progress.freeze_count > 1 && !progress.incidents.is_empty(), "freezes were refused");
    assert_eq!(progress.peer.as_ref().unwrap().store_id.len(), 16);
    assert!(bytes < 256 << 10, "{bytes} bytes are kept of what it said");
}

/// A target that reads no more when it is asked to prepare is given up, and holds neither clients nor the end of the node.
#[tokio::test(start_paused = true)]
async fn no_target_holds_a_source_by_not_reading() {
    let _alone = ALONE.lock().await;
    for stalls in [hostile_target::Stalls::Prepared, hostile_target::Stalls::Silent] {
        let dir = tempfile::tempdir().unwrap();
        let source = support::memory_source::MemorySource::default();
        source.write(b"key", Some(b"value")).await;
        let hostile = hostile_target::HostileTarget::stalling(stalls);
        let (mut client, stop) = driver_within(&dir, &source, hostile.dial(), Limits::default()).await;
        let mut request = Pair::request("m1");
        request.limits = Some(MigrationLimits { freeze_timeout_ms: Some(10_000), ..Default::default() });
        client.start_migration(request).await.unwrap();
        eventually("another stream comes", || hostile.streams() >= 2).await;
        let stopping = tokio::time::timeout(Duration::from_secs(30), stop()).await;
        stopping.expect("the node can be stopped");
    }
}

/// A target that has lost all whenever it is asked costs a copy each time, but not as many as it can make.
#[tokio::test(start_paused = true)]
async fn a_copy_that_starts_again_and_again_is_not_hurried() {
    let _alone = ALONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let source = support::memory_source::MemorySource::default();
    source.write(b"key", Some(b"value")).await;
    let (hostile, mut came) = hostile_target::HostileTarget::forgetful();
    let (mut client, stop) = driver_within(&dir, &source, hostile.dial(), Limits::default()).await;
    client.start_migration(Pair::request("m1")).await.unwrap();
    let came = came.wait_for(|came| came.len() >= 8).await.unwrap().clone();
    stop().await;
    // Each wait is random, up to twice as long as the one before; all of them below a hundredth of that is as good as impossible.
    let lasted = came[7] - came[1];
    assert!(lasted >= Duration::from_millis(100), "six copies within {lasted:?}");
}

fn highest_attempt(_: &Header) -> Option<Error> {
    used(u64::MAX)
}

fn highest_copy(_: &Header) -> Option<Error> {
    Some(Reason::StaleCopy.error("staged").metadata("copy", u64::MAX.to_string()))
}

fn used(attempt: u64) -> Option<Error> {
    Some(Reason::StaleAttempt.error("used").metadata("attempt", attempt.to_string()))
}

/// Whether its number rises or not.
#[tokio::test(start_paused = true)]
async fn an_attempt_is_not_claimed_as_fast_as_a_target_says_that_it_was_used() {
    let _alone = ALONE.lock().await;
    let refuses: [hostile_target::Refuses; 2] =
        [|header| used(header.attempt), |header| used(header.attempt + 1)];
    for refuses in refuses {
        let dir = tempfile::tempdir().unwrap();
        let source = support::memory_source::MemorySource::default();
        let (hostile, mut came) = hostile_target::HostileTarget::refusing(refuses);
        let (mut client, stop) = driver_within(&dir, &source, hostile.dial(), Limits::default()).await;
        client.start_migration(Pair::request("m1")).await.unwrap();
        let came = came.wait_for(|came| came.len() >= 8).await.unwrap().clone();
        stop().await;
        let lasted = came[7] - came[1];
        assert!(lasted >= Duration::from_millis(100), "six streams within {lasted:?}");
    }
}

#[tokio::test]
async fn no_number_that_a_target_tells_is_counted_beyond_the_highest() {
    let _alone = ALONE.lock().await;
    let cases: [(hostile_target::Refuses, MigrationState, &str); 4] = [
        (highest_attempt, MigrationState::Failed, "SUPERSEDED"),
        (highest_copy, MigrationState::Failed, "STALE_COPY"),
        // Once it has accepted.
        (
            |header| highest_attempt(header).filter(|_| header.attempt > 1),
            MigrationState::NeedsOperator,
            "SUPERSEDED",
        ),
        (
            |header| highest_copy(header).filter(|_| header.attempt > 1),
            MigrationState::Cancelling,
            "STALE_COPY",
        ),
    ];
    for (refuses, state, reason) in cases {
        let mut pair = Pair::start().await;
        pair.fill(1).await;
        pair.source_down().await;
        let (hostile, _came) = hostile_target::HostileTarget::refusing(refuses);
        up_to(&mut pair, &hostile).await;
        pair.begin(|_| {}).await.unwrap();
        let stopped = pair.reaches(state).await;
        assert_eq!(error_of(&stopped).reason(), reason, "{stopped:?}");
        // Nor at the next start.
        pair.source_down().await;
        pair.source = pair.source.restarted();
        up_to(&mut pair, &hostile).await;
        pair.until("nothing is logged", |_| !pair.source.has_log(&id())).await;
        pair.source_serves().await;
        assert_eq!(pair.progress().await.state(), state);
        if state == MigrationState::NeedsOperator {
            let resolved = pair.resolve(MigrationDecision::Discarded, |_| {}).await.unwrap();
            assert_eq!(resolved.state(), MigrationState::Cancelled);
        }
    }
}

/// The slots are the target's, and no operator is asked about them.
#[tokio::test]
async fn what_was_handed_over_stays_so_whatever_the_target_says() {
    let _alone = ALONE.lock().await;
    let mut pair = Pair::start().await;
    pair.fill(10).await;
    pair.target.fault("forget", Fault::Wait(Arc::new(Semaphore::new(0))));
    pair.begin(|_| {}).await.unwrap();
    pair.until("the target is told", |_| pair.target.calls("forget") == 1).await;
    assert_eq!(pair.progress().await.state(), MigrationState::Completed);
    pair.source_down().await;
    pair.source = pair.source.restarted();
    let (hostile, mut came) = hostile_target::HostileTarget::refusing(|_| {
        Some(Reason::Superseded.error("another one").metadata("attempt", "9"))
    });
    up_to(&mut pair, &hostile).await;
    let came = came.wait_for(|came| came.len() >= 3);
    tokio::time::timeout(PATIENCE, came).await.expect("it is told again").unwrap();
    let shown = pair.progress().await;
    assert_eq!((shown.state(), shown.gate()), (MigrationState::Completed, MigrationGate::Moved), "{shown:?}");
    let refused = pair.resolve(MigrationDecision::Discarded, |_| {}).await.unwrap_err();
    assert_eq!(refused.reason(), "RESOLVE_REFUSED");
    assert_eq!(pair.source.read(b"key1").await, Read::Moved { owner: "n2".into(), epoch: 1 });
}

/// The source of `pair` comes back, and finds another target.
async fn up_to(pair: &mut Pair, hostile: &hostile_target::HostileTarget) {
    let (client, stop) = driver_within(&pair.dir, &pair.source, hostile.dial(), Limits::default()).await;
    (pair.client, pair.stop_driver) = (client, Some(stop));
}

/// So that no row of the table is forgotten here: each limit is lowered, or exceeded by its name.
#[test]
fn every_limit_of_the_table_is_here() {
    let here = include_str!("limits.rs");
    let limits = limits_of("Migrations:");
    // The disk is the store's: of examples/node, see its tests of staging.
    let of_store = |name: &str| name == "MigrationTarget" || name.starts_with("node serve");
    let limits: Vec<_> = limits.into_iter().filter(|name| !of_store(name)).collect();
    for name in &limits {
        assert!(
            ["limits.", "async fn "].iter().any(|at| here.contains(&format!("{at}{name}"))),
            "no test exceeds {name}"
        );
    }
    assert!(limits.len() >= 10, "the table was found: {limits:?}");
}
