//! The interrupted context: the registers that the kernel saved on the signal stack and will load again.
//!
//! ```text
//!   ucontext.uc_mcontext.gregs    r8 .. r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, ...
//!   ucontext.uc_mcontext.fpregs → 0    control words, last x87 instruction and operand
//!                                 32   st0-7 / mm0-7, 16 bytes each
//!                                 160  xmm0-15
//!                                 416  unused; at 464 what follows (struct _fpx_sw_bytes)
//!                                 512  XSAVE header: which components are not in their initial state
//!                                 576  upper halves of ymm0-15, opmasks, of zmm0-15, zmm16-31, ...
//! ```
//!
//! Sources for the extended area: Intel 64 manual, volume 1, chapter 13 (standard form), and Linux's
//! `arch/x86/include/uapi/asm/sigcontext.h`.

use core::ffi::c_void;
use core::slice;

/// Names of the general registers, in the order of `gregs`.
pub(crate) const NAMES: [&str; 16] = [
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx",
    "rsp",
];

/// The place of a register in `gregs`, by its instruction number: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 ...
pub(crate) const PLACE: [usize; 16] = [13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7];

/// The same by DWARF number: rax, rdx, rcx, rbx, rsi, rdi, rbp, rsp, r8 ...
pub(super) const DWARF_PLACE: [usize; 16] = [13, 12, 14, 11, 9, 8, 10, 15, 0, 1, 2, 3, 4, 5, 6, 7];

const WORD: usize = size_of::<usize>();
const X87: usize = 32 / WORD;
const LEGACY_END: usize = 416 / WORD;
const SOFTWARE_BYTES: usize = 464 / WORD;
const EXTENDED: usize = 576 / WORD;
/// FP_XSTATE_MAGIC1: an XSAVE area follows the 512 bytes of FXSAVE.
const XSTATE_MAGIC: u32 = 0x4650_5853;
/// More than any processor's XSAVE area (AMX's is 11 KiB). A larger figure is rejected.
const XSTATE_MOST: usize = 64 << 10;

/// A signal handler's third argument.
pub(crate) struct Context<'a>(&'a mut libc::ucontext_t);

impl Context<'_> {
    /// # Safety
    /// `raw` is the third argument of a signal handler installed with `SA_SIGINFO`, and is used only while it runs.
    pub(crate) unsafe fn new(raw: *mut c_void) -> Self {
        // SAFETY: a handler's third argument is a `ucontext_t`, which belongs to the handler alone while it runs.
        Self(unsafe { &mut *raw.cast() })
    }

    pub(crate) fn rip(&self) -> usize {
        self.0.uc_mcontext.gregs[libc::REG_RIP as usize] as usize
    }

    pub(crate) fn rsp(&self) -> usize {
        self.0.uc_mcontext.gregs[libc::REG_RSP as usize] as usize
    }

    /// The number of the processor exception that last raised a signal for this thread. If the kernel itself raised the
    /// current signal, the number is from an earlier one, or 0.
    pub(super) fn exception(&self) -> usize {
        self.0.uc_mcontext.gregs[libc::REG_TRAPNO as usize] as usize
    }

    /// The general registers, in the order of [`NAMES`].
    pub(crate) fn general(&mut self) -> &mut [usize] {
        let first = self.0.uc_mcontext.gregs.as_mut_ptr().cast();
        // SAFETY: `gregs` has 23 entries of 64 bits; the first 16 are the general registers.
        unsafe { slice::from_raw_parts_mut(first, NAMES.len()) }
    }

    /// The words of the vector registers in two stretches: x87 to xmm, then the extended area.
    pub(crate) fn vectors(&mut self) -> [&mut [usize]; 2] {
        let area = self.0.uc_mcontext.fpregs.cast::<usize>();
        if area.is_null() {
            return [&mut [], &mut []];
        }
        // SAFETY: the kernel always writes 512 bytes of FXSAVE, followed by the area that their software bytes announce.
        // The two stretches do not overlap.
        unsafe {
            let [magic, _, _, size] = {
                let software = area.add(SOFTWARE_BYTES).cast::<u32>();
                [*software, *software.add(1), *software.add(2), *software.add(4)]
            };
            let legacy = slice::from_raw_parts_mut(area.add(X87), LEGACY_END - X87);
            let words = size as usize / WORD;
            if magic != XSTATE_MAGIC || size as usize > XSTATE_MOST || words <= EXTENDED {
                return [legacy, &mut []];
            }
            [legacy, slice::from_raw_parts_mut(area.add(EXTENDED), words - EXTENDED)]
        }
    }

    /// The signal mask of the interrupted code.
    pub(crate) fn mask(&self) -> &libc::sigset_t {
        &self.0.uc_sigmask
    }
}

/// Changes that only a debugger makes to the interrupted code.
#[cfg(feature = "torture")]
impl Context<'_> {
    pub(crate) fn set_rip(&mut self, rip: usize) {
        self.0.uc_mcontext.gregs[libc::REG_RIP as usize] = rip as i64;
    }

    pub(crate) fn flags(&mut self) -> &mut i64 {
        &mut self.0.uc_mcontext.gregs[libc::REG_EFL as usize]
    }

    /// A general register, by its instruction number.
    pub(crate) fn register(&mut self, number: usize) -> &mut usize {
        &mut self.general()[PLACE[number]]
    }

    /// The kernel's part of the signal mask that the interrupted code will continue with, one bit per signal.
    pub(crate) fn mask_bits(&mut self) -> &mut u64 {
        // SAFETY: a `sigset_t` has 1024 bits, and the kernel uses the first 64.
        unsafe { &mut *(&raw mut self.0.uc_sigmask).cast() }
    }
}
