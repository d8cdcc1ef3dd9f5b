//! One migration that comes in: what is known of it, what is held for it, and which stream may write.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures::FutureExt as _;
use proto_common::error::Error;
use proto_common::guard::RangeHold;
use proto_common::ids::MigrationId;
use proto_common::meter::Meter;
use proto_common::registry::Tracker;
use tokio::sync::{OwnedMutexGuard, watch};

use super::hurry::Wishes;
use super::places::Place;
use super::record::Record;
use crate::Reason;
use crate::hold::Hold;
use crate::target::Staged;
use crate::v1::transfer_migration_data_response::Discarded;
use crate::v1::{MigrationProgress, MigrationState};

/// Why a stream has to end.
#[derive(Debug, Clone)]
pub(super) enum Stop {
    /// With this error.
    Error(Error),
    /// With this answer, though nobody asked: the migration was cancelled here.
    Discarded(Discarded),
}

/// The place of one migration ID.
pub(super) struct Slot {
    pub(super) id: MigrationId,
    /// Held by whoever lets a stream in.
    pub(super) attach: tokio::sync::Mutex<()>,
    /// Held through every change, so that changes come one after the other. `None`: not known.
    pub(super) state: tokio::sync::Mutex<Option<Incoming>>,
    stream: Mutex<Option<Entry>>,
    /// A commit has begun and holds `state` until it is done.
    committing: AtomicBool,
    pub(super) wishes: Wishes,
}

struct Entry {
    attempt: u64,
    stop: watch::Sender<Option<Stop>>,
    /// Held for as long as the stream may write.
    quiet: Arc<tokio::sync::Mutex<()>>,
}

/// A stream's right to write; given up when dropped.
pub(super) struct Permit {
    slot: Arc<Slot>,
    pub(super) attempt: u64,
    pub(super) stop: watch::Receiver<Option<Stop>>,
    _quiet: OwnedMutexGuard<()>,
}

impl Slot {
    pub(super) fn new(id: MigrationId, incoming: Option<Incoming>) -> Arc<Self> {
        Arc::new(Self {
            id,
            attach: tokio::sync::Mutex::new(()),
            state: tokio::sync::Mutex::new(incoming),
            stream: Mutex::new(None),
            committing: AtomicBool::new(false),
            wishes: Wishes::default(),
        })
    }

    fn stream(&self) -> MutexGuard<'_, Option<Entry>> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_stream(&self) -> bool {
        self.stream().is_some()
    }

    /// Tells the stream to end, if there is one; the first reason counts.
    pub(super) fn tell(&self, stop: Stop) {
        if let Some(entry) = &*self.stream() {
            entry.stop.send_if_modified(|told| {
                let first = told.is_none();
                if first {
                    *told = Some(stop);
                }
                first
            });
        }
    }

    /// Waits until the stream that there is, if any, does not write any more.
    pub(super) async fn quiet(&self) {
        let quiet = self.stream().as_ref().map(|entry| Arc::clone(&entry.quiet));
        if let Some(quiet) = quiet {
            drop(quiet.lock().await);
        }
    }

    /// Makes the stream of `attempt` the one that may write. The one before is quiet.
    pub(super) fn register(self: &Arc<Self>, attempt: u64) -> Result<Permit, Error> {
        let quiet = Arc::new(tokio::sync::Mutex::new(()));
        let held = Arc::clone(&quiet)
            .try_lock_owned()
            .map_err(|_| Reason::Internal.error("a new stream is not quiet"))?;
        let (stop, stopped) = watch::channel(None);
        *self.stream() = Some(Entry { attempt, stop, quiet });
        Ok(Permit { slot: Arc::clone(self), attempt, stop: stopped, _quiet: held })
    }

    pub(super) fn is_committing(&self) -> bool {
        self.committing.load(Ordering::Acquire)
    }

    /// Shows that a commit is under way, until dropped.
    pub(super) fn committing(&self) -> impl Drop + '_ {
        struct Reset<'a>(&'a AtomicBool);
        impl Drop for Reset<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::Release);
            }
        }
        self.committing.store(true, Ordering::Release);
        Reset(&self.committing)
    }
}

