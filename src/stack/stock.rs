//! Each thread's stock of finished slots: warm, accessible, and taken and put back without a system call.
//!
//! The stock holds at most [`BUDGET`] bytes of memory. Further slots give their memory back and go to the free list of
//! their class. When the thread ends, all slots do.
//!
//! A slot counts with its accessible bytes. For a stack that stays, this is the whole window, most of which may be
//! unused. Only the kernel knows how much is used, and asking takes a hundred times as long as putting. So once half of
//! the budget is taken, only *samples* are measured, and each stack counts with their average. A sample is cut down to
//! [`KEPT`] bytes. Samples are frequent ([`OFTEN`]) while they differ from the average, and rare ([`SELDOM`]) while they
//! agree.
//!
//! The fault handler takes from the same stock, so growth gets warm memory. If it interrupted `take` or `put` (they run
//! on coroutine stacks too), `busy` tells it to leave the stock alone.

use core::cell::Cell;
use core::cmp::Ordering::{Equal, Greater, Less};
use core::ptr;
use core::sync::atomic::{Ordering, compiler_fence};

use super::arena::Slot;
use super::guard;
use super::pages::{Pages, resident};
use super::record::{Record, SCOUT};
use super::scouts;
use crate::error::Error;
use crate::signals;
use crate::size::{CLASSES, Class, PAGE};
use crate::words::words;

/// The bytes of stack memory that a thread keeps for reuse.
const BUDGET: usize = 8 << 20;

const KEPT: usize = 8 * PAGE;

/// One in this many stacks that stay is a sample, at most and at least.
const OFTEN: u32 = 8;
const SELDOM: u32 = 128;

pub(crate) struct Stock {
    first: [Cell<*mut Record>; CLASSES],
    bytes: Cell<usize>,
    busy: Cell<bool>,
    /// How many stacks that stay are put until the next sample, and from one sample to the next.
    until_sample: Cell<u32>,
    interval: Cell<u32>,
    /// The average number of bytes of memory in a sample. Recent samples count for more.
    average: Cell<usize>,
}

thread_local! {
    // Constant and without a destructor. The handler gets its address from `words`. `thread` gives the slots back when
    // the thread ends.
    static STOCK: Stock = const {
        Stock {
            first: [const { Cell::new(core::ptr::null_mut()) }; CLASSES],
            bytes: Cell::new(0),
            busy: Cell::new(false),
            until_sample: Cell::new(OFTEN),
            interval: Cell::new(OFTEN),
            average: Cell::new(PAGE),
        }
    };
}

impl Stock {
    #[inline(always)]
    fn pop(&self, class: Class) -> Option<*mut Record> {
        let first = &self.first[class.index()];
        self.busy.set(true);
        compiler_fence(Ordering::SeqCst);
        let record = first.get();
        if !record.is_null() {
            // SAFETY: slots in the stock are accessible and belong to this thread.
            let (next, counted) = unsafe { ((*record).next_in_stock, (*record).counted) };
            first.set(next);
            self.bytes.set(self.bytes.get() - counted);
        }
        compiler_fence(Ordering::SeqCst);
        self.busy.set(false);
        (!record.is_null()).then_some(record)
    }

    /// # Safety
    /// The slot of `record` is accessible and unowned.
    #[inline(always)]
    unsafe fn push(&self, record: *mut Record, class: Class, counted: usize) {
        let first = &self.first[class.index()];
        self.busy.set(true);
        compiler_fence(Ordering::SeqCst);
        // SAFETY: the slot is accessible and unowned, so its record is too.
        unsafe {
            (*record).next_in_stock = first.get();
            (*record).counted = counted;
        }
        first.set(record);
        self.bytes.set(self.bytes.get() + counted);
        compiler_fence(Ordering::SeqCst);
        self.busy.set(false);
    }

