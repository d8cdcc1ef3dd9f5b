use std::fs;

use proptest::prelude::*;

use super::*;

fn frame(record: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    encode(record, &mut frame).unwrap();
    frame
}

fn read(path: &Path) -> (Vec<Vec<u8>>, Option<Damage>) {
    let (_, records, damage) = RecordLog::open(path).unwrap();
    (records, damage)
}

/// Of which all was set aside.
fn bad_record(offset: u64, bytes: u64) -> Damage {
    Damage::BadRecord { offset, bytes, set_aside: bytes }
}

#[test]
fn appends_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let (mut log, records, damage) = RecordLog::open(&path).unwrap();
    assert!(records.is_empty() && damage.is_none());
    log.append(b"one").unwrap();
    log.append(b"").unwrap();
    log.sync().unwrap();
    assert_eq!(log.file_len(), fs::metadata(&path).unwrap().len());

    let (mut log, records, damage) = RecordLog::open(&path).unwrap();
    assert_eq!((records, damage), (vec![b"one".to_vec(), vec![]], None));
    log.append(b"two").unwrap();
    log.rewrite([b"three", b"four!"]).unwrap();
    log.append(b"five").unwrap();
    assert_eq!(log.file_len(), fs::metadata(&path).unwrap().len());
    assert_eq!(read(&path), (vec![b"three".to_vec(), b"four!".to_vec(), b"five".to_vec()], None));
}

#[test]
fn a_bad_record_in_the_middle_is_kept_for_inspection() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let (good, mut bad, later) = (frame(b"good"), frame(b"spoiled"), frame(b"later"));
    *bad.last_mut().unwrap() ^= 1;
    fs::write(&path, [good.clone(), bad.clone(), later.clone()].concat()).unwrap();
    let (mut log, records, damage) = RecordLog::open(&path).unwrap();
    let lost = [bad, later].concat();
    assert_eq!(records, [b"good".to_vec()]);
    assert_eq!(damage, Some(bad_record(length(&good), length(&lost))));
    assert_eq!(fs::read(dir.path().join("log.damaged")).unwrap(), lost);
    log.append(b"next").unwrap();
    assert_eq!(read(&path), (vec![b"good".to_vec(), b"next".to_vec()], None));
}

/// As with a damaged size.
#[test]
fn of_a_long_end_that_is_damaged_a_part_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, frame(b"good")).unwrap();
    let total = MAX_SET_ASIDE + (1 << 20);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(total).unwrap();
    let (records, damage) = read(&path);
    assert_eq!(records, [b"good".to_vec()]);
    let bytes = total - 16;
    let damage = damage.unwrap();
    assert_eq!(damage, Damage::BadRecord { offset: 16, bytes, set_aside: MAX_SET_ASIDE });
    assert!(
        damage.to_string().contains(&format!("of {bytes} bytes from there on, the first {MAX_SET_ASIDE}"))
    );
    assert_eq!(fs::metadata(dir.path().join("log.damaged")).unwrap().len(), MAX_SET_ASIDE);
    assert_eq!(read(&path), (vec![b"good".to_vec()], None));
}

#[cfg(target_os = "linux")]
#[test]
fn a_log_is_cut_also_where_there_is_no_room_for_what_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, [frame(b"good"), vec![0; 4096]].concat()).unwrap();
    // Whatever is written there finds the disk full.
    std::os::unix::fs::symlink("/dev/full", dir.path().join("log.damaged.tmp")).unwrap();
    let (records, damage) = read(&path);
    assert_eq!(records, [b"good".to_vec()]);
    let damage = damage.unwrap();
    assert_eq!(damage, Damage::BadRecord { offset: 16, bytes: 4096, set_aside: 0 });
    assert!(damage.to_string().contains("there was no room"), "{damage}");
    assert_eq!(read(&path), (vec![b"good".to_vec()], None));
}

