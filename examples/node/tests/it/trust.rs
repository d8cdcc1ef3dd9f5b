//! Real nodes by TLS: certificates that are replaced while data moves, and callers that may not do what they try.

use crate::certificates;
use std::path::Path;
use std::time::Duration;

use crate::certificates::{Ca, Issue};
use crate::secret::Secret;
use crate::support::{call, client, load, program, until};
use node::demo::processes::NodeProcess;
use node::store::NodeAddresses;
use prost::Message as _;
use proto::common::connect::Connect as _;
use proto::common::dial::{Dialer, NodeChannel};
use proto::common::error::{CommonReason, Error};
use proto::common::tls::{Tls, TlsPem};
use proto::node::migration_service_client::MigrationServiceClient;
use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto::node::transfer_migration_data_request::{Frame, Header};
use proto::node::transfer_split_snapshot_request::{
    Frame as SnapshotFrame, Header as SnapshotHeader, LaneHeader,
};
use proto::node::{
    CancelTransferRequest, Direction, GetMigrationProgressRequest, ListTransfersRequest, MigrationLimits,
    MigrationSpec, MigrationState, NodeIdentity, SlotRange, StartMigrationRequest,
    TransferMigrationDataRequest, TransferPhase, TransferSplitSnapshotRequest,
};

/// Puts a file in its place, whole at every moment.
fn put(path: &Path, text: &str) {
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, text).unwrap();
    std::fs::rename(fresh, path).unwrap();
}

/// Certificates of a node in `directory/<id>`, signed by `ca`, which trusts all of `trusted`. Whole at every moment for who reads
/// them one after the other, except between two of the three: then the node keeps what it has.
fn write(directory: &Path, id: &str, ca: &Ca, trusted: &[&Ca]) {
    issue(directory, id, ca, trusted, &Issue::node(id));
}

/// The same with a certificate that says `issue`.
fn issue(directory: &Path, id: &str, ca: &Ca, trusted: &[&Ca], issue: &Issue) {
    let directory = directory.join(format!("tls-{id}"));
    std::fs::create_dir_all(&directory).unwrap();
    let (certificate, key) = ca.issue(issue);
    let bundle: String = trusted.iter().map(|ca| ca.pem()).collect();
    for (name, text) in [("ca.crt", bundle), ("node.crt", certificate), ("node.key", key)] {
        put(&directory.join(name), &text);
    }
}

async fn start(directory: &Path, id: &str, slots: &str) -> NodeProcess {
    let file = |name: &str| directory.join(format!("tls-{id}")).join(name).display().to_string();
    let arguments = [("--tls-ca", "ca.crt"), ("--tls-cert", "node.crt"), ("--tls-key", "node.key")];
    let arguments: Vec<_> =
        arguments.into_iter().flat_map(|(flag, name)| [flag.to_owned(), file(name)]).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    NodeProcess::start_with(&program(), id, directory, slots, &arguments).await.unwrap()
}

fn tls(ca: &Ca, trusted: &[&Ca], uri: &str) -> Tls {
    let (certificate, key) = ca.issue(&Issue::uri(uri));
    let bundle: String = trusted.iter().map(|ca| ca.pem()).collect();
    Tls::from_pem(TlsPem { ca: bundle.into(), certificate: certificate.into(), key: key.into() }).unwrap()
}

async fn connect(tls: Tls, node: &NodeProcess) -> Result<NodeChannel, Error> {
    Dialer::tls(tls).to(&node.addresses().grpc, Some(&node.id().parse().unwrap()))?.connect().await
}

/// The wire is raw bytes, so that every method of every descriptor can be called with an empty message.
#[derive(Debug, Clone, Copy, Default)]
struct Empty;

impl tonic::codec::Codec for Empty {
    type Encode = ();
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl tonic::codec::Encoder for Empty {
    type Item = ();
    type Error = tonic::Status;

    fn encode(&mut self, (): (), _: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        Ok(())
    }
}

impl tonic::codec::Decoder for Empty {
    type Item = ();
    type Error = tonic::Status;

