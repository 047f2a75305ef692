//! regrow and others, shape by shape, side by side.
//!
//! ```text
//! cargo bench --package regrow-benches --bench side_by_side               # prints the table, writes target/side-by-side.json
//! cargo bench --package regrow-benches --bench side_by_side -- --write    # also this processor's page in docs/benchmarks/
//! cargo bench --package regrow-benches --bench side_by_side -- --only 100,000 --processes 1
//! ```
//!
//! Every shape runs in a few processes of its own, pinned to one processor: where code and stacks happen to lie decides
//! a good part of a nanosecond. In each, the contestants take turns in short rounds.

mod futures;
mod growth;
mod kernel;
mod lives;
mod measure;
mod output;
mod peers;
mod shapes;
mod systems;

use std::path::Path;
use std::process::{Command, Stdio};

use measure::{Contestant, Outcome, Run, contest, in_turn};
use regrow::Maps;
use shapes::Many;
use systems::{Generator, Region, Regrow, Relocating, System, corosensei};

/// Rounds in each process.
const ROUNDS: usize = 15;

/// A loop at the root, at four places in the program.
macro_rules! root_loops { ($value:ty) => {
    four(
        root_loops!($value, shapes::root_loop, [_], Regrow),
        root_loops!($value, shapes::root_loop, [_], corosensei()),
        root_loops!($value, shapes::root_loop, [_], Generator),
        root_loops!($value, futures::root_loop, [],),
    )
}; ($value:ty, $module:ident::$function:ident, [$($system_type:tt)?], $($system:expr)?) => {
    in_turn([
        $module::$function::<$($system_type,)? $value, 0>($($system)?),
        $module::$function::<$($system_type,)? $value, 1>($($system)?),
        $module::$function::<$($system_type,)? $value, 2>($($system)?),
        $module::$function::<$($system_type,)? $value, 3>($($system)?),
    ])
} }

/// A shape's name, and how its contestants are made.
type Shape = (&'static str, fn() -> Vec<Contestant<'static>>);

