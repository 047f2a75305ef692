//! Which thread has the block of a stack that is frozen in place: one word per slot, used by any thread and by the fault handler.
//!
//! ```text
//!                begin              put                 take
//!   not frozen ─────────► BUSY ──────────────► block ────────────► BUSY
//!   ▲                                                               │
//!   └─────── the bytes are back, the block is on its list ──────────┘
//! ```
//!
//! The thread that makes it `BUSY` has exclusive access to the stack
//! and its block, until it writes the word again. All others wait.
//!
//! "Not frozen" is written last: a thread that sees it may free the list on which the block was left.
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

/// The stack is being frozen or thawed, or a thread looks at its block.
const BUSY: usize = 1;

impl Custody {
    /// Begins to freeze the stack, which is not frozen. The caller has exclusive access until it calls [`put`](Self::put).
    pub(crate) fn begin(&self) {
        self.0.store(BUSY, Ordering::SeqCst);
    }

    /// Ends `BUSY`: the stack is frozen in this block, or not frozen.
    pub(crate) fn put(&self, block: Option<NonNull<Block>>) {
        self.0.store(block.map_or(0, |block| block.as_ptr() as usize), Ordering::Release);
    }

    /// True if the stack is frozen, or that is changing. Does not wait.
    pub(crate) fn is_frozen_or_busy(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }

    /// True if the stack is frozen. Waits while that is changing: if its block is on the list
    /// already, the thread that found it there must see that the stack is no longer frozen.
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

    /// Thaws the stack by `bring_back`, if it is frozen. `leave` gets its block, which is no longer
    /// needed, before other threads see that the stack is thawed. After an error it is still frozen.
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
