//! The only interface to the assembly: resume, suspend, finish, and the first frame that they rely on.
//!
//! Both sides of a switch leave the same words below their stack pointer, in the shape of a
//! call that has not returned. `rsp` itself does not change, so the words lie in the red zone:
//!
//! ```text
//!            resumer (R = its rsp)              suspended coroutine (S = its rsp)
//!   R  - 8   where the suspend lands            S  - 8   where the next resume lands
//!   R - 16   rbp                                S - 16   rbp
//!   R - 24   rbx                                S - 24   rbx
//!   R - 32   the resumer's own resumer
//!   R - 40   base of the coroutine that runs
//!   R - 48   where regrow_watch goes on, if the stack has grown since
//! ```
//!
//! A coroutine that never ran looks as if it had suspended in its first frame, at the base of its stack:
//!
//! ```text
//!   base + 24  record         address of the stack's record (src/stack/record.rs)
//!   base +  8  return address  a fixed one inside regrow_entry, for walkers of the rbp chain
//!   base       link           address R - 16 of the latest resumer: the rbp chain continues there
//!   base -  8  regrow_entry   \
//!   base - 16  (free)          } what a suspend would have left
//!   base - 24  entry function /
//! ```
//!
//! A handle names a coroutine from outside by two addresses. It is not touched while the
//! coroutine runs. When the fault handler moves the stack it corrects the base at `R - 40`.
//! The coroutine then suspends at another address than before, and the handle is corrected.
//!
//! The floating-point control state (mxcsr, x87 control word) is not switched: it belongs to the thread, as in corosensei and
//! in Boost.Context by default. Code that changes rounding or exception masks must restore them before it suspends or resumes.

use core::arch::asm;
use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use core::cell::Cell;
use core::ffi::c_void;
use core::mem::MaybeUninit;

use crate::map::{Register, Registers};

/// How far below a stack pointer each word lies, as drawn above. The inlined assembly takes
/// these numbers as operands; asm/switch.S states them again, and a test compares them.
mod below {
    pub(super) const LANDING: usize = 8;
    pub(super) const RBP: usize = 16;
    pub(super) const RBX: usize = 24;
    pub(super) const RESUMER: usize = 32;
    pub(super) const RUNNING: usize = 40;
    pub(super) const WATCHED_LANDING: usize = 48;
}

/// The registers that a suspend saves, and how far below its stack pointer.
pub(crate) const PARKED: [(Register, usize); 2] = [(Register::RBP, below::RBP), (Register::RBX, below::RBX)];

/// Bytes that a suspend saves below its stack pointer.
pub(crate) const SAVED: usize = below::RBX;

/// A coroutine, as its owner holds it: two words.
#[repr(C)]
pub(crate) struct Handle {
    /// The coroutine's stack pointer while it is suspended, a multiple of 16; [`ENDED`]
    /// once it has ended. [`WATCHED`] is added if its next resume has more to do.
    pub sp: usize,
    /// The outermost frame, at the top of its stack.
    pub base: *mut Base,
}

/// The `sp` of a coroutine that has ended (asm/finish.s).
pub(crate) const ENDED: usize = 1;
/// Set in the `sp` of a coroutine whose stack has grown (`regrow_watch` in asm/switch.S, src/grow/shrink.rs).
pub(crate) const WATCHED: usize = 2;

/// Set in the `sp` of a frozen coroutine, which is the address of its block (src/freeze/block.rs).
pub(crate) const FROZEN: usize = 4;

impl Handle {
    /// True if a plain resume is not enough.
    #[inline(always)]
    pub fn is_special(&self) -> bool {
        self.sp & 15 != 0
    }

    #[inline(always)]
    pub fn has_ended(&self) -> bool {
        self.sp & ENDED != 0
    }

    /// Prefetches the lines that a resume touches first: those around the
    /// stack pointer, where a suspend has saved its registers, and the base.
    #[inline(always)]
    pub fn prefetch(&self) {
        for address in [self.sp.wrapping_sub(SAVED), self.sp.wrapping_add(40), self.base as usize] {
            // SAFETY: a prefetch is a hint and accesses nothing, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address as *const i8) };
        }
    }
}

