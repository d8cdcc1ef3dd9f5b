//! Something that a node has so much of, and of which no peer gets more than its share: places, bytes.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// So much for all, so much of that for each peer, by its key. Clones share it.
#[derive(Debug)]
pub struct Shares<K> {
    limit: u64,
    limit_per_peer: u64,
    /// Whether the share of a peer is less where less is free.
    graded: bool,
    taken: Arc<Mutex<Taken<K>>>,
}

#[derive(Debug)]
struct Taken<K> {
    all: u64,
    /// Those that have nothing are not in it.
    by_peer: HashMap<K, u64>,
}

/// What was taken; given back when dropped.
#[derive(Debug)]
#[must_use = "dropped, it is given back"]
pub struct Share<K: Eq + Hash> {
    taken: Arc<Mutex<Taken<K>>>,
    peer: Option<K>,
    amount: u64,
}

/// Whose limit does not allow more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// That of all.
    All {
        /// What there is.
        limit: u64,
    },
    /// That of the peer which asks.
    Peer {
        /// Its share.
        limit: u64,
    },
}

impl Full {
    /// The limit that was reached.
    #[must_use]
    pub fn limit(self) -> u64 {
        match self {
            Self::All { limit } | Self::Peer { limit } => limit,
        }
    }
}

impl<K> Clone for Shares<K> {
    fn clone(&self) -> Self {
        Self { taken: Arc::clone(&self.taken), ..*self }
    }
}

impl<K: Eq + Hash + Clone> Shares<K> {
    /// `limit` for all, `limit_per_peer` of it for each.
    #[must_use]
    pub fn new(limit: u64, limit_per_peer: u64) -> Self {
        let taken = Taken { all: 0, by_peer: HashMap::new() };
        Self { limit, limit_per_peer, graded: false, taken: Arc::new(Mutex::new(taken)) }
    }

    /// The same, but that peers which take all that they can leave something to the next one: each may have such a part of what the others leave as
    /// `limit_per_peer` is of `limit`. Of 8192 with 2048 for each, four peers get 2048, 1536, 1152 and 864, one after the other, and the fifth one 648;
    /// ten leave 462, and the next one gets 115.
    #[must_use]
    pub fn graded(limit: u64, limit_per_peer: u64) -> Self {
        Self { graded: true, ..Self::new(limit, limit_per_peer) }
    }

    /// `amount` for `peer`. The node itself, which is no peer, has no share to keep to.
    ///
    /// # Errors
    ///
    /// [`Full`], and nothing is taken.
    pub fn take(&self, peer: Option<&K>, amount: u64) -> Result<Share<K>, Full> {
        self.enter(peer, amount, false)
    }

    /// [`take`](Self::take) where a limit must not keep anybody from the first thing that it asks for: who has nothing yet gets `amount`, also
    /// if that is more than the limit.
    ///
    /// # Errors
    ///
    /// [`Full`], and nothing is taken.
    pub fn take_first(&self, peer: Option<&K>, amount: u64) -> Result<Share<K>, Full> {
        self.enter(peer, amount, true)
    }

    /// `amount` for `peer`, whatever the limits, which it counts against from now on: for what it has already.
    pub fn adopt(&self, peer: Option<&K>, amount: u64) -> Share<K> {
        self.share(&mut lock(&self.taken), peer, amount)
    }

    /// Adds `amount` to `share`, one of these, as if all of it had been taken at once by [`take_first`](Self::take_first).
    ///
    /// # Errors
    ///
    /// [`Full`], and nothing is added.
    pub fn grow_first(&self, share: &mut Share<K>, amount: u64) -> Result<(), Full> {
        let mut taken = lock(&self.taken);
        let peer = share.peer.as_ref();
        taken.give_back(peer, share.amount);
        let whole = share.amount.saturating_add(amount);
        let checked = self.check(&taken, peer, whole, true);
        share.amount = taken.add(peer, if checked.is_ok() { whole } else { share.amount });
        checked
    }

    fn enter(&self, peer: Option<&K>, amount: u64, first: bool) -> Result<Share<K>, Full> {
        let mut taken = lock(&self.taken);
        self.check(&taken, peer, amount, first)?;
        Ok(self.share(&mut taken, peer, amount))
    }

    fn check(&self, taken: &Taken<K>, peer: Option<&K>, amount: u64, first: bool) -> Result<(), Full> {
        let beyond = |had: u64, limit: u64| had.saturating_add(amount) > limit && (had > 0 || !first);
        if let Some(peer) = peer
            && beyond(taken.by_peer.get(peer).copied().unwrap_or(0), self.limit_per_peer)
        {
            return Err(Full::Peer { limit: self.limit_per_peer });
        }
        if beyond(taken.all, self.limit) {
            return Err(Full::All { limit: self.limit });
        }
        if let Some(peer) = peer
            && self.graded
        {
            let had = taken.by_peer.get(peer).copied().unwrap_or(0);
            let free = self.limit.saturating_sub(taken.all.saturating_add(amount));
            let rest = self.limit.saturating_sub(self.limit_per_peer);
            let wanted = u128::from(had.saturating_add(amount)) * u128::from(rest);
            if wanted > u128::from(free) * u128::from(self.limit_per_peer) && (had > 0 || !first) {
                return Err(Full::Peer { limit: had });
            }
        }
        Ok(())
    }

    fn share(&self, taken: &mut Taken<K>, peer: Option<&K>, amount: u64) -> Share<K> {
        let amount = taken.add(peer, amount);
        Share { taken: Arc::clone(&self.taken), peer: peer.cloned(), amount }
    }

    /// What all have.
    #[must_use]
    pub fn taken(&self) -> u64 {
        lock(&self.taken).all
    }
}