const SHAPES: [Shape; 29] = [
    ("loop at the root, ()", || with_root(root_loops!(()))),
    ("loop at the root, u64", || with_root(root_loops!(u64))),
    ("loop at the root, 64 bytes", || root_loops!([u64; 8])),
    ("suspend in a fresh callee", || {
        let mut all = four(
            shapes::fresh_callee(Regrow),
            shapes::fresh_callee(corosensei()),
            shapes::fresh_callee(Generator),
            futures::calling(false),
        );
        all.extend(programs("callee", "callee", 0));
        all
    }),
    ("5 calls deep in the coroutine", || {
        four(
            shapes::deep(Regrow, 5, 0),
            shapes::deep(corosensei(), 5, 0),
            shapes::deep(Generator, 5, 0),
            futures::calling(true),
        )
    }),
    ("5 calls deep in the resumer", || {
        three(shapes::deep(Regrow, 0, 5), shapes::deep(corosensei(), 0, 5), shapes::deep(Generator, 0, 5))
    }),
    ("5 calls deep in both", || {
        three(shapes::deep(Regrow, 5, 5), shapes::deep(corosensei(), 5, 5), shapes::deep(Generator, 5, 5))
    }),
    ("a walk over a tree", || {
        three(shapes::tree_walk(Regrow), shapes::tree_walk(corosensei()), shapes::tree_walk(Generator))
    }),
    ("16 suspend sites, 100 coroutines", || {
        per(
            shapes::SITES_COROUTINES,
            four(
                shapes::sites(Regrow),
                shapes::sites(corosensei()),
                shapes::sites(Generator),
                futures::sites(),
            ),
        )
    }),
    ("10,000 in turn", || many(Many { count: 10_000, ..Many::default() })),
    ("10,000 shuffled", || many(Many { count: 10_000, shuffled: true, ..Many::default() })),
    ("10,000 shuffled, prefetched", || {
        many(Many { count: 10_000, shuffled: true, ahead: AHEAD, ..Many::default() })
    }),
    ("100,000 in turn", || many(Many { count: 100_000, ..Many::default() })),
    ("100,000 in turn, prefetched", || many(Many { count: 100_000, ahead: AHEAD, ..Many::default() })),
    ("100,000 shuffled", || many(Many { count: 100_000, shuffled: true, ..Many::default() })),
    ("100,000 shuffled, prefetched", || {
        many(Many { count: 100_000, shuffled: true, ahead: AHEAD, ..Many::default() })
    }),
    ("100,000 shuffled, in a callee", || {
        many(Many { count: 100_000, shuffled: true, in_callee: true, ahead: 0 })
    }),
    ("create, run, finish: stack reused", || {
        let mut all = four(
            lives::regrow_reused(),
            lives::corosensei_reused(),
            lives::generator_reused(),
            futures::created(),
        );
        all.extend(programs("reused", "reused", 0));
        all
    }),
    ("create, run, finish: new stack", || {
        let mut all =
            three(lives::new_stacks(Regrow), lives::new_stacks(corosensei()), lives::new_stacks(Generator));
        all.push(Contestant::new("regrow, relocating", lives::new_stacks(Relocating::new())));
        all.extend(programs("new", "new", lives::NEW));
        per(lives::NEW, all)
    }),
    ("2 to 64 KiB by moving", || {
        let mut all = vec![
            Contestant::new("regrow", growth::moving()),
            Contestant::new("the kernel's share", growth::kernel_moving()),
        ];
        all.extend(plain_stacks());
        all.extend(peers::run("go", "grow", growth::DESCENT as u64).map(|run| Contestant::new("Go", run)));
        all
    }),
    ("2 to 64 KiB in place", || {
        let mut all = vec![Contestant::new("regrow", growth::in_place())];
        all.extend(plain_stacks());
        all
    }),
    ("2 to 64 KiB by moving, memory cold", || cold(growth::moving_cold())),
    ("2 to 64 KiB, slack first, memory cold", || cold(growth::slack_first_cold())),
    ("2 to 64 KiB in place, memory cold", || cold(growth::in_place_cold())),
    ("to 64 KiB at a site that has learned, moving, memory cold", || cold(growth::learned_cold())),
    ("a KiB moved, of 1 MiB", || per(growth::MOVED as u64 >> 10, relocations())),
    ("a KiB moved, of 32 KiB, memory cold", || per(32, relocations_cold(32 << 10))),
    ("a KiB moved, of 1 MiB, memory cold", || per(1024, relocations_cold(1 << 20))),
    ("a frame moved, of 1 MiB", || per(growth::FRAMES, relocations())),
];

/// The shapes in the picture.
const PICTURED: [&str; 6] = [
    "loop at the root, u64",
    "suspend in a fresh callee",
    "16 suspend sites, 100 coroutines",
    "10,000 shuffled",
    "100,000 shuffled",
    "create, run, finish: stack reused",
];

/// How far ahead coroutines are prefetched.
const AHEAD: usize = 16;

fn three(ours: Run<'static>, corosensei: Run<'static>, generator: Run<'static>) -> Vec<Contestant<'static>> {
    vec![
        Contestant::new("regrow", ours),
        Contestant::new("corosensei", corosensei),
        Contestant::new("generator", generator),
    ]
}

fn four(
    ours: Run<'static>,
    corosensei: Run<'static>,
    generator: Run<'static>,
    future: Run<'static>,
) -> Vec<Contestant<'static>> {
    let mut all = three(ours, corosensei, generator);
    all.push(Contestant::new("async", future));
    all
}

fn per(unit: u64, contestants: Vec<Contestant<'static>>) -> Vec<Contestant<'static>> {
    contestants.into_iter().map(|contestant| contestant.unit(unit)).collect()
}

/// The same shape in other programs, where they have it.
fn programs(boost: &'static str, go: &'static str, argument: u64) -> Vec<Contestant<'static>> {
    let named = peers::PROGRAMS.into_iter().zip([boost, go]);
    named
        .filter_map(|((name, program), shape)| {
            Some(Contestant::new(name, peers::run(program, shape, argument)?))
        })
        .collect()
}

