//! The goroutine classic: recurse far past the first stack, and watch it grow.
//!
//! `cargo run --release --example recursive_deep -- [--depth N] [--json]`
//!
//! Each level holds 256 bytes. A `&mut` to a local of the first frame goes all the way down, is
//! written at the bottom and checked at the top: it is right only if every move of the stack rewrote it.

use std::hint::black_box;

use regrow::{Builder, Growth, LastGrowth, Yielder};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options = Options::from_arguments()?;
    let expected = on_a_plain_thread(options.depth)?;

    let relocated = on_a_coroutine(options.depth, Growth::Relocate)?;
    if options.json {
        println!("{}", relocated.json(expected));
    } else {
        relocated.print(expected);
        println!();
        on_a_coroutine(options.depth, Growth::InPlace)?.print(expected);
    }
    if relocated.result != expected { Err("the results differ".into()) } else { Ok(()) }
}

/// What is checked: a sum over every level's local, and the word written at the bottom.
type Sums = (u64, u64);

/// Recurses `depth` levels. `bottom` is a local of the first frame.
fn recursive_deep(depth: u64, bottom: &mut u64, log: &mut Log) -> u64 {
    let local = black_box([depth as u8; 256]);
    log.look(depth);
    if depth == 0 {
        *bottom = u64::MAX / 3;
        return u64::from(local[0]);
    }
    let below = recursive_deep(depth - 1, bottom, log);
    below + local.iter().map(|&byte| u64::from(byte)).sum::<u64>()
}

fn run(depth: u64, log: &mut Log) -> Sums {
    log.deepest = depth;
    let mut bottom = 0;
    let sum = recursive_deep(depth, &mut bottom, log);
    (sum, bottom)
}

/// The growths seen, each with how many levels down the recursion was.
#[derive(Default)]
struct Log {
    /// Of a stack that grows in place there is nothing to see: the kernel does it.
    moving: bool,
    deepest: u64,
    seen: u64,
    growths: Vec<(u64, LastGrowth)>,
}

impl Log {
    fn look(&mut self, depth: u64) {
        let Some(stats) = self.moving.then(regrow::current_stats).flatten() else { return };
        if stats.growths != self.seen {
            self.seen = stats.growths;
            self.growths.extend(stats.last.map(|growth| (self.deepest - depth, growth)));
        }
    }
}

struct Run {
    growth: Growth,
    growths: Vec<(u64, LastGrowth)>,
    result: Sums,
    /// Bytes of stack at the end.
    size: usize,
}

/// Enough for `depth` levels, in a debug build too.
fn enough(depth: u64) -> usize {
    ((depth as usize + 64) * 1024).next_power_of_two()
}

fn on_a_coroutine(depth: u64, growth: Growth) -> Result<Run, regrow::Error> {
    // Both runs are of one spawn site: the second would start with the size that the first has come to.
    let mut builder = Builder::new().name("recursive_deep").maximum(enough(depth)).learn(false);
    if growth == Growth::Relocate {
        // SAFETY: `recursive_deep` passes references down its own stack; the log keeps numbers on the heap.
        builder = unsafe { builder.relocating() };
    }
    let mut coroutine = builder.try_spawn(move |_: &Yielder<(), ()>, ()| {
        let mut log = Log { moving: growth == Growth::Relocate, ..Log::default() };
        let result = run(depth, &mut log);
        let size = regrow::current_stats().map_or(0, |stats| stats.highest);
        (result, log.growths, size)
    })?;
    let (result, growths, size) = coroutine.resume(()).returned().expect("it does not suspend");
    Ok(Run { growth, growths, result, size })
}

fn on_a_plain_thread(depth: u64) -> std::io::Result<Sums> {
    let thread = std::thread::Builder::new().stack_size(enough(depth));
    Ok(thread.spawn(move || run(depth, &mut Log::default()))?.join().expect("it does not panic"))
}

impl Run {
    fn print(&self, expected: Sums) {
        if self.growth == Growth::InPlace {
            println!("growing in place: by the kernel, page by page, to {} bytes", self.size);
            return self.print_result(expected);
        }
        println!("growing by moving");
        println!("{:>8} {:>12} {:>12} {:>12} {:>8} {:>12}", "depth", "from", "to", "copied", "words", "ns");
        for (depth, growth) in &self.growths {
            let LastGrowth { from, to, bytes, words, nanoseconds, .. } = growth;
            println!("{depth:>8} {from:>12} {to:>12} {bytes:>12} {words:>8} {nanoseconds:>12}");
        }
        self.print_result(expected);
    }

    fn print_result(&self, expected: Sums) {
        let verdict = if self.result == expected { "equal" } else { "DIFFERENT" };
        println!("result {:?}, on a plain thread {expected:?}: {verdict}", self.result);
    }

    fn json(&self, expected: Sums) -> serde_json::Value {
        let growths: Vec<_> = self
            .growths
            .iter()
            .map(|(depth, growth)| {
                serde_json::json!({
                    "depth": depth, "from": growth.from, "to": growth.to, "bytes": growth.bytes,
                    "words": growth.words, "ns": growth.nanoseconds,
                })
            })
            .collect();
        serde_json::json!({
            "growth": "relocate", "growths": growths, "result": self.result.0 ^ self.result.1, "expected": expected.0 ^ expected.1,
        })
    }
}

struct Options {
    depth: u64,
    json: bool,
}

impl Options {
    fn from_arguments() -> Result<Self, lexopt::Error> {
        use lexopt::prelude::*;
        let mut options = Self { depth: 100, json: false };
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("depth") => options.depth = arguments.value()?.parse()?,
                Long("json") => options.json = true,
                other => return Err(other.unexpected()),
            }
        }
        if options.depth > 3_000_000 {
            return Err("--depth: at most 3000000, for a stack of 4 GiB".into());
        }
        Ok(options)
    }
}
