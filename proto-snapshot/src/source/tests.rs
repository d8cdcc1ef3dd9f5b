//! Tests of the sources.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use proptest::prelude::*;
use proto_common::path::FileName;

use super::*;

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 31 + n / 251) as u8).collect()
}

async fn read<S: SnapshotSource>(
    source: &S,
    file: u32,
    offset: u64,
    len: Option<u64>,
    piece: usize,
) -> Result<Vec<Bytes>, SourceError> {
    source.open(file, offset, len, piece).await?.try_collect().await
}

/// Pieces have exactly the asked length, but for the last.
fn assert_pieces(pieces: &[Bytes], piece: usize, expected: &[u8]) {
    assert_eq!(pieces.concat(), expected);
    if let Some((last, all)) = pieces.split_last() {
        assert!(
            all.iter().all(|one| one.len() == piece),
            "{:?}",
            pieces.iter().map(Bytes::len).collect::<Vec<_>>()
        );
        assert!(!last.is_empty() && last.len() <= piece);
    }
}

/// On a disk, as a rule, and in memory, where there is a file system for that: both are read in their own way.
fn directories() -> Vec<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let memory = memory.is_dir().then(|| tempfile::tempdir_in(memory).unwrap());
    std::iter::once(tempfile::tempdir().unwrap()).chain(memory).collect()
}

fn touch_later(path: &Path) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_modified(modified + Duration::from_nanos(1000))
        .unwrap();
}

#[tokio::test]
async fn a_directory_is_listed_in_order_with_what_identifies_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("b/deep")).unwrap();
    fs::create_dir_all(at("empty/dir")).unwrap();
    for (name, len) in [("b/deep/z", 10), ("b-", 0), ("b/a", 3), ("a", 5), ("caf\u{e9}", 1), (".hidden", 2)] {
        fs::write(at(name), bytes(len)).unwrap();
    }
    let source = DirectorySource::new(dir.path());
    let first = source.describe(false).await.unwrap();
    let names: Vec<_> = first.files.iter().map(|file| (file.name.as_str(), file.size.unwrap())).collect();
    let expected = [(".hidden", 2), ("a", 5), ("b/a", 3), ("b/deep/z", 10), ("b-", 0), ("caf\u{e9}", 1)];
    assert_eq!(names, expected);
    assert!(first.content_version.len() <= crate::spec::MAX_CONTENT_VERSION);
    crate::spec::Manifest::new(first.files).unwrap();
    // The same again, also from another source; with digests it is the same version.
    let again = DirectorySource::new(dir.path()).describe(true).await.unwrap();
    assert_eq!(again.content_version, first.content_version);
    assert_eq!(again.files[3].blake3, Some(Box::new(*blake3::hash(&bytes(10)).as_bytes())));
    assert_eq!(again.files[4].blake3, Some(Box::new(*blake3::hash(b"").as_bytes())));
    for (number, (_, len)) in (0..).zip(expected) {
        assert_pieces(&read(&source, number, 0, None, 4).await.unwrap(), 4, &bytes(len as usize));
    }
}

#[tokio::test]
async fn many_directories_and_a_very_large_one_are_listed_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = Vec::new();
    for number in 0..2000 {
        // Twenty directories within each other's neighbours, and all others in one.
        let name = match number % 20 {
            0 => format!("{}/deep/{number:04}", number / 100),
            _ => format!("flat/{number:04}"),
        };
        let path = dir.path().join(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes(number % 7)).unwrap();
        expected.push((FileName::new(&name).unwrap(), Some(number as u64 % 7)));
    }
    expected.sort();
    let files = DirectorySource::new(dir.path()).describe(false).await.unwrap().files;
    assert_eq!(files.into_iter().map(|file| (file.name, file.size)).collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn whatever_changes_the_content_changes_the_version() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    fs::write(&path, "one").unwrap();
    let source = DirectorySource::new(dir.path());
    let mut seen = vec![source.describe(false).await.unwrap().content_version];
    let mut new = async |what: &str| {
        let version = source.describe(false).await.unwrap().content_version;
        assert!(!seen.contains(&version), "{what}");
        seen.push(version);
    };
    touch_later(&path);
    new("touched").await;
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, "four").unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    new("another size, the same time").await;
    fs::write(dir.path().join("copy"), "four").unwrap();
    fs::File::options().write(true).open(dir.path().join("copy")).unwrap().set_modified(modified).unwrap();
    fs::rename(dir.path().join("copy"), &path).unwrap();
    new("another inode, the same size and time").await;
    fs::rename(&path, dir.path().join("b")).unwrap();
    new("renamed").await;
}

