//! Coroutines as a value: what goes in and out, what is dropped when, what a panic does, what is refused.

use std::cell::{Cell, RefCell};
use std::fmt::Debug;
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use regrow::{
    Builder, Coroutine, CoroutineResult, DEFAULT_MAXIMUM_IN_PLACE, DEFAULT_MAXIMUM_RELOCATE, Error, Growth,
    MAX_SIZE, Yielder, current_stats,
};

mod support;
use support::{
    Counted, OnDrop, both_ways, builders, frame, grown, growths, live, relocating, run, this_test, variant,
};

fn panic_text(payload: Box<dyn std::any::Any + Send>) -> String {
    match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => payload.downcast_ref::<&str>().expect("a text").to_string(),
    }
}

/// The message of a panic of `f`.
fn panics<R>(f: impl FnOnce() -> R) -> String {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(_) => panic!("it was meant to panic"),
        Err(payload) => panic_text(payload),
    }
}

// --- values ------------------------------------------------------------------------------------------------------

/// Passes values of one type in, out and back, then drops coroutines at each stage of their life.
fn carries<T: Clone + Debug + PartialEq + 'static>(values: [T; 3]) {
    both_ways(|builder| {
        let [a, b, c] = values.clone().map(Counted::new);
        let expected = values.clone();
        let mut coroutine = builder.spawn(move |yielder: &Yielder<Counted<T>, Counted<T>>, first| {
            assert_eq!(first.0, expected[0]);
            let second = yielder.suspend(first);
            frame::<3000>(1);
            assert_eq!(second.0, expected[1]);
            let third = yielder.suspend(second);
            assert_eq!(third.0, expected[2]);
            third
        });
        assert_eq!(coroutine.resume(a).yielded().unwrap().0, values[0]);
        assert_eq!(coroutine.resume(b).yielded().unwrap().0, values[1]);
        assert_eq!(coroutine.resume(c).returned().unwrap().0, values[2]);
        assert!(coroutine.done());
        drop(coroutine);
        assert_eq!(live(), 0);

        for resumes in 0..3 {
            let captured = Counted::new(values[0].clone());
            let mut coroutine = builder.spawn(move |yielder: &Yielder<Counted<T>, Counted<T>>, mut value| {
                let _captured = captured;
                loop {
                    value = yielder.suspend(value);
                }
            });
            for value in values.iter().take(resumes).cloned() {
                drop::<CoroutineResult<_, ()>>(coroutine.resume(Counted::new(value)));
            }
            drop(coroutine);
            assert_eq!(live(), 0, "dropped after {resumes} resumes");
        }
    });
}

#[test]
fn values_of_every_size_are_carried_and_dropped_once() {
    macro_rules! sizes {
        ($($n:literal)*) => { $(carries([[1u8; $n], [2; $n], std::array::from_fn(|n| n as u8)]);)* };
    }
    sizes!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32);
    sizes!(33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64);
    sizes!(100 1000 5000);
}

#[test]
fn values_with_padding_niches_and_destructors_are_carried() {
    carries([(1u8, 2u16), (3, 4), (5, 6)]);
    carries([(1u8, 2u32), (3, 4), (5, 6)]);
    carries([(1u8, 2u64, 3u8), (3, 4, 5), (5, 6, 7)]);
    carries([Some(1u32), None, Some(3)]);
    carries([Some('a'), None, Some('ü')]);
    carries([1.5f32, -0.0, f32::MIN]);
    carries([true, false, true]);
    carries([(), (), ()]);
    carries([Some(Box::new(1)), None, Some(Box::new(3))]);
    carries(["one", "two", "three"].map(String::from));
    carries([vec![1; 100], vec![], vec![3]]);
    carries([Rc::new(1), Rc::new(2), Rc::new(3)]);
    carries([i128::MIN, -1, i128::MAX]);
}

