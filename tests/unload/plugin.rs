//! A library with coroutines, as a program loads it: compiled and loaded by `tests/unload.rs`.

use std::hint::black_box;

use regrow::{Builder, Yielder, current_stats};

#[inline(never)]
fn deep(levels: u64) -> u64 {
    let here = black_box([levels; 16]);
    let below = if levels == 0 { 0 } else { deep(levels - 1) };
    below + black_box(here)[7]
}

/// The sum of the numbers up to `levels`, on a stack that moves. 0 if it did not grow.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_deep(levels: u64) -> u64 {
    // SAFETY: nothing is kept outside the stack.
    let builder = unsafe { Builder::new().learn(false).relocating() };
    let mut coroutine = builder.spawn(move |_: &Yielder<(), ()>, ()| {
        let sum = deep(levels);
        if current_stats().unwrap().growths > 0 { sum } else { 0 }
    });
    coroutine.resume(()).returned().unwrap()
}
