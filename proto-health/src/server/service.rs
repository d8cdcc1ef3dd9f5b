//! `HealthService`: questions in, answers from what the registry knows out.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use proto_common::access::{Caller, Guarded};
use proto_common::error::Error;
use proto_common::ids::NodeId;
use proto_common::prompt::{MAX_REQUEST_BYTES, Prompt};
use proto_common::refusal::{Refusal, WithDetails};
use proto_common::text::printable;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::limits::{MAX_MESSAGE_BYTES, REMOVAL_BLOCKERS};
use crate::reason::Reason;
use crate::server::asking::{self, Told};
use crate::server::core::Inner;
use crate::server::facts::{Facts, Sections};
use crate::server::page::{self, Position};
use crate::server::verdict::{LIVENESS, OVERALL, READINESS, STARTUP, Snapshot};
use crate::server::watch::{Cursor, Event};
use crate::v1::health_service_server::{HealthService, HealthServiceServer};
use crate::v1::{
    ComponentHealth, GetNodeStatusRequest, GetNodeStatusResponse, HealthCheckRequest, HealthCheckResponse,
    HealthProbe, HealthReport, HealthStatus, NodeState, NodeStatus, NodeStatusSection, WatchHealthRequest,
    WatchHealthResponse,
};

/// Longest name of a service that may be asked for, in bytes.
pub(crate) const MAX_SERVICE_NAME: usize = 1024;

/// [`NodeHealth`] as it is added to a tonic server.
pub type NodeHealthService = Guarded<WithDetails<Prompt<HealthServiceServer<NodeHealth>>>>;

/// The health service of a node. See [`HealthRegistry::service`](super::HealthRegistry::service).
#[derive(Clone)]
pub struct NodeHealth {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for NodeHealth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodeHealth(..)")
    }
}

impl NodeHealth {
    pub(crate) fn server(inner: Arc<Inner>) -> NodeHealthService {
        let access = inner.access.clone();
        let service = HealthServiceServer::new(Self { inner })
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Guarded::new(WithDetails::new(Prompt::new(service), refused), access)
    }

    /// Who calls, if it may.
    fn admit(&self, from: &str, extensions: &http::Extensions) -> Result<Option<NodeId>, Error> {
        let from = match from {
            "" => None,
            id => Some(NodeId::new(id).map_err(|error| error.at("from"))?),
        };
        let caller = Caller::of(extensions)?;
        if let Some(from) = &from {
            caller.claims("from", from)?;
            self.inner.callers.heard(from);
        }
        Ok(from)
    }
}

/// What tonic refuses before a handler sees it.
pub(crate) fn refused(refusal: Refusal) -> Error {
    match refusal {
        Refusal::Compressed { encoding } => Reason::UnsupportedCompression
            .error(format!("messages in {encoding} are not taken; send them as they are"))
            .metadata("encoding", encoding),
        Refusal::TooLarge => {
            Reason::InvalidField.error(format!("a request is larger than {MAX_REQUEST_BYTES} bytes"))
        }
        _ => Reason::InvalidField.error("a message could not be decoded"),
    }
}

pub(crate) fn shutting_down() -> Error {
    Reason::ShuttingDown.error("the node shuts down and has sent its last state")
}

fn named(service: &str) -> Result<(), Error> {
    if service.len() > MAX_SERVICE_NAME {
        let why = format!("has {} bytes, the limit is {MAX_SERVICE_NAME}", service.len());
        return Err(Reason::InvalidField.field("service", why));
    }
    Ok(())
}

/// A watcher of a service is told when this changes.
fn version(snapshot: &Snapshot, service: &str) -> Option<u64> {
    snapshot.verdicts.get(service).map(|verdict| verdict.version)
}

impl Inner {
    /// The report of `service`, and the picture that it is of. `None`: there is no such service.
    fn report(&self, service: &str, omit_components: bool) -> (Arc<Snapshot>, Option<HealthReport>) {
        if omit_components {
            let snapshot = self.snapshot();
            let report = snapshot.report(service, Vec::new());
            return (snapshot, report);
        }
        self.refresh();
        // Pictures are made under this lock, so that what follows is one picture.
        let core = self.core();
        let snapshot = Arc::clone(&self.subscribe().borrow());
        let now = Instant::now();
        let counts = |component: &ComponentHealth| {
            let probe = match service {
                OVERALL => return true,
                LIVENESS => HealthProbe::Liveness,
                READINESS => HealthProbe::Readiness,
                STARTUP => HealthProbe::Startup,
                name => return component.name == name,
            };
            component.probes.contains(&probe.into())
        };
        let mut components: Vec<ComponentHealth> =
            core.cells.values().map(|cell| cell.to_wire(now)).filter(counts).collect();
        drop(core);
        components.sort_by_key(|one| std::cmp::Reverse((one.status().severity(), one.critical)));
        let report = snapshot.report(service, components);
        (snapshot, report)
    }
}

impl Snapshot {
    fn report(&self, service: &str, components: Vec<ComponentHealth>) -> Option<HealthReport> {
        let verdict = self.verdicts.get(service)?;
        Some(HealthReport {
            service: service.to_owned(),
            status: verdict.status.into(),
            message: verdict.message.to_string(),
            components,
            since_unix_ms: verdict.since_unix_ms,
        })
    }
}

fn unknown_service(service: &str) -> HealthReport {
    HealthReport {
        service: service.to_owned(),
        status: HealthStatus::UnknownService.into(),
        message: "this node knows no such service".to_owned(),
        ..HealthReport::default()
    }
}

