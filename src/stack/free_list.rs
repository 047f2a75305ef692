//! A lock-free list of free slots: any thread, and the fault handler, may take and put slots at any time.
//!
//! ```text
//!   newest ──► slot ──next──► slot ──next──► 0
//! ```
//!
//! The table entry of a slot, where its `next` is, stays readable for ever. This matters to a thread that found the slot on
//! the list just before another thread took it. It must not act on the `next` that it reads: the slot may have been taken,
//! used, and put back on top of other slots before its exchange. So the list counts its changes, and such an exchange fails.
#![forbid(unsafe_code)]

use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// A slot's number: its arena, its place there, plus one, so that 0 means "none".
pub(crate) type Link = u32;

/// A counter of changes in the upper half, the newest [`Link`] in the lower half.
pub(super) struct FreeList(AtomicU64);

impl FreeList {
    pub(super) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// The slot that [`pop`](Self::pop) would take; 0 if there is none.
    pub(super) fn newest(&self) -> Link {
        self.0.load(Ordering::Acquire) as Link
    }

    /// Takes a slot off. All that was done to the slot before it was put on the list has
    /// happened. `next` returns where the `next` of a slot is; `None` for the link 0.
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

    /// Puts a slot without an owner on the list. `next` is the slot's.
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

/// The head that follows `head` when `link` becomes the newest slot.
fn changed(head: u64, link: Link) -> u64 {
    const ONE_MORE: u64 = 1 << Link::BITS;
    (head & !(ONE_MORE - 1)).wrapping_add(ONE_MORE) | u64::from(link)
}
