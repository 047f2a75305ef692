//! What src/freeze/block.rs is for the library: blocks, of which loom watches who uses them.

use std::cell::Cell;
use std::ptr::{self, NonNull};

use loom::cell::UnsafeCell;

use crate::touched::Touched;

/// A block. Whoever uses it without being its only user makes the model fail.
#[derive(Debug)]
pub(crate) struct Frozen {
    told: *const Touched,
    entry: u32,
    next: UnsafeCell<*mut Frozen>,
    freed: Cell<bool>,
}

impl Frozen {
    /// A block whose stack is told of this list.
    pub(crate) fn new(told: *const Touched, entry: u32) -> Self {
        Self { told, entry, next: UnsafeCell::new(ptr::null_mut()), freed: Cell::new(false) }
    }

    pub(crate) fn was_freed(&self) -> bool {
        self.freed.get()
    }

    /// As the library does when it says whom to tell, or writes the block's words.
    pub(crate) fn write(&mut self) {
        self.link_to(ptr::null_mut());
    }

    pub(crate) fn told(&self) -> *const () {
        self.told.cast()
    }

    pub(crate) fn entry(&self) -> u32 {
        self.entry
    }

    pub(crate) fn link_to(&mut self, next: *mut Self) {
        if std::thread::panicking() {
            return; // the model has failed: that is enough
        }
        // SAFETY: the pointer is valid for this call, in which loom sees that nobody else uses it.
        self.next.with_mut(|link| unsafe { *link = next });
    }

    pub(crate) fn next(&self) -> *mut Self {
        if std::thread::panicking() {
            return ptr::null_mut(); // the model has failed: that is enough
        }
        // SAFETY: the pointer is valid for this call, in which loom sees that nobody writes it.
        self.next.with(|link| unsafe { *link })
    }

    /// Its memory stays, for the model to look at it.
    pub(crate) unsafe fn free(mut block: NonNull<Self>) {
        // SAFETY: the models keep their blocks until all their threads have ended.
        let block = unsafe { block.as_mut() };
        block.write();
        assert!(!block.freed.replace(true), "freed twice");
    }
}