    fn decode(&mut self, from: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<()>, tonic::Status> {
        bytes::Buf::advance(from, bytes::Buf::remaining(from));
        Ok(Some(()))
    }
}

/// Every method of every service of the node: its path, and whether it streams.
fn methods() -> Vec<(String, String)> {
    let sets = [
        proto::snapshot::FILE_DESCRIPTOR_SET,
        proto::migration::FILE_DESCRIPTOR_SET,
        proto::health::FILE_DESCRIPTOR_SET,
    ];
    let mut methods = Vec::new();
    for set in sets {
        for file in prost_types::FileDescriptorSet::decode(set).unwrap().file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    methods.push((path, method.name().to_owned()));
                }
            }
        }
    }
    methods
}

/// What comes of calling a method with an empty message.
async fn poke(channel: NodeChannel, path: &str) -> Result<(), Error> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let one = tonic::Request::new(futures::stream::iter([()]));
    let path = path.parse().unwrap();
    let mut answers = grpc.streaming(one, path, Empty).await.map_err(Error::from)?.into_inner();
    tokio::time::timeout(Duration::from_secs(20), answers.message())
        .await
        .unwrap()
        .map_err(Error::from)
        .map(drop)
}

#[tokio::test]
async fn an_observer_reads_and_changes_nothing_whatever_the_method() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("one"));
    write(dir.path(), "n1", &ca, &[&ca]);
    let n1 = start(dir.path(), "n1", "0-16383").await;
    let observer = connect(tls(&ca, &[&ca], "observer://c1/grafana"), &n1).await.unwrap();
    let operator = connect(tls(&ca, &[&ca], "operator://c1/alice"), &n1).await.unwrap();
    let (mut reads, mut writes) = (0, 0);
    for (path, method) in methods() {
        let changes_nothing =
            ["Get", "List", "Watch", "HealthCheck"].iter().any(|start| method.starts_with(start));
        let refused =
            |outcome: Result<(), Error>| outcome.is_err_and(|error| error.is(CommonReason::PermissionDenied));
        let of_observer = refused(poke(observer.clone(), &path).await);
        assert_eq!(of_observer, !changes_nothing, "{path}");
        // The control: what an observer is refused, an operator reaches, except the data plane of migrations.
        let of_operator = refused(poke(operator.clone(), &path).await);
        assert_eq!(of_operator, method == "TransferMigrationData", "{path}");
        if changes_nothing { reads += 1 } else { writes += 1 }
    }
    assert!(reads >= 9 && writes >= 7, "{reads} {writes}");
}

