//! Certificates for tests, and commands by TLS.
#![cfg(feature = "tls")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use proto::common::access::{Access, RoleTable};
use proto::common::tls::{Tls, TlsFiles, TlsIncoming, TlsLimits};
use proto::health::HealthRegistry;
use proto::node::NodeIdentity;
use tokio::net::TcpListener;

#[path = "../../../proto-common/tests/support/certificates.rs"]
#[allow(dead_code, reason = "not every test needs all of it")]
mod certificates;
mod support;

use certificates::{Ca, Issue};
use support::{Node, Running, installed, nodectl, refusing_port, snapshot, tree, until};

fn files(dir: &Path, name: &str) -> TlsFiles {
    let path = |name: String| dir.join(name);
    TlsFiles {
        ca: path("ca.crt".into()),
        certificate: path(format!("{name}.crt")),
        key: path(format!("{name}.key")),
    }
}

fn flags(dir: &Path, name: &str) -> String {
    let TlsFiles { ca, certificate, key } = files(dir, name);
    format!("--tls-ca {} --tls-cert {} --tls-key {}", ca.display(), certificate.display(), key.display())
}

async fn serve(dir: &Path, name: &str) -> String {
    let tls = Tls::from_files(files(dir, name)).unwrap();
    let identity = NodeIdentity { node_id: name.into(), incarnation: 1, ..NodeIdentity::default() };
    let access = Access::new(tls.identity().cluster, RoleTable::new());
    let health = HealthRegistry::builder(identity).access(access).build();
    health.set_running();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let incoming = TlsIncoming::new(listener, tls, TlsLimits::default());
    let server = tonic::transport::Server::builder().add_service(health.service());
    tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    address
}

