//! Walks from random interrupted instructions, prologues and epilogues among them, equal those of independent walkers.
//!
//! A signal hits a busy thread at no particular instruction. Its handler copies the stack and walks; another walker
//! goes through the copy afterwards.

mod support;
mod walkers;

use std::cell::UnsafeCell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_int, c_void};
use std::hint::{black_box, spin_loop};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use regrow::map::{self, End, Registers};
use regrow::{Coroutine, Yielder};
use support::random;
use walkers::{Framehop, MOST, Step, Walked, interrupted, libgcc, ours};

/// Words of the stack that are copied.
const COPY: usize = 32 << 10;
/// And from how far below rsp: the red zone.
const BELOW: usize = 128;

/// What the handler found out.
struct Sample {
    with_libgcc: bool,
    start: Registers,
    copy: [usize; COPY],
    copied: usize,
    mine: [Step; MOST],
    walked: Walked,
    theirs: [Step; MOST],
    theirs_count: usize,
}

impl Sample {
    fn memory(&self, address: usize) -> Option<usize> {
        let first = self.start.get(map::Register::RSP)? - BELOW;
        let offset = address.checked_sub(first & !7)?;
        (offset.is_multiple_of(8) && offset / 8 < self.copied).then(|| self.copy[offset / 8])
    }
}

/// Belongs to the handler while `TAKEN` is false, and to the thread that compares while it is true.
struct Shared(UnsafeCell<Sample>);

// SAFETY: see above; `TAKEN` passes it on with release and acquire, and one test at a time uses it.
unsafe impl Sync for Shared {}

static SAMPLE: Shared = Shared(UnsafeCell::new(Sample {
    with_libgcc: false,
    start: Registers::UNKNOWN,
    copy: [0; COPY],
    copied: 0,
    mine: [Step { pc: 0, rsp: 0, saved: [0; 6] }; MOST],
    walked: Walked { frames: 0, ordinary: 0, end: None },
    theirs: [Step { pc: 0, rsp: 0, saved: [0; 6] }; MOST],
    theirs_count: 0,
}));
static TAKEN: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the handler's argument; the sample is ours until we say that it is taken.
    let (context, sample) = unsafe { (&*context.cast::<libc::ucontext_t>(), &mut *SAMPLE.0.get()) };
    sample.start = interrupted(context);
    let first = (sample.start.get(map::Register::RSP).unwrap() - BELOW) & !7;
    let local = libc::iovec { iov_base: sample.copy.as_mut_ptr().cast(), iov_len: COPY * 8 };
    let remote = libc::iovec { iov_base: first as *mut c_void, iov_len: COPY * 8 };
    // SAFETY: writes into the copy; what cannot be read ends it.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    sample.copied = usize::try_from(read).unwrap_or(0) / 8;
    let start = sample.start;
    let mut mine = sample.mine;
    sample.walked = ours(&start, false, |address| sample.memory(address), &mut mine);
    sample.mine = mine;
    sample.theirs_count = if sample.with_libgcc { libgcc(&mut sample.theirs) } else { 0 };
    TAKEN.store(true, Ordering::Release);
}

extern "C" fn compare_numbers(a: *const c_void, b: *const c_void) -> c_int {
    // SAFETY: qsort passes pointers to elements of an array of them.
    unsafe { (*a.cast::<u64>()).cmp(&*b.cast::<u64>()) as c_int }
}

fn work(round: u64) -> u64 {
    let mut numbers: Vec<u64> = (0..40).map(|n| n * 0x9e37_79b9 % (round % 97 + 7)).collect();
    numbers.sort_by(|a, b| b.cmp(a));
    // SAFETY: sorts the vector's elements.
    unsafe { libc::qsort(numbers.as_mut_ptr().cast(), numbers.len(), 8, Some(compare_numbers)) };
    let table: HashMap<u64, String> =
        numbers.iter().map(|&n| (n, format!("{n:>8x} {:?}", n as f64 / 3.0))).collect();
    let tree: BTreeMap<_, _> = table.iter().collect();
    let text = tree.values().fold(String::new(), |all, one| all + one);
    text.split(' ').filter_map(|word| word.parse::<u64>().ok()).sum()
}

fn work_in_coroutines(round: u64) -> u64 {
    let mut coroutine = Coroutine::new(move |yielder: &Yielder<(), u64>, ()| {
        for n in 0..5 {
            yielder.suspend(n);
        }
        let _ = std::panic::catch_unwind(|| std::panic::resume_unwind(Box::new(round)));
        yielder.suspend(work(round));
    });
    std::iter::from_fn(|| coroutine.resume(()).yielded()).sum()
}