/// The outermost frame of a coroutine. A `Yielder` is a reference to it.
#[repr(C, align(16))]
pub(crate) struct Base {
    /// `R - 16` of the latest resume, where the resumer's rbp is stored, with its return address above.
    pub link: Cell<usize>,
    /// A fixed address inside `regrow_entry`.
    pub return_address: usize,
    /// The address of the stack's record (src/stack/record.rs); rewritten like any other word when the stack moves.
    pub owner: *mut c_void,
}

/// A value that a switch carries, or its address on the other side's stack.
/// It may be uninitialised, since the value may have padding or be `()`.
pub(crate) type Word = MaybeUninit<usize>;

/// The compiler may keep data in this zone: the ABI guarantees that no other code writes it.
pub(crate) const RED_ZONE: usize = 128;

/// Commands to a coroutine.
pub(crate) const RESUME: usize = 0;
pub(crate) const UNWIND: usize = 1;

/// Outcomes of a resume.
pub(crate) const YIELDED: usize = 0;
pub(crate) const RETURNED: usize = 1;
pub(crate) const PANICKED: usize = 2;

/// A coroutine's main function. It never returns, but ends in [`finish`].
pub(crate) type Entry = unsafe extern "C" fn(word: Word, command: usize, base: &Base) -> !;

unsafe extern "C" {
    fn regrow_entry();
    fn regrow_entry_return();
    fn regrow_watch_landing();
    /// The entry function of a raw coroutine. It calls the function whose address is in the place of a closure.
    pub(crate) fn regrow_raw(word: Word, command: usize, base: &Base) -> !;
}

/// Writes the first frame of a coroutine below and into `base`, and returns its handle.
///
/// # Safety
/// `base` and 24 bytes below it are writable and the caller's alone; `owner` is the record of that stack.
#[inline(always)]
pub(crate) unsafe fn prepare(base: *mut Base, owner: *mut c_void, entry: Entry) -> Handle {
    let word = base.cast::<usize>();
    // SAFETY: the caller guarantees the range that all five words are in; `base` is 16-byte aligned.
    unsafe {
        restore_base(base, owner);
        word.byte_sub(below::LANDING).write(regrow_entry as *const () as usize);
        word.byte_sub(below::RBX).write(entry as usize);
    }
    Handle { sp: base as usize, base }
}

/// Writes the base of a stack again, except the link, which the next resume writes.
///
/// # Safety
/// `base` is writable and the caller's alone; `owner` is the record of that stack.
pub(crate) unsafe fn restore_base(base: *mut Base, owner: *mut c_void) {
    // SAFETY: the base is writable and the caller's alone.
    unsafe {
        (*base).return_address = regrow_entry_return as *const () as usize;
        (*base).owner = owner;
    }
}

/// True if the coroutine suspended at `sp` has not run yet.
///
/// # Safety
/// `sp` is the stack pointer of a suspended coroutine.
pub(crate) unsafe fn is_fresh(sp: usize) -> bool {
    // SAFETY: a suspended stack holds the address where it continues right below its stack pointer.
    unsafe { ((sp - below::LANDING) as *const usize).read() == regrow_entry as *const () as usize }
}

/// The registers that the coroutine suspended at `sp` continues with: its suspend left them there, as drawn above.
///
/// # Safety
/// `sp` is the stack pointer of a suspended coroutine.
pub(crate) unsafe fn registers_of(sp: usize) -> Registers {
    // SAFETY: a suspend has left these three words below the stack pointer.
    let left = |below: usize| unsafe { ((sp - below) as *const usize).read() };
    Registers::new(left(below::LANDING), sp)
        .with(Register::RBP, left(below::RBP))
        .with(Register::RBX, left(below::RBX))
}

