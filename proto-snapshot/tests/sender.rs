//! A sender against receivers that lie, are lazy, or end at the wrong moment: a scripted server in the same process, on a clock
//! that jumps whenever everybody waits.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed expectation is a failed test"
)]

#[path = "support/peer.rs"]
mod peer;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt as _;
use peer::*;
use prost::Message as _;
use proto_common::connect::connect_fn;
use proto_common::error::{Code, Error};
use proto_common::ids::NodeId;
use proto_common::v1::{Direction, NodeIdentity};
use proto_snapshot::Reason;
use proto_snapshot::limits::{MAX_PAGE_BYTES, MIN_CHUNK_BYTES};
use proto_snapshot::sender::{SenderOptions, SnapshotSender};
use proto_snapshot::transfers::Transfers;
use proto_snapshot::v1::split_snapshot_service_server::SplitSnapshotServiceServer;
use proto_snapshot::v1::transfer_split_snapshot_request::{Chunk, End, Frame, LaneHeader};
use proto_snapshot::v1::transfer_split_snapshot_response::{Accepted, Extent, Frame as Answer, Installed};
use proto_snapshot::v1::*;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};

async fn ends<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(24 * 60 * 60), future).await.expect("it ends")
}

#[tokio::test(start_paused = true)]
async fn a_cancel_that_comes_too_late_ends_as_the_install_does() {
    let (asked, was_asked) = watch::channel(false);
    let mut peer = Peer::new(move |mut call| {
        let mut was_asked = was_asked.clone();
        async move {
            call.header().await;
            call.say(accepted(vec![extent(0, 0, 10)])).await;
            let (_, end) = call.take(0).await;
            call.say(ack(10, 10, 10, TransferPhase::Installing)).await;
            was_asked.wait_for(|asked| *asked).await.unwrap();
            call.say(installed(&end)).await;
        }
    });
    peer.on_cancel = Arc::new(move || {
        asked.send_replace(true);
        async { Err(Reason::TooLateToCancel.error("it is being installed")) }.boxed()
    });
    let mut handle = peer.send(Zeros::new([10]));
    let mut watch = handle.watch().unwrap();
    while watch.next().await.unwrap().phase() != TransferPhase::Installing {}
    handle.cancel();
    ends(handle.join()).await.unwrap();
    assert_eq!(handle.progress().unwrap().phase(), TransferPhase::Installed);
    assert_eq!(peer.streams(), 1);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_while_it_is_not_known_whether_a_cancel_came_in_time() {
    let (taken, count) = watch::channel(0);
    let taken = Arc::new(taken);
    let bytes = Arc::clone(&taken);
    let mut peer = Peer::new(move |mut call| {
        let taken = Arc::clone(&bytes);
        async move {
            call.header().await;
            call.say(accepted(vec![extent(0, 0, 64 * MIB)])).await;
            // One chunk at a time.
            while let Some(frame) = call.next().await {
                if let Frame::Chunk(chunk) = frame {
                    taken.send_modify(|taken| *taken += chunk.payload.len());
                    let taken = *taken.borrow() as u64;
                    sleep(Duration::from_secs(1)).await;
                    call.say(ack(taken, taken, taken + MIB, TransferPhase::Transferring)).await;
                }
            }
        }
    });
    let (answers, since) = (Arc::new(Mutex::new(0)), count.clone());
    let at_cancel = Arc::clone(&answers);
    peer.on_cancel = Arc::new(move || {
        *at_cancel.lock().unwrap() = *since.borrow();
        sleep(Duration::from_secs(25)).map(Ok).boxed()
    });
    let mut handle = peer.send(Zeros::new([64 * MIB]));
    count.clone().wait_for(|taken| *taken > 10 << 20).await.unwrap();
    handle.cancel();
    let error = ends(handle.join()).await.unwrap_err();
    assert!(error.is(Reason::TransferCancelled), "{error:?}");
    assert_eq!(error.to_string(), "the transfer was cancelled at its sender", "25 s are waited for");
    assert_eq!(handle.progress().unwrap().phase(), TransferPhase::Cancelled);
    // What was in the queue already.
    let later = *count.borrow() - *answers.lock().unwrap();
    assert!(later <= 10 << 20, "{later} bytes were sent after the cancel");
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_transfer_ends_when_the_receiver_has_discarded_it() {
    let cancelled = Arc::new(Notify::new());
    let heard = Arc::clone(&cancelled);
    let mut peer = Peer::new(move |mut call| {
        let heard = Arc::clone(&heard);
        async move {
            call.header().await;
            call.say(accepted(vec![extent(0, 0, 10)])).await;
            heard.notified().await;
            // The stream ends first, the removal takes its time.
            call.fail(Reason::TransferCancelled.error("cancelled")).await;
        }
    });
    peer.on_cancel = Arc::new(move || {
        cancelled.notify_one();
        sleep(Duration::from_secs(5)).map(Ok).boxed()
    });
    let mut handle = peer.send(Zeros::new([10]));
    while peer.streams() == 0 {
        sleep(Duration::from_millis(10)).await;
    }
    let start = Instant::now();
    handle.cancel();
    let error = ends(handle.join()).await.unwrap_err();
    assert!(error.is(Reason::TransferCancelled), "{error:?}");
    assert!(start.elapsed() >= Duration::from_secs(5), "it was not waited for");
}

#[tokio::test(start_paused = true)]
async fn a_cancel_says_whether_the_receiver_knows() {
    let quiet = |mut call: Call| async move {
        call.header().await;
        std::future::pending().await
    };
    let mut peer = Peer::new(quiet);
    peer.on_cancel = Arc::new(|| std::future::pending().boxed());
    let mut handle = peer.send(Zeros::new([10]));
    while peer.streams() == 0 {
        sleep(Duration::from_millis(10)).await;
    }
    let start = Instant::now();
    handle.cancel();
    let error = ends(handle.join()).await.unwrap_err();
    assert!(error.is(Reason::TransferCancelled), "{error:?}");
    assert!(error.to_string().contains("did not answer in time"), "{error}");
    assert!(start.elapsed() >= Duration::from_secs(30));

    let peer = Peer::new(quiet);
    let mut handle = peer.send(Zeros::new([10]));
    while peer.streams() == 0 {
        sleep(Duration::from_millis(10)).await;
    }
    peer.refuse.store(1, Ordering::SeqCst);
    handle.cancel();
    let error = ends(handle.join()).await.unwrap_err();
    assert!(error.is(Reason::TransferCancelled), "{error:?}");
    assert!(error.to_string().contains("could not be told (nobody listens)"), "{error}");

    let mut peer = Peer::new(quiet);
    peer.on_cancel = Arc::new(|| {
        let error = Reason::TooLateToCancel.error("it has failed");
        async { Err(error.metadata("phase", TransferPhase::Failed.as_str_name())) }.boxed()
    });
    let mut handle = peer.send(Zeros::new([10]));
    handle.cancel();
    let error = ends(handle.join()).await.unwrap_err();
    assert!(error.is(Reason::TransferCancelled), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_may_keep_its_headers_until_it_has_read_everything() {
    // Four pages at least, so that they fit no queue.
    let source = Zeros { name_len: 200, ..Zeros::new(vec![0; 20_000]) };
    let mut peer = Peer::new(|mut call| async move {
        let (header, files) = call.header().await;
        assert_eq!((header.file_count, files), (20_000, 20_000));
        let installed = Installed { file_count: files, ..Installed::default() };
        call.say(Answer::Accepted(Accepted { already_installed: true, ..terms(Vec::new()) })).await;
        call.say(Answer::Installed(installed)).await;
    });
    peer.lazy = true;
    assert_eq!(ends(peer.send(source).join()).await.unwrap().file_count, 20_000);
    assert_eq!(peer.streams(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_answers_is_given_up_and_tried_again() {
    for reads in [false, true] {
        let mut peer = Peer::new(move |mut call| async move {
            if reads {
                while call.next().await.is_some() {}
            }
            std::future::pending().await
        });
        peer.lazy = true;
        let options = with_patience(60);
        let mut handle = peer.send_with(Zeros::new([10]), options, Transfers::default());
        let error = ends(handle.join()).await.unwrap_err();
        assert!(error.is(Reason::IdleTimeout), "{error:?}");
        assert!((3..5).contains(&peer.streams()), "{}", peer.streams());
    }
}

fn with_patience(seconds: u64) -> SenderOptions {
    let mut options = SenderOptions::default();
    options.give_up_after = Some(Duration::from_secs(seconds));
    options
}

#[tokio::test(start_paused = true)]
async fn what_is_missing_is_believed_only_as_far_as_the_manifest_goes() {
    let sizes = || Zeros { sizes: vec![Some(100), None, Some(1 << 40)], unknown: 10, ..Zeros::new([]) };
    for (name, missing) in [
        ("beyond the manifest", vec![extent(3, 0, 1)]),
        ("beyond the file", vec![extent(0, 1, 100)]),
        ("beyond all numbers", vec![extent(2, 1, u64::MAX)]),
        ("far beyond", vec![extent(0, 0, u64::MAX)]),
        ("far beyond any file", vec![extent(1, 1, u64::MAX - 1)]),
        ("empty", vec![extent(0, 0, 0)]),
        ("open although the size is known", vec![extent(0, 0, None)]),
        ("files out of order", vec![extent(2, 0, 1), extent(0, 0, 1)]),
        ("offsets out of order", vec![extent(0, 50, 1), extent(0, 0, 1)]),
        ("overlapping", vec![extent(0, 0, 51), extent(0, 50, 1)]),
        ("twice", vec![extent(0, 0, 51), extent(0, 0, 51)]),
        ("after an open end", vec![extent(1, 0, None), extent(1, 10, 1)]),
    ] {
        let peer = Peer::new(move |mut call| {
            let missing = missing.clone();
            async move {
                call.header().await;
                call.install(missing).await;
            }
        });
        let mut handle = peer.send(sizes());
        let error = ends(handle.join()).await.unwrap_err();
        assert!(error.is(Reason::InvalidField) && !error.is_retryable(), "{name}: {error:?}");
        assert_eq!(error.violations()[0].field, "accepted.missing", "{name}");
        assert_eq!(handle.progress().unwrap().wire_bytes, 0, "{name}");
        assert_eq!(peer.streams(), 1, "{name}");
    }
}

/// Who asks for a byte in each has the sender read, sum up and frame every one of them.
#[tokio::test(start_paused = true)]
async fn chunks_are_no_smaller_than_it_is_worth() {
    for (max_chunk_bytes, sent) in [(MIN_CHUNK_BYTES, true), (MIN_CHUNK_BYTES - 1, false), (0, false)] {
        let peer = Peer::new(move |mut call| async move {
            call.header().await;
            call.say(Answer::Accepted(Accepted { max_chunk_bytes, ..terms(vec![extent(0, 0, 10_000)]) }))
                .await;
            let (_, end) = call.take(8 * MIB).await;
            call.say(installed(&end)).await;
        });
        match ends(peer.send(Zeros::new([10_000])).join()).await {
            Ok(_) => assert!(sent, "{max_chunk_bytes}"),
            Err(error) => {
                assert!(!sent && error.is(Reason::InvalidField) && !error.is_retryable(), "{error:?}");
                assert_eq!(error.violations()[0].field, "accepted.max_chunk_bytes");
            }
        }
        assert_eq!(peer.streams(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn pages_without_end_are_not_read_for_ever() {
    for per_page in [0_u64, 20_000] {
        let pages = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&pages);
        let peer = Peer::new(move |mut call| {
            let pages = Arc::clone(&count);
            async move {
                call.header().await;
                for page in 0..1000 {
                    let missing =
                        (page * per_page..(page + 1) * per_page).map(|at| extent(0, at * 2, 1)).collect();
                    let page = Answer::Accepted(Accepted { missing, ..Accepted::default() });
                    call.say(page).await;
                    if call.answers.is_closed() {
                        break;
                    }
                    pages.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        let error = ends(peer.send(Zeros::new([1 << 40])).join()).await.unwrap_err();
        assert!(error.is(Reason::InvalidField), "{error:?}");
        assert_eq!(error.violations()[0].field, "accepted.missing");
        assert!(pages.load(Ordering::SeqCst) < 60);
    }
}

/// An empty entry of a page takes twenty times as much memory as bytes.
#[tokio::test(start_paused = true)]
async fn an_answer_that_is_larger_than_an_honest_page_is_not_read() {
    let answer = |bytes: usize| {
        let with = |padding: usize| {
            let supported_features = vec!["x".repeat(padding)];
            Answer::Accepted(Accepted { supported_features, ..terms(vec![extent(0, 0, 100)]) })
        };
        let len = |frame| TransferSplitSnapshotResponse { frame: Some(frame) }.encoded_len();
        // The lengths of what is around it take as many bytes then.
        with(bytes - (len(with(bytes)) - bytes))
    };
    let sent_with = async |bytes: usize| {
        let peer = Peer::new(move |mut call| async move {
            call.header().await;
            call.say(answer(bytes)).await;
            let (_, end) = call.take(8 * MIB).await;
            call.say(installed(&end)).await;
        });
        (ends(peer.send(Zeros::new([100])).join()).await, peer.streams())
    };
    let (largest, _) = sent_with(MAX_PAGE_BYTES).await;
    largest.unwrap();
    let (larger, streams) = sent_with(MAX_PAGE_BYTES + 1).await;
    let error = larger.unwrap_err();
    assert_eq!((error.code(), streams), (Code::OutOfRange, 1), "{error:?}");
    assert!(!error.is_retryable(), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_huge_file_is_not_cut_before_it_is_sent() {
    let peer = Peer::new(|mut call| async move {
        call.header().await;
        call.say(accepted(vec![extent(0, 0, 1 << 62)])).await;
        let _ = call.next().await;
        call.fail(Reason::StaleFence.error("it was accepted")).await;
    });
    let error = ends(peer.send(Zeros::new([1 << 62])).join()).await.unwrap_err();
    assert!(error.is(Reason::StaleFence), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn the_time_before_the_first_failure_is_not_held_against_it() {
    let mut peer = Peer::new(|mut call| async move {
        call.header().await;
        if call.number == 0 {
            // Longer than its patience, but it says so.
            for _ in 0..100 {
                sleep(Duration::from_secs(10)).await;
                call.say(ack(0, 0, 0, TransferPhase::Preparing)).await;
            }
            return call.fail(Reason::StorageFailed.error("the disk is busy")).await;
        }
        call.install(vec![extent(0, 0, 10)]).await;
    });
    peer.refuse = Arc::new(AtomicUsize::new(2));
    let source = Zeros { describing: Duration::from_secs(1000), ..Zeros::new([10]) };
    ends(peer.send_with(source, with_patience(60), Transfers::default()).join()).await.unwrap();
    assert_eq!(peer.streams(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_accepts_and_fails_is_given_up_all_the_same() {
    let peer = Peer::new(|mut call| async move {
        call.header().await;
        call.say(accepted(vec![extent(0, 0, 10)])).await;
        let _ = call.next().await;
        call.fail(Reason::StorageFailed.error("the disk is full")).await;
    });
    let start = Instant::now();
    let mut handle = peer.send_with(Zeros::new([10]), with_patience(60), Transfers::default());
    let error = ends(handle.join()).await.unwrap_err();
    assert!(error.is(Reason::StorageFailed), "{error:?}");
    assert!((60..90).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn signs_of_life_alone_are_no_progress() {
    // At which point the receiver does nothing more than to repeat its acknowledgement.
    for point in ["credit", "end", "installed"] {
        let peer = Peer::new(move |mut call| async move {
            call.header().await;
            if call.number == 1 {
                call.install(vec![extent(0, 0, 4 * MIB)]).await;
                return;
            }
            let received = match point {
                "credit" => {
                    call.say(Answer::Accepted(Accepted {
                        credit_limit: MIB,
                        ..terms(vec![extent(0, 0, 4 * MIB)])
                    }))
                    .await;
                    MIB
                }
                "end" => {
                    call.say(accepted(vec![extent(0, 0, 4 * MIB)])).await;
                    call.take(8 * MIB).await.0
                }
                _ => {
                    let terms = Accepted { already_installed: true, ..terms(Vec::new()) };
                    call.say(Answer::Accepted(terms)).await;
                    0
                }
            };
            loop {
                call.say(ack(received, received, received, TransferPhase::Transferring)).await;
                sleep(Duration::from_secs(3)).await;
            }
        });
        let start = Instant::now();
        ends(peer.send(Zeros::new([4 * MIB])).join()).await.unwrap();
        assert_eq!(peer.streams(), 2, "{point}");
        assert!((10..20).contains(&start.elapsed().as_secs()), "{point}: {:?}", start.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_disk_and_a_long_check_are_borne() {
    let peer = Peer::new(|mut call| async move {
        call.header().await;
        call.say(Answer::Accepted(Accepted { credit_limit: MIB, ..terms(vec![extent(0, 0, 8 * MIB)]) }))
            .await;
        let mut received = 0;
        let end = loop {
            match call.next().await {
                Some(Frame::Chunk(chunk)) => {
                    let len = chunk.payload.len() as u64;
                    received += len;
                    // The disk takes a little at a time; the credit comes last.
                    for step in 1..=10 {
                        sleep(Duration::from_secs(3)).await;
                        let written = received - len + len / 10 * step;
                        call.say(ack(written, 0, received, TransferPhase::Transferring)).await;
                    }
                    call.say(ack(received, 0, received + MIB, TransferPhase::Transferring)).await;
                }
                Some(Frame::End(end)) => break end,
                _ => {}
            }
        };
        for _ in 0..1000 {
            call.say(ack(received, received, received, TransferPhase::Verifying)).await;
            sleep(Duration::from_secs(3)).await;
        }
        call.say(installed(&end)).await;
    });
    ends(peer.send_with(Zeros::new([8 * MIB]), with_patience(20), Transfers::default()).join())
        .await
        .unwrap();
    assert_eq!(peer.streams(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_was_there_before_is_not_speed() {
    let had = 63 * MIB;
    let peer = Peer::new(move |mut call| async move {
        call.header().await;
        if call.number == 0 {
            return call.fail(Reason::StorageFailed.error("come back")).await;
        }
        let missing = vec![extent(0, had, MIB)];
        call.say(Answer::Accepted(Accepted { durable_bytes: had, credit_limit: 0, ..terms(missing) })).await;
        for step in 0..50 {
            sleep(Duration::from_millis(100)).await;
            call.say(ack(0, had, step, TransferPhase::Transferring)).await;
        }
        call.say(ack(0, had, MIB, TransferPhase::Transferring)).await;
        let (_, end) = call.take(0).await;
        call.say(installed(&end)).await;
    });
    let mut handle = peer.send(Zeros::new([64 * MIB]));
    let mut watch = handle.watch().unwrap();
    let mut measured = 0;
    while let Some(transfer) = watch.next().await {
        let progress = transfer.progress.unwrap();
        if let Some(rate) = progress.bytes_per_second {
            measured += 1;
            assert!(rate <= MIB, "{rate} bytes per second of 1 MiB that was sent");
        }
    }
    assert!(measured > 5);
    ends(handle.join()).await.unwrap();
}

/// What the streams of a transfer of several lanes do, by what they say first.
fn with_lanes<C: Future<Output = ()> + Send + 'static, L: Future<Output = ()> + Send + 'static>(
    control: impl Fn(Call) -> C + Send + Sync + 'static,
    lane: impl Fn(Call, LaneHeader) -> L + Send + Sync + 'static,
) -> Peer {
    let (control, lane) = (Arc::new(control), Arc::new(lane));
    Peer::new(move |mut call| {
        let (control, lane) = (Arc::clone(&control), Arc::clone(&lane));
        async move {
            match call.next().await {
                Some(Frame::LaneHeader(header)) => lane(call, header).await,
                Some(Frame::Header(_)) => {
                    while !matches!(call.next().await, Some(Frame::Manifest(page)) if page.last) {}
                    control(call).await;
                }
                other => panic!("{other:?} comes first"),
            }
        }
    })
}

fn several(missing: Vec<Extent>) -> Answer {
    Answer::Accepted(Accepted { max_lanes: 4, ..terms(missing) })
}

fn lanes(lanes: u32) -> SenderOptions {
    let mut options = with_patience(60);
    options.lanes = lanes;
    options
}

#[tokio::test(start_paused = true)]
async fn a_transfer_goes_on_without_lanes_that_cannot_be_opened() {
    for hangs in [false, true] {
        let peer = with_lanes(
            |mut call| async move {
                call.say(several(vec![extent(0, 0, 96 * MIB)])).await;
                let (bytes, end) = call.take(8 * MIB).await;
                assert_eq!(bytes, 96 * MIB);
                call.say(installed(&end)).await;
            },
            move |call, _| async move {
                if hangs {
                    std::future::pending::<()>().await;
                }
                call.fail(Reason::NoSuchAttempt.error("no lanes today")).await;
            },
        );
        let start = Instant::now();
        // At a rate at which all lanes have been tried in vain long before the end.
        let mut options = lanes(4);
        options.bytes_per_second = std::num::NonZeroU64::new(MIB);
        let mut handle = peer.send_with(Zeros::new([96 * MIB]), options, Transfers::default());
        ends(handle.join()).await.unwrap();
        assert_eq!(handle.progress().unwrap().connections, 1, "one control stream is enough");
        assert!(start.elapsed() < Duration::from_secs(100), "{:?}", start.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_lane_that_has_nothing_to_do() {
    for missing in [0, 10] {
        let opened = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&opened);
        let peer = with_lanes(
            move |mut call| async move {
                let all = (missing > 0).then(|| extent(0, 0, missing));
                call.say(several(all.into_iter().collect())).await;
                let (_, end) = call.take(8 * MIB).await;
                call.say(installed(&end)).await;
            },
            move |_, _| {
                count.fetch_add(1, Ordering::SeqCst);
                std::future::pending()
            },
        );
        let start = Instant::now();
        ends(peer.send_with(Zeros::new([10]), lanes(4), Transfers::default()).join()).await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        if missing == 0 {
            assert_eq!(opened.load(Ordering::SeqCst), 0);
        }
    }
}

/// A lane that breaks after a megabyte each time, all of which arrived, and at last cannot be opened any more.
#[tokio::test(start_paused = true)]
async fn what_a_lane_has_taken_and_not_sent_is_sent_by_another() {
    const SIZE: u64 = 64 * MIB;
    const BREAKS: u64 = 10;
    let there = Arc::new(Mutex::new(vec![false; usize::try_from(SIZE / MIB).unwrap()]));
    let put = |there: &Mutex<Vec<bool>>, chunk: &Chunk| {
        let first = usize::try_from(chunk.offset / MIB).unwrap();
        if (chunk.offset + chunk.payload.len() as u64).is_multiple_of(MIB) {
            assert!(!std::mem::replace(&mut there.lock().unwrap()[first], true), "sent twice");
        }
        chunk.payload.len() as u64
    };
    let missing = |there: &Mutex<Vec<bool>>| {
        let there = there.lock().unwrap();
        let gaps = (0..).zip(there.iter()).filter(|(_, there)| !**there);
        gaps.map(|(number, _)| extent(0, number * MIB, MIB)).collect::<Vec<_>>()
    };
    let (lane_there, control_there) = (Arc::clone(&there), Arc::clone(&there));
    let (tell, told) = watch::channel(false);
    let peer = with_lanes(
        move |mut call| {
            let (there, mut told) = (Arc::clone(&control_there), told.clone());
            async move {
                call.say(Answer::Accepted(Accepted {
                    max_lanes: 2,
                    credit_limit: 0,
                    ..terms(missing(&there))
                }))
                .await;
                // Until the lane is gone, this one brings nothing.
                told.wait_for(|gone| *gone).await.unwrap();
                call.say(ack(0, 0, 0, TransferPhase::Transferring)).await;
                call.say(ack(0, 0, SIZE, TransferPhase::Transferring)).await;
                let mut received = 0;
                loop {
                    match call.next().await {
                        Some(Frame::Chunk(chunk)) => {
                            received += put(&there, &chunk);
                            call.say(ack(received, received, SIZE, TransferPhase::Transferring)).await;
                        }
                        Some(Frame::End(end)) => break call.say(installed(&end)).await,
                        _ => {}
                    }
                }
            }
        },
        move |mut call, header| {
            let (there, tell) = (Arc::clone(&lane_there), tell.clone());
            async move {
                let generation = header.generation & u64::from(u32::MAX);
                if generation > BREAKS {
                    if generation == BREAKS + 3 {
                        tell.send_replace(true);
                    }
                    return call.fail(Reason::NoSuchAttempt.error("no more")).await;
                }
                call.say(Answer::Accepted(Accepted { credit_limit: MIB, ..terms(missing(&there)) })).await;
                let mut received = 0;
                while received < MIB {
                    if let Some(Frame::Chunk(chunk)) = call.next().await {
                        received += put(&there, &chunk);
                    }
                }
                call.say(ack(received, received, MIB, TransferPhase::Transferring)).await;
                sleep(Duration::from_millis(10)).await;
                call.fail(Reason::ShuttingDown.error("it breaks")).await;
            }
        },
    );
    let source = Zeros::new([SIZE]);
    let mut handle = peer.send_with(source, lanes(2), Transfers::default());
    tokio::time::timeout(Duration::from_secs(600), handle.join()).await.expect("it ends").unwrap();
    assert!(there.lock().unwrap().iter().all(|there| *there));
    assert_eq!(handle.progress().unwrap().connections, 1, "one control stream is enough");
    assert_eq!(peer.streams(), 1 + 13, "progress starts the count of failures anew");
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_is_superseded_ends_its_transfer() {
    let peer = with_lanes(
        |mut call| async move {
            call.say(several(vec![extent(0, 0, 96 * MIB)])).await;
            let mut bytes = 0;
            while let Some(frame) = call.next().await {
                match frame {
                    Frame::Chunk(chunk) => bytes += chunk.payload.len() as u64,
                    Frame::End(_) => panic!("it goes on"),
                    _ => {}
                }
                call.say(ack(bytes, bytes, bytes + 8 * MIB, TransferPhase::Transferring)).await;
            }
        },
        |call, _| async move { call.fail(Reason::Superseded.error("another one sends")).await },
    );
    // The lanes have come before the last unit is taken.
    let mut options = lanes(2);
    options.bytes_per_second = std::num::NonZeroU64::new(MIB);
    let mut handle = peer.send_with(Zeros::new([96 * MIB]), options, Transfers::default());
    let error = ends(handle.join()).await.unwrap_err();
    assert!(error.is(Reason::Superseded), "{error:?}");
    assert_eq!(peer.streams(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_handle_leaves_a_transfer_that_has_ended() {
    let peer = Peer::new(|mut call| async move {
        call.header().await;
        call.say(accepted(vec![extent(0, 0, MIB)])).await;
        std::future::pending().await
    });
    let transfers = Transfers::default();
    let handle = peer.send_with(Zeros::new([MIB]), SenderOptions::default(), transfers.clone());
    let mut watch = handle.watch().unwrap();
    while watch.next().await.unwrap().phase() != TransferPhase::Transferring {}
    drop(handle);
    let mut last = None;
    while let Some(transfer) = ends(watch.next()).await {
        last = Some(transfer);
    }
    let last = last.unwrap();
    assert_eq!(last.phase(), TransferPhase::Failed);
    assert!(last.is_finished());
    let error = Error::from(last.progress.clone().unwrap().error.unwrap());
    assert!(error.is(Reason::StreamEndedEarly) && error.is_retryable(), "{error:?}");
    assert_eq!(transfers.registry().get(Some(Direction::Out), "t"), Some(last));
    assert_eq!(transfers.registry().active(None), 0);
    drop(peer.send_with(Zeros::new([MIB]), SenderOptions::default(), transfers));
}

#[tokio::test(start_paused = true)]
async fn a_source_that_cannot_seek_is_read_once_and_from_the_start() {
    let size = 40 * MIB;
    // What the receiver has kept of an earlier attempt: a part of the second file, or all of it.
    for kept in [vec![extent(0, 0, size), extent(1, 1, size - 1)], vec![extent(0, 0, size)]] {
        let peer = Peer::new(move |mut call| {
            let kept = kept.clone();
            async move {
                let (header, _) = call.header().await;
                if call.number == 0 {
                    assert_eq!((header.attempt, header.discard_staged), (1, false));
                    call.install(kept).await;
                } else {
                    assert_eq!((header.attempt, header.discard_staged), (2, true));
                    call.install(vec![extent(0, 0, size), extent(1, 0, size)]).await;
                }
            }
        });
        let source = Zeros { can_seek: false, ..Zeros::new([size, size]) };
        let mut options = SenderOptions::default();
        options.lanes = 4;
        ends(peer.send_with(source.clone(), options, Transfers::default()).join()).await.unwrap();
        assert_eq!(peer.streams(), 2);
        assert_eq!(source.opened(), [(0, 0, Some(size)), (1, 0, Some(size))]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_does_not_discard_ends_a_transfer_that_cannot_seek() {
    let peer = Peer::new(|mut call| async move {
        call.header().await;
        call.install(vec![extent(0, 1, 9)]).await;
    });
    let source = Zeros { can_seek: false, ..Zeros::new([10]) };
    let error = ends(peer.send(source.clone()).join()).await.unwrap_err();
    assert!(error.is(Reason::InvalidField) && !error.is_retryable(), "{error:?}");
    assert_eq!(peer.streams(), 2);
    assert_eq!(source.opened(), []);
}

#[tokio::test(start_paused = true)]
async fn installed_is_believed_after_the_end_and_with_the_same_totals() {
    for early in [true, false] {
        let peer = Peer::new(move |mut call| async move {
            call.header().await;
            call.say(accepted(vec![extent(0, 0, 10)])).await;
            let (_, mut end) = if early {
                (0, End { total_bytes: 10, file_count: 1, ..End::default() })
            } else {
                call.take(0).await
            };
            end.total_bytes -= u64::from(!early);
            call.say(installed(&end)).await;
            while call.next().await.is_some() {}
        });
        // It is still waiting for credit where the receiver is early.
        let source = Zeros::new([10]);
        let mut options = SenderOptions::default();
        options.bytes_per_second = if early { std::num::NonZeroU64::new(1) } else { None };
        let mut handle = peer.send_with(source, options, Transfers::default());
        let error = ends(handle.join()).await.unwrap_err();
        assert!(error.is(if early { Reason::UnexpectedFrame } else { Reason::TotalsMismatch }), "{error:?}");
        assert_eq!(handle.progress().unwrap().phase(), TransferPhase::Failed);
    }
}

#[tokio::test(start_paused = true)]
async fn another_node_or_store_than_the_one_that_is_meant_gets_nothing() {
    for (node_id, store_id, meant) in
        [("n3", [7_u8; 16], false), ("n2", [8; 16], false), ("n2", [7; 16], true)]
    {
        let peer = Peer::new(move |mut call| async move {
            call.header().await;
            let node = NodeIdentity {
                node_id: node_id.to_owned(),
                store_id: store_id.to_vec().into(),
                ..NodeIdentity::default()
            };
            let accepted = Accepted { receiver: Some(node), ..terms(vec![extent(0, 0, 10)]) };
            call.say(Answer::Accepted(accepted)).await;
            if meant {
                let (_, end) = call.take(0).await;
                call.say(installed(&end)).await;
            }
            while call.next().await.is_some() {}
        });
        let connect = connect_fn(move || {
            let peer = peer.clone();
            async move { Ok(SplitSnapshotServiceServer::new(peer)) }
        });
        let mut what = snapshot();
        what.target_node = Some(NodeId::new("n2").unwrap());
        let mut options = SenderOptions::default();
        options.target_store = Some(bytes::Bytes::from_static(&[7; 16]));
        let mut handle = SnapshotSender::new(connect).options(options).send(what, Zeros::new([10])).unwrap();
        let result = ends(handle.join()).await;
        if meant {
            result.unwrap();
        } else {
            let error = result.unwrap_err();
            assert!(error.is(Reason::WrongNode) && !error.is_retryable(), "{error:?}");
            assert_eq!(handle.progress().unwrap().wire_bytes, 0);
        }
    }
}
