//! Numbers and examples that the comments of `migration.proto` promise to peers in other languages.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use prost::Message as _;
use proto_migration::v1::SlotDigests;
use proto_migration::v1::transfer_migration_data_request::{Entries, Entry, Prepare};

const PROTO: &str = include_str!("../proto/node/migration/v1/migration.proto");

/// The hash of one key, from the text of the contract.
fn entry_hash(key: &[u8], value: &[u8], expires_unix_ms: u64) -> u128 {
    let mut input = Vec::new();
    input.extend(u64::try_from(key.len()).expect("a short key").to_le_bytes());
    input.extend(expires_unix_ms.to_le_bytes());
    input.extend(key);
    input.extend(value);
    let hash = blake3::hash(&input);
    let (first, _) = hash.as_bytes().split_first_chunk::<16>().expect("32 bytes");
    u128::from_le_bytes(*first)
}

fn hex(sum: u128) -> String {
    sum.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_examples_of_the_digest_are_right() {
    let a = entry_hash(b"a", b"1", 0);
    let b = entry_hash(b"key", b"", 1_700_000_000_000);
    let (_, examples) = PROTO.split_once("// Examples: of key").expect("examples");
    let shown: Vec<&str> =
        examples.lines().filter_map(|line| line.strip_prefix("//   ")).take(3).map(str::trim).collect();
    assert_eq!(shown, [hex(a), hex(b), hex(a.wrapping_add(b))]);
}

#[test]
fn the_largest_prepare_is_as_small_as_said() {
    let digests = SlotDigests {
        slots: (0..16384).collect(),
        keys: vec![u64::MAX; 16384],
        sums: vec![0xff; 16 * 16384].into(),
    };
    let prepare = Prepare {
        freeze: u64::MAX,
        final_seq: u64::MAX,
        new_slot_epoch: u64::MAX,
        keys: u64::MAX,
        digests: Some(digests),
    };
    assert!(PROTO.contains("16384 slots, less than 460000 bytes"));
    let encoded = prepare.encoded_len();
    assert!((450_000..460_000).contains(&encoded), "{encoded} bytes");
}

#[test]
fn an_entry_of_the_largest_size_fits_in_a_batch() {
    let max_batch_bytes = 64 * 1024 * 1024;
    assert!(PROTO.contains("Accepted.max_batch_bytes - 64 bytes"));
    let key = vec![b'k'; 65536];
    let value = vec![b'v'; max_batch_bytes - 64 - key.len()];
    let entry = Entry {
        seq: u64::MAX,
        tombstone: false,
        expires_unix_ms: Some(u64::MAX),
        key: key.into(),
        value: value.into(),
    };
    let payload = Entries { entries: vec![entry] }.encoded_len();
    assert!(payload <= max_batch_bytes, "{payload} bytes");
}

#[test]
fn the_value_is_last_on_the_wire() {
    let entry = Entry {
        seq: 7,
        tombstone: false,
        expires_unix_ms: Some(9),
        key: b"key".to_vec().into(),
        value: b"value".to_vec().into(),
    };
    assert!(entry.encode_to_vec().ends_with(b"value"));
}
