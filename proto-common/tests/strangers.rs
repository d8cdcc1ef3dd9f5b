//! Who does not get past the handshake: each hears why, is counted and logged, and is in nobody's way. And the key, which nobody gets to see.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use proto_common::connect::Connect as _;
use proto_common::dial::{Dialer, NodeChannel};
use proto_common::error::CommonReason;
use proto_common::limits::ConnectionLimits;
use proto_common::listen::Limited;
use proto_common::refusals::counts;
use proto_common::tls::{Tls, TlsError, TlsFiles, TlsIncoming, TlsLimits, TlsPem, TlsProblem};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{AlertDescription, ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_rustls::client::TlsStream;
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

use certificates::{Ca, Issue, now};
use echo::call;
use handshake::{PATIENCE, READ, ask, node, serve, serve_within};
use log::Log;
use secret::Secret;

/// A server, and another node that is connected to it before. One at a time, so that what is counted is known.
struct Scene {
    ca: Ca,
    address: String,
    other: Tls,
    open: NodeChannel,
    before: BTreeMap<String, u64>,
    _alone: MutexGuard<'static, ()>,
}

impl Scene {
    async fn new(limits: TlsLimits) -> Self {
        Self::new_within(limits, None).await
    }

    async fn new_within(limits: TlsLimits, connections: Option<ConnectionLimits>) -> Self {
        static ALONE: Mutex<()> = Mutex::const_new(());
        let alone = ALONE.lock().await;
        let ca = Ca::new("one");
        let named = Issue { dns: vec!["n1.test".to_owned()], ..Issue::node("n1") };
        let address =
            serve_within(handshake::tls(&ca, &ca, &named).unwrap(), limits, connections.unwrap_or_default())
                .await;
        let other = node(&ca, "n2");
        let open = Dialer::tls(other.clone()).to(&address, None).unwrap().connect().await.unwrap();
        call(open.clone(), READ).await.unwrap();
        Self { ca, address, other, open, before: counts(), _alone: alone }
    }

    /// On the connection that it had, and on a new one.
    async fn others_go_on(&self) {
        timeout(PATIENCE, call(self.open.clone(), READ)).await.unwrap().unwrap();
        ask(&self.other, &self.address, None).await.unwrap();
    }

    /// Exactly this was refused since the start, or since the last time.
    fn has_refused(&mut self, expected: &[(&str, u64)]) {
        let before = std::mem::replace(&mut self.before, counts());
        let since =
            self.before.iter().map(|(reason, count)| (&**reason, count - before.get(reason).unwrap_or(&0)));
        let since: BTreeMap<&str, u64> = since.filter(|(_, count)| *count > 0).collect();
        assert_eq!(since, expected.iter().copied().collect());
    }
}

/// A client that is rustls alone.
struct Stranger {
    version: &'static SupportedProtocolVersion,
    alpn: &'static [&'static str],
    /// Certificate and key.
    shows: Option<(String, String)>,
}

impl Stranger {
    /// Connects, trusting `ca`, and waits until the server ends that: how it does.
    async fn meets(self, ca: &Ca, address: &str) -> io::Error {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut answer = Vec::new();
        let meeting = async { self.connect(ca, stream).await?.read_to_end(&mut answer).await };
        let error = timeout(PATIENCE, meeting).await.unwrap().unwrap_err();
        assert!(answer.is_empty(), "nothing was served");
        error
    }

    /// Shakes hands over `stream`, trusting `ca`.
    async fn connect(self, ca: &Ca, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.connect_trusting(&ca.pem(), stream).await
    }

    async fn connect_trusting(self, ca: &str, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[self.version])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match self.shows {
            Some((certificate, key)) => {
                let chain = CertificateDer::pem_slice_iter(certificate.as_bytes());
                let chain = chain.collect::<Result<_, _>>().unwrap();
                config
                    .with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap())
                    .unwrap()
            }
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let name = ServerName::try_from("n1.test").unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }
}

