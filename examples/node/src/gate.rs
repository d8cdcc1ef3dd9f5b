//! The gate that every request passes: whose a slot is, and whether requests to it have to wait.
//!
//! While slots change hands, requests to them are held, not refused. A hold first stops newcomers, then
//! waits until the requests that were let in before are done; so when [`Gate::hold`] returns, nothing that
//! it stops is under way, and nothing will be until the [`GateHold`] is dropped.

mod slow;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

pub use slow::WriteDelay;

use crate::common::{NodeId, SLOT_COUNT, SlotRange};
use crate::store::{Claim, Ownership};

/// What a request does to its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads.
    Read,
    /// Writes, perhaps after reading.
    Write,
}

/// What a hold stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HoldMode {
    /// Writes wait, reads go on.
    Writes,
    /// Reads and writes wait.
    All,
    /// Neither is served, and neither waits: nobody knows whether this node may serve them. See [`Gate::quarantine`].
    Refused,
}

/// What the gate says to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Pass,
    /// The slot is held: [wait](Gate::wait), then ask again.
    Held,
    /// Another node owns the slot.
    Moved,
    /// Nobody owns the slot.
    Unowned,
    /// What is known of the slot is [damaged](Gate::quarantined).
    Quarantined,
}

/// Why a request does not wait any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// Too many requests wait already.
    #[error("too many requests wait for slots that change hands")]
    TooMany,
    /// It has waited as long as requests may.
    #[error("the slot has been changing hands for long")]
    TooLong,
}

/// See the [module](self). Clones are the same gate.
#[derive(Debug, Clone)]
pub struct Gate {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    me: NodeId,
    /// Held by whoever makes a new picture of who owns what, which takes milliseconds where each slot has its owner: every request waits for `state`.
    known: Mutex<Known>,
    state: RwLock<State>,
    reads: Box<[AtomicU32]>,
    writes: Box<[AtomicU32]>,
    /// The state changed: waiting requests ask again.
    changed: Notify,
    /// A request ended while somebody drains.
    ended: Notify,
    draining: AtomicUsize,
    waiting: AtomicUsize,
    max_waiting: usize,
    sealed: AtomicBool,
    slow: slow::SlowSlots,
}

/// Whence the picture of who owns what is made.
#[derive(Debug)]
struct Known {
    durable: Ownership,
    /// Claims that are not durable yet.
    ahead: Vec<Claim>,
}

#[derive(Debug)]
struct State {
    /// All that is known together.
    ownership: Arc<Ownership>,
    /// The same by slot, since every request asks.
    owners: Box<[Owner]>,
    holds: Vec<Entry>,
    held: Box<[Option<HoldMode>]>,
    next_hold: u64,
}

/// A hold that lives.
#[derive(Debug)]
struct Entry {
    id: u64,
    range: SlotRange,
    mode: HoldMode,
    /// How long a request waits for it at most.
    patience: Option<Duration>,
    began: Instant,
    /// Requests that have waited for it.
    waited: Arc<AtomicU64>,
    /// Of slots that are refused.
    why: Option<Arc<str>>,
}

impl Entry {
    fn stops(&self, slot: u16, access: Access) -> bool {
        self.range.contains(slot) && (self.mode >= HoldMode::All || access == Access::Write)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Me,
    Other,
    Nobody,
}

impl Gate {
    /// The gate of node `me`. At most `max_waiting` requests wait for held slots.
    #[must_use]
    pub fn new(me: NodeId, ownership: Ownership, max_waiting: usize) -> Self {
        let slots = usize::from(SLOT_COUNT);
        let counters = || (0..slots).map(|_| AtomicU32::new(0)).collect();
        let owners = owners(&me, &ownership);
        Self {
            shared: Arc::new(Shared {
                me,
                known: Mutex::new(Known { durable: ownership.clone(), ahead: Vec::new() }),
                state: RwLock::new(State {
                    ownership: Arc::new(ownership),
                    owners,
                    holds: Vec::new(),
                    held: vec![None; slots].into(),
                    next_hold: 0,
                }),
                reads: counters(),
                writes: counters(),
                changed: Notify::new(),
                ended: Notify::new(),
                draining: AtomicUsize::new(0),
                waiting: AtomicUsize::new(0),
                max_waiting,
                sealed: AtomicBool::new(false),
                slow: slow::SlowSlots::default(),
            }),
        }
    }

