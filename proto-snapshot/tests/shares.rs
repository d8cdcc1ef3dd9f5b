//! What one source node may take of a receiver: its share, and no more, whatever it opens; others go on meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use proto_common::checksum::crc64;
use proto_common::error::Error;
use proto_common::refusals::count_of;
use proto_common::slots::SlotRange;
use proto_snapshot::Reason;
use proto_snapshot::sender::SnapshotSender;
use proto_snapshot::source::DirectorySource;
use proto_snapshot::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto_snapshot::v1::transfer_split_snapshot_request::{Chunk, File, Frame, Header, Heartbeat, Manifest};
use proto_snapshot::v1::transfer_split_snapshot_response::Frame as Answer;
use proto_snapshot::v1::{TransferSplitSnapshotRequest, TransferSplitSnapshotResponse};
use support::{Server, builder, make_tree, small_limits, snapshot};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// Of the snapshot of a [`Stalled`] stream.
const SIZE: u64 = 1 << 20;

/// A stream that is accepted and then says nothing.
struct Stalled {
    frames: mpsc::Sender<TransferSplitSnapshotRequest>,
    answers: Streaming<TransferSplitSnapshotResponse>,
}

impl Stalled {
    async fn open(server: &Server, node: &str, id: &str) -> Result<Self, Error> {
        let channel = proto_common::tuning::endpoint(&server.uri()).unwrap().connect().await.unwrap();
        let header = Header {
            transfer_id: id.to_owned(),
            source_shard_id: "s1".to_owned(),
            target_shard_id: format!("s-{id}"),
            source_node_id: node.to_owned(),
            slots: Some(SlotRange::new(0, 1).unwrap().into()),
            snapshot_index: 1,
            snapshot_term: 1,
            attempt: 1,
            session: vec![1; 16].into(),
            generation: 1,
            file_count: 1,
            name_bytes: 1,
            total_bytes: Some(SIZE),
            ..Header::default()
        };
        let file = File { name: "a".to_owned(), size: Some(SIZE), blake3: None };
        let (frames, requests) = mpsc::channel(4);
        for frame in [Frame::Header(header), Frame::Manifest(Manifest { files: vec![file], last: true })] {
            frames.send(TransferSplitSnapshotRequest { frame: Some(frame) }).await.unwrap();
        }
        let mut client = SplitSnapshotServiceClient::new(channel);
        let mut answers = client.transfer_split_snapshot(ReceiverStream::new(requests)).await?.into_inner();
        let answer = answers.message().await?.unwrap().frame.unwrap();
        assert!(matches!(answer, Answer::Accepted(_)), "{answer:?}");
        Ok(Self { frames, answers })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_takes_all_it_gets_leaves_the_others_their_places() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 8, 1 << 20, 1);
    let mut limits = small_limits();
    (limits.transfers, limits.transfers_per_peer, limits.staged_per_peer) = (4, 2, 3);
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let first = Stalled::open(&server, "n9", "x1").await.unwrap();
    let _second = Stalled::open(&server, "n9", "x2").await.unwrap();
    let before = count_of("TOO_MANY_TRANSFERS");
    let refused = Stalled::open(&server, "n9", "x3").await.err().expect("more than its share");
    assert!(refused.is(Reason::TooManyTransfers) && refused.is_retryable(), "{refused:?}");
    assert_eq!((refused.get("limit"), refused.get("peer")), (Some("2"), Some("n9")));
    assert!(count_of("TOO_MANY_TRANSFERS") > before);
    // Another node, at once and to its end.
    let endpoint = proto_common::tuning::endpoint(&server.uri()).unwrap();
    let sender = SnapshotSender::new(endpoint);
    let other = DirectorySource::new(source.path());
    sender.send(snapshot("t"), other).unwrap().join().await.unwrap();

    // What it leaves behind is counted, too.
    drop(first);
    let third = async {
        loop {
            match Stalled::open(&server, "n9", "x3").await {
                Ok(third) => return third,
                Err(error) => assert!(error.is(Reason::TooManyTransfers), "{error:?}"),
            }
        }
    };
    drop(tokio::time::timeout(support::LONG, third).await.expect("a place comes free"));
    let refused = async {
        loop {
            let refused = Stalled::open(&server, "n9", "x4").await.err().expect("three are staged");
            if refused.get("limit") == Some("3") {
                return refused;
            }
        }
    };
    let refused = tokio::time::timeout(support::LONG, refused).await.expect("the share of staged transfers");
    assert!(refused.is(Reason::TooManyTransfers), "{refused:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_now_and_then_keeps_no_place() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(source.path(), 8, 1 << 20, 1);
    let mut limits = small_limits();
    limits.transfers = 1;
    limits.slowest_time = std::time::Duration::from_millis(500);
    let server = Server::start(builder(target.path()).limits(limits)).await;
    let before = count_of("TOO_SLOW");
    let mut slow = Stalled::open(&server, "n9", "x1").await.unwrap();
    let frames = slow.frames.clone();
    let bytes = tokio::spawn(async move {
        for offset in 0.. {
            let payload = bytes::Bytes::from_static(b"x");
            let chunk = Chunk { file: 0, offset, crc64nvme: crc64(&payload), payload };
            for frame in [Frame::Chunk(chunk), Frame::Heartbeat(Heartbeat {})] {
                let sent = frames.send(TransferSplitSnapshotRequest { frame: Some(frame) }).await;
                if sent.is_err() {
                    return offset;
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        0
    });
    // It has the only place until it is found too slow; then somebody else gets that.
    let endpoint = proto_common::tuning::endpoint(&server.uri()).unwrap();
    let other = DirectorySource::new(source.path());
    SnapshotSender::new(endpoint).send(snapshot("t"), other).unwrap().join().await.unwrap();
    let refused = loop {
        match slow.answers.message().await {
            Ok(answer) => assert!(answer.is_some(), "an end without a refusal"),
            Err(status) => break Error::from(status),
        }
    };
    assert!(refused.is(Reason::TooSlow) && refused.is_retryable(), "{refused:?}");
    assert!(refused.message().contains("65536 bytes within 500ms"), "{refused}");
    assert!(count_of("TOO_SLOW") > before);
    drop(slow);
    assert!(bytes.await.unwrap() > 1, "it was refused for its rate, not for its silence");
    server.stop().await;
}
