//! `nodectl certs`: a CA and certificates for a test cluster.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Subcommand;
use proto::common::ids::{ClusterId, NodeId};
use proto::common::peer::{PeerIdentity, Role};
use proto::common::tls::{Tls, TlsFiles};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};

use crate::failure::Failure;
use crate::output::Output;

/// Names that are no node's, since files are called like that.
const RESERVED: [&str; 3] = ["ca", "operator", "observer"];
/// Certificates begin that long ago, for clocks that lag.
const SLACK: Duration = Duration::from_secs(3600);
const DAY: u64 = 86_400;

const EXAMPLES: &str = "\
Examples:
  nodectl certs new --dir certs --nodes n1,n2 --cluster test
  node serve --id n1 ... --tls-ca certs/ca.crt --tls-cert certs/n1.crt --tls-key certs/n1.key
  nodectl health 127.0.0.1:7101 --tls-ca certs/ca.crt --tls-cert certs/operator.crt --tls-key certs/operator.key

DIR gets ca.crt and ca.key, and a certificate and a key for each node, for an operator, and for an
observer, who may look and change nothing. Keys can be read by you alone. Nothing is overwritten.

Whoever has ca.key can be any node. For more than tests, keep it elsewhere, or use the CA that you have.";

const ADD_EXAMPLES: &str = "\
Examples:
  nodectl certs add --dir certs --nodes n3,n4

DIR is one that certs new has made, with ca.key. The cluster is that of its operator.crt. To renew a
certificate, move the old one and its key away first: nothing is overwritten. A node that runs takes
new files within seconds.";

#[derive(Debug, Subcommand)]
pub(crate) enum Certs {
    /// Make a test CA, and certificates of nodes, an operator and an observer
    #[command(after_help = EXAMPLES)]
    New(New),
    /// Make certificates of more nodes with the CA that `certs new` has made
    #[command(after_help = ADD_EXAMPLES)]
    Add(Add),
}

#[derive(Debug, clap::Args)]
pub(crate) struct New {
    /// Where the files go; made if it is not there
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,

    /// The nodes, by their IDs
    #[arg(long, value_name = "ID,...", required = true, value_delimiter = ',')]
    nodes: Vec<NodeId>,

    /// The cluster's name. Default: none
    #[arg(long, value_name = "ID")]
    cluster: Option<ClusterId>,

    /// How long the certificates are valid
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u64).range(1..=36_500))]
    days: u64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Add {
    /// Where the CA is, and the files go
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,

    /// The nodes, by their IDs
    #[arg(long, value_name = "ID,...", required = true, value_delimiter = ',')]
    nodes: Vec<NodeId>,

    /// How long the certificates are valid
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u64).range(1..=36_500))]
    days: u64,
}

pub(crate) fn run(command: Certs, output: &mut Output) -> Result<(), Failure> {
    match command {
        Certs::New(New { dir, nodes, cluster, days }) => {
            check(&nodes)?;
            let peer = |role, id: &NodeId| PeerIdentity { role, cluster: cluster.clone(), id: id.clone() };
            let mut peers: Vec<PeerIdentity> = nodes.iter().map(|id| peer(Role::Node, id)).collect();
            for role in [Role::Operator, Role::Observer] {
                let id = NodeId::new(role.scheme()).map_err(|error| Failure::failed(error.to_string()))?;
                peers.push(peer(role, &id));
            }
            let (issuer, mut files) = ca(days).map_err(|error| unmade(&error))?;
            files.extend(issue(&issuer, &peers, days).map_err(|error| unmade(&error))?);
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .map_err(|error| unwritten(&dir, &error))?;
            write(&dir, &files, output)
        }
        Certs::Add(Add { dir, nodes, days }) => {
            check(&nodes)?;
            let (issuer, cluster) = existing(&dir)?;
            let peer = |id| PeerIdentity { role: Role::Node, cluster: cluster.clone(), id };
            let peers: Vec<PeerIdentity> = nodes.into_iter().map(peer).collect();
            let files = issue(&issuer, &peers, days).map_err(|error| unmade(&error))?;
            write(&dir, &files, output)
        }
    }
}

fn unmade(error: &rcgen::Error) -> Failure {
    Failure::failed(format!("cannot make certificates: {error}"))
}

fn unwritten(what: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("cannot write {}: {error}", what.display()))
}

