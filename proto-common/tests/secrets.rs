//! The key, which nobody gets to see.
//!
//! Alone in its process: `tracing` remembers for all threads whether anybody wants a record, so tests beside it decide with it what is logged.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use proto_common::connect::Connect as _;
use proto_common::dial::Dialer;
use proto_common::limits::ConnectionLimits;
use proto_common::listen::Limited;
use proto_common::tls::{Tls, TlsError, TlsFiles, TlsIncoming, TlsLimits, TlsPem, TlsProblem};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;

#[path = "support/certificates.rs"]
#[allow(dead_code, reason = "not every test needs all of it")]
mod certificates;
#[path = "support/echo.rs"]
#[allow(dead_code, reason = "not every test needs all of it")]
mod echo;
#[path = "support/handshake.rs"]
#[allow(dead_code, reason = "not every test needs all of it")]
mod handshake;
#[path = "support/log.rs"]
mod log;
#[path = "support/secret.rs"]
mod secret;

use certificates::{Ca, Issue};
use handshake::{PATIENCE, ask, serve};
use log::Log;
use secret::Secret;

/// The key stands in memory for as long as the process runs, and nowhere else.
#[tokio::test]
async fn the_key_is_in_no_log_and_no_debug() {
    let (log, _guard) = Log::begin();
    let mut shown = String::new();
    let mut show = |what: &dyn std::fmt::Debug| shown += &format!("{what:?} {what:#?}\n");
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let ca = Ca::new("one");
    let write = |(certificate, key): (&str, &str)| {
        for (name, text) in [("ca.crt", &*ca.pem()), ("n1.crt", certificate), ("n1.key", key)] {
            std::fs::write(path(name), text).unwrap();
        }
    };
    let (certificate, key) = ca.issue(&Issue::node("n1"));
    write((&certificate, &key));
    let files = TlsFiles { ca: path("ca.crt"), certificate: path("n1.crt"), key: path("n1.key") };
    show(&files);
    let server = Tls::from_files(files).unwrap();
    let (of_client, key_of_client) = ca.issue(&Issue::node("n2"));
    let pem = TlsPem {
        ca: ca.pem().into(),
        certificate: of_client.clone().into(),
        key: key_of_client.clone().into(),
    };
    show(&pem);
    let client = Tls::from_pem(pem).unwrap();

    // A handshake, and what there is while and after it.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let incoming = TlsIncoming::new(listener, server.clone(), TlsLimits::default());
    let mut incoming = Limited::new(incoming, ConnectionLimits::default());
    let dial = Dialer::tls(client.clone()).to(&address, None).unwrap();
    show(&dial);
    let dialed = tokio::spawn(async move { dial.connect().await });
    let accepted = timeout(PATIENCE, incoming.next()).await.unwrap().unwrap().unwrap();
    show(&(&accepted, accepted.get_ref(), &incoming, &server, &client, &Dialer::tls(client.clone())));
    drop((accepted, incoming));
    show(&timeout(PATIENCE, dialed).await.unwrap());
    let address = serve(server.clone()).await;
    ask(&client, &address, None).await.unwrap();

    // Another one is taken.
    let (second_certificate, second_key) = ca.issue(&Issue::node("n1"));
    write((&second_certificate, &second_key));
    server.reload_if_changed().expect("the files have changed").unwrap();
    show(&server);
    ask(&client, &address, None).await.unwrap();

    // Damaged in each way.
    let half = &key[..key.len() / 2];
    let (first_line, rest) = key.split_once('\n').unwrap();
    let other_kind = key.replace("PRIVATE KEY", "CERTIFICATE");
    let strange = [
        half.to_owned(),
        format!("{first_line}\n*{}", &rest[1..]),
        format!("{first_line}\nAAAA{}", &rest[4..]),
        format!("{first_line}\n{}", &rest[4..]),
        other_kind,
        key.replace("PRIVATE KEY", "RSA PRIVATE KEY"),
        key.replace("PRIVATE KEY", "EC PRIVATE KEY"),
        key_of_client.clone(),
        format!("{key}{key}"),
    ];
    let mut problems: Vec<(TlsError, String)> = Vec::new();
    for (number, damaged) in strange.iter().enumerate() {
        write((&second_certificate, damaged));
        let error = server.reload().expect_err(&format!("{number} is damaged"));
        tracing::error!(%error, ?error, "the new certificates cannot be used");
        problems.push((error, damaged.clone()));
        // As a certificate, too: whoever mixes the files up.
        write((damaged, &second_key));
        show(&server.reload().map_err(|error| (error.to_string(), proto_common::Error::from(error))));
    }
    for kind in [TlsProblem::Malformed, TlsProblem::KeyMismatch] {
        assert!(problems.iter().any(|(error, _)| error.problem() == kind), "{problems:?}");
    }
    show(&problems.into_iter().map(|(error, _)| error).collect::<Vec<_>>());
    ask(&client, &address, None).await.expect("the old one stays in use");

    let text = log.text();
    for of in [" TRACE h2", " DEBUG rustls", "ERROR"] {
        assert!(text.contains(of), "no {of} among {} bytes", text.len());
    }
    for key in [&key, &second_key, &key_of_client] {
        let secret = Secret::of(key);
        secret.is_not_in(key, &text);
        secret.is_not_in(key, &shown);
    }
}