    /// How many bytes a slot with a stack that stays counts for, by samples.
    ///
    /// # Safety
    /// The slot of `record` is accessible and unowned.
    unsafe fn weight(&self, record: *mut Record) -> usize {
        let until_sample = self.until_sample.get() - 1;
        self.until_sample.set(until_sample);
        if until_sample == 0 {
            // SAFETY: the slot is unowned, so its contents may be lost.
            unsafe { self.sample(record) };
        }
        self.average.get()
    }

    /// Asks the kernel how much memory a stack that stays has, and cuts it down.
    ///
    /// # Safety
    /// As for [`weight`](Self::weight), of a stack that stays.
    #[cold]
    #[inline(never)]
    unsafe fn sample(&self, record: *mut Record) {
        let end = Record::end(record);
        // SAFETY: the slot is accessible, so its record is readable.
        let (open, class) = unsafe { ((*record).open, (*record).class) };
        let bytes = resident(end - open..end);
        if bytes > KEPT {
            // SAFETY: the slot is unowned, and `open` bytes of it are accessible. The head is in the part that is kept.
            unsafe { Pages::new(class, end).discard(open, KEPT) };
        }
        let average = self.average.get();
        let agrees = bytes <= 2 * average && average <= 2 * bytes;
        let interval = if agrees { (2 * self.interval.get()).min(SELDOM) } else { OFTEN };
        self.interval.set(interval);
        self.until_sample.set(interval);
        // Rounded up, so that the average can reach a larger value.
        self.average.set((3 * average + bytes).div_ceil(4).max(PAGE));
    }
}

/// Readies a thread for coroutines: its signal stack, and the fault handler.
pub(crate) type Prepare = fn() -> Result<(), Error>;

/// Takes a slot of `class` with at least `open` accessible bytes. Only `open` and `class` of its record are right.
///
/// If the stock has no such slot, `prepare` readies the thread first.
#[inline(always)]
pub(crate) fn take(class: Class, open: usize, prepare: Prepare) -> Result<*mut Record, Error> {
    match STOCK.with(|stock| stock.pop(class)) {
        // SAFETY: a slot just taken is ours, so its record is accessible.
        Some(record) if unsafe { (*record).open } == open => Ok(record),
        other => take_slowly(class, open, other, prepare, guard::leave_mappings),
    }
}

/// Like [`take`], for a stack that existed before: it is not refused in order to leave mappings to other code.
pub(crate) fn take_again(class: Class, open: usize, prepare: Prepare) -> Result<*mut Record, Error> {
    let cached = STOCK.with(|stock| stock.pop(class));
    take_slowly(class, open, cached, prepare, || Ok(()))
}

#[cold]
#[inline(never)]
fn take_slowly(
    class: Class,
    open: usize,
    cached: Option<*mut Record>,
    prepare: Prepare,
    may_be_made: fn() -> Result<(), Error>,
) -> Result<*mut Record, Error> {
    if let Some(record) = cached {
        // A stack that moves was cached with a different size.
        // SAFETY: a slot just taken is ours, so its record is accessible.
        return match unsafe { resize(record, open) } {
            Ok(()) => Ok(record),
            Err(error) => {
                // SAFETY: the slot is still ours and empty.
                unsafe { put(record) };
                Err(error)
            }
        };
    }
    prepare()?;
    if class.is_moving() {
        signals::keep_off_moving_stacks();
    }
    may_be_made()?;
    let (slot, now_open) = Slot::take(class, open)?;
    let record = Record::at(slot.end());
    // SAFETY: the slot is ours, and its top page is accessible.
    unsafe {
        (*record).open = now_open;
        (*record).class = class;
        let scout = !class.is_moving() && scouts::is_ones_turn();
        (*record).counted = if scout { SCOUT } else { 0 };
        if now_open > open {
            resize(record, open).inspect_err(|_| slot.give(now_open))?;
        }
    }
    Ok(record)
}

