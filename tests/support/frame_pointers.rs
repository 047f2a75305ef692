//! Walks the chain of frame pointers from inside a nested coroutine to its resumers. Built and run by
//! tests/backtrace.rs, with frame pointers.

use std::arch::asm;
use std::hint::black_box;

use regrow::{Builder, Yielder, current_stats};

/// The frame pointer of the function this is inlined into.
#[inline(always)]
fn rbp() -> usize {
    let rbp;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) rbp, options(nomem, nostack, preserves_flags)) };
    rbp
}

/// The frame pointers from `at` outwards, until `last` or until it does not look like a chain.
fn chain(mut at: usize, last: usize) -> Vec<usize> {
    let mut found = vec![at];
    while at != last && at != 0 && at % 8 == 0 && found.len() < 200 {
        // SAFETY: a frame pointer points to the one before it.
        at = unsafe { *(at as *const usize) };
        found.push(at);
    }
    found
}

#[inline(never)]
fn innermost(of_root: usize, of_outer: usize, of_inner: &usize) {
    let found = chain(rbp(), of_root);
    let place = |frame| found.iter().position(|&at| at == frame);
    let places = [*of_inner, of_outer, of_root].map(place);
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?} {found:x?}");
}

/// Uses more stack than there is, so that it grows.
#[inline(never)]
fn grows() {
    black_box([1u8; 20_000]);
}

#[inline(never)]
fn in_the_inner_coroutine(of_root: usize, of_outer: usize) {
    let of_inner = rbp(); // on this stack: follows when it moves
    grows();
    let stats = current_stats().unwrap();
    assert!(stats.growths > 0 || stats.size > 20_000);
    innermost(of_root, of_outer, black_box(&of_inner));
    black_box(());
}

#[inline(never)]
fn in_the_outer_coroutine(builder: &Builder, of_root: usize) {
    grows();
    let of_outer = rbp();
    let mut inner = builder.spawn(move |_: &Yielder<(), ()>, ()| in_the_inner_coroutine(of_root, of_outer));
    inner.resume(());
}

fn root(builder: &Builder) {
    let of_root = rbp();
    let copy = builder.clone();
    let mut outer = builder.spawn(move |_: &Yielder<(), ()>, ()| in_the_outer_coroutine(&copy, of_root));
    outer.resume(());
    println!("the chain is whole");
}

fn main() {
    root(&Builder::new().learn(false));
    // SAFETY: nothing keeps a pointer to these stacks elsewhere but `of_outer`, while that stack does not run.
    root(&unsafe { Builder::new().learn(false).relocating() });
}
