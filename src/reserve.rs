//! Growing on request: without a fault, for a fraction of its price.

use crate::error::Error;
use crate::grow::growth::{self, Begun};
use crate::grow::relocate;
use crate::not_moved::{NotMoved, Reason};
use crate::settings::Growth;
use crate::size::{self, PAGE};
use crate::stack::record::Record;
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
    let Some(record) = switch::running().map(Running::record) else { return Ok(()) };
    let above = Record::bytes_above(record, here);
    let need = above.saturating_add(bytes).saturating_add(RED_ZONE);
    // SAFETY: the running coroutine's record is accessible, and only this thread uses it.
    let (open, size, maximum, growth) = unsafe {
        ((*record).open, (*record).size(), (*record).settings.maximum(), (*record).settings.growth)
    };
    // SAFETY: as above.
    let on_another_stack = !unsafe { Record::holds(record, here) };
    if need <= open || on_another_stack {
        return Ok(());
    }
    let room = Error::Room { bytes, maximum };
    if growth == Growth::InPlace {
        return Err(room);
    }
    // SAFETY: as above.
    if let Some(open) = growth::slack_first(unsafe { &*record }, need) {
        // SAFETY: the bytes are within the window, and what is below those that are open is not used.
        return unsafe { open_now(record, open) };
    }
    let Some(size) = size::grown(size, need, maximum) else { return Err(room) };
    if let Some(stack) = thread::signal_stack_end() {
        // SAFETY: nothing else runs on the signal stack as long as no signal is handled, and one that comes meanwhile is
        // handled further down on it. The function moves this stack as that of a suspended coroutine is moved.
        unsafe { switch::hop(size, move_running, stack) };
    }
    // If it has moved, so has this pointer to its head.
    // SAFETY: as above.
    let (open, class) = unsafe { ((*record).open, (*record).class) };
    let slack = need.next_multiple_of(PAGE);
    if need <= open {
        Ok(())
    } else if slack <= class.window() && size::size_of_open(slack) <= maximum {
        // SAFETY: just checked.
        unsafe { open_now(record, slack) }
    } else {
        Err(room)
    }
}

/// # Safety
/// `record` is the running coroutine's; `open` bytes are within its slot's window, and nothing below them is needed.
unsafe fn open_now(record: *mut Record, open: usize) -> Result<(), Error> {
    // SAFETY: the record of the running coroutine is accessible, and its slot has so many bytes.
    unsafe {
        let begun = Begun::now(&*record);
        begun.finish(growth::open(record, open)?);
    }
    Ok(())
}

/// On another stack: moves the stack of the running coroutine, which `rsp` was on, to a slot of `size` bytes if
/// it may; returns what `rsp` is now.
unsafe extern "C" fn move_running(size: usize, rsp: usize) -> usize {
    let Some(running) = switch::running() else { return rsp };
    let mut handle = Handle { sp: rsp, base: running.base() };
    let record = running.record();
    // SAFETY: the coroutine has put itself into the state of a suspended one, with such a handle. Whoever asked for
    // `Growth::Relocate` made the promise about pointers.
    unsafe {
        let begun = Begun::now(&*record);
        let outcome = if (*record).is_pinned() {
            Err(NotMoved::at(Reason::Pinned, reserve as *const () as usize).into())
        } else {
            relocate::relocate_suspended(&mut handle, size)
        };
        match outcome {
            Ok(moved) => {
                running.set_base(handle.base);
                begun.finish(moved.done());
                handle.sp
            }
            Err(refusal) => {
                (*record).note(refusal.why);
                rsp
            }
        }
    }
}
