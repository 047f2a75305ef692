//! What the integration tests share: both ways of growing, functions that use stack, child processes.
//!
//! With the feature `torture`, `REGROW_TORTURE=random-50 cargo test --features torture --test growth` puts each closure that
//! [`run`] is to run on a stack that moves under torture, in that mode (as `torture::Mode` is displayed), and asserts that the
//! report is clean.
#![allow(dead_code, unused_imports, unused_macros, reason = "each test binary uses its own part of this")]

use std::cell::Cell;
use std::fmt;
use std::hint::black_box;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use regrow::{Builder, Stats, Yielder, current_stats};

/// A builder of coroutines whose stacks move.
pub fn relocating() -> Builder {
    // SAFETY: the tests keep no pointer into a coroutine's stack outside it, but for those that are about just
    // this: they do it in a child process, which ends at the first use of such a pointer.
    unsafe { Builder::new().learn(false).relocating() }
}

/// A way of growing. Its name, "moving" or "in place", is a variant of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Moving,
    InPlace,
}

impl Way {
    pub const BOTH: [Self; 2] = [Self::Moving, Self::InPlace];

    /// The way that this is the name of.
    pub fn named(name: &str) -> Self {
        Self::BOTH.into_iter().find(|way| way.to_string() == name).expect("a way of growing")
    }

    /// A builder of coroutines that grow so.
    pub fn builder(self) -> Builder {
        match self {
            Self::Moving => relocating(),
            Self::InPlace => Builder::new().learn(false),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Moving => "moving",
            Self::InPlace => "in place",
        })
    }
}

/// A builder for each [`Way`], in their order, of coroutines that may grow far.
pub fn builders() -> [Builder; 2] {
    [Way::Moving.builder(), Way::InPlace.builder().maximum(64 << 20)]
}

/// Checks a property of coroutines for each way of growing: with each of the [`builders`]. Says for which one it failed.
pub fn both_ways(mut holds: impl FnMut(Builder)) {
    for (way, builder) in Way::BOTH.into_iter().zip(builders()) {
        let _says = OnDrop(|| {
            if std::thread::panicking() {
                eprintln!("with a stack that grows: {way}");
            }
        });
        holds(builder);
    }
}

/// Whether guards are markers in the page table here, without a mapping each; says so if they are not.
pub fn by_markers() -> bool {
    const MADV_GUARD_INSTALL: i32 = 102;
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let asked_not_to = std::env::var_os("REGROW_GUARD").is_some_and(|value| value == "protect");
        let (access, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: a new mapping that replaces nothing and that nobody else knows of.
        let works = unsafe {
            let page = libc::mmap(std::ptr::null_mut(), 4096, access, flags, -1, 0);
            page != libc::MAP_FAILED && libc::madvise(page, 4096, MADV_GUARD_INSTALL) == 0
        };
        if asked_not_to || !works {
            println!("skipped: it takes guard markers (Linux 6.13, and REGROW_GUARD not set)");
        }
        works && !asked_not_to
    })
}

/// Runs `f` in a coroutine of its own, to its end; one that moves under torture, if that is asked for.
pub fn run<R: 'static>(builder: &Builder, f: impl FnOnce() -> R + 'static) -> R {
    #[cfg(feature = "torture")]
    if let Some(torture) = torture_of(builder) {
        // SAFETY: a test. What it finds is looked at before the value.
        let (value, report) = unsafe { torture.run(f) };
        assert!(report.is_clean(), "{report}");
        return value.expect("a closure without a finding comes to its end");
    }
    let mut coroutine = builder.spawn(move |_: &Yielder<(), ()>, ()| f());
    coroutine.resume(()).returned().expect("it never suspends")
}

/// The torture that `REGROW_TORTURE` asks for, if this builder makes what is tortured: coroutines that move and have no limits
/// of their own. Not for a coroutine within another: that one is tortured already.
#[cfg(feature = "torture")]
fn torture_of(builder: &Builder) -> Option<regrow::torture::Torture> {
    /// What takes more goes on without torture.
    const STEPS: u64 = 20_000;
    let mode = std::env::var("REGROW_TORTURE").ok()?;
    let mode = mode.parse().unwrap_or_else(|error| panic!("REGROW_TORTURE: {error}"));
    let same = format!("{builder:?}") == format!("{:?}", relocating());
    (same && current_stats().is_none()).then(|| regrow::torture::Torture::new(mode).limit(STEPS))
}

