//! From the data frames of an HTTP body to messages.

use std::marker::PhantomData;

use bytes::{Buf, BufMut as _, Bytes, BytesMut};
use prost::DecodeError;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};
use tonic::Status;

use super::payload::{Payload, Reader};
use super::{BulkMessage, PREFIX, payload_tag};

/// Data frames below this size are copied together: 16 KiB, the frame size that every peer may use.
///
/// It bounds the books: a peer that sends one byte per frame costs a buffer and an entry of 32 bytes for every 16 KiB, not for every byte. And it bounds
/// what a piece keeps alive: a small one would hold on to the whole buffer that the connection read it into, with the frames beside it.
/// 32,768 files of 8 KiB took 0.18 s from memory to memory with 4 KiB here, 0.16 with 16 KiB, 0.18 with 64 KiB.
const COPIED: usize = 16 << 10;

/// Bytes that a message may have outside of its payload: 1 MiB, what a page of a manifest has at most and more than the digests of all slots. What is decoded is
/// larger than it was on the wire, up to hundred times where it is made of thousands of empty messages, so it is not the limit of a message that bounds it.
const BESIDES: usize = 1 << 20;

/// What takes the place of a payload while prost decodes the rest of its message.
const TOKEN: u8 = 1;

/// Why there is no next message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BulkError {
    /// The next message is longer than is taken, or has more outside of its payload. Nothing of it was decoded.
    #[error("a message of {len} bytes is longer than {limit}")]
    TooLarge {
        /// Its length, as declared, or what of it is no payload.
        len: u64,
        /// The limit.
        limit: usize,
    },
    /// The next message is compressed, although the headers of the call name no encoding.
    #[error("a message is compressed, and the call names no encoding")]
    Compressed,
    /// The flag before the next message is none that gRPC knows.
    #[error("a message has the flag {0}; 0 and 1 are known")]
    Flag(u8),
    /// It is no message of its type.
    #[error("a message could not be decoded")]
    Malformed(#[source] DecodeError),
    /// The stream ended within a message, or broke.
    #[error("the stream broke")]
    Broken(#[source] Status),
}

/// A message, and its payload beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct Received<M> {
    /// The message with its payload taken out.
    pub message: M,
    /// The payload; empty if the message has none.
    pub payload: Payload,
}

/// Makes messages of the data frames of an HTTP body.
///
/// Holds at most one message and one data frame, if [`next_message`](Self::next_message) is called until it has none before more is pushed. What it makes of the bytes is
/// what prost makes of them, but that the payload is not copied, and that what is no payload has at most 1 MiB.
#[derive(Debug)]
pub struct Decoder<M> {
    frames: Reader,
    /// Small data frames, behind all others.
    small: BytesMut,
    /// Length of the message whose prefix was read.
    message: Option<usize>,
    limit: usize,
    scratch: Scratch,
    _message: PhantomData<fn() -> M>,
}

/// Where a message is put together without its payload, to be used again: small ones come by the thousand.
#[derive(Debug, Default)]
struct Scratch {
    message: BytesMut,
    frame: BytesMut,
}

/// A scratch that has grown beyond this is not kept: what a chunk has beside its payload is some 30 bytes, and a page of a manifest up to 1 MiB. 100,000 files of 4 KiB took as long
/// with 1 KiB.
const KEPT: usize = 16 << 10;

impl<M: BulkMessage> Decoder<M> {
    /// For messages of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            frames: Reader::default(),
            small: BytesMut::new(),
            message: None,
            limit,
            scratch: Scratch::default(),
            _message: PhantomData,
        }
    }

    /// Messages that have not begun yet have at most `limit` bytes each.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Takes a data frame.
    pub fn push(&mut self, data: Bytes) {
        if data.len() < COPIED {
            self.small.extend_from_slice(&data);
            if self.small.len() >= COPIED {
                self.gather();
            }
        } else {
            self.gather();
            self.frames.push(data);
        }
    }

    /// The next message, if all of it is there.
    ///
    /// # Errors
    ///
    /// After one, what follows in the stream has no meaning.
    pub fn next_message(&mut self) -> Result<Option<Received<M>>, BulkError> {
        let len = match self.message {
            Some(len) => len,
            None => {
                if self.buffered() < PREFIX {
                    return Ok(None);
                }
                self.gather();
                let flag = self.frames.get_u8();
                let declared = self.frames.get_u32();
                match flag {
                    0 => {}
                    1 => return Err(BulkError::Compressed),
                    flag => return Err(BulkError::Flag(flag)),
                }
                let len = usize::try_from(declared).ok().filter(|len| *len <= self.limit);
                let too_large = BulkError::TooLarge { len: declared.into(), limit: self.limit };
                *self.message.insert(len.ok_or(too_large)?)
            }
        };
        if self.buffered() < len {
            return Ok(None);
        }
        self.gather();
        self.message = None;
        let decoded = decode(self.frames.split_to(len), &mut self.scratch);
        if self.scratch.message.capacity().max(self.scratch.frame.capacity()) > KEPT {
            self.scratch = Scratch::default();
        }
        decoded.map(Some)
    }

    /// Whether a message has begun that is not complete.
    #[must_use]
    pub fn is_within_message(&self) -> bool {
        self.message.is_some() || self.buffered() > 0
    }

    fn buffered(&self) -> usize {
        self.frames.remaining() + self.small.len()
    }

    /// Puts the small data frames where the others are.
    fn gather(&mut self) {
        self.frames.push(self.small.split().freeze());
    }
}

