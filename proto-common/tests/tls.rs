//! Real handshakes over TCP: what each failure says, who gets in, and certificates that are replaced meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use proto_common::access::{Authorizer as _, Call, READS, RoleTable};
use proto_common::connect::Connect as _;
use proto_common::dial::Dialer;
use proto_common::error::CommonReason;
use proto_common::tls::{Tls, TlsFiles, TlsPem, TlsProblem};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::time::timeout;

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/echo.rs"]
mod echo;
#[path = "support/handshake.rs"]
#[allow(dead_code, reason = "not every test needs all of it")]
mod handshake;

use certificates::{Ca, DAY, Issue, now};
use echo::{call, call_of};
use handshake::{PATIENCE, READ, ask, node, serve, tls};

#[tokio::test]
async fn both_sides_know_whom_they_talk_to() {
    let ca = Ca::new("one");
    let address = serve(node(&ca, "n1")).await;
    for expected in [None, Some("n1")] {
        assert_eq!(ask(&node(&ca, "n2"), &address, expected).await.unwrap(), "node://c1/n2");
    }
    let operator = tls(&ca, &ca, &Issue::uri("operator://c1/alice")).unwrap();
    assert_eq!(ask(&operator, &address, None).await.unwrap(), "operator://c1/alice");
}

#[tokio::test]
async fn a_dns_name_is_a_node_where_no_uri_names_one() {
    let ca = Ca::new("one");
    let named = |dns: &str| {
        tls(&ca, &ca, &Issue { uri: None, dns: vec![dns.to_owned()], ..Issue::node("") }).unwrap()
    };
    let address = serve(named("n1.example")).await;
    assert_eq!(ask(&named("n2"), &address, Some("n1.example")).await.unwrap(), "node:///n2");
    assert!(ask(&named("n2"), &address, Some("n3")).await.unwrap_err().is(CommonReason::WrongPeer));
    // The URI counts, whatever the DNS name is.
    let both = tls(&ca, &ca, &Issue { dns: vec!["n9".to_owned()], ..Issue::node("n1") }).unwrap();
    assert_eq!(both.identity().to_string(), "node://c1/n1");
}

/// A mistake of whoever signs makes nobody of an observer, not a node.
#[test]
fn a_certificate_names_one_or_nobody() {
    let ca = Ca::new("one");
    let issue = |uri: &str, more: &[&str]| Issue {
        more: more.iter().map(|uri| (*uri).to_owned()).collect(),
        dns: vec!["n1".to_owned()],
        ..Issue::uri(uri)
    };
    let observer = "observer://c1/eve";
    for (uri, more) in [
        (observer, &["operator://c1/eve"][..]),
        ("operator://c1/eve", &[observer]),
        ("node://c1/n1", &["node://c2/n1"]),
        ("node://c1/n1", &["node://c1/n2"]),
        ("node://c1/n1", &["https://n1.example", "node://c1/N1"]),
        (observer, &["node:c1/n1"]),
        ("OBSERVER://c1/eve", &[]),
        ("Node://c1/n1", &[]),
        ("observer://eve", &[]),
        ("observer://c1/eve/", &[]),
        ("observer://c1/e%76e", &[]),
        ("observer://user@c1:1/eve", &[]),
        ("node://c1/..", &[]),
        ("observer:", &[]),
    ] {
        let problem = tls(&ca, &ca, &issue(uri, more)).unwrap_err();
        assert_eq!(problem.problem(), TlsProblem::NamesNobody, "{uri} {more:?}");
    }
    // The first name counts: one that is none is not stepped over.
    let dns = vec![["x"; 4].map(|part| part.repeat(60)).join("."), "n2".to_owned()];
    let problem = tls(&ca, &ca, &Issue { uri: None, dns, ..Issue::node("") }).unwrap_err();
    assert_eq!(problem.problem(), TlsProblem::NamesNobody);
    for more in [&["https://n1.example", "spiffe://c1/n1"][..], &["node://c1/n1"]] {
        assert_eq!(
            tls(&ca, &ca, &issue("node://c1/n1", more)).unwrap().identity().to_string(),
            "node://c1/n1"
        );
    }
}

