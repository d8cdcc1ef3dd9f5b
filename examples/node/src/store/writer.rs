//! Group commit: one thread owns all write transactions.
//!
//! Whatever is queued when a transaction begins goes into it, so the more clients wait for the disk, the
//! more of them share one sync. A write is answered after the commit that holds it, never before.
//!
//! Work in the background has a queue of its own, and is done in slices: one when no client waits, and one after each group of writes or
//! other job. So a client waits for one slice at most, however many have something to do in the background, and they go on however much
//! clients write and others have done alone.

use std::cell::{Cell, OnceCell};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use redb::{Durability, WriteTransaction};
use tokio::sync::{mpsc, oneshot};

use super::ops::{Outcome, WriteOp};
use super::shared::Shared;
use super::txn::RowsTxn;
use super::{StoreError, unix_ms};
use crate::gate::Permits;

/// Batches that may wait for the writer. A connection has one at a time, so this bounds how many connections
/// are queued, not how many may write.
const QUEUE: usize = 1024;
/// Writes in one transaction: large enough that the disk's sync does not matter any more, small enough
/// that nobody waits long for others.
const MAX_OPS: usize = 16 * 1024;
/// How long a slice of background work goes on, from where it can stop, before it commits: about what a commit costs, and little beside what
/// clients notice, as the next group of their writes has to write its pages, too. What it begins with, a bounded number of rows of logs and staging,
/// comes on top. On a disk, at half of the load that saturates a node, 99 of 100 writes to slots that stay took up to 10 to 13 ms during a
/// migration; with 400 µs 14 to 23, with 100 µs 10 to 14, but the migration takes twice as long.
const SLICE: Duration = Duration::from_micros(200);
/// Rows that a slice has at least, within [`LONG_SLICE`]: some half of what [`SLICE`] is enough for. Where a processor is so slow that it is not, each group of writes
/// would come before a row or two, and a copy would take as long as clients go on: in a build for debugging, 80 s instead of 1 under `redis-benchmark`.
const LEAST: u32 = 16;
/// The same where the clients of another node wait for it with their writes held: about as long as a group of writes, so that not many of these come before it
/// is done. With 5 ms, freezes are no shorter, and on a disk 99 of 100 writes of this node's clients take up to 38 ms meanwhile, instead of 24.
const LONG_SLICE: Duration = Duration::from_millis(2);
/// Slices that may wait for the writer; each of the few that work in the background asks for one at a time.
const SLICES: usize = 64;

/// What the writer is asked for.
enum Job {
    Writes {
        ops: Vec<WriteOp>,
        permits: Permits,
        asked: Instant,
        reply: oneshot::Sender<Result<Vec<Outcome>, StoreError>>,
    },
    Alone(Work),
}

type Work = Box<dyn FnOnce(&Shared) + Send>;

/// A slice of background work, in its transaction. Its time begins when it is first asked for.
#[derive(Debug)]
pub(super) struct Slice {
    lasts: Duration,
    began: OnceCell<Instant>,
    asked: Cell<u32>,
}

impl Default for Slice {
    fn default() -> Self {
        Self { lasts: SLICE, began: OnceCell::new(), asked: Cell::new(0) }
    }
}

impl Slice {
    pub(super) fn long() -> Self {
        Self { lasts: LONG_SLICE, ..Self::default() }
    }

    /// Whether the rest has to wait for the next one. Asked for each row, before or after it.
    pub(super) fn is_over(&self) -> bool {
        let (now, asked) = (Instant::now(), self.asked.get() + 1);
        self.asked.set(asked);
        let lasted = now.duration_since(*self.began.get_or_init(|| now));
        lasted >= self.lasts && (asked > LEAST || lasted >= LONG_SLICE)
    }
}

/// Hands writes to the writer thread. Dropping all clones ends the thread once the queue is empty.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    queue: mpsc::Sender<Job>,
    background: mpsc::Sender<Work>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job")
    }
}

