//! The shapes of growth: a coroutine that needs more and more stack, and the price of moving it.

use std::hint::black_box;
use std::time::Duration;

use corosensei::stack::DefaultStack;
use regrow::{Builder, LastGrowth, Maps, Yielder, current_stats, totals};

use super::kernel;
use super::measure::{Run, timed};

/// Bytes of stack that the recursion of the growth shapes takes: 60 KiB, so that a stack of 64 KiB holds it.
pub const DESCENT: usize = 60 << 10;

/// Takes `bytes` of stack below `top`, a frame of some 200 bytes at a time, all of them written.
#[inline(never)]
pub fn descend(top: usize, bytes: usize) -> usize {
    let frame = black_box([top; 20]);
    let here = (&raw const frame) as usize;
    // `top` is a number that moves with the stack, as any pointer to it.
    let deeper = if top - here < bytes { descend(top, bytes) } else { 0 };
    deeper + black_box(&frame)[7] % 2
}

fn descent(bytes: usize) -> usize {
    let here = 0u8;
    descend((&raw const here) as usize, bytes)
}

fn relocating() -> Builder {
    // SAFETY: what is run from it keeps no pointer to its stack outside it.
    unsafe { Builder::new().learn(false).relocating() }
}

fn regrow(builder: Builder) -> Run<'static> {
    Box::new(move |count| {
        timed(count, || {
            let mut coroutine = builder.spawn(|_: &Yielder<(), ()>, ()| descent(DESCENT));
            _ = black_box(coroutine.resume(()));
        })
    })
}

/// From 2 to 64 KiB by moving, five times.
pub fn moving() -> Run<'static> {
    regrow(relocating())
}

/// From 2 to 64 KiB in place.
pub fn in_place() -> Run<'static> {
    regrow(Builder::new().learn(false))
}

/// The same recursion on a stack that is there already: used before, or new each time.
pub fn corosensei(new: bool) -> Run<'static> {
    let make = || DefaultStack::new(128 << 10).expect("a stack");
    let mut stack = Some(make());
    Box::new(move |count| {
        timed(count, || {
            let own = if new { make() } else { stack.take().unwrap_or_else(make) };
            let mut coroutine =
                corosensei::Coroutine::<(), (), usize, _>::with_stack(own, |_, ()| descent(DESCENT));
            _ = black_box(coroutine.resume(()).as_return());
            stack = Some(coroutine.into_stack());
        })
    })
}

/// The shapes with cold memory: every coroutine has a stack that nobody used before, and keeps it, suspended after
/// its recursion, until the shape is done with. That it ends is not timed.
fn regrow_cold(builder: Builder) -> Run<'static> {
    let mut kept = Vec::new();
    Box::new(move |count| {
        kept.reserve(count as usize);
        timed(count, || kept.push(suspended_after_descent(&builder)))
    })
}

/// One spawn site for all that learn.
#[inline(never)]
fn suspended_after_descent(builder: &Builder) -> regrow::Coroutine<(), usize, ()> {
    let mut coroutine = builder.spawn(|yielder: &Yielder<(), usize>, ()| yielder.suspend(descent(DESCENT)));
    _ = black_box(coroutine.resume(()));
    coroutine
}

pub fn moving_cold() -> Run<'static> {
    regrow_cold(relocating())
}

pub fn slack_first_cold() -> Run<'static> {
    regrow_cold(relocating().slack_first(true))
}

pub fn in_place_cold() -> Run<'static> {
    regrow_cold(Builder::new().learn(false))
}

/// As moving where the spawn site has learned, from a first coroutine that has ended, what it takes: no stack overflows.
pub fn learned_cold() -> Run<'static> {
    let builder = relocating().learn(true);
    suspended_after_descent(&builder).resume(());
    let mut run = regrow_cold(builder);
    Box::new(move |count| {
        let growths = || totals().moves + totals().in_place;
        let before = growths();
        let time = run(count);
        assert_eq!(growths(), before, "a stack of a site that has learned has overflown");
        time
    })
}

/// The same recursion on a plain, lazily committed stack, new each time and kept.
pub fn corosensei_cold() -> Run<'static> {
    let mut kept = Vec::new();
    Box::new(move |count| {
        kept.reserve(count as usize);
        timed(count, || {
            let stack = DefaultStack::new(128 << 10).expect("a stack");
            let mut coroutine =
                corosensei::Coroutine::<(), usize, (), _>::with_stack(stack, |yielder, ()| {
                    yielder.suspend(descent(DESCENT));
                });
            _ = black_box(coroutine.resume(()).as_yield());
            kept.push(coroutine);
        })
    })
}

/// What the kernel asks for the same faults, system calls and first touches, with a handler that does nothing else.
pub fn kernel_moving() -> Run<'static> {
    let prices = kernel::Prices::new();
    Box::new(move |count| kernel::with_handler(&prices, || timed(count, || prices.grow_by_moving())))
}

/// The size of the stacks whose relocation is timed.
pub const MOVED: usize = 1 << 20;

/// Relocates a full stack of [`MOVED`] bytes; the time is that of the handler, as the stack's counters have it, for each KiB
/// copied. One operation is one relocation.
pub fn relocation(maps: Maps) -> Run<'static> {
    let builder = relocating().maps(maps).first_size(MOVED);
    Box::new(move |count| {
        let mut time = Duration::ZERO;
        for _ in 0..count {
            time += moved(&builder);
        }
        time
    })
}

/// How long a relocation took.
fn moved(builder: &Builder) -> Duration {
    let mut coroutine = builder.spawn(|_: &Yielder<(), ()>, ()| {
        descent(MOVED + (8 << 10));
        current_stats().expect("in a coroutine").last.expect("it has grown")
    });
    let last = coroutine.resume(()).returned().expect("it does not suspend");
    assert!(last.bytes > MOVED - 4096 && last.from == MOVED, "{last:?}");
    Duration::from_nanos(last.nanoseconds)
}

/// The same for stacks of `size` bytes that move to memory which nobody used before, and stay there.
pub fn relocation_cold(size: usize) -> Run<'static> {
    let builder = relocating().first_size(size);
    let mut kept = Vec::new();
    Box::new(move |count| {
        let mut time = Duration::ZERO;
        for _ in 0..count {
            let mut coroutine = builder.spawn(move |yielder: &Yielder<(), LastGrowth>, ()| {
                descent(size + 6000);
                yielder.suspend(current_stats().expect("in a coroutine").last.expect("it has grown"));
            });
            let last = coroutine.resume(()).yielded().expect("it suspends");
            assert!(last.bytes > size - 4096 && last.from == size, "{last:?}");
            time += Duration::from_nanos(last.nanoseconds);
            kept.push(coroutine);
        }
        time
    })
}

/// What it replaces: as many bytes copied to pages that nobody used before, and their own given back.
pub fn copy_cold(size: usize) -> Run<'static> {
    Box::new(move |count| {
        let mut time = Duration::ZERO;
        for _ in 0..count {
            time += kernel::copied(size);
        }
        time
    })
}

/// The price of a frame walked: as [`relocation`], the rest of which both contestants share.
pub const FRAMES: u64 = (MOVED / 192) as u64;
