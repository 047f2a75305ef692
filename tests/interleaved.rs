//! Ten thousand coroutines, each growing to a size of its own, resumed at random in turn: each computes what
//! the same function computes on a plain thread's stack.

use std::hint::black_box;

use proptest::prelude::*;
use regrow::{Builder, Coroutine, Yielder, totals};

#[path = "support/corpus.rs"]
mod corpus;
mod support;
use support::{random, relocating};

const COROUTINES: usize = 10_000;

/// One frame's locals, linked to those of its caller.
struct Node<'a> {
    caller: Option<&'a Node<'a>>,
    words: [u64; 5],
}

/// Recurses `depth` frames down; pauses here and there on the way; folds what all frames hold into one number.
#[inline(never)]
fn work(state: &mut u64, depth: usize, caller: Option<&Node<'_>>, pause: &mut dyn FnMut(u64)) -> u64 {
    let node = black_box(Node { caller, words: std::array::from_fn(|_| random(state)) });
    if random(state).is_multiple_of(16) {
        pause(node.words[0]);
    }
    let below = match depth {
        0 => checksum(Some(&node)),
        _ => work(state, depth - 1, Some(&node), pause),
    };
    if random(state).is_multiple_of(32) {
        pause(below);
    }
    below ^ checksum(Some(&node)).rotate_left(7)
}

/// Of the locals of up to eight frames.
fn checksum(mut at: Option<&Node<'_>>) -> u64 {
    let mut sum = 0u64;
    for _ in 0..8 {
        let Some(node) = at else { break };
        sum = node.words.iter().fold(sum, |sum, &word| sum.wrapping_mul(31).wrapping_add(word));
        at = node.caller;
    }
    sum
}

/// What coroutine `n` does: where its numbers come from, and how deep it goes. Most stay small.
fn task(seed: u64, n: usize) -> (u64, usize) {
    let mut state = seed ^ (n as u64) << 20;
    let depth = random(&mut state) as usize % (1 << (random(&mut state) % 9)) * 2;
    (state, depth)
}

/// The same on this thread's own stack: what it pauses with, and its result.
fn expected(seed: u64, n: usize) -> (u64, u64) {
    let (mut state, depth) = task(seed, n);
    let mut pauses = 0u64;
    let result =
        work(&mut state, depth, None, &mut |value| pauses = pauses.wrapping_mul(3).wrapping_add(value));
    (pauses, result)
}

fn interleave(seed: u64) {
    let builders = [relocating(), Builder::new().learn(false)];
    let mut live: Vec<(usize, u64, Coroutine<(), u64, u64>)> = (0..COROUTINES)
        .map(|n| {
            let coroutine = builders[n % 2].spawn(move |yielder: &Yielder<(), u64>, ()| {
                let (mut state, depth) = task(seed, n);
                work(&mut state, depth, None, &mut |value| yielder.suspend(value))
            });
            (n, 0, coroutine)
        })
        .collect();
    let mut state = seed;
    while !live.is_empty() {
        let at = random(&mut state) as usize % live.len();
        let (n, pauses, coroutine) = &mut live[at];
        match coroutine.resume(()) {
            regrow::CoroutineResult::Yield(value) => *pauses = pauses.wrapping_mul(3).wrapping_add(value),
            regrow::CoroutineResult::Return(result) => {
                assert_eq!((*pauses, result), expected(seed, *n), "coroutine {n}, seed {seed}");
                live.swap_remove(at);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        max_shrink_iters: 0, // a seed has nothing to shrink
        ..corpus::cases(4)
    })]

    #[test]
    fn interleaved_coroutines_compute_what_a_plain_thread_computes(seed: u64) {
        println!("seed {seed}");
        let before = totals();
        interleave(seed);
        let after = totals();
        let moves = after.moves - before.moves;
        println!("{moves} moves");
        prop_assert!(moves > 3000, "{} moves", moves);
    }
}
