//! Stacks that were frozen in place and touched, so that the handler thawed them: a list of their blocks.
//!
//! ```text
//!   Touched ──► block ──next──► block ──next──► null       the newest first
//! ```
//!
//! The blocks wait on the list to be freed, which the handler may not do. From it
//! a [`Pool`](crate::Pool) learns which of its coroutines are no longer frozen.

use core::ptr::{self, NonNull};

use super::block::Frozen;
use crate::sync::{AtomicPtr, Ordering};

/// A list of such blocks.
#[derive(Debug)]
pub(crate) struct Touched(AtomicPtr<Frozen>);

/// The list of blocks without an owner.
pub(crate) static TOUCHED: Touched = Touched::new();

/// Where the handler reports that it has thawed a stack: a list, and the stack's number for the owner of the list.
///
/// Code that makes one must keep the list alive as long as a stack is frozen with it.
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

    /// In the handler: puts the block of a thawed stack on the list that the block names.
    ///
    /// # Safety
    /// The caller owns the block, and the list lives.
    pub(crate) unsafe fn leave(mut block: NonNull<Frozen>) {
        // SAFETY: the caller guarantees that the list lives. The block is this thread's until it is on the list.
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

    /// True if the list is empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed).is_null()
    }

    /// Takes the blocks off the list, and returns their numbers for the owner. The blocks are freed.
    pub(crate) fn take(&self) -> Taken {
        if self.is_empty() {
            return Taken(ptr::null_mut());
        }
        Taken(self.0.swap(ptr::null_mut(), Ordering::Acquire))
    }

    /// The numbers of the blocks on the list. No thread may [`take`](Self::take) them meanwhile.
    pub(crate) fn entries(&self) -> impl Iterator<Item = u32> {
        let mut next = self.0.load(Ordering::Acquire);
        core::iter::from_fn(move || {
            // SAFETY: a block on the list does not change until it is taken.
            let block = unsafe { next.as_ref()? };
            next = block.next();
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
        // SAFETY: the whole list was taken and is this thread's; a block on a list links to the next one.
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
