//! The reports for people when a stack cannot grow or a stale pointer is used.
//!
//! The fault handler makes a report in its last moments. It writes straight to standard error from a buffer on the signal
//! stack, most important things first in case the rest fails, and then aborts.

use core::ffi::{c_int, c_void};
use core::fmt::Write;
use core::sync::atomic::{AtomicI32, Ordering};
use std::process::abort;

use crate::context::{Context, NAMES};
use crate::error::Error;
use crate::signals;
use crate::size::size_of_open;
use crate::stack::arena::Slot;
use crate::stack::guard;
use crate::stack::record::Record;
use crate::stderr::{self, Stderr};
use crate::symbol;
use crate::words::thread_number;

/// Frames shown, innermost first.
const FRAMES: usize = 32;

/// The reason why a stack cannot grow, which ends the process.
pub(crate) enum Fatal {
    /// The stack would exceed the coroutine's maximum.
    Maximum,
    /// The stack may not move here, and the slack below it is used up.
    Slack,
    /// The kernel gave no memory.
    Kernel(Error),
}

/// Reports a stack that cannot grow, in the manner of Go's "stack exceeds limit".
pub(crate) fn overflow(record: *const Record, need: usize, why: &Fatal, context: &mut Context<'_>) -> ! {
    // SAFETY: the running coroutine's record is accessible, and only this thread uses it. The coroutine does not continue.
    let record = unsafe { &*record };
    let (size, maximum) = (record.size(), record.settings.maximum());
    let need = size_of_open(need.next_multiple_of(4096));
    let mut out = begin();
    let _ = match why {
        Fatal::Maximum => writeln!(
            out,
            "regrow: {} exceeds its {maximum}-byte stack limit\nfatal error: stack overflow\n  size {size} bytes, \
             {need} needed; raise Builder::maximum if this depth is meant",
            record.called()
        ),
        Fatal::Slack => writeln!(
            out,
            "regrow: {} may not move its stack here and has used up its slack\nfatal error: stack overflow\n  size {size} \
             bytes, {need} needed, limit {maximum} bytes; start it larger with Builder::first_size",
            record.called()
        ),
        Fatal::Kernel(error) => writeln!(
            out,
            "regrow: {} cannot grow its stack\nfatal error: out of memory\n  size {size} bytes, {need} needed, limit \
             {maximum} bytes; {error}",
            record.called()
        ),
    };
    if let (Fatal::Slack, Some(not_moved)) = (why, record.not_moved) {
        let _ = write!(out, "  not moved: {:?}, at ", not_moved.reason);
        let _ = symbol::describe(not_moved.frame, &mut out);
        let _ = writeln!(out);
    }
    let _ = writeln!(out, "\n{} [running]:", record.called());
    frames(&mut out, context.rip());
    finish(out)
}

/// Reports the use of a pointer to where a stack used to be.
pub(crate) fn stale(old: Slot, address: usize, context: &mut Context<'_>) -> ! {
    let mut out = begin();
    let live = old.current();
    if live.is_old() {
        let _ = writeln!(
            out,
            "regrow: stale pointer into the stack of a frozen coroutine\nfatal error: address {address:#x} is where that \
             stack was before it moved"
        );
    } else {
        // SAFETY: the slot that old slots lead to holds a live stack, whose record is accessible. If its coroutine ends on
        // another thread at this moment, only the report is wrong.
        let record = unsafe { &*Record::at(live.end()) };
        let below_top = (old.end() - usize::from(record.base_offset)).wrapping_sub(address);
        let _ = writeln!(
            out,
            "regrow: stale pointer into the stack of {}\nfatal error: address {address:#x} is where that stack was before \
             it moved, {below_top} bytes below its top; it is now at {:#x}",
            record.called(),
            live.end() - (old.end() - address),
        );
    }
    let registers = context.general();
    let nearest = (0..NAMES.len())
        .filter(|&at| (old.start()..old.end()).contains(&registers[at]))
        .min_by_key(|&at| registers[at].abs_diff(address));
    if let Some(at) = nearest {
        let value = registers[at];
        let offset = address.wrapping_sub(value) as isize;
        let _ = writeln!(out, "  register {} = {value:#x}, {offset:+} bytes to the address", NAMES[at]);
    }
    let _ = writeln!(
        out,
        "  the pointer was kept outside the stack (heap, static, another stack, another thread): keep such things \
         off relocating coroutines, or grow in place\n\nused at:"
    );
    frames(&mut out, context.rip());
    finish(out)
}

/// Reports a frozen stack that was touched and cannot be thawed.
pub(crate) fn cannot_thaw(slot: Slot, error: &Error) -> ! {
    let mut out = begin();
    let end = slot.end();
    let _ = writeln!(
        out,
        "regrow: cannot thaw the stack of coroutine {end:#x}, which was touched\nfatal error: {error}"
    );
    finish(out)
}

/// Reports a lost signal: its handler has no stack of its own, and the interrupted coroutine's stack had no room for it.
pub(crate) fn lost_signal(candidates: impl Iterator<Item = c_int>) -> ! {
    let mut out = begin();
    let _ = write!(
        out,
        "regrow: a signal came where a coroutine's stack had no room for its handler\nfatal error: lost signal, one of"
    );
    for signal in candidates {
        let _ = write!(out, " {signal}");
    }
    let _ = writeln!(out, "\n  install their handlers with SA_ONSTACK");
    finish(out)
}