#[tokio::test]
async fn a_server_that_is_not_meant_is_told_apart_before_anything_is_sent() {
    let (ca, other, namesake) = (Ca::new("one"), Ca::new("other"), Ca::new("one"));
    let client = node(&ca, "n9");
    let cases: Vec<(Tls, Option<&str>, CommonReason, &str)> = vec![
        (
            node(&ca, "n3"),
            Some("n2"),
            CommonReason::WrongPeer,
            "not valid for node n2: the certificate is that of node n3",
        ),
        (
            tls(&ca, &ca, &Issue::uri("node://c2/n1")).unwrap(),
            None,
            CommonReason::WrongCluster,
            "node://c2/n1",
        ),
        (
            tls(&ca, &ca, &Issue::uri("operator://c1/eve")).unwrap(),
            None,
            CommonReason::WrongPeer,
            "which is no node",
        ),
        (node(&other, "n1"), None, CommonReason::UnknownCa, "signed by an unknown CA: the certificate of"),
    ];
    let of_namesake =
        (node(&namesake, "n1"), None, CommonReason::UnknownCa, "signed by an unknown CA: the certificate of");
    for (server, expected, reason, text) in cases.into_iter().chain([of_namesake]) {
        let address = serve(server).await;
        let error = ask(&client, &address, expected).await.unwrap_err();
        assert!(error.is(reason) && error.message().contains(text), "{error:?}");
        assert!(error.message().contains(&address), "{error:?}");
        assert!(!error.is_retryable(), "{error:?}");
    }
}

