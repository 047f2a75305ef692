//! Shrinking: a stack gives back the memory that its coroutine does not need.
//!
//! A stack that moves goes to a smaller size. A stack that stays gives back all pages
//! below its stack pointer, by one call; they are zeros when it touches them again.
//!
//! Only watched coroutines are checked. The switch does not test for them: a marked handle
//! makes the next resume take the slow way, through [`before_resume`]. Watched are:
//!
//! - a stack that moves, once it has grown. The fault handler changes where the next suspend lands, from the
//!   waiting resume to `regrow_watch` (asm/switch.S), which marks the handle and continues at the resume;
//! - a stack that stays, from the start, if its policy is [`Shrink::Eager`], or if its spawn site knows of spikes (src/site.rs).
//!
//! A suspend does not show how deep the coroutine went before it. So a line of marks is laid, and deeper frames overwrite it.
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
//! A stack that moves shrinks when its mark has survived [`PATIENCE`] resumes. A stack that stays
//! gives memory back when a mark was overwritten and the next one has survived so many. If the stack
//! grows again after that, its patience doubles: so a coroutine whose spikes recur is soon left alone.

use super::relocate;
use crate::error::Error;
use crate::not_moved::{NotMoved, Reason, Refusal};
use crate::settings::{Growth, Shrink};
use crate::site::Site;
use crate::size::{self, PAGE};
use crate::stack::pages::{Pages, resident};
use crate::stack::record::Record;
use crate::stack::stock;
use crate::stack::suspended::Suspended;
use crate::stats;
use crate::switch;
use crate::trace::{self, Event, Name};

/// A scout is no longer one after this many resumes without a spike, since each takes a few times as long as usual.
const SCOUTED: u16 = 256;

/// The pattern of the mark, one cache line: code does not leave it on a stack.
const MARK: [u64; 8] = [u64::from_le_bytes(*b"unused\xf5\xf5"); 8];
const MARK_BYTES: usize = size_of_val(&MARK);

/// Prepares a watched coroutine for its resume: shrinks its stack if it should be smaller.
pub(crate) fn before_resume(suspended: &mut Suspended<'_>) {
    if suspended.record().settings.growth == Growth::Relocate {
        if is_quiet(suspended) {
            // If there is no memory for it, the stack keeps its size.
            let _ = shrink(suspended);
        }
    } else if is_quiet_in_place(suspended) && shrink(suspended).is_ok_and(|smaller| smaller) {
        tell_site(suspended.record());
    }
}

/// Marks the handle again if there is still something to watch. The view ends here.
pub(crate) fn watch_again(suspended: &mut Suspended<'_>) {
    if is_watched(suspended.record()) {
        suspended.handle().sp |= switch::WATCHED;
    }
}

