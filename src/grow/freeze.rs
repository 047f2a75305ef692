//! Freezing: the used bytes of a suspended coroutine in a block of just their size, its slot given to others.
//!
//! ```text
//!      slot                                  block
//!   end   ┌────────────┐
//!         │ record     │ ── what differs ──► ┌────────────┐
//!         │ ...        │    from a new one   │ Frozen     │
//!  base   ├────────────┤                     ├────────────┤
//!         │ frames     │ ─── pointers ─────► │ words      │
//!    sp   │ saved regs │     made relative   └────────────┘
//!         └────────────┘
//! ```
//!
//! Frames are walked and judged once, when they are frozen: words that point into the stack are moved to [`NOWHERE`], a
//! stretch of addresses that no processor has. So thawing, into whatever slot is free, is a scan for these.
//!
//! A stale pointer into a frozen stack cannot be caught: its slot is somebody else's. That is the price of giving it away.
//!
//! Stacks that grow in place use the same blocks, but keep their slot and their words as they are: src/grow/in_place.rs.

use core::mem::MaybeUninit;
use core::ptr::{self, NonNull};
use core::slice;
use core::sync::atomic::Ordering;
use std::alloc::{Layout, alloc, dealloc};

use super::obey::{self, Copied, Stopped};
use super::reason::{self, NotMoved, Reason};
use super::relocate::suspended_registers;
use super::rewrite::Window;
use super::state::State;
use super::touched::{Told, Touched};
use super::{Maps, Shrink, Watch, in_place, shrink};
use crate::error::Error;
use crate::map;
use crate::site::Site;
use crate::stack::class::{Class, PAGE, open_bytes, size_of_open};
use crate::stack::{Link, Record, Slot, cache, guard};
use crate::stats::{Growth, Stats};
use crate::switch::{self, Base, Handle};

/// One past the window that pointers into frozen stacks are moved to: not canonical, so no address is in it.
const NOWHERE: usize = 0x5245_4752_0000_0000;

/// What a suspend saves below its stack pointer (src/switch.rs).
pub(super) const SAVED: usize = 24;
const WORD: usize = size_of::<usize>();

/// The head of a block, before its words.
#[repr(C, align(16))]
pub(crate) struct Frozen {
    /// The bytes of the record, if there is more to it than the following. To be moved out, not dropped.
    record: Option<Box<MaybeUninit<Record>>>,
    /// In place only; with the entry: whom to tell when the stack is touched.
    chain: Chain,
    site: *const Site,
    /// Words that follow: from what the suspend saved to the first word of the base.
    words: u32,
    entry: u32,
    /// In place only: the most pages that were seen to have memory.
    highest: u32,
    base_offset: u16,
    first_log: u8,
    maximum_log: u8,
    maps: Maps,
    shrink: Shrink,
    growth: Growth,
    slack_first: bool,
    raw: bool,
    /// In place only: its pages are without access, not guarded.
    pub(super) forbidden: bool,
}

const _: () = assert!(size_of::<Frozen>() == 48);

/// What links a block to others.
#[derive(Clone, Copy)]
union Chain {
    /// While the stack is frozen: the list to which its block goes when it is touched.
    told: *const Touched,
    /// On the list: the next block.
    next: *mut Frozen,
}

impl Frozen {
    fn layout(words: usize) -> Option<Layout> {
        Layout::from_size_align(size_of::<Self>() + words * WORD, align_of::<Self>()).ok()
    }