#[test]
fn values_aligned_beyond_the_stack_are_carried() {
    macro_rules! aligned {
        ($($align:literal)*) => {$({
            #[repr(align($align))]
            #[derive(Clone, Debug, PartialEq)]
            struct Aligned(u8, [u8; 40]);

            impl Drop for Aligned {
                fn drop(&mut self) {
                    assert_eq!((&raw const *self).addr() % $align, 0);
                }
            }
            carries([Aligned(1, [1; 40]), Aligned(2, [2; 40]), Aligned(3, [3; 40])]);

            let captured = Aligned(7, [7; 40]);
            let mut coroutine = Coroutine::<(), (), u8>::new(move |_, ()| {
                assert_eq!((&raw const captured).addr() % $align, 0);
                captured.0 + captured.1[39]
            });
            assert_eq!(coroutine.resume(()).returned(), Some(14));
        })*};
    }
    aligned!(16 32 64 128 1024);
}

#[test]
fn closures_of_any_size_run_and_are_dropped_once() {
    fn with<const N: usize>() {
        both_ways(|builder| {
            for resume in [true, false] {
                let captured = Counted::new([N as u8; N]);
                let mut coroutine = builder.spawn(move |_: &Yielder<(), ()>, ()| {
                    let captured = &captured; // all of it, not a copy of its bytes
                    black_box(frame::<3000>(2));
                    captured.0.iter().map(|&byte| u64::from(byte)).sum::<u64>()
                });
                assert_eq!(live(), 1);
                if resume {
                    assert_eq!(coroutine.resume(()).returned(), Some(N as u64 * (N as u64 & 255)));
                    assert_eq!(live(), 0);
                }
                drop(coroutine);
                assert_eq!(live(), 0);
            }
        });
    }
    with::<0>();
    with::<1>();
    with::<15>();
    with::<16>();
    with::<100>();
    with::<1008>();
    with::<1023>();
    with::<1024>();
    with::<1025>();
    with::<1500>();
    with::<4096>();
    with::<9000>();
}

#[test]
fn the_shapes_of_resume_and_suspend() {
    let mut numbers = Coroutine::<(), u32, &str>::new(|yielder, ()| {
        for number in 0..3 {
            yielder.suspend(number);
        }
        "end"
    });
    assert!(!numbers.started() && !numbers.done());
    for number in 0..3 {
        assert_eq!(numbers.resume(()), CoroutineResult::Yield(number));
        assert!(numbers.started() && !numbers.done());
    }
    assert_eq!(numbers.resume(()), CoroutineResult::Return("end"));
    assert!(numbers.started() && numbers.done());

    // Suspended in the middle of functions, moved from place to place meanwhile.
    fn leaves(yielder: &Yielder<bool, String>, depth: u32, path: &str) -> u32 {
        if depth == 0 || !yielder.suspend(path.to_string()) {
            return 1;
        }
        leaves(yielder, depth - 1, &format!("{path}l")) + leaves(yielder, depth - 1, &format!("{path}r"))
    }
    let mut walker = vec![Coroutine::new(|yielder, _: bool| leaves(yielder, 3, ""))];
    let mut paths = Vec::new();
    let count = loop {
        let mut moved = walker.pop().unwrap();
        match moved.resume(paths.last().is_none_or(|path: &String| path != "r")) {
            CoroutineResult::Yield(path) => paths.push(path),
            CoroutineResult::Return(count) => break count,
        }
        walker = vec![moved];
    };
    assert_eq!((paths.join(","), count), (",l,ll,lr,r".to_string(), 5));
}

#[test]
fn a_coroutine_is_neither_send_nor_sync() {
    /// Ambiguous, so that this does not compile, for a type that is `Send` (or `Sync`).
    trait NotSend<A> {
        fn check() {}
    }
    impl<T: ?Sized> NotSend<()> for T {}
    impl<T: ?Sized + Send> NotSend<u8> for T {}
    trait NotSync<A> {
        fn check() {}
    }
    impl<T: ?Sized> NotSync<()> for T {}
    impl<T: ?Sized + Sync> NotSync<u8> for T {}

    <Coroutine<(), (), ()> as NotSend<_>>::check();
    <Coroutine<(), (), ()> as NotSync<_>>::check();
    <Yielder<(), ()> as NotSync<_>>::check();
    <&Yielder<(), ()> as NotSend<_>>::check();
}

// --- dropping ------------------------------------------------------------------------------------------------------

