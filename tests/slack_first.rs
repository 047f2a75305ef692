//! Stacks that use their slot's slack before they move.

use std::hint::black_box;

use regrow::{Builder, Coroutine, Stats, Yielder, current_stats, pin, pinned_room};

mod support;
use support::relocating;

fn slack_first() -> Builder {
    relocating().slack_first(true)
}

/// What has become of a stack, and where a local of its root function is.
type Found = (Stats, usize);

/// A coroutine that uses some `kib` KiB of stack before each suspend.
fn diver(builder: &Builder) -> Coroutine<u64, Found, ()> {
    builder.spawn(|yielder: &Yielder<u64, Found>, mut kib| {
        let mut dives = [0u64; 4];
        let last = &mut dives[3];
        let mut expected = 0;
        loop {
            deep(kib);
            *last += 1;
            expected += 1;
            assert_eq!(black_box(&*last), black_box(&expected));
            kib = yielder.suspend((current_stats().unwrap(), &raw const *last as usize));
        }
    })
}

/// Takes `kib` KiB of stack, and not much more.
fn deep(kib: u64) {
    let here = 0u8;
    down((&raw const here) as usize, kib as usize * 1024);
}

/// `top` is a number that moves with the stack, as any pointer to it.
#[inline(never)]
fn down(top: usize, bytes: usize) {
    let local = black_box([bytes; 20]);
    if top - (&raw const local as usize) < bytes {
        down(top, bytes);
    }
    assert_eq!(black_box(local), [bytes; 20]);
}

fn dive(coroutine: &mut Coroutine<u64, Found, ()>, kib: u64) -> Stats {
    coroutine.resume(kib).yielded().unwrap().0
}

fn place(coroutine: &mut Coroutine<u64, Found, ()>) -> usize {
    coroutine.resume(0).yielded().unwrap().1
}

#[test]
fn it_moves_when_the_slack_is_used_up_and_not_before() {
    let mut coroutine = diver(&slack_first());
    for kib in [5, 10, 20, 28] {
        let stats = dive(&mut coroutine, kib);
        assert!(stats.growths > 0 && stats.bytes_copied == 0, "{kib} KiB: {stats:?}");
    }
    assert!(dive(&mut coroutine, 60).bytes_copied > 28_000);
    // There it has slack again.
    let before = coroutine.stats();
    let after = dive(&mut coroutine, 100);
    assert_eq!((after.bytes_copied, after.size), (before.bytes_copied, 128 << 10));
}

#[test]
fn without_it_moves_at_once() {
    let copied = |builder| dive(&mut diver(&builder), 5).bytes_copied;
    assert_ne!(copied(relocating()), 0);
    assert_eq!(copied(slack_first()), 0);
}

#[test]
fn many_in_the_same_arena_do_not_meet() {
    let mut all: Vec<_> = (0..200).map(|_| diver(&slack_first())).collect();
    for round in 1..40 {
        for (number, coroutine) in all.iter_mut().enumerate() {
            dive(coroutine, (number as u64 * 7 + round * 3) % 45);
        }
    }
}

#[test]
fn what_was_opened_is_given_back_where_the_stack_is() {
    let mut coroutine = diver(&slack_first());
    let before = place(&mut coroutine);
    for _ in 0..3 {
        assert_eq!(dive(&mut coroutine, 20).size, 32 << 10);
        assert!(coroutine.shrink().unwrap());
        assert!(coroutine.stats().size <= 8 << 10);
        assert_eq!(place(&mut coroutine), before);
    }
    // One that was moved goes to a smaller slot.
    dive(&mut coroutine, 60);
    let moved = place(&mut coroutine);
    assert!(coroutine.shrink().unwrap());
    assert!(coroutine.stats().size <= 8 << 10);
    assert_ne!(place(&mut coroutine), moved);
}

#[test]
fn frozen_and_thawed_it_does_so_still() {
    for kib in [0, 1, 20] {
        let mut coroutine = diver(&slack_first());
        dive(&mut coroutine, kib);
        assert!(coroutine.freeze().unwrap());
        let stats = dive(&mut coroutine, 25);
        assert_eq!(stats.bytes_copied, 0, "frozen after {kib} KiB");
    }
}

#[test]
fn a_pinned_stack_has_the_same_room() {
    let room = |builder: Builder| {
        support::run(&builder, || {
            let _pin = pin();
            deep(20);
            pinned_room().unwrap()
        })
    };
    assert!(room(slack_first()).abs_diff(room(relocating())) < 4096);
}

#[test]
fn the_maximum_holds() {
    let mut coroutine = diver(&slack_first().maximum(16 << 10));
    assert_eq!(dive(&mut coroutine, 5).size, 8 << 10);
    assert_eq!(dive(&mut coroutine, 12).size, 16 << 10);
}
