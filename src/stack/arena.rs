//! Arenas: long stretches of address space, each cut into equal slots of one class.
//!
//! ```text
//!  arena  | slot 0 | slot 1 | slot 2 | ... | fresh, never used ...                 |
//!
//!  slot    start                                                               end
//!          | guard 16 KiB | slack: guard pages that may be opened | stack | head |
//!                       (a stack that stays: its window, accessible; src/stack/pages.rs)
//! ```
//!
//! Arithmetic on a small table of arenas resolves an address to its slot, without a lock. Each class has a lock-free list
//! of free slots. Fresh slots are taken in batches. The fault handler may call all of this, even where it interrupted it:
//! no thread waits.

use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicUsize, Ordering};

use super::custody::Custody;
use super::free_list::{FreeList, Link};
use super::guard::Reserved;
use super::pages::Pages;
use super::{carry, guard};
use crate::error::Error;
use crate::hooks;
use crate::size::{ALIGN, CLASSES, Class, PAGE, arena_places, arenas_below, next_place};

const INDEX_BITS: u32 = 22;
const MAX_SLOTS: u32 = 1 << INDEX_BITS;
const MAX_ARENAS: usize = 1000;

/// The data of a slot that lies outside its memory, which may be inaccessible.
#[repr(C)]
pub(crate) struct Meta {
    /// The next slot on the same list: free slots of its class, or old slots of a coroutine.
    pub next: AtomicU32,
    /// For an old slot: the slot its stack moved to.
    pub moved_to: AtomicU32,
    /// For a free slot: how many pages are accessible. For a slot with a frozen stack: how many were.
    pub open_pages: AtomicU32,
    /// [`USABLE`], [`GUARDED`] and [`OLD`].
    pub flags: AtomicU32,
    /// For a slot whose stack is frozen in place: the owner of its block.
    pub frozen: Custody,
}

/// More than reserved address space: the slot can be made accessible.
const USABLE: u32 = 1;
/// The inaccessible part of the slot consists of guard pages.
const GUARDED: u32 = 2;
/// A stack moved away from here and its coroutine has not ended. An access here uses a stale pointer.
pub(crate) const OLD: u32 = 4;

struct Arena {
    start: AtomicUsize,
    /// Written last: while `end` is 0 the arena is not ready.
    end: AtomicUsize,
    meta: AtomicPtr<Meta>,
    slots: AtomicU32,
    /// The first slot that was never used.
    fresh: AtomicU32,
    class: AtomicU8,
    /// The arena lies where there was room. Its addresses may look like common data.
    anywhere: AtomicBool,
}

#[expect(clippy::declare_interior_mutable_const, reason = "an initialiser, copied into statics")]
const NO_ARENA: Arena = Arena {
    start: AtomicUsize::new(0),
    end: AtomicUsize::new(0),
    meta: AtomicPtr::new(core::ptr::null_mut()),
    slots: AtomicU32::new(0),
    fresh: AtomicU32::new(0),
    class: AtomicU8::new(0),
    anywhere: AtomicBool::new(false),
};

static ARENAS: [Arena; MAX_ARENAS] = [NO_ARENA; MAX_ARENAS];
/// How many entries of [`ARENAS`] were ever claimed.
static CLAIMED: AtomicUsize = AtomicUsize::new(0);
/// For each class, the arena that still has fresh slots, plus one; 0 if there is no such arena.
static NEWEST: [AtomicU32; CLASSES] = [const { AtomicU32::new(0) }; CLASSES];
static FREE: [FreeList; CLASSES] = [const { FreeList::new() }; CLASSES];

/// Arenas of moving stacks are searched for from here down. It is 0 at first, then below all of them.
static TOP: AtomicUsize = AtomicUsize::new(0);

/// For each arena, how many of its slots were ever used.
pub(super) fn used() -> impl Iterator<Item = usize> {
    let claimed = CLAIMED.load(Ordering::Acquire).min(MAX_ARENAS);
    ARENAS.iter().take(claimed).map(|arena| match arena.end.load(Ordering::Acquire) {
        0 => 0,
        _ => arena.fresh.load(Ordering::Acquire) as usize,
    })
}

