//! Why a stack that may move did not: the latest time, and how often for each reason.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::Error;
use crate::map;
use crate::symbol;

/// Why a stack whose growth is [`Growth::Relocate`](crate::Growth::Relocate) stayed where it was: it grew in place, did not
/// shrink, or was not frozen.
///
/// ```
/// # #[inline(never)]
/// # fn deeper() {
/// #     std::hint::black_box([0u8; 10_000]);
/// # }
/// use regrow::{Builder, Reason, Yielder, pin};
/// // SAFETY: nothing is kept outside the stack.
/// let builder = unsafe { Builder::new().relocating() };
/// let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
///     let _pin = pin();
///     deeper();
///     yielder.suspend(());
/// });
/// coroutine.resume(());
/// assert_eq!(coroutine.last_not_moved().unwrap().reason, Reason::Pinned);
/// assert!(regrow::not_moved().any(|(reason, count)| reason == Reason::Pinned && count > 0));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Reason {
    /// The instruction was no push, call or access based on `rsp`, so registers may hold
    /// differences of pointers. The stack moves when such an instruction next overflows it.
    NotAGrowthPoint,
    /// A [`Pinned`](crate::Pinned) guard is alive.
    Pinned,
    /// A frame of pinned code is on the stack.
    PinnedCode,
    /// A frame has no unwind information: its code was made at run time or hand-written.
    NoMap,
    /// A frame's map leaves words ambiguous, and the coroutine has [`Maps::Precise`](crate::Maps::Precise).
    Imprecise,
    /// A frame's map contradicts the stack: a pointer word points elsewhere, or a frame has no end.
    Inconsistent,
    /// The kernel gave no memory for a larger slot.
    NoMemory,
    /// The coroutine suspended while its code was on another stack: its frames cannot be walked.
    OnAnotherStack,
}

/// All reasons, in the order of their counters.
const REASONS: [Reason; 8] = [
    Reason::NotAGrowthPoint,
    Reason::Pinned,
    Reason::PinnedCode,
    Reason::NoMap,
    Reason::Imprecise,
    Reason::Inconsistent,
    Reason::NoMemory,
    Reason::OnAnotherStack,
];

/// One time that a stack did not move; see [`Coroutine::last_not_moved`](crate::Coroutine::last_not_moved).
///
/// ```
/// # #[inline(never)]
/// # fn deeper() {
/// #     std::hint::black_box([0u8; 10_000]);
/// # }
/// use regrow::{Builder, NotMoved, Yielder, pin};
/// // SAFETY: nothing is kept outside the stack.
/// let builder = unsafe { Builder::new().relocating() };
/// let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
///     let _pin = pin();
///     deeper();
///     yielder.suspend(());
/// });
/// coroutine.resume(());
/// let NotMoved { reason, frame } = coroutine.last_not_moved().unwrap();
/// println!("grown in place at {frame:#x}: {reason:?}");
/// # assert_eq!(reason, regrow::Reason::Pinned);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotMoved {
    /// The reason.
    pub reason: Reason,
    /// The program counter of the frame that was the reason; of the interrupted frame if no frame was.
    pub frame: usize,
}

impl NotMoved {
    /// The frame's function, offset and file, if they can be found. Slow: it reads the program's symbol table.
    ///
    /// ```
    /// # let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|_, ()| ());
    /// if let Some(not_moved) = coroutine.last_not_moved() {
    ///     println!("{:?} because of {}", not_moved.reason, not_moved.function());
    /// }
    /// ```
    #[must_use]
    pub fn function(&self) -> String {
        let mut text = String::new();
        let _ = symbol::describe(self.frame, &mut text);
        text
    }
}

impl NotMoved {
    /// The reason is the frame that has this program counter.
    pub(crate) const fn at(reason: Reason, frame: usize) -> Self {
        Self { reason, frame }
    }
}

/// As [`NotMoved`], on its way to the code that notes or reports it.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub why: NotMoved,
    /// The kernel's answer, with [`Reason::NoMemory`].
    pub error: Option<Error>,
}

impl Refusal {
    /// The kernel gave no memory for a move that the frame at `frame` asked for.
    pub(crate) fn no_memory(error: Error, frame: usize) -> Self {
        Self { why: NotMoved::at(Reason::NoMemory, frame), error: Some(error) }
    }
}

impl From<NotMoved> for Refusal {
    fn from(why: NotMoved) -> Self {
        Self { why, error: None }
    }
}

static COUNTS: [AtomicU64; REASONS.len()] = [const { AtomicU64::new(0) }; REASONS.len()];

/// How often stacks of this process that may move did not grow, shrink or freeze by
/// moving, for each reason. Each event is counted when it happens, which is cheap.
///
/// ```
/// for (reason, count) in regrow::not_moved() {
///     println!("{reason:?}: {count}");
/// }
/// ```
pub fn not_moved() -> impl Iterator<Item = (Reason, u64)> {
    REASONS.into_iter().zip(&COUNTS).map(|(reason, count)| (reason, count.load(Ordering::Relaxed)))
}

/// Code without a map was found, or nothing was recorded yet: read the loaded objects before the next spawn.
static UNKNOWN_CODE: AtomicBool = AtomicBool::new(true);

/// Records the unwind tables of loaded objects if unknown code was found since the last time. Not for the handler.
pub(crate) fn record_unknown_code() {
    if UNKNOWN_CODE.load(Ordering::Acquire) {
        map::record_loaded_objects(); // one thread at a time; the others wait here
        UNKNOWN_CODE.store(false, Ordering::Release);
    }
}

/// True if unknown code kept a stack in place, and more code is known now: the move may be tried again. Not for the handler.
pub(crate) fn knows_more(reason: Reason) -> bool {
    reason == Reason::NoMap && !map::record_loaded_objects().added.is_empty()
}

/// Counts one more.
pub(crate) fn count(reason: Reason) {
    if reason == Reason::NoMap {
        UNKNOWN_CODE.store(true, Ordering::Relaxed);
    }
    COUNTS[reason as usize].fetch_add(1, Ordering::Relaxed);
}
