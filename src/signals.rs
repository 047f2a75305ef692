//! Signals whose handler runs on the stack it interrupts, and how to keep them off that stack.

use core::ffi::c_int;
use core::ptr;
use std::sync::Once;

/// Signals whose handler does not run on an alternate stack.
///
/// Such a handler runs on the current stack. On a coroutine's stack it needs room, so it may make the stack grow, and with
/// [`Growth::Relocate`](crate::Growth::Relocate) it may hold pointers to the stack. Install handlers with `SA_ONSTACK`, or call
/// [`keep_signals_off_coroutine_stacks`].
///
/// ```
/// assert!(!regrow::signals_on_coroutine_stacks().contains(&libc::SIGSEGV));
/// ```
#[must_use]
pub fn signals_on_coroutine_stacks() -> Vec<i32> {
    without_own_stack().map(|(signal, _)| signal).collect()
}

/// Adds `SA_ONSTACK` to all handlers without it. Returns the signals of these handlers.
///
/// Creating the first coroutine that may move does this too, because its stack may have no room for a signal. Call it again
/// after later handlers have been installed, for example by libraries. They then run on the alternate stack of the interrupted
/// thread: 128 KiB if it is [prepared](crate::prepare_thread), as little as 8 KiB if not. Without an alternate stack they run
/// as before.
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

/// Calls [`keep_signals_off_coroutine_stacks`] once, before the first coroutine that may move.
pub(crate) fn keep_off_moving_stacks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(keep_signals_off_coroutine_stacks()));
}

/// The signals with a handler that lacks `SA_ONSTACK`. Makes only system calls, because the fault handler uses it, too.
pub(crate) fn without_own_stack() -> impl Iterator<Item = (c_int, libc::sigaction)> {
    (1..=libc::SIGRTMAX()).filter_map(|signal| {
        let now = disposition(signal)?;
        let handled = now.sa_sigaction != libc::SIG_DFL && now.sa_sigaction != libc::SIG_IGN;
        (handled && now.sa_flags & libc::SA_ONSTACK == 0).then_some((signal, now))
    })
}

/// A signal's disposition; `None`, with `errno`, if the kernel does not say.
pub(crate) fn disposition(signal: c_int) -> Option<libc::sigaction> {
    // SAFETY: zeros are a `sigaction`. The call reads the disposition and changes nothing.
    unsafe {
        let mut now: libc::sigaction = core::mem::zeroed();
        (libc::sigaction(signal, ptr::null(), &mut now) == 0).then_some(now)
    }
}

/// Adds `SA_ONSTACK` to a signal's handler. False if the kernel refuses.
pub(crate) fn give_own_stack(signal: c_int, mut handler: libc::sigaction) -> bool {
    handler.sa_flags |= libc::SA_ONSTACK;
    // SAFETY: this signal already has this handler. On a thread without an alternate stack the flag changes nothing.
    unsafe { libc::sigaction(signal, &handler, ptr::null_mut()) == 0 }
}

pub(crate) fn reset(signal: c_int) {
    // SAFETY: zeros are the `sigaction` of the default action, `SIG_DFL`, which runs no code of the process.
    unsafe { libc::sigaction(signal, &core::mem::zeroed(), ptr::null_mut()) };
}

/// Sends a signal to this thread. False if the kernel refuses.
pub(crate) fn raise(signal: c_int) -> bool {
    // SAFETY: the code that installed the disposition decided what the signal does. The call itself touches no memory.
    unsafe { libc::raise(signal) == 0 }
}

pub(crate) fn set_of<const N: usize>(signals: [c_int; N]) -> libc::sigset_t {
    // SAFETY: zeros are an empty set, to which the call adds a signal.
    let mut set = unsafe { core::mem::zeroed() };
    signals.into_iter().for_each(|signal| add(&mut set, signal));
    set
}

pub(crate) fn add(set: &mut libc::sigset_t, signal: c_int) {
    // SAFETY: the call changes a set that is borrowed mutably.
    unsafe { libc::sigaddset(set, signal) };
}

pub(crate) fn contains(set: &libc::sigset_t, signal: c_int) -> bool {
    // SAFETY: the call reads a set that is borrowed.
    unsafe { libc::sigismember(set, signal) == 1 }
}

/// Changes which signals are blocked on this thread: `how` is `SIG_BLOCK`, `SIG_UNBLOCK` or `SIG_SETMASK`.
pub(crate) fn change_mask(how: c_int, set: &libc::sigset_t) {
    // SAFETY: the call reads a set that is borrowed. A blocked signal waits, and no code relies on its arrival.
    unsafe { libc::pthread_sigmask(how, set, ptr::null_mut()) };
}

/// Bytes of the largest signal frame; `None` if the kernel does not say (before Linux 5.14).
pub(crate) fn frame_size() -> Option<usize> {
    // SAFETY: the call reads the auxiliary vector, which does not change.
    let bytes = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) } as usize;
    (bytes != 0).then_some(bytes)
}
