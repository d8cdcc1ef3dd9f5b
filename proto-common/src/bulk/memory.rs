//! What the allocator does with buffers that are freed all the time.

use std::sync::Once;

/// Size of the block that is freed once: as much as a connection may have received and not handed on
/// (`tuning::CONNECTION_WINDOW`). glibc takes part in this up to 32 MiB. For 1 GiB in frames of 64 KiB, a receiver takes 3,400 page faults instead of 15,000, and 2.8 GiB/s
/// arrive instead of 2.5.
const BLOCK: usize = 16 << 20;

/// Has the allocator keep freed buffers, if it is glibc's at its default settings.
///
/// Every frame that arrives has a buffer of its own, which is freed as soon as its bytes are written. glibc maps a block of 128 KiB or more
/// by itself and unmaps it when it is freed, and gives back what is free at the top of a heap from 128 KiB on; so the pages of each
/// buffer are made, zeroed and faulted in anew: measured, 145,000 page faults for 1 GiB in frames of 256 KiB, and 1.8 GiB/s instead of 3.2.
/// These thresholds rise by themselves when a mapped block is freed, to its size and to twice its size ("dynamic mmap
/// threshold", mallopt(3)), so freeing a large block once is all it takes, and no page of it is ever touched. It leaves
/// at most twice the block's size free in each heap. Where the process has set thresholds of its own they stay; other allocators (jemalloc
/// and mimalloc were as fast without) see one allocation and no more.
pub(super) fn keep_freed_buffers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut block = Vec::<u8>::new();
        // Where there is no room for it, it is slower, and nothing else.
        let _ = std::hint::black_box(&mut block).try_reserve_exact(BLOCK);
    });
}
