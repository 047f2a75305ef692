//! The atomics of the lock-free protocols in src/stack/{custody,free_list}.rs, src/freeze/touched.rs and src/map/published.rs.
//!
//! These files import their atomics only from here, so that models/ can compile them with atomics that try every order.

pub(crate) use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Lets other threads run, while this one waits for one of them. Allowed in the fault handler.
pub(crate) fn let_others_run() {
    // SAFETY: no arguments, no memory.
    unsafe { libc::sched_yield() };
}
