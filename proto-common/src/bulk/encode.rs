//! A message as it goes over the wire: what precedes the payload, and the payload.

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

use super::{BulkMessage, PREFIX, payload_tag};

/// Room for the prefix (5 bytes), and for tags and lengths that are written anew: a tag and a length take five bytes each at most. More would only be memory of each message.
const HEAD_ROOM: usize = 64;

/// A message with the prefix of gRPC, to be sent in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// Prefix, and everything before the payload.
    pub head: Bytes,
    /// The payload, shared with the message that it came from. Empty if there is none.
    pub payload: Bytes,
}

/// The message is longer than a peer may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of {len} bytes is longer than {limit}")]
pub struct TooLong {
    /// Its length.
    pub len: usize,
    /// The limit.
    pub limit: usize,
}

/// Encodes a message of at most `limit` bytes. Head and payload together are what prost makes of it, behind the prefix of gRPC.
///
/// # Errors
///
/// When it is longer.
pub fn encode<M: BulkMessage>(mut message: M, limit: usize) -> Result<Parts, TooLong> {
    let payload = message.payload_mut().map(std::mem::take).unwrap_or_default();
    let mut small = BytesMut::with_capacity(message.encoded_len() + HEAD_ROOM);
    small.put_bytes(0, PREFIX);
    // The only error is a lack of room, and this buffer grows.
    let _ = message.encode(&mut small);
    let parts = match split::<M>(&small[PREFIX..], &payload) {
        _ if payload.is_empty() => Parts { head: finish(small, 0, limit)?, payload },
        Some(head) => Parts { head: finish(head, payload.len(), limit)?, payload },
        // More than one frame in the message: not what this was made for, so it is copied.
        None => {
            if let Some(field) = message.payload_mut() {
                *field = payload;
            }
            let mut whole = BytesMut::with_capacity(message.encoded_len() + PREFIX);
            whole.put_bytes(0, PREFIX);
            let _ = message.encode(&mut whole);
            Parts { head: finish(whole, 0, limit)?, payload: Bytes::new() }
        }
    };
    Ok(parts)
}

/// Encodes a message of at most `limit` bytes behind what is in `to`, its payload included.
///
/// # Errors
///
/// When it is longer.
#[cfg(feature = "client")]
pub(super) fn append<M: BulkMessage>(message: &M, limit: usize, to: &mut BytesMut) -> Result<(), TooLong> {
    to.put_u8(0);
    to.put_u32(declared(message.encoded_len(), limit)?);
    // The only error is a lack of room, and this buffer grows.
    let _ = message.encode(to);
    Ok(())
}

/// The length of a message as its prefix has it.
fn declared(len: usize, limit: usize) -> Result<u32, TooLong> {
    u32::try_from(len).ok().filter(|_| len <= limit).ok_or(TooLong { len, limit })
}

/// Writes the prefix of a message of which `rest` bytes follow.
fn finish(mut head: BytesMut, rest: usize, limit: usize) -> Result<Bytes, TooLong> {
    let declared = declared((head.len() - PREFIX).saturating_add(rest), limit)?;
    head[1..PREFIX].copy_from_slice(&declared.to_be_bytes());
    Ok(head.freeze())
}

/// The head of the message whose encoding without its payload is `small`, behind room for the prefix; `None` if that is not one frame.
fn split<M: BulkMessage>(small: &[u8], payload: &Bytes) -> Option<BytesMut> {
    let mut frame = small;
    let (tag, wire_type) = decode_key(&mut frame).ok()?;
    let payload_tag = payload_tag::<M>(tag).filter(|_| wire_type == WireType::LengthDelimited)?;
    let len = decode_varint(&mut frame).ok()?;
    if usize::try_from(len) != Ok(frame.len()) {
        return None;
    }
    let mut field = BytesMut::with_capacity(20);
    encode_key(payload_tag, WireType::LengthDelimited, &mut field);
    encode_varint(payload.len() as u64, &mut field);
    let mut head = BytesMut::with_capacity(frame.len() + HEAD_ROOM);
    head.put_bytes(0, PREFIX);
    encode_key(tag, WireType::LengthDelimited, &mut head);
    encode_varint((frame.len() + field.len() + payload.len()) as u64, &mut head);
    head.extend_from_slice(frame);
    head.extend_from_slice(&field);
    Some(head)
}