#[tokio::test]
async fn new_certificates_work_and_are_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let certs = dir.path().join("certs");
    let new = format!("certs new --dir {} --nodes n1,n2 --cluster test", certs.display());
    let made = nodectl(&new).await;
    assert_eq!(made.code, Some(0), "{made:?}");
    let mut names: Vec<String> = std::fs::read_dir(&certs)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names.len(), 10, "{names:?}");
    for name in names.iter().filter(|name| name.ends_with(".key")) {
        let mode = std::fs::metadata(certs.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    for (name, uri) in [
        ("n1", "node://test/n1"),
        ("operator", "operator://test/operator"),
        ("observer", "observer://test/observer"),
    ] {
        assert_eq!(Tls::from_files(files(&certs, name)).unwrap().identity().to_string(), uri);
    }

    let before = std::fs::read(certs.join("ca.key")).unwrap();
    let again = nodectl(&new).await;
    assert_eq!(again.code, Some(2), "{again:?}");
    assert!(again.stderr.contains("ca.crt is there already"), "{again:?}");
    assert_eq!(std::fs::read(certs.join("ca.key")).unwrap(), before);

    // One more node of the same CA and cluster.
    let add = format!("certs add --dir {} --nodes n3", certs.display());
    let added = nodectl(&add).await;
    assert!(added.code == Some(0) && added.stdout.contains("n3.key"), "{added:?}");
    let mode = std::fs::metadata(certs.join("n3.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(Tls::from_files(files(&certs, "n3")).unwrap().identity().to_string(), "node://test/n3");
    let third = serve(&certs, "n3").await;
    let asked = nodectl(&format!("status {third} {}", flags(&certs, "observer"))).await;
    assert!(asked.code == Some(0) && asked.stdout.contains("n3"), "{asked:?}");
    let again = nodectl(&add).await;
    assert!(again.code == Some(2) && again.stderr.contains("n3.crt is there already"), "{again:?}");
    let nothing = nodectl(&format!("certs add --dir {} --nodes n4", dir.path().display())).await;
    assert!(nothing.code == Some(2) && nothing.stderr.contains("ca.crt"), "{nothing:?}");

    let address = serve(&certs, "n1").await;
    let asked = nodectl(&format!("status {address} {}", flags(&certs, "observer"))).await;
    assert!(asked.code == Some(0) && asked.stdout.contains("n1"), "{asked:?}");
    // Another test's CA.
    let other = dir.path().join("other");
    nodectl(&format!("certs new --dir {} --nodes n1", other.display())).await;
    let refused = nodectl(&format!("transfers --at {address} {}", flags(&other, "operator"))).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(
        refused.stderr.contains("signed by an unknown CA") && refused.stderr.contains("UNKNOWN_CA"),
        "{refused:?}"
    );
    let plain = nodectl(&format!("transfers --at {address}")).await;
    assert!(plain.code == Some(1) && plain.stderr.contains("if it wants TLS, give --tls-ca"), "{plain:?}");
    for command in ["health", "status"] {
        let plain = nodectl(&format!("{command} {address}")).await;
        assert!(plain.stdout.contains("does it want TLS?"), "{plain:?}");
    }
    // Whoever has given them needs no such advice.
    let elsewhere = nodectl(&format!("transfers --at 127.0.0.1:1 {}", flags(&certs, "operator"))).await;
    assert!(elsewhere.code == Some(1) && !elsewhere.stderr.contains("wants TLS"), "{elsewhere:?}");
}

/// Certificate and key of `name`, and the CA's certificate, in `dir`. One after the other, so whoever reads them may find two that do not fit.
fn write(dir: &Path, name: &str, ca: &Ca, issue: &Issue) {
    let TlsFiles { ca: ca_file, certificate, key } = files(dir, name);
    let (issued, secret) = ca.issue(issue);
    for (path, text) in [(ca_file, ca.pem()), (certificate, issued), (key, secret)] {
        let fresh = path.with_extension("new");
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(fresh, path).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_waits_for_a_certificate_that_has_expired_to_be_renewed() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, certs, data) = (Ca::new("one"), dir.path(), dir.path().join("data"));
    let (path, _) = snapshot(dir.path(), 14 << 20);
    write(certs, "n1", &ca, &Issue::node("n1"));
    let alice = || Issue::uri("operator://c1/alice");
    let expires = certificates::now() + 10;
    write(certs, "alice", &ca, &Issue { not_after: expires, ..alice() });

    let tls = Tls::from_files(files(certs, "n1")).unwrap();
    let start = async |port| {
        let (access, tls) = (Access::new(tls.identity().cluster, RoleTable::new()), tls.clone());
        Node::start_by(&data, port, access, |listener, server| async move {
            server.serve_with_incoming(TlsIncoming::new(listener, tls, TlsLimits::default())).await.unwrap();
        })
        .await
    };
    let (port, address) = refusing_port();
    let node = start(port).await;
    let mut push = Running::start(&format!(
        "push {path} --to {address} --source-shard s1 --target-shard s2 --transfer-id t1 --rate 1MiB --json {}",
        flags(certs, "alice")
    ));
    until("some of it is durable", || node.durable("t1") > 0).await;
    // What is open goes on; the next connection is refused.
    until("the certificate has expired", || certificates::now() > expires).await;
    let before = node.durable("t1");
    assert!(before < 14 << 20, "it takes longer than that");
    let node = start(node.kill()).await;
    push.says("CERTIFICATE_EXPIRED").await;
    let found = node.durable("t1");
    assert!(found >= before, "{found} of {before}");

    write(certs, "alice", &ca, &alice());
    let ended = push.ended().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(installed(&node).await, tree(path.as_ref()));
    assert_eq!(ended.last()["event"], "installed");
    assert!(ended.last()["wire_bytes"].as_u64().unwrap() < (14 << 20) + (2 << 20), "it went on: {ended:?}");
}

#[tokio::test]
async fn wrong_usage_is_told_by_flag() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().display();
    for (args, named) in [
        (format!("certs new --dir {dir}"), "--nodes"),
        (format!("certs new --dir {dir} --nodes a/b"), "--nodes"),
        (format!("certs new --dir {dir} --nodes ca"), "--nodes"),
        (format!("certs new --dir {dir} --nodes n1,n1"), "--nodes"),
        (format!("certs new --dir {dir} --nodes n1 --days 0"), "--days"),
        ("health n1:1 --tls-ca /none".to_owned(), "--tls-cert and --tls-key are missing"),
        ("health n1:1 --tls-ca /none --tls-cert /none --tls-key /none".to_owned(), "/none cannot be read"),
    ] {
        let ended = nodectl(&args).await;
        assert_eq!(ended.code, Some(2), "{args}: {ended:?}");
        assert!(ended.stderr.contains(named), "{args}: {ended:?}");
    }
}
