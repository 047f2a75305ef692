//! A frozen coroutine goes on where it was, wherever that is then, and costs about what it uses.

use std::cell::Cell;
use std::hint::black_box;
use std::rc::Rc;

use proptest::prelude::*;
use regrow::{Builder, Coroutine, Yielder, frames::State, pin};

mod support;
use support::{Counted, frame, live, relocating};

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
    for depth in [0, 1, 5, 30, 300] {
        let mut coroutine = adder(&relocating(), depth);
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
    let builder = relocating();
    let mut all: Vec<_> = (0..100).map(|_| adder(&builder, 3)).collect();
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
    let mut coroutine = relocating().spawn(|yielder: &Yielder<(), ()>, ()| yielder.suspend(()));
    coroutine.resume(());
    assert_eq!(coroutine.bytes(), 4096);
    coroutine.freeze().unwrap();
    let most = if cfg!(debug_assertions) { 2000 } else { 320 };
    assert!(coroutine.bytes() <= most, "{} bytes", coroutine.bytes());
}

#[test]
fn dropping_one_runs_its_destructors() {
    let mut coroutine = adder(&relocating(), 10);
    coroutine.resume(1);
    coroutine.freeze().unwrap();
    assert_eq!(live(), 1);
    drop(coroutine);
    assert_eq!(live(), 0);
}

#[test]
fn name_counters_and_old_slots_are_kept() {
    let mut coroutine = relocating().name("sleeper").spawn(|yielder: &Yielder<(), ()>, ()| {
        frame::<30_000>(1);
        yielder.suspend(());
        frame::<30_000>(2);
    });
    coroutine.resume(());
    let before = coroutine.stats();
    assert!(before.growths > 0);
    assert!(coroutine.freeze().unwrap());
    assert_eq!(coroutine.name(), Some("sleeper"));
    assert_eq!(coroutine.stats().growths, before.growths);
    assert_eq!(coroutine.frames().state, State::Frozen);
    assert!(!coroutine.shrink().unwrap());
    coroutine.thaw().unwrap();
    assert_eq!(coroutine.name(), Some("sleeper"));
    assert!(coroutine.resume(()).returned().is_some());
}

#[test]
fn what_cannot_be_frozen_says_no_and_goes_on() {
    let mut in_place = Coroutine::<(), u32, ()>::new(|yielder, ()| yielder.suspend(1));
    let mut fresh = relocating().spawn(|_: &Yielder<(), ()>, ()| ());
    let mut pinned = relocating().spawn(|yielder: &Yielder<(), ()>, ()| {
        let _pin = pin();
        yielder.suspend(());
    });
    in_place.resume(());
    pinned.resume(());
    assert!(!in_place.freeze().unwrap() && !fresh.freeze().unwrap() && !pinned.freeze().unwrap());
    assert!(in_place.resume(()).returned().is_some());
    assert!(fresh.resume(()).returned().is_some());
    assert!(!fresh.freeze().unwrap(), "it has ended");
    assert!(pinned.resume(()).returned().is_some());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Any order of resumes, freezes, thaws, shrinks and drops of several coroutines: each sum is what it should be, and
    /// each destructor runs once.
    #[test]
    fn any_order_of_operations(steps in prop::collection::vec((0..6usize, 0..7u8, 1..1000u64), 1..120)) {
        let mut slots: [Option<(Coroutine<_, _, _>, u64)>; 6] = [const { None }; 6];
        let spawned = Rc::new(Cell::new(0));
        for (which, operation, number) in steps {
            let slot = &mut slots[which];
            match (operation, slot.as_mut()) {
                (0, _) | (_, None) => {
                    let depth = number as u32 % 60;
                    let mut coroutine = adder(&relocating(), depth);
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
