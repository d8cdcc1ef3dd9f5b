//! With tokio's clock paused: it jumps to the next timer once nothing else can run, so intervals are exact.

use std::collections::BTreeSet;

use proptest::prelude::*;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;

use super::*;

const ANY: fn(Direction, &u32) -> bool = |_, _| true;

fn registry(limits: RegistryLimits) -> Registry<u32> {
    Registry::new(limits)
}

#[test]
fn one_registry_for_both_directions() {
    let registry = registry(RegistryLimits::default());
    let incoming = registry.insert(Direction::In, "t1", 1).unwrap();
    let outgoing = registry.insert(Direction::Out, "t1", 2).unwrap();
    assert_eq!(registry.get(Some(Direction::In), "t1"), Some(1));
    assert_eq!(registry.get(Some(Direction::Out), "t1"), Some(2));
    assert_eq!(registry.active(None), 2);
    incoming.update(|value| *value = 10);
    assert_eq!(incoming.get(), 10);
    assert_eq!(registry.get(None, "t1"), Some(10));
    incoming.finish(|value| *value = 11);
    assert_eq!(registry.get(Some(Direction::In), "t1"), Some(11));
    assert_eq!(registry.get(None, "t1"), Some(2), "the active one first");
    assert_eq!((registry.active(Some(Direction::In)), registry.active(Some(Direction::Out))), (0, 1));
    assert_eq!((outgoing.id(), outgoing.direction()), ("t1", Direction::Out));
    assert_eq!(registry.get(None, "t2"), None);
}

#[test]
fn an_id_is_active_once_and_free_again_at_its_end() {
    let registry = registry(RegistryLimits { active: 2, ..Default::default() });
    let first = registry.insert(Direction::In, "t1", 1).unwrap();
    assert_eq!(registry.insert(Direction::In, "t1", 2).unwrap_err().reason(), "ALREADY_EXISTS");
    drop(first);
    assert_eq!(registry.get(None, "t1"), Some(1), "what was abandoned stays visible as it was");
    let again = registry.insert(Direction::In, "t1", 2).unwrap();
    assert_eq!(registry.list(ANY, 0, "").unwrap().items, [2], "it replaces the finished one");
    let _other = registry.insert(Direction::In, "t2", 3).unwrap();
    let full = registry.insert(Direction::In, "t3", 4).unwrap_err();
    assert_eq!(full.reason(), "LIMIT_EXCEEDED");
    assert!(full.is_retryable());
    drop(again);
    assert!(registry.insert(Direction::In, "t3", 4).is_ok());
}

#[test]
fn what_an_earlier_process_left_is_let_in_beyond_the_limit_and_counts() {
    let registry = registry(RegistryLimits { active: 1, ..Default::default() });
    let first = registry.readopt(Direction::In, "t1", 1).unwrap();
    let second = registry.readopt(Direction::In, "t2", 2).unwrap();
    assert_eq!(registry.readopt(Direction::In, "t2", 3).unwrap_err().reason(), "ALREADY_EXISTS");
    assert_eq!(registry.active(None), 2);
    drop(first);
    let full = registry.insert(Direction::In, "t3", 4).unwrap_err();
    assert_eq!((full.reason(), full.get("limit")), ("LIMIT_EXCEEDED", Some("1")));
    drop(second);
    assert!(registry.insert(Direction::In, "t3", 4).is_ok());
}

#[test]
fn the_history_is_bounded_and_can_be_seeded() {
    let registry = registry(RegistryLimits { finished: 3, ..Default::default() });
    let running = registry.insert(Direction::In, "b", 20).unwrap();
    registry
        .seed(["a", "b", "c", "d", "e"].into_iter().zip(1..).map(|(id, v)| (Direction::In, id.into(), v)));
    assert_eq!(registry.list(ANY, 0, "").unwrap().items, [20, 5, 4, 3]);
    running.finish(|_| {});
    assert_eq!(registry.list(ANY, 0, "").unwrap().items, [20, 5, 4]);
    assert_eq!(registry.get(None, "c"), None);
    // Nothing is left behind for what was forgotten.
    assert_eq!(registry.shared.tasks().by_key.len(), 3);
}

