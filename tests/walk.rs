//! Walks of real stacks equal those of two independent walkers, frame by frame and register by register.

mod walkers;

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::hint::black_box;
use std::panic::{self, AssertUnwindSafe};

use regrow::map::{self, End};
use regrow::{Builder, Coroutine, Yielder};
use walkers::{Framehop, MOST, Step, libgcc, ours, own_memory, registers};

thread_local! {
    /// What was compared on this thread: places and frames.
    static COMPARED: RefCell<Vec<(&'static str, usize)>> = const { RefCell::new(Vec::new()) };
}

/// Compares the three walkers here. A difference ends the process, since this is called in destructors and by C.
#[inline(never)]
fn observe(place: &'static str) {
    let start = registers();
    let mut theirs = [Step::default(); MOST];
    let count = libgcc(&mut theirs);
    let mut mine = [Step::default(); MOST];
    let walked = ours(&start, true, own_memory, &mut mine);
    let (other, complete) = Framehop::new().walk(&start, own_memory, MOST);
    let (mine, theirs) = (&mine[..walked.frames], &theirs[..count]);

    // The first frame is this function, seen at different instructions.
    let same = mine.len() > 2 && mine[1..] == theirs[1..] && walked.end == Some(End::Outermost);
    let pairs = mine.iter().zip(&other).take(walked.ordinary);
    let same_for_framehop = pairs.clone().all(|(mine, other)| (mine.pc, mine.rsp) == (other.pc, other.rsp))
        && other.len() >= walked.ordinary
        && (walked.ordinary < mine.len() || (complete && other.len() == mine.len()));
    if !same || !same_for_framehop {
        eprintln!(
            "{place}: ours {mine:#x?}\n{walked:?}\nlibgcc {theirs:#x?}\nframehop {other:#x?} {complete}"
        );
        std::process::abort();
    }
    COMPARED.with_borrow_mut(|all| all.push((place, pairs.count())));
}

#[inline(never)]
fn recurse<const WORDS: usize>(depth: usize) -> u64 {
    let frame = black_box([depth as u64; WORDS]);
    if depth == 0 {
        observe("recursion");
        return 0;
    }
    recurse::<WORDS>(depth - 1) + frame[WORDS - 1]
}

#[inline(never)]
fn with_many_registers(a: u64, b: u64, c: u64, d: u64, e: u64, f: u64) -> u64 {
    let [a, b, c, d, e, f] = black_box([a, b, c, d, e, f]);
    observe("all callee-saved registers in use");
    let sum = a + b * 2 + c * 3 + d * 4;
    observe("all callee-saved registers in use");
    sum + e + f + a
}

#[repr(align(128))]
struct Aligned([u8; 256]);

#[inline(never)]
fn realigned(depth: usize) -> u8 {
    let frame = black_box(Aligned([depth as u8; 256]));
    if depth == 0 {
        observe("realigned frame")
    } else {
        black_box(realigned(depth - 1));
    }
    frame.0[7]
}

trait Shape {
    fn area(&self) -> u64;
}

struct Square(u64);

impl Shape for Square {
    #[inline(never)]
    fn area(&self) -> u64 {
        observe("dyn method");
        self.0 * self.0
    }
}

impl Drop for Square {
    fn drop(&mut self) {
        observe(if std::thread::panicking() { "destructor while unwinding" } else { "drop glue" });
    }
}

extern "C" fn compare(a: *const c_void, b: *const c_void) -> c_int {
    observe("callback of libc");
    // SAFETY: qsort and bsearch pass pointers to elements of the arrays below.
    unsafe { (*a.cast::<i32>()).cmp(&*b.cast::<i32>()) as c_int }
}

fn callbacks() {
    let mut numbers = [5, 3, 9, 1];
    // SAFETY: the array has four elements of four bytes.
    unsafe {
        libc::qsort(numbers.as_mut_ptr().cast(), 4, 4, Some(compare));
        let key = 9;
        let found = libc::bsearch((&raw const key).cast(), numbers.as_ptr().cast(), 4, 4, Some(compare));
        assert_eq!(*found.cast::<i32>(), 9);
    }
    assert_eq!(numbers, [1, 3, 5, 9]);
}

fn panics() {
    let caught: Result<(), Box<dyn Any + Send>> = panic::catch_unwind(AssertUnwindSafe(|| {
        let _guard = Square(2);
        let all: Vec<Box<dyn Shape>> = vec![Box::new(Square(1)), Box::new(Square(3))];
        if black_box(all.len()) == 2 {
            panic!("on purpose");
        }
    }));
    assert_eq!(*caught.unwrap_err().downcast_ref::<&str>().unwrap(), "on purpose");
}

extern "C" fn on_signal(_: c_int) {
    observe("signal handler");
}

fn signal() {
    // SAFETY: a handler that only observes, for a signal that this thread sends itself.
    unsafe {
        libc::signal(libc::SIGUSR2, on_signal as *const () as usize);
        libc::raise(libc::SIGUSR2);
    }
}

fn everything() {
    recurse::<1>(5);
    recurse::<40>(20);
    recurse::<2000>(3);
    with_many_registers(1, 2, 3, 4, 5, 6);
    realigned(4);
    let shape: Box<dyn Shape> = black_box(Box::new(Square(4)));
    assert_eq!(shape.area(), 16);
    drop(vec![shape, Box::new(Square(5))]);
    let observing = |n: u64| {
        observe("closure");
        n + 1
    };
    assert_eq!((0..3).map(black_box(&observing as &dyn Fn(u64) -> u64)).sum::<u64>(), 6);
    let mut order = [3, 1, 2];
    order.sort_by(|a, b| {
        observe("comparison in a sort");
        a.cmp(b)
    });
    callbacks();
    panics();
    signal();
}

fn compared() -> Vec<(&'static str, usize)> {
    COMPARED.with_borrow_mut(std::mem::take)
}

fn silence_panics() {
    panic::set_hook(Box::new(|info| {
        observe("panic hook");
        if info.payload_as_str() != Some("on purpose") {
            eprintln!("{info}");
        }
    }));
}

fn check_places(all: &[(&str, usize)]) {
    for place in [
        "recursion",
        "all callee-saved registers in use",
        "realigned frame",
        "dyn method",
        "drop glue",
        "closure",
        "comparison in a sort",
        "callback of libc",
        "panic hook",
        "destructor while unwinding",
        "signal handler",
    ] {
        let frames: Vec<_> =
            all.iter().filter(|(other, _)| *other == place).map(|(_, frames)| *frames).collect();
        assert!(!frames.is_empty(), "nothing was compared at: {place}");
        println!("{place}: {} walks, of up to {} frames", frames.len(), frames.iter().max().unwrap());
    }
}

#[test]
fn on_a_thread() {
    map::record_loaded_objects();
    silence_panics();
    everything();
    check_places(&compared());
}

#[test]
fn in_coroutines_and_on_through_their_resumers() {
    map::record_loaded_objects();
    silence_panics();
    let mut coroutine = Coroutine::new(|yielder: &Yielder<(), ()>, ()| {
        everything();
        yielder.suspend(());
        let mut inner = Builder::new().spawn(|yielder: &Yielder<(), ()>, ()| {
            recurse::<10>(3);
            yielder.suspend(());
            everything();
        });
        inner.resume(());
        inner.resume(());
        observe("after a nested coroutine");
    });
    coroutine.resume(());
    recurse::<3>(3);
    coroutine.resume(());
    check_places(&compared());
}
