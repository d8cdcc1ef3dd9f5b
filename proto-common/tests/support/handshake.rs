//! A server with a certificate, and nodes that call it.

use std::time::Duration;

use proto_common::access::{Access, Guarded, RoleTable};
use proto_common::connect::Connect as _;
use proto_common::dial::Dialer;
use proto_common::error::Error;
use proto_common::limits::ConnectionLimits;
use proto_common::listen::Limited;
use proto_common::tls::{Tls, TlsError, TlsIncoming, TlsLimits, TlsPem};
use proto_common::tuning::tune_server;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tonic::transport::Server;

use crate::certificates::{Ca, Issue};
use crate::echo::{Echo, call};

/// A method that everybody may call.
pub(crate) const READ: &str = "GetTransferProgress";
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn tls(ca: &Ca, trusted: &Ca, issue: &Issue) -> Result<Tls, TlsError> {
    let (certificate, key) = ca.issue(issue);
    Tls::from_pem(TlsPem { ca: trusted.pem().into(), certificate: certificate.into(), key: key.into() })
}

pub(crate) fn node(ca: &Ca, id: &str) -> Tls {
    tls(ca, ca, &Issue::node(id)).unwrap()
}

/// A server with that certificate; its address.
pub(crate) async fn serve_within(tls: Tls, limits: TlsLimits, connections: ConnectionLimits) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let access = Access::new(tls.identity().cluster, RoleTable::new());
    tokio::spawn(async move {
        let incoming = Limited::new(TlsIncoming::new(listener, tls, limits), connections);
        tune_server(Server::builder())
            .add_service(Guarded::new(Echo, access))
            .serve_with_incoming(incoming)
            .await
            .unwrap();
    });
    address
}

pub(crate) async fn serve(tls: Tls) -> String {
    serve_within(tls, TlsLimits::default(), ConnectionLimits::default()).await
}

/// Connects and calls; what the server says of the caller.
pub(crate) async fn ask(tls: &Tls, address: &str, expected: Option<&str>) -> Result<String, Error> {
    let expected = expected.map(|id| id.parse().unwrap());
    let dial = Dialer::tls(tls.clone()).to(address, expected.as_ref())?;
    let channel = timeout(PATIENCE, dial.connect()).await.expect("a connection or an error in time")?;
    timeout(PATIENCE, call(channel, READ)).await.expect("an answer in time")
}