#[test]
fn dropping_unwinds_the_frames_innermost_first() {
    both_ways(|builder| {
        let order = Rc::new(RefCell::new(Vec::new()));
        let log = order.clone();
        let captured = order.clone();
        let in_closure = OnDrop(move || captured.borrow_mut().push("captured"));
        let mut coroutine = builder.spawn(move |yielder: &Yielder<(), ()>, ()| {
            let _captured = &in_closure;
            let _first = OnDrop(|| log.borrow_mut().push("first"));
            let _second = OnDrop(|| log.borrow_mut().push("second"));
            let inner = || {
                let _inner = OnDrop(|| log.borrow_mut().push("inner"));
                frame::<4000>(1);
                yielder.suspend(());
                log.borrow_mut().push("never");
            };
            inner();
        });
        coroutine.resume(());
        assert!(order.borrow().is_empty());
        drop(coroutine);
        assert_eq!(*order.borrow(), ["inner", "second", "first", "captured"]);
        assert_eq!(Rc::strong_count(&order), 1, "all clones are gone");
    });
}

#[test]
fn what_a_finished_coroutine_held_is_dropped_before_its_result_arrives() {
    let captured = Counted::new(1);
    let mut coroutine = Coroutine::<Counted<u8>, (), Counted<u8>>::new(move |_, input| {
        let captured = &captured; // all of it, not a copy of its byte
        let _local = Counted::new(captured.0);
        Counted::new(input.0 + 1)
    });
    let result = coroutine.resume(Counted::new(5)).returned().unwrap();
    assert_eq!((result.0, live()), (6, 1));
    drop((coroutine, result));
    assert_eq!(live(), 0);
}

#[test]
fn a_forgotten_coroutine_leaks_and_no_worse() {
    both_ways(|builder| {
        let leaked = Rc::new(());
        for _ in 0..10 {
            let held = leaked.clone();
            let mut coroutine = builder.spawn(move |yielder: &Yielder<(), ()>, ()| {
                let _held = held;
                frame::<6000>(1);
                yielder.suspend(());
            });
            coroutine.resume(());
            std::mem::forget(coroutine);
        }
        assert_eq!(Rc::strong_count(&leaked), 11);
        // Others go on as if nothing had happened.
        for _ in 0..100 {
            assert_eq!(run(&builder, || frame::<6000>(2)), 12_000);
        }
    });
}

#[test]
fn dropping_a_coroutine_says_nothing() {
    match variant() {
        None => {
            let outcome = this_test!().child("");
            assert!(outcome.has_passed(), "{outcome}");
            assert_eq!(outcome.stderr, "");
        }
        Some(_) => {
            let mut coroutine = Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
            coroutine.resume(());
            drop(coroutine);
        }
    }
}

#[test]
fn code_being_unwound_by_a_drop_sees_that_it_is() {
    let seen = Rc::new(Cell::new(false));
    let tells = seen.clone();
    let mut coroutine = Coroutine::<(), (), ()>::new(move |yielder, ()| {
        let _tells = OnDrop(|| tells.set(std::thread::panicking()));
        yielder.suspend(());
    });
    coroutine.resume(());
    assert!(!std::thread::panicking());
    drop(coroutine);
    assert!(seen.get() && !std::thread::panicking());
}

#[test]
fn a_forced_unwind_can_be_caught_and_suspended_again() {
    both_ways(|builder| {
        let caught = Rc::new(Cell::new(0));
        let count = caught.clone();
        let mut coroutine = builder.spawn(move |yielder: &Yielder<(), Counted<u32>>, ()| {
            for times in 0..5 {
                let _local = Counted::new(times);
                if catch_unwind(AssertUnwindSafe(|| yielder.suspend(Counted::new(times)))).is_err() {
                    count.set(count.get() + 1);
                    frame::<4000>(1);
                }
            }
        });
        assert_eq!(coroutine.resume(()).yielded().unwrap().0, 0);
        assert_eq!(coroutine.resume(()).yielded().unwrap().0, 1);
        drop(coroutine);
        assert_eq!((caught.get(), live()), (4, 0));
    });
}

#[test]
fn a_forced_unwind_that_is_passed_on_by_hand_ends_the_coroutine() {
    let mut coroutine = Coroutine::<(), (), ()>::new(|yielder, ()| {
        let _local = Counted::new(1);
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| yielder.suspend(()))) {
            resume_unwind(payload);
        }
    });
    coroutine.resume(());
    drop(coroutine);
    assert_eq!(live(), 0);
}

