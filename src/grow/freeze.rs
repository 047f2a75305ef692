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

use core::ptr::{self, NonNull};
use core::slice;
use core::sync::atomic::Ordering;
use std::alloc::{Layout, alloc, dealloc};

use super::obey::{self, Copied};
use super::relocate::suspended_registers;
use super::rewrite::Window;
use super::{Maps, Shrink, Watch, shrink};
use crate::error::Error;
use crate::map;
use crate::site::Site;
use crate::stack::class::{Class, open_bytes, size_of_open};
use crate::stack::{Link, Record, Slot, cache};
use crate::stats::{Growth, Stats};
use crate::switch::{self, Base, Handle};

/// One past the window that pointers into frozen stacks are moved to: not canonical, so no address is in it.
const NOWHERE: usize = 0x5245_4752_0000_0000;

/// What a suspend saves below its stack pointer (src/switch.rs).
const SAVED: usize = 24;
const WORD: usize = size_of::<usize>();

/// The head of a block, before its words.
#[repr(C, align(16))]
pub(crate) struct Frozen {
    /// The record, if there is more to it than the following.
    record: Option<Box<Record>>,
    site: *const Site,
    maximum: usize,
    /// Words that follow: from what the suspend saved to the first word of the base.
    words: u32,
    base_offset: u16,
    first_log: u8,
    maps: Maps,
    shrink: Shrink,
    raw: bool,
}

impl Frozen {
    fn layout(words: usize) -> Option<Layout> {
        Layout::from_size_align(size_of::<Self>() + words * WORD, align_of::<Self>()).ok()
    }

    /// Bytes of the block.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>() + self.words as usize * WORD
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.record.as_ref()?.name.as_deref()
    }

    pub(crate) fn stats(&self) -> Stats {
        let used = self.words as usize * WORD + usize::from(self.base_offset);
        let size = size_of_open(used.next_multiple_of(4096)).next_power_of_two();
        match &self.record {
            Some(record) => Stats { size, ..record.stats() },
            None => Stats { size, highest: 1 << self.first_log, ..Stats::NONE },
        }
    }

    /// # Safety
    /// A block that [`freeze`] made.
    unsafe fn words_of(block: NonNull<Self>) -> *mut usize {
        // SAFETY: the words follow the head.
        unsafe { block.as_ptr().add(1).cast() }
    }
}

/// The block of a frozen coroutine.
pub(crate) fn block(handle: &Handle) -> Option<NonNull<Frozen>> {
    let address = handle.sp & !switch::FROZEN;
    if handle.sp & switch::FROZEN == 0 { None } else { NonNull::new(address as *mut Frozen) }
}

/// Puts a suspended coroutine that may move into a block, and gives its slot back. `false` if it must stay as it is: it
/// grows in place, never ran, is pinned, or a frame cannot be moved.
///
/// # Safety
/// The handle is that of a suspended coroutine, not marked.
pub(crate) unsafe fn freeze(handle: &mut Handle) -> Result<bool, Error> {
    // SAFETY: by the caller's word.
    unsafe {
        let record = (*handle.base).record();
        let movable = (*record).growth == Growth::Relocate && !(*record).is_pinned();
        if !movable || switch::is_fresh(handle.sp) {
            return Ok(false);
        }
        let lowest = handle.sp - SAVED;
        let count = (handle.base as usize - lowest) / WORD + 1;
        let out_of_memory = |bytes| Error::Memory {
            doing: "freezing a coroutine",
            bytes,
            source: std::io::Error::from_raw_os_error(libc::ENOMEM),
        };
        let layout = Frozen::layout(count).ok_or_else(|| out_of_memory(count))?;
        let Some(block) = NonNull::new(alloc(layout).cast::<Frozen>()) else {
            return Err(out_of_memory(layout.size()));
        };
        let end = Record::end(record);
        let words = Frozen::words_of(block);
        ptr::copy_nonoverlapping(lowest as *const usize, words, count);
        let (start, parked) = suspended_registers(handle.sp);
        let copied = Copied {
            lowest,
            old: slice::from_raw_parts(lowest as *const usize, count),
            new: slice::from_raw_parts_mut(words, count),
            window: Window::new(lowest..end, NOWHERE),
            parked,
        };
        let judged = obey::rewrite(&map::process().read(), &start, (*record).maps, copied);
        if let Err((reason, frame)) = judged {
            dealloc(block.as_ptr().cast(), layout);
            (*record).not_moved = Some(super::NotMoved { reason, frame });
            return Ok(false);
        }
        let head = Frozen {
            record: None,
            site: (*record).site,
            maximum: (*record).maximum,
            words: count as u32,
            base_offset: (*record).base_offset,
            first_log: (*record).first_log,
            maps: (*record).maps,
            shrink: (*record).watch.policy(),
            raw: (*record).raw,
        };
        block.as_ptr().write(head);
        if (*record).tidy {
            (*block.as_ptr()).record = Some(Box::new(record.read()));
        }
        // Those who follow an old slot to where its stack is find that it is nowhere.
        point_old_slots(record, 0);
        if (*record).open > (*record).first_open {
            let _ = cache::resize(record, (*record).first_open); // if that fails the slot is merely larger
        }
        cache::put(record);
        handle.sp = block.as_ptr() as usize | switch::FROZEN;
        handle.base = ptr::null_mut();
        Ok(true)
    }
}