#[tokio::test]
async fn a_node_with_a_good_certificate_cannot_take_over_what_is_anothers() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("one"));
    for id in ["n1", "n2"] {
        write(dir.path(), id, &ca, &[&ca]);
    }
    let n1 = start(dir.path(), "n1", "0-16383").await;
    let n2 = start(dir.path(), "n2", "none").await;
    load(&n1, 200).await;
    let operator = tls(&ca, &[&ca], "operator://c1/alice");
    let spec = MigrationSpec {
        slots: Some(SlotRange { start: 0, end: 100 }),
        source_shard_id: "s1".to_owned(),
        target_shard_id: "s2".to_owned(),
        source_node_id: "n1".to_owned(),
        target_node_id: "n2".to_owned(),
        auto_complete: false,
        value_format: String::new(),
    };
    let order = StartMigrationRequest {
        migration_id: "m1".to_owned(),
        spec: Some(spec.clone()),
        target_address: n2.addresses().grpc.clone(),
        ..StartMigrationRequest::default()
    };
    let hostile = tls(&ca, &[&ca], "node://c1/n3");
    // A node orders nothing.
    let mut as_node = MigrationServiceClient::new(connect(hostile.clone(), &n1).await.unwrap());
    let refused = Error::from(as_node.start_migration(order.clone()).await.unwrap_err());
    assert!(refused.is(CommonReason::PermissionDenied), "{refused:?}");
    let mut as_operator = MigrationServiceClient::new(connect(operator.clone(), &n1).await.unwrap());
    as_operator.start_migration(order).await.unwrap();
    let state = async |direction: Direction, node: &NodeProcess| {
        let mut client = MigrationServiceClient::new(connect(operator.clone(), node).await.unwrap());
        let request =
            GetMigrationProgressRequest { migration_id: "m1".to_owned(), direction: direction.into() };
        client.get_migration_progress(request).await.ok().and_then(|answer| answer.into_inner().migration)
    };
    until("it is READY", async || {
        state(Direction::Out, &n1).await.is_some_and(|migration| migration.state() == MigrationState::Ready)
    })
    .await;
    let before = state(Direction::In, &n2).await.unwrap();

    // It claims to be n1, with the next attempt; all else is right.
    let source = before.peer.clone().unwrap();
    let value_format = before.spec.clone().unwrap().value_format;
    let header = |node_id: &str| Header {
        migration_id: "m1".to_owned(),
        spec: Some(MigrationSpec {
            source_node_id: node_id.to_owned(),
            value_format: value_format.clone(),
            ..spec.clone()
        }),
        purpose: 1,
        source: Some(NodeIdentity {
            node_id: node_id.to_owned(),
            cluster_id: "c1".to_owned(),
            ..source.clone()
        }),
        attempt: before.attempt + 1,
        session: vec![9; 16].into(),
        copy: 1,
        ..Header::default()
    };
    let mut at_target = MigrationServiceClient::new(connect(hostile.clone(), &n2).await.unwrap());
    let mut try_as = async |node_id: &str| {
        let frame = TransferMigrationDataRequest { frame: Some(Frame::Header(header(node_id))) };
        let answers = at_target.transfer_migration_data(futures::stream::iter([frame])).await;
        let answer = match answers {
            Ok(answers) => answers.into_inner().message().await,
            Err(status) => Err(status),
        };
        Error::from(answer.unwrap_err())
    };
    let refused = try_as("n1").await;
    assert!(
        refused.is(CommonReason::PermissionDenied) && refused.message().contains("node://c1/n3"),
        "{refused:?}"
    );
    // In its own name it is another migration.
    let refused = try_as("n3").await;
    assert_eq!(refused.reason(), "SPECIFICATION_MISMATCH", "{refused:?}");
    let after = state(Direction::In, &n2).await.unwrap();
    assert_eq!((after.attempt, after.state()), (before.attempt, before.state()), "nothing was disturbed");
}

#[tokio::test]
async fn a_node_with_a_good_certificate_cannot_touch_the_transfer_of_another_one() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("one"));
    for id in ["n1", "n2"] {
        write(dir.path(), id, &ca, &[&ca]);
    }
    let n1 = start(dir.path(), "n1", "0-16383").await;
    let n2 = start(dir.path(), "n2", "none").await;
    load(&n1, 20_000).await;
    let NodeAddresses { grpc, resp } = n2.addresses();
    let begun = call(&mut client(&n1).await, &format!("SPLIT 8192 n2 {grpc} {resp} RATE 32768")).await;
    assert!(!begun.starts_with('-'), "{begun}");
    let as_who = async |uri: &str, node: &NodeProcess| {
        SplitSnapshotServiceClient::new(connect(tls(&ca, &[&ca], uri), node).await.unwrap())
    };
    let mut operator = as_who("operator://c1/alice", &n2).await;
    let mut shown = async || {
        let listed = operator.list_transfers(ListTransfersRequest::default()).await.unwrap().into_inner();
        listed.transfers.into_iter().next()
    };
    until("the transfer runs", async || {
        shown().await.is_some_and(|shown| shown.phase() == TransferPhase::Transferring)
    })
    .await;
    let before = shown().await.unwrap();
    let transfer_id = before.transfer_id.clone();
    let cancel =
        CancelTransferRequest { transfer_id: transfer_id.clone(), ..CancelTransferRequest::default() };

    // At either end, in either direction; and by the target's own certificate at the source.
    let mut refusals = Vec::new();
    for (uri, node) in [("node://c1/n3", &n1), ("node://c1/n3", &n2), ("node://c1/n2", &n1)] {
        for direction in
            [Direction::Unspecified, if node.id() == "n1" { Direction::Out } else { Direction::In }]
        {
            let cancel = CancelTransferRequest { direction: direction.into(), ..cancel.clone() };
            refusals.push(as_who(uri, node).await.cancel_transfer(cancel).await.unwrap_err());
        }
    }
    // As one of its lanes, and as its next attempt.
    let lane = LaneHeader {
        transfer_id: transfer_id.clone(),
        attempt: before.attempt,
        session: vec![9; 16].into(),
        lane: 1,
        generation: 1,
    };
    let next = SnapshotHeader {
        transfer_id,
        source_shard_id: before.source_shard_id.clone(),
        target_shard_id: before.target_shard_id.clone(),
        source_node_id: "n1".to_owned(),
        slots: before.slots,
        snapshot_index: 1,
        snapshot_term: 1,
        attempt: before.attempt + 1,
        session: vec![9; 16].into(),
        generation: 1,
        file_count: 1,
        name_bytes: 1,
        lanes: 1,
        ..SnapshotHeader::default()
    };
    for frame in [SnapshotFrame::LaneHeader(lane), SnapshotFrame::Header(next)] {
        let frames = futures::stream::iter([TransferSplitSnapshotRequest { frame: Some(frame) }]);
        let answers = as_who("node://c1/n3", &n2).await.transfer_split_snapshot(frames).await;
        refusals.push(answers.unwrap().into_inner().message().await.unwrap_err());
    }
    for refused in refusals {
        let refused = Error::from(refused);
        assert!(refused.is(CommonReason::PermissionDenied), "{refused:?}");
    }
    let after = shown().await.unwrap();
    assert_eq!((after.phase(), after.attempt), (TransferPhase::Transferring, before.attempt), "undisturbed");

    // The control: an operator may.
    as_who("operator://c1/alice", &n2).await.cancel_transfer(cancel).await.unwrap();
    assert_eq!(shown().await.unwrap().phase(), TransferPhase::Cancelled);
}