#[tokio::test]
async fn all_that_cannot_be_sent_is_listed_at_once() {
    use std::os::unix::ffi::OsStrExt as _;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("fine"), "x").unwrap();
    fs::create_dir(at("sub")).unwrap();
    symlink(at("fine"), at("sub/link")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    symlink(dir.path(), at("loop")).unwrap();
    fs::write(at("back\\slash"), "x").unwrap();
    fs::write(at("new\nline"), "x").unwrap();
    fs::create_dir(at("bad\tdir")).unwrap();
    fs::write(at("bad\tdir/x"), "x").unwrap();
    fs::write(at("").join(std::ffi::OsStr::from_bytes(b"not\xffutf8")), "x").unwrap();
    drop(std::os::unix::net::UnixListener::bind(at("socket")).unwrap());
    let error = DirectorySource::new(dir.path()).describe(false).await.unwrap_err();
    let SourceError::Unsupported { entries } = &error else { panic!("{error:?}") };
    let expected = ["back", "new", "bad", "not", "dangling", "loop", "socket", "sub/link"];
    assert_eq!(entries.len(), expected.len(), "{entries:#?}");
    for name in expected {
        assert!(entries.iter().any(|entry| entry.starts_with(name)), "{name}: {entries:#?}");
    }
    assert!(!error.to_string().contains('\n'));
    assert!(!entries.iter().any(|entry| entry.starts_with("fine")));
    // The directory itself may be a link.
    let other = tempfile::tempdir().unwrap();
    fs::create_dir(other.path().join("real")).unwrap();
    fs::write(other.path().join("real/f"), "x").unwrap();
    symlink(other.path().join("real"), other.path().join("link")).unwrap();
    assert_eq!(DirectorySource::new(other.path().join("link")).describe(false).await.unwrap().files.len(), 1);
    let error = DirectorySource::new(other.path().join("absent")).describe(false).await.unwrap_err();
    assert!(matches!(error, SourceError::Io { .. }), "{error:?}");
}

#[tokio::test]
async fn a_directory_of_names_that_are_too_deep_is_refused_without_following_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut at = dir.path().to_owned();
    for _ in 0..6 {
        at.push("d".repeat(200));
    }
    fs::create_dir_all(&at).unwrap();
    fs::write(at.join("f"), "x").unwrap();
    let error = DirectorySource::new(dir.path()).describe(false).await.unwrap_err();
    assert!(matches!(&error, SourceError::Unsupported { entries } if entries.len() == 1), "{error:?}");
    assert!(error.to_string().len() < 600);
}

#[tokio::test]
async fn any_extent_is_read_in_exact_pieces() {
    for dir in directories() {
        let path = dir.path().join("file");
        let content = bytes(300_000);
        fs::write(&path, &content).unwrap();
        let source = FileSource::new(&path);
        let described = source.describe(true).await.unwrap();
        assert_eq!(described.files[0].name.as_str(), "file");
        assert_eq!(described.files[0].blake3, Some(Box::new(*blake3::hash(&content).as_bytes())));
        for (offset, len, piece) in [
            (0, None, 65536),
            (0, Some(300_000), 300_000),
            (0, Some(300_000), 299_999),
            (1, Some(299_999), 1000),
            (299_999, Some(1), 10),
            (300_000, None, 10),
            (5, Some(0), 10),
            (100, Some(50_000), 1 << 20),
        ] {
            let pieces = read(&source, 0, offset as u64, len, piece).await.unwrap();
            let end = len.map_or(content.len(), |len| offset + len as usize);
            assert_pieces(&pieces, piece, &content[offset..end]);
        }
        for (file, offset, len) in
            [(1, 0, None), (0, 300_001, None), (0, 1, Some(300_000)), (0, 1, Some(u64::MAX))]
        {
            let error = read(&source, file, offset, len, 1000).await.unwrap_err();
            assert!(matches!(&error, SourceError::Io { .. }), "{error:?}");
        }
        let named = FileSource::new(&path).named(FileName::new("other/name").unwrap());
        assert_eq!(named.describe(false).await.unwrap().files[0].name.as_str(), "other/name");
        assert!(read(&named, 0, 0, None, 10).await.is_ok());
    }
}

