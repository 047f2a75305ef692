//! Freezing a stack that stays in place: its pages go back to the kernel, but it keeps its slot and address.
//!
//! Only the pages from its stack pointer up are frozen. The pages below hold
//! nothing that is needed: their memory is given back, and they stay accessible.
//!
//! Any code on any thread may hold pointers into such a stack, and use them at any time. So a
//! frozen stack is guarded: code that touches it faults, and the handler thaws it. No access may
//! come between two steps. In a process with one thread there is no other code that could make one:
//!
//! ```text
//!             meta.frozen    pages                (src/stack/custody.rs)
//!  suspended  0              accessible
//!             BUSY           accessible       freeze: bytes read          thaw: bytes written
//!             BUSY           │ memory given   │                           ▲
//!  frozen     the block      ▼ back, guard    ▼                           │ guard removed
//! ```
//!
//! With other threads, the pages are made inaccessible around each change. Their
//! bytes are read and written through `/proc/self/mem`, which ignores that:
//!
//! ```text
//!  suspended  0              accessible
//!             BUSY           no access        freeze: bytes read          thaw: bytes written
//!             BUSY           guard, no access │ memory given back         ▲ guard removed
//!  frozen     the block      guard            ▼                           │
//! ```
//!
//! This costs four times as much, nearly all of it in `mprotect`: twice, it cuts the pages out of their mapping and
//! merges them again. It cannot be left out. `MADV_GUARD_INSTALL` on a page in use first frees it and then guards it,
//! and removing a guard leaves a page of zeros: a thread that comes between would read zeros, or its write would be
//! lost. No other way takes a page from all threads at once. Moving it leaves a hole that any `mmap` may fill
//! (`mremap`), or a page of zeros again (`MREMAP_DONTUNMAP`, `UFFDIO_MOVE`). `UFFDIO_WRITEPROTECT` stops only writers.
//!
//! The first [`FEW`] stacks that are frozen among threads stay inaccessible instead of guarded. This
//! saves half of the time, for two mappings each. Where guards cannot be installed in inaccessible
//! pages (before Linux 6.15, or with guards by page protection), all frozen stacks stay so.
//!
//! A thread that faults while the stack is `BUSY` waits for the thread that made it so. That thread
//! must therefore finish: meanwhile its signals are blocked, it has room on its stack, and the process
//! does not fork (src/freeze/forks.rs). The handler does not free blocks: it puts them on a list.

use core::ffi::c_int;
use core::mem::MaybeUninit;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicUsize, Ordering};

use super::alone::{alone, look_for_flag};
use super::block::Frozen;
use super::forks;
use super::touched::{TOUCHED, Told, Touched};
use crate::error::Error;
use crate::report;
use crate::size::PAGE;
use crate::stack::arena::Slot;
use crate::stack::custody::Block;
use crate::stack::guard;
use crate::stack::own_memory::OwnMemory;
use crate::stack::pages::resident;
use crate::stack::record::Record;
use crate::stack::suspended::Suspended;
use crate::switch::{self, Base, Handle, SAVED};
use crate::trace::{self, Event, Name};
use crate::words::words;

/// How many frozen stacks may be mappings of their own: few compared to the 65,530 that a process may have.
const FEW: usize = 1000;

/// How many are now.
static FORBIDDEN: AtomicUsize = AtomicUsize::new(0);

/// How often a stack was frozen or thawed so far.
static CHANGES: AtomicUsize = AtomicUsize::new(0);

/// Freezes a suspended coroutine that grows in place, and has run. After an error nothing has changed.
///
/// # Safety
/// The list in `told` lives as long as the coroutine is frozen.
pub(super) unsafe fn freeze(suspended: &mut Suspended<'_>, told: Told) -> Result<bool, Error> {
    TOUCHED.free();
    look_for_flag();
    forks::prepare()?;
    let Some(slot) = Record::slot(suspended.record()) else { return Ok(false) };
    let lowest = suspended.sp() - SAVED;
    let pages = (slot.end() - lowest).div_ceil(PAGE);
    let unused = resident_below(slot.end() - pages * PAGE, slot.end() - suspended.record().open);
    let words = (suspended.base() as usize + size_of::<Base>() - lowest) / size_of::<usize>();
    let record = suspended.record_mut();
    record.highest = record.highest.max(pages * PAGE + unused);
    let mut block = Frozen::allocate(words)?;
    // SAFETY: no other code knows the block until it is in the slot's entry.
    unsafe {
        block.write(Frozen::of(record, words));
        block.as_mut().tell(told.list.cast(), told.entry);
    }
    let meta = slot.meta();
    meta.open_pages.store(pages as u32, Ordering::Relaxed);
    let outcome = undisturbed(|| {
        meta.frozen.begin();
        CHANGES.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the stack is suspended and `BUSY`, and the block was made for it.
        let outcome = unsafe { put_away(slot, lowest, block) };
        meta.frozen.put(outcome.is_ok().then_some(block.cast()));
        outcome
    });
    if let Err(error) = outcome {
        // SAFETY: the block was not put into the slot's entry.
        unsafe { Frozen::free(block) };
        return Err(error);
    }
    // SAFETY: nothing below the stack pointer is needed, frozen or not.
    unsafe { slot.pages().discard(slot.class().window(), pages * PAGE) };
    suspended.handle().sp |= switch::FROZEN;
    Ok(true)
}

