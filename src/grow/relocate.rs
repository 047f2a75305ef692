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
//! The registers of the interrupted context are rewritten too, including vector registers, and the base
//! that the resumer keeps. The old slot becomes inaccessible at once and stays so until the coroutine
//! ends. So a pointer to it that was missed faults at its first use, instead of corrupting data silently.

use core::ops::Range;
use core::ptr;
use core::slice;
use core::sync::atomic::Ordering;

use super::growth::Done;
use super::obey::{self, Copied, Words};
use super::point::{Point, growth_point};
use super::rewrite::Window;
use super::scratch::Scratch;
use crate::context::{Context, DWARF_PLACE, NAMES};
use crate::error::Error;
use crate::hooks;
use crate::map::{self, Register, Registers};
use crate::not_moved::{self, NotMoved, Refusal};
use crate::settings::Growth;
use crate::size::{Class, PAGE, open_bytes};
use crate::stack::arena::{OLD, Slot};
use crate::stack::carry::carry;
use crate::stack::free_list::Link;
use crate::stack::record::Record;
use crate::stack::suspended::Suspended;
use crate::stack::{guard, stock};
use crate::stats;
use crate::switch::{self, Base, Handle, RED_ZONE, Running};

/// A fault that a larger stack resolves.
pub(crate) struct Fault {
    pub running: Running,
    pub slot: Slot,
    pub address: usize,
    /// The lowest address that will be used soon, if known; at most `address`.
    pub lowest: usize,
    pub growth_point: bool,
    /// In a probe loop, the number of the general register that holds its end.
    pub loop_end: Option<usize>,
    /// The length of the instruction if it is a call.
    pub call_length: usize,
}

/// A stack that has been moved; the registers have not been rewritten yet.
pub(crate) struct Moved {
    pub window: Window,
    /// The record's new address.
    pub record: *mut Record,
    pub bytes: usize,
    pub words: Words,
}

/// Moves the stack that `context` was interrupted on to a slot of `size` bytes. After an error nothing has changed.
///
/// # Safety
/// `fault` is at a growth point, in the coroutine that `context` interrupted. Its
/// owner promised that only its stack and registers hold pointers into its stack.
pub(crate) unsafe fn relocate(
    context: &mut Context<'_>,
    fault: &Fault,
    size: usize,
) -> Result<Done, Refusal> {
    let start = interrupted(context, fault.call_length);
    // SAFETY: the context was interrupted at a growth point on the stack in
    // this slot, and the stack is in use nowhere else. Its base moves with it.
    let moved = unsafe {
        let moved = Move::make(fault.slot, &start, size, [None; 6])?;
        fault.running.set_base(moved.base(fault.running.base()));
        moved
    };
    let Moved { window, words, .. } = moved;
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
    Ok(Done { words: words.rewritten + registers, ..moved.done() })
}

/// Whether the instruction at `pc`, whose bytes `byte` returns, is a growth point.
pub(crate) fn is_growth_point(pc: usize, byte: impl Fn(usize) -> u8) -> bool {
    match growth_point(byte) {
        Point::Yes => true,
        Point::IfFramePointer => has_frame_pointer(pc),
        Point::No => false,
    }
}

/// True if `rbp` points to the frame of the function at `pc`: its unwind data counts from `rbp` there.
fn has_frame_pointer(pc: usize) -> bool {
    let reader = map::process().read();
    let rules = reader.find(pc).and_then(|map| map.rules());
    matches!(rules, Some(Ok(rules)) if rules.is_counted_from(Register::RBP))
}

/// The registers that a walk from an interrupted context starts with. A call that could not push its return address is
/// looked up by its last byte, as if it had pushed it: the map of a call is the one for its return address.
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

/// Moves the stack of a suspended coroutine to a slot of `size` bytes,
/// enough for its used part. After an error nothing has changed.
///
/// # Safety
/// The coroutine's owner made the promise about pointers.
pub(crate) unsafe fn relocate_suspended(
    suspended: &mut Suspended<'_>,
    size: usize,
) -> Result<Moved, Refusal> {
    let (start, parked) = registers_and_places(suspended);
    let slot = Record::slot(suspended.record());
    let slot = slot.ok_or_else(|| Refusal::no_memory(Error::Arenas, start.pc()))?;
    // SAFETY: the coroutine is suspended, and continues with these registers, some of which lie on
    // its stack. The caller guarantees the promise about pointers. The base moves with the stack.
    unsafe {
        let moved = Move::make(slot, &start, size, parked)?;
        let (sp, base) = (moved.window.moved(suspended.sp()), moved.base(suspended.base()));
        *suspended.handle() = Handle { sp, base };
        Ok(moved)
    }
}