fn with_root(mut all: Vec<Contestant<'static>>) -> Vec<Contestant<'static>> {
    all.extend(programs("root", "root", 0));
    all
}

fn many(how: Many) -> Vec<Contestant<'static>> {
    // Prefetching is ours; the others run as ever.
    let plain = Many { ahead: 0, ..how };
    let dense = |coloured| shapes::many(Region::corosensei(how.count, coloured), plain);
    let mut all = vec![Contestant::new("regrow", shapes::many(Regrow, how))];
    if how.ahead != 0 {
        all.push(Contestant::new("regrow, not prefetched", shapes::many(Regrow, plain)));
        all.push(Contestant::new("regrow, relocating", shapes::many(Relocating::new(), how)));
    } else {
        all.push(Contestant::new("regrow, relocating", shapes::many(Relocating::new(), plain)));
    }
    all.push(Contestant::new("corosensei, page-aligned stacks", dense(false)));
    all.push(Contestant::new("corosensei, coloured stacks", dense(true)));
    if how.count <= 10_000 {
        all.push(Contestant::new("corosensei", shapes::many(corosensei(), plain)));
        all.push(Contestant::new("generator", shapes::many(Generator, plain)));
    }
    all.push(Contestant::new("async", futures::many(plain)));
    if how.count <= 10_000 && !how.in_callee {
        let shape = if how.shuffled { "shuffled" } else { "many" };
        let boost = peers::run("boost", shape, how.count as u64);
        all.extend(boost.map(|run| Contestant::new("Boost.Context", run)));
    }
    if !how.shuffled {
        // One operation of it is a pass over all already.
        let go = peers::run("go", "many", how.count as u64);
        all.extend(go.map(|run| Contestant::new("Go", run)));
    }
    per(how.count as u64, all.into_iter().map(Contestant::warm).collect())
}

/// The same recursion on stacks that need not grow.
fn plain_stacks() -> [Contestant<'static>; 2] {
    [
        Contestant::new("a used stack", growth::corosensei(false)),
        Contestant::new("a new stack of 128 KiB", growth::corosensei(true)),
    ]
}

/// Growth where neither stacks nor their memory were used before.
fn cold(ours: Run<'static>) -> Vec<Contestant<'static>> {
    let mut all = vec![
        Contestant::new("regrow", ours),
        Contestant::new("a new stack of 128 KiB, kept", growth::corosensei_cold()),
    ];
    for (name, shape) in [("Go, every stack new", "grow_all_new"), ("Go, the last one new", "grow_cold")] {
        let go = peers::run("go", shape, growth::DESCENT as u64);
        all.extend(go.map(|run| Contestant::new(name, run)));
    }
    all
}

fn relocations() -> Vec<Contestant<'static>> {
    vec![
        Contestant::new("regrow", growth::relocation(Maps::Ambiguous)),
        Contestant::new("regrow, no frame walked", growth::relocation(Maps::Off)),
    ]
}

fn relocations_cold(size: usize) -> Vec<Contestant<'static>> {
    vec![
        Contestant::new("regrow", growth::relocation_cold(size)),
        Contestant::new("copied to new pages", growth::copy_cold(size)),
    ]
}

/// What the command line asks for.
struct Options {
    processes: usize,
    core: usize,
    only: String,
    write: bool,
    /// In a process of a shape's own: which.
    shape: Option<usize>,
}

impl Options {
    fn parse() -> Result<Self, lexopt::Error> {
        use lexopt::prelude::*;
        // The last one: the first has most interrupts to serve.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut options =
            Self { processes: 3, core: cores - 1, only: String::new(), write: false, shape: None };
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("processes") => options.processes = parser.value()?.parse()?,
                Long("core") => options.core = parser.value()?.parse()?,
                Long("only") => options.only = parser.value()?.parse()?,
                Long("write") => options.write = true,
                Long("shape") => options.shape = Some(parser.value()?.parse()?),
                Long("bench") => {} // from cargo
                other => return Err(other.unexpected()),
            }
        }
        Ok(options)
    }
}

