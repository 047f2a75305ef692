//! `REGROW_TRACE=moves` writes a line for each growth, refusal, shrink, freeze and thaw, with right numbers, and nothing
//! without it.

use std::fmt::Display;
use std::hint::black_box;

use regrow::{Builder, Growth, LastGrowth, Reason, Yielder, current_stats, pin};

mod support;
use support::{Outcome, Test, frame, relocating, this_test, variant};

/// Runs the test again in a child with this value of the variable; an empty one is none.
fn with_variable(test: Test, value: &str) -> Outcome {
    let outcome = test.child_with("child", &[("REGROW_TRACE", value)]);
    assert!(outcome.has_passed(), "{outcome}");
    outcome
}

fn traced(test: Test) -> Outcome {
    with_variable(test, "moves")
}

/// The lines of the trace, without what they all begin with, and without where the stack is now.
fn told(outcome: &Outcome) -> Vec<&str> {
    let lines = outcome.stderr.lines().filter_map(|line| line.strip_prefix("regrow: "));
    lines.map(|line| line.split(", now 0x").next().unwrap_or_default()).collect()
}

/// In a child: says what its trace should contain.
fn expect(what: impl Display) {
    println!("\nexpected: {what}");
}

/// What the child has said.
fn expected(outcome: &Outcome) -> Vec<&str> {
    outcome.stdout.lines().filter_map(|line| line.strip_prefix("expected: ")).collect()
}

/// All that a child expects has been told, in this order.
fn assert_told(outcome: &Outcome) {
    let mut lines = told(outcome).into_iter();
    assert!(!expected(outcome).is_empty(), "{outcome}");
    for what in expected(outcome) {
        assert!(lines.any(|line| line == what), "not told in its place: {what}\n{outcome}");
    }
}

/// Builders for both ways of growing, of coroutines with a name.
fn both_ways() -> [Builder; 2] {
    [relocating().name("mover"), Builder::new().learn(false).name("stayer")]
}

fn called(builder_growth: Growth) -> &'static str {
    if builder_growth == Growth::Relocate { "coroutine \"mover\"" } else { "coroutine \"stayer\"" }
}

/// Grows a coroutine of this builder a few times; returns each growth that it has noticed.
fn grow(builder: &Builder) -> (Vec<LastGrowth>, u64) {
    let mut coroutine = builder.spawn(|_: &Yielder<(), ()>, ()| {
        let mut growths = Vec::with_capacity(3);
        for step in [frame::<5000>, frame::<20_000>, frame::<70_000>] {
            step(1);
            growths.extend(current_stats().unwrap().last);
        }
        (growths, current_stats().unwrap().growths)
    });
    coroutine.resume(()).returned().unwrap()
}

#[test]
fn a_growth_by_moving_is_told_with_its_numbers() {
    if variant().is_none() {
        let outcome = traced(this_test!());
        assert_told(&outcome);
        let moves = told(&outcome).iter().filter(|line| line.contains(" moved ")).count();
        assert!(outcome.stdout.contains(&format!("growths: {moves}\n")), "{moves} lines\n{outcome}");
        return;
    }
    let [mover, _] = both_ways();
    let (growths, count) = grow(&mover);
    for LastGrowth { from, to, bytes, words, nanoseconds, .. } in growths {
        assert!(bytes > 0);
        expect(format!(
            "coroutine \"mover\" moved {from} -> {to} bytes, {bytes} copied, {words} words, {nanoseconds} ns"
        ));
    }
    println!("growths: {count}");
}

#[test]
fn a_refusal_is_told_and_then_the_growth_in_slack() {
    if variant().is_none() {
        return assert_told(&traced(this_test!()));
    }
    let [mover, _] = both_ways();
    let mut coroutine = mover.spawn(|yielder: &Yielder<(), ()>, ()| {
        let pinned = pin();
        frame::<10_000>(1);
        drop(pinned);
        yielder.suspend(());
    });
    coroutine.resume(());
    let why = coroutine.last_not_moved().unwrap();
    assert_eq!(why.reason, Reason::Pinned);
    let LastGrowth { from, to, bytes: 0, words: 0, nanoseconds, .. } = coroutine.stats().last.unwrap() else {
        panic!("it has moved");
    };
    expect(format!("coroutine \"mover\" not moved: Pinned at {:#x}", why.frame));
    expect(format!("coroutine \"mover\" opened slack {from} -> {to} bytes, {nanoseconds} ns"));
}

