//! Coroutines and their yielders: resume and suspend, panics, forced unwinding, dropping.

use core::any::Any;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::ptr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::error::Error;
use crate::frames::{self, Frames};
use crate::freeze;
use crate::freeze::block::Frozen;
use crate::freeze::state::State;
use crate::freeze::touched::Told;
use crate::grow::shrink;
use crate::not_moved::{NotMoved, Reason};
use crate::settings::Growth;
use crate::size::PAGE;
use crate::stack::record::Record;
use crate::stack::release::release;
use crate::stack::suspended::Suspended;
use crate::stats::Stats;
use crate::switch::{self, Base, Handle, PANICKED, RED_ZONE, RESUME, RETURNED, UNWIND, Word, YIELDED};
use crate::thread;

/// A stackful coroutine: a function with its own stack that can stop anywhere and go on later.
///
/// Each [`resume`](Self::resume) passes an `In` and runs the coroutine until it suspends with an `Out` or
/// returns a `Ret`. The first `In` is the closure's argument; [`Yielder::suspend`] returns the later ones.
///
/// The stack starts at 2 KiB and grows by itself ([`Builder`](crate::Builder) says how, and
/// how far). A coroutine takes one page of memory and nothing else; this value is two words.
///
/// A panic in the coroutine comes out of `resume`. Dropping a suspended coroutine unwinds its frames,
/// so their destructors run. [`mem::forget`](core::mem::forget) leaks the stack and the values on it.
/// With `panic = "abort"` nothing can unwind, so a suspended coroutine that is dropped is leaked.
///
/// A coroutine that runs, or waits for one that it has resumed, can be dropped in one way only: a
/// thread-local owns it and `exit`, called inside it, runs the destructor. Such a coroutine is leaked.
/// That destructor may query it like any other, but must not resume it: nothing detects that mistake.
///
/// Unwinding on drop aborts the process if a frame stops it: an `extern "C"` function, a `noexcept`
/// function, or a C++ `catch (...)` that does not rethrow. Resume such a coroutine to its end, or leak it.
///
/// # Thread-locals
/// When a thread ends, a thread-local may be destroyed before a coroutine that borrows it. So a coroutine
/// that is kept in a thread-local can read freed memory. End or drop such coroutines before the thread ends.
///
/// # Libraries that ask the thread for its stack
/// They get the bounds of the thread's stack, not of the coroutine's. In a coroutine `stacker::remaining_stack` is 0, or far
/// too large where the coroutine's stack lies above the thread's. So an outermost `stacker::maybe_grow` always takes a segment,
/// or never does. The bounds cannot be set from outside. Call `stacker::grow` where a recursion begins: inside it the bounds
/// are right. But do not suspend inside it: the bounds belong to the thread, and the resumer would see those of the segment.
///
/// # Threads
/// A coroutine is not `Send`:
/// ```compile_fail,E0277
/// let coroutine = regrow::Coroutine::<(), (), ()>::new(|_, ()| ());
/// std::thread::spawn(move || drop(coroutine));
/// ```
/// To move one to another thread regardless (in an `unsafe` wrapper) you must know that
/// 1. everything alive on its stack may be sent to another thread (guards of locks may not),
/// 2. no address of a thread-local variable is kept across a suspend, by you or by the compiler,
/// 3. the other thread has called [`prepare_thread`](crate::prepare_thread). Without an alternate
///    signal stack, an overflow of a stack that moves ends the process by SIGSEGV, without a report.
///
/// # Example
/// ```
/// use regrow::{Coroutine, CoroutineResult};
///
/// let mut adder = Coroutine::new(|yielder, mut number: u32| {
///     let mut sum = 0;
///     while number != 0 {
///         sum += number;
///         number = yielder.suspend(sum);
///     }
///     format!("the sum is {sum}")
/// });
/// assert_eq!(adder.resume(1), CoroutineResult::Yield(1));
/// assert_eq!(adder.resume(2), CoroutineResult::Yield(3));
/// assert_eq!(adder.resume(0), CoroutineResult::Return("the sum is 3".to_string()));
/// ```
pub struct Coroutine<In, Out, Ret> {
    handle: Handle,
    types: PhantomData<fn(In) -> (Out, Ret)>,
    not_send: PhantomData<*mut ()>,
}