#[tokio::test]
async fn a_file_source_takes_files_only() {
    let dir = tempfile::tempdir().unwrap();
    let error = FileSource::new(dir.path()).describe(false).await.unwrap_err();
    assert!(matches!(error, SourceError::Unsupported { .. }), "{error:?}");
    let error = FileSource::new(dir.path().join("absent")).describe(false).await.unwrap_err();
    assert!(matches!(error, SourceError::Changed { .. } | SourceError::Io { .. }), "{error:?}");
    fs::write(dir.path().join("bad\nname"), "x").unwrap();
    let error = FileSource::new(dir.path().join("bad\nname")).describe(false).await.unwrap_err();
    assert!(matches!(error, SourceError::Unsupported { .. }), "{error:?}");
    let error = read(&FileSource::new(dir.path()), 0, 0, None, 10).await.unwrap_err();
    assert!(matches!(error, SourceError::Io { .. }), "not described: {error:?}");
}

#[tokio::test]
async fn a_file_that_changed_since_it_was_described_is_not_sent() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 5] = [
        ("grown", |path| fs::write(path, bytes(200_001)).unwrap()),
        ("shorter", |path| fs::write(path, bytes(10)).unwrap()),
        ("removed", |path| fs::remove_file(path).unwrap()),
        ("touched", touch_later),
        ("replaced", |path| {
            let modified = fs::metadata(path).unwrap().modified().unwrap();
            let other = path.with_extension("other");
            fs::write(&other, vec![0; 200_000]).unwrap();
            fs::File::options().write(true).open(&other).unwrap().set_modified(modified).unwrap();
            fs::rename(other, path).unwrap();
        }),
    ];
    for ((what, change), dir) in
        changes.into_iter().flat_map(|change| directories().into_iter().map(move |dir| (change, dir)))
    {
        let path = dir.path().join("file");
        fs::write(&path, bytes(200_000)).unwrap();
        let source = FileSource::new(&path);
        source.describe(false).await.unwrap();
        assert!(read(&source, 0, 0, None, 1000).await.is_ok());
        change(&path);
        for (len, piece) in [(None, 1000), (Some(5), 1000)] {
            let error = read(&source, 0, 0, len, piece).await.unwrap_err();
            assert!(matches!(error, SourceError::Changed { .. }), "{what}: {error:?}");
        }
    }
}

#[tokio::test]
async fn a_file_that_changes_while_it_is_read_is_never_read_to_its_end() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 2] = [
        ("touched", touch_later),
        ("shorter", |path| fs::File::options().write(true).open(path).unwrap().set_len(50_000).unwrap()),
    ];
    for ((what, change), dir) in
        changes.into_iter().flat_map(|change| directories().into_iter().map(move |dir| (change, dir)))
    {
        let path = dir.path().join("file");
        fs::write(&path, bytes(100_000)).unwrap();
        let source = FileSource::new(&path);
        source.describe(false).await.unwrap();
        let mut pieces = source.open(0, 0, None, 10_000).await.unwrap();
        let first = pieces.next().await.unwrap().unwrap();
        assert_eq!(first, bytes(100_000)[..10_000]);
        change(&path);
        let rest: Vec<_> = pieces.collect().await;
        let (last, before) = rest.split_last().unwrap();
        assert!(before.iter().all(Result::is_ok) && before.len() < 9, "{what}: {}", before.len());
        assert!(matches!(last, Err(SourceError::Changed { .. })), "{what}: {last:?}");
    }
}

