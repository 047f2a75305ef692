//! Regressions: criterion keeps the figures of the run before and says what has changed.
//! `cargo bench --package regrow-benches --bench switch`
//!
//! How the figures compare with those of others is for benches/side_by_side.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use regrow::{Builder, Coroutine, Yielder};

type Echo = Coroutine<u64, u64, ()>;

#[inline(never)]
fn callee(yielder: &Yielder<u64, u64>, value: u64) -> u64 {
    black_box(yielder.suspend(value))
}

fn echo() -> Echo {
    Coroutine::new(|yielder, mut value| {
        loop {
            value = yielder.suspend(value);
        }
    })
}

fn switches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("switch");
    let mut coroutine = echo();
    group.bench_function("loop at the root", |bencher| bencher.iter(|| coroutine.resume(black_box(1))));
    let mut coroutine = Echo::new(|yielder, mut value| {
        loop {
            value = callee(yielder, value);
        }
    });
    group.bench_function("in a fresh callee", |bencher| bencher.iter(|| coroutine.resume(black_box(1))));
    let mut coroutine = Coroutine::<[u64; 8], [u64; 8], ()>::new(|yielder, mut value| {
        loop {
            value = yielder.suspend(value);
        }
    });
    group.bench_function("64 bytes", |bencher| bencher.iter(|| coroutine.resume(black_box([1; 8]))));
    let mut coroutines: Vec<_> = (0..1000).map(|_| echo()).collect();
    group.bench_function("1000 in turn", |bencher| {
        bencher.iter(|| coroutines.iter_mut().for_each(|one| _ = black_box(one.resume(1))));
    });
    group.finish();
}

fn lives(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("life");
    group.bench_function("created, run, finished", |bencher| {
        bencher.iter(|| Coroutine::<u64, (), u64>::new(|_, value| value + 1).resume(black_box(1)));
    });
    group.bench_function("dropped suspended", |bencher| {
        let suspended = || {
            let mut coroutine = echo();
            coroutine.resume(1);
            coroutine
        };
        bencher.iter_batched(suspended, drop, BatchSize::SmallInput);
    });
    group.finish();
}

/// Takes so many frames of some hundred bytes.
#[inline(never)]
fn descend(frames: usize) -> usize {
    let frame = black_box([frames; 20]);
    let deeper = if frames > 0 { descend(frames - 1) } else { 0 };
    deeper + black_box(&frame)[7] % 2
}

fn growth(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("growth");
    // SAFETY: the recursion keeps nothing outside its stack.
    let relocating = unsafe { Builder::new().relocating() };
    for (name, builder) in [("moving to 64 KiB", relocating), ("in place to 64 KiB", Builder::new())] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| builder.spawn(|_: &Yielder<(), ()>, ()| descend(300)).resume(()));
        });
    }
    group.finish();
}

/// Freezing and thawing, the pair. Last: the thread that is started here changes what the others cost.
fn freezing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("freeze and thaw");
    // SAFETY: the coroutine keeps nothing outside its stack.
    let relocating = unsafe { Builder::new().relocating() };
    let mut bench = |name, builder: &Builder| {
        let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
            let locals = black_box([1u64; 16]);
            yielder.suspend(());
            assert_eq!(black_box(locals), [1; 16]);
        });
        coroutine.resume(());
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                assert!(coroutine.freeze().is_ok_and(|frozen| frozen));
                coroutine.thaw()
            });
        });
        coroutine.resume(());
    };
    bench("moving", &relocating);
    bench("in place", &Builder::new());
    std::thread::spawn(std::thread::park);
    bench("in place, among threads", &Builder::new());
}

criterion_group!(benches, switches, lives, growth, freezing);
criterion_main!(benches);
