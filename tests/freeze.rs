//! A frozen coroutine goes on where it was, wherever that is then, and costs about what it uses.

use std::cell::Cell;
use std::hint::black_box;
use std::ptr;
use std::rc::Rc;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use proptest::prelude::*;
use regrow::{Builder, Coroutine, Yielder, frames::State, pin};

#[path = "support/corpus.rs"]
mod corpus;
mod support;
use support::{
    Counted, Test, below, both_ways, builders, frame, grown, live, outcome, random, this_test, variant,
};

/// A coroutine that keeps pointers between its frames, `depth` of them, and adds up what it is given.
fn adder(builder: &Builder, depth: u32) -> Coroutine<u64, u64, u64> {
    #[inline(never)]
    fn level(yielder: &Yielder<u64, u64>, depth: u32, sum: &mut u64, callers: &mut u64) {
        let mut own = black_box(u64::from(depth));
        *callers += 1;
        if depth > 0 {
            level(yielder, depth - 1, sum, &mut own);
        } else {
            loop {
                match yielder.suspend(*sum) {
                    0 => break,
                    number => *sum += number,
                }
                own = black_box(own + 1) - 1;
            }
        }
        assert_eq!(own, u64::from(depth) + u64::from(depth > 0));
    }
    builder.spawn(move |yielder: &Yielder<u64, u64>, first| {
        let _counted = Counted::new(());
        let mut sum = first;
        let mut calls = 0;
        level(yielder, depth, &mut sum, &mut calls);
        assert_eq!(calls, 1);
        sum
    })
}

#[test]
fn a_frozen_coroutine_goes_on() {
    for (builder, depth) in builders().iter().flat_map(|b| [0, 1, 5, 30, 300].map(|depth| (b, depth))) {
        let mut coroutine = adder(builder, depth);
        let mut sum = 7;
        assert_eq!(coroutine.resume(7).yielded(), Some(7));
        for number in 1..20 {
            assert!(coroutine.freeze().unwrap(), "{:?}", coroutine.last_not_moved());
            assert!(coroutine.is_frozen() && coroutine.freeze().unwrap() && coroutine.started());
            sum += number;
            assert_eq!(coroutine.resume(number).yielded(), Some(sum), "depth {depth}");
        }
        assert!(coroutine.freeze().unwrap());
        assert_eq!(coroutine.resume(0).returned(), Some(sum));
        assert_eq!(live(), 0);
    }
}

#[test]
fn its_slot_is_used_by_others_meanwhile() {
    let builders = builders();
    let mut all: Vec<_> = (0..100).map(|number| adder(&builders[number % builders.len()], 3)).collect();
    for (number, coroutine) in all.iter_mut().enumerate() {
        coroutine.resume(number as u64);
        assert!(coroutine.freeze().unwrap());
    }
    for round in 1..4 {
        for (number, coroutine) in all.iter_mut().enumerate().rev() {
            let expected = number as u64 + round;
            assert_eq!(coroutine.resume(1).yielded(), Some(expected));
            assert!(coroutine.freeze().unwrap());
        }
    }
    drop(all);
    assert_eq!(live(), 0);
}

#[test]
fn a_frozen_coroutine_takes_little() {
    both_ways(|builder| {
        let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| yielder.suspend(()));
        coroutine.resume(());
        assert_eq!(coroutine.bytes(), 4096);
        assert!(coroutine.freeze().unwrap());
        let most = if cfg!(debug_assertions) { 2000 } else { 320 };
        assert!(coroutine.bytes() <= most, "{} bytes", coroutine.bytes());
    });
}

#[test]
fn dropping_one_runs_its_destructors() {
    both_ways(|builder| {
        let mut coroutine = adder(&builder, 10);
        coroutine.resume(1);
        assert!(coroutine.freeze().unwrap());
        assert_eq!(live(), 1);
        drop(coroutine);
        assert_eq!(live(), 0);
    });
}

