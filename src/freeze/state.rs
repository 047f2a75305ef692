//! The state of a coroutine. The two words of its handle are decoded only here.
//!
//! | `sp` | `base` | state |
//! | --- | --- | --- |
//! | [`ENDED`](switch::ENDED) | | ended |
//! | block + [`FROZEN`](switch::FROZEN) | null | frozen elsewhere: in a block, without a slot |
//! | address + `FROZEN` | its base | frozen here; suspended, if it was touched since |
//! | address | its base, from which this thread has entered a coroutine that waits or runs | running |
//! | address in its slot | its base | suspended |
//! | another address | its base | elsewhere: suspended, on a stack that is not its own |
//!
//! [`WATCHED`](switch::WATCHED) is not a state. It says which way
//! the next resume takes, and may be added to each of the last four.

use core::ptr::NonNull;

use super::block::Frozen;
use crate::stack::arena::Slot;
use crate::stack::record::Record;
use crate::switch::{self, Base, Handle, Running};

/// The state of a coroutine.
#[derive(Clone, Copy)]
pub(crate) enum State {
    /// It has returned or panicked. Its stack may belong to another coroutine.
    Ended,
    /// It is in this block, without a slot.
    FrozenElsewhere(NonNull<Frozen>),
    /// It is in its slot, which is guarded. It may thaw at any moment.
    FrozenHere,
    /// It runs on this thread, or waits for a coroutine that it has resumed. The handle says where it was before.
    ///
    /// The resume borrows the handle meanwhile. Only the destructor of a
    /// thread-local that owns it sees this state, when `exit` runs that destructor.
    Running(Running),
    /// Its stack pointer is this one, in its own slot.
    Suspended(usize),
    /// Its stack pointer is this one, on another stack: its code has switched to that stack and suspended there.
    Elsewhere(usize),
}

impl State {
    /// Decodes a handle. Takes one step for each coroutine that runs or waits on this thread.
    pub(crate) fn of(handle: &Handle) -> Self {
        if handle.has_ended() {
            return Self::Ended;
        }
        let sp = handle.sp & !(switch::WATCHED | switch::FROZEN);
        if handle.sp & switch::FROZEN != 0 {
            if handle.base.is_null() {
                return NonNull::new(sp as *mut Frozen).map_or(Self::Ended, Self::FrozenElsewhere);
            }
            if is_frozen_in_place(handle.base) {
                return Self::FrozenHere;
            }
        }
        if let Some(running) = running(handle.base) {
            return Self::Running(running);
        }
        // SAFETY: the coroutine has not ended, is not frozen and does not run here, so base and record are where the handle says.
        let own = unsafe { Record::holds((*handle.base).record(), sp) };
        if own { Self::Suspended(sp) } else { Self::Elsewhere(sp) }
    }

    /// True if it is in a block.
    pub(crate) fn is_frozen(self) -> bool {
        matches!(self, Self::FrozenElsewhere(_) | Self::FrozenHere)
    }
}

/// True if the stack with this base is frozen in place. Waits while it is being thawed.
fn is_frozen_in_place(base: *const Base) -> bool {
    Slot::containing(base as usize).is_some_and(|slot| slot.meta().frozen.is_frozen())
}

/// The coroutine of this thread that runs, or waits for one that it has resumed, and had this
/// base when it was resumed. If its stack has moved since, this base is in one of its old slots.
fn running(base: *mut Base) -> Option<Running> {
    let innermost = switch::running()?;
    let slot = Slot::containing(base as usize)?.current();
    let lives_there = |running: &Running| slot.holds(running.base() as usize);
    core::iter::successors(Some(innermost), |running| running.resumed_by()).find(lives_there)
}