#[tokio::test]
async fn strangers_hear_why_and_are_counted_and_in_nobodys_way() {
    let mut scene = Scene::new(TlsLimits::default()).await;
    let good = || Some(scene.ca.issue(&Issue::node("n3")));
    let expired = Issue { not_before: now() - 90, not_after: now() - 30, ..Issue::node("n3") };
    let alert = |alert| Some(rustls::Error::AlertReceived(alert));
    let cases = [
        (
            Stranger { version: &TLS12, alpn: &["h2"], shows: good() },
            alert(AlertDescription::ProtocolVersion),
            "TLS_FAILED",
            "peer is incompatible: Tls12NotOfferedOrEnabled",
        ),
        (
            Stranger { version: &TLS13, alpn: &["http/1.1", "h3"], shows: good() },
            alert(AlertDescription::NoApplicationProtocol),
            "TLS_FAILED",
            "peer doesn't support any known protocol",
        ),
        // No alert is for this: the connection just ends.
        (
            Stranger { version: &TLS13, alpn: &[], shows: good() },
            None,
            "TLS_FAILED",
            "peer doesn't support any known protocol",
        ),
        (
            Stranger { version: &TLS13, alpn: &["h2"], shows: None },
            alert(AlertDescription::CertificateRequired),
            "UNAUTHENTICATED",
            "peer sent no certificates",
        ),
        (
            Stranger {
                version: &TLS13,
                alpn: &["h2"],
                shows: Some(Ca::new("other").issue(&Issue::node("n3"))),
            },
            alert(AlertDescription::UnknownCA),
            "UNKNOWN_CA",
            "invalid peer certificate: UnknownIssuer",
        ),
        // Another CA of the same name.
        (
            Stranger {
                version: &TLS13,
                alpn: &["h2"],
                shows: Some(Ca::new("one").issue(&Issue::node("n3"))),
            },
            alert(AlertDescription::DecryptError),
            "UNKNOWN_CA",
            "invalid peer certificate: BadSignature",
        ),
        (
            Stranger { version: &TLS13, alpn: &["h2"], shows: Some(scene.ca.issue(&expired)) },
            alert(AlertDescription::CertificateExpired),
            "CERTIFICATE_EXPIRED",
            "invalid peer certificate: certificate expired",
        ),
    ];
    for (stranger, heard, reason, logged) in cases {
        let (log, _guard) = Log::begin();
        let error = stranger.meets(&scene.ca, &scene.address).await;
        let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()).cloned();
        assert_eq!(cause, heard, "{logged}: {error:?}");
        if heard.is_none() {
            assert!(
                matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset),
                "{error:?}"
            );
        }
        let line = log.text().lines().find(|line| line.contains("TLS handshake failed")).map(str::to_owned);
        let line = line.expect("the server logs it");
        assert!(line.contains(&format!("error={logged}")), "{line}");
        scene.has_refused(&[(reason, 1)]);
        scene.others_go_on().await;
    }
    // Some that say nothing, or break off: those are refused by nobody.
    drop(TcpStream::connect(&scene.address).await.unwrap());
    let mut broken = TcpStream::connect(&scene.address).await.unwrap();
    broken.write_all(&[0x16, 3, 1]).await.unwrap();
    broken.shutdown().await.unwrap();
    timeout(PATIENCE, broken.read_to_end(&mut Vec::new())).await.unwrap().unwrap();
    scene.others_go_on().await;
    scene.has_refused(&[]);
}

#[tokio::test]
async fn a_server_that_speaks_no_http2_is_not_taken() {
    let ca = Ca::new("one");
    let client = node(&ca, "n2");
    for alpn in [None, Some("http/1.1")] {
        let (certificate, key) = ca.issue(&Issue::node("n1"));
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let mut config =
            ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_protocol_versions(&[&TLS13])
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(chain, key)
                .unwrap();
        config.alpn_protocols = alpn.iter().map(|name: &&str| name.as_bytes().to_vec()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serving = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(stream).await?;
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said).await;
            io::Result::Ok(said)
        });
        let error = ask(&client, &address, None).await.unwrap_err();
        assert!(error.is(CommonReason::TlsFailed), "{error:?}");
        assert_eq!(error.message(), format!("{address} speaks TLS, and no HTTP/2 over it"));
        // Not a byte of a request was sent to it.
        if let Ok(said) = timeout(PATIENCE, serving).await.unwrap().unwrap() {
            assert!(said.is_empty(), "{said:?}");
        }
    }
}

#[tokio::test]
async fn one_handshake_more_than_allowed_ends_the_oldest_of_who_has_most() {
    let mut limits = TlsLimits::default();
    (limits.handshakes, limits.handshake) = (4, Duration::from_secs(300));
    let mut scene = Scene::new(limits).await;
    let mut stalled = Vec::new();
    for _ in 0..4 {
        stalled.push(TcpStream::connect(&scene.address).await.unwrap());
    }
    for _ in 0..16 {
        stalled.push(TcpStream::connect(&scene.address).await.unwrap());
        // It gets no word.
        let over = timeout(PATIENCE, stalled.remove(0).read_u8()).await.expect("the oldest is ended");
        assert!(over.is_err());
    }
    scene.has_refused(&[("TOO_MANY_HANDSHAKES", 16)]);
    // All places are taken by those that stall, and one of them has to go for each of the others.
    scene.others_go_on().await;
    scene.has_refused(&[("TOO_MANY_HANDSHAKES", 1)]);
}

