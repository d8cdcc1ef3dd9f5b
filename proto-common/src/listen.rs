//! Connections within limits: how many, from whom, and how long one may say nothing.
//!
//! [`Limited`] stands between whatever accepts connections (TCP, or TLS with its handshake) and tonic's `serve_with_incoming`.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use crate::limits::ConnectionLimits;
use crate::refusals;

/// Length of what every HTTP/2 client sends first, in bytes (RFC 9113, 3.4).
const PREFACE_LEN: usize = 24;

/// Something that knows who is at its other end.
pub trait RemoteIp {
    /// The address, if there is one. Connections without one are counted as one peer's.
    fn remote_ip(&self) -> Option<IpAddr>;
}

impl RemoteIp for TcpStream {
    fn remote_ip(&self) -> Option<IpAddr> {
        self.peer_addr().ok().map(|address| address.ip())
    }
}

/// Connections of `S` within limits; those beyond them are closed as soon as they come.
#[derive(Debug)]
pub struct Limited<S> {
    incoming: S,
    limits: ConnectionLimits,
    open: Arc<Mutex<Open>>,
}

#[derive(Debug, Default)]
struct Open {
    all: usize,
    by_peer: HashMap<Option<IpAddr>, usize>,
}

impl<S> Limited<S> {
    /// `incoming`, within `limits`.
    #[must_use]
    pub fn new(incoming: S, limits: ConnectionLimits) -> Self {
        Self { incoming, limits, open: Arc::default() }
    }

    fn enter(&self, peer: Option<IpAddr>) -> Result<Place, &'static str> {
        let mut open = lock(&self.open);
        if open.all >= self.limits.connections {
            return Err("TOO_MANY_CONNECTIONS");
        }
        let of_peer = open.by_peer.entry(peer).or_default();
        if *of_peer >= self.limits.connections_per_peer {
            return Err("TOO_MANY_CONNECTIONS_OF_PEER");
        }
        *of_peer += 1;
        open.all += 1;
        Ok(Place { open: Arc::clone(&self.open), peer })
    }
}

impl<S, IO> Stream for Limited<S>
where
    S: Stream<Item = io::Result<IO>> + Unpin,
    IO: RemoteIp,
{
    type Item = io::Result<LimitedConnection<IO>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let io = match ready!(Pin::new(&mut self.incoming).poll_next(cx)) {
                Some(Ok(io)) => io,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            };
            let peer = io.remote_ip();
            match self.enter(peer) {
                Ok(place) => {
                    let ConnectionLimits { preface, idle, .. } = self.limits;
                    return Poll::Ready(Some(Ok(LimitedConnection::new(io, place, preface, idle))));
                }
                Err(reason) => {
                    refusals::count(reason);
                    tracing::debug!(?peer, reason, "a connection was closed");
                }
            }
        }
    }
}

/// One of the connections that are counted; until dropped.
#[derive(Debug)]
struct Place {
    open: Arc<Mutex<Open>>,
    peer: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = lock(&self.open);
        open.all = open.all.saturating_sub(1);
        if let Some(of_peer) = open.by_peer.get_mut(&self.peer) {
            *of_peer -= 1;
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
}

impl<IO> LimitedConnection<IO> {
    fn new(io: IO, place: Place, preface: Duration, idle: Duration) -> Self {
        let deadline = Box::pin(sleep(preface));
        Self { io, _place: place, preface: PREFACE_LEN, idle, deadline, last_read: Instant::now() }
    }

    /// What is limited.
    pub fn get_ref(&self) -> &IO {
        &self.io
    }

    /// Whether the peer has been silent for too long. The timer is set anew only when it ends, not with every read.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            ready!(self.deadline.as_mut().poll(cx));
            let silent = (self.preface == 0).then(|| self.last_read + self.idle);
            match silent {
                Some(until) if until > Instant::now() => self.deadline.as_mut().reset(until),
                _ => break,
            }
        }
        let reason = if self.preface > 0 { "SLOW_PREFACE" } else { "IDLE_CONNECTION" };
        refusals::count(reason);
        Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "the peer was silent for too long"))
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for LimitedConnection<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        match Pin::new(&mut self.io).poll_read(cx, buf) {
            Poll::Ready(read) => {
                self.preface = self.preface.saturating_sub(buf.filled().len() - before);
                self.last_read = Instant::now();
                Poll::Ready(read)
            }
            Poll::Pending => self.poll_silence(cx).map(Err),
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for LimitedConnection<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
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