/// For each class, the newest slot of its free list, or 0.
pub(super) fn newest_free() -> impl Iterator<Item = Link> {
    FREE.iter().map(FreeList::newest)
}

#[derive(Clone, Copy)]
pub(crate) struct Slot {
    arena: u32,
    index: u32,
}

impl Slot {
    /// The slot that holds `address`, guard included. `None` outside all arenas.
    pub(crate) fn containing(address: usize) -> Option<Self> {
        let claimed = CLAIMED.load(Ordering::Acquire).min(MAX_ARENAS);
        for (number, arena) in ARENAS.iter().enumerate().take(claimed) {
            let end = arena.end.load(Ordering::Acquire);
            let start = arena.start.load(Ordering::Relaxed);
            if address < end && address >= start {
                let index = (address - start) / arena.class().stride();
                return Some(Self { arena: number as u32, index: index as u32 });
            }
        }
        None
    }

    pub(super) fn of(arena: usize, index: usize) -> Self {
        Self { arena: arena as u32, index: index as u32 }
    }

    /// The numbers of its arena and of the slot there.
    pub(super) fn numbers(self) -> (usize, usize) {
        (self.arena as usize, self.index as usize)
    }

    pub(crate) fn from_link(link: Link) -> Option<Self> {
        let number = link.checked_sub(1)?;
        Some(Self { arena: number >> INDEX_BITS, index: number & (MAX_SLOTS - 1) })
    }

    pub(crate) fn link(self) -> Link {
        (self.arena << INDEX_BITS | self.index).wrapping_add(1)
    }

    pub(crate) fn holds(self, address: usize) -> bool {
        (self.start()..self.end()).contains(&address)
    }

