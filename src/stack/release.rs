//! The end of a coroutine's stack: everything it held goes back.

use core::sync::atomic::Ordering;

use super::arena::{OLD, Slot};
use super::free_list::Link;
use super::record::Record;
use super::{scouts, stock};

/// Takes back the slot of a finished coroutine and the slots its stack has left.
///
/// # Safety
/// The coroutine of `record` has ended, and nothing on its stack is needed any more.
#[inline(always)]
pub(crate) unsafe fn release(record: *mut Record) {
    // SAFETY: the coroutine has ended, so its slot and record are accessible, the caller's, and no longer needed.
    unsafe {
        if (*record).tidy {
            tidy(record);
        }
        stock::put(record);
    }
}

/// # Safety
/// As for [`release`].
#[cold]
#[inline(never)]
unsafe fn tidy(record: *mut Record) {
    // SAFETY: the coroutine has ended, so no other code uses its record, and nothing below its first size is needed.
    unsafe {
        drop((*record).name.take());
        scouts::learn(&*record);
        drop((*record).pins.take());
        give_back_old(core::mem::take(&mut (*record).old));
        // The part of a moving stack below its first size is closed again. Its memory goes back, and the next owner gets
        // the requested size. If closing fails, the slot is merely larger.
        if (*record).open > (*record).class.first_open() {
            let _ = stock::resize(record, (*record).class.first_open());
        }
    }
}

/// Puts a list of old slots on the free lists. The first of the list is reused last.
pub(crate) fn give_back_old(mut link: Link) {
    while let Some(slot) = Slot::from_link(link) {
        link = slot.meta().next.load(Ordering::Relaxed);
        slot.meta().flags.fetch_and(!OLD, Ordering::Release);
        slot.give(0);
    }
}
