//! Connections within limits: how many, from whom, how many calls and frames of no use come on them, and how long one may say nothing.
//!
//! [`Limited`] stands between whatever accepts connections (TCP, or TLS with its handshake) and tonic's `serve_with_incoming`. What HTTP/2
//! then refuses by itself is counted here, too, by the name that RFC 9113 or, for its statuses, RFC 6585 has for it.

mod block;
mod frames;
#[cfg(target_os = "linux")]
mod low_water;
pub(crate) mod rates;
mod refused;

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use self::frames::{Frames, PREFACE};
use self::rates::Rates;
use self::refused::Refused;
use crate::limits::ConnectionLimits;
use crate::peer::{Peer, PeerKey};
use crate::refusals;

/// Something that knows who is at its other end.
pub trait RemotePeer {
    /// Whose connection it is.
    fn remote_peer(&self) -> PeerKey;

    /// From now on, reading is to wait until so many bytes are there, or the end of what the peer sends; 1 as it was. They are to come: at least as many are left of a frame that has
    /// begun. Whatever is between the frames and the socket must keep none of them back, so by default nothing is done.
    ///
    /// # Errors
    ///
    /// Those of the system. The connection is no longer of use then.
    fn set_low_water(&self, _bytes: usize) -> io::Result<()> {
        Ok(())
    }
}

impl RemotePeer for TcpStream {
    fn remote_peer(&self) -> PeerKey {
        Peer::plaintext(self.peer_addr().ok()).key()
    }

    #[cfg(target_os = "linux")]
    fn set_low_water(&self, bytes: usize) -> io::Result<()> {
        low_water::set(self, bytes)
    }
}

/// Bytes of a long frame for which reading waits: all of the longest ([`FRAME_SIZE`](crate::tuning::FRAME_SIZE)). A socket that tells of each segment, 64 KiB on loopback, wakes the receiver up
/// to eight times for a frame, which has two calls and a turn of the runtime for each, and a sender that wakes a sleeping processor pays, too. On loopback with 2 cores
/// and one worker thread at each end, 1 GiB from memory to memory took 0.30 to 0.37 s without, and 0.25 to 0.31 with 256 KiB and with 512 KiB, where raw TCP took 0.24 to
/// 0.30 (medians of three runs of 9 interleaved rounds); without, it took 1.11 to 1.17 times the processor time. In one of two runs, 128 KiB gained nothing.
/// On one core for both ends, 0.62 s without and with 256 KiB, 0.57 with 512 KiB, 0.49 by raw TCP.
const LOW_WATER: usize = crate::tuning::FRAME_SIZE as usize;

/// What is left of a frame at least where that is waited for: less comes at once.
const WORTH_WAITING: usize = 32 << 10;

/// Connections of `S` within limits; those beyond them are closed as soon as they come.
#[derive(Debug)]
pub struct Limited<S> {
    incoming: S,
    limits: ConnectionLimits,
    open: Arc<Mutex<Open>>,
    pause: AcceptPause,
}

/// Nobody is accepted for a moment after accepting failed, as it does when no file descriptor is free: what waits would make it fail
/// again at once, and again.
#[derive(Debug, Default)]
pub(crate) struct AcceptPause(Option<Pin<Box<Sleep>>>);

impl AcceptPause {
    const TIME: Duration = Duration::from_millis(100);

    pub(crate) fn begin(&mut self, error: &io::Error) {
        tracing::warn!(%error, "cannot accept a connection");
        self.0 = Some(Box::pin(sleep(Self::TIME)));
    }

    /// Ready when it is over.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(pause) = &mut self.0 {
            ready!(pause.as_mut().poll(cx));
            self.0 = None;
        }
        Poll::Ready(())
    }
}

#[derive(Debug, Default)]
struct Open {
    all: usize,
    by_peer: HashMap<PeerKey, OfPeer>,
    /// Peers without a connection that are remembered, since their buckets are not full.
    gone: usize,
}

#[derive(Debug)]
struct OfPeer {
    connections: usize,
    rates: Arc<Rates>,
}

impl Open {
    /// Peers without a connection that are remembered. Whoever is forgotten before its time has a burst once more when it comes back.
    const MOST_GONE: usize = 1024;