/// A transfer that failed, was repeated and succeeded is on record twice.
#[test]
fn of_several_records_of_a_task_the_last_one_counts() {
    let registry = registry(RegistryLimits { finished: 3, ..Default::default() });
    registry.insert(Direction::In, "own", 100).unwrap().finish(|_| {});
    let running = registry.insert(Direction::In, "running", 200).unwrap();
    let seed = |records: &[(&str, u32)]| {
        registry.seed(records.iter().map(|&(id, value)| (Direction::In, id.to_owned(), value)));
    };
    seed(&[("a", 1), ("b", 2), ("own", 3), ("running", 4), ("a", 5)]);
    assert_eq!(registry.get(None, "a"), Some(5));
    assert_eq!(registry.get(None, "own"), Some(100), "what this process knows is newer");
    assert_eq!(registry.get(None, "running"), Some(200));
    assert_eq!(registry.list(ANY, 0, "").unwrap().items, [200, 5, 2, 100]);
    seed(&[("b", 6)]);
    assert_eq!(registry.list(ANY, 0, "").unwrap().items, [200, 6, 5, 100]);
    drop(running);
    assert_eq!(registry.shared.tasks().by_key.len(), 3);
}

#[test]
fn pages() {
    let registry = registry(RegistryLimits { page: 3, ..Default::default() });
    let trackers: Vec<_> =
        (0..4).map(|i| registry.insert(Direction::Out, &format!("a{i}"), i).unwrap()).collect();
    registry.seed((10..14).map(|i| (Direction::In, format!("f{i}"), i)));
    let first = registry.list(ANY, 1000, "").unwrap();
    assert_eq!(first.items, [0, 1, 2]);
    let second = registry.list(ANY, 3, &first.next_page_token).unwrap();
    assert_eq!(second.items, [3, 13, 12]);
    let third = registry.list(ANY, 3, &second.next_page_token).unwrap();
    assert_eq!((third.items, third.next_page_token.as_str()), (vec![11, 10], ""));
    let incoming = registry.list(|direction, _| direction == Direction::In, 0, "").unwrap();
    assert_eq!(incoming.items, [13, 12, 11]);
    drop(trackers);
}

#[test]
fn a_bad_page_token_is_refused() {
    let (registry, other) = (registry(RegistryLimits::default()), registry(RegistryLimits::default()));
    let foreign = Token::new(&other);
    for token in ["x", "1.2.3", "....", "-1.0.0.0", &"f".repeat(10_000), "\u{1f980}", &foreign] {
        let error = registry.list(ANY, 0, token).unwrap_err();
        assert_eq!(error.reason(), "INVALID_FIELD");
        assert_eq!(error.violations()[0].field, "page_token");
    }
    assert!(other.list(ANY, 0, &foreign).is_ok());
}

/// A token that `registry` gave out.
struct Token;