/// What a coroutine answers to a resume.
///
/// ```
/// use regrow::CoroutineResult;
/// assert_eq!(CoroutineResult::<u32, ()>::Yield(3).yielded(), Some(3));
/// assert_eq!(CoroutineResult::<u32, ()>::Return(()).yielded(), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum CoroutineResult<Out, Ret> {
    /// It suspended with this value and can be resumed.
    Yield(Out),
    /// It returned this value and has ended.
    Return(Ret),
}

impl<Out, Ret> CoroutineResult<Out, Ret> {
    /// The value it suspended with, if it did.
    ///
    /// ```
    /// assert_eq!(regrow::CoroutineResult::<u8, u8>::Yield(1).yielded(), Some(1));
    /// ```
    pub fn yielded(self) -> Option<Out> {
        match self {
            Self::Yield(value) => Some(value),
            Self::Return(_) => None,
        }
    }

    /// The value it returned, if it did.
    ///
    /// ```
    /// assert_eq!(regrow::CoroutineResult::<u8, u8>::Return(1).returned(), Some(1));
    /// ```
    pub fn returned(self) -> Option<Ret> {
        match self {
            Self::Return(value) => Some(value),
            Self::Yield(_) => None,
        }
    }
}

impl<In, Out, Ret> Coroutine<In, Out, Ret> {
    #[inline(always)]
    pub(crate) fn from_handle(handle: Handle) -> Self {
        Self { handle, types: PhantomData, not_send: PhantomData }
    }

    /// Makes each resume check whether the stack has unused memory.
    pub(crate) fn watch(&mut self) {
        self.handle.sp |= switch::WATCHED;
    }

    /// Runs the coroutine until it suspends or returns.
    ///
    /// # Panics
    /// If the coroutine has ended. If it panics: with the same payload, and the coroutine has ended.
    ///
    /// ```
    /// let mut coroutine = regrow::Coroutine::<(), u32, ()>::new(|yielder, ()| {
    ///     for number in 0.. {
    ///         yielder.suspend(number);
    ///     }
    /// });
    /// assert_eq!(coroutine.resume(()).yielded(), Some(0));
    /// assert_eq!(coroutine.resume(()).yielded(), Some(1));
    /// ```
    // Always: a call to this function would push a return address. A return in the coroutine would then
    // be mispredicted by the processor's return stack, which makes such coroutines four times as slow.
    #[inline(always)]
    #[track_caller]
    pub fn resume(&mut self, input: In) -> CoroutineResult<Out, Ret> {
        let input = Transfer::new(input);
        let (word, outcome) = if self.handle.is_special() {
            self.resume_specially(input)
        } else {
            // SAFETY: a handle without flag bits is that of a suspended coroutine (a running one is borrowed
            // by its resume). With `RESUME` it takes an `In`, in its first frame and at every suspend.
            unsafe { switch::resume(&mut self.handle, input.word(), RESUME) }
        };
        if outcome == YIELDED {
            // SAFETY: with this outcome comes an `Out`.
            return CoroutineResult::Yield(unsafe { Transfer::read(word) });
        }
        // SAFETY: the coroutine has ended with this word and outcome.
        match unsafe { self.end(word, outcome) } {
            Ok(value) => CoroutineResult::Return(value),
            Err(payload) => resume_unwind(payload),
        }
    }

