//! Stacks that have become large for nothing become small again, and those that need their size keep it.

use std::hint::black_box;

use regrow::{Builder, Coroutine, Growth, Shrink, Yielder};

mod support;
use support::this_test;

/// Uses some `kib` KiB of stack, returns a sum over it.
#[inline(never)]
fn deep(kib: u64) -> u64 {
    let local = black_box([kib as u8; 1024]);
    let below = if kib > 1 { deep(kib - 1) } else { 0 };
    below + u64::from(local[512])
}

fn expected(kib: u64) -> u64 {
    (1..=kib).map(|level| u64::from(level as u8)).sum()
}

fn builder(growth: Growth, shrink: Shrink) -> Builder {
    let builder = Builder::new().maximum(1 << 20).shrink(shrink).learn(false);
    // SAFETY: the coroutines of these tests keep nothing outside their stacks.
    if growth == Growth::Relocate { unsafe { builder.relocating() } } else { builder }
}

/// A coroutine that goes as deep as it is told before each suspend, and has a local that it points to.
fn diver(growth: Growth, shrink: Shrink) -> Coroutine<u64, u64, ()> {
    builder(growth, shrink).spawn(|yielder: &Yielder<u64, u64>, mut kib| {
        let mut dives = [0u64; 4];
        let last = &mut dives[3];
        loop {
            let sum = if kib == 0 { 0 } else { deep(kib) };
            *last += 1;
            kib = yielder.suspend(sum + (*last << 32));
        }
    })
}

fn dive(coroutine: &mut Coroutine<u64, u64, ()>, kib: u64, count: &mut u64) {
    *count += 1;
    let answer = coroutine.resume(kib).yielded().unwrap();
    assert_eq!(answer & 0xffff_ffff, expected(kib));
    assert_eq!(answer >> 32, *count, "a local of the root function");
}

const BOTH: [Growth; 2] = [Growth::InPlace, Growth::Relocate];

#[test]
fn a_spike_is_given_back_after_some_quiet_resumes() {
    // By the default policy only scouts are looked at of those that grow in place: tests/learn.rs.
    for (growth, policy) in [(Growth::InPlace, Shrink::Eager), (Growth::Relocate, Shrink::Default)] {
        let mut coroutine = diver(growth, policy);
        let mut count = 0;
        dive(&mut coroutine, 50, &mut count);
        let spike = coroutine.stats().size;
        assert!(spike >= 50 << 10);
        for _ in 0..40 {
            dive(&mut coroutine, 0, &mut count);
        }
        assert!(
            coroutine.stats().size <= 8192,
            "{growth:?}: {} (a debug build uses more)",
            coroutine.stats().size
        );
        assert_eq!(coroutine.stats().shrinks, 1);
        assert_eq!(coroutine.stats().highest, spike);
    }
}

#[test]
fn a_loop_that_grows_and_returns_grows_once() {
    for growth in BOTH {
        for shrink in [Shrink::Default, Shrink::Eager, Shrink::Off] {
            let mut coroutine = diver(growth, shrink);
            let mut count = 0;
            dive(&mut coroutine, 50, &mut count);
            let growths = coroutine.stats().growths;
            for _ in 0..200 {
                dive(&mut coroutine, 50, &mut count);
            }
            assert_eq!(coroutine.stats().growths, growths, "{growth:?} {shrink:?}");
        }
    }
}

#[test]
fn a_spike_now_and_then_is_met_with_more_and_more_patience() {
    for growth in [Growth::Relocate] {
        let mut coroutine = diver(growth, Shrink::Default);
        let mut count = 0;
        for _ in 0..100 {
            dive(&mut coroutine, 50, &mut count);
            for _ in 0..40 {
                dive(&mut coroutine, 0, &mut count);
            }
        }
        // Patience 32 (in vain), 64: longer than the quiet spells.
        assert_eq!(coroutine.stats().shrinks, 1, "{growth:?}");
    }
}

#[test]
fn off_means_off() {
    for growth in BOTH {
        let mut coroutine = diver(growth, Shrink::Off);
        let mut count = 0;
        dive(&mut coroutine, 50, &mut count);
        for _ in 0..1000 {
            dive(&mut coroutine, 0, &mut count);
        }
        assert_eq!(coroutine.stats().shrinks, 0);
        assert!(coroutine.stats().size >= 50 << 10);
        assert!(coroutine.shrink().unwrap());
        assert!(coroutine.stats().size <= 8192);
        dive(&mut coroutine, 3, &mut count);
    }
}

#[test]
fn what_is_in_use_stays() {
    for growth in BOTH {
        let mut coroutine = builder(growth, Shrink::Eager).spawn(|yielder: &Yielder<(), usize>, ()| {
            let local = black_box([7u8; 10_000]);
            let pointer = &local[9_999];
            loop {
                yielder.suspend(usize::from(*pointer) + black_box(&local).len());
            }
        });
        for _ in 0..10 {
            assert_eq!(coroutine.resume(()).yielded(), Some(10_007));
        }
        // Debug builds have the array twice in the frame.
        assert!(coroutine.stats().size <= 64 << 10, "{:?}", coroutine.stats());
        assert!(coroutine.stats().size >= 8192, "which holds 10 KiB and more");
        coroutine.shrink().unwrap();
        assert_eq!(coroutine.resume(()).yielded(), Some(10_007));
    }
}