    /// One connection of `peer` less.
    fn leave(&mut self, peer: &PeerKey) {
        self.all = self.all.saturating_sub(1);
        let Some(of_peer) = self.by_peer.get_mut(peer) else { return };
        of_peer.connections = of_peer.connections.saturating_sub(1);
        if of_peer.connections > 0 {
            return;
        }
        let now = Instant::now();
        if of_peer.rates.full() <= now {
            self.by_peer.remove(peer);
            return;
        }
        self.gone += 1;
        if self.gone <= Self::MOST_GONE {
            return;
        }
        self.by_peer.retain(|_, peer| peer.connections > 0 || peer.rates.full() > now);
        let left = self.by_peer.iter().filter(|(_, peer)| peer.connections == 0);
        let soonest = left.clone().min_by_key(|(_, peer)| peer.rates.full()).map(|(key, _)| key.clone());
        self.gone = left.count();
        if self.gone > Self::MOST_GONE
            && let Some(soonest) = soonest
        {
            self.by_peer.remove(&soonest);
            self.gone -= 1;
        }
    }
}

impl<S> Limited<S> {
    /// `incoming`, within `limits`.
    #[must_use]
    pub fn new(incoming: S, limits: ConnectionLimits) -> Self {
        Self { incoming, limits, open: Arc::default(), pause: AcceptPause::default() }
    }

    /// Whatever accepts connections.
    pub fn get_ref(&self) -> &S {
        &self.incoming
    }

    fn enter(&self, peer: PeerKey) -> Result<Place, &'static str> {
        let mut open = lock(&self.open);
        if open.all >= self.limits.connections {
            return Err("TOO_MANY_CONNECTIONS");
        }
        let of_peer = open.by_peer.get(&peer);
        let connections = of_peer.map_or(0, |of_peer| of_peer.connections);
        if connections >= self.limits.connections_per_peer {
            return Err("TOO_MANY_CONNECTIONS_OF_PEER");
        }
        let rates = match of_peer {
            Some(of_peer) => Arc::clone(&of_peer.rates),
            None => Arc::new(Rates::new(&self.limits)),
        };
        open.gone -= usize::from(of_peer.is_some() && connections == 0);
        let of_peer = OfPeer { connections: connections + 1, rates: Arc::clone(&rates) };
        open.by_peer.insert(peer.clone(), of_peer);
        open.all += 1;
        Ok(Place { open: Arc::clone(&self.open), peer, rates })
    }
}

impl<S, IO> Stream for Limited<S>
where
    S: Stream<Item = io::Result<IO>> + Unpin,
    IO: RemotePeer,
{
    type Item = io::Result<LimitedConnection<IO>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            ready!(self.pause.poll(cx));
            let io = match ready!(Pin::new(&mut self.incoming).poll_next(cx)) {
                Some(Ok(io)) => io,
                // Of one connection that was given up before it was accepted.
                Some(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Some(Err(error)) => {
                    self.pause.begin(&error);
                    continue;
                }
                None => return Poll::Ready(None),
            };
            let peer = io.remote_peer();
            match self.enter(peer.clone()) {
                Ok(place) => {
                    return Poll::Ready(Some(Ok(LimitedConnection::new(io, place, &self.limits))));
                }
                Err(reason) => {
                    refusals::count(reason);
                    tracing::debug!(%peer, reason, "a connection was closed");
                }
            }
        }
    }
}

/// One of the connections that are counted; until dropped.
#[derive(Debug)]
struct Place {
    open: Arc<Mutex<Open>>,
    peer: PeerKey,
    rates: Arc<Rates>,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.open).leave(&self.peer);
    }
}

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection that ends when its peer says nothing for too long.
#[derive(Debug)]
pub struct LimitedConnection<IO> {
    io: IO,
    /// Bytes that are still to come of the preface.
    preface: usize,
    idle: Duration,
    deadline: Pin<Box<Sleep>>,
    /// Or until when nothing is read, because of something that has to wait: as long as that the peer has no way to be heard.
    last_read: Instant,
    /// Since when the peer takes nothing of what is written. HTTP/2 does not read meanwhile.
    blocked: Option<Instant>,
    frames: Frames,
    refused: Refused,
    /// What [`RemotePeer::set_low_water`] was told last.
    low_water: usize,
    /// Left behind `frames`, which gives back what it has taken and not used.
    _place: Place,
}