#[test]
fn name_counters_and_old_slots_are_kept() {
    both_ways(|builder| {
        let growth = builder.spawn(|_: &Yielder<(), ()>, ()| ()).growth();
        let mut coroutine = builder.name("sleeper").spawn(|yielder: &Yielder<(), ()>, ()| {
            frame::<30_000>(1);
            yielder.suspend(());
            frame::<30_000>(2);
        });
        coroutine.resume(());
        let before = coroutine.stats();
        assert!(grown(&before) > 0);
        assert!(coroutine.freeze().unwrap());
        assert_eq!(coroutine.name(), Some("sleeper"));
        assert_eq!(coroutine.stats().growths, before.growths);
        assert_eq!(coroutine.growth(), growth);
        assert_eq!(coroutine.frames().state, State::Frozen);
        assert!(!coroutine.shrink().unwrap());
        assert!(coroutine.is_frozen());
        coroutine.thaw().unwrap();
        assert!(!coroutine.is_frozen());
        assert_eq!(coroutine.name(), Some("sleeper"));
        assert_eq!(coroutine.growth(), growth);
        assert!(coroutine.resume(()).returned().is_some());
    });
}

#[test]
fn what_cannot_be_frozen_says_no_and_goes_on() {
    both_ways(|builder| {
        let mut fresh = builder.spawn(|_: &Yielder<(), ()>, ()| ());
        let mut pinned = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
            let _pin = pin();
            yielder.suspend(());
        });
        pinned.resume(());
        assert!(!fresh.freeze().unwrap() && !pinned.freeze().unwrap());
        assert!(fresh.resume(()).returned().is_some());
        assert!(!fresh.freeze().unwrap(), "it has ended");
        assert!(pinned.resume(()).returned().is_some());
    });
}

const ALONE: &str = "REGROW_TEST_ALONE";

/// True in a process that has one thread: before the test harness has started.
fn is_alone() -> bool {
    std::env::var_os(ALONE).is_some()
}