    /// The picture of who owns what.
    #[must_use]
    pub fn ownership(&self) -> Arc<Ownership> {
        Arc::clone(&self.shared.read().ownership)
    }

    /// Replaces the picture of who owns what by what is durable. What it was [told ahead of that](Gate::redirect) stays, until it is.
    pub fn set_ownership(&self, ownership: Ownership) {
        self.shared.picture(|known| known.durable = ownership);
    }

    /// Takes `claim` over, by epoch, before it is durable here: its owner has the slots durably, and what leads this node to know so after a
    /// crash is durable, too. Repeating it changes nothing. Returns whether its owner has all of the slots then; not where another one is known at an epoch
    /// that is as high.
    #[must_use]
    pub fn redirect(&self, claim: Claim) -> bool {
        self.shared.picture(|known| known.ahead.push(claim.clone())).gives(&claim)
    }

    /// Permits of no slots yet, to [enter](Permits::enter) with.
    #[must_use]
    pub fn permits(&self, access: Access) -> Permits {
        Permits { shared: Arc::clone(&self.shared), access, slots: Vec::new() }
    }

    /// What the gate says to `access` at this moment, without letting anything in.
    #[must_use]
    pub fn verdict(&self, slot: u16, access: Access) -> Verdict {
        self.shared.read().verdict(slot, access)
    }

    /// [`Gate::verdict`] of `slot` and of all slots behind it up to the second result, exclusive.
    #[must_use]
    pub fn verdicts_from(&self, slot: u16, access: Access) -> (Verdict, u16) {
        let state = self.shared.read();
        let verdict = state.verdict(slot, access);
        (
            verdict,
            (slot..SLOT_COUNT).find(|&slot| state.verdict(slot, access) != verdict).unwrap_or(SLOT_COUNT),
        )
    }

    /// Waits until the slot is not held for `access`, and says whether it may pass. It may be held again
    /// when the caller enters.
    ///
    /// Cancel safe: dropping the future gives up the place.
    ///
    /// # Errors
    ///
    /// [`WaitError::TooMany`] at once, [`WaitError::TooLong`] when the [patience](Gate::hold_for) of a hold is at its end.
    pub async fn wait(&self, slot: u16, access: Access) -> Result<Verdict, WaitError> {
        let waiting = self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        let _place = Place(&self.shared.waiting);
        if waiting >= self.shared.max_waiting {
            return Err(WaitError::TooMany);
        }
        let since = Instant::now();
        let mut counted = 0;
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that no change between looking and waiting is missed.
            changed.as_mut().enable();
            let until = {
                let state = self.shared.read();
                match state.verdict(slot, access) {
                    Verdict::Held => state.count_waiting(slot, access, since, &mut counted),
                    verdict => return Ok(verdict),
                }
            };
            match until {
                None => changed.await,
                Some(until) => {
                    let left = tokio::time::timeout_at(until, changed).await;
                    left.map_err(|_| WaitError::TooLong)?;
                }
            }
        }
    }

    /// Keeps what is held for ever, also when its [`GateHold`] is dropped: the process is about to end, and what is
    /// undecided then must not be served by it any more.
    pub fn seal(&self) {
        self.shared.sealed.store(true, Ordering::SeqCst);
    }

    /// How many requests wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    /// Holds `range` and returns once everything that the hold stops has drained. Holds may overlap; the
    /// stricter one counts.
    ///
    /// Cancel safe: dropping the future releases the hold.
    pub async fn hold(&self, range: SlotRange, mode: HoldMode) -> GateHold {
        self.drained(self.hold_undrained(range, mode)).await
    }

    /// [`Gate::hold`], for which each request waits for `patience` at most.
    ///
    /// Cancel safe: dropping the future releases the hold.
    pub async fn hold_for(&self, range: SlotRange, mode: HoldMode, patience: Duration) -> GateHold {
        self.drained(self.hold_undrained_for(range, mode, Some(patience))).await
    }