impl<IO> LimitedConnection<IO> {
    fn new(io: IO, place: Place, limits: &ConnectionLimits) -> Self {
        let deadline = Box::pin(sleep(limits.preface));
        let last_read = Instant::now();
        let frames = Frames::new(limits.header_bytes, Arc::clone(&place.rates));
        Self {
            io,
            _place: place,
            preface: PREFACE.len(),
            idle: limits.idle,
            deadline,
            last_read,
            blocked: None,
            frames,
            refused: Refused::default(),
            low_water: 1,
        }
    }

    /// What is limited.
    pub fn get_ref(&self) -> &IO {
        &self.io
    }

    /// Whether the peer has been silent, or taken nothing, for too long. The timer is set anew only when it ends, not with every read.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            ready!(self.deadline.as_mut().poll(cx));
            let silent = (self.preface == 0).then(|| self.blocked.unwrap_or(self.last_read) + self.idle);
            match silent {
                Some(until) if until > Instant::now() => self.deadline.as_mut().reset(until),
                _ => break,
            }
        }
        let reason = if self.preface > 0 { "SLOW_PREFACE" } else { "IDLE_CONNECTION" };
        refusals::count(reason);
        Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "the peer was silent for too long"))
    }

    /// Has the socket tell of what is left of a long frame in large pieces.
    fn wait_for_more(&mut self) -> io::Result<()>
    where
        IO: RemotePeer,
    {
        let low_water = match self.frames.rest() {
            rest if rest >= WORTH_WAITING => rest.min(LOW_WATER),
            _ => 1,
        };
        if low_water != self.low_water {
            self.io.set_low_water(low_water)?;
            self.low_water = low_water;
        }
        Ok(())
    }

    /// What a write gives, unless the peer has taken nothing for too long.
    fn unless_blocked<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_pending() {
            self.blocked.get_or_insert_with(Instant::now);
            return self.poll_silence(cx).map(Err);
        }
        if self.blocked.take().is_some() {
            // It is there. What it has said meanwhile is read next.
            self.last_read = self.last_read.max(Instant::now());
        }
        written
    }
}