/// How much memory lies below the page at `bottom`, in a stack whose window begins at `start`. If the next page has
/// none, the answer is 0: only frames without probes skip a page. The kernel answers this question six times as fast.
fn resident_below(bottom: usize, start: usize) -> usize {
    let next = bottom.saturating_sub(PAGE).max(start)..bottom;
    if resident(next) == 0 { 0 } else { resident(start..bottom) }
}

/// Thaws the coroutine of a handle that says it is frozen in place; `false` if somebody else has.
pub(crate) fn thaw(handle: &mut Handle) -> Result<bool, Error> {
    let mut thawed = false;
    if let Some(slot) = Slot::containing(handle.base as usize) {
        let mut left = None;
        undisturbed(|| thaw_slot(slot, |block| left = Some(block)))?;
        thawed = left.is_some();
        if let Some(block) = left {
            // SAFETY: the stack is thawed, and no other code knows the block any more.
            unsafe { Frozen::free(block) };
        }
    }
    TOUCHED.free();
    handle.sp &= !switch::FROZEN;
    Ok(thawed)
}

/// Lets `look` see the block of the stack with this base, if it is frozen.
pub(crate) fn peek<R>(base: *const Base, look: impl FnOnce(&mut Frozen) -> R) -> Option<R> {
    let slot = Slot::containing(base as usize)?;
    undisturbed(|| {
        let mut block: NonNull<Frozen> = slot.meta().frozen.take()?.cast();
        // SAFETY: taking the block gives exclusive access to it.
        let seen = look(unsafe { block.as_mut() });
        slot.meta().frozen.put(Some(block.cast()));
        Some(seen)
    })
}

/// In the handler: true if the fault was at a frozen stack, which is now thawed.
pub(crate) fn serve(slot: Slot, address: usize) -> bool {
    if !slot.meta().frozen.is_frozen_or_busy() || !was_open(slot, address) {
        return false;
    }
    let mut line = None;
    let leave = |block: NonNull<Frozen>| {
        // SAFETY: the block is this thread's. Its list lives as long as the stack is frozen, and it is `BUSY` still: whoever
        // drops the list first waits until it is not. Nor is the name dropped, whether it is still the block's or in the slot.
        unsafe {
            if trace::is_on() {
                line = Some(trace::line(
                    &Name { name: block.as_ref().name(), end: slot.end() },
                    &Event::Touched,
                ));
            }
            Touched::leave(block);
        }
    };
    let outcome = forks::apart(|| thaw_slot(slot, leave));
    // Not earlier: a full pipe may keep the writer waiting, and others wait for the slot.
    if let Some(line) = line {
        line.write();
    }
    if let Err(error) = outcome {
        report::cannot_thaw(slot, &error);
    }
    true
}

/// True if the address is in the frozen pages of the slot.
fn was_open(slot: Slot, address: usize) -> bool {
    address >= slot.end() - open_bytes(slot)
}

/// The size of the slot's frozen part: whole pages, from that of the stack pointer up.
fn open_bytes(slot: Slot) -> usize {
    slot.meta().open_pages.load(Ordering::Relaxed) as usize * PAGE
}

/// In the handler, for an unexplained fault: true if a stack was frozen or thawed since this thread last asked
/// about the address. Then the fault may belong to an earlier state, and the instruction is to be tried again.
pub(crate) fn came_too_early(slot: Slot, address: usize) -> bool {
    let changes = CHANGES.load(Ordering::SeqCst);
    changes != 0
        && was_open(slot, address)
        && words().missed.replace([address, changes]) != [address, changes]
}

/// Does work during which a slot is `BUSY`, outside the handler. Signals are blocked: a handler of the program that
/// touched the stack would wait for the thread that it interrupted. Signals for faults of this thread are not blocked,
/// since its own stack may have to grow. But growing now might have to wait for the same slot, so room is made first.
fn undisturbed<R>(work: impl FnOnce() -> R) -> R {
    const OWN_DOING: [c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGTRAP, libc::SIGILL, libc::SIGFPE];
    make_room();
    // SAFETY: signal sets are plain data, and the mask becomes what it was.
    unsafe {
        let mut mask = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        libc::sigfillset(mask.as_mut_ptr());
        for signal in OWN_DOING {
            libc::sigdelset(mask.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, mask.as_ptr(), before.as_mut_ptr());
        let result = forks::apart(work);
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut());
        result
    }
}

/// Touches as much stack as undisturbed work needs.
#[inline(never)]
fn make_room() {
    let mut room = MaybeUninit::<[u8; 4096]>::uninit();
    // SAFETY: a local variable.
    unsafe { room.as_mut_ptr().cast::<u8>().write_volatile(0) };
}

