//! A scripted receiver in the same process, and a source of zeros.

#![allow(unreachable_pub, missing_docs, reason = "a part of a test binary")]

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, Stream, StreamExt as _};
use proto_common::connect::connect_fn;
use proto_common::error::Error;
use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::path::FileName;
use proto_common::slots::SlotRange;
use proto_common::v1::Priority;
use proto_snapshot::Reason;
use proto_snapshot::sender::{SenderOptions, SnapshotSender, SnapshotToSend, TransferHandle};
use proto_snapshot::source::{Description, PieceStream, SnapshotSource, SourceError};
use proto_snapshot::spec::{ManifestFile, SnapshotPoint};
use proto_snapshot::transfers::Transfers;
use proto_snapshot::v1::split_snapshot_service_server::{SplitSnapshotService, SplitSnapshotServiceServer};
use proto_snapshot::v1::transfer_split_snapshot_request::{End, Frame, Header};
use proto_snapshot::v1::transfer_split_snapshot_response::{
    Accepted, Ack, Extent, Frame as Answer, Installed,
};
use proto_snapshot::v1::*;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

pub const MIB: u64 = 1 << 20;

pub type Answers = mpsc::Sender<Result<TransferSplitSnapshotResponse, Status>>;

/// One stream, as its script sees it.
pub struct Call {
    /// 0 for the first stream of the test.
    pub number: usize,
    pub frames: Streaming<TransferSplitSnapshotRequest>,
    pub answers: Answers,
}

impl Call {
    pub async fn next(&mut self) -> Option<Frame> {
        self.frames.message().await.ok().flatten().map(|request| request.frame.expect("a frame is set"))
    }

    pub async fn say(&self, frame: Answer) {
        let _ = self.answers.send(Ok(TransferSplitSnapshotResponse { frame: Some(frame) })).await;
    }

    pub async fn fail(&self, error: Error) {
        let _ = self.answers.send(Err(error.into())).await;
    }

    /// Reads the header and the manifest.
    pub async fn header(&mut self) -> (Header, u64) {
        let Some(Frame::Header(header)) = self.next().await else { panic!("no header") };
        let mut files = 0;
        loop {
            match self.next().await {
                Some(Frame::Manifest(page)) => {
                    files += page.files.len() as u64;
                    if page.last {
                        return (header, files);
                    }
                }
                Some(Frame::Heartbeat(_)) => {}
                other => panic!("{other:?} in the manifest"),
            }
        }
    }

    /// Takes chunks until the end, acknowledging each; returns how many bytes came.
    pub async fn take(&mut self, credit: u64) -> (u64, End) {
        let mut bytes = 0;
        let mut end = End::default();
        loop {
            match self.next().await {
                Some(Frame::Chunk(chunk)) => {
                    bytes += chunk.payload.len() as u64;
                    self.say(ack(bytes, bytes, bytes + credit, TransferPhase::Transferring)).await;
                }
                Some(Frame::End(page)) => {
                    end.files.extend(page.files);
                    if page.last {
                        return (bytes, End { files: end.files, ..page });
                    }
                }
                Some(Frame::Heartbeat(_)) => {}
                other => panic!("{other:?} among chunks"),
            }
        }
    }

    /// Accepts `missing`, takes it and installs; returns how many bytes came.
    pub async fn install(&mut self, missing: Vec<Extent>) -> u64 {
        self.say(accepted(missing)).await;
        let (bytes, end) = self.take(8 * MIB).await;
        self.say(installed(&end)).await;
        bytes
    }
}

pub fn accepted(missing: Vec<Extent>) -> Answer {
    Answer::Accepted(terms(missing))
}

pub fn terms(missing: Vec<Extent>) -> Accepted {
    Accepted {
        missing,
        last: true,
        max_chunk_bytes: 1 << 20,
        credit_limit: 8 * MIB,
        idle_timeout_ms: 10_000,
        max_lanes: 1,
        ..Accepted::default()
    }
}

pub fn ack(received: u64, durable: u64, credit: u64, phase: TransferPhase) -> Answer {
    Answer::Ack(Ack {
        received_bytes: received,
        durable_bytes: durable,
        credit_limit: credit,
        phase: phase.into(),
    })
}

pub fn installed(end: &End) -> Answer {
    Answer::Installed(Installed {
        total_bytes: end.total_bytes,
        file_count: end.file_count,
        ..Installed::default()
    })
}

pub fn extent(file: u32, offset: u64, length: impl Into<Option<u64>>) -> Extent {
    Extent { file, offset, length: length.into(), more_files: 0 }
}

pub type Script = Arc<dyn Fn(Call) -> BoxFuture<'static, ()> + Send + Sync>;
pub type OnCancel = Arc<dyn Fn() -> BoxFuture<'static, Result<(), Error>> + Send + Sync>;

#[derive(Clone)]
pub struct Peer {
    pub script: Script,
    pub on_cancel: OnCancel,
    /// Answers a stream only when its script has ended, headers included.
    pub lazy: bool,
    pub streams: Arc<AtomicUsize>,
    pub connections: Arc<AtomicUsize>,
    /// Connections that are refused first.
    pub refuse: Arc<AtomicUsize>,
}

