//! The pages of a slot: which of them are accessible, where its guards are, and which the kernel has given memory to.
//!
//! ```text
//!  a stack that moves: all below it is guarded
//!
//!    start                                          end
//!    | guard | slack                 | stack | head |
//!    |####### guards ################|◄─── open ───►|
//!
//!  a stack that stays: all of its window is accessible
//!
//!    start                                          end
//!    | guard | window                       | head  |
//!    |#######|◄─────────────── open ───────────────►|
//!            |  no memory yet   | ◄── touched ──────|
//! ```
//!
//! A stack that stays grows by the kernel's own page faults, page by page as it is touched. So the kernel may touch it,
//! too: signal frames and what system calls write need no handler of ours.

use core::ops::Range;

use super::guard;
use crate::error::Error;
use crate::size::{Class, PAGE};

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

    /// The guards of a slot with `open` accessible bytes.
    pub(super) fn guards(self, open: usize) -> Range<usize> {
        self.end - self.class.stride()..self.end - open
    }

    /// Makes `open` bytes accessible instead of `now`. After an error nothing has changed.
    ///
    /// # Safety
    /// The slot is the caller's, and nothing below the `now` bytes is needed.
    pub(crate) unsafe fn open(self, now: usize, open: usize) -> Result<(), Error> {
        // SAFETY: the range is within the slot, which the caller owns, and nothing in it is needed.
        unsafe { guard::open(self.end - open, open - now) }
    }

    /// Makes `open` bytes accessible instead of `now`, which are more, and gives the memory of the others back. After an
    /// error nothing has changed.
    ///
    /// # Safety
    /// The slot is the caller's, and nothing below the `open` bytes is needed.
    pub(crate) unsafe fn close(self, now: usize, open: usize) -> Result<(), Error> {
        // SAFETY: the range is within the slot, which the caller owns, and nothing in it is needed.
        unsafe { guard::close(self.end - now, now - open) }
    }

    /// Gives the memory of all accessible pages back but for the uppermost `kept` bytes.
    ///
    /// # Safety
    /// The slot is the caller's, `open` bytes of it are accessible, and nothing below the `kept` bytes is needed.
    pub(crate) unsafe fn discard(self, open: usize, kept: usize) {
        // SAFETY: the range is accessible, within the slot, which the caller owns, and nothing in it is needed.
        unsafe { guard::discard(self.end - open, open - kept) };
    }
}

/// How many bytes of `range`, whole pages, the kernel has given memory to. All of them, should it not say.
pub(crate) fn resident(range: Range<usize>) -> usize {
    // No larger, since it may lie on the stack that is asked about.
    let mut pages = [0u8; 1024];
    let mut sum = 0;
    for start in range.clone().step_by(pages.len() * PAGE) {
        let Some(pages) = each_resident(start..range.end, &mut pages) else { return range.len() };
        sum += pages.filter(|&has_memory| has_memory).count() * PAGE;
    }
    sum
}

/// For each page of `range`, or as many of them as `room` has bytes: whether the kernel has given it memory. `None` if it does
/// not say.
pub(super) fn each_resident(range: Range<usize>, room: &mut [u8]) -> Option<impl Iterator<Item = bool>> {
    let pages = (range.len() / PAGE).min(room.len());
    // SAFETY: the kernel reads nothing of the pages, and writes a byte for each, for which there is room.
    let answer = unsafe { libc::mincore(range.start as *mut _, pages * PAGE, room.as_mut_ptr()) };
    (answer == 0).then(|| room[..pages].iter().map(|&page| page & 1 != 0))
}