/// As [`relocate_suspended`], but reads the unwind tables of code that was loaded since they were last read.
///
/// # Safety
/// The coroutine's owner made the promise about pointers.
pub(crate) unsafe fn relocate_parked(suspended: &mut Suspended<'_>, size: usize) -> Result<Moved, Refusal> {
    // SAFETY: the promise about pointers was made with `Growth::Relocate`. After a refusal nothing has changed.
    unsafe {
        match relocate_suspended(suspended, size) {
            Err(refusal) if not_moved::knows_more(refusal.why.reason) => relocate_suspended(suspended, size),
            outcome => outcome,
        }
    }
}

/// The registers that a suspended coroutine continues with, and where on its stack some of them lie.
pub(crate) fn registers_and_places(suspended: &Suspended<'_>) -> (Registers, [Option<usize>; 6]) {
    let mut parked = [None; 6];
    for (register, below) in switch::PARKED {
        if let Some(index) = register.saved_index() {
            parked[index] = Some(suspended.sp() - below);
        }
    }
    (suspended.registers(), parked)
}

impl Moved {
    /// The result of this growth.
    pub(crate) fn done(&self) -> Done {
        Done { growth: Growth::Relocate, bytes: self.bytes, words: self.words.rewritten }
    }

    /// The new address of the base that was at `old`. Updates the record's address in it.
    ///
    /// # Safety
    /// `old` was the base of the coroutine whose stack was moved.
    unsafe fn base(&self, old: *mut Base) -> *mut Base {
        let base = self.window.moved(old as usize) as *mut Base;
        // SAFETY: the base lies in the copied head, which is this coroutine's; its record is where the copy is.
        unsafe { (*base).owner = self.record.cast() };
        base
    }
}

/// A stack that is in two slots: the copy will be committed or abandoned.
struct Move {
    from: Slot,
    to: Destination,
    /// Bytes below the old slot's end that are accessible.
    open: usize,
    /// The lowest byte that was copied.
    lowest: usize,
    /// The part of the old slot whose addresses move to the new one.
    window: Window,
    /// Where the copy is, if it is not in the new slot yet.
    scratch: Option<Scratch>,
}

impl Move {
    /// Moves the stack in slot `from`, whose used part follows from `start`,
    /// to a slot of `size` bytes. After an error nothing has changed.
    ///
    /// # Safety
    /// The slot holds the stack of a coroutine whose owner made the promise about pointers.
    /// The coroutine does not run, except in the caller, on another stack. `start` are the
    /// registers that it continues with, `parked` where some of them lie on that stack.
    unsafe fn make(
        from: Slot,
        start: &Registers,
        size: usize,
        parked: [Option<usize>; 6],
    ) -> Result<Moved, Refusal> {
        let no_memory = |error| Refusal::no_memory(error, start.pc());
        // SAFETY: the caller guarantees that only this thread uses the stack,
        // its old slots and its record, and that the stack does not change.
        unsafe {
            let copied = Self::copy(from, start, size).map_err(no_memory)?;
            match copied.judge(start, parked) {
                Ok(words) => copied.commit(words).map_err(no_memory),
                Err(why) => {
                    copied.abandon();
                    Err(why.into())
                }
            }
        }
    }

    /// Finds a slot of `size` bytes, and copies the used bytes there.
    ///
    /// # Safety
    /// As for [`make`](Self::make).
    unsafe fn copy(from: Slot, start: &Registers, size: usize) -> Result<Self, Error> {
        let end = from.end();
        let record = Record::at(end);
        // SAFETY: a coroutine's record is accessible; the list of old slots in it is this coroutine's.
        let (open, to) = unsafe {
            ((*record).open, Destination::find(&mut (*record).old, Class::moving(size), open_bytes(size))?)
        };
        let sp = start.get(Register::RSP).unwrap_or(end);
        let lowest = sp.wrapping_sub(RED_ZONE).max(end - open) & !7;
        let window = Window::new(from.start() + 1..end, to.slot.end());
        let scratch = if to.warm { None } else { Scratch::take(end - lowest) };
        let copied = Self { from, to, open, lowest, window, scratch };
        // SAFETY: the used bytes are accessible, and only this move uses their destination.
        unsafe { ptr::copy_nonoverlapping(lowest as *const u8, copied.place() as *mut u8, end - lowest) };
        Ok(copied)
    }

    /// The address of the copy's lowest byte.
    fn place(&self) -> usize {
        self.scratch.as_ref().map_or(self.window.moved(self.lowest), Scratch::start)
    }

