//! The frames that a client sends, followed so that none keeps more alive than itself.
//!
//! h2 reads frames into one buffer after the other, and what it keeps of a header block, in the request and in the table of HPACK, are slices of the buffer that
//! the block was read into. A frame for which that has no room makes it grow, to twice its size where that is more, and behind the frame there is room for
//! others: a client that sends a few frames, each twice as long as the one before, and then a header block of a hundred bytes, makes a hundred bytes keep a
//! mebibyte, for each stream, and for each of the hundred entries that the table has room for. So a long frame, or a header block that has one, is the last in
//! its buffer: what is left of that is filled up with frames of a type that nobody knows, which h2 skips (RFC 9113, 4.1). It asks for room for the next frame
//! while the last of these is still there, so it gets a new buffer.
//!
//! Where only a part of a head fits, that is what there is, and h2 asks for room for the rest of it. By then nothing else may be in the buffer, and it is used
//! again: so what follows is the rest of that head, and once more frames that fill it up.
//!
//! Each `HEADERS` is a call, since a client of gRPC sends no trailers; no other frame begins one. Every other frame but one with data enough takes some work as well, for nothing. Where a
//! peer has sent too many of either, what follows the head of that frame, without which it is nothing to h2, waits here, and all else in the socket.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::rates::{Kind, Rates};
use crate::refusals;

/// What every HTTP/2 client sends first (RFC 9113, 3.4).
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Length (3 bytes), type, flags, stream (RFC 9113, 4.1).
const HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PUSH_PROMISE: u8 = 5;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// A type that is in no registry of HTTP/2's, for experiments.
const UNKNOWN: u8 = 0xfa;

/// Frames that may share their buffer, in bytes: h2 begins with one of this size, which those of up to this size make no larger than twice that. With
/// a long frame at its end it is at most that much larger than the frame.
const SHORT: usize = 8 << 10;

/// `DATA` of so many bytes pays for a frame without: the one with the message's other fields, where each is one of its own.
const WORTH_A_FRAME: usize = 4 << 10;

/// Longest payload of a frame that fills up: what every HTTP/2 endpoint takes (RFC 9113, 4.2).
const FILLING: usize = 16 << 10;

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
    /// Whether the frame, or one before it in the same block, is longer than [`SHORT`].
    long: bool,
    /// Whether only `CONTINUATION` may follow.
    in_block: bool,
    /// Longest frame of a header block.
    header_frame: usize,
    /// Bytes that are left of the head of a frame that fills up.
    owed: usize,
    rates: Arc<Rates>,
    /// Frames for which tokens were taken, and that have not come yet.
    paid: u32,
    /// Until it is the turn of what has begun.
    hold: Option<(Kind, Pin<Box<Sleep>>)>,
    /// What was read behind the head of one that had to wait: less than there was room for in the buffer, which is no larger than 32 KiB where a head is read.
    held: Bytes,
}

