//! The codec of the generated code: protobuf with small buffers.
//!
//! tonic allocates the buffer of a stream when it is opened and keeps it while the stream is open: 8 KiB by default,
//! for messages that take 7 bytes (standard) to a few hundred. With thousands of watches that is most of their memory.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Grows on demand, for the messages that are larger.
const BUFFER_SIZE: usize = 64;
/// tonic's own: encoded bytes at which they are handed on.
const YIELD_THRESHOLD: usize = 32 << 10;

/// See the [module](self).
pub struct LeanCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> std::fmt::Debug for LeanCodec<T, U> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LeanCodec")
    }
}

impl<T, U> Default for LeanCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

fn small() -> BufferSettings {
    BufferSettings::new(BUFFER_SIZE, YIELD_THRESHOLD)
}

impl<T, U> Codec for LeanCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(small())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(small())
    }
}
