//! Connects to a node by TLS, and says what went wrong in words that help.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore,
    SignatureScheme,
};
use tokio::io::AsyncBufReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tonic::codegen::Service;
use tonic::codegen::http;

use super::error::{long, since, until};
use super::{ALPN, Loaded, Tls, certificate, provider};
use crate::error::{CommonReason, Error};
use crate::ids::NodeId;
use crate::peer::{PeerIdentity, Role};

/// How long the server's first words are waited for. A server that refuses the client's certificate says so only after the client
/// thinks that the handshake is done (TLS 1.3); one that accepts it sends its HTTP/2 settings. Past this the connection is used as
/// it is.
const FIRST_WORDS: Duration = Duration::from_secs(2);

/// Makes TLS connections for a tonic channel, each with the certificate that is current then.
#[derive(Debug, Clone)]
pub(crate) struct TlsConnector {
    tls: Tls,
    expected: Option<NodeId>,
    limit: Duration,
}

impl TlsConnector {
    pub(crate) fn new(tls: Tls, expected: Option<NodeId>, limit: Duration) -> Self {
        Self { tls, expected, limit }
    }

    async fn connect(self, uri: Uri) -> Result<TokioIo<TlsStream<TcpStream>>, Error> {
        let address = uri.authority().map_or_else(String::new, ToString::to_string);
        let connecting = self.handshake(&uri, &address);
        match timeout(self.limit, connecting).await {
            Ok(connected) => connected.map(TokioIo::new),
            Err(_) => Err(unavailable(&address, &format!("no answer within {} ms", self.limit.as_millis()))),
        }
    }

    async fn handshake(&self, uri: &Uri, address: &str) -> Result<TlsStream<TcpStream>, Error> {
        let host = uri.host().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().unwrap_or(443);
        let stream = TcpStream::connect((bare, port))
            .await
            .map_err(|error| unavailable(address, &error.to_string()))?;
        stream.set_nodelay(true).map_err(|error| unavailable(address, &error.to_string()))?;
        crate::near::tune(&stream);
        let loaded = self.tls.current();
        let name = ServerName::try_from(bare.to_owned())
            .map_err(|_| unavailable(address, "its name is neither an IP address nor a DNS name"))?;
        let config = config(&loaded, self.expected.clone())
            .map_err(|error| Error::new(CommonReason::TlsFailed, format!("TLS cannot be set up: {error}")))?;
        let failed = |error: io::Error| self.explain(error, address, &loaded);
        let mut stream =
            tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(failed)?;
        // rustls takes a server that chooses no protocol at all.
        if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            let none = rustls::Error::NoApplicationProtocol;
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, none)));
        }
        match timeout(FIRST_WORDS, stream.fill_buf()).await {
            Ok(Ok([])) => Err(unavailable(address, "it closed the connection after the TLS handshake")),
            Ok(Err(error)) => Err(failed(error)),
            Ok(Ok(_)) | Err(_) => Ok(stream),
        }
    }

    /// The error for people and programs.
    fn explain(&self, error: io::Error, address: &str, loaded: &Loaded) -> Error {
        let Some(cause) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()).cloned()
        else {
            return unavailable(address, &format!("the TLS handshake broke: {error}"));
        };
        let now = SystemTime::now();
        let (reason, message) = match &cause {
            rustls::Error::InvalidCertificate(problem) => {
                self.their_certificate(problem, address, loaded, now)
            }
            rustls::Error::AlertReceived(alert) => our_certificate(*alert, address, loaded, now),
            rustls::Error::NoApplicationProtocol => (CommonReason::TlsFailed, no_http2(address)),
            rustls::Error::InvalidMessage(_) => {
                (CommonReason::TlsFailed, format!("{address} does not speak TLS; is it a plaintext port?"))
            }
            other => (CommonReason::TlsFailed, format!("the TLS handshake with {address} failed: {other}")),
        };
        Error::new(reason, message).metadata("address", address).caused_by(cause)
    }

    fn their_certificate(
        &self,
        problem: &CertificateError,
        address: &str,
        loaded: &Loaded,
        now: SystemTime,
    ) -> (CommonReason, String) {
        match problem {
            CertificateError::ExpiredContext { not_after, .. } => {
                let ago = long(since(*not_after, now));
                (
                    CommonReason::CertificateExpired,
                    format!("certificate expired {ago} ago: that of {address}"),
                )
            }
            CertificateError::NotValidYetContext { not_before, .. } => {
                let ahead = long(until(*not_before, now));
                let what =
                    format!("certificate not valid for another {ahead}: that of {address}; check the clocks");
                (CommonReason::TlsFailed, what)
            }
            // A bad signature is that of another CA of the same name.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                let what = format!(
                    "signed by an unknown CA: the certificate of {address} is signed by none in {}",
                    last(&loaded.names.ca)
                );
                (CommonReason::UnknownCa, what)
            }
            CertificateError::Other(OtherError(mismatch)) => match mismatch.downcast_ref::<Mismatch>() {
                Some(mismatch) => (mismatch.reason(), format!("{mismatch} (at {address})")),
                None => {
                    (CommonReason::TlsFailed, format!("the certificate of {address} is refused: {mismatch}"))
                }
            },
            other => (CommonReason::TlsFailed, format!("the certificate of {address} is refused: {other}")),
        }
    }
}

