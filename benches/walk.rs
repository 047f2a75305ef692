//! What stack maps cost: recording, memory, look-ups, and a frame walked. Medians of several runs, printed.
//!
//! `cargo bench --package regrow-benches --bench walk`

#[path = "../tests/walkers/mod.rs"]
mod walkers;

use std::hint::black_box;
use std::time::Instant;

use regrow::map::{self, Cfa, FrameMap, Registers, Rules, StackMaps, Walk};
use walkers::{Framehop, MOST, Step, libgcc, own_memory, registers};

const RUNS: usize = 101;

/// The median of what `run` takes, in nanoseconds per `units` of work.
fn median(units: usize, mut run: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_nanos() as f64 / units as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[RUNS / 2]
}

fn line(what: &str, nanoseconds: f64) {
    println!("{what:52} {nanoseconds:10.1} ns");
}

fn walk(start: &Registers) -> usize {
    let reader = map::process().read();
    let mut walk = Walk::new(&reader, start, own_memory);
    let mut bytes = 0;
    while let Some(frame) = walk.advance() {
        bytes += black_box(frame).range().len();
    }
    bytes
}

#[inline(never)]
fn recurse(depth: usize, then: &dyn Fn()) -> usize {
    let frame = black_box([depth; 5]);
    if depth == 0 {
        then();
        return 0;
    }
    recurse(depth - 1, then) + frame[4]
}

/// Frames of functions that keep all callee-saved registers.
#[inline(never)]
fn recurse_with_registers(depth: usize, then: &dyn Fn()) -> usize {
    let [a, b, c, d, e, f] = black_box([depth; 6]);
    if depth == 0 {
        then();
        return 0;
    }
    recurse_with_registers(depth - 1, then) + a * b + c * d + e * f
}

fn walks() {
    let here = || {
        let start = registers();
        let mut steps = [Step::default(); MOST];
        let frames = walkers::ours(&start, false, own_memory, &mut steps).frames;
        // Short runs: on a busy machine a long one is interrupted by other processes, and its time is not ours.
        let times = 5000 / frames;
        let ours = median(times * frames, || (0..times).for_each(|_| _ = black_box(walk(&start))));
        line(&format!("ours, {frames} frames"), ours);
        let mut other = Framehop::new();
        let theirs = median(times * frames, || {
            (0..times).for_each(|_| _ = black_box(other.walk(&start, own_memory, MOST)));
        });
        line("framehop, with its cache", theirs);
        let theirs = median(5 * frames, || (0..5).for_each(|_| _ = black_box(libgcc(&mut steps))));
        line("libgcc, with _dl_find_object", theirs);
    };
    for depth in [1, 10, 200] {
        println!("\na frame walked: recursion {depth} deep");
        black_box(recurse(depth, &here));
    }
    println!("\na frame walked: recursion 100 deep, six registers saved in each");
    black_box(recurse_with_registers(100, &here));
}

fn look_ups() {
    println!("\na look-up");
    let reader = map::process().read();
    let mut steps = [Step::default(); MOST];
    let frames = libgcc(&mut steps);
    let hot: Vec<usize> = steps[..frames].iter().map(|step| step.pc - 1).collect();
    line(
        "of the few functions on this stack",
        median(100 * hot.len(), || {
            for _ in 0..100 {
                hot.iter().for_each(|&pc| _ = black_box(reader.find(pc)));
            }
        }),
    );
    // Addresses all over libc.
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let cold: Vec<usize> = std::iter::from_fn(|| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        Some(libc::qsort as *const () as usize - 0x1_0000 + random as usize % 0x10_0000)
    })
    .filter(|&pc| reader.find(pc).is_some())
    .take(10_000)
    .collect();
    line(
        "of 10,000 random places in libc",
        median(cold.len(), || {
            cold.iter().for_each(|&pc| _ = black_box(reader.find(pc)));
        }),
    );
    drop(reader);
    line(
        "begin and end of reading",
        median(1000, || (0..1000).for_each(|_| drop(black_box(map::process().read())))),
    );
}

fn registering() {
    println!("\nregistering and removing a module of 20 maps");
    for others in [0, 100, 10_000] {
        let maps = StackMaps::new();
        let module = |number: usize| {
            let map = |function: usize| {
                let start = number * 0x10_0000 + function * 0x100;
                FrameMap::new(start..start + 0x80).rules(Rules::new(Cfa::rsp(16)))
            };
            (1..=20usize).map(map).collect::<Vec<_>>()
        };
        let all: Vec<_> = (0..others).map(|number| maps.register(module(number + 1)).unwrap()).collect();
        let nanoseconds = median(1, || drop(maps.register(module(others + 1)).unwrap()));
        line(&format!("with {others} others"), nanoseconds);
        drop(all);
    }
}

fn main() {
    println!("{}", map::record_loaded_objects());
    look_ups();
    walks();
    registering();
}
