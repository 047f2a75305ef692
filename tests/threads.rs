//! Threads: each with coroutines of its own, coroutines that outlive a thread's main function, coroutines that
//! move between threads.

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};

use regrow::{Coroutine, CoroutineResult, Yielder, current_stats, prepare_thread};

mod support;
use support::{OnDrop, both_ways, builders, frame, grown, growths, random, relocating, this_test};

const THREADS: usize = 8;

/// Uses a stack of some `depth` times 200 bytes; a number that depends on all of it.
#[inline(never)]
fn deep(depth: u64, caller: &mut u64) -> u64 {
    let mut words = black_box([depth; 8]);
    *caller ^= depth;
    let below = if depth == 0 { 1 } else { deep(depth - 1, &mut words[2]) };
    words.iter().fold(below, |sum, &word| sum.wrapping_mul(31).wrapping_add(word))
}

/// The same with a number of its own in its caller's frame.
fn deep_from_here(depth: u64) -> u64 {
    let mut top = 0;
    deep(depth, &mut top).wrapping_add(top)
}

#[test]
fn eight_threads_each_grow_coroutines_of_their_own() {
    let start = Arc::new(Barrier::new(THREADS));
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let start = start.clone();
            std::thread::spawn(move || {
                start.wait();
                let mut state = thread as u64;
                for round in 0..60 {
                    let builders = builders();
                    let mut coroutines: Vec<_> = (0..30)
                        .map(|n| {
                            let depth = random(&mut state) % 100 + 60;
                            let coroutine =
                                builders[n % 2].spawn(|yielder: &Yielder<u64, u64>, mut depth: u64| {
                                    loop {
                                        depth = yielder.suspend(deep_from_here(depth));
                                    }
                                });
                            (depth, coroutine)
                        })
                        .collect();
                    for times in 1..4 {
                        for (depth, coroutine) in &mut coroutines {
                            let depth = *depth * times;
                            assert_eq!(
                                coroutine.resume(depth).yielded(),
                                Some(deep_from_here(depth)),
                                "{round}"
                            );
                            assert!(grown(&coroutine.stats()) > 0);
                        }
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn slots_given_back_by_one_thread_serve_another() {
    for _ in 0..30 {
        let builders = builders();
        let depth = 150;
        let found = std::thread::spawn(move || {
            builders.map(|builder| support::run(&builder, move || (deep_from_here(depth), growths() > 0)))
        });
        assert_eq!(found.join().unwrap(), [(deep_from_here(depth), true); 2]);
    }
}

/// Lives in a thread-local; dropped when the thread's main function, and std's alternate signal stack, are gone.
type Kept = RefCell<Option<Coroutine<(), (), ()>>>;

thread_local!(static KEPT: Kept = const { RefCell::new(None) });

#[test]
fn a_coroutine_in_a_thread_local_is_unwound_when_the_thread_ends() {
    static DROPPED: AtomicUsize = AtomicUsize::new(0);
    both_ways(|builder| {
        for prepared_first in [true, false] {
            DROPPED.store(0, Ordering::SeqCst);
            let builder = builder.clone();
            let thread = std::thread::spawn(move || {
                if prepared_first {
                    prepare_thread().unwrap();
                }
                KEPT.set(None); // registers its destructor before or after anything of ours
                let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
                    let _counts = OnDrop(|| {
                        DROPPED.fetch_add(1, Ordering::SeqCst);
                    });
                    // Must grow while it is being unwound.
                    let _grows = OnDrop(|| {
                        let before = current_stats().unwrap().highest;
                        frame::<90_000>(1);
                        assert!(current_stats().unwrap().highest > before);
                        DROPPED.fetch_add(10, Ordering::SeqCst);
                    });
                    yielder.suspend(());
                });
                coroutine.resume(());
                KEPT.set(Some(coroutine));
            });
            thread.join().unwrap();
            assert_eq!(DROPPED.load(Ordering::SeqCst), 11);
        }
    });
}

#[test]
fn a_coroutine_can_be_made_and_run_in_a_destructor_at_the_threads_end() {
    struct RunsLate(mpsc::Sender<u64>);
    impl Drop for RunsLate {
        fn drop(&mut self) {
            both_ways(|builder| {
                let sum = support::run(&builder, || deep_from_here(100));
                self.0.send(sum).unwrap();
            });
        }
    }
    thread_local!(static LATE: Cell<Option<RunsLate>> = const { Cell::new(None) });

    for ran_before in [false, true] {
        let (sender, sums) = mpsc::channel();
        std::thread::spawn(move || {
            LATE.set(Some(RunsLate(sender)));
            if ran_before {
                support::run(&relocating(), || frame::<5000>(1));
            }
        })
        .join()
        .unwrap();
        assert_eq!(sums.iter().collect::<Vec<_>>(), [deep_from_here(100); 2]);
    }
}

/// Lets a coroutine go to another thread.
struct Moving<In, Out, Ret>(Coroutine<In, Out, Ret>);

// SAFETY: the coroutines in here keep nothing on their stacks that is bound to a thread, no address of a
// thread-local, and the threads they go to are prepared.
unsafe impl<In, Out, Ret> Send for Moving<In, Out, Ret> {}

#[test]
fn a_coroutine_can_grow_on_one_thread_after_another() {
    both_ways(|builder| {
        let coroutine = builder.spawn(|yielder: &Yielder<u64, u64>, mut depth: u64| {
            let mut sum = 0u64;
            while depth != 0 {
                sum = sum.wrapping_add(deep_from_here(depth));
                depth = yielder.suspend(sum);
            }
            growths()
        });
        let mut moving = Moving(coroutine);
        let mut expected = 0u64;
        for round in 1..=THREADS as u64 {
            let depth = 20 << round;
            expected = expected.wrapping_add(deep_from_here(depth));
            moving = std::thread::spawn(move || {
                let mut moving = moving; // all of it, not the field
                prepare_thread().unwrap();
                assert_eq!(moving.0.resume(depth), CoroutineResult::Yield(expected));
                moving
            })
            .join()
            .unwrap();
        }
        let growths = moving.0.resume(0).returned().unwrap();
        assert!(growths >= THREADS as u64 / 2, "{growths}");
    });
}

#[test]
fn a_coroutine_can_be_dropped_on_another_thread() {
    static DROPPED: AtomicUsize = AtomicUsize::new(0);
    both_ways(|builder| {
        DROPPED.store(0, Ordering::SeqCst);
        let mut moving = Moving(builder.spawn(|yielder: &Yielder<(), ()>, ()| {
            let _counts = OnDrop(|| {
                deep_from_here(300);
                DROPPED.fetch_add(1, Ordering::SeqCst);
            });
            yielder.suspend(());
        }));
        moving.0.resume(());
        // This thread is not prepared by hand: dropping sees to it.
        std::thread::spawn(move || drop(moving)).join().unwrap();
        assert_eq!(DROPPED.load(Ordering::SeqCst), 1);
    });
}

/// As servers have them that leave signals to one thread.
fn blocks_all_signals() {
    // SAFETY: plain data for two calls.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
    }
}

#[test]
fn a_thread_with_all_signals_blocked_grows_stacks_once_it_is_prepared() {
    let Some(how) = support::variant() else {
        return this_test!().passes_each(["prepared", "by the first coroutine"]);
    };
    let thread = std::thread::spawn(move || {
        blocks_all_signals();
        if how == "prepared" {
            prepare_thread().unwrap();
        }
        both_ways(|builder| {
            support::run(&builder, || {
                frame::<100_000>(1);
                assert!(growths() > 0);
            });
        });
        // SAFETY: plain data for calls that read.
        let blocked = unsafe {
            let mut mask = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &mut mask);
            [libc::SIGSEGV, libc::SIGBUS, libc::SIGUSR1, libc::SIGTERM]
                .map(|signal| libc::sigismember(&mask, signal) == 1)
        };
        assert_eq!(blocked, [false, false, true, true]);
    });
    thread.join().unwrap();
}

#[test]
fn preparing_a_thread_again_asks_the_kernel_nothing() {
    match support::variant() {
        None => this_test!().passes(),
        Some(_) => {
            prepare_thread().unwrap();
            support::refuse(&[libc::SYS_sigaltstack, libc::SYS_mmap], libc::EPERM);
            prepare_thread().unwrap();
        }
    }
}
