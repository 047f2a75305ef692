//! The handlers of crates that programs use, which have no stack of their own, run wherever a coroutine's stack is.

use std::ffi::c_int;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use regrow::{Builder, Yielder};

mod support;
use support::{depths, down, frame, fresh, relocating, run, this_test, variant};

/// Raises a signal at every depth of a stack, each time on fresh memory, and calls `seen` from there afterwards.
fn raise_at_every_depth(signal: c_int, seen: impl Fn() + Clone + 'static) {
    assert!(regrow::signals_on_coroutine_stacks().contains(&signal));
    for levels in depths() {
        let seen = seen.clone();
        run(&fresh(), move || {
            down(levels, &|| {
                // SAFETY: sends this thread a signal that is handled.
                unsafe { libc::raise(signal) };
                seen();
            });
            frame::<60_000>(1);
        });
    }
}

#[test]
fn a_flag_of_signal_hook_is_set_at_every_depth() {
    if variant().is_none() {
        return this_test!().passes();
    }
    let flag = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(libc::SIGTERM, Arc::clone(&flag)).unwrap();
    raise_at_every_depth(libc::SIGTERM, move || assert!(flag.swap(false, Ordering::SeqCst)));
}

#[test]
fn a_low_level_handler_of_signal_hook_runs_at_every_depth() {
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    if variant().is_none() {
        return this_test!().passes();
    }
    let handler = || {
        // It may do what a handler may, with a frame of its own.
        let bytes = black_box([1u8; 4000]);
        SEEN.fetch_add(usize::from(bytes[77]), Ordering::SeqCst);
    };
    // SAFETY: the handler does what a handler may do.
    unsafe { signal_hook::low_level::register(libc::SIGUSR1, handler) }.unwrap();
    raise_at_every_depth(libc::SIGUSR1, || assert_eq!(SEEN.swap(0, Ordering::SeqCst), 1));
}

/// Its own signal handler runs where the signal comes, and wakes a thread, in which the program's runs.
#[test]
fn the_handler_of_ctrlc_is_woken_at_every_depth() {
    if variant().is_none() {
        return this_test!().passes();
    }
    let (sender, receiver) = channel();
    ctrlc::set_handler(move || sender.send(()).unwrap()).unwrap();
    let receiver: &'static _ = Box::leak(Box::new(receiver));
    raise_at_every_depth(libc::SIGINT, || receiver.recv_timeout(Duration::from_secs(60)).unwrap());
}

// --- a profiler --------------------------------------------------------------------------------------------------

/// How many samples were taken, and how many of them in coroutines.
static SAMPLES: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

/// How many walks did not get to the function that resumes the coroutines.
static CUT_OFF: AtomicUsize = AtomicUsize::new(0);

/// Takes a sample: walks the stack that it was called on, and those of who resumed.
extern "C" fn sample(_signal: c_int) {
    let (mut inside, mut complete) = (false, false);
    let walk = |frame: &backtrace::Frame| {
        let function = frame.symbol_address() as usize;
        inside |= function == recurse as *const () as usize;
        complete |= function == resume_them as *const () as usize;
        !complete
    };
    // SAFETY: only this thread walks.
    unsafe { backtrace::trace_unsynchronized(walk) };
    SAMPLES[0].fetch_add(1, Ordering::Relaxed);
    SAMPLES[1].fetch_add(usize::from(inside), Ordering::Relaxed);
    CUT_OFF.fetch_add(usize::from(inside && !complete), Ordering::Relaxed);
}

/// Goes down and up again, and suspends on the way.
#[inline(never)]
fn recurse(yielder: &Yielder<(), ()>, levels: u64) -> u64 {
    let words = black_box([levels; 20]);
    let sum = if levels == 0 { 0 } else { recurse(yielder, levels - 1) };
    if levels.is_multiple_of(8) {
        yielder.suspend(());
    }
    assert_eq!(black_box(words), [levels; 20]);
    sum + levels
}

/// Resumes some coroutines in turn until all have returned.
#[inline(never)]
fn resume_them(builder: &Builder) {
    let mut coroutines: Vec<_> = (0..20)
        .map(|number| builder.spawn(move |yielder: &Yielder<(), ()>, ()| recurse(yielder, number * 8)))
        .collect();
    let mut sum = 0;
    while !coroutines.is_empty() {
        coroutines.retain_mut(|coroutine| match coroutine.resume(()).returned() {
            Some(depths) => {
                sum += depths;
                false
            }
            None => true,
        });
    }
    assert_eq!(sum, (0..20).map(|number| (0..=number * 8).sum::<u64>()).sum());
}

#[test]
fn a_profiler_that_walks_stacks_harms_nothing_and_gets_to_who_resumes() {
    const ENOUGH: usize = 150;
    let Some(way) = variant() else {
        return this_test!().passes_each(["in place", "moving"]);
    };
    // The walker reads and keeps what it needs before the first signal.
    backtrace::trace(|_| true);
    let millisecond = libc::timeval { tv_sec: 0, tv_usec: 1000 };
    let every = libc::itimerval { it_interval: millisecond, it_value: millisecond };
    // SAFETY: the handler does what a handler may do; plain data for system calls.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = sample as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(libc::sigaction(libc::SIGPROF, &action, std::ptr::null_mut()), 0);
        assert_eq!(libc::setitimer(libc::ITIMER_PROF, &every, std::ptr::null_mut()), 0);
    }
    while SAMPLES[1].load(Ordering::Relaxed) < ENOUGH {
        let builder = if way == "moving" { relocating() } else { fresh() };
        black_box(resume_them)(&builder);
    }
    assert_eq!(CUT_OFF.load(Ordering::Relaxed), 0, "of {SAMPLES:?}");
}