impl Token {
    #[allow(clippy::new_ret_no_self, reason = "only its text matters")]
    fn new(registry: &Registry<u32>) -> String {
        registry.seed((0..200).map(|i| (Direction::In, format!("f{i}"), i)));
        registry.list(ANY, 1, "").unwrap().next_page_token
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_gives_the_first_state_at_once_then_the_latest_then_the_last() {
    let registry = registry(RegistryLimits::default());
    let tracker = registry.insert(Direction::In, "t1", 0).unwrap();
    let mut watch = registry.watch(None, "t1").unwrap();
    let start = Instant::now();
    assert_eq!(watch.next().await, Some(0));
    assert_eq!(start.elapsed(), Duration::ZERO);

    for i in 1..=5 {
        tracker.update(|value| *value = i);
    }
    assert_eq!(watch.next().await, Some(5));
    assert_eq!(start.elapsed().as_millis(), 100);

    // A change long after the last item is delivered without delay.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = Instant::now();
    tracker.update(|value| *value = 6);
    assert_eq!(watch.next().await, Some(6));
    assert_eq!(before.elapsed(), Duration::ZERO);

    // The last state does not wait for the interval.
    let before = Instant::now();
    tracker.finish(|value| *value = 7);
    assert_eq!(watch.next().await, Some(7));
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert_eq!(watch.next().await, None);
    assert_eq!(watch.next().await, None);
}

#[tokio::test(start_paused = true)]
async fn an_end_during_the_interval_cuts_it_short() {
    let registry = registry(RegistryLimits::default());
    let tracker = registry.insert(Direction::In, "t1", 0).unwrap();
    let mut watch = registry.watch(None, "t1").unwrap();
    assert_eq!(watch.next().await, Some(0));
    let start = Instant::now();
    tracker.update(|value| *value = 1);
    let reader = tokio::spawn(async move { watch.next().await });
    tokio::time::sleep(Duration::from_millis(30)).await;
    drop(tracker);
    assert_eq!(reader.await.unwrap(), Some(1));
    assert_eq!(start.elapsed().as_millis(), 30);
}

#[tokio::test(start_paused = true)]
async fn a_finished_task_gives_one_state_and_an_unknown_one_is_not_found() {
    let registry = registry(RegistryLimits::default());
    registry.insert(Direction::In, "t1", 1).unwrap().finish(|_| {});
    let states: Vec<_> = registry.watch(None, "t1").unwrap().collect().await;
    assert_eq!(states, [1]);
    assert_eq!(registry.watch(Some(Direction::Out), "t1").unwrap_err().reason(), "NOT_FOUND");
}

#[tokio::test(start_paused = true)]
async fn watchers_are_bounded_and_their_places_come_back() {
    let registry = registry(RegistryLimits { watchers: 1, ..Default::default() });
    let _tracker = registry.insert(Direction::In, "t1", 1).unwrap();
    let watch = registry.watch(None, "t1").unwrap();
    let full = registry.watch(None, "t1").unwrap_err();
    assert_eq!(full.reason(), "LIMIT_EXCEEDED");
    assert!(full.is_retryable());
    drop(watch);
    // A watch that fails takes no place.
    assert_eq!(registry.watch(None, "t2").unwrap_err().reason(), "NOT_FOUND");
    assert!(registry.watch(None, "t1").is_ok());
}

#[tokio::test(start_paused = true)]
async fn next_is_cancel_safe() {
    let registry = registry(RegistryLimits::default());
    let tracker = registry.insert(Direction::In, "t1", 0).unwrap();
    let mut watch = registry.watch(None, "t1").unwrap();
    assert_eq!(watch.next().await, Some(0));
    tracker.update(|value| *value = 1);
    let early = tokio::time::timeout(Duration::from_millis(10), watch.next()).await;
    assert!(early.is_err(), "the interval is not over");
    assert_eq!(watch.next().await, Some(1), "the change is not lost with the cancelled call");
}

#[derive(Debug, Clone)]
enum Step {
    Start,
    Finish(prop::sample::Index),
    Page,
}

proptest! {
    /// Tasks come and go while somebody lists; whatever was there from the first page to the last is seen once.
    #[test]
    fn a_list_has_no_gaps_and_no_repeats(
        steps in prop::collection::vec(
            prop_oneof![
                2 => Just(Step::Start),
                2 => any::<prop::sample::Index>().prop_map(Step::Finish),
                1 => Just(Step::Page),
            ],
            0..60,
        ),
        before in 0_u32..12,
    ) {
        let registry = registry(RegistryLimits::default());
        let start = |i: u32| registry.insert(Direction::In, &i.to_string(), i).unwrap();
        let mut running: Vec<_> = (0..before).map(start).collect();
        let mut next = before;
        let mut seen = Vec::new();
        let mut token = Some(String::new());
        let mut page = |token: &mut Option<String>| {
            if let Some(text) = token.take() {
                let page = registry.list(ANY, 2, &text).unwrap();
                seen.extend(page.items);
                *token = Some(page.next_page_token).filter(|text| !text.is_empty());
            }
        };
        page(&mut token);
        for step in steps {
            match step {
                Step::Start => {
                    running.push(start(next));
                    next += 1;
                }
                Step::Finish(index) if !running.is_empty() => {
                    running.remove(index.index(running.len())).finish(|_| {});
                }
                Step::Finish(_) => {}
                Step::Page => page(&mut token),
            }
        }
        while token.is_some() {
            page(&mut token);
        }
        let unique: BTreeSet<_> = seen.iter().copied().collect();
        prop_assert_eq!(unique.len(), seen.len(), "repeats in {:?}", seen);
        prop_assert!((0..before).all(|i| unique.contains(&i)), "gaps in {:?}", seen);
    }
}

#[tokio::test]
async fn a_peer_has_its_share_of_the_watches_and_the_node_itself_has_none() {
    let registry = registry(RegistryLimits { watchers: 4, watchers_per_peer: 2, ..Default::default() });
    let _task = registry.insert(Direction::In, "t1", 1).unwrap();
    let peer = PeerKey::Unknown;
    let first = registry.watch_for(&peer, None, "t1").unwrap();
    let _second = registry.watch_for(&peer, None, "t1").unwrap();
    let full = registry.watch_for(&peer, None, "t1").unwrap_err();
    assert!(full.is(CommonReason::LimitExceeded) && full.is_retryable(), "{full:?}");
    assert_eq!((full.get("limit"), full.get("peer")), (Some("2"), Some("unknown")));
    let _own = [registry.watch(None, "t1").unwrap(), registry.watch(None, "t1").unwrap()];
    let full = registry.watch(None, "t1").unwrap_err();
    assert_eq!((full.get("limit"), full.get("peer")), (Some("4"), None));
    drop(first);
    drop(registry.watch_for(&peer, None, "t1").unwrap());
}