    /// Bytes of the block.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>() + self.words as usize * WORD
    }

    /// Words of the stack that are in the block.
    pub(super) fn words(&self) -> usize {
        self.words as usize
    }

    /// Says whom to tell when the stack, frozen in place, is touched.
    pub(crate) fn tell(&mut self, told: Told) {
        self.chain = Chain { told: told.list };
        self.entry = told.entry;
    }

    /// The list that was told.
    ///
    /// # Safety
    /// The block is of a stack that is frozen in place, and not on a list.
    pub(super) unsafe fn told(&self) -> *const Touched {
        // SAFETY: by the caller's word `tell` was the last to write it.
        unsafe { self.chain.told }
    }

    /// Which of its owner's the stack is.
    pub(super) fn entry(&self) -> u32 {
        self.entry
    }

    /// Links the block to the next one on a list.
    pub(super) fn link_to(&mut self, next: *mut Self) {
        self.chain = Chain { next };
    }

    /// The next block on the list.
    ///
    /// # Safety
    /// The block is on a list, or taken off with the whole of it.
    pub(super) unsafe fn next(&self) -> *mut Self {
        // SAFETY: by the caller's word `link_to` was the last to write it.
        unsafe { self.chain.next }
    }

    /// The record, if it is kept as a whole.
    fn record(&self) -> Option<&Record> {
        // SAFETY: the bytes of a record, which nobody moves out before the block is gone.
        self.record.as_ref().map(|record| unsafe { record.assume_init_ref() })
    }

    pub(crate) fn growth(&self) -> Growth {
        self.growth
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.record()?.name.as_deref()
    }

    pub(crate) fn not_moved(&self) -> Option<NotMoved> {
        self.record()?.not_moved
    }

    pub(crate) fn stats(&self) -> Stats {
        let used = self.words as usize * WORD + usize::from(self.base_offset);
        let size = match self.growth {
            Growth::InPlace => used.next_multiple_of(PAGE),
            Growth::Relocate => size_of_open(used.next_multiple_of(PAGE)).next_power_of_two(),
        };
        let (counters, highest) = match self.record() {
            Some(record) => (record.counters(), record.highest),
            None => (Stats::NONE, self.first_highest()),
        };
        Stats { size, highest: highest.max(size), ..counters }
    }

    /// The most bytes that a stack ever had about which there is no more to say.
    fn first_highest(&self) -> usize {
        match self.growth {
            Growth::InPlace => self.highest as usize * PAGE,
            Growth::Relocate => 1 << self.first_log,
        }
    }

    /// # Safety
    /// A block that [`freeze`] made.
    pub(super) unsafe fn words_of(block: NonNull<Self>) -> *mut usize {
        // SAFETY: the words follow the head.
        unsafe { block.as_ptr().add(1).cast() }
    }
}

/// Lets `look` see the block of the coroutine, if it is frozen. One that is frozen in place may have thawed meanwhile.
pub(crate) fn peek<R>(handle: &Handle, look: impl FnOnce(&Frozen) -> R) -> Option<R> {
    match State::of(handle) {
        // SAFETY: a block without a slot is the coroutine's as long as the handle says so.
        State::FrozenElsewhere(block) => Some(look(unsafe { block.as_ref() })),
        State::FrozenHere => in_place::peek(handle.base, |frozen| look(frozen)),
        _ => None,
    }
}

/// Says whom to tell when the stack is touched, if it is frozen in place.
///
/// # Safety
/// The list lives as long as it is frozen.
pub(crate) unsafe fn tell(handle: &Handle, told: Told) {
    if let State::FrozenHere = State::of(handle) {
        in_place::peek(handle.base, |frozen| frozen.tell(told));
    }
}

/// Puts a suspended coroutine into a block, and gives its slot or its pages back. `false` if it must stay as it is: it
/// never ran, is pinned, or a frame cannot be moved.
///
/// # Safety
/// The handle is that of a coroutine suspended on its own stack, not marked; the list in `told` lives as long as it is frozen.
pub(crate) unsafe fn freeze(handle: &mut Handle, told: Told) -> Result<bool, Error> {
    // SAFETY: the caller says that it is suspended on its own stack: its record, and its words from what the suspend saved
    // up to its base, are accessible and change no more until it is resumed.
    unsafe {
        let record = (*handle.base).record();
        if switch::is_fresh(handle.sp) {
            return Ok(false);
        }
        if (*record).growth == Growth::InPlace {
            return if (*record).is_pinned() { Ok(false) } else { in_place::freeze(handle, told) };
        }
        if (*record).is_pinned() {
            let frame = switch::registers_of(handle.sp).pc();
            reason::note(record, NotMoved { reason: Reason::Pinned, frame });
            return Ok(false);
        }
        let count = (handle.base as usize - (handle.sp - SAVED)) / WORD + 1;
        let block = Frozen::allocate(count)?;
        let judged = match copy_to_nowhere(handle, block, count) {
            Err((reason, _)) if reason::knows_more(reason) => copy_to_nowhere(handle, block, count),
            judged => judged,
        };
        if let Err((reason, frame)) = judged {
            Frozen::deallocate(block, count);
            reason::note(record, NotMoved { reason, frame });
            return Ok(false);
        }
        block.write(Frozen::of(record, count));
        // Those who follow an old slot to where its stack is find that it is nowhere.
        point_old_slots(record, 0);
        if (*record).open > (*record).first_open {
            let _ = cache::resize(record, (*record).first_open); // if that fails the slot is merely larger
        }
        cache::put(record);
        guard::owe();
        handle.sp = block.as_ptr() as usize | switch::FROZEN;
        handle.base = ptr::null_mut();
        Ok(true)
    }
}

