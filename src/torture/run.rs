//! The state of the running torture: made and taken apart by `Torture::run`, used by the signal handlers.
//!
//! All memory is allocated before the first step; the handlers only fill it in.

use core::cell::{Cell, UnsafeCell};
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use super::mode::Mode;
use super::report::{Found, Hit};
use crate::coroutine::current_stats;
use crate::switch::Running;
use crate::words::thread_number;

/// A stack does not return to a slot before this many moves.
pub(super) const KEPT: usize = 256;

/// The handlers' data about the torture on their thread.
pub(super) struct Run {
    pub mode: Mode,
    pub random: u64,
    pub limit: u64,
    /// The coroutine that resumes the tortured one, if one does.
    pub outside: Option<Running>,
    pub leaves: &'static [Range<usize>],
    /// A tortured stack was seen since stepping was switched on.
    pub inside: bool,
    /// SIGTRAP is blocked, and one is pending.
    pub paused: bool,
    pub steps: u64,
    pub moves: u64,
    pub bytes: u64,
    pub words: u64,
    pub skipped: u64,
    pub refused: u64,
    pub growths: u64,
    pub hits: Hits,
}

impl Run {
    /// Whether the mode asks for a move before the instruction that comes next.
    pub(super) fn wants(&mut self, growth_point: impl Fn() -> bool) -> bool {
        match self.mode {
            Mode::GrowthPoints => growth_point(),
            Mode::Breakpoints => true,
            Mode::Every(distance) => self.steps.is_multiple_of(distance.max(1)),
            Mode::Random(distance) => next(&mut self.random).is_multiple_of(distance.max(1)),
            Mode::Overflows => false,
        }
    }

    pub(super) fn has_stepped_enough(&self) -> bool {
        self.steps >= self.limit
    }

    pub(super) fn by_steps(&self) -> bool {
        !matches!(self.mode, Mode::Breakpoints | Mode::Overflows)
    }
}

/// SplitMix64: the next of a sequence of well-mixed numbers.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// How often each instruction was moved at: a hash table of fixed size.
pub(super) struct Hits {
    table: Box<[Hit]>,
    /// Moves at instructions that found no free place in the table.
    lost: u64,
}

impl Hits {
    const SIZE: usize = 1 << 16;
    const PROBES: usize = 16;

    pub(super) fn new() -> Self {
        Self { table: vec![Hit { pc: 0, moves: 0 }; Self::SIZE].into_boxed_slice(), lost: 0 }
    }

    pub(super) fn count(&mut self, pc: usize) {
        let first = pc.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        for probe in 0..Self::PROBES {
            let Some(hit) = self.table.get_mut((first + probe) % Self::SIZE) else { break };
            if hit.pc == pc || hit.pc == 0 {
                hit.pc = pc;
                hit.moves += 1;
                return;
            }
        }
        self.lost += 1;
    }

    pub(super) fn into_list(self) -> Vec<Hit> {
        let mut list: Vec<_> = self.table.into_iter().filter(|hit| hit.pc != 0).collect();
        if self.lost != 0 {
            list.push(Hit { pc: 0, moves: self.lost });
        }
        list.sort_unstable_by_key(|hit| core::cmp::Reverse(hit.moves));
        list
    }
}

thread_local! {
    /// The torture of this thread. Constant and without a destructor, so a handler can read it.
    static CURRENT: Cell<*mut Run> = const { Cell::new(ptr::null_mut()) };
}

/// This thread's torture; null if there is none.
pub(super) fn current() -> *mut Run {
    CURRENT.get()
}

/// The tortured thread; 0 if there is none.
static THREAD: AtomicI32 = AtomicI32::new(0);

pub(super) fn tortured_thread() -> i32 {
    THREAD.load(Ordering::Acquire)
}

/// The first finding of the run, made by any thread.
struct First {
    claimed: AtomicBool,
    /// Set when the claiming thread has written `found`.
    complete: AtomicBool,
    found: UnsafeCell<Found>,
}

// SAFETY: only the thread that claimed `found` writes it, and it is read only after `complete` is set.
unsafe impl Sync for First {}

static FIRST: First = First {
    claimed: AtomicBool::new(false),
    complete: AtomicBool::new(false),
    found: UnsafeCell::new(Found::NOTHING),
};

/// Forgets the finding of the previous run.
pub(super) fn forget() {
    FIRST.complete.store(false, Ordering::Relaxed);
    FIRST.claimed.store(false, Ordering::Release);
}

/// Sets this thread's torture; null for no torture.
pub(super) fn set_current(run: *mut Run) {
    let thread = if run.is_null() { 0 } else { thread_number() };
    CURRENT.set(run);
    THREAD.store(thread, Ordering::Release);
}

/// Records a finding if it is the first.
pub(super) fn record(fill: impl FnOnce(&mut Found)) {
    if !FIRST.claimed.swap(true, Ordering::AcqRel) {
        // SAFETY: this call has just claimed it, so no other thread writes it, and no thread reads it before it is complete.
        fill(unsafe { &mut *FIRST.found.get() });
        FIRST.complete.store(true, Ordering::Release);
    }
}

/// The finding, once complete; only the tortured thread may add to it.
pub(super) fn recorded() -> Option<*mut Found> {
    FIRST.complete.load(Ordering::Acquire).then(|| FIRST.found.get())
}

/// Copies the running coroutine's growths into the report.
pub(super) fn count_growths() {
    let growths = current_stats().map_or(0, |stats| stats.growths);
    // SAFETY: a torture of this thread is running, and no reference to it is alive here. An interrupting handler uses other
    // fields.
    unsafe { (*current()).growths = growths };
}
