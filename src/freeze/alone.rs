//! Whether this thread is the only one of its process: then no other thread can touch a stack that it freezes or thaws.
//!
//! glibc (2.32 and later) has a flag for its own locks: `__libc_single_threaded`. Without the flag the answer
//! is no. A thread that was made without the C library makes the flag wrong, which breaks `malloc` as well.

use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

/// The address of glibc's flag; null before it was looked up, [`NO_FLAG`] if there is none.
static FLAG: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

static NO_FLAG: u8 = 0;

/// Looks up the flag, before the first stack is frozen. Not for the handler.
pub(super) fn look_for_flag() {
    if FLAG.load(Ordering::Relaxed).is_null() {
        // SAFETY: a constant name.
        let flag = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__libc_single_threaded".as_ptr()) };
        let flag = if flag.is_null() { (&raw const NO_FLAG).cast_mut() } else { flag.cast() };
        FLAG.store(flag, Ordering::Relaxed);
    }
}

/// True if there is certainly no other thread. Only the calling thread can change that.
pub(super) fn alone() -> bool {
    let flag = FLAG.load(Ordering::Relaxed);
    // SAFETY: the flag is a `char` of the C library, or `NO_FLAG`. If other threads exist, it is 0 already.
    !flag.is_null() && unsafe { flag.read_volatile() } != 0
}