/// Reports that the fault handler has too little room and got no stack of its own. Too little is left for other reports.
pub(crate) extern "C" fn no_stack_for_the_handler() -> ! {
    const TEXT: &str = "regrow: a thread's signal stack is too small for the handler of faults\nfatal error: out of memory for \
                        another one; a stack of 64 KiB would have been enough\n";
    stderr::write(TEXT.as_bytes());
    abort()
}

/// Bytes of the stack on which frames are walked and looked up.
const STACK: usize = 128 << 10;

/// Writes the frames, from the one interrupted at `rip` outwards.
///
/// The walk uses a new stack: the alternate stack of a thread that never ran a coroutine is too small for an unwinder.
fn frames(out: &mut Stderr, rip: usize) {
    let mut walk = Walk { out, rip, shown: 0 };
    let argument = (&raw mut walk).cast();
    match guard::reserve(STACK, libc::PROT_READ | libc::PROT_WRITE) {
        // SAFETY: the stack was mapped above for this use alone. `walk_frames` gets the `Walk` that it expects.
        Ok(stack) => unsafe { regrow_call_on(argument, walk_frames, stack + STACK) },
        Err(_) => walk_frames(argument),
    }
}

unsafe extern "C" {
    /// Calls `function` on the stack that ends at `end` (asm/switch.S).
    fn regrow_call_on(argument: *mut c_void, function: extern "C" fn(*mut c_void), end: usize);
}

/// The thread that reports; 0 before there is one.
static REPORTER: AtomicI32 = AtomicI32::new(0);

/// Makes this thread the reporter. If another thread already is, waits for the end of the process.
fn be_the_reporter() {
    if REPORTER.compare_exchange(0, thread_number(), Ordering::Relaxed, Ordering::Relaxed).is_err() {
        wait_for_the_end();
    }
}

/// Waits for the end of the process. For handlers only, where all blockable signals are blocked.
// Inlined because torture takes functions that do not return for panics, and puts breakpoints in them.
#[inline(always)]
pub(crate) fn wait_for_the_end() -> ! {
    loop {
        // SAFETY: the call has no arguments, touches no memory, and runs no handler here.
        unsafe { libc::pause() };
    }
}

/// Makes a fault from here on end the process by SIGABRT, like the report itself. A report reads data that may be damaged, and
/// the blocked SIGSEGV would otherwise kill it. Other threads, whose stacks may still have to grow, wait.
fn abort_on_faults() {
    extern "C" fn on_fault(_signal: c_int) {
        if thread_number() != REPORTER.load(Ordering::Relaxed) {
            wait_for_the_end();
        }
        abort()
    }
    const FAULTS: [c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];
    // SAFETY: zeros are a `sigaction`. The handler takes one argument, as its flags say, and does not return.
    unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK; // another thread's stack may have no room
        libc::sigfillset(&mut action.sa_mask);
        for signal in FAULTS {
            libc::sigaction(signal, &action, core::ptr::null_mut());
        }
    }
    signals::change_mask(libc::SIG_UNBLOCK, &signals::set_of(FAULTS));
}

extern "C" fn walk_frames(argument: *mut c_void) {
    // SAFETY: the argument is the `Walk` of `frames`, which waits. The callback has the signature that the unwinder asks for
    // and gets the same `Walk`. The callback no longer runs when the `Walk` is used here.
    let walk = unsafe {
        _Unwind_Backtrace(on_frame, argument);
        &mut *argument.cast::<Walk<'_>>()
    };
    if walk.shown == 0 {
        walk.show(walk.rip); // the unwinder did not get through the signal frame
    }
    if walk.shown > FRAMES {
        let _ = writeln!(walk.out, "  ...");
    }
}

struct Walk<'a> {
    out: &'a mut Stderr,
    rip: usize,
    shown: usize,
}

impl Walk<'_> {
    fn show(&mut self, pc: usize) {
        if self.shown < FRAMES {
            let _ = write!(self.out, "  {:2}: ", self.shown);
            let _ = symbol::describe(pc, self.out);
            let _ = writeln!(self.out);
        }
        self.shown += 1;
    }
}

// The unwinder that std links. On this path no libgcc of the last ten years allocates, whether or not the program has unwound
// before. It reads stacks and unwind tables, and the process is about to abort.
unsafe extern "C" {
    fn _Unwind_Backtrace(
        callback: extern "C" fn(*mut c_void, *mut c_void) -> c_int,
        argument: *mut c_void,
    ) -> c_int;
    fn _Unwind_GetIPInfo(context: *mut c_void, before: *mut c_int) -> usize;
}

extern "C" fn on_frame(context: *mut c_void, argument: *mut c_void) -> c_int {
    const GO_ON: c_int = 0;
    const STOP: c_int = 5; // _URC_END_OF_STACK
    // SAFETY: the unwinder passes its context and the `Walk` of `frames`, which `walk_frames` does not use meanwhile.
    let (walk, pc) = unsafe {
        let mut before = 0;
        let pc = _Unwind_GetIPInfo(context, &mut before);
        if pc == 0 {
            return STOP; // below a thread's first function
        }
        // A return address is one past its call, and may be in the next function.
        (&mut *argument.cast::<Walk<'_>>(), if before == 0 { pc.wrapping_sub(1) } else { pc })
    };
    // The handler's own frames come first; the address identifies the interrupted frame.
    if walk.shown > 0 || pc == walk.rip {
        walk.show(pc);
    }
    if walk.shown > FRAMES { STOP } else { GO_ON }
}

/// Prepares the process's one report and returns standard error for it.
fn begin() -> Stderr {
    be_the_reporter();
    abort_on_faults();
    Stderr::new()
}

fn finish(mut out: Stderr) -> ! {
    out.flush();
    abort()
}
