//! The kernel refuses memory: at each mapping call in turn there is an error, or it goes on without, and nothing is lost.
#![cfg(target_env = "gnu")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use regrow::{Builder, Coroutine, Error, Pool, Yielder};

#[path = "support/failing.rs"]
mod failing;
mod support;
use failing::failing;
use support::{Counted, Way, both_ways, builders, frame, live, this_test, variant};

/// Keeps values and pointers to them across a suspend, after it has grown; answers with their sum.
fn sleeper(builder: &Builder) -> Result<Coroutine<u64, u64, u64>, Error> {
    builder.try_spawn(|yielder: &Yielder<u64, u64>, mut sum| {
        let _counted = Counted::new(());
        frame::<12_000>(1);
        let total = &mut sum;
        loop {
            match yielder.suspend(*total) {
                0 => return *total,
                number => *total += number,
            }
        }
    })
}

/// True for the errors that say that the kernel refused memory or, where guards are page protection, one more mapping.
fn refused(error: &Error) -> bool {
    matches!(error, Error::Memory { .. } | Error::Mappings { .. })
}

/// Runs `step` with its first mapping call failing, then with the second, until it has no more; returns how many it had.
fn each_call(persists: bool, mut step: impl FnMut(&mut dyn FnMut(&mut dyn FnMut()))) -> i32 {
    for number in 0.. {
        let mut failed = false;
        step(&mut |f| failed = failing(number, persists, f).1);
        if !failed {
            return number;
        }
        assert!(number < 100, "there is no end to it");
    }
    0
}

#[test]
fn spawning_says_so_and_loses_nothing() {
    let builders = builders().into_iter().chain([10, 12, 14].map(|log| Builder::new().maximum(4096 << log)));
    for builder in builders {
        for persists in [false, true] {
            each_call(persists, |with_failure| {
                regrow::trim();
                let mut spawned = None;
                with_failure(&mut || spawned = Some(sleeper(&builder)));
                match spawned.unwrap() {
                    Ok(mut coroutine) => assert_eq!(coroutine.resume(3).yielded(), Some(3)),
                    Err(error) => assert!(refused(&error), "{error}"),
                }
                assert_eq!(live(), 0);
            });
        }
    }
}

/// The first coroutine of a process, and of a thread.
#[test]
fn the_first_spawn_of_a_process_says_so_and_works_the_next_time() {
    let Some(number) = variant() else {
        return this_test!().passes_each(0..12);
    };
    both_ways(|builder| {
        let number = number.parse().unwrap();
        let (spawned, failed) = failing(number, false, || sleeper(&builder));
        assert!(failed || spawned.is_ok());
        if let Err(error) = spawned {
            assert!(refused(&error), "{error}");
        }
        assert_eq!(sleeper(&builder).unwrap().resume(3).yielded(), Some(3));
    });
}

/// Every step in the life of a parked coroutine, with each of its mapping calls failing.
#[test]
fn parked_coroutines_stay_what_they_are() {
    type Step = fn(&mut Coroutine<u64, u64, u64>) -> Result<(), Error>;
    let steps: [(&str, Step); 3] = [
        ("freeze", |coroutine| coroutine.freeze().map(drop)),
        ("shrink", |coroutine| coroutine.shrink().map(drop)),
        ("thaw", |coroutine| coroutine.thaw()),
    ];
    let builders = builders();
    let ways = Way::BOTH.into_iter().zip(&builders);
    for ((way, builder), persists) in ways.flat_map(|way| [(way, false), (way, true)]) {
        for (name, step) in steps {
            let calls = each_call(persists, |with_failure| {
                let mut coroutine = sleeper(builder).unwrap();
                assert_eq!(coroutine.resume(3).yielded(), Some(3));
                if name == "thaw" {
                    assert!(coroutine.freeze().unwrap());
                }
                regrow::trim();
                let mut outcome = Ok(());
                with_failure(&mut || outcome = step(&mut coroutine));
                if let Err(error) = &outcome {
                    assert!(refused(error), "{name}: {error}");
                    assert!(name != "thaw" || coroutine.is_frozen());
                }
                assert_eq!(coroutine.resume(4).yielded(), Some(7), "after {name}: {outcome:?}");
                assert_eq!(coroutine.resume(0).returned(), Some(7));
                assert_eq!(live(), 0);
            });
            // One that moves may find a slot that is ready.
            assert!(calls > 0 || way == Way::Moving && name != "shrink", "{name}");
        }
    }
}

/// A resume that cannot thaw for want of memory panics, and the coroutine is in its pool as before.
#[test]
fn a_pool_keeps_whom_it_cannot_thaw() {
    for (way, builder) in Way::BOTH.into_iter().zip(&builders()) {
        let calls = each_call(false, |with_failure| {
            let mut coroutine = sleeper(builder).unwrap();
            assert_eq!(coroutine.resume(3).yielded(), Some(3));
            let mut pool = Pool::new(0);
            let key = pool.insert(coroutine);
            assert_eq!(pool.stats().frozen, 1);
            regrow::trim();
            let mut outcome = None;
            with_failure(&mut || outcome = catch_unwind(AssertUnwindSafe(|| pool.resume(key, 4))).ok());
            let sum = if outcome.is_some() { 7 } else { 3 };
            assert_eq!(pool.resume(key, 1).unwrap().yielded(), Some(sum + 1));
        });
        assert!(calls > 0 || way == Way::Moving);
    }
}

/// A growth that may not move for want of memory is made in place, if that works; else the process ends with a report.
#[test]
fn a_growth_without_memory_ends_in_a_report_at_worst() {
    let Some(variant) = variant() else {
        let mut reports = 0;
        for way in Way::BOTH {
            for number in 0..6 {
                let outcome = this_test!().child(format!("{way} {number}"));
                if !outcome.status.success() {
                    assert_eq!(way, Way::Moving, "a stack that grows in place needs no call: {outcome}");
                    assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{way} {number}: {outcome}");
                    assert!(outcome.stderr.contains("out of memory"), "{way} {number}: {outcome}");
                    reports += 1;
                }
            }
        }
        println!("{reports} reports");
        return;
    };
    let (way, number) = variant.rsplit_once(' ').unwrap();
    let mut coroutine = sleeper(&Way::named(way).builder()).unwrap();
    let (answer, _) = failing(number.parse().unwrap(), false, || coroutine.resume(3).yielded());
    assert_eq!(answer, Some(3));
    assert_eq!(coroutine.resume(0).returned(), Some(3));
}
