//! A small client of the Redis protocol: pipelined, one connection, no redirects by itself.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::BytesMut;
use redis_protocol::resp2::decode::decode_bytes_mut;
use redis_protocol::resp2::encode::extend_encode_borrowed;
use redis_protocol::resp2::types::{BorrowedFrame, BytesFrame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// One connection.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    input: BytesMut,
    output: BytesMut,
}

impl Client {
    /// Connects to `host:port`.
    ///
    /// # Errors
    ///
    /// Nobody listens there.
    pub async fn connect(address: &str) -> anyhow::Result<Self> {
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
            .await
            .with_context(|| format!("no connection to {address}"))?
            .with_context(|| format!("no connection to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, input: BytesMut::new(), output: BytesMut::new() })
    }

    /// Adds a command to those that are sent next.
    ///
    /// # Errors
    ///
    /// It could not be encoded.
    pub fn push<A: AsRef<[u8]>>(&mut self, arguments: &[A]) -> anyhow::Result<()> {
        let arguments: Vec<_> =
            arguments.iter().map(|argument| BorrowedFrame::BulkString(argument.as_ref())).collect();
        extend_encode_borrowed(&mut self.output, &BorrowedFrame::Array(&arguments), false)
            .context("a command could not be encoded")?;
        Ok(())
    }

    /// Bytes that wait to be sent.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.output.len()
    }

    /// Sends what was pushed.
    ///
    /// # Errors
    ///
    /// The connection broke; what arrived is not known.
    pub async fn send(&mut self) -> anyhow::Result<()> {
        self.stream.write_all(&self.output).await?;
        self.output.clear();
        Ok(())
    }

    /// The next reply, in the order of the commands. An error that the server replies is a frame, not an error.
    ///
    /// # Errors
    ///
    /// The connection broke, or what came is no reply.
    pub async fn reply(&mut self) -> anyhow::Result<BytesFrame> {
        loop {
            if let Some((frame, _, _)) = decode_bytes_mut(&mut self.input).context("this is no reply")? {
                return Ok(frame);
            }
            self.input.reserve(64 << 10);
            if self.stream.read_buf(&mut self.input).await? == 0 {
                bail!("the server closed the connection");
            }
        }
    }

    /// Sends one command and waits for its reply.
    ///
    /// # Errors
    ///
    /// As [`Client::reply`]; an error that the server replies is a frame.
    pub async fn call<A: AsRef<[u8]>>(&mut self, arguments: &[A]) -> anyhow::Result<BytesFrame> {
        self.push(arguments)?;
        self.send().await?;
        self.reply().await
    }
}

/// The text of a frame that is one.
#[must_use]
pub fn text(frame: &BytesFrame) -> Option<&str> {
    match frame {
        BytesFrame::SimpleString(bytes) | BytesFrame::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        BytesFrame::Error(text) => Some(text),
        _ => None,
    }
}

/// The value of `name` in a flat list of names and values, as RESP2 has maps.
#[must_use]
pub fn field<'a>(frame: &'a BytesFrame, name: &str) -> Option<&'a BytesFrame> {
    let BytesFrame::Array(items) = frame else { return None };
    let (pairs, _) = items.as_chunks::<2>();
    pairs.iter().find(|[key, _]| text(key) == Some(name)).map(|[_, value]| value)
}