#[test]
fn catching_the_unwinding_over_and_over_ends_the_process_with_a_sentence() {
    match variant() {
        None => {
            let outcome = this_test!().child("");
            assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
            assert!(outcome.stderr.contains("catches its unwinding and suspends again"), "{outcome}");
        }
        Some(_) => {
            let mut coroutine = Coroutine::<(), (), ()>::new(|yielder, ()| {
                loop {
                    let _ = catch_unwind(AssertUnwindSafe(|| yielder.suspend(())));
                }
            });
            coroutine.resume(());
            drop(coroutine);
        }
    }
}

#[test]
fn a_panic_that_replaces_a_forced_unwind_comes_out_of_the_drop() {
    let mut coroutine = Coroutine::<(), (), ()>::new(|yielder, ()| {
        let _ = catch_unwind(AssertUnwindSafe(|| yielder.suspend(())));
        resume_unwind(Box::new("another".to_string()));
    });
    coroutine.resume(());
    assert_eq!(panics(|| drop(coroutine)), "another");
}

#[test]
fn a_fresh_coroutine_whose_captured_value_panics_when_dropped_gives_its_stack_back() {
    for _ in 0..3 {
        let panicker = OnDrop(|| resume_unwind(Box::new("in drop".to_string())));
        let coroutine = Coroutine::<(), (), ()>::new(move |_, ()| {
            black_box(&panicker);
        });
        assert_eq!(panics(|| drop(coroutine)), "in drop");
        assert_eq!(run(&Builder::new(), || 3), 3);
    }
}

// --- panics --------------------------------------------------------------------------------------------------------

#[test]
fn a_panic_crosses_to_the_resumer_with_its_payload() {
    #[derive(Debug, PartialEq)]
    struct Payload([u64; 5], String);
    both_ways(|builder| {
        let mut coroutine = builder.spawn(|yielder: &Yielder<u64, ()>, first: u64| {
            let _local = Counted::new(first);
            yielder.suspend(());
            frame::<4000>(1);
            std::panic::resume_unwind(Box::new(Payload([first; 5], "text".into())));
        });
        let _: CoroutineResult<(), ()> = coroutine.resume(4);
        let payload = catch_unwind(AssertUnwindSafe(|| coroutine.resume(1))).unwrap_err();
        assert_eq!(payload.downcast_ref::<Payload>(), Some(&Payload([4; 5], "text".into())));
        assert!(coroutine.done());
        assert_eq!(live(), 0);
        assert_eq!(
            panics(|| coroutine.resume(1)),
            "resumed a coroutine that has ended: check done() or the last CoroutineResult"
        );
    });
}

#[test]
fn resuming_a_finished_coroutine_panics_with_a_sentence() {
    let mut coroutine = Coroutine::<Counted<u8>, (), ()>::new(|_, _| ());
    coroutine.resume(Counted::new(1));
    for _ in 0..2 {
        let text = panics(|| coroutine.resume(Counted::new(2)));
        assert_eq!(text, "resumed a coroutine that has ended: check done() or the last CoroutineResult");
    }
    assert_eq!(live(), 0, "the input that was refused is dropped");
}

/// A resume after a growth, which is watched, or after a freeze goes another way than most; and the stack may have moved.
#[test]
fn large_values_are_carried_by_resumes_of_every_kind() {
    both_ways(|builder| {
        let mut sums = builder.spawn(|yielder: &Yielder<[u64; 9], [u64; 9]>, mut values: [u64; 9]| {
            while values[0] < 100 {
                values = yielder.suspend(values.map(|value| value + frame::<3000>(1)));
                frame::<7000>(1); // the first time it grows, between one value and the next
            }
            values
        });
        for number in 0..10 {
            let values: [u64; 9] = std::array::from_fn(|place| number + place as u64);
            assert_eq!(sums.resume(values), CoroutineResult::Yield(values.map(|value| value + 3000)));
            assert!(number % 3 != 2 || sums.freeze().unwrap());
        }
        assert!(grown(&sums.stats()) > 0);
        assert_eq!(sums.resume([100; 9]), CoroutineResult::Return([100; 9]));
    });
}

