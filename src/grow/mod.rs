//! Growth: what happens when a stack runs into its guard page.
//!
//! Of a stack that moves: it becomes larger. One that grows in place needs none of this before it is at its maximum: all of
//! its window is accessible, and the kernel gives it memory as it is touched. Then what happens is a report.
//!
//! Invariants, at every instruction of the interrupted program:
//! 1. A slot belongs to one coroutine, as its stack or as one of its old slots, or to nobody.
//! 2. `record.open` bytes below a live slot's end are accessible, and guards are below them (src/stack/pages.rs).
//! 3. Of an old slot nothing is accessible.
//! 4. A stack moves only at a growth point, and only if its owner allowed it.

mod alone;
mod context;
mod custody;
mod fault;
mod forks;
mod freeze;
mod in_place;
mod lost;
mod obey;
mod point;
mod reason;
mod relocate;
mod reserve;
mod rewrite;
mod scratch;
mod shrink;
mod state;
mod touched;

pub(crate) use context::{Context, NAMES};
pub(crate) use custody::Custody;
#[cfg(feature = "torture")]
pub(crate) use fault::{ON_FAULT, chain_to, is_growth_point, take_over};
pub(crate) use fault::{SIGNALS, install_handler};
pub(crate) use freeze::{Frozen, freeze, peek, tell, thaw};
pub use obey::Maps;
pub use reason::{NotMoved, Reason, not_moved};
pub(crate) use reason::{record_unknown_code, refuse_elsewhere};
pub use reserve::reserve;
pub use shrink::Shrink;
pub(crate) use shrink::{Watch, after_resume, before_resume, shrink};
pub(crate) use state::State;
pub(crate) use touched::{Told, Touched};
#[cfg(feature = "torture")]
pub(crate) use {context::PLACE, point::probe_loop_end};

use relocate::Failure;

use crate::error::Error;
use crate::report;
use crate::stack::{Record, Slot, cache, class, class::PAGE};
use crate::stats::{self, Growth, LastGrowth};
use crate::switch::{self, RED_ZONE, Running};

/// A fault that a larger stack will cure.
struct Fault {
    running: Running,
    slot: Slot,
    address: usize,
    /// The lowest address that will be used soon, as far as is known: at most `address`.
    lowest: usize,
    growth_point: bool,
    /// In a probe loop, which general register holds its end.
    loop_end: Option<usize>,
    /// Of a call, how many bytes it has.
    call_length: usize,
}

/// Why a stack could not grow.
pub(crate) enum Refusal {
    /// It would exceed the coroutine's maximum.
    Maximum,
    /// It may not move here, and the slack below it is used up.
    Slack,
    /// The kernel gave no memory.
    Kernel(Error),
}

/// Makes the stack larger, or reports that it cannot and aborts.
///
/// # Safety
/// `fault` is a fault of the running coroutine at the guard of its own stack, `context` the interrupted context.
unsafe fn grow(context: &mut Context<'_>, fault: &Fault) {
    let start = now();
    let record = Record::at(fault.slot.end());
    // SAFETY: the running coroutine's record is accessible, and only this thread uses it.
    let (growth, from) = unsafe { ((*record).growth, (*record).size()) };
    // SAFETY: by the caller's word.
    let outcome = unsafe {
        match growth {
            Growth::Relocate => move_up(context, fault),
            Growth::InPlace => Err(Refusal::Maximum),
        }
    };
    match outcome {
        Ok(done) => finish(done, from, start),
        Err(refusal) => report::overflow(record, fault.slot.end() - fault.lowest, &refusal, context),
    }
}

/// Counts a growth that has been made, from a stack of `from` bytes, since the time `start`.
fn finish(done: Done, from: usize, start: u64) {
    let Done { record, growth, bytes, words } = done;
    // SAFETY: where the record of the running coroutine is now, accessible and this thread's.
    let record = unsafe { &mut *record };
    let last = LastGrowth { from, to: record.size(), bytes, words, nanoseconds: now().wrapping_sub(start) };
    record.tidy = true;
    record.growths += 1;
    record.bytes_copied += bytes as u64;
    record.words_rewritten += words as u64;
    record.highest = record.highest.max(last.to);
    record.last = last;
    record.watch.start_over(record.shrinks != 0);
    if record.watch.policy() != Shrink::Off
        && let Some(running) = switch::running()
    {
        running.watch();
    }
    stats::count(growth, &last);
}

/// What a growth did, and where the record is now.
pub(crate) struct Done {
    pub record: *mut Record,
    growth: Growth,
    pub bytes: usize,
    pub words: usize,
}

