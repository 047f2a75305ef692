//! Shrinking: a stack that is larger than its coroutine needs goes back to a smaller size.
//!
//! Only coroutines that have grown are looked at, and nothing on the way of a switch asks which those are: the
//! fault handler that makes a stack larger also changes where the next suspend lands, from the resume that
//! waits to `regrow_watch` (asm/switch.S), which marks the handle and goes on to the resume. A
//! marked handle takes the slow way through the next [`before_resume`].
//!
//! How deep a coroutine goes between two suspends is not visible at them. So a line of marks is laid a quarter down its
//! stack: frames that pass it write over it.
//!
//! ```text
//!   base ┌──────────┐
//!        │ used     │
//!   sp   ├──────────┤
//!        │          │
//!  mark  ├──────────┤ a quarter of the size below the base: overwritten if the stack was used further down
//!        │          │
//!        │          │
//!        └──────────┘
//! ```
//!
//! A stack whose mark has outlasted [`PATIENCE`] resumes becomes smaller. If it grows again after that, its patience
//! doubles: a coroutine that always comes back is left alone soon.

use crate::error::Error;
use crate::stack::class::PAGE;
use crate::stack::{Record, cache, class, guard};
use crate::stats::{self, Growth};
use crate::switch::{self, Handle, RED_ZONE};

use super::reason::{self, NotMoved, Reason};
use super::relocate::{self, Failure};

/// When a stack becomes smaller by itself; see [`Builder::shrink`](crate::Builder::shrink).
///
/// ```
/// # #[inline(never)]
/// # fn deeper() {
/// #     std::hint::black_box([0u8; 10_000]);
/// # }
///
/// use regrow::{Builder, Shrink, Yielder};
/// let size_after_a_spike = |policy| {
///     let mut coroutine = Builder::new().learn(false).shrink(policy).spawn(|yielder: &Yielder<(), ()>, ()| {
///         deeper();
///         loop {
///             yielder.suspend(());
///         }
///     });
///     for _ in 0..10 {
///         coroutine.resume(());
///     }
///     coroutine.stats().size
/// };
/// assert_eq!(size_after_a_spike(Shrink::Eager), 2048);
/// assert!(size_after_a_spike(Shrink::Default) > 10_000); // not yet
/// assert!(size_after_a_spike(Shrink::Off) > 10_000);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
#[repr(u8)]
pub enum Shrink {
    /// Only when asked to ([`Coroutine::shrink`](crate::Coroutine::shrink)).
    Off,
    /// When less than a quarter has been used over 32 resumes; over twice as many each time it was in vain.
    #[default]
    Default,
    /// At the first resume that finds less than a quarter used since the one before.
    Eager,
}

/// How many resumes a mark must outlast, with [`Shrink::Default`].
const PATIENCE: u16 = 32;

/// What a record keeps for this.
#[derive(Clone, Copy)]
pub(crate) struct Watch {
    policy: Shrink,
    /// The mark is in place.
    marked: bool,
    /// Resumes that the mark has outlasted.
    quiet: u16,
    patience: u16,
}

impl Watch {
    pub(crate) const fn new(policy: Shrink) -> Self {
        Self {
            policy,
            marked: false,
            quiet: 0,
            patience: if matches!(policy, Shrink::Eager) { 1 } else { PATIENCE },
        }
    }

    pub(crate) const fn policy(self) -> Shrink {
        self.policy
    }

    /// The stack has grown: whatever was marked is elsewhere.
    pub(super) fn start_over(&mut self, shrunk_before: bool) {
        self.marked = false;
        self.quiet = 0;
        if shrunk_before && self.policy == Shrink::Default {
            self.patience = self.patience.saturating_mul(2);
        }
    }
}

/// One cache line of it is the mark: a pattern that code does not leave on a stack.
const MARK: [u64; 8] = [u64::from_le_bytes(*b"unused\xf5\xf5"); 8];

/// Readies a coroutine with a marked handle for its resume: looks whether its stack should be smaller.
///
/// # Safety
/// The handle is that of a suspended coroutine, marked.
pub(crate) unsafe fn before_resume(handle: &mut Handle) {
    handle.sp &= !switch::WATCHED;
    // SAFETY: by the caller's word.
    unsafe {
        let record = (*handle.base).record();
        // Suspended on another stack, it does not show how much of its own is in use.
        if Record::holds(record, handle.sp) && is_quiet(handle, &mut *record) {
            // Without memory it stays as large as it is.
            let _ = shrink(handle);
        }
    }
}