/// True if the coroutine of this record is to be checked before its next resume.
pub(crate) fn is_watched(record: &Record) -> bool {
    match record.settings.growth {
        Growth::Relocate => {
            record.size() > record.settings.first_size() && record.settings.shrink != Shrink::Off
        }
        Growth::InPlace => is_watched_in_place(record),
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

/// Tells the spawn site that its coroutines have spikes.
fn tell_site(record: &Record) {
    if let Some(site) = record.site
        && record.scout
    {
        site.had_spike();
    }
}

/// True if the mark has been in place for long enough. Lays the mark if it is missing.
fn is_quiet(suspended: &mut Suspended<'_>) -> bool {
    let mark = (suspended.base() as usize - suspended.record().size() / 4) & !(MARK_BYTES - 1);
    let intact = lay_mark(suspended, mark);
    let watch = &mut suspended.record_mut().watch;
    if intact == Some(true) && watch.marked {
        watch.quiet += 1;
        return watch.quiet >= watch.patience;
    }
    watch.marked = intact.is_some(); // if not, more than a quarter is in use now
    watch.quiet = 0;
    false
}

/// The same for a stack that stays: true if it was used below the page of its stack pointer, and then not for long enough.
fn is_quiet_in_place(suspended: &mut Suspended<'_>) -> bool {
    // If the mark does not fit into this page, the next one below is used.
    let mark = (suspended.lowest() - MARK_BYTES) / PAGE * PAGE;
    let Some(intact) = lay_mark(suspended, mark) else { return false }; // this is the lowest page
    let record = suspended.record_mut();
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

/// Lays the mark at an address, a multiple of its size; true if it was there. `None` if that is not in the unused part of the stack.
fn lay_mark(suspended: &Suspended<'_>, at: usize) -> Option<bool> {
    let unused = suspended.end() - suspended.record().open..suspended.lowest();
    if at < unused.start || at + MARK_BYTES > unused.end {
        return None;
    }
    let place = at as *mut [u64; 8];
    // SAFETY: the place is aligned and accessible, and nothing below what a suspended coroutine uses is needed.
    unsafe {
        let intact = place.read() == MARK;
        if !intact {
            place.write(MARK);
        }
        Some(intact)
    }
}

/// Makes the stack of a suspended coroutine as small as its used part allows, but not smaller
/// than its first size. True if it became smaller. After an error nothing has changed.
pub(crate) fn shrink(suspended: &mut Suspended<'_>) -> Result<bool, Error> {
    let before = suspended.end();
    let record = suspended.record_mut();
    record.watch.marked = false;
    record.watch.quiet = 0;
    let outcome = match record.settings.growth {
        Growth::InPlace => Ok(give_back_unused(suspended)),
        Growth::Relocate => shrink_moving(suspended),
    };
    if matches!(outcome, Ok(true)) {
        let now = suspended.record_mut();
        now.shrinks += 1;
        stats::count_shrink();
        if trace::is_on() {
            let called = Name { end: before, ..now.called() };
            trace::tell(&called, &Event::Shrunk { to: now.stats().size, now: Record::end(now) });
        }
    }
    outcome
}

/// Gives back the memory of all pages below the used part of a stack that stays. False if there was none.
fn give_back_unused(suspended: &mut Suspended<'_>) -> bool {
    let (end, used) = (suspended.end(), used_pages(suspended));
    let record = suspended.record_mut();
    let before = record.bytes();
    if used >= record.open || resident(end - record.open..end - used) == 0 {
        return false;
    }
    record.highest = record.highest.max(before);
    record.watch.spike = false;
    discard_unused(suspended);
    true
}

fn shrink_moving(suspended: &mut Suspended<'_>) -> Result<bool, Error> {
    let base = suspended.base() as usize;
    let need = suspended.end() - base + 2 * (base - suspended.lowest());
    let record = suspended.record_mut();
    let size = fitting(need, record.settings.first_size());
    if size >= record.size() {
        return Ok(false);
    }
    if record.class.size() <= size {
        // A stack whose slack was opened is cut down where it is.
        // SAFETY: the slot is the coroutine's, and so many bytes hold its used part.
        unsafe { stock::resize(record, size::open_bytes(size))? };
        discard_unused(suspended);
        return Ok(true);
    }
    let outcome = if record.is_pinned() {
        Err(NotMoved::at(Reason::Pinned, suspended.registers().pc()).into())
    } else {
        // SAFETY: the promise about pointers was made with `Growth::Relocate`.
        unsafe { relocate::relocate_parked(suspended, size) }
    };
    match outcome {
        Ok(_) => Ok(true),
        Err(Refusal { error: Some(error), .. }) => Err(error),
        Err(Refusal { why, .. }) => {
            suspended.record_mut().note(why);
            Ok(false)
        }
    }
}

/// Bytes of the pages that the coroutine uses, from the slot's end down.
fn used_pages(suspended: &Suspended<'_>) -> usize {
    suspended.end() - suspended.lowest() / PAGE * PAGE
}

/// Gives back the memory of the accessible pages below the used part.
fn discard_unused(suspended: &Suspended<'_>) {
    let (used, record) = (used_pages(suspended), suspended.record());
    if used < record.open {
        // SAFETY: the slot is the coroutine's, and nothing below its red zone is needed.
        unsafe { Pages::new(record.class, suspended.end()).discard(record.open, used) };
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
