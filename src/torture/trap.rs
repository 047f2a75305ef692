//! The SIGTRAP handler, called once per instruction: it looks at the next instruction and moves the stack.
//!
//! The SIGSEGV handler asks this module during a torture whether a fault is a finding. If so, the interrupted context becomes
//! that of the resumer, as if the coroutine had suspended. Its frames are not unwound, and its stack is never used again.
//!
//! The rules of src/handler/mod.rs apply: nothing here allocates, locks, prints, or panics.

use core::ffi::{c_int, c_void};
use core::fmt::Write;
use core::iter;
use core::ptr;
use core::sync::atomic::Ordering;
use std::sync::OnceLock;

use super::breakpoints;
use super::functions::holding;
use super::report::Kind;
use super::run::{self, KEPT, Run};
use crate::context::{Context, PLACE};
use crate::error::Error;
use crate::grow::growth::Done;
use crate::grow::overflow::may_move;
use crate::grow::point::{call_length, probe_loop_end};
use crate::grow::relocate::{self, Fault, is_growth_point};
use crate::handler::{self, chain_to};
use crate::hooks;
use crate::report::wait_for_the_end;
use crate::settings::Growth;
use crate::signals;
use crate::size::PAGE;
use crate::stack::arena::Slot;
use crate::stack::free_list::Link;
use crate::stack::record::Record;
use crate::stack::release::give_back_old;
use crate::stderr::Stderr;
use crate::switch::{self, RED_ZONE, Running};
use crate::words::keeping_errno;

/// The previous handler. It is written before our handler is installed, and our handler only reads it, without waiting.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

pub(super) fn install() -> Result<(), Error> {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    if INSTALLED.get().is_none() {
        // SAFETY: `on_trap` is a handler for SIGTRAP and passes other signals to `PREVIOUS`.
        unsafe { handler::take_over(libc::SIGTRAP, on_trap, &PREVIOUS)? };
        hooks::install(hooks::Table {
            catches,
            put_instruction_back,
            put_breakpoint_back: breakpoints::put_back,
        });
        let _ = INSTALLED.set(());
    }
    Ok(())
}

/// The trap flag in the flags register.
const TRAP_FLAG: i64 = 0x100;
const TRAPS: u64 = 1 << (libc::SIGTRAP - 1);

/// The numbers of general registers in instructions.
const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;
const R8: usize = 8;
const R10: usize = 10;
const R11: usize = 11;

unsafe extern "C" fn on_trap(signal: c_int, info: *mut libc::siginfo_t, raw: *mut c_void) {
    // SAFETY: the kernel passes a `siginfo_t` and a context to a handler that is installed with SA_SIGINFO, as this one is.
    // They are passed on only when this handler no longer uses them.
    keeping_errno(|| unsafe {
        let (code, sender) = ((*info).si_code, (*info).si_pid());
        if !serve(code, sender, &mut Context::new(raw))
            && let Some(previous) = PREVIOUS.get()
        {
            chain_to(previous, signal, info, raw);
        }
    });
}

/// Handles the signal; false if it is not ours.
fn serve(code: c_int, sender: c_int, context: &mut Context<'_>) -> bool {
    match run_in_handler() {
        run if code == libc::SI_KERNEL => return breakpoint(run, context),
        Some(run) if code == libc::TRAP_TRACE => step(run, context),
        Some(run) if code == libc::SI_TKILL && sender as u32 == std::process::id() => called(run, context),
        _ => return false,
    }
    true
}

/// The torture of this thread, for its handlers.
fn run_in_handler<'a>() -> Option<&'a mut Run> {
    // SAFETY: the pointer is null or that of a running torture. Handlers do not interrupt each other, and the code they
    // interrupt has no reference to it: `turn` uses it only while nothing is stepped through.
    unsafe { run::current().as_mut() }
}

/// Inserts a breakpoint at each growth point, except in code that the handlers call.
pub(super) fn insert_breakpoints() -> Result<(), &'static str> {
    // Calls through the hook table are not followed, so its entries are listed here.
    breakpoints::insert(&[
        on_trap as *const () as usize,
        handler::ON_FAULT as *const () as usize,
        catches as *const () as usize,
        put_instruction_back as *const () as usize,
        breakpoints::put_back as *const () as usize,
        <Stderr as Write>::write_str as *const () as usize,
        <Stderr as Write>::write_char as *const () as usize,
    ])
}

