//! A target that keeps to the order of frames, and says as much as fits into each.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "a part of a test binary")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proto_common::error::Error;
use proto_common::v1::{NodeIdentity, TaskError};
use proto_migration::Reason;
use proto_migration::driver::{Dial, dial_fn};
use proto_migration::v1::migration_service_server::{MigrationService, MigrationServiceServer};
use proto_migration::v1::transfer_migration_data_request::{Frame, Header, Prepare};
use proto_migration::v1::transfer_migration_data_response::{
    Accepted, Ack, Frame as Answer, PrepareRefused, Prepared, Resume,
};
use proto_migration::v1::*;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::support::frames::identity;

/// Of the 2 MiB that a source reads of one answer.
const MUCH: usize = 1_900_000;

/// Clones are one.
#[derive(Debug, Clone, Default)]
pub struct HostileTarget {
    streams: Arc<AtomicUsize>,
    /// When streams came to one that knows of none before.
    forgetful: Option<Arc<watch::Sender<Vec<Instant>>>>,
    refused: Arc<AtomicUsize>,
    refuses: Option<Refuses>,
    stalls: Option<Stalls>,
}

/// What a target does that reads no more once it was asked to prepare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stalls {
    /// It says that it is prepared, when no more fits on the way to it.
    Prepared,
    /// It says nothing.
    Silent,
}

/// So long, heartbeats fill what is on the way to a target that does not read.
const FULL: Duration = Duration::from_secs(5);

/// Why a stream is refused, if it is.
pub type Refuses = fn(&Header) -> Option<Error>;

type Answers = mpsc::Sender<Result<TransferMigrationDataResponse, Status>>;

impl HostileTarget {
    pub fn dial(&self) -> impl Dial + use<> {
        let hostile = self.clone();
        dial_fn(move |_, _| {
            let service = MigrationServiceServer::new(hostile.clone());
            async move { Ok(service) }
        })
    }

    /// One that has forgotten the migration whenever a stream comes; and when those came.
    pub fn forgetful() -> (Self, watch::Receiver<Vec<Instant>>) {
        let (came, seen) = watch::channel(Vec::new());
        (Self { forgetful: Some(Arc::new(came)), ..Self::default() }, seen)
    }

    /// The same, which refuses some streams.
    pub fn refusing(refuses: Refuses) -> (Self, watch::Receiver<Vec<Instant>>) {
        let (forgetful, seen) = Self::forgetful();
        (Self { refuses: Some(refuses), ..forgetful }, seen)
    }

    /// One that stalls on its first stream, for which no silence is too long.
    pub fn stalling(stalls: Stalls) -> Self {
        Self { stalls: Some(stalls), ..Self::default() }
    }

    /// Streams that came.
    pub fn streams(&self) -> usize {
        self.streams.load(Ordering::SeqCst)
    }

