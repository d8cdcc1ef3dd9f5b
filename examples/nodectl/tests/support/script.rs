//! A node that answers as it was told to: for what a real one does only after a disaster.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::common::error::Error;
use proto::migration::Reason;
use proto::node::health_service_server::{HealthService, HealthServiceServer};
use proto::node::migration_service_server::{MigrationService, MigrationServiceServer};
use proto::node::*;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

type Answers<T> = Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

/// What it knows, and what it was asked.
#[derive(Default)]
pub(crate) struct State {
    /// Migrations by ID, as `Get` and `List` show them.
    pub(crate) migrations: Vec<MigrationProgress>,
    /// What each watch tells, one after the other, at last with what `Get` shows; then it stays open.
    pub(crate) watch: Vec<MigrationProgress>,
    /// A migration that is started ends at once, in this state.
    pub(crate) start_ends: Option<MigrationState>,
    /// The node owns these slots at epoch 3; a migration that completes takes them away.
    pub(crate) owned: Vec<SlotRange>,
    /// Reasons not to remove it, one for each time that it is asked.
    pub(crate) blockers: VecDeque<String>,
    pub(crate) started: Vec<StartMigrationRequest>,
    pub(crate) completed: Vec<CompleteMigrationRequest>,
    pub(crate) cancelled: Vec<CancelMigrationRequest>,
    pub(crate) resolved: Vec<ResolveMigrationRequest>,
    pub(crate) refuse: Option<Error>,
    /// What it lists and tells of itself instead.
    pub(crate) lists: Option<fn() -> ListMigrationsResponse>,
    pub(crate) tells: Option<fn() -> NodeStatus>,
    /// So many are refused that are started, since others have their places.
    pub(crate) places_taken: u32,
}

/// It, and its address.
#[derive(Clone)]
pub(crate) struct Script {
    pub(crate) address: SocketAddr,
    pub(crate) state: Arc<Mutex<State>>,
}

impl Script {
    pub(crate) async fn start(state: State) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let script = Self { address, state: Arc::new(Mutex::new(state)) };
        let server = tonic::transport::Server::builder()
            .add_service(MigrationServiceServer::new(script.clone()))
            .add_service(HealthServiceServer::new(script.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        script
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock().unwrap())
    }

    fn get(&self, id: &str) -> Result<MigrationProgress, Status> {
        self.with(|state| {
            if let Some(error) = &state.refuse {
                return Err(error.clone().into());
            }
            let found = state.migrations.iter().find(|migration| migration.migration_id == id).cloned();
            found.ok_or_else(|| Error::new(Reason::MigrationNotFound, format!("no migration {id}")).into())
        })
    }
}

/// Slots 0-99 from n1 to n2, in that state.
pub(crate) fn migration(id: &str, state: MigrationState) -> MigrationProgress {
    let identity = |node: &str, byte: u8| NodeIdentity {
        node_id: node.to_owned(),
        store_id: vec![byte; 16].into(),
        ..NodeIdentity::default()
    };
    let ended =
        matches!(state, MigrationState::Completed | MigrationState::Cancelled | MigrationState::Failed);
    MigrationProgress {
        migration_id: id.to_owned(),
        state: state.into(),
        gate: MigrationGate::Open.into(),
        decision: MigrationDecision::Undecided.into(),
        spec: Some(MigrationSpec {
            slots: Some(SlotRange { start: 0, end: 100 }),
            source_shard_id: "s1".to_owned(),
            target_shard_id: "s2".to_owned(),
            source_node_id: "n1".to_owned(),
            target_node_id: "n2".to_owned(),
            auto_complete: true,
            value_format: String::new(),
        }),
        reporter: Some(identity("n1", 0x11)),
        peer: Some(identity("n2", 0x22)),
        target_address: "127.0.0.1:9".to_owned(),
        attempt: 4,
        copy: 1,
        slot_epoch: 7,
        progress: Some(Progress {
            direction: Direction::Out.into(),
            bytes_done: 1 << 20,
            bytes_total: Some(4 << 20),
            items_done: 10,
            items_total: Some(40),
            total_is_estimate: true,
            started_unix_ms: 1_000,
            phase_started_unix_ms: 2_000,
            last_activity_unix_ms: 3_000,
            finished_unix_ms: ended.then_some(5_000),
            ..Progress::default()
        }),
        ..MigrationProgress::default()
    }
}

#[tonic::async_trait]
impl MigrationService for Script {
    type TransferMigrationDataStream = Answers<TransferMigrationDataResponse>;
    type WatchMigrationProgressStream = Answers<WatchMigrationProgressResponse>;

    async fn start_migration(
        &self,
        request: Request<StartMigrationRequest>,
    ) -> Result<Response<StartMigrationResponse>, Status> {
        let request = request.into_inner();
        let id = request.migration_id.clone();
        if let Ok(known) = self.get(&id) {
            self.with(|state| state.started.push(request));
            return Ok(Response::new(StartMigrationResponse { migration: Some(known), joined: true }));
        }
        self.with(|state| {
            state.started.push(request.clone());
            if let Some(error) = &state.refuse {
                return Err(error.clone().into());
            }
            if state.places_taken > 0 {
                state.places_taken -= 1;
                let error = Reason::TooManyMigrations.error("4 migrations leave this node already");
                return Err(error.retry_after(Duration::from_millis(1)).into());
            }
            let ends = state.start_ends.unwrap_or(MigrationState::Pending);
            let moved = request.spec.clone().unwrap();
            if ends == MigrationState::Completed {
                let moved = moved.slots.unwrap();
                state.owned = state
                    .owned
                    .iter()
                    .flat_map(|owned| {
                        [(owned.start, moved.start.min(owned.end)), (moved.end.max(owned.start), owned.end)]
                    })
                    .filter(|(start, end)| start < end)
                    .map(|(start, end)| SlotRange { start, end })
                    .collect();
            }
            let mut started = migration(&id, ends);
            started.spec = Some(moved);
            state.migrations.push(started.clone());
            Ok(Response::new(StartMigrationResponse { migration: Some(started), joined: false }))
        })
    }

