//! What the node says of itself, asked for once for all who want to know at a time: what that costs does not depend on how many call.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto_common::clock::millis;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use crate::server::core::Inner;
use crate::server::facts::{self, Facts, Sections};
use crate::v1::RemovalBlocker;

/// Time between two questions to the node. It may take a millisecond to answer one, and calls may come by the thousand; but whoever reads a slot map of 16384
/// ranges asks for 41 pages one after the other, and has a second.
const BETWEEN: Duration = Duration::from_millis(5);

/// What the node said.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) facts: Facts,
    /// All reasons why it can't be removed.
    pub(crate) blockers: Vec<RemovalBlocker>,
}

type Answer = watch::Receiver<Option<Arc<Told>>>;

/// The next question, and when it may be asked.
#[derive(Debug, Default)]
pub(crate) struct Asking {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What those want to know who came since the last question was asked, and where the answer will be.
    next: Option<(Sections, Answer)>,
    not_before: Option<Instant>,
}

impl Asking {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the node says to a question that is asked from now on, in time whatever it does.
///
/// Cancel safe: others who wait for the same answer get it all the same.
pub(crate) async fn ask(inner: &Arc<Inner>, sections: Sections) -> Arc<Told> {
    let mut answer = {
        let mut state = inner.asking.lock();
        match &mut state.next {
            // Its task is still there.
            Some((wanted, answer)) if answer.has_changed().is_ok() => {
                *wanted = wanted.and(sections);
                answer.clone()
            }
            _ => {
                let (sender, answer) = watch::channel(None);
                state.next = Some((sections, answer.clone()));
                inner.tasks.spawn(put(Arc::clone(inner), sender, state.not_before));
                answer
            }
        }
    };
    let told = answer.wait_for(Option::is_some).await.ok().and_then(|told| told.clone());
    told.unwrap_or_else(|| {
        told_of(inner, facts::unknown("the question was lost, which is a defect; see the log"))
    })
}

/// Puts the next question to the node. Over within [`BETWEEN`] and the time that the node has.
async fn put(inner: Arc<Inner>, answer: watch::Sender<Option<Arc<Told>>>, not_before: Option<Instant>) {
    if let Some(at) = not_before {
        sleep_until(at).await;
    }
    let wanted = {
        let mut state = inner.asking.lock();
        state.not_before = Some(Instant::now() + BETWEEN);
        state.next.take()
    };
    let Some((sections, _)) = wanted else { return };
    let facts = facts_of(&inner, sections).await;
    answer.send_replace(Some(told_of(&inner, facts)));
}

fn told_of(inner: &Inner, mut facts: Facts) -> Arc<Told> {
    facts::fill_heard_from(&mut facts, |peer| inner.callers.last_heard_from(peer));
    let blockers = facts::blockers(&mut facts);
    Arc::new(Told { facts, blockers })
}

async fn facts_of(inner: &Inner, sections: Sections) -> Facts {
    let Some(source) = inner.facts.clone() else {
        return facts::unknown("this node has nobody who tells what it has");
    };
    let asking = tokio::spawn(async move { source.facts(sections).await });
    let abort = asking.abort_handle();
    let limit = inner.limits.facts_timeout;
    match timeout(limit, asking).await {
        Ok(Ok(facts)) => facts,
        Ok(Err(_)) => facts::unknown("the node failed to say what it has, which is a defect; see its log"),
        Err(_) => {
            abort.abort();
            facts::unknown(&format!("the node did not say within {} ms what it has", millis(limit)))
        }
    }
}
