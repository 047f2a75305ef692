//! Shrinking: a stack that has more than its coroutine needs gives it back.
//!
//! A stack that moves goes to a smaller size. One that stays gives back the memory of all pages below its stack pointer, by
//! one call; they are zeros when it touches them again.
//!
//! Only watched coroutines are looked at, and nothing on the way of a switch asks which those are: a marked handle takes the
//! slow way through the next [`before_resume`]. Which are watched:
//!
//! - a stack that moves, from when it has grown: the fault handler changes where the next suspend lands, from the resume
//!   that waits to `regrow_watch` (asm/switch.S), which marks the handle and goes on to the resume;
//! - a stack that stays, from the start, if its policy is [`Shrink::Eager`], or if its spawn site knows of spikes (src/site.rs).
//!
//! How deep a coroutine goes between two suspends is not visible at them. So a line of marks is laid: frames that pass
//! it write over it.
//!
//! ```text
//!   base ┌──────────┐
//!        │ used     │
//!   sp   ├──────────┤
//!        │          │
//!  mark  ├──────────┤ overwritten if the stack was used further down. If it moves: a quarter of the size below the base.
//!        │          │ If it stays: at the bottom of the page that the stack pointer is in
//!        │          │
//!        └──────────┘
//! ```
//!
//! A stack that moves becomes smaller when its mark has outlasted [`PATIENCE`] resumes; one that stays gives memory back when
//! a mark was overwritten and the next one has outlasted so many. If it grows again after that, its patience
//! doubles: a coroutine that always comes back is left alone soon.

use super::relocate;
use crate::error::Error;
use crate::not_moved::{NotMoved, Reason, Refusal};
use crate::settings::{Growth, Shrink};
use crate::site::Site;
use crate::size::{self, PAGE};
use crate::stack::pages::{Pages, resident};
use crate::stack::record::Record;
use crate::stack::stock;
use crate::stats;
use crate::switch::{self, Handle, RED_ZONE};
use crate::trace::{self, Event, Name};

/// After how many resumes without a spike a scout is one no more: each takes a few times as long as another's.
const SCOUTED: u16 = 256;

/// One cache line of it is the mark: a pattern that code does not leave on a stack.
const MARK: [u64; 8] = [u64::from_le_bytes(*b"unused\xf5\xf5"); 8];
const MARK_BYTES: usize = size_of_val(&MARK);

/// Readies a coroutine with a marked handle for its resume: looks whether its stack should be smaller.
///
/// # Safety
/// The handle is that of a suspended coroutine, marked.
pub(crate) unsafe fn before_resume(handle: &mut Handle) {
    handle.sp &= !switch::WATCHED;
    // SAFETY: a suspended coroutine's base and record are accessible, and nobody else uses them.
    unsafe {
        let record = (*handle.base).record();
        if !Record::holds(record, handle.sp) {
            return; // suspended on another stack: it does not show how much of its own is in use
        }
        if (*record).settings.growth == Growth::Relocate {
            if is_quiet(handle, &mut *record) {
                // It moves, and its record with it. Without memory it stays as large as it is.
                let _ = shrink(handle);
            }
        } else if is_quiet_in_place(handle, &mut *record) && shrink(handle).is_ok_and(|smaller| smaller) {
            tell_site(&*record);
        }
    }
}

/// Marks the handle again if there is still something to watch.
///
/// # Safety
/// The handle is that of a suspended coroutine.
pub(crate) unsafe fn after_resume(handle: &mut Handle) {
    // SAFETY: a suspended coroutine's base and record are accessible, and nobody else uses them.
    let record = unsafe { &*(*handle.base).record() };
    let watched = match record.settings.growth {
        Growth::Relocate => {
            record.size() > record.settings.first_size() && record.settings.shrink != Shrink::Off
        }
        Growth::InPlace => is_watched_in_place(record),
    };
    if watched {
        handle.sp |= switch::WATCHED;
    }
}

/// True if the coroutine, whose stack stays, is watched.
fn is_watched_in_place(record: &Record) -> bool {
    let is_spiky = || record.site.is_some_and(Site::is_spiky);
    match record.settings.shrink {
        Shrink::Off => false,
        Shrink::Eager => true,
        Shrink::Default => record.scout || is_spiky(),
    }
}

/// Says that coroutines made where this one was have spikes.
fn tell_site(record: &Record) {
    if let Some(site) = record.site
        && record.scout
    {
        site.had_spike();
    }
}

/// True if the mark has been in place for long enough. Puts it there if it is not.
///
/// # Safety
/// As for [`before_resume`], the handle not marked any more.
unsafe fn is_quiet(handle: &Handle, record: &mut Record) -> bool {
    let mark = (handle.base as usize - record.size() / 4) & !(MARK_BYTES - 1);
    if mark + MARK_BYTES > handle.sp - RED_ZONE {
        record.watch.marked = false; // more than a quarter is in use right now
        record.watch.quiet = 0;
        return false;
    }
    // SAFETY: below what a suspended coroutine uses of its stack, and accessible: a quarter of the size below the base.
    if unsafe { lay_mark(mark) } && record.watch.marked {
        record.watch.quiet += 1;
        return record.watch.quiet >= record.watch.patience;
    }
    record.watch.marked = true;
    record.watch.quiet = 0;
    false
}