/// Marks the handle again if there is still something to watch.
///
/// # Safety
/// The handle is that of a suspended coroutine.
pub(crate) unsafe fn after_resume(handle: &mut Handle) {
    // SAFETY: by the caller's word.
    let record = unsafe { &*(*handle.base).record() };
    if record.size() > record.first_size() && record.watch.policy != Shrink::Off {
        handle.sp |= switch::WATCHED;
    }
}

/// True if the mark has been in place for long enough. Puts it there if it is not.
///
/// # Safety
/// As for [`before_resume`], the handle not marked any more.
unsafe fn is_quiet(handle: &Handle, record: &mut Record) -> bool {
    let mark = (handle.base as usize - record.size() / 4) & !(size_of_val(&MARK) - 1);
    let mark = mark as *mut [u64; 8];
    if mark as usize + size_of_val(&MARK) > handle.sp - RED_ZONE {
        record.watch.marked = false; // more than a quarter is in use right now
        record.watch.quiet = 0;
        return false;
    }
    // SAFETY: below what a suspended coroutine uses of its stack, and accessible: a quarter of the size below the base.
    let intact = record.watch.marked && unsafe { mark.read() } == MARK;
    if !intact {
        // SAFETY: the same.
        unsafe { mark.write(MARK) };
        record.watch.marked = true;
        record.watch.quiet = 0;
        return false;
    }
    record.watch.quiet += 1;
    record.watch.quiet >= record.watch.patience
}

/// Makes the stack of a suspended coroutine as small as it can be with as much room as is used, and no smaller than it
/// was at first. True if it became smaller. After an error nothing has changed.
///
/// # Safety
/// The handle is that of a coroutine suspended on its own stack, not marked.
pub(crate) unsafe fn shrink(handle: &mut Handle) -> Result<bool, Error> {
    // SAFETY: by the caller's word.
    unsafe {
        let record = (*handle.base).record();
        (*record).watch.marked = false;
        (*record).watch.quiet = 0;
        let used = handle.base as usize - (handle.sp - RED_ZONE);
        let need = Record::end(record) - handle.base as usize + 2 * used;
        let size = fitting(need, (*record).first_size());
        if size >= (*record).size() {
            return Ok(false);
        }
        // One that moves, too, is cut down where it is, if its slack was opened there.
        let stays = (*record).growth == Growth::InPlace || (*record).class.size() <= size;
        let record = if stays {
            cache::resize(record, class::open_bytes(size))?;
            discard_unused(handle, record);
            record
        } else if (*record).is_pinned() {
            reason::note(
                record,
                NotMoved { reason: Reason::Pinned, frame: switch::registers_of(handle.sp).pc() },
            );
            return Ok(false);
        } else {
            match relocate::relocate_parked(handle, size) {
                Ok(moved) => moved.record,
                Err(Failure::Kernel(error)) => return Err(error),
                Err(Failure::Frame(reason, frame)) => {
                    reason::note(record, NotMoved { reason, frame });
                    return Ok(false);
                }
            }
        };
        (*record).shrinks += 1;
        stats::count_shrink();
        Ok(true)
    }
}

/// Gives back the memory of the pages below what a stack in place uses: it was touched when the stack was used further down.
///
/// # Safety
/// The handle is that of a suspended coroutine, not marked; `record` is its record.
unsafe fn discard_unused(handle: &Handle, record: *const Record) {
    // SAFETY: by the caller's word.
    let bottom = Record::end(record) - unsafe { (*record).open };
    let used = (handle.sp - RED_ZONE) / PAGE * PAGE;
    if used > bottom {
        // SAFETY: accessible pages of the coroutine's own slot, in which nothing is needed.
        unsafe { guard::discard(bottom, used - bottom) };
    }
}

/// The smallest size from `first` on that has `need` accessible bytes.
pub(super) fn fitting(need: usize, first: usize) -> usize {
    let mut size = first;
    while class::open_bytes(size) < need {
        size *= 2;
    }
    size
}