/// It never waits for a piece, so all that ends its turns is the budget that tokio gives each.
#[tokio::test]
async fn who_is_slower_than_the_disk_gets_all_pieces() {
    for dir in directories() {
        let content = bytes(400_000);
        fs::write(dir.path().join("file"), &content).unwrap();
        let source = FileSource::new(dir.path().join("file"));
        source.describe(false).await.unwrap();
        let mut pieces = source.open(0, 0, None, 1000).await.unwrap();
        let mut read = Vec::new();
        while let Some(piece) = pieces.next().await {
            read.extend_from_slice(&piece.unwrap());
            std::thread::sleep(Duration::from_micros(500));
        }
        assert_eq!(read.len(), content.len());
    }
}

/// The store of the node writes on the same threads, and a peer may stall as many streams as it likes.
#[test]
fn a_stream_that_nobody_reads_on_keeps_no_thread() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let content = bytes(100_000);
        fs::write(dir.path().join("file"), &content).unwrap();
        let source = FileSource::new(dir.path().join("file"));
        source.describe(false).await.unwrap();
        let mut stalled = Vec::new();
        for _ in 0..3 {
            let mut pieces = source.open(0, 0, None, 1000).await.unwrap();
            let first = pieces.next().await.unwrap().unwrap();
            stalled.push((first, pieces));
        }
        let other = tokio::task::spawn_blocking(|| ());
        tokio::time::timeout(Duration::from_secs(30), other).await.expect("a thread is free").unwrap();
        // They go on where they were.
        for (first, rest) in stalled {
            let mut read = first.to_vec();
            for piece in rest.collect::<Vec<_>>().await {
                read.extend_from_slice(&piece.unwrap());
            }
            assert_eq!(read, content);
        }
    });
}

/// Nobody takes more than the first piece: few of the others are read.
#[tokio::test]
async fn reads_at_most_four_pieces_ahead_and_ends_when_dropped() {
    for dir in directories() {
        let path = dir.path().join("file");
        fs::write(&path, bytes(100_000)).unwrap();
        let source = FileSource::new(&path);
        source.describe(false).await.unwrap();
        let mut pieces = source.open(0, 0, None, 1000).await.unwrap();
        pieces.next().await.unwrap().unwrap();
        // While it is held up, what comes after the pieces that were read ahead is cut off; whoever reads on sees that.
        tokio::time::sleep(Duration::from_millis(50)).await;
        fs::File::options().write(true).open(&path).unwrap().set_len(1000).unwrap();
        let read: Vec<_> = pieces.collect().await;
        assert!(read.iter().filter(|piece| piece.is_ok()).count() <= 4, "{}", read.len());
        assert!(read.last().unwrap().is_err());
        let pieces = source.open(0, 0, None, 1000).await;
        assert!(pieces.is_err());
        fs::write(&path, bytes(100_000)).unwrap();
        source.describe(false).await.unwrap();
        drop(source.open(0, 0, None, 10).await.unwrap());
        // The runtime waits for blocking tasks when it ends: this test would hang if the reader did not.
    }
}

#[tokio::test]
async fn describing_stops_when_nobody_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = fs::File::create(dir.path().join("sparse")).unwrap();
    // Hashing this takes minutes in a debug build.
    file.set_len(1 << 40).unwrap();
    let source = DirectorySource::new(dir.path());
    let given_up = tokio::time::timeout(Duration::from_millis(50), source.describe(true)).await;
    assert!(given_up.is_err());
    // As above, the end of the runtime waits for it.
}

type Opened = futures::stream::Iter<std::vec::IntoIter<io::Result<Bytes>>>;

fn items(content: &[u8], lens: &[usize], offset: u64) -> Opened {
    let mut rest = Bytes::copy_from_slice(&content[offset as usize..]);
    let mut items = Vec::new();
    for len in lens.iter().cycle().take(content.len() + lens.len()) {
        items.push(Ok(rest.split_to((*len).min(rest.len()))));
    }
    if !rest.is_empty() {
        items.push(Ok(rest));
    }
    stream::iter(items)
}

