//! Accepts connections and does their handshakes, so that no peer waits for another's.

use std::collections::HashMap;
use std::hash::Hash;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::CertificateError;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use super::{ALPN, Tls, certificate};
use crate::error::{CommonReason, Reason as _};
use crate::listen::AcceptPause;
use crate::listen::rates::Bucket;
use crate::peer::{Peer, PeerKey};
use crate::refusals;

/// What handshakes may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TlsLimits {
    /// Handshakes under way at once. Default 256. One more ends the oldest one of the address that has most of them, so that
    /// whoever stalls them stands in nobody's way but its own; of IPv6, of the address in the /64 that has most, since who has one address there has all.
    /// Counted as `TOO_MANY_HANDSHAKES`.
    pub handshakes: usize,
    /// Longest handshake. Default 10 s. After that the connection is closed; counted as `SLOW_HANDSHAKE`.
    pub handshake: Duration,
    /// Handshakes with one address in a second, behind the first [`handshakes_burst`](Self::handshakes_burst). Default 100: each takes some tenths of a millisecond of the
    /// processor. One more waits for its turn in one of the [`handshakes`](Self::handshakes) under way; counted as `TOO_MANY_HANDSHAKES_OF_ADDRESS`. All addresses of an IPv6 /64 have four times as many together, since
    /// who has one address there has all. 0 is as 1.
    pub handshakes_each_second: u32,
    /// Handshakes with one address at once, when there were none for a while. Default 1024: as many connections as a server takes by default, should all of them come from one address.
    pub handshakes_burst: u32,
}

impl Default for TlsLimits {
    fn default() -> Self {
        Self {
            handshakes: 256,
            handshake: Duration::from_secs(10),
            handshakes_each_second: 100,
            handshakes_burst: 1024,
        }
    }
}

/// A handshake under way.
#[derive(Debug)]
struct Handshake {
    /// Counts up with each connection.
    number: u64,
    address: SocketAddr,
    abort: AbortHandle,
}

/// Connections whose handshake is done, for tonic's `serve_with_incoming`. Each is made with the certificate that is current
/// when it is accepted.
///
/// A handshake that fails ends its connection, is logged, counted ([`refusals`]: `TLS_FAILED`, `UNKNOWN_CA`,
/// `CERTIFICATE_EXPIRED`, `UNAUTHENTICATED`), and is no item of the stream. Dropping it ends those under way.
#[derive(Debug)]
pub struct TlsIncoming {
    listener: TcpListener,
    tls: Tls,
    limits: TlsLimits,
    handshakes: JoinSet<Result<TlsConnection, io::Error>>,
    pending: HashMap<Id, Handshake>,
    /// By address, and by [`network`] where that is another thing.
    rates: HashMap<(IpAddr, bool), Arc<Bucket>>,
    next: u64,
    pause: AcceptPause,
    told: Told,
}

/// Failed handshakes that are told in a minute, each by itself.
const TOLD: u32 = 20;

/// How many were told: anybody who reaches the port can make them, and must not fill the log.
#[derive(Debug)]
struct Told {
    since: Instant,
    told: u32,
    left_out: u64,
}

impl Told {
    fn new() -> Self {
        Self { since: Instant::now(), told: 0, left_out: 0 }
    }

    /// Whether one more is told by itself; those of the minute before that were not, are now.
    fn one_more(&mut self) -> bool {
        if self.since.elapsed() >= Duration::from_secs(60) {
            let left_out = std::mem::replace(self, Self::new()).left_out;
            if left_out > 0 {
                tracing::info!(handshakes = left_out, "more TLS handshakes failed than are told one by one");
            }
        }
        let tells = self.told < TOLD;
        if tells {
            self.told += 1;
        } else {
            self.left_out += 1;
        }
        tells
    }
}

impl TlsIncoming {
    /// Accepts from `listener`.
    #[must_use]
    pub fn new(listener: TcpListener, tls: Tls, limits: TlsLimits) -> Self {
        Self {
            listener,
            tls,
            limits,
            handshakes: JoinSet::new(),
            pending: HashMap::new(),
            rates: HashMap::new(),
            next: 0,
            pause: AcceptPause::default(),
            told: Told::new(),
        }
    }

