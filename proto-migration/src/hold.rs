//! Requests of clients that a node keeps waiting while slots change hands.

/// What a hold stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoldMode {
    /// Writes wait, reads are served.
    Writes,
    /// Reads and writes wait.
    All,
}

/// Requests for a slot range wait as long as this lives; dropping it lets them ask again who serves them.
///
/// A store bounds how many wait and for how long: beyond that, clients get an error that tells them to try again, never a wrong answer.
pub trait Held: Send + Sync + 'static {
    /// Requests that have waited because of this hold so far, those that wait now included.
    fn held_requests(&self) -> u64;
}

/// A hold of some store.
pub type Hold = Box<dyn Held>;

impl std::fmt::Debug for dyn Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held").field("held_requests", &self.held_requests()).finish()
    }
}