/// Interrupts `work` this many times; returns the samples that ours could not walk to an end.
fn interrupt(samples: usize, with_libgcc: bool, work: fn(u64) -> u64) -> Vec<End> {
    static STOP: AtomicBool = AtomicBool::new(false);
    map::record_loaded_objects();
    STOP.store(false, Ordering::Relaxed);
    // SAFETY: nobody is signalled yet.
    unsafe { (*SAMPLE.0.get()).with_libgcc = with_libgcc };
    let ready = Arc::new(Barrier::new(2));
    let prepared = ready.clone();
    let worker = std::thread::spawn(move || {
        regrow::prepare_thread().unwrap(); // an alternate stack with room for this handler
        prepared.wait();
        (0..)
            .take_while(|_| !STOP.load(Ordering::Relaxed))
            .map(|round| black_box(work(round)) as u128)
            .sum::<u128>()
    });
    // SAFETY: a handler for a signal that nobody else uses, on the alternate stack.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
    }
    ready.wait();
    let mut framehop = Framehop::new();
    let mut stuck = Vec::new();
    let mut frames = 0;
    let mut state = 5;
    for _ in 0..samples {
        (0..random(&mut state) % 5000).for_each(|_| spin_loop());
        // SAFETY: the worker runs until it is told to stop.
        assert_eq!(unsafe { libc::pthread_kill(worker.as_pthread_t(), libc::SIGUSR1) }, 0);
        while !TAKEN.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        // SAFETY: it is taken: ours until we give it back.
        let sample = unsafe { &*SAMPLE.0.get() };
        check(sample, &mut framehop);
        frames += sample.walked.frames;
        stuck.extend(sample.walked.end.filter(|end| matches!(end, End::Stuck { .. })));
        TAKEN.store(false, Ordering::Release);
    }
    STOP.store(true, Ordering::Relaxed);
    worker.join().unwrap();
    println!("{samples} walks, {frames} frames, {} stuck", stuck.len());
    stuck
}

fn check(sample: &Sample, framehop: &mut Framehop) {
    let mine = &sample.mine[..sample.walked.frames];
    let (other, _) = framehop.walk(&sample.start, |address| sample.memory(address), MOST);
    let pairs = mine.iter().zip(&other).take(sample.walked.ordinary);
    let same = pairs.clone().all(|(mine, other)| (mine.pc, mine.rsp) == (other.pc, other.rsp));
    assert!(
        same && other.len() >= sample.walked.ordinary,
        "{:x?}\nours {mine:#x?}\n{:?}\nframehop {other:#x?}",
        sample.start,
        sample.walked
    );
    // libgcc began in the handler: it comes to the interrupted frame after the signal frame.
    let theirs = &sample.theirs[..sample.theirs_count];
    let Some(first) = mine.first() else { return };
    let begin = theirs.iter().position(|step| step == first).unwrap_or(theirs.len());
    let end = theirs.len().min(begin + mine.len());
    assert!(
        !sample.with_libgcc || theirs[begin..end] == *mine,
        "{:x?}\nours {mine:#x?}\n{:?}\nlibgcc {theirs:#x?}",
        sample.start,
        sample.walked
    );
}

fn samples() -> usize {
    std::env::var("REGROW_SAMPLES").map_or(1000, |number| number.parse().expect("a number"))
}

/// Prints each function that a walk got stuck in.
fn print(stuck: &[End]) {
    for end in stuck {
        let End::Stuck { pc, why } = *end else { continue };
        let mut name = None;
        backtrace::resolve(pc as *mut c_void, |symbol| name = symbol.name().map(|name| name.to_string()));
        println!("{pc:#x} {}: {why}", name.unwrap_or_default());
    }
}

#[test]
fn at_random_instructions() {
    let stuck = interrupt(samples(), true, work);
    print(&stuck);
    assert!(stuck.len() * 100 <= samples(), "too many walks did not come to an end");
    // One after the other: they share the sample.
    let stuck = interrupt(samples(), false, work_in_coroutines);
    print(&stuck);
    // More may get stuck here: between the two stacks of a switch no walker can know where it is.
    assert!(stuck.len() * 10 <= samples(), "too many walks did not come to an end");
}
