//! Compiled code on stacks that move, without a guess: 10,000 coroutines of a small language with pointers to
//! locals.
//!
//! ```text
//! cargo run --release --features cranelift --example jit -- [--count COROUTINES] [--seed SEED]
//! ```
//!
//! The programs in `programs/` are compiled by Cranelift and run on relocating coroutines under
//! `Maps::Precise`, with no frame of Rust code below theirs (`Builder::spawn_raw`), resumed in random order.
//! Each recurses, at its own time, until its stack of 2 KiB has become one of 64 KiB, writes to the locals of
//! older frames through pointers, and looks at them again on its way back. Each value it yields, and its
//! result, must be what an interpreter of the same language says.
//!
//! The exit status is 1 if anything differs, if a coroutine did not come to its 64 KiB by moving, or if a word
//! was ambiguous. These are the words of frames, as `regrow::totals().words_by_map` counts them. The registers
//! of the function that is interrupted are not among them: no compiler's map describes registers within a
//! prologue, so they are judged by their value.
//!
//! [`syntax`]: the language; [`interpreter`]: what it means; [`compiler`]: how pointers are kept where
//! stack maps find them; [`module`]: executable memory, and all that is known about its frames.

mod compiler;
mod interpreter;
mod module;
mod syntax;

use std::error::Error;
use std::ffi::c_void;
use std::fmt::Display;
use std::num::NonZero;
use std::ops::{AddAssign, RangeInclusive};
use std::process::ExitCode;
use std::ptr;
use std::thread;
use std::time::Instant;

use interpreter::{Limits, Trap};
use module::Module;
use regrow::{Builder, Coroutine, CoroutineResult, Maps, Totals, WordsByMap, Yielder, not_moved, totals};
use syntax::Program;

/// A program, and how deep it must recurse for its stack to need between 32 and 64 KiB, with ten levels to
/// spare at either end: where a stack begins in its slot differs by up to 1.5 KiB.
struct Source {
    name: &'static str,
    text: &'static str,
    depths: RangeInclusive<i64>,
}

const SOURCES: [Source; 5] = [
    Source { name: "witness", text: include_str!("programs/witness.jit"), depths: 330..=500 },
    Source { name: "record", text: include_str!("programs/record.jit"), depths: 350..=540 },
    Source { name: "ladder", text: include_str!("programs/ladder.jit"), depths: 260..=400 },
    Source { name: "sorting", text: include_str!("programs/sorting.jit"), depths: 310..=480 },
    Source { name: "tree", text: include_str!("programs/tree.jit"), depths: 390..=570 },
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
    let tallies = interleave(&modules, &tasks, traces, &mut random)?;
    println!("ran compiled in {:.1} s, seed {}\n", start.elapsed().as_secs_f64(), options.seed);
    Ok(print_tallies(&tallies))
}

/// What compiled code calls for `yield`.
///
/// # Safety
/// `context` is the yielder of the running coroutine.
unsafe extern "C" fn suspend(context: *const c_void, value: i64) -> i64 {
    // SAFETY: by the caller's word. The yielder is on the stack that may move; compiled code keeps its
    // address where it is rewritten, and while we run the stack stays where it is.
    unsafe { &*context.cast::<Yielder<usize, usize>>() }.suspend(value as usize) as i64
}

/// What one coroutine has to do.
struct Task {
    program: usize,
    /// Depth and seed.
    arguments: [i64; 2],
}

impl Task {
    fn random(number: usize, random: &mut Random) -> Self {
        let program = number % SOURCES.len();
        let depths = &SOURCES[program].depths;
        let spread = (depths.end() - depths.start() + 1) as usize;
        let depth = depths.start() + random.below(spread) as i64;
        Self { program, arguments: [depth, (random.next() >> 32) as i64] }
    }

