//! The words of a thread that the fault handler uses: asm/switch.S has room for them.

use core::arch::asm;
use core::cell::Cell;
use core::ffi::{c_int, c_void};

/// What of a thread the fault handler reads or writes, but for who runs: words in the thread's static block, 0 at first. Those
/// of `thread_local!` may be allocated at their first use, in a library that was loaded later.
#[repr(C)]
pub(crate) struct Words {
    /// This thread's alternate stack, 0 before it has one.
    pub signal_stack: Cell<usize>,
    /// Where this thread's stock of slots is, once it is prepared.
    pub stock: Cell<*const c_void>,
    /// Address and count of changes at this thread's latest fault that had no reason any more (src/freeze/in_place.rs).
    pub missed: Cell<[usize; 2]>,
    /// Not 0 while this thread forks (src/freeze/forks.rs).
    pub forks: Cell<usize>,
}

/// This thread's words.
#[inline]
pub(crate) fn words() -> &'static Words {
    let words: *const Words;
    // Not a pure function: a coroutine may go on in another thread.
    // SAFETY: computes an address in this thread's static block, whose own address is its first word. The words last as long
    // as the thread, are zeros at first, which is right for each, and a shared reference to cells is not sent elsewhere.
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

/// The number by which the kernel knows this thread.
pub(crate) fn thread_number() -> i32 {
    // SAFETY: the call has no arguments and touches no memory.
    unsafe { libc::gettid() }
}

/// Calls `f` in a handler: the interrupted code does not see what its system calls leave in `errno`.
pub(crate) fn keeping_errno<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: this thread's `errno` lasts as long as the thread, which a handler does not leave. Only this thread uses it, and
    // through a cell the system calls in `f` may write to it.
    let errno = unsafe { &*libc::__errno_location().cast::<Cell<c_int>>() };
    let before = errno.get();
    let result = f();
    errno.set(before);
    result
}
