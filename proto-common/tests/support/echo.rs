//! A service that tells each caller who it is, under the name of one that role tables know.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use proto_common::access::Caller;
use proto_common::dial::NodeChannel;
use proto_common::error::Error;
use proto_common::v1::NodeIdentity;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

#[derive(Clone)]
pub(crate) struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "node.snapshot.v1.SplitSnapshotService";
}

impl tonic::server::UnaryService<NodeIdentity> for Echo {
    type Response = NodeIdentity;
    type Future = Pin<Box<dyn Future<Output = Result<Response<NodeIdentity>, Status>> + Send>>;

    fn call(&mut self, request: Request<NodeIdentity>) -> Self::Future {
        Box::pin(async move {
            let caller = Caller::of(request.extensions())?;
            Ok(Response::new(NodeIdentity { version: caller.peer().to_string(), ..NodeIdentity::default() }))
        })
    }
}

impl tonic::codegen::Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(
            async move { Ok(tonic::server::Grpc::new(ProstCodec::default()).unary(Self, request).await) },
        )
    }
}

/// Calls that method.
pub(crate) async fn call(channel: NodeChannel, method: &str) -> Result<String, Error> {
    call_of(channel, method, None).await
}

/// Calls that method, in the cluster that is meant.
pub(crate) async fn call_of(
    channel: NodeChannel,
    method: &str,
    cluster: Option<&str>,
) -> Result<String, Error> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|error| Error::from(Status::from_error(error.into())))?;
    let path = PathAndQuery::try_from(format!("/{}/{method}", Echo::NAME)).unwrap();
    let mut request = Request::new(NodeIdentity::default());
    if let Some(cluster) = cluster {
        request.metadata_mut().insert(proto_common::access::CLUSTER_METADATA, cluster.parse().unwrap());
    }
    let answer = client.unary::<_, NodeIdentity, _>(request, path, ProstCodec::default()).await;
    Ok(answer.map_err(Error::from)?.into_inner().version)
}