    /// As [`switch::resume`], for a coroutine that has ended, is frozen, or whose stack has grown and is watched.
    // The caller reads the result: reading it here would cost every resume one more copy of a large value.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn resume_specially(&mut self, input: Transfer<In>) -> (Word, usize) {
        if self.done() {
            drop(input.into_inner());
            resumed_after_end();
        }
        if let Err(error) = self.thaw() {
            drop(input.into_inner());
            panic!("cannot resume a frozen coroutine: {error}");
        }
        self.handle.sp &= !switch::WATCHED;
        // SAFETY: it has not ended and is not frozen, so it is suspended, and takes an `In` with `RESUME`.
        let reply = unsafe {
            // On another stack, the stack pointer does not show how much of the coroutine's own stack is in use.
            if Record::holds((*self.handle.base).record(), self.handle.sp) {
                shrink::before_resume(&mut Suspended::new(&mut self.handle));
            }
            switch::resume(&mut self.handle, input.word(), RESUME)
        };
        if !self.done() {
            self.watch_again();
        }
        reply
    }

    /// Marks the handle of a coroutine that has suspended, if it is to be watched.
    fn watch_again(&mut self) {
        // SAFETY: a suspended coroutine's base and record are accessible.
        if shrink::is_watched(unsafe { &*(*self.handle.base).record() }) {
            self.watch();
        }
    }

    /// Reads the result of a coroutine that has ended from its stack, and gives the stack back.
    ///
    /// # Safety
    /// The latest resume gave this word and outcome, which is not `YIELDED`.
    #[inline(always)]
    unsafe fn end(&mut self, word: Word, outcome: usize) -> Result<Ret, Box<dyn Any + Send>> {
        // SAFETY: with `RETURNED` comes a `Ret`, otherwise the address of a panic's payload
        // on the coroutine's stack. Nothing on the stack is needed after that value is read.
        unsafe {
            let result =
                if outcome == RETURNED { Ok(Transfer::read(word)) } else { Err(Transfer::read(word)) };
            release((*self.handle.base).record());
            result
        }
    }

    /// True if the coroutine has returned or panicked.
    ///
    /// ```
    /// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|_, ()| ());
    /// assert!(!coroutine.done());
    /// coroutine.resume(());
    /// assert!(coroutine.done());
    /// ```
    #[inline]
    #[must_use]
    pub fn done(&self) -> bool {
        self.handle.has_ended()
    }

    /// True if the coroutine has been resumed at least once.
    ///
    /// ```
    /// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
    /// assert!(!coroutine.started());
    /// coroutine.resume(());
    /// assert!(coroutine.started());
    /// ```
    #[must_use]
    pub fn started(&self) -> bool {
        match self.state() {
            // SAFETY: it is suspended there.
            State::Suspended(sp) => !unsafe { switch::is_fresh(sp) },
            _ => true, // a coroutine that was never resumed is on its own stack, and not frozen
        }
    }

    /// Prefetches the memory that a resume of this coroutine touches first: where it goes on, and its outermost frame.
    ///
    /// This helps a caller that resumes so many coroutines in turn that their stacks are in
    /// no cache. Call it for the coroutine that is some resumes ahead (8, say). It takes a
    /// few cycles, changes nothing, and may be called for a coroutine that has ended.
    ///
    /// ```
    /// use regrow::Coroutine;
    ///
    /// const AHEAD: usize = 8;
    /// let mut ready: Vec<_> = (0..100)
    ///     .map(|number| Coroutine::<(), u32, ()>::new(move |yielder, ()| yielder.suspend(number)))
    ///     .collect();
    /// for next in 0..ready.len() {
    ///     if let Some(later) = ready.get(next + AHEAD) {
    ///         later.prefetch();
    ///     }
    ///     assert_eq!(ready[next].resume(()).yielded(), Some(next as u32));
    /// }
    /// ```
    #[inline(always)]
    pub fn prefetch(&self) {
        self.handle.prefetch();
    }

    /// How its stack grows; [`Growth::InPlace`] after its end, when that is no longer known.
    ///
    /// ```
    /// let coroutine = regrow::Coroutine::<(), (), ()>::new(|_, ()| ());
    /// assert_eq!(coroutine.growth(), regrow::Growth::InPlace);
    /// ```
    #[must_use]
    pub fn growth(&self) -> Growth {
        self.ask(|frozen| frozen.settings().growth, |record| record.settings.growth)
            .unwrap_or(Growth::InPlace)
    }

    /// Its name; `None` after its end.
    ///
    /// ```
    /// assert_eq!(regrow::Coroutine::<(), (), ()>::new(|_, ()| ()).name(), None);
    /// ```
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        let of_block = |frozen: &Frozen| frozen.name().map(ptr::from_ref);
        let name = self.ask(of_block, |record| record.name.as_deref().map(ptr::from_ref)).flatten();
        // SAFETY: the name is on the heap and belongs to the coroutine, which is borrowed, wherever the record is.
        name.map(|name| unsafe { &*name })
    }

    /// Its counters; all zero after its end, when another coroutine may have the stack.
    ///
    /// ```
    /// let coroutine = regrow::Coroutine::<(), (), ()>::new(|_, ()| ());
    /// assert_eq!(coroutine.stats().highest, 4096);
    /// ```
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.ask(Frozen::stats, Record::stats).unwrap_or(Stats::NONE)
    }

    /// Gives back the memory that the suspended coroutine's stack does not need. True if there was some.
    ///
    /// A stack that grows in place gives back all pages below its stack pointer. A stack that moves becomes as small as
    /// its used part allows, but not smaller than its first size; memory below the used part goes back to the kernel.
    ///
    /// A [pinned](crate::pin()) stack does not move; it can only give back slack that was
    /// opened for it. A coroutine that suspended while its code was on another stack (as
    /// with `stacker::grow`) gives back nothing: the used part of its own stack is unknown.
    ///
    /// # Errors
    /// If the kernel has no memory for the smaller slot. Nothing has changed then.
    ///
    /// ```
    /// #[inline(never)]
    /// fn deeper() {
    ///     std::hint::black_box([0u8; 50_000]);
    /// }
    /// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| {
    ///     deeper();
    ///     yielder.suspend(());
    /// });
    /// coroutine.resume(());
    /// assert!(coroutine.stats().size > 32768);
    /// assert!(coroutine.shrink()?);
    /// assert!(coroutine.stats().size <= 8192);
    /// # Ok::<(), regrow::Error>(())
    /// ```
    pub fn shrink(&mut self) -> Result<bool, Error> {
        let Some(mut suspended) = self.on_its_own_stack() else { return Ok(false) };
        let outcome = shrink::shrink(&mut suspended);
        shrink::watch_again(&mut suspended);
        outcome
    }

    /// Moves the coroutine's used bytes into a block of their size and gives the
    /// stack to others. `true` if it is now frozen. A resume or drop thaws it.
    ///
    /// This is for coroutines that are parked for long: one that holds almost nothing takes some
    /// hundred bytes. A [pin](crate::pin()) prevents freezing, and so does a frame that may not move
    /// if the stack grows by moving (see [`last_not_moved`](Self::last_not_moved)). Nothing happens
    /// to a coroutine that never ran, has ended, or suspended while its code was on another stack.
    ///
    /// A stack that grows in place keeps its address and its slot. Code on any thread may touch it while it is frozen: the
    /// fault handler thaws it. A thread that has blocked SIGSEGV ends the process by such a touch, without a report. A
    /// system call that gets memory on a frozen stack fails with `EFAULT`. What the kernel writes there by itself is lost,
    /// for example when it completes a read that another thread or an `io_uring` has begun: pin the stack until then.
    ///
    /// Freezing and thawing a stack that grows in place takes some microseconds in a
    /// process with one thread, and four times as much with several. With several it needs
    /// `/proc/self/mem`, and before Linux 6.15 one or two mappings for each frozen stack.
    ///
    /// # Errors
    /// If there is no memory for the block or the mappings, or no `/proc/self/mem` where it is needed. Nothing has changed then.
    ///
    /// ```
    /// // SAFETY: nothing is kept outside the stack.
    /// let builder = unsafe { regrow::Builder::new().relocating() };
    /// let mut coroutine = builder.spawn(|yielder: &regrow::Yielder<(), u32>, ()| {
    ///     let mut number = 0;
    ///     let reference = &mut number;
    ///     loop {
    ///         *reference += 1;
    ///         yielder.suspend(*reference);
    ///     }
    /// #   #[allow(unreachable_code)]
    /// #   ()
    /// });
    /// assert_eq!(coroutine.resume(()).yielded(), Some(1));
    /// assert!(coroutine.freeze()?);
    /// assert!(coroutine.is_frozen());
    /// assert_eq!(coroutine.resume(()).yielded(), Some(2));
    /// # Ok::<(), regrow::Error>(())
    /// ```
    pub fn freeze(&mut self) -> Result<bool, Error> {
        // SAFETY: the list of `NOBODY` lives forever.
        unsafe { self.freeze_telling(Told::NOBODY) }
    }

    /// As [`freeze`](Self::freeze); `told` learns when the stack is touched.
    ///
    /// # Safety
    /// `told`'s list lives as long as the coroutine is frozen, or until [`tell`](Self::tell) names another.
    pub(crate) unsafe fn freeze_telling(&mut self, told: Told) -> Result<bool, Error> {
        if self.is_frozen() {
            return Ok(true); // until some code touches it
        }
        let Some(suspended) = self.on_its_own_stack() else { return Ok(false) };
        // SAFETY: the caller guarantees that the list lives long enough.
        unsafe { freeze::freeze(suspended, told) }
    }

    /// The coroutine, if it is suspended on its own stack: then it can be shrunk and frozen.
    /// If its code is on another stack, a stack that may move is counted as not moved.
    fn on_its_own_stack(&mut self) -> Option<Suspended<'_>> {
        match self.state() {
            State::Suspended(sp) => {
                self.handle.sp = sp;
                // SAFETY: it is suspended there, and its owner is borrowed.
                Some(unsafe { Suspended::new(&mut self.handle) })
            }
            State::Elsewhere(sp) => {
                // SAFETY: it is suspended there, so its record and what its suspend has left are accessible.
                let (record, registers) =
                    unsafe { (&mut *(*self.handle.base).record(), switch::registers_of(sp)) };
                if record.settings.growth == Growth::Relocate {
                    record.note(NotMoved::at(Reason::OnAnotherStack, registers.pc()));
                }
                None
            }
            _ => None,
        }
    }

    /// Names the list that learns when the stack is touched, if it is now frozen in place.
    ///
    /// # Safety
    /// As for [`freeze_telling`](Self::freeze_telling).
    pub(crate) unsafe fn tell(&self, told: Told) {
        // SAFETY: the caller says that the list lives as long as it is frozen.
        unsafe { freeze::tell(&self.handle, told) };
    }

    /// Brings a frozen coroutine back onto a stack now. A resume does this, too.
    ///
    /// # Errors
    /// If there is no memory for a stack. The coroutine is still frozen then.
    ///
    /// ```
    /// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|_, ()| ());
    /// coroutine.thaw()?; // nothing to do
    /// # Ok::<(), regrow::Error>(())
    /// ```
    pub fn thaw(&mut self) -> Result<(), Error> {
        if self.handle.sp & switch::FROZEN == 0 {
            return Ok(());
        }
        // SAFETY: the handle says that it is frozen. If thawing succeeds it is suspended.
        unsafe { freeze::thaw(&mut self.handle, thread::prepare)? };
        self.watch_again();
        Ok(())
    }

    /// True if the coroutine is [frozen](Self::freeze).
    ///
    /// ```
    /// assert!(!regrow::Coroutine::<(), (), ()>::new(|_, ()| ()).is_frozen());
    /// ```
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.state().is_frozen()
    }

    /// Bytes of memory that the coroutine's stack and record take. For a frozen coroutine, those of its block. For
    /// a stack that grows in place, those of the slot's pages that have memory, which the kernel is asked for.
    /// Otherwise those of the slot's accessible pages, although untouched ones take no memory. 0 after its end.
    ///
    /// ```
    /// assert_eq!(regrow::Coroutine::<(), (), ()>::new(|_, ()| ()).bytes(), 4096);
    /// ```
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.ask(Frozen::bytes, Record::bytes).unwrap_or(0)
    }

    /// As [`bytes`](Self::bytes), without asking the kernel: a stack
    /// that grows in place counts its pages from the stack pointer up.
    pub(crate) fn parked_bytes(&self) -> usize {
        let of_record = |record: &Record| {
            let used = Record::end(record).wrapping_sub(self.handle.sp).wrapping_add(RED_ZONE);
            match record.settings.growth {
                Growth::InPlace if used <= record.open => used.next_multiple_of(PAGE),
                _ => record.bytes(),
            }
        };
        self.ask(Frozen::bytes, of_record).unwrap_or(0)
    }

    /// Why the stack stayed where it was, the latest time that it could not move: it
    /// grew in place, did not shrink, or was not frozen. `None` if that never happened.
    ///
    /// ```
    /// #[inline(never)]
    /// fn deeper() {
    ///     std::hint::black_box([0u8; 10_000]);
    /// }
    /// // SAFETY: nothing is kept outside the stack.
    /// let builder = unsafe { regrow::Builder::new().relocating() };
    /// let mut coroutine = builder.spawn(|yielder: &regrow::Yielder<(), ()>, ()| {
    ///     let pin = regrow::pin();
    ///     deeper();
    ///     drop(pin);
    ///     yielder.suspend(());
    /// });
    /// coroutine.resume(());
    /// assert_eq!(coroutine.last_not_moved().unwrap().reason, regrow::Reason::Pinned);
    /// ```
    #[must_use]
    pub fn last_not_moved(&self) -> Option<NotMoved> {
        self.ask(Frozen::not_moved, |record| record.not_moved).flatten()
    }

    /// The frames on its stack: a table when printed, plain data otherwise. Slow: it reads unwind tables and symbols.
    ///
    /// ```
    /// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
    /// coroutine.resume(());
    /// let frames = coroutine.frames();
    /// println!("{frames}");
    /// assert_eq!(frames.frames.iter().map(|frame| frame.size).sum::<usize>(), frames.used);
    /// ```
    #[must_use]
    pub fn frames(&self) -> Frames {
        let hidden = |state| Frames::hidden(state, self.name(), self.growth(), &self.stats());
        match self.state() {
            State::Ended => Frames::finished(),
            State::FrozenHere | State::FrozenElsewhere(_) => hidden(frames::State::Frozen),
            State::Elsewhere(_) => hidden(frames::State::OnAnotherStack),
            State::Running(_) => hidden(frames::State::Running),
            // SAFETY: it is suspended there, on its own stack.
            State::Suspended(sp) => unsafe { Frames::of_suspended(sp, self.handle.base) },
        }
    }

    /// Its state.
    fn state(&self) -> State {
        State::of(&self.handle)
    }

    /// Asks the block of a frozen coroutine, or the record of another one. `None` after its end.
    fn ask<R>(&self, of_block: impl FnOnce(&Frozen) -> R, of_record: impl FnOnce(&Record) -> R) -> Option<R> {
        freeze::peek(&self.handle, of_block).or_else(|| self.record().map(of_record))
    }

    fn record(&self) -> Option<&Record> {
        let base = match self.state() {
            State::Ended | State::FrozenHere | State::FrozenElsewhere(_) => return None,
            State::Running(running) => running.base(),
            State::Suspended(_) | State::Elsewhere(_) => self.handle.base,
        };
        // SAFETY: base and record are accessible, since the coroutine has not ended and is not frozen. Only
        // this thread writes the record: while the coroutine runs, and through its handle, which is borrowed.
        Some(unsafe { &*(*base).record() })
    }

    /// Unwinds the frames of a suspended coroutine.
    #[cold]
    fn unwind(&mut self) {
        /// How often a coroutine may catch its unwinding and suspend again.
        const PATIENCE: usize = 100;
        // During the destructors of thread-locals, std may have removed the thread's signal stack, without which
        // the stack cannot grow. An error is ignored: it cannot be returned, and the stack may not need to grow.
        let _ = thread::prepare();
        for _ in 0..PATIENCE {
            self.handle.sp &= !switch::WATCHED;
            // SAFETY: it is suspended, and with `UNWIND` it takes no value.
            let (word, outcome) = unsafe { switch::resume(&mut self.handle, Word::uninit(), UNWIND) };
            if outcome == YIELDED {
                // SAFETY: with this outcome comes an `Out`.
                drop(unsafe { Transfer::<Out>::read(word) });
                continue;
            }
            // SAFETY: the coroutine has ended with this word and outcome.
            match unsafe { self.end(word, outcome) } {
                Err(payload) if !payload.is::<ForcedUnwind>() => resume_unwind(payload),
                _ => return,
            }
        }
        fatal("a coroutine that is being dropped catches its unwinding and suspends again, over and over");
    }
}

