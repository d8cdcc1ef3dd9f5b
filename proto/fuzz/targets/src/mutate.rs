//! Makes new inputs of old ones, for the runner on stable: it knows nothing of coverage, so it tries much at random.

use fastrand::Rng;

/// Longest input that is made, in bytes.
const MAX_LEN: usize = 4096;

/// One of `seeds`, changed in one to sixteen places; now and then bytes at random.
#[must_use]
pub fn mutate(rng: &mut Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut input = if seeds.is_empty() || rng.u8(..8) == 0 {
        let len = rng.usize(..512);
        std::iter::repeat_with(|| rng.u8(..)).take(len).collect()
    } else {
        seeds[rng.usize(..seeds.len())].clone()
    };
    for _ in 0..1_u32 << rng.u32(0..=4) {
        let at = if input.is_empty() { 0 } else { rng.usize(..input.len()) };
        match rng.u8(..8) {
            0 if !input.is_empty() => input[at] ^= 1 << rng.u8(..8),
            1 if !input.is_empty() => input[at] = rng.u8(..),
            2 if !input.is_empty() => input[at] = [0, 1, 0x7f, 0x80, 0xfe, 0xff][rng.usize(..6)],
            3 => input.insert(at, rng.u8(..)),
            4 if !input.is_empty() => drop(input.remove(at)),
            5 => {
                // A piece of it once more, elsewhere.
                let piece = input[at..input.len().min(at + rng.usize(1..=64))].to_vec();
                let to = rng.usize(..=input.len());
                input.splice(to..to, piece);
            }
            6 if !seeds.is_empty() => {
                // The rest of another one.
                let other = &seeds[rng.usize(..seeds.len())];
                input.truncate(at);
                input.extend_from_slice(&other[rng.usize(..=other.len())..]);
            }
            _ => input.truncate(at.max(1)),
        }
    }
    input.truncate(MAX_LEN);
    input
}
