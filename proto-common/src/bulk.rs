//! Streams of messages of which one field is large, without a copy of that field on either side.
//!
//! A generated client encodes each message into one buffer, and a generated server gathers each message in one: a copy of every
//! byte at each end, which is about half of what such a stream costs. Here the large field of a message travels as the [`Bytes`] that it is,
//! in HTTP/2 frames of its own behind one with all that comes before it, and arrives as a [`Payload`]: the pieces of the frames that carried it. The bytes on the
//! wire are those that prost makes, so any gRPC client and server stands at the other end.
//!
//! | side | what | feature |
//! |---|---|---|
//! | sending | [`Outgoing`], the body of a request; [`WithBody`] has a generated client send it | `client` |
//! | receiving | [`WithRawBody`] hands the body of a call past a generated server, [`Incoming`] reads it | `server` |
//!
//! The rest of the call, which is headers, status, trailers and the other direction, stays with tonic. It follows that interceptors, layers and
//! tonic's router work as they do for every other method.

mod decode;
mod encode;
#[cfg(any(feature = "client", feature = "server"))]
mod memory;
mod payload;
#[cfg(feature = "server")]
mod receive;
#[cfg(feature = "client")]
mod send;
#[cfg(test)]
mod tests;

use bytes::Bytes;

pub use decode::{BulkError, Decoder, Received};
pub use encode::{Parts, TooLong, encode};
pub use payload::{Payload, Reader};
#[cfg(feature = "server")]
pub use receive::{Incoming, WithRawBody};
#[cfg(feature = "client")]
pub use send::{Outgoing, WithBody};

/// Length of what precedes each message in a gRPC stream: a flag and the length in four bytes, big endian.
pub(crate) const PREFIX: usize = 5;

/// A message of which one field may be large: a `oneof` of frames, some of which have a payload.
///
/// Implemented by hand beside the generated type. A test of the implementing crate holds it to prost's own encoding.
pub trait BulkMessage: prost::Message + Default + 'static {
    /// The frames that have a payload.
    const PAYLOADS: &'static [PayloadField];

    /// The payload of this message, if it is a frame that has one.
    fn payload_mut(&mut self) -> Option<&mut Bytes>;
}

/// Where the payload of a frame stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PayloadField {
    /// Tag of the frame, which is a message, in the message.
    pub frame: u32,
    /// Tag of the payload, a field of type `bytes`, in the frame; the highest one there, so that it comes last on the wire.
    pub payload: u32,
}

/// The payload's tag in the frame with this tag, if it has one.
fn payload_tag<M: BulkMessage>(frame: u32) -> Option<u32> {
    M::PAYLOADS.iter().find(|field| field.frame == frame).map(|field| field.payload)
}