proptest! {
    #[test]
    fn a_stream_is_cut_into_exact_pieces(
        len in 0..3000_usize,
        lens in prop::collection::vec(0..400_usize, 1..6),
        piece in 1..500_usize,
        offset in 0..3000_usize,
        limit in prop::option::of(0..3000_usize),
    ) {
        let content = bytes(len);
        let offset = offset.min(len);
        let limit = limit.map(|limit| limit.min(len - offset));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (inner, sizes) = (content.clone(), lens);
        let source = StreamSource::new(FileName::new("dump").unwrap(), "v", move |offset| {
            let opened = items(&inner, &sizes, offset);
            async { Ok(opened) }
        })
        .seekable();
        let pieces = runtime.block_on(read(&source, 0, offset as u64, limit.map(|limit| limit as u64), piece)).unwrap();
        let end = limit.map_or(len, |limit| offset + limit);
        assert_pieces(&pieces, piece, &content[offset..end]);
    }
}

#[tokio::test]
async fn a_stream_is_described_without_being_opened() {
    let opened = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&opened);
    let source = StreamSource::new(FileName::new("dump").unwrap(), "generation-1", move |_| {
        counter.fetch_add(1, Ordering::Relaxed);
        async { Ok(stream::iter([Ok(Bytes::from_static(b"abc"))])) }
    });
    let described = source.describe(true).await.unwrap();
    assert_eq!(described.content_version, "generation-1");
    assert_eq!((described.files[0].size, &described.files[0].blake3), (None, &None));
    assert_eq!(opened.load(Ordering::Relaxed), 0);
    assert!(!source.can_seek());
    assert!(read(&source, 0, 1, None, 10).await.is_err());
    assert!(read(&source, 1, 0, None, 10).await.is_err());
    assert_eq!(opened.load(Ordering::Relaxed), 0);
    assert_eq!(read(&source, 0, 0, None, 10).await.unwrap().concat(), b"abc");
    assert!(source.seekable().can_seek());
}

#[tokio::test]
async fn a_stream_that_fails_or_ends_early_says_so() {
    let failing = StreamSource::new(FileName::new("dump").unwrap(), "v", |_| async {
        Ok(stream::iter([Ok(Bytes::from_static(b"abcde")), Err(io::Error::other("broken"))]))
    });
    let read_all: Vec<_> = failing.open(0, 0, None, 2).await.unwrap().collect().await;
    assert_eq!(read_all.len(), 3);
    assert!(matches!(&read_all[2], Err(SourceError::Io { source, .. }) if source.to_string() == "broken"));
    let error = read(&failing, 0, 0, Some(6), 3).await.unwrap_err();
    assert!(matches!(error, SourceError::Io { .. }), "{error:?}");
    let short = StreamSource::new(FileName::new("dump").unwrap(), "v", |_| async {
        Ok(stream::iter([Ok(Bytes::from_static(b"abcde"))]))
    });
    let error = read(&short, 0, 0, Some(6), 3).await.unwrap_err();
    assert!(matches!(error, SourceError::Changed { .. }), "{error:?}");
    let closed = StreamSource::new(FileName::new("dump").unwrap(), "v", |_| async {
        Err::<Opened, _>(io::Error::other("no"))
    });
    assert!(read(&closed, 0, 0, None, 3).await.is_err());
}