impl Writer {
    pub(super) fn start(shared: Arc<Shared>) -> Result<(Self, JoinHandle<()>), StoreError> {
        let (queue, jobs) = mpsc::channel(QUEUE);
        let (background, slices) = mpsc::channel(SLICES);
        let thread = std::thread::Builder::new()
            .name("node-writer".into())
            .spawn(move || run(&shared, jobs, slices))
            .map_err(|source| StoreError::io("cannot start the writer thread", source))?;
        Ok((Self { queue, background }, thread))
    }

    /// Does `ops` in order and returns their outcomes once they are durable. `permits` are held until then, also
    /// when the returned future is dropped: the writes are done all the same.
    pub(super) async fn write(
        &self,
        ops: Vec<WriteOp>,
        permits: Permits,
    ) -> Result<Vec<Outcome>, StoreError> {
        let (reply, outcome) = oneshot::channel();
        self.queue
            .send(Job::Writes { ops, permits, asked: Instant::now(), reply })
            .await
            .map_err(|_| StoreError::Closed)?;
        outcome.await.map_err(|_| StoreError::Closed)?
    }

    /// Runs `work` in a transaction of its own and commits it if that returns `Ok`, in two phases: for the few that decide something. See [`Phases`].
    pub(super) async fn transact<T: Send + 'static>(
        &self,
        work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.transact_in(Phases::Two, work).await
    }

    /// [`Writer::transact`] in as many phases.
    pub(super) async fn transact_in<T: Send + 'static>(
        &self,
        phases: Phases,
        work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (job, outcome) = alone(move |shared| transaction(shared, phases, work));
        self.queue.send(Job::Alone(job)).await.map_err(|_| StoreError::Closed)?;
        outcome.await.map_err(|_| StoreError::Closed)?
    }

    /// [`Writer::transact`] for work that clients do not wait for. `work` does a part that ends with the slice, and says whether that has to
    /// be durable now, or with the next transaction that is: for parts of something that is only of use as a whole.
    ///
    /// Not done when the returned future is dropped before it was begun.
    pub(super) async fn background<T: Send + 'static>(
        &self,
        work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>, &Slice) -> Result<(T, Durability), StoreError>
        + Send
        + 'static,
    ) -> Result<T, StoreError> {
        self.in_background(move |shared| {
            commit(shared, Phases::One, |txn, rows| work(txn, rows, &Slice::default()))
        })
        .await?
    }

    /// Returns when all background work that was asked for before is done.
    pub(super) async fn settle(&self) -> Result<(), StoreError> {
        self.in_background(|_| ()).await
    }

    async fn in_background<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, outcome) = oneshot::channel();
        let work = Box::new(move |shared: &Shared| {
            // Others may have taken what it was meant for out of its way since.
            if !reply.is_closed() {
                let _ = reply.send(work(shared));
            }
        });
        self.background.send(work).await.map_err(|_| StoreError::Closed)?;
        outcome.await.map_err(|_| StoreError::Closed)
    }

    /// Runs `work` in the writer's thread, without a transaction: when all that is committed is published.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let (job, outcome) = alone(move |shared| Ok(work(shared)));
        self.queue.send(Job::Alone(job)).await.map_err(|_| StoreError::Closed)?;
        outcome.await.map_err(|_| StoreError::Closed)?
    }

    /// [`Writer::run`], without waiting for it.
    pub(super) async fn post(&self, work: impl FnOnce(&Shared) + Send + 'static) -> Result<(), StoreError> {
        self.queue.send(Job::Alone(Box::new(work))).await.map_err(|_| StoreError::Closed)
    }

    /// [`Writer::transact`] in one phase, for threads that may block. Panics on an async thread.
    pub(super) fn transact_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (job, outcome) = alone(move |shared| transaction(shared, Phases::One, work));
        self.queue.blocking_send(Job::Alone(job)).map_err(|_| StoreError::Closed)?;
        outcome.blocking_recv().map_err(|_| StoreError::Closed)?
    }
}

