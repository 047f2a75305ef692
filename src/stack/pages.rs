//! The pages of a slot: which of them are accessible, and where its guards are.
//!
//! ```text
//!  a stack that moves: all below it is guarded
//!
//!    start                                          end
//!    | guard | slack                 | stack | head |
//!    |####### guards ################|◄─── open ───►|
//!
//!  a stack that stays: its window may be many megabytes, and most of it is never used
//!
//!    | guard |                | band | stack | head |
//!    |# guard|    nothing     |######|◄─── open ───►|
//!            |                |◄───── guarded ─────►|
//!            |◄───────────── window ───────────────►|
//! ```
//!
//! A guard page costs 25 ns and 8 bytes of page table. So below a stack that stays there is a band of them, and another at the
//! bottom of the slot. When the stack grows the band goes down first. What is between could be accessed, but nothing gets
//! there without touching the band: except C with a frame wider than the band, compiled without probes, whose stack
//! pointer goes on below it. That is its own memory, and as good as any other; it is not counted as growth. When the stack
//! grows over it later, what is in use stays as it is (src/grow/mod.rs sees to that: a new band goes below it), and
//! it goes back to the kernel with the rest of the slot, not before.
//!
//! Where guards are pages without access, all of a slot that is not open is.

use core::ops::Range;

use super::class::{Class, GUARD, PAGE};
use super::guard;
use crate::error::Error;

/// At least so much below an open stack is guarded: as wide as the guard at the bottom, for the same reason.
const BAND: usize = GUARD;

/// A new band is as wide as the stack, and that is at least this: growing on to twice the size takes no other, nor does
/// growing from 4 KiB to 64 KiB.
const LEAST: usize = 9 * PAGE;

/// A gap of so many pages in the guards of a new slot would cost more than the guards: the kernel takes 0.5 µs a range.
const NARROW: usize = 16 * PAGE;

/// What was open and is not any more is guarded down to here, and merely given back below it.
const KEPT: usize = 64 * PAGE;

/// The pages of one slot.
#[derive(Clone, Copy)]
pub(crate) struct Pages {
    class: Class,
    end: usize,
}

impl Pages {
    /// Of the slot of `class` that ends at `end`.
    pub(crate) fn new(class: Class, end: usize) -> Self {
        Self { class, end }
    }

    /// Where the window begins, and the guard at the bottom ends.
    fn bottom(self) -> usize {
        self.end - self.class.stride() + GUARD
    }

    /// True if not all below the stack is guarded.
    fn has_band(self) -> bool {
        !self.class.is_moving() && guard::by_madvise()
    }

    /// The guards of a slot that was never used, with `open` accessible bytes.
    pub(super) fn guards(self, open: usize) -> [Range<usize>; 2] {
        let (start, bottom, top) = (self.bottom() - GUARD, self.bottom(), self.end - open);
        if self.has_band() && bottom + NARROW + BAND < top {
            [start..bottom, top - BAND..top]
        } else {
            [start..top, top..top]
        }
    }

    /// Makes `open` bytes accessible instead of `now`. Guards reach at least `guarded` bytes below the end, and at least a
    /// band below what is open; returns how far they reach then. After an error nothing has changed.
    ///
    /// # Safety
    /// The slot is the caller's, and nothing below the `open` bytes is needed.
    pub(crate) unsafe fn open(self, now: usize, open: usize, guarded: usize) -> Result<usize, Error> {
        let window = self.end - self.bottom();
        let mut reach = guarded.max(now + BAND).min(window);
        // SAFETY: by the caller's word; both ranges are within the slot.
        unsafe {
            if self.has_band() && reach < (open + BAND).min(window) {
                let from = reach.max(open);
                let wanted = (2 * open.max(LEAST) + BAND).min(window);
                // A kernel without memory for the band leaves the guard at the bottom: the rest of the window is then used
                // without being counted, but nothing is overwritten.
                if wanted <= from || guard::close(self.end - wanted, wanted - from).is_ok() {
                    reach = wanted;
                }
            }
            guard::open(self.end - open, open - now)?;
        }
        Ok(reach)
    }

    /// Makes `open` bytes accessible instead of `now`, which are more, and gives the memory of the others back. Otherwise
    /// as [`open`](Self::open); after an error some of the others may be closed.
    ///
    /// # Safety
    /// As for [`open`](Self::open).
    pub(crate) unsafe fn close(self, now: usize, open: usize, guarded: usize) -> Result<usize, Error> {
        let kept = if self.has_band() { now.min(open + KEPT) } else { now };
        // SAFETY: by the caller's word; both ranges are within the slot.
        unsafe {
            guard::close(self.end - kept, kept - open)?;
            if kept < now {
                // With what is below the band, if anything is.
                guard::discard(self.bottom(), self.end - kept - self.bottom());
                return Ok(kept);
            }
        }
        Ok(guarded)
    }

    /// Gives all memory of a slot back of which `open` bytes are accessible.
    ///
    /// # Safety
    /// The slot is the caller's, and nothing in it is needed.
    pub(super) unsafe fn discard(self, open: usize) {
        let start = if self.has_band() { self.bottom() } else { self.end - open };
        // SAFETY: by the caller's word. Guards stay.
        unsafe { guard::discard(start, self.end - start) };
    }
}
