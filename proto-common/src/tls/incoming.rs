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
    /// Handshakes with one address in a second, of IPv6 with a /64, behind the first [`handshakes_burst`](Self::handshakes_burst). Default 100: each takes some tenths of a millisecond of the
    /// processor. One more waits for its turn in one of the [`handshakes`](Self::handshakes) under way; counted as `TOO_MANY_HANDSHAKES_OF_ADDRESS`. 0 is as 1.
    pub handshakes_each_second: u32,
    /// Handshakes with one address at once, when there were none for a while. Default 512: as many connections as two nodes may have.
    pub handshakes_burst: u32,
}

impl Default for TlsLimits {
    fn default() -> Self {
        Self {
            handshakes: 256,
            handshake: Duration::from_secs(10),
            handshakes_each_second: 100,
            handshakes_burst: 512,
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
    /// By [`network`].
    rates: HashMap<IpAddr, Arc<Bucket>>,
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
            turn.comes().await;
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
        let (network, now) = (network(address), Instant::now());
        if self.rates.len() >= NETWORKS && !self.rates.contains_key(&network) {
            self.rates.retain(|_, bucket| bucket.full() > now);
            let soonest = self.rates.iter().min_by_key(|(_, bucket)| bucket.full());
            if self.rates.len() >= NETWORKS
                && let Some(soonest) = soonest.map(|(network, _)| *network)
            {
                self.rates.remove(&soonest);
            }
        }
        let TlsLimits { handshakes_each_second, handshakes_burst, .. } = self.limits;
        let new = || Arc::new(Bucket::new(handshakes_each_second, handshakes_burst));
        let bucket = Arc::clone(self.rates.entry(network).or_insert_with(new));
        let from = bucket.take(now, 1);
        if from > now {
            refusals::count("TOO_MANY_HANDSHAKES_OF_ADDRESS");
        }
        Turn { bucket, from }
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

/// Networks whose handshakes are remembered. Whoever is forgotten before its time has a burst once more.
const NETWORKS: usize = 4096;

/// A token of a bucket, given back by whoever leaves before its time comes: else those of one address that come and leave would have the next one wait ever longer.
#[derive(Debug)]
struct Turn {
    bucket: Arc<Bucket>,
    from: Instant,
}

impl Turn {
    async fn comes(self) {
        sleep_until(self.from).await;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.from > Instant::now() {
            self.bucket.give_back(1);
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

    #[tokio::test]
    async fn only_so_many_addresses_are_remembered() {
        let mut incoming = incoming().await;
        for number in 0..2 * u32::try_from(NETWORKS).unwrap() {
            let turn = incoming.turn(IpAddr::V4(number.into()));
            assert!(turn.from <= Instant::now(), "each has its burst");
            assert!(incoming.rates.len() <= NETWORKS);
        }
        assert_eq!(incoming.rates.len(), NETWORKS);
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
