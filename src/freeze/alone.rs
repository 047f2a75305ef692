//! Whether this thread is the only one of its process: then nobody else can touch a stack that it freezes or thaws.
//!
//! glibc (2.32 and later) knows it for its own locks: `__libc_single_threaded`. Elsewhere the answer is no. A thread that
//! was made without the C library breaks `malloc` in the same way.

use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

/// glibc's flag; null if it has not been looked for, [`NO_FLAG`] if there is none.
static FLAG: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

static NO_FLAG: u8 = 0;

/// Looks for the flag. Before the first stack is frozen, not in the handler.
pub(super) fn look_for_flag() {
    if FLAG.load(Ordering::Relaxed).is_null() {
        // SAFETY: a constant name.
        let flag = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__libc_single_threaded".as_ptr()) };
        let flag = if flag.is_null() { (&raw const NO_FLAG).cast_mut() } else { flag.cast() };
        FLAG.store(flag, Ordering::Relaxed);
    }
}

/// True if there is certainly no other thread; only the caller can change that.
pub(super) fn alone() -> bool {
    let flag = FLAG.load(Ordering::Relaxed);
    // SAFETY: a `char` of the C library, or ours. Other threads may set it to 0 together with us, if there are any: then
    // it is 0 already.
    !flag.is_null() && unsafe { flag.read_volatile() } != 0
}