#[tokio::test]
async fn small_files_in_order_are_read_ahead_and_still_checked() {
    for dir in directories() {
        let at = |number: usize| dir.path().join(format!("{number:04}"));
        // Every seventh is empty and never asked for, one is large.
        let len = |number: usize| match number {
            150 => 200_000,
            number if number % 7 == 0 => 0,
            number => 100 + number,
        };
        for number in 0..300 {
            fs::write(at(number), bytes(len(number))).unwrap();
        }
        let source = DirectorySource::new(dir.path());
        source.describe(false).await.unwrap();
        let asked: Vec<usize> = (0..300).filter(|number| len(*number) > 0).collect();
        for number in asked.iter().copied().filter(|number| *number < 280) {
            let file = u32::try_from(number).unwrap();
            let found = read(&source, file, 0, Some(len(number) as u64), 1 << 20).await.unwrap();
            assert_eq!(found.concat(), bytes(len(number)), "file {number}");
            if number == 10 {
                // What comes after it is in memory, as it was when it was described.
                fs::remove_file(at(11)).unwrap();
            }
            if number == 151 {
                // Not yet: no batch goes beyond a large file.
                fs::write(at(299), "other").unwrap();
            }
        }
        let mut last = Ok(Vec::new());
        for number in asked.iter().copied().filter(|number| *number >= 280) {
            last = read(&source, number as u32, 0, None, 1 << 20).await;
            assert_eq!(last.is_ok(), number != 299, "file {number}");
        }
        assert!(matches!(last, Err(SourceError::Changed { .. })), "{last:?}");
        // By itself, out of order.
        assert_eq!(read(&source, 20, 0, None, 1 << 20).await.unwrap().concat(), bytes(120));
        assert!(matches!(read(&source, 11, 0, None, 1 << 20).await, Err(SourceError::Changed { .. })));
    }
}

/// However many files are there to be sent, in memory, other tasks get their turn.
#[tokio::test]
async fn small_files_in_memory_are_read_by_who_asks_in_turns() {
    for dir in directories() {
        for number in 0..200 {
            fs::write(dir.path().join(format!("{number:03}")), bytes(100 + number)).unwrap();
        }
        let source = DirectorySource::new(dir.path());
        source.describe(false).await.unwrap();
        if !source.in_memory() {
            continue;
        }
        assert_eq!(read(&source, 0, 0, None, 1 << 20).await.unwrap().concat(), bytes(100));
        let mut turns = 0;
        for number in 1..200 {
            let mut reading = std::pin::pin!(read(&source, number as u32, 0, None, 1 << 20));
            let read = loop {
                match futures::poll!(reading.as_mut()) {
                    std::task::Poll::Ready(read) => break read.unwrap(),
                    std::task::Poll::Pending => turns += 1,
                }
            };
            assert_eq!(read.concat(), bytes(100 + number), "file {number}");
        }
        assert_eq!(turns, 4, "one for each batch of 64, and none that waits for another thread");
    }
}

/// A read that began before a source was described anew, and ends after: what it has read ahead is not what the files are.
#[test]
fn what_was_read_ahead_is_not_given_out_under_a_new_description() {
    // One thread reads, so that what it does is in order.
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let write = |text: &str| {
            for number in 0..4 {
                fs::write(dir.path().join(number.to_string()), format!("{text}-{number}")).unwrap();
            }
        };
        write("old");
        let source = DirectorySource::new(dir.path());
        source.describe(false).await.unwrap();
        if source.in_memory() {
            return eprintln!(
                "SKIPPED: temporary files lie in memory, where nothing is read ahead on another thread"
            );
        }
        assert_eq!(read(&source, 0, 0, None, 1 << 20).await.unwrap().concat(), b"old-0");
        // Holds the thread, so that the batch is not there at once.
        let (release, held) = std::sync::mpsc::channel::<()>();
        drop(tokio::task::spawn_blocking(move || held.recv()));
        let mut slow = std::pin::pin!(source.open(1, 0, None, 1 << 20));
        assert!(futures::poll!(slow.as_mut()).is_pending());
        drop(release);
        // After the batch that it waits for.
        tokio::task::spawn_blocking(|| ()).await.unwrap();
        write("new");
        source.describe(false).await.unwrap();
        let one: Vec<Bytes> = slow.await.unwrap().try_collect().await.unwrap();
        assert_eq!(one.concat(), b"old-1", "as it was when it was read");
        for number in [2, 3, 0, 1] {
            let bytes = read(&source, number, 0, None, 1 << 20).await.unwrap().concat();
            assert_eq!(bytes, format!("new-{number}").into_bytes());
        }
    });
}
