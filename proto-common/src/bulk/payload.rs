//! Bytes in pieces.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

use crate::checksum::Crc64Hasher;

/// Bytes in the pieces in which they came from the network. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Payload {
    /// None is empty.
    slices: Vec<Bytes>,
    len: usize,
}

impl Payload {
    /// The number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces in order; none is empty.
    #[must_use]
    pub fn slices(&self) -> &[Bytes] {
        &self.slices
    }

    /// The pieces, for a vectored write.
    pub fn io_slices(&self) -> impl Iterator<Item = IoSlice<'_>> {
        self.slices.iter().map(|slice| IoSlice::new(slice))
    }

    /// The CRC-64/NVME of all bytes.
    #[must_use]
    pub fn crc64(&self) -> u64 {
        match self.slices.as_slice() {
            [all] => crate::checksum::crc64(all),
            slices => {
                let mut hasher = Crc64Hasher::new();
                slices.iter().for_each(|slice| hasher.update(slice));
                hasher.finish()
            }
        }
    }

    /// All bytes in one piece. Copies them, unless they are in one piece already.
    #[must_use]
    pub fn into_bytes(mut self) -> Bytes {
        match self.slices.len() {
            0 => Bytes::new(),
            1 => self.slices.swap_remove(0),
            _ => {
                let mut all = BytesMut::with_capacity(self.len);
                self.slices.iter().for_each(|slice| all.extend_from_slice(slice));
                all.freeze()
            }
        }
    }

    /// Reads the bytes in order. What is taken of it as [`Bytes`] shares the memory, unless it spans pieces.
    #[must_use]
    pub fn reader(self) -> Reader {
        Reader { slices: self.slices.into(), len: self.len }
    }

    pub(super) fn push(&mut self, slice: Bytes) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push(slice);
        }
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        let mut payload = Self::default();
        payload.push(bytes);
        payload
    }
}

/// Equal bytes, however they are cut.
impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.slices.iter().flatten().eq(other.slices.iter().flatten())
    }
}

impl Eq for Payload {}

/// See [`Payload::reader`].
#[derive(Debug, Clone, Default)]
pub struct Reader {
    /// None is empty.
    slices: VecDeque<Bytes>,
    len: usize,
}

impl Reader {
    /// Takes the next `len` bytes, which are there, without copying any.
    pub(super) fn split_to(&mut self, len: usize) -> Payload {
        let mut taken = Payload::default();
        while taken.len < len {
            let Some(front) = self.slices.front_mut() else { break };
            let want = len - taken.len;
            let piece = if front.len() <= want {
                self.slices.pop_front().unwrap_or_default()
            } else {
                front.split_to(want)
            };
            self.len -= piece.len();
            taken.push(piece);
        }
        taken
    }

    pub(super) fn push(&mut self, slice: Bytes) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push_back(slice);
        }
    }
}

impl Buf for Reader {
    fn remaining(&self) -> usize {
        self.len
    }

    fn chunk(&self) -> &[u8] {
        self.slices.front().map_or(&[], |front| front)
    }

    fn advance(&mut self, count: usize) {
        assert!(count <= self.len, "cannot advance by {count}: {} bytes are left", self.len);
        let mut left = count;
        while let Some(front) = self.slices.front_mut()
            && left > 0
        {
            let step = left.min(front.len());
            front.advance(step);
            if front.is_empty() {
                self.slices.pop_front();
            }
            left -= step;
        }
        self.len -= count;
    }

    fn copy_to_bytes(&mut self, len: usize) -> Bytes {
        assert!(len <= self.len, "cannot take {len}: {} bytes are left", self.len);
        self.split_to(len).into_bytes()
    }
}