/// Decodes one message, with the help of `scratch`.
fn decode<M: BulkMessage>(message: Payload, scratch: &mut Scratch) -> Result<Received<M>, BulkError> {
    // One that does not begin with a frame that has a payload, such as a page of a list, has nothing to be spared a copy.
    let mut start = message.slices().first().map_or(&[][..], |first| first);
    let is_small = message.len() <= BESIDES;
    if is_small && decode_key(&mut start).is_ok_and(|(tag, _)| payload_tag::<M>(tag).is_none()) {
        return whole(message);
    }
    scratch.message.clear();
    let lifted = match message.slices() {
        // As a rule a small message is in one piece, and then there is nothing to be made for it.
        [all] => lift::<M, Bytes>(all.clone(), scratch),
        _ => lift::<M, Reader>(message.clone().reader(), scratch),
    };
    let Some(payload) = lifted else {
        // A message with groups, which nobody sends and prost skips, or one that is broken: prost says how.
        return whole(message);
    };
    check_besides(scratch.message.len())?;
    let mut message = M::decode(&scratch.message[..]).map_err(BulkError::Malformed)?;
    let token = message.payload_mut().map(std::mem::take).unwrap_or_default();
    Ok(Received { message, payload: if token.is_empty() { Payload::default() } else { payload } })
}

fn check_besides(len: usize) -> Result<(), BulkError> {
    if len > BESIDES {
        return Err(BulkError::TooLarge { len: len as u64, limit: BESIDES });
    }
    Ok(())
}

/// Decodes one message as prost does.
fn whole<M: BulkMessage>(message: Payload) -> Result<Received<M>, BulkError> {
    check_besides(message.len())?;
    let mut message = M::decode(message.into_bytes()).map_err(BulkError::Malformed)?;
    let payload = message.payload_mut().map(std::mem::take).unwrap_or_default();
    Ok(Received { message, payload: payload.into() })
}

/// Copies `message` to the scratch, but for the payloads: each leaves a token there, and the last one that is not empty is returned. `None` if there
/// is something else than fields whose ends show.
///
/// The last one is enough. Where fields repeat, prost merges a frame into one of the same kind before it, and drops one of another kind, so a
/// payload that lasts is followed by no other; whether it lasts is what the token tells.
fn lift<M: BulkMessage, S: Source>(mut message: S, scratch: &mut Scratch) -> Option<Payload> {
    let Scratch { message: small, frame: kept } = scratch;
    let mut payload = None;
    while message.has_remaining() {
        let (tag, wire_type) = decode_key(&mut message).ok()?;
        let frame = payload_tag::<M>(tag).filter(|_| wire_type == WireType::LengthDelimited);
        let Some(payload_tag) = frame else {
            copy_field(tag, wire_type, &mut message, small)?;
            continue;
        };
        let mut frame = delimited(&mut message)?;
        kept.clear();
        while frame.has_remaining() {
            let (tag, wire_type) = decode_key(&mut frame).ok()?;
            if tag != payload_tag || wire_type != WireType::LengthDelimited {
                copy_field(tag, wire_type, &mut frame, kept)?;
                continue;
            }
            let bytes = delimited(&mut frame)?;
            encode_key(tag, wire_type, kept);
            if bytes.has_remaining() {
                kept.put_slice(&[1, TOKEN]);
                payload = Some(bytes);
            } else {
                kept.put_u8(0);
            }
        }
        encode_key(tag, wire_type, small);
        encode_varint(kept.len() as u64, small);
        small.extend_from_slice(kept);
    }
    Some(payload.map(S::into_payload).unwrap_or_default())
}

/// Copies the field whose key was read. `None` for a group, whose end only shows by reading it, and for one that is cut short.
fn copy_field<S: Source>(tag: u32, wire_type: WireType, from: &mut S, to: &mut BytesMut) -> Option<()> {
    let value = match wire_type {
        WireType::Varint => {
            let value = decode_varint(from).ok()?;
            encode_key(tag, wire_type, to);
            encode_varint(value, to);
            return Some(());
        }
        WireType::LengthDelimited => delimited(from)?,
        WireType::SixtyFourBit => take(from, 8)?,
        WireType::ThirtyTwoBit => take(from, 4)?,
        WireType::StartGroup | WireType::EndGroup => return None,
    };
    encode_key(tag, wire_type, to);
    if wire_type == WireType::LengthDelimited {
        encode_varint(value.remaining() as u64, to);
    }
    to.put(value);
    Some(())
}

/// The bytes behind their length.
fn delimited<S: Source>(from: &mut S) -> Option<S> {
    let len = decode_varint(from).ok()?;
    take(from, usize::try_from(len).ok()?)
}

fn take<S: Source>(from: &mut S, len: usize) -> Option<S> {
    (len <= from.remaining()).then(|| from.cut(len))
}

/// Bytes that can be taken apart without a copy.
trait Source: Buf + Sized {
    /// Takes the next `len` bytes, which are there.
    fn cut(&mut self, len: usize) -> Self;

    fn into_payload(self) -> Payload;
}

impl Source for Bytes {
    fn cut(&mut self, len: usize) -> Self {
        self.split_to(len)
    }

    fn into_payload(self) -> Payload {
        self.into()
    }
}

impl Source for Reader {
    fn cut(&mut self, len: usize) -> Self {
        self.split_to(len).reader()
    }

    fn into_payload(mut self) -> Payload {
        self.split_to(self.remaining())
    }
}
