//! Pins keep a stack in place for a while; pinned code keeps every stack with one of its frames in place.

use core::cell::Cell;
use core::marker::PhantomData;
use core::ops::{ControlFlow, Range};
use core::sync::atomic::{AtomicUsize, Ordering};
use std::rc::Rc;

use crate::map::objects;
use crate::size;
use crate::stack::record::Record;
use crate::switch::{self, Running};

/// While this value lives, the stack of the coroutine that made it does not move: it grows in place.
///
/// Use a pin for code that keeps a pointer to a local where relocation cannot see it, such as `std::thread::scope` or a C
/// library with callbacks. [`pinned_room`] says how much the stack can grow; beyond that it overflows. A pin has no effect
/// outside coroutines, or in one that grows in place anyway.
///
/// A leaked pin holds for the rest of the coroutine's life.
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
    /// A pin belongs to a coroutine, and a coroutine to a thread.
    not_send: PhantomData<*mut ()>,
}

/// Pins the stack of the running coroutine until the returned guard is dropped.
///
/// ```
/// let pin = regrow::pin(); // outside a coroutine: nothing
/// drop(pin);
/// ```
pub fn pin() -> Pinned {
    let count = switch::running().map(Running::record).map(|record| {
        let fresh = Rc::new(Cell::new(0));
        // SAFETY: the running coroutine's record is accessible, and only this thread uses it. If the stack has moved meanwhile,
        // this pointer to its head has moved with it.
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

/// Bytes that the running coroutine's stack can still grow and hold without moving. `None` outside coroutines, and on another
/// stack to which a coroutine's code has switched.
///
/// A stack that moves has slack of its own size below it, at least 44 KiB and at most up to its maximum. A stack that grows in
/// place has its whole window. A pinned stack that needs more ends the process with an overflow report: start such a coroutine
/// larger ([`Builder::first_size`](crate::Builder::first_size)).
///
/// ```
/// let mut coroutine = regrow::Coroutine::<(), (), usize>::new(|_, ()| regrow::pinned_room().unwrap());
/// assert!(coroutine.resume(()).returned().unwrap() > 250_000);
/// ```
#[must_use]
#[inline(never)]
pub fn pinned_room() -> Option<usize> {
    let here = 0u8;
    let record = switch::running()?.record();
    // SAFETY: the running coroutine's record is accessible, and only this thread uses it.
    let (class, maximum, own) = unsafe {
        ((*record).class, (*record).settings.maximum(), Record::holds(record, &raw const here as usize))
    };
    if !own {
        return None;
    }
    let window = class.window().min(size::open_bytes(maximum));
    Some(window.saturating_sub(Record::bytes_above(record, &raw const here as usize)))
}

/// Number of code ranges that can be pinned at a time.
const MOST_CODE: usize = 64;

/// Pinned code, read by the fault handler: first and last byte. An entry whose last byte is 0 is free.
static CODE: [[AtomicUsize; 2]; MOST_CODE] =
    [const { [AtomicUsize::new(0), AtomicUsize::new(0)] }; MOST_CODE];

/// Number of entries of [`CODE`] that have ever been used.
static CODE_USED: AtomicUsize = AtomicUsize::new(0);

/// While this value lives, a stack with a frame of the code does not move; see [`pin_code`].
///
/// ```
/// use regrow::PinnedCode;
/// /// A C library that keeps pointers to its locals in its own structures; loaded, and pinned.
/// struct Library {
///     code: PinnedCode,
/// }
/// # let start = regrow::pin_code as *const () as usize;
/// # let range = start..start + 64;
/// let library = Library { code: regrow::pin_code(range).expect("fewer than 64 ranges are pinned") };
/// # drop(library);
/// ```
#[must_use = "the code is pinned while this value lives"]
#[derive(Debug)]
pub struct PinnedCode(Vec<usize>);

/// Keeps every stack in place that has a frame of this code, while the result lives. Use it for code that keeps pointers to its
/// locals outside the stack, such as a C library. It needs frame maps ([`Maps::Off`](crate::Maps::Off) looks at no frames).
///
/// `None` if 64 ranges are already pinned.
///
/// ```
/// let start = regrow::pin_code as *const () as usize;
/// let pinned = regrow::pin_code(start..start + 64).unwrap();
/// drop(pinned);
/// ```
pub fn pin_code(code: Range<usize>) -> Option<PinnedCode> {
    let mut pinned = PinnedCode(Vec::new());
    pinned.add(code).then_some(pinned)
}

/// As [`pin_code`], for all code of a loaded object (the program or a shared library) whose file name begins with `name`, such
/// as `"libsqlite3.so"`. `None` if there is no such object, or if too many ranges are pinned.
///
/// ```
/// let libc = regrow::pin_object("libc.so").expect("the C library");
/// drop(libc);
/// assert!(regrow::pin_object("no such library").is_none());
/// ```
pub fn pin_object(name: &str) -> Option<PinnedCode> {
    let mut found = Vec::new();
    objects::visit(|object| {
        let file = object.path().to_bytes().rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        if file.starts_with(name.as_bytes()) {
            found.extend(object.code());
        }
        ControlFlow::Continue(())
    });
    let mut pinned = PinnedCode(Vec::new());
    let all = found.into_iter().all(|code| pinned.add(code));
    (all && !pinned.0.is_empty()).then_some(pinned)
}

impl PinnedCode {
    fn add(&mut self, code: Range<usize>) -> bool {
        let last = code.end.saturating_sub(1).max(1);
        let claim = |entry: &[AtomicUsize; 2]| {
            entry[1].compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let Some(at) = CODE.iter().position(claim) else { return false };
        CODE_USED.fetch_max(at + 1, Ordering::AcqRel);
        CODE[at][0].store(code.start, Ordering::Relaxed);
        CODE[at][1].store(last, Ordering::Release);
        self.0.push(at);
        true
    }
}

impl Drop for PinnedCode {
    fn drop(&mut self) {
        for &at in &self.0 {
            CODE[at][1].store(0, Ordering::Release);
        }
    }
}

/// True if a frame at `pc` keeps its stack in place.
pub(crate) fn is_pinned_code(pc: usize) -> bool {
    let used = CODE_USED.load(Ordering::Acquire);
    CODE.iter().take(used).any(|[first, last]| {
        let last = last.load(Ordering::Acquire);
        pc <= last && pc >= first.load(Ordering::Relaxed)
    })
}
