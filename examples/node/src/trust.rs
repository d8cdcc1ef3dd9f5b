//! Whom the node trusts, and how it proves who it is: TLS, the cluster, and who may call.

use std::net::SocketAddr;

use anyhow::{Context as _, bail};
use proto::common::access::{Access, AllowAll, AllowLocal, Authorizer, RoleTable};
use proto::common::dial::Dialer;
use proto::common::ids::ClusterId;
use proto::common::peer::Role;
use proto::common::tls::{RELOAD_INTERVAL, Tls, TlsFiles};
use tokio_util::sync::CancellationToken;

use crate::common::NodeId;

/// What the command line says of it.
#[derive(Debug, Clone, Default)]
pub struct TrustOptions {
    /// `--tls-ca`, `--tls-cert`, `--tls-key`; `None`: plaintext.
    pub tls: Option<TlsFiles>,
    /// `--cluster`.
    pub cluster: Option<ClusterId>,
    /// `--insecure-plaintext`.
    pub insecure_plaintext: bool,
}

/// See the [module](self). Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    tls: Option<Tls>,
    cluster: Option<ClusterId>,
    /// Callers of other machines are served in plaintext.
    from_anywhere: bool,
}

impl Trust {
    /// Reads the files and holds them against who the node is and where it listens. Blocks.
    ///
    /// # Errors
    ///
    /// Each names the flag to change.
    pub fn load(options: TrustOptions, node: &NodeId, listen: SocketAddr) -> anyhow::Result<Self> {
        let TrustOptions { tls, cluster, insecure_plaintext } = options;
        let Some(files) = tls else {
            if !listen.ip().is_loopback() {
                if !insecure_plaintext {
                    bail!(
                        "--grpc {listen} is no loopback address, and without TLS anybody who reaches it may read, move and discard \
                         data; give --tls-ca, --tls-cert and --tls-key, or --insecure-plaintext if the network is closed"
                    );
                }
                tracing::warn!(%listen, "the gRPC port is plaintext: whoever reaches it may do everything");
            }
            return Ok(Self { tls: None, cluster, from_anywhere: insecure_plaintext });
        };
        if insecure_plaintext {
            bail!("--insecure-plaintext and --tls-cert exclude each other");
        }
        let certificate = files.certificate.display().to_string();
        let tls = Tls::from_files(files).context("TLS cannot be set up")?;
        let identity = tls.identity();
        if identity.role != Role::Node || identity.id != *node {
            bail!(
                "--tls-cert {certificate} is that of {identity}, --id is {node}; a node needs its own certificate"
            );
        }
        if cluster.is_some() && cluster != identity.cluster {
            let named = cluster.as_ref().map_or("", ClusterId::as_str);
            bail!("--tls-cert {certificate} is that of {identity}, --cluster is {named}");
        }
        Ok(Self { cluster: identity.cluster, tls: Some(tls), from_anywhere: false })
    }

    /// The certificates, with TLS.
    #[must_use]
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// The cluster, if it has a name.
    #[must_use]
    pub fn cluster(&self) -> Option<&ClusterId> {
        self.cluster.as_ref()
    }

    /// How other nodes are called.
    #[must_use]
    pub fn dialer(&self) -> Dialer {
        let dialer = self.tls.clone().map_or_else(Dialer::plaintext, Dialer::tls);
        dialer.in_cluster(self.cluster.as_ref())
    }

    /// Who may call: with TLS by role, in plaintext this machine, and everybody only if the command line says so.
    #[must_use]
    pub fn access(&self) -> Access {
        Access::new(self.cluster.clone(), self.authorizer())
    }

    fn authorizer(&self) -> Box<dyn Authorizer> {
        match &self.tls {
            Some(_) => Box::new(RoleTable::new()),
            None if self.from_anywhere => Box::new(AllowAll),
            None => Box::new(AllowLocal),
        }
    }

    /// Takes new certificates as their files are replaced, until `stop`.
    pub async fn follow(&self, stop: CancellationToken) {
        let Some(tls) = &self.tls else { return stop.cancelled().await };
        let told = |outcome: Result<(), _>| match outcome {
            Ok(()) => {
                let expires = tls.expires().map(|at| humantime::format_rfc3339_seconds(at).to_string());
                tracing::info!(expires, "new certificates are in use");
            }
            Err(error) => tracing::error!(%error, "the new certificates cannot be used; the old ones stay"),
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = tls.follow(RELOAD_INTERVAL, told) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(insecure_plaintext: bool, listen: &str) -> anyhow::Result<Trust> {
        let options = TrustOptions { insecure_plaintext, ..TrustOptions::default() };
        Trust::load(options, &"n1".parse().unwrap(), listen.parse().unwrap())
    }

    /// What is logged meanwhile.
    fn logged(of: impl FnOnce()) -> String {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let writer = std::sync::Mutex::new(writer);
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(writer).finish();
        tracing::subscriber::with_default(subscriber, of);
        let mut text = String::new();
        std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
        text
    }

    #[test]
    fn plaintext_beyond_loopback_takes_a_flag() {
        let far = ["0.0.0.0:7101", "[::]:7101", "192.0.2.1:7101"];
        for listen in ["127.0.0.1:0", "[::1]:0"] {
            let text = logged(|| drop(load(false, listen).unwrap()));
            assert_eq!(text, "", "{listen}");
        }
        for listen in far {
            let text = logged(|| drop(load(true, listen).unwrap()));
            let warning = "the gRPC port is plaintext: whoever reaches it may do everything";
            assert!(
                text.contains(" WARN ") && text.contains(warning) && text.contains(listen),
                "{listen}: {text}"
            );
            let refused = load(false, listen).unwrap_err().to_string();
            assert!(refused.contains("--insecure-plaintext") && refused.contains(listen), "{refused}");
        }
    }

    #[test]
    fn callers_of_other_machines_take_it_too() {
        use proto::common::access::{Authorizer as _, Call};
        use proto::common::peer::Peer;

        let may = |trust: &Trust, address: &str| {
            let peer = Peer::plaintext(Some(address.parse().unwrap()));
            trust
                .authorizer()
                .authorize(&Call::new(&peer, "node.health.v1.HealthService", "HealthCheck"))
                .is_ok()
        };
        let (local, anybody) = (load(false, "127.0.0.1:0").unwrap(), load(true, "127.0.0.1:0").unwrap());
        for (address, near) in [("127.0.0.1:1", true), ("192.0.2.7:1", false)] {
            assert_eq!((may(&local, address), may(&anybody, address)), (near, true), "{address}");
        }
    }
}
