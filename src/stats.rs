//! Counters for one coroutine and for the whole process.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::settings::Growth;

/// One growth of one stack.
///
/// ```
/// # #[inline(never)]
/// # fn deeper() {
/// #     std::hint::black_box([0u8; 10_000]);
/// # }
///
/// use regrow::{Builder, LastGrowth, Yielder};
/// // SAFETY: nothing is kept outside the stack.
/// let builder = unsafe { Builder::new().relocating() };
/// let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
///     deeper(); // 10,000 bytes
///     yielder.suspend(());
/// });
/// coroutine.resume(());
/// let LastGrowth { from, to, bytes, .. } = coroutine.stats().last.unwrap();
/// assert!(from < to && to > 10_000 && bytes > 0);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct LastGrowth {
    /// Size before, in bytes.
    pub from: usize,
    /// Size after, in bytes.
    pub to: usize,
    /// Bytes copied; 0 if the stack used its slack.
    pub bytes: usize,
    /// Words rewritten because they pointed into the stack, registers included.
    pub words: usize,
    /// Nanoseconds in the fault handler, without the kernel's share (about 2–3 µs).
    pub nanoseconds: u64,
}

/// Counters of one coroutine; see [`Coroutine::stats`](crate::Coroutine::stats) and
/// [`current_stats`](crate::current_stats).
///
/// ```
/// let mut coroutine = regrow::Coroutine::new(|_: &regrow::Yielder<(), ()>, ()| {
///     regrow::current_stats().unwrap().size
/// });
/// assert_eq!(coroutine.stats().size, 4096);
/// assert_eq!(coroutine.stats().growths, 0);
/// # let _ = coroutine.resume(());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Stats {
    /// How often the fault handler or [`reserve`](crate::reserve) made the stack larger. 0 for a stack that grows in place:
    /// only the kernel enlarges it.
    pub growths: u64,
    /// How often the stack became smaller or gave memory back.
    pub shrinks: u64,
    /// Bytes copied by moving.
    pub bytes_copied: u64,
    /// Words rewritten by moving.
    pub words_rewritten: u64,
    /// Bytes the stack has now. For a stack that grows in place: the bytes with memory, record included, as the kernel
    /// tells. While it is frozen: the bytes that will have memory once thawed.
    pub size: usize,
    /// The most bytes the stack ever had. For a stack that grows in place: the most seen by this call or when memory was
    /// given back.
    pub highest: usize,
    /// The latest growth.
    pub last: Option<LastGrowth>,
}

impl Stats {
    /// The counters of a coroutine that has ended.
    pub(crate) const NONE: Self =
        Self { growths: 0, shrinks: 0, bytes_copied: 0, words_rewritten: 0, size: 0, highest: 0, last: None };
}

/// How the maps of moved frames class their words; part of [`Totals`].
///
/// With [`Maps::Precise`](crate::Maps::Precise) no word is ambiguous. With [`Maps::Off`](crate::Maps::Off) all are.
///
/// ```
/// let words = regrow::totals().words_by_map;
/// assert!(words.elsewhere <= words.pointers);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct WordsByMap {
    /// Pointers.
    pub pointers: u64,
    /// The pointers left alone since they did not point into their stack: null, the heap, another stack.
    pub elsewhere: u64,
    /// Data.
    pub data: u64,
    /// Words judged by their value.
    pub ambiguous: u64,
}

impl WordsByMap {
    #[cfg(feature = "torture")]
    pub(crate) const NONE: Self = Self { pointers: 0, elsewhere: 0, data: 0, ambiguous: 0 };
}

