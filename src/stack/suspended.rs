//! A coroutine that is suspended on its own stack: what can be read of it, and done to it, while it does not run.
//!
//! ```text
//!   end    ┌──────────┐
//!          │ record   │
//!   base   ├──────────┤
//!          │ frames   │
//!   sp     ├──────────┤
//!          │ saved    │ rip, rbp, rbx (asm/suspend.s)
//!   lowest ├──────────┤ the end of the red zone
//!          │ not needed
//! ```

use super::record::Record;
use crate::map::Registers;
use crate::switch::{self, Base, Handle, RED_ZONE};

/// Such a coroutine, by its handle.
pub(crate) struct Suspended<'a>(&'a mut Handle);

impl<'a> Suspended<'a> {
    /// # Safety
    /// The handle is that of a coroutine that is suspended on its own stack, and has no flags set.
    /// As long as the result lives, no other code resumes the coroutine or writes its record.
    pub(crate) unsafe fn new(handle: &'a mut Handle) -> Self {
        Self(handle)
    }

    pub(crate) fn sp(&self) -> usize {
        self.0.sp
    }

    pub(crate) fn base(&self) -> *mut Base {
        self.0.base
    }

    /// Its handle, for code that moves it. Afterwards it must again be that
    /// of a suspended coroutine, or of a frozen one if the view ends here.
    pub(crate) fn handle(&mut self) -> &mut Handle {
        self.0
    }

    pub(crate) fn record(&self) -> &Record {
        // SAFETY: the coroutine is suspended, so base and record are accessible. By `new`'s contract no other code writes them.
        unsafe { &*(*self.0.base).record() }
    }

    pub(crate) fn record_mut(&mut self) -> &mut Record {
        // SAFETY: the coroutine is suspended, so base and record are
        // accessible. The view is borrowed, so there is no other reference.
        unsafe { &mut *(*self.0.base).record() }
    }

    /// One past the highest address of its slot.
    pub(crate) fn end(&self) -> usize {
        Record::end(self.record())
    }

    /// The lowest address in use.
    pub(crate) fn lowest(&self) -> usize {
        self.0.sp - RED_ZONE
    }

    /// The registers that it continues with.
    pub(crate) fn registers(&self) -> Registers {
        // SAFETY: the coroutine is suspended at this stack pointer.
        unsafe { switch::registers_of(self.0.sp) }
    }

    /// True if it has not run yet.
    pub(crate) fn is_fresh(&self) -> bool {
        // SAFETY: the coroutine is suspended at this stack pointer.
        unsafe { switch::is_fresh(self.0.sp) }
    }
}
