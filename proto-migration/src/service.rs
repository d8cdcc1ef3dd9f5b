//! The service of a node: what is asked of the source and what is asked of the target, on one port.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use proto_common::access::{Access, Caller, Guarded};
use proto_common::bulk::WithRawBody;
use proto_common::error::{CommonReason, Error};
use proto_common::fence::Fence;
use proto_common::ids::MigrationId;
use proto_common::prompt::MAX_REQUEST_BYTES;
use proto_common::refusal::{Refusal, WithDetails};
use proto_common::v1::Direction;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::limits::{Limits, largest_message};
use crate::migrations::Migrations;
use crate::progress::REASON_BYTES;
use crate::v1::migration_service_server::{self, MigrationServiceServer};
use crate::v1::{
    CancelMigrationRequest, CancelMigrationResponse, CompleteMigrationRequest, CompleteMigrationResponse,
    GetMigrationProgressRequest, GetMigrationProgressResponse, ListMigrationsRequest, ListMigrationsResponse,
    MigrationDecision, MigrationProgress, ResolveMigrationRequest, ResolveMigrationResponse,
    StartMigrationRequest, StartMigrationResponse, TransferMigrationDataRequest,
    TransferMigrationDataResponse, WatchMigrationProgressRequest, WatchMigrationProgressResponse,
};
use crate::{Reason, v1};

/// The answers of one data stream.
pub(crate) type Answers = ReceiverStream<Result<TransferMigrationDataResponse, Status>>;

/// The service as it is added to a tonic server: tonic's own refusals have details, too.
pub type MigrationService = Guarded<WithDetails<WithRawBody<MigrationServiceServer<MigrationNode>>>>;

/// The method whose batches are not copied.
const TRANSFER: &str = "/node.migration.v1.MigrationService/TransferMigrationData";

/// An operator's decision, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolution {
    /// COMMITTED or DISCARDED.
    pub(crate) decision: MigrationDecision,
    pub(crate) attempt: u64,
    pub(crate) peer_store_id: bytes::Bytes,
    pub(crate) reason: String,
}

/// What is asked of a node as the source.
#[tonic::async_trait]
pub(crate) trait SourceCalls: Send + Sync + 'static {
    async fn start(&self, request: StartMigrationRequest) -> Result<StartMigrationResponse, Error>;
    async fn complete(
        &self,
        id: &MigrationId,
        deadline_ms: u64,
        fence: Option<Fence>,
    ) -> Result<MigrationProgress, Error>;
    async fn cancel(
        &self,
        id: &MigrationId,
        reason: &str,
        fence: Option<Fence>,
    ) -> Result<MigrationProgress, Error>;
    async fn resolve(&self, id: &MigrationId, resolution: Resolution) -> Result<MigrationProgress, Error>;
}

/// What is asked of a node as the target.
#[tonic::async_trait]
pub(crate) trait TargetCalls: Send + Sync + 'static {
    /// Serves one data stream in a task of its own.
    fn transfer(
        &self,
        request: Request<Streaming<TransferMigrationDataRequest>>,
        caller: Caller,
    ) -> Result<Answers, Error>;
    async fn cancel(
        &self,
        id: &MigrationId,
        reason: &str,
        fence: Option<Fence>,
    ) -> Result<MigrationProgress, Error>;
    async fn resolve(&self, id: &MigrationId, resolution: Resolution) -> Result<MigrationProgress, Error>;
}

/// The service of a node, made of a [driver](crate::driver::MigrationDriver), a [receiver](crate::receiver::MigrationReceiver), or both.
#[derive(Clone)]
pub struct MigrationNode {
    pub(crate) migrations: Migrations,
    pub(crate) limits: Limits,
    pub(crate) source: Option<Arc<dyn SourceCalls>>,
    pub(crate) target: Option<Arc<dyn TargetCalls>>,
    /// Ends watches when the node stops.
    pub(crate) stopping: CancellationToken,
    pub(crate) access: Access,
}

impl std::fmt::Debug for MigrationNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MigrationNode")
            .field("source", &self.source.is_some())
            .field("target", &self.target.is_some())
            .finish_non_exhaustive()
    }
}

