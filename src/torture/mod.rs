//! Torture: move the stack of a closure wherever it may be moved, and be told what broke.
//!
//! Who asks for relocation ([`Builder::relocating`](crate::Builder::relocating)) promises that nothing outside the
//! stack points into it. This checks the promise: the closure runs on a relocating coroutine whose stack is moved
//! thousands of times, and the slot it has left is inaccessible at once. A pointer left behind is
//! a fault at its first use. The closure ends there, the process does not, and a [`Report`] says what it was.
//!
//! ```
//! use regrow::torture::{Mode, Torture};
//!
//! fn parse(text: &str) -> Vec<u32> {
//!     text.split(',').map(|number| number.parse().unwrap()).collect()
//! }
//! // SAFETY: a test; the report is looked at before the value.
//! let (value, report) = unsafe { Torture::new(Mode::GrowthPoints).run(|| parse("1,2,3")) };
//! assert!(report.is_clean(), "{report}");
//! assert_eq!(value, Some(vec![1, 2, 3]));
//! assert!(report.moves > 50);
//! ```
//!
//! # How
//!
//! The closure runs with the processor's trap flag set: after each instruction the kernel sends SIGTRAP, whose handler
//! runs on the thread's signal stack, looks at the instruction that comes next, and if the [`Mode`] says so moves
//! the stack by the function that the fault handler moves it by. What an overflow would do at this instruction is
//! what happens.
//!
//! ```text
//!   closure    push rbp │  mov rbp, rsp │  sub rsp, 32 │  call f │ ...
//!                       ▼               ▼              ▼         ▼         one SIGTRAP each
//!   handler    wanted here? movable? ── yes ─► relocate to a free slot, close the old one, poison the new one
//! ```
//!
//! # Where a stack is not moved
//!
//! - **In leaf string routines**, other than at growth points. `memcpy`, `strlen` and their kin hold *differences* of
//!   pointers in registers (`sub rsi, rcx`), which no rewriting of values can see. Which instructions these are is
//!   decided by address: the dynamic linker is asked for each of libc's `mem*`, `str*`, `wcs*` and `wmem*` functions,
//!   which gives the variant chosen for this processor, and the unwind table for where that function ends.
//! - **In probe loops**, other than at the probe. Between `lea r11, [rsp - N]` and the end of the loop `r11` is on the
//!   scale of `rsp` without pointing into the slot. Decided by its value: below the slot, by less than 4 GiB.
//! - **While SIGTRAP is blocked.** The kernel kills a process that is trapped then. A system call that would block it
//!   (libc's `posix_spawn` and `pthread_create` block everything for a while) switches stepping off, and a SIGTRAP left
//!   pending switches it on again as soon as it can be delivered.
//! - **While this crate takes or gives back a slot.** A handler that changes the list of free slots at each instruction
//!   would keep the exchange of its head from ever succeeding.
//! - **On another stack**: in signal handlers with a stack of their own, and while another coroutine runs whose
//!   stack grows in place. A nested coroutine whose stack moves is tortured like the outer one.
//!
//! # Which slots
//!
//! A stack that returns to a slot makes the pointers right again that were left there. So slots are used again only
//! after at least 256 more moves. Guards are put up and taken down by
//! `madvise`, 1.3 µs the pair.
//!
//! # Poison
//!
//! Stack that was never used since the last move holds bytes `0xf5`, down to the end of the page that `rsp` is in: as a
//! pointer they fault in a way that no mapping can hide, and a finding says [`Kind::Poison`]. The bytes a stack
//! has moved away from do not exist any more: their use is [`Kind::Stale`].
//!
//! # One at a time
//!
//! A process tortures one closure at a time; [`Torture::run`] waits for its turn. Other threads run on undisturbed. One
//! that uses a stale pointer into the tortured stack (a scoped thread, say) is a finding too: it is stopped for
//! good, since there is nothing it could go on with.

mod breakpoints;
mod functions;
mod leaf;
mod mode;
mod report;
mod run;
mod trap;
mod turn;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::builder::Builder;
use crate::coroutine::{CoroutineResult, Yielder};
use crate::thread;

pub use mode::{Mode, UnknownMode};
pub use report::{Finding, Hit, Kind, Report};

/// Runs closures and moves their stacks.
///
/// ```
/// use regrow::torture::{Mode, Torture};
///
/// // The classic: a heap structure of references to locals.
/// let culprit = || {
///     let numbers = std::hint::black_box([1u32, 2, 3]);
///     let references: Vec<&u32> = numbers.iter().collect();
///     references.into_iter().sum::<u32>()
/// };
/// // SAFETY: it keeps pointers to its stack on the heap; the report is about that.
/// let (value, report) = unsafe { Torture::new(Mode::GrowthPoints).run(culprit) };
/// assert_eq!(value, None);
/// assert_eq!(report.findings.len(), 1);
/// ```
#[derive(Clone, Debug)]
pub struct Torture {
    mode: Mode,
    seed: u64,
    limit: u64,
}