/// Like [`take`], for the fault handler. Returns the slot, its number of accessible bytes, and whether they are warm
/// (used before and not given back).
pub(crate) fn take_in_handler(class: Class, open: usize) -> Result<(Slot, usize, bool), Error> {
    // SAFETY: the pointer is null or that of this thread's stock, which lasts as long as the thread.
    let stock = unsafe { words().stock.get().cast::<Stock>().as_ref() }.filter(|stock| !stock.busy.get());
    let cached = stock.and_then(|stock| stock.pop(class));
    match cached.and_then(|record| Record::slot(record).map(|slot| (slot, record))) {
        // SAFETY: a slot just taken is ours, so its record is accessible.
        Some((slot, record)) => Ok((slot, unsafe { (*record).open }, true)),
        None => Slot::take(class, open).map(|(slot, open)| (slot, open, false)),
    }
}

/// Opens or closes pages so that exactly `open` bytes are accessible.
///
/// # Safety
/// The slot of `record` is accessible and the caller's. Nothing below the `open` bytes is needed.
pub(crate) unsafe fn resize(record: *mut Record, open: usize) -> Result<(), Error> {
    // SAFETY: the slot is accessible and the caller's, so its record is too. Nothing below the `open` bytes is needed.
    unsafe {
        let pages = Pages::new((*record).class, Record::end(record));
        let now = (*record).open;
        match now.cmp(&open) {
            Less => pages.open(now, open)?,
            Equal => {}
            Greater => pages.close(now, open)?,
        }
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
    // SAFETY: the slot is accessible, so its record is.
    let (class, open) = unsafe { ((*record).class, (*record).open) };
    STOCK.with(|stock| {
        let budget = if class.is_moving() { BUDGET } else { BUDGET / 2 };
        if stock.bytes.get() + open <= budget {
            // SAFETY: the slot is the caller's, and accessible.
            unsafe { stock.push(record, class, open) }
        } else {
            // SAFETY: nothing in the slot is needed, and it is the caller's.
            unsafe { put_by_weight(stock, record, class) }
        }
    });
}

/// Like [`put`], with slots counted by samples.
///
/// # Safety
/// As for [`put`].
#[cold]
#[inline(never)]
unsafe fn put_by_weight(stock: &Stock, record: *mut Record, class: Class) {
    // SAFETY: nothing in the slot is needed, and it is the caller's.
    unsafe {
        if !class.is_moving() {
            let weight = stock.weight(record);
            if stock.bytes.get() + weight <= BUDGET {
                return stock.push(record, class, weight);
            }
        }
        give_back(record);
    }
}

/// Gives a slot's memory back to the kernel and puts the slot on the free list of its class.
///
/// # Safety
/// As for [`put`].
unsafe fn give_back(record: *mut Record) {
    let Some(slot) = Record::slot(record) else { return };
    // SAFETY: the slot is accessible and the caller's, so its record is readable; nothing in it is needed any more.
    let open = unsafe {
        let open = (*record).open;
        slot.pages().discard(open, 0);
        open
    };
    slot.give(open);
}

pub(crate) fn of_this_thread() -> *const Stock {
    STOCK.with(ptr::from_ref)
}

/// The counted bytes of memory in this thread's stock.
pub(crate) fn bytes() -> usize {
    STOCK.with(|stock| stock.bytes.get())
}

/// Passes the slots of this thread's stock to `each`. If `each` returns false, the rest of that class is skipped.
pub(crate) fn visit(mut each: impl FnMut(Slot) -> bool) {
    STOCK.with(|stock| {
        for first in &stock.first {
            let mut record = first.get();
            while let Some(slot) = Record::slot(record)
                && each(slot)
            {
                // SAFETY: slots in the stock are accessible and belong to this thread.
                record = unsafe { (*record).next_in_stock };
            }
        }
    });
}

/// Gives all slots of this thread's stock back.
pub(crate) fn flush() {
    STOCK.with(|stock| {
        for index in 0..CLASSES {
            while let Some(record) = stock.pop(Class::from_index(index)) {
                // SAFETY: a slot just taken off the stock is ours.
                unsafe { give_back(record) }
            }
        }
    });
}
