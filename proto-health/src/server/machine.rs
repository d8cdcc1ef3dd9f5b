//! The machine as this process sees it: sampled in the background, read at no cost.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto_common::clock::{millis, now_unix_ms};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::server::checks::{Space, SyncedWrite, space};
use crate::v1::{DiskStatus, MachineStatus};

/// Time between two samples.
pub const SAMPLE_INTERVAL: Duration = Duration::from_secs(2);

type Used = Arc<dyn Fn() -> Option<u64> + Send + Sync>;

/// A disk that holds data of the node.
#[derive(Clone)]
pub struct Disk {
    name: String,
    path: PathBuf,
    write: Option<SyncedWrite>,
    used: Option<Used>,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("name", &self.name).field("path", &self.path).finish_non_exhaustive()
    }
}

impl Disk {
    /// The one that holds `path`; `name` says what for: `data`, `staging`.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self { name: name.into(), path: path.into(), write: None, used: None }
    }

    /// Shows what that check measures.
    #[must_use]
    pub fn write_probe(mut self, probe: SyncedWrite) -> Self {
        self.write = Some(probe);
        self
    }

    /// Who knows how many bytes the node's own files take. Called on a thread that may block.
    #[must_use]
    pub fn used_by_node(mut self, used: impl Fn() -> Option<u64> + Send + Sync + 'static) -> Self {
        self.used = Some(Arc::new(used));
        self
    }
}

/// Samples the machine until the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Machine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    disks: Vec<Disk>,
    last: Arc<Mutex<Option<(Instant, MachineStatus)>>>,
    sampling: AbortHandle,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.sampling.abort();
    }
}

impl Machine {
    /// Begins to sample. Call it in a tokio runtime.
    #[must_use]
    pub fn start(disks: Vec<Disk>) -> Self {
        let last: Arc<Mutex<Option<(Instant, MachineStatus)>>> = Arc::default();
        let (shown, sampled) = (Arc::clone(&last), disks.clone());
        let sampling = tokio::spawn(async move {
            let mut system = System::new();
            // The use of processors is a difference: the first sample has none.
            let mut first = true;
            loop {
                let disks = sampled.clone();
                let sampling = tokio::task::spawn_blocking(move || {
                    let status = sample(&mut system, &disks, first);
                    (system, status)
                });
                let Ok((used, status)) = sampling.await else { return };
                system = used;
                *shown.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), status));
                let pause = if first { sysinfo::MINIMUM_CPU_UPDATE_INTERVAL } else { SAMPLE_INTERVAL };
                first = false;
                tokio::time::sleep(pause).await;
            }
        });
        Self { shared: Arc::new(Shared { disks, last, sampling: sampling.abort_handle() }) }
    }

    /// The last sample, with its age; `None` before the first.
    pub(crate) fn status(&self) -> Option<MachineStatus> {
        let (at, mut status) = self.shared.last.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        status.age_ms = millis(at.elapsed());
        // As last measured: by the check, which has its own interval.
        for (disk, shown) in self.shared.disks.iter().zip(&mut status.disks) {
            let probe = disk.write.as_ref().and_then(SyncedWrite::last);
            shown.writable = probe.map(|probe| probe.latency.is_some());
            shown.sync_latency_ms =
                probe.and_then(|probe| probe.latency).map(|latency| latency.as_secs_f64() * 1000.0);
        }
        Some(status)
    }
}

/// Blocks.
fn sample(system: &mut System, disks: &[Disk], first: bool) -> MachineStatus {
    let pid = Pid::from_u32(std::process::id());
    system.refresh_memory();
    system.refresh_cpu_usage();
    let what = ProcessRefreshKind::nothing().with_cpu().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), true, what);
    let process = system.process(pid);
    let (mut total, mut available) = (system.total_memory(), system.available_memory());
    if let Some(limits) = system.cgroup_limits() {
        total = total.min(limits.total_memory);
        available = available.min(limits.free_memory);
    }
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    MachineStatus {
        sampled_unix_ms: now_unix_ms(),
        age_ms: 0,
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        cpu_percent: (!first).then(|| f64::from(system.global_cpu_usage()).clamp(0.0, 100.0)),
        process_cpu_percent: process.filter(|_| !first).map(|process| process.cpu_usage().into()),
        load_1m: Some(System::load_average().one),
        memory_total_bytes: (total > 0).then_some(total),
        memory_available_bytes: (total > 0).then_some(available),
        process_memory_bytes: process.map(sysinfo::Process::memory),
        disks: disks.iter().map(disk_status).collect(),
    }
}

fn disk_status(disk: &Disk) -> DiskStatus {
    let Space { total, available } = space(&disk.path).unwrap_or(Space { total: 0, available: 0 });
    DiskStatus {
        name: disk.name.clone(),
        total_bytes: total,
        available_bytes: available,
        used_by_node_bytes: disk.used.as_ref().and_then(|used| used()),
        sync_latency_ms: None,
        writable: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn samples_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let probe = SyncedWrite::new(dir.path());
        let disk = Disk::new("data", dir.path()).write_probe(probe.clone()).used_by_node(|| Some(7));
        let machine = Machine::start(vec![disk]);
        let status = loop {
            match machine.status() {
                Some(status) if status.cpu_percent.is_some() => break status,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        assert!(status.cpus >= 1 && status.sampled_unix_ms > 1_700_000_000_000, "{status:?}");
        let total = status.memory_total_bytes.unwrap();
        assert!((1..=total).contains(&status.memory_available_bytes.unwrap()), "{status:?}");
        assert!((1..total).contains(&status.process_memory_bytes.unwrap()), "{status:?}");
        let [disk] = status.disks.as_slice() else { panic!("{status:?}") };
        assert!(disk.total_bytes > 0 && disk.available_bytes <= disk.total_bytes);
        assert_eq!((disk.used_by_node_bytes, disk.writable), (Some(7), None));
        probe.check().start().await.unwrap();
        let disk = machine.status().unwrap().disks.remove(0);
        assert!(disk.writable == Some(true) && disk.sync_latency_ms.unwrap() > 0.0, "{disk:?}");
    }
}