fn main() -> Result<(), lexopt::Error> {
    let options = Options::parse()?;
    if let Some(shape) = options.shape {
        run(shape, options.core);
        return Ok(());
    }
    let machine = machine(&options, &peers::compile());
    println!("{machine}\n");
    let mut outcomes = Vec::new();
    for (number, (name, _)) in SHAPES.iter().enumerate() {
        if !name.contains(&options.only) {
            continue;
        }
        let mut outcome = Outcome::default();
        for _ in 0..options.processes {
            outcome.add(in_a_process(number, options.core));
        }
        eprintln!("{name}");
        outcomes.push(outcome);
    }
    let table = output::markdown(&outcomes);
    println!("{table}");
    let json = serde_json::to_string_pretty(&output::json(&outcomes)).expect("numbers and strings");
    std::fs::write(peers::target().join("side-by-side.json"), json)
        .expect("the target directory is writable");
    if options.write {
        write(&machine, &table, &outcomes).expect("docs/ is writable");
    }
    Ok(())
}

/// One process's rounds of a shape.
fn in_a_process(shape: usize, core: usize) -> Outcome {
    let this = std::env::current_exe().expect("the path of this program");
    let arguments = ["--shape".to_owned(), shape.to_string(), "--core".to_owned(), core.to_string()];
    let output =
        Command::new(this).args(arguments).stderr(Stdio::inherit()).output().expect("it can be run again");
    assert!(output.status.success(), "{}: {}", SHAPES[shape].0, output.status);
    serde_json::from_slice(&output.stdout).expect("what `run` prints")
}

/// Runs a shape in this process, and prints its rounds.
fn run(shape: usize, core: usize) {
    pin(core);
    // The fault handler of `generator` knows no other than its own faults: it must be there before ours, which asks it
    // only about what is not ours.
    let mut first = Generator.spawn(|_, _: u64| ());
    Generator::resume(&mut first, 0);
    let (name, contestants) = SHAPES[shape];
    let outcome = contest(name, ROUNDS, contestants());
    println!("{}", serde_json::to_string(&outcome).expect("numbers and strings"));
}

/// Keeps this process, and those it starts, on one processor.
fn pin(core: usize) {
    // SAFETY: plain data for a system call.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set);
    }
}

/// What it all ran on.
fn machine(options: &Options, peers: &[String]) -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let mut parts = vec![
        format!(
            "{} ({}), {cores} processors, pinned to number {}",
            field(&cpuinfo, "model name"),
            generation(&cpuinfo),
            options.core
        ),
        format!("Linux {}", kernel.trim()),
        peers::first_line(&["rustc", "--version"]).unwrap_or_default(),
    ];
    parts.extend_from_slice(peers);
    parts.push(format!("medians of {} processes with {ROUNDS} rounds each", options.processes));
    parts.join("; ")
}

/// What /proc/cpuinfo says of the first processor.
fn field<'a>(cpuinfo: &'a str, name: &str) -> &'a str {
    let line = cpuinfo.lines().find(|line| line.split('\t').next() == Some(name));
    line.and_then(|line| line.split_once(": ")).map_or("?", |(_, value)| value)
}

/// Which generation of processors this is, of those whose results differ.
fn generation(cpuinfo: &str) -> String {
    format!("family {}, model {}", field(cpuinfo, "cpu family"), field(cpuinfo, "model"))
}

/// Writes the table and the picture of this generation of processors, new ones or in place of older ones.
fn write(machine: &str, table: &str, outcomes: &[Outcome]) -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks");
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = generation(&cpuinfo).replace(", ", "-").replace(' ', "-");
    let page = folder.join(name).with_extension("md");
    println!("{} {}", if page.exists() { "replaces" } else { "adds" }, page.display());
    std::fs::write(&page, format!("{machine}\n\n{table}"))?;
    let pictured = outcomes.iter().filter(|outcome| PICTURED.contains(&outcome.shape.as_str()));
    let model = machine.split_inclusive(')').next().unwrap_or_default();
    std::fs::write(page.with_extension("svg"), output::picture(&pictured.collect::<Vec<_>>(), model))
}