impl<In, Out, Ret> Drop for Coroutine<In, Out, Ret> {
    #[inline]
    fn drop(&mut self) {
        if !self.done() {
            self.drop_unfinished();
        }
    }
}

impl<In, Out, Ret> Coroutine<In, Out, Ret> {
    #[cold]
    fn drop_unfinished(&mut self) {
        if self.thaw().is_err() {
            // SAFETY: the list of `NOBODY` lives forever.
            unsafe { self.tell(Told::NOBODY) };
            return; // leaked: there is no memory for a stack to unwind it on
        }
        if let State::Running(_) = self.state() {
            return; // dropped inside `exit`: its frames are in use, and are leaked
        }
        self.handle.sp &= !switch::WATCHED;
        if self.started() {
            // SAFETY: it has not ended, and its maker promised that the frames of a raw coroutine may be forgotten.
            unsafe {
                let record = (*self.handle.base).record();
                if (*record).settings.raw {
                    self.handle.sp = switch::ENDED;
                    return release(record);
                }
            }
            if cfg!(panic = "unwind") {
                self.unwind();
            }
            return;
        }
        // SAFETY: it never ran, so its closure is where the builder put it, and its stack is empty otherwise.
        unsafe {
            let record = (*self.handle.base).record();
            self.handle.sp = switch::ENDED;
            // The stack is given back even if the closure's destructor panics.
            let release = OnDrop(|| release(record));
            ((*record).drop_closure)(record.cast());
            drop(release);
        }
    }
}

