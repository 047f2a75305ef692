//! Spawn sites learn what their coroutines need, each for itself, and forget it again.

use std::hint::black_box;

use regrow::{Builder, Coroutine, Growth, Stats, Yielder, current_stats, spawn_sites};

mod support;
use support::{frame, this_test};

fn builder(growth: Growth) -> Builder {
    let builder = Builder::new().maximum(1 << 20);
    // SAFETY: nothing is kept outside the stacks.
    if growth == Growth::Relocate { unsafe { builder.relocating() } } else { builder }
}

fn finish(mut coroutine: Coroutine<(), (), Stats>) -> Stats {
    coroutine.resume(()).returned().unwrap()
}

#[test]
fn a_site_that_always_needs_much_stops_growing() {
    let builder = builder(Growth::Relocate);
    let spawn = || {
        finish(builder.spawn(|_: &Yielder<(), ()>, ()| {
            frame::<14_000>(1);
            current_stats().unwrap()
        }))
    };
    assert!(spawn().growths > 0);
    for round in 0..1000 {
        assert_eq!(spawn().growths, 0, "round {round}");
    }
}

/// Calls itself until it has taken so many bytes of stack below `top`.
#[inline(never)]
fn descend(top: usize, bytes: usize) -> usize {
    let frame = black_box([top; 20]);
    let here = (&raw const frame) as usize;
    // `top` is a number that moves with the stack, as any pointer to it.
    let deeper = if top - here < bytes { descend(top, bytes) } else { 0 };
    deeper + black_box(&frame)[7] % 2
}

/// The first coroutine of a site recurses, overflowing at each size, and ends. No later one overflows, whether they
/// live one after the other or all at once, each on a stack of its own.
#[test]
fn after_the_first_no_coroutine_of_a_site_overflows() {
    // Well within the size that is learned, wherever in its page the first frame comes to lie.
    const DEPTH: usize = 44 << 10;
    #[inline(never)]
    fn moving(builder: &Builder) -> Coroutine<(), Stats, ()> {
        builder.spawn(|yielder: &Yielder<(), Stats>, ()| {
            let here = 0u8;
            descend((&raw const here) as usize, DEPTH);
            yielder.suspend(current_stats().unwrap());
        })
    }
    let builder = builder(Growth::Relocate);
    let mut first = moving(&builder);
    let stats = first.resume(()).yielded().unwrap();
    assert!(stats.growths >= 3 && stats.size == 64 << 10, "{stats:?}");
    first.resume(());
    let mut kept = Vec::new();
    for round in 0..500 {
        let mut later = moving(&builder);
        let stats = later.resume(()).yielded().unwrap();
        assert_eq!((stats.growths, stats.size), (0, 64 << 10), "round {round}");
        if round % 2 == 0 {
            kept.push(later);
        } else {
            later.resume(()); // a scout, at times
        }
    }
}

#[test]
fn two_sites_do_not_share_an_average() {
    let builder = builder(Growth::Relocate);
    let large = || {
        finish(builder.spawn(|_: &Yielder<(), ()>, ()| {
            frame::<50_000>(1);
            current_stats().unwrap()
        }))
    };
    let small = || finish(builder.spawn(|_: &Yielder<(), ()>, ()| black_box(current_stats().unwrap())));
    large();
    for _ in 0..200 {
        assert_eq!(large().growths, 0);
        assert!(small().size <= 4096, "2 KiB, and once more in a debug build");
    }
}

#[test]
fn a_bimodal_site_does_not_thrash() {
    {
        let growth = Growth::Relocate;
        let builder = builder(growth);
        let mut growths = 0;
        for round in 0..2000 {
            growths += finish(builder.spawn(move |_: &Yielder<(), ()>, ()| {
                if round % 3 == 0 {
                    frame::<30_000>(1);
                }
                current_stats().unwrap()
            }))
            .growths;
        }
        assert!(growths <= 8, "{growth:?}: {growths} growths in 2000 coroutines");
    }
}

#[test]
fn what_is_not_needed_any_more_is_forgotten() {
    {
        let growth = Growth::Relocate;
        let builder = builder(growth);
        let run = |deep: bool| {
            finish(builder.spawn(move |_: &Yielder<(), ()>, ()| {
                if deep {
                    frame::<100_000>(1);
                }
                current_stats().unwrap()
            }))
        };
        run(true);
        assert!(run(false).size >= 100_000);
        let sizes: Vec<_> = (0..2000).map(|_| run(false).size).collect();
        // A debug build needs more than 2 KiB to ask.
        assert!(*sizes.last().unwrap() <= 8192, "{growth:?}: {:?}", sizes.last());
    }
}

#[test]
fn it_can_be_turned_off() {
    let builder = builder(Growth::Relocate).learn(false);
    for _ in 0..10 {
        let stats = finish(builder.spawn(|_: &Yielder<(), ()>, ()| {
            frame::<14_000>(1);
            current_stats().unwrap()
        }));
        assert!(stats.growths > 0);
    }
}

#[test]
fn it_can_be_read() {
    #[inline(never)]
    fn made_here(builder: &Builder) -> Stats {
        finish(builder.spawn(|_: &Yielder<(), ()>, ()| {
            frame::<14_000>(1);
            current_stats().unwrap()
        }))
    }
    let builder = builder(Growth::Relocate);
    made_here(&builder);
    made_here(&builder);
    let sites = spawn_sites();
    let mine = sites.iter().find(|site| site.closure.contains("made_here"));
    let mine = mine.unwrap_or_else(|| panic!("{sites:?}"));
    assert!(mine.first_size >= 8192 && mine.spawned >= 1, "{mine:?}");
}

#[test]
fn never_more_than_the_maximum() {
    let large = builder(Growth::Relocate);
    let small = large.clone().maximum(8192);
    let run = |builder: &Builder, deep: bool| {
        finish(builder.spawn(move |_: &Yielder<(), ()>, ()| {
            if deep {
                frame::<100_000>(1);
            }
            current_stats().unwrap()
        }))
    };
    run(&large, true);
    assert_eq!(run(&small, false).size, 8192);
}

/// A stack that grows in place has nothing to learn but whether to give memory back: its scouts are watched, and when one of
/// them had a spike so are all that are made there later.
#[test]
fn a_site_whose_scouts_had_spikes_has_its_later_coroutines_watched() {
    if support::variant().is_none() {
        return this_test!().passes(); // where the first coroutine is this one
    }
    let spawn = || {
        Builder::new().spawn(|yielder: &Yielder<bool, ()>, mut deep| {
            loop {
                if deep {
                    frame::<60_000>(1);
                }
                deep = yielder.suspend(());
            }
        })
    };
    let spike = |coroutine: &mut Coroutine<bool, (), ()>| {
        coroutine.resume(true);
        let after_spike = coroutine.stats().size;
        (0..40).for_each(|_| _ = coroutine.resume(false));
        (after_spike, coroutine.stats().size)
    };
    let mut all: Vec<_> = (0..64).map(|_| spawn()).collect();
    let [mut scout, mut other] = [all.pop().unwrap(), all.pop().unwrap()];
    for (watched, coroutine) in [(false, &mut other), (true, &mut scout)] {
        let (after_spike, later) = spike(coroutine);
        assert!(after_spike > 60_000 && (later < 20_000) == watched, "{after_spike} {later} {watched}");
    }
    let (after_spike, later) = spike(&mut spawn());
    assert!(after_spike > 60_000 && later < 20_000, "{after_spike} {later}");
}
