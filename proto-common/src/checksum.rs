//! The checksum of payloads and files: CRC-64/NVME.
//!
//! It *combines*: from the checksums of two neighbouring pieces follows that of both together, so every byte is
//! hashed once at each end, chunk by chunk and in any order, and the whole-file checksum costs next to nothing more.
//! It is computed with carry-less multiplication where the CPU has it (x86-64, AArch64): measured on an AMD EPYC, 54 GiB/s from
//! cache and 17 GiB/s from memory in pieces of 1 MiB, the same as CRC-32C by that method and twice of CRC-32C by its own
//! instruction. At equal speed, 64 bits leave an undetected error 2^32 times less likely than 32.
//! Amazon S3 uses the same one for its full-object checksums, so a store behind S3 can hand them through.
//!
//! Parameters: width 64, polynomial `0xad93d23594c93659`, initial value and final XOR all ones, reflected;
//! the checksum of `123456789` is `0xae8b14860a799888`. It finds accidents, not attackers.

use crc_fast::{CrcAlgorithm, Digest};

const ALGORITHM: CrcAlgorithm = CrcAlgorithm::Crc64Nvme;

/// The checksum of `data`.
///
/// ```
/// assert_eq!(proto_common::checksum::crc64(b"123456789"), 0xae8b_1486_0a79_9888);
/// ```
#[must_use]
pub fn crc64(data: &[u8]) -> u64 {
    crc_fast::crc64_nvme(data)
}

/// The checksum of `a` followed by `b`, from that of `a`, that of `b`, and the length of `b` in bytes.
///
/// Takes one polynomial multiplication (about 100 ns) per set bit of `second_len`, so it is fastest for chunks of a power of two.
///
/// ```
/// use proto_common::checksum::{combine, crc64};
/// assert_eq!(combine(crc64(b"12345"), crc64(b"6789"), 4), crc64(b"123456789"));
/// ```
#[must_use]
pub fn combine(first: u64, second: u64, second_len: u64) -> u64 {
    // Appending n bytes multiplies the checksum by x^(8n). The library does the same with 64x64 matrices, in 70 us:
    // more than it takes to hash a chunk of 1 MiB.
    let mut shifted = first;
    for (bit, power) in POWERS.iter().enumerate() {
        if second_len >> bit & 1 == 1 {
            shifted = multiply(shifted, *power);
        }
    }
    shifted ^ second
}

/// The polynomial, bit-reflected.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// `x^(8 * 2^n)` for every bit `n` of a length in bytes.
const POWERS: [u64; 64] = {
    // Bit-reflected, the highest bit is x^0; so this is x^8.
    let mut power = 1 << (63 - 8);
    let mut powers = [0; 64];
    let mut n = 0;
    while n < powers.len() {
        powers[n] = power;
        power = multiply(power, power);
        n += 1;
    }
    powers
};

/// `a * b` modulo the polynomial, all bit-reflected.
const fn multiply(a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    let mut bit = 1 << 63;
    while bit != 0 {
        if a & bit != 0 {
            product ^= b;
        }
        b = if b & 1 == 1 { (b >> 1) ^ POLYNOMIAL } else { b >> 1 };
        bit >>= 1;
    }
    product
}

/// Computes the checksum of data that arrives in pieces.
#[derive(Debug, Clone)]
pub struct Crc64Hasher(Digest);

impl Crc64Hasher {
    /// A hasher that has seen nothing; its checksum is 0.
    #[must_use]
    pub fn new() -> Self {
        Self(Digest::new(ALGORITHM))
    }

    /// Takes the next piece.
    pub fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// The checksum of everything so far. More may follow.
    #[must_use]
    pub fn finish(&self) -> u64 {
        self.0.finalize()
    }
}

impl Default for Crc64Hasher {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn check_value() {
        assert_eq!(crc64(b"123456789"), 0xae8b_1486_0a79_9888);
        assert_eq!(crc64(b""), 0);
        assert_eq!(Crc64Hasher::default().finish(), 0);
    }

    /// Bit by bit, from the definition; the library takes other paths for short and for long input.
    fn by_definition(data: &[u8]) -> u64 {
        let mut crc = u64::MAX;
        for &byte in data {
            crc ^= u64::from(byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
            }
        }
        !crc
    }

    proptest! {
        #[test]
        fn pieces_and_combination_agree_with_the_definition(
            data in prop::collection::vec(any::<u8>(), 0..2000),
            cut in any::<prop::sample::Index>(),
        ) {
            let (a, b) = data.split_at(cut.index(data.len() + 1));
            let whole = by_definition(&data);
            prop_assert_eq!(crc64(&data), whole);
            let mut hasher = Crc64Hasher::new();
            hasher.update(a);
            hasher.update(b);
            prop_assert_eq!(hasher.finish(), whole);
            let b_len = u64::try_from(b.len()).unwrap();
            prop_assert_eq!(combine(crc64(a), crc64(b), b_len), whole);
        }

        #[test]
        fn combination_agrees_with_the_library(first: u64, second: u64, len: u64, shift in 0_u32..64) {
            let len = len >> shift;
            let theirs = crc_fast::checksum_combine(ALGORITHM, first, second, len);
            prop_assert_eq!(combine(first, second, len), theirs);
        }

        #[test]
        fn any_single_flipped_bit_is_found(
            data in prop::collection::vec(any::<u8>(), 1..600),
            at in any::<prop::sample::Index>(),
            bit in 0..8,
        ) {
            let mut damaged = data.clone();
            damaged[at.index(data.len())] ^= 1_u8 << bit;
            prop_assert_ne!(crc64(&damaged), crc64(&data));
        }
    }
}
