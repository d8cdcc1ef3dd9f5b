//! The simulated network under tonic: a connector, a listener, and what both carry.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use hyper_util::rt::TokioIo;
use proto_common::connect::{Connect, connect_fn};
use proto_common::error::{CommonReason, Error};
use proto_common::tuning::endpoint;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::Channel;
use tonic::transport::server::Connected;
use turmoil::net::{TcpListener, TcpStream};

use crate::trace::Trace;

pub const PORT: u16 = 7101;

/// A connection of the simulated network.
pub struct Connection(TcpStream);

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().0).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_shutdown(cx)
    }
}

/// New connections to `host`.
pub fn connect(host: &'static str, trace: Trace) -> impl Connect<Channel = Channel> {
    connect_fn(move || {
        let trace = trace.clone();
        async move {
            let connector = tower::service_fn(move |_: http::Uri| async move {
                TcpStream::connect((host, PORT)).await.map(Connection).map(TokioIo::new)
            });
            let connected = endpoint(&format!("{host}:{PORT}"))?.connect_with_connector(connector).await;
            trace.add(format_args!("net: {}", if connected.is_ok() { "connected" } else { "no connection" }));
            connected.map_err(|error| Error::new(CommonReason::Unavailable, error.to_string()))
        }
    })
}

/// Connections that arrive at this host.
pub async fn listen() -> io::Result<impl Stream<Item = io::Result<Connection>>> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    Ok(futures::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| Connection(stream));
        Some((accepted, listener))
    }))
}
