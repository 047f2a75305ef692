//! Stacks that stay: all of their window is accessible, so what is not touched costs nothing, and a frame of any size within it
//! is on memory that is its own.

use std::arch::asm;
use std::ffi::c_void;
use std::hint::black_box;

use regrow::{Builder, Coroutine, Yielder, current_stats};

mod support;
use support::{frame, run, this_test, variant};

fn in_place(maximum: usize) -> Builder {
    Builder::new().learn(false).maximum(maximum)
}

fn wide() -> Builder {
    in_place(256 << 10)
}

/// Runs `f` on a stack that no coroutine had before.
fn on_new_slot(mut f: impl FnMut() + 'static) {
    let mut coroutine = wide().spawn(move |yielder: &Yielder<(), ()>, ()| {
        f();
        yielder.suspend(());
    });
    coroutine.resume(());
    std::mem::forget(coroutine);
}

/// Calls `f` with the stack pointer so many bytes further down, as C code without probes does that has a large frame.
/// Nothing in between is touched. Nothing can unwind through it.
fn far_below(bytes: usize, f: &mut dyn FnMut()) {
    far_below_by(bytes, &mut || f());
}

fn far_below_by<F: FnMut()>(bytes: usize, f: &mut F) {
    extern "C" fn call<F: FnMut()>(f: *mut c_void) {
        // SAFETY: passed below.
        unsafe { (*f.cast::<F>())() }
    }
    // SAFETY: keeps the stack pointer in a register that calls preserve.
    unsafe {
        asm!(
            "mov r12, rsp",
            "sub rsp, {bytes}",
            "and rsp, -64",
            "call {call}",
            "mov rsp, r12",
            bytes = in(reg) bytes,
            call = sym call::<F>,
            in("rdi") std::ptr::from_mut(f),
            out("r12") _,
            clobber_abi("C"),
        );
    }
}

/// Bytes the kernel says of this process.
fn status(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10
}

/// Recurses until so many bytes of stack are used.
#[inline(never)]
fn descend(top: usize, bytes: usize) -> u64 {
    let local = black_box([bytes as u64; 16]);
    let used = top - local.as_ptr() as usize;
    let below = if used < bytes { descend(top, bytes) } else { 0 };
    assert_eq!(black_box(local), [bytes as u64; 16]);
    below + 1
}

/// As [`descend`], from here.
fn descend_by(bytes: usize) -> u64 {
    let here = 0u8;
    descend(black_box(&raw const here as usize), bytes)
}

#[test]
fn a_window_that_is_not_used_costs_no_page_tables() {
    let Some(variant) = variant() else {
        return this_test!().passes_each([64usize << 20, 1 << 30]);
    };
    let maximum: usize = variant.parse().unwrap();
    let spawn = || {
        let mut coroutine = in_place(maximum).spawn(|yielder: &Yielder<(), ()>, ()| yielder.suspend(()));
        coroutine.resume(());
        coroutine
    };
    run(&in_place(1 << 16), || ()); // the handler, the tables of maps
    let before = status("VmPTE:");
    let one = spawn();
    let after_one = status("VmPTE:");
    // Both ends of the slot are in a lowest and a middle table of their own, at most.
    assert!(after_one - before <= 5 * 4096, "{} bytes for one", after_one - before);
    let many: Vec<_> = (0..32).map(|_| spawn()).collect();
    let each = (status("VmPTE:") - after_one) / many.len();
    // The bottom of one is next to the top of the one below it.
    assert!(each <= 3 * 4096, "{each} bytes each");
    drop(one);
}

/// What the kernel says of a stack is what was used of it, whoever had the slot before.
#[test]
fn the_size_is_what_was_touched() {
    for megabytes in [0, 1, 24, 2, 30, 1] {
        regrow::trim();
        run(&in_place(32 << 20), move || {
            let bytes = (megabytes << 20) + 100_000;
            let steps = descend_by(bytes);
            assert!(steps > megabytes as u64 * 100);
            let stats = current_stats().unwrap();
            assert!((bytes..bytes + 20_000).contains(&stats.size), "{bytes}: {stats:?}");
            assert_eq!((stats.highest, stats.growths), (stats.size, 0));
        });
    }
}

#[test]
fn what_a_frame_steps_over_is_its_own() {
    for (below, up) in [(60_000, 30_000), (60_000, 50_000), (100_000, 94_000), (150_000, 145_000)] {
        for room in [3000, 6000, 19_000] {
            on_new_slot(move || {
                let top = 0u8;
                let top = &raw const top as usize;
                let mut sum = 0;
                far_below(below, &mut || {
                    let deep = black_box([0xa5u8; 3000]);
                    // The frame that was stepped over, from below.
                    let mut at = top - up;
                    while at < top - room {
                        // SAFETY: between this frame and that of the coroutine's closure.
                        unsafe { (at as *mut u8).write_volatile(7) };
                        at += 512;
                    }
                    sum = deep.iter().map(|&byte| u64::from(byte)).sum();
                });
                assert_eq!(sum, 0xa5 * 3000);
                descend_by(200_000);
            });
        }
    }
}

