//! A stack that moves has run into its guard page: it moves to a larger slot, or, where it may not, opens its slack.
//!
//! ```text
//!   slack first, and it holds what is needed? ─ yes ─► open it
//!     │ no
//!   may it move? ── yes ─► moved (src/grow/relocate.rs)
//!     │ no                    │ refused
//!   note why  ◄───────────────┘
//!     │
//!   slack left? ── yes ─► open the pages down to the fault
//!     │ no
//!   the process ends with a report
//! ```

use super::growth::{self, Begun, Done};
use super::relocate::{self, Fault};
use crate::context::Context;
use crate::not_moved::{NotMoved, Reason};
use crate::report::{self, Fatal};
use crate::settings::Growth;
use crate::size::{self, PAGE};
use crate::stack::record::Record;
use crate::switch::RED_ZONE;

/// Makes the stack larger, or reports that it cannot and aborts.
///
/// # Safety
/// `fault` is a fault of the running coroutine at the guard of its own stack, `context` the interrupted context.
pub(crate) unsafe fn grow(context: &mut Context<'_>, fault: &Fault) {
    let record = Record::at(fault.slot.end());
    // SAFETY: the running coroutine's record is accessible, and only this thread uses it.
    let (growth, begun) = unsafe { ((*record).settings.growth, Begun::now(&*record)) };
    let outcome = match growth {
        // SAFETY: the caller says what kind of fault it is and of whom.
        Growth::Relocate => unsafe { make_room(context, fault) },
        Growth::InPlace => Err(Fatal::Maximum),
    };
    match outcome {
        Ok(done) => begun.finish(done),
        Err(why) => report::overflow(record, fault.slot.end() - fault.lowest, &why, context),
    }
}

/// Moves the stack to a slot that holds what is needed; opens its slack if it may not move now, or is not to yet.
///
/// # Safety
/// As for [`grow`].
unsafe fn make_room(context: &mut Context<'_>, fault: &Fault) -> Result<Done, Fatal> {
    let record = Record::at(fault.slot.end());
    let need = fault.slot.end() - fault.lowest.min(context.rsp() - RED_ZONE);
    // SAFETY: the running coroutine's record, which only this thread uses.
    if let Some(open) = growth::slack_first(unsafe { &*record }, need) {
        // SAFETY: so many bytes are within the slot's window, and nothing below its open pages is in use.
        return unsafe { growth::open(record, open) }.map_err(Fatal::Kernel);
    }
    // SAFETY: the same record.
    let (size, maximum) = unsafe { ((*record).size(), (*record).settings.maximum()) };
    // SAFETY: the same record.
    let refusal = match may_move(unsafe { &*record }, fault) {
        Ok(()) => {
            let size = size::grown(size, need, maximum).ok_or(Fatal::Maximum)?;
            // SAFETY: the fault is at a growth point, and whoever asked for `Growth::Relocate` made the promise about
            // pointers.
            match unsafe { relocate::relocate(context, fault, size) } {
                Ok(done) => return Ok(done),
                Err(refusal) => refusal,
            }
        }
        Err(reason) => NotMoved::at(reason, context.rip()).into(),
    };
    // SAFETY: the same record: a stack that was refused is where it was.
    unsafe { (*record).note(refusal.why) };
    // SAFETY: the caller says whose fault it is.
    unsafe { open_slack(fault) }.map_err(|fatal| refusal.error.map_or(fatal, Fatal::Kernel))
}

/// What speaks against moving now, looking at the instruction and the coroutine only.
pub(crate) fn may_move(record: &Record, fault: &Fault) -> Result<(), Reason> {
    if !fault.growth_point {
        Err(Reason::NotAGrowthPoint)
    } else if record.is_pinned() {
        Err(Reason::Pinned)
    } else {
        Ok(())
    }
}

/// Opens the pages down to the fault, in a slot whose stack may move, but not now.
///
/// # Safety
/// As for [`grow`].
unsafe fn open_slack(fault: &Fault) -> Result<Done, Fatal> {
    let record = Record::at(fault.slot.end());
    let open = fault.slot.end() - fault.address / PAGE * PAGE;
    // SAFETY: the running coroutine's record, which only this thread uses.
    if size::size_of_open(open) > unsafe { (*record).settings.maximum() } {
        return Err(Fatal::Maximum);
    }
    if open > fault.slot.class().window() {
        return Err(Fatal::Slack);
    }
    // SAFETY: the bytes are within the slot's window, and nothing below the fault is in use.
    unsafe { growth::open(record, open) }.map_err(Fatal::Kernel)
}