/// Runs tests where nobody has made a thread yet. The harness makes one in any case, so before `main`.
extern "C" fn before_main() {
    if is_alone() {
        let tests: [fn(); _] = [
            a_child_process_has_its_own_frozen_stacks,
            a_frozen_coroutine_goes_on,
            a_handle_on_a_frozen_stack_is_found,
            a_signal_handler_may_touch_what_it_interrupts_the_freezing_of,
            a_system_call_on_a_frozen_stack_says_efault,
            any_order_of_operations,
            dropping_one_runs_its_destructors,
            its_slot_is_used_by_others_meanwhile,
            name_counters_and_old_slots_are_kept,
            one_coroutine_touches_another,
            what_cannot_be_frozen_says_no_and_goes_on,
            alone_it_needs_no_proc_self_mem,
        ];
        variant(); // the time limit
        tests.iter().for_each(|test| test());
        assert_eq!(std::fs::read_dir("/proc/self/task").unwrap().count(), 1);
        println!("alone to the end");
        std::process::exit(0);
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

/// Stacks that grow in place are frozen in other ways in a process with one thread, and where guards are page protection.
#[test]
fn it_works_alone_and_without_guard_markers() {
    for guard in ["", "protect"] {
        let outcome = outcome(this_test!().command("").env(ALONE, "1").env("REGROW_GUARD", guard));
        assert!(outcome.status.success(), "{guard:?}: {outcome}");
        assert!(outcome.stdout.ends_with("alone to the end\n"), "{outcome}");
    }
    let among_threads = [
        Test::of(no_access_falls_between_the_steps),
        Test::of(any_order_of_operations),
        Test::of(who_touches_a_frozen_stack_thaws_it),
    ];
    for test in among_threads {
        test.passes_each_with([""], &[("REGROW_GUARD", "protect")]);
    }
}

/// Lets the process open files, or none.
fn allow_files(any: bool) {
    let limit = libc::rlimit { rlim_cur: if any { 100 } else { 0 }, rlim_max: 100 };
    // SAFETY: a system call on a local value.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
}

fn alone_it_needs_no_proc_self_mem() {
    let mut staying = adder(&Builder::new(), 3);
    staying.resume(1);
    allow_files(false);
    assert!(staying.freeze().unwrap());
    assert_eq!(staying.resume(2).yielded(), Some(3));
    allow_files(true);
}

/// Without `/proc/self/mem` it says so, and loses nothing.
#[test]
fn without_proc_self_mem_it_says_so_and_goes_on() {
    if variant().is_none() {
        return this_test!().passes();
    }
    let [mut moving, mut staying] = builders().map(|builder| adder(&builder, 3));
    assert_eq!((moving.resume(1).yielded(), staying.resume(1).yielded()), (Some(1), Some(1)));
    allow_files(false);
    let error = staying.freeze().unwrap_err();
    assert!(matches!(error, regrow::Error::OwnMemory { .. }) && error.to_string().contains("/proc/self/mem"));
    assert!(!staying.is_frozen() && moving.freeze().unwrap());
    assert_eq!((moving.resume(2).yielded(), staying.resume(2).yielded()), (Some(3), Some(3)));
    allow_files(true);
    assert!(staying.freeze().unwrap());
    allow_files(false);
    assert_eq!(staying.resume(2).yielded(), Some(5));
}

/// A coroutine that grows in place, suspended with the address of a counter on its stack, of which it takes
/// the value when it goes on.
fn with_counter() -> (Coroutine<(), usize, u64>, &'static AtomicU64) {
    let mut coroutine = Builder::new().spawn(|yielder: &Yielder<(), usize>, ()| {
        let counter = AtomicU64::new(0);
        loop {
            yielder.suspend(&raw const counter as usize);
            if counter.load(Ordering::Relaxed) >= ENOUGH {
                return counter.load(Ordering::Relaxed);
            }
        }
    });
    let counter = coroutine.resume(()).yielded().unwrap() as *const AtomicU64;
    // SAFETY: the tests use it as long as the coroutine is suspended, where it stays in place.
    (coroutine, unsafe { &*counter })
}

const ENOUGH: u64 = 1 << 40;

#[test]
fn who_touches_a_frozen_stack_thaws_it() {
    let (mut coroutine, counter) = with_counter();
    assert!(coroutine.freeze().unwrap() && coroutine.is_frozen());
    counter.fetch_add(3, Ordering::Relaxed);
    assert!(!coroutine.is_frozen());

    assert!(coroutine.freeze().unwrap());
    // A thread that regrow does not know.
    assert_eq!(std::thread::spawn(|| counter.load(Ordering::Relaxed)).join().unwrap(), 3);
    assert!(!coroutine.is_frozen());

    counter.fetch_add(ENOUGH, Ordering::Relaxed);
    assert!(coroutine.freeze().unwrap());
    assert_eq!(coroutine.resume(()).returned(), Some(ENOUGH + 3));
}

#[test]
fn one_coroutine_touches_another() {
    let (mut coroutine, counter) = with_counter();
    assert!(coroutine.freeze().unwrap());
    let mut other = Builder::new().spawn(|_: &Yielder<(), ()>, ()| counter.fetch_add(4, Ordering::Relaxed));
    assert_eq!(other.resume(()).returned(), Some(0));
    assert!(!coroutine.is_frozen());
    assert!(coroutine.freeze().unwrap());
    counter.fetch_add(ENOUGH, Ordering::Relaxed);
    assert_eq!(coroutine.resume(()).returned(), Some(ENOUGH + 4));
}

/// A signal handler counts on a stack that its thread freezes, thaws, looks at and resumes all the time: no count is lost, and
/// nobody waits for the thread that it interrupted.
#[test]
fn a_signal_handler_may_touch_what_it_interrupts_the_freezing_of() {
    const EACH: u64 = 2000;
    static COUNTER: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());
    static SIGNALS: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: libc::c_int) {
        // SAFETY: the test below sees that the counter lives.
        let before = unsafe { &*COUNTER.load(Ordering::Relaxed) }.fetch_add(1, Ordering::Relaxed);
        let signals = SIGNALS.fetch_add(1, Ordering::Relaxed);
        assert_eq!(before, signals);
    }
    if variant().is_none() && !is_alone() {
        return this_test!().passes();
    }
    let (mut coroutine, counter) = with_counter();
    COUNTER.store(ptr::from_ref(counter).cast_mut(), Ordering::Relaxed);
    // SAFETY: system calls on local values; the handler may interrupt anything of this thread, to which the timer's signals go.
    let timer = unsafe {
        libc::alarm(30);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(libc::SIGUSR1, &action, ptr::null_mut());
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGUSR1;
        event.sigev_notify_thread_id = libc::gettid();
        let mut timer = ptr::null_mut();
        assert_eq!(libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer), 0);
        let interval = libc::timespec { tv_sec: 0, tv_nsec: 23_000 };
        let always = libc::itimerspec { it_interval: interval, it_value: interval };
        libc::timer_settime(timer, 0, &always, ptr::null_mut());
        timer
    };
    let (mut frozen, mut touched) = (0, 0);
    while SIGNALS.load(Ordering::Relaxed) < EACH {
        assert!(coroutine.freeze().unwrap());
        frozen += 1;
        touched += u32::from(coroutine.bytes() == 4096) + u32::from(!coroutine.is_frozen());
        match frozen % 3 {
            0 => coroutine.thaw().unwrap(),
            1 => assert!(coroutine.resume(()).yielded().is_some()),
            _ => {}
        }
    }
    // SAFETY: the timer made above.
    unsafe { libc::timer_delete(timer) };
    assert!(touched > 0, "of {frozen} freezes");
    let signals = SIGNALS.load(Ordering::Relaxed);
    assert_eq!(counter.fetch_add(ENOUGH, Ordering::Relaxed), signals);
    assert_eq!(coroutine.resume(()).returned(), Some(ENOUGH + signals));
}