impl<K: Eq + Hash> Share<K> {
    /// What the peer has in all, with this; of the node itself, which is no peer, this alone.
    #[must_use]
    pub fn of_peer(&self) -> u64 {
        let peer = self.peer.as_ref();
        peer.and_then(|peer| lock(&self.taken).by_peer.get(peer).copied()).unwrap_or(self.amount)
    }
}

impl<K: Eq + Hash> Taken<K> {
    /// Counts `amount`, or as much of it as can be counted: what could not be is not given back either.
    fn add(&mut self, peer: Option<&K>, amount: u64) -> u64
    where
        K: Clone,
    {
        let amount = amount.min(u64::MAX - self.all);
        self.all += amount;
        if let Some(peer) = peer {
            *self.by_peer.entry(peer.clone()).or_default() += amount;
        }
        amount
    }

    fn give_back(&mut self, peer: Option<&K>, amount: u64) {
        self.all = self.all.saturating_sub(amount);
        let Some(peer) = peer else { return };
        if let Some(of_peer) = self.by_peer.get_mut(peer) {
            *of_peer = of_peer.saturating_sub(amount);
            if *of_peer == 0 {
                self.by_peer.remove(peer);
            }
        }
    }
}

impl<K: Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        lock(&self.taken).give_back(self.peer.as_ref(), self.amount);
    }
}

fn lock<K>(taken: &Mutex<Taken<K>>) -> MutexGuard<'_, Taken<K>> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_gets_its_share_and_leaves_the_rest() {
        let shares = Shares::new(10, 6);
        let of_a = shares.take(Some(&"a"), 6).unwrap();
        assert_eq!(shares.take(Some(&"a"), 1).unwrap_err(), Full::Peer { limit: 6 });
        let of_b = shares.take(Some(&"b"), 3).unwrap();
        assert_eq!(shares.take(Some(&"b"), 2).unwrap_err(), Full::All { limit: 10 });
        assert_eq!(shares.take(None, 2).unwrap_err(), Full::All { limit: 10 });
        let of_node = shares.take(None, 1).unwrap();
        assert_eq!(shares.taken(), 10);
        drop(of_a);
        let _again = shares.take(Some(&"a"), 6).unwrap();
        assert_eq!((of_b.of_peer(), of_node.of_peer()), (3, 1));
        let more = shares.adopt(Some(&"b"), 2);
        assert_eq!((of_b.of_peer(), more.of_peer()), (5, 5));
        drop((of_b, of_node, more));
        assert_eq!(shares.taken(), 6);
        assert_eq!(lock(&shares.taken).by_peer.len(), 1, "who has nothing is forgotten");
    }

    #[test]
    fn peers_that_take_all_they_can_leave_something_to_the_next_one() {
        let most = |shares: &Shares<usize>, peer| {
            std::iter::from_fn(|| shares.take(Some(&peer), 1).ok()).collect::<Vec<_>>()
        };
        let (flat, graded) = (Shares::new(8192, 2048), Shares::graded(8192, 2048));
        let all: Vec<_> = (0..4).map(|peer| most(&flat, peer)).collect();
        assert!(flat.take(Some(&4), 1).is_err(), "four have it all");
        drop(all);
        let mut all: Vec<_> = (0..10).map(|peer| most(&graded, peer)).collect();
        let taken: Vec<_> = all.iter().map(Vec::len).collect();
        assert_eq!(taken[..5], [2048, 1536, 1152, 864, 648]);
        assert_eq!(8192 - taken.iter().sum::<usize>(), 462);
        assert!(most(&graded, 10).len() > 100);
        // Who has much gets no more of what others give back than it has a right to.
        all.truncate(1);
        assert!(most(&graded, 0).is_empty());
        assert_eq!(most(&graded, 11).len(), 1536);
    }

    #[test]
    fn what_grows_is_counted_as_if_it_had_been_taken_at_once() {
        let shares = Shares::new(10, 6);
        let mut first = shares.take_first(Some(&"a"), 3).unwrap();
        shares.grow_first(&mut first, 3).unwrap();
        shares.grow_first(&mut first, 14).expect("it is the only one");
        assert_eq!(shares.take_first(Some(&"b"), 1).unwrap_err(), Full::All { limit: 10 });
        drop(first);
        let mut first = shares.take_first(Some(&"a"), 3).unwrap();
        let mut second = shares.take_first(Some(&"a"), 2).unwrap();
        shares.grow_first(&mut second, 1).unwrap();
        for share in [&mut first, &mut second] {
            assert_eq!(shares.grow_first(share, 1), Err(Full::Peer { limit: 6 }), "there is another one");
        }
        let mut of_b = shares.take_first(Some(&"b"), 4).unwrap();
        assert_eq!(shares.grow_first(&mut of_b, 1), Err(Full::All { limit: 10 }));
        assert_eq!((shares.taken(), lock(&shares.taken).by_peer["a"]), (10, 6));
        drop((first, second, of_b));
        assert_eq!((shares.taken(), lock(&shares.taken).by_peer.len()), (0, 0));
    }

    #[test]
    fn the_first_thing_is_given_whatever_its_size_and_no_second_one() {
        let shares = Shares::new(10, 6);
        let large = shares.take_first(Some(&"a"), 20).unwrap();
        assert_eq!(shares.take_first(Some(&"a"), 1).unwrap_err(), Full::Peer { limit: 6 });
        assert_eq!(shares.take_first(Some(&"b"), 1).unwrap_err(), Full::All { limit: 10 });
        drop(large);
        assert!(shares.take(Some(&"a"), 20).is_err());
        let _most = shares.adopt(Some(&"a"), u64::MAX);
        drop(shares.adopt(Some(&"a"), 7));
        assert_eq!(shares.taken(), u64::MAX);
    }
}
