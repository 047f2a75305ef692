//! Forks wait until no stack is being frozen or thawed in place, and such work waits until a fork is over.
//!
//! A child has its parent's memory, but only the thread that forked. If another thread was thawing
//! a stack, that stack would stay `BUSY` in the child for ever, with only a part of its bytes.
//!
//! ```text
//!   CHANGING   number of threads that freeze or thaw   such a thread adds itself, then reads FORKING; if that is
//!                                                      set, it steps back and waits
//!   FORKING    number of threads that fork             such a thread sets it, then waits until CHANGING is 0
//! ```
//!
//! Both write before they read, in one order for all threads, so at least one of them sees the other. Only `fork`
//! runs the functions given to `pthread_atfork`. A child made by a bare `clone` must not touch frozen stacks.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::io;

use crate::error::Error;
use crate::sync::let_others_run;
use crate::words::words;

static CHANGING: AtomicUsize = AtomicUsize::new(0);
static FORKING: AtomicUsize = AtomicUsize::new(0);

/// Makes forks wait from now on. Called before the first stack is frozen, not in the handler.
pub(super) fn prepare() -> Result<(), Error> {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if TOLD.load(Ordering::Acquire) {
        return Ok(());
    }
    // If two threads get here at once, both register the functions, which then only count twice.
    // SAFETY: the three functions allocate nothing and take no lock.
    let error = unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    if error != 0 {
        let source = io::Error::from_raw_os_error(error);
        return Err(Error::Memory { doing: "preparing for forks", bytes: 0, source });
    }
    TOLD.store(true, Ordering::Release);
    Ok(())
}

/// Does work during which a slot is `BUSY`, also in the handler. Must not be nested.
pub(super) fn apart<R>(work: impl FnOnce() -> R) -> R {
    CHANGING.fetch_add(1, Ordering::SeqCst);
    while FORKING.load(Ordering::SeqCst) != 0 && words().forks.get() == 0 {
        CHANGING.fetch_sub(1, Ordering::SeqCst);
        while FORKING.load(Ordering::SeqCst) != 0 {
            let_others_run();
        }
        CHANGING.fetch_add(1, Ordering::SeqCst);
    }
    let result = work();
    CHANGING.fetch_sub(1, Ordering::SeqCst);
    result
}

/// Other fork handlers of this thread may touch frozen stacks before and after: then it must not wait for itself.
extern "C" fn before() {
    words().forks.set(1);
    FORKING.fetch_add(1, Ordering::SeqCst);
    while CHANGING.load(Ordering::SeqCst) != 0 {
        let_others_run();
    }
}

extern "C" fn in_parent() {
    FORKING.fetch_sub(1, Ordering::SeqCst);
    words().forks.set(0);
}

/// Other threads that were forking, or waiting to fork, are not in the child.
extern "C" fn in_child() {
    FORKING.store(0, Ordering::SeqCst);
    CHANGING.store(0, Ordering::SeqCst);
    words().forks.set(0);
}