    /// Freezes that were refused.
    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::SeqCst)
    }

    async fn serve(self, mut frames: Streaming<TransferMigrationDataRequest>, answers: Answers) {
        let mut stream = self.streams.fetch_add(1, Ordering::SeqCst);
        if let Some(came) = &self.forgetful {
            came.send_modify(|came| came.push(Instant::now()));
            // All of them like the first one that is believed.
            stream = 1;
        }
        let say = async |frame| {
            let _ = answers.send(Ok(TransferMigrationDataResponse { frame: Some(frame) })).await;
        };
        let stalls = self.stalls.filter(|_| stream == 0);
        if stalls.is_some() {
            // Like one that is believed.
            stream = 2;
        }
        let mut ack = Ack { credit_limit: 1 << 40, ..Ack::default() };
        while let Ok(Some(TransferMigrationDataRequest { frame: Some(frame) })) = frames.message().await {
            match frame {
                Frame::Header(header) => {
                    if let Some(error) = self.refuses.and_then(|refuses| refuses(&header)) {
                        let _ = answers.send(Err(error.into())).await;
                        return;
                    }
                    let store_id = if stream == 0 { vec![2; MUCH] } else { vec![2; 16] };
                    let version = if stream == 0 { String::new() } else { "v".repeat(MUCH) };
                    say(Answer::Accepted(Accepted {
                        target: Some(NodeIdentity {
                            version,
                            store_id: store_id.into(),
                            ..identity("n2", 2)
                        }),
                        decision: MigrationDecision::Undecided.into(),
                        known: stream > 1 && stalls.is_none(),
                        resume: Some(Resume {
                            copy: header.copy,
                            through_seq: header.base_seq,
                            ..Resume::default()
                        }),
                        max_batch_bytes: 1 << 20,
                        credit_limit: ack.credit_limit,
                        idle_timeout_ms: if stalls.is_some() { u64::MAX } else { 30_000 },
                        ..Accepted::default()
                    }))
                    .await;
                    ack.durable_seq = header.base_seq;
                }
                Frame::Bulk(_) if self.forgetful.is_some() => return,
                Frame::Bulk(_) if stream == 1 => {
                    let lost = Reason::LogLost.error("l".repeat(3 << 20));
                    let _ = answers.send(Err(lost.into())).await;
                    return;
                }
                Frame::Bulk(bulk) => ack.durable_number = bulk.number,
                Frame::Delta(delta) => {
                    (ack.durable_number, ack.durable_seq) = (delta.number, delta.through_seq);
                }
                Frame::Prepare(prepare) if stalls.is_some() => {
                    sleep(FULL).await;
                    if stalls == Some(Stalls::Prepared) {
                        let Prepare { freeze, final_seq, .. } = prepare;
                        say(Answer::Prepared(Prepared { freeze, final_seq, ..Prepared::default() })).await;
                    }
                    // The connection stays.
                    answers.closed().await;
                    return;
                }
                Frame::Prepare(prepare) => {
                    let digest = SlotDigest { sum: vec![1; MUCH / 3].into(), ..SlotDigest::default() };
                    let text = |of: &str| of.repeat(MUCH / 1000);
                    let metadata = (0..50).map(|n| (format!("{n}{}", text("k")), text("v"))).collect();
                    let error = TaskError {
                        code: 14,
                        reason: text("R"),
                        message: text("m"),
                        metadata,
                        retry_after_ms: Some(1),
                    };
                    say(Answer::PrepareRefused(PrepareRefused {
                        freeze: prepare.freeze,
                        error: Some(error),
                        mismatch: Some(SlotMismatch {
                            source: Some(digest.clone()),
                            target: Some(digest),
                            ..SlotMismatch::default()
                        }),
                    }))
                    .await;
                    self.refused.fetch_add(1, Ordering::SeqCst);
                }
                _ => {}
            }
            (ack.received_number, ack.state) = (ack.durable_number, MigrationState::Receiving.into());
            say(Answer::Ack(ack)).await;
        }
    }
}

type Refused<T> = Result<Response<T>, Status>;

fn no<T>() -> Refused<T> {
    Err(Status::unimplemented("not in this test"))
}

#[tonic::async_trait]
impl MigrationService for HostileTarget {
    type TransferMigrationDataStream = ReceiverStream<Result<TransferMigrationDataResponse, Status>>;
    type WatchMigrationProgressStream = ReceiverStream<Result<WatchMigrationProgressResponse, Status>>;

    async fn transfer_migration_data(
        &self,
        request: Request<Streaming<TransferMigrationDataRequest>>,
    ) -> Refused<Self::TransferMigrationDataStream> {
        let (answers, stream) = mpsc::channel(4);
        tokio::spawn(self.clone().serve(request.into_inner(), answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn start_migration(&self, _: Request<StartMigrationRequest>) -> Refused<StartMigrationResponse> {
        no()
    }

    async fn complete_migration(
        &self,
        _: Request<CompleteMigrationRequest>,
    ) -> Refused<CompleteMigrationResponse> {
        no()
    }

    async fn cancel_migration(&self, _: Request<CancelMigrationRequest>) -> Refused<CancelMigrationResponse> {
        no()
    }

    async fn get_migration_progress(
        &self,
        _: Request<GetMigrationProgressRequest>,
    ) -> Refused<GetMigrationProgressResponse> {
        no()
    }

    async fn watch_migration_progress(
        &self,
        _: Request<WatchMigrationProgressRequest>,
    ) -> Refused<Self::WatchMigrationProgressStream> {
        no()
    }

    async fn list_migrations(&self, _: Request<ListMigrationsRequest>) -> Refused<ListMigrationsResponse> {
        no()
    }

    async fn resolve_migration(
        &self,
        _: Request<ResolveMigrationRequest>,
    ) -> Refused<ResolveMigrationResponse> {
        no()
    }
}
