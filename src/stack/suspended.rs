//! A coroutine that is suspended on its own stack: what can be seen of it, and done to it, while it does not run.
//!
//! ```text
//!   end    ┌──────────┐
//!          │ record   │
//!   base   ├──────────┤
//!          │ frames   │
//!   sp     ├──────────┤
//!          │ saved    │ rip, rbp, rbx (asm/suspend.s)
//!   lowest ├──────────┤ the end of the red zone
//!          │ nothing that anybody needs
//! ```

use super::record::Record;
use crate::map::Registers;
use crate::switch::{self, Base, Handle, RED_ZONE};

/// Such a coroutine, by its handle.
pub(crate) struct Suspended<'a>(&'a mut Handle);

impl<'a> Suspended<'a> {
    /// # Safety
    /// The handle is that of a coroutine that is suspended on its own stack, and no flag is set in it. As long as the result lives
    /// nobody else resumes the coroutine or writes its record.
    pub(crate) unsafe fn new(handle: &'a mut Handle) -> Self {
        Self(handle)
    }

    pub(crate) fn sp(&self) -> usize {
        self.0.sp
    }

    pub(crate) fn base(&self) -> *mut Base {
        self.0.base
    }

    /// Its handle, for whoever moves it. It must be that of a suspended coroutine again, or of a frozen one if this is the end of
    /// the view.
    pub(crate) fn handle(&mut self) -> &mut Handle {
        self.0
    }

    pub(crate) fn record(&self) -> &Record {
        // SAFETY: the coroutine is suspended, so base and record are accessible and written by nobody, as `new` was promised.
        unsafe { &*(*self.0.base).record() }
    }

    pub(crate) fn record_mut(&mut self) -> &mut Record {
        // SAFETY: the coroutine is suspended, so base and record are accessible. The view is borrowed, so there is no other
        // reference.
        unsafe { &mut *(*self.0.base).record() }
    }

    /// One past the highest address of its slot.
    pub(crate) fn end(&self) -> usize {
        Record::end(self.record())
    }

    /// The lowest address of what is in use.
    pub(crate) fn lowest(&self) -> usize {
        self.0.sp - RED_ZONE
    }

    /// The registers that it goes on with.
    pub(crate) fn registers(&self) -> Registers {
        // SAFETY: it is suspended at this stack pointer.
        unsafe { switch::registers_of(self.0.sp) }
    }

    /// True if it has not run yet.
    pub(crate) fn is_fresh(&self) -> bool {
        // SAFETY: it is suspended at this stack pointer.
        unsafe { switch::is_fresh(self.0.sp) }
    }
}
