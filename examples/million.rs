//! A million parked coroutines, and what each costs.
//!
//! ```text
//! cargo run --release --example million -- [--count N] [--frozen] [--in-place] [--depth D] [--json]
//!                                          [--spike BYTES [--shrink default|eager|by-hand]]
//! ```
//!
//! Each is run to its first suspend with a few live locals, `--depth` calls down, and parked; with `--frozen` it is frozen
//! there. Then all are resumed once, in random order, and what they answer is checked. When `go` is on the path, the
//! program in benches/peers/go/million does the same with goroutines.
//!
//! With `--spike` each first uses so many bytes of stack once and parks again, and then gives the memory back: with
//! `--frozen` it is frozen again; with `--shrink by-hand` it is told to shrink; else all are resumed, to no purpose,
//! until their policy has made them small.

use std::collections::BTreeMap;
use std::error::Error;
use std::hint::black_box;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use regrow::{Builder, Coroutine, Shrink, Yielder};

type Parked = Coroutine<u64, u64, u64>;

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::from_arguments()?;
    let before = Memory::now()?;
    let mut handles: Vec<Parked> = Vec::with_capacity(options.count);
    let builder = options.builder();

    let (spawn, freeze) = park(&options, &builder, &mut handles)?;
    let after = Memory::now()?;
    let spike = if options.spike == 0 { None } else { Some(spike(&options, &mut handles, &after)?) };
    let sizes = histogram(&handles);
    let resume = resume_all(&options, &mut handles)?;

    let each = |bytes: usize, base: usize| bytes.saturating_sub(base) as f64 / options.count as f64;
    let nanoseconds = |time: Duration| time.as_nanos() as f64 / options.count as f64;
    let mut figures = serde_json::json!({
        "count": options.count,
        "rss_bytes_each": each(after.resident, before.resident),
        "page_table_bytes_each": each(after.page_tables, before.page_tables),
        "mappings": after.mappings.saturating_sub(before.mappings),
        "spawn_ns_each": nanoseconds(spawn),
        "freeze_ns_each": nanoseconds(freeze),
        "resume_ns_each": nanoseconds(resume),
    });
    if let Some(Spike { peak, rest, quiet }) = spike {
        figures["spike_bytes"] = options.spike.into();
        figures["spike_rss_bytes_each"] = each(peak.resident, before.resident).into();
        figures["spike_page_table_bytes_each"] = each(peak.page_tables, before.page_tables).into();
        figures["quiet_resumes"] = quiet.into();
        figures["later_rss_bytes_each"] = each(rest.resident, before.resident).into();
        figures["later_page_table_bytes_each"] = each(rest.page_tables, before.page_tables).into();
        figures["later_rss_by_first"] = (rest.resident as f64 / after.resident as f64).into();
    }
    if options.json {
        println!("{figures}");
    } else {
        print(&options, &figures, goroutines(&options).as_ref(), &sizes);
    }
    // The process ends here: unwinding a million stacks would take longer than all of the above.
    std::mem::forget(handles);
    Ok(())
}

/// Spawns them all, runs each to its first suspend, and freezes it if that is wanted.
fn park(
    options: &Options,
    builder: &Builder,
    handles: &mut Vec<Parked>,
) -> Result<(Duration, Duration), Box<dyn Error>> {
    const CHUNK: usize = 1 << 12;
    let bar = options.bar("parking");
    let (mut spawn, mut freeze) = (Duration::ZERO, Duration::ZERO);
    while handles.len() < options.count {
        // In chunks that fit into a thread's stock of slots: those frozen in one are used again by the next.
        let first = handles.len();
        let end = options.count.min(first + if options.frozen { CHUNK / 4 } else { CHUNK });
        let start = Instant::now();
        for number in first..end {
            let (depth, spike) = (options.depth, options.spike);
            let mut coroutine = if spike == 0 {
                builder.try_spawn(move |yielder: &Yielder<u64, u64>, seed| parked_at(yielder, depth, seed))?
            } else {
                builder.try_spawn(move |yielder: &Yielder<u64, u64>, seed| spiking(yielder, spike, seed))?
            };
            let answer = coroutine.resume(number as u64).yielded();
            assert_eq!(answer, Some(number as u64 + 1));
            handles.push(coroutine);
        }
        spawn += start.elapsed();
        if options.frozen {
            let start = Instant::now();
            for coroutine in &mut handles[first..] {
                if !coroutine.freeze()? {
                    return Err(format!("not frozen: {:?}", coroutine.last_not_moved()).into());
                }
            }
            freeze += start.elapsed();
        }
        bar.set_position(handles.len() as u64);
    }
    bar.finish_and_clear();
    Ok((spawn, freeze))
}

