//! Moving the stack of an interrupted coroutine to a larger slot, or of a suspended one to any other.
//!
//! ```text
//!            old slot                              new slot, twice the size or more
//!   end   ┌────────────┐                     end  ┌────────────┐
//!         │ head       │ ─── copied ──────────►   │ head       │  every distance from the end stays
//!         │ frames     │ ─── copied, and words ─► │ frames     │
//!         │ red zone   │     in the window        │ red zone   │
//!         ├────────────┤     rewritten            │            │
//!         │ slack      │                          │  room      │
//!         │ guard      │                          ├────────────┤
//!         └────────────┘                          │ slack ...  │
//! ```
//!
//! A stack that goes to memory which was never used takes its pages along (src/grow/scratch.rs).
//!
//! Then the registers of the interrupted context, the vector registers among them, and the base that the resumer keeps.
//! The old slot becomes inaccessible at once and stays so until the coroutine has ended: a pointer to it
//! that was kept where none of this looks is a fault at its first use, not silent corruption.

use core::ops::Range;
use core::ptr;
use core::slice;
use core::sync::atomic::Ordering;

use super::context::{Context, DWARF_PLACE, NAMES};
use super::obey::{self, Copied, Words};
use super::rewrite::Window;
use super::scratch::Scratch;
use super::{Done, Fault, Reason, reason};
use crate::error::Error;
use crate::map::{self, Register, Registers};
use crate::stack::class::{Class, PAGE, open_bytes};
use crate::stack::{Link, OLD, Record, Slot, cache, carry::carry, guard};
use crate::stats::{self, Growth};
use crate::switch::{self, Base, Handle, RED_ZONE};

/// A stack that has been moved, but for the registers.
pub(super) struct Moved {
    pub window: Window,
    /// Where the record is now.
    pub record: *mut Record,
    pub bytes: usize,
    pub words: Words,
}

/// Why a stack was not moved. Nothing has changed.
pub(super) enum Failure {
    /// There is no memory for it.
    Kernel(Error),
    /// A frame speaks against it.
    Frame(Reason, usize),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Kernel(error)
    }
}

/// Moves the stack that `context` was interrupted on to a slot of `size` bytes. After an error
/// nothing has changed.
///
/// # Safety
/// `fault` is at a growth point, in the coroutine that `context` interrupted, whose owner promised that
/// pointers into its stack are only in it and in registers.
pub(super) unsafe fn relocate(
    context: &mut Context<'_>,
    fault: &Fault,
    size: usize,
) -> Result<Done, Failure> {
    let start = interrupted(context, fault.call_length);
    // SAFETY: by the caller's word; the stack is used down to the red zone below rsp.
    let Moved { window, record, bytes, words } = unsafe {
        let moved = transfer(fault.slot, &start, size, [None; 6])?;
        fault.running.set_base(moved.base(fault.running.base()));
        moved
    };
    let general = context.general();
    let before: [usize; NAMES.len()] = core::array::from_fn(|place| general[place]);
    let mut registers = window.rewrite(general);
    if let Some(place) = fault.loop_end {
        general[place] = window.shift(before[place]);
    }
    for (register, keep) in Register::CALLEE_SAVED.into_iter().zip(words.keep) {
        if keep {
            let place = DWARF_PLACE[usize::from(register.dwarf())];
            general[place] = before[place];
        }
    }
    for stretch in context.vectors() {
        registers += window.rewrite(stretch);
    }
    Ok(Done { record, growth: Growth::Relocate, bytes, words: words.rewritten + registers })
}

/// True if `rbp` points to the frame of the function at `pc`, there: its unwind data counts from it.
pub(super) fn has_frame_pointer(pc: usize) -> bool {
    let reader = map::process().read();
    let rules = reader.find(pc).and_then(|map| map.rules());
    matches!(rules, Some(Ok(rules)) if rules.is_counted_from(Register::RBP))
}

/// The registers that a walk from an interrupted context starts with. A call that could not push its return address is
/// looked up by its last byte, as if it had: what it calls for lies in the map for its return address.
fn interrupted(context: &mut Context<'_>, call_length: usize) -> Registers {
    let pc = context.rip() + call_length.saturating_sub(1);
    let mut registers = Registers::new(pc, context.rsp());
    let general = context.general();
    for number in 0..16 {
        if let Some(register) = Register::from_dwarf(number) {
            registers = registers.with(register, general[DWARF_PLACE[usize::from(number)]]);
        }
    }
    registers
}