    fn arena(self) -> &'static Arena {
        &ARENAS[self.arena as usize]
    }

    pub(crate) fn class(self) -> Class {
        self.arena().class()
    }

    /// The lowest address, where the guard starts.
    pub(crate) fn start(self) -> usize {
        let arena = self.arena();
        arena.start.load(Ordering::Relaxed) + self.index as usize * arena.class().stride()
    }

    /// One past the highest address, where the head ends.
    pub(crate) fn end(self) -> usize {
        self.start() + self.class().stride()
    }

    pub(crate) fn pages(self) -> Pages {
        Pages::new(self.class(), self.end())
    }

    pub(crate) fn meta(self) -> &'static Meta {
        // SAFETY: an arena's table has an entry for each of its slots, and is never unmapped.
        unsafe { &*self.arena().meta.load(Ordering::Relaxed).add(self.index as usize) }
    }

    pub(crate) fn is_old(self) -> bool {
        self.meta().flags.load(Ordering::Acquire) & OLD != 0
    }

    /// Follows a stack from one of its old slots to its present slot.
    pub(crate) fn current(self) -> Self {
        let mut slot = self;
        while slot.is_old() {
            match Self::from_link(slot.meta().moved_to.load(Ordering::Acquire)) {
                Some(next) => slot = next,
                None => break,
            }
        }
        slot
    }

    /// Takes a slot of `class`, with at least `open` bytes accessible. Returns it and its number of accessible bytes.
    pub(crate) fn take(class: Class, open: usize) -> Result<(Self, usize), Error> {
        let _undisturbed = hooks::undisturbed();
        let slot = match Self::pop(class) {
            Some(slot) => slot,
            None => Self::take_fresh(class, open)?,
        };
        match slot.make_ready(open) {
            Ok(now_open) => Ok((slot, now_open)),
            Err(error) => {
                slot.push();
                Err(error)
            }
        }
    }

    /// Puts an unused slot with `open` accessible bytes on the free list.
    pub(crate) fn give(self, open: usize) {
        let _undisturbed = hooks::undisturbed();
        // SAFETY: the slot is unused, so the contents of its accessible pages are not needed.
        let open = if unsafe { guard::take_back(self.end() - open, open) } { 0 } else { open };
        self.meta().open_pages.store((open / PAGE) as u32, Ordering::Relaxed);
        self.push();
    }

    fn make_ready(self, open: usize) -> Result<usize, Error> {
        let meta = self.meta();
        let flags = meta.flags.load(Ordering::Relaxed);
        let now = meta.open_pages.load(Ordering::Relaxed) as usize * PAGE;
        if now >= open && flags & GUARDED != 0 {
            return Ok(now);
        }
        // SAFETY: the slot was just taken from the list or the arena, so it is ours and holds no stack.
        unsafe {
            if flags & USABLE == 0 {
                guard::make_usable(self.start(), self.class().stride())?;
            }
            if flags & GUARDED == 0 {
                self.make_guarded(open)?;
            } else {
                self.pages().open(now, open)?;
            }
        }
        meta.flags.store(USABLE | GUARDED, Ordering::Relaxed);
        meta.open_pages.store((open / PAGE) as u32, Ordering::Relaxed);
        Ok(open)
    }

    /// Guards everything but the uppermost `open` bytes.
    ///
    /// # Safety
    /// The slot is usable, was never used, and is the caller's.
    unsafe fn make_guarded(self, open: usize) -> Result<(), Error> {
        // SAFETY: the slot is usable, was never used, so holds no stack, and no other thread has it.
        unsafe {
            if guard::by_madvise() {
                guard::install(core::iter::once(self.pages().guards(open)))
            } else {
                guard::open(self.end() - open, open)
            }
        }
    }

    fn pop(class: Class) -> Option<Self> {
        let next = |link| Some(&Self::from_link(link)?.meta().next);
        FREE[class.index()].pop(next).and_then(Self::from_link)
    }

    fn push(self) {
        FREE[self.class().index()].push(self.link(), &self.meta().next);
    }

    /// Takes a batch of fresh slots. All but the returned one go on the free list.
    fn take_fresh(class: Class, open: usize) -> Result<Self, Error> {
        loop {
            if let Some(slot) = Self::take_fresh_batch(class, open)? {
                return Ok(slot);
            }
        }
    }

    /// True if no stack may lie at this place.
    pub(super) fn is_left_out(self) -> bool {
        self.arena().next_place(self.start()) != self.start()
    }

    /// `None` if no slot of the batch may be used.
    fn take_fresh_batch(class: Class, open: usize) -> Result<Option<Self>, Error> {
        let (first, count) = claim_batch(class)?;
        let slots = (0..count).map(|number| Self { index: first.index + number, ..first });
        let slots = slots.filter(|slot| !slot.is_left_out());
        // Two system calls for the batch. If one fails, each slot repeats it when it is taken.
        // SAFETY: these slots were never used, so they hold no stack.
        let flags = unsafe {
            if guard::make_usable(first.start(), count as usize * class.stride()).is_err() {
                0
            } else if first.is_left_out() {
                return Ok(None); // usable too, so that both sides merge into one mapping
            } else if !guard::by_madvise()
                || guard::install(slots.clone().map(|slot| slot.pages().guards(open))).is_err()
            {
                USABLE
            } else {
                USABLE | GUARDED
            }
        };
        let open_pages = if flags & GUARDED == 0 { 0 } else { (open / PAGE) as u32 };
        let mut taken: Option<Self> = None;
        for slot in slots.rev() {
            slot.meta().open_pages.store(open_pages, Ordering::Relaxed);
            slot.meta().flags.store(flags, Ordering::Relaxed);
            if let Some(other) = taken.replace(slot) {
                other.push();
            }
        }
        Ok(taken)
    }
}

impl Arena {
    fn class(&self) -> Class {
        Class::from_index(self.class.load(Ordering::Relaxed) as usize)
    }

    /// The first address, from `from` on, where one of its slots may start.
    fn next_place(&self, from: usize) -> usize {
        if self.anywhere.load(Ordering::Relaxed) { from } else { next_place(self.class(), from) }
    }
}

/// The number of fresh slots to take from `start` on, after `used` others: [`FEW`] within 2 MiB, or `used / 4` if that is
/// more. Guards cost time and page tables, and a program with few coroutines should not pay for many. At a left-out
/// place, the batch is the rest of it.
fn batch(arena: &Arena, start: usize, used: u32) -> u32 {
    let class = arena.class();
    match arena.next_place(start) - start {
        0 => (((2 << 20) / class.stride()) as u32).min(FEW).max(used / 4).clamp(1, MOST_AT_A_TIME),
        left_out => left_out.div_ceil(class.stride()) as u32,
    }
}