    async fn drained(&self, hold: GateHold) -> GateHold {
        self.shared.draining.fetch_add(1, Ordering::SeqCst);
        let _draining = Place(&self.shared.draining);
        loop {
            let ended = self.shared.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.shared.is_drained(hold.range, hold.mode) {
                return hold;
            }
            ended.await;
        }
    }

    /// [`Gate::hold`] where nothing can be under way yet: before a node serves.
    pub fn hold_undrained(&self, range: SlotRange, mode: HoldMode) -> GateHold {
        self.hold_undrained_for(range, mode, None)
    }

    /// [`Gate::hold_undrained`], for which each request waits for `patience` at most.
    pub fn hold_undrained_for(
        &self,
        range: SlotRange,
        mode: HoldMode,
        patience: Option<Duration>,
    ) -> GateHold {
        self.add(range, mode, patience, None)
    }

    /// Refuses all requests to slots of `range` that this node owns, until the result is dropped, and says `why`. Where another node owns
    /// them, requests go there as ever.
    pub fn quarantine(&self, range: SlotRange, why: &str) -> GateHold {
        self.add(range, HoldMode::Refused, None, Some(why.into()))
    }

    /// Why the slot is quarantined, if it is.
    #[must_use]
    pub fn quarantined(&self, slot: u16) -> Option<Arc<str>> {
        let state = self.shared.read();
        let mut holds = state.holds.iter().filter(|hold| hold.range.contains(slot));
        holds.find_map(|hold| hold.why.clone())
    }

    /// All slots that are quarantined, and why.
    #[must_use]
    pub fn quarantines(&self) -> Vec<(SlotRange, Arc<str>)> {
        let state = self.shared.read();
        state.holds.iter().filter_map(|hold| Some((hold.range, hold.why.clone()?))).collect()
    }

    fn add(
        &self,
        range: SlotRange,
        mode: HoldMode,
        patience: Option<Duration>,
        why: Option<Arc<str>>,
    ) -> GateHold {
        let waited = Arc::default();
        let mut state = self.shared.write();
        let id = state.next_hold;
        state.next_hold += 1;
        let began = Instant::now();
        state.holds.push(Entry { id, range, mode, patience, began, waited: Arc::clone(&waited), why });
        state.spread();
        GateHold { shared: Arc::clone(&self.shared), id, range, mode, waited }
    }

    /// Delays writes to `range` until the result is dropped; see [`WriteDelay::set`].
    pub fn slow_writes(&self, range: SlotRange) -> WriteDelay {
        self.shared.slow.add(range)
    }

    /// Whether writes to `slot` are delayed.
    #[must_use]
    pub fn is_slow(&self, slot: u16) -> bool {
        self.shared.slow.of(slot).is_some()
    }

    /// Waits as long as a write to `slot` is delayed. Takes no time where nothing is.
    ///
    /// Cancel safe.
    pub async fn delay_write(&self, slot: u16) {
        self.shared.slow.delay(slot).await;
    }
}

fn owners(me: &NodeId, ownership: &Ownership) -> Box<[Owner]> {
    let mut owners = vec![Owner::Nobody; usize::from(SLOT_COUNT)];
    for claim in ownership.claims() {
        let owner = if claim.owner == *me { Owner::Me } else { Owner::Other };
        owners[usize::from(claim.range.start())..usize::from(claim.range.end())].fill(owner);
    }
    owners.into()
}

impl State {
    fn verdict(&self, slot: u16, access: Access) -> Verdict {
        let slot = usize::from(slot);
        match (self.held[slot], access) {
            (Some(HoldMode::All), _) | (Some(HoldMode::Writes), Access::Write) => return Verdict::Held,
            _ => {}
        }
        match self.owners[slot] {
            Owner::Me if self.held[slot] == Some(HoldMode::Refused) => Verdict::Quarantined,
            Owner::Me => Verdict::Pass,
            Owner::Other => Verdict::Moved,
            Owner::Nobody => Verdict::Unowned,
        }
    }

