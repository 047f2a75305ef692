//! A library with coroutines, as a program loads it: compiled and loaded by `tests/unload.rs`.

use std::hint::black_box;

use regrow::{Builder, Coroutine, Yielder, current_stats};

#[inline(never)]
fn deep(levels: u64) -> u64 {
    let here = black_box([levels; 16]);
    let below = if levels == 0 { 0 } else { deep(levels - 1) };
    below + black_box(here)[7]
}

/// The sum of the numbers up to `levels`, on a stack that moves. 0 if it did not grow. While it grows it is `armed`.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_deep(levels: u64, armed: extern "C" fn(bool)) -> u64 {
    // SAFETY: nothing is kept outside the stack.
    let builder = unsafe { Builder::new().learn(false).relocating() };
    let mut coroutine = builder.spawn(move |_: &Yielder<(), ()>, ()| {
        armed(true);
        let sum = deep(levels);
        armed(false);
        if current_stats().unwrap().growths > 0 { sum } else { 0 }
    });
    coroutine.resume(()).returned().unwrap()
}

/// An address in a stack that was frozen once. Whoever uses it makes a fault that the handler may serve.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_frozen() -> usize {
    let mut coroutine = Coroutine::new(|yielder: &Yielder<(), usize>, ()| {
        let local = black_box(5u64);
        yielder.suspend(&raw const local as usize);
    });
    let local = coroutine.resume(()).yielded().unwrap();
    assert!(coroutine.freeze().unwrap());
    std::mem::forget(coroutine);
    local
}
