//! Pins: spans during which a stack must not move.

use core::cell::Cell;
use core::marker::PhantomData;
use std::rc::Rc;

use crate::stack::{Record, class};
use crate::switch;

/// While one of these lives, the stack of the coroutine that made it does not move: it grows in place.
///
/// For code that keeps a pointer to a local where relocation cannot see it, such as `std::thread::scope`
/// or a C library with callbacks. [`pinned_room`] says how much such a stack can grow; beyond that it has overflowed.
/// In a coroutine that grows in place anyway, and outside coroutines, a pin does nothing.
///
/// A pin that is leaked holds for the rest of the coroutine's life.
///
/// ```
/// #[inline(never)]
/// fn deeper() {
///     std::hint::black_box([0u8; 10_000]);
/// }
/// // SAFETY: the pointer kept on the heap is used only while the stack is pinned.
/// let builder = unsafe { regrow::Builder::new().relocating() };
/// let mut coroutine = builder.spawn(|_: &regrow::Yielder<(), ()>, ()| {
///     let number = 7;
///     let pin = regrow::pin();
///     let kept = Box::new(&number); // would be stale after a move
///     deeper();
///     let seen = **kept;
///     drop(pin);
///     seen
/// });
/// assert_eq!(coroutine.resume(()).returned(), Some(7));
/// ```
#[must_use = "the stack is pinned while this value lives"]
#[derive(Debug)]
pub struct Pinned {
    count: Option<Rc<Cell<usize>>>,
    /// A pin belongs to a coroutine, and that to a thread.
    not_send: PhantomData<*mut ()>,
}

/// Pins the stack of the running coroutine until the returned guard is dropped.
///
/// ```
/// let pin = regrow::pin(); // outside a coroutine: nothing
/// drop(pin);
/// ```
pub fn pin() -> Pinned {
    let count = switch::running_record().map(|record| {
        let fresh = Rc::new(Cell::new(0));
        // SAFETY: the running coroutine's record is this thread's. Should the stack have moved meanwhile, this
        // pointer to its head has moved with it.
        let count = unsafe {
            (*record).tidy = true;
            (*record).pins.get_or_insert(fresh).clone()
        };
        count.set(count.get() + 1);
        count
    });
    Pinned { count, not_send: PhantomData }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(count) = &self.count {
            count.set(count.get() - 1);
        }
    }
}

/// How many bytes the running coroutine's stack can still grow, and hold, without moving. `None` outside coroutines.
///
/// A stack that moves has slack of its own size below it, 44 KiB at least, at most up to its maximum; one that
/// grows in place all of its window. What is pinned and needs more ends the process with an overflow report: start such
/// a coroutine larger ([`Builder::first_size`](crate::Builder::first_size)).
///
/// ```
/// let mut coroutine = regrow::Coroutine::<(), (), usize>::new(|_, ()| regrow::pinned_room().unwrap());
/// assert!(coroutine.resume(()).returned().unwrap() > 250_000);
/// ```
#[must_use]
#[inline(never)]
pub fn pinned_room() -> Option<usize> {
    let here = 0u8;
    let record = switch::running_record()?;
    // SAFETY: the running coroutine's record is this thread's.
    let (class, maximum) = unsafe { ((*record).class, (*record).maximum) };
    let window = class.window().min(class::open_bytes(maximum));
    Some((&raw const here as usize).saturating_sub(Record::end(record) - window))
}
