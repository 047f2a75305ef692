//! Growth on request, which avoids the cost of a fault.

use crate::error::Error;
use crate::grow::growth::{self, Begun};
use crate::grow::relocate;
use crate::not_moved::{NotMoved, Reason};
use crate::settings::Growth;
use crate::size::{self, PAGE};
use crate::stack::record::Record;
use crate::stack::suspended::Suspended;
use crate::switch::{self, Handle, RED_ZONE, Running};
use crate::thread;

/// Makes sure that the running coroutine has at least `bytes` of stack left: if not, its stack grows now. This
/// function does nothing outside coroutines, and on another stack that a coroutine's code has switched to.
///
/// A stack that grows in place has its whole maximum from the start: the result says whether that is enough. For a stack that
/// moves, `reserve` has two uses. Before a recursion of known depth, it saves the kernel's cost of signals. And it makes room
/// for buffers that are handed to the kernel, which fails with `EFAULT` where code would fault and grow the stack.
///
/// ```
/// #[inline(never)]
/// fn deeper() {
///     std::hint::black_box([0u8; 50_000]);
/// }
/// // SAFETY: nothing is kept outside the stack.
/// let builder = unsafe { regrow::Builder::new().relocating() };
/// let mut coroutine = builder.spawn(|_: &regrow::Yielder<(), ()>, ()| {
///     regrow::reserve(150_000)?;
///     let growths = regrow::current_stats().unwrap().growths;
///     deeper(); // no fault
///     assert_eq!(regrow::current_stats().unwrap().growths, growths);
///     Ok::<(), regrow::Error>(())
/// });
/// coroutine.resume(()).returned().unwrap()?;
/// # Ok::<(), regrow::Error>(())
/// ```
///
/// # Errors
/// [`Error::Room`] if that would exceed the coroutine's maximum, or if its stack may not move now and its
/// slot has too little slack. [`Error::Memory`] if the kernel has no memory. Nothing has changed then.
#[inline(never)]
pub fn reserve(bytes: usize) -> Result<(), Error> {
    let mark = 0u8;
    let here = &raw const mark as usize;
    let Some(running) = switch::running() else { return Ok(()) };
    let above = Record::bytes_above(running.record(), here);
    let need = above.saturating_add(bytes).saturating_add(RED_ZONE);
    let before = running.room();
    let on_own_stack = above <= before.class.stride();
    if need <= before.open || !on_own_stack {
        return Ok(());
    }
    let maximum = before.settings.maximum();
    let room = Error::Room { bytes, maximum };
    if before.settings.growth == Growth::InPlace {
        return Err(room);
    }
    if let Some(open) = growth::slack_first(before, need) {
        // SAFETY: the bytes are within the window, and nothing below the open ones is in use.
        return unsafe { open_now(running, open) };
    }
    let Some(size) = size::grown(before.size(), need, maximum) else { return Err(room) };
    if let Some(stack) = thread::signal_stack_end() {
        // SAFETY: the signal stack is free as long as no signal is handled, and a signal that comes meanwhile
        // is handled further down on it. The function moves this stack as it moves a suspended coroutine's.
        unsafe { switch::hop(size, move_running, stack) };
    }
    let now = running.room();
    let slack = need.next_multiple_of(PAGE);
    if need <= now.open {
        Ok(())
    } else if slack <= now.class.window() && size::size_of_open(slack) <= maximum {
        // SAFETY: the slot has this much slack, as just checked.
        unsafe { open_now(running, slack) }
    } else {
        Err(room)
    }
}

/// # Safety
/// `open` bytes are within the window of the running coroutine's slot, and nothing below them is needed.
unsafe fn open_now(running: Running, open: usize) -> Result<(), Error> {
    let begun = Begun::now(running);
    // SAFETY: the caller guarantees that the slot has so many bytes.
    let done = unsafe { growth::open(running, open)? };
    begun.finish(running, done);
    Ok(())
}

/// Runs on another stack: moves the stack of the running coroutine, which `rsp`
/// was on, to a slot of `size` bytes if it may move. Returns what `rsp` is now.
unsafe extern "C" fn move_running(size: usize, rsp: usize) -> usize {
    let Some(running) = switch::running() else { return rsp };
    let mut handle = Handle { sp: rsp, base: running.base() };
    let (begun, pinned) = (Begun::now(running), running.with_record(|record| record.is_pinned()));
    let outcome = if pinned {
        Err(NotMoved::at(Reason::Pinned, reserve as *const () as usize).into())
    } else {
        // SAFETY: the coroutine is in the state of a suspended one, with such a
        // handle. The promise about pointers was made with `Growth::Relocate`.
        unsafe { relocate::relocate_suspended(&mut Suspended::new(&mut handle), size) }
    };
    match outcome {
        Ok(moved) => {
            // SAFETY: the stack has moved, and its base is at this address.
            unsafe { running.set_base(handle.base) };
            begun.finish(running, moved.done());
        }
        Err(mut refusal) => {
            if refusal.error.is_some() {
                refusal.why.frame = reserve as *const () as usize; // no other frame was the reason
            }
            running.with_record(|record| record.note(refusal.why));
        }
    }
    handle.sp
}
