//! The store of a target hurries while clients of the source wait for it.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt as _;

use super::Inner;
use super::incoming::{Slot, guarded};
use crate::target::MigrationTarget;

/// A wish that the store hurries for one migration, which ends with the last one that is dropped.
pub(super) struct Hurried {
    slot: Arc<Slot>,
    hurry: Box<dyn Fn(bool) + Send + Sync>,
}

/// How many there are. Locked while the store is told, so that what it hears last is true.
#[derive(Debug, Default)]
pub(super) struct Wishes(Mutex<usize>);

impl Hurried {
    pub(super) fn new<T: MigrationTarget>(inner: &Arc<Inner<T>>, slot: &Arc<Slot>) -> Self {
        let (inner, id) = (Arc::clone(inner), slot.id.clone());
        let hurry = Box::new(move |wanted| {
            // It waits for nothing, so it is done at once; and one that panics takes nobody down.
            let hurry = async {
                inner.target.hurry(&id, wanted);
                Ok(())
            };
            let _ = guarded(hurry).now_or_never();
        });
        let mut wishes = slot.wishes.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *wishes == 0 {
            hurry(true);
        }
        *wishes += 1;
        drop(wishes);
        Self { slot: Arc::clone(slot), hurry }
    }
}

impl Drop for Hurried {
    fn drop(&mut self) {
        let mut wishes = self.slot.wishes.0.lock().unwrap_or_else(PoisonError::into_inner);
        *wishes -= 1;
        if *wishes == 0 {
            (self.hurry)(false);
        }
    }
}

impl fmt::Debug for Hurried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hurried")
    }
}