impl<IO: AsyncRead + RemotePeer + Unpin> AsyncRead for LimitedConnection<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        match this.frames.poll_read(Pin::new(&mut this.io), cx, buf) {
            Poll::Ready(read) => {
                self.last_read = Instant::now();
                if self.preface > 0 {
                    self.preface = self.preface.saturating_sub(buf.filled().len() - before);
                    if self.preface == 0 {
                        // What is left of the time for the preface may be longer than a silence.
                        let until = self.last_read + self.idle;
                        self.deadline.as_mut().reset(until);
                    }
                }
                let read = read.and_then(|()| self.wait_for_more());
                Poll::Ready(read)
            }
            Poll::Pending => match self.frames.held_until() {
                Some(until) => {
                    self.last_read = until;
                    Poll::Pending
                }
                None => self.poll_silence(cx).map(Err),
            },
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for LimitedConnection<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        if let Poll::Ready(Ok(len)) = written {
            self.refused.written(buf.get(..len).unwrap_or(buf), refusals::count);
        }
        self.unless_blocked(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.unless_blocked(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut_down = Pin::new(&mut self.io).poll_shutdown(cx);
        self.unless_blocked(cx, shut_down)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        if let Poll::Ready(Ok(mut len)) = written {
            for buf in bufs {
                let now = len.min(buf.len());
                self.refused.written(&buf[..now], refusals::count);
                len -= now;
            }
        }
        self.unless_blocked(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl<IO: Connected> Connected for LimitedConnection<IO> {
    type ConnectInfo = IO::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.io.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio_stream::StreamExt as _;

    use super::rates::Kind;
    use super::*;
    use crate::tuning::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, tune_server_within};

    impl RemotePeer for DuplexStream {
        fn remote_peer(&self) -> PeerKey {
            PeerKey::Unknown
        }
    }

    async fn connection(limits: ConnectionLimits) -> (LimitedConnection<DuplexStream>, DuplexStream) {
        let (here, mut there) = tokio::io::duplex(64);
        let incoming = tokio_stream::once(io::Result::Ok(here));
        let mut connection = Limited::new(incoming, limits).next().await.unwrap().unwrap();
        there.write_all(&[b'x'; PREFACE.len()]).await.unwrap();
        connection.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
        (connection, there)
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_silent() {
        let (mut connection, mut there) = connection(ConnectionLimits::default()).await;
        let idle = ConnectionLimits::default().idle;
        let before = refusals::count_of("IDLE_CONNECTION");
        // Full, but for less than that time, as often as it likes.
        connection.write_all(&[0; 64]).await.unwrap();
        for _ in 0..3 {
            let began = Instant::now();
            let (written, ()) = tokio::join!(connection.write_all(&[0; 64]), async {
                tokio::time::sleep(idle * 2 / 3).await;
                there.read_exact(&mut [0; 64]).await.unwrap();
            });
            written.unwrap();
            assert_eq!(began.elapsed(), idle * 2 / 3);
        }
        let began = Instant::now();
        let error = connection.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!((error.kind(), began.elapsed().as_secs()), (io::ErrorKind::TimedOut, idle.as_secs()));
        // At least: other tests of this process count as well.
        assert!(refusals::count_of("IDLE_CONNECTION") > before);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silence_is_as_long_as_allowed_whatever_the_time_for_the_preface() {
        for idle in [Duration::from_secs(1), Duration::from_secs(1000)] {
            let limits = ConnectionLimits { idle, ..ConnectionLimits::default() };
            let (mut connection, mut there) = connection(limits).await;
            for _ in 0..3 {
                tokio::time::sleep(idle * 2 / 3).await;
                there.write_all(b"x").await.unwrap();
                connection.read_exact(&mut [0]).await.unwrap();
            }
            let began = Instant::now();
            let error = connection.read_exact(&mut [0]).await.unwrap_err();
            assert_eq!((error.kind(), began.elapsed().as_secs()), (io::ErrorKind::TimedOut, idle.as_secs()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn accepting_rests_after_a_failure() {
        let (here, _there) = tokio::io::duplex(1);
        let failures = [io::ErrorKind::ConnectionAborted, io::ErrorKind::OutOfMemory];
        let accepted = failures.map(|kind| Err(io::Error::from(kind))).into_iter().chain([Ok(here)]);
        let mut limited = Limited::new(tokio_stream::iter(accepted), ConnectionLimits::default());
        let began = Instant::now();
        limited.next().await.unwrap().unwrap();
        assert_eq!(began.elapsed(), AcceptPause::TIME);
    }

    type Accepted = LimitedConnection<DuplexStream>;

    /// A server within `limits`.
    fn server(limits: ConnectionLimits) -> Limited<()> {
        Limited::new((), limits)
    }

    /// A connection of a peer, and what it writes to.
    fn of(server: &Limited<()>, peer: &PeerKey) -> (Accepted, DuplexStream) {
        let (here, there) = tokio::io::duplex(1 << 20);
        let place = server.enter(peer.clone()).unwrap();
        (LimitedConnection::new(here, place, &server.limits), there)
    }

    fn peer(number: u32) -> PeerKey {
        PeerKey::Address(IpAddr::V4(Ipv4Addr::from_bits(number)))
    }

    const CALL_BYTES: usize = 9 + 5;

    /// `count` calls, each a head and a block of 5 bytes, in which the number of the call is.
    fn calls(count: u8) -> Vec<u8> {
        let call = |number| [&[0, 0, 5, 1, 5, 0, 0, 0, 1][..], &[number; 5]].concat();
        (0..count).flat_map(call).collect()
    }

    /// Reads `count` calls; after how many milliseconds each was there.
    async fn arrive(connection: &mut Accepted, count: usize, began: Instant) -> Vec<u128> {
        let mut times = Vec::new();
        for number in 0..count {
            let mut call = [0; CALL_BYTES];
            connection.read_exact(&mut call).await.unwrap();
            assert_eq!(usize::from(call[CALL_BYTES - 1]), number);
            times.push(began.elapsed().as_millis());
        }
        times
    }

    /// Ten calls in a second.
    fn ten_calls(burst: u32) -> ConnectionLimits {
        ConnectionLimits { calls_per_peer: 10, calls_burst_per_peer: burst, ..ConnectionLimits::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_calls_too_often_waits_on_all_of_its_connections_and_no_other_does() {
        let server = server(ten_calls(4));
        let before = refusals::count_of("TOO_MANY_CALLS_OF_PEER");
        let mut connections = [1, 1, 2].map(|number| of(&server, &peer(number)));
        for (connection, there) in &mut connections {
            there.write_all(&[PREFACE, &*calls(4)].concat()).await.unwrap();
            connection.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
        }
        let [(first, _a), (second, _b), (other, _c)] = &mut connections;
        let began = Instant::now();
        assert_eq!(arrive(first, 4, began).await, [0; 4]);
        assert_eq!(arrive(other, 4, began).await, [0; 4]);
        // The first one has taken the burst.
        assert_eq!(arrive(second, 4, began).await, [100, 200, 300, 400]);
        assert!(refusals::count_of("TOO_MANY_CALLS_OF_PEER") >= before + 4);
        // By turns.
        for (_, there) in &mut connections[..2] {
            there.write_all(&calls(3)).await.unwrap();
        }
        let [(first, _a), (second, _b), ..] = &mut connections;
        let both = tokio::join!(arrive(first, 3, began), arrive(second, 3, began));
        assert_eq!(both, (vec![500, 700, 900], vec![600, 800, 1000]));
    }

    /// What the connection gives at once is the call that waits up to its head, and the peer cannot send on for ever.
    #[tokio::test(start_paused = true)]
    async fn nothing_is_read_of_a_connection_that_waits() {
        let server = server(ten_calls(1));
        let (mut connection, mut there) = of(&server, &peer(1));
        there.write_all(PREFACE).await.unwrap();
        let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        there.write_all(&[&*calls(2), &ping].concat()).await.unwrap();
        let began = Instant::now();
        let mut read = vec![0; 4096];
        let len = connection.read(&mut read).await.unwrap();
        assert_eq!((len, began.elapsed().as_millis()), (PREFACE.len() + CALL_BYTES + 9, 0));
        // Whatever the socket has is left there.
        let sent = tokio::time::timeout(Duration::from_millis(50), async {
            loop {
                there.write_all(&[0; 1024]).await.unwrap();
            }
        });
        let (sent, next) = tokio::join!(sent, connection.read(&mut read[len..]));
        assert!(sent.is_err());
        assert_eq!((next.unwrap(), began.elapsed().as_millis()), (5 + ping.len(), 100));
        assert!(read[..len + 5 + ping.len()].ends_with(&ping));
    }

    /// No other frame begins a stream, and what goes on with one that has begun takes no token.
    #[tokio::test(start_paused = true)]
    async fn each_header_block_is_a_call_however_it_is_cut() {
        const CONTINUATION: u8 = 9;
        let frame = |kind: u8, flags: u8, len: u8| {
            [&[0, 0, len, kind, flags, 0, 0, 0, 1][..], &vec![0; usize::from(len)]].concat()
        };
        for block in [
            frame(1, 4, 200),
            // Empty, and all of it in what follows.
            [frame(1, 0, 0), frame(CONTINUATION, 0, 0), frame(CONTINUATION, 4, 200)].concat(),
            [frame(1, 0, 100), frame(CONTINUATION, 0, 50), frame(CONTINUATION, 4, 50)].concat(),
        ] {
            let server = server(ten_calls(1));
            let (mut connection, mut there) = of(&server, &peer(1));
            // Frames of all other kinds between them.
            let others = [0, 2, 3, 4, 6, 7, 8, 10, 0xfa].map(|kind| frame(kind, 0, 8)).concat();
            let calls = [&*block, &others].concat();
            there.write_all(&[PREFACE, &*calls.repeat(5)].concat()).await.unwrap();
            connection.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
            let began = Instant::now();
            for number in 0..5 {
                connection.read_exact(&mut vec![0; calls.len()]).await.unwrap();
                assert_eq!(began.elapsed().as_millis(), number * 100);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_waits_is_not_silent_and_one_that_has_waited_is() {
        let idle = Duration::from_secs(1);
        let server = server(ConnectionLimits { idle, calls_per_peer: 1, ..ten_calls(0) });
        // The third waits for thrice the time that a silence may have, and is heard again after that.
        let mut connections = [1, 1, 1].map(|number| of(&server, &peer(number)));
        let began = Instant::now();
        for (connection, there) in &mut connections {
            there.write_all(&[PREFACE, &calls(1)[..9]].concat()).await.unwrap();
            connection.read_exact(&mut [0; PREFACE.len() + 9]).await.unwrap();
        }
        let [.., (last, there)] = &mut connections;
        let mut block = [0; 5];
        let (read, ()) = tokio::join!(last.read_exact(&mut block), async {
            tokio::time::sleep(idle * 7 / 2).await;
            there.write_all(&[0; 5]).await.unwrap();
        });
        read.unwrap();
        assert_eq!(began.elapsed(), idle * 7 / 2);
        let error = last.read_exact(&mut [0]).await.unwrap_err();
        assert_eq!((error.kind(), began.elapsed()), (io::ErrorKind::TimedOut, idle * 9 / 2));
        // Nobody is there any more: that is found when what it has said is read.
        let (mut dead, mut there) = of(&server, &peer(1));
        there.write_all(&[PREFACE, &*calls(1)].concat()).await.unwrap();
        drop(there);
        let began = Instant::now();
        dead.read_to_end(&mut Vec::new()).await.unwrap();
        assert_eq!(began.elapsed(), idle);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_comes_again_has_no_other_burst() {
        let server = server(ten_calls(4));
        for since in [0, 100] {
            let (mut connection, mut there) = of(&server, &peer(1));
            there.write_all(&[PREFACE, &*calls(4)].concat()).await.unwrap();
            connection.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
            let began = Instant::now();
            let times = arrive(&mut connection, 4, began).await;
            assert_eq!(times, [since, 2 * since, 3 * since, 4 * since]);
            assert_eq!(lock(&server.open).gone, 0);
            drop((connection, there));
            assert_eq!(lock(&server.open).gone, 1);
        }
        // When its bucket is full it is as anybody who has never called, and nothing is known of it behind its last connection.
        tokio::time::sleep(Duration::from_millis(400)).await;
        drop(of(&server, &peer(1)));
        let open = lock(&server.open);
        assert_eq!((open.all, open.gone, open.by_peer.len()), (0, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_leaves_before_its_turn_takes_no_time_of_others() {
        let server = server(ten_calls(1));
        let call = async || {
            let (mut connection, mut there) = of(&server, &peer(1));
            there.write_all(&[PREFACE, &*calls(1)].concat()).await.unwrap();
            connection.read_exact(&mut [0; PREFACE.len() + 9]).await.unwrap();
            (connection, there)
        };
        let began = Instant::now();
        let _at_once = call().await;
        for _ in 0..1000 {
            drop(call().await);
        }
        let (mut connection, _there) = call().await;
        connection.read_exact(&mut [0; 5]).await.unwrap();
        assert_eq!(began.elapsed().as_millis(), 100);
        // One that leaves behind its turn has had it, whether it has made use of it or not.
        let unused = call().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(unused);
        let (mut connection, _there) = call().await;
        connection.read_exact(&mut [0; 5]).await.unwrap();
        assert_eq!(began.elapsed().as_millis(), 300);
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_are_gone_are_remembered_up_to_a_number() {
        let server = server(ten_calls(10_000));
        let most = u32::try_from(Open::MOST_GONE).unwrap();
        let stays = of(&server, &peer(0));
        // The one in the middle has made the fewest calls.
        for number in 1..=most + 1 {
            let place = server.enter(peer(number)).unwrap();
            for _ in 0..=number.abs_diff(most / 2) {
                place.rates.of(Kind::Call).take(Instant::now(), 1);
            }
        }
        let known = || {
            let open = lock(&server.open);
            (open.by_peer.len(), open.gone, open.by_peer.contains_key(&peer(most / 2)))
        };
        assert_eq!(known(), (Open::MOST_GONE + 1, Open::MOST_GONE, false));
        // All but one are full again by then.
        tokio::time::sleep(Duration::from_millis(100) * (most / 2 + 1)).await;
        server.enter(peer(most + 2)).unwrap().rates.of(Kind::Call).take(Instant::now(), 1);
        assert_eq!(known(), (2 + 1, 2, false));
        drop(stays);
        assert_eq!(known(), (2, 2, false));
    }

    /// A client that has said hello to a server with the keepalive of [`tuning`](crate::tuning), on a connection within `limits`.
    async fn client(limits: ConnectionLimits) -> DuplexStream {
        let (here, mut there) = tokio::io::duplex(1 << 20);
        let incoming = Limited::new(tokio_stream::once(Ok(here)).chain(tokio_stream::pending()), limits);
        let mut server = tune_server_within(tonic::transport::Server::builder(), &incoming.limits);
        tokio::spawn(server.add_routes(tonic::service::Routes::default()).serve_with_incoming(incoming));
        there.write_all(&[&PREFACE[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat()).await.unwrap();
        there
    }

    /// `count` calls of methods that do not exist, which is answered.
    fn unknown(first: u32, count: u32) -> Vec<u8> {
        let block = [0x83, 0x86, 0x04, 2, b'/', b'a', 0x01, 1, b'n'];
        let call = |number: u32| [&[0, 0, 9, 1, 5][..], &(2 * number + 1).to_be_bytes(), &block[..]].concat();
        (first..first + count).flat_map(call).collect()
    }

    #[derive(Debug, PartialEq)]
    enum Said {
        Answer,
        Ping(Vec<u8>),
        End,
    }

    /// The next answer to a call, or ping.
    async fn said(there: &mut DuplexStream) -> Said {
        loop {
            let mut head = [0; 9];
            if there.read_exact(&mut head).await.is_err() {
                return Said::End;
            }
            let mut payload = vec![0; usize::from(head[2]) | usize::from(head[1]) << 8];
            there.read_exact(&mut payload).await.unwrap();
            match (head[3], head[4] & 1) {
                (1, _) => return Said::Answer,
                (6, 0) => return Said::Ping(payload),
                _ => {}
            }
        }
    }

    fn acknowledged(ping: &[u8]) -> Vec<u8> {
        [&[0, 0, 8, 6, 1, 0, 0, 0, 0][..], ping].concat()
    }

    /// A ping is for a connection from which no call has come for a while, and one that waits has one in each of its turns.
    #[tokio::test(start_paused = true)]
    async fn a_connection_that_waits_is_not_pinged() {
        let mut there = client(ConnectionLimits { calls_per_peer: 1, ..ten_calls(1) }).await;
        let began = Instant::now();
        there.write_all(&unknown(0, 100)).await.unwrap();
        for number in 0..100 {
            assert_eq!((said(&mut there).await, began.elapsed().as_secs()), (Said::Answer, number));
        }
        let Said::Ping(ping) = said(&mut there).await else { panic!("no ping") };
        assert_eq!(began.elapsed(), Duration::from_secs(99) + KEEPALIVE_INTERVAL);
        there.write_all(&acknowledged(&ping)).await.unwrap();
        assert!(matches!(said(&mut there).await, Said::Ping(_)), "it is alive");
    }

    /// What may end one that waits: calls that come between a ping and its acknowledgement, and wait for longer than that may take.
    #[tokio::test(start_paused = true)]
    async fn a_ping_that_is_acknowledged_behind_calls_that_wait_has_as_long_as_any() {
        let most = u32::try_from(KEEPALIVE_TIMEOUT.as_secs()).unwrap();
        for (calls, goes_on) in [(most, true), (most + 2, false)] {
            let mut there = client(ConnectionLimits { calls_per_peer: 1, ..ten_calls(1) }).await;
            let Said::Ping(ping) = said(&mut there).await else { panic!("no ping") };
            there.write_all(&[unknown(0, calls), acknowledged(&ping)].concat()).await.unwrap();
            for _ in 0..most {
                assert_eq!(said(&mut there).await, Said::Answer);
            }
            if goes_on {
                assert!(matches!(said(&mut there).await, Said::Ping(_)));
            } else {
                while said(&mut there).await == Said::Answer {}
                assert_eq!(said(&mut there).await, Said::End);
            }
        }
    }
}