/// Signatures of each would be checked.
#[tokio::test]
async fn a_certificate_comes_with_few_others() {
    let mut scene = Scene::new(TlsLimits::default()).await;
    let shows = |others| {
        let (certificate, key) = scene.ca.issue(&Issue::node("n3"));
        let shows = Some((certificate + &scene.ca.pem().repeat(others), key));
        Stranger { version: &TLS13, alpn: &["h2"], shows }
    };
    let stream = TcpStream::connect(&scene.address).await.unwrap();
    let mut taken = shows(4).connect(&scene.ca, stream).await.unwrap();
    timeout(PATIENCE, taken.read_u8()).await.unwrap().unwrap();
    shows(5).meets(&scene.ca, &scene.address).await;
    scene.has_refused(&[("TLS_FAILED", 1)]);
    scene.others_go_on().await;
}

#[tokio::test]
async fn handshakes_of_an_address_beyond_those_that_it_may_make_wait() {
    const BURST: u32 = 2;
    const MORE: u32 = 4;
    const EVERY: Duration = Duration::from_millis(250);
    let mut limits = TlsLimits::default();
    (limits.handshakes_each_second, limits.handshakes_burst) = (4, BURST);
    let scene = Scene::new(limits).await;
    let shows = scene.ca.issue(&Issue::node("n3"));
    let began = Instant::now();
    let mut meeting = JoinSet::new();
    for _ in 0..BURST + MORE {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 7], 0).into()).unwrap();
        let stream = socket.connect(scene.address.parse().unwrap()).await.unwrap();
        let stranger = Stranger { version: &TLS13, alpn: &["h2"], shows: Some(shows.clone()) };
        let ca = scene.ca.pem();
        meeting.spawn(async move { stranger.connect_trusting(&ca, stream).await.unwrap() });
    }
    // Of another address, on which there is one connection.
    ask(&scene.other, &scene.address, None).await.unwrap();
    let done = timeout(PATIENCE, meeting.join_all()).await.unwrap();
    assert_eq!(done.len(), (BURST + MORE) as usize);
    assert!(began.elapsed() >= EVERY * MORE, "{:?}", began.elapsed());
    let counted = counts().get("TOO_MANY_HANDSHAKES_OF_ADDRESS").copied().unwrap_or_default();
    assert!((1..=u64::from(MORE)).contains(&counted), "{counted}");
}

#[tokio::test]
async fn a_slow_handshake_is_ended() {
    let mut limits = TlsLimits::default();
    limits.handshake = Duration::from_secs(2);
    let mut scene = Scene::new(limits).await;
    let mut slow = TcpStream::connect(&scene.address).await.unwrap();
    slow.write_all(&[0x16, 3, 1]).await.unwrap();
    // Meanwhile.
    scene.others_go_on().await;
    let over = timeout(PATIENCE, slow.read_u8()).await.expect("ended by the time limit");
    assert!(over.is_err());
    scene.has_refused(&[("SLOW_HANDSHAKE", 1)]);
    scene.others_go_on().await;
}

/// Whoever has a certificate may have many addresses, and many who have one may share one.
#[tokio::test]
async fn connections_are_those_of_the_certificate_wherever_they_come_from() {
    let mut limits = ConnectionLimits::default();
    limits.connections_per_peer = 2;
    let scene = Scene::new_within(TlsLimits::default(), Some(limits)).await;
    let connect = async |host: u8, owner: &str| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, host], 0))).unwrap();
        let stream = socket.connect(scene.address.parse().unwrap()).await.unwrap();
        let shows = Some(scene.ca.issue(&Issue::uri(owner)));
        let mut stream =
            Stranger { version: &TLS13, alpn: &["h2"], shows }.connect(&scene.ca, stream).await.unwrap();
        // The server speaks first: its settings.
        timeout(PATIENCE, stream.read_u8()).await.unwrap().map(|_| stream)
    };
    let mut held = Vec::new();
    for host in [11, 12] {
        held.push(connect(host, "node://c1/n9").await.unwrap());
    }
    for host in [11, 13] {
        connect(host, "node://c1/n9").await.unwrap_err();
    }
    for owner in ["node://c1/n8", "operator://c1/n9", "node://c1/n8"] {
        held.push(connect(11, owner).await.unwrap());
    }
    let refused = counts()["TOO_MANY_CONNECTIONS_OF_PEER"];
    assert_eq!(refused, scene.before.get("TOO_MANY_CONNECTIONS_OF_PEER").copied().unwrap_or(0) + 2);
    // What is closed is free again.
    drop(held.remove(0));
    let again = async { while connect(13, "node://c1/n9").await.is_err() {} };
    timeout(PATIENCE, again).await.unwrap();
    scene.others_go_on().await;
}

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