/// Copies a stack into the words of a block, where what points into it points to [`NOWHERE`]. After an error the words are no good.
///
/// # Safety
/// The handle is that of a coroutine suspended on its own stack, which moves; the block has room for its `count` words.
unsafe fn copy_to_nowhere(handle: &Handle, block: NonNull<Frozen>, count: usize) -> Result<(), Stopped> {
    let lowest = handle.sp - SAVED;
    // SAFETY: the stack is suspended, so its words, from those that the suspend saved up to the first of the base, are
    // accessible and do not change; those of the block are nobody else's yet.
    unsafe {
        let record = (*handle.base).record();
        let words = Frozen::words_of(block);
        ptr::copy_nonoverlapping(lowest as *const usize, words, count);
        let (start, parked) = suspended_registers(handle.sp);
        let copied = Copied {
            lowest,
            old: slice::from_raw_parts(lowest as *const usize, count),
            new: slice::from_raw_parts_mut(words, count),
            window: Window::new(lowest..Record::end(record), NOWHERE),
            parked,
        };
        obey::rewrite(&map::process().read(), &start, (*record).maps, copied).map(drop)
    }
}

/// Brings a frozen coroutine back onto a stack. After an error it is still frozen.
///
/// # Safety
/// The handle is that of a frozen coroutine; if in place, it may have thawed without the handle knowing.
pub(crate) unsafe fn thaw(handle: &mut Handle) -> Result<(), Error> {
    let State::FrozenElsewhere(block) = State::of(handle) else { return in_place::thaw(handle) };
    // SAFETY: by the caller's word: a block that `freeze` made, and that is nobody else's.
    unsafe {
        let frozen = block.as_ref();
        let count = frozen.words as usize;
        let used = count * WORD + usize::from(frozen.base_offset);
        let size = shrink::fitting(used + used / 2, 1 << frozen.first_log).min(1 << frozen.maximum_log);
        let record = cache::take_again(Class::moving(size), open_bytes(size))?;
        guard::paid();
        let end = Record::end(record);
        let base = end - usize::from(frozen.base_offset);
        let lowest = base + WORD - count * WORD;

        ptr::copy_nonoverlapping(Frozen::words_of(block), lowest as *mut usize, count);
        let window = Window::new(NOWHERE - (end - lowest)..NOWHERE, end);
        window.rewrite(slice::from_raw_parts_mut(lowest as *mut usize, count));

        let (open, class) = ((*record).open, (*record).class);
        frozen.restore_record(record, size);
        (*record).open = open;
        (*record).first_open = open;
        (*record).class = class;
        let base = base as *mut Base;
        switch::restore_base(base, record);
        point_old_slots(record, Record::slot(record).map_or(0, Slot::link));
        handle.sp = lowest + SAVED;
        handle.base = base;
        Frozen::free(block);
        Ok(())
    }
}

/// Says where the stack is that has left its old slots; 0: nowhere.
///
/// # Safety
/// `record` is a suspended coroutine's.
unsafe fn point_old_slots(record: *const Record, to: Link) {
    // SAFETY: by the caller's word.
    if let Some(newest) = Slot::from_link(unsafe { (*record).old }) {
        newest.meta().moved_to.store(to, Ordering::Release);
    }
}