impl<In, Out, Ret> core::fmt::Debug for Coroutine<In, Out, Ret> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Coroutine")
            .field("name", &self.name())
            .field("started", &self.started())
            .field("done", &self.done())
            .field("growth", &self.growth())
            .field("size", &self.stats().size)
            .finish()
    }
}

/// Suspends a coroutine, from inside, with a value for its resumer.
///
/// ```
/// use regrow::{Coroutine, Yielder};
///
/// fn visit(yielder: &Yielder<(), u32>, depth: u32) {
///     if depth > 0 {
///         visit(yielder, depth - 1);
///         yielder.suspend(depth); // from any depth of calls
///         visit(yielder, depth - 1);
///     }
/// }
/// let mut walk = Coroutine::new(|yielder: &Yielder<(), u32>, ()| visit(yielder, 3));
/// let order: Vec<_> = std::iter::from_fn(|| walk.resume(()).yielded()).collect();
/// assert_eq!(order, [1, 2, 1, 3, 1, 2, 1]);
/// ```
#[repr(transparent)]
pub struct Yielder<In, Out> {
    base: Base,
    types: PhantomData<fn(Out) -> In>,
    not_send: PhantomData<*mut ()>,
}

impl<In, Out> Yielder<In, Out> {
    /// Suspends the coroutine with `value` for its resumer, and returns what it is resumed with.
    ///
    /// # What belongs to the thread
    /// The count of panics belongs to the thread, not to the coroutine. So do not suspend in a destructor that
    /// runs because of a panic or a C++ exception. Until the coroutine is resumed, other code on the thread
    /// seems to panic: it poisons the mutexes that it unlocks, and a panic in it may abort the process.
    ///
    /// Do not hold a borrow of a thread-local, or a context that a library keeps in one, across a
    /// suspend. The resumer sees that context, and leaves its own contexts in the wrong order.
    /// Examples are the guards of `tracing::Span::enter` and `tokio::runtime::Handle::enter`, and
    /// the closures of `tracing::subscriber::with_default` and `tokio::task::LocalKey::sync_scope`.
    ///
    /// # Panics
    /// If another coroutine runs, that is, a nested one uses an outer one's yielder.
    /// Also when the suspended coroutine is dropped: this unwinds its frames.
    ///
    /// ```
    /// let mut echo = regrow::Coroutine::<u32, u32, ()>::new(|yielder, mut value| loop {
    ///     value = yielder.suspend(value);
    /// });
    /// assert_eq!(echo.resume(5).yielded(), Some(5));
    /// ```
    #[inline(always)] // as `Coroutine::resume`
    #[track_caller]
    pub fn suspend(&self, value: Out) -> In {
        let Some(running) = switch::running().filter(|running| ptr::eq(running.base(), &self.base)) else {
            suspended_from_elsewhere();
        };
        let value = Transfer::new(value);
        // SAFETY: this coroutine runs, as was just checked, and its resumer expects an `Out` with `YIELDED`.
        let (word, command) = unsafe { switch::suspend(running, &self.base, value.word()) };
        if command != RESUME {
            forced_unwind();
        }
        // SAFETY: with `RESUME` comes an `In`.
        unsafe { Transfer::read(word) }
    }
}

