//! `transfers`, `progress` and `cancel`, and peers that lie.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod support;

use std::process::Stdio;

use proto::node::{ListTransfersResponse, Progress, TaskError, TransferProgress};
use support::{Node, Running, nodectl, refusing_port, snapshot, until};

const MIB: usize = 1 << 20;

fn push(node: &Node, path: &str, id: &str, more: &str) -> Running {
    let push = format!(
        "push {path} --to {} --source-shard s1 --target-shard s2 --transfer-id {id} {more}",
        node.address
    );
    Running::start(&push)
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_what_runs_and_what_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (path, size) = snapshot(dir.path(), 4 * MIB);
    let node = Node::start(&dir.path().join("data")).await;
    let at = format!("--at {}", node.address);
    let empty = nodectl(&format!("transfers {at} --json")).await;
    assert_eq!(empty.stdout, "{\"transfers\":[]}\n");

    assert_eq!(push(&node, &path, "done", "").ended().await.code, Some(0));
    let running = push(&node, &path, "runs", "--rate 1MiB --index 1");
    until("some of it is durable", || node.durable("runs") > 0).await;

    let list = nodectl(&format!("transfers {at} --json")).await;
    assert_eq!(list.code, Some(0), "{list:?}");
    let transfers = list.last()["transfers"].clone();
    let row = |index: usize| (transfers[index]["transfer_id"].as_str(), transfers[index]["phase"].as_str());
    assert_eq!(row(0), (Some("runs"), Some("transferring")));
    assert_eq!(row(1), (Some("done"), Some("installed")));
    assert_eq!(transfers[1]["bytes_done"], size);
    assert_eq!(transfers[1]["finished"], true);
    assert_eq!(transfers[0]["direction"], "in");

    let lines = nodectl(&format!("transfers {at}")).await;
    lines.assert_plain();
    let rows: Vec<Vec<&str>> = lines.stdout.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(rows.len(), 3, "{lines:?}");
    assert_eq!(&rows[2][..3], ["done", "in", "installed"]);
    assert!(rows.iter().all(|row| row.len() == rows[0].len()), "{lines:?}");

    let active = nodectl(&format!("transfers {at} --active --json")).await.last();
    assert_eq!(active["transfers"].as_array().unwrap().len(), 1);
    let out = nodectl(&format!("transfers {at} --direction out --json")).await.last();
    assert_eq!(out["transfers"].as_array().unwrap().len(), 0);
    drop(running);
}

