//! Files that lie in memory: to read or write a piece of one takes less than a change of threads, and waits for nothing.

use std::fs::File;

/// Whether `file` lies in a memory file system, where nothing waits for a device.
#[cfg(target_os = "linux")]
pub(crate) fn in_memory(file: &File) -> bool {
    /// `TMPFS_MAGIC` and `RAMFS_MAGIC` of `linux/magic.h`.
    const MAGIC: [i64; 2] = [0x0102_1994, 0x8584_58f6];
    #[allow(clippy::useless_conversion, reason = "its type depends on the platform")]
    rustix::fs::fstatfs(file).is_ok_and(|found| MAGIC.contains(&i64::from(found.f_type)))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn in_memory(_file: &File) -> bool {
    false
}