#[tokio::test]
async fn certificates_and_the_ca_rotate_under_a_split_and_a_migration() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (Ca::new("old"), Ca::new("new"));
    for id in ["n1", "n2"] {
        write(dir.path(), id, &old, &[&old]);
    }
    let n1 = start(dir.path(), "n1", "0-16383").await;
    let n2 = start(dir.path(), "n2", "none").await;
    load(&n1, 20_000).await;
    let mut redis = client(&n1).await;

    // A split at a rate that leaves time.
    let addresses = n2.addresses();
    let split = format!("SPLIT 8192 n2 {} {} RATE 98304", addresses.grpc, addresses.resp);
    let transfer = call(&mut redis, &split).await;
    assert!(!transfer.starts_with('-'), "{transfer}");
    let operator_of_old = tls(&old, &[&old], "operator://c1/alice");
    let phase = async |tls: &Tls| {
        let channel = connect(tls.clone(), &n2).await?;
        let listed =
            SplitSnapshotServiceClient::new(channel).list_transfers(ListTransfersRequest::default()).await;
        let listed = listed.map_err(Error::from)?.into_inner().transfers;
        Ok::<_, Error>(listed.into_iter().next())
    };
    until("the transfer runs", async || {
        let shown = phase(&operator_of_old).await.unwrap();
        shown.is_some_and(|shown| shown.phase() == TransferPhase::Transferring)
    })
    .await;
    // The careful way: first everybody trusts both, then certificates are of the new CA, then the old one goes.
    for (ca, trusted) in [(&old, &[&old, &new][..]), (&new, &[&old, &new][..]), (&new, &[&new][..])] {
        for id in ["n1", "n2"] {
            write(dir.path(), id, ca, trusted);
        }
        let probe = tls(ca, trusted, "observer://c1/probe");
        until("both have taken it", async || {
            let mut taken = true;
            for node in [&n1, &n2] {
                taken &= connect(probe.clone(), node).await.is_ok();
            }
            taken
        })
        .await;
    }
    // The control: it is over for the old CA, and the transfer was under way all the time.
    let operator = tls(&new, &[&new], "operator://c1/alice");
    until("the old CA is out", async || phase(&operator_of_old).await.is_err()).await;
    let shown = phase(&operator).await.unwrap().unwrap();
    assert_eq!(shown.phase(), TransferPhase::Transferring, "it takes longer than the rotation");
    assert_eq!(shown.connections, 1, "the sender never had to connect again: {shown:?}");
    until("the split is done", async || {
        phase(&operator).await.unwrap().is_some_and(|shown| shown.phase() == TransferPhase::Installed)
    })
    .await;
    assert_eq!(phase(&operator).await.unwrap().unwrap().attempt, 1);

    // New connections between the nodes, of a migration back, are made with the new certificates.
    let mut at_n2 = MigrationServiceClient::new(connect(operator.clone(), &n2).await.unwrap());
    let order = StartMigrationRequest {
        migration_id: "back".to_owned(),
        spec: Some(MigrationSpec {
            slots: Some(SlotRange { start: 8192, end: 8300 }),
            source_shard_id: "s2".to_owned(),
            target_shard_id: "s1".to_owned(),
            source_node_id: String::new(),
            target_node_id: "n1".to_owned(),
            auto_complete: true,
            value_format: String::new(),
        }),
        target_address: n1.addresses().grpc.clone(),
        ..StartMigrationRequest::default()
    };
    until("n2 owns the slots", async || at_n2.start_migration(order.clone()).await.is_ok()).await;
    until("it is COMPLETED", async || {
        let request =
            GetMigrationProgressRequest { migration_id: "back".to_owned(), direction: Direction::Out.into() };
        let state = at_n2.get_migration_progress(request).await.unwrap().into_inner().migration.unwrap();
        assert!(state.progress.as_ref().is_none_or(|progress| progress.error.is_none()), "{state:?}");
        state.state() == MigrationState::Completed
    })
    .await;
}

