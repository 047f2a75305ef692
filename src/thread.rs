//! What a thread needs before it may run coroutines: an alternate signal stack, and its end noticed.
//!
//! The fault handler cannot run on the stack that just overflowed. Std gives its threads an alternate
//! stack of 8 KiB, too small for an AVX-512 signal frame and a relocation; ours replaces it:
//!
//! ```text
//!   | guard page | HANDLER_STACK + what the kernel needs for a signal frame |
//! ```
//!
//! Where another one has been put in its place, or the thread was never prepared, the handler may have to go over to a stack of
//! its own (asm/on_fault.s).

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

/// For the handler itself: enough for the relocator and the reports in a debug build.
const HANDLER_STACK: usize = 128 << 10;

/// Makes this thread able to run coroutines. Creating one does it; a thread that resumes coroutines
/// created elsewhere (an unsafe thing to do, see [`Coroutine`](crate::Coroutine)) calls it first. On a thread that
/// is prepared it costs next to nothing.
///
/// SIGSEGV and SIGBUS are unblocked on this thread: stacks that move grow by the first, and stacks frozen in place thaw by it when
/// they are touched. They must stay unblocked: with SIGSEGV blocked, either ends the process without a report.
///
/// The thread gets an alternate signal stack of 128 KiB. Another one may be installed later, of any size in which the kernel
/// delivers signals: where it is small, each growth costs four more system calls.
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

/// As [`prepare_thread`], and the alternate stack is there again if somebody took it away. It costs at least one system call, so
/// it belongs on slow paths.
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
        // SAFETY: the page is the lowest of a mapping that was made above, and nobody uses it.
        unsafe { libc::mprotect(new as *mut _, PAGE, libc::PROT_NONE) };
        install(new)?;
        unblock_faults();
        words().stock.set(stock::of_this_thread().cast());
        words().signal_stack.set(new);
        // SAFETY: the key was created in this process and is never deleted.
        unsafe { libc::pthread_setspecific(key, new as *const c_void) };
    } else if !is_installed(ours) {
        // Std takes the alternate stack away when a thread's main function has returned, before the
        // destructors of thread-local variables run: a coroutine dropped there comes by here.
        install(ours)?;
    }
    Ok(())
}

/// Gives the slots that this thread keeps for reuse back, and their memory to the kernel. Returns how many bytes that was, as
/// [`cached_bytes`] counts them. Their address space stays reserved, for coroutines to come.
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

/// Bytes of memory in stacks that this thread keeps for reuse: at most 8 MiB. Of stacks that grow in place this is an estimate:
/// a few count for all they might hold, and the kernel is asked about some of the others.
///
/// ```
/// drop(regrow::Coroutine::<(), (), ()>::new(|_, ()| ()));
/// assert!(regrow::cached_bytes() >= 4096);
/// ```
#[must_use]
pub fn cached_bytes() -> usize {
    stock::bytes()
}

/// Sees that the library this code is in is never unloaded, if it is one: the handler and the destructor of the key are called
/// after whoever loaded it has closed it. The program itself stays anyway: nothing is found for it, or it changes nothing.
fn stay_loaded() {
    // SAFETY: zeros are a `Dl_info`. The name it is filled with lasts as long as the object is loaded, which it is: its code runs.
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
    // SAFETY: the call writes the key; the destructor has the signature that pthread asks for.
    match unsafe { libc::pthread_key_create(&mut key, Some(end_of_thread)) } {
        0 => Ok(key),
        code => Err(Error::Handler { source: io::Error::from_raw_os_error(code) }),
    }
}

fn install(stack: usize) -> Result<(), Error> {
    let new = libc::stack_t { ss_sp: (stack + PAGE) as *mut c_void, ss_flags: 0, ss_size: stack_size() };
    // SAFETY: `prepare` made the mapping for this thread; it is used for nothing else as long as the thread lives.
    match unsafe { libc::sigaltstack(&new, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(Error::Handler { source: io::Error::last_os_error() }),
    }
}

/// A fault whose signal is blocked ends the process. Servers block all signals on threads that are to get none.
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

/// The end of this thread's signal stack, for other short work that must not be on the current stack.
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
    // SAFETY: the mapping is the one that this thread made, and no signal handler runs on it, since this function
    // does. It is taken away from the kernel before it is unmapped.
    unsafe {
        if is_installed(stack) {
            let off = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            libc::sigaltstack(&off, ptr::null_mut());
        }
        guard::unreserve(stack, PAGE + stack_size());
    }
}
