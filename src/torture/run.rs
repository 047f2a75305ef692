//! The state of the torture that runs: made and taken apart by `Torture::run`, used by the signal handlers.
//!
//! All of it is allocated before the first step; the handlers only fill in.

use core::arch::asm;
use core::cell::{Cell, UnsafeCell};
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::report::{self, Found, Hit, Report};
use super::{Mode, breakpoints, leaf, trap};
use crate::coroutine::current_stats;
use crate::stats::WordsByMap;
use crate::switch::{self, Running};

/// A stack does not return to a slot before this many moves.
pub(super) const KEPT: usize = 256;

/// What the handlers know of the torture on their thread.
pub(super) struct Run {
    mode: Mode,
    random: u64,
    limit: u64,
    /// The coroutine that resumes the tortured one, if one does.
    pub outside: Option<Running>,
    pub leaves: &'static [Range<usize>],
    /// A stack that is tortured was seen since stepping was switched on.
    pub inside: bool,
    /// SIGTRAP is blocked, and one is pending.
    pub paused: bool,
    pub steps: u64,
    pub moves: u64,
    pub bytes: u64,
    pub words: u64,
    pub skipped: u64,
    pub refused: u64,
    growths: u64,
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

    fn by_steps(&self) -> bool {
        !matches!(self.mode, Mode::Breakpoints | Mode::Overflows)
    }

    pub(super) fn by_smallest_steps(&self) -> bool {
        self.mode == Mode::Overflows
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
    /// Moves at instructions that found no place any more.
    lost: u64,
}

impl Hits {
    const SIZE: usize = 1 << 16;
    const PROBES: usize = 16;