/// Resumes the coroutine of `handle`. Returns its word and the outcome, and updates the handle.
///
/// # Safety
/// The coroutine is suspended, and waits for this `word` and `command`.
#[inline(always)]
pub(crate) unsafe fn resume(handle: &mut Handle, word: Word, command: usize) -> (Word, usize) {
    let (sp, base, reply, outcome): (usize, *mut Base, Word, usize);
    // SAFETY: the coroutine is suspended, and takes this word and command. The operands are those
    // that asm/resume.s names, and all registers that it does not keep are declared clobbered.
    unsafe {
        asm!(
            include_str!("../asm/resume.s"),
            inout("rax") handle.sp => sp,
            inout("rdx") handle.base => base,
            inout("rdi") word => reply,
            inout("rsi") command => outcome,
            landing = const below::LANDING,
            rbp = const below::RBP,
            rbx = const below::RBX,
            resumer = const below::RESUMER,
            running = const below::RUNNING,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            clobber_abi("sysv64"),
        );
    }
    // Usually the coroutine suspends where it did before, so there is nothing to update. The read is volatile:
    // otherwise the compiler keeps the old address in one of the two registers that live through the switch.
    // SAFETY: a reference is readable.
    if sp != unsafe { (&raw const handle.sp).read_volatile() } {
        *handle = Handle { sp, base };
        if handle.has_ended() {
            return (reply, outcome);
        }
    }
    (reply, YIELDED)
}

/// Suspends the running coroutine and gives `word` to its resumer. Returns the next word and command.
///
/// # Safety
/// `base` is that of the running coroutine, which is `running`; its resumer expects this word with `YIELDED`.
#[inline(always)]
pub(crate) unsafe fn suspend(running: Running, base: &Base, word: Word) -> (Word, usize) {
    let (reply, command);
    // SAFETY: the resumer waits in asm/resume.s. The operands are those that asm/suspend.s
    // names, and all registers that it does not keep are declared clobbered.
    unsafe {
        asm!(
            include_str!("../asm/suspend.s"),
            inout("r8") running.0 => _,
            inout("rdx") base => _,
            inout("rdi") word => reply,
            out("rsi") command,
            landing = const below::LANDING,
            rbp = const below::RBP,
            rbx = const below::RBX,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            clobber_abi("sysv64"),
        );
    }
    (reply, command)
}

/// Leaves the running coroutine for the last time.
///
/// # Safety
/// The coroutine of `base` runs; its resumer expects this word with this outcome; nothing
/// on this stack is needed after the resumer has read the value that `word` points to.
#[inline(always)]
pub(crate) unsafe fn finish(base: &Base, word: Word, outcome: usize) -> ! {
    // SAFETY: the resumer waits in asm/resume.s; the operands are those that asm/finish.s names, and control does not return.
    unsafe {
        asm!(
            include_str!("../asm/finish.s"),
            in("r8") resumer(),
            in("rdx") base,
            in("rdi") word,
            in("rsi") outcome,
            landing = const below::LANDING,
            ended = const ENDED,
            options(noreturn),
        );
    }
}

/// Calls `function` with `argument` and this stack's `rsp`, on the stack that ends at `end`.
/// Continues with the `rsp` that the function returns: it may move this stack, which looks suspended.
///
/// # Safety
/// The other stack is accessible, its end is a multiple of 16, and no other code uses
/// it meanwhile. The function returns where this stack's `rsp` is, and does not unwind.
#[inline(always)]
pub(crate) unsafe fn hop(argument: usize, function: unsafe extern "C" fn(usize, usize) -> usize, end: usize) {
    // SAFETY: the operands are those that asm/hop.s names. The function keeps
    // the registers that calls keep, and all others are declared clobbered.
    unsafe {
        asm!(
            include_str!("../asm/hop.s"),
            inout("rdi") argument => _,
            inout("rsi") function => _,
            inout("rdx") end => _,
            landing = const below::LANDING,
            rbp = const below::RBP,
            rbx = const below::RBX,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            clobber_abi("sysv64"),
        );
    }
}

