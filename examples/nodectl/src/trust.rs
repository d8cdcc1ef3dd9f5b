//! How nodes are connected to, for every command of this process: in plaintext, or by TLS with a certificate of its own.

use std::sync::OnceLock;

use proto::common::dial::Dialer;
use proto::common::ids::{ClusterId, NodeId};

use crate::failure::Failure;

/// In whose name a push is sent without a certificate.
const NAME: &str = "nodectl";

#[derive(Debug)]
struct Trust {
    dialer: Dialer,
    name: Option<NodeId>,
    #[cfg(feature = "tls")]
    tls: Option<proto::common::tls::Tls>,
}

/// Set once, before anything is connected.
static TRUST: OnceLock<Trust> = OnceLock::new();

/// The cluster and the certificates of the command line.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct TlsArgs {
    /// The cluster that you mean; nodes of another one refuse. With TLS it is the one of your certificate
    #[arg(long, global = true, value_name = "ID", display_order = 1000)]
    cluster: Option<ClusterId>,

    /// TLS: certificates of the CAs that sign the nodes' certificates (PEM). With --tls-cert and --tls-key
    #[cfg(feature = "tls")]
    #[arg(long, global = true, value_name = "FILE", display_order = 1001)]
    tls_ca: Option<std::path::PathBuf>,

    /// TLS: your certificate (PEM), of an operator or an observer
    #[cfg(feature = "tls")]
    #[arg(long, global = true, value_name = "FILE", display_order = 1002)]
    tls_cert: Option<std::path::PathBuf>,

    /// TLS: the private key of that certificate (PEM)
    #[cfg(feature = "tls")]
    #[arg(long, global = true, value_name = "FILE", display_order = 1003)]
    tls_key: Option<std::path::PathBuf>,
}

/// Has all connections made as `args` say.
pub(crate) fn set(args: TlsArgs) -> Result<(), Failure> {
    if let Some(trust) = load(args)? {
        // Only main calls this.
        let _ = TRUST.set(trust);
    }
    Ok(())
}

#[cfg(feature = "tls")]
fn load(args: TlsArgs) -> Result<Option<Trust>, Failure> {
    use proto::common::tls::{Tls, TlsFiles};

    let TlsArgs { cluster, tls_ca, tls_cert, tls_key } = args;
    let flags = [("--tls-ca", &tls_ca), ("--tls-cert", &tls_cert), ("--tls-key", &tls_key)];
    let missing: Vec<&str> = flags.iter().filter(|(_, file)| file.is_none()).map(|(flag, _)| *flag).collect();
    let files = match (tls_ca, tls_cert, tls_key) {
        (Some(ca), Some(certificate), Some(key)) => TlsFiles { ca, certificate, key },
        (None, None, None) => return Ok(plaintext(cluster)),
        _ => {
            let message = format!(
                "TLS takes --tls-ca, --tls-cert and --tls-key together; {} missing",
                match &*missing {
                    [one] => format!("{one} is"),
                    more => format!("{} are", more.join(" and ")),
                }
            );
            return Err(Failure::usage(message));
        }
    };
    let tls = Tls::from_files(files).map_err(|error| Failure::usage(error.to_string()))?;
    let identity = tls.identity();
    if let Some(cluster) = cluster.filter(|cluster| identity.cluster.as_ref() != Some(cluster)) {
        let message = format!("--tls-cert is that of {identity}, --cluster is {cluster}");
        return Err(Failure::usage(message));
    }
    let dialer = Dialer::tls(tls.clone()).in_cluster(identity.cluster.as_ref());
    Ok(Some(Trust { dialer, name: Some(identity.id), tls: Some(tls) }))
}

fn plaintext(cluster: Option<ClusterId>) -> Option<Trust> {
    cluster.map(|cluster| Trust {
        dialer: Dialer::plaintext().in_cluster(Some(&cluster)),
        name: None,
        #[cfg(feature = "tls")]
        tls: None,
    })
}

#[cfg(not(feature = "tls"))]
#[allow(clippy::unnecessary_wraps, reason = "with TLS it can fail")]
fn load(args: TlsArgs) -> Result<Option<Trust>, Failure> {
    Ok(plaintext(args.cluster))
}

/// Takes new certificates as their files are replaced, as long as it is polled: what takes long outlives a certificate.
#[cfg(feature = "tls")]
pub(crate) async fn follow() {
    if let Some(tls) = TRUST.get().and_then(|trust| trust.tls.as_ref()) {
        // Whoever connects with one that does not help is told so.
        tls.follow(proto::common::tls::RELOAD_INTERVAL, |_| {}).await
    }
}

/// How nodes are connected to.
pub(crate) fn dialer() -> Dialer {
    TRUST.get().map_or_else(Dialer::plaintext, |trust| trust.dialer.clone())
}

/// In whose name something is sent where nothing is said.
pub(crate) fn name() -> Result<NodeId, Failure> {
    match TRUST.get().and_then(|trust| trust.name.clone()) {
        Some(name) => Ok(name),
        None => NodeId::new(NAME).map_err(|error| Failure::failed(error.to_string())),
    }
}