impl Frozen {
    /// A block for so many words, not initialised.
    pub(super) fn allocate(words: usize) -> Result<NonNull<Self>, Error> {
        let layout = Self::layout(words);
        // SAFETY: the layout is not empty.
        let block = layout.and_then(|layout| NonNull::new(unsafe { alloc(layout) }.cast()));
        block.ok_or_else(|| Error::Memory {
            doing: "freezing a coroutine",
            bytes: layout.map_or(words, |layout| layout.size()),
            source: std::io::Error::from_raw_os_error(libc::ENOMEM),
        })
    }

    /// # Safety
    /// A block from [`allocate`](Self::allocate) for so many words, not used afterwards.
    unsafe fn deallocate(block: NonNull<Self>, words: usize) {
        if let Some(layout) = Self::layout(words) {
            // SAFETY: by the caller's word.
            unsafe { dealloc(block.as_ptr().cast(), layout) };
        }
    }

    /// # Safety
    /// A block whose head is initialised, not used afterwards, and whose record has been moved out or is still in its slot.
    pub(super) unsafe fn free(block: NonNull<Self>) {
        // SAFETY: by the caller's word.
        unsafe {
            let words = block.as_ref().words as usize;
            ptr::drop_in_place(block.as_ptr());
            Self::deallocate(block, words);
        }
    }

    /// The head of the block of a coroutine that takes so many words.
    ///
    /// # Safety
    /// `record` is that of a suspended coroutine.
    pub(super) unsafe fn of(record: *mut Record, words: usize) -> Self {
        // SAFETY: by the caller's word. A copied record is moved back, or forgotten.
        unsafe {
            // What a scout's pages would tell is lost.
            (*record).scout = false;
            let more = (*record).tidy
                || (*record).open != (*record).first_open
                || (*record).shrinks != 0
                || (*record).not_moved.is_some();
            Self {
                record: more.then(|| Box::new(record.cast::<MaybeUninit<Record>>().read())),
                chain: Chain { next: ptr::null_mut() },
                site: (*record).site,
                words: words as u32,
                entry: 0,
                highest: ((*record).highest / PAGE) as u32,
                base_offset: (*record).base_offset,
                first_log: (*record).first_log,
                maximum_log: (*record).maximum.trailing_zeros() as u8,
                maps: (*record).maps,
                shrink: (*record).watch.policy(),
                growth: (*record).growth,
                slack_first: (*record).slack_first,
                raw: (*record).raw,
                forbidden: false,
            }
        }
    }

    /// Writes what the record of the stack was that was frozen in place; returns where its words belong, and how many bytes
    /// they are.
    ///
    /// # Safety
    /// `record` is writable; what is there needs no drop. The slot is the one of that stack.
    pub(super) unsafe fn place_in_place(&self, slot: Slot, record: *mut Record) -> (usize, usize) {
        // SAFETY: by the caller's word.
        unsafe {
            self.restore_record(record, 0);
            if self.record.is_none() {
                let open = slot.class().window();
                (*record).open = open;
                (*record).first_open = open;
                (*record).class = slot.class();
            }
        }
        let bytes = self.words as usize * WORD;
        (slot.end() - usize::from(self.base_offset) + size_of::<Base>() - bytes, bytes)
    }

    /// Writes the record that was kept, or one in which nothing has happened yet.
    ///
    /// # Safety
    /// `record` is writable, what is there needs no drop, and a kept record is restored once.
    unsafe fn restore_record(&self, record: *mut Record, size: usize) {
        // SAFETY: by the caller's word.
        unsafe {
            if let Some(kept) = &self.record {
                return record.cast::<MaybeUninit<Record>>().copy_from_nonoverlapping(&raw const **kept, 1);
            }
            Record::clear(record);
            (*record).maximum = 1 << self.maximum_log;
            (*record).growth = self.growth;
            (*record).maps = self.maps;
            (*record).slack_first = self.slack_first;
            (*record).raw = self.raw;
            (*record).site = self.site;
            (*record).watch = Watch::new(self.shrink);
            (*record).first_log = self.first_log;
            (*record).base_offset = self.base_offset;
            (*record).highest = if self.growth == Growth::InPlace { self.first_highest() } else { size };
            (*record).scout = false;
        }
    }
}
