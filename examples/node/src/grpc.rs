//! The gRPC port: server reflection, and the services that nodes offer each other.

use std::time::Duration;

use anyhow::Context as _;
use proto::common::access::Guarded;
use proto::common::listen::Limited;
use proto::common::prompt::{MAX_REQUEST_BYTES, Prompt};
use proto::common::tls::{Tls, TlsIncoming};
use proto::common::tuning::{incoming_within, tune_server_within};
use proto::health::HealthRegistry;
use proto::limits::Limits;
use proto::node::NodeIdentity;
use proto::snapshot::hook::InstallHook;
use proto::snapshot::store::FileStoreOptions;
use proto::snapshot::{FileSnapshotStore, SnapshotReceiver};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;

use crate::health::WhileUp;
use crate::migrate::Migrating;
use crate::node::Node;

/// Who the node is, as every service says it.
#[must_use]
pub fn identity(node: &Node) -> NodeIdentity {
    NodeIdentity {
        node_id: node.id().to_string(),
        cluster_id: node.trust().cluster().map(ToString::to_string).unwrap_or_default(),
        store_id: node.store_id().to_vec().into(),
        incarnation: node.incarnation(),
        version: env!("CARGO_PKG_VERSION").into(),
    }
}

/// Takes the snapshots that are sent to this node, in its data directory; `hook` makes those of rows part of its database.
/// After `draining` it takes no new ones.
///
/// # Errors
///
/// The directory cannot be read, or is in use.
pub async fn receiver(
    node: &Node,
    hook: impl InstallHook,
    draining: CancellationToken,
    files: FileStoreOptions,
    limits: proto::snapshot::limits::Limits,
) -> anyhow::Result<SnapshotReceiver<FileSnapshotStore>> {
    let directory = node.store().directory().join("snapshots");
    let store = tokio::task::spawn_blocking(move || FileSnapshotStore::open(directory, files));
    let store = store.await?.context("cannot open the directory of snapshots")?;
    SnapshotReceiver::builder(node.id(), store)
        .identity(identity(node))
        .limits(limits)
        .access(node.trust().access())
        .hook(WhileUp::new(hook, draining))
        .start()
        .await
        .context("cannot go on with the snapshots of an earlier process")
}

/// All services of this node, and what describes them.
///
/// # Errors
///
/// The descriptors that were compiled in are not whole.
pub fn services(
    node: &Node,
    receiver: SnapshotReceiver<FileSnapshotStore>,
    migrating: &Migrating,
    health: &HealthRegistry,
) -> anyhow::Result<Routes> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::common::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(proto::snapshot::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(proto::migration::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(proto::health::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(proto::health::grpc_health_v1::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("cannot describe the services")?
        .max_decoding_message_size(MAX_REQUEST_BYTES);
    // Who asks for descriptions is done before long: a stream that goes on holds more than it is worth.
    Ok(Routes::new(Guarded::new(Prompt::streaming(reflection), node.trust().access()))
        .add_service(receiver.into_service())
        .add_service(migrating.service())
        .add_service(health.service())
        .add_service(health.standard_service()))
}

/// Serves until `stop`, by TLS if there is any; calls under way may end within `grace`.
///
/// # Errors
///
/// The server failed.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    services: Routes,
    limits: Limits,
    stop: CancellationToken,
    grace: Duration,
) -> anyhow::Result<()> {
    let server = tune_server_within(Server::builder(), &limits.connections).add_routes(services);
    let stopped = stop.clone().cancelled_owned();
    let serving = async move {
        match tls {
            Some(tls) => {
                let accepted = TlsIncoming::new(listener, tls, limits.handshakes);
                let incoming = Limited::new(accepted, limits.connections);
                server.serve_with_incoming_shutdown(incoming, stopped).await
            }
            None => {
                let incoming = incoming_within(listener, limits.connections);
                server.serve_with_incoming_shutdown(incoming, stopped).await
            }
        }
    };
    tokio::pin!(serving);
    tokio::select! {
        served = &mut serving => return served.context("the gRPC server failed"),
        () = stop.cancelled() => {}
    }
    match tokio::time::timeout(grace, serving).await {
        Ok(served) => served.context("the gRPC server failed"),
        Err(_) => {
            tracing::warn!("gRPC calls did not end in time; they are cut");
            Ok(())
        }
    }
}