/// Many threads count on a stack that is frozen, thawed and resumed all the time: no count is lost, however many others are
/// frozen.
#[test]
fn no_access_falls_between_the_steps() {
    count_in_many_threads();
    let mut others: Vec<_> = (0..1100).map(|_| adder(&Builder::new(), 0)).collect();
    for other in &mut others {
        other.resume(1);
        assert!(other.freeze().unwrap());
    }
    count_in_many_threads();
    for mut other in others {
        assert_eq!(other.resume(2).yielded(), Some(3));
        assert!(other.freeze().unwrap());
    }
}

fn count_in_many_threads() {
    const THREADS: u64 = 4;
    const EACH: u64 = 5000;
    let (mut coroutine, counter) = with_counter();
    let threads: Vec<_> = (0..THREADS)
        .map(|mut seed| {
            std::thread::spawn(move || {
                let mut last = 0;
                for _ in 0..EACH {
                    let now = counter.fetch_add(1, Ordering::Relaxed) + 1;
                    assert!(now > last, "the counter went back from {last} to {now}");
                    last = now;
                    // Many come while it is frozen, some while it is being frozen or thawed.
                    for _ in 0..random(&mut seed) % 2000 {
                        std::hint::spin_loop();
                    }
                }
            })
        })
        .collect();
    let mut frozen = 0;
    while threads.iter().any(|thread| !thread.is_finished()) {
        frozen += u32::from(coroutine.freeze().unwrap());
        match frozen % 3 {
            0 => assert!(coroutine.resume(()).yielded().is_some()),
            1 => coroutine.thaw().unwrap(),
            _ => {}
        }
    }
    assert!(threads.into_iter().all(|thread| thread.join().is_ok()));
    assert!(frozen > 0);
    assert!(coroutine.freeze().unwrap());
    assert_eq!(counter.fetch_add(ENOUGH, Ordering::Relaxed), THREADS * EACH);
    assert_eq!(coroutine.resume(()).returned(), Some(ENOUGH + THREADS * EACH));
}

