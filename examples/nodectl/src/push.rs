//! `nodectl push`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::common::clock::millis;
use proto::common::error::Error;
use proto::common::fence::Fence;
use proto::common::ids::{NodeId, TransferId};
use proto::node::{Progress, TransferPhase, TransferProgress};
use proto::snapshot::Reason;
use proto::snapshot::sender::{Installed, SenderOptions, SnapshotSender, SnapshotToSend, TransferHandle};
use proto::snapshot::source::{Description, DirectorySource, FileSource, SnapshotSource, SourceError};
use proto::snapshot::spec::SnapshotPoint;
use proto::snapshot::transfers::Transfers;

use crate::advice;
use crate::args::Push;
use crate::call::located;
use crate::dial::{Dialer, Wait, pauses};
use crate::document::{EventDocument, InstalledDocument, StartedDocument, TransferDocument};
use crate::failure::Failure;
use crate::human;
use crate::identity;
use crate::live::Live;
use crate::output::Output;
use crate::resume;
use crate::signals::Signals;
use crate::trust;

/// How often what is shown is brought up to date.
const REFRESH: Duration = Duration::from_millis(100);
/// Entries that a refusal names; there may be a million.
const NAMED: usize = 20;

pub(crate) async fn run(push: Push, output: &mut Output, signals: &mut Signals) -> Result<(), Failure> {
    if push.path.is_dir() {
        let source = DirectorySource::new(&push.path);
        send(&push, source, output, signals).await
    } else {
        let source = FileSource::new(&push.path);
        send(&push, source, output, signals).await
    }
}

async fn send(
    push: &Push,
    source: impl SnapshotSource,
    output: &mut Output,
    signals: &mut Signals,
) -> Result<(), Failure> {
    let began = Instant::now();
    let content = tokio::select! {
        described = source.describe(false) => described.map_err(|error| unreadable(push, error))?,
        () = signals.interrupted() => return Err(Failure::interrupted("interrupted before anything was sent")),
    };
    if content.files.is_empty() {
        let message = format!("'<PATH>': {} has no files; a snapshot has at least one", push.path.display());
        return Err(Failure::usage(message));
    }
    let source_node = match &push.source_node {
        Some(node) => node.clone(),
        None => trust::name()?,
    };
    let id = match &push.transfer_id {
        Some(id) => id.clone(),
        None => {
            identity::of(push, &source_node, &content).map_err(|error| Failure::failed(error.to_string()))?
        }
    };
    let transfers = Transfers::default();
    let dialer =
        Dialer::new(push.to.dial(push.target_node.as_ref())?, push.retry_for, transfers.clone(), id.clone());
    let dialer = Arc::new(dialer);
    let sender = SnapshotSender::new(Arc::clone(&dialer)).options(options(push)).transfers(transfers);
    let mut handle = sender.send(snapshot(push, source_node, &id), source)?;
    let mut sending = Sending { push, id: &id, resume: resume::command(id.as_str()), began };
    sending.announce(&content, output);

    let mut live = Live::new(output, &push.to);
    let mut refresh = tokio::time::interval(REFRESH);
    let result = loop {
        tokio::select! {
            biased;
            () = signals.interrupted() => break None,
            result = handle.join() => break Some(result),
            _ = refresh.tick() => {
                if let Some(transfer) = handle.progress() {
                    live.show(output, &transfer, wait(&transfer, &dialer).as_ref());
                }
            }
        }
    };
    drop(live);
    let last = handle.progress().unwrap_or_default();
    match result {
        Some(Ok(installed)) => {
            sending.installed(&installed, &last, output);
            Ok(())
        }
        Some(Err(error)) => Err(sending.failed(error)),
        None => Err(sending.interrupted(handle, &last)),
    }
}

fn options(push: &Push) -> SenderOptions {
    let mut options = SenderOptions::default();
    options.lanes = push.lanes.unwrap_or(options.lanes);
    options.bytes_per_second = push.rate.map(|rate| rate.0);
    options.digests = push.reuse;
    options.backoff = pauses();
    options.give_up_after = push.retry_for.0;
    options
}

fn snapshot(push: &Push, source_node: NodeId, id: &TransferId) -> SnapshotToSend {
    SnapshotToSend {
        transfer_id: id.clone(),
        source_shard: push.source_shard.clone(),
        target_shard: push.target_shard.clone(),
        source_node,
        target_node: push.target_node.clone(),
        slots: push.slots,
        point: SnapshotPoint { term: push.term, index: push.index },
        fence: push.epoch.map(|epoch| Fence { epoch, term: push.term }),
        priority: push.priority.into(),
    }
}

