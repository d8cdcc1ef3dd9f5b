//! The gRPC port: server reflection, and the services that nodes offer each other.

use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;

/// All services of this node.
///
/// # Errors
///
/// The descriptors that were compiled in are not whole.
pub fn services() -> anyhow::Result<Routes> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::common::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(proto::snapshot::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(proto::migration::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(proto::health::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("cannot describe the services")?;
    Ok(Routes::new(reflection))
}

/// Serves until `stop`; calls under way may end within `grace`.
///
/// # Errors
///
/// The server failed.
pub async fn serve(
    listener: TcpListener,
    services: Routes,
    stop: CancellationToken,
    grace: Duration,
) -> anyhow::Result<()> {
    let server = proto::common::tuning::tune_server(Server::builder()).add_routes(services);
    let serving =
        server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned());
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