#[test]
fn growing_and_shrinking_for_long_takes_no_more_slots() {
    let mut coroutine =
        builder(Growth::Relocate, Shrink::Off).spawn(|yielder: &Yielder<u64, usize>, mut kib| {
            let local = 0u8;
            loop {
                deep(kib);
                kib = yielder.suspend(&raw const local as usize);
            }
        });
    let mut places = std::collections::HashSet::new();
    for _ in 0..2000 {
        places.insert(coroutine.resume(200).yielded());
        assert!(coroutine.shrink().unwrap());
        places.insert(coroutine.resume(1).yielded());
    }
    assert!(places.len() <= 4, "the stack has been in {} places", places.len());
}

/// Bytes of memory this process takes.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn memory_goes_back() {
    for growth in BOTH {
        let mut all: Vec<_> = (0..500).map(|_| (diver(growth, Shrink::Off), 0)).collect();
        let mut before = 0;
        for (coroutine, count) in &mut all {
            dive(coroutine, 0, count);
        }
        before += resident();
        for (coroutine, count) in &mut all {
            dive(coroutine, 200, count);
        }
        assert!(resident() > before + 500 * (200 << 10), "{growth:?}");
        for (coroutine, _) in &mut all {
            coroutine.shrink().unwrap();
        }
        assert!(resident() < before + (4 << 20), "{growth:?}: {} before, {} after", before, resident());
    }
}

/// Many coroutines each need 64 KiB for a moment and stay: afterwards the process takes within a tenth of what it took
/// before. By the default policy this takes as many quiet resumes as it has patience, by the eager one two; by hand none. The
/// default policy looks at none of those that grow in place, and were all made before the first spike.
#[test]
fn a_spike_of_many_leaves_nothing_behind() {
    const COUNT: usize = 2000;
    let ways = BOTH.into_iter().flat_map(|growth| {
        [(Shrink::Default, 34), (Shrink::Eager, 2), (Shrink::Off, 0)]
            .map(|(policy, quiet)| (growth, policy, quiet))
    });
    let ways = ways.filter(|&(growth, policy, _)| growth == Growth::Relocate || policy != Shrink::Default);
    // Each alone in a process of its own, whose memory is not that of other tests.
    let Some(variant) = support::variant() else {
        return this_test!().passes_each(0..ways.count());
    };
    let (growth, policy, quiet) = ways.clone().nth(variant.parse().unwrap()).unwrap();
    let mut all: Vec<_> = (0..COUNT).map(|_| (diver(growth, policy), 0)).collect();
    for (coroutine, count) in &mut all {
        dive(coroutine, 0, count);
    }
    let before = resident();
    for (coroutine, count) in &mut all {
        dive(coroutine, 64, count);
    }
    assert!(resident() > before + COUNT * (56 << 10));
    for _ in 0..quiet {
        for (coroutine, count) in &mut all {
            dive(coroutine, 0, count);
        }
    }
    if policy == Shrink::Off {
        for (coroutine, _) in &mut all {
            assert!(coroutine.shrink().unwrap());
        }
    }
    let after = resident();
    assert!(after < before + before / 10, "{growth:?}, {policy:?}: {before} before, {after} after");
    for (coroutine, count) in &mut all {
        dive(coroutine, 1, count);
    }
}

#[test]
fn a_pinned_stack_does_not_move_down_either() {
    let mut coroutine = builder(Growth::Relocate, Shrink::Eager).spawn(|yielder: &Yielder<(), ()>, ()| {
        deep(20);
        let number = 7u64;
        let pin = regrow::pin();
        let kept = Box::new(&number as *const u64);
        for _ in 0..10 {
            yielder.suspend(());
            // SAFETY: the stack was pinned all the time.
            assert_eq!(unsafe { **kept }, 7);
        }
        drop(pin);
        yielder.suspend(());
    });
    for _ in 0..11 {
        assert!(coroutine.stats().shrinks == 0);
        coroutine.resume(());
    }
    assert!(coroutine.shrink().unwrap(), "{:?}", coroutine.last_not_moved().map(|why| why.function()));
}

#[test]
fn dropping_a_coroutine_that_is_watched_unwinds_it() {
    struct Count<'a>(&'a std::cell::Cell<u32>);
    impl Drop for Count<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    for growth in BOTH {
        let drops = Box::leak(Box::new(std::cell::Cell::new(0)));
        let drops: &'static std::cell::Cell<u32> = drops;
        let mut coroutine = builder(growth, Shrink::Default).spawn(move |yielder: &Yielder<(), ()>, ()| {
            let _count = Count(drops);
            deep(50);
            yielder.suspend(());
        });
        coroutine.resume(());
        drop(coroutine);
        assert_eq!(drops.get(), 1);
    }
}