    fn begin(&mut self, stream: TcpStream, address: SocketAddr) {
        while self.pending.len() >= self.limits.handshakes.max(1) {
            self.end_one();
        }
        let turn = self.turn(address.ip());
        let acceptor = TlsAcceptor::from(Arc::clone(&self.tls.current().server));
        let (number, limit) = (self.next, self.limits.handshake);
        self.next += 1;
        let abort = self.handshakes.spawn(async move {
            turn.comes(&stream).await?;
            let done = async {
                stream.set_nodelay(true)?;
                let stream = acceptor.accept(stream).await?;
                let session = stream.get_ref().1;
                // rustls refuses who offers other protocols, and takes who offers none.
                if session.alpn_protocol() != Some(ALPN) {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        rustls::Error::NoApplicationProtocol,
                    ));
                }
                let certificates = session.peer_certificates().unwrap_or_default();
                let identity = certificates.first().and_then(certificate::identity);
                Ok(TlsConnection { peer: Peer::certified(identity, Some(address)), stream })
            };
            timeout(limit, done).await.unwrap_or_else(|_| {
                refusals::count("SLOW_HANDSHAKE");
                Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long"))
            })
        });
        self.pending.insert(abort.id(), Handshake { number, address, abort });
    }

    /// When one more handshake with `address` may begin.
    fn turn(&mut self, address: IpAddr) -> Turn {
        let (address, now) = (address.to_canonical(), Instant::now());
        let mut turn = Turn { buckets: vec![self.bucket((address, false), 1)], from: now };
        if network(address) != address {
            turn.buckets.push(self.bucket((network(address), true), NEIGHBOURS));
        }
        for bucket in &turn.buckets {
            turn.from = turn.from.max(bucket.take(now, 1));
        }
        if turn.from > now {
            refusals::count("TOO_MANY_HANDSHAKES_OF_ADDRESS");
        }
        turn
    }

    fn bucket(&mut self, of: (IpAddr, bool), times: u32) -> Arc<Bucket> {
        if self.rates.len() >= ADDRESSES && !self.rates.contains_key(&of) {
            let now = Instant::now();
            self.rates.retain(|_, bucket| bucket.full() > now);
            let soonest = self.rates.iter().min_by_key(|(_, bucket)| bucket.full());
            if self.rates.len() >= ADDRESSES
                && let Some(soonest) = soonest.map(|(of, _)| *of)
            {
                self.rates.remove(&soonest);
            }
        }
        let TlsLimits { handshakes_each_second, handshakes_burst, .. } = self.limits;
        let (each_second, burst) =
            (handshakes_each_second.saturating_mul(times), handshakes_burst.saturating_mul(times));
        Arc::clone(self.rates.entry(of).or_insert_with(|| Arc::new(Bucket::new(each_second, burst))))
    }

    /// Ends the oldest handshake of the address that has most, in the network that has most: neighbours of who stalls are in its way no more than others.
    fn end_one(&mut self) {
        let Some((most, _)) = most(&self.pending, network) else { return };
        let of_it = self.pending.iter().filter(|(_, one)| network(one.address.ip()) == most);
        let Some((_, oldest)) = self::most(of_it, |address| address) else { return };
        if let Some(Handshake { address, abort, .. }) = self.pending.remove(&oldest) {
            abort.abort();
            refusals::count("TOO_MANY_HANDSHAKES");
            tracing::debug!(peer = %address, "too many TLS handshakes at once; this one is ended");
        }
    }
}

/// Addresses and networks whose handshakes are remembered. Whoever is forgotten before its time has a burst once more.
const ADDRESSES: usize = 4096;

/// How many times as many handshakes all of a /64 may make as one address in it: a stranger there is in its neighbours' way only where it has several addresses.
const NEIGHBOURS: u32 = 4;

/// A token of each bucket, given back by whoever leaves before its time comes: else those of one address that come and leave would have the next one wait ever longer.
#[derive(Debug)]
struct Turn {
    buckets: Vec<Arc<Bucket>>,
    from: Instant,
}

impl Turn {
    /// Waits, as long as the peer is there.
    async fn comes(self, stream: &TcpStream) -> io::Result<()> {
        let comes = sleep_until(self.from);
        let leaves = async {
            match stream.peek(&mut [0]).await {
                Ok(0) => io::Error::from(io::ErrorKind::UnexpectedEof),
                // It may leave later: that is found behind its turn.
                Ok(_) => std::future::pending().await,
                Err(error) => error,
            }
        };
        tokio::select! {
            biased;
            () = comes => Ok(()),
            left = leaves => Err(left),
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.from > Instant::now() {
            self.buckets.iter().for_each(|bucket| bucket.give_back(1));
        }
    }
}

/// What one stranger has at least: of IPv4 an address, of IPv6 a /64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        address => address,
    }
}