impl Frames {
    /// For headers of `header_bytes`, as HTTP/2 counts them, which is more than they have in a frame. What is a little too large is for h2 to refuse; a frame
    /// of twice the size is not read. What comes takes tokens of `rates`.
    pub(super) fn new(header_bytes: u32, rates: Arc<Rates>) -> Self {
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
            owed: 0,
            rates,
            paid: 0,
            hold: None,
            held: Bytes::new(),
        }
    }

    /// Bytes of a frame that are still to come behind its head, beside those that are held; 0 between frames.
    pub(super) fn rest(&self) -> usize {
        if self.is_http2 { self.rest.saturating_sub(self.held.len()) } else { 0 }
    }

    /// Until when nothing is read because of what has to wait.
    pub(super) fn held_until(&self) -> Option<Instant> {
        self.hold.as_ref().map(|(_, hold)| hold.deadline())
    }

    /// Whether all of the preface has come.
    fn has_begun(&self) -> bool {
        self.preface == PREFACE.len()
    }

    /// Reads from `io` as that does, and fills up `buf` behind the end of a long frame. Nothing is read before it is the turn of the frame whose head was read last.
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
        if let Some((_, hold)) = &mut self.hold {
            ready!(hold.as_mut().poll(cx));
            self.hold = None;
        }
        if self.owed > 0 {
            self.fill(buf);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let end = self.end();
        match end.filter(|end| *end < buf.remaining()) {
            _ if !self.held.is_empty() => {
                let len = self.held.len().min(buf.remaining()).min(end.unwrap_or(usize::MAX));
                buf.put_slice(&self.held[..len]);
            }
            // Does not fill with zeros what is read into, unlike a buffer that is made of a part of this one.
            Some(end) => {
                ready!(pin!(io.take(u64::try_from(end).unwrap_or(u64::MAX))).poll_read(cx, buf))?;
            }
            None => ready!(io.poll_read(cx, buf))?,
        }
        let came = buf.filled().get(before..).unwrap_or_default();
        let looked_at = self.came(came);
        let passed = *looked_at.as_ref().unwrap_or(&0);
        if self.held.is_empty() {
            self.held = Bytes::copy_from_slice(came.get(passed..).unwrap_or_default());
        } else {
            self.held.advance(passed);
        }
        if self.held.is_empty() {
            // An empty part of what was held holds all of it.
            self.held = Bytes::new();
        }
        buf.set_filled(before + passed);
        if looked_at.is_ok() && end.is_some() && self.rest == 0 && self.len == 0 && !self.in_block {
            self.fill(buf);
        }
        Poll::Ready(looked_at.map(|_| ()))
    }

    /// Bytes until something ends behind which there may be nothing else in the buffer. Only of a frame that was begun by an earlier read: one that comes in one
    /// read made no buffer grow.
    fn end(&self) -> Option<usize> {
        match self.rest {
            _ if !self.is_http2 || !self.long => None,
            0 => self.in_block.then_some(HEAD - self.len),
            rest => Some(rest),
        }
    }

    /// Leaves no room in `buf`.
    fn fill(&mut self, buf: &mut ReadBuf<'_>) {
        let is_owed = self.owed > 0;
        self.owed = put_end(filling(0), self.owed, buf);
        while buf.remaining() >= HEAD {
            let room = buf.remaining() - HEAD;
            // Behind it there is nothing, or room for another head.
            let len = if room <= FILLING { room } else { FILLING.min(room - HEAD) };
            buf.put_slice(&filling(len));
            buf.initialize_unfilled_to(len);
            buf.advance(len);
        }
        // Once is enough: what is left then is that of a buffer that was made for the rest of a head, so it is small.
        if !is_owed && buf.remaining() > 0 {
            self.owed = put_end(filling(0), HEAD, buf);
        }
    }

    /// Looks at what came; how much of it may be passed on before something has to wait.
    fn came(&mut self, came: &[u8]) -> io::Result<usize> {
        let mut bytes = came;
        while !bytes.is_empty() && self.is_http2 && self.hold.is_none() {
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
        Ok(if self.is_http2 { came.len() - bytes.len() } else { came.len() })
    }

    /// The head of a frame is there.
    fn begun(&mut self) -> io::Result<()> {
        let [a, b, c, kind, flags, ..] = self.head;
        self.len = 0;
        self.rest = [a, b, c].iter().fold(0, |len, byte| len << 8 | usize::from(*byte));
        self.long = HEAD + self.rest > SHORT || (self.in_block && self.long);
        if matches!(kind, HEADERS | PUSH_PROMISE | CONTINUATION) {
            self.in_block = flags & END_HEADERS == 0;
            if self.rest > self.header_frame {
                refusals::count("ENHANCE_YOUR_CALM");
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a header frame is too long"));
            }
        }
        let takes = match kind {
            HEADERS => Kind::Call,
            DATA if self.rest >= WORTH_A_FRAME => {
                self.paid = self.rates.at_once(Kind::Frame).min(self.paid + 1);
                return Ok(());
            }
            _ if self.paid > 0 => {
                self.paid -= 1;
                return Ok(());
            }
            _ => Kind::Frame,
        };
        let (now, count) = (Instant::now(), self.rates.at_once(takes));
        let from = self.rates.of(takes).take(now, count);
        if takes == Kind::Frame {
            self.paid = count - 1;
        }
        if from > now {
            refusals::count(takes.reason());
            self.hold = Some((takes, Box::pin(sleep_until(from))));
        }
        Ok(())
    }
}

impl Drop for Frames {
    /// Whoever leaves before its turn takes no time of those that stay: else one that comes and leaves again and again would have its peer wait ever longer.
    fn drop(&mut self) {
        if let Some((kind, hold)) = &self.hold
            && hold.deadline() > Instant::now()
        {
            self.rates.of(*kind).give_back(1);
        }
        if self.paid > 0 {
            self.rates.of(Kind::Frame).give_back(self.paid);
        }
    }
}

/// The head of a frame that fills up with `len` bytes behind it.
fn filling(len: usize) -> [u8; HEAD] {
    let [_, a, b, c] = u32::try_from(len).unwrap_or_default().to_be_bytes();
    [a, b, c, UNKNOWN, 0, 0, 0, 0, 0]
}

