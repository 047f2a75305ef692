//! Reserved stack is there without a fault, whichever way the stack grows, and what was on it stays right.

use std::hint::black_box;

use regrow::{Error, current_stats, pin, reserve};

mod support;
use support::{both_ways, frame, relocating, run};

#[test]
fn reserved_stack_is_used_without_another_growth() {
    both_ways(|builder| {
        for kib in [1, 3, 8, 60, 500, 3000] {
            run(&builder, move || {
                let local = black_box([kib; 5]);
                let pointer = black_box(&local[3]);
                reserve(kib << 10).unwrap();
                assert_eq!(*pointer, kib, "a pointer into the stack");
                assert!(std::ptr::eq(pointer, &local[3]));
                let before = current_stats().unwrap().growths;
                black_box(recurse(kib.saturating_sub(1)));
                assert_eq!(current_stats().unwrap().growths, before, "{kib} KiB");
                assert_eq!(local, [kib; 5]);
            });
        }
    });
}

/// Uses at most 1 KiB a level, in a debug build too.
#[inline(never)]
fn recurse(levels: usize) -> u64 {
    if levels == 0 { 0 } else { small(3) + recurse(levels - 1) }
}

#[inline(never)]
fn small(seed: u8) -> u64 {
    let bytes = black_box([seed; 64]);
    u64::from(bytes[5])
}

#[test]
fn callee_saved_registers_survive() {
    both_ways(|builder| {
        let sum = run(&builder, || {
            let mut numbers = [1u64, 2, 3, 4, 5, 6, 7, 8, 9, 10];
            for round in 1..6 {
                let [a, b, c, d, e, f, g, h, i, j] = numbers;
                reserve(3000 << round).unwrap();
                numbers = [a + j, b + i, c + h, d + g, e + f, f + e, g + d, h + c, i + b, j + a];
            }
            numbers.iter().sum::<u64>()
        });
        assert_eq!(sum, 55 << 5);
    });
}

#[test]
fn moves_are_counted_like_growths() {
    run(&relocating(), || {
        reserve(8000).unwrap(); // for the calls of this test itself
        let before = current_stats().unwrap();
        reserve(100_000).unwrap();
        let after = current_stats().unwrap();
        assert_eq!(after.growths, before.growths + 1);
        assert!(after.bytes_copied > before.bytes_copied && after.size >= 100_000);
    });
}

#[test]
fn a_pinned_stack_reserves_its_slack_and_no_more() {
    run(&relocating(), || {
        let _pin = pin();
        let local = 0u8;
        let address = &raw const local as usize ^ usize::MAX;
        reserve(20_000).unwrap();
        frame::<8000>(1);
        assert!(matches!(reserve(10 << 20), Err(Error::Room { .. })));
        assert_eq!(&raw const local as usize, !black_box(address));
    });
}

#[test]
fn more_than_the_maximum_is_an_error_that_says_so() {
    both_ways(|builder| {
        run(&builder.maximum(64 << 10), || {
            let error = reserve(100_000).unwrap_err();
            assert!(error.to_string().contains("Builder::maximum"), "{error}");
            assert!(reserve(usize::MAX).is_err());
            reserve(20_000).unwrap();
        });
    });
}

#[test]
fn outside_coroutines_it_does_nothing() {
    reserve(usize::MAX).unwrap();
}

#[test]
fn a_system_call_finds_a_reserved_buffer() {
    both_ways(|builder| {
        run(&builder, || {
            reserve(300_000).unwrap();
            read_zeros();
        });
    });

    #[inline(never)]
    fn read_zeros() {
        let mut buffer = std::mem::MaybeUninit::<[u8; 200_000]>::uninit();
        // SAFETY: reads from a device into a buffer of that size.
        let read = unsafe {
            let file = libc::open(c"/dev/zero".as_ptr(), libc::O_RDONLY);
            let read = libc::read(file, buffer.as_mut_ptr().cast(), 200_000);
            libc::close(file);
            read
        };
        assert_eq!(read, 200_000);
    }
}