#[test]
fn a_reserve_keeps_what_is_in_use() {
    for (bytes, below) in
        [0, 100, 4000, 30_000].into_iter().flat_map(|b| [60_000, 150_000, 220_000].map(|d| (b, d)))
    {
        on_new_slot(move || {
            let mut right = false;
            far_below(below, &mut || {
                let deep = black_box([0x5au8; 2000]);
                regrow::reserve(bytes).unwrap();
                right = black_box(deep) == [0x5a; 2000];
            });
            assert!(right, "{bytes} bytes reserved {below} bytes down");
        });
    }
}

/// Suspended far below: it can be made smaller and frozen, goes on, and its slot is as good as another afterwards.
#[test]
fn a_coroutine_may_suspend_far_below() {
    for below in [60_000, 90_000, 200_000] {
        let mut coroutine = wide().spawn(move |yielder: &Yielder<u64, u64>, first| {
            let mut sum = first;
            far_below(below, &mut || {
                let deep = black_box([3u64; 100]);
                for _ in 0..100 {
                    sum += yielder.suspend(sum);
                }
                sum += deep.iter().sum::<u64>();
            });
            sum + frame::<60_000>(1)
        });
        let mut answer = coroutine.resume(1);
        while let Some(sum) = answer.yielded() {
            assert!(sum % 3 == 0 || coroutine.freeze().unwrap(), "after {sum}");
            coroutine.shrink().unwrap();
            answer = coroutine.resume(1);
            if let regrow::CoroutineResult::Return(last) = answer {
                assert_eq!(last, 101 + 300 + 60_000);
                break;
            }
        }
        assert!(coroutine.done());
        // The next one is to have a slot of its own.
        std::mem::forget(wide().spawn(|_: &Yielder<(), ()>, ()| ()));
    }
}

/// What was used far below goes back with the slot.
#[test]
fn memory_far_below_is_given_back() {
    const COUNT: usize = 300;
    if variant().is_none() {
        return this_test!().passes();
    }
    let round = || {
        let mut all: Vec<Coroutine<(), (), ()>> = (0..COUNT)
            .map(|_| {
                wide().spawn(|yielder: &Yielder<(), ()>, ()| {
                    far_below(50_000, &mut || _ = black_box(frame::<100_000>(1)));
                    yielder.suspend(());
                })
            })
            .collect();
        all.iter_mut().for_each(|one| _ = one.resume(()));
        let most = status("VmRSS:");
        drop(all);
        regrow::trim();
        (most, status("VmRSS:"))
    };
    round();
    let (most, least) = round();
    assert!(most - least > COUNT * 90_000, "{most} bytes, then {least}");
}

/// Wherever it begins, a recursion ends at the maximum.
#[test]
fn a_recursion_that_begins_far_below_ends_at_the_maximum() {
    if variant().is_none() {
        for guard in ["", "protect"] {
            let outcome = this_test!().child_with("", &[("REGROW_GUARD", guard)]);
            assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
            assert!(outcome.stderr.contains("exceeds its 262144-byte stack limit"), "{outcome}");
        }
        return;
    }
    let neighbours: Vec<_> =
        (0..20).map(|_| wide().spawn(|yielder: &Yielder<(), ()>, ()| yielder.suspend(()))).collect();
    on_new_slot(|| far_below(50_000, &mut || _ = black_box(descend_for_ever(1))));
    drop(neighbours);
}

#[expect(unconditional_recursion, reason = "that is the point")]
fn descend_for_ever(number: u64) -> u64 {
    let local = black_box([number; 50]);
    descend_for_ever(number + 1) + local[7]
}

/// What a thread keeps for reuse is bounded by the memory it holds, whoever has used it: by small ones, greedy ones, and a few
/// greedy ones among many small ones. Whatever they have written, zeros among it.
#[test]
fn the_stock_of_a_thread_stays_small() {
    let Some(variant) = variant() else {
        return this_test!().passes_each(["1 1", "10 1", "100 1", "1 0", "10 0"]);
    };
    let (every, fill) = variant.split_once(' ').unwrap();
    let (every, fill): (usize, u8) = (every.parse().unwrap(), fill.parse().unwrap());
    #[inline(never)] // its frame is not that of those who do not call it
    fn buffer(fill: u8) {
        black_box(&mut [fill; 90_000]);
    }
    let round = |greedy: bool| {
        let mut all: Vec<_> = (0..2000)
            .map(|number| {
                let greedy = greedy && number % every == 0;
                wide().spawn(move |yielder: &Yielder<(), ()>, ()| {
                    if greedy {
                        buffer(fill);
                    }
                    yielder.suspend(());
                })
            })
            .collect();
        all.iter_mut().for_each(|one| _ = one.resume(()));
    };
    round(false);
    let before = status("VmRSS:");
    for _ in 0..3 {
        round(true);
        round(false);
        let kept = status("VmRSS:").saturating_sub(before);
        assert!(kept < 24 << 20, "{kept} bytes kept where one in {every} is greedy");
    }
}
