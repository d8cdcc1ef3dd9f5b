//! Where files lie. In memory, to read or write a piece of one takes less than a change of threads, and waits for nothing.

use std::fs::File;

/// Whether `file` lies in a memory file system, where nothing waits for a device.
pub(crate) fn in_memory(file: &File) -> bool {
    /// `TMPFS_MAGIC` and `RAMFS_MAGIC` of `linux/magic.h`.
    const MAGIC: [i64; 2] = [0x0102_1994, 0x8584_58f6];
    lies_in(file, &MAGIC)
}

/// Whether `file` lies in a file system of one of these kinds; where that cannot be told, it does not.
#[cfg(target_os = "linux")]
pub(crate) fn lies_in(file: &File, kinds: &[i64]) -> bool {
    #[allow(clippy::useless_conversion, reason = "its type depends on the platform")]
    rustix::fs::fstatfs(file).is_ok_and(|found| kinds.contains(&i64::from(found.f_type)))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn lies_in(_file: &File, _kinds: &[i64]) -> bool {
    false
}
