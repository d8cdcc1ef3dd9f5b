//! The standard `grpc.health.v1`, answered from the same registry.

use std::collections::HashMap;
use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use proto_common::access::Guarded;
use proto_common::prompt::{MAX_REQUEST_BYTES, Prompt};
use proto_common::refusal::WithDetails;
use tonic::{Request, Response, Status};

use crate::grpc_health_v1::health_check_response::ServingStatus;
use crate::grpc_health_v1::health_server::{Health, HealthServer};
use crate::grpc_health_v1::{HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse};
use crate::limits::STANDARD_LIST;
use crate::server::core::Inner;
use crate::server::service::{MAX_SERVICE_NAME, refused, shutting_down};
use crate::server::verdict::Snapshot;
use crate::server::watch::{Cursor, Event};

/// [`StandardHealth`] as it is added to a tonic server.
pub type StandardHealthService = Guarded<WithDetails<Prompt<HealthServer<StandardHealth>>>>;

/// The standard health service of a node. See [`HealthRegistry::standard_service`](super::HealthRegistry::standard_service).
#[derive(Clone)]
pub struct StandardHealth {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for StandardHealth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StandardHealth(..)")
    }
}

impl StandardHealth {
    pub(crate) fn server(inner: Arc<Inner>) -> StandardHealthService {
        let access = inner.access.clone();
        let service = HealthServer::new(Self { inner }).max_decoding_message_size(MAX_REQUEST_BYTES);
        Guarded::new(WithDetails::new(Prompt::new(service), refused), access)
    }
}

fn status(serving: bool) -> ServingStatus {
    if serving { ServingStatus::Serving } else { ServingStatus::NotServing }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

fn watched(snapshot: &Snapshot, service: &str) -> ServingStatus {
    snapshot.serving(service).map_or(ServingStatus::ServiceUnknown, status)
}

#[tonic::async_trait]
impl Health for StandardHealth {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = &request.get_ref().service;
        match self.inner.peek(|snapshot| snapshot.serving(service)) {
            Some(serving) => Ok(Response::new(answer(status(serving)))),
            None => Err(Status::not_found("unknown service")),
        }
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        let snapshot = self.inner.snapshot();
        let names = snapshot.verdicts.keys().chain(&snapshot.services);
        let statuses: HashMap<String, HealthCheckResponse> =
            names.map(|name| (name.to_string(), answer(watched(&snapshot, name)))).collect();
        if statuses.len() > STANDARD_LIST {
            let message = format!(
                "there are {} services, a list holds at most {STANDARD_LIST}; ask for each",
                statuses.len()
            );
            return Err(Status::resource_exhausted(message));
        }
        Ok(Response::new(HealthListResponse { statuses }))
    }

    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (_, extensions, HealthCheckRequest { service }) = request.into_parts();
        if service.len() > MAX_SERVICE_NAME {
            return Err(Status::invalid_argument(format!("a name has at most {MAX_SERVICE_NAME} bytes")));
        }
        if self.inner.peek(|snapshot| snapshot.closed) {
            return Err(shutting_down().into());
        }
        let place = self.inner.places.take(&extensions)?;
        let cursor = Cursor::new(&self.inner, &service, None, watched, place, None);
        let states = stream::unfold(Some((cursor, None)), |open| async move {
            let (mut cursor, told) = open?;
            match cursor.next().await {
                Event::State(snapshot) | Event::Heartbeat(snapshot) => {
                    let status = watched(&snapshot, &cursor.service);
                    Some((Ok(answer(status)), Some((cursor, Some(status)))))
                }
                Event::Closed(snapshot) => {
                    // The reader may have been told already.
                    let last = watched(&snapshot, &cursor.service);
                    (told != Some(last)).then(|| (Ok(answer(last)), None))
                }
            }
        });
        Ok(Response::new(states.boxed()))
    }
}
