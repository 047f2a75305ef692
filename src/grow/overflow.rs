//! The growth of a stack that moves and ran into its guard page: it
//! moves to a larger slot, or opens its slack if it may not move.
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
use crate::not_moved::{NotMoved, Reason, Refusal};
use crate::report::{self, Fatal};
use crate::settings::Growth;
use crate::size::{self, PAGE};
use crate::stack::record::Record;
use crate::switch::RED_ZONE;

/// Makes the stack larger, or ends the process with a report.
///
/// # Safety
/// `fault` is a fault of the running coroutine at the guard of its own stack, `context` the interrupted context.
pub(crate) unsafe fn grow(context: &mut Context<'_>, fault: &Fault) {
    let running = fault.running;
    let begun = Begun::now(running);
    let outcome = match running.room().settings.growth {
        // SAFETY: the caller guarantees that this fault is the running coroutine's, at the guard of its own stack.
        Growth::Relocate => unsafe { make_room(context, fault) },
        Growth::InPlace => Err(Fatal::Maximum),
    };
    match outcome {
        Ok(done) => begun.finish(running, done),
        Err(why) => report::overflow(running.record(), fault.slot.end() - fault.lowest, &why, context),
    }
}

/// Moves the stack to a slot that is large enough. Opens its slack instead if it may not move now, or uses its slack first.
///
/// # Safety
/// As for [`grow`].
unsafe fn make_room(context: &mut Context<'_>, fault: &Fault) -> Result<Done, Fatal> {
    let need = fault.slot.end() - fault.lowest.min(context.rsp() - RED_ZONE);
    let room = fault.running.room();
    if let Some(open) = growth::slack_first(room, need) {
        return open_now(fault, open);
    }
    let mut refusal: Refusal = match fault.running.with_record(|record| may_move(record, fault)) {
        Err(reason) => NotMoved::at(reason, context.rip()).into(),
        Ok(()) => {
            let larger = size::grown(room.size(), need, room.settings.maximum());
            // SAFETY: the fault is at a growth point, and the promise about pointers was made with `Growth::Relocate`.
            match unsafe { relocate::relocate(context, fault, larger.ok_or(Fatal::Maximum)?) } {
                Ok(done) => return Ok(done),
                Err(refusal) => refusal,
            }
        }
    };
    if refusal.error.is_some() {
        refusal.why.frame = context.rip(); // no other frame was the reason
    }
    // The stack has not moved.
    fault.running.with_record(|record| record.note(refusal.why));
    open_slack(fault).map_err(|fatal| refusal.error.map_or(fatal, Fatal::Kernel))
}

/// Checks whether the instruction and the coroutine allow a move now.
pub(crate) fn may_move(record: &Record, fault: &Fault) -> Result<(), Reason> {
    if !fault.growth_point {
        Err(Reason::NotAGrowthPoint)
    } else if record.is_pinned() {
        Err(Reason::Pinned)
    } else {
        Ok(())
    }
}

/// Opens the pages down to the fault, in the slot of a stack that may not move now.
fn open_slack(fault: &Fault) -> Result<Done, Fatal> {
    let open = fault.slot.end() - fault.address / PAGE * PAGE;
    if size::size_of_open(open) > fault.running.room().settings.maximum() {
        return Err(Fatal::Maximum);
    }
    if open > fault.slot.class().window() {
        return Err(Fatal::Slack);
    }
    open_now(fault, open)
}

fn open_now(fault: &Fault, open: usize) -> Result<Done, Fatal> {
    // SAFETY: so many bytes are within the window of the running coroutine's slot, and nothing below its open pages is in use.
    unsafe { growth::open(fault.running, open) }.map_err(Fatal::Kernel)
}
