//! Connections within limits: how many, from whom, and how long one may say nothing.
//!
//! [`Limited`] stands between whatever accepts connections (TCP, or TLS with its handshake) and tonic's `serve_with_incoming`. What HTTP/2
//! then refuses by itself is counted here, too, by the name that RFC 9113 or, for its statuses, RFC 6585 has for it.

mod block;
mod frames;
#[cfg(target_os = "linux")]
mod low_water;
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
/// 0.30 (medians of three runs of 9 interleaved rounds), with 1.12 to 1.17 times the processor time without. With 128 KiB it was as fast once, and not at all faster the next time.
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
    by_peer: HashMap<PeerKey, usize>,
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
        let of_peer = open.by_peer.get(&peer).copied().unwrap_or(0);
        if of_peer >= self.limits.connections_per_peer {
            return Err("TOO_MANY_CONNECTIONS_OF_PEER");
        }
        open.by_peer.insert(peer.clone(), of_peer + 1);
        open.all += 1;
        Ok(Place { open: Arc::clone(&self.open), peer })
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
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = lock(&self.open);
        open.all = open.all.saturating_sub(1);
        if let Some(of_peer) = open.by_peer.get_mut(&self.peer) {
            *of_peer = of_peer.saturating_sub(1);
            if *of_peer == 0 {
                open.by_peer.remove(&self.peer);
            }
        }
    }
}

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection that ends when its peer says nothing for too long.
#[derive(Debug)]
pub struct LimitedConnection<IO> {
    io: IO,
    _place: Place,
    /// Bytes that are still to come of the preface.
    preface: usize,
    idle: Duration,
    deadline: Pin<Box<Sleep>>,
    last_read: Instant,
    /// Since when the peer takes nothing of what is written. HTTP/2 does not read meanwhile.
    blocked: Option<Instant>,
    frames: Frames,
    refused: Refused,
    /// What [`RemotePeer::set_low_water`] was told last.
    low_water: usize,
}

impl<IO> LimitedConnection<IO> {
    fn new(io: IO, place: Place, limits: &ConnectionLimits) -> Self {
        let deadline = Box::pin(sleep(limits.preface));
        let last_read = Instant::now();
        Self {
            io,
            _place: place,
            preface: PREFACE.len(),
            idle: limits.idle,
            deadline,
            last_read,
            blocked: None,
            frames: Frames::new(limits.header_bytes),
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
            self.last_read = Instant::now();
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
            Poll::Pending => self.poll_silence(cx).map(Err),
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio_stream::StreamExt as _;

    use super::*;

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
}
