//! Transport settings for bulk data: few large frames, windows that never stall a fast link.
//!
//! The defaults of HTTP/2 (64 KiB windows, 16 KiB frames) cap a stream at 64 KiB per round trip; with these settings the
//! network or the disk is the limit. Use them on both sides: each side's windows bound what the *other* one sends.

use std::time::Duration;

#[cfg(feature = "listen")]
use crate::limits::ConnectionLimits;
#[cfg(feature = "listen")]
use crate::listen::Limited;

/// HTTP/2 flow-control window of one stream: 8 MiB.
///
/// Holds the bandwidth-delay product of 10 Gbit/s at 6 ms. On loopback 4 MiB and 16 MiB are as fast; more only adds memory per stalled
/// stream.
pub const STREAM_WINDOW: u32 = 8 << 20;

/// HTTP/2 flow-control window of a connection: 16 MiB, two streams' worth, so that one unread stream does not stop the others. 1 GiB from memory to memory
/// took 0.32 s with 8 and 32 MiB, and 0.34 with 16 (medians of 8 interleaved rounds that differ by more).
pub const CONNECTION_WINDOW: u32 = 16 << 20;

/// Largest HTTP/2 frame that a server accepts: 512 KiB, 32 times the default.
///
/// A frame is one system call at the sender and two or more at the receiver, each with its share of TCP's work and, where the peer
/// sleeps, a wake-up: on loopback, with checksums at both ends and 2 cores, 2.8 GiB/s at 64 KiB, 3.2 at 256 KiB, 3.6 at 512 KiB, and 3.6 at 1 and 2 MiB
/// (raw TCP in writes of 64 KiB, 256 KiB and 1 MiB: 2.7, 3.1 and 4.2). A connection that is in the middle of a frame has a buffer of its size, and an
/// urgent frame waits for at most one: 4 ms at 1 Gbit/s.
pub const FRAME_SIZE: u32 = 512 << 10;

/// Largest HTTP/2 frame that a client accepts: 16 KiB, the least that there may be. What is large goes from clients to servers, and of a header block h2 keeps the buffer that it was read into,
/// which is as large as frames make it: so a hundred headers of a server that means harm keep some 3 MiB for each connection, and not a hundred.
pub const ANSWER_FRAME_SIZE: u32 = 16 << 10;

/// A silent connection is probed with an HTTP/2 ping this often: with [`KEEPALIVE_TIMEOUT`], a peer that is gone is noticed after 40 s at most, and a node with
/// 1000 idle connections answers some 30 pings a second. Streams notice sooner, by heartbeats of their own.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);

/// A connection on which a ping stays unanswered for this long is closed; its streams fail. An answer waits behind the frame that is being sent, so a link has to carry
/// [`FRAME_SIZE`] in this time: 51 KiB/s.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for a TCP connection, including TLS: TCP sends its first segment again after 1 and 3 s, so two of three may be lost.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// `endpoint` with the settings of this module, and without Nagle's delay.
///
/// Pings go out on an idle connection too, so that a dead peer is noticed while nothing moves.
#[cfg(feature = "channel")]
#[must_use]
pub fn tune_endpoint(endpoint: tonic::transport::Endpoint) -> tonic::transport::Endpoint {
    endpoint
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(ANSWER_FRAME_SIZE)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
}

/// A tuned endpoint for `address`: `host:port`, or a whole URI (`http://host:port`). Nothing is connected yet.
///
/// # Errors
///
/// `INVALID_FIELD` if it is neither.
#[cfg(feature = "channel")]
pub fn endpoint(address: &str) -> Result<tonic::transport::Endpoint, crate::Error> {
    use crate::error::{CommonReason, Error};
    use crate::text::printable;

    let refuse = |why: &str| {
        let shown = printable(address, 256);
        Error::new(
            CommonReason::InvalidField,
            format!("\"{shown}\" is not an address ({why}); write host:port or http://host:port"),
        )
        .violation("address", why)
    };
    let uri = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let endpoint = tonic::transport::Endpoint::from_shared(uri).map_err(|_| refuse("it is not a URI"))?;
    let parsed = endpoint.uri();
    if !matches!(parsed.scheme_str(), Some("http" | "https")) {
        return Err(refuse("its scheme is neither http nor https"));
    }
    if parsed.host().is_none_or(str::is_empty) {
        return Err(refuse("it has no host"));
    }
    if parsed.port_u16().is_none_or(|port| port == 0) {
        return Err(refuse("it has no port"));
    }
    if !matches!(parsed.path(), "" | "/") || parsed.query().is_some() {
        return Err(refuse("something follows the port"));
    }
    Ok(tune_endpoint(endpoint))
}

