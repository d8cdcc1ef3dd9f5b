//! The frames that a client sends, followed so that none keeps more alive than itself.
//!
//! h2 reads frames into one buffer after the other, and what it keeps of a header block, in the request and in the table of HPACK, are slices of the buffer that
//! the block was read into. A frame for which that has no room makes it grow, to twice its size where that is more, and behind the frame there is room for
//! others: a client that sends a few frames, each twice as long as the one before, and then a header block of a hundred bytes, makes a hundred bytes keep a
//! mebibyte, for each stream, and for each of the hundred entries that the table has room for. So a long frame is the last one in its buffer: what is left of
//! that is filled up with a frame of a type that nobody knows, which h2 skips (RFC 9113, 4.1), and then it begins with a new one.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};

use crate::refusals;

/// What every HTTP/2 client sends first (RFC 9113, 3.4).
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Length (3 bytes), type, flags, stream (RFC 9113, 4.1).
const HEAD: usize = 9;
const HEADERS: u8 = 1;
const PUSH_PROMISE: u8 = 5;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// A type that is in no registry of HTTP/2's, for experiments.
const UNKNOWN: u8 = 0xfa;

/// Frames that may share their buffer, in bytes: h2 begins with one of this size, which those of up to this size make no larger than twice that. With
/// a long frame at its end it is at most that much larger than the frame.
const SHORT: usize = 8 << 10;

/// What there is behind a long frame, at most.
const LARGEST_FILLING: usize = 2 * SHORT;

/// Follows the frames that come on one connection.
#[derive(Debug)]
pub(super) struct Frames {
    /// Bytes of the preface that have come; what follows another one is not looked at.
    preface: usize,
    is_http2: bool,
    head: [u8; HEAD],
    /// Bytes that have come of it.
    len: usize,
    /// Bytes of the frame that are still to come behind the head.
    rest: usize,
    /// Whether the frame is longer than [`SHORT`].
    long: bool,
    /// Whether only `CONTINUATION` may follow.
    in_block: bool,
    /// Longest frame of a header block.
    header_frame: usize,
}

impl Frames {
    /// For headers of `header_bytes`, as HTTP/2 counts them, which is more than they have in a frame. What is a little too large is for h2 to refuse; a frame
    /// of twice the size is not read.
    pub(super) fn new(header_bytes: u32) -> Self {
        let header_frame = usize::try_from(header_bytes).unwrap_or(usize::MAX).saturating_mul(2);
        Self {
            preface: 0,
            is_http2: true,
            head: [0; HEAD],
            len: 0,
            rest: 0,
            long: false,
            in_block: false,
            header_frame,
        }
    }

    /// Whether all of the preface has come.
    fn has_begun(&self) -> bool {
        self.preface == PREFACE.len()
    }

    /// Reads from `io` as that does, and fills up `buf` behind the end of a long frame.
    ///
    /// # Errors
    ///
    /// Those of `io`; `InvalidData` for a frame of a header block that is too long.
    pub(super) fn poll_read<IO: AsyncRead>(
        &mut self,
        io: Pin<&mut IO>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Only of a frame that was begun by an earlier read. One that comes in one read made no buffer grow.
        if !(self.is_http2 && self.long && self.rest > 0 && self.rest < buf.remaining()) {
            let before = buf.filled().len();
            ready!(io.poll_read(cx, buf))?;
            let looked_at = self.came(buf.filled().get(before..).unwrap_or_default());
            if looked_at.is_err() {
                buf.set_filled(before);
            }
            return Poll::Ready(looked_at);
        }
        let before = buf.filled().len();
        // Does not fill with zeros what is read into, unlike a buffer that is made of a part of this one.
        ready!(pin!(io.take(u64::try_from(self.rest).unwrap_or(u64::MAX))).poll_read(cx, buf))?;
        let came = buf.filled().len() - before;
        self.rest -= came;
        if self.rest == 0 && !self.in_block && buf.remaining() >= HEAD {
            let payload = (buf.remaining() - HEAD).min(LARGEST_FILLING);
            let [_, len @ ..] = u32::try_from(payload).unwrap_or_default().to_be_bytes();
            buf.put_slice(&len);
            buf.put_slice(&[UNKNOWN, 0, 0, 0, 0, 0]);
            buf.initialize_unfilled_to(payload).fill(0);
            buf.advance(payload);
        }
        Poll::Ready(Ok(()))
    }

    fn came(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() && self.is_http2 {
            let now;
            if !self.has_begun() {
                let wanted = PREFACE.get(self.preface..).unwrap_or_default();
                (now, bytes) = bytes.split_at(wanted.len().min(bytes.len()));
                self.is_http2 = wanted.starts_with(now);
                self.preface += now.len();
            } else if self.rest > 0 {
                (now, bytes) = bytes.split_at(self.rest.min(bytes.len()));
                self.rest -= now.len();
            } else {
                (now, bytes) = bytes.split_at((HEAD - self.len).min(bytes.len()));
                self.head[self.len..self.len + now.len()].copy_from_slice(now);
                self.len += now.len();
                if self.len == HEAD {
                    self.begun()?;
                }
            }
        }
        Ok(())
    }

