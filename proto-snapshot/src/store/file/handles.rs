//! Open files, at most so many of them for the whole store: a snapshot may have more files than a process may open.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::{Arc, Mutex};

use super::lock;

/// Serial number of the staging area, number of the file.
type Key = (u64, u32);

#[derive(Debug)]
pub(super) struct Handles {
    limit: usize,
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    files: HashMap<Key, (Arc<File>, u64)>,
    by_age: BTreeMap<u64, Key>,
    clock: u64,
}

impl Handles {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), cache: Mutex::default() }
    }

    pub(super) fn get(&self, area: u64, file: u32) -> Option<Arc<File>> {
        lock(&self.cache).touch((area, file))
    }

    /// Keeps `handle`, and closes the one that was not used for longest if there are too many. Closing does not sync: who wrote to a
    /// file remembers that, and opens it again to sync it.
    pub(super) fn put(&self, area: u64, file: u32, handle: &Arc<File>) {
        let mut cache = lock(&self.cache);
        let key = (area, file);
        cache.remove(key);
        cache.clock += 1;
        let now = cache.clock;
        cache.files.insert(key, (Arc::clone(handle), now));
        cache.by_age.insert(now, key);
        while cache.files.len() > self.limit
            && let Some((_, oldest)) = cache.by_age.pop_first()
        {
            cache.files.remove(&oldest);
        }
    }

    pub(super) fn forget(&self, area: u64, file: u32) {
        lock(&self.cache).remove((area, file));
    }

    pub(super) fn forget_area(&self, area: u64) {
        let mut cache = lock(&self.cache);
        cache.files.retain(|key, _| key.0 != area);
        cache.by_age.retain(|_, key| key.0 != area);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        lock(&self.cache).files.len()
    }
}

impl Cache {
    fn touch(&mut self, key: Key) -> Option<Arc<File>> {
        let (file, age) = self.files.get_mut(&key)?;
        self.by_age.remove(age);
        self.clock += 1;
        *age = self.clock;
        self.by_age.insert(self.clock, key);
        Some(Arc::clone(file))
    }

    fn remove(&mut self, key: Key) {
        if let Some((_, age)) = self.files.remove(&key) {
            self.by_age.remove(&age);
        }
    }
}