/// The CA in `dir`, and the cluster that its certificates are of.
fn existing(dir: &Path) -> Result<(Issuer<'static, KeyPair>, Option<ClusterId>), Failure> {
    let unusable = |path: &Path, error: &dyn std::fmt::Display| {
        Failure::usage(format!(
            "--dir: {}: {error}; name a directory that certs new has made",
            path.display()
        ))
    };
    let read = |name: &str| {
        let path = dir.join(name);
        std::fs::read_to_string(&path)
            .map(|text| (path.clone(), text))
            .map_err(|error| unusable(&path, &error))
    };
    let ((path, certificate), (key_path, key)) = (read("ca.crt")?, read("ca.key")?);
    let key = KeyPair::from_pem(&key).map_err(|error| unusable(&key_path, &error))?;
    let ours =
        TlsFiles { ca: path.clone(), certificate: dir.join("operator.crt"), key: dir.join("operator.key") };
    let cluster = Tls::from_files(ours).map_err(|error| unusable(dir, &error))?.identity().cluster;
    Ok((Issuer::from_ca_cert_pem(&certificate, key).map_err(|error| unusable(&path, &error))?, cluster))
}

/// Names that files can have, each once.
fn check(nodes: &[NodeId]) -> Result<(), Failure> {
    for (at, node) in nodes.iter().enumerate() {
        if RESERVED.contains(&node.as_str()) {
            return Err(Failure::usage(format!(
                "--nodes: \"{node}\" is the name of a file of the CA, an operator or an observer"
            )));
        }
        if nodes[..at].contains(node) {
            return Err(Failure::usage(format!("--nodes: {node} is named twice")));
        }
    }
    Ok(())
}

struct File {
    name: String,
    text: String,
    secret: bool,
}

/// A new CA, and its files.
fn ca(days: u64) -> Result<(Issuer<'static, KeyPair>, Vec<File>), rcgen::Error> {
    let mut ca = params(&format!("test CA {:08x}", fastrand::u32(..)), days);
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let files = vec![
        File { name: "ca.crt".to_owned(), text: ca.self_signed(&key)?.pem(), secret: false },
        File { name: "ca.key".to_owned(), text: key.serialize_pem(), secret: true },
    ];
    Ok((Issuer::new(ca, key), files))
}

/// A certificate and a key for each of `peers`.
fn issue(issuer: &Issuer<'_, KeyPair>, peers: &[PeerIdentity], days: u64) -> Result<Vec<File>, rcgen::Error> {
    let mut files = Vec::new();
    for peer in peers {
        let mut params = params(peer.id.as_str(), days);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.subject_alt_names = vec![SanType::URI(peer.to_string().try_into()?)];
        if peer.role == Role::Node {
            // For clients of other makes, which compare the address.
            params.subject_alt_names.push(SanType::DnsName("localhost".try_into()?));
            params.subject_alt_names.push(SanType::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()));
            params.subject_alt_names.push(SanType::IpAddress(std::net::Ipv6Addr::LOCALHOST.into()));
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, issuer)?.pem();
        files.push(File { name: format!("{}.crt", peer.id), text: certificate, secret: false });
        files.push(File { name: format!("{}.key", peer.id), text: key.serialize_pem(), secret: true });
    }
    Ok(files)
}

fn params(name: &str, days: u64) -> CertificateParams {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.not_before = epoch + now.saturating_sub(SLACK);
    params.not_after = epoch + now + Duration::from_secs(days * DAY);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

/// All or, where one of them is there already, none; and says which.
fn write(dir: &Path, files: &[File], output: &mut Output) -> Result<(), Failure> {
    if let Some(there) =
        files.iter().map(|file| dir.join(&file.name)).find(|path| path.symlink_metadata().is_ok())
    {
        return Err(Failure::usage(format!(
            "--dir: {} is there already, and nothing is overwritten",
            there.display()
        )));
    }
    for File { name, text, secret } in files {
        let path = dir.join(name);
        let mode = if *secret { 0o600 } else { 0o644 };
        // Atomic against others: a file that came meanwhile is not overwritten, and the key is never readable by others.
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path)
            .map_err(|error| unwritten(&path, &error))?;
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(|error| unwritten(&path, &error))?;
    }
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    if output.json() {
        output.document(&serde_json::json!({ "dir": dir, "files": names }));
    } else {
        let lines: Vec<String> = names.iter().map(|name| dir.join(name).display().to_string()).collect();
        output.text(&format!("{}\n", lines.join("\n")));
    }
    Ok(())
}