/// The stack pointer of the resumer of the coroutine that runs on this thread; 0 if none runs.
///
/// This is not a pure function: the value changes at every switch, and with the thread, so it is read anew each time.
#[inline(always)]
fn resumer() -> usize {
    let sp;
    // SAFETY: reads one word of this thread's static TLS block.
    unsafe {
        asm!(
            "mov {sp}, [rip + regrow_resumer@GOTTPOFF]",
            "mov {sp}, fs:[{sp}]",
            sp = out(reg) sp,
            options(nostack, preserves_flags, readonly),
        );
    }
    sp
}

/// The coroutine that runs on this thread, identified by its resumer's stack pointer.
/// Valid as long as the coroutine runs, or waits for one that it has resumed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Running(usize);

/// The coroutine that runs on this thread, if one does.
#[inline(always)]
pub(crate) fn running() -> Option<Running> {
    match resumer() {
        0 => None,
        sp => Some(Running(sp)),
    }
}

impl Running {
    /// The word at `below` bytes under the stack pointer of its resumer, which waits: as drawn above.
    #[inline(always)]
    fn word(self, below: usize) -> *mut usize {
        (self.0 - below) as *mut usize
    }

    /// Its base, which is accessible.
    #[inline(always)]
    pub fn base(self) -> *mut Base {
        // SAFETY: the coroutine runs, so its resumer waits in asm/resume.s, which stored the base there.
        unsafe { *self.word(below::RUNNING) as *mut Base }
    }

    /// Sets where its base is now. Its handle is corrected when it suspends.
    ///
    /// # Safety
    /// Its stack has moved, and its base is at this address.
    pub unsafe fn set_base(self, base: *mut Base) {
        // SAFETY: the coroutine runs, so its resumer waits in asm/resume.s, which keeps that word for the base.
        unsafe { *self.word(below::RUNNING) = base as usize };
    }

    /// Makes its next suspend set [`WATCHED`] in its handle.
    pub fn watch(self) {
        let watch = regrow_watch_landing as *const () as usize;
        // SAFETY: the coroutine runs, so its resumer waits in asm/resume.s;
        // these two words of its red zone are reserved for this.
        unsafe {
            if *self.word(below::LANDING) != watch {
                *self.word(below::WATCHED_LANDING) = *self.word(below::LANDING);
                *self.word(below::LANDING) = watch;
            }
        }
    }

    /// The coroutine that resumed it, if a coroutine did.
    pub fn resumed_by(self) -> Option<Self> {
        // SAFETY: the coroutine runs, so its resumer waits in asm/resume.s, which stored its own resumer there.
        match unsafe { *self.word(below::RESUMER) } {
            0 => None,
            sp => Some(Self(sp)),
        }
    }

    /// What a suspend passes to its resumer: where it lands, and its stack pointer.
    #[cfg(feature = "torture")]
    pub fn landing(self) -> (usize, usize) {
        // SAFETY: the coroutine runs, so its resumer waits in asm/resume.s, which stored there where a suspend lands.
        (unsafe { *self.word(below::LANDING) }, self.0)
    }
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    /// The inlined assembly takes its numbers as operands. asm/switch.S, compiled separately, states them again.
    #[test]
    fn the_assembly_states_the_same_numbers() {
        let stated = |name: &str| {
            let value = |line: &str| {
                let value = line.trim().strip_prefix(".set")?.trim().strip_prefix(name)?.strip_prefix(',')?;
                value.split("//").next()?.trim().parse::<usize>().ok()
            };
            include_str!("../asm/switch.S").lines().find_map(value).expect(name)
        };
        for (name, here) in [
            ("LANDING", below::LANDING),
            ("WATCHED_LANDING", below::WATCHED_LANDING),
            ("ENDED", ENDED),
            ("WATCHED", WATCHED),
            ("RETURNED", RETURNED),
            ("BASE_OWNER", offset_of!(Base, owner)),
            ("RAW_FUNCTION", size_of::<fn()>().next_multiple_of(16)),
            ("WORDS", size_of::<crate::words::Words>()),
        ] {
            assert_eq!(stated(name), here, "{name}");
        }
        assert_eq!(offset_of!(Base, link), 0);
    }
}
