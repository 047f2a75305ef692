//! The head of a slot: the coroutine's record, its closure until it runs, and the place where its stack begins.
//!
//! ```text
//!   end   ┌────────────────────────────┐
//!         │ Record                     │ cold: limits, counters, name
//!         ├────────────────────────────┤
//!         │ closure, until it starts   │ at most INLINE_CLOSURE bytes, else a Box of it
//!         ├────────────────────────────┤
//!         │ colour: 0 to 23 lines      │ so that the first frames of many stacks do not
//!         ├────────────────────────────┤ share the few cache sets that page-aligned ones would
//!  base → │ Base                       │ hot: written by every resume (src/switch.rs)
//!         ├────────────────────────────┤
//!         │ first frame, frames ...    │
//!   end - open                         │ the lowest accessible byte
//!         ├────────────────────────────┤
//!         │ slack (if it moves), guard  │
//!  start  └────────────────────────────┘
//! ```
//!
//! A move takes all of it along, so every distance from the end stays the same.

use core::arch::asm;
use core::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use super::arena::Slot;
use super::free_list::Link;
use super::pages::resident;
use super::watch::Watch;
use crate::not_moved::{self, NotMoved};
use crate::settings::{Growth, Settings};
use crate::site::Site;
use crate::size::{Class, HEAD, size_of_open};
use crate::stats::{LastGrowth, Stats};
use crate::switch::{Base, Running};
use crate::trace::{self, Event, Name};

/// The largest closure, in bytes, that is kept in the head. Larger closures are boxed.
pub(crate) const INLINE_CLOSURE: usize = 1024;

/// Colours: the number of different offsets, in cache lines, that the bases of stacks have.
const COLOURS: usize = 24;
const LINE: usize = 64;

/// A coroutine, except its stack. The record lies at the end of its slot.
#[repr(C, align(64))]
pub(crate) struct Record {
    /// In a stock: the record of the stock's next slot.
    pub next_in_stock: *mut Record,
    /// Bytes below the slot's end that are accessible.
    pub open: usize,
    /// In a stock: the number of bytes that the slot counts for (src/stack/stock.rs). In a slot
    /// just taken that is new to the thread: [`SCOUT`], if its coroutine is to be a scout.
    pub counted: usize,
    /// Slots that the stack has left, newest first.
    pub old: Link,
    /// The slot's class.
    pub class: Class,
    pub settings: Settings,
    /// It is a scout: it tells its site how much of its stack it uses (src/site.rs).
    pub scout: bool,
    /// Where it was made; `None` if nothing is to be learned from it.
    pub site: Option<&'static Site>,
    /// It has something that must be dropped or undone: `release` has more to do.
    pub tidy: bool,
    /// Whether and when the stack shrinks.
    pub watch: Watch,
    pub shrinks: u32,
    /// Why the stack did not move, the latest time that it could have.
    pub not_moved: Option<NotMoved>,
    /// How many pins hold the stack, once it has been pinned.
    pub pins: Option<Rc<Cell<usize>>>,
    /// Distance from the base to the end.
    pub base_offset: u16,
    /// Drops a closure that never ran, at this address in the head.
    pub drop_closure: unsafe fn(*mut u8),
    pub name: Option<Arc<str>>,
    pub growths: u64,
    pub bytes_copied: u64,
    pub words_rewritten: u64,
    pub highest: usize,
    /// Valid if `growths` is not 0.
    pub last: LastGrowth,
}

/// This is not a number of bytes.
pub(crate) const SCOUT: usize = usize::MAX;

const RECORD: usize = size_of::<Record>();
const BASE: usize = size_of::<Base>();
const _: () = assert!(
    RECORD + INLINE_CLOSURE + BASE <= HEAD
        && RECORD.is_multiple_of(LINE)
        && INLINE_CLOSURE.is_multiple_of(LINE)
);

