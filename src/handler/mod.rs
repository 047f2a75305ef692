//! The fault handler: from a SIGSEGV at a guard page to a larger stack, or to the previous handler.
//!
//! ```text
//!   fault ─ room for the handler? ── no ─► onto a stack of its own, until it has served (asm/on_fault.s)
//!             │ yes
//!           in an arena? ── no ──────────────────────────────────────► the previous handler
//!             │ yes
//!           an old slot? ── yes ─► stale pointer: report, abort
//!             │ no
//!           a frozen stack? ─ yes ─► thaw it (src/freeze/in_place.rs), return
//!             │ no
//!           the running coroutine's guard, near rsp? ── no ──────────► the previous handler
//!             │ yes
//!           grow (src/grow/overflow.rs) ── no room ─► overflow: report, abort
//!             │
//!           return: the instruction runs again
//! ```
//!
//! Nothing here allocates, locks, prints through std, panics or touches a lazily initialised thread-local.

mod lost;

use core::arch::naked_asm;
use core::ffi::{c_int, c_void};
use core::mem::offset_of;
use core::ptr;
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::context::{Context, PLACE};
use crate::error::Error;
use crate::freeze::in_place;
use crate::grow::overflow::grow;
use crate::grow::point::{call_length, probe_loop_end};
use crate::grow::relocate::{Fault, is_growth_point};
use crate::hooks;
use crate::report;
use crate::signals;
use crate::size::MAX_SIZE;
use crate::stack::arena::Slot;
use crate::stack::record::Record;
use crate::switch::{self, RED_ZONE};
use crate::words::keeping_errno;

/// The fault signals, which the handler serves.
pub(crate) const SIGNALS: [c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// The previous handlers, written before our handler is installed. Our handler only reads them, without waiting.
static PREVIOUS: [OnceLock<libc::sigaction>; SIGNALS.len()] = [const { OnceLock::new() }; SIGNALS.len()];

/// Installs the handler; called once per process.
pub(crate) fn install() -> Result<(), Error> {
    /// The number of signals with our handler: after an error the next call does the rest.
    static INSTALLED: Mutex<usize> = Mutex::new(0);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS).skip(*installed) {
        // SAFETY: `on_fault` is a handler for this signal and passes faults that are not ours to `previous`.
        unsafe { take_over(signal, on_fault, previous)? };
        *installed += 1;
    }
    Ok(())
}

/// The handler, for code that has to know which functions it runs.
#[cfg(feature = "torture")]
pub(crate) const ON_FAULT: Handler = on_fault;

/// The signature of a handler, as the kernel calls it.
pub(crate) type Handler = unsafe extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// Installs `handler`, and stores the previous disposition in `previous`. Of several attempts, the first one stores it.
///
/// # Safety
/// `handler` is a handler for this signal and passes signals that are not its own to `previous`.
pub(crate) unsafe fn take_over(
    signal: c_int,
    handler: Handler,
    previous: &OnceLock<libc::sigaction>,
) -> Result<(), Error> {
    let refused = || Error::Handler { source: io::Error::last_os_error() };
    // `previous` is written before our handler goes in, so that a fault on another thread finds it.
    let now = signals::disposition(signal).ok_or_else(refused)?;
    let _ = previous.set(now);
    // SAFETY: the caller says that the handler is for this signal.
    unsafe { put(signal, handler) }.then_some(()).ok_or_else(refused)
}

/// Installs `handler` for a signal. False, with `errno`, if the kernel refuses.
///
/// # Safety
/// `handler` is a handler for this signal.
unsafe fn put(signal: c_int, handler: Handler) -> bool {
    // SAFETY: zeros are a `sigaction`. The handler is for this signal and has the signature that the flags ask for.
    unsafe {
        let mut ours: libc::sigaction = core::mem::zeroed();
        ours.sa_sigaction = handler as *const () as usize;
        // SIGINFO gives the address. ONSTACK: the faulting stack has no room. Without RESTART: a fault interrupts no system
        // call. Without NODEFER: a fault in the handler is a bug and ends the process.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // All signals are blocked: another handler must not run between two stacks.
        libc::sigfillset(&mut ours.sa_mask);
        libc::sigaction(signal, &ours, ptr::null_mut()) == 0
    }
}

/// Bytes that the handler may need, even in a debug build. If less is left, it moves to a stack of its own.
const ENOUGH: usize = 48 << 10;

/// Bytes of the handler's own stack.
const OWN_STACK: usize = 128 << 10;

static ALL_SIGNALS: u64 = u64::MAX;

