//! What is kept of a migration, be it in a file or in a store, so that it tells itself whether it is whole.
//!
//! | bytes | content |
//! |---|---|
//! | 0..3 | which kind of record it is |
//! | 3 | version of what it holds |
//! | 4..8 | length of what follows the header, little-endian |
//! | 8..16 | CRC-64/NVME of all other bytes, little-endian |
//! | 16.. | a protobuf message |

use prost::Message;
use proto_common::checksum::Crc64Hasher;

pub(crate) const HEADER_LEN: usize = 16;

/// A kind of record, in the version that this program writes, and the only one that it reads: what another one says could be misunderstood.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) name: [u8; 3],
    pub(crate) version: u8,
}

impl Kind {
    /// Encodes `record`.
    pub(crate) fn seal(self, record: &impl Message) -> Vec<u8> {
        let Self { name: [a, b, c], version } = self;
        let record = record.encode_to_vec();
        // A record is bounded far below; a longer one would not be read back.
        let len = u32::try_from(record.len()).unwrap_or(u32::MAX);
        let mut head = [a, b, c, version, 0, 0, 0, 0];
        head[4..].copy_from_slice(&len.to_le_bytes());
        let mut sealed = Vec::with_capacity(HEADER_LEN + record.len());
        sealed.extend_from_slice(&head);
        sealed.extend_from_slice(&crc(head, &record).to_le_bytes());
        sealed.extend_from_slice(&record);
        sealed
    }

    /// Decodes what [`seal`](Self::seal) encoded.
    ///
    /// # Errors
    ///
    /// What is wrong with it, as the end of a sentence that begins with its name. Every change of a single bit and every cut is found.
    pub(crate) fn open<M: Message + Default>(self, sealed: &[u8]) -> Result<M, String> {
        let short = || format!("has {} bytes, less than its header", sealed.len());
        let (head, rest) = sealed.split_first_chunk::<8>().ok_or_else(short)?;
        let (stored, record) = rest.split_first_chunk::<8>().ok_or_else(short)?;
        let &[a, b, c, version, len @ ..] = head;
        if [a, b, c] != self.name {
            return Err("does not begin like a record".to_owned());
        }
        let len = u32::from_le_bytes(len);
        if usize::try_from(len) != Ok(record.len()) {
            return Err(format!("says {len} bytes and holds {}", record.len()));
        }
        if crc(*head, record) != u64::from_le_bytes(*stored) {
            return Err("does not match its checksum".to_owned());
        }
        if version != self.version {
            return Err(format!("has version {version}; this program reads {}", self.version));
        }
        M::decode(record).map_err(|error| format!("does not decode: {error}"))
    }
}

fn crc(head: [u8; 8], record: &[u8]) -> u64 {
    let mut hasher = Crc64Hasher::new();
    hasher.update(&head);
    hasher.update(record);
    hasher.finish()
}

/// Every way in which one bit is another or bytes are missing or too many, and what was done.
#[cfg(test)]
pub(crate) fn damages(whole: &[u8]) -> impl Iterator<Item = (String, Vec<u8>)> {
    let flips = (0..whole.len() * 8).map(|bit| {
        let mut flipped = whole.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        (format!("bit {bit} flipped"), flipped)
    });
    let cuts = (0..whole.len()).map(|len| (format!("cut to {len} bytes"), whole[..len].to_vec()));
    let longer = [&b"\0"[..], b"x", whole].map(|more| ("more behind it".to_owned(), [whole, more].concat()));
    flips.chain(cuts).chain(longer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::MigrationProgress;

    const KIND: Kind = Kind { name: *b"ABC", version: 3 };

    #[test]
    fn what_is_whole_is_read_and_nothing_else() {
        for record in [
            MigrationProgress::default(),
            MigrationProgress { migration_id: "m1".to_owned(), attempt: 7, ..Default::default() },
        ] {
            let sealed = KIND.seal(&record);
            assert_eq!(KIND.open::<MigrationProgress>(&sealed).unwrap(), record);
            for (how, damaged) in damages(&sealed) {
                assert!(KIND.open::<MigrationProgress>(&damaged).is_err(), "{how}");
            }
        }
    }

    #[test]
    fn another_version_and_another_kind_are_told_from_damage() {
        let record = MigrationProgress { attempt: 7, ..Default::default() };
        for (kind, problem) in [
            (Kind { version: 4, ..KIND }, "has version 4; this program reads 3"),
            (Kind { name: *b"ABD", ..KIND }, "does not begin like a record"),
        ] {
            assert_eq!(KIND.open::<MigrationProgress>(&kind.seal(&record)).unwrap_err(), problem);
        }
    }
}