/// How far the running coroutine has grown: how often, if it moves; if it grows in place, by how many pages.
pub fn growths() -> u64 {
    grown(&current_stats().expect("called in a coroutine"))
}

/// The same of a coroutine with these counters. Of one that moves, and has not grown, they must not be the first.
pub fn grown(stats: &Stats) -> u64 {
    let in_place = stats.last.is_none() && stats.size.is_multiple_of(4096);
    if in_place { stats.highest as u64 / 4096 - 1 } else { stats.growths }
}

/// Calls `f` from `steps` small frames further down.
#[inline(never)]
pub fn below(steps: usize, f: &mut dyn FnMut()) {
    let here = black_box([steps; 4]);
    match steps {
        0 => f(),
        _ => below(steps - 1, f),
    }
    assert_eq!(black_box(here), [steps; 4]);
}

/// A builder of coroutines whose stacks grow in place, none of whose memory has been touched before.
pub fn fresh() -> Builder {
    regrow::trim();
    Builder::new().learn(false)
}

/// Runs `f` so many small frames further down, which are about 100 bytes each.
#[inline(never)]
pub fn down<R>(levels: usize, f: &dyn Fn() -> R) -> R {
    let words = black_box([levels; 6]);
    let result = if levels == 0 { f() } else { down(levels - 1, f) };
    assert_eq!(black_box(words), [levels; 6]);
    result
}

/// How many levels [`down`]: depths that lie close together over three pages, and far apart over the rest of the window.
pub fn depths() -> impl Iterator<Item = usize> {
    (0..140).chain((140..300).step_by(5))
}

/// A frame of at least `N` bytes, all of them written and read.
#[inline(never)]
pub fn frame<const N: usize>(seed: u8) -> u64 {
    let bytes = black_box([seed; N]);
    let sum = bytes.iter().map(|&byte| u64::from(byte)).sum();
    assert_eq!(sum, u64::from(seed) * N as u64);
    sum
}

/// Calls its function when it is dropped.
pub struct OnDrop<F: FnMut()>(pub F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

thread_local!(static LIVE: Cell<isize> = const { Cell::new(0) });

/// How many [`Counted`] of this thread exist: 0 if each was dropped once.
pub fn live() -> isize {
    LIVE.get()
}

/// A value whose drops are counted.
#[derive(Debug, PartialEq)]
pub struct Counted<T>(pub T);

impl<T> Counted<T> {
    pub fn new(value: T) -> Self {
        LIVE.set(LIVE.get() + 1);
        Self(value)
    }
}

impl<T> Drop for Counted<T> {
    fn drop(&mut self) {
        LIVE.set(LIVE.get() - 1);
    }
}

/// SplitMix64: the next of a sequence of well-mixed numbers.
pub fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

const VARIANT: &str = "REGROW_TEST_CHILD";

/// In a child process: which variant of the test it is to run. `None` in the test proper.
pub fn variant() -> Option<String> {
    let variant = std::env::var(VARIANT).ok()?;
    let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: plain system calls. A child is meant to crash without a core file, and not to hang.
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &no_core);
        libc::alarm(100);
    }
    Some(variant)
}

/// How a child process ended and what it said.
pub struct Outcome {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// True of a child that ran one test, which passed.
    pub fn has_passed(&self) -> bool {
        self.status.success() && self.stdout.contains("test result: ok. 1 passed")
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n--- stdout\n{}\n--- stderr\n{}", self.status, self.stdout, self.stderr)
    }
}

