//! Moving the stack of an interrupted coroutine to a larger slot, or of a suspended one to any other.
//!
//! ```text
//!            old slot                              new slot, twice the size or more
//!   end   ┌────────────┐                     end  ┌────────────┐
//!         │ head       │ ─── copied ──────────►   │ head       │  every distance from the end stays
//!         │ frames     │ ─── copied, and words ─► │ frames     │
//!         │ red zone   │     in the window        │ red zone   │
//!         ├────────────┤     rewritten            │            │
//!         │ slack      │                          │  room      │
//!         │ guard      │                          ├────────────┤
//!         └────────────┘                          │ slack ...  │
//! ```
//!
//! Then the registers of the interrupted context, the vector registers among them, and the handle.
//! The old slot becomes inaccessible at once and stays so until the coroutine has ended: a pointer to it
//! that was kept where none of this looks is a fault at its first use, not silent corruption.

use core::ptr;
use core::slice;
use core::sync::atomic::Ordering;

use super::context::Context;
use super::rewrite::Window;
use super::{Done, Fault};
use crate::error::Error;
use crate::stack::{Link, OLD, Record, Slot, cache, class::Class, class::open_bytes, guard};
use crate::stats::Growth;
use crate::switch::{Handle, RED_ZONE};

/// A stack that has been moved, but for the registers.
pub(super) struct Moved {
    pub window: Window,
    /// Where the record is now.
    pub record: *mut Record,
    pub bytes: usize,
    pub words: usize,
}

/// Moves the stack that `context` was interrupted on to a slot of `size` bytes. After an error
/// nothing has changed.
///
/// # Safety
/// `fault` is at a growth point, in the coroutine that `context` interrupted, whose owner promised that
/// pointers into its stack are only in it and in registers.
pub(super) unsafe fn relocate(context: &mut Context<'_>, fault: &Fault, size: usize) -> Result<Done, Error> {
    // SAFETY: by the caller's word; the stack is used down to the red zone below rsp. The handle is the
    // resumer's, who waits in the switch.
    let moved = unsafe {
        let moved = transfer(fault.slot, context.rsp() - RED_ZONE, size)?;
        moved.correct_base(fault.handle);
        moved
    };
    let window = moved.window;
    let general = context.general();
    let loop_end = fault.loop_end.map(|place| (place, window.shift(general[place])));
    let mut registers = window.rewrite(general);
    if let Some((place, end)) = loop_end {
        general[place] = end;
    }
    for stretch in context.vectors() {
        registers += window.rewrite(stretch);
    }
    let Moved { record, bytes, words, .. } = moved;
    Ok(Done { record, growth: Growth::Relocate, bytes, words: words + registers })
}

/// Moves the stack of a coroutine that does not run to a slot of `size` bytes, which is enough for what is
/// used of it. After an error nothing has changed.
///
/// # Safety
/// The coroutine of `handle` is suspended, or has put itself into the same state, and its owner made the promise
/// about pointers.
pub(super) unsafe fn relocate_suspended(handle: *mut Handle, size: usize) -> Result<Moved, Error> {
    // SAFETY: by the caller's word; what a suspend saves lies in the red zone below its stack pointer.
    unsafe {
        let slot = Record::slot((*(*handle).base).record).ok_or(Error::Arenas)?;
        let moved = transfer(slot, (*handle).sp - RED_ZONE, size)?;
        moved.correct_base(handle);
        (*handle).sp = moved.window.moved((*handle).sp);
        Ok(moved)
    }
}

impl Moved {
    /// # Safety
    /// `handle` is that of the coroutine whose stack was moved.
    unsafe fn correct_base(&self, handle: *mut Handle) {
        // SAFETY: by the caller's word.
        unsafe { (*handle).base = self.window.moved((*handle).base as usize) as *mut _ };
    }
}

/// Moves the stack in slot `from`, of which the bytes from `lowest` on are used, to a slot of `size` bytes. After an
/// error nothing has changed.
///
/// # Safety
/// The slot holds the stack of a coroutine whose owner made the promise about pointers, and who does not run but in the
/// caller, on another stack.
unsafe fn transfer(from: Slot, lowest: usize, size: usize) -> Result<Moved, Error> {
    let record = Record::at(from.end());
    // SAFETY: a coroutine's record is accessible, and only its thread uses it.
    let open = unsafe { (*record).open };
    let lowest = lowest.max(from.end() - open) & !7;
    // SAFETY: the list of old slots is this coroutine's.
    let (to, to_open) = unsafe { destination(&mut (*record).old, Class::moving(size), open_bytes(size))? };
    let window = Window::new(from.start()..from.end(), to.end());

    // SAFETY: both ranges are accessible, the second is ours alone, and `lowest` is aligned to a word.
    let words = unsafe { copy(lowest, from.end(), window) };
    let new = Record::at(to.end());
    // SAFETY: the old slot's frames were copied, nothing in it is needed but the record after an error; the
    // new record was copied with them.
    unsafe {
        if let Err(error) = guard::close(from.end() - open, open) {
            // Given up, not put back on the list of old slots: those that point on to it point to its end.
            to.give(to_open);
            return Err(error);
        }
        retire(from, to, &mut (*new).old);
        (*new).class = to.class();
        (*new).open = to_open;
        (*new).first_open = open_bytes(size);
    }
    Ok(Moved { window, record: new, bytes: from.end() - lowest, words })
}

/// A slot to move to: one that this stack has been in before, so that pointers which were missed then are right
/// again and a stack that grows and shrinks leaves no trail of slots; else any free one.
///
/// # Safety
/// `old` is the list of the coroutine's old slots.
unsafe fn destination(old: &mut Link, class: Class, open: usize) -> Result<(Slot, usize), Error> {
    let mut previous: Option<Slot> = None;
    let mut link = *old;
    while let Some(slot) = Slot::from_link(link) {
        link = slot.meta().next.load(Ordering::Relaxed);
        if slot.class() == class {
            // SAFETY: an old slot of this coroutine, of which nothing is accessible.
            unsafe { guard::open(slot.end() - open, open)? };
            slot.meta().flags.fetch_and(!OLD, Ordering::Release);
            match previous {
                Some(previous) => previous.meta().next.store(link, Ordering::Relaxed),
                None => *old = link,
            }
            return Ok((slot, open));
        }
        previous = Some(slot);
    }
    cache::take_in_handler(class, open)
}

/// Copies `[lowest, end)` to where `window` moves it, and rewrites the frames, not the record.
///
/// # Safety
/// Source and target are accessible and do not overlap; `lowest` is word-aligned.
unsafe fn copy(lowest: usize, end: usize, window: Window) -> usize {
    let target = window.moved(lowest);
    // SAFETY: by the caller's word. The base and all frames lie below the record.
    unsafe {
        ptr::copy_nonoverlapping(lowest as *const u8, target as *mut u8, end - lowest);
        let frames = (Record::at(end) as usize - lowest) / size_of::<usize>();
        window.rewrite(slice::from_raw_parts_mut(target as *mut usize, frames))
    }
}

/// Marks a slot as left, and puts it on the coroutine's list of such.
fn retire(from: Slot, to: Slot, list: &mut Link) {
    let meta = from.meta();
    meta.next.store(*list, Ordering::Relaxed);
    meta.moved_to.store(to.link(), Ordering::Relaxed);
    meta.flags.fetch_or(OLD, Ordering::Release);
    *list = from.link();
}
