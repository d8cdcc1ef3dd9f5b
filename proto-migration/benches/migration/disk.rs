//! How long the disk takes to keep a small write, which a commit has to wait for.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::load::histogram;

/// Writes that are kept one after the other.
const SYNCS: u32 = 300;
/// As much as a page of a database.
const PAGE: [u8; 4096] = [1; 4096];

#[derive(Serialize)]
pub(crate) struct Fsync {
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
}

/// Of writes that are spread over `time`, so that they are no load of their own beside that of others.
pub(crate) fn fsync(dir: &Path, time: Duration) -> Fsync {
    let mut file = tempfile::tempfile_in(dir).expect("a file in --dir");
    let mut micros = histogram();
    let every = time / SYNCS;
    let start = Instant::now();
    for number in 0..SYNCS {
        std::thread::sleep((start + every * number).saturating_duration_since(Instant::now()));
        file.write_all(&PAGE).unwrap();
        let began = Instant::now();
        file.sync_data().unwrap();
        micros.saturating_record(u64::try_from(began.elapsed().as_micros()).unwrap());
    }
    #[allow(clippy::cast_precision_loss)]
    let millis = |quantile| micros.value_at_quantile(quantile) as f64 / 1000.0;
    Fsync { p50_ms: millis(0.5), p99_ms: millis(0.99) }
}
