//! Frames of every size from 16 bytes to 8 KiB cross the guard unharmed, whichever way the stack grows.

use std::hint::black_box;

mod support;
use support::{both_ways, growths, run};

/// What each stack comes to use at least.
const DEPTH: usize = 20 << 10;

/// Recurses until `left` bytes are used up, each frame pointing to itself and to its caller's number.
#[inline(never)]
fn frame<const N: usize>(left: usize, caller: &mut u64) -> u64 {
    let mut bytes = black_box([left as u8; N]);
    let own = bytes.as_mut_ptr();
    let mut number = 1;
    *caller += N as u64;
    if left > N {
        number += black_box(frame::<N>(left - N, &mut number));
    }
    assert_eq!(black_box(own), bytes.as_mut_ptr());
    assert!(bytes == [left as u8; N], "a frame of {N} bytes");
    number
}

type Frame = fn(usize, &mut u64) -> u64;

macro_rules! row {
    ($from:expr) => {
        row!($from; 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    };
    ($from:expr; $($n:expr),*) => {
        [$((16 * ($from + $n) + 16, frame::<{ 16 * ($from + $n) + 16 }> as Frame)),*]
    };
}

macro_rules! rows {
    ($($row:expr),*) => { [$(row!(16 * $row)),*] };
}

/// Each size, 16, 32, ..., 8192, and its function.
#[rustfmt::skip]
static FRAMES: [[(usize, Frame); 16]; 32] = rows!(
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
);

#[test]
fn frames_of_all_sizes_cross_the_guard() {
    let frames = FRAMES.as_flattened();
    assert_eq!(frames.len(), 512);
    both_ways(|builder| {
        for (n, &(size, frame)) in frames.iter().enumerate() {
            assert_eq!(size, 16 * (n + 1));
            let f = move || {
                let mut top = 0;
                (frame(DEPTH, &mut top), top)
            };
            let expected = f();
            let found = run(&builder, move || {
                let found = f();
                assert!(growths() >= 2, "frames of {size} bytes: {} growths", growths());
                found
            });
            assert_eq!(found, expected, "{builder:?}, frames of {size} bytes");
        }
    });
}