/// Handles a breakpoint, on any thread; false if the trap is not one of our breakpoints.
fn breakpoint(run: Option<&mut Run>, context: &mut Context<'_>) -> bool {
    let at = context.rip() - 1;
    let Some(displaced) = breakpoints::displaced(at) else { return false };
    if let Some(run) = run {
        if run::recorded().is_some() {
            leave(run, context);
            return true;
        }
        if let Some((running, slot)) = moving_stack(context)
            && !run.has_stepped_enough()
        {
            run.steps += 1;
            context.set_rip(at);
            move_stack(run, context, running, slot);
        }
    }
    context.set_rip(displaced);
    true
}

/// Handles a SIGTRAP from this process: stepping may go on, or another thread has a finding.
fn called(run: &mut Run, context: &mut Context<'_>) {
    if run::recorded().is_some() {
        leave(run, context);
    } else if run.paused {
        run.paused = false;
        *context.flags() |= TRAP_FLAG;
    }
}

/// Called before each instruction.
fn step(run: &mut Run, context: &mut Context<'_>) {
    if run::recorded().is_some() {
        return leave(run, context);
    }
    if blocks_traps(run, context) {
        return;
    }
    let Some((running, slot)) = moving_stack(context) else {
        if run.inside && switch::running().is_none() {
            *context.flags() &= !TRAP_FLAG;
        }
        return;
    };
    run.inside = true;
    if run.has_stepped_enough() {
        *context.flags() &= !TRAP_FLAG;
        return;
    }
    run.steps += 1;
    let rip = context.rip();
    let growth_point = || is_growth_point(rip, |at| breakpoints::code(rip + at));
    if !run.wants(growth_point) {
        return;
    }
    let whole = holding(run.leaves, rip).is_none() && !in_probe_loop(context, slot);
    if !whole && !growth_point() {
        run.skipped += 1;
        return;
    }
    move_stack(run, context, running, slot);
}

/// Moves the running coroutine's stack, which is in `slot`.
fn move_stack(run: &mut Run, context: &mut Context<'_>, running: Running, slot: Slot) {
    let rip = context.rip();
    // SAFETY: the coroutine was interrupted on its stack in this slot, and its pointers are whole at this instruction.
    let moved = unsafe { move_here(context, running, slot, |at| breakpoints::code(rip + at)) };
    let Some(moved) = moved else {
        run.refused += 1;
        return;
    };
    run.moves += 1;
    run.bytes += moved.bytes as u64;
    run.words += moved.words as u64;
    run.hits.count(rip);
    // SAFETY: the running coroutine was interrupted with this `rsp`, and its record is where its stack has moved to.
    unsafe { after_move(run, context.rsp(), running.record()) };
}

/// Moves the interrupted stack to another slot of its size, as if it had overflowed at the interrupted instruction. `byte`
/// returns the bytes of that instruction. `None` if the stack cannot be moved.
///
/// # Safety
/// The running coroutine was interrupted on its stack in `slot`. Pointers into its stack are only in the stack and in
/// registers.
unsafe fn move_here(
    context: &mut Context<'_>,
    running: Running,
    slot: Slot,
    byte: impl Fn(usize) -> u8 + Copy,
) -> Option<Done> {
    let (rip, rsp) = (context.rip(), context.rsp());
    let growth_point = is_growth_point(rip, byte);
    let number = if growth_point { probe_loop_end(byte) } else { None };
    let here = Fault {
        running,
        slot,
        address: rsp,
        lowest: rsp,
        growth_point: true, // or an instruction as safe as one
        loop_end: number.map(|number| PLACE[number]),
        call_length: call_length(byte),
    };
    // SAFETY: the record is that of the running coroutine: it is accessible, and only this thread uses it. The caller says that
    // all pointers into the stack are where `relocate` looks for them.
    unsafe {
        let record = Record::at(slot.end());
        may_move(&*record, &here).ok()?;
        let done = relocate::relocate(context, &here, (*record).size().next_power_of_two()).ok()?;
        (*running.record()).tidy = true;
        Some(done)
    }
}

