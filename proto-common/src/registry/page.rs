//! Listing tasks page by page, without gaps and without repeats while they start and end.

use std::ops::Bound;

use super::Registry;
use crate::error::{CommonReason, Error};
use crate::v1::Direction;

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// The tasks: active ones first, the longest running first; then finished ones, the latest first.
    pub items: Vec<T>,
    /// Asks for the next page; empty if this is the last.
    pub next_page_token: String,
}

/// Where a list goes on. All numbers are those of [`Tasks`](super::Tasks).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Token {
    /// Tasks that finished from here on did so after the list began.
    began: u64,
    /// Active tasks below this number are done.
    active: u64,
    /// Finished tasks from this number on are done.
    finished: u64,
}

impl Token {
    fn encode(self, nonce: u32) -> String {
        let Self { began, active, finished } = self;
        format!("{nonce:x}.{began:x}.{active:x}.{finished:x}")
    }

    fn decode(token: &str, nonce: u32) -> Option<Self> {
        let mut numbers = token.splitn(4, '.').map(|part| u64::from_str_radix(part, 16).ok());
        let mut next = || numbers.next().flatten();
        let (theirs, began, active, finished) = (next()?, next()?, next()?, next()?);
        (theirs == u64::from(nonce)).then_some(Self { began, active, finished })
    }
}

impl<T: Clone + Send + Sync + 'static> Registry<T> {
    /// One page of the tasks that `filter` accepts.
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
            Token { began: tasks.next_finished, active: 0, finished: u64::MAX }
        } else {
            Token::decode(page_token, self.shared.nonce).ok_or_else(bad_token)?
        };

        let mut items = Vec::new();
        if token.finished == u64::MAX {
            for (&number, task) in tasks.active.range(token.active..) {
                if items.len() == size {
                    return Ok(Page { items, next_page_token: token.encode(self.shared.nonce) });
                }
                token.active = number + 1;
                let state = task.state.borrow();
                if filter(task.key.0, &state.value) {
                    items.push(state.value.clone());
                }
            }
        }
        let older = (Bound::Unbounded, Bound::Excluded(token.finished));
        for (&number, task) in tasks.finished.range(older).rev() {
            let listed_while_active = number >= token.began && task.started < token.active;
            if !listed_while_active && filter(task.key.0, &task.value) {
                if items.len() == size {
                    return Ok(Page { items, next_page_token: token.encode(self.shared.nonce) });
                }
                items.push(task.value.clone());
            }
            token.finished = number;
        }
        Ok(Page { items, next_page_token: String::new() })
    }
}

fn bad_token() -> Error {
    let why = "is not a token of this list; it ends with a restart of the node";
    Error::new(CommonReason::InvalidField, format!("the page token {why}; list again from the start"))
        .violation("page_token", why)
}
