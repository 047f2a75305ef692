//! Moves the stack of real code wherever it may be moved, and compares its output with a plain thread's.
//!
//! `cargo run --release --features torture --example torture -- [workload] [--mode M] [--seed N] [--steps N]
//! [--list] [--json] [--price]`; `--help` explains.

mod price;
mod workloads;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use regrow::torture::{Finding, Mode, Report, Torture, UnknownMode};
use serde_json::{Value, json};

use workloads::{Expected, Workload};

const HELP: &str = "\
torture [workload ...]   all of them unless named
  --mode M      growth-points (the default), breakpoints, every-N, random-N, overflows, or all
  --seed N      for random-N; 0 unless given
  --steps N     step through at most so many instructions of each, then let it go on; 2000000 unless given
  --list        list the workloads, a name a line
  --json        print an object for each run instead of a table
  --price       measure what a step and a move cost, beside the bare trap

Exit status: 1 if a workload that was named is not clean; if none was named, 1 if any verdict is not the one
expected (some are there because they cannot be clean).";

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let options = Options::from_arguments()?;
    if options.list {
        workloads::all().iter().for_each(|workload| println!("{}", workload.name));
        return Ok(ExitCode::SUCCESS);
    }
    if options.price {
        price::measure();
        return Ok(ExitCode::SUCCESS);
    }
    workloads::quiet_panics();
    let chosen = options.chosen()?;
    let bar = progress_bar(chosen.len() * options.modes.len());
    let mut runs = Vec::new();
    for workload in chosen {
        let expected = workload.on_a_plain_thread();
        for &mode in &options.modes {
            bar.set_message(format!("{} at {mode}", workload.name));
            let run = Run::new(workload, mode, &options, &expected);
            if options.json {
                println!("{}", run.json());
            }
            runs.push(run);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    if !options.json {
        print_table(&runs);
    }
    let named = !options.names.is_empty();
    let good = runs.iter().all(|run| if named { run.is_clean() } else { run.is_as_expected() });
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// One workload in one mode.
struct Run {
    workload: Workload,
    report: Report,
    same_output: bool,
    time: Duration,
}

impl Run {
    fn new(workload: Workload, mode: Mode, options: &Options, expected: &str) -> Self {
        let torture = Torture::new(mode).seed(options.seed).limit(options.steps);
        let start = Instant::now();
        // SAFETY: this is what the program is for; outputs are compared, findings are reported.
        let (value, report) = unsafe { torture.run(workload.run) };
        Self { workload, report, same_output: value.as_deref() == Some(expected), time: start.elapsed() }
    }

    fn is_clean(&self) -> bool {
        self.report.is_clean() && self.same_output
    }

    /// One that cannot be clean may be so in a mode that moves its stack at no wrong moment.
    fn is_as_expected(&self) -> bool {
        match (self.workload.expected, self.report.findings.first()) {
            (_, None) => self.same_output,
            (Expected::Clean, Some(_)) => false,
            (Expected::Culprit(name), Some(finding)) => names(finding, name),
        }
    }

    fn json(&self) -> Value {
        let stale = |finding: &Finding| {
            json!({
                "kind": format!("{:?}", finding.kind),
                "function": finding.function,
                "instruction": finding.instruction,
                "pc": finding.pc,
                "file": finding.file,
                "line": finding.line,
                "register": finding.register,
                "below_top": finding.below_top,
                "points_into": finding.points_into,
                "on_another_thread": finding.on_another_thread,
            })
        };
        json!({
            "workload": self.workload.name,
            "mode": self.report.mode.to_string(),
            "steps": self.report.steps,
            "moves": self.report.moves,
            "growths": self.report.growths,
            "stale": self.report.findings.iter().map(stale).collect::<Vec<_>>(),
            "same_output": self.same_output,
            "clean": self.is_clean(),
        })
    }

    fn verdict(&self) -> String {
        match self.report.findings.first() {
            Some(finding) => format!("stale: {}", finding.function),
            None if self.same_output => "clean".to_string(),
            None => "the output differs".to_string(),
        }
    }
}

/// Whether a finding is about a function with `name` in its name, or called by one.
fn names(finding: &Finding, name: &str) -> bool {
    let functions = finding.backtrace.iter().chain([&finding.function]).chain(&finding.points_into);
    functions.into_iter().any(|function| function.contains(name))
}

fn print_table(runs: &[Run]) {
    println!("| workload | mode | steps | moves | growths | time | verdict |");
    println!("| --- | --- | ---: | ---: | ---: | ---: | --- |");
    for run in runs {
        let Report { mode, steps, moves, growths, .. } = &run.report;
        let (name, verdict, time) = (run.workload.name, run.verdict(), run.time.as_millis());
        println!("| {name} | {mode} | {steps} | {moves} | {growths} | {time} ms | {verdict} |");
    }
    for run in runs.iter().filter(|run| !run.report.is_clean()) {
        println!("\n{}: {}", run.workload.name, run.report);
    }
}

fn progress_bar(runs: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}").expect("a valid template");
    ProgressBar::new(runs as u64).with_style(style)
}

struct Options {
    names: Vec<String>,
    modes: Vec<Mode>,
    seed: u64,
    steps: u64,
    list: bool,
    json: bool,
    price: bool,
}

impl Options {
    fn from_arguments() -> Result<Self, lexopt::Error> {
        use lexopt::prelude::*;
        let mut options = Self {
            names: Vec::new(),
            modes: vec![Mode::GrowthPoints],
            seed: 0,
            steps: 2_000_000,
            list: false,
            json: false,
            price: false,
        };
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("mode") => options.modes = parser.value()?.parse_with(modes)?,
                Long("seed") => options.seed = parser.value()?.parse()?,
                Long("steps") => options.steps = parser.value()?.parse()?,
                Long("list") => options.list = true,
                Long("json") => options.json = true,
                Long("price") => options.price = true,
                Long("help") => {
                    println!("{HELP}");
                    std::process::exit(0);
                }
                Value(name) => options.names.push(name.string()?),
                _ => return Err(argument.unexpected()),
            }
        }
        Ok(options)
    }

    fn chosen(&self) -> Result<Vec<Workload>, String> {
        let all = workloads::all();
        if self.names.is_empty() {
            return Ok(all);
        }
        let find = |name: &String| {
            let found = all.iter().find(|workload| workload.name == *name);
            found.copied().ok_or_else(|| format!("no workload is called {name}: --list lists them"))
        };
        self.names.iter().map(find).collect()
    }
}

/// One mode, as [`Mode`] writes itself, or all.
fn modes(text: &str) -> Result<Vec<Mode>, UnknownMode> {
    if text == "all" {
        return Ok(vec![
            Mode::GrowthPoints,
            Mode::Breakpoints,
            Mode::Every(1),
            Mode::Random(10),
            Mode::Overflows,
        ]);
    }
    Ok(vec![text.parse()?])
}
