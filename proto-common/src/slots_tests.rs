use proptest::prelude::*;

use super::*;

fn range(start: u16, end: u16) -> SlotRange {
    SlotRange::new(start, end).unwrap()
}

/// From the Redis Cluster specification and from `CLUSTER KEYSLOT` of a Redis server.
#[test]
fn published_vectors() {
    assert_eq!(State::<XMODEM>::calculate(b"123456789"), 0x31c3);
    assert_eq!(slot_of(b"123456789"), 12739);
    assert_eq!(slot_of(b"foo"), 12182);
    assert_eq!(slot_of(b"bar"), 5061);
    assert_eq!(slot_of(b"hello"), 866);
    assert_eq!(slot_of(b"somekey"), 11058);
    assert_eq!(slot_of(b"foo{hash_tag}"), 2515);
    assert_eq!(slot_of(b""), 0);
}

#[test]
fn hash_tags() {
    assert_eq!(hash_tag(b"{user1000}.following"), b"user1000");
    assert_eq!(slot_of(b"{user1000}.following"), slot_of(b"{user1000}.followers"));
    // An empty tag: the whole key.
    assert_eq!(hash_tag(b"foo{}{bar}"), b"foo{}{bar}");
    // From the first `{` to the first `}` behind it.
    assert_eq!(hash_tag(b"foo{{bar}}zap"), b"{bar");
    assert_eq!(hash_tag(b"foo{bar}{zap}"), b"bar");
    assert_eq!(hash_tag(b"foo{bar"), b"foo{bar");
    assert_eq!(hash_tag(b"}foo{bar}"), b"bar");
    assert_eq!(hash_tag(b"foo}bar{"), b"foo}bar{");
}

#[test]
fn operators_write_ranges_inclusively() {
    assert_eq!("0-8191".parse(), Ok(range(0, 8192)));
    assert_eq!("0-16383".parse(), Ok(SlotRange::FULL));
    assert_eq!("5".parse(), Ok(range(5, 6)));
    assert_eq!("5-5".parse(), Ok(range(5, 6)));
    assert_eq!(SlotRange::FULL.to_string(), "0-16383");
    assert_eq!(range(5, 6).to_string(), "5");
    for text in ["", "-", "5-", "-5", "6-5", "0-16384", "16384", "a-b", "+1-2", "1-2-3", "0x1-2", "99999"] {
        assert!(matches!(text.parse::<SlotRange>(), Err(SlotRangeError::Syntax(_))), "{text}");
    }
}

#[test]
fn the_wire_form_is_checked() {
    let wire = |start, end| SlotRange::try_from(v1::SlotRange { start, end });
    assert_eq!(wire(0, 16384), Ok(SlotRange::FULL));
    assert_eq!(v1::SlotRange::from(range(3, 9)), v1::SlotRange { start: 3, end: 9 });
    for (start, end) in [(0, 0), (5, 5), (6, 5), (0, 16385), (65536, 65537), (u32::MAX, 1), (0, u32::MAX)] {
        assert_eq!(wire(start, end), Err(SlotRangeError::Bounds { start, end }));
    }
    assert_eq!(SlotRange::from_wire(None), Err(SlotRangeError::Missing));
    let error = wire(9, 3).unwrap_err().at("header.slots");
    assert_eq!(error.reason(), "INVALID_SLOT_RANGE");
    assert_eq!(error.violations()[0].field, "header.slots");
}

#[test]
fn splits() {
    assert_eq!(SlotRange::FULL.middle(), 8192);
    assert_eq!(SlotRange::FULL.split_at(8192), Ok((range(0, 8192), range(8192, 16384))));
    assert!(range(4, 8).split_at(4).is_err());
    assert!(range(4, 8).split_at(8).is_err());
    assert_eq!(range(4, 5).middle(), 4);
}

fn any_range() -> impl Strategy<Value = SlotRange> {
    (0..SLOT_COUNT, 1..=SLOT_COUNT).prop_filter_map("empty", |(start, end)| SlotRange::new(start, end).ok())
}

proptest! {
    #[test]
    fn every_key_has_a_slot(key in any::<Vec<u8>>()) {
        prop_assert!(slot_of(&key) < SLOT_COUNT);
    }

    #[test]
    fn text_and_wire_round_trip(r in any_range()) {
        prop_assert_eq!(r.to_string().parse::<SlotRange>(), Ok(r));
        prop_assert_eq!(SlotRange::try_from(v1::SlotRange::from(r)), Ok(r));
    }

    #[test]
    fn arithmetic_agrees_with_sets(a in any_range(), b in any_range(), slot in 0..SLOT_COUNT) {
        let (in_a, in_b) = (a.contains(slot), b.contains(slot));
        prop_assert_eq!(a.intersection(b).is_some_and(|r| r.contains(slot)), in_a && in_b);
        prop_assert_eq!(a.difference(b).iter().any(|r| r.contains(slot)), in_a && !in_b);
        prop_assert_eq!(a.overlaps(b), a.intersection(b).is_some());
        prop_assert_eq!(a.contains_range(b), b.difference(a).is_empty());
        let parts: u16 = a.difference(b).iter().map(|r| r.len()).sum();
        prop_assert_eq!(parts + a.intersection(b).map_or(0, SlotRange::len), a.len());
        prop_assert_eq!(a.iter().len(), usize::from(a.len()));
    }

    #[test]
    fn halves_differ_by_one_slot_at_most(r in any_range()) {
        match r.split_at(r.middle()) {
            Ok((low, high)) => {
                prop_assert_eq!(low.end(), high.start());
                prop_assert!(high.len() - low.len() <= 1);
            }
            Err(_) => prop_assert_eq!(r.len(), 1),
        }
    }
}
