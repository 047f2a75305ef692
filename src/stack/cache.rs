//! Each thread's stock of finished slots: warm, accessible, taken and put back without a system call.
//!
//! The stock of a thread is bounded by [`BUDGET`] bytes of accessible stack; what is above it
//! goes to the free list of its class with its memory given back. When the thread ends all of it does.
//!
//! The fault handler takes from the same stock, so that growing finds warm memory. It may have
//! interrupted `take` or `put` (they run on coroutine stacks too): `busy` tells it to leave the stock alone.

use core::cell::Cell;
use core::cmp::Ordering::{Equal, Greater, Less};
use core::sync::atomic::{Ordering, compiler_fence};

use super::arena::Slot;
use super::class::{CLASSES, Class};
use super::guard;
use super::pages::Pages;
use super::record::Record;
use crate::error::Error;
use crate::thread;

/// Bytes of accessible stack a thread keeps for reuse.
const BUDGET: usize = 8 << 20;

struct Cache {
    first: [Cell<*mut Record>; CLASSES],
    bytes: Cell<usize>,
    busy: Cell<bool>,
}

thread_local! {
    // Without a destructor and constant: reading it is one load, in the handler too.
    // `thread` gives the slots back when the thread ends.
    static CACHE: Cache = const {
        Cache {
            first: [const { Cell::new(core::ptr::null_mut()) }; CLASSES],
            bytes: Cell::new(0),
            busy: Cell::new(false),
        }
    };
}

impl Cache {
    #[inline(always)]
    fn pop(&self, class: Class) -> Option<*mut Record> {
        let first = &self.first[class.index()];
        self.busy.set(true);
        compiler_fence(Ordering::SeqCst);
        let record = first.get();
        if !record.is_null() {
            // SAFETY: cached slots are accessible and belong to this thread.
            let (next, open) = unsafe { ((*record).next_cached, (*record).open) };
            first.set(next);
            self.bytes.set(self.bytes.get() - open);
        }
        compiler_fence(Ordering::SeqCst);
        self.busy.set(false);
        (!record.is_null()).then_some(record)
    }

    /// # Safety
    /// The slot of `record` is accessible and nobody's.
    #[inline(always)]
    unsafe fn push(&self, record: *mut Record, class: Class, open: usize) {
        let first = &self.first[class.index()];
        self.busy.set(true);
        compiler_fence(Ordering::SeqCst);
        // SAFETY: by the caller's word.
        unsafe { (*record).next_cached = first.get() };
        first.set(record);
        self.bytes.set(self.bytes.get() + open);
        compiler_fence(Ordering::SeqCst);
        self.busy.set(false);
    }
}

/// A slot of `class` with at least `open` accessible bytes. Its record's `open` and `class` are
/// right, everything else in it is left over from its last owner.
#[inline(always)]
pub(crate) fn take(class: Class, open: usize) -> Result<*mut Record, Error> {
    match CACHE.with(|cache| cache.pop(class)) {
        // SAFETY: a slot just taken is ours, its record accessible.
        Some(record) if unsafe { (*record).open } == open => Ok(record),
        other => take_slowly(class, open, other, guard::leave_mappings),
    }
}

/// As [`take`], for a stack that there was before: it is not refused in order to leave mappings to others.
pub(crate) fn take_again(class: Class, open: usize) -> Result<*mut Record, Error> {
    let cached = CACHE.with(|cache| cache.pop(class));
    take_slowly(class, open, cached, || Ok(()))
}

