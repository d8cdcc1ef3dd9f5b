//! Numbers that are given away once, across restarts.

use redb::{ReadableTable, WriteTransaction};

use super::{StoreError, tables};

/// Of generations of rows.
pub(super) const GENERATION: &str = "generation";
/// Of leases of the change log.
pub(super) const LEASE: &str = "lease";
/// Of changes.
pub(super) const SEQUENCE: &str = "sequence";

/// The last one that was given away; 0 if there is none.
pub(super) fn last(table: &impl ReadableTable<&'static str, u64>, name: &str) -> Result<u64, StoreError> {
    Ok(table.get(name)?.map_or(0, |last| last.value()))
}

/// The next one.
pub(super) fn next(txn: &WriteTransaction, name: &str) -> Result<u64, StoreError> {
    let mut table = txn.open_table(tables::COUNTERS)?;
    let next = last(&table, name)?.saturating_add(1);
    table.insert(name, next)?;
    Ok(next)
}

/// Says that all up to `last` were given away.
pub(super) fn set(txn: &WriteTransaction, name: &str, last: u64) -> Result<(), StoreError> {
    txn.open_table(tables::COUNTERS)?.insert(name, last)?;
    Ok(())
}
