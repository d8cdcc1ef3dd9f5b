//! Reading the visible rows of a slot range in order.

use std::ops::Bound;

use redb::{AccessGuard, ReadOnlyTable};

use super::StoreError;
use super::generations::Generations;
use super::tables::{self, Place, Row};
use crate::common::SlotRange;

type Rows = ReadOnlyTable<&'static [u8], &'static [u8]>;
type Guard = AccessGuard<'static, &'static [u8]>;

/// The visible rows of a range, in the order of slot and key, expired ones included.
///
/// Rows of other generations lie in between. It steps over them slot by slot, and where there are none it is one pass.
pub(super) struct VisibleRows<'r> {
    rows: &'r Rows,
    generations: &'r Generations,
    end: u16,
    inner: redb::Range<'static, &'static [u8], &'static [u8]>,
}

/// One of them.
pub(super) struct VisibleRow {
    key: Guard,
    stored: Guard,
}

impl VisibleRow {
    pub(super) fn place(&self) -> Result<Place<'_>, StoreError> {
        Place::of_row(self.key.value())
    }

    pub(super) fn row(&self) -> Result<Row<'_>, StoreError> {
        Row::decode(self.stored.value())
    }
}

impl<'r> VisibleRows<'r> {
    /// All of `range`, or those behind a [position](tables::position), which lies in it.
    pub(super) fn new(
        rows: &'r Rows,
        generations: &'r Generations,
        range: SlotRange,
        behind: Option<&[u8]>,
    ) -> Result<Self, StoreError> {
        let start = match behind {
            None => Bound::Included(range.start().to_be_bytes().to_vec()),
            Some(position) => {
                let (slot, key) = tables::split_position(position)?;
                if slot < range.start() || slot >= range.end() {
                    return Err(StoreError::Refused(format!("slot {slot} lies outside of slots {range}")));
                }
                Bound::Excluded(Place { slot, generation: generations.of(slot), key }.row())
            }
        };
        let inner = seek(rows, &start, range.end())?;
        Ok(Self { rows, generations, end: range.end(), inner })
    }

    pub(super) fn next(&mut self) -> Result<Option<VisibleRow>, StoreError> {
        loop {
            let Some(entry) = self.inner.next() else { return Ok(None) };
            let (key, stored) = entry?;
            let (slot, generation) = {
                let place = Place::of_row(key.value())?;
                (place.slot, place.generation)
            };
            let visible = self.generations.of(slot);
            if generation == visible {
                return Ok(Some(VisibleRow { key, stored }));
            }
            let slot = if generation < visible { slot } else { slot + 1 };
            if slot >= self.end {
                return Ok(None);
            }
            let next = Place { slot, generation: self.generations.of(slot), key: b"" };
            self.inner = seek(self.rows, &Bound::Included(next.row()), self.end)?;
        }
    }
}

fn seek(
    rows: &Rows,
    start: &Bound<Vec<u8>>,
    end: u16,
) -> Result<redb::Range<'static, &'static [u8], &'static [u8]>, StoreError> {
    let end = end.to_be_bytes();
    let bounds = (start.as_ref().map(Vec::as_slice), Bound::Excluded(end.as_slice()));
    Ok(rows.range::<&[u8]>(bounds)?)
}