/// Why the peer does not take our certificate.
fn our_certificate(
    alert: AlertDescription,
    address: &str,
    loaded: &Loaded,
    now: SystemTime,
) -> (CommonReason, String) {
    let ours = last(&loaded.names.certificate);
    match alert {
        AlertDescription::CertificateExpired => {
            let ago = loaded.expires.and_then(|at| now.duration_since(at).ok());
            let what = match ago {
                Some(ago) => format!("certificate expired {} ago: {ours}; {address} refuses it", long(ago)),
                None => format!("{address} says that {ours} has expired; check its clock"),
            };
            (CommonReason::CertificateExpired, what)
        }
        // The latter for another CA of the same name.
        AlertDescription::UnknownCA | AlertDescription::DecryptError => (
            CommonReason::UnknownCa,
            format!("signed by an unknown CA: {address} does not trust who signed {ours}"),
        ),
        AlertDescription::CertificateRequired => {
            (CommonReason::Unauthenticated, format!("{address} wants a certificate, and got none"))
        }
        AlertDescription::NoApplicationProtocol => (CommonReason::TlsFailed, no_http2(address)),
        AlertDescription::ProtocolVersion => {
            (CommonReason::TlsFailed, format!("{address} does not speak TLS 1.3"))
        }
        other => (
            CommonReason::TlsFailed,
            format!("{address} refuses the connection or {ours}: TLS alert {other:?}"),
        ),
    }
}

/// The last part of a path. A node that cannot reach another one tells its peers why, in its status and in the progress of what it moves there, and no
/// path of a node is told to peers.
fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn no_http2(address: &str) -> String {
    format!("{address} speaks TLS, and no HTTP/2 over it")
}

fn unavailable(address: &str, why: &str) -> Error {
    Error::new(CommonReason::Unavailable, format!("cannot connect to {address}: {why}"))
        .metadata("address", address)
}

type Connecting = Pin<Box<dyn Future<Output = Result<TokioIo<TlsStream<TcpStream>>, Error>> + Send>>;

impl Service<Uri> for TlsConnector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = Error;
    type Future = Connecting;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect(uri))
    }
}

fn config(loaded: &Loaded, expected: Option<NodeId>) -> Result<ClientConfig, rustls::Error> {
    let provider = provider();
    let signatures =
        WebPkiServerVerifier::builder_with_provider(Arc::clone(&loaded.roots), Arc::clone(&provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
    let verifier = NodeVerifier {
        signatures,
        roots: Arc::clone(&loaded.roots),
        ours: loaded.identity.clone(),
        expected,
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::clone(&loaded.key) as Arc<dyn rustls::client::ResolvesClientCert>);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Takes the certificates of nodes: signed by the cluster's CA, of the own cluster, and of the node that is meant.
///
/// The address is not compared with the certificate: nodes move, and are called by address and ID.
#[derive(Debug)]
struct NodeVerifier {
    signatures: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
    ours: PeerIdentity,
    expected: Option<NodeId>,
}

/// A good certificate of somebody else.
#[derive(Debug)]
enum Mismatch {
    Nameless,
    NoNode(PeerIdentity),
    Cluster { found: PeerIdentity, ours: PeerIdentity },
    Node { found: PeerIdentity, expected: NodeId },
}

impl Mismatch {
    fn reason(&self) -> CommonReason {
        match self {
            Self::Cluster { .. } => CommonReason::WrongCluster,
            Self::Nameless | Self::NoNode(_) | Self::Node { .. } => CommonReason::WrongPeer,
        }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nameless => f.write_str("the certificate names no node"),
            Self::NoNode(found) => write!(f, "the certificate is that of {found}, which is no node"),
            Self::Cluster { found, ours } => {
                write!(
                    f,
                    "the certificate is that of {found}, which is not of the cluster {:?}",
                    ours.cluster_name()
                )
            }
            Self::Node { found, expected } => {
                write!(f, "not valid for node {expected}: the certificate is that of node {}", found.id)
            }
        }
    }
}

impl std::error::Error for Mismatch {}

impl NodeVerifier {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Mismatch> {
        let found = certificate::identity(certificate).ok_or(Mismatch::Nameless)?;
        if found.role != Role::Node {
            return Err(Mismatch::NoNode(found));
        }
        if found.cluster != self.ours.cluster {
            return Err(Mismatch::Cluster { found, ours: self.ours.clone() });
        }
        match &self.expected {
            Some(expected) if *expected != found.id => {
                Err(Mismatch::Node { found, expected: expected.clone() })
            }
            _ => Ok(()),
        }
    }
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        super::chain::check(intermediates)?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = provider().signature_verification_algorithms;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms.all)?;
        self.check(end_entity).map_err(|mismatch| {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(mismatch))))
        })?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signatures.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signatures.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signatures.supported_verify_schemes()
    }
}