/// A coroutine that runs, and grows, while the handle it was resumed through is on a stack that has been frozen meanwhile, or
/// is just being frozen.
#[test]
fn a_handle_on_a_frozen_stack_is_found() {
    let mut holder = Builder::new().spawn(|yielder: &Yielder<usize, usize>, _| {
        let mut inner = Builder::new().learn(false).spawn(|_: &Yielder<(), ()>, ()| {
            let holder = HOLDER.get() as *mut Coroutine<usize, usize, ()>;
            // SAFETY: its owner waits for this coroutine.
            let mut freeze = || assert!(unsafe { (*holder).freeze() }.unwrap());
            for depth in 0..200 {
                below(depth, &mut freeze);
            }
            frame::<50_000>(1);
        });
        yielder.suspend(&raw mut inner as usize);
    });
    // SAFETY: a system call; the process ends if somebody waits for himself.
    unsafe { libc::alarm(60) };
    let inner = holder.resume(0).yielded().unwrap() as *mut Coroutine<(), (), ()>;
    thread_local!(static HOLDER: Cell<usize> = const { Cell::new(0) });
    HOLDER.set(&raw mut holder as usize);
    // SAFETY: a local of a suspended coroutine, which stays where it is.
    assert!(unsafe { (*inner).resume(()) }.returned().is_some());
    assert!(holder.resume(0).returned().is_some());
    // SAFETY: as above.
    unsafe { libc::alarm(0) };
}

/// The kernel does not thaw: it says `EFAULT`, and the stack is as it was.
#[test]
fn a_system_call_on_a_frozen_stack_says_efault() {
    let (mut coroutine, counter) = with_counter();
    assert!(coroutine.freeze().unwrap());
    // SAFETY: the kernel checks the address.
    let answer = unsafe { libc::getrandom(counter.as_ptr().cast(), 8, 0) };
    assert_eq!((answer, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
    assert!(coroutine.is_frozen());
    assert_eq!(counter.load(Ordering::Relaxed), 0);
}

/// After a `fork` the child's stacks are thawed in the child.
#[test]
fn a_child_process_has_its_own_frozen_stacks() {
    let (mut coroutine, counter) = with_counter();
    assert!(coroutine.freeze().unwrap());
    // SAFETY: the child only counts, and ends.
    unsafe {
        match libc::fork() {
            0 => {
                let before = counter.fetch_add(5, Ordering::Relaxed);
                libc::_exit(i32::from(before != 0 || counter.load(Ordering::Relaxed) != 5));
            }
            child => {
                let mut status = 1;
                assert_eq!(libc::waitpid(child, &mut status, 0), child);
                assert_eq!(status, 0);
            }
        }
    }
    assert!(coroutine.is_frozen());
    assert_eq!(counter.load(Ordering::Relaxed), 0);
}

proptest! {
    #![proptest_config(corpus::cases(200))]

    /// Any order of resumes, freezes, thaws, shrinks and drops of several coroutines: each sum is what it should be, and
    /// each destructor runs once.
    #[test]
    fn any_order_of_operations(steps in prop::collection::vec((0..6usize, 0..7u8, 1..1000u64), 1..120)) {
        let mut slots: [Option<(Coroutine<_, _, _>, u64)>; 6] = [const { None }; 6];
        let [moving, staying] = builders();
        let builders = [moving.clone(), staying, moving.slack_first(true)];
        let spawned = Rc::new(Cell::new(0));
        for (which, operation, number) in steps {
            let slot = &mut slots[which];
            match (operation, slot.as_mut()) {
                (0, _) | (_, None) => {
                    let depth = number as u32 % 60;
                    let mut coroutine = adder(&builders[number as usize % builders.len()], depth);
                    prop_assert_eq!(coroutine.resume(number).yielded(), Some(number));
                    spawned.set(spawned.get() + 1);
                    *slot = Some((coroutine, number));
                }
                (1, _) => *slot = None,
                (2, Some((coroutine, _))) => prop_assert!(coroutine.freeze().unwrap()),
                (3, Some((coroutine, _))) => coroutine.thaw().unwrap(),
                (4, Some((coroutine, _))) => drop(coroutine.shrink().unwrap()),
                (_, Some((coroutine, sum))) => {
                    *sum += number;
                    prop_assert_eq!(coroutine.resume(number).yielded(), Some(*sum));
                }
            }
            prop_assert_eq!(live(), slots.iter().flatten().count() as isize);
        }
        drop(slots);
        prop_assert_eq!(live(), 0);
    }
}
