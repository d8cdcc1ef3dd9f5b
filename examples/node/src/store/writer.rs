//! Group commit: one thread owns all write transactions.
//!
//! Whatever is queued when a transaction begins goes into it, so the more clients wait for the disk, the
//! more of them share one sync. A write is answered after the commit that holds it, never before.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

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

/// What the writer is asked for.
enum Job {
    Writes { ops: Vec<WriteOp>, permits: Permits, reply: oneshot::Sender<Result<Vec<Outcome>, StoreError>> },
    Alone(Box<dyn FnOnce(&Shared) + Send>),
}

/// Hands writes to the writer thread. Dropping all clones ends the thread once the queue is empty.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    queue: mpsc::Sender<Job>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job")
    }
}

impl Writer {
    pub(super) fn start(shared: Arc<Shared>) -> Result<(Self, JoinHandle<()>), StoreError> {
        let (queue, jobs) = mpsc::channel(QUEUE);
        let thread = std::thread::Builder::new()
            .name("node-writer".into())
            .spawn(move || run(&shared, jobs))
            .map_err(|source| StoreError::io("cannot start the writer thread", source))?;
        Ok((Self { queue }, thread))
    }

    /// Does `ops` in order and returns their outcomes once they are durable. `permits` are held until then, also
    /// when the returned future is dropped: the writes are done all the same.
    pub(super) async fn write(
        &self,
        ops: Vec<WriteOp>,
        permits: Permits,
    ) -> Result<Vec<Outcome>, StoreError> {
        let (reply, outcome) = oneshot::channel();
        self.queue.send(Job::Writes { ops, permits, reply }).await.map_err(|_| StoreError::Closed)?;
        outcome.await.map_err(|_| StoreError::Closed)?
    }

    /// Runs `work` in a transaction of its own and commits it if that returns `Ok`.
    pub(super) async fn transact<T: Send + 'static>(
        &self,
        work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.transact_with(Durability::Immediate, work).await
    }

    /// [`Writer::transact`], durable with the next transaction that is: for parts of something that is only of use as a whole.
    pub(super) async fn transact_lazily<T: Send + 'static>(
        &self,
        work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.transact_with(Durability::None, work).await
    }

    async fn transact_with<T: Send + 'static>(
        &self,
        durability: Durability,
        work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (job, outcome) = alone(move |shared| commit(shared, durability, work));
        self.queue.send(job).await.map_err(|_| StoreError::Closed)?;
        outcome.await.map_err(|_| StoreError::Closed)?
    }

    /// Runs `work` in the writer's thread, without a transaction: when everything queued before is done and published.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let (job, outcome) = alone(move |shared| Ok(work(shared)));
        self.queue.send(job).await.map_err(|_| StoreError::Closed)?;
        outcome.await.map_err(|_| StoreError::Closed)?
    }

    /// [`Writer::run`], without waiting for it.
    pub(super) async fn post(&self, work: impl FnOnce(&Shared) + Send + 'static) -> Result<(), StoreError> {
        self.queue.send(Job::Alone(Box::new(work))).await.map_err(|_| StoreError::Closed)
    }

    /// [`Writer::transact`] for threads that may block. Panics on an async thread.
    pub(super) fn transact_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (job, outcome) = alone(move |shared| commit(shared, Durability::Immediate, work));
        self.queue.blocking_send(job).map_err(|_| StoreError::Closed)?;
        outcome.blocking_recv().map_err(|_| StoreError::Closed)?
    }
}

fn alone<T: Send + 'static>(
    work: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
) -> (Job, oneshot::Receiver<Result<T, StoreError>>) {
    let (reply, outcome) = oneshot::channel();
    let job = Job::Alone(Box::new(move |shared| {
        // Nobody may be waiting any more; what was committed stays committed.
        let _ = reply.send(work(shared));
    }));
    (job, outcome)
}

fn run(shared: &Shared, mut jobs: mpsc::Receiver<Job>) {
    let mut next = None;
    while let Some(job) = next.take().or_else(|| jobs.blocking_recv()) {
        match job {
            Job::Alone(work) => work(shared),
            Job::Writes { ops, permits, reply } => {
                let mut batch = Batch { size: ops.len(), members: vec![Member { ops, reply, permits }] };
                while batch.size < MAX_OPS {
                    match jobs.try_recv() {
                        Ok(Job::Writes { ops, permits, reply }) => {
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
                batch.commit(shared);
            }
        }
    }
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
    fn commit(self, shared: &Shared) {
        shared.client_writes.fetch_add(1, Ordering::Relaxed);
        let outcomes = commit(shared, Durability::Immediate, |_, rows| {
            self.members
                .iter()
                .map(|member| member.ops.iter().map(|op| rows.apply(op)).collect::<Result<Vec<_>, _>>())
                .collect::<Result<Vec<_>, _>>()
        });
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

fn commit<T>(
    shared: &Shared,
    durability: Durability,
    work: impl FnOnce(&WriteTransaction, &mut RowsTxn<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let mut txn = shared.database.begin_write()?;
    txn.set_durability(durability).map_err(redb::Error::from)?;
    let done = (|| {
        let mut rows = RowsTxn::open(&txn, shared, unix_ms())?;
        let value = work(&txn, &mut rows)?;
        Ok((value, rows.finish()?))
    })();
    match done {
        Ok((value, effects)) => {
            match effects.generations.clone() {
                None => txn.commit()?,
                Some(generations) => shared.generations.switch(generations, || Ok(txn.commit()?))?,
            }
            shared.publish(effects);
            Ok(value)
        }
        Err(error) => {
            txn.abort()?;
            Err(error)
        }
    }
}
