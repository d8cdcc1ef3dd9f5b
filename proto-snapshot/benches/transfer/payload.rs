//! The bytes that are moved from memory: random ones, the same for every peer.

use bytes::Bytes;

/// The content repeats after this many bytes: enough that it has to come from memory or the last cache level, little enough that it
/// doesn't show in what a transfer takes.
const PERIOD: usize = 16 << 20;
/// Largest piece.
const LARGEST: usize = 8 << 20;

/// Endless content at any offset, of which nothing is copied.
#[derive(Debug, Clone)]
pub struct Payload(Bytes);

impl Payload {
    pub fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut content = Vec::with_capacity(PERIOD + LARGEST);
        while content.len() < PERIOD {
            // xorshift64: nothing on the way compresses, so any bytes that differ would do.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.extend_from_slice(&state.to_le_bytes());
        }
        content.extend_from_within(..LARGEST);
        Self(content.into())
    }

    /// The `len` bytes at `offset`; at most 8 MiB.
    pub fn at(&self, offset: u64, len: usize) -> Bytes {
        let start = (offset % PERIOD as u64) as usize;
        self.0.slice(start..start + len)
    }

    /// All of `bytes` bytes, in pieces of `piece`.
    pub fn pieces(&self, bytes: u64, piece: usize) -> impl Iterator<Item = Bytes> + use<> {
        let payload = self.clone();
        (0..bytes.div_ceil(piece as u64)).map(move |number| {
            let at = number * piece as u64;
            payload.at(at, piece.min((bytes - at) as usize))
        })
    }
}
