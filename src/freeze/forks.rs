//! Forks wait until no stack is being frozen or thawed in place, and such work waits until a fork is over.
//!
//! A child has the memory of its parent, but of its threads only the one that forked. A stack that another thread was
//! thawing would be `BUSY` in the child for ever, and its bytes half there.
//!
//! ```text
//!   CHANGING   how many threads are at it        a thread that begins: adds itself, looks at FORKING, and if it is set
//!   FORKING    how many threads are forking      steps back and waits; one that forks: sets it, waits for CHANGING to be 0
//! ```
//!
//! Both write before they read, in one order for all threads, so at least one sees the other. Only `fork` runs what
//! `pthread_atfork` was told; a child made by a bare `clone` has to leave frozen stacks alone.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::io;

use crate::error::Error;
use crate::words::words;

static CHANGING: AtomicUsize = AtomicUsize::new(0);
static FORKING: AtomicUsize = AtomicUsize::new(0);

/// Sees that forks wait. Before the first stack is frozen, not in the handler.
pub(super) fn prepare() -> Result<(), Error> {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if TOLD.load(Ordering::Acquire) {
        return Ok(());
    }
    // Two threads that come here at once tell it twice: they only count twice.
    // SAFETY: three functions that allocate nothing and take no lock.
    let error = unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    if error != 0 {
        let source = io::Error::from_raw_os_error(error);
        return Err(Error::Memory { doing: "preparing for forks", bytes: 0, source });
    }
    TOLD.store(true, Ordering::Release);
    Ok(())
}

/// Does work during which a slot is `BUSY`; in the handler, too. Not within itself.
pub(super) fn apart<R>(work: impl FnOnce() -> R) -> R {
    CHANGING.fetch_add(1, Ordering::SeqCst);
    while FORKING.load(Ordering::SeqCst) != 0 && words().forks.get() == 0 {
        CHANGING.fetch_sub(1, Ordering::SeqCst);
        while FORKING.load(Ordering::SeqCst) != 0 {
            wait();
        }
        CHANGING.fetch_add(1, Ordering::SeqCst);
    }
    let result = work();
    CHANGING.fetch_sub(1, Ordering::SeqCst);
    result
}

/// What else is to be done before and after a fork may touch frozen stacks: this thread must not wait for itself.
extern "C" fn before() {
    words().forks.set(1);
    FORKING.fetch_add(1, Ordering::SeqCst);
    while CHANGING.load(Ordering::SeqCst) != 0 {
        wait();
    }
}

extern "C" fn in_parent() {
    FORKING.fetch_sub(1, Ordering::SeqCst);
    words().forks.set(0);
}

/// Other threads that were forking, or waiting for that, are not in the child.
extern "C" fn in_child() {
    FORKING.store(0, Ordering::SeqCst);
    CHANGING.store(0, Ordering::SeqCst);
    words().forks.set(0);
}

fn wait() {
    // SAFETY: no arguments.
    unsafe { libc::sched_yield() };
}
