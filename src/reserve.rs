//! Growing on request: without a fault, for a fraction of its price.

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

/// Sees that the running coroutine has at least `bytes` of stack left, growing it now if it has not. Outside coroutines
/// it does nothing, nor on another stack that a coroutine's code has gone over to: that one is not the coroutine's to grow.
///
/// A stack that grows in place has all of its maximum from the start: of one the answer says whether that is enough. For one
/// that moves it is of use for two things: deep recursion that is known beforehand, since a growth by fault costs the kernel's
/// price for a signal; and buffers on the stack that are handed to the kernel, which answers `EFAULT` where code would have
/// faulted.
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
/// [`Error::Room`] if that would exceed the coroutine's maximum, or if its stack may not move now and has not that much
/// slack; [`Error::Memory`] if the kernel has none. Nothing has changed then.
#[inline(never)]
pub fn reserve(bytes: usize) -> Result<(), Error> {
    let mark = 0u8;
    let here = &raw const mark as usize;
    let Some(running) = switch::running() else { return Ok(()) };
    let above = Record::bytes_above(running.record(), here);
    let need = above.saturating_add(bytes).saturating_add(RED_ZONE);
    let (open, size, settings, on_own_stack, slack) = running.with_record(|record| {
        let on_own_stack = above <= record.class.stride();
        (record.open, record.size(), record.settings, on_own_stack, growth::slack_first(record, need))
    });
    if need <= open || !on_own_stack {
        return Ok(());
    }
    let maximum = settings.maximum();
    let room = Error::Room { bytes, maximum };
    if settings.growth == Growth::InPlace {
        return Err(room);
    }
    if let Some(open) = slack {
        // SAFETY: the bytes are within the window, and what is below those that are open is not used.
        return unsafe { open_now(running, open) };
    }
    let Some(size) = size::grown(size, need, maximum) else { return Err(room) };
    if let Some(stack) = thread::signal_stack_end() {
        // SAFETY: nothing else runs on the signal stack as long as no signal is handled, and one that comes meanwhile is
        // handled further down on it. The function moves this stack as that of a suspended coroutine is moved.
        unsafe { switch::hop(size, move_running, stack) };
    }
    let (open, window) = running.with_record(|record| (record.open, record.class.window()));
    let slack = need.next_multiple_of(PAGE);
    if need <= open {
        Ok(())
    } else if slack <= window && size::size_of_open(slack) <= maximum {
        // SAFETY: just checked.
        unsafe { open_now(running, slack) }
    } else {
        Err(room)
    }
}

/// # Safety
/// `open` bytes are within the window of the running coroutine's slot, and nothing below them is needed.
unsafe fn open_now(running: Running, open: usize) -> Result<(), Error> {
    let begun = running.with_record(|record| Begun::now(record));
    // SAFETY: the slot has so many bytes, as the caller says.
    let done = unsafe { growth::open(running, open)? };
    begun.finish(running, done);
    Ok(())
}

/// On another stack: moves the stack of the running coroutine, which `rsp` was on, to a slot of `size` bytes if
/// it may; returns what `rsp` is now.
unsafe extern "C" fn move_running(size: usize, rsp: usize) -> usize {
    let Some(running) = switch::running() else { return rsp };
    let mut handle = Handle { sp: rsp, base: running.base() };
    let (begun, pinned) = running.with_record(|record| (Begun::now(record), record.is_pinned()));
    let outcome = if pinned {
        Err(NotMoved::at(Reason::Pinned, reserve as *const () as usize).into())
    } else {
        // SAFETY: the coroutine has put itself into the state of a suspended one, with such a handle. Whoever asked for
        // `Growth::Relocate` made the promise about pointers.
        unsafe { relocate::relocate_suspended(&mut Suspended::new(&mut handle), size) }
    };
    match outcome {
        Ok(moved) => {
            // SAFETY: the stack has moved, and this is where its base is.
            unsafe { running.set_base(handle.base) };
            begun.finish(running, moved.done());
        }
        Err(refusal) => running.with_record(|record| record.note(refusal.why)),
    }
    handle.sp
}
