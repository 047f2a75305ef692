//! Contests: several contestants in one process, in alternating short rounds, and what comes of it.
//!
//! Time is the processor time of the thread: on a machine that does other things too, theirs is not ours. (What they do
//! to the caches still is.)

use std::hint::black_box;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Runs a number of operations and returns how long they took.
pub type Run<'a> = Box<dyn FnMut(u64) -> Duration + 'a>;

/// How long a contestant runs in a round, about. Short: on a busy machine a long one is interrupted.
const ROUND: Duration = Duration::from_micros(1500);

pub struct Contestant<'a> {
    pub name: &'static str,
    pub run: Run<'a>,
    /// Operations in what `run` counts as one: the number of coroutines, say.
    pub unit: u64,
}

impl<'a> Contestant<'a> {
    pub fn new(name: &'static str, run: Run<'a>) -> Self {
        Self { name, run, unit: 1 }
    }

    pub fn unit(self, unit: u64) -> Self {
        Self { unit, ..self }
    }

    /// Does one operation before its time is taken, in each round. The caches are full of what the others used, and one pass over
    /// many coroutines may be all that fits into a round: it would be a cold one for some contestants, and one in ten
    /// for others.
    pub fn warm(self) -> Self {
        let mut run = self.run;
        let warm = move |count| {
            run(1);
            run(count)
        };
        Self { run: Box::new(warm), ..self }
    }
}

/// Times `operation`, `count` times.
#[inline(always)]
pub fn timed(count: u64, mut operation: impl FnMut()) -> Duration {
    let start = now();
    for _ in 0..count {
        operation();
    }
    now() - start
}

/// Moves the code behind it down, by 16 bytes for each `PLACE`.
#[inline(always)]
pub fn placed<const PLACE: usize>() {
    // SAFETY: instructions that do nothing.
    unsafe { core::arch::asm!(".skip 16 * {}, 0x90", const PLACE, options(nomem, nostack, preserves_flags)) };
}

/// The same at several places in the program, by turns: how some short loops happen to lie in the lines of the cache makes
/// them take twice as long.
pub fn in_turn<const COPIES: usize>(mut copies: [Run<'static>; COPIES]) -> Run<'static> {
    let mut turn = 0;
    Box::new(move |count| {
        turn += 1;
        copies[turn % COPIES](count)
    })
}

/// Processor time of this thread.
pub fn now() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// What a shape came to: nanoseconds an operation of each contestant in each round.
#[derive(Default, Serialize, Deserialize)]
pub struct Outcome {
    pub shape: String,
    /// The first is ours.
    pub names: Vec<String>,
    rounds: Vec<Vec<f64>>,
}

/// A median with its quartiles.
#[derive(Clone, Copy)]
pub struct Spread {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |quarter: usize| values[(values.len() - 1) * quarter / 4];
        Self { low: at(1), median: at(2), high: at(3) }
    }
}

impl Outcome {
    /// Adds the rounds of another process.
    pub fn add(&mut self, other: Self) {
        let rounds = std::mem::take(&mut self.rounds);
        *self = Self { rounds: rounds.into_iter().chain(other.rounds).collect(), ..other };
    }

    pub fn nanoseconds(&self, contestant: usize) -> Spread {
        Spread::of(self.rounds.iter().map(|round| round[contestant]).collect())
    }

    /// Our time by a contestant's, round by round.
    pub fn ratio(&self, contestant: usize) -> Spread {
        Spread::of(self.rounds.iter().map(|round| round[0] / round[contestant]).collect())
    }
}

/// Lets the contestants run in turn, `rounds` times; who begins changes from round to round.
pub fn contest(shape: &str, rounds: usize, mut contestants: Vec<Contestant<'_>>) -> Outcome {
    let count = contestants.len();
    let lengths: Vec<u64> = contestants.iter_mut().map(calibrate).collect();
    let rounds = (0..rounds)
        .map(|round| {
            let mut times = vec![0.0; count];
            for place in 0..count {
                let index = (place + round) % count;
                let Contestant { run, unit, .. } = &mut contestants[index];
                let operations = lengths[index] * *unit;
                let time = lower(round, &mut || run(lengths[index]));
                times[index] = time.as_nanos() as f64 / operations as f64;
            }
            times
        })
        .collect();
    let names = contestants.iter().map(|contestant| contestant.name.to_owned()).collect();
    Outcome { shape: shape.to_owned(), names, rounds }
}

/// Calls `f` from `steps` frames of some hundred bytes further down. How far the two stacks of a switch are apart, modulo
/// a page, decides which of their words the processor takes for each other: chance, so every round has its own.
#[inline(never)]
fn lower(steps: usize, f: &mut dyn FnMut() -> Duration) -> Duration {
    let room = black_box([0u8; 272]);
    let time = if steps == 0 { f() } else { lower(steps - 1, f) };
    black_box(room);
    time
}

/// How many operations take about a round. Warms everything up, too: what is done once in a process, recording stack maps for
/// example, is not part of an operation.
fn calibrate(contestant: &mut Contestant<'_>) -> u64 {
    (contestant.run)(1);
    let mut count = 1;
    loop {
        let time = (contestant.run)(count);
        if time >= ROUND / 2 {
            return count;
        }
        count =
            (count * 2).max((count as f64 * ROUND.as_secs_f64() / time.as_secs_f64().max(1e-7) / 4.0) as u64);
    }
}