    /// Rewrites the words of the copy according to the maps of its frames. After an error they are invalid.
    ///
    /// # Safety
    /// As for [`make`](Self::make).
    unsafe fn judge(&self, start: &Registers, parked: [Option<usize>; 6]) -> Result<Words, NotMoved> {
        let Self { lowest, .. } = *self;
        let end = self.from.end();
        // Pointers in frames point to frames, including the red zone. In a
        // narrow window, fewer words that are no pointers look like one.
        let sp = start.get(Register::RSP).unwrap_or(end);
        let window = Window::new(sp.wrapping_sub(RED_ZONE)..end, self.to.slot.end());
        let record = Record::at(end);
        let length = (record as usize - lowest) / size_of::<usize>();
        // SAFETY: both copies are accessible and do not overlap. No code writes the
        // old one, and only this move uses the new one. `lowest` is aligned to a word.
        unsafe {
            let old = slice::from_raw_parts(lowest as *const usize, length);
            let new = slice::from_raw_parts_mut(self.place() as *mut usize, length);
            let copied = Copied { lowest, old, new, window, parked };
            obey::rewrite(&map::process().read(), start, (*record).settings.maps, copied)
        }
    }

    /// Closes the old slot, which is the last step that can fail. From then on the stack is in the new slot.
    ///
    /// # Safety
    /// As for [`make`](Self::make); the words of the copy are right.
    unsafe fn commit(self, words: Words) -> Result<Moved, Error> {
        let end = self.from.end();
        let open = end - self.open..end;
        // SAFETY: all used bytes of the old slot have been copied.
        let closed = unsafe {
            match &self.scratch {
                Some(scratch) => close_carrying(open, self.lowest, self.window, scratch),
                None => guard::close(open.start, open.len()),
            }
        };
        if let Err(error) = closed {
            // SAFETY: the error has left the old slot unchanged.
            unsafe { self.abandon() };
            return Err(error);
        }
        let Self { from, to, lowest, window, .. } = self;
        let record = Record::at(to.slot.end());
        // SAFETY: the new slot is the stack's now, and its record a copy of the old one.
        unsafe {
            retire(from, to.slot, &mut (*record).old);
            (*record).class = to.slot.class();
            (*record).open = to.open;
        }
        stats::count_words(&words.by_map);
        hooks::count_words(&words.by_map);
        Ok(Moved { window, record, bytes: end - lowest, words })
    }

    /// Gives the new slot back: the stack stays in the old one.
    ///
    /// # Safety
    /// As for [`make`](Self::make).
    unsafe fn abandon(self) {
        let record = Record::at(self.from.end());
        // SAFETY: the old record is accessible, and it has the list of old slots in which the new slot was found.
        unsafe { self.to.give_up(self.from, &mut (*record).old) };
    }
}

/// Closes the `open` pages of the old slot. Those from the page of `lowest` on go to the new
/// slot and are filled from the scratch. After an error nothing has changed in the old slot.
///
/// # Safety
/// The old slot's stack is in the scratch, from `lowest` on. The caller owns the new slot, where `window` moves the stack.
unsafe fn close_carrying(
    open: Range<usize>,
    lowest: usize,
    window: Window,
    scratch: &Scratch,
) -> Result<(), Error> {
    let first = lowest / PAGE * PAGE;
    // SAFETY: both slots are this move's. Pages that were carried have the old contents until the scratch is written over them.
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
    /// Prefers a slot that this stack has left: pointers that were missed then are right again,
    /// and a stack that grows and shrinks leaves no trail of slots. Otherwise any free slot.
    ///
    /// # Safety
    /// `old` is the list of the coroutine's old slots.
    unsafe fn find(old: &mut Link, class: Class, open: usize) -> Result<Self, Error> {
        let mut previous: Option<Slot> = None;
        // Not under torture, which is to reveal missed pointers.
        let mut link = if hooks::is_tortured() { 0 } else { *old };
        while let Some(slot) = Slot::from_link(link) {
            link = slot.meta().next.load(Ordering::Relaxed);
            if slot.class() == class {
                // SAFETY: it is an old slot of this coroutine, of which nothing is accessible.
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
        let (slot, open, warm) = stock::take_in_handler(class, open)?;
        Ok(Self { slot, open, former: false, warm })
    }

    /// Puts the slot back, empty.
    ///
    /// # Safety
    /// It was found for the stack in slot `from`, whose list of old slots is `old`.
    unsafe fn give_up(self, from: Slot, old: &mut Link) {
        if self.former {
            // SAFETY: the slot is still this move's. If closing fails, a stale pointer into it goes unnoticed.
            // But the stack has not run there, so every such pointer was missed at an earlier move.
            let _ = unsafe { guard::close(self.slot.end() - self.open, self.open) };
            retire(self.slot, from, old);
        } else {
            self.slot.give(self.open);
        }
    }
}

/// Marks a slot as left, and puts it on the coroutine's list of old slots.
fn retire(from: Slot, to: Slot, list: &mut Link) {
    let meta = from.meta();
    meta.next.store(*list, Ordering::Relaxed);
    meta.moved_to.store(to.link(), Ordering::Relaxed);
    meta.flags.fetch_or(OLD, Ordering::Release);
    *list = from.link();
}