/// The running coroutine, if its stack may move and holds `rsp`.
fn moving_stack(context: &Context<'_>) -> Option<(Running, Slot)> {
    let running = switch::running().filter(|_| hooks::may_disturb())?;
    let slot = Slot::containing(context.rsp())?;
    let (end, _, growth) = end_open_growth(running);
    (slot.end() == end && growth == Growth::Relocate).then_some((running, slot))
}

/// Where the running coroutine's slot ends, how much of it is accessible, and how its stack grows.
fn end_open_growth(running: Running) -> (usize, usize, Growth) {
    let record = running.record();
    // SAFETY: the record of the running coroutine is accessible, and only this thread uses it.
    unsafe { (Record::end(record), (*record).open, (*record).settings.growth) }
}

/// True between `lea r11, [rsp - N]` and the end of the loop that touches a large frame's pages (src/grow/point.rs).
fn in_probe_loop(context: &mut Context<'_>, slot: Slot) -> bool {
    const LARGEST: usize = 1 << 32;
    slot.start().wrapping_sub(*context.register(R11)) < LARGEST
}

/// # Safety
/// `record` is that of the running coroutine, interrupted with `rsp`, whose stack has just moved.
unsafe fn after_move(run: &Run, rsp: usize, record: *mut Record) {
    // SAFETY: the record is that of the running coroutine: it is accessible, and only this thread uses it. The bytes written
    // are accessible and lie below the red zone, where nothing is in use.
    unsafe {
        if run.moves.is_multiple_of(KEPT as u64) {
            give_back_oldest((*record).old, KEPT);
        }
        let open = Record::end(record) - (*record).open;
        let used = (rsp - RED_ZONE).max(open);
        let start = (used / PAGE * PAGE).max(open);
        ptr::write_bytes(start as *mut u8, super::report::POISON, used - start);
    }
}

/// Gives back the slots that a stack has left, except the latest `keep`; `link` is the newest.
fn give_back_oldest(mut link: Link, keep: usize) {
    for _ in 1..keep {
        let Some(slot) = Slot::from_link(link) else { return };
        link = slot.meta().next.load(Ordering::Relaxed);
    }
    if let Some(last_kept) = Slot::from_link(link) {
        give_back_old(last_kept.meta().next.swap(0, Ordering::Relaxed));
    }
}

/// Handles the next instruction if it is a system call that would block SIGTRAP: emulates the call and stops stepping until
/// SIGTRAP is unblocked.
fn blocks_traps(run: &mut Run, context: &mut Context<'_>) -> bool {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let rip = context.rip();
    // The second byte is read only if the first matches.
    let is_syscall = breakpoints::code(rip) == SYSCALL[0] && breakpoints::code(rip + 1) == SYSCALL[1];
    if !is_syscall || *context.register(RAX) != libc::SYS_rt_sigprocmask as usize {
        return false;
    }
    let (how, new, old) = (*context.register(RDI), *context.register(RSI), *context.register(RDX));
    if *context.register(R10) != size_of::<u64>() || new == 0 || [new, old].into_iter().any(is_guarded) {
        return false;
    }
    // SAFETY: the interrupted code passes this address for the kernel to read eight bytes at, and it is in no guard.
    let new = unsafe { (new as *const u64).read_unaligned() };
    let mask = *context.mask_bits();
    let wanted = match how as c_int {
        libc::SIG_BLOCK => mask | new,
        libc::SIG_SETMASK => new,
        _ => return false,
    };
    if wanted & TRAPS == 0 {
        return false;
    }
    if old != 0 {
        // SAFETY: the interrupted code passes this address for the kernel to write eight bytes at, and it is in no guard.
        unsafe { (old as *mut u64).write_unaligned(mask) };
    }
    // A system call leaves its result in `rax`, its return address in `rcx` and its flags in `r11`.
    *context.mask_bits() = wanted & !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1));
    *context.flags() &= !TRAP_FLAG;
    *context.register(RAX) = 0;
    *context.register(RCX) = rip + SYSCALL.len();
    *context.register(R11) = *context.flags() as usize;
    context.set_rip(rip + SYSCALL.len());
    run.paused = true;
    send_trap(run::tortured_thread());
    true
}

