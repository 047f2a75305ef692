//! Freezing a stack that moves: its slot is given to others.
//!
//! Its frames are walked and judged once, when it is frozen. Words that point into the stack are moved to [`NOWHERE`],
//! a range of addresses that no processor has. Thawing, into any free slot, is then a scan for such words.
//!
//! A stale pointer into a frozen stack is not caught, because its slot
//! belongs to another stack. That is the price of giving the slot away.

use core::ptr::{self, NonNull};
use core::slice;
use core::sync::atomic::Ordering;

use super::block::{Frozen, WORD};
use crate::error::Error;
use crate::grow::obey::{self, Copied};
use crate::grow::relocate::registers_and_places;
use crate::grow::rewrite::Window;
use crate::grow::shrink;
use crate::map;
use crate::not_moved::{self, NotMoved, Reason};
use crate::size::{Class, open_bytes};
use crate::stack::arena::Slot;
use crate::stack::free_list::Link;
use crate::stack::guard;
use crate::stack::record::Record;
use crate::stack::stock::{self, Prepare};
use crate::stack::suspended::Suspended;
use crate::switch::{self, Base, Handle, SAVED};

/// The end of the window that pointers into frozen stacks are moved to. It is not canonical, so nothing has such an address.
const NOWHERE: usize = 0x5245_4752_0000_0000;

/// Puts a suspended coroutine into a block, and gives its slot to others. `false`
/// if it must stay as it is: it is pinned, or has a frame that cannot be moved.
pub(super) fn freeze(suspended: &mut Suspended<'_>) -> Result<bool, Error> {
    if suspended.record().is_pinned() {
        let frame = suspended.registers().pc();
        suspended.record_mut().note(NotMoved::at(Reason::Pinned, frame));
        return Ok(false);
    }
    let count = (suspended.base() as usize - (suspended.sp() - SAVED)) / WORD + 1;
    let block = Frozen::allocate(count)?;
    let judged = match copy_to_nowhere(suspended, block, count) {
        Err(why) if not_moved::knows_more(why.reason) => copy_to_nowhere(suspended, block, count),
        judged => judged,
    };
    if let Err(why) = judged {
        // SAFETY: the block was allocated above for so many words, and no other code knows it.
        unsafe { Frozen::deallocate(block, count) };
        suspended.record_mut().note(why);
        return Ok(false);
    }
    let record = suspended.record_mut();
    // Code that follows an old slot to the stack now finds that there is none.
    point_old_slots(record, 0);
    // SAFETY: the block now has all that the slot holds of the coroutine, so nothing in the slot is needed.
    unsafe {
        block.write(Frozen::of(record, count));
        if record.open > record.class.first_open() {
            let _ = stock::resize(record, record.class.first_open()); // if this fails, the slot just stays larger
        }
        stock::put(record);
    }
    guard::owe();
    *suspended.handle() = Handle { sp: block.as_ptr() as usize | switch::FROZEN, base: ptr::null_mut() };
    Ok(true)
}

/// Copies a stack into the words of a block, with pointers into it moved to [`NOWHERE`]. After an error the words are
/// invalid. The block was allocated for `count` words: from those that the suspend saved up to the first of the base.
fn copy_to_nowhere(suspended: &Suspended<'_>, block: NonNull<Frozen>, count: usize) -> Result<(), NotMoved> {
    let lowest = suspended.sp() - SAVED;
    let (start, parked) = registers_and_places(suspended);
    // SAFETY: the stack is suspended, so its words are accessible and do not change. No other code uses the block yet.
    let (old, new) = unsafe {
        let words = Frozen::words_of(block);
        ptr::copy_nonoverlapping(lowest as *const usize, words, count);
        (slice::from_raw_parts(lowest as *const usize, count), slice::from_raw_parts_mut(words, count))
    };
    let copied = Copied { lowest, old, new, window: Window::new(lowest..suspended.end(), NOWHERE), parked };
    obey::rewrite(&map::process().read(), &start, suspended.record().settings.maps, copied).map(drop)
}

/// Brings a coroutine back from its block onto a stack. After an error it is still frozen.
///
/// # Safety
/// The handle is that of a coroutine that is frozen in this block, which was made by [`freeze`].
pub(super) unsafe fn thaw(
    handle: &mut Handle,
    block: NonNull<Frozen>,
    prepare: Prepare,
) -> Result<(), Error> {
    // SAFETY: the block belongs to the coroutine alone.
    let frozen = unsafe { block.as_ref() };
    let (settings, count, used) = (frozen.settings(), frozen.words(), frozen.used());
    let size = shrink::fitting(used + used / 2, settings.first_size()).min(settings.maximum());
    let record = stock::take_again(Class::moving(size), open_bytes(size), prepare)?;
    guard::paid();
    let end = Record::end(record);
    let base = end - frozen.base_offset();
    let lowest = base + WORD - count * WORD;
    // SAFETY: the slot was taken for so many bytes, and is empty. The old contents of its record need no drop.
    unsafe {
        ptr::copy_nonoverlapping(Frozen::words_of(block), lowest as *mut usize, count);
        let window = Window::new(NOWHERE - (end - lowest)..NOWHERE, end);
        window.rewrite(slice::from_raw_parts_mut(lowest as *mut usize, count));

        let (open, class) = ((*record).open, (*record).class);
        frozen.restore_record(record, size);
        (*record).open = open;
        (*record).class = class;
        let base = base as *mut Base;
        switch::restore_base(base, record.cast());
        point_old_slots(&*record, Record::slot(record).map_or(0, Slot::link));
        *handle = Handle { sp: lowest + SAVED, base };
        Frozen::free(block);
    }
    Ok(())
}

/// Tells a stack's old slots where it is now; 0: nowhere.
fn point_old_slots(record: &Record, to: Link) {
    if let Some(newest) = Slot::from_link(record.old) {
        newest.meta().moved_to.store(to, Ordering::Release);
    }
}
