//! Freezing a stack that stays where it is: its pages go back to the kernel, its slot and address remain its own.
//!
//! Any code may hold pointers into such a stack, on any thread, and use them at any time. So a frozen stack is guarded, and
//! whoever touches it faults, and the handler thaws it. No access falls between two steps: around each change the pages
//! are without access, and their bytes are read and written through `/proc/self/mem`, which asks for none.
//!
//! ```text
//!             meta.frozen    pages
//!  suspended  0              accessible
//!             BUSY           no access        freeze: bytes read          thaw: bytes written
//!             BUSY           guard, no access │ memory given back         ▲ guard removed
//!  frozen     the block      guard            ▼                           │
//! ```
//!
//! Whoever faults while it is `BUSY` waits. The handler does not free blocks: it hangs them on a list.

use core::cell::Cell;
use core::mem::MaybeUninit;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::freeze::{Frozen, SAVED};
use crate::error::Error;
use crate::report;
use crate::stack::class::PAGE;
use crate::stack::own_memory::OwnMemory;
use crate::stack::{Record, Slot, guard};
use crate::switch::{self, Base, Handle};

/// `Meta::frozen` of a slot that is being frozen or thawed.
const BUSY: usize = 1;

/// How often a stack was frozen or thawed.
static CHANGES: AtomicUsize = AtomicUsize::new(0);

/// Blocks of stacks that the handler has thawed.
static THAWED: AtomicPtr<Frozen> = AtomicPtr::new(ptr::null_mut());