impl Permit {
    pub(super) fn stopped(&self) -> Option<Stop> {
        self.stop.borrow().clone()
    }

    pub(super) fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut stream = self.slot.stream();
        if stream.as_ref().is_some_and(|entry| entry.attempt == self.attempt) {
            *stream = None;
        }
    }
}

/// What is known of a migration. The record is the durable one, but for what only progress shows, and for which attempt was the last one of a migration
/// that was cancelled.
pub(super) struct Incoming {
    pub(super) record: Record,
    pub(super) staged: Staged,
    /// Requests that wait for the outcome: in PREPARED.
    pub(super) hold: Option<Hold>,
    /// What others may not move meanwhile: until the outcome.
    pub(super) range: Option<RangeHold>,
    pub(super) place: Option<Place>,
    /// `None` once it has moved to the history.
    pub(super) tracker: Option<Tracker<MigrationProgress>>,
    /// It ended, and the history does not have it yet.
    pub(super) unrecorded: bool,
    /// The store panicked: what it has is to be read again before anything else.
    pub(super) doubt: bool,
    pub(super) meter: Meter,
    /// When its last stream ended, or when this process found it.
    pub(super) last_stream: tokio::time::Instant,
    /// At the last look, its source could not give the slots away any more.
    pub(super) lost: bool,
}

impl Incoming {
    pub(super) fn new(record: Record, staged: Staged) -> Self {
        Self {
            record,
            staged,
            hold: None,
            range: None,
            place: None,
            tracker: None,
            unrecorded: false,
            doubt: false,
            meter: Meter::default(),
            last_stream: tokio::time::Instant::now(),
            lost: false,
        }
    }

    pub(super) fn state(&self) -> MigrationState {
        self.record.state()
    }

    /// Takes note of an error of the store.
    pub(super) fn failed(&mut self, error: Error) -> Error {
        self.doubt |= error.is(Reason::Internal);
        error
    }

    /// Lets everything go that is only held until the outcome.
    pub(super) fn release(&mut self) {
        self.hold = None;
        self.range = None;
        self.place = None;
    }

    /// Changes what is shown, and shows it.
    pub(super) fn show(&mut self, change: impl FnOnce(&mut MigrationProgress)) {
        let progress = &mut self.record.progress;
        change(progress);
        progress.durable_seq = self.record.kept.through_seq;
        progress.task().throttled_ms = progress.target_throttled_ms;
        let active = progress.connected && !self.record.kept.copied;
        let task = progress.task();
        if active {
            self.meter.measure(Instant::now(), task);
        } else {
            (task.bytes_per_second, task.eta_ms) = (None, None);
        }
        if let Some(tracker) = &self.tracker {
            tracker.update(|shown| *shown = progress.clone());
        }
    }

    /// The source was told of nothing that is staged, not even of a tombstone, and nothing of it is known that must be kept.
    pub(super) fn is_empty(&self) -> bool {
        match self.state() {
            MigrationState::Cancelled => !self.unrecorded,
            MigrationState::Receiving => !self.record.kept.used,
            _ => false,
        }
    }
}

/// Runs a call of the store; one that panics has failed, and nobody else is taken down with it.
pub(super) async fn guarded<R>(call: impl Future<Output = Result<R, Error>>) -> Result<R, Error> {
    AssertUnwindSafe(call).catch_unwind().await.unwrap_or_else(|panic| {
        let said = panic
            .downcast_ref::<&str>()
            .map(|said| (*said).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        tracing::error!(panic = said, "the store panicked");
        Err(Reason::Internal.error("the store of the target panicked; what is durable stays"))
    })
}
