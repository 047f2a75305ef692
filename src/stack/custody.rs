//! Who has the block of a stack that is frozen in place: one word for each slot, used by any thread and by the fault handler.
//!
//! ```text
//!                begin              put                 take
//!   not frozen ─────────► BUSY ──────────────► block ────────────► BUSY
//!   ▲                                                               │
//!   └─────── the bytes are back, the block is on its list ──────────┘
//! ```
//!
//! Whoever makes it `BUSY` has the stack and its block alone, until it writes the word again. Everybody else waits.
//!
//! "Not frozen" comes last of all. Whoever sees it may free the list on which the block was left.
#![forbid(unsafe_code)]

use core::ptr::NonNull;

use crate::sync::{AtomicUsize, Ordering, let_others_run};

/// The word: 0 if the stack is not frozen, [`BUSY`], or the address of its block.
#[derive(Debug, Default)]
#[repr(transparent)]
pub(crate) struct Custody(AtomicUsize);

/// A block, of which only the address is known here (src/freeze/block.rs).
#[derive(Debug)]
pub(crate) enum Block {}

/// The stack is being frozen or thawed, or somebody looks at its block.
const BUSY: usize = 1;

impl Custody {
    /// The stack, which is not frozen, is going to be. The caller has it alone from here on, until it calls [`put`](Self::put).
    pub(crate) fn begin(&self) {
        self.0.store(BUSY, Ordering::SeqCst);
    }

    /// Whoever made it `BUSY` says that the stack is frozen in this block, or not frozen.
    pub(crate) fn put(&self, block: Option<NonNull<Block>>) {
        self.0.store(block.map_or(0, |block| block.as_ptr() as usize), Ordering::Release);
    }

    /// True if the stack is frozen, or that just changes. Does not wait.
    pub(crate) fn is_frozen_or_busy(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }

    /// True if the stack is frozen. Waits while that changes: its block may be on the list already, and whoever found it
    /// there is to see that it is frozen no longer.
    pub(crate) fn is_frozen(&self) -> bool {
        self.settled() != 0
    }

    /// Takes the block of a frozen stack: the word is `BUSY` until [`put`](Self::put). `None` if the stack is not frozen.
    pub(crate) fn take(&self) -> Option<NonNull<Block>> {
        loop {
            let seen = self.settled();
            let block = NonNull::new(seen as *mut Block)?;
            if self.0.compare_exchange(seen, BUSY, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
                return Some(block);
            }
        }
    }

    /// Thaws the stack by `bring_back`, if it is frozen. `leave` gets its block, which is no longer needed, before anyone
    /// sees that the stack is thawed. After an error it is still frozen.
    pub(crate) fn thaw<E>(
        &self,
        bring_back: impl FnOnce(NonNull<Block>) -> Result<(), E>,
        leave: impl FnOnce(NonNull<Block>),
    ) -> Result<(), E> {
        let Some(block) = self.take() else { return Ok(()) };
        let outcome = bring_back(block);
        if outcome.is_ok() {
            leave(block);
            self.put(None);
        } else {
            self.put(Some(block));
        }
        outcome
    }

    /// The word, once it is not `BUSY`.
    fn settled(&self) -> usize {
        loop {
            match self.0.load(Ordering::Acquire) {
                BUSY => let_others_run(),
                settled => return settled,
            }
        }
    }
}