thread_local! {
    /// Address and [`CHANGES`] at this thread's latest fault that had no reason any more.
    static MISSED: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// Freezes a suspended coroutine that grows in place, and has run. `false` if the system lacks something for it.
///
/// # Safety
/// The handle is that of such a coroutine, not marked.
pub(super) unsafe fn freeze(handle: &mut Handle) -> Result<bool, Error> {
    free_thawed();
    // SAFETY: by the caller's word; the block is nobody else's until it is in the slot's entry.
    unsafe {
        let record = (*handle.base).record();
        let (Some(slot), Some(memory)) = (Record::slot(record), OwnMemory::open()) else { return Ok(false) };
        if !guard::by_madvise() {
            return Ok(false);
        }
        let lowest = handle.sp - SAVED;
        let words = (handle.base as usize + size_of::<Base>() - lowest) / size_of::<usize>();
        let block = Frozen::allocate(words)?;
        block.write(Frozen::of(record, words));

        let meta = slot.meta();
        let open = (*record).open;
        let start = slot.end() - open;
        meta.open_pages.store((open / PAGE) as u32, Ordering::Relaxed);
        meta.frozen.store(BUSY, Ordering::SeqCst);
        CHANGES.fetch_add(1, Ordering::SeqCst);
        let give_up = || {
            meta.frozen.store(0, Ordering::Release);
            Frozen::free(block);
        };
        guard::forbid(start, open).inspect_err(|_| give_up())?;
        if !memory.read(lowest, Frozen::words_of(block).cast(), words * size_of::<usize>()) {
            // The mapping becomes what it was: if the kernel lacks memory for that it is short of it for a moment.
            while guard::allow(start, open).is_err() {
                libc::sched_yield();
            }
            give_up();
            return Ok(false);
        }
        // Part of it may be gone after an error: all is written back. If that fails it is frozen, without gain.
        if guard::close(start, open).is_err() && restore(slot, block).is_ok() {
            give_up();
            return Ok(false);
        }
        // With access the guarded pages are one mapping with their neighbours. If this fails they are not.
        let _ = guard::allow(start, open);
        meta.frozen.store(block.as_ptr() as usize, Ordering::Release);
        handle.sp |= switch::FROZEN;
        Ok(true)
    }
}

/// Thaws the coroutine of a handle that says it is frozen in place, unless somebody else has.
pub(super) fn thaw(handle: &mut Handle) -> Result<(), Error> {
    if let Some(slot) = Slot::containing(handle.base as usize)
        && let Some(block) = thaw_slot(slot)?
    {
        // SAFETY: its stack is thawed: nobody knows of the block any more.
        unsafe { Frozen::free(block) };
    }
    free_thawed();
    handle.sp &= !switch::FROZEN;
    Ok(())
}

/// True if the stack with this base is frozen in place.
pub(super) fn is_frozen(base: *const Base) -> bool {
    Slot::containing(base as usize).is_some_and(|slot| slot.meta().frozen.load(Ordering::Acquire) != 0)
}

/// Lets `look` see the block of the stack with this base, if it is frozen.
pub(super) fn peek<R>(base: *const Base, look: impl FnOnce(&Frozen) -> R) -> Option<R> {
    let slot = Slot::containing(base as usize)?;
    let block = take_block(slot)?;
    // SAFETY: whoever has taken the block has it alone.
    let seen = look(unsafe { block.as_ref() });
    slot.meta().frozen.store(block.as_ptr() as usize, Ordering::Release);
    Some(seen)
}

/// In the handler: true if the fault was at a frozen stack, which is thawed now.
pub(super) fn serve(slot: Slot, address: usize) -> bool {
    if slot.meta().frozen.load(Ordering::Acquire) == 0 || !was_open(slot, address) {
        return false;
    }
    match thaw_slot(slot) {
        Ok(None) => {}
        Ok(Some(block)) => push_thawed(block),
        Err(error) => report::cannot_thaw(slot, &error),
    }
    true
}

/// In the handler: makes what is at the address accessible if it is on a frozen stack.
pub(super) fn thaw_at(address: usize) {
    if CHANGES.load(Ordering::Relaxed) != 0
        && let Some(slot) = Slot::containing(address)
    {
        serve(slot, address);
    }
}

/// True if the address is in the pages that were accessible when the slot's stack was frozen.
fn was_open(slot: Slot, address: usize) -> bool {
    address >= slot.end() - slot.meta().open_pages.load(Ordering::Relaxed) as usize * PAGE
}

/// In the handler, of a fault that nothing explains: true if a stack was frozen or thawed since this thread last asked about
/// the address. Then the instruction may just have come too early, and is to be tried again.
pub(super) fn came_too_early(slot: Slot, address: usize) -> bool {
    let changes = CHANGES.load(Ordering::SeqCst);
    changes != 0 && was_open(slot, address) && MISSED.replace((address, changes)) != (address, changes)
}

/// Takes the block of a frozen stack, whose entry then is `BUSY`. `None` if it is not frozen.
fn take_block(slot: Slot) -> Option<NonNull<Frozen>> {
    let frozen = &slot.meta().frozen;
    loop {
        match frozen.load(Ordering::Acquire) {
            // SAFETY: no arguments.
            BUSY => drop(unsafe { libc::sched_yield() }),
            block => {
                let block = NonNull::new(block as *mut Frozen)?;
                let taken = frozen.compare_exchange(
                    block.as_ptr() as usize,
                    BUSY,
                    Ordering::SeqCst,
                    Ordering::Relaxed,
                );
                if taken.is_ok() {
                    return Some(block);
                }
            }
        }
    }
}

/// Thaws a stack; returns its block, which is no longer needed. After an error it is still frozen.
fn thaw_slot(slot: Slot) -> Result<Option<NonNull<Frozen>>, Error> {
    let Some(block) = take_block(slot) else { return Ok(None) };
    CHANGES.fetch_add(1, Ordering::SeqCst);
    // SAFETY: whoever has taken the block has block and stack alone.
    let outcome = unsafe { restore(slot, block) };
    let left = if outcome.is_ok() { 0 } else { block.as_ptr() as usize };
    slot.meta().frozen.store(left, Ordering::Release);
    outcome.map(|()| Some(block))
}

/// Writes a stack back from its block and makes it accessible. After an error nothing of it is accessible.
///
/// # Safety
/// The slot's stack was frozen into this block, and is `BUSY` by the caller.
unsafe fn restore(slot: Slot, block: NonNull<Frozen>) -> Result<(), Error> {
    let open = slot.meta().open_pages.load(Ordering::Relaxed) as usize * PAGE;
    let start = slot.end() - open;
    let no_memory = |bytes| Error::Memory {
        doing: "thawing a coroutine",
        bytes,
        source: std::io::Error::from_raw_os_error(libc::ENOMEM),
    };
    // SAFETY: by the caller's word; nobody has access to these pages until the last line.
    unsafe {
        let memory = OwnMemory::open().ok_or_else(|| no_memory(open))?;
        let mut record = MaybeUninit::<Record>::zeroed();
        let (lowest, bytes) = block.as_ref().place_in_place(slot, open, record.as_mut_ptr());
        guard::forbid(start, open)?;
        guard::open(start, open)?;
        let at = Record::at(slot.end()) as usize;
        let written = memory.write(lowest, Frozen::words_of(block).cast(), bytes)
            && memory.write(at, record.as_ptr().cast(), size_of::<Record>());
        if !written {
            let _ = guard::close(start, open);
            let _ = guard::allow(start, open);
            return Err(no_memory(open));
        }
        guard::allow(start, open)
    }
}

fn push_thawed(block: NonNull<Frozen>) {
    let mut head = THAWED.load(Ordering::Relaxed);
    loop {
        // SAFETY: the block is this thread's until it is on the list.
        unsafe { (*block.as_ptr()).next = head };
        match THAWED.compare_exchange_weak(head, block.as_ptr(), Ordering::Release, Ordering::Relaxed) {
            Ok(_) => return,
            Err(seen) => head = seen,
        }
    }
}

/// Frees the blocks of stacks that the handler has thawed.
fn free_thawed() {
    if THAWED.load(Ordering::Relaxed).is_null() {
        return;
    }
    let mut next = THAWED.swap(ptr::null_mut(), Ordering::Acquire);
    while let Some(block) = NonNull::new(next) {
        // SAFETY: the list, taken whole, is this thread's.
        unsafe {
            next = block.as_ref().next;
            Frozen::free(block);
        }
    }
}