impl MigrationNode {
    /// Joins the two sides of one node. Both were made with the same [`Migrations`].
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.source = self.source.or(other.source);
        self.target = self.target.or(other.target);
        self
    }

    /// The cluster, and who may call. Default: everybody.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// The service, to be added to a tonic server.
    #[must_use]
    pub fn into_service(self) -> MigrationService {
        let largest_answer = largest_message(self.limits.batch_bytes);
        let access = self.access.clone();
        // Batches do not pass its decoder.
        let service = MigrationServiceServer::new(self)
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(largest_answer);
        Guarded::new(WithDetails::new(WithRawBody::new(service, TRANSFER), refused), access)
    }

    fn source(&self) -> Result<&Arc<dyn SourceCalls>, Error> {
        self.source.as_ref().ok_or_else(|| {
            Error::with_code(
                proto_common::error::Code::Unimplemented,
                "NOT_A_SOURCE",
                "this node gives no slots away; ask the source of the migration",
            )
        })
    }

    fn target(&self) -> Result<&Arc<dyn TargetCalls>, Error> {
        self.target.as_ref().ok_or_else(|| {
            Error::with_code(
                proto_common::error::Code::Unimplemented,
                "NOT_A_TARGET",
                "this node takes no slots over; ask the target of the migration",
            )
        })
    }

    /// The side that a call without a direction means, the outgoing migration if there is one, where `caller` may touch its slots.
    fn side(&self, caller: &Caller, direction: i32, id: &MigrationId) -> Result<Direction, Error> {
        let direction = self.migrations.meant(wanted(direction)?, id);
        let migration = self.migrations.get(direction, id)?;
        may(caller, migration.spec.as_ref())?;
        Ok(migration.direction())
    }
}

#[tonic::async_trait]
impl migration_service_server::MigrationService for MigrationNode {
    type TransferMigrationDataStream = Answers;
    type WatchMigrationProgressStream =
        Pin<Box<dyn Stream<Item = Result<WatchMigrationProgressResponse, Status>> + Send>>;

    async fn start_migration(
        &self,
        request: Request<StartMigrationRequest>,
    ) -> Result<Response<StartMigrationResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        may(&caller, request.get_ref().spec.as_ref())?;
        Ok(Response::new(self.source()?.start(request.into_inner()).await?))
    }

    async fn transfer_migration_data(
        &self,
        request: Request<Streaming<TransferMigrationDataRequest>>,
    ) -> Result<Response<Self::TransferMigrationDataStream>, Status> {
        let caller = Caller::of(request.extensions())?;
        Ok(Response::new(self.target()?.transfer(request, caller)?))
    }

    async fn complete_migration(
        &self,
        request: Request<CompleteMigrationRequest>,
    ) -> Result<Response<CompleteMigrationResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let CompleteMigrationRequest { migration_id, deadline_ms, fence } = request.into_inner();
        let id = id_of(&migration_id)?;
        let deadline_ms = deadline_ms.unwrap_or(30_000);
        if !(1..=3_600_000).contains(&deadline_ms) {
            let problem = format!("is {deadline_ms}; it takes 1 to 3600000");
            return Err(Reason::InvalidField.field("deadline_ms", problem).into());
        }
        if let Ok(known) = self.migrations.get(Some(Direction::Out), &id) {
            may(&caller, known.spec.as_ref())?;
        }
        let migration = self.source()?.complete(&id, deadline_ms, fence.map(Fence::from)).await?;
        Ok(Response::new(CompleteMigrationResponse { migration: Some(migration) }))
    }

    async fn cancel_migration(
        &self,
        request: Request<CancelMigrationRequest>,
    ) -> Result<Response<CancelMigrationResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let CancelMigrationRequest { migration_id, direction, reason, fence } = request.into_inner();
        let id = id_of(&migration_id)?;
        let (reason, fence) = (kept_reason(&reason), fence.map(Fence::from));
        let migration = match self.side(&caller, direction, &id)? {
            Direction::In => self.target()?.cancel(&id, &reason, fence).await?,
            Direction::Out | Direction::Unspecified => self.source()?.cancel(&id, &reason, fence).await?,
        };
        Ok(Response::new(CancelMigrationResponse { migration: Some(migration) }))
    }

    async fn get_migration_progress(
        &self,
        request: Request<GetMigrationProgressRequest>,
    ) -> Result<Response<GetMigrationProgressResponse>, Status> {
        let GetMigrationProgressRequest { migration_id, direction } = request.into_inner();
        let migration = self.migrations.get(wanted(direction)?, &id_of(&migration_id)?)?;
        Ok(Response::new(GetMigrationProgressResponse { migration: Some(migration) }))
    }

    async fn watch_migration_progress(
        &self,
        request: Request<WatchMigrationProgressRequest>,
    ) -> Result<Response<Self::WatchMigrationProgressStream>, Status> {
        let peer = Caller::of(request.extensions())?.peer().key();
        let WatchMigrationProgressRequest { migration_id, direction } = request.into_inner();
        let watch = self.migrations.watch(&peer, wanted(direction)?, &id_of(&migration_id)?)?;
        let states = futures::stream::unfold(Some((watch, self.stopping.clone())), |open| async move {
            let (mut watch, stopping) = open?;
            tokio::select! {
                biased;
                migration = watch.next() => {
                    let migration = migration?;
                    // Its owner may have something left to do, such as `Forget`; the migration itself has ended.
                    let rest = (!migration.is_final()).then_some((watch, stopping));
                    Some((Ok(WatchMigrationProgressResponse { migration: Some(migration) }), rest))
                }
                () = stopping.cancelled() => Some((Err(shutting_down().into()), None)),
            }
        });
        Ok(Response::new(Box::pin(states)))
    }

    async fn list_migrations(
        &self,
        request: Request<ListMigrationsRequest>,
    ) -> Result<Response<ListMigrationsResponse>, Status> {
        let ListMigrationsRequest { page_size, page_token, direction, active_only } = request.into_inner();
        let page = self.migrations.list(wanted(direction)?, active_only, page_size, &page_token)?;
        Ok(Response::new(ListMigrationsResponse {
            migrations: page.items,
            next_page_token: page.next_page_token,
        }))
    }

    async fn resolve_migration(
        &self,
        request: Request<ResolveMigrationRequest>,
    ) -> Result<Response<ResolveMigrationResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let ResolveMigrationRequest { migration_id, direction, decision, attempt, peer_store_id, reason } =
            request.into_inner();
        let id = id_of(&migration_id)?;
        let decision = MigrationDecision::try_from(decision).unwrap_or_default();
        if !matches!(decision, MigrationDecision::Committed | MigrationDecision::Discarded) {
            let problem = "is neither COMMITTED nor DISCARDED";
            return Err(Reason::InvalidField.field("decision", problem).into());
        }
        if reason.is_empty() || reason.len() > REASON_BYTES {
            let problem = format!("has {} bytes; it takes 1 to {REASON_BYTES}", reason.len());
            return Err(Reason::InvalidField.field("reason", problem).into());
        }
        let resolution = Resolution { decision, attempt, peer_store_id, reason: kept_reason(&reason) };
        let migration = match self.side(&caller, direction, &id)? {
            Direction::In => self.target()?.resolve(&id, resolution).await?,
            Direction::Out | Direction::Unspecified => self.source()?.resolve(&id, resolution).await?,
        };
        Ok(Response::new(ResolveMigrationResponse { migration: Some(migration) }))
    }
}

