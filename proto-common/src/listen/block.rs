//! Whether a header block says that a request's own was too large: h2 answers those by itself, with status 431 and nothing else.
//!
//! Of HPACK (RFC 7541) as much as that takes: where a field ends, and how many entries were put into the dynamic table since the one that is looked
//! for. What an entry holds, and which were dropped, is not asked: whoever encodes refers to none that is gone.

/// `:status` in the static table.
const STATUS: usize = 8;
/// 431, by Huffman's code.
const TOO_LARGE: [u8; 3] = [0x69, 0x90, 0xff];
/// The dynamic table's first index.
const DYNAMIC: usize = 62;

/// Follows the header blocks of one direction of a connection, byte by byte.
#[derive(Debug, Default)]
pub(super) struct Block {
    at: At,
    /// Entries that were put into the dynamic table.
    inserted: usize,
    /// The one that is status 431: how many there were when it had been put there.
    entry: Option<usize>,
    /// Of the field that is read: whether it is put into the table.
    insert: bool,
    /// Whether it is `:status`.
    status: bool,
}

#[derive(Debug, Default, Clone, Copy)]
enum At {
    #[default]
    Field,
    /// In an integer that goes on behind its first byte.
    Integer { of: Of, value: usize, shift: u32 },
    /// A string begins, which is a name or a value.
    String { name: bool },
    /// In it: bytes that are left, and how many of them are those that are looked for, where all were so far.
    Text { name: bool, left: usize, matched: Option<usize> },
}

/// What an integer tells.
#[derive(Debug, Clone, Copy)]
enum Of {
    Indexed,
    Literal,
    Size,
    String { name: bool, huffman: bool },
}

impl Block {
    /// The next block begins.
    pub(super) fn begin(&mut self) {
        self.at = At::Field;
    }

    /// Takes the next byte; whether the block says that with it.
    pub(super) fn byte(&mut self, byte: u8) -> bool {
        match self.at {
            At::Field => match byte {
                0x80.. => self.integer(Of::Indexed, byte, 7),
                0x40.. => self.literal(true, byte, 6),
                0x20.. => self.integer(Of::Size, byte, 5),
                _ => self.literal(false, byte, 4),
            },
            At::Integer { of, value, shift } => {
                let value =
                    value.saturating_add(usize::from(byte & 0x7f).checked_shl(shift).unwrap_or(usize::MAX));
                if byte & 0x80 == 0 {
                    return self.told(of, value);
                }
                self.at = At::Integer { of, value, shift: shift.saturating_add(7) };
                false
            }
            At::String { name } => self.integer(Of::String { name, huffman: byte & 0x80 != 0 }, byte, 7),
            At::Text { name, left, matched } => {
                let matched = matched.filter(|at| TOO_LARGE.get(*at) == Some(&byte)).map(|at| at + 1);
                self.text(name, left - 1, matched)
            }
        }
    }

    fn literal(&mut self, insert: bool, byte: u8, bits: u32) -> bool {
        self.insert = insert;
        self.integer(Of::Literal, byte, bits)
    }

    /// An integer that begins in the last `bits` of a byte.
    fn integer(&mut self, of: Of, byte: u8, bits: u32) -> bool {
        let most = (1 << bits) - 1;
        let value = usize::from(byte) & most;
        if value < most {
            return self.told(of, value);
        }
        self.at = At::Integer { of, value, shift: 0 };
        false
    }

    fn told(&mut self, of: Of, value: usize) -> bool {
        self.at = At::Field;
        match of {
            Of::Indexed => {
                let index = self.entry.map(|entry| DYNAMIC + (self.inserted - entry));
                return index == Some(value);
            }
            Of::Size => {}
            Of::Literal => {
                self.status = value == STATUS;
                self.at = At::String { name: value == 0 };
            }
            Of::String { name, huffman } => {
                let looked_for = huffman && !name && self.status && value == TOO_LARGE.len();
                return self.text(name, value, looked_for.then_some(0));
            }
        }
        false
    }

    fn text(&mut self, name: bool, left: usize, matched: Option<usize>) -> bool {
        self.at = match (left, name) {
            (1.., _) => At::Text { name, left, matched },
            (0, true) => At::String { name: false },
            (0, false) => At::Field,
        };
        if left > 0 || name {
            return false;
        }
        let found = matched == Some(TOO_LARGE.len());
        if self.insert {
            self.inserted = self.inserted.saturating_add(1);
            if found {
                self.entry = Some(self.inserted);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Which of the blocks say it.
    fn found(blocks: &[&[u8]]) -> Vec<bool> {
        let mut block = Block::default();
        let mut says = |bytes: &&[u8]| {
            block.begin();
            bytes.iter().filter(|byte| block.byte(**byte)).count() == 1
        };
        blocks.iter().map(&mut says).collect()
    }

    /// As h2 writes them: the first of a connection in full, then by the place in the table.
    #[test]
    fn an_entry_is_found_again_wherever_it_has_come_to() {
        let first: &[u8] = &[0x48, 0x83, 0x69, 0x90, 0xff];
        // Two further entries: a name of its own, and one of the static table.
        let others: &[u8] = &[0x40, 0x81, 0x1f, 0x03, b'a', b'b', b'c', 0x88, 0x5f, 0x01, b'x'];
        assert_eq!(found(&[first, &[0xbe], others, &[0xbe], &[0xc0]]), [true, true, false, false, true]);
        // It was dropped, and is there anew.
        assert_eq!(found(&[first, others, first, &[0xc1], &[0xbe]]), [true, false, true, false, true]);
        // Where the peer wants no table, it is written each time.
        let never: &[u8] = &[0x20, 0x08, 0x83, 0x69, 0x90, 0xff];
        assert_eq!(found(&[never, never, &[0xbe]]), [true, true, false]);
        // Status 200, 404 in full, a value that is the same elsewhere, one that begins so.
        for other in [
            &[0x88][..],
            &[0x48, 0x82, 0x68, 0x0f],
            &[0x50, 0x83, 0x69, 0x90, 0xff],
            &[0x48, 0x84, 0x69, 0x90, 0xff, 0xff],
        ] {
            assert_eq!(found(&[other, &[0x88]]), [false, false]);
        }
        // A long text in the way: 300 bytes, 127 + 173.
        let long = [&[0x00, 0x01, b'n', 0x7f, 0xad, 0x01][..], &[0x48; 300], first].concat();
        assert_eq!(found(&[&long]), [true]);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_no_reason_to_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut block = Block::default();
            for byte in bytes {
                block.byte(byte);
            }
        }
    }
}