impl<In, Out> core::fmt::Debug for Yielder<In, Out> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Yielder")
    }
}

/// The first function on a new coroutine's stack. It gets the first input.
pub(crate) unsafe extern "C" fn entry<In, Out, Ret, F>(word: Word, _command: usize, base: &Base) -> !
where
    F: FnOnce(&Yielder<In, Out>, In) -> Ret,
{
    // SAFETY: a yielder is a base, whatever its types.
    let yielder = unsafe { &*ptr::from_ref(base).cast::<Yielder<In, Out>>() };
    let run = || {
        // SAFETY: the first resume brings an `In`; the builder put an `F` at this place, and it is taken once.
        let (input, f) = unsafe {
            (Transfer::<In>::read(word), Record::closure(base.record(), size_of::<F>()).cast::<F>().read())
        };
        f(yielder, input)
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(value) => {
            let value = Transfer::new(value);
            // SAFETY: the resumer reads a `Ret` with this outcome before it touches the stack.
            unsafe { switch::finish(base, value.word(), RETURNED) }
        }
        Err(payload) => {
            let payload: Transfer<Box<dyn Any + Send>> = Transfer::new(payload);
            // SAFETY: the resumer reads a payload with this outcome before it touches the stack.
            unsafe { switch::finish(base, payload.word(), PANICKED) }
        }
    }
}

