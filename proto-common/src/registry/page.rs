//! Listing tasks page by page, without gaps and without repeats while they start and end.

use super::{Active, Finished, Registry};
use crate::error::{CommonReason, Error};
use crate::v1::Direction;

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// The tasks: first those that were active when the list began, the longest running first; then finished ones, the latest first.
    pub items: Vec<T>,
    /// Asks for the next page; empty if this is the last.
    pub next_page_token: String,
}

/// Where a list goes on. It has two parts: first what was active when it began or started since, in the order of starting, then
/// what had finished before. A task that ends meanwhile stays in the first part, so it is neither skipped nor repeated.
///
/// All numbers are those of [`Tasks`](super::Tasks).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Token {
    /// Tasks that finished from here on did so after the list began.
    began: u64,
    /// First part: tasks that started before this are done.
    started: u64,
    /// Second part: tasks that finished from here on are done. `FIRST_PART` until it is reached.
    finished: u64,
}

const FIRST_PART: u64 = u64::MAX;

impl Token {
    fn encode(self, nonce: u32) -> String {
        let Self { began, started, finished } = self;
        format!("{nonce:x}.{began:x}.{started:x}.{finished:x}")
    }

    fn decode(token: &str, nonce: u32) -> Option<Self> {
        let mut numbers = token.splitn(4, '.').map(|part| u64::from_str_radix(part, 16).ok());
        let mut next = || numbers.next().flatten();
        let (theirs, began, started, finished) = (next()?, next()?, next()?, next()?);
        (theirs == u64::from(nonce)).then_some(Self { began, started, finished })
    }
}

impl<T: Clone + Send + Sync + 'static> Registry<T> {
    /// One page of the tasks that `filter` accepts. `filter` must not call into the registry, and must not block.
    ///
    /// `page_size` 0 means the limit; more than the limit is cut to it. The first page has an empty token, each
    /// further one the token of the page before, with the same filter. A task that exists all the time is listed exactly once, even if it ends between two pages. One that
    /// starts while finished tasks are being listed is not seen.
    ///
    /// # Errors
    ///
    /// `INVALID_FIELD` with field `page_token` for a token that is not from this registry, or from before a restart: start over.
    pub fn list(
        &self,
        filter: impl Fn(Direction, &T) -> bool,
        page_size: u32,
        page_token: &str,
    ) -> Result<Page<T>, Error> {
        let limit = self.shared.limits.page.max(1);
        let size = match usize::try_from(page_size) {
            Ok(size) if size > 0 => size.min(limit),
            _ => limit,
        };
        let tasks = self.shared.tasks();
        let mut token = if page_token.is_empty() {
            Token { began: tasks.next_finished, started: 0, finished: FIRST_PART }
        } else {
            Token::decode(page_token, self.shared.nonce).ok_or_else(bad_token)?
        };
        let mut items = Vec::new();
        let more = |items, token: Token| Ok(Page { items, next_page_token: token.encode(self.shared.nonce) });

        if token.finished == FIRST_PART {
            let ended =
                tasks.finished.range(token.began..).map(|(_, task)| (task.started, Entry::Finished(task)));
            let mut first_part: Vec<_> = ended.filter(|&(started, _)| started >= token.started).collect();
            first_part
                .extend(tasks.active.range(token.started..).map(|(&at, task)| (at, Entry::Active(task))));
            first_part.sort_unstable_by_key(|&(started, _)| started);
            for (started, entry) in first_part {
                if items.len() == size {
                    return more(items, token);
                }
                token.started = started + 1;
                items.extend(entry.accepted_by(&filter));
            }
            token.finished = token.began;
        }
        for (&number, task) in tasks.finished.range(..token.finished).rev() {
            if items.len() == size {
                return more(items, token);
            }
            token.finished = number;
            items.extend(Entry::Finished(task).accepted_by(&filter));
        }
        Ok(Page { items, next_page_token: String::new() })
    }
}

enum Entry<'a, T> {
    Active(&'a Active<T>),
    Finished(&'a Finished<T>),
}

impl<T: Clone> Entry<'_, T> {
    fn accepted_by(&self, filter: impl Fn(Direction, &T) -> bool) -> Option<T> {
        match self {
            Self::Active(task) => {
                let state = task.state.borrow();
                filter(task.key.0, &state.value).then(|| state.value.clone())
            }
            Self::Finished(task) => filter(task.key.0, &task.value).then(|| task.value.clone()),
        }
    }
}

fn bad_token() -> Error {
    let why = "is not a token of this list; it ends with a restart of the node";
    Error::new(CommonReason::InvalidField, format!("the page token {why}; list again from the start"))
        .violation("page_token", why)
}
