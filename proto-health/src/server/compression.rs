//! Refuses compressed requests by name, as the contract says; tonic's own refusal has no reason that a program could read.

use std::task::{Context, Poll};

use futures::future::{Either, Ready, ready};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::NamedService;

use crate::reason::Reason;

/// A service that takes no compressed messages.
#[derive(Debug, Clone)]
pub struct RefuseCompressed<S> {
    service: S,
}

impl<S> RefuseCompressed<S> {
    pub(crate) fn new(service: S) -> Self {
        Self { service }
    }
}

impl<S: NamedService> NamedService for RefuseCompressed<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for RefuseCompressed<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let encoding = request.headers().get("grpc-encoding");
        match encoding.filter(|encoding| *encoding != "identity") {
            None => Either::Left(self.service.call(request)),
            Some(encoding) => {
                let encoding =
                    proto_common::text::printable(&String::from_utf8_lossy(encoding.as_bytes()), 64);
                let message = format!("messages in {encoding} are not taken; send them as they are");
                let error = Reason::UnsupportedCompression.error(message).metadata("encoding", encoding);
                Either::Right(ready(Ok(Status::from(error).into_http())))
            }
        }
    }
}