/// The handler: ensures that what it calls has room, whichever stack it was called on.
#[unsafe(naked)]
unsafe extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, raw: *mut c_void) {
    naked_asm!(
        include_str!("../../asm/on_fault.s"),
        ss_sp = const offset_of!(libc::ucontext_t, uc_stack) + offset_of!(libc::stack_t, ss_sp),
        ss_size = const offset_of!(libc::ucontext_t, uc_stack) + offset_of!(libc::stack_t, ss_size),
        enough = const ENOUGH,
        own = const OWN_STACK,
        access = const libc::PROT_READ | libc::PROT_WRITE,
        flags = const libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        set_mask = const libc::SIG_SETMASK,
        mmap = const libc::SYS_mmap,
        munmap = const libc::SYS_munmap,
        sigprocmask = const libc::SYS_rt_sigprocmask,
        all_signals = sym ALL_SIGNALS,
        handle = sym handle,
        serve = sym serve_signal,
        pass_on = sym pass_on,
        no_stack = sym report::no_stack_for_the_handler,
    )
}

/// Serves or passes on a signal, on a stack with enough room.
unsafe extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, raw: *mut c_void) {
    // SAFETY: asm/on_fault.s passes on the three arguments with which the kernel called the handler.
    unsafe {
        if !serve_signal(signal, info, raw) {
            pass_on(signal, info, raw);
        }
    }
}

/// Handles the signal; false if it is not ours.
unsafe extern "C" fn serve_signal(signal: c_int, info: *mut libc::siginfo_t, raw: *mut c_void) -> bool {
    // SAFETY: the kernel passes a `siginfo_t` and a context to a handler that is installed with SA_SIGINFO, as this one is.
    let (code, address, mut context) =
        unsafe { ((*info).si_code, (*info).si_addr() as usize, Context::new(raw)) };
    keeping_errno(|| {
        let _in_place = hooks::instruction_in_its_place(&mut context);
        // A code of 0 or less means that a process sent the signal, not the processor.
        code > 0
            && (hooks::catches(address, &mut context)
                || is_kernels_own(signal, code, address) && lost::send_again(&context)
                || serve(address, context))
    })
}

/// Does what would have happened without our handler, on the stack where it would have happened.
unsafe extern "C" fn pass_on(signal: c_int, info: *mut libc::siginfo_t, raw: *mut c_void) {
    // SAFETY: `handle` or asm/on_fault.s passes the arguments with which the kernel called the handler.
    keeping_errno(|| unsafe {
        if is_kernels_own(signal, (*info).si_code, (*info).si_addr() as usize) {
            pass_on_kernels_own(info, raw);
        } else {
            chain(signal, info, raw);
        }
    });
}

/// True for a SIGSEGV without an address.
fn is_kernels_own(signal: c_int, code: c_int, address: usize) -> bool {
    code == libc::SI_KERNEL && address == 0 && signal == libc::SIGSEGV
}

/// Grows or thaws the stack that was touched; false if the fault is not ours.
fn serve(address: usize, mut context: Context<'_>) -> bool {
    let Some(slot) = Slot::containing(address) else { return false };
    if slot.is_old() {
        report::stale(slot, address, &mut context);
    }
    in_place::serve(slot, address)
        || serve_growth(slot, address, context)
        || in_place::came_too_early(slot, address)
}

/// Passes on a SIGSEGV without an address. The previous handler may take it for a fatal fault and restore the default action.
/// If the process continues because a signal was lost, our handler must be installed again.
///
/// # Safety
/// The arguments are those of the handler.
unsafe fn pass_on_kernels_own(info: *mut libc::siginfo_t, raw: *mut c_void) {
    // SAFETY: the arguments are those of the running handler. No other code uses its context before it is passed on. And
    // `on_fault` is the handler for this signal.
    unsafe {
        let context = Context::new(raw);
        if lost::comes_again(&context) {
            // The previous handler has seen this fault and wants the default action.
            return signals::reset(libc::SIGSEGV);
        }
        let at = lost::At::of(&context);
        chain(libc::SIGSEGV, info, raw);
        if is_default(libc::SIGSEGV) {
            at.remember();
            put(libc::SIGSEGV, on_fault);
        }
    }
}

fn is_default(signal: c_int) -> bool {
    signals::disposition(signal).is_some_and(|now| now.sa_sigaction == libc::SIG_DFL)
}

