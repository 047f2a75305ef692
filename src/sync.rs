//! What the lock-free protocols are made of: src/stack/{custody,free_list}.rs, src/freeze/touched.rs, src/map/published.rs.
//!
//! They take it from here and nowhere else. So models/ can compile the same files with atomics whose every order it tries.

pub(crate) use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Lets other threads run, one of which is waited for. Allowed in the fault handler.
pub(crate) fn let_others_run() {
    // SAFETY: no arguments, no memory.
    unsafe { libc::sched_yield() };
}
