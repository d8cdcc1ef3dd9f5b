//! A sender that says what a test wants, and no more.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

use bytes::Bytes;
use proto_common::checksum::crc64;
use proto_common::error::Error;
use proto_common::slots::SlotRange;
use proto_snapshot::store::SnapshotStore;
use proto_snapshot::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto_snapshot::v1::transfer_split_snapshot_request::{
    Chunk, End, File, FileTotal, Frame, Header, LaneHeader, Manifest,
};
use proto_snapshot::v1::transfer_split_snapshot_response::Frame as Answer;
use proto_snapshot::v1::{TransferSplitSnapshotRequest, TransferSplitSnapshotResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::support::{LONG, Server};

/// Of the snapshot of a [`Stalled`] stream, and of a chunk.
pub const SIZE: u64 = 1 << 20;

/// A stream that is accepted and then says nothing by itself.
pub struct Stalled {
    pub frames: mpsc::Sender<TransferSplitSnapshotRequest>,
    pub answers: Streaming<TransferSplitSnapshotResponse>,
    /// What it may send before the next answer.
    pub credit: u64,
}

pub fn request(frame: Frame) -> TransferSplitSnapshotRequest {
    TransferSplitSnapshotRequest { frame: Some(frame) }
}

pub fn chunk(file: u32, offset: u64, payload: &Bytes) -> Frame {
    Frame::Chunk(Chunk { file, offset, crc64nvme: crc64(payload), payload: payload.clone() })
}

impl Stalled {
    pub async fn open(server: &Server<impl SnapshotStore>, node: &str, id: &str) -> Result<Self, Error> {
        Self::open_with(server, node, id, SIZE, 1).await
    }

    /// One of a snapshot of `size` bytes.
    pub async fn open_with(
        server: &Server<impl SnapshotStore>,
        node: &str,
        id: &str,
        size: u64,
        generation: u64,
    ) -> Result<Self, Error> {
        Self::begin(server, Self::begun(node, id, size, generation)).await
    }

    /// What it says first.
    pub fn begun(node: &str, id: &str, size: u64, generation: u64) -> Vec<Frame> {
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
            generation,
            file_count: 1,
            name_bytes: 1,
            total_bytes: Some(size),
            lanes: 2,
            ..Header::default()
        };
        let file = File { name: "a".to_owned(), size: Some(size), blake3: None };
        let manifest = Manifest { files: vec![file], last: true };
        vec![Frame::Header(header), Frame::Manifest(manifest)]
    }

    /// A lane of one.
    pub async fn lane(server: &Server<impl SnapshotStore>, id: &str) -> Self {
        let header = LaneHeader {
            transfer_id: id.to_owned(),
            attempt: 1,
            session: vec![1; 16].into(),
            lane: 1,
            generation: 1,
        };
        Self::begin(server, vec![Frame::LaneHeader(header)]).await.unwrap()
    }

    pub async fn begin(server: &Server<impl SnapshotStore>, first: Vec<Frame>) -> Result<Self, Error> {
        let mut begun = Self::say_first(server, first).await?;
        begun.credit = loop {
            match begun.hear().await? {
                Answer::Accepted(accepted) => break accepted.credit_limit,
                // From a receiver that looks for what it has already, and is not through yet.
                Answer::Ack(_) => {}
                other => panic!("not accepted: {other:?}"),
            }
        };
        Ok(begun)
    }

    /// One on a connection of its own that was not answered yet.
    pub async fn say_first(server: &Server<impl SnapshotStore>, first: Vec<Frame>) -> Result<Self, Error> {
        let channel = proto_common::tuning::endpoint(&server.uri()).unwrap().connect().await.unwrap();
        Self::say_first_on(channel, first).await
    }

    /// The same on a connection that it shares.
    pub async fn say_first_on(channel: Channel, first: Vec<Frame>) -> Result<Self, Error> {
        let (frames, requests) = mpsc::channel(4);
        for frame in first {
            frames.send(request(frame)).await.unwrap();
        }
        let mut client = SplitSnapshotServiceClient::new(channel);
        let answers = client.transfer_split_snapshot(ReceiverStream::new(requests)).await?.into_inner();
        Ok(Self { frames, answers, credit: 0 })
    }

    /// One that was refused meanwhile reads nothing; it says why in its answer.
    pub async fn say(&self, frame: Frame) {
        let _ = self.frames.send(request(frame)).await;
    }

    /// Sends a chunk, where it has credit for that.
    pub async fn chunk(&self, offset: u64, payload: &Bytes) {
        self.chunk_of(0, offset, payload).await;
    }

    pub async fn chunk_of(&self, file: u32, offset: u64, payload: &Bytes) {
        self.say(chunk(file, offset, payload)).await;
    }

    /// Says that it has sent `size` bytes that have this checksum.
    pub async fn end(&self, size: u64, crc64nvme: u64) {
        let files = vec![FileTotal { file: 0, size, crc64nvme }];
        self.say(Frame::End(End { files, last: true, file_count: 1, total_bytes: size })).await;
    }

    /// The next answer.
    pub async fn hear(&mut self) -> Result<Answer, Error> {
        let answer = tokio::time::timeout(LONG, self.answers.message()).await.expect("an answer");
        let answer = answer?.expect("no end before the last word").frame.unwrap();
        if let Answer::Ack(ack) = &answer {
            self.credit = ack.credit_limit;
        }
        Ok(answer)
    }

    /// The error that ends it.
    pub async fn refusal(&mut self) -> Error {
        let refusal = async {
            loop {
                match self.hear().await {
                    Ok(answer) => assert!(matches!(answer, Answer::Ack(_)), "{answer:?}"),
                    Err(error) => return error,
                }
            }
        };
        tokio::time::timeout(LONG, refusal).await.expect("an end")
    }

    /// Waits until the snapshot is installed.
    pub async fn installed(&mut self) {
        while !matches!(self.hear().await.unwrap(), Answer::Installed(_)) {}
    }
}
