//! Stacks that were frozen in place, and thawed by the handler because somebody touched them: their blocks, left on a list.
//!
//! ```text
//!   Touched ──► block ──next──► block ──next──► null       the newest first
//! ```
//!
//! There the blocks wait to be freed, which the handler may not do, and there a [`Pool`](crate::Pool) finds which of its
//! coroutines are frozen no longer.

use core::ptr::{self, NonNull};

use super::block::Frozen;
use crate::sync::{AtomicPtr, Ordering};

/// A list of such blocks.
#[derive(Debug)]
pub(crate) struct Touched(AtomicPtr<Frozen>);

/// The list of those that belong to nobody.
pub(crate) static TOUCHED: Touched = Touched::new();

/// Whom the handler tells that it has thawed a stack: a list, and which of the list's owner's it is.
///
/// Whoever makes one sees that the list lives as long as a stack is frozen with it.
#[derive(Clone, Copy)]
pub(crate) struct Told {
    pub list: *const Touched,
    pub entry: u32,
}

impl Told {
    pub(crate) const NOBODY: Self = Self { list: &raw const TOUCHED, entry: 0 };
}

impl Touched {
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    /// In the handler: leaves the block of a stack that is thawed on the list that it names.
    ///
    /// # Safety
    /// The block is the caller's, and that list lives.
    pub(crate) unsafe fn leave(mut block: NonNull<Frozen>) {
        // SAFETY: the list lives, as the caller says, and the block is this thread's until it is on the list.
        unsafe {
            let list = &(*block.as_ref().told().cast::<Self>()).0;
            let mut head = list.load(Ordering::Relaxed);
            loop {
                block.as_mut().link_to(head);
                match list.compare_exchange_weak(head, block.as_ptr(), Ordering::Release, Ordering::Relaxed) {
                    Ok(_) => return,
                    Err(seen) => head = seen,
                }
            }
        }
    }

    /// Frees the blocks on the list.
    pub(crate) fn free(&self) {
        drop(self.take());
    }

    /// True if there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed).is_null()
    }

    /// Takes the blocks off the list: which of the owner's they were of. They are freed.
    pub(crate) fn take(&self) -> Taken {
        if self.is_empty() {
            return Taken(ptr::null_mut());
        }
        Taken(self.0.swap(ptr::null_mut(), Ordering::Acquire))
    }

    /// Which of the owner's the blocks on the list are of. Nobody may [`take`](Self::take) them meanwhile.
    pub(crate) fn entries(&self) -> impl Iterator<Item = u32> {
        let mut next = self.0.load(Ordering::Acquire);
        core::iter::from_fn(move || {
            // SAFETY: a block on the list changes no more, until somebody takes it.
            let block = unsafe { next.as_ref()? };
            // SAFETY: a block on a list links to the next one.
            next = unsafe { block.next() };
            Some(block.entry())
        })
    }
}

impl Drop for Touched {
    fn drop(&mut self) {
        self.free();
    }
}

/// Blocks that were taken off a list.
pub(crate) struct Taken(*mut Frozen);

impl Iterator for Taken {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let block = NonNull::new(self.0)?;
        // SAFETY: the list, taken whole, is this thread's; a block on a list links to the next one.
        unsafe {
            self.0 = block.as_ref().next();
            let entry = block.as_ref().entry();
            Frozen::free(block);
            Some(entry)
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}
