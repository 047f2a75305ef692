//! Contests: several contestants in one process, in alternating short rounds, and what comes of it.

use std::time::{Duration, Instant};

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
}

/// Times `operation`, `count` times.
#[inline(always)]
pub fn timed(count: u64, mut operation: impl FnMut()) -> Duration {
    let start = Instant::now();
    for _ in 0..count {
        operation();
    }
    start.elapsed()
}

/// What a shape came to: nanoseconds an operation of each contestant in each round.
pub struct Outcome {
    pub shape: &'static str,
    /// The first is ours.
    pub names: Vec<&'static str>,
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
    pub fn nanoseconds(&self, contestant: usize) -> Spread {
        Spread::of(self.rounds.iter().map(|round| round[contestant]).collect())
    }

    /// Our time by a contestant's, round by round.
    pub fn ratio(&self, contestant: usize) -> Spread {
        Spread::of(self.rounds.iter().map(|round| round[0] / round[contestant]).collect())
    }
}

/// Lets the contestants run in turn, `rounds` times; who begins changes from round to round.
pub fn contest(shape: &'static str, rounds: usize, mut contestants: Vec<Contestant<'_>>) -> Outcome {
    let count = contestants.len();
    let lengths: Vec<u64> = contestants.iter_mut().map(calibrate).collect();
    let rounds = (0..rounds)
        .map(|round| {
            let mut times = vec![0.0; count];
            for place in 0..count {
                let index = (place + round) % count;
                let Contestant { run, unit, .. } = &mut contestants[index];
                let operations = lengths[index] * *unit;
                times[index] = run(lengths[index]).as_nanos() as f64 / operations as f64;
            }
            times
        })
        .collect();
    Outcome { shape, names: contestants.iter().map(|contestant| contestant.name).collect(), rounds }
}

/// How many operations take about a round. Warms everything up, too.
fn calibrate(contestant: &mut Contestant<'_>) -> u64 {
    let mut count = 1;
    loop {
        let time = (contestant.run)(count);
        if time >= ROUND / 2 {
            return count;
        }
        count = (count * 2).max((count as f64 * ROUND.as_secs_f64() / time.as_secs_f64().max(1e-7) / 4.0) as u64);
    }
}
