//! From components and the node's state to the verdict of each service: the rules of `health.proto`.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use proto_common::clock::now_unix_ms;
use proto_common::text::printable;
use tokio::time::Instant;

use crate::server::core::Core;
use crate::v1::{HealthProbe, HealthStatus, NodeState};

/// The services that every node has, beside its components.
pub(crate) const OVERALL: &str = "";
pub(crate) const LIVENESS: &str = "liveness";
pub(crate) const READINESS: &str = "readiness";
pub(crate) const STARTUP: &str = "startup";
pub(crate) const RESERVED: [&str; 3] = [LIVENESS, READINESS, STARTUP];

/// How one service is.
#[derive(Debug, Clone)]
pub(crate) struct Verdict {
    pub(crate) status: HealthStatus,
    pub(crate) message: Arc<str>,
    pub(crate) since_unix_ms: u64,
    /// The revision at which anything that a watcher of it is told of changed last.
    pub(crate) version: u64,
    /// The answer of the standard protocol: SERVING.
    pub(crate) serving: bool,
    fingerprint: u64,
}

/// All verdicts at one time; readers never wait for anything but a pointer.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) revision: u64,
    pub(crate) state: NodeState,
    /// The last frames were sent; no watch goes on.
    pub(crate) closed: bool,
    /// From here on a result is stale that was not when this was made.
    pub(crate) fresh_until: Option<Instant>,
    pub(crate) verdicts: HashMap<Arc<str>, Verdict>,
    /// gRPC services, which only the standard protocol knows; each is as ready as the node.
    pub(crate) services: BTreeSet<Arc<str>>,
}

impl Snapshot {
    /// What the standard protocol says of `service`; `None`: not known.
    pub(crate) fn serving(&self, service: &str) -> Option<bool> {
        let name = if self.services.contains(service) { READINESS } else { service };
        self.verdicts.get(service).or_else(|| self.verdicts.get(name)).map(|verdict| verdict.serving)
    }
}

/// One component as the verdicts see it.
struct Seen {
    name: Arc<str>,
    status: HealthStatus,
    message: String,
    critical: bool,
    probes: Vec<HealthProbe>,
    since_unix_ms: u64,
}

/// Looks at everything anew. Advances the state and the revision of `core`.
pub(crate) fn look(core: &mut Core, before: &Snapshot, now: Instant) -> Snapshot {
    let mut fresh_until: Option<Instant> = None;
    let mut seen = Vec::with_capacity(core.cells.len());
    for (name, cell) in &mut core.cells {
        let (status, message) = cell.verdict(now);
        if let Some(at) = cell.stale_at().filter(|at| *at >= now) {
            fresh_until = Some(fresh_until.map_or(at, |until| until.min(at)));
        }
        seen.push(Seen {
            name: Arc::clone(name),
            status,
            message,
            critical: cell.component.critical,
            probes: cell.component.probes.clone(),
            since_unix_ms: cell.since_unix_ms(),
        });
    }
    let started = seen
        .iter()
        .all(|one| !one.critical || !one.probes.contains(&HealthProbe::Startup) || one.status.works());
    core.life.advance(started);

    let state = core.life.state();
    let starting = !core.life.started();
    let mut verdicts = HashMap::with_capacity(seen.len() + 4);
    let mut put = |name: Arc<str>,
                   status: HealthStatus,
                   message: String,
                   serving,
                   counted: &[&Seen],
                   since: Option<u64>| {
        let mut hasher = DefaultHasher::new();
        (i32::from(state), i32::from(status)).hash(&mut hasher);
        for one in counted {
            (&one.name, i32::from(one.status), one.critical).hash(&mut hasher);
        }
        let fingerprint = hasher.finish();
        let old = before.verdicts.get(&name);
        let version = old.filter(|old| old.fingerprint == fingerprint).map(|old| old.version);
        let since_unix_ms = since
            .or_else(|| old.filter(|old| old.status == status).map(|old| old.since_unix_ms))
            .unwrap_or_else(now_unix_ms);
        // 0 is replaced by the new revision below.
        let version = version.unwrap_or(0);
        let message = Arc::from(message);
        let verdict = Verdict { status, message, since_unix_ms, version, serving, fingerprint };
        verdicts.insert(name, verdict);
    };

    let all: Vec<&Seen> = seen.iter().collect();
    let of =
        |probe| all.iter().copied().filter(|one: &&Seen| one.probes.contains(&probe)).collect::<Vec<_>>();
    let ready = state == NodeState::Running;

    let live = of(HealthProbe::Liveness);
    let (status, message) = aggregate(&live, starting, core.message_bytes);
    put(Arc::from(LIVENESS), status, message, status != HealthStatus::Unhealthy, &live, None);

    let readiness = of(HealthProbe::Readiness);
    for (name, counted) in [(READINESS, &readiness), (OVERALL, &all)] {
        let (mut status, mut message) = aggregate(&readiness, starting, core.message_bytes);
        if !ready {
            status = HealthStatus::Unhealthy;
            message = printable(&core.life.why_not_ready(&message), core.message_bytes);
        }
        put(Arc::from(name), status, message, status.works(), counted, None);
    }

    let startup = of(HealthProbe::Startup);
    let (status, message) = if starting {
        let waiting: Vec<&str> =
            startup.iter().filter(|one| one.critical && !one.status.works()).map(|one| &*one.name).collect();
        let message = match waiting.as_slice() {
            [] => core.life.why_not_ready(""),
            names => format!("still starting: waits for {}", names.join(", ")),
        };
        (HealthStatus::Unhealthy, printable(&message, core.message_bytes))
    } else {
        (HealthStatus::Healthy, String::new())
    };
    put(Arc::from(STARTUP), status, message, status.works(), &startup, None);

    for one in &seen {
        let serving = ready && (one.status.works() || one.status == HealthStatus::Undecided);
        let name = Arc::clone(&one.name);
        put(name, one.status, one.message.clone(), serving, &[one], Some(one.since_unix_ms));
    }

    let gone = before.verdicts.keys().any(|name| !verdicts.contains_key(name));
    let changed = gone || verdicts.values().any(|verdict| verdict.version == 0);
    if changed {
        core.revision += 1;
    }
    for verdict in verdicts.values_mut().filter(|verdict| verdict.version == 0) {
        verdict.version = core.revision;
    }
    Snapshot {
        revision: core.revision,
        state,
        closed: core.closed,
        fresh_until,
        verdicts,
        services: core.services.clone(),
    }
}

/// The verdict over components, and why.
fn aggregate(counted: &[&Seen], starting: bool, message_bytes: usize) -> (HealthStatus, String) {
    let mut status = HealthStatus::Healthy;
    let mut why: Vec<(u8, String)> = Vec::new();
    for one in counted {
        let effect = match one.status {
            HealthStatus::Healthy => continue,
            HealthStatus::Unhealthy if one.critical => HealthStatus::Unhealthy,
            HealthStatus::Degraded | HealthStatus::Unhealthy => HealthStatus::Degraded,
            _ if one.critical && !starting => HealthStatus::Degraded,
            _ => continue,
        };
        if effect.severity() > status.severity() {
            status = effect;
        }
        let text = if one.message.is_empty() { one.status.short_name() } else { &one.message };
        why.push((effect.severity(), format!("{}: {text}", one.name)));
    }
    why.sort_by_key(|(severity, _)| std::cmp::Reverse(*severity));
    let why: Vec<String> = why.into_iter().map(|(_, text)| text).collect();
    (status, printable(&why.join("; "), message_bytes))
}
