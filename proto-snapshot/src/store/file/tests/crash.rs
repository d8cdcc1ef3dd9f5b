//! A process that writes, or installs, is killed with SIGKILL at random moments. Whatever it said to be durable has to be there.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt as _;

use super::support::*;
use crate::extent::{Extent, ExtentRecord, FileExtents};
use crate::store::{SnapshotStore as _, Staging as _};

const DIR: &str = "PROTO_SNAPSHOT_STORE_CRASH_DIR";

fn files() -> Files {
    let mut files: Files =
        (0..40).map(|n| (format!("small/{}/{n}", n % 7), content(n, 3000 + n as usize))).collect();
    files.push(("large".to_owned(), content(99, 6 << 20)));
    files.push(("empty".to_owned(), Vec::new()));
    files
}

/// Runs one of the `child_` functions below in a process of its own.
fn spawn(function: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("store::file::tests::crash::{function}")])
        .args(["--nocapture", "--ignored", "--test-threads=1"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What the child said before it was killed, or before it ended by itself: lines that begin with `mark`. It is killed after
/// `lines` of them and a pause.
fn read_then_kill(mut child: Child, mark: &str, lines: usize, pause: Duration) -> (Vec<String>, bool) {
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut said = Vec::new();
    let mut read = |said: &mut Vec<String>| {
        let mut line = String::new();
        let more = output.read_line(&mut line).unwrap() > 0;
        // A line that was cut off by the kill was not said.
        if line.ends_with('\n') {
            said.extend(line.split_once(mark).map(|(_, rest)| rest.trim().to_owned()));
        }
        more
    };
    while said.len() < lines && read(&mut said) {}
    let until = Instant::now() + pause;
    while Instant::now() < until {
        std::hint::spin_loop();
    }
    let ended = child.try_wait().unwrap().is_some();
    child.kill().unwrap();
    child.wait().unwrap();
    while read(&mut said) {}
    (said, !ended)
}

fn gaps(records: &[ExtentRecord], files: &Files) -> Vec<(u32, usize, usize)> {
    let mut there = vec![FileExtents::default(); files.len()];
    for record in records {
        there[record.extent.file as usize]
            .insert(record.extent.offset, record.extent.len, record.crc)
            .unwrap();
    }
    let mut gaps = Vec::new();
    for ((number, (_, content)), there) in (0..).zip(files).zip(&there) {
        for (offset, len) in there.gaps(content.len() as u64) {
            gaps.push((number, offset as usize, len as usize));
        }
    }
    gaps
}

/// Goes on with the transfer, four chunks at a time, written while others are synced; says what is durable.
#[test]
#[ignore = "is run by another test, in a process of its own"]
fn child_that_writes() {
    let dir = std::env::var_os(DIR).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
    runtime.block_on(async {
        let files = Arc::new(files());
        let (store, mut recovered) = open_with(
            Path::new(&dir),
            // Fewer handles than files, so that files are synced that were closed before.
            super::FileStoreOptions { max_open_files: 8, ..options() },
        )
        .await;
        assert_eq!(recovered.staged.len(), 1, "{:?}", recovered.damage);
        let staging = recovered.staged.remove(0);
        let mut todo = Vec::new();
        for (file, offset, len) in gaps(&staging.records(), &files) {
            let step = rand::rng().random_range(1000..60_000);
            for at in (offset..offset + len).step_by(step) {
                todo.push((file, at, step.min(offset + len - at)));
            }
        }
        let mut tasks = tokio::task::JoinSet::new();
        for part in todo.chunks(todo.len().div_ceil(4).max(1)) {
            let (staging, files, part) = (Arc::clone(&staging), Arc::clone(&files), part.to_vec());
            tasks.spawn(async move {
                for batch in part.chunks(3) {
                    let (chunks, records) = batch
                        .iter()
                        .map(|&(file, at, len)| chunk(&files, file, at, len))
                        .unzip::<_, _, Vec<_>, Vec<_>>();
                    staging.write(chunks).await.unwrap();
                    staging.sync(records.clone()).await.unwrap();
                    let mut said = String::new();
                    for ExtentRecord { extent, .. } in records {
                        said += &format!("durable {} {} {}\n", extent.file, extent.offset, extent.len);
                    }
                    std::io::stdout().write_all(said.as_bytes()).unwrap();
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        println!("durable all");
        drop(store);
    });
}

#[tokio::test]
async fn what_was_synced_survives_sigkill() {
    let dir = tempfile::tempdir().unwrap();
    let files = files();
    let (store, _) = open(dir.path()).await;
    drop(store.stage(&plan("t1", 1, &files)).await.unwrap());
    drop(store);
    let mut durable: BTreeMap<(u32, u64), u64> = BTreeMap::new();
    let mut killed = 0;
    for round in 0.. {
        assert!(round < 60, "the transfer does not get on");
        let lines = rand::rng().random_range(0..60);
        let pause = Duration::from_micros(rand::rng().random_range(0..20_000));
        let (said, alive) = read_then_kill(spawn("child_that_writes", dir.path()), "durable ", lines, pause);
        killed += usize::from(alive);
        for line in &said {
            if let [file, offset, len] = line.split(' ').collect::<Vec<_>>()[..] {
                durable.insert((file.parse().unwrap(), offset.parse().unwrap()), len.parse().unwrap());
            }
        }
        let (store, mut recovered) = open(dir.path()).await;
        let staging = recovered.staged.remove(0);
        let records = staging.records();
        let mut there = vec![FileExtents::default(); files.len()];
        for record in &records {
            let Extent { file, offset, len } = record.extent;
            there[file as usize].insert(offset, len, record.crc).unwrap();
            assert_eq!(
                staging.checksum(record.extent).await.unwrap(),
                record.crc,
                "round {round}: {record:?}"
            );
            let (_, expected) = chunk(&files, file, offset as usize, len as usize);
            assert_eq!(record.crc, expected.crc, "round {round}: {record:?}");
        }
        for (&(file, offset), &len) in &durable {
            let missing = there[file as usize].gaps(offset + len).any(|(at, gap)| at + gap > offset);
            assert!(
                !missing,
                "round {round}: {len} bytes at {offset} of file {file} were durable and are gone"
            );
        }
        if gaps(&records, &files).is_empty() {
            install(&staging, &files).await;
            assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
            break;
        }
    }
    assert!(killed >= 3, "only {killed} processes were killed while they worked");
}

fn generation(index: u64) -> Files {
    (0..5).map(|n| (format!("d{}/f{n}", n % 2), content(index * 10 + n, 20_000))).collect()
}

/// Installs one snapshot after the other, each newer than the last; finishes first what it finds.
#[test]
#[ignore = "is run by another test, in a process of its own"]
fn child_that_installs() {
    let dir = std::env::var_os(DIR).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let (store, recovered) = open(Path::new(&dir)).await;
        assert_eq!(recovered.damage, Vec::<String>::new());
        for staging in recovered.staged {
            let files = generation(staging.plan().spec.point.index);
            let mut there = staging.records();
            if staging.state() == crate::store::StagingState::Open {
                for (file, offset, len) in gaps(&there, &files) {
                    let (chunk, record) = chunk(&files, file, offset, len);
                    staging.write(vec![chunk]).await.unwrap();
                    there.push(record);
                    staging.sync(vec![record]).await.unwrap();
                }
            }
            install(&staging, &files).await;
        }
        let from = store.shard(&shard()).await.unwrap().high_water.map_or(1, |point| point.index + 1);
        for index in from..from + 1000 {
            let files = generation(index);
            let staging = store.stage(&plan(&format!("t{index}"), index, &files)).await.unwrap();
            fill(&staging, &files).await;
            install(&staging, &files).await;
            println!("installed {index}");
        }
    });
}

#[tokio::test]
async fn an_install_is_whole_or_can_be_finished_whatever_moment_it_is_killed_at() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (mut acknowledged, mut interrupted, mut half_way) = (0, 0, 0);
    for round in 0..25 {
        let lines = rand::rng().random_range(0..4);
        let pause = Duration::from_micros(rand::rng().random_range(0..15_000));
        let child = spawn("child_that_installs", dir.path());
        let (said, alive) = read_then_kill(child, "installed ", lines, pause);
        interrupted += u32::from(alive);
        acknowledged = said.iter().map(|line| line.parse().unwrap()).chain([acknowledged]).max().unwrap();

        let (store, recovered) = open(dir.path()).await;
        assert_eq!(recovered.damage, Vec::<String>::new(), "round {round}");
        half_way += u32::from(!recovered.staged.is_empty());
        let Some((id, found)) = current(&store).await else {
            assert_eq!(acknowledged, 0);
            continue;
        };
        let index: u64 = id.as_str()[1..].parse().unwrap();
        assert!(index >= acknowledged, "round {round}: {index} is current, {acknowledged} was acknowledged");
        assert_eq!(found, as_tree(&generation(index)), "round {round}");
        assert_eq!(store.shard(&shard()).await.unwrap().high_water, Some(spec("t", index).point));
    }
    assert!(acknowledged > 0 && interrupted > 0 && half_way > 0, "{acknowledged} {interrupted} {half_way}");
}