/// Moves the stack of a coroutine that does not run to a slot of `size` bytes, which is enough for what is
/// used of it. After an error nothing has changed.
///
/// # Safety
/// The coroutine of `handle` is suspended, or has put itself into the same state, and its owner made the promise
/// about pointers.
pub(super) unsafe fn relocate_suspended(handle: &mut Handle, size: usize) -> Result<Moved, Failure> {
    // SAFETY: by the caller's word; what a suspend saves lies in the red zone below its stack pointer (src/switch.rs).
    unsafe {
        let sp = handle.sp;
        let slot = Record::slot((*handle.base).record()).ok_or(Error::Arenas)?;
        let (start, parked) = suspended_registers(sp);
        let moved = transfer(slot, &start, size, parked)?;
        handle.base = moved.base(handle.base);
        handle.sp = moved.window.moved(sp);
        Ok(moved)
    }
}

/// As [`relocate_suspended`], where there is time to look for code that was loaded since its unwind tables were read.
///
/// # Safety
/// The coroutine of `handle` is suspended on its own stack, and its owner made the promise about pointers.
pub(super) unsafe fn relocate_parked(handle: &mut Handle, size: usize) -> Result<Moved, Failure> {
    // SAFETY: the caller says that it is suspended; after a failure nothing has changed, so it still is.
    unsafe {
        match relocate_suspended(handle, size) {
            Err(Failure::Frame(reason, _)) if reason::knows_more(reason) => relocate_suspended(handle, size),
            outcome => outcome,
        }
    }
}

/// The registers that a coroutine suspended at `sp` goes on with, and where on its stack some of them lie.
///
/// # Safety
/// `sp` is the stack pointer of a suspended coroutine.
pub(super) unsafe fn suspended_registers(sp: usize) -> (Registers, [Option<usize>; 6]) {
    let mut parked = [None; 6];
    for (register, below) in [(Register::RBP, 16), (Register::RBX, 24)] {
        if let Some(index) = register.saved_index() {
            parked[index] = Some(sp - below);
        }
    }
    // SAFETY: by the caller's word.
    (unsafe { switch::registers_of(sp) }, parked)
}

impl Moved {
    /// Where the base is now that was at `old`. It is told where its record is.
    ///
    /// # Safety
    /// `old` was the base of the coroutine whose stack was moved.
    unsafe fn base(&self, old: *mut Base) -> *mut Base {
        let base = self.window.moved(old as usize) as *mut Base;
        // SAFETY: by the caller's word. The base lies in the copied head; its record is where the copy is.
        unsafe { (*base).set_record(self.record) };
        base
    }
}

/// Moves the stack in slot `from`, in use as `start` says, to a slot of `size` bytes. After an error
/// nothing has changed.
///
/// # Safety
/// The slot holds the stack of a coroutine whose owner made the promise about pointers, and who does not run but in the
/// caller, on another stack. `start` are the registers it goes on with, `parked` where some of them lie on that stack.
unsafe fn transfer(
    from: Slot,
    start: &Registers,
    size: usize,
    parked: [Option<usize>; 6],
) -> Result<Moved, Failure> {
    let end = from.end();
    let record = Record::at(end);
    // SAFETY: a coroutine's record is accessible, and only its thread uses it.
    let (open, maps) = unsafe { ((*record).open, (*record).maps) };
    let sp = start.get(Register::RSP).unwrap_or(end);
    let lowest = sp.wrapping_sub(RED_ZONE).max(end - open) & !7;
    // SAFETY: the list of old slots is this coroutine's.
    let to = unsafe { Destination::find(&mut (*record).old, Class::moving(size), open_bytes(size))? };
    let window = Window::new(from.start() + 1..end, to.slot.end());
    // What lies in frames points to frames, the red zone included. The narrower the window, the fewer words that are
    // no pointers look like one.
    let frames = Window::new(sp.wrapping_sub(RED_ZONE)..end, to.slot.end());

    let scratch = if to.warm { None } else { Scratch::take(end - lowest) };
    let copy = scratch.as_ref().map_or(window.moved(lowest), Scratch::start);

    // SAFETY: both ranges are accessible, the second is ours alone, and `lowest` is aligned to a word.
    let words = unsafe {
        ptr::copy_nonoverlapping(lowest as *const u8, copy as *mut u8, end - lowest);
        let length = (record as usize - lowest) / size_of::<usize>();
        let old = slice::from_raw_parts(lowest as *const usize, length);
        let new = slice::from_raw_parts_mut(copy as *mut usize, length);
        obey::rewrite(
            &map::process().read(),
            start,
            maps,
            Copied { lowest, old, new, window: frames, parked },
        )
    };
    let closed = words.map_err(|(reason, frame)| Failure::Frame(reason, frame)).and_then(|words| {
        // SAFETY: nothing in the old slot is needed once it is closed, which is the last that can fail.
        let closed = unsafe {
            match &scratch {
                Some(scratch) => close_carrying(end - open..end, lowest, window, scratch),
                None => guard::close(end - open, open),
            }
        };
        closed.map(|()| words).map_err(Failure::Kernel)
    });
    let new = Record::at(to.slot.end());
    // SAFETY: the new slot is ours, and its record a copy; after an error the old record is still there.
    unsafe {
        match closed {
            Ok(words) => {
                retire(from, to.slot, &mut (*new).old);
                (*new).class = to.slot.class();
                (*new).open = to.open;
                (*new).first_open = open_bytes(size);
                stats::count_words(&words.by_map);
                Ok(Moved { window, record: new, bytes: end - lowest, words })
            }
            Err(failure) => {
                to.give_up(from, &mut (*record).old);
                Err(failure)
            }
        }
    }
}

