//! The head of a slot: the coroutine's record, its closure until it runs, and where its stack begins.
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
//! When the stack moves, all of it moves, so every distance from the end stays what it was.

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

/// Bytes of a closure that is kept in the head; a larger one is boxed.
pub(crate) const INLINE_CLOSURE: usize = 1024;

/// Colours: how many different offsets, in cache lines, the bases of stacks have.
const COLOURS: usize = 24;
const LINE: usize = 64;

/// What a coroutine is, apart from its stack. At the end of its slot.
#[repr(C, align(64))]
pub(crate) struct Record {
    /// While the slot is in a stock: the record of the next slot of the stock.
    pub next_in_stock: *mut Record,
    /// Bytes below the slot's end that are accessible.
    pub open: usize,
    /// While the slot is in a stock: for how many bytes it counts in the stock (src/stack/stock.rs). Of a slot that was just taken,
    /// and is new to the thread: [`SCOUT`], if its coroutine is to be one.
    pub counted: usize,
    /// Slots that the stack has left, newest first.
    pub old: Link,
    /// The slot's class.
    pub class: Class,
    pub settings: Settings,
    /// Tells its site how much of its stack it uses (src/site.rs).
    pub scout: bool,
    /// Where it was made; `None` if what it needs is not to be learned.
    pub site: Option<&'static Site>,
    /// The owner leaves something behind that is not just forgotten: `release` has more to do.
    pub tidy: bool,
    /// Whether and when the stack becomes smaller.
    pub watch: Watch,
    pub shrinks: u32,
    /// Why the stack grew in place at its latest growth that might have moved it.
    pub not_moved: Option<NotMoved>,
    /// How many pins hold the stack, once there was one.
    pub pins: Option<Rc<Cell<usize>>>,
    /// Distance from the base to the end.
    pub base_offset: u16,
    /// Drops a closure that never ran, given the address of its place in the head.
    pub drop_closure: unsafe fn(*mut u8),
    pub name: Option<Arc<str>>,
    pub growths: u64,
    pub bytes_copied: u64,
    pub words_rewritten: u64,
    pub highest: usize,
    /// Meaningful if `growths` is not 0.
    pub last: LastGrowth,
}

/// No number of bytes.
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

    /// Bytes from `here`, an address in the running coroutine's own stack, to the end of its slot. Of two addresses inside, which
    /// move together should it overflow meanwhile; the end, one past them, does not.
    ///
    /// By one instruction: a compiler may take the difference in two, with something between them that is no address and does
    /// not move. No growth point is there, but torture moves stacks elsewhere, too.
    #[inline]
    pub(crate) fn bytes_above(record: *const Self, here: usize) -> usize {
        let mut between = record as usize;
        // SAFETY: subtracts.
        unsafe { asm!("sub {}, {}", inout(reg) between, in(reg) here, options(pure, nomem, nostack)) };
        between.wrapping_add(RECORD)
    }

    /// True if `here` is an address in the record's own slot. A coroutine's stack pointer need not be: its code may have gone over
    /// to another stack, and suspended there.
    ///
    /// # Safety
    /// `record` is a coroutine's, and accessible.
    pub(crate) unsafe fn holds(record: *const Self, here: usize) -> bool {
        // SAFETY: the record is that of a coroutine that has not ended, so it is accessible. Of two addresses that move together, as in `bytes_above`.
        Self::bytes_above(record, here) <= unsafe { (*record).class.stride() }
    }

    /// The closure's place, for a closure of at most [`INLINE_CLOSURE`] bytes aligned to 16.
    #[inline]
    pub(crate) fn closure(record: *mut Self, bytes: usize) -> *mut u8 {
        (record as usize - bytes.next_multiple_of(16)) as *mut u8
    }

    /// Where the base of the stack goes, above which `closure` bytes are taken. At the end of a line: the words of a first
    /// frame that every switch touches are in this line and the next one.
    #[inline]
    pub(crate) fn base(record: *mut Self, closure: usize) -> *mut Base {
        let top = record as usize - closure.next_multiple_of(LINE) - BASE;
        let room = (HEAD - RECORD - BASE - closure.next_multiple_of(LINE)) / LINE + 1;
        (top - colour(Self::end(record), room.min(COLOURS)) * LINE) as *mut Base
    }

    /// Writes what a record says of a coroutine to which nothing has happened yet.
    ///
    /// # Safety
    /// The slot of `record` is accessible and the caller's. What was there needs no drop: `release` takes that out.
    #[inline(always)]
    pub(crate) unsafe fn clear(record: *mut Self) {
        // SAFETY: the slot is accessible and the caller's, and what was there needs no drop.
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

    /// The size of a stack that moves; the maximum of one that stays.
    pub(crate) fn size(&self) -> usize {
        size_of_open(self.open)
    }

    /// Bytes of the slot that are used: what is accessible of a stack that moves, what has been touched of one that stays.
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

    /// What has been counted of it; `size` and `highest` only as far as they are known without asking the kernel.
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
    /// Counts a time that the stack did not move, and notes why.
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
    /// Its record, which is accessible. It lies in the window of the stack: when the stack moves, so does this pointer.
    #[inline(always)]
    pub(crate) fn record(self) -> *mut Record {
        // SAFETY: the base of a running coroutine is accessible.
        unsafe { (*self.base()).record() }
    }

    /// Lets `look` see its record, and write it. Not within itself.
    #[inline]
    pub(crate) fn with_record<R>(self, look: impl FnOnce(&mut Record) -> R) -> R {
        // SAFETY: the record of a running coroutine is accessible. Only its thread uses it: this one, which does nothing else
        // with it meanwhile. Should this stack move, on which `look` may run, the reference moves with it.
        look(unsafe { &mut *self.record() })
    }
}

/// A colour below `colours`, the same for all slots in a MiB, and from MiB to MiB in no regular pattern.
///
/// A few neighbours have the same, 16 at most: processors fetch ahead for who resumes them in turn, at equal distances. Not more, lest
/// a hundred coroutines meet in a few sets of the first cache.
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