#[test]
fn suspending_inside_catch_unwind_keeps_what_it_catches() {
    both_ways(|builder| {
        let mut coroutine = builder.spawn(|yielder: &Yielder<bool, u32>, _: bool| {
            let mut caught = 0;
            for round in 0..10 {
                let result = catch_unwind(AssertUnwindSafe(|| {
                    if yielder.suspend(round) {
                        resume_unwind(Box::new(round));
                    }
                    round
                }));
                caught += result.unwrap_or_else(|payload| 100 * *payload.downcast::<u32>().unwrap());
            }
            caught
        });
        coroutine.resume(false);
        let mut expected = 0;
        for round in 0..9 {
            // In between, others panic on this thread: the counts of panics in flight do not mix.
            panics(|| run(&Builder::new(), || resume_unwind(Box::new("elsewhere".to_string()))));
            let panic = round % 3 == 0;
            expected += if panic { 100 * round } else { round };
            assert_eq!(coroutine.resume(panic).yielded(), Some(round + 1));
        }
        assert_eq!(coroutine.resume(false).returned(), Some(expected + 9));
    });
}

// --- nesting -------------------------------------------------------------------------------------------------------

#[test]
fn nested_coroutines_run_grow_and_suspend_each_on_their_own() {
    for (outer_builder, inner_builder) in builders().into_iter().zip(builders().into_iter().rev()) {
        let mut outer = outer_builder.spawn(move |yielder: &Yielder<u64, u64>, mut number: u64| {
            let mut inner = inner_builder.spawn(|yielder: &Yielder<u64, u64>, mut number: u64| {
                loop {
                    frame::<2500>(1);
                    let mut innermost =
                        Coroutine::<u64, u64, u64>::new(|yielder, n| yielder.suspend(n + 1) * 2);
                    let next = innermost.resume(number).yielded().unwrap();
                    number = yielder.suspend(innermost.resume(next).returned().unwrap());
                    frame::<9000>(1);
                }
            });
            while number < 100 {
                let CoroutineResult::<u64, ()>::Yield(reply) = inner.resume(number) else { unreachable!() };
                frame::<5000>(1);
                number = yielder.suspend(reply + 1);
                frame::<20_000>(1);
            }
            grown(&inner.stats())
        });
        for number in 0..50 {
            assert_eq!(outer.resume(number), CoroutineResult::Yield((number + 1) * 2 + 1));
        }
        assert!(grown(&outer.stats()) > 0);
        assert!(outer.resume(100).returned().unwrap() > 0);
    }
}

#[test]
fn a_panic_goes_through_two_levels() {
    both_ways(|builder| {
        let inner_builder = builder.clone();
        let mut outer = builder.spawn(move |_: &Yielder<(), ()>, ()| {
            let _outer = Counted::new(1);
            let mut inner = inner_builder.spawn(|_: &Yielder<(), ()>, ()| {
                let _inner = Counted::new(2);
                frame::<3000>(1);
                resume_unwind(Box::new("from the innermost".to_string()));
            });
            inner.resume(());
        });
        assert_eq!(panics(|| outer.resume(())), "from the innermost");
        assert!(outer.done());
        assert_eq!(live(), 0);
    });
}

#[test]
fn dropping_an_outer_coroutine_drops_the_inner_one() {
    both_ways(|builder| {
        let inner_builder = builder.clone();
        let mut outer = builder.spawn(move |yielder: &Yielder<(), ()>, ()| {
            let _outer = Counted::new(1);
            let mut inner = inner_builder.spawn(|yielder: &Yielder<(), ()>, ()| {
                let _inner = Counted::new(2);
                let _grows = OnDrop(|| drop(black_box(frame::<5000>(1).to_string())));
                yielder.suspend(());
            });
            inner.resume(());
            frame::<5000>(1);
            yielder.suspend(());
        });
        outer.resume(());
        assert_eq!(live(), 2);
        drop(outer);
        assert_eq!(live(), 0);
    });
}