/// The same for a stack that stays: true if it has been used below the page of its stack pointer, and then not for long enough.
///
/// # Safety
/// As for [`is_quiet`].
unsafe fn is_quiet_in_place(handle: &Handle, record: &mut Record) -> bool {
    // Where the page has no room for the mark the next one has.
    let mark = (handle.sp - RED_ZONE - MARK_BYTES) / PAGE * PAGE;
    if mark < Record::end(record) - record.open {
        return false; // the lowest page there is
    }
    // SAFETY: below what a suspended coroutine uses of its stack, and in its window, all of which is accessible.
    let intact = unsafe { lay_mark(mark) };
    let watch = &mut record.watch;
    if intact && watch.marked {
        watch.quiet = watch.quiet.saturating_add(1);
        if watch.quiet >= SCOUTED && !watch.spike {
            record.scout = false;
        }
        return watch.spike && watch.quiet >= watch.patience;
    }
    if watch.marked && !watch.spike {
        watch.spike = true;
        watch.start_over(record.settings.shrink, record.shrinks != 0);
    }
    watch.marked = true;
    watch.quiet = 0;
    false
}

/// True if the mark is at this address. It is there afterwards.
///
/// # Safety
/// The address, a multiple of the mark's size, is accessible, and nothing there is needed.
unsafe fn lay_mark(at: usize) -> bool {
    let place = at as *mut [u64; 8];
    // SAFETY: the place is aligned, accessible, and may be written over.
    unsafe {
        let intact = place.read() == MARK;
        if !intact {
            place.write(MARK);
        }
        intact
    }
}

/// Makes the stack of a suspended coroutine as small as it can be with as much room as is used, and no smaller than it
/// was at first. True if it became smaller. After an error nothing has changed.
///
/// # Safety
/// The handle is that of a coroutine suspended on its own stack, not marked.
pub(crate) unsafe fn shrink(handle: &mut Handle) -> Result<bool, Error> {
    // SAFETY: a suspended coroutine's base and record are accessible, and nobody else uses them.
    unsafe {
        let record = (*handle.base).record();
        (*record).watch.marked = false;
        (*record).watch.quiet = 0;
        let outcome = match (*record).settings.growth {
            Growth::InPlace => Ok(give_back_unused(handle, &mut *record)),
            Growth::Relocate => shrink_moving(handle, record),
        };
        if matches!(outcome, Ok(true)) {
            // It may have moved.
            let now = &mut *(*handle.base).record();
            now.shrinks += 1;
            stats::count_shrink();
            if trace::is_on() {
                let before = Name { end: Record::end(record), ..now.called() };
                trace::tell(&before, &Event::Shrunk { to: now.stats().size, now: Record::end(now) });
            }
        }
        outcome
    }
}

/// Gives back the memory of all pages below what a stack that stays uses. False if there was none.
///
/// # Safety
/// As for [`shrink`]; `record` is its record.
unsafe fn give_back_unused(handle: &Handle, record: &mut Record) -> bool {
    let end = Record::end(record);
    let used = end - (handle.sp - RED_ZONE) / PAGE * PAGE;
    let before = record.bytes();
    if used >= record.open || resident(end - record.open..end - used) == 0 {
        return false;
    }
    record.highest = record.highest.max(before);
    record.watch.spike = false;
    // SAFETY: the window is accessible, and nothing below the stack pointer's red zone is needed.
    unsafe { Pages::new(record.class, end).discard(record.open, used) };
    true
}

/// # Safety
/// As for [`shrink`]; `record` is its record.
unsafe fn shrink_moving(handle: &mut Handle, record: *mut Record) -> Result<bool, Error> {
    // SAFETY: a suspended coroutine's record is accessible, and nobody else uses it.
    unsafe {
        let used = handle.base as usize - (handle.sp - RED_ZONE);
        let need = Record::end(record) - handle.base as usize + 2 * used;
        let size = fitting(need, (*record).settings.first_size());
        if size >= (*record).size() {
            return Ok(false);
        }
        if (*record).class.size() <= size {
            // It is cut down where it is, if its slack was opened there.
            stock::resize(record, size::open_bytes(size))?;
            discard_unused(handle, record);
            return Ok(true);
        }
        if (*record).is_pinned() {
            (*record).note(NotMoved::at(Reason::Pinned, switch::registers_of(handle.sp).pc()));
            return Ok(false);
        }
        match relocate::relocate_parked(handle, size) {
            Ok(_) => Ok(true),
            Err(Refusal { error: Some(error), .. }) => Err(error),
            Err(Refusal { why, .. }) => {
                (*record).note(why);
                Ok(false)
            }
        }
    }
}

/// Gives back the memory of the pages below what a stack uses that was cut down: it was touched when it was used further down.
///
/// # Safety
/// The handle is that of a suspended coroutine, not marked; `record` is its record.
unsafe fn discard_unused(handle: &Handle, record: *const Record) {
    let end = Record::end(record);
    let used = end - (handle.sp - RED_ZONE) / PAGE * PAGE;
    // SAFETY: a suspended coroutine's record is accessible; of its own pages, nothing is needed below the stack pointer.
    unsafe {
        if used < (*record).open {
            Pages::new((*record).class, end).discard((*record).open, used);
        }
    }
}

/// The smallest size from `first` on that has `need` accessible bytes.
pub(crate) fn fitting(need: usize, first: usize) -> usize {
    let mut size = first;
    while size::open_bytes(size) < need {
        size *= 2;
    }
    size
}