/// Thaws a stack. `leave` gets its block, which is no longer needed, before other threads see that the stack
/// is thawed: after that, the owner of the block's list may be gone. After an error the stack is still frozen.
fn thaw_slot(slot: Slot, leave: impl FnOnce(NonNull<Frozen>)) -> Result<(), Error> {
    let bring_back = |block: NonNull<Block>| {
        CHANGES.fetch_add(1, Ordering::SeqCst);
        // SAFETY: taking the block gives exclusive access to block and stack.
        unsafe { bring_back(slot, block.cast()) }
    };
    slot.meta().frozen.thaw(bring_back, |block| leave(block.cast()))
}

/// Copies a stack from `lowest` on into its block, gives back its pages and guards them. After an error nothing has changed.
///
/// # Safety
/// The stack is suspended, and the caller has made it `BUSY`. The block was made for it, and its head is initialised.
unsafe fn put_away(slot: Slot, lowest: usize, mut block: NonNull<Frozen>) -> Result<(), Error> {
    let open = open_bytes(slot);
    let start = slot.end() - open;
    // SAFETY: this thread has made the slot `BUSY`. Other threads have no access to the stack, or do not exist.
    unsafe {
        let words = Frozen::words_of(block);
        let frozen = block.as_mut();
        if alone() {
            ptr::copy_nonoverlapping(lowest as *const usize, words, frozen.words());
            if !guard::by_madvise() {
                guard::forbid(start, open)?;
                guard::discard(start, open);
                set_forbidden(frozen, true);
                return Ok(());
            }
            // An error may have freed a part of the stack. If that cannot
            // be brought back, the stack counts as frozen, without gain.
            return match guard::close(start, open) {
                Err(error) if bring_back(slot, block).is_ok() => Err(error),
                _ => Ok(()),
            };
        }
        let memory = OwnMemory::open()?;
        guard::forbid(start, open)?;
        if let Err(error) = memory.read(lowest, words.cast(), frozen.words() * size_of::<usize>()) {
            // The mapping must be restored. If the kernel lacks memory for that, it does so only for a moment.
            while guard::allow(start, open).is_err() {
                libc::sched_yield();
            }
            return Err(error);
        }
        let guarded = guard::by_madvise()
            && FORBIDDEN.load(Ordering::Relaxed) >= FEW
            && guard::mark(start, open).is_ok()
            // Once accessible, they are one mapping with their neighbours.
            && guard::allow(start, open).is_ok();
        if !guarded {
            guard::discard(start, open);
            set_forbidden(frozen, true);
        }
        Ok(())
    }
}

/// Writes a stack back from its block and makes it accessible. After an error it is inaccessible.
///
/// # Safety
/// The slot's stack was put away into this block, and the caller has made it `BUSY`.
unsafe fn bring_back(slot: Slot, mut block: NonNull<Frozen>) -> Result<(), Error> {
    let open = open_bytes(slot);
    let start = slot.end() - open;
    // SAFETY: this thread has made the slot `BUSY`. Other threads have no access to the stack, or do not exist.
    unsafe {
        let words = Frozen::words_of(block);
        let frozen = block.as_mut();
        if alone() {
            if guard::by_madvise() {
                guard::open(start, open)?;
            }
            if frozen.forbidden {
                guard::allow(start, open)?;
                set_forbidden(frozen, false);
            }
            let (lowest, bytes) = frozen.place_in_place(slot, Record::at(slot.end()));
            ptr::copy_nonoverlapping(words.cast::<u8>(), lowest as *mut u8, bytes);
            return Ok(());
        }
        let memory = OwnMemory::open()?;
        if !frozen.forbidden {
            guard::forbid(start, open)?;
            set_forbidden(frozen, true);
        }
        remove_guard(start, open)?;
        let mut record = MaybeUninit::<Record>::zeroed();
        let (lowest, bytes) = frozen.place_in_place(slot, record.as_mut_ptr());
        memory.write(lowest, words.cast(), bytes)?;
        memory.write(Record::at(slot.end()) as usize, record.as_ptr().cast(), size_of::<Record>())?;
        guard::allow(start, open)?;
        set_forbidden(frozen, false);
        Ok(())
    }
}

/// Notes whether the pages of a stack are inaccessible, and counts such stacks.
fn set_forbidden(frozen: &mut Frozen, forbidden: bool) {
    frozen.forbidden = forbidden;
    if forbidden {
        FORBIDDEN.fetch_add(1, Ordering::Relaxed);
    } else {
        FORBIDDEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Removes guard markers, if guards are markers, and leaves the protection.
///
/// # Safety
/// As for [`guard::open`].
unsafe fn remove_guard(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the range lies in a slot that is `BUSY` by this thread.
    if guard::by_madvise() { unsafe { guard::unmark(start, bytes) } } else { Ok(()) }
}