/// The call is refused by what its head says: its request never comes.
#[tokio::test]
async fn a_call_for_another_cluster_is_refused_before_its_request_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = NodeProcess::start_with(&program(), "n1", dir.path(), "0-16383", &["--cluster", "c1"]).await;
    let n1 = n1.unwrap();
    let in_cluster = async |name: &str| {
        let dialer = Dialer::plaintext().in_cluster(Some(&name.parse().unwrap()));
        dialer.to(&n1.addresses().grpc, None).unwrap().connect().await.unwrap()
    };
    let (ours, theirs) = (in_cluster("c1").await, in_cluster("c2").await);
    for (path, _) in methods() {
        let mut grpc = tonic::client::Grpc::new(theirs.clone());
        grpc.ready().await.unwrap();
        let never = tonic::Request::new(futures::stream::pending::<()>());
        // Well before the node gives up waiting for a request, after 30 s.
        let answer = tokio::time::timeout(
            Duration::from_secs(15),
            grpc.streaming(never, path.parse().unwrap(), Empty),
        );
        let refused = answer.await.unwrap_or_else(|_| panic!("{path} waits for the request"));
        let refused = Error::from(refused.map(drop).unwrap_err());
        assert!(refused.is(CommonReason::WrongCluster) && !refused.is_retryable(), "{path}: {refused:?}");
        assert_eq!(refused.get("cluster_id"), Some("c1"), "{path}: {refused:?}");
        // Meanwhile another one is answered.
        poke(ours.clone(), "/node.health.v1.HealthService/HealthCheck").await.unwrap();
    }
}