#[tokio::test]
async fn certificates_that_expire_in_use_say_so_on_either_side() {
    let ca = Ca::new("one");
    let brief = Issue { not_after: now() + 2, ..Issue::node("brief") };
    let (short, long) = (tls(&ca, &ca, &brief).unwrap(), node(&ca, "n2"));
    let (server_of_short, server_of_long) = (serve(short.clone()).await, serve(long.clone()).await);
    // The control: both work while it is valid.
    ask(&long, &server_of_short, None).await.unwrap();
    ask(&short, &server_of_long, None).await.unwrap();
    let until = short.expires().unwrap();
    while std::time::SystemTime::now() < until + Duration::from_millis(1100) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for (client, address) in [(&long, &server_of_short), (&short, &server_of_long)] {
        let error = ask(client, address, None).await.unwrap_err();
        assert!(error.is(CommonReason::CertificateExpired), "{error:?}");
        assert!(
            error.message().starts_with("certificate expired ") && error.message().contains(" ago: "),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_client_that_the_server_does_not_trust_hears_why() {
    let (ca, other) = (Ca::new("one"), Ca::new("other"));
    let address = serve(node(&ca, "n1")).await;
    // Trusts the server's CA, is signed by another one, and cannot even be loaded like that; so by a bundle.
    let (certificate, key) = other.issue(&Issue::node("n2"));
    let bundle = format!("{}{}", ca.pem(), other.pem());
    let client =
        Tls::from_pem(TlsPem { ca: bundle.into(), certificate: certificate.into(), key: key.into() })
            .unwrap();
    let error = ask(&client, &address, None).await.unwrap_err();
    assert!(error.is(CommonReason::UnknownCa), "{error:?}");
    assert!(error.message().contains(&format!("{address} does not trust who signed")), "{error:?}");
}

/// A node tells its peers, observers among them, why it cannot reach another one.
#[tokio::test]
async fn why_a_node_cannot_be_reached_names_files_and_no_paths() {
    let (ca, other) = (Ca::new("one"), Ca::new("other"));
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let brief = Issue { not_after: now() + 2, ..Issue::node("n2") };
    let (certificate, key) = ca.issue(&brief);
    for (name, text) in [("ca.crt", ca.pem()), ("n2.crt", certificate), ("n2.key", key)] {
        std::fs::write(path(name), text).unwrap();
    }
    let files = TlsFiles { ca: path("ca.crt"), certificate: path("n2.crt"), key: path("n2.key") };
    let client = Tls::from_files(files).unwrap();
    let strange = ask(&client, &serve(node(&other, "n1")).await, None).await.unwrap_err();
    assert!(strange.is(CommonReason::UnknownCa) && strange.message().contains("ca.crt"), "{strange:?}");
    let address = serve(node(&ca, "n1")).await;
    let until = client.expires().unwrap();
    while std::time::SystemTime::now() < until + Duration::from_millis(1100) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let expired = ask(&client, &address, None).await.unwrap_err();
    assert!(
        expired.is(CommonReason::CertificateExpired) && expired.message().contains("n2.crt"),
        "{expired:?}"
    );
    let secret = directory.path().to_str().unwrap();
    for error in [strange, expired] {
        assert!(!format!("{error:?}").contains(secret), "{error:?}");
    }
}

#[tokio::test]
async fn plaintext_and_tls_do_not_mix() {
    let ca = Ca::new("one");
    let address = serve(node(&ca, "n1")).await;
    let channel = Dialer::plaintext().to(&address, None).unwrap().connect().await;
    if let Ok(channel) = channel {
        timeout(PATIENCE, call(channel, READ)).await.unwrap().unwrap_err();
    }
    // A plaintext server that says something which is no TLS.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let plain = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    });
    let error = ask(&node(&ca, "n2"), &plain, None).await.unwrap_err();
    assert!(error.is(CommonReason::TlsFailed) && error.message().contains("does not speak TLS"), "{error:?}");
    for (dialer, address) in
        [(Dialer::plaintext(), "https://n1:1"), (Dialer::tls(node(&ca, "n2")), "http://n1:1")]
    {
        assert_eq!(dialer.to(address, None).unwrap_err().reason(), "INVALID_FIELD");
    }
}

#[test]
fn what_is_wrong_with_files_is_said_by_name() {
    let (ca, other) = (Ca::new("one"), Ca::new("other"));
    let now = now();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let write = |ca: &str, certificate: &str, key: &str| {
        for (name, text) in [("ca.crt", ca), ("n1.crt", certificate), ("n1.key", key)] {
            std::fs::write(path(name), text).unwrap();
        }
        Tls::from_files(TlsFiles { ca: path("ca.crt"), certificate: path("n1.crt"), key: path("n1.key") })
    };
    let (good, key) = ca.issue(&Issue::node("n1"));
    write(&ca.pem(), &good, &key).unwrap();
    let (expired, expired_key) =
        ca.issue(&Issue { not_before: now - 9 * DAY, not_after: now - 3 * DAY - 60, ..Issue::node("n1") });
    let (early, early_key) =
        ca.issue(&Issue { not_before: now + 2 * DAY + 60, not_after: now + 9 * DAY, ..Issue::node("n1") });
    let (nameless, nameless_key) = ca.issue(&Issue::uri("https://c1/n1"));
    let (_, strange_key) = other.issue(&Issue::node("n1"));
    for (certificates, certificate, key, problem, texts) in [
        (
            &*ca.pem(),
            &*expired,
            &*expired_key,
            TlsProblem::Expired,
            ["certificate expired 3 days ago", "n1.crt"],
        ),
        (&ca.pem(), &early, &early_key, TlsProblem::NotYetValid, ["not valid for another 2 days", "n1.crt"]),
        (&other.pem(), &good, &key, TlsProblem::UnknownCa, ["signed by an unknown CA", "ca.crt"]),
        (
            &ca.pem(),
            &good,
            &strange_key,
            TlsProblem::KeyMismatch,
            ["key does not match certificate", "n1.key"],
        ),
        (&ca.pem(), &nameless, &nameless_key, TlsProblem::NamesNobody, ["names nobody", "n1.crt"]),
        ("", &good, &key, TlsProblem::Malformed, ["holds no certificate", "ca.crt"]),
        (&ca.pem(), &key, &key, TlsProblem::Malformed, ["holds no certificate", "n1.crt"]),
        (&ca.pem(), &good, &good, TlsProblem::Malformed, ["holds no private key", "n1.key"]),
        (&ca.pem(), &good[..good.len() / 2], &key, TlsProblem::Malformed, ["is damaged", "n1.crt"]),
    ] {
        let error = write(certificates, certificate, key).unwrap_err();
        assert_eq!(error.problem(), problem, "{error}");
        for text in texts {
            assert!(error.to_string().contains(text), "{error}");
        }
        assert!(!error.to_string().contains("PRIVATE KEY"), "{error}");
    }
    std::fs::remove_file(path("n1.key")).unwrap();
    let files = TlsFiles { ca: path("ca.crt"), certificate: path("n1.crt"), key: path("n1.key") };
    let error = Tls::from_files(files).unwrap_err();
    assert!(error.problem() == TlsProblem::Unreadable && error.to_string().contains("n1.key"), "{error}");
}

#[tokio::test]
async fn certificates_are_replaced_under_open_connections() {
    let directory = tempfile::tempdir().unwrap();
    let write = |directory: &Path, ca: &str, certificate: &str, key: &str| {
        std::fs::write(directory.join("ca.crt"), ca).unwrap();
        std::fs::write(directory.join("n1.crt"), certificate).unwrap();
        std::fs::write(directory.join("n1.key"), key).unwrap();
    };
    let files = TlsFiles {
        ca: directory.path().join("ca.crt"),
        certificate: directory.path().join("n1.crt"),
        key: directory.path().join("n1.key"),
    };
    let (old, new) = (Ca::new("old"), Ca::new("new"));
    let (certificate, key) = old.issue(&Issue::node("n1"));
    write(directory.path(), &old.pem(), &certificate, &key);
    let server = Tls::from_files(files).unwrap();
    let address = serve(server.clone()).await;
    let (of_old, of_new) = (node(&old, "n2"), node(&new, "n2"));
    let open = Dialer::tls(of_old.clone()).to(&address, None).unwrap().connect().await.unwrap();
    call(open.clone(), READ).await.unwrap();
    assert!(server.reload_if_changed().is_none(), "nothing has changed");
    assert!(ask(&of_new, &address, None).await.is_err());

    // Half of it is there: the old pair stays in use, and it is told once.
    let (certificate, key) = new.issue(&Issue::node("n1"));
    std::fs::write(directory.path().join("n1.crt"), &certificate).unwrap();
    let refused = server.reload_if_changed().expect("a file has changed").unwrap_err();
    assert_eq!(refused.problem(), TlsProblem::UnknownCa, "{refused}");
    assert!(server.reload_if_changed().is_none(), "told once");
    ask(&of_old, &address, None).await.unwrap();
    // Somebody else's certificate is not taken.
    let (stranger, stranger_key) = old.issue(&Issue::node("n7"));
    write(directory.path(), &old.pem(), &stranger, &stranger_key);
    assert_eq!(server.reload().unwrap_err().problem(), TlsProblem::OtherIdentity);

    write(directory.path(), &new.pem(), &certificate, &key);
    server.reload_if_changed().expect("the files have changed").unwrap();
    ask(&of_new, &address, None).await.unwrap();
    assert!(ask(&of_old, &address, None).await.unwrap_err().is(CommonReason::UnknownCa));
    call(open, READ).await.expect("an open connection goes on");
}

#[tokio::test]
async fn the_guard_refuses_before_the_service_is_reached() {
    let ca = Ca::new("one");
    let address = serve(node(&ca, "n1")).await;
    let observer = tls(&ca, &ca, &Issue::uri("observer://c1/grafana")).unwrap();
    let channel = Dialer::tls(observer).to(&address, None).unwrap().connect().await.unwrap();
    call(channel.clone(), READ).await.unwrap();
    for method in ["StartMigration", "CancelTransfer", "TransferSplitSnapshot", "InventedLater"] {
        let error = call(channel.clone(), method).await.unwrap_err();
        assert!(error.is(CommonReason::PermissionDenied), "{method}: {error:?}");
    }
    let error = call_of(channel.clone(), READ, Some("c2")).await.unwrap_err();
    assert!(error.is(CommonReason::WrongCluster) && error.get("cluster_id") == Some("c1"), "{error:?}");
    call_of(channel, READ, Some("c1")).await.unwrap();
}

#[test]
fn a_role_counts_for_the_services_of_the_table_alone() {
    use proto_common::peer::Peer;

    let peer = Peer::certified(Some("observer://c1/grafana".parse().unwrap()), None);
    for known in READS {
        let (service, method) = known.split_once('/').unwrap();
        let may = |service| RoleTable::new().authorize(&Call::new(&peer, service, method));
        may(service).unwrap();
        // A user's service may have a method of that name which changes much.
        let refused = may("store.v1.Store").unwrap_err();
        assert!(refused.is(CommonReason::PermissionDenied), "{refused:?}");
    }
}