    /// What it is resumed with after its yield number `turn`.
    fn answer(&self, turn: usize, yielded: i64) -> i64 {
        let mix = self.arguments[1] ^ yielded.rotate_left(32) ^ turn as i64;
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
        let result = interpreter::run(program, task.arguments, LIMITS, |value| {
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
    coroutine: Coroutine<usize, usize, usize>,
    expected: Trace,
    turn: usize,
    input: usize,
    /// It has grown to [`SIZE`] by moving.
    grown: bool,
}

/// What a turn of a task came to.
enum Turn {
    Continues,
    Equal,
    Unequal(String),
}

impl<'t> Running<'t> {
    fn new(task: &'t Task, module: &Module, expected: Trace) -> Result<Self, regrow::Error> {
        // SAFETY: compiled code keeps pointers to its stack in its frames and in registers only, as words.
        let builder = unsafe { Builder::new().relocating() };
        // Had it learned how much stack these programs come to need, it would start them with that, and
        // nothing would grow.
        let builder = builder.maps(Maps::Precise).learn(false);
        // SAFETY: compiled code does not unwind, nor does what it calls, and nothing refers to its frames. The
        // module outlives the coroutine, and its `yield` function takes a yielder.
        let coroutine = unsafe { builder.spawn_raw(module.raw_entry())? };
        // The first resume brings the address of the arguments.
        let input = ptr::from_ref(&task.arguments) as usize;
        Ok(Self { task, coroutine, expected, turn: 0, input, grown: false })
    }

    fn turn(&mut self) -> Turn {
        let expected = self.expected.yields.get(self.turn);
        let result = self.coroutine.resume(self.input);
        // Each program yields at its deepest, or on its way back from there.
        let last = self.coroutine.stats().last;
        self.grown |= last.is_some_and(|last| last.to == SIZE && last.bytes > 0);
        match result {
            CoroutineResult::Yield(value) if expected == Some(&(value as i64)) => {
                self.turn += 1;
                self.input = self.task.answer(self.turn, value as i64) as usize;
                Turn::Continues
            }
            CoroutineResult::Return(value) if expected.is_none() && value as i64 == self.expected.result => {
                Turn::Equal
            }
            other => {
                let result = self.expected.result;
                Turn::Unequal(format!("{other:?}, not {expected:?} or the result {result}"))
            }
        }
    }
}

/// Resumes all tasks in random order until all have ended.
fn interleave(
    modules: &[Module],
    tasks: &[Task],
    traces: Vec<Trace>,
    random: &mut Random,
) -> Result<Vec<Tally>, regrow::Error> {
    let mut tallies: Vec<_> = modules.iter().map(|_| Tally::default()).collect();
    let start = |(task, trace): (_, _)| Running::new(task, &modules[task.program], trace);
    let mut running: Vec<_> = tasks.iter().zip(traces).map(start).collect::<Result<_, _>>()?;
    while !running.is_empty() {
        let next = random.below(running.len());
        let one = &mut running[next];
        let before = totals(); // of this process, in which nothing else runs
        let turn = one.turn();
        tallies[one.task.program] += Tally::of(&turn, one.grown, &before, &totals());
        if let Turn::Unequal(difference) = &turn {
            let Task { program, arguments: [depth, seed] } = *one.task;
            eprintln!("{}({depth}, {seed}), turn {}: {difference}", SOURCES[program].name, one.turn);
        }
        if !matches!(turn, Turn::Continues) {
            running.swap_remove(next);
        }
    }
    Ok(tallies)
}

/// What the columns of the last table are called.
const COLUMNS: [&str; 11] = [
    "coroutines",
    "resumes",
    "moves",
    "in place",
    "at 64 KiB",
    "pointers",
    "elsewhere",
    "data",
    "ambiguous",
    "equal",
    "unequal",
];

/// What the tasks of one program came to.
#[derive(Clone, Copy, Default)]
struct Tally {
    /// That have ended.
    coroutines: u64,
    resumes: u64,
    /// Growths by moving.
    moves: u64,
    /// Growths in place.
    in_place: u64,
    /// Coroutines that came to [`SIZE`] by moving.
    grown: u64,
    /// Words of moved frames.
    words: WordsByMap,
    equal: u64,
    unequal: u64,
}

impl Tally {
    /// Of one turn, between two readings of the counters.
    fn of(turn: &Turn, grown: bool, before: &Totals, after: &Totals) -> Self {
        let has_ended = !matches!(turn, Turn::Continues);
        let (from, mut words) = (before.words_by_map, after.words_by_map);
        words.pointers -= from.pointers;
        words.elsewhere -= from.elsewhere;
        words.data -= from.data;
        words.ambiguous -= from.ambiguous;
        Self {
            coroutines: has_ended.into(),
            resumes: 1,
            moves: after.moves - before.moves,
            in_place: after.in_place - before.in_place,
            grown: (has_ended && grown).into(),
            words,
            equal: matches!(turn, Turn::Equal).into(),
            unequal: matches!(turn, Turn::Unequal(_)).into(),
        }
    }

    fn columns(&self) -> [u64; COLUMNS.len()] {
        let Self { coroutines, resumes, moves, in_place, grown, words, equal, unequal } = *self;
        let WordsByMap { pointers, elsewhere, data, ambiguous, .. } = words;
        [coroutines, resumes, moves, in_place, grown, pointers, elsewhere, data, ambiguous, equal, unequal]
    }

    /// Nothing differed, no word was a guess, and every stack moved until it was as large as it should be.
    fn is_right(&self) -> bool {
        self.unequal == 0 && self.words.ambiguous == 0 && self.grown == self.coroutines
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.coroutines += other.coroutines;
        self.resumes += other.resumes;
        self.moves += other.moves;
        self.in_place += other.in_place;
        self.grown += other.grown;
        self.words.pointers += other.words.pointers;
        self.words.elsewhere += other.words.elsewhere;
        self.words.data += other.words.data;
        self.words.ambiguous += other.words.ambiguous;
        self.equal += other.equal;
        self.unequal += other.unequal;
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
            let (size, frame, maps) = (function.size(), function.frame(), function.stack_maps());
            let words: usize = maps.iter().map(|(_, _, map)| map.entries().count()).sum();
            let calls = maps.len();
            println!("{:<8} {function_type:<39} {size:>6} {frame:>6} {calls:>13} {words:>17}", source.name);
        }
    }
}

/// Prints what all tasks came to; true if that is right.
fn print_tallies(tallies: &[Tally]) -> bool {
    let mut all = Tally::default();
    tallies.iter().for_each(|tally| all += *tally);
    println!("{:63} {:-^43}", "", " words of moved frames ");
    print_row("program", &COLUMNS);
    for (source, tally) in SOURCES.iter().zip(tallies) {
        print_row(source.name, &tally.columns());
    }
    print_row("all", &all.columns());
    println!("\nnot moved, by reason");
    for (reason, count) in not_moved() {
        println!("  {:<15} {count:>9}", format!("{reason:?}"));
    }
    all.is_right()
}

fn print_row(name: &str, columns: &[impl Display; COLUMNS.len()]) {
    print!("{name:<8}");
    columns.iter().for_each(|column| print!(" {column:>10}"));
    println!();
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