fn alone<T: Send + 'static>(
    work: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
) -> (Work, oneshot::Receiver<Result<T, StoreError>>) {
    let (reply, outcome) = oneshot::channel();
    let job = Box::new(move |shared: &Shared| {
        // Nobody may be waiting any more; what was committed stays committed.
        let _ = reply.send(work(shared));
    });
    (job, outcome)
}

fn run(shared: &Shared, mut jobs: mpsc::Receiver<Job>, mut background: mpsc::Receiver<Work>) {
    let mut next = None;
    loop {
        let job = match next.take() {
            Some(job) => Ok(job),
            None => match wait(&mut jobs, &mut background) {
                Some(found) => found,
                None => return,
            },
        };
        match job {
            Ok(Job::Alone(work)) => work(shared),
            Ok(Job::Writes { ops, permits, asked, reply }) => {
                next = group(shared, asked, Member { ops, reply, permits }, &mut jobs);
            }
            Err(work) => {
                work(shared);
                continue;
            }
        }
        if let Ok(work) = background.try_recv() {
            work(shared);
        }
    }
}

/// The next job, or background work where there is none; none when both queues have ended.
fn wait(jobs: &mut mpsc::Receiver<Job>, background: &mut mpsc::Receiver<Work>) -> Option<Result<Job, Work>> {
    futures::executor::block_on(async {
        tokio::select! {
            biased;
            Some(job) = jobs.recv() => Some(Ok(job)),
            Some(work) = background.recv() => Some(Err(work)),
            else => None,
        }
    })
}

/// Commits writes together with those that are queued; returns what was found behind them.
fn group(shared: &Shared, asked: Instant, first: Member, jobs: &mut mpsc::Receiver<Job>) -> Option<Job> {
    let mut batch = Batch { size: first.ops.len(), members: vec![first] };
    let mut next = None;
    while batch.size < MAX_OPS {
        match jobs.try_recv() {
            Ok(Job::Writes { ops, permits, asked: _, reply }) => {
                batch.size += ops.len();
                batch.members.push(Member { ops, reply, permits });
            }
            Ok(other) => {
                next = Some(other);
                break;
            }
            Err(_) => break,
        }
    }
    batch.commit(shared, asked);
    next
}

struct Member {
    ops: Vec<WriteOp>,
    reply: oneshot::Sender<Result<Vec<Outcome>, StoreError>>,
    permits: Permits,
}

struct Batch {
    size: usize,
    members: Vec<Member>,
}

impl Batch {
    fn commit(self, shared: &Shared, asked: Instant) {
        shared.client_writes.fetch_add(1, Ordering::Relaxed);
        let outcomes = transaction(shared, Phases::One, |_, rows| {
            self.members
                .iter()
                .map(|member| member.ops.iter().map(|op| rows.apply(op)).collect::<Result<Vec<_>, _>>())
                .collect::<Result<Vec<_>, _>>()
        });
        // Before anybody is answered: who has an answer finds it counted.
        shared.strain.took(asked.elapsed(), !shared.leases.active().is_empty());
        match outcomes {
            Ok(outcomes) => {
                for (member, outcomes) in self.members.into_iter().zip(outcomes) {
                    drop(member.permits);
                    let _ = member.reply.send(Ok(outcomes));
                }
            }
            Err(error) => {
                tracing::error!(%error, writes = self.size, "a batch of writes failed");
                for member in self.members {
                    drop(member.permits);
                    let _ = member.reply.send(Err(error.clone()));
                }
            }
        }
    }
}

/// How often a commit is synced. After a crash, redb cannot tell damage in a commit of one phase from one that was torn, and takes the one before; a
/// commit of two phases was whole when it was made the last, so that its damage is damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phases {
    /// Once: for rows, whose time is that of the disk's sync.
    One,
    /// Twice: for who owns what, and for records of what moves.
    Two,
}

