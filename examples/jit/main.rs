//! Compiled code on stacks that move: 10,000 coroutines of a small language with pointers to locals.
//!
//! ```text
//! cargo run --release --example jit -- [--count COROUTINES] [--seed SEED]
//! ```
//!
//! The programs in `programs/` are compiled by Cranelift and run on relocating coroutines, resumed in
//! random order. Each recurses, at its own time, until its stack of 2 KiB has become one of 64 KiB, writes
//! to the locals of older frames through pointers, and looks at them again on its way back. Each value it
//! yields, and its result, must be what an interpreter of the same language says: any difference, and the
//! exit status is 1.
//!
//! [`syntax`]: the language; [`interpreter`]: what it means; [`compiler`]: how pointers are kept where
//! stack maps find them; [`module`]: executable memory, and all that is known about its frames.

mod compiler;
mod interpreter;
mod module;
mod syntax;

use std::error::Error;
use std::ffi::c_void;
use std::num::NonZero;
use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::ptr;
use std::thread;
use std::time::Instant;

use interpreter::{Limits, Trap};
use module::Module;
use regrow::{Builder, Coroutine, CoroutineResult, Stats, Yielder, current_stats, totals};
use syntax::Program;

/// A program, and how deep it must recurse for its stack to need between 32 and 64 KiB.
struct Source {
    name: &'static str,
    text: &'static str,
    depths: RangeInclusive<i64>,
}

const SOURCES: [Source; 5] = [
    Source { name: "witness", text: include_str!("programs/witness.jit"), depths: 300..=480 },
    Source { name: "record", text: include_str!("programs/record.jit"), depths: 350..=540 },
    Source { name: "ladder", text: include_str!("programs/ladder.jit"), depths: 240..=385 },
    Source { name: "sorting", text: include_str!("programs/sorting.jit"), depths: 310..=480 },
    Source { name: "tree", text: include_str!("programs/tree.jit"), depths: 390..=640 },
];

/// What every stack grows to, in bytes.
const SIZE: usize = 64 << 10;

