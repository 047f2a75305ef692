//! The block of a frozen stack: its used bytes, and the parts of its record that differ from a new one.
//!
//! ```text
//!      slot                                  block
//!   end   ┌────────────┐
//!         │ record     │ ── what differs ──► ┌────────────┐
//!         │ ...        │    from a new one   │ Frozen     │
//!  base   ├────────────┤                     ├────────────┤
//!         │ frames     │ ──────────────────► │ words      │
//!    sp   │ saved regs │                     └────────────┘
//!         └────────────┘
//! ```

use core::mem::MaybeUninit;
use core::ptr::{self, NonNull};
use std::alloc::{Layout, alloc, dealloc};

use crate::error::Error;
use crate::not_moved::NotMoved;
use crate::settings::{Growth, Settings};
use crate::site::Site;
use crate::size::{PAGE, size_of_open};
use crate::stack::arena::Slot;
use crate::stack::record::Record;
use crate::stack::watch::Watch;
use crate::stats::Stats;
use crate::switch::Base;

pub(crate) const WORD: usize = size_of::<usize>();

/// The head of a block, before its words.
#[repr(C, align(16))]
pub(crate) struct Frozen {
    /// The bytes of the record, if the fields below do not suffice. They are moved out, not dropped.
    record: Option<Box<MaybeUninit<Record>>>,
    /// In place only. While the stack is frozen: the list that its block goes to when it is touched. On the list: the next block.
    chain: *mut (),
    site: Option<&'static Site>,
    /// How many words follow: from those that the suspend saved up to the first word of the base.
    words: u32,
    entry: u32,
    /// In place only: the largest number of pages that had memory.
    highest: u32,
    base_offset: u16,
    settings: Settings,
    /// In place only: its pages are without access instead of guarded.
    pub(crate) forbidden: bool,
}

const _: () = assert!(size_of::<Frozen>() == 48);

impl Frozen {
    fn layout(words: usize) -> Option<Layout> {
        Layout::from_size_align(size_of::<Self>() + words * WORD, align_of::<Self>()).ok()
    }

    /// The size of the block in bytes.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>() + self.words as usize * WORD
    }

    /// The size in bytes of the slot's used part, from these words up.
    pub(crate) fn used(&self) -> usize {
        self.words() * WORD + usize::from(self.base_offset)
    }

    /// Bytes from the base to the end of the slot.
    pub(crate) fn base_offset(&self) -> usize {
        usize::from(self.base_offset)
    }

    /// How many words of the stack are in the block.
    pub(crate) fn words(&self) -> usize {
        self.words as usize
    }

    /// Names the list that learns when the stack, frozen in place, is touched.
    ///
    /// `list` is the address of a list (src/freeze/touched.rs), `entry` the stack's number there.
    pub(crate) fn tell(&mut self, list: *const (), entry: u32) {
        self.chain = list.cast_mut();
        self.entry = entry;
    }

    /// The list that [`tell`](Self::tell) named, as long as the block is not on it.
    pub(crate) fn told(&self) -> *const () {
        self.chain
    }

    /// The stack's number for the owner of its list.
    pub(crate) fn entry(&self) -> u32 {
        self.entry
    }

    /// Links the block to the next one on a list.
    pub(crate) fn link_to(&mut self, next: *mut Self) {
        self.chain = next.cast();
    }

    /// The next block on the list, if the block is on one, or was taken off together with all others.
    pub(crate) fn next(&self) -> *mut Self {
        self.chain.cast()
    }

    /// The record, if the whole of it is kept.
    fn record(&self) -> Option<&Record> {
        // SAFETY: these are the bytes of a record, which are not moved out before the block is freed.
        self.record.as_ref().map(|record| unsafe { record.assume_init_ref() })
    }

    pub(crate) fn settings(&self) -> Settings {
        self.settings
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.record()?.name.as_deref()
    }

    pub(crate) fn not_moved(&self) -> Option<NotMoved> {
        self.record()?.not_moved
    }

    pub(crate) fn stats(&self) -> Stats {
        let used = self.used();
        let size = match self.settings.growth {
            Growth::InPlace => used.next_multiple_of(PAGE),
            Growth::Relocate => size_of_open(used.next_multiple_of(PAGE)).next_power_of_two(),
        };
        let (counters, highest) = match self.record() {
            Some(record) => (record.counters(), record.highest),
            None => (Stats::NONE, self.first_highest()),
        };
        Stats { size, highest: highest.max(size), ..counters }
    }

    /// The most bytes that the stack had, if no record is kept.
    fn first_highest(&self) -> usize {
        match self.settings.growth {
            Growth::InPlace => self.highest as usize * PAGE,
            Growth::Relocate => self.settings.first_size(),
        }
    }

    /// Where the words of a block are: behind its head.
    pub(crate) fn words_of(block: NonNull<Self>) -> *mut usize {
        block.as_ptr().wrapping_add(1).cast()
    }
}