#[test]
fn the_yielder_of_an_outer_coroutine_panics_with_a_sentence_in_an_inner_one() {
    thread_local!(static OUTER: Cell<usize> = const { Cell::new(0) });
    let mut outer = Coroutine::<u8, u8, String>::new(|yielder, _| {
        OUTER.set(&raw const *yielder as usize);
        let mut inner = Coroutine::<(), (), ()>::new(|_, ()| {
            // SAFETY: the outer coroutine waits, its stack does not move: the yielder is where it was.
            let yielder = unsafe { &*(OUTER.get() as *const Yielder<u8, u8>) };
            yielder.suspend(1);
        });
        let text = panics(|| inner.resume(()));
        assert!(inner.done());
        // It is all right again in its own.
        assert_eq!(yielder.suspend(2), 7);
        text
    });
    assert_eq!(outer.resume(0), CoroutineResult::Yield(2));
    assert_eq!(
        outer.resume(7).returned().unwrap(),
        "suspend() on the yielder of a coroutine that is not the one running: suspend the running one first"
    );

    // And outside of all of them.
    let mut coroutine = Coroutine::<(), usize, ()>::new(|yielder, ()| {
        yielder.suspend(&raw const *yielder as usize);
    });
    let yielder = coroutine.resume(()).yielded().unwrap();
    // SAFETY: the coroutine is suspended, its stack does not move.
    let text = panics(|| unsafe { (*(yielder as *const Yielder<(), usize>)).suspend(1) });
    assert!(text.starts_with("suspend() on the yielder of a coroutine that is not the one running"));
}

// --- making --------------------------------------------------------------------------------------------------------

#[test]
fn sizes_that_make_no_sense_are_errors_that_say_what_to_do() {
    let nothing = |_: &Yielder<(), ()>, ()| ();
    for bytes in [0, 1, 1024, 2047, 2049, 3000, 3 << 20, MAX_SIZE + 1, 2 * MAX_SIZE, usize::MAX] {
        for (name, builder) in
            [("first_size", Builder::new().first_size(bytes)), ("maximum", Builder::new().maximum(bytes))]
        {
            // SAFETY: nothing is spawned.
            for builder in [builder.clone(), unsafe { builder.relocating() }] {
                match builder.try_spawn(nothing).unwrap_err() {
                    Error::Size { what, bytes: said } => assert_eq!((what, said), (name, bytes)),
                    error => panic!("{error:?}"),
                }
                let text = panics(|| builder.spawn(nothing));
                assert!(
                    text.contains("cannot create a coroutine: ") && text.contains("power of two"),
                    "{text}"
                );
            }
        }
    }
    let error = Builder::new().first_size(8192).maximum(4096).try_spawn(nothing).unwrap_err();
    assert!(matches!(error, Error::FirstAboveMaximum { first: 8192, maximum: 4096 }), "{error:?}");
    assert!(error.to_string().contains("8192") && error.to_string().contains("4096"), "{error}");
}

#[test]
fn a_closure_that_was_refused_is_dropped_once() {
    let captured = Counted::new(5);
    let closure = move |_: &Yielder<(), ()>, ()| black_box(&captured).0;
    assert!(Builder::new().first_size(3).try_spawn(closure).is_err());
    assert_eq!(live(), 0);
}

#[test]
fn what_the_builder_was_told_is_what_the_coroutine_has() {
    assert_eq!((DEFAULT_MAXIMUM_IN_PLACE, DEFAULT_MAXIMUM_RELOCATE), (256 << 10, 256 << 20));
    let mut sizes = [Growth::InPlace, Growth::Relocate].into_iter();
    for builder in [Builder::new().learn(false), relocating()] {
        let growth = sizes.next().unwrap();
        for log in 11..=20 {
            let size = 1 << log;
            let name = format!("of {size} bytes");
            let mut coroutine = builder
                .clone()
                .name(name.as_str())
                .first_size(size)
                .spawn(|_: &Yielder<_, ()>, ()| current_stats().unwrap());
            assert_eq!((coroutine.name(), coroutine.growth()), (Some(name.as_str()), growth));
            // In place: what the one before has left in the slot is there, too.
            let is = if growth == Growth::InPlace { coroutine.stats().size.max(4096) } else { size };
            assert_eq!((coroutine.stats().size, coroutine.stats().highest), (is, is));
            assert!(format!("{coroutine:?}").contains(&name));
            let inside = coroutine.resume(()).returned().unwrap();
            // What reads the counters may itself need more than the smallest stack, in a debug build.
            if size > 4096 && growth == Growth::Relocate {
                assert_eq!((inside.size, inside.growths, inside.last), (size, 0, None));
            }
            // Afterwards nothing is known of it.
            assert_eq!((coroutine.name(), coroutine.stats().size, coroutine.stats().growths), (None, 0, 0));
        }
    }
}