fn main() -> ExitCode {
    match Options::parse().and_then(|options| options.map_or(Ok(true), |options| run(&options))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("jit: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Options {
    count: usize,
    seed: u64,
}

impl Options {
    /// From the command line; `None` if it asked for help and got it.
    fn parse() -> Result<Option<Self>, Box<dyn Error>> {
        use lexopt::{Arg, ValueExt};
        let mut options = Self { count: 10_000, seed: 1 };
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next()? {
            match argument {
                Arg::Long("count") => options.count = arguments.value()?.parse()?,
                Arg::Long("seed") => options.seed = arguments.value()?.parse()?,
                Arg::Short('h') | Arg::Long("help") => {
                    println!("usage: jit [--count COROUTINES] [--seed SEED]");
                    return Ok(None);
                }
                other => return Err(other.unexpected().into()),
            }
        }
        Ok(Some(options))
    }
}

/// Compiles, interprets, runs and compares; true if nothing differed.
fn run(options: &Options) -> Result<bool, Box<dyn Error>> {
    let parse =
        |source: &Source| syntax::parse(source.text).map_err(|error| format!("{}: {error}", source.name));
    let programs: Vec<_> = SOURCES.iter().map(parse).collect::<Result<_, _>>()?;
    let compile = |program| compiler::compile(program, suspend);
    let modules: Vec<_> = programs.iter().map(compile).collect::<Result<_, _>>()?;
    print_code(&modules);

    let mut random = Random(options.seed);
    let tasks: Vec<_> = (0..options.count).map(|number| Task::random(number, &mut random)).collect();
    let start = Instant::now();
    let traces = interpret(&programs, &tasks)?;
    println!("\ninterpreted in {:.1} s", start.elapsed().as_secs_f64());

    let start = Instant::now();
    let tallies = interleave(&modules, &tasks, traces, &mut random);
    println!("ran compiled in {:.1} s, seed {}\n", start.elapsed().as_secs_f64(), options.seed);
    Ok(print_tallies(&tallies))
}

/// What compiled code calls for `yield`.
///
/// # Safety
/// `context` is the yielder of the running coroutine.
unsafe extern "C-unwind" fn suspend(context: *const c_void, value: i64) -> i64 {
    // SAFETY: by the caller's word. The yielder is on the stack that may move; compiled code keeps its
    // address where it is rewritten, as we do.
    unsafe { &*context.cast::<Yielder<i64, i64>>() }.suspend(value)
}

/// What one coroutine has to do.
struct Task {
    program: usize,
    depth: i64,
    seed: i64,
}

impl Task {
    fn random(number: usize, random: &mut Random) -> Self {
        let program = number % SOURCES.len();
        let depths = &SOURCES[program].depths;
        let spread = (depths.end() - depths.start() + 1) as usize;
        let depth = depths.start() + random.below(spread) as i64;
        Self { program, depth, seed: (random.next() >> 32) as i64 }
    }

    /// What it is resumed with after its yield number `turn`.
    fn answer(&self, turn: usize, yielded: i64) -> i64 {
        let mix = self.seed ^ yielded.rotate_left(32) ^ turn as i64;
        (Random(mix as u64).next() >> 16) as i64
    }
}

/// What a task yields and returns.
struct Trace {
    yields: Vec<i64>,
    result: i64,
}

impl Trace {
    /// According to the interpreter.
    fn of(task: &Task, program: &Program) -> Result<Self, Trap> {
        const LIMITS: Limits = Limits { fuel: 10_000_000, depth: 10_000 };
        let mut yields = Vec::new();
        let result = interpreter::run(program, [task.depth, task.seed], LIMITS, |value| {
            yields.push(value);
            task.answer(yields.len(), value)
        })?;
        Ok(Self { yields, result })
    }
}

/// Traces of all tasks, on all processors. The interpreter calls itself as deep as the program does, so it
/// gets a large stack.
fn interpret(programs: &[Program], tasks: &[Task]) -> Result<Vec<Trace>, Box<dyn Error>> {
    const STACK: usize = 256 << 20;
    let traces = |tasks: &[Task]| -> Result<Vec<_>, Trap> {
        tasks.iter().map(|task| Trace::of(task, &programs[task.program])).collect()
    };
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        let start =
            |tasks| thread::Builder::new().stack_size(STACK).spawn_scoped(scope, move || traces(tasks));
        let share = tasks.len().div_ceil(processors).max(1);
        let threads: Vec<_> = tasks.chunks(share).map(start).collect::<Result<_, _>>()?;
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().expect("the interpreter does not panic")?);
        }
        Ok(all)
    })
}

/// A task on its way, on a stack that may move.
struct Running<'t> {
    task: &'t Task,
    coroutine: Coroutine<i64, i64, (i64, Option<Stats>)>,
    expected: Trace,
    turn: usize,
    input: i64,
}

/// What a turn of a task came to.
enum Turn {
    Continues,
    Equal(Stats),
    Unequal(String),
}

impl<'t> Running<'t> {
    fn new(task: &'t Task, module: &Module, expected: Trace) -> Self {
        let entry = module.entry();
        let (depth, seed) = (task.depth, task.seed);
        // SAFETY: compiled code keeps pointers in its frames and in registers, as words; the closure keeps
        // none.
        let builder = unsafe { Builder::new().relocating() };
        let coroutine = builder.spawn(move |yielder: &Yielder<i64, i64>, _| {
            // SAFETY: the module outlives the coroutine, and its `yield` function takes a yielder.
            let result = unsafe { entry(ptr::from_ref(yielder).cast(), depth, seed) };
            (result, current_stats())
        });
        Self { task, coroutine, expected, turn: 0, input: 0 }
    }

    fn turn(&mut self) -> Turn {
        let expected = self.expected.yields.get(self.turn);
        match self.coroutine.resume(self.input) {
            CoroutineResult::Yield(value) if expected == Some(&value) => {
                self.turn += 1;
                self.input = self.task.answer(self.turn, value);
                Turn::Continues
            }
            CoroutineResult::Return((value, Some(stats)))
                if expected.is_none() && value == self.expected.result =>
            {
                Turn::Equal(stats)
            }
            other => {
                let result = self.expected.result;
                Turn::Unequal(format!("{other:?}, not {expected:?} or the result {result}"))
            }
        }
    }
}