/// Whether `caller` may do that to the slots of a migration.
fn may(caller: &Caller, spec: Option<&v1::MigrationSpec>) -> Result<(), Error> {
    let Some(spec) = spec else { return Ok(()) };
    caller.may_named([&spec.source_shard_id, &spec.target_shard_id], spec.slots)
}

/// What tonic refuses before a handler sees it.
pub(crate) fn refused(refusal: Refusal) -> Error {
    match refusal {
        Refusal::TooLarge => Reason::BatchTooLarge
            .error(format!(
                "a message is larger than Accepted.max_batch_bytes and 1 MiB allow, or a request or header than {MAX_REQUEST_BYTES} bytes"
            )),
        Refusal::Compressed { encoding } => Reason::UnsupportedCompression
            .error(format!("the message is compressed with {encoding}; send it as it is"))
            .metadata("encoding", encoding),
        _ => Reason::UnknownFrame.error("a message could not be decoded"),
    }
}

pub(crate) fn shutting_down() -> Error {
    Reason::ShuttingDown.error("this node is shutting down; try again when it is back")
}

fn id_of(migration_id: &str) -> Result<MigrationId, Error> {
    MigrationId::new(migration_id).map_err(|error| error.at("migration_id"))
}

fn wanted(direction: i32) -> Result<Option<Direction>, Error> {
    match Direction::try_from(direction) {
        Ok(Direction::Unspecified) => Ok(None),
        Ok(direction) => Ok(Some(direction)),
        Err(_) => {
            let problem = format!("is {direction}, which this node does not know");
            Err(Error::new(CommonReason::InvalidField, format!("direction {problem}"))
                .violation("direction", problem))
        }
    }
}

fn kept_reason(reason: &str) -> String {
    proto_common::text::printable(reason, REASON_BYTES)
}