/// Moves the stack to a slot that holds what is needed; opens its slack if it may not move now, or is not to yet.
///
/// # Safety
/// As for [`grow`].
unsafe fn move_up(context: &mut Context<'_>, fault: &Fault) -> Result<Done, Refusal> {
    let record = Record::at(fault.slot.end());
    let need = fault.slot.end() - fault.lowest.min(context.rsp() - RED_ZONE);
    // SAFETY: the running coroutine's record, as in `grow`; before an error nothing has changed, and who
    // asked for `Growth::Relocate` made the promise about pointers.
    unsafe {
        if let Some(open) = slack_first(&*record, need) {
            return open_to(record, open).map_err(Refusal::Kernel);
        }
        let blame = match may_move(&*record, fault) {
            Ok(()) => {
                let size = class::grown((*record).size(), need, (*record).maximum).ok_or(Refusal::Maximum)?;
                match relocate::relocate(context, fault, size) {
                    Ok(moved) => return Ok(moved),
                    Err(Failure::Frame(reason, frame)) => Blame { reason, frame, error: None },
                    Err(Failure::Kernel(error)) => {
                        Blame { reason: Reason::NoMemory, frame: context.rip(), error: Some(error) }
                    }
                }
            }
            Err(reason) => Blame { reason, frame: context.rip(), error: None },
        };
        reason::count(blame.reason);
        (*record).not_moved = Some(NotMoved { reason: blame.reason, frame: blame.frame });
        open_slack(fault).map_err(|refusal| blame.error.map_or(refusal, Refusal::Kernel))
    }
}

/// How many bytes to open of a stack that is not to move before its slack is used up; `None` if the slack does not hold what is
/// needed.
fn slack_first(record: &Record, need: usize) -> Option<usize> {
    let (size, maximum) = (record.size(), record.maximum);
    let in_window = |size| Some(class::open_bytes(size)).filter(|&open| open <= record.class.window());
    let sizes = [class::grown_in_slack(size, need, maximum), class::grown(size, need, maximum)];
    sizes.into_iter().flatten().find_map(in_window).filter(|_| record.slack_first)
}

/// Moves the stack that `context` was interrupted on to another slot of its size, as if it had overflowed there, at an
/// instruction whose bytes are those that `byte` returns. `None` if it cannot be moved.
///
/// # Safety
/// The coroutine that runs was interrupted, on its stack in `slot`; pointers into its stack are only in it and
/// in registers.
#[cfg(feature = "torture")]
pub(crate) unsafe fn move_here(
    context: &mut Context<'_>,
    running: Running,
    slot: Slot,
    byte: impl Fn(usize) -> u8 + Copy,
) -> Option<Done> {
    let (rip, rsp) = (context.rip(), context.rsp());
    let growth_point = is_growth_point(rip, byte);
    let number = if growth_point { point::probe_loop_end(byte) } else { None };
    let here = Fault {
        running,
        slot,
        address: rsp,
        lowest: rsp,
        growth_point: true, // or as good as one
        loop_end: number.map(|number| PLACE[number]),
        call_length: point::call_length(byte),
    };
    // SAFETY: the running coroutine's record, as in `grow`; by the caller's word.
    unsafe {
        let record = Record::at(slot.end());
        may_move(&*record, &here).ok()?;
        let done = relocate::relocate(context, &here, (*record).size().next_power_of_two()).ok()?;
        (*done.record).tidy = true;
        Some(done)
    }
}

/// What speaks against moving now, looking at the instruction and the coroutine only.
fn may_move(record: &Record, fault: &Fault) -> Result<(), Reason> {
    if !fault.growth_point {
        Err(Reason::NotAGrowthPoint)
    } else if record.is_pinned() {
        Err(Reason::Pinned)
    } else {
        Ok(())
    }
}

/// Why a stack does not move, and the frame that is the reason.
struct Blame {
    reason: Reason,
    frame: usize,
    error: Option<Error>,
}

/// Opens the pages down to the fault, in a slot whose stack may move, but not now.
///
/// # Safety
/// As for [`grow`].
unsafe fn open_slack(fault: &Fault) -> Result<Done, Refusal> {
    let open = fault.slot.end() - fault.address / PAGE * PAGE;
    // SAFETY: the running coroutine's record, as in `grow`.
    if class::size_of_open(open) > unsafe { (*Record::at(fault.slot.end())).maximum } {
        return Err(Refusal::Maximum);
    }
    if open > fault.slot.class().window() {
        return Err(Refusal::Slack);
    }
    // SAFETY: by the caller's word.
    unsafe { open_to(Record::at(fault.slot.end()), open) }.map_err(Refusal::Kernel)
}

/// # Safety
/// `record` is the running coroutine's; `open` bytes are within its slot's window, more than are open, and nothing below them
/// is needed.
unsafe fn open_to(record: *mut Record, open: usize) -> Result<Done, Error> {
    // SAFETY: the running coroutine's own slot. On its own stack this may have faulted, and made it larger already.
    unsafe { cache::resize(record, open.max((*record).open))? };
    Ok(Done { record, growth: Growth::InPlace, bytes: 0, words: 0 })
}

/// Nanoseconds of a clock that only runs forward; read without a system call.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
}