    async fn transfer_migration_data(
        &self,
        _: Request<Streaming<TransferMigrationDataRequest>>,
    ) -> Result<Response<Self::TransferMigrationDataStream>, Status> {
        Err(Status::unimplemented("not for tools"))
    }

    async fn complete_migration(
        &self,
        request: Request<CompleteMigrationRequest>,
    ) -> Result<Response<CompleteMigrationResponse>, Status> {
        let request = request.into_inner();
        let migration = Some(self.get(&request.migration_id)?);
        self.with(|state| state.completed.push(request));
        Ok(Response::new(CompleteMigrationResponse { migration }))
    }

    async fn cancel_migration(
        &self,
        request: Request<CancelMigrationRequest>,
    ) -> Result<Response<CancelMigrationResponse>, Status> {
        let request = request.into_inner();
        let mut migration = self.get(&request.migration_id)?;
        migration.state = MigrationState::Cancelling.into();
        self.with(|state| state.cancelled.push(request));
        Ok(Response::new(CancelMigrationResponse { migration: Some(migration) }))
    }

    async fn get_migration_progress(
        &self,
        request: Request<GetMigrationProgressRequest>,
    ) -> Result<Response<GetMigrationProgressResponse>, Status> {
        let migration = Some(self.get(&request.into_inner().migration_id)?);
        Ok(Response::new(GetMigrationProgressResponse { migration }))
    }

    async fn watch_migration_progress(
        &self,
        request: Request<WatchMigrationProgressRequest>,
    ) -> Result<Response<Self::WatchMigrationProgressStream>, Status> {
        let last = self.get(&request.into_inner().migration_id)?;
        let told = self.with(|state| state.watch.clone()).into_iter().chain([last]);
        let told = told.map(|migration| Ok(WatchMigrationProgressResponse { migration: Some(migration) }));
        let told: Vec<_> = told.collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(told).chain(tokio_stream::pending()))))
    }

    async fn list_migrations(
        &self,
        request: Request<ListMigrationsRequest>,
    ) -> Result<Response<ListMigrationsResponse>, Status> {
        if let Some(list) = self.with(|state| state.lists) {
            return Ok(Response::new(list()));
        }
        let active_only = request.into_inner().active_only;
        let migrations = self.with(|state| state.migrations.clone());
        let active =
            |migration: &MigrationProgress| migration.progress.as_ref().unwrap().finished_unix_ms.is_none();
        let migrations =
            migrations.into_iter().filter(|migration| !active_only || active(migration)).collect();
        Ok(Response::new(ListMigrationsResponse { migrations, next_page_token: String::new() }))
    }

    async fn resolve_migration(
        &self,
        request: Request<ResolveMigrationRequest>,
    ) -> Result<Response<ResolveMigrationResponse>, Status> {
        let request = request.into_inner();
        let mut migration = self.get(&request.migration_id)?;
        migration.state = MigrationState::Cancelled.into();
        self.with(|state| state.resolved.push(request));
        Ok(Response::new(ResolveMigrationResponse { migration: Some(migration) }))
    }
}

#[tonic::async_trait]
impl HealthService for Script {
    type WatchHealthStream = Answers<WatchHealthResponse>;

    async fn health_check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn watch_health(
        &self,
        _: Request<WatchHealthRequest>,
    ) -> Result<Response<Self::WatchHealthStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn get_node_status(
        &self,
        _: Request<GetNodeStatusRequest>,
    ) -> Result<Response<GetNodeStatusResponse>, Status> {
        let identity = NodeIdentity { node_id: "n1".to_owned(), ..NodeIdentity::default() };
        let status = self.with(|state| {
            if let Some(tell) = state.tells {
                return tell();
            }
            let owned: u32 = state.owned.iter().map(|slots| slots.end - slots.start).sum();
            let kind = RemovalBlockerKind::OwnsSlots.into();
            let blocker = match owned {
                0 => state.blockers.pop_front().map(|message| RemovalBlocker {
                    kind: RemovalBlockerKind::UnconfirmedCommit.into(),
                    message,
                    ..RemovalBlocker::default()
                }),
                _ => Some(RemovalBlocker { kind, count: owned.into(), ..RemovalBlocker::default() }),
            };
            NodeStatus {
                slots_owned: owned,
                safe_to_remove: blocker.is_none(),
                removal_blockers: blocker.into_iter().collect(),
                slot_owners: state
                    .owned
                    .iter()
                    .map(|slots| SlotOwner {
                        slots: Some(*slots),
                        epoch: 3,
                        node_id: "n1".to_owned(),
                        ..SlotOwner::default()
                    })
                    .collect(),
                ..NodeStatus::default()
            }
        });
        let origin = ReplyOrigin { identity: Some(identity), ..ReplyOrigin::default() };
        Ok(Response::new(GetNodeStatusResponse {
            origin: Some(origin),
            status: Some(status),
            next_page_token: String::new(),
        }))
    }
}