#[tokio::test]
async fn the_key_of_a_node_is_in_no_log() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("one"));
    let key_file = dir.path().join("tls-n1").join("node.key");
    let key = || std::fs::read_to_string(&key_file).unwrap();
    write(dir.path(), "n1", &ca, &[&ca]);
    let mut keys = vec![key()];
    let mut n1 = start(dir.path(), "n1", "0-16383").await;
    n1.stop().await.unwrap();
    n1.set_environment(&[("RUST_LOG", "trace")]);
    n1.restart().await.unwrap();
    let log = || std::fs::read_to_string(n1.log()).unwrap();
    let operator = tls(&ca, &[&ca], "operator://c1/alice");
    let calls = async || {
        let channel = connect(operator.clone(), &n1).await.unwrap();
        poke(channel, "/node.health.v1.HealthService/GetNodeStatus").await.unwrap();
    };
    calls().await;
    // Another one, and what cannot be one.
    write(dir.path(), "n1", &ca, &[&ca]);
    keys.push(key());
    until("the new certificate is taken", async || log().contains("new certificates are in use")).await;
    calls().await;
    let (first, rest) = keys[1].split_once('\n').unwrap();
    let half = keys[1][..keys[1].len() / 2].to_owned();
    let damaged =
        [half, format!("{first}\n*{}", &rest[1..]), format!("{first}\nAAAA{}", &rest[4..]), keys[0].clone()];
    for (number, damaged) in damaged.iter().enumerate() {
        put(&key_file, damaged);
        until("it is refused", async || {
            log().matches("the new certificates cannot be used").count() > number
        })
        .await;
    }
    calls().await;
    let mut command = tokio::process::Command::new(program());
    command
        .args(["serve", "--id", "n1", "--grpc", "127.0.0.1:0", "--resp", "127.0.0.1:0"])
        .env("RUST_LOG", "trace");
    for (flag, name) in [("--tls-ca", "ca.crt"), ("--tls-cert", "node.crt"), ("--tls-key", "node.key")] {
        command.arg(flag).arg(dir.path().join("tls-n1").join(name));
    }
    command.arg("--data").arg(dir.path().join("data")).kill_on_drop(true);
    let ended = tokio::time::timeout(Duration::from_secs(60), command.output()).await.unwrap().unwrap();
    let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(!ended.status.success() && stderr.contains("key does not match certificate"), "{stderr}");
    let text = log() + &stderr;
    assert!(text.contains("TRACE"), "nothing is logged in detail");
    for key in &keys {
        Secret::of(key).is_not_in(key, &text);
    }
}

#[tokio::test]
async fn what_is_wrong_with_the_flags_is_said() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("one"));
    write(dir.path(), "n1", &ca, &[&ca]);
    let file = |name: &str| dir.path().join("tls-n1").join(name).display().to_string();
    let (ca_file, certificate, key) = (file("ca.crt"), file("node.crt"), file("node.key"));
    let all = ["--tls-ca", &ca_file, "--tls-cert", &certificate, "--tls-key", &key];
    for (id, flags, named) in [
        ("n1", &all[..2], "--tls-cert"),
        ("n1", &all[..4], "--tls-key"),
        ("n2", &all[..], "--tls-cert"),
        ("n1", &[&all[..], &["--cluster", "c2"]].concat(), "--cluster is c2"),
        ("n1", &[&all[..], &["--insecure-plaintext"]].concat(), "--insecure-plaintext"),
        (
            "n1",
            &["--tls-ca", &ca_file, "--tls-cert", &key, "--tls-key", &key],
            "node.key holds no certificate",
        ),
        ("n1", &["--grpc", "0.0.0.0:0"], "--insecure-plaintext"),
    ] {
        let mut command = tokio::process::Command::new(program());
        command.args(["serve", "--id", id, "--resp", "127.0.0.1:0"]).args(flags);
        if !flags.contains(&"--grpc") {
            command.args(["--grpc", "127.0.0.1:0"]);
        }
        command.arg("--data").arg(dir.path().join("data")).kill_on_drop(true);
        let ended = tokio::time::timeout(Duration::from_secs(60), command.output()).await.unwrap().unwrap();
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert!(!ended.status.success() && stderr.contains(named), "{flags:?}: {stderr}");
        assert!(!dir.path().join("data").exists(), "nothing was made");
    }
}

