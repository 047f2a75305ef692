//! Signals whose handler runs on the stack that it interrupts, and how to keep them off it.

use core::ffi::c_int;
use core::ptr;
use std::sync::Once;

/// Signals whose handler does not run on an alternate stack.
///
/// Such a handler runs on whatever stack is current: on a coroutine's it needs room there, makes
/// the stack grow, and with [`Growth::Relocate`](crate::Growth::Relocate) may hold pointers to it. Install handlers
/// with `SA_ONSTACK`, or call [`keep_signals_off_coroutine_stacks`].
///
/// ```
/// assert!(!regrow::signals_on_coroutine_stacks().contains(&libc::SIGSEGV));
/// ```
#[must_use]
pub fn signals_on_coroutine_stacks() -> Vec<i32> {
    without_own_stack().map(|(signal, _)| signal).collect()
}

/// Adds `SA_ONSTACK` to all handlers without it. Returns the signals whose handlers had none.
///
/// The first coroutine that may move does it, for there may be no room for a signal on its stack. Call this when handlers have
/// been installed since, by libraries perhaps. They then run on the alternate stack of the thread that they interrupt: 128 KiB
/// on one that is [prepared](crate::prepare_thread), as little as 8 KiB on another, and as before on one without.
///
/// ```
/// # extern "C" fn handler(_: i32) {}
/// // SAFETY: the handler does nothing.
/// unsafe { libc::signal(libc::SIGUSR1, handler as *const () as usize) };
/// assert!(regrow::keep_signals_off_coroutine_stacks().contains(&libc::SIGUSR1));
/// assert!(regrow::signals_on_coroutine_stacks().is_empty());
/// ```
pub fn keep_signals_off_coroutine_stacks() -> Vec<i32> {
    without_own_stack()
        .filter(|&(signal, handler)| give_own_stack(signal, handler))
        .map(|(signal, _)| signal)
        .collect()
}

/// Does it before the first coroutine that may move.
pub(crate) fn keep_off_moving_stacks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(keep_signals_off_coroutine_stacks()));
}

/// The signals that have a handler without `SA_ONSTACK`, and the handler. System calls only: the fault handler asks, too.
pub(crate) fn without_own_stack() -> impl Iterator<Item = (c_int, libc::sigaction)> {
    (1..=libc::SIGRTMAX()).filter_map(|signal| {
        // SAFETY: `sigaction` is plain data; the call only reads the disposition.
        let (known, now) = unsafe {
            let mut now: libc::sigaction = core::mem::zeroed();
            (libc::sigaction(signal, ptr::null(), &mut now) == 0, now)
        };
        let handled = now.sa_sigaction != libc::SIG_DFL && now.sa_sigaction != libc::SIG_IGN;
        (known && handled && now.sa_flags & libc::SA_ONSTACK == 0).then_some((signal, now))
    })
}

/// Adds `SA_ONSTACK` to a signal's handler. False if the kernel does not take it.
pub(crate) fn give_own_stack(signal: c_int, mut handler: libc::sigaction) -> bool {
    handler.sa_flags |= libc::SA_ONSTACK;
    // SAFETY: the handler is what this signal has already. On a thread without an alternate stack the flag changes nothing.
    unsafe { libc::sigaction(signal, &handler, ptr::null_mut()) == 0 }
}