impl Peer {
    pub fn new<F: Future<Output = ()> + Send + 'static>(
        script: impl Fn(Call) -> F + Send + Sync + 'static,
    ) -> Self {
        Self {
            script: Arc::new(move |call| script(call).boxed()),
            on_cancel: Arc::new(|| async { Ok(()) }.boxed()),
            lazy: false,
            streams: Arc::default(),
            connections: Arc::default(),
            refuse: Arc::default(),
        }
    }

    pub fn send<S: SnapshotSource>(&self, source: S) -> TransferHandle {
        self.send_with(source, SenderOptions::default(), Transfers::default())
    }

    pub fn send_with<S: SnapshotSource>(
        &self,
        source: S,
        options: SenderOptions,
        transfers: Transfers,
    ) -> TransferHandle {
        let peer = self.clone();
        let connect = connect_fn(move || {
            let peer = peer.clone();
            async move {
                peer.connections.fetch_add(1, Ordering::SeqCst);
                let refused =
                    peer.refuse.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
                if refused.is_ok() {
                    return Err(Reason::ShuttingDown.error("nobody listens"));
                }
                Ok(SplitSnapshotServiceServer::new(peer))
            }
        });
        SnapshotSender::new(connect).options(options).transfers(transfers).send(snapshot(), source).unwrap()
    }

    pub fn streams(&self) -> usize {
        self.streams.load(Ordering::SeqCst)
    }
}

#[tonic::async_trait]
impl SplitSnapshotService for Peer {
    type TransferSplitSnapshotStream =
        Pin<Box<dyn Stream<Item = Result<TransferSplitSnapshotResponse, Status>> + Send>>;
    type WatchTransferProgressStream = futures::stream::Empty<Result<WatchTransferProgressResponse, Status>>;

    async fn transfer_split_snapshot(
        &self,
        request: Request<Streaming<TransferSplitSnapshotRequest>>,
    ) -> Result<Response<Self::TransferSplitSnapshotStream>, Status> {
        let (answers, stream) = mpsc::channel(if self.lazy { 1000 } else { 1 });
        let number = self.streams.fetch_add(1, Ordering::SeqCst);
        let script = (self.script)(Call { number, frames: request.into_inner(), answers });
        if self.lazy {
            script.await;
            return Ok(Response::new(ReceiverStream::new(stream).boxed()));
        }
        // The script lives as long as the stream does.
        let script = script.map(|()| None).into_stream();
        let answers = ReceiverStream::new(stream).map(Some);
        let both = futures::stream::select(answers, script).filter_map(|answer| async { answer });
        Ok(Response::new(both.boxed()))
    }

    async fn get_transfer_progress(
        &self,
        _: Request<GetTransferProgressRequest>,
    ) -> Result<Response<GetTransferProgressResponse>, Status> {
        Err(Reason::TransferNotFound.error("unknown").into())
    }

    async fn watch_transfer_progress(
        &self,
        _: Request<WatchTransferProgressRequest>,
    ) -> Result<Response<Self::WatchTransferProgressStream>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn list_transfers(
        &self,
        _: Request<ListTransfersRequest>,
    ) -> Result<Response<ListTransfersResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn cancel_transfer(
        &self,
        _: Request<CancelTransferRequest>,
    ) -> Result<Response<CancelTransferResponse>, Status> {
        (self.on_cancel)().await?;
        Ok(Response::new(CancelTransferResponse::default()))
    }
}

pub fn snapshot() -> SnapshotToSend {
    SnapshotToSend {
        transfer_id: TransferId::new("t").unwrap(),
        source_shard: ShardId::new("s1").unwrap(),
        target_shard: ShardId::new("s2").unwrap(),
        source_node: NodeId::new("n1").unwrap(),
        target_node: None,
        slots: SlotRange::FULL,
        point: SnapshotPoint { term: 1, index: 1 },
        fence: None,
        priority: Priority::Split,
    }
}

/// What was asked of a source: file, offset and length.
pub type Opened = (u32, u64, Option<u64>);

/// Zeros.
#[derive(Clone)]
pub struct Zeros {
    pub sizes: Vec<Option<u64>>,
    /// What files of unknown size have.
    pub unknown: u64,
    pub name_len: usize,
    pub can_seek: bool,
    pub describing: Duration,
    pub opened: Arc<Mutex<Vec<Opened>>>,
}

impl Zeros {
    pub fn new(sizes: impl Into<Vec<u64>>) -> Self {
        Self {
            sizes: sizes.into().into_iter().map(Some).collect(),
            unknown: 0,
            name_len: 5,
            can_seek: true,
            describing: Duration::ZERO,
            opened: Arc::default(),
        }
    }

    pub fn opened(&self) -> Vec<Opened> {
        std::mem::take(&mut self.opened.lock().unwrap())
    }
}

impl SnapshotSource for Zeros {
    async fn describe(&self, _: bool) -> Result<Description, SourceError> {
        sleep(self.describing).await;
        let file = |(number, size): (usize, &Option<u64>)| ManifestFile {
            name: FileName::new(&format!("{number:0>width$}", width = self.name_len)).unwrap(),
            size: *size,
            blake3: None,
        };
        let files = self.sizes.iter().enumerate().map(file).collect();
        Ok(Description { files, content_version: "v".to_owned() })
    }

    async fn open(
        &self,
        file: u32,
        offset: u64,
        len: Option<u64>,
        piece: usize,
    ) -> Result<PieceStream, SourceError> {
        self.opened.lock().unwrap().push((file, offset, len));
        let size = self.sizes[usize::try_from(file).unwrap()].unwrap_or(self.unknown);
        let end = offset + len.unwrap_or(size - offset);
        assert!(end <= size, "{len:?} bytes at {offset} of file {file} are beyond its {size}");
        let piece = piece as u64;
        let pieces = (0..(end - offset).div_ceil(piece)).map(move |number| {
            let left = end - offset - number * piece;
            Ok(Bytes::from(vec![0; usize::try_from(piece.min(left)).unwrap()]))
        });
        Ok(futures::stream::iter(pieces).boxed())
    }

    fn can_seek(&self) -> bool {
        self.can_seek
    }
}