#[test]
fn a_stack_of_the_first_size_holds_that_much() {
    both_ways(|builder| {
        // An array of all but a little of it, for the frames above it and its own.
        assert_eq!(
            run(&builder.clone().first_size(16 << 10), || (bytes_used(), current_stats().unwrap().growths)).1,
            0
        );
    });
    #[inline(never)]
    fn bytes_used() -> u64 {
        let mut bytes = std::mem::MaybeUninit::<[u8; 14 << 10]>::uninit();
        // SAFETY: all of it is written before it is read.
        unsafe {
            black_box(&mut bytes).as_mut_ptr().cast::<u8>().write_bytes(1, 14 << 10);
            u64::from(bytes.assume_init_ref()[77])
        }
    }
}

#[test]
fn a_reused_stack_starts_as_small_as_it_was_asked_for() {
    both_ways(|builder| {
        for round in 0..20 {
            let size = if round % 2 == 0 { 8 << 10 } else { 32 << 10 };
            let mut coroutine = builder.clone().first_size(size).spawn(|_: &Yielder<(), ()>, ()| {
                let before = current_stats().unwrap();
                frame::<70_000>(1);
                before
            });
            let in_place = coroutine.growth() == Growth::InPlace;
            assert!(coroutine.stats().size == size || in_place);
            let before = coroutine.resume(()).returned().unwrap();
            assert_eq!((before.growths, before.bytes_copied), (0, 0));
            assert!((before.size, before.highest) == (size, size) || in_place);
        }
    });
}

// --- what is not switched ------------------------------------------------------------------------------------------

/// The floating-point control state belongs to the thread: a change in a coroutine is seen by its resumer, and
/// the other way round.
#[test]
fn mxcsr_and_the_x87_control_word_belong_to_the_thread() {
    fn mxcsr() -> u32 {
        let mut value = 0u32;
        // SAFETY: stores four bytes.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack)) };
        value & !0x3f // without the sticky exception flags
    }
    fn set_mxcsr(value: u32) {
        // SAFETY: only the rounding mode differs from what was read.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack)) };
    }
    fn x87() -> u16 {
        let mut value = 0u16;
        // SAFETY: stores two bytes.
        unsafe { std::arch::asm!("fnstcw [{}]", in(reg) &raw mut value, options(nostack)) };
        value
    }
    fn set_x87(value: u16) {
        // SAFETY: only the rounding mode differs from what was read.
        unsafe { std::arch::asm!("fldcw [{}]", in(reg) &raw const value, options(nostack)) };
    }
    const DOWN: u32 = 1 << 13;
    const UP: u32 = 2 << 13;
    const X87_DOWN: u16 = 1 << 10;

    both_ways(|builder| {
        let (usual, x87_usual) = (mxcsr(), x87());
        let mut coroutine = builder.spawn(move |yielder: &Yielder<(), ()>, ()| {
            set_mxcsr(usual | DOWN);
            set_x87(x87_usual | X87_DOWN);
            frame::<5000>(1); // a growth keeps them
            assert!(growths() > 0);
            assert_eq!((mxcsr(), x87()), (usual | DOWN, x87_usual | X87_DOWN));
            yielder.suspend(());
            assert_eq!((mxcsr(), x87()), (usual | UP, x87_usual));
        });
        coroutine.resume(());
        let seen = (mxcsr(), x87());
        set_mxcsr(usual | UP);
        set_x87(x87_usual);
        coroutine.resume(());
        let at_the_end = mxcsr();
        set_mxcsr(usual);
        assert_eq!(seen, (usual | DOWN, x87_usual | X87_DOWN));
        assert_eq!(at_the_end, usual | UP);
    });
}
