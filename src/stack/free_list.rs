//! A list of free slots, without a lock: any thread, and the fault handler, take from it and put on it at any time.
//!
//! ```text
//!   newest ──► slot ──next──► slot ──next──► 0
//! ```
//!
//! The table entry of a slot, where its `next` is, stays readable for ever: also for a thread that found the slot on the
//! list just before another took it. What that thread reads then is of no use, and it must not act on it: between its look at
//! the list and its exchange the slot may have been taken, used, and put back on top of other ones. So the list counts how
//! often it was changed, and the exchange fails.
#![forbid(unsafe_code)]

use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// A slot's number: which arena, which slot in it, plus one so that 0 is "none".
pub(crate) type Link = u32;

/// A counter of changes in the upper half, the newest [`Link`] in the lower.
pub(super) struct FreeList(AtomicU64);

impl FreeList {
    pub(super) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// The one that [`pop`](Self::pop) would take; 0 if there is none.
    pub(super) fn newest(&self) -> Link {
        self.0.load(Ordering::Acquire) as Link
    }

    /// Takes one off; all that was done to it before it was put on the list has happened. `next` says where the `next` of a
    /// slot is; `None` for the link 0.
    pub(super) fn pop<'a>(&self, next: impl Fn(Link) -> Option<&'a AtomicU32>) -> Option<Link> {
        let mut head = self.0.load(Ordering::Acquire);
        loop {
            let link = head as Link;
            let new = changed(head, next(link)?.load(Ordering::Relaxed));
            match self.0.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(link),
                Err(seen) => head = seen,
            }
        }
    }

    /// Puts one on that is nobody's, and whose `next` is this.
    pub(super) fn push(&self, link: Link, next: &AtomicU32) {
        let mut head = self.0.load(Ordering::Relaxed);
        loop {
            next.store(head as Link, Ordering::Relaxed);
            match self.0.compare_exchange_weak(
                head,
                changed(head, link),
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(seen) => head = seen,
            }
        }
    }
}

/// The head that follows `head` when `link` becomes the newest.
fn changed(head: u64, link: Link) -> u64 {
    const ONE_MORE: u64 = 1 << Link::BITS;
    (head & !(ONE_MORE - 1)).wrapping_add(ONE_MORE) | u64::from(link)
}
