//! Identifiers, names of files and slots, against their rules written down once more.

use proto_common::ids::{ClusterId, ComponentName, MigrationId, NodeId, ShardId, TransferId};
use proto_common::path::FileName;
use proto_common::slots::{SLOT_COUNT, SlotRange, slot_of};
use proto_common::text::printable;

/// Tries `data` as each of them.
pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let id = (1..=128).contains(&text.len())
        && !text.starts_with('.')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    macro_rules! each {
        ($($kind:ty),*) => {$(
            match <$kind>::new(&*text) {
                Ok(parsed) => assert!(id && parsed.as_str() == text, "{text:?}"),
                Err(error) => {
                    assert!(!id, "{text:?}");
                    shown(&error.to_string());
                    super::harness::polite(&error.at("field"));
                }
            }
        )*};
    }
    each!(NodeId, ShardId, TransferId, MigrationId, ClusterId, ComponentName);

    let component = |part: &str| {
        (1..=255).contains(&part.len())
            && part != "."
            && part != ".."
            && !part.chars().any(|c| c.is_control() || c == '\\')
    };
    let name = text.len() <= 1024 && text.split('/').count() <= 32 && text.split('/').all(component);
    match FileName::new(&text) {
        Ok(parsed) => assert!(name && parsed.as_str() == text, "{text:?}"),
        Err(error) => {
            assert!(!name, "{text:?}");
            shown(&error.to_string());
        }
    }

    for text in [text.clone().into_owned(), slots_like(data)] {
        match text.parse::<SlotRange>() {
            Ok(range) => {
                assert_eq!(slots(&text), Some((range.start(), range.end())), "{text:?}");
                assert_eq!(range.to_string().parse::<SlotRange>().unwrap(), range);
            }
            Err(error) => {
                assert_eq!(slots(&text), None, "{text:?}");
                shown(&error.to_string());
            }
        }
    }
    if let Some((bounds, _)) = data.split_first_chunk::<8>() {
        let [start, end] = [0, 4].map(|at| u32::from_le_bytes(bounds[at..at + 4].try_into().unwrap()));
        let wire = proto_common::v1::SlotRange { start, end };
        let valid = start < end && end <= u32::from(SLOT_COUNT);
        assert_eq!(SlotRange::from_wire(Some(wire)).is_ok(), valid, "{wire:?}");
    }

    assert_eq!(slot_of(data), slot_of(tag(data)));
    assert!(slot_of(data) < SLOT_COUNT);
}

/// What `data` says in the alphabet of slots, so that most of it is nearly right.
fn slots_like(data: &[u8]) -> String {
    const ALPHABET: &[u8; 16] = b"0123456789--+ ,1";
    data.iter().take(12).map(|byte| char::from(ALPHABET[usize::from(byte % 16)])).collect()
}

/// First slot and the one past the last of `N` or `N-M`, with spaces around the numbers.
fn slots(text: &str) -> Option<(u16, u16)> {
    let mut parts = text.splitn(2, '-').map(|part| {
        let digits = part.trim();
        let number = digits.bytes().try_fold(0_u32, |number, byte| {
            let digit = char::from(byte).to_digit(10)?;
            Some((number * 10 + digit).min(u32::from(SLOT_COUNT)))
        })?;
        (!digits.is_empty() && number < u32::from(SLOT_COUNT)).then(|| u16::try_from(number).unwrap())
    });
    let first = parts.next()??;
    let last = parts.next().unwrap_or(Some(first))?;
    (first <= last).then_some((first, last + 1))
}

/// The part between the first brace and the next closing one, unless that is empty.
fn tag(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|&b| b == b'{') else { return key };
    match key[open + 1..].iter().position(|&b| b == b'}') {
        Some(len) if len > 0 => &key[open + 1..open + 1 + len],
        _ => key,
    }
}

/// Messages are short and cannot rewrite a terminal.
fn shown(message: &str) {
    assert!(message.len() < 1000, "{message}");
    assert_eq!(printable(message, 4096), message);
}
