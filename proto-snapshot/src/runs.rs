//! A map from offsets to runs of bytes, of which most files have one.

use std::collections::BTreeMap;

/// An ordered map by offset. With at most one entry it takes no memory of its own: a snapshot of 100,000 small files has several of these
/// maps for each, and the smallest node of a tree is some 300 bytes.
#[derive(Debug, Clone)]
pub(crate) enum RunMap<V> {
    Few(Option<(u64, V)>),
    Many(BTreeMap<u64, V>),
}

impl<V> Default for RunMap<V> {
    fn default() -> Self {
        Self::Few(None)
    }
}

impl<V: Copy> RunMap<V> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Few(one) => usize::from(one.is_some()),
            Self::Many(runs) => runs.len(),
        }
    }

    pub(crate) fn insert(&mut self, offset: u64, run: V) {
        match self {
            Self::Few(one) => match one.take() {
                Some(other) if other.0 != offset => {
                    *self = Self::Many(BTreeMap::from([other, (offset, run)]));
                }
                _ => *one = Some((offset, run)),
            },
            Self::Many(runs) => {
                runs.insert(offset, run);
            }
        }
    }

    pub(crate) fn remove(&mut self, offset: u64) -> Option<V> {
        match self {
            Self::Few(one) => one.take_if(|(start, _)| *start == offset).map(|(_, run)| run),
            Self::Many(runs) => {
                let removed = runs.remove(&offset);
                if runs.len() <= 1 {
                    *self = Self::Few(runs.pop_first());
                }
                removed
            }
        }
    }

    /// The last one that begins before `end`.
    pub(crate) fn before(&self, end: u64) -> Option<(u64, V)> {
        match self {
            Self::Few(one) => one.filter(|(start, _)| *start < end),
            Self::Many(runs) => runs.range(..end).next_back().map(|(start, run)| (*start, *run)),
        }
    }

    #[cfg(feature = "server")]
    pub(crate) fn get(&self, offset: u64) -> Option<V> {
        match self {
            Self::Few(one) => one.filter(|(start, _)| *start == offset).map(|(_, run)| run),
            Self::Many(runs) => runs.get(&offset).copied(),
        }
    }

    /// All of them, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, V)> + '_ {
        self.from(0)
    }

    /// Those that begin at `offset` or behind it, in order.
    pub(crate) fn from(&self, offset: u64) -> impl Iterator<Item = (u64, V)> + '_ {
        let (one, many) = match self {
            Self::Few(one) => (one.filter(|(start, _)| *start >= offset), None),
            Self::Many(runs) => (None, Some(runs.range(offset..).map(|(start, run)| (*start, *run)))),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_an_ordered_map(steps in prop::collection::vec((any::<bool>(), 0_u64..6, any::<u8>()), 0..40)) {
            let (mut runs, mut model) = (RunMap::default(), BTreeMap::new());
            for (insert, offset, run) in steps {
                if insert {
                    runs.insert(offset, run);
                    model.insert(offset, run);
                } else {
                    prop_assert_eq!(runs.remove(offset), model.remove(&offset));
                }
                prop_assert_eq!(runs.len(), model.len());
                prop_assert_eq!(runs.iter().collect::<Vec<_>>(), model.iter().map(|(at, run)| (*at, *run)).collect::<Vec<_>>());
                prop_assert_eq!(matches!(runs, RunMap::Few(_)), model.len() <= 1);
                for at in 0..8 {
                    prop_assert_eq!(runs.before(at), model.range(..at).next_back().map(|(at, run)| (*at, *run)));
                    prop_assert_eq!(runs.get(at), model.get(&at).copied());
                    let behind: Vec<_> = model.range(at..).map(|(at, run)| (*at, *run)).collect();
                    prop_assert_eq!(runs.from(at).collect::<Vec<_>>(), behind);
                }
            }
        }
    }
}