#[test]
fn freezing_and_thawing_are_told_for_both_ways_of_growing() {
    if variant().is_none() {
        let outcome = traced(this_test!());
        return assert_eq!(told(&outcome), expected(&outcome), "{outcome}");
    }
    for builder in both_ways() {
        let mut coroutine = builder.spawn(|yielder: &Yielder<(), usize>, ()| {
            let local = black_box(5u64);
            yielder.suspend(&raw const local as usize);
        });
        let local = coroutine.resume(()).yielded().unwrap() as *const u64;
        let name = called(coroutine.growth());
        assert!(coroutine.freeze().unwrap());
        expect(format!("{name} frozen, {} bytes", coroutine.bytes()));
        coroutine.thaw().unwrap();
        coroutine.thaw().unwrap();
        expect(format!("{name} thawed"));
        if coroutine.growth() == Growth::InPlace {
            assert!(coroutine.freeze().unwrap());
            expect(format!("{name} frozen, {} bytes", coroutine.bytes()));
            // SAFETY: a local of a suspended coroutine, which stays where it is.
            assert_eq!(unsafe { local.read_volatile() }, 5);
            expect(format!("{name} thawed because it was touched"));
        }
        assert!(coroutine.resume(()).returned().is_some());
    }
}

#[test]
fn a_shrink_is_told_for_both_ways_of_growing() {
    if variant().is_none() {
        let outcome = traced(this_test!());
        let shrinks = told(&outcome).iter().filter(|line| line.contains(" shrunk ")).count();
        assert_eq!(shrinks, 2, "{outcome}");
        return assert_told(&outcome);
    }
    for builder in both_ways() {
        let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
            frame::<50_000>(1);
            yielder.suspend(());
        });
        coroutine.resume(());
        assert!(coroutine.shrink().unwrap());
        expect(format!("{} shrunk to {} bytes", called(coroutine.growth()), coroutine.stats().size));
    }
}

/// A coroutine without a name is called by the end of its slot, as in reports, and its line says where its stack went.
#[test]
fn moves_of_a_coroutine_without_a_name_can_be_followed() {
    if variant().is_some() {
        grow(&relocating());
        return;
    }
    let outcome = traced(this_test!());
    let mut now = None;
    for line in outcome.stderr.lines().filter_map(|line| line.strip_prefix("regrow: coroutine ")) {
        let (before, rest) = line.split_once(" moved ").unwrap_or_else(|| panic!("{outcome}"));
        assert_eq!(now.unwrap_or(before), before, "{outcome}");
        now = Some(rest.split_once(", now ").unwrap().1);
    }
    assert!(now.is_some(), "{outcome}");
}

#[test]
fn nothing_is_told_without_the_variable() {
    if variant().is_none() {
        for value in [None, Some("")] {
            let outcome = with_variable(this_test!(), value.unwrap_or_default());
            assert!(!outcome.stderr.contains("regrow"), "{outcome}");
        }
        return;
    }
    for builder in both_ways() {
        grow(&builder);
        let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| yielder.suspend(()));
        coroutine.resume(());
        assert!(coroutine.freeze().unwrap());
        coroutine.thaw().unwrap();
    }
}

#[test]
fn an_unknown_value_is_answered_by_one_sentence_that_names_the_known_one() {
    if variant().is_some() {
        grow(&relocating());
        return;
    }
    let outcome = with_variable(this_test!(), "everything");
    let sentence =
        "nothing is traced, since REGROW_TRACE is not \"moves\", its only value, but \"everything\"";
    assert_eq!(told(&outcome), [sentence], "{outcome}");
}

#[test]
fn lines_of_several_threads_do_not_mix() {
    const THREADS: usize = 4;
    const ROUNDS: usize = 50;
    if variant().is_some() {
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| (0..ROUNDS).for_each(|_| drop(grow(&relocating().name("x".repeat(50))))));
            }
        });
        return;
    }
    let outcome = traced(this_test!());
    let lines = told(&outcome);
    let (start, end) = (format!("coroutine \"{}\" moved ", "x".repeat(50)), " ns");
    assert!(lines.len() >= THREADS * ROUNDS * 3, "{outcome}");
    for line in lines {
        let whole = line.starts_with(&start) && line.ends_with(end) && line.matches("coroutine").count() == 1;
        assert!(whole, "{line}\n{outcome}");
    }
}

#[test]
fn a_name_that_is_longer_than_a_line_is_cut() {
    if variant().is_some() {
        grow(&relocating().name("ü".repeat(5000)));
        return;
    }
    let outcome = traced(this_test!());
    let start = format!("coroutine \"{}\" moved ", "ü".repeat(60));
    let lines = told(&outcome);
    assert!(!lines.is_empty() && lines.iter().all(|line| line.starts_with(&start)), "{outcome}");
}