/// Say how, then what.
///
/// ```
/// use regrow::torture::{Mode, Torture};
/// let torture = Torture::new(Mode::Random(5)).seed(4711).limit(10_000);
/// // SAFETY: nothing is kept anywhere.
/// let (value, report) = unsafe { torture.run(|| [3, 1, 2].map(|number| number * 2)) };
/// assert!(report.is_clean() && report.steps <= 10_000, "{report}");
/// assert_eq!(value, Some([6, 2, 4]));
/// ```
impl Torture {
    /// With seed 0 and no limit.
    ///
    /// ```
    /// use regrow::torture::{Mode, Torture};
    /// // SAFETY: nothing is kept anywhere.
    /// let (value, report) = unsafe { Torture::new(Mode::Every(1)).run(|| i64::from_str_radix("-1f", 16)) };
    /// assert!(report.is_clean(), "{report}");
    /// assert_eq!(value, Some(Ok(-31)));
    /// ```
    #[must_use]
    pub const fn new(mode: Mode) -> Self {
        Self { mode, seed: 0, limit: u64::MAX }
    }

    /// The seed of [`Mode::Random`], which alone decides where the stack is moved. Other modes have no use for it.
    ///
    /// ```
    /// use regrow::torture::{Mode, Torture};
    /// for seed in 0..4 {
    ///     // SAFETY: nothing is kept anywhere.
    ///     let (_, report) = unsafe { Torture::new(Mode::Random(10)).seed(seed).run(|| format!("{:?}", 0.5)) };
    ///     assert!(report.is_clean(), "with seed {seed}: {report}");
    /// }
    /// ```
    #[must_use]
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// How many instructions are stepped through at most; the closure then goes on unhindered. A step takes 3 to 11 µs.
    ///
    /// ```
    /// use regrow::torture::{Mode, Torture};
    /// // SAFETY: nothing is kept anywhere.
    /// let (_, report) = unsafe { Torture::new(Mode::Every(1)).limit(1000).run(|| (0..).take(9999).sum::<u64>()) };
    /// assert_eq!(report.steps, 1000);
    /// ```
    #[must_use]
    pub const fn limit(mut self, steps: u64) -> Self {
        self.limit = steps;
        self
    }

    /// Runs `f` to its end on a relocating coroutine, moving its stack. Its value is `None` if a finding has ended it:
    /// its frames are not unwound then, what they own is leaked.
    ///
    /// # Panics
    /// If `f` does, with its payload. If `f` itself runs a torture. If the torture cannot begin, for want of memory or because
    /// the system lets nobody write breakpoints; the message says which.
    ///
    /// # Safety
    /// The promise of [`Builder::relocating`](crate::Builder::relocating) is checked here, not needed. But not every
    /// way to break it is a fault: a stack address that is only compared, xored, or kept in half a word is
    /// wrong after a move without any use as a pointer. So `f` may misbehave in any way: call this in tests.
    ///
    /// ```
    /// use regrow::torture::{Mode, Torture};
    /// // SAFETY: nothing is kept anywhere.
    /// let (value, report) = unsafe { Torture::new(Mode::Random(3)).seed(1).run(|| format!("{:?}", [1.5, 2.5])) };
    /// assert!(report.is_clean(), "{report}");
    /// assert_eq!(value.unwrap(), "[1.5, 2.5]");
    /// ```
    pub unsafe fn run<R: 'static>(&self, f: impl FnOnce() -> R + 'static) -> (Option<R>, Report) {
        // SAFETY: the caller answers for `f` to this function, which asks for the same as `run_suspending`.
        unsafe { self.run_suspending(|_| f()) }
    }

    /// As [`run`](Self::run), for a closure that suspends; it is resumed at once, each time.
    ///
    /// # Panics
    /// As [`run`](Self::run).
    ///
    /// # Safety
    /// As for [`run`](Self::run).
    ///
    /// ```
    /// use regrow::torture::{Mode, Torture};
    /// // SAFETY: nothing is kept anywhere.
    /// let (value, report) = unsafe {
    ///     Torture::new(Mode::GrowthPoints).run_suspending(|yielder| {
    ///         let local = std::hint::black_box(5);
    ///         yielder.suspend(());
    ///         local
    ///     })
    /// };
    /// assert!(report.is_clean(), "{report}");
    /// assert_eq!(value, Some(5));
    /// ```
    pub unsafe fn run_suspending<R: 'static>(
        &self,
        f: impl FnOnce(&Yielder<(), ()>) -> R + 'static,
    ) -> (Option<R>, Report) {
        if let Err(error) = thread::prepare() {
            panic!("cannot torture: {error}");
        }
        // SAFETY: the caller answers for `f`: that it keeps no pointers to its stack, or for what it does after a move.
        let builder = unsafe { Builder::new().name("tortured").learn(false).relocating() };
        let mut coroutine = builder.spawn(move |yielder: &Yielder<(), ()>, ()| {
            let _counts = turn::enter();
            f(yielder)
        });
        // With the first relocating coroutine the unwind tables are read: not something to do from breakpoint to breakpoint.
        let turn = turn::begin(self.mode, self.seed, self.limit);
        // A coroutine that was left for a finding has suspended, to its resumer, and is done.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                turn::arm();
                match coroutine.resume(()) {
                    CoroutineResult::Return(value) => break Some(value),
                    CoroutineResult::Yield(()) if coroutine.done() => break None,
                    // What has grown goes back to its first size, to grow again; without memory it stays.
                    CoroutineResult::Yield(()) if self.mode == Mode::Overflows => {
                        let _ = coroutine.shrink();
                    }
                    CoroutineResult::Yield(()) => {}
                }
            }
        }));
        let report = turn.end();
        match outcome {
            Ok(value) => (value, report),
            Err(payload) => resume_unwind(payload),
        }
    }
}
