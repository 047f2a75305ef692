//! The pages of a slot: which are accessible, which are guards, and which have memory.
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
//! A stack that stays grows through the kernel's own page faults as it is touched. So the kernel may touch it too: signal
//! frames and writes by system calls need no handler of this crate.

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
    /// The pages of the slot of `class` that ends at `end`.
    pub(crate) fn new(class: Class, end: usize) -> Self {
        Self { class, end }
    }

    /// The guards of a slot with `open` accessible bytes.
    pub(super) fn guards(self, open: usize) -> Range<usize> {
        self.end - self.class.stride()..self.end - open
    }

    /// Raises the accessible bytes from `now` to `open`. An error changes nothing.
    ///
    /// # Safety
    /// The slot is the caller's, and nothing below the `now` bytes is needed.
    pub(crate) unsafe fn open(self, now: usize, open: usize) -> Result<(), Error> {
        // SAFETY: the range is within the slot, which the caller owns, and nothing in it is needed.
        unsafe { guard::open(self.end - open, open - now) }
    }

    /// Lowers the accessible bytes from `now` to `open` and gives the memory of the rest back. An error changes nothing.
    ///
    /// # Safety
    /// The slot is the caller's, and nothing below the `open` bytes is needed.
    pub(crate) unsafe fn close(self, now: usize, open: usize) -> Result<(), Error> {
        // SAFETY: the range is within the slot, which the caller owns, and nothing in it is needed.
        unsafe { guard::close(self.end - now, now - open) }
    }

    /// Gives the memory of all accessible pages back, except the uppermost `kept` bytes.
    ///
    /// # Safety
    /// The slot is the caller's, `open` bytes of it are accessible, and nothing below the `kept` bytes is needed.
    pub(crate) unsafe fn discard(self, open: usize, kept: usize) {
        // SAFETY: the range is accessible and within the slot, which the caller owns, and nothing in it is needed.
        unsafe { guard::discard(self.end - open, open - kept) };
    }
}

/// How many bytes of `range` (whole pages) have memory from the kernel. All of them if the kernel does not tell.
pub(crate) fn resident(range: Range<usize>) -> usize {
    // Kept small, since the array may lie on the measured stack.
    let mut pages = [0u8; 1024];
    let mut sum = 0;
    for start in range.clone().step_by(pages.len() * PAGE) {
        let Some(pages) = each_resident(start..range.end, &mut pages) else { return range.len() };
        sum += pages.filter(|&has_memory| has_memory).count() * PAGE;
    }
    sum
}

/// Tells for each page of `range`, up to the length of `room`, whether the kernel has given it memory. `None` if the
/// kernel does not tell.
pub(super) fn each_resident(range: Range<usize>, room: &mut [u8]) -> Option<impl Iterator<Item = bool>> {
    let pages = (range.len() / PAGE).min(room.len());
    // SAFETY: the kernel does not read the pages, and writes one byte for each, for which `room` has space.
    let answer = unsafe { libc::mincore(range.start as *mut _, pages * PAGE, room.as_mut_ptr()) };
    (answer == 0).then(|| room[..pages].iter().map(|&page| page & 1 != 0))
}
