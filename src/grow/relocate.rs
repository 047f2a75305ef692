//! Moving the stack of an interrupted coroutine to a larger slot.
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
use crate::stack::{self, OLD, Record, Slot, cache, class::Class, class::open_bytes, guard};
use crate::stats::Growth;
use crate::switch::RED_ZONE;

/// Moves the stack that `context` was interrupted on to a slot of `size` bytes. After an error
/// nothing has changed.
///
/// # Safety
/// `fault` is at a growth point, in the coroutine that `context` interrupted, whose owner promised that
/// pointers into its stack are only in it and in registers.
pub(super) unsafe fn relocate(context: &mut Context<'_>, fault: &Fault, size: usize) -> Result<Done, Error> {
    let from = fault.slot;
    let record = Record::at(from.end());
    // SAFETY: the running coroutine's record is accessible, and only this thread uses it.
    let open = unsafe { (*record).open };
    let lowest = (context.rsp() - RED_ZONE).max(from.end() - open) & !7;

    let class = Class::moving(size);
    let (to, to_open) = cache::take_in_handler(class, open_bytes(size))?;
    let window = Window::new(from.start()..from.end(), to.end());

    // SAFETY: both ranges are accessible, the second is ours alone, and `lowest` is aligned to a word.
    let words = unsafe { copy(lowest, from.end(), window) };
    let new = Record::at(to.end());
    // SAFETY: the old slot's frames were copied, nothing in it is needed but the link below; the
    // new record was copied with them.
    unsafe {
        if let Err(error) = guard::close(from.end() - open, open) {
            to.give(to_open);
            return Err(error);
        }
        retire(from, to, &mut (*new).old);
        (*new).class = class;
        (*new).open = to_open;
        (*new).first_open = stack::first_open(size);
        // The handle is the resumer's, who waits in the switch.
        let handle = fault.handle;
        (*handle).base = window.moved((*handle).base as usize) as *mut _;
    }
    let general = context.general();
    let loop_end = fault.loop_end.map(|place| (place, window.shift(general[place])));
    let mut registers = window.rewrite(general);
    if let Some((place, end)) = loop_end {
        general[place] = end;
    }
    for stretch in context.vectors() {
        registers += window.rewrite(stretch);
    }
    Ok(Done { record: new, growth: Growth::Relocate, bytes: from.end() - lowest, words: words + registers })
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
fn retire(from: Slot, to: Slot, list: &mut stack::Link) {
    let meta = from.meta();
    meta.next.store(*list, Ordering::Relaxed);
    meta.moved_to.store(to.link(), Ordering::Relaxed);
    meta.flags.fetch_or(OLD, Ordering::Release);
    *list = from.link();
}