#[cold]
#[inline(never)]
fn take_slowly(
    class: Class,
    open: usize,
    cached: Option<*mut Record>,
    may_be_made: fn() -> Result<(), Error>,
) -> Result<*mut Record, Error> {
    if let Some(record) = cached {
        // A stack that stays was cached with another first size than is wanted now.
        // SAFETY: a slot just taken is ours, its record accessible.
        return match unsafe { resize(record, open) } {
            Ok(()) => Ok(record),
            Err(error) => {
                // SAFETY: nothing was put in it.
                unsafe { put(record) };
                Err(error)
            }
        };
    }
    thread::prepare()?;
    may_be_made()?;
    let (slot, now_open) = Slot::take(class, open)?;
    let record = Record::at(slot.end());
    // SAFETY: the slot is ours and its top page accessible.
    unsafe {
        (*record).open = now_open;
        (*record).guarded = 0;
        (*record).class = class;
        if now_open > open {
            resize(record, open).inspect_err(|_| slot.give(now_open))?;
        }
    }
    Ok(record)
}

/// As [`take`], for the fault handler. Returns the slot, how many bytes of it are accessible, and whether they are warm: were
/// used before, and not given back.
pub(crate) fn take_in_handler(class: Class, open: usize) -> Result<(Slot, usize, bool), Error> {
    let cached = CACHE.with(|cache| if cache.busy.get() { None } else { cache.pop(class) });
    match cached.and_then(|record| Record::slot(record).map(|slot| (slot, record))) {
        // SAFETY: a slot just taken is ours, its record accessible.
        Some((slot, record)) => Ok((slot, unsafe { (*record).open }, true)),
        None => Slot::take(class, open).map(|(slot, open)| (slot, open, false)),
    }
}

/// Opens or closes pages so that exactly `open` bytes are accessible.
///
/// # Safety
/// The slot of `record` is accessible and the caller's; nothing below the `open` bytes is needed.
pub(crate) unsafe fn resize(record: *mut Record, open: usize) -> Result<(), Error> {
    // SAFETY: by the caller's word.
    unsafe {
        let pages = Pages::new((*record).class, Record::end(record));
        let (now, guarded) = ((*record).open, (*record).guarded);
        (*record).guarded = match now.cmp(&open) {
            Less => pages.open(now, open, guarded)?,
            Equal => guarded,
            Greater => pages.close(now, open, guarded)?,
        };
        (*record).open = open;
    }
    Ok(())
}

/// Takes back a slot whose coroutine has ended.
///
/// # Safety
/// The slot of `record` is accessible and the caller's, and nothing in it is needed any more.
#[inline(always)]
pub(crate) unsafe fn put(record: *mut Record) {
    // SAFETY: by the caller's word.
    let (class, open) = unsafe { ((*record).class, (*record).open) };
    CACHE.with(|cache| {
        if cache.bytes.get() + open <= BUDGET {
            // SAFETY: by the caller's word.
            unsafe { cache.push(record, class, open) }
        } else {
            // SAFETY: by the caller's word.
            unsafe { give_back(record) }
        }
    });
}

/// Puts a slot on the free list of its class, its memory given back to the kernel.
///
/// # Safety
/// As for [`put`].
#[cold]
#[inline(never)]
unsafe fn give_back(record: *mut Record) {
    // SAFETY: by the caller's word.
    let open = unsafe { (*record).open };
    if let Some(slot) = Record::slot(record) {
        // SAFETY: a slot that is nobody's.
        unsafe { slot.pages().discard(open) };
        slot.give(open);
    }
}

/// Bytes of accessible stack in this thread's stock.
pub(crate) fn bytes() -> usize {
    CACHE.with(|cache| cache.bytes.get())
}

/// Shows the slots of this thread's stock to `each`, which returns false to see no more of their class.
pub(crate) fn visit(mut each: impl FnMut(Slot) -> bool) {
    CACHE.with(|cache| {
        for first in &cache.first {
            let mut record = first.get();
            while let Some(slot) = Record::slot(record)
                && each(slot)
            {
                // SAFETY: cached slots are accessible and belong to this thread.
                record = unsafe { (*record).next_cached };
            }
        }
    });
}

/// Gives all slots of this thread's stock back.
pub(crate) fn flush() {
    CACHE.with(|cache| {
        for index in 0..CLASSES {
            while let Some(record) = cache.pop(Class::from_index(index)) {
                // SAFETY: a slot just taken off the stock is ours.
                unsafe { give_back(record) }
            }
        }
    });
}