/// What has most handshakes, by `key` of their addresses, and the oldest of these; of several the one whose is oldest.
fn most<'a, K: Eq + Hash>(
    pending: impl IntoIterator<Item = (&'a Id, &'a Handshake)>,
    key: impl Fn(IpAddr) -> K,
) -> Option<(K, Id)> {
    let mut counts: HashMap<K, (usize, u64, Id)> = HashMap::new();
    for (&id, &Handshake { number, address, .. }) in pending {
        let (count, oldest, of) = counts.entry(key(address.ip())).or_insert((0, number, id));
        *count += 1;
        if number < *oldest {
            (*oldest, *of) = (number, id);
        }
    }
    let most = counts.into_iter().max_by_key(|(_, (count, oldest, _))| (*count, u64::MAX - oldest));
    most.map(|(key, (_, _, oldest))| (key, oldest))
}

/// What a handshake that failed is counted as. A connection that just broke off, as those of many probes do, was refused by nobody.
fn reason(error: &io::Error) -> Option<CommonReason> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match error {
        rustls::Error::NoCertificatesPresented => CommonReason::Unauthenticated,
        rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => CommonReason::CertificateExpired,
        // The latter for another CA of the same name.
        rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => CommonReason::UnknownCa,
        _ => CommonReason::TlsFailed,
    })
}

impl Stream for TlsIncoming {
    type Item = io::Result<TlsConnection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match self.handshakes.poll_join_next_with_id(cx) {
                Poll::Ready(Some(Ok((id, done)))) => {
                    let address = self.pending.remove(&id).map(|ended| ended.address);
                    match (done, address) {
                        (Ok(connection), _) => return Poll::Ready(Some(Ok(connection))),
                        (Err(error), Some(address)) => {
                            if let Some(reason) = reason(&error) {
                                refusals::count(reason.as_str());
                            }
                            if self.told.one_more() {
                                tracing::info!(peer = %address, %error, "TLS handshake failed");
                            } else {
                                tracing::debug!(peer = %address, %error, "TLS handshake failed");
                            }
                        }
                        (Err(_), None) => {}
                    }
                    continue;
                }
                // Ended by us, or it panicked: it gives its place back either way.
                Poll::Ready(Some(Err(error))) => {
                    if let Some(ended) = self.pending.remove(&error.id()) {
                        tracing::error!(peer = %ended.address, %error, "a TLS handshake panicked");
                    }
                    continue;
                }
                Poll::Ready(None) | Poll::Pending => {}
            }
            ready!(self.pause.poll(cx));
            match ready!(self.listener.poll_accept(cx)) {
                Ok((stream, address)) => self.begin(stream, address),
                Err(error) => {
                    self.pause.begin(&error);
                }
            }
        }
    }
}

/// A connection whose peer has shown a certificate. Requests that come over it have its [`Peer`] in their extensions.
#[derive(Debug)]
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
}

impl Connected for TlsConnection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