    /// The head of a frame is there.
    fn begun(&mut self) -> io::Result<()> {
        let [a, b, c, kind, flags, ..] = self.head;
        self.len = 0;
        self.rest = [a, b, c].iter().fold(0, |len, byte| len << 8 | usize::from(*byte));
        self.long = HEAD + self.rest > SHORT;
        if matches!(kind, HEADERS | PUSH_PROMISE | CONTINUATION) {
            self.in_block = flags & END_HEADERS == 0;
            if self.rest > self.header_frame {
                refusals::count("ENHANCE_YOUR_CALM");
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a header frame is too long"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use bytes::{Bytes, BytesMut};
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt as _;
    use tokio_stream::StreamExt as _;
    use tokio_util::codec::{FramedRead, LengthDelimitedCodec};

    use super::*;

    const KIB: usize = 1 << 10;

    struct Followed<IO>(IO, Frames);

    impl<IO: AsyncRead + Unpin> AsyncRead for Followed<IO> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let Self(io, frames) = &mut *self;
            frames.poll_read(Pin::new(io), cx, buf)
        }
    }

    fn frame(kind: u8, flags: u8, len: usize) -> Vec<u8> {
        let head = u32::try_from(len).unwrap().to_be_bytes();
        [&head[1..], &[kind, flags, 0, 0, 0, 1], &vec![kind; len]].concat()
    }

    /// As h2 reads them.
    async fn read(io: impl AsyncRead + Unpin) -> Vec<BytesMut> {
        let codec = LengthDelimitedCodec::builder()
            .length_field_length(3)
            .length_adjustment(9)
            .num_skip(0)
            .max_frame_length(512 * KIB)
            .new_codec();
        let mut read = FramedRead::new(io, codec);
        let mut kept = Vec::new();
        while let Some(frame) = read.next().await {
            let frame = frame.unwrap();
            if frame[3] == HEADERS {
                kept.push(frame);
            }
        }
        kept
    }

    /// Those of `kept` that keep more than `bytes`.
    fn keep_more(kept: Vec<BytesMut>, bytes: usize) -> usize {
        kept.into_iter().filter_map(|mut frame| frame.try_reclaim(bytes).then_some(())).count()
    }

    #[tokio::test]
    async fn a_header_block_does_not_keep_the_frames_before_it() {
        let mut sent = Vec::new();
        for _ in 0..8 {
            for kib in [20, 9, 17, 33, 65, 129, 257, 500] {
                sent.extend(frame(UNKNOWN, 0, kib * KIB));
            }
            sent.extend(frame(HEADERS, END_HEADERS, 50));
        }
        let kept = read(Cursor::new(sent.clone())).await;
        assert_eq!(kept.len(), 8);
        assert_eq!(keep_more(kept, 400 * KIB), 8, "what would be kept");
        let followed = Followed(Cursor::new([PREFACE, &*sent].concat()), Frames::new(16 << 10));
        let mut followed = Box::pin(followed);
        followed.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
        let kept = read(followed).await;
        assert_eq!(kept.len(), 8);
        assert_eq!(keep_more(kept, 2 * SHORT + 1), 0);
    }

    #[tokio::test]
    async fn a_header_frame_that_is_far_too_long_is_not_read() {
        for (len, is_read) in [(2048, true), (2049, false)] {
            let sent = [PREFACE, &*frame(HEADERS, END_HEADERS, len)].concat();
            let mut followed = Followed(Cursor::new(sent), Frames::new(1024));
            let read = followed.read_to_end(&mut Vec::new()).await;
            assert_eq!(read.is_ok(), is_read, "{read:?}");
        }
    }

    #[tokio::test]
    async fn what_is_no_http2_is_as_it_came() {
        for other in [&b"PRI * HTTP/1"[..], b"GET / HTTP/1.1", &[0x16; 30]] {
            let sent = [other, &frame(HEADERS, 0, 100 * KIB)].concat();
            let mut read = Vec::new();
            let mut followed = Followed(Cursor::new(sent.clone()), Frames::new(1));
            followed.read_to_end(&mut read).await.unwrap();
            assert!(read == sent);
        }
    }

    /// Gives as many bytes at once as the lengths say.
    struct Pieces<I>(Cursor<Vec<u8>>, I);

    impl<I: Iterator<Item = usize> + Unpin> AsyncRead for Pieces<I> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let mut piece = vec![0; self.1.next().unwrap().min(buf.remaining())];
            let mut part = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut self.0).poll_read(cx, &mut part))?;
            buf.put_slice(part.filled());
            Poll::Ready(Ok(()))
        }
    }

    /// The frames in `bytes` but those that fill up.
    fn without_filling(mut bytes: Bytes) -> Vec<Bytes> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let len = bytes[..3].iter().fold(0, |len, byte| len << 8 | usize::from(*byte));
            let frame = bytes.split_to(HEAD + len);
            if frame[3] != UNKNOWN {
                frames.push(frame);
            }
        }
        frames
    }

    proptest! {
        #[test]
        fn all_comes_as_it_was_sent_however_it_is_cut(
            frames in prop::collection::vec((0_u8..10, 0_u8..8, prop_oneof![0..40_usize, 7000..40_000_usize]), 1..12),
            pieces in prop::collection::vec(prop_oneof![1..100_usize, 1..30_000_usize], 1..10),
        ) {
            let sent: Vec<_> = frames.iter().map(|(kind, flags, len)| frame(*kind, *flags, *len)).collect();
            let io = Pieces(Cursor::new([PREFACE, &*sent.concat()].concat()), pieces.into_iter().cycle());
            let mut followed = Followed(io, Frames::new(1 << 20));
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let mut read = Vec::new();
            runtime.block_on(followed.read_to_end(&mut read)).unwrap();
            prop_assert_eq!(&read[..PREFACE.len()], PREFACE);
            let read = without_filling(Bytes::from(read).slice(PREFACE.len()..));
            prop_assert!(read == sent);
        }
    }
}