#[tokio::test(flavor = "multi_thread")]
async fn shows_and_follows_one() {
    let dir = tempfile::tempdir().unwrap();
    let (path, size) = snapshot(dir.path(), 4 * MIB);
    let node = Node::start(&dir.path().join("data")).await;
    let running = push(&node, &path, "t1", "--rate 1MiB");
    until("some of it is durable", || node.durable("t1") > 0).await;
    let watch = nodectl(&format!("progress t1 --at {} --watch --json", node.address)).await;
    assert_eq!(watch.code, Some(0), "{watch:?}");
    let documents = watch.documents();
    assert!(documents.len() >= 3, "{watch:?}");
    assert!(
        documents.iter().all(|document| document["event"] == "progress" && document["transfer_id"] == "t1")
    );
    assert!(
        documents.windows(2).all(|pair| pair[0]["bytes_done"].as_u64() <= pair[1]["bytes_done"].as_u64())
    );
    assert_eq!(watch.last()["phase"], "installed");
    assert_eq!(running.ended().await.code, Some(0));

    let one = nodectl(&format!("progress t1 --at {} --json", node.address)).await;
    assert_eq!(one.documents().len(), 1);
    assert_eq!(one.last()["bytes_total"], size);
    let phases = one.last()["phases"].as_array().unwrap().len();
    assert!(phases >= 3, "{one:?}");
    let text = nodectl(&format!("progress t1 --at {}", node.address)).await;
    text.assert_plain();
    assert!(text.stdout.contains("phase       installed"), "{text:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_of_what_is_cancelled_fails() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), 4 * MIB);
    let node = Node::start(&dir.path().join("data")).await;
    let running = push(&node, &path, "t1", "--rate 1MiB");
    until("some of it is durable", || node.durable("t1") > 0).await;
    let mut watch = Running::start(&format!("progress t1 --at {} --watch", node.address));
    watch.says("transferring").await;
    let cancel = nodectl(&format!("cancel t1 --at {} --reason wrong-shard --json", node.address)).await;
    assert_eq!(cancel.code, Some(0), "{cancel:?}");
    assert_eq!(cancel.last()["phase"], "cancelled");
    assert_eq!(cancel.last()["error"]["reason"], "TRANSFER_CANCELLED");
    let watched = watch.ended().await;
    assert_eq!(watched.code, Some(1), "{watched:?}");
    watched.assert_plain();
    assert!(watched.stderr.contains("t1 is cancelled: cancelled: wrong-shard"), "{watched:?}");
    assert_eq!(running.ended().await.code, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_outlives_the_node() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), 8 * MIB);
    let data = dir.path().join("data");
    let node = Node::start(&data).await;
    let address = node.address;
    let running = push(&node, &path, "t1", "--rate 4MiB");
    until("some of it is durable", || node.durable("t1") > 0).await;
    let mut watch = Running::start(&format!("progress t1 --at {address} --watch"));
    watch.says("transferring").await;
    let port = node.kill();
    watch.says("waiting for").await;
    let _node = Node::start_on(&data, port).await;
    let watched = watch.ended().await;
    assert_eq!(watched.code, Some(0), "{watched:?}");
    assert_eq!(running.ended().await.code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_a_reason_and_advice() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), 1000);
    let node = Node::start(&dir.path().join("data")).await;
    assert_eq!(push(&node, &path, "done", "").ended().await.code, Some(0));
    let (_port, nobody) = refusing_port();
    for (args, reason, advice) in [
        (format!("progress nope --at {}", node.address), "TRANSFER_NOT_FOUND", "nodectl transfers --at"),
        (
            format!("progress nope --watch --at {}", node.address),
            "TRANSFER_NOT_FOUND",
            "nodectl transfers --at",
        ),
        (format!("cancel nope --at {}", node.address), "TRANSFER_NOT_FOUND", "nodectl transfers --at"),
        (format!("cancel done --at {}", node.address), "TOO_LATE_TO_CANCEL", "nothing was changed"),
        (format!("transfers --at {nobody}"), "UNAVAILABLE", "its gRPC address"),
        (format!("progress done --watch --at {nobody}"), "UNAVAILABLE", "its gRPC address"),
    ] {
        let ended = nodectl(&args).await;
        assert_eq!(ended.code, Some(1), "{args}: {ended:?}");
        ended.assert_plain();
        assert!(ended.stdout.is_empty(), "{args}: {ended:?}");
        assert!(ended.stderr.contains(&format!("reason: {reason}")), "{args}: {ended:?}");
        assert!(ended.stderr.contains("help: ") && ended.stderr.contains(advice), "{args}: {ended:?}");
        let last = nodectl(&format!("{args} --json")).await.last();
        assert_eq!(last["event"], "failed", "{args}");
        assert_eq!(last["error"]["reason"], reason, "{args}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_leaves_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), MIB);
    let node = Node::start(&dir.path().join("data")).await;
    for args in [
        format!("push {path} --to {} --source-shard s1 --target-shard s2 --transfer-id t1", node.address),
        format!("transfers --at {}", node.address),
        format!("progress t1 --watch --at {}", node.address),
        "completions bash".to_owned(),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_nodectl"));
        command.args(args.split_whitespace()).stdout(writer).stderr(Stdio::piped());
        let ended = command.output().await.unwrap();
        assert_eq!(
            (ended.status.code(), String::from_utf8(ended.stderr).unwrap().as_str()),
            (Some(0), ""),
            "{args}"
        );
    }
}

/// A peer whose every text would clear the screen and hide what follows.
mod liar {
    use std::net::SocketAddr;
    use std::pin::Pin;

    use proto::node::split_snapshot_service_server::{SplitSnapshotService, SplitSnapshotServiceServer};
    use proto::node::*;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status, Streaming};

    pub(super) const TEXT: &str = "x\x1b[2J\u{9b}31m\u{202e}y\r\n\tz";

    fn transfer() -> TransferProgress {
        TransferProgress {
            transfer_id: TEXT.to_owned(),
            source_shard_id: TEXT.to_owned(),
            target_shard_id: TEXT.to_owned(),
            source_node_id: TEXT.to_owned(),
            target_node_id: TEXT.to_owned(),
            phase: 99,
            priority: -1,
            slots: Some(SlotRange { start: 7, end: 2 }),
            progress: Some(Progress {
                direction: 42,
                bytes_done: u64::MAX,
                bytes_total: Some(1),
                bytes_per_second: Some(u64::MAX),
                eta_ms: Some(u64::MAX),
                started_unix_ms: u64::MAX,
                finished_unix_ms: Some(1),
                error: Some(TaskError {
                    code: 77,
                    reason: TEXT.to_owned(),
                    message: TEXT.to_owned(),
                    metadata: [(TEXT.to_owned(), TEXT.to_owned())].into(),
                    retry_after_ms: Some(u64::MAX),
                }),
                ..Progress::default()
            }),
            expires_unix_ms: Some(u64::MAX),
            ..TransferProgress::default()
        }
    }

    struct Liar(fn(&ListTransfersRequest) -> ListTransfersResponse);

    type Answers<T> = Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

    #[tonic::async_trait]
    impl SplitSnapshotService for Liar {
        type TransferSplitSnapshotStream = Answers<TransferSplitSnapshotResponse>;
        type WatchTransferProgressStream = Answers<WatchTransferProgressResponse>;

        async fn transfer_split_snapshot(
            &self,
            _: Request<Streaming<TransferSplitSnapshotRequest>>,
        ) -> Result<Response<Self::TransferSplitSnapshotStream>, Status> {
            Err(Status::failed_precondition(TEXT))
        }

        async fn get_transfer_progress(
            &self,
            _: Request<GetTransferProgressRequest>,
        ) -> Result<Response<GetTransferProgressResponse>, Status> {
            Ok(Response::new(GetTransferProgressResponse { transfer: Some(transfer()), node: None }))
        }

        async fn watch_transfer_progress(
            &self,
            _: Request<WatchTransferProgressRequest>,
        ) -> Result<Response<Self::WatchTransferProgressStream>, Status> {
            let last = Ok(WatchTransferProgressResponse { transfer: Some(transfer()) });
            Ok(Response::new(Box::pin(tokio_stream::iter([last]))))
        }

        async fn list_transfers(
            &self,
            request: Request<ListTransfersRequest>,
        ) -> Result<Response<ListTransfersResponse>, Status> {
            Ok(Response::new((self.0)(request.get_ref())))
        }

        async fn cancel_transfer(
            &self,
            _: Request<CancelTransferRequest>,
        ) -> Result<Response<CancelTransferResponse>, Status> {
            Ok(Response::new(CancelTransferResponse { transfer: Some(transfer()) }))
        }
    }

    pub(super) async fn start() -> SocketAddr {
        listing(|_| ListTransfersResponse {
            transfers: vec![transfer(), TransferProgress::default()],
            ..ListTransfersResponse::default()
        })
        .await
    }

    /// One that lists these.
    pub(super) async fn listing(list: fn(&ListTransfersRequest) -> ListTransfersResponse) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server =
            tonic::transport::Server::builder().add_service(SplitSnapshotServiceServer::new(Liar(list)));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_peer_says_reaches_the_terminal_raw() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = snapshot(dir.path(), 1000);
    let address = liar::start().await;
    for (args, code, shown) in [
        (format!("push {path} --to {address} --source-shard s1 --target-shard s2"), 1, true),
        (format!("transfers --at {address}"), 0, true),
        (format!("progress t1 --at {address}"), 0, true),
        (format!("progress t1 --at {address} --watch"), 1, true),
        (format!("cancel t1 --at {address}"), 0, false),
    ] {
        let ended = nodectl(&args).await;
        assert_eq!(ended.code, Some(code), "{args}: {ended:?}");
        ended.assert_plain();
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(!said.contains('\u{202e}'), "{args}: {said:?}");
        assert_eq!(said.contains("x\\u{1b}[2J"), shown, "{args}: {said:?}");
        let json = nodectl(&format!("{args} --json")).await;
        json.assert_plain();
        assert!(!json.stdout.contains(['\u{202e}', '\t']), "{args}: {json:?}");
        json.documents();
    }
    let list = nodectl(&format!("transfers --at {address} --json")).await.last();
    assert_eq!(list["transfers"][0]["transfer_id"], liar::TEXT);
    assert_eq!(list["transfers"][0]["phase"], "unknown_99");
    assert_eq!(list["transfers"][0]["error"]["code"], "unknown");
}