/// Closes the `open` pages of the old slot, of which those from the one of `lowest` on go to the new slot, and fills them with
/// what is in the scratch. After an error nothing has changed in the old slot.
///
/// # Safety
/// The old slot's stack is in the scratch, from `lowest` on. The new one, where `window` moves it, is the caller's.
unsafe fn close_carrying(
    open: Range<usize>,
    lowest: usize,
    window: Window,
    scratch: &Scratch,
) -> Result<(), Error> {
    let first = lowest / PAGE * PAGE;
    // SAFETY: by the caller's word. As far as pages were carried they have the old contents until the scratch's are written
    // over them.
    unsafe {
        let carried = carry(first, window.moved(first), open.end - first);
        guard::close(open.start, open.len()).inspect_err(|_| {
            ptr::copy_nonoverlapping(window.moved(first) as *const u8, first as *mut u8, carried);
        })?;
        let (from, to) = (scratch.start() as *const u8, window.moved(lowest) as *mut u8);
        ptr::copy_nonoverlapping(from, to, open.end - lowest);
    }
    Ok(())
}

/// A slot to move to.
struct Destination {
    slot: Slot,
    open: usize,
    /// The stack has been there before.
    former: bool,
    /// There is memory in it.
    warm: bool,
}

impl Destination {
    /// A slot that this stack has been in before, so that pointers which were missed then are right again and a
    /// stack that grows and shrinks leaves no trail of slots; else any free one.
    ///
    /// # Safety
    /// `old` is the list of the coroutine's old slots.
    unsafe fn find(old: &mut Link, class: Class, open: usize) -> Result<Self, Error> {
        let mut previous: Option<Slot> = None;
        let mut link = if returns_to_former_slots() { *old } else { 0 };
        while let Some(slot) = Slot::from_link(link) {
            link = slot.meta().next.load(Ordering::Relaxed);
            if slot.class() == class {
                // SAFETY: an old slot of this coroutine, of which nothing is accessible.
                unsafe { guard::open(slot.end() - open, open)? };
                slot.meta().flags.fetch_and(!OLD, Ordering::Release);
                match previous {
                    Some(previous) => previous.meta().next.store(link, Ordering::Relaxed),
                    None => *old = link,
                }
                return Ok(Self { slot, open, former: true, warm: false });
            }
            previous = Some(slot);
        }
        let (slot, open, warm) = cache::take_in_handler(class, open)?;
        Ok(Self { slot, open, former: false, warm })
    }

    /// Puts it back, with nothing in it.
    ///
    /// # Safety
    /// It was found for the stack in slot `from`, whose list of old slots is `old`.
    unsafe fn give_up(self, from: Slot, old: &mut Link) {
        if self.former {
            // SAFETY: the slot is still ours. Should closing fail, a stale pointer into it goes unnoticed: it was moved
            // to and back, so there is none that was not checked already.
            let _ = unsafe { guard::close(self.slot.end() - self.open, self.open) };
            retire(self.slot, from, old);
        } else {
            self.slot.give(self.open);
        }
    }
}

/// Not under torture: what was missed is to be noticed.
fn returns_to_former_slots() -> bool {
    #[cfg(feature = "torture")]
    return !crate::torture::is_running();
    #[cfg(not(feature = "torture"))]
    return true;
}

/// Marks a slot as left, and puts it on the coroutine's list of such.
fn retire(from: Slot, to: Slot, list: &mut Link) {
    let meta = from.meta();
    meta.next.store(*list, Ordering::Relaxed);
    meta.moved_to.store(to.link(), Ordering::Relaxed);
    meta.flags.fetch_or(OLD, Ordering::Release);
    *list = from.link();
}
