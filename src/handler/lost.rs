//! A SIGSEGV without an address, sent by the kernel (`SI_KERNEL`), has two causes that look alike:
//!
//! - The frame of another signal did not fit on the stack. That signal is lost, and the interrupted code has to continue.
//! - A general protection fault: the address is not canonical, or the instruction is privileged. The fault recurs at once with
//!   the same registers and must end the process.
//!
//! The exception number tells the two apart, except that a general protection fault which the program survived leaves its
//! number.

use core::sync::atomic::{AtomicUsize, Ordering};

use crate::context::Context;
use crate::report;
use crate::signals;
use crate::stack::arena::Slot;
use crate::stack::record::Record;
use crate::switch::{self, RED_ZONE};

/// The number of a page fault. The kernel's own signals leave the number as it is, and a page fault always has an address.
const PAGE_FAULT: usize = 14;
const GENERAL_PROTECTION: usize = 13;

/// Bytes that a signal frame may take, if the kernel does not say (before Linux 5.14).
const FRAME: usize = 16 << 10;

/// Place of the latest fault at which the previous handler wanted the process to end.
static LATEST: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

/// The place of a fault: `rip` and `rsp`.
pub(super) struct At([usize; 2]);

impl At {
    pub(super) fn of(context: &Context<'_>) -> Self {
        Self([context.rip(), context.rsp()])
    }

    /// Remembers the fault, so that its recurrence is recognised. A fault on another thread in between costs one more round.
    pub(super) fn remember(self) {
        for (word, value) in LATEST.iter().zip(self.0) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

/// True if this is a remembered fault that recurs, not a lost signal.
pub(super) fn comes_again(context: &Context<'_>) -> bool {
    let latest = LATEST.each_ref().map(|word| word.load(Ordering::Relaxed));
    context.exception() != PAGE_FAULT && latest == At::of(context).0
}

/// Resends the signal that was lost on the running coroutine's stack, to a handler that now has a stack of its own. False if it
/// is not certain that a signal was lost.
///
/// The data sent with the signal stays lost. If several signals are possible, a report names them and the process ends.
pub(super) fn send_again(context: &Context<'_>) -> bool {
    if context.exception() == GENERAL_PROTECTION || !may_have_lacked_room(context) {
        return false;
    }
    let could_come = |&(signal, _): &_| !signals::contains(context.mask(), signal);
    let mut candidates = signals::without_own_stack().filter(could_come);
    let Some((signal, handler)) = candidates.next() else { return false };
    if let Some((second, _)) = candidates.next() {
        let rest = candidates.map(|(signal, _)| signal);
        report::lost_signal([signal, second].into_iter().chain(rest));
    }
    // All signals are blocked in the handler, so this one arrives when the interrupted code continues.
    signals::give_own_stack(signal, handler) && signals::raise(signal)
}

/// True if a coroutine runs on its own stack with less room left than a signal frame may take.
fn may_have_lacked_room(context: &Context<'_>) -> bool {
    let Some((running, slot)) = switch::running().zip(Slot::containing(context.rsp())) else { return false };
    let record = running.record();
    if slot.end() != Record::end(record) {
        return false;
    }
    // SAFETY: the record of the running coroutine is accessible, and only this thread uses it.
    let lowest = slot.end() - unsafe { (*record).open };
    context.rsp().saturating_sub(lowest) < RED_ZONE + signals::frame_size().unwrap_or(FRAME)
}