/// Whether a crash may have left what is at the end of `file`, a last record that is as long as it says and starts at `start`.
fn may_be_torn(file: &[u8], start: usize) -> bool {
    let body = start + if file.len() == start + HEADER_LEN { 4 } else { HEADER_LEN };
    let last_sector = (file.len() - 1) / 512 * 512;
    file[body.max(last_sector)..].iter().all(|byte| *byte == 0)
}

#[test]
fn damage_to_the_last_record_is_kept_and_what_a_crash_leaves_of_it_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let (path, damaged) = (dir.path().join("log"), dir.path().join("log.damaged"));
    let content = |len: usize| (0..len).map(|at| u8::try_from(at % 255 + 1).unwrap()).collect::<Vec<_>>();
    // Within a sector, up to its end, one byte beyond it, with a header across two, and over several.
    for (first, len) in [(3, 40), (3, 485), (3, 486), (490, 40), (100, 1500), (3, 0)] {
        let (good, last) = (frame(&content(first)), frame(&content(len)));
        let start = good.len();
        let file = [&good[..], &last].concat();
        // Without what opening or closing it syncs, as there are thousands of them.
        let mut scratch = tempfile::tempfile().unwrap();
        let mut looks_torn = |file: &[u8]| {
            scratch.set_len(0).unwrap();
            scratch.rewind().unwrap();
            scratch.write_all(file).unwrap();
            scratch.rewind().unwrap();
            let (records, end, damage) = read_records(&scratch, length(file)).unwrap();
            assert_eq!((records, end), (vec![content(first)], length(&good)), "{len} bytes behind {first}");
            match damage {
                End::Clean => panic!("it is reported"),
                End::Torn => true,
                End::Bad => false,
            }
        };
        for end in start + 1..file.len() {
            assert!(looks_torn(&file[..end]), "{end} of {} bytes are there", file.len());
        }
        // In its length it may look like a crash.
        for at in start..file.len() {
            for bit in 0..8 {
                let mut flipped = file.clone();
                flipped[at] ^= 1_u8 << bit;
                let torn = looks_torn(&flipped);
                assert!(at < start + 4 || !torn, "bit {bit} of byte {at} of {}", file.len());
            }
        }
        for zeros in start + 4..file.len() {
            let mut cut = file.clone();
            cut[zeros..].fill(0);
            assert_eq!(looks_torn(&cut), may_be_torn(&cut, start), "zeros from {zeros} on");
            assert!(zeros % 512 != 0 || may_be_torn(&cut, start));
        }
        let mut flipped = file.clone();
        flipped[start + 7] ^= 1;
        fs::write(&path, &flipped).unwrap();
        let bytes = length(&last);
        assert_eq!(read(&path).1, Some(bad_record(length(&good), bytes)));
        assert_eq!(fs::read(&damaged).unwrap(), flipped[start..]);
    }
}

#[test]
fn a_length_beyond_the_end_is_damage_where_records_follow() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let good = frame(b"good");
    for later in [vec![frame(b"later")], vec![frame(b""), frame(b"last")], vec![frame(b"later"), vec![9; 30]]]
    {
        let mut bad = frame(b"spoiled");
        // 1 MiB more, or what reaches to the end.
        let (to_end, rest) = (b"spoiled".len() + later.concat().len(), later.concat());
        for len in [b"spoiled".len() + (1 << 20), to_end] {
            bad[..4].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
            let lost = [&bad[..], &rest].concat();
            fs::write(&path, [&good[..], &lost].concat()).unwrap();
            let (records, damage) = read(&path);
            assert_eq!(records, [b"good".to_vec()]);
            assert_eq!(damage, Some(bad_record(length(&good), length(&lost))));
            assert_eq!(fs::read(dir.path().join("log.damaged")).unwrap(), lost);
        }
    }
}