/// Brings a frozen coroutine back onto a stack. After an error it is still frozen.
///
/// # Safety
/// The handle is that of a frozen coroutine.
pub(crate) unsafe fn thaw(handle: &mut Handle) -> Result<(), Error> {
    let Some(block) = block(handle) else { return Ok(()) };
    // SAFETY: by the caller's word: a block that `freeze` made, and that is nobody else's.
    unsafe {
        let frozen = &mut *block.as_ptr();
        let count = frozen.words as usize;
        let used = count * WORD + usize::from(frozen.base_offset);
        let size = shrink::fitting(used + used / 2, 1 << frozen.first_log).min(frozen.maximum);
        let record = cache::take(Class::moving(size), open_bytes(size))?;
        let end = Record::end(record);
        let base = end - usize::from(frozen.base_offset);
        let lowest = base + WORD - count * WORD;

        ptr::copy_nonoverlapping(Frozen::words_of(block), lowest as *mut usize, count);
        let window = Window::new(NOWHERE - (end - lowest)..NOWHERE, end);
        window.rewrite(slice::from_raw_parts_mut(lowest as *mut usize, count));

        let (open, class) = ((*record).open, (*record).class);
        match frozen.record.take() {
            Some(kept) => record.write(*kept),
            None => frozen.fill_record(record, size),
        }
        (*record).open = open;
        (*record).first_open = open;
        (*record).class = class;
        let base = base as *mut Base;
        switch::restore_base(base, record);
        point_old_slots(record, Record::slot(record).map_or(0, Slot::link));
        handle.sp = lowest + SAVED;
        handle.base = base;
        free(block);
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
    /// Writes a record in which nothing has happened yet.
    ///
    /// # Safety
    /// The slot of `record` is the caller's.
    unsafe fn fill_record(&self, record: *mut Record, size: usize) {
        // SAFETY: by the caller's word; what was there needs no drop.
        unsafe {
            Record::clear(record);
            (*record).maximum = self.maximum;
            (*record).growth = Growth::Relocate;
            (*record).maps = self.maps;
            (*record).raw = self.raw;
            (*record).site = self.site;
            (*record).watch = Watch::new(self.shrink);
            (*record).first_log = self.first_log;
            (*record).base_offset = self.base_offset;
            (*record).highest = size;
        }
    }
}

/// # Safety
/// A block that [`freeze`] made, not used afterwards.
unsafe fn free(block: NonNull<Frozen>) {
    // SAFETY: by the caller's word.
    unsafe {
        let words = block.as_ref().words as usize;
        ptr::drop_in_place(&raw mut (*block.as_ptr()).record);
        if let Some(layout) = Frozen::layout(words) {
            dealloc(block.as_ptr().cast(), layout);
        }
    }
}