/// Parks `depth` calls down with a few live locals; answers the second time with a sum over them.
fn parked_at(yielder: &Yielder<u64, u64>, depth: u32, seed: u64) -> u64 {
    if depth > 0 {
        return deeper(yielder, depth, seed);
    }
    let locals = black_box([seed, seed ^ 1, seed ^ 2]);
    let second = yielder.suspend(seed + 1);
    second + locals.iter().sum::<u64>()
}

#[inline(never)]
fn deeper(yielder: &Yielder<u64, u64>, depth: u32, seed: u64) -> u64 {
    let local = black_box(seed);
    parked_at(yielder, depth - 1, seed) + local - seed
}

/// What a spiking coroutine is resumed with, other than for good.
const SPIKE: u64 = u64::MAX;
const QUIET: u64 = u64::MAX - 1;

/// As [`parked_at`], where a [`SPIKE`] lets it use so many bytes of stack.
fn spiking(yielder: &Yielder<u64, u64>, bytes: usize, seed: u64) -> u64 {
    let locals = black_box([seed, seed ^ 1, seed ^ 2]);
    loop {
        match yielder.suspend(seed + 1) {
            SPIKE => _ = black_box(touch((&raw const locals) as usize, bytes)),
            QUIET => {}
            second => return second + locals.iter().sum::<u64>(),
        }
    }
}

/// Takes `bytes` of stack below `top`, a frame of some 200 bytes at a time, all of them written.
#[inline(never)]
fn touch(top: usize, bytes: usize) -> usize {
    let frame = black_box([top; 20]);
    let here = (&raw const frame) as usize;
    // `top` is a number that moves with the stack, as any pointer to it.
    let deeper = if top - here < bytes { touch(top, bytes) } else { 0 };
    deeper + black_box(&frame)[7] % 2
}

/// The memory taken when all have used much stack, and when they have given it back.
struct Spike {
    peak: Memory,
    rest: Memory,
    /// Resumes of each in between.
    quiet: u32,
}

fn spike(options: &Options, handles: &mut [Parked], before: &Memory) -> Result<Spike, Box<dyn Error>> {
    /// More quiet resumes than any policy asks for.
    const MOST: u32 = 100;
    resume_each(handles, SPIKE);
    let peak = Memory::now()?;
    let mut quiet = 0;
    if options.frozen {
        handles.iter_mut().try_for_each(|coroutine| coroutine.freeze().map(drop))?;
    } else if options.shrink == Shrink::Off {
        handles.iter_mut().try_for_each(|coroutine| coroutine.shrink().map(drop))?;
    } else {
        while quiet < MOST && Memory::now()?.resident > before.resident + before.resident / 10 {
            resume_each(handles, QUIET);
            quiet += 1;
        }
    }
    Ok(Spike { peak, rest: Memory::now()?, quiet })
}

fn resume_each(handles: &mut [Parked], order: u64) {
    for (number, coroutine) in handles.iter_mut().enumerate() {
        assert_eq!(coroutine.resume(order).yielded(), Some(number as u64 + 1));
    }
}