    /// Counts a request that waits `since` then, once per hold, and says until when it may: the patience of a hold is for what that hold takes. `counted` is which
    /// holds it was counted for.
    fn count_waiting(&self, slot: u16, access: Access, since: Instant, counted: &mut u64) -> Option<Instant> {
        let stopping = || self.holds.iter().filter(|hold| hold.stops(slot, access));
        for hold in stopping().filter(|hold| hold.id >= *counted) {
            hold.waited.fetch_add(1, Ordering::Relaxed);
        }
        *counted = self.next_hold;
        stopping().filter_map(|hold| Some(since.max(hold.began) + hold.patience?)).min()
    }

    fn spread(&mut self) {
        self.held.fill(None);
        for &Entry { range, mode, .. } in &self.holds {
            for held in &mut self.held[usize::from(range.start())..usize::from(range.end())] {
                *held = (*held).max(Some(mode));
            }
        }
    }
}

// A poisoned lock means that a panic happened between two statements that leave the state whole.
impl Shared {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is known, and makes the picture anew, which is returned; forgets those claims ahead that tell nothing new.
    fn picture(&self, change: impl FnOnce(&mut Known)) -> Arc<Ownership> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut known);
        let mut ownership = known.durable.clone();
        known.ahead.retain(|claim| ownership.adopt(claim));
        let owners = owners(&self.me, &ownership);
        let ownership = Arc::new(ownership);
        let mut state = self.write();
        let old = std::mem::replace(&mut state.owners, owners);
        let older = std::mem::replace(&mut state.ownership, Arc::clone(&ownership));
        drop(state);
        // Freed while nobody waits for them.
        drop((old, older));
        drop(known);
        self.changed.notify_waiters();
        ownership
    }

    fn counters(&self, access: Access) -> &[AtomicU32] {
        match access {
            Access::Read => &self.reads,
            Access::Write => &self.writes,
        }
    }

    fn is_drained(&self, range: SlotRange, mode: HoldMode) -> bool {
        let slots = usize::from(range.start())..usize::from(range.end());
        let idle =
            |counters: &[AtomicU32]| counters[slots.clone()].iter().all(|n| n.load(Ordering::SeqCst) == 0);
        idle(&self.writes) && (mode == HoldMode::Writes || idle(&self.reads))
    }
}

struct Place<'a>(&'a AtomicUsize);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Requests of one connection that were let in. Dropping it says that they are done.
#[derive(Debug)]
pub struct Permits {
    shared: Arc<Shared>,
    access: Access,
    slots: Vec<u16>,
}

impl Permits {
    /// Lets one more request in, if the slot is this node's and not held.
    pub fn enter(&mut self, slot: u16) -> Verdict {
        // Counted under the lock: a hold that comes later sees the count when it has the lock.
        let state = self.shared.read();
        let verdict = state.verdict(slot, self.access);
        if verdict == Verdict::Pass {
            self.shared.counters(self.access)[usize::from(slot)].fetch_add(1, Ordering::SeqCst);
            self.slots.push(slot);
        }
        verdict
    }
}

impl Drop for Permits {
    fn drop(&mut self) {
        let counters = self.shared.counters(self.access);
        for &slot in &self.slots {
            counters[usize::from(slot)].fetch_sub(1, Ordering::SeqCst);
        }
        if self.shared.draining.load(Ordering::SeqCst) > 0 {
            self.shared.ended.notify_waiters();
        }
    }
}

/// Slots are held as long as this lives.
#[derive(Debug)]
#[must_use = "dropping it lets the requests through"]
pub struct GateHold {
    shared: Arc<Shared>,
    id: u64,
    range: SlotRange,
    mode: HoldMode,
    waited: Arc<AtomicU64>,
}

impl GateHold {
    /// Requests that have waited for it so far, those that wait now included.
    #[must_use]
    pub fn waited(&self) -> u64 {
        self.waited.load(Ordering::Relaxed)
    }

    /// The held slots.
    #[must_use]
    pub fn range(&self) -> SlotRange {
        self.range
    }
}

impl Drop for GateHold {
    fn drop(&mut self) {
        if self.shared.sealed.load(Ordering::SeqCst) {
            return;
        }
        let mut state = self.shared.write();
        state.holds.retain(|hold| hold.id != self.id);
        state.spread();
        drop(state);
        self.shared.changed.notify_waiters();
    }
}