/// Counters of the process since it started; see [`totals`].
///
/// ```
/// use regrow::{Builder, Totals, Yielder, totals};
/// # #[inline(never)]
/// # fn deeper() {
/// #     std::hint::black_box([0u8; 10_000]);
/// # }
/// // SAFETY: nothing is kept outside the stack.
/// let builder = unsafe { Builder::new().relocating() };
/// builder.spawn(|_: &Yielder<(), ()>, ()| deeper()).resume(()); // 10,000 bytes
/// let Totals { moves, in_place, highest, .. } = totals();
/// println!("{} growths, {moves} of them by moving; the largest stack has had {highest} bytes", moves + in_place);
/// assert!(moves > 0 && highest > 10_000);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Totals {
    /// Growths by moving.
    pub moves: u64,
    /// How often a stack that may move used its slack instead.
    pub in_place: u64,
    /// How often a stack became smaller or gave memory back.
    pub shrinks: u64,
    /// Bytes copied.
    pub bytes_copied: u64,
    /// Words rewritten.
    pub words_rewritten: u64,
    /// Words of moved frames, by their class in the frames' maps.
    pub words_by_map: WordsByMap,
    /// The largest size of any stack that moves, in bytes.
    pub highest: usize,
}

static MOVES: AtomicU64 = AtomicU64::new(0);
static IN_PLACE: AtomicU64 = AtomicU64::new(0);
static SHRINKS: AtomicU64 = AtomicU64::new(0);
static BYTES_COPIED: AtomicU64 = AtomicU64::new(0);
static WORDS_REWRITTEN: AtomicU64 = AtomicU64::new(0);
static POINTERS: AtomicU64 = AtomicU64::new(0);
static ELSEWHERE: AtomicU64 = AtomicU64::new(0);
static DATA: AtomicU64 = AtomicU64::new(0);
static AMBIGUOUS: AtomicU64 = AtomicU64::new(0);
static HIGHEST: AtomicUsize = AtomicUsize::new(0);

/// Reads the process-wide counters. Only growths and shrinks update them, never a switch.
///
/// ```
/// let before = regrow::totals();
/// // SAFETY: nothing is kept outside the stack.
/// let builder = unsafe { regrow::Builder::new().relocating() };
/// let mut coroutine = builder.spawn(|_: &regrow::Yielder<(), ()>, ()| {
///     std::hint::black_box([0u8; 100_000]);
/// });
/// coroutine.resume(());
/// assert!(regrow::totals().moves > before.moves);
/// ```
#[must_use]
pub fn totals() -> Totals {
    Totals {
        moves: MOVES.load(Ordering::Relaxed),
        in_place: IN_PLACE.load(Ordering::Relaxed),
        shrinks: SHRINKS.load(Ordering::Relaxed),
        bytes_copied: BYTES_COPIED.load(Ordering::Relaxed),
        words_rewritten: WORDS_REWRITTEN.load(Ordering::Relaxed),
        words_by_map: WordsByMap {
            pointers: POINTERS.load(Ordering::Relaxed),
            elsewhere: ELSEWHERE.load(Ordering::Relaxed),
            data: DATA.load(Ordering::Relaxed),
            ambiguous: AMBIGUOUS.load(Ordering::Relaxed),
        },
        highest: HIGHEST.load(Ordering::Relaxed),
    }
}

pub(crate) fn count_words(words: &WordsByMap) {
    POINTERS.fetch_add(words.pointers, Ordering::Relaxed);
    ELSEWHERE.fetch_add(words.elsewhere, Ordering::Relaxed);
    DATA.fetch_add(words.data, Ordering::Relaxed);
    AMBIGUOUS.fetch_add(words.ambiguous, Ordering::Relaxed);
}

pub(crate) fn count_shrink() {
    SHRINKS.fetch_add(1, Ordering::Relaxed);
}

pub(crate) fn count(growth: Growth, last: &LastGrowth) {
    let kind = if growth == Growth::Relocate { &MOVES } else { &IN_PLACE };
    kind.fetch_add(1, Ordering::Relaxed);
    BYTES_COPIED.fetch_add(last.bytes as u64, Ordering::Relaxed);
    WORDS_REWRITTEN.fetch_add(last.words as u64, Ordering::Relaxed);
    HIGHEST.fetch_max(last.to, Ordering::Relaxed);
}
