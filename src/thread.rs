//! Prepares a thread to run coroutines: it gets an alternate signal stack, and its end is noticed.
//!
//! The fault handler cannot run on the stack that just overflowed. Std gives its threads an alternate stack of 8 KiB, too small
//! for an AVX-512 signal frame and a relocation. Ours replaces it:
//!
//! ```text
//!   | guard page | HANDLER_STACK + what the kernel needs for a signal frame |
//! ```
//!
//! If the thread has another alternate stack, or was never prepared, the handler may have to move to a stack of its own
//! (asm/on_fault.s).

use core::ffi::c_void;
use core::ptr;
use std::io;
use std::sync::OnceLock;

use crate::error::Error;
use crate::handler;
use crate::signals;
use crate::size::PAGE;
use crate::stack::{guard, stock};
use crate::trace;
use crate::words::words;

/// Bytes for the handler itself: enough for the relocator and the reports in a debug build.
const HANDLER_STACK: usize = 128 << 10;

/// Makes this thread able to run coroutines. Creating a coroutine does so, too. A thread that resumes coroutines created
/// elsewhere (unsafe, see [`Coroutine`](crate::Coroutine)) calls this first. On a prepared thread it costs next to nothing.
///
/// The call unblocks SIGSEGV and SIGBUS on this thread. Stacks that move grow by SIGSEGV, and stacks frozen in place thaw by it
/// when touched. Keep both unblocked: with SIGSEGV blocked, growing or thawing ends the process without a report.
///
/// The thread gets an alternate signal stack of 128 KiB. Another one may be installed later, of any size in which the kernel
/// delivers signals. If it is small, each growth costs four more system calls.
///
/// # Errors
/// If the fault handler or the alternate signal stack cannot be installed.
///
/// ```
/// std::thread::spawn(|| regrow::prepare_thread().unwrap()).join().unwrap();
/// ```
pub fn prepare_thread() -> Result<(), Error> {
    if words().signal_stack.get() == 0 { prepare() } else { Ok(()) }
}

/// As [`prepare_thread`], but also restores the alternate stack if other code has removed it. Costs at least one system call,
/// so it belongs on slow paths.
pub(crate) fn prepare() -> Result<(), Error> {
    static PROCESS: OnceLock<libc::pthread_key_t> = OnceLock::new();
    let key = match PROCESS.get() {
        Some(key) => *key,
        None => {
            guard::detect();
            trace::detect();
            stay_loaded();
            let key = create_key()?;
            handler::install()?;
            let _ = PROCESS.set(key);
            key
        }
    };
    let ours = words().signal_stack.get();
    if ours == 0 {
        let new = guard::reserve(PAGE + stack_size(), libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: the page is the lowest of a mapping made above, which is not in use yet.
        unsafe { libc::mprotect(new as *mut _, PAGE, libc::PROT_NONE) };
        install(new)?;
        unblock_faults();
        words().stock.set(stock::of_this_thread().cast());
        words().signal_stack.set(new);
        // SAFETY: the key was created in this process and is never deleted.
        unsafe { libc::pthread_setspecific(key, new as *const c_void) };
    } else if !is_installed(ours) {
        // Std removes the alternate stack when a thread's main function has returned, before the destructors of thread-local
        // variables run. A coroutine dropped in such a destructor gets here.
        install(ours)?;
    }
    Ok(())
}

/// Gives back the slots that this thread keeps for reuse, and their memory to the kernel. Returns the number of bytes, as
/// [`cached_bytes`] counts them. The address space stays reserved for later coroutines.
///
/// ```
/// drop(regrow::Coroutine::<(), (), ()>::new(|_, ()| ()));
/// assert!(regrow::trim() >= 4096);
/// assert_eq!(regrow::cached_bytes(), 0);
/// ```
pub fn trim() -> usize {
    let bytes = stock::bytes();
    stock::flush();
    bytes
}

/// Bytes of memory in stacks that this thread keeps for reuse, at most 8 MiB. For stacks that grow in place it is an estimate:
/// a few count with all that they might hold, and the kernel is asked about some of the others.
///
/// ```
/// drop(regrow::Coroutine::<(), (), ()>::new(|_, ()| ()));
/// assert!(regrow::cached_bytes() >= 4096);
/// ```
#[must_use]
pub fn cached_bytes() -> usize {
    stock::bytes()
}

/// Keeps the library with this code loaded, if the code is in a library: the handler and the key's destructor may be called
/// after the library's user has closed it. For the program itself, which always stays, this finds or changes nothing.
fn stay_loaded() {
    // SAFETY: zeros are a `Dl_info`. The name in it lasts as long as the object is loaded, and the object's code is running.
    unsafe {
        let mut object: libc::Dl_info = core::mem::zeroed();
        if libc::dladdr(stay_loaded as *const c_void, &mut object) != 0 && !object.dli_fname.is_null() {
            libc::dlopen(object.dli_fname, libc::RTLD_NOW | libc::RTLD_NODELETE | libc::RTLD_NOLOAD);
        }
    }
}

/// `pthread` calls the key's destructor after those of Rust's thread-locals, which may still drop coroutines.
fn create_key() -> Result<libc::pthread_key_t, Error> {
    let mut key = 0;
    // SAFETY: the call writes the key. The destructor has the signature that pthread asks for.
    match unsafe { libc::pthread_key_create(&mut key, Some(end_of_thread)) } {
        0 => Ok(key),
        code => Err(Error::Handler { source: io::Error::from_raw_os_error(code) }),
    }
}

fn install(stack: usize) -> Result<(), Error> {
    let new = libc::stack_t { ss_sp: (stack + PAGE) as *mut c_void, ss_flags: 0, ss_size: stack_size() };
    // SAFETY: `prepare` made the mapping for this thread. It has no other use while the thread lives.
    match unsafe { libc::sigaltstack(&new, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(Error::Handler { source: io::Error::last_os_error() }),
    }
}

/// Unblocks the fault signals: a fault with its signal blocked ends the process. Servers block all signals on some threads.
fn unblock_faults() {
    signals::change_mask(libc::SIG_UNBLOCK, &signals::set_of(handler::SIGNALS));
}

fn is_installed(stack: usize) -> bool {
    // SAFETY: zeros are a `stack_t`, which the call fills in.
    unsafe {
        let mut now: libc::stack_t = core::mem::zeroed();
        libc::sigaltstack(ptr::null(), &mut now) == 0
            && now.ss_sp as usize == stack + PAGE
            && now.ss_flags & libc::SS_DISABLE == 0
    }
}

/// The end of this thread's signal stack, for other short work that must not use the current stack.
pub(crate) fn signal_stack_end() -> Option<usize> {
    let stack = words().signal_stack.get();
    (stack != 0).then(|| stack + PAGE + stack_size())
}

fn stack_size() -> usize {
    (HANDLER_STACK + signals::frame_size().unwrap_or(0)).next_multiple_of(PAGE)
}

extern "C" fn end_of_thread(stack: *mut c_void) {
    stock::flush();
    words().signal_stack.set(0);
    let stack = stack as usize;
    // SAFETY: this thread made the mapping, and no signal handler runs on it, because this function runs. The kernel stops
    // using it before it is unmapped.
    unsafe {
        if is_installed(stack) {
            let off = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            libc::sigaltstack(&off, ptr::null_mut());
        }
        guard::unreserve(stack, PAGE + stack_size());
    }
}
