//! The begin and end of a torture.

use core::arch::asm;
use core::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::mode::Mode;
use super::report::{self, Found, Report};
use super::run::{self, Hits, Run};
use super::{breakpoints, leaf, trap};
use crate::hooks::{self, Flags};
use crate::switch;

/// Exclusive use of the one torture a process can run.
pub(super) struct Turn {
    run: *mut Run,
    _lock: MutexGuard<'static, ()>,
}

/// Waits for its turn and prepares this thread.
pub(super) fn begin(mode: Mode, seed: u64, limit: u64) -> Turn {
    static LOCK: Mutex<()> = Mutex::new(());
    assert!(run::current().is_null(), "a tortured closure cannot run a torture of its own");
    let lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = trap::install() {
        panic!("cannot torture: {error}");
    }
    report::prepare();
    run::forget();
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
    hooks::take_words();
    hooks::set_flags(Flags { tortured: true, smallest_steps: mode == Mode::Overflows });
    run::set_current(run);
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
    pub(super) fn end(self) -> Report {
        set_trap_flag(false);
        breakpoints::remove();
        breakpoints::seal();
        run::set_current(ptr::null_mut());
        hooks::set_flags(Flags::default());
        // SAFETY: `begin` made the box, only this call frees it, and no handler finds it any more.
        let run = unsafe { Box::from_raw(self.run) };
        if run.paused {
            trap::take_pending();
        }
        // SAFETY: the finding is complete, and no handler adds to it once the torture has ended.
        let found = run::recorded().map(|found| unsafe { &*found });
        Report {
            mode: run.mode,
            steps: run.steps,
            moves: run.moves,
            growths: run.growths,
            bytes_copied: run.bytes,
            words_rewritten: run.words,
            words_by_map: hooks::take_words(),
            skipped: run.skipped,
            refused: run.refused,
            hits: run.hits.into_list(),
            findings: found.map(Found::resolve).into_iter().collect(),
        }
    }
}

/// Called by the tortured coroutine when it begins. The result counts the stack's growths when it is dropped.
pub(super) fn enter() -> impl Drop {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            run::count_growths();
        }
    }
    Leave
}

/// Switches stepping on, before each resume. The handler switches it off after the coroutine is left.
pub(super) fn arm() {
    // SAFETY: `begin` has made the torture of this thread. Nothing is stepped through now, so no handler uses it.
    let run = unsafe { &mut *run::current() };
    run.inside = false;
    run.outside = switch::running();
    if run.by_steps() && !run.paused {
        set_trap_flag(true);
    }
}

/// Sets or clears the trap flag. The processor traps after each instruction while the flag is set, from the one after the next
/// on.
fn set_trap_flag(on: bool) {
    // SAFETY: only the trap flag changes, `trap::on_trap` handles its traps, and the stack is unchanged afterwards.
    unsafe {
        match on {
            true => asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq"),
            false => asm!("pushfq", "and qword ptr [rsp], -0x101", "popfq"),
        }
    }
}
