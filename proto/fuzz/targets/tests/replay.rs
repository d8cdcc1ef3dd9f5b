//! Every kept input again: the seeds, and those of findings of before.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use fuzz_targets::mutate::mutate;
use fuzz_targets::{TARGETS, panics, seeds, target};

/// The seeds, and a hundred changes of them that are the same each time.
fn replay(name: &str) {
    let target = target(name).unwrap();
    let seeds = seeds(name).unwrap();
    assert!(!seeds.is_empty());
    let mut rng = fastrand::Rng::with_seed(1);
    let changed: Vec<_> = (0..100).map(|_| mutate(&mut rng, &seeds)).collect();
    for input in seeds.iter().chain(&changed) {
        (target.run)(input);
    }
    assert_eq!(panics(), 0, "a task panicked");
}

macro_rules! replays {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            replay(stringify!($name));
        })*

        #[test]
        fn no_target_is_left_out() {
            let mut named = [$(stringify!($name)),*];
            named.sort_unstable();
            assert_eq!(TARGETS.map(|target| target.name).as_slice(), named.as_slice());
        }
    };
}

replays! { answers grpc ids journal manifest migration records snapshot staging status }
