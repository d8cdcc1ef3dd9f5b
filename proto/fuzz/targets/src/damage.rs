//! What a bad disk, or a hand, does to files: flips, cuts, swaps.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use arbitrary::Unstructured;
use proto_common::checksum::crc64;

/// Contents by name, below one directory.
pub type Files = BTreeMap<String, Vec<u8>>;

/// Writes them below `dir`.
pub fn write(dir: &Path, files: &Files) {
    for (name, content) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

/// Damages those of `files` whose name is `eligible`, one to four times, as `data` says.
pub fn apply(
    data: &mut Unstructured<'_>,
    files: &mut Files,
    eligible: impl Fn(&str) -> bool,
) -> arbitrary::Result<()> {
    let names: Vec<String> = files.keys().filter(|name| eligible(name)).cloned().collect();
    for _ in 0..data.int_in_range(1..=4)? {
        let name = data.choose(&names)?;
        let other = data.choose(&names)?.clone();
        let content = files.get_mut(name).unwrap();
        let len = content.len();
        let at = if len == 0 { 0 } else { usize::from(data.arbitrary::<u16>()?) % len };
        match data.int_in_range(0..=6)? {
            0 if len > 0 => content[at] ^= 1 << data.int_in_range(0..=7)?,
            1 => content.truncate(at),
            2 if len > 0 => {
                // Two ranges of one length trade places.
                let to = usize::from(data.arbitrary::<u16>()?) % len;
                let size = data.int_in_range(1..=16)?.min(len - at.max(to)).min(at.abs_diff(to));
                for step in 0..size {
                    content.swap(at + step, to + step);
                }
            }
            3 => {
                let size = data.int_in_range(1..=64)?.min(len - at);
                content[at..at + size].fill(0);
            }
            4 => content.extend_from_slice(data.bytes(data.len().min(32))?),
            5 => {
                let mine = std::mem::take(content);
                let theirs = files.insert(other, mine).unwrap();
                if !theirs.is_empty() {
                    files.insert(name.clone(), theirs);
                }
            }
            _ => *content = data.bytes(data.len().min(256))?.to_vec(),
        }
    }
    Ok(())
}

/// The records of a log that was damaged, up to the first that is not as it was written, and whether they are all that it holds. What
/// `proto_common::durable::RecordLog` reads, by other means: `[len: u32][crc: u64][record]`, where `crc` is of `len` and record.
#[must_use]
pub fn records(mut log: &[u8]) -> (Vec<&[u8]>, bool) {
    let mut records = Vec::new();
    while let Some((len, rest)) = log.split_first_chunk::<4>()
        && let Some((crc, rest)) = rest.split_first_chunk::<8>()
        && let Some((record, rest)) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)
        && crc64(&[&len[..], record].concat()) == u64::from_le_bytes(*crc)
    {
        records.push(record);
        log = rest;
    }
    (records, log.is_empty())
}