/// Runs a program to its end.
pub fn outcome(command: &mut Command) -> Outcome {
    let output = command.output().unwrap();
    Outcome {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The test around this: a [`Test`], which starts the test again in processes of its own.
macro_rules! this_test {
    () => {{
        fn here() {}
        crate::support::Test::around(here)
    }};
}
pub(crate) use this_test;

/// A test of this binary. Children run it, and nothing else, with [`variant`] set.
///
/// Each method that runs a child to its end fails unless the harness found the test there.
#[derive(Clone, Copy)]
pub struct Test(&'static str);

impl Test {
    /// This function. Its name is the compiler's, so it is right whatever the function is renamed to.
    pub fn of<F>(_test: F) -> Self {
        let path = std::any::type_name::<F>(); // binary::module::test
        Self(path.split_once("::").unwrap().1)
    }

    /// The function that contains `here`, perhaps in closures.
    pub fn around<F>(here: F) -> Self {
        let Self(path) = Self::of(here); // module::test::{{closure}}::here
        Self(path.rsplit_once("::").unwrap().0.trim_end_matches("::{{closure}}"))
    }

    /// The function's own name, without its modules.
    pub fn name(self) -> &'static str {
        self.0.rsplit("::").next().unwrap()
    }

    /// The command that runs a variant of it. Programs that talk with their child start it by this.
    pub fn command(self, variant: impl ToString) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", self.0, "--nocapture", "--test-threads=1"]);
        command.env(VARIANT, variant.to_string()).env_remove("RUST_BACKTRACE");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a variant of it to its end.
    pub fn child(self, variant: impl ToString) -> Outcome {
        self.started(outcome(&mut self.command(variant)))
    }

    /// The same with environment variables.
    pub fn child_with(self, variant: impl ToString, environment: &[(&str, &str)]) -> Outcome {
        self.started(outcome(self.command(variant).envs(environment.iter().copied())))
    }

    /// Lets another program start it: the command becomes that program's last arguments.
    pub fn under(self, program: &mut Command, variant: impl ToString) -> &mut Command {
        let command = self.command(variant);
        program.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => program.env(name, value),
                None => program.env_remove(name),
            };
        }
        program
    }

    /// Runs it in one child, where it passes.
    pub fn passes(self) {
        self.passes_each([""]);
    }

    /// Runs each variant in a child of its own. All pass.
    pub fn passes_each<V: ToString>(self, variants: impl IntoIterator<Item = V>) {
        self.passes_each_with(variants, &[]);
    }

    /// The same with environment variables.
    pub fn passes_each_with<V: ToString>(
        self,
        variants: impl IntoIterator<Item = V>,
        environment: &[(&str, &str)],
    ) {
        for variant in variants {
            let variant = variant.to_string();
            let outcome = self.child_with(&variant, environment);
            assert!(outcome.has_passed(), "{} {variant:?}: {outcome}", self.0);
            let skipped = outcome.stdout.lines().filter(|line| line.starts_with("skipped"));
            skipped.for_each(|line| println!("{line}"));
        }
    }

    fn started(self, outcome: Outcome) -> Outcome {
        let found = outcome.stdout.lines().any(|line| line == "running 1 test");
        assert!(found, "{} is not one test of this binary: {outcome}", self.0);
        outcome
    }
}

/// Lets the kernel answer these system calls with an error from now on.
pub fn refuse(calls: &[libc::c_long], error: i32) {
    let step = |code: u32, jt, k| libc::sock_filter { code: code as u16, jt, jf: 0, k };
    let mut filter = vec![step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for (&call, left) in calls.iter().zip((1..=calls.len() as u8).rev()) {
        filter.push(step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, left, call as u32));
    }
    filter.push(step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW));
    filter.push(step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | error as u32));
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: a filter of this length, read by the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program), 0);
    }
}

/// Sends this thread a signal where the stack has 64 bytes left above `lowest`.
#[inline(never)]
pub fn signalled_at(lowest: usize, signal: i32) {
    // SAFETY: the code uses no stack while `rsp` is elsewhere, and a signal's handler only what is above `lowest`.
    unsafe {
        std::arch::asm!(
            "mov {kept}, rsp",
            "mov rsp, {low}",
            "syscall",
            "mov rsp, {kept}",
            kept = out(reg) _,
            low = in(reg) lowest + 64,
            inlateout("rax") libc::SYS_tgkill => _,
            in("rdi") libc::getpid(),
            in("rsi") libc::gettid(),
            in("rdx") signal,
            out("rcx") _,
            out("r11") _,
        );
    }
}