/// Runs `work` in a transaction that is durable.
fn transaction<T>(
    shared: &Shared,
    phases: Phases,
    work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    commit(shared, phases, |txn, rows| Ok((work(txn, rows)?, Durability::Immediate)))
}

/// Runs `work` in a transaction that is as durable as it says.
fn commit<T>(
    shared: &Shared,
    phases: Phases,
    work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>) -> Result<(T, Durability), StoreError>,
) -> Result<T, StoreError> {
    let mut txn = shared.database.begin_write()?;
    txn.set_two_phase_commit(phases == Phases::Two);
    let done = (|| {
        let mut rows = RowsTxn::open(&txn, shared, unix_ms())?;
        let value = work(&txn, &mut rows)?;
        Ok((value, rows.finish()?))
    })();
    match done {
        Ok(((value, durability), effects)) => {
            txn.set_durability(durability).map_err(redb::Error::from)?;
            match effects.generations.clone() {
                None => txn.commit()?,
                Some(generations) => shared.generations.switch(generations, || Ok(txn.commit()?))?,
            }
            shared.publish(effects);
            Ok(value)
        }
        Err(error) => {
            // After an I/O error this fails, too, and says less.
            if let Err(also) = txn.abort() {
                tracing::debug!(error = %also, "a transaction that failed could not be undone");
            }
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;

    use bytes::Bytes;
    use proto::common::ids::MigrationId;
    use proto::migration::entry::{Entry, Image};

    use super::super::Store;
    use super::super::test_store::{open, set};
    use super::*;
    use crate::common::slot_of;

    /// Holds the writer's thread until the sender is dropped.
    async fn held(writer: &Writer) -> std::sync::mpsc::Sender<()> {
        let (release, released) = std::sync::mpsc::channel();
        let (here, is_here) = oneshot::channel();
        let hold = move |_: &Shared| {
            let _ = here.send(());
            let _ = released.recv();
        };
        writer.post(hold).await.unwrap();
        is_here.await.unwrap();
        release
    }

    /// Asks for a slice that tells how many groups of writes there were before it, and waits until it is queued.
    async fn ask(
        store: &Store,
        writer: &Writer,
        seen: &Arc<Mutex<Vec<u64>>>,
    ) -> tokio::task::JoinHandle<Result<(), StoreError>> {
        let room = writer.background.capacity();
        let (shared, seen, asking) = (Arc::clone(&store.inner.shared), Arc::clone(seen), writer.clone());
        let slice = tokio::spawn(async move {
            let work = move |_: &WriteTransaction, _: &mut RowsTxn<'_>, _: &Slice| {
                seen.lock().unwrap().push(shared.client_writes.load(Ordering::Relaxed));
                Ok(((), Durability::None))
            };
            asking.background(work).await
        });
        while writer.background.capacity() == room {
            tokio::task::yield_now().await;
        }
        slice
    }

    /// Queues a write.
    async fn write(store: &Store, writer: &Writer) -> tokio::task::JoinHandle<()> {
        let room = writer.queue.capacity();
        let store = store.clone();
        let write = tokio::spawn(async move { set(&store, "key", "value").await });
        while writer.queue.capacity() == room {
            tokio::task::yield_now().await;
        }
        write
    }

    #[tokio::test]
    async fn writes_go_first_and_each_group_or_job_lets_one_slice_pass() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = open(directory.path(), "a", "0-16383");
        let writer = store.writer().unwrap();
        let hold = held(&writer).await;
        let seen = Arc::default();
        let mut slices = Vec::new();
        for _ in 0..4 {
            slices.push(ask(&store, &writer, &seen).await);
        }
        let first = write(&store, &writer).await;
        // Ends the group of the first write.
        writer.post(|_| ()).await.unwrap();
        let second = write(&store, &writer).await;
        drop(hold);
        for slice in slices {
            slice.await.unwrap().unwrap();
        }
        first.await.unwrap();
        second.await.unwrap();
        // After the job that held the writer, the first group, the job behind it, and the second group.
        assert_eq!(*seen.lock().unwrap(), [0, 1, 1, 2]);
    }

    /// Stages the same rows twice while clients always have a write in the queue, so that a group of theirs comes before each slice.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_hurries_is_staged_in_fewer_slices() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = open(directory.path(), "a", "0-8191");
        let id = MigrationId::new("m1").unwrap();
        store.begin_staging(&id, "8192-16383".parse().unwrap(), Bytes::new()).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let clients: Vec<_> = (0..2)
            .map(|_| {
                let (store, stop) = (store.clone(), Arc::clone(&stop));
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        set(&store, "key", "value").await;
                    }
                })
            })
            .collect();
        let groups = async |seq, hurried| {
            let image = Image { value: Bytes::from_static(b"value"), expires_unix_ms: None };
            let keys = (0..).map(|n: u32| Bytes::from(format!("key:{n}")));
            let keys = keys.filter(|key| slot_of(key) >= 8192).take(4000);
            let entries = keys.map(|key| Entry { seq, key, image: Some(image.clone()) }).collect();
            store.hurry(&id, hurried);
            let before = store.client_writes();
            store.stage(&id, entries, Bytes::new()).await.unwrap();
            store.client_writes() - before
        };
        let (calm, hurried) = (groups(1, false).await, groups(2, true).await);
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            client.await.unwrap();
        }
        assert!(
            hurried * 2 < calm,
            "{hurried} groups of writes came before it was done, and {calm} without hurry"
        );
    }

    #[tokio::test]
    async fn only_a_pause_that_is_quiet_and_has_all_slots_spares_another_one_the_wait() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = open(directory.path(), "a", "0-16383");
        let writer = store.writer().unwrap();
        let (few, all) = ("100-199".parse().unwrap(), "0-16383".parse().unwrap());
        let is_at_once = async |range| {
            let stopping = store.stop_expiry(range);
            tokio::pin!(stopping);
            futures::poll!(stopping).is_ready()
        };
        let pause = store.pause_expiry(all);
        let hold = held(&writer).await;
        assert!(!is_at_once(few).await, "what was being removed may be so still");
        drop(hold);
        drop(pause);
        let pause = store.stop_expiry(few).await.unwrap();
        let hold = held(&writer).await;
        assert!(is_at_once(few).await);
        assert!(!is_at_once(all).await);
        drop(pause);
        assert!(!is_at_once(few).await);
        drop(hold);
    }

    #[test]
    fn a_slice_has_a_few_rows_where_they_take_long_and_one_where_that_is_too_long() {
        let now = Instant::now();
        // Of a slice that begins in the future nothing has passed, however long the processor is taken away.
        let future = now + Duration::from_secs(3600);
        let begun = |lasts, began| Slice { lasts, began: OnceCell::from(began), asked: Cell::new(0) };
        let rows = |slice: Slice| (1..10 * LEAST).find(|_| slice.is_over());
        assert_eq!(rows(begun(Duration::ZERO, future)), Some(LEAST + 1));
        assert_eq!(rows(begun(Duration::ZERO, now - LONG_SLICE)), Some(1));
        assert_eq!(rows(begun(SLICE, future)), None);
    }

    #[tokio::test]
    async fn a_slice_that_nobody_waits_for_any_more_is_not_begun() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = open(directory.path(), "a", "0-16383");
        let writer = store.writer().unwrap();
        let hold = held(&writer).await;
        let seen = Arc::default();
        let (dropped, kept) = (ask(&store, &writer, &seen).await, ask(&store, &writer, &seen).await);
        dropped.abort();
        assert!(dropped.await.unwrap_err().is_cancelled());
        drop(hold);
        kept.await.unwrap().unwrap();
        assert_eq!(seen.lock().unwrap().len(), 1);
    }
}