/// Drops the closure of a coroutine that never ran.
///
/// # Safety
/// `record` is that of a coroutine made with an `F`, which is still in its place.
pub(crate) unsafe fn drop_closure<F>(record: *mut u8) {
    // SAFETY: the closure never ran, so it is still where the builder put it.
    unsafe { Record::closure(record.cast(), size_of::<F>()).cast::<F>().drop_in_place() }
}

/// A value on its way through a switch. A value that fits is in the word itself. Otherwise the word
/// is its address on this side's stack, which does not change before the other side has read it.
struct Transfer<T>(ManuallyDrop<T>);

impl<T> Transfer<T> {
    const FITS: bool = size_of::<T>() <= size_of::<usize>();

    #[inline(always)]
    fn new(value: T) -> Self {
        Self(ManuallyDrop::new(value))
    }

    fn into_inner(self) -> T {
        ManuallyDrop::into_inner(self.0)
    }

    #[inline(always)]
    fn word(&self) -> Word {
        let value = ptr::from_ref(&self.0);
        if !Self::FITS {
            return Word::new(value as usize);
        }
        let mut word = Word::uninit();
        // SAFETY: the value fits, and a word may hold whatever bytes it has.
        unsafe { ptr::copy_nonoverlapping(value.cast::<u8>(), word.as_mut_ptr().cast(), size_of::<T>()) };
        word
    }

