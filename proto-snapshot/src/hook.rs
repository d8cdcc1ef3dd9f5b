//! What the owner of a store has to say about a snapshot: whether it may come, and how it becomes part of the state machine.

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use proto_common::error::Error;

use crate::spec::TransferPlan;
use crate::store::PlacedSnapshot;

/// A boxed future, as hooks return.
pub type HookFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

/// Something that is held for as long as a transfer is unfinished, e.g. the
/// [`RangeHold`](proto_common::guard::RangeHold) of its slots.
pub type Hold = Box<dyn Any + Send + Sync>;

/// Lets the owner of a store take part in a transfer.
pub trait InstallHook: Send + Sync + 'static {
    /// Called before a transfer is accepted. What it returns is dropped when the transfer ends.
    ///
    /// # Errors
    ///
    /// Go to the sender as they are: give the code and reason that fit.
    fn admit<'a>(&'a self, plan: &'a TransferPlan) -> HookFuture<'a, Hold> {
        let _ = plan;
        Box::pin(async { Ok(Box::new(()) as Hold) })
    }

    /// Called for each unfinished transfer when the node starts, instead of [`admit`](Self::admit), which is the default: its hold is needed
    /// again, and what only a new transfer has to fulfil, such as room on the disk, needs no second look. A hook that wraps another has to forward this, too.
    ///
    /// # Errors
    ///
    /// The transfer goes on without a hold. Whether it can be installed is for [`install`](Self::install) to find out.
    fn readmit<'a>(&'a self, plan: &'a TransferPlan) -> HookFuture<'a, Hold> {
        self.admit(plan)
    }

    /// Why the source of a transfer that is staged here cannot give its slots away any more, as far as this node knows: that another one owns some of them. Where it says so
    /// at two looks in a row, up to a minute apart, and the transfer does not have all its data yet, it ends as FAILED with `INSTALL_REFUSED`, so that what
    /// [`admit`](Self::admit) holds for it is free again. `None`, the default: nothing is known. Does not wait. A hook that wraps another has to forward this, too.
    fn lost_by_source(&self, plan: &TransferPlan) -> Option<String> {
        let _ = plan;
        None
    }

    /// Merges a complete, verified snapshot into the state machine. It lies in its final place but is
    /// not the shard's current one until this returns `Ok`; the sender sees the phase INSTALLING.
    ///
    /// **Must be idempotent**: it is called again when the node crashed before its success was
    /// recorded. Putting the same rows once more is not enough where clients may have written since: record
    /// the transfer ID, or the ownership that it brings, in the transaction that merges the rows, and do nothing where that
    /// is found. It runs in a task of the receiver, so a sender that disconnects doesn't end it.
    ///
    /// # Errors
    ///
    /// One that [is retryable](Error::is_retryable) is shown in the progress and the hook is called again,
    /// with growing pauses. Any other ends the transfer as FAILED with `INSTALL_REFUSED`.
    fn install<'a>(&'a self, snapshot: &'a PlacedSnapshot) -> HookFuture<'a, ()>;

    /// Whether the files stay once the snapshot is current. Default: yes. `false` is for an [`install`](Self::install) that has
    /// made them part of something else: the store [discards](crate::store::Staging::discard) them then, and remembers that they
    /// were installed. A hook that wraps another has to forward this, too.
    fn keeps_files(&self, plan: &TransferPlan) -> bool {
        let _ = plan;
        true
    }
}

/// Takes every snapshot and leaves it as files.
#[derive(Debug, Clone, Copy, Default)]
pub struct KeepFiles;

impl InstallHook for KeepFiles {
    fn install<'a>(&'a self, _snapshot: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

impl<H: InstallHook + ?Sized> InstallHook for Arc<H> {
    fn admit<'a>(&'a self, plan: &'a TransferPlan) -> HookFuture<'a, Hold> {
        (**self).admit(plan)
    }

    fn readmit<'a>(&'a self, plan: &'a TransferPlan) -> HookFuture<'a, Hold> {
        (**self).readmit(plan)
    }

    fn lost_by_source(&self, plan: &TransferPlan) -> Option<String> {
        (**self).lost_by_source(plan)
    }

    fn install<'a>(&'a self, snapshot: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        (**self).install(snapshot)
    }

    fn keeps_files(&self, plan: &TransferPlan) -> bool {
        (**self).keeps_files(plan)
    }
}