#[tonic::async_trait]
impl HealthService for NodeHealth {
    async fn health_check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let (_, extensions, request) = request.into_parts();
        let HealthCheckRequest { service, from, omit_components } = request;
        named(&service)?;
        self.admit(&from, &extensions)?;
        let (snapshot, report) = self.inner.report(&service, omit_components);
        let health = report.ok_or_else(|| {
            let shown = printable(&service, 128);
            let message = format!(
                "this node knows no service \"{shown}\"; ask for \"\", liveness, readiness, startup or a component"
            );
            Reason::UnknownService.error(message).metadata("service", shown)
        })?;
        let origin = Some(self.inner.origin(&snapshot));
        Ok(Response::new(HealthCheckResponse { origin, health: Some(health) }))
    }

    type WatchHealthStream = BoxStream<'static, Result<WatchHealthResponse, Status>>;

    async fn watch_health(
        &self,
        request: Request<WatchHealthRequest>,
    ) -> Result<Response<Self::WatchHealthStream>, Status> {
        let (_, extensions, request) = request.into_parts();
        let WatchHealthRequest { service, from, heartbeat_ms, omit_components } = request;
        named(&service)?;
        let allowed = &self.inner.limits.heartbeat_ms;
        if heartbeat_ms != 0 && !allowed.contains(&heartbeat_ms) {
            let why = format!("{heartbeat_ms} is not within {}..={}", allowed.start(), allowed.end());
            return Err(Reason::InvalidField.field("heartbeat_ms", why).into());
        }
        let from = self.admit(&from, &extensions)?;
        if self.inner.peek(|snapshot| snapshot.closed) {
            return Err(shutting_down().into());
        }
        let place = self.inner.places.take(&extensions)?;
        let watching = from.map(|from| self.inner.callers.watching(from));
        let heartbeat = (heartbeat_ms != 0).then(|| Duration::from_millis(heartbeat_ms.into()));
        let cursor = Cursor::new(&self.inner, &service, heartbeat, version, place, watching);
        let frames = stream::unfold(Some(cursor), move |open| async move {
            let mut cursor = open?;
            let event = cursor.next().await;
            let inner = &cursor.inner;
            let state = || {
                let (snapshot, report) = inner.report(&cursor.service, omit_components);
                (inner.origin(&snapshot), Some(report.unwrap_or_else(|| unknown_service(&cursor.service))))
            };
            let (origin, health) = match &event {
                Event::Heartbeat(snapshot) => (inner.origin(snapshot), None),
                Event::State(_) | Event::Closed(_) => state(),
            };
            let last_frame = matches!(event, Event::Closed(_));
            let frame = WatchHealthResponse { origin: Some(origin), health, last_frame };
            Some((Ok(frame), (!last_frame).then_some(cursor)))
        });
        Ok(Response::new(frames.boxed()))
    }

    async fn get_node_status(
        &self,
        request: Request<GetNodeStatusRequest>,
    ) -> Result<Response<GetNodeStatusResponse>, Status> {
        let (_, extensions, request) = request.into_parts();
        let GetNodeStatusRequest { sections, page_size, page_token, from } = request;
        let sections = Sections::from_wire(&sections).map_err(|(at, value)| {
            Reason::InvalidField
                .field(&format!("sections[{at}]"), format!("{value} is no section of this version"))
        })?;
        let position = Position::parse(&page_token, sections, &self.inner)?;
        self.admit(&from, &extensions)?;

        let told = asking::ask(&self.inner, sections).await;
        let Told { facts, blockers } = &*told;
        let health = sections.contains(NodeStatusSection::Health);
        let (snapshot, report) = self.inner.report(OVERALL, !health);
        let mut status = self.status(&snapshot, facts);
        status.health = if health { report } else { None };
        status.safe_to_remove = blockers.is_empty();
        let omitted = blockers.len().saturating_sub(REMOVAL_BLOCKERS);
        status.removal_blockers_omitted = u32::try_from(omitted).unwrap_or(u32::MAX);
        status.removal_blockers = blockers.iter().take(REMOVAL_BLOCKERS).cloned().collect();
        #[cfg(feature = "machine")]
        if sections.contains(NodeStatusSection::Machine) {
            status.machine = self.inner.machine.as_ref().and_then(crate::server::machine::Machine::status);
        }
        let next_page_token = page::fill(facts, &mut status, position, page_size, &self.inner, sections);
        let origin = Some(self.inner.origin(&snapshot));
        Ok(Response::new(GetNodeStatusResponse { origin, status: Some(status), next_page_token }))
    }
}

impl NodeHealth {
    /// All but lists, health, machine and what blocks the removal.
    fn status(&self, snapshot: &Snapshot, facts: &Facts) -> NodeStatus {
        let core = self.inner.core();
        let mut drain = core.life.drain_status();
        if let Some(drain) = &mut drain {
            drain.active_transfers = u32::try_from(facts.transfers.len()).unwrap_or(u32::MAX);
            drain.active_migrations = u32::try_from(facts.migrations.len()).unwrap_or(u32::MAX);
        }
        let state: NodeState = snapshot.state;
        NodeStatus {
            state: state.into(),
            state_since_unix_ms: core.life.since_unix_ms(),
            state_reason: core.life.reason().to_owned(),
            started_unix_ms: self.inner.started_unix_ms,
            node_address: facts.node_address.clone(),
            client_address: facts.client_address.clone(),
            drain,
            slots_owned: facts.slots_owned,
            keys: facts.keys,
            bytes: facts.bytes,
            slot_map_revision: facts.slot_map_revision,
            open_watches: u32::try_from(self.inner.places.open()).unwrap_or(u32::MAX),
            ..NodeStatus::default()
        }
    }
}