/// Resumes all tasks in random order until all have ended.
fn interleave(modules: &[Module], tasks: &[Task], traces: Vec<Trace>, random: &mut Random) -> Vec<Tally> {
    let mut tallies: Vec<_> = modules.iter().map(|_| Tally::default()).collect();
    let start = |(task, trace): (_, _)| Running::new(task, &modules[task.program], trace);
    let mut running: Vec<_> = tasks.iter().zip(traces).map(start).collect();
    while !running.is_empty() {
        let next = random.below(running.len());
        let one = &mut running[next];
        let turn = one.turn();
        tallies[one.task.program].count(&turn);
        if let Turn::Unequal(difference) = &turn {
            let Task { program, depth, seed } = *one.task;
            eprintln!("{}({depth}, {seed}), turn {}: {difference}", SOURCES[program].name, one.turn);
        }
        if !matches!(turn, Turn::Continues) {
            running.swap_remove(next);
        }
    }
    tallies
}

/// What the tasks of one program came to.
#[derive(Clone, Copy, Default)]
struct Tally {
    coroutines: usize,
    resumes: usize,
    growths: u64,
    words: u64,
    /// Ended with a stack of [`SIZE`].
    grown: usize,
    equal: usize,
    unequal: usize,
}

impl Tally {
    fn count(&mut self, turn: &Turn) {
        self.resumes += 1;
        match turn {
            Turn::Continues => return,
            Turn::Equal(stats) => {
                self.equal += 1;
                self.growths += stats.growths;
                self.words += stats.words_rewritten;
                self.grown += usize::from(stats.highest == SIZE);
            }
            Turn::Unequal(_) => self.unequal += 1,
        }
        self.coroutines += 1;
    }

    fn add(self, other: &Self) -> Self {
        Self {
            coroutines: self.coroutines + other.coroutines,
            resumes: self.resumes + other.resumes,
            growths: self.growths + other.growths,
            words: self.words + other.words,
            grown: self.grown + other.grown,
            equal: self.equal + other.equal,
            unequal: self.unequal + other.unequal,
        }
    }

    fn print(&self, name: &str) {
        let Self { coroutines, resumes, growths, words, grown, equal, unequal } = self;
        print!("{name:<8} {coroutines:>10} {resumes:>9} {growths:>8} {grown:>9} ");
        println!("{words:>11} {equal:>6} {unequal:>8}");
    }
}

/// What compiling gave: functions, and what is known about their frames.
fn print_code(modules: &[Module]) {
    println!(
        "program  function                                  code  frame  calls mapped  words that point"
    );
    for (source, module) in SOURCES.iter().zip(modules) {
        for function in &module.functions {
            let parameters: Vec<_> = function.parameters.iter().map(ToString::to_string).collect();
            let function_type = format!("{}({})", function.name, parameters.join(", "));
            let size = function.size;
            let frame = function.stack_maps.first().map_or("".to_string(), |(_, span, _)| span.to_string());
            let calls = function.stack_maps.len();
            let words: usize = function.stack_maps.iter().map(|(_, _, map)| map.entries().count()).sum();
            println!("{:<8} {function_type:<39} {size:>6} {frame:>6} {calls:>13} {words:>17}", source.name);
        }
    }
}

/// Prints what all tasks came to; true if nothing differed and every stack has become as large as it
/// should.
fn print_tallies(tallies: &[Tally]) -> bool {
    println!("program  coroutines   resumes  growths at 64 KiB       words  equal  unequal");
    for (source, tally) in SOURCES.iter().zip(tallies) {
        tally.print(source.name);
    }
    let all = tallies.iter().fold(Tally::default(), Tally::add);
    all.print("all");
    println!("\nof all growths {} moved the stack, {} were in place", totals().moves, totals().in_place);
    all.unequal == 0 && all.grown == all.coroutines
}

/// A random generator: SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Below `limit`, which is not 0.
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
