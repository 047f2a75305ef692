//! Torture: moves the stack of a closure wherever it may be moved, and reports what broke.
//!
//! A caller of [`Builder::relocating`](crate::Builder::relocating) promises that nothing outside the stack points into it.
//! Torture checks this promise: it runs the closure on a relocating coroutine, moves the stack thousands of times, and makes
//! each slot that the stack leaves inaccessible at once. The first use of a pointer left behind is a fault. The fault ends the
//! closure but not the process, and a [`Report`] describes it.
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
//! The closure runs with the processor's trap flag set, so the kernel sends SIGTRAP after each instruction. The handler runs on
//! the thread's signal stack and looks at the next instruction. If the [`Mode`] asks for a move there, the handler moves the
//! stack with the fault handler's own function, so the effect is that of an overflow at this instruction.
//!
//! ```text
//!   closure    push rbp │  mov rbp, rsp │  sub rsp, 32 │  call f │ ...
//!                       ▼               ▼              ▼         ▼         one SIGTRAP each
//!   handler    wanted here? movable? ── yes ─► relocate to a free slot, close the old one, poison the new one
//! ```
//!
//! # Where a stack is not moved
//!
//! - **In leaf string routines**, except at growth points. `memcpy`, `strlen` and the like hold *differences* of pointers in
//!   registers (`sub rsi, rcx`), which a relocator cannot recognise. Their addresses identify them: the dynamic linker gives
//!   this processor's variant of each libc `mem*`, `str*`, `wcs*` and `wmem*` function, and the unwind table its end.
//! - **In probe loops**, except at the probe. Between `lea r11, [rsp - N]` and the end of the loop, `r11` is relative to `rsp`
//!   but points outside the slot. Such a loop is known by the value of `r11`: less than 4 GiB below the slot.
//! - **While SIGTRAP is blocked.** The kernel kills a process that is trapped then. A system call that would block SIGTRAP
//!   (libc's `posix_spawn` and `pthread_create` block all signals for a while) switches stepping off. A SIGTRAP left pending
//!   switches stepping on again when it is delivered.
//! - **While this crate takes or returns a slot.** If a handler changed the list of free slots at each instruction, the
//!   exchange of the list's head would never succeed.
//! - **On another stack**: in signal handlers with their own stack, and while a coroutine runs whose stack grows in place. A
//!   nested coroutine whose stack moves is tortured like the outer one.
//!
//! # Which slots
//!
//! A stack that returned to a slot would make the pointers left there valid again. So a slot is reused only after at least 256
//! more moves. Guards are set and removed by `madvise`, at 1.3 µs per pair.
//!
//! # Poison
//!
//! Stack bytes unused since the last move are `0xf5`, down to the end of the page that holds `rsp`. Using them as a pointer
//! always faults, and the finding is [`Kind::Poison`]. The bytes that a stack has left are inaccessible: using them is
//! [`Kind::Stale`].
//!
//! # One at a time
//!
//! A process tortures one closure at a time; [`Torture::run`] waits for its turn. Other threads run undisturbed. If another
//! thread (a scoped one, say) uses a stale pointer into the tortured stack, that is also a finding. That thread is stopped for
//! good, because it has no valid data to continue with.

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

/// Set the options, then run a closure.
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
    /// A torture with seed 0 and no limit.
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

    /// Sets the seed of [`Mode::Random`], which alone decides where the stack is moved. Other modes ignore the seed.
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

    /// Limits how many instructions are stepped through; the closure then runs on freely. A step takes 3 to 11 µs.
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

    /// Runs `f` to its end on a relocating coroutine and moves its stack. The value is `None` if a finding ended `f`: its
    /// frames are then not unwound, and the values they own are leaked.
    ///
    /// # Panics
    /// If `f` panics, with its payload. If `f` itself runs a torture. If the torture cannot begin, because memory is short or
    /// the system forbids writing breakpoints; the message gives the reason.
    ///
    /// # Safety
    /// This function checks the promise of [`Builder::relocating`](crate::Builder::relocating) and does not require it. But a
    /// broken promise need not fault: a stack address that is only compared, xored, or kept in half a word is wrong after a
    /// move and never used as a pointer. So `f` may misbehave in any way: call this in tests.
    ///
    /// ```
    /// use regrow::torture::{Mode, Torture};
    /// // SAFETY: nothing is kept anywhere.
    /// let (value, report) = unsafe { Torture::new(Mode::Random(3)).seed(1).run(|| format!("{:?}", [1.5, 2.5])) };
    /// assert!(report.is_clean(), "{report}");
    /// assert_eq!(value.unwrap(), "[1.5, 2.5]");
    /// ```
    pub unsafe fn run<R: 'static>(&self, f: impl FnOnce() -> R + 'static) -> (Option<R>, Report) {
        // SAFETY: `f` leaves no pointer to its stack outside that stack, or what it does with one is the test: the caller's promise.
        unsafe { self.run_suspending(|_| f()) }
    }

    /// As [`run`](Self::run), for a closure that suspends; it is resumed at once each time.
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
        // SAFETY: `f` keeps no pointer to its stack outside that stack, or what it does with one after a move is the test.
        let builder = unsafe { Builder::new().name("tortured").learn(false).relocating() };
        let mut coroutine = builder.spawn(move |yielder: &Yielder<(), ()>, ()| {
            let _counts = turn::enter();
            f(yielder)
        });
        // The spawn above reads the unwind tables if it is the first of a relocating coroutine, so breakpoints go in after it.
        let turn = turn::begin(self.mode, self.seed, self.limit);
        // A coroutine that a finding ended has yielded to its resumer and is done.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                turn::arm();
                match coroutine.resume(()) {
                    CoroutineResult::Return(value) => break Some(value),
                    CoroutineResult::Yield(()) if coroutine.done() => break None,
                    // A grown stack shrinks to its first size, to grow again; if memory is short it stays as it is.
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