/// Each empty transfer is two bytes of an answer and some 500 of memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lists_without_end_is_refused() {
    fn empty(count: usize, next: &str) -> ListTransfersResponse {
        let transfers = vec![TransferProgress::default(); count];
        ListTransfersResponse { transfers, next_page_token: next.to_owned() }
    }
    let many = liar::listing(|_| empty(140_000, "")).await;
    let more = liar::listing(|_| empty(101, "")).await;
    let endless = liar::listing(|_| empty(1, "on")).await;
    for (address, says) in [
        (many, "too large"),
        (more, "a page of 101 transfers, where 100 were asked for"),
        (endless, "it goes on after 400 transfers on 400 pages"),
    ] {
        let ended = nodectl(&format!("transfers --at {address} --timeout 60s")).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{ended:?}");
        assert!(ended.stderr.contains(says) && ended.stderr.contains("OUT_OF_RANGE"), "{ended:?}");
    }
}

/// Of a node that is honest, whose peers were not.
#[tokio::test(flavor = "multi_thread")]
async fn errors_as_long_as_can_be_are_listed() {
    let address = liar::listing(|request| {
        let from = request.page_token.parse().unwrap_or(0_u32);
        let to = (from + request.page_size).min(150);
        let long = |number: u32| TransferProgress {
            transfer_id: number.to_string(),
            progress: Some(Progress {
                error: Some(TaskError { message: "x".repeat(20 << 10), ..TaskError::default() }),
                ..Progress::default()
            }),
            ..TransferProgress::default()
        };
        let next_page_token = if to < 150 { to.to_string() } else { String::new() };
        ListTransfersResponse { transfers: (from..to).map(long).collect(), next_page_token }
    })
    .await;
    let list = nodectl(&format!("transfers --at {address} --json")).await.last();
    let listed = list["transfers"].as_array().unwrap().iter().map(|one| one["transfer_id"].as_str().unwrap());
    assert!(listed.eq((0..150).map(|number| number.to_string())), "{list}");
}
