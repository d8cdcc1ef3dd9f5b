//! An async stream of unknown length as a source.

use std::future::Future;
use std::io;
use std::pin::Pin;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt as _};
use proto_common::path::FileName;

use crate::spec::ManifestFile;

use super::{Description, PieceStream, SnapshotSource, SourceError};

/// Opens a stream of bytes. Implemented for closures `|offset: u64| async { Ok(stream) }`.
pub trait OpenStream: Send + Sync + 'static {
    /// The bytes from `offset` to the end, in pieces of any length.
    fn open(
        &self,
        offset: u64,
    ) -> impl Future<Output = io::Result<BoxStream<'static, io::Result<Bytes>>>> + Send;
}

impl<F, Fut, S> OpenStream for F
where
    F: Fn(u64) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = io::Result<S>> + Send,
    S: Stream<Item = io::Result<Bytes>> + Send + 'static,
{
    async fn open(&self, offset: u64) -> io::Result<BoxStream<'static, io::Result<Bytes>>> {
        Ok(self(offset).await?.boxed())
    }
}

/// A snapshot of one file that is generated while it is sent: its size is not known before the end.
///
/// ```
/// # async fn doc() -> Result<(), Box<dyn std::error::Error>> {
/// use bytes::Bytes;
/// use futures::stream;
/// use proto_common::path::FileName;
/// use proto_snapshot::source::StreamSource;
///
/// let dump = StreamSource::new(FileName::new("dump")?, "generation-17", |_offset| async {
///     Ok(stream::iter([Ok(Bytes::from("one")), Ok(Bytes::from("two"))]))
/// });
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct StreamSource<O> {
    name: FileName,
    content_version: String,
    seekable: bool,
    open: O,
}

impl<O: OpenStream> StreamSource<O> {
    /// A stream that `open` opens, as the file `name`. Two streams under the same `content_version` (at most
    /// [`MAX_CONTENT_VERSION`](crate::spec::MAX_CONTENT_VERSION) bytes) have the same bytes, if they can seek. It is opened at offset 0 only.
    pub fn new(name: FileName, content_version: impl Into<String>, open: O) -> Self {
        Self { name, content_version: content_version.into(), seekable: false, open }
    }

    /// Says that `open` works at any offset and gives the same bytes each time, so that a transfer that broke off
    /// goes on where it was.
    #[must_use]
    pub fn seekable(self) -> Self {
        Self { seekable: true, ..self }
    }
}

impl<O: OpenStream> SnapshotSource for StreamSource<O> {
    /// Digests are never computed: the bytes exist only while they are sent.
    async fn describe(&self, _digests: bool) -> Result<Description, SourceError> {
        let file = ManifestFile { name: self.name.clone(), size: None, blake3: None };
        Ok(Description { files: vec![file], content_version: self.content_version.clone() })
    }

    /// Nothing is read ahead: the stream is polled when a piece is asked for.
    async fn open(
        &self,
        file: u32,
        offset: u64,
        len: Option<u64>,
        piece: usize,
    ) -> Result<PieceStream, SourceError> {
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why);
        let opened = if file != 0 {
            Err(invalid("there is one file"))
        } else if offset != 0 && !self.seekable {
            Err(invalid("it cannot seek"))
        } else {
            self.open.open(offset).await
        };
        let name = self.name.to_string();
        let inner = opened.map_err(|source| SourceError::Io { name: name.clone(), source })?;
        let pieces = Pieces {
            inner,
            buffer: BytesMut::new(),
            rest: Bytes::new(),
            left: len,
            piece: piece.max(1),
            name,
        };
        let pieces = stream::try_unfold(pieces, |mut pieces| async move {
            Ok(pieces.next().await?.map(|piece| (piece, pieces)))
        });
        Ok(Box::pin(pieces))
    }

    fn can_seek(&self) -> bool {
        self.seekable
    }
}

/// Cuts a stream into pieces of one length.
struct Pieces {
    inner: Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>,
    /// A piece in the making, from several items.
    buffer: BytesMut,
    /// What is left of the last item.
    rest: Bytes,
    /// How many bytes are wanted still; `None`: all.
    left: Option<u64>,
    piece: usize,
    name: String,
}

impl Pieces {
    /// The next piece; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        let left = self.left.map_or(usize::MAX, |left| usize::try_from(left).unwrap_or(usize::MAX));
        let want = self.piece.min(left);
        if want == 0 {
            return Ok(None);
        }
        loop {
            let missing = want - self.buffer.len();
            if self.buffer.is_empty() && self.rest.len() >= want {
                // The usual case of large items: nothing is copied.
                let piece = self.rest.split_to(want);
                return Ok(Some(self.count(piece)));
            }
            let taken = self.rest.split_to(missing.min(self.rest.len()));
            if self.buffer.capacity() == 0 {
                self.buffer.reserve(want);
            }
            self.buffer.extend_from_slice(&taken);
            if self.buffer.len() == want {
                let piece = std::mem::take(&mut self.buffer).freeze();
                return Ok(Some(self.count(piece)));
            }
            match self.inner.next().await {
                Some(Ok(item)) => self.rest = item,
                Some(Err(source)) => return Err(SourceError::Io { name: self.name.clone(), source }),
                None => return self.end(),
            }
        }
    }

    fn end(&mut self) -> Result<Option<Bytes>, SourceError> {
        let piece = std::mem::take(&mut self.buffer).freeze();
        match self.left {
            Some(left) => Err(SourceError::Changed {
                name: self.name.clone(),
                what: format!("it ended {left} bytes early"),
            }),
            None if piece.is_empty() => Ok(None),
            None => {
                self.left = Some(0);
                Ok(Some(piece))
            }
        }
    }

    fn count(&mut self, piece: Bytes) -> Bytes {
        let len = u64::try_from(piece.len()).unwrap_or(u64::MAX);
        self.left = self.left.map(|left| left.saturating_sub(len));
        piece
    }
}
