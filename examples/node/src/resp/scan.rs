//! Cursors of SCAN.
//!
//! A cursor is a slot and, where a large slot had to be cut, a random token for the key after which to go on. Tokens live
//! in memory. One that is gone, since the node was restarted or others pushed it out, goes on at the start of
//! its slot: keys come twice, which SCAN allows, but none is left out.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use crate::store::ScanPosition;

/// Scans in the middle of a large slot at the same time. Each holds one key.
const TOKENS: usize = 4096;
/// Bytes of those keys. The last one stays, whatever its size.
const TOKEN_BYTES: usize = 16 << 20;
const TOKEN_BITS: u32 = 48;

#[derive(Debug, Default)]
pub(super) struct Cursors {
    tokens: Mutex<Tokens>,
}

#[derive(Debug, Default)]
struct Tokens {
    keys: HashMap<u64, Bytes>,
    order: VecDeque<u64>,
    bytes: usize,
}

impl Tokens {
    fn add(&mut self, token: u64, key: Bytes) {
        self.bytes += key.len();
        match self.keys.insert(token, key) {
            None => self.order.push_back(token),
            Some(replaced) => self.bytes -= replaced.len(),
        }
        while self.order.len() > TOKENS || (self.bytes > TOKEN_BYTES && self.order.len() > 1) {
            let oldest = self.order.pop_front().and_then(|oldest| self.keys.remove(&oldest));
            self.bytes -= oldest.map_or(0, |key| key.len());
        }
    }
}

impl Cursors {
    /// The cursor for `position`, which is not the start.
    pub(super) fn encode(&self, position: ScanPosition, slot: u16) -> u64 {
        let slot_bits = u64::from(slot) << TOKEN_BITS;
        match position {
            ScanPosition::Slot(slot) => u64::from(slot) << TOKEN_BITS,
            ScanPosition::After(key) => {
                // Never 0, which would be the start of a slot, or the end.
                let token = (rand::random::<u64>() >> (u64::BITS - TOKEN_BITS)) | 1;
                let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
                tokens.add(token, key);
                slot_bits | token
            }
        }
    }

    /// Where `cursor` goes on.
    pub(super) fn decode(&self, cursor: u64) -> ScanPosition {
        let slot = u16::try_from(cursor >> TOKEN_BITS).unwrap_or(u16::MAX);
        let token = cursor & ((1 << TOKEN_BITS) - 1);
        if token == 0 {
            return ScanPosition::Slot(slot);
        }
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        match tokens.keys.get(&token) {
            Some(key) => ScanPosition::After(key.clone()),
            None => ScanPosition::Slot(slot),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_any_size_take_bounded_memory() {
        let cursors = Cursors::default();
        let held = || {
            let tokens = cursors.tokens.lock().unwrap();
            assert_eq!(tokens.bytes, tokens.keys.values().map(Bytes::len).sum::<usize>());
            (tokens.order.len(), tokens.bytes)
        };
        let add = |bytes| cursors.encode(ScanPosition::After(Bytes::from(vec![b'k'; bytes])), 7);
        let first = add(1 << 20);
        for _ in 0..100 {
            add(1 << 20);
        }
        assert_eq!(held(), (16, TOKEN_BYTES));
        assert_eq!(cursors.decode(first), ScanPosition::Slot(7), "its scan begins the slot again");
        let large = add(TOKEN_BYTES + 1);
        assert_eq!(held(), (1, TOKEN_BYTES + 1));
        assert!(matches!(cursors.decode(large), ScanPosition::After(_)), "a scan gets on, whatever the keys");
        for _ in 0..2 * TOKENS {
            add(1);
        }
        assert_eq!(held(), (TOKENS, TOKENS));
    }

    #[test]
    fn positions_come_back() {
        let cursors = Cursors::default();
        assert_eq!(cursors.decode(0), ScanPosition::Slot(0));
        for position in [ScanPosition::Slot(7), ScanPosition::After(Bytes::from_static(b"key"))] {
            assert_eq!(cursors.decode(cursors.encode(position.clone(), 7)), position);
        }
    }

    #[test]
    fn a_forgotten_token_goes_on_at_the_start_of_its_slot() {
        let cursors = Cursors::default();
        let first = cursors.encode(ScanPosition::After(Bytes::from_static(b"first")), 9);
        for n in 0..TOKENS {
            cursors.encode(ScanPosition::After(Bytes::from(n.to_string())), 9);
        }
        assert_eq!(cursors.decode(first), ScanPosition::Slot(9));
        assert_eq!(cursors.tokens.lock().unwrap().keys.len(), TOKENS);
    }
}