impl Frozen {
    /// Allocates a block for so many words, uninitialised.
    pub(crate) fn allocate(words: usize) -> Result<NonNull<Self>, Error> {
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
    /// The block came from [`allocate`](Self::allocate) for so many words, and is not used afterwards.
    pub(crate) unsafe fn deallocate(block: NonNull<Self>, words: usize) {
        if let Some(layout) = Self::layout(words) {
            // SAFETY: the block was allocated with this layout, and is not used afterwards.
            unsafe { dealloc(block.as_ptr().cast(), layout) };
        }
    }

    /// # Safety
    /// The block's head is initialised, it is not used afterwards, and its record has been moved out or is still in its slot.
    pub(crate) unsafe fn free(block: NonNull<Self>) {
        // SAFETY: the caller guarantees that the head is initialised and the block not used afterwards.
        unsafe {
            let words = block.as_ref().words as usize;
            ptr::drop_in_place(block.as_ptr());
            Self::deallocate(block, words);
        }
    }

    /// The head of the block of a suspended coroutine with so many words. A kept record is moved back
    /// later, or forgotten. Until then its contents have two owners, and this one does not use them.
    pub(crate) fn of(record: &mut Record, words: usize) -> Self {
        record.scout = false; // the count of a scout's pages is lost
        let more = record.tidy
            || record.open != record.class.first_open()
            || record.shrinks != 0
            || record.not_moved.is_some();
        // SAFETY: the record is copied as bytes. They are used as a record only after they were moved back.
        let kept = || unsafe { Box::new(ptr::from_ref(record).cast::<MaybeUninit<Record>>().read()) };
        Self {
            record: more.then(kept),
            chain: ptr::null_mut(),
            site: record.site,
            words: words as u32,
            entry: 0,
            highest: (record.highest / PAGE) as u32,
            base_offset: record.base_offset,
            settings: record.settings,
            forbidden: false,
        }
    }

    /// Writes the record of a stack that was frozen in place. Returns where its words belong, and how many bytes they are.
    ///
    /// # Safety
    /// `record` is writable, and its contents need no drop. The slot is that of the stack.
    pub(crate) unsafe fn place_in_place(&self, slot: Slot, record: *mut Record) -> (usize, usize) {
        // SAFETY: the record is writable, and its contents need no drop.
        unsafe {
            self.restore_record(record, 0);
            if self.record.is_none() {
                let open = slot.class().window();
                (*record).open = open;
                (*record).class = slot.class();
            }
        }
        let bytes = self.words as usize * WORD;
        (slot.end() - usize::from(self.base_offset) + size_of::<Base>() - bytes, bytes)
    }

    /// Writes the kept record, or else one to which nothing has happened yet.
    ///
    /// # Safety
    /// `record` is writable, its contents need no drop, and a kept record is restored only once.
    pub(crate) unsafe fn restore_record(&self, record: *mut Record, size: usize) {
        // SAFETY: the record is writable, and its contents need no drop. A kept record is moved out once.
        unsafe {
            if let Some(kept) = &self.record {
                return record.cast::<MaybeUninit<Record>>().copy_from_nonoverlapping(&raw const **kept, 1);
            }
            Record::clear(record);
            (*record).settings = self.settings;
            (*record).site = self.site;
            (*record).watch = Watch::new(self.settings.shrink);
            (*record).base_offset = self.base_offset;
            (*record).highest =
                if self.settings.growth == Growth::InPlace { self.first_highest() } else { size };
        }
    }
}
