//! SIGSEGV without an address, of the kernel's making (`SI_KERNEL`). It has two causes, which look alike:
//!
//! - The frame of another signal did not fit on the stack. That signal is lost, and the interrupted code is to go on.
//! - A general protection fault: an address that is not canonical, an instruction of the kernel's. It comes again at once,
//!   with the same registers, and must end the process.
//!
//! The number of the exception tells them apart, but for one thing: after a general protection fault that a program has
//! survived it stays what it was.

use core::sync::atomic::{AtomicUsize, Ordering};

use crate::context::Context;
use crate::report;
use crate::signals;
use crate::stack::arena::Slot;
use crate::stack::record::Record;
use crate::switch::{self, RED_ZONE};

/// The number of a page fault: the kernel's own signals leave it, and no page fault is without an address.
const PAGE_FAULT: usize = 14;
const GENERAL_PROTECTION: usize = 13;

/// What a signal frame may take where the kernel does not say, before Linux 5.14.
const FRAME: usize = 16 << 10;

/// Where the latest fault was that the previous handler wanted the process to end at.
static LATEST: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

/// Where a fault was: `rip` and `rsp`.
pub(super) struct At([usize; 2]);

impl At {
    pub(super) fn of(context: &Context<'_>) -> Self {
        Self([context.rip(), context.rsp()])
    }

    /// So that it is known when it comes again. Another thread's in between costs one more round.
    pub(super) fn remember(self) {
        for (word, value) in LATEST.iter().zip(self.0) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

/// True if this is no lost signal, but a fault that was remembered and has come again.
pub(super) fn comes_again(context: &Context<'_>) -> bool {
    let latest = LATEST.each_ref().map(|word| word.load(Ordering::Relaxed));
    context.exception() != PAGE_FAULT && latest == At::of(context).0
}

/// Sends the signal that was lost on the running coroutine's stack again, to a handler that has a stack of its own now.
/// False if it is not known that one was lost.
///
/// What was sent along with it is lost, all the same. If several can have been it, a report says which.
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
    // Every signal is blocked in the handler. This one comes when the interrupted code goes on.
    signals::give_own_stack(signal, handler) && signals::raise(signal)
}

/// True if a coroutine runs, on its own stack, with less room left than a signal frame may take.
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