#[cfg(feature = "listen")]
impl crate::listen::RemotePeer for TlsConnection {
    fn remote_peer(&self) -> PeerKey {
        self.peer.key()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[path = "../../tests/support/certificates.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "of tests, of which each takes a part")]
mod certificates;

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio_stream::StreamExt as _;

    use super::certificates::{Ca, Issue};
    use super::*;
    use crate::tls::TlsPem;

    async fn incoming() -> TlsIncoming {
        let ca = Ca::new("one");
        let (certificate, key) = ca.issue(&Issue::node("n1"));
        let pem = TlsPem { ca: ca.pem().into(), certificate: certificate.into(), key: key.into() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        TlsIncoming::new(listener, Tls::from_pem(pem).unwrap(), TlsLimits::default())
    }

    #[tokio::test(start_paused = true)]
    async fn only_so_many_addresses_are_remembered() {
        let mut incoming = incoming().await;
        for number in 0..u32::try_from(ADDRESSES).unwrap() + 50 {
            let turn = incoming.turn(IpAddr::V4(number.into()));
            assert!(turn.from <= Instant::now(), "each has its burst");
            assert!(incoming.rates.len() <= ADDRESSES);
        }
        assert_eq!(incoming.rates.len(), ADDRESSES);
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_before_its_turn_takes_no_time_of_others() {
        let mut incoming = incoming().await;
        (incoming.limits.handshakes_each_second, incoming.limits.handshakes_burst) = (1, 1);
        let address = IpAddr::V4(1.into());
        let wait = |turn: &Turn| turn.from.saturating_duration_since(Instant::now()).as_secs();
        assert_eq!(wait(&incoming.turn(address)), 0);
        for _ in 0..100 {
            assert_eq!(wait(&incoming.turn(address)), 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_neighbour_has_a_turn_until_all_of_a_network_have_made_too_many() {
        let mut incoming = incoming().await;
        (incoming.limits.handshakes_each_second, incoming.limits.handshakes_burst) = (1, 10);
        let mut waits = |address: &str, count: usize| {
            let turns: Vec<_> = (0..count).map(|_| incoming.turn(address.parse().unwrap())).collect();
            let waits = turns.iter().map(|turn| turn.from.saturating_duration_since(Instant::now()));
            let waits = waits.map(|wait| wait.as_millis()).collect::<Vec<_>>();
            // Each is used.
            turns.into_iter().for_each(std::mem::forget);
            waits
        };
        assert_eq!(waits("2001:db8::1", 12)[9..], [0, 1000, 2000]);
        assert_eq!(waits("2001:db8::2", 10), [0; 10]);
        assert_eq!(waits("2001:db8::3", 10), [0; 10]);
        assert_eq!(waits("2001:db8::4", 10)[7..], [0, 250, 500]);
        assert_eq!(waits("2001:db8:0:1::4", 10), [0; 10]);
        assert_eq!(waits("::ffff:10.0.0.1", 11)[9..], [0, 1000]);
        assert_eq!(waits("10.0.0.1", 1), [2000]);
        assert_eq!(waits("10.0.0.2", 10), [0; 10]);
    }

    #[tokio::test]
    async fn who_hangs_up_before_its_turn_is_waited_for_no_longer() {
        let mut incoming = incoming().await;
        (incoming.limits.handshakes_each_second, incoming.limits.handshakes_burst) = (1, 0);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        for says in [&b""[..], b"x"] {
            let mut there = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (here, address) = listener.accept().await.unwrap();
            there.write_all(says).await.unwrap();
            drop(there);
            let began = Instant::now();
            // Of whoever has said something it is not known before its turn.
            let came = incoming.turn(address.ip()).comes(&here).await;
            assert_eq!(came.is_ok(), !says.is_empty());
            assert_eq!(began.elapsed() >= Duration::from_millis(900), !says.is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_failed_handshakes_are_told_in_a_minute_and_no_more() {
        let mut told = Told::new();
        let told_of_100 = |told: &mut Told| (0..100).filter(|_| told.one_more()).count();
        assert_eq!(told_of_100(&mut told), 20);
        tokio::time::advance(Duration::from_secs(59)).await;
        assert_eq!(told_of_100(&mut told), 0);
        assert_eq!(told.left_out, 180);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(told_of_100(&mut told), 20);
        assert_eq!(told.left_out, 80, "those of the minute before were told together");
    }

    /// Of handshakes that came in this order from these addresses, the one that is ended for one more.
    async fn ended(addresses: &[&str]) -> usize {
        let mut incoming = incoming().await;
        for (number, address) in (0..).zip(addresses) {
            let abort = incoming.handshakes.spawn(std::future::pending());
            let address = SocketAddr::new(address.parse().unwrap(), 1000);
            incoming.pending.insert(abort.id(), Handshake { number, address, abort });
        }
        incoming.end_one();
        let left: Vec<u64> = incoming.pending.values().map(|handshake| handshake.number).collect();
        assert_eq!(left.len(), addresses.len() - 1);
        (0..addresses.len()).find(|number| !left.contains(&(*number as u64))).unwrap()
    }

    #[tokio::test]
    async fn who_has_many_addresses_of_one_network_has_no_more_places() {
        // The first one is in nobody's way.
        assert_eq!(ended(&["2001:db8::1", "2001:db8:1::1", "2001:db8:1::2", "2001:db8:1::3"]).await, 1);
        assert_eq!(ended(&["192.0.2.1", "2001:db8::a:1", "2001:db8::b:2"]).await, 1);
        assert_eq!(ended(&["2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:2::1"]).await, 0);
        // As it comes to a socket that takes both.
        assert_eq!(ended(&["::ffff:192.0.2.1", "::ffff:192.0.2.2", "192.0.2.2"]).await, 1);
        assert_eq!(ended(&["::ffff:192.0.2.1", "::ffff:192.0.2.2", "2001:db8::1"]).await, 0);
        // A neighbour of who stalls.
        assert_eq!(ended(&["2001:db8::1", "2001:db8::2", "2001:db8::2"]).await, 1);
    }

    #[tokio::test]
    async fn a_handshake_that_panics_gives_its_place_back() {
        let mut incoming = incoming().await;
        let address = incoming.listener.local_addr().unwrap();
        let abort = incoming.handshakes.spawn(async { panic!("as a test asks") });
        incoming.pending.insert(abort.id(), Handshake { number: 0, address, abort });
        while !incoming.pending.is_empty() {
            let next = tokio::time::timeout(Duration::from_millis(10), incoming.next()).await;
            assert!(next.is_err(), "nobody connects");
        }
    }
}