impl Record {
    /// The record of the slot that ends at `end`.
    #[inline]
    pub(crate) fn at(end: usize) -> *mut Self {
        (end - RECORD) as *mut Self
    }

    /// One past the highest address of the record's slot.
    #[inline]
    pub(crate) fn end(record: *const Self) -> usize {
        record as usize + RECORD
    }

    /// Bytes from `here`, an address in the running coroutine's own stack, to the end of its slot. Both operands lie
    /// inside the stack, so they move together if it overflows meanwhile. The end lies outside and would not move.
    ///
    /// The difference is taken by one instruction: a compiler may use two, with a value between them that is no
    /// address and does not move. There is no growth point there, but torture moves stacks at other places, too.
    #[inline]
    pub(crate) fn bytes_above(record: *const Self, here: usize) -> usize {
        let mut between = record as usize;
        // SAFETY: the instruction only subtracts.
        unsafe { asm!("sub {}, {}", inout(reg) between, in(reg) here, options(pure, nomem, nostack)) };
        between.wrapping_add(RECORD)
    }

    /// True if `here` is an address in the record's own slot. A coroutine's stack pointer
    /// may be outside: its code may have switched to another stack and suspended there.
    ///
    /// # Safety
    /// `record` is a coroutine's, and accessible.
    pub(crate) unsafe fn holds(record: *const Self, here: usize) -> bool {
        // SAFETY: the record is that of a coroutine that has not ended, so it
        // is accessible. Both addresses move together, as in `bytes_above`.
        Self::bytes_above(record, here) <= unsafe { (*record).class.stride() }
    }

    /// The place of a closure of at most [`INLINE_CLOSURE`] bytes, aligned to 16.
    #[inline]
    pub(crate) fn closure(record: *mut Self, bytes: usize) -> *mut u8 {
        (record as usize - bytes.next_multiple_of(16)) as *mut u8
    }

    /// The place of the stack's base, below `closure` bytes. It is at the end of a line:
    /// so this line and the next one have all words of a first frame that switches touch.
    #[inline]
    pub(crate) fn base(record: *mut Self, closure: usize) -> *mut Base {
        let top = record as usize - closure.next_multiple_of(LINE) - BASE;
        let room = (HEAD - RECORD - BASE - closure.next_multiple_of(LINE)) / LINE + 1;
        (top - colour(Self::end(record), room.min(COLOURS)) * LINE) as *mut Base
    }

    /// Writes the record of a coroutine to which nothing has happened yet.
    ///
    /// # Safety
    /// The caller owns the slot of `record`, which is accessible. The old contents need no drop: `release` has dropped them.
    #[inline(always)]
    pub(crate) unsafe fn clear(record: *mut Self) {
        // SAFETY: the slot is accessible and the caller's, and its old contents need no drop.
        unsafe {
            (*record).old = 0;
            (*record).shrinks = 0;
            (*record).scout = false;
            (*record).site = None;
            (&raw mut (*record).name).write(None);
            (&raw mut (*record).pins).write(None);
            (*record).not_moved = None;
            (*record).tidy = false;
            (*record).growths = 0;
            (*record).bytes_copied = 0;
            (*record).words_rewritten = 0;
        }
    }

    /// The size of a stack that moves; the maximum of a stack that stays.
    pub(crate) fn size(&self) -> usize {
        size_of_open(self.open)
    }

    /// Bytes of the slot that are used: the accessible ones of a stack that moves, the touched ones of a stack that stays.
    pub(crate) fn bytes(&self) -> usize {
        match self.settings.growth {
            Growth::Relocate => self.open,
            Growth::InPlace => {
                let end = Self::end(self);
                resident(end - self.open..end)
            }
        }
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.pins.as_ref().is_some_and(|count| count.get() != 0)
    }

    pub(crate) fn slot(record: *const Self) -> Option<Slot> {
        Slot::containing(record as usize)
    }