const FEW: u32 = 4;
const MOST_AT_A_TIME: u32 = 32;

fn claim_batch(class: Class) -> Result<(Slot, u32), Error> {
    loop {
        let newest = NEWEST[class.index()].load(Ordering::Acquire);
        if let Some(number) = newest.checked_sub(1) {
            let arena = &ARENAS[number as usize];
            let slots = arena.slots.load(Ordering::Relaxed);
            let after = |fresh| {
                let start = Slot { arena: number, index: fresh }.start();
                slots.min(fresh + batch(arena, start, fresh))
            };
            let taken = arena.fresh.fetch_update(Ordering::AcqRel, Ordering::Acquire, |fresh| {
                (fresh < slots).then(|| after(fresh))
            });
            if let Ok(index) = taken {
                return Ok((Slot { arena: number, index }, after(index) - index));
            }
        }
        new_arena(class, newest)?;
    }
}

/// Reserves address space for an arena. True if it lies where there was room.
fn reserve_arena(class: Class, bytes: usize) -> Result<(Reserved, bool), Error> {
    if !class.is_moving() {
        return Reserved::new(bytes, libc::PROT_NONE).map(|start| (start, true));
    }
    let wanted = Reserved::at(bytes, |free| {
        let first = arenas_below(free);
        let top = match TOP.compare_exchange(0, first, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => first,
            Err(top) => top,
        };
        arena_places(class, free.min(top), bytes)
    });
    match wanted {
        Ok(start) => Ok((start, false)),
        // The process has few addresses, or only low ones, as under Valgrind.
        Err(_) => Reserved::aligned(bytes, ALIGN).map(|start| (start, true)),
    }
}

/// Adds an arena eight times as large as the last one of its class, or smaller if the kernel refuses. `seen` is the
/// exhausted arena. If another thread was faster, its arena is used instead.
fn new_arena(class: Class, seen: u32) -> Result<(), Error> {
    let largest = match seen.checked_sub(1) {
        Some(number) => ARENAS[number as usize].slots.load(Ordering::Relaxed).saturating_mul(8),
        None => ((64 << 20) / class.stride()).clamp(4, 64) as u32,
    };
    let mut slots = largest.min(MAX_SLOTS);
    let (memory, anywhere) = loop {
        match reserve_arena(class, slots as usize * class.stride()) {
            Ok(found) => break found,
            Err(error) if slots == 1 => return Err(error),
            Err(_) => slots = slots.div_ceil(4),
        }
    };
    let bytes = slots as usize * class.stride();
    let table = slots as usize * size_of::<Meta>();
    let meta = Reserved::new(table, libc::PROT_READ | libc::PROT_WRITE)?;
    let start = memory.start();
    // SAFETY: the stretch was reserved above and holds no stack. After an error the kernel may use huge pages, which is
    // fine.
    unsafe {
        libc::madvise(start as *mut _, bytes, libc::MADV_NOHUGEPAGE);
        if class.is_moving() {
            carry::register(start, bytes);
        }
    }

    let number = CLAIMED.fetch_add(1, Ordering::AcqRel);
    if number >= MAX_ARENAS {
        CLAIMED.fetch_sub(1, Ordering::AcqRel);
        return Err(Error::Arenas);
    }
    let arena = &ARENAS[number];
    arena.start.store(memory.keep(), Ordering::Relaxed);
    arena.meta.store(meta.keep() as *mut Meta, Ordering::Relaxed);
    arena.slots.store(slots, Ordering::Relaxed);
    arena.class.store(class.index() as u8, Ordering::Relaxed);
    arena.anywhere.store(anywhere, Ordering::Relaxed);
    arena.end.store(start + bytes, Ordering::Release);
    if !anywhere {
        TOP.fetch_min(start - 1, Ordering::Relaxed);
    }
    // If two threads each add an arena, the loser's slots are found later or never. This wastes only address space.
    let _ =
        NEWEST[class.index()].compare_exchange(seen, number as u32 + 1, Ordering::AcqRel, Ordering::Relaxed);
    Ok(())
}
