//! TCP connections that are dialled, and how much may lie in the send buffer of one.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::codegen::http::Uri;
use tonic::codegen::{Service, StdError};

/// Up to this round-trip time, as TCP measured it in its handshake, the other end is near. On loopback it is 8 to 36 µs. The buffer below carries 5 GiB/s at this time, more than
/// one connection can fill, and would hold back a longer way.
#[cfg(target_os = "linux")]
const NEAR: Duration = Duration::from_micros(100);

/// Bytes that a connection to a node that is near asks to have in its send buffer. Linux makes it twice as many, which is a frame of
/// [`FRAME_SIZE`](crate::tuning::FRAME_SIZE), and on its own lets the buffer grow to `tcp_wmem`, 4 MiB: what lies there has left the
/// processor's cache when it is sent, or on one host received. From memory to memory on loopback, AMD, medians of 10 rounds by turns of 1 GiB: 0.51 s without,
/// 0.52 with 128 KiB, 0.44 with 256 KiB, 0.48 with 512 KiB, 0.58 with 1 MiB. A host whose `net.core.wmem_max` is at its default grants 208 KiB, which took 0.93 of the
/// time without.
#[cfg(target_os = "linux")]
const NEAR_SEND_BUFFER: usize = 256 << 10;

/// Opens TCP connections for a channel.
#[derive(Debug, Clone)]
pub(crate) struct TcpConnector(HttpConnector);

impl TcpConnector {
    pub(crate) fn new(limit: Duration) -> Self {
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        http.set_connect_timeout(Some(limit));
        Self(http)
    }
}

impl Service<Uri> for TcpConnector {
    type Response = TokioIo<TcpStream>;
    type Error = StdError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.0.call(uri);
        Box::pin(async move {
            let stream = connecting.await?;
            tune(stream.inner());
            Ok(stream)
        })
    }
}

/// Sets the send buffer of a connection that was just made. One for which that fails works as well.
pub(crate) fn tune(socket: &TcpStream) {
    #[cfg(target_os = "linux")]
    if let Err(error) = linux::tune(socket) {
        tracing::debug!(%error, "the send buffer of a connection stays as it is");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = socket;
}

#[cfg(target_os = "linux")]
mod linux {
    use std::os::fd::AsFd;

    use nix::sys::socket::sockopt::SndBuf;
    use nix::sys::socket::{getsockopt, setsockopt};
    use nix::{getsockopt_impl, libc, sockopt_impl};

    use super::{Duration, NEAR, NEAR_SEND_BUFFER};

    /// The first words of `struct tcp_info` of `linux/tcp.h`, which every kernel fills; later ones differ from version to version.
    type Info = [u32; 18];

    /// Where `tcpi_rtt` is, in microseconds.
    const RTT: usize = 17;

    sockopt_impl!(
        /// What TCP knows of a connection.
        TcpInfo,
        GetOnly,
        libc::IPPROTO_TCP,
        libc::TCP_INFO,
        Info
    );

    pub(super) fn rtt(socket: &impl AsFd) -> nix::Result<Duration> {
        Ok(Duration::from_micros(getsockopt(socket, TcpInfo)?[RTT].into()))
    }

    pub(super) fn tune(socket: &impl AsFd) -> nix::Result<()> {
        apply(socket, rtt(socket)?)
    }

    /// A buffer that is set no longer grows, so that of a longer way is left alone.
    pub(super) fn apply(socket: &impl AsFd, rtt: Duration) -> nix::Result<()> {
        // Without a sample, as where the first segment was sent twice, it is 0.
        if rtt.is_zero() || rtt > NEAR { Ok(()) } else { setsockopt(socket, SndBuf, &NEAR_SEND_BUFFER) }
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use nix::sys::socket::getsockopt;
    use nix::sys::socket::sockopt::SndBuf;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn the_send_buffer_of_a_near_connection_is_small_and_that_of_others_is_left_alone() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let rtt = linux::rtt(&socket).unwrap();
        assert!(!rtt.is_zero() && rtt < Duration::from_secs(60), "{rtt:?}");
        let buffer = || getsockopt(&socket, SndBuf).unwrap();
        let untouched = buffer();
        assert!(untouched > 2 * NEAR_SEND_BUFFER, "{untouched}");
        for rtt in [NEAR + Duration::from_micros(1), Duration::ZERO] {
            linux::apply(&socket, rtt).unwrap();
            assert_eq!(buffer(), untouched);
        }
        linux::apply(&socket, NEAR).unwrap();
        assert_eq!(buffer(), granted());
    }

    /// What Linux makes of the small one.
    fn granted() -> usize {
        let max = std::fs::read_to_string("/proc/sys/net/core/wmem_max").unwrap();
        2 * NEAR_SEND_BUFFER.min(max.trim().parse().unwrap())
    }

    #[tokio::test]
    async fn a_connection_that_is_dialled_has_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri: Uri = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let mut connector = TcpConnector::new(Duration::from_secs(60));
        // One of them is made without the machine doing something else meanwhile.
        for _ in 0..100 {
            std::future::poll_fn(|cx| connector.poll_ready(cx)).await.unwrap();
            let socket = connector.call(uri.clone()).await.unwrap();
            let socket = socket.inner();
            assert!(socket.nodelay().unwrap());
            if linux::rtt(socket).unwrap() <= NEAR {
                assert_eq!(getsockopt(socket, SndBuf).unwrap(), granted());
                return;
            }
        }
        panic!("no connection on loopback was near");
    }
}
