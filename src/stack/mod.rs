//! Stacks: sizes, guard pages, arenas of slots, the head of a slot, each thread's stock of free ones.

mod arena;
pub(crate) mod cache;
pub(crate) mod carry;
pub(crate) mod class;
mod free_list;
pub(crate) mod guard;
pub(crate) mod own_memory;
pub(crate) mod pages;
mod record;

pub(crate) use arena::{OLD, Slot};
pub use arena::{Slots, slots};
pub(crate) use free_list::Link;
pub(crate) use record::{INLINE_CLOSURE, Record, SCOUT};

use core::sync::atomic::Ordering;

use crate::site;
use crate::stats::Growth;

/// Takes back everything a coroutine held that has ended: its slot, and those its stack has left.
///
/// # Safety
/// The coroutine of `record` has ended and nothing on its stack is needed any more.
#[inline(always)]
pub(crate) unsafe fn release(record: *mut Record) {
    // SAFETY: by the caller's word.
    unsafe {
        if (*record).tidy {
            tidy(record);
        }
        cache::put(record);
    }
}

/// Tells the site what the coroutine came to need.
///
/// # Safety
/// As for [`release`].
unsafe fn learn(record: *mut Record) {
    // SAFETY: by the caller's word; sites are statics.
    unsafe {
        let Some(site) = (*record).site.as_ref() else { return };
        if (*record).growth == Growth::InPlace {
            return; // it has told as soon as it knew: src/grow/shrink.rs
        }
        if (*record).growths != 0 {
            site.grew_to((*record).highest);
        } else if (*record).scout {
            site.scouted(site::used_by_scout(record));
        }
    }
}

/// # Safety
/// As for [`release`].
#[cold]
#[inline(never)]
unsafe fn tidy(record: *mut Record) {
    // SAFETY: by the caller's word.
    unsafe {
        drop((*record).name.take());
        learn(record);
        drop((*record).pins.take());
        give_back_old(core::mem::take(&mut (*record).old));
        // What was opened below the first size of a stack that moves is closed again: its memory goes back and the
        // next owner starts with what it asked for. If closing fails the slot is merely larger.
        if (*record).open > (*record).first_open {
            let _ = cache::resize(record, (*record).first_open);
        }
    }
}

/// Puts the slots of a list of old slots on the free lists. The first of the list is the last to be used again.
fn give_back_old(mut link: Link) {
    while let Some(slot) = Slot::from_link(link) {
        link = slot.meta().next.load(Ordering::Relaxed);
        slot.meta().flags.fetch_and(!OLD, Ordering::Release);
        slot.give(0);
    }
}

/// Gives the slots back that a stack has left, all but the `keep` it left last.
///
/// # Safety
/// `record` is the running coroutine's.
#[cfg(feature = "torture")]
pub(crate) unsafe fn give_back_oldest(record: *const Record, keep: usize) {
    // SAFETY: by the caller's word only this thread uses the record.
    let mut link = unsafe { (*record).old };
    for _ in 1..keep {
        let Some(slot) = Slot::from_link(link) else { return };
        link = slot.meta().next.load(Ordering::Relaxed);
    }
    if let Some(last_kept) = Slot::from_link(link) {
        give_back_old(last_kept.meta().next.swap(0, Ordering::Relaxed));
    }
}
