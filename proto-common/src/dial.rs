//! Connections to nodes, in plaintext or by TLS, in one way for all who dial.

use std::task::{Context, Poll};
use std::time::Duration;

use tonic::body::Body;
use tonic::codegen::http::HeaderValue;
use tonic::codegen::{Service, http};
use tonic::transport::{Channel, Endpoint};

use crate::connect::{Connect, no_connection};
use crate::error::{CommonReason, Error};
use crate::ids::{ClusterId, NodeId};
use crate::near::TcpConnector;
use crate::peer::CLUSTER_METADATA;
use crate::tuning::{CONNECT_TIMEOUT, endpoint};

/// How this process connects to nodes. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    #[cfg(feature = "tls")]
    tls: Option<crate::tls::Tls>,
    cluster: Option<HeaderValue>,
}

impl Dialer {
    /// In plaintext.
    #[must_use]
    pub fn plaintext() -> Self {
        Self::default()
    }

    /// By TLS, showing the certificate of `tls`.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(tls: crate::tls::Tls) -> Self {
        Self { tls: Some(tls), cluster: None }
    }

    /// Names the cluster that is meant in each call, as [`CLUSTER_METADATA`]; `None` is the one without a name. A node of another one
    /// refuses the call before it does anything, also in plaintext. Without this, calls name none.
    #[must_use]
    pub fn in_cluster(mut self, cluster: Option<&ClusterId>) -> Self {
        // An ID has no character that metadata cannot have.
        self.cluster = HeaderValue::from_str(cluster.map_or("", ClusterId::as_str)).ok();
        self
    }

    /// Whether it connects by TLS.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.tls.is_some();
        #[cfg(not(feature = "tls"))]
        false
    }

    /// The node at `address`: `host:port`, or a URI whose scheme is `http` in plaintext and `https` by TLS. By TLS it has to prove
    /// that it is a node of the own cluster, and the node `expected` if there is one. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// `INVALID_FIELD` if it is no address, or one of the other kind.
    pub fn to(&self, address: &str, expected: Option<&NodeId>) -> Result<Dial, Error> {
        let endpoint = endpoint(address)?;
        let refuse = |why: &str| {
            Error::new(CommonReason::InvalidField, format!("{}: {why}", endpoint.uri()))
                .violation("address", why.to_owned())
        };
        let scheme = address.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        match (scheme.as_deref(), self.is_encrypted()) {
            (Some("https"), false) => {
                return Err(refuse(
                    "https takes a certificate, a key and a CA; write host:port for plaintext",
                ));
            }
            (Some("http"), true) => {
                return Err(refuse("http is plaintext, TLS is configured; write host:port"));
            }
            _ => {}
        }
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            // The scheme that the connector sees is `http`, or tonic would look for TLS of its own; the one in requests is `https`.
            let host = endpoint.uri().authority().map_or_else(String::new, ToString::to_string);
            let origin = format!("https://{host}").parse().map_err(|_| refuse("it is not a URI"))?;
            let endpoint = crate::tuning::endpoint(&host)?.origin(origin);
            return Ok(Dial {
                endpoint,
                tls: Some((tls.clone(), expected.cloned())),
                limit: CONNECT_TIMEOUT,
                cluster: self.cluster.clone(),
            });
        }
        let _ = expected;
        Ok(Dial {
            endpoint,
            #[cfg(feature = "tls")]
            tls: None,
            limit: CONNECT_TIMEOUT,
            cluster: self.cluster.clone(),
        })
    }
}

/// The way to one node; makes connections to it.
#[derive(Debug, Clone)]
pub struct Dial {
    endpoint: Endpoint,
    #[cfg(feature = "tls")]
    tls: Option<(crate::tls::Tls, Option<NodeId>)>,
    limit: Duration,
    cluster: Option<HeaderValue>,
}

impl Dial {
    /// How long to wait for a connection, handshake included. Default: [`CONNECT_TIMEOUT`].
    #[must_use]
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// A channel that connects when it is first used, and again when the connection broke.
    #[must_use]
    pub fn connect_lazy(&self) -> NodeChannel {
        let endpoint = self.endpoint.clone().connect_timeout(self.limit);
        #[cfg(feature = "tls")]
        if let Some((tls, expected)) = &self.tls {
            let connector = crate::tls::connect::TlsConnector::new(tls.clone(), expected.clone(), self.limit);
            return self.named(endpoint.connect_with_connector_lazy(connector));
        }
        self.named(endpoint.connect_with_connector_lazy(TcpConnector::new(self.limit)))
    }

    fn named(&self, channel: Channel) -> NodeChannel {
        NodeChannel { channel, cluster: self.cluster.clone() }
    }
}

/// A connection to a node, whose calls name the cluster that is [meant](Dialer::in_cluster). Cheap to clone; clones share it.
#[derive(Debug, Clone)]
pub struct NodeChannel {
    channel: Channel,
    cluster: Option<HeaderValue>,
}

impl Service<http::Request<Body>> for NodeChannel {
    type Response = <Channel as Service<http::Request<Body>>>::Response;
    type Error = <Channel as Service<http::Request<Body>>>::Error;
    type Future = <Channel as Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Service::poll_ready(&mut self.channel, cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        if let Some(cluster) = &self.cluster {
            request.headers_mut().insert(CLUSTER_METADATA, cluster.clone());
        }
        Service::call(&mut self.channel, request)
    }
}

/// A new connection each time.
impl Connect for Dial {
    type Channel = NodeChannel;

    async fn connect(&self) -> Result<NodeChannel, Error> {
        let endpoint = self.endpoint.clone().connect_timeout(self.limit);
        #[cfg(feature = "tls")]
        if let Some((tls, expected)) = &self.tls {
            let connector = crate::tls::connect::TlsConnector::new(tls.clone(), expected.clone(), self.limit);
            let channel = endpoint.connect_with_connector(connector).await;
            return channel.map(|channel| self.named(channel)).map_err(|error| {
                crate::status::own_error(&error).unwrap_or_else(|| {
                    let message = format!("cannot connect: {}", crate::connect::deepest(&error));
                    Error::new(CommonReason::Unavailable, message).caused_by(error)
                })
            });
        }
        let channel = endpoint.connect_with_connector(TcpConnector::new(self.limit)).await;
        channel.map(|channel| self.named(channel)).map_err(|error| no_connection(&endpoint, error))
    }
}
