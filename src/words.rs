//! The words of a thread that the fault handler uses. asm/switch.S reserves them.

use core::arch::asm;
use core::cell::Cell;
use core::ffi::{c_int, c_void};

/// The thread state that the fault handler reads or writes, apart from the running coroutine. The words are in the thread's
/// static block and start at 0. A `thread_local!` might be allocated at its first use, in a library that was loaded later.
#[repr(C)]
pub(crate) struct Words {
    /// This thread's alternate stack; 0 before it has one.
    pub signal_stack: Cell<usize>,
    /// The address of this thread's stock of slots, once it is prepared.
    pub stock: Cell<*const c_void>,
    /// Address and count of changes at this thread's latest fault whose reason had already gone (src/freeze/in_place.rs).
    pub missed: Cell<[usize; 2]>,
    /// Not 0 while this thread forks (src/freeze/forks.rs).
    pub forks: Cell<usize>,
}

// A plain build must notice, too, that asm/switch.S has other room for them (`WORDS`).
const _: () = assert!(size_of::<Words>() == 40);

/// This thread's words.
#[inline]
pub(crate) fn words() -> &'static Words {
    let words: *const Words;
    // The asm is not `pure`: a coroutine may continue on another thread.
    // SAFETY: the asm computes an address in this thread's static block, whose own address is its first word. The words last as
    // long as the thread and start at zero, which is valid for each. A shared reference to cells is not sent elsewhere.
    unsafe {
        asm!(
            "mov {words}, [rip + regrow_words@GOTTPOFF]",
            "add {words}, fs:[0]",
            words = out(reg) words,
            options(nostack, readonly),
        );
        &*words
    }
}

/// The kernel's number for this thread.
pub(crate) fn thread_number() -> i32 {
    // SAFETY: the call has no arguments and touches no memory.
    unsafe { libc::gettid() }
}

/// Calls `f` in a handler and restores `errno`, which the system calls of `f` may change, for the interrupted code.
pub(crate) fn keeping_errno<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: this thread's `errno` lasts as long as the thread, which a handler does not leave. Only this thread uses it, and
    // the cell allows the system calls in `f` to write to it.
    let errno = unsafe { &*libc::__errno_location().cast::<Cell<c_int>>() };
    let before = errno.get();
    let result = f();
    errno.set(before);
    result
}