/// What the transfer waits for, if it does.
fn wait(transfer: &TransferProgress, dialer: &Dialer) -> Option<Wait> {
    if transfer.phase() != TransferPhase::Pending {
        return None;
    }
    dialer.wait().or_else(|| {
        let error = Error::from(transfer.progress.as_ref()?.error.clone()?);
        let next_try = error.retry_after_hint();
        Some(Wait { error, next_try })
    })
}

/// Why PATH cannot be sent. What it holds is wrong usage, like a path that is not there; a disk that fails is not.
fn unreadable(push: &Push, error: SourceError) -> Failure {
    let path = push.path.display();
    match error {
        SourceError::Unsupported { mut entries } => {
            let count = entries.len();
            entries.truncate(NAMED);
            if count > NAMED {
                entries.push(format!("and {} more", count - NAMED));
            }
            let what = if count == 1 { "an entry".to_owned() } else { format!("{count} entries") };
            let list = entries.join("; ");
            Failure::usage(format!("'<PATH>': {path} has {what} that cannot be part of a snapshot: {list}"))
        }
        error => Failure::failed(format!("cannot read {path}: {error}")),
    }
}

/// A push that has begun, for those who tell of it.
struct Sending<'a> {
    push: &'a Push,
    id: &'a TransferId,
    resume: String,
    began: Instant,
}

impl Sending<'_> {
    fn announce(&mut self, content: &Description, output: &mut Output) {
        let files_total = content.files.len() as u64;
        let bytes_total = content.files.iter().try_fold(0_u64, |sum, file| sum.checked_add(file.size?));
        let address = self.push.to.to_string();
        if output.json() {
            output.document(&StartedDocument {
                event: "started",
                transfer_id: self.id.as_str(),
                address: &address,
                files_total,
                bytes_total,
                resume: &self.resume,
            });
            return;
        }
        let size = bytes_total.map_or_else(String::new, |bytes| format!("{} in ", human::bytes(bytes)));
        output.line(&format!(
            "pushing {size}{} to {address} as transfer {}",
            human::files(files_total),
            self.id
        ));
    }

    fn installed(&self, installed: &Installed, last: &TransferProgress, output: &mut Output) {
        let elapsed = self.began.elapsed();
        if output.json() {
            output.document(&EventDocument {
                event: "installed",
                transfer: TransferDocument::from(last),
                installed: Some(InstalledDocument {
                    already_installed: installed.already_installed,
                    installed_unix_ms: installed.installed_unix_ms,
                    elapsed_ms: millis(elapsed),
                }),
            });
            return;
        }
        let size =
            format!("{} in {}", human::bytes(installed.total_bytes), human::files(installed.file_count));
        if installed.already_installed && last.wire_bytes == 0 {
            output.line(&format!("{} was installed already: {size}; nothing was sent", self.id));
            return;
        }
        let mut text =
            format!("installed {size} in {}; {} sent", human::time(elapsed), human::bytes(last.wire_bytes));
        let rate = u128::from(last.wire_bytes) * 1000 / u128::from(millis(elapsed)).max(1);
        if let Ok(rate @ 1..) = u64::try_from(rate) {
            text.push_str(&format!(" at {}", human::rate(rate)));
        }
        if installed.reused_bytes > 0 {
            text.push_str(&format!(", {} were there already", human::bytes(installed.reused_bytes)));
        }
        if last.connections > 1 {
            text.push_str(&format!(", {} reconnections", last.connections - 1));
        }
        output.line(&text);
    }

    fn failed(&self, error: Error) -> Failure {
        let error = located(error, &self.push.to);
        let help = advice::about(&error, &self.push.to.to_string());
        let resumable = error.is_retryable() || error.is(Reason::Superseded);
        let help = match (error.is_retryable(), self.push.retry_for.0) {
            (true, Some(patience)) => {
                let tried = format!("nothing moved for {}, the limit of --retry-for", human::time(patience));
                Some(help.map_or_else(|| tried.clone(), |help| format!("{tried}; {help}")))
            }
            _ => help,
        };
        let failure = Failure::from(error).about(self.id.as_str()).help(help);
        if resumable { failure.resume(&self.resume) } else { failure }
    }

    /// Dropping the handle stops the sending and leaves what the node has.
    fn interrupted(&self, handle: TransferHandle, last: &TransferProgress) -> Failure {
        drop(handle);
        let Progress { bytes_done, bytes_total, .. } = last.progress.clone().unwrap_or_default();
        let of = bytes_total.map_or_else(String::new, |total| format!(" of {}", human::bytes(total)));
        let address = &self.push.to;
        let message = if last.connections == 0 {
            format!("interrupted before {address} accepted anything")
        } else {
            format!(
                "interrupted; {}{of} are safe at {address} and stay there until they expire",
                human::bytes(bytes_done)
            )
        };
        Failure::interrupted(message).about(self.id.as_str()).resume(&self.resume)
    }
}
