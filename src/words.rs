//! The words of a thread that the fault handler uses: asm/switch.S has room for them.

use core::arch::asm;
use core::cell::Cell;
use core::ffi::c_void;

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

/// This thread's.
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