/// True if the kernel might find this address inaccessible.
fn is_guarded(address: usize) -> bool {
    Slot::containing(address).is_some_and(|slot| {
        switch::running()
            .map(end_open_growth)
            .is_none_or(|(end, open, _)| slot.end() != end || address < end - open)
    })
}

fn send_trap(thread: i32) {
    // SAFETY: the system call takes numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGTRAP) };
}

/// Removes the SIGTRAP that was pending for a stepper that blocks it.
pub(super) fn take_pending() {
    let traps = signals::set_of([libc::SIGTRAP]);
    // SAFETY: the call reads a set and a time, both borrowed, and writes nothing. It does not wait.
    unsafe { libc::sigtimedwait(&traps, ptr::null_mut(), &libc::timespec { tv_sec: 0, tv_nsec: 0 }) };
}

/// True if a fault is a finding of the running torture. The finding has then been dealt with.
fn catches(address: usize, context: &mut Context<'_>) -> bool {
    let thread = run::tortured_thread();
    if thread == 0 {
        return false;
    }
    match run_in_handler() {
        Some(run) => {
            let Some((kind, slot)) = stale(address).or_else(|| poisoned(address, context)) else {
                return false;
            };
            run::record(|found| found.fill(kind, address, slot, false, context));
            leave(run, context);
            true
        }
        None => {
            let slot = Slot::containing(address).filter(|slot| slot.is_old());
            if slot.is_none() {
                return false;
            }
            run::record(|found| found.fill(Kind::Stale, address, slot, true, context));
            send_trap(thread);
            // This thread has no valid data to return to, and another thread may wait for it while lending it data.
            wait_for_the_end()
        }
    }
}

/// Finds a touched slot that the stack has left, even one so old that it may be in use again.
fn stale(address: usize) -> Option<(Kind, Option<Slot>)> {
    let end = Record::end(switch::running()?.record());
    let slot = Slot::containing(address).filter(|slot| slot.end() != end)?;
    Some((Kind::Stale, Some(slot)))
}

/// Finds a register that may have been the pointer and holds the fill of fresh stack.
fn poisoned(address: usize, context: &mut Context<'_>) -> Option<(Kind, Option<Slot>)> {
    const NEAR: usize = 1 << 16;
    let pattern = usize::from_ne_bytes([super::report::POISON; size_of::<usize>()]);
    // For a non-canonical address the processor does not report the address accessed.
    let found = address == 0 && context.general().iter().any(|value| value.abs_diff(pattern) < NEAR);
    found.then_some((Kind::Poison, None))
}

/// Restores a displaced instruction that faulted to its own place, and returns that place.
fn put_instruction_back(context: &mut Context<'_>) -> Option<usize> {
    let (at, later) = breakpoints::original(context.rip())?;
    (!later && breakpoints::take_out(at)).then(|| {
        context.set_rip(at);
        at
    })
}

/// Continues in the resumer of the tortured coroutine, as asm/finish.s would.
fn leave(run: &mut Run, context: &mut Context<'_>) {
    let inside = iter::successors(switch::running(), |running| running.resumed_by());
    let Some(tortured) = inside.take_while(|&running| Some(running) != run.outside).last() else {
        return; // outside the tortured coroutine, which will not be resumed again
    };
    // The handler runs the code below only here, so breakpoints may be in it.
    breakpoints::remove();
    if let Some((at, pushed)) = breakpoints::original(context.rip()) {
        // The unwinder knows only the instruction's own place, so the context moves there.
        context.set_rip(at);
        *context.register(RSP) += if pushed { size_of::<usize>() } else { 0 };
    }
    if let Some(found) = run::recorded() {
        // SAFETY: the finding is complete, so its maker no longer uses it. This is the tortured thread, and only its handler
        // adds to the finding.
        unsafe { (*found).add_frames(context.rsp()) };
    }
    run::count_growths();
    let (landing, resumer) = tortured.landing();
    context.set_rip(landing);
    const DIRECTION_FLAG: i64 = 0x400;
    *context.flags() &= !(TRAP_FLAG | DIRECTION_FLAG);
    *context.register(RSP) = resumer;
    *context.register(R8) = resumer;
    *context.register(RDX) = tortured.base() as usize;
    *context.register(RAX) = switch::ENDED;
    *context.register(RSI) = switch::YIELDED; // a value of size zero
}