    /// Its counters; `size` and `highest` only as far as known without asking the kernel.
    pub(crate) fn counters(&self) -> Stats {
        Stats {
            growths: self.growths,
            shrinks: u64::from(self.shrinks),
            bytes_copied: self.bytes_copied,
            words_rewritten: self.words_rewritten,
            size: self.size(),
            highest: self.highest,
            last: (self.growths != 0).then_some(self.last),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        let size = match self.settings.growth {
            Growth::Relocate => self.size(),
            Growth::InPlace => self.bytes(),
        };
        Stats { size, highest: self.highest.max(size), ..self.counters() }
    }
}

impl Record {
    /// Counts that the stack did not move, and notes why.
    pub(crate) fn note(&mut self, why: NotMoved) {
        not_moved::count(why.reason);
        self.not_moved = Some(why);
        if trace::is_on() {
            trace::tell(&self.called(), &Event::NotMoved(why));
        }
    }

    /// How its coroutine is called in reports and in the trace.
    pub(crate) fn called(&self) -> Name<'_> {
        Name { name: self.name.as_deref(), end: Self::end(self) }
    }
}

impl Base {
    #[inline(always)]
    pub(crate) fn record(&self) -> *mut Record {
        self.owner.cast()
    }
}

impl Running {
    /// Its record, which is accessible. The record moves with the stack, and this pointer is rewritten.
    #[inline(always)]
    pub(crate) fn record(self) -> *mut Record {
        // SAFETY: the base of a running coroutine is accessible.
        unsafe { (*self.base()).record() }
    }

    /// The room that its stack has.
    pub(crate) fn room(self) -> Room {
        let record = self.record();
        // SAFETY: the record of a running coroutine is accessible. It is read field by field: on the coroutine's own stack this may
        // run into the guard, and the handler then writes the record.
        unsafe { Room { open: (*record).open, class: (*record).class, settings: (*record).settings } }
    }

    /// Lets `look` read and write its record. Must not be nested.
    #[inline]
    pub(crate) fn with_record<R>(self, look: impl FnOnce(&mut Record) -> R) -> R {
        // SAFETY: the record of a running coroutine is accessible. Only this thread uses it, and for
        // nothing else meanwhile. If this stack moves while `look` runs on it, the reference moves with it.
        look(unsafe { &mut *self.record() })
    }
}

/// How much stack a coroutine has, and may have.
#[derive(Clone, Copy)]
pub(crate) struct Room {
    /// As in the record.
    pub open: usize,
    pub class: Class,
    pub settings: Settings,
}

impl Room {
    /// The size of a stack that moves; the maximum of one that stays.
    pub(crate) fn size(self) -> usize {
        size_of_open(self.open)
    }
}

/// A colour below `colours`, the same for all slots in a MiB, and irregular from one MiB to the next.
///
/// Up to 16 neighbours share a colour: when they are resumed in turn, processors prefetch at
/// equal distances. More would make a hundred coroutines share few sets of the first cache.
#[inline]
fn colour(end: usize, colours: usize) -> usize {
    let mixed = (end >> 20).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (mixed * colours) >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::PAGE;

    #[test]
    fn the_smallest_stack_has_its_two_kib_whatever_the_closure_and_colour() {
        for page in 1..2000 {
            let end = page * PAGE;
            for closure in [0, 1, 16, 100, 500, INLINE_CLOSURE] {
                let record = Record::at(end);
                let base = Record::base(record, closure) as usize;
                assert_eq!((base + BASE) % LINE, 0);
                assert!(base >= end - HEAD, "a stack of {} bytes", base - (end - PAGE));
                assert!(base + BASE <= Record::closure(record, closure) as usize);
            }
        }
    }

    #[test]
    fn colours_are_spread_evenly() {
        let mut count = [0usize; COLOURS];
        for slot in 0..24_000 {
            count[colour(0x7f00_0000_0000 + slot * 16 * PAGE, COLOURS)] += 1;
        }
        assert!(count.iter().all(|&n| (900..1100).contains(&n)), "{count:?}");
    }
}