    /// # Safety
    /// `word` was made by [`word`](Self::word) from a `T` that has not been read since, and whose stack has
    /// not run since.
    #[inline(always)]
    unsafe fn read(word: Word) -> T {
        // SAFETY: the word holds the bytes of a `T`, or the address of one on a stack that has not run since. It is read once.
        unsafe {
            if Self::FITS {
                word.as_ptr().cast::<T>().read_unaligned()
            } else {
                (word.assume_init() as *const T).read()
            }
        }
    }
}

/// The payload of the unwinding that drops a suspended coroutine's frames.
struct ForcedUnwind;

#[cold]
#[inline(never)]
fn forced_unwind() -> ! {
    resume_unwind(Box::new(ForcedUnwind))
}

#[cold]
#[inline(never)]
#[track_caller]
fn resumed_after_end() -> ! {
    panic!("resumed a coroutine that has ended: check done() or the last CoroutineResult");
}

#[cold]
#[inline(never)]
#[track_caller]
fn suspended_from_elsewhere() -> ! {
    panic!(
        "suspend() on the yielder of a coroutine that is not the one running: suspend the running one first"
    );
}

#[cold]
fn fatal(sentence: &str) -> ! {
    eprintln!("regrow: {sentence}");
    std::process::abort()
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// The counters of the coroutine that runs on this thread; `None` outside coroutines.
///
/// ```
/// assert!(regrow::current_stats().is_none());
/// ```
#[must_use]
pub fn current_stats() -> Option<Stats> {
    switch::running().map(|running| running.with_record(|record| record.stats()))
}