fn resume_all(options: &Options, handles: &mut [Parked]) -> Result<Duration, Box<dyn Error>> {
    let bar = options.bar("resuming");
    let mut order: Vec<u32> = (0..handles.len() as u32).collect();
    let mut random = fastrand::Rng::with_seed(options.seed);
    random.shuffle(&mut order);
    let mut time = Duration::ZERO;
    for chunk in order.chunks(1 << 12) {
        let start = Instant::now();
        for &number in chunk {
            let seed = u64::from(number);
            let answer = handles[number as usize].resume(5).returned();
            if answer != Some(5 + seed + (seed ^ 1) + (seed ^ 2)) {
                return Err(format!("coroutine {number} answered {answer:?}").into());
            }
        }
        time += start.elapsed();
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    Ok(time)
}

/// How many take how many bytes of stack or block.
fn histogram(handles: &[Parked]) -> BTreeMap<usize, usize> {
    let mut sizes = BTreeMap::new();
    for coroutine in handles {
        *sizes.entry(coroutine.bytes()).or_default() += 1;
    }
    sizes
}

/// The same figures of goroutines, when `go` is on the path. At most a million: they take 3 KB each.
fn goroutines(options: &Options) -> Option<serde_json::Value> {
    let mut go = Command::new("go");
    go.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/peers/go/million")).args(["run", "."]);
    go.arg(format!("--count={}", options.count.min(1_000_000))).arg(format!("--depth={}", options.depth));
    let output = go.stderr(Stdio::inherit()).output().ok()?;
    serde_json::from_slice(&output.stdout).ok()
}

fn print(
    options: &Options,
    figures: &serde_json::Value,
    go: Option<&serde_json::Value>,
    sizes: &BTreeMap<usize, usize>,
) {
    let growing = if options.in_place { "in place" } else { "by moving" };
    let frozen = if options.frozen { "frozen, " } else { "" };
    println!("{} coroutines, growing {growing}, {frozen}parked {} calls down", options.count, options.depth);
    if go.is_some() {
        println!("  {:<28} {:>12} {:>12}", "", "coroutines", "goroutines");
    }
    let cell = |value: Option<&serde_json::Value>| {
        let number = value.and_then(serde_json::Value::as_f64);
        number.map_or(String::new(), |number| {
            if number < 10.0 { format!("{number:.3}") } else { format!("{number:.1}") }
        })
    };
    for (key, value) in figures.as_object().into_iter().flatten() {
        println!("  {key:<28} {:>12} {:>12}", cell(Some(value)), cell(go.and_then(|go| go.get(key))));
    }
    println!("  bytes of stack or block, how many:");
    let most = sizes.values().copied().max().unwrap_or(1);
    for (bytes, count) in sizes {
        println!("  {bytes:>8} {count:>10} {}", "#".repeat((count * 40).div_ceil(most)));
    }
}

/// What the kernel says of this process.
struct Memory {
    resident: usize,
    page_tables: usize,
    mappings: usize,
}

impl Memory {
    fn now() -> Result<Self, Box<dyn Error>> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let kib = |name: &str| -> Result<usize, Box<dyn Error>> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()).ok_or("no such line")?;
            Ok(number.parse::<usize>()? << 10)
        };
        let mappings = std::fs::read_to_string("/proc/self/maps")?.lines().count();
        Ok(Self { resident: kib("VmRSS:")?, page_tables: kib("VmPTE:")?, mappings })
    }
}

struct Options {
    count: usize,
    depth: u32,
    seed: u64,
    frozen: bool,
    in_place: bool,
    json: bool,
    spike: usize,
    shrink: Shrink,
}

impl Options {
    fn from_arguments() -> Result<Self, lexopt::Error> {
        use lexopt::prelude::*;
        let mut options = Self {
            count: 1_000_000,
            depth: 0,
            seed: 1,
            frozen: false,
            in_place: false,
            json: false,
            spike: 0,
            shrink: Shrink::Default,
        };
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("count") => options.count = arguments.value()?.parse()?,
                Long("depth") => options.depth = arguments.value()?.parse()?,
                Long("seed") => options.seed = arguments.value()?.parse()?,
                Long("frozen") => options.frozen = true,
                Long("in-place") => options.in_place = true,
                Long("json") => options.json = true,
                Long("spike") => options.spike = arguments.value()?.parse()?,
                Long("shrink") => options.shrink = arguments.value()?.parse_with(policy)?,
                other => return Err(other.unexpected()),
            }
        }
        if options.spike != 0 && options.depth != 0 {
            return Err("--spike and --depth: one of them".into());
        }
        Ok(options)
    }

    fn builder(&self) -> Builder {
        let builder = Builder::new().shrink(self.shrink);
        // SAFETY: the coroutines of this example keep nothing outside their stacks.
        if self.in_place { builder } else { unsafe { builder.relocating() } }
    }

    fn bar(&self, what: &'static str) -> ProgressBar {
        if self.json {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template("{msg:>9} {bar:40} {pos}/{len} {eta}");
        let bar = ProgressBar::new(self.count as u64).with_message(what);
        style.map_or(bar.clone(), |style| bar.with_style(style))
    }
}

/// What `--shrink` asks for.
fn policy(name: &str) -> Result<Shrink, &'static str> {
    match name {
        "default" => Ok(Shrink::Default),
        "eager" => Ok(Shrink::Eager),
        "by-hand" => Ok(Shrink::Off),
        _ => Err("default, eager or by-hand"),
    }
}