    fn new() -> Self {
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

    fn into_list(self) -> Vec<Hit> {
        let mut list: Vec<_> = self.table.into_iter().filter(|hit| hit.pc != 0).collect();
        if self.lost != 0 {
            list.push(Hit { pc: 0, moves: self.lost });
        }
        list.sort_unstable_by_key(|hit| core::cmp::Reverse(hit.moves));
        list
    }
}

thread_local! {
    /// The torture of this thread. Constant, without a destructor: readable in a handler.
    static CURRENT: Cell<*mut Run> = const { Cell::new(ptr::null_mut()) };
}

thread_local! {
    /// How many things of the kind that moves would disturb are under way. As above.
    static UNDISTURBED: Cell<u32> = const { Cell::new(0) };
}

thread_local! {
    /// The words of all stacks that were moved on this thread since its torture began. As above.
    static WORDS: Cell<WordsByMap> = const { Cell::new(WordsByMap::NONE) };
}

/// Counts the words of one move.
pub(crate) fn count_words(words: &WordsByMap) {
    let before = WORDS.get();
    WORDS.set(WordsByMap {
        pointers: before.pointers.wrapping_add(words.pointers),
        elsewhere: before.elsewhere.wrapping_add(words.elsewhere),
        data: before.data.wrapping_add(words.data),
        ambiguous: before.ambiguous.wrapping_add(words.ambiguous),
    });
}

/// No moves on this thread until the value is dropped.
pub(crate) fn undisturbed() -> impl Drop {
    struct Over;
    impl Drop for Over {
        fn drop(&mut self) {
            UNDISTURBED.set(UNDISTURBED.get() - 1);
        }
    }
    UNDISTURBED.set(UNDISTURBED.get() + 1);
    Over
}

pub(super) fn may_disturb() -> bool {
    UNDISTURBED.get() == 0
}

/// This thread's torture, null if there is none.
pub(super) fn current() -> *mut Run {
    CURRENT.get()
}

/// The thread that is tortured, 0 if none is.
static THREAD: AtomicI32 = AtomicI32::new(0);

pub(super) fn tortured_thread() -> i32 {
    THREAD.load(Ordering::Acquire)
}

/// The first finding of the run, whichever thread makes it.
struct First {
    claimed: AtomicBool,
    /// Written by who claimed it, before this is set.
    complete: AtomicBool,
    found: UnsafeCell<Found>,
}

// SAFETY: `found` is written by the one who claimed it and read after that is complete.
unsafe impl Sync for First {}

static FIRST: First = First {
    claimed: AtomicBool::new(false),
    complete: AtomicBool::new(false),
    found: UnsafeCell::new(Found::NOTHING),
};

/// Records a finding if it is the first.
pub(super) fn record(fill: impl FnOnce(&mut Found)) {
    if !FIRST.claimed.swap(true, Ordering::AcqRel) {
        // SAFETY: just claimed, so nobody else writes, and nobody reads before it is complete.
        fill(unsafe { &mut *FIRST.found.get() });
        FIRST.complete.store(true, Ordering::Release);
    }
}

/// The finding, once there is one; the caller may add to it if it is the tortured thread.
pub(super) fn recorded() -> Option<*mut Found> {
    FIRST.complete.load(Ordering::Acquire).then(|| FIRST.found.get())
}

/// Exclusive use of the one torture a process can run.
pub(super) struct Turn {
    run: *mut Run,
    _lock: MutexGuard<'static, ()>,
}

/// Waits for its turn and prepares this thread.
pub(super) fn begin(mode: Mode, seed: u64, limit: u64) -> Turn {
    static LOCK: Mutex<()> = Mutex::new(());
    assert!(current().is_null(), "a tortured closure cannot run a torture of its own");
    let lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = trap::install() {
        panic!("cannot torture: {error}");
    }
    report::prepare();
    FIRST.complete.store(false, Ordering::Relaxed);
    FIRST.claimed.store(false, Ordering::Release);
    let run = Box::into_raw(Box::new(Run {
        mode,
        random: seed,
        limit,
        outside: None,
        leaves: leaf::ranges(),
        inside: false,
        paused: false,
        steps: 0,
        moves: 0,
        bytes: 0,
        words: 0,
        skipped: 0,
        refused: 0,
        growths: 0,
        hits: Hits::new(),
    }));
    CURRENT.set(run);
    WORDS.set(WordsByMap::NONE);
    // SAFETY: a plain system call.
    THREAD.store(unsafe { libc::gettid() }, Ordering::Release);
    let turn = Turn { run, _lock: lock };
    if mode == Mode::Breakpoints
        && let Err(why) = trap::insert_breakpoints()
    {
        turn.end();
        panic!("cannot torture: {why}");
    }
    turn
}

impl Turn {
    /// Ends the torture and tells what it was like.
    pub(super) fn end(self) -> Report {
        set_trap_flag(false);
        breakpoints::remove();
        breakpoints::seal();
        THREAD.store(0, Ordering::Release);
        CURRENT.set(ptr::null_mut());
        // SAFETY: made by `begin`; no handler on this thread uses it any more.
        let run = unsafe { Box::from_raw(self.run) };
        if run.paused {
            trap::take_pending();
        }
        // SAFETY: complete, and this run's.
        let found = recorded().map(|found| unsafe { &*found });
        Report {
            mode: run.mode,
            steps: run.steps,
            moves: run.moves,
            growths: run.growths,
            bytes_copied: run.bytes,
            words_rewritten: run.words,
            words_by_map: WORDS.get(),
            skipped: run.skipped,
            refused: run.refused,
            hits: run.hits.into_list(),
            findings: found.map(Found::resolve).into_iter().collect(),
        }
    }
}

/// Called by the tortured coroutine when it begins. What it returns counts the stack's growths when it is dropped.
pub(super) fn enter() -> impl Drop {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            count_growths();
        }
    }
    Leave
}

/// Switches stepping on, before each resume. The handler switches it off when the coroutine has been left.
pub(super) fn arm() {
    // SAFETY: this thread's run; nothing is stepped through now.
    let run = unsafe { &mut *current() };
    run.inside = false;
    run.outside = switch::running();
    if run.by_steps() && !run.paused {
        set_trap_flag(true);
    }
}

/// Takes the growths of the running coroutine over into the report.
pub(super) fn count_growths() {
    let growths = current_stats().map_or(0, |stats| stats.growths);
    // SAFETY: this thread's run; a handler in between writes other fields.
    unsafe { (*current()).growths = growths };
}

/// The processor traps after each instruction while the flag is set, from the one after the next on.
fn set_trap_flag(on: bool) {
    // SAFETY: changes a flag whose trap `trap::on_trap` handles.
    unsafe {
        match on {
            true => asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq"),
            false => asm!("pushfq", "and qword ptr [rsp], -0x101", "popfq"),
        }
    }
}