/// Grows the running coroutine's stack if the fault is a growth.
fn serve_growth(slot: Slot, address: usize, mut context: Context<'_>) -> bool {
    let Some(running) = switch::running() else { return false };
    let record = running.record();
    let rsp = context.rsp();
    let on_its_stack = rsp >= slot.start() && rsp <= slot.end();
    if slot.end() != Record::end(record) || !on_its_stack {
        return false;
    }
    let rip = context.rip();
    if address.wrapping_sub(rip) < 16 {
        return false; // a jump to the guard: there is no instruction to look at
    }
    // SAFETY: the instruction at `rip` has just run, so its bytes are readable. Bytes after it are read only after a store, for
    // the next instruction, to which a store continues.
    let byte = |at| unsafe { *((rip + at) as *const u8) };
    let growth_point = is_growth_point(rip, byte);
    if address + RED_ZONE < rsp && !growth_point {
        return false; // below all that the frame may use: a wild pointer that happens to hit our guard
    }
    // SAFETY: the record of the running coroutine is accessible, and only this thread uses it.
    if address >= slot.end() - unsafe { (*record).open } {
        return false; // we made it accessible, so other code protected it
    }
    let call_length = call_length(byte);
    let loop_end = if growth_point { probe_loop_end(byte).map(|number| PLACE[number]) } else { None };
    // The lowest address that the code is about to use. For a large frame that is its lower end, which avoids growing page by
    // page.
    let lowest = match loop_end.map(|place| context.general()[place]) {
        Some(end) if end < address && address - end <= MAX_SIZE && !hooks::smallest_steps() => end,
        _ => address,
    };
    // SAFETY: the checks above show that the fault is the running coroutine's, at the guard of its own stack.
    unsafe {
        grow(&mut context, &Fault { running, slot, address, lowest, growth_point, loop_end, call_length })
    };
    true
}

/// Does what would have happened without our handler.
///
/// # Safety
/// The arguments are those of the handler.
unsafe fn chain(signal: c_int, info: *mut libc::siginfo_t, raw: *mut c_void) {
    let index = usize::from(signal != SIGNALS[0]);
    match PREVIOUS[index].get() {
        // SAFETY: the arguments are those of the handler.
        Some(previous) => unsafe { chain_to(previous, signal, info, raw) },
        None => signals::reset(signal), // unreachable: it is written before the handler is installed
    }
}

/// Does what would have happened if `previous` were still installed.
///
/// # Safety
/// The arguments are those of the handler.
pub(crate) unsafe fn chain_to(
    previous: &libc::sigaction,
    signal: c_int,
    info: *mut libc::siginfo_t,
    raw: *mut c_void,
) {
    // SAFETY: the kernel passed this `siginfo_t` to the handler, which still runs.
    // A trap is over when its handler runs, so no instruction raises it again.
    let sent = unsafe { (*info).si_code } <= 0 || signal == libc::SIGTRAP;
    match previous.sa_sigaction {
        libc::SIG_IGN if sent => {}
        // A fault cannot be ignored: the kernel ends the process, as by default.
        libc::SIG_DFL | libc::SIG_IGN => reset(signal, sent),
        handler => {
            if previous.sa_flags & libc::SA_RESETHAND != 0 {
                signals::reset(signal);
            }
            // SAFETY: the address is that of a handler, because the two other values are excluded. The handler takes one or
            // three arguments, as its flags say, and gets those that the kernel meant for it.
            unsafe {
                mask_for(previous, signal, Context::new(raw).mask());
                if previous.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: Handler = core::mem::transmute(handler);
                    handler(signal, info, raw);
                } else {
                    let handler: unsafe extern "C" fn(c_int) = core::mem::transmute(handler);
                    handler(signal);
                }
            }
        }
    }
}

/// Restores the default action: the faulting instruction runs again and ends the process with its original registers. A signal
/// that was sent is sent again; it stays blocked until the handler returns.
fn reset(signal: c_int, sent: bool) {
    signals::reset(signal);
    if sent {
        signals::raise(signal);
    }
}

/// Blocks exactly what the kernel would have blocked for the previous handler, until our handler returns and the kernel
/// restores the interrupted mask.
fn mask_for(previous: &libc::sigaction, signal: c_int, interrupted: &libc::sigset_t) {
    let mut mask = *interrupted;
    let blocked = (1..=libc::SIGRTMAX()).filter(|&other| signals::contains(&previous.sa_mask, other));
    blocked.for_each(|other| signals::add(&mut mask, other));
    if previous.sa_flags & libc::SA_NODEFER == 0 {
        signals::add(&mut mask, signal);
    }
    signals::change_mask(libc::SIG_SETMASK, &mask);
}
