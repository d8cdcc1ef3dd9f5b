//! What tonic refuses by itself, with the details that every refusal of ours has.
//!
//! The generated services decode unary requests before a handler sees them. A message that is too large, compressed or broken ends there, with a
//! code and a sentence and nothing that a program could decide by. [`WithDetails`] stands in front and puts that right; it looks at
//! the headers of an answer, never at a body.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

use crate::error::Error;
use crate::text::printable;

/// Why tonic refused a request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The message is larger than the service takes.
    TooLarge,
    /// The message is compressed, in this way.
    Compressed {
        /// The name of the encoding, fit to be shown.
        encoding: String,
    },
    /// The message is not one of its type.
    Undecodable,
}

/// `S`, whose refusals by tonic are told as [`Error`]s. `tell` gives each the reason that the service has for it.
#[derive(Debug, Clone)]
pub struct WithDetails<S> {
    inner: S,
    tell: fn(Refusal) -> Error,
}

impl<S> WithDetails<S> {
    /// Puts `tell` in front of a generated service.
    pub fn new(inner: S, tell: fn(Refusal) -> Error) -> Self {
        Self { inner, tell }
    }
}

impl<S: NamedService> NamedService for WithDetails<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for WithDetails<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>>,
    S::Future: Unpin,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Answer<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let encoding = request.headers().get("grpc-encoding").and_then(|encoding| encoding.to_str().ok());
        let encoding = encoding.filter(|encoding| *encoding != "identity");
        let encoding = encoding.map(|encoding| printable(encoding, 64));
        Answer { inner: self.inner.call(request), encoding, tell: self.tell }
    }
}

/// What [`WithDetails`] answers.
#[derive(Debug)]
pub struct Answer<F> {
    inner: F,
    encoding: Option<String>,
    tell: fn(Refusal) -> Error,
}

impl<F, E> Future for Answer<F>
where
    F: Future<Output = Result<http::Response<Body>, E>> + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut response = ready!(Pin::new(&mut self.inner).poll(cx))?;
        if let Some(refusal) = refusal(response.headers(), self.encoding.take()) {
            response = Status::from((self.tell)(refusal)).into_http();
        }
        Poll::Ready(Ok(response))
    }
}

/// Why an answer with these headers is a refusal of tonic's. Ours always have details.
fn refusal(headers: &http::HeaderMap, encoding: Option<String>) -> Option<Refusal> {
    if headers.contains_key("grpc-status-details-bin") {
        return None;
    }
    // The codes of tonic's decoder.
    match (headers.get("grpc-status")?.as_bytes(), encoding) {
        (b"11", _) => Some(Refusal::TooLarge),
        (b"12", Some(encoding)) => Some(Refusal::Compressed { encoding }),
        (b"13", _) => Some(Refusal::Undecodable),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> http::HeaderMap {
        let pair =
            |&(name, value)| (http::HeaderName::from_static(name), http::HeaderValue::from_static(value));
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn only_what_has_no_details_is_told_anew() {
        let gzip = || Some("gzip".to_owned());
        assert_eq!(refusal(&headers(&[("grpc-status", "11")]), None), Some(Refusal::TooLarge));
        assert_eq!(refusal(&headers(&[("grpc-status", "13")]), None), Some(Refusal::Undecodable));
        let compressed = Refusal::Compressed { encoding: "gzip".to_owned() };
        assert_eq!(refusal(&headers(&[("grpc-status", "12")]), gzip()), Some(compressed));
        assert_eq!(refusal(&headers(&[("grpc-status", "12")]), None), None, "an unknown method");
        let ours = headers(&[("grpc-status", "11"), ("grpc-status-details-bin", "CAs")]);
        assert_eq!(refusal(&ours, gzip()), None);
        assert_eq!(refusal(&headers(&[]), gzip()), None, "a success");
    }
}