/// Puts as much of the last `left` bytes of `head` into `buf` as there is room for, and returns how many are left then.
fn put_end(head: [u8; HEAD], left: usize, buf: &mut ReadBuf<'_>) -> usize {
    let end = &head[HEAD - left..];
    let (now, later) = end.split_at(end.len().min(buf.remaining()));
    buf.put_slice(now);
    later.len()
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::time::Duration;

    use bytes::{Bytes, BytesMut};
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt as _;
    use tokio_stream::StreamExt as _;
    use tokio_util::codec::{FramedRead, LengthDelimitedCodec};

    use super::*;
    use crate::limits::ConnectionLimits;

    const KIB: usize = 1 << 10;

    fn frames(header_bytes: u32) -> Frames {
        Frames::new(header_bytes, Arc::new(Rates::new(&ConnectionLimits::default())))
    }

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

    /// The header blocks in `sent`, as h2 reads them, and whether they are `followed`.
    async fn kept(sent: &[u8], followed: bool) -> Vec<BytesMut> {
        if !followed {
            return read(Cursor::new(sent.to_vec())).await;
        }
        let followed = Followed(Cursor::new([PREFACE, sent].concat()), frames(1 << 20));
        let mut followed = Box::pin(followed);
        followed.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
        read(followed).await
    }

    /// What a header block may keep: frames of up to [`SHORT`] share a buffer of twice that, and one of them may double it.
    const MOST: usize = 4 * SHORT;

    #[tokio::test]
    async fn a_header_block_does_not_keep_the_frames_before_it() {
        let before = [20, 9, 17, 33, 65, 129, 257, 500].map(|kib| frame(UNKNOWN, 0, kib * KIB)).concat();
        let sent = [before, frame(HEADERS, END_HEADERS, 50)].concat().repeat(8);
        let without = kept(&sent, false).await;
        assert_eq!((without.len(), keep_more(without, 400 * KIB)), (8, 8), "what would be kept");
        let with = kept(&sent, true).await;
        assert_eq!((with.len(), keep_more(with, 2 * SHORT + 1)), (8, 0));
    }

    /// Each long frame makes a buffer twice as large as it was, but for so many bytes, and a short one behind it has it used again.
    #[tokio::test]
    async fn no_room_is_too_small_to_be_filled() {
        for room in 0..2 * HEAD {
            let grown = (14..20).flat_map(|power| {
                let short = frame(UNKNOWN, 0, 100);
                let long = frame(UNKNOWN, 0, (1 << power) - room - short.len() - HEAD);
                [short, long].concat()
            });
            let sent = grown.chain(frame(HEADERS, END_HEADERS, 50)).collect::<Vec<_>>();
            // Where not even a length fits, there is a new buffer.
            let without = keep_more(kept(&sent, false).await, 400 * KIB);
            assert_eq!(without, usize::from(room >= 3), "what would be kept: {room}");
            let with = kept(&sent, true).await;
            assert_eq!((with.len(), keep_more(with, MOST + 1)), (1, 0), "{room}");
        }
    }

    /// As the codec of h2 asks for room, whatever is kept of the frames before.
    #[test]
    fn all_room_is_filled_with_frames() {
        for room in (0..100).chain(FILLING..FILLING + 30).chain(2 * FILLING..2 * FILLING + 30) {
            let mut frames = frames(1 << 20);
            let mut memory = vec![1; room];
            let mut buf = ReadBuf::new(&mut memory);
            frames.fill(&mut buf);
            assert_eq!(buf.remaining(), 0, "{room}");
            let mut all = buf.filled().to_vec();
            while frames.owed > 0 {
                let mut memory = [1; 3 * HEAD];
                let mut buf = ReadBuf::new(&mut memory);
                frames.fill(&mut buf);
                assert_eq!(buf.remaining(), 0, "{room}");
                all.extend_from_slice(buf.filled());
            }
            assert!(without_filling(all.into()).is_empty(), "{room}");
        }
    }

    #[tokio::test]
    async fn a_header_frame_that_is_far_too_long_is_not_read() {
        for (len, is_read) in [(2048, true), (2049, false)] {
            let sent = [PREFACE, &*frame(HEADERS, END_HEADERS, len)].concat();
            let mut followed = Followed(Cursor::new(sent), frames(1024));
            let read = followed.read_to_end(&mut Vec::new()).await;
            assert_eq!(read.is_ok(), is_read, "{read:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn frames_that_wait_come_several_at_once() {
        const BURST: u32 = 4096;
        let limits = ConnectionLimits {
            frames_per_peer: 1000,
            frames_burst_per_peer: BURST,
            ..ConnectionLimits::default()
        };
        let rates = Arc::new(Rates::new(&limits));
        let ping = frame(6, 0, 8);
        let sent = [PREFACE, &*ping.repeat(BURST as usize + 9)].concat();
        let mut followed = Followed(Cursor::new(sent), Frames::new(1 << 20, Arc::clone(&rates)));
        let began = Instant::now();
        followed.read_exact(&mut vec![0; PREFACE.len() + ping.len() * BURST as usize]).await.unwrap();
        assert_eq!(began.elapsed().as_millis(), 0);
        for millis in [4, 4, 4, 4, 8, 8, 8, 8, 12] {
            followed.read_exact(&mut vec![0; ping.len()]).await.unwrap();
            assert_eq!(began.elapsed().as_millis(), millis);
        }
        // Of the last four, three are for the next one.
        let taken = rates.full() - began;
        drop(followed);
        assert_eq!(taken - (rates.full() - began), Duration::from_millis(3));
    }

    #[tokio::test]
    async fn what_is_no_http2_is_as_it_came() {
        for other in [&b"PRI * HTTP/1"[..], b"GET / HTTP/1.1", &[0x16; 30]] {
            let sent = [other, &frame(HEADERS, 0, 100 * KIB)].concat();
            let mut read = Vec::new();
            let mut followed = Followed(Cursor::new(sent.clone()), frames(1));
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

    /// Its clock goes on when nothing else does.
    fn paused() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
    }

    /// Frames of some kind, each about twice as long as the one before, and short ones between.
    fn growing() -> impl Strategy<Value = Vec<u8>> {
        let one = |power: u32| {
            let near = prop_oneof![-40..40_isize, -(1_isize << power) / 4..(1_isize << power) / 4];
            let short = prop::collection::vec(prop_oneof![0..100_usize, 1000..9000_usize], 0..3);
            (any::<bool>(), near, 0..20_usize, short).prop_map(move |(is_block, near, end, short)| {
                let len = (1_usize << power).saturating_add_signed(near);
                let long = match is_block {
                    true => [frame(PUSH_PROMISE, 0, len), frame(CONTINUATION, END_HEADERS, end)].concat(),
                    false => frame(UNKNOWN, 0, len),
                };
                short.into_iter().flat_map(|len| frame(UNKNOWN, 0, len)).chain(long).collect()
            })
        };
        (13..19).map(one).collect::<Vec<_>>().prop_map(|frames: Vec<Vec<u8>>| frames.concat())
    }

    proptest! {
        #[test]
        fn a_header_block_keeps_little_whatever_came_before_it(before in growing()) {
            let sent = [before, frame(HEADERS, END_HEADERS, 50)].concat();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let with = runtime.block_on(kept(&sent, true));
            prop_assert_eq!((with.len(), keep_more(with, MOST + 1)), (1, 0));
        }

        #[test]
        fn all_comes_as_it_was_sent_however_it_is_cut(
            frames in prop::collection::vec((0_u8..10, 0_u8..8, prop_oneof![0..40_usize, 7000..40_000_usize]), 1..12),
            pieces in prop::collection::vec(prop_oneof![1..100_usize, 1..30_000_usize], 1..10),
            calls_burst_per_peer in 0..4_u32,
            frames_burst_per_peer in 0..4_u32,
        ) {
            let sent: Vec<_> = frames.iter().map(|(kind, flags, len)| frame(*kind, *flags, *len)).collect();
            let io = Pieces(Cursor::new([PREFACE, &*sent.concat()].concat()), pieces.into_iter().cycle());
            let mut read = Vec::new();
            let took = paused().block_on(async {
                let limits = ConnectionLimits {
                    calls_per_peer: 10,
                    calls_burst_per_peer,
                    frames_per_peer: 5,
                    frames_burst_per_peer,
                    ..ConnectionLimits::default()
                };
                let mut followed = Followed(io, Frames::new(1 << 20, Arc::new(Rates::new(&limits))));
                let began = Instant::now();
                followed.read_to_end(&mut read).await.unwrap();
                began.elapsed().as_millis()
            });
            prop_assert_eq!(&read[..PREFACE.len()], PREFACE);
            let read = without_filling(Bytes::from(read).slice(PREFACE.len()..));
            prop_assert!(read == sent);
            let mut now = 0;
            let (mut calls, mut others) =
                (Level::full(100, calls_burst_per_peer), Level::full(200, frames_burst_per_peer));
            let mut paid = false;
            for (kind, _, len) in frames {
                match kind {
                    HEADERS => now = calls.take(now),
                    DATA if len >= WORTH_A_FRAME => paid = true,
                    _ if paid => paid = false,
                    _ => now = others.take(now),
                }
            }
            prop_assert_eq!(took, u128::from(now.unsigned_abs()));
        }
    }

    /// A bucket, by what is in it: as many milliseconds as it takes to come.
    struct Level {
        each: i64,
        most: i64,
        level: i64,
        at: i64,
    }

    impl Level {
        fn full(each: i64, burst: u32) -> Self {
            let most = each * i64::from(burst);
            Self { each, most, level: most, at: 0 }
        }

        fn add(&mut self, more: i64) {
            self.level = self.most.min(self.level + more);
        }

        /// When it is there.
        fn take(&mut self, now: i64) -> i64 {
            self.add(now - self.at);
            self.at = now;
            self.level -= self.each;
            now + 0.max(-self.level)
        }
    }
}