#[tokio::test]
async fn a_migration_waits_for_a_certificate_that_has_expired_to_be_renewed() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("one"));
    let expires = certificates::now() + 15;
    issue(dir.path(), "n1", &ca, &[&ca], &Issue { not_after: expires, ..Issue::node("n1") });
    write(dir.path(), "n2", &ca, &[&ca]);
    let n1 = start(dir.path(), "n1", "0-16383").await;
    let mut n2 = start(dir.path(), "n2", "none").await;
    load(&n1, 2000).await;
    // A client does not compare its own certificate with the clock, and n1's has to be valid for this connection only while it is made.
    let operator = tls(&ca, &[&ca], "operator://c1/alice");
    let mut at_n1 = MigrationServiceClient::new(connect(operator.clone(), &n1).await.unwrap());
    let order = StartMigrationRequest {
        migration_id: "m".to_owned(),
        spec: Some(MigrationSpec {
            slots: Some(SlotRange { start: 8192, end: 16384 }),
            source_shard_id: "s1".to_owned(),
            target_shard_id: "s2".to_owned(),
            source_node_id: "n1".to_owned(),
            target_node_id: "n2".to_owned(),
            auto_complete: true,
            value_format: String::new(),
        }),
        target_address: n2.addresses().grpc.clone(),
        limits: Some(MigrationLimits { max_bytes_per_second: Some(4 << 10), ..MigrationLimits::default() }),
        ..StartMigrationRequest::default()
    };
    at_n1.start_migration(order.clone()).await.unwrap();
    let mut shown = async || {
        let request =
            GetMigrationProgressRequest { migration_id: "m".to_owned(), direction: Direction::Out.into() };
        at_n1.get_migration_progress(request).await.unwrap().into_inner().migration.unwrap()
    };
    until("it copies", async || shown().await.state() == MigrationState::Copying).await;
    until("the certificate of n1 has expired", async || certificates::now() > expires).await;
    // What is open goes on; the next connection is refused.
    assert_eq!(shown().await.state(), MigrationState::Copying);
    n2.kill().await.unwrap();
    n2.restart().await.unwrap();
    until("the source is told", async || {
        let error = shown().await.progress.unwrap().error;
        error.is_some_and(|error| error.reason == "CERTIFICATE_EXPIRED")
    })
    .await;
    assert_eq!(shown().await.state(), MigrationState::Copying, "it waits");

    write(dir.path(), "n1", &ca, &[&ca]);
    let request = StartMigrationRequest { limits: None, ..order };
    until("n1 can be reached again", async || {
        let Ok(channel) = connect(operator.clone(), &n1).await else { return false };
        // The same order, without the limit on its rate.
        MigrationServiceClient::new(channel).start_migration(request.clone()).await.is_ok()
    })
    .await;
    until("it is COMPLETED", async || shown().await.state() == MigrationState::Completed).await;
}

#[tokio::test]
async fn every_method_refuses_calls_for_another_cluster_in_plaintext() {
    let dir = tempfile::tempdir().unwrap();
    let n1 = NodeProcess::start_with(&program(), "n1", dir.path(), "0-16383", &["--cluster", "c1"]).await;
    let n1 = n1.unwrap();
    let in_cluster = async |cluster: Option<&str>| {
        let cluster = cluster.map(|name| name.parse().unwrap());
        let dialer = Dialer::plaintext().in_cluster(cluster.as_ref());
        dialer.to(&n1.addresses().grpc, None).unwrap().connect().await.unwrap()
    };
    let (ours, theirs, nameless) =
        (in_cluster(Some("c1")).await, in_cluster(Some("c2")).await, in_cluster(None).await);
    let is_refused =
        |outcome: Result<(), Error>| outcome.is_err_and(|error| error.is(CommonReason::WrongCluster));
    for (path, _) in methods() {
        assert!(is_refused(poke(theirs.clone(), &path).await), "{path}");
        assert!(is_refused(poke(nameless.clone(), &path).await), "{path}");
        assert!(!is_refused(poke(ours.clone(), &path).await), "{path}");
    }
    // A client that names none is let in.
    let silent = Dialer::plaintext().to(&n1.addresses().grpc, None).unwrap().connect().await.unwrap();
    for (path, _) in methods() {
        assert!(!is_refused(poke(silent.clone(), &path).await), "{path}");
    }
    // Nodes name theirs, also where no message does.
    let n2 =
        NodeProcess::start_with(&program(), "n2", dir.path(), "none", &["--cluster", "c2"]).await.unwrap();
    load(&n1, 10).await;
    let NodeAddresses { grpc, resp } = n2.addresses();
    let begun = call(&mut client(&n1).await, &format!("SPLIT 8192 n2 {grpc} {resp}")).await;
    assert!(begun.contains("the call is meant for cluster \"c1\", this node is of \"c2\""), "{begun}");
    assert_eq!(call(&mut client(&n1).await, "SET foo 1").await, "OK", "the slots are n1's as before");
}