#[test]
fn a_long_torn_record_is_torn_and_not_searched_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut noise = 1_u64;
    let mut byte = || {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        noise.to_be_bytes()[0]
    };
    let torn = frame(&(0..1 << 19).map(|_| byte()).collect::<Vec<_>>());
    fs::write(&path, &torn[..torn.len() - 1]).unwrap();
    let bytes = length(&torn) - 1;
    assert_eq!(read(&path), (vec![], Some(Damage::TornTail { offset: 0, bytes })));
    assert!(!dir.path().join("log.damaged").exists());
    // Lengths of half a MiB everywhere: what cannot be looked through is kept.
    let torn = frame(&[0, 0, 8, 0].repeat(1 << 18));
    fs::write(&path, &torn[..torn.len() - 1]).unwrap();
    let bytes = length(&torn) - 1;
    assert_eq!(read(&path), (vec![], Some(bad_record(0, bytes))));
}

#[test]
fn zeros_and_absurd_lengths_are_damage_and_allocate_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    for tail in [vec![0; 4096], vec![0xff; 4096]] {
        fs::write(&path, [frame(b"good"), tail].concat()).unwrap();
        let (records, damage) = read(&path);
        assert_eq!(records, [b"good".to_vec()]);
        assert_eq!(damage, Some(bad_record(16, 4096)));
    }
}

#[test]
fn a_record_beyond_the_limit_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let (mut log, ..) = RecordLog::open(&path).unwrap();
    log.append(b"one").unwrap();
    let large = vec![0; MAX_RECORD_LEN + 1];
    assert_eq!(log.append(&large).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(log.rewrite([&large]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    log.append(b"two").unwrap();
    log.sync().unwrap();
    assert_eq!(read(&path), (vec![b"one".to_vec(), b"two".to_vec()], None));
}

#[test]
fn after_a_failed_write_nothing_more_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let (mut log, ..) = RecordLog::open(&path).unwrap();
    log.append(b"one").unwrap();
    // A handle that cannot write stands in for a disk that fails.
    log.file = File::open(&path).unwrap();
    assert!(log.append(b"two").is_err());
    log.file = OpenOptions::new().append(true).open(&path).unwrap();
    assert!(log.append(b"three").unwrap_err().to_string().contains("open the log again"));
    assert!(log.sync().is_err());
    assert_eq!(read(&path), (vec![b"one".to_vec()], None));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_crash_at_any_byte_leaves_a_prefix(
        records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let frames: Vec<_> = records.iter().map(|record| frame(record)).collect();
        let file = frames.concat();
        let cut = cut.index(file.len() + 1);
        fs::write(&path, &file[..cut]).unwrap();
        let mut whole = 0;
        let mut end = 0;
        while whole < frames.len() && end + frames[whole].len() <= cut {
            end += frames[whole].len();
            whole += 1;
        }
        let (mut log, found, damage) = RecordLog::open(&path).unwrap();
        prop_assert_eq!(&found[..], &records[..whole]);
        let torn = (end < cut).then(|| Damage::TornTail {
            offset: end.try_into().unwrap(),
            bytes: (cut - end).try_into().unwrap(),
        });
        prop_assert_eq!(damage, torn);
        log.append(b"next").unwrap();
        let (found, damage) = read(&path);
        prop_assert_eq!(found.len(), whole + 1);
        prop_assert_eq!(damage, None);
    }

    #[test]
    fn no_flipped_bit_goes_unnoticed(
        records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..8),
        at in any::<prop::sample::Index>(),
        bit in 0..8,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file: Vec<u8> = records.iter().flat_map(|record| frame(record)).collect();
        let at = at.index(file.len());
        file[at] ^= 1_u8 << bit;
        fs::write(&path, &file).unwrap();
        let (found, damage) = read(&path);
        prop_assert!(damage.is_some());
        prop_assert!(found.len() < records.len());
        prop_assert_eq!(&found[..], &records[..found.len()]);
        // Only that of the length of the last record may pass for a crash, and where it is of zeros itself.
        let offset = found.iter().map(|record| frame(record).len()).sum::<usize>();
        if found.len() + 1 < records.len() || (at >= offset + 4 && !may_be_torn(&file, offset)) {
            prop_assert!(matches!(damage, Some(Damage::BadRecord { .. })), "{:?}", damage);
            prop_assert_eq!(&fs::read(dir.path().join("log.damaged")).unwrap(), &file[offset..]);
        }
    }
}