/// All that a server for bulk data needs: one that is tuned, and the connections that come to `address`, within the default limits, for its
/// `serve_with_incoming`. [`tune_server`], [`listen`] and [`incoming`] in one; where the system chooses the port, `incoming.get_ref().local_addr()` tells it. Must be
/// called within a Tokio runtime.
///
/// ```no_run
/// # async fn example(service: tonic::service::Routes) -> Result<(), Box<dyn std::error::Error>> {
/// let (mut server, incoming) = proto_common::tuning::server(([127, 0, 0, 1], 7101).into())?;
/// server.add_routes(service).serve_with_incoming(incoming).await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// Those of the system, such as an address that is in use.
#[cfg(feature = "listen")]
pub fn server(
    address: std::net::SocketAddr,
) -> std::io::Result<(tonic::transport::Server, Limited<tonic::transport::server::TcpIncoming>)> {
    Ok((tune_server(tonic::transport::Server::builder()), incoming(listen(address)?)))
}

/// `server` with the settings of this module, and without Nagle's delay where it opens the listener itself
/// (`serve`, `serve_with_shutdown`); a listener of your own goes through [`incoming`].
#[cfg(feature = "listen")]
#[must_use]
pub fn tune_server<L>(server: tonic::transport::Server<L>) -> tonic::transport::Server<L> {
    tune_server_within(server, &ConnectionLimits::default())
}

/// [`tune_server`], with other limits than the default ones.
///
/// What `limits` say of a connection once it is open. h2 bounds the rest by itself: frames of one header block that goes on and on
/// (CVE-2024-27316); pings and settings, which it answers from a bounded queue and stops reading until that is sent; and frames of little data that nobody has
/// read, since 0.4.20 by half of [`CONNECTION_WINDOW`].
#[cfg(feature = "listen")]
#[must_use]
pub fn tune_server_within<L>(
    server: tonic::transport::Server<L>,
    limits: &ConnectionLimits,
) -> tonic::transport::Server<L> {
    server
        .max_concurrent_streams(limits.streams_per_connection)
        .http2_max_header_list_size(limits.header_bytes)
        .http2_max_pending_accept_reset_streams(Some(limits.pending_resets))
        .http2_max_local_error_reset_streams(Some(limits.error_resets))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_SIZE)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .tcp_nodelay(true)
}

/// The connections of `listener` for `serve_with_incoming`, without Nagle's delay, within the default [`ConnectionLimits`].
///
/// The server's own setting does not reach a listener that it did not open, and with Nagle's algorithm a small answer waits
/// for the peer's delayed acknowledgement of the one before: 40 ms on Linux.
///
/// Where many peers may come at once, [`listen`] makes the listener.
#[cfg(feature = "listen")]
#[must_use]
pub fn incoming(
    listener: impl Into<tonic::transport::server::TcpIncoming>,
) -> Limited<tonic::transport::server::TcpIncoming> {
    incoming_within(listener, ConnectionLimits::default())
}

/// [`incoming`], within other limits.
#[cfg(feature = "listen")]
#[must_use]
pub fn incoming_within(
    listener: impl Into<tonic::transport::server::TcpIncoming>,
    limits: ConnectionLimits,
) -> Limited<tonic::transport::server::TcpIncoming> {
    Limited::new(listener.into().with_nodelay(Some(true)), limits)
}

/// Connections that may wait to be accepted, as far as the system allows (`net.core.somaxconn` of Linux: 4096).
///
/// One that finds no room comes again after a second, which is TCP's first pause: of 200 that came at once, 30 did with the 128 of
/// [`TcpListener::bind`](tokio::net::TcpListener::bind).
#[cfg(feature = "listen")]
const BACKLOG: u32 = 1024;

/// A listener at `address` with room for 1024 connections that wait to be accepted. Must be called within a Tokio runtime.
///
/// # Errors
///
/// Those of the system, such as an address that is in use.
#[cfg(feature = "listen")]
pub fn listen(address: std::net::SocketAddr) -> std::io::Result<tokio::net::TcpListener> {
    use tokio::net::TcpSocket;
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // As `TcpListener::bind` does: a restart finds its address free although connections of before are still being closed.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

#[cfg(all(test, feature = "channel"))]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (address, uri) in [
            ("127.0.0.1:7101", "http://127.0.0.1:7101/"),
            ("[::1]:7101", "http://[::1]:7101/"),
            ("http://node-1.example:80", "http://node-1.example:80/"),
            ("https://n1:443/", "https://n1:443/"),
        ] {
            let endpoint = endpoint(address).unwrap();
            assert_eq!(endpoint.uri().to_string(), uri);
            assert!(endpoint.get_tcp_nodelay());
        }
        for address in
            ["", "n1", "n1:", "n1:x", "n1:70000", "n1:0", "ftp://n1:21", "n1:1/x", "a b:1", "\x1b:1", ":1"]
        {
            let error = endpoint(address).expect_err(address);
            assert_eq!(error.reason(), "INVALID_FIELD", "{address}");
        }
    }
}
