//! The table of a suspended coroutine's frames: the same frames as a backtrace, end to end, each word counted once.

use std::arch::global_asm;
use std::ffi::c_void;
use std::hint::black_box;

use regrow::frames::{Cell, State, Words};
use regrow::map::{self, End, FrameMap, Place, Register, Source, Stuck, Verdict, Word};
use regrow::{Builder, Coroutine, Frames, Growth, Yielder};

mod support;
use support::{both_ways, frame, grown};

type Out = Yielder<(), Vec<usize>>;

/// The return addresses of this function's callers, innermost first.
#[inline(never)]
fn callers() -> Vec<usize> {
    let mut all = Vec::new();
    backtrace::trace(|frame| {
        all.push(frame.ip() as usize);
        true
    });
    all
}

#[inline(never)]
fn suspends(yielder: &Out) -> u64 {
    let here = black_box([1u64; 9]);
    yielder.suspend(callers());
    here[3]
}

trait Step {
    fn step(&self, yielder: &Out, depth: usize) -> u64;
}

struct Recursion;

impl Step for Recursion {
    #[inline(never)]
    fn step(&self, yielder: &Out, depth: usize) -> u64 {
        let array = black_box([depth as u64; 30]);
        let below = match depth {
            0 => sorts(yielder),
            _ => black_box(self as &dyn Step).step(yielder, depth - 1),
        };
        black_box(below) + array[depth]
    }
}

#[inline(never)]
fn sorts(yielder: &Out) -> u64 {
    let mut numbers = black_box([3, 1, 2]);
    numbers.sort_by(|a, b| {
        suspends(yielder);
        a.cmp(b)
    });
    numbers[0]
}

const NAMES: [&str; 6] = ["::suspends", "::sorts", "::step", "::step", "::step", "::step"];

/// Suspended in the comparator of a sort under a recursion of dyn calls; with the backtrace of that moment.
fn suspended(builder: &Builder) -> (Coroutine<(), Vec<usize>, u64>, Vec<usize>) {
    let mut coroutine = builder.spawn(|yielder: &Out, ()| Recursion.step(yielder, 3));
    let trace = coroutine.resume(()).yielded().expect("it suspends");
    (coroutine, trace)
}

fn name(frame: &regrow::frames::Frame) -> &str {
    frame.function().map_or("", |function| &function.name)
}

/// What holds of every table: the frames lie end to end, and their words are all counted once.
fn check(frames: &Frames) {
    let mut depth = frames.used;
    for frame in &frames.frames {
        assert_eq!(frame.depth, depth, "{frames}");
        assert_eq!(frame.words().total() * 8, frame.size, "{frames}");
        assert_eq!(frame.words().return_addresses, 1, "{frames}");
        depth -= frame.size;
    }
    assert_eq!(depth == 0, frames.end == End::Base, "{frames}");
    let text = frames.to_string();
    let around = 3 + usize::from(frames.end != End::Base);
    assert_eq!(text.lines().count(), frames.frames.len() + around, "{text}");
    for (line, frame) in text.lines().skip(2).zip(&frames.frames) {
        let mut columns = line.split_whitespace();
        assert_eq!(columns.next(), Some(frame.depth.to_string().as_str()), "{line}");
        assert_eq!(columns.next(), Some(frame.size.to_string().as_str()), "{line}");
        assert!(line.contains(&format!("{:#x}", frame.pc)) && line.contains(name(frame)), "{line}");
    }
}

#[test]
fn the_frames_are_those_of_a_backtrace() {
    both_ways(|builder| {
        let (coroutine, trace) = suspended(&builder.name("sorter"));
        let frames = coroutine.frames();
        check(&frames);
        assert_eq!((frames.name.as_deref(), frames.state), (Some("sorter"), State::Suspended));
        assert_eq!(frames.growth, coroutine.growth());
        assert_eq!(frames.end, End::Base);

        // The backtrace has the same return addresses from the caller of `suspends` on, up to the first frame's,
        // which is not of the coroutine's functions any more.
        let at = frames.frames.iter().position(|frame| name(frame).ends_with("::suspends")).unwrap();
        let ours: Vec<_> = frames.frames[at + 1..].iter().map(|frame| frame.pc).collect();
        let from = trace.iter().position(|&pc| pc == ours[0]).expect("both have the caller");
        assert_eq!(trace[from..from + ours.len()], ours, "{frames}");

        let mut names = frames.frames.iter().map(name);
        for expected in NAMES {
            assert!(
                names.any(|name| name.ends_with(expected)),
                "no {expected} where it belongs in\n{frames}"
            );
        }
        assert!(name(frames.frames.last().unwrap()).ends_with("coroutine::entry"), "{frames}");
    });
}

#[test]
fn a_line_in_the_table_for_each_inlined_function_if_asked_for() {
    let (coroutine, _) = suspended(&Builder::new());
    let frames = coroutine.frames();
    let functions: usize = frames.frames.iter().map(|frame| frame.functions.len()).sum();
    assert!(frames.frames.iter().all(|frame| !frame.functions.is_empty()), "{frames:#}");
    assert_eq!(format!("{frames:#}").lines().count(), functions + 3, "{frames:#}");
}

#[test]
fn looking_changes_nothing() {
    both_ways(|builder| {
        let (mut coroutine, _) = suspended(&builder);
        let first = coroutine.frames();
        assert_eq!(coroutine.frames(), first);
        let mut seen = 1;
        while coroutine.resume(()).yielded().is_some() {
            check(&coroutine.frames());
            seen += 1;
        }
        assert!(seen >= 2);
        let finished = coroutine.frames();
        assert_eq!((finished.state, finished.used, finished.frames.len()), (State::Finished, 0, 0));
        assert!(finished.to_string().contains("finished"), "{finished}");
    });
}

#[test]
fn one_that_never_ran_has_no_frames() {
    let coroutine = Builder::new().name("idle").spawn(|_: &Yielder<(), ()>, ()| ());
    let frames = coroutine.frames();
    assert_eq!((frames.state, frames.used, frames.frames.len()), (State::NotStarted, 0, 0));
    assert_eq!((frames.size, frames.end), (4096, End::Base));
    assert_eq!(frames.to_string(), "coroutine \"idle\", not started: 0 of 4096 bytes used, grows in place\n");
}

#[test]
fn one_that_has_moved_and_is_watched() {
    both_ways(|builder| {
        let mut coroutine = builder.spawn(|yielder: &Out, ()| {
            frame::<20_000>(1);
            Recursion.step(yielder, 2)
        });
        assert!(coroutine.resume(()).yielded().is_some());
        assert!(grown(&coroutine.stats()) > 0);
        let frames = coroutine.frames();
        check(&frames);
        assert_eq!((frames.end, frames.size), (End::Base, coroutine.stats().size));
        // It is still watched: the next resumes shrink it.
        assert_eq!(coroutine.frames(), frames);
        assert!(coroutine.resume(()).yielded().is_some());
        check(&coroutine.frames());
    });
}

#[test]
fn words_are_inside_by_their_values() {
    // Of 64 words every other is an address in this very array.
    #[inline(never)]
    fn points_to_itself(yielder: &Out) {
        let mut array = [0usize; 64];
        let start = array.as_ptr() as usize;
        for index in (0..64).step_by(2) {
            array[index] = start + index;
        }
        black_box(&array);
        yielder.suspend(Vec::new());
        black_box(&array);
    }
    both_ways(|builder| {
        let mut coroutine = builder.spawn(|yielder: &Out, ()| points_to_itself(yielder));
        coroutine.resume(());
        let frames = coroutine.frames();
        let alternate = |cells: &[Cell]| (0..64).all(|index| cells[index].inside == (index % 2 == 0));
        assert!(frames.frames.iter().any(|frame| frame.cells.windows(64).any(alternate)), "{frames}");
    });
}

// Calls `rdi` with `rsi`: `mapped` from a frame that has unwind tables, and words with a map; `unmapped` from one about
// which nothing is known.
global_asm!(
    ".globl mapped",
    ".type mapped, @function",
    "mapped:",
    ".cfi_startproc",
    "sub rsp, 24",
    ".cfi_adjust_cfa_offset 24",
    "mov [rsp], rsp",
    "mov [rsp + 8], rsp",
    "mov qword ptr [rsp + 16], 5",
    "mov rax, rdi",
    "mov rdi, rsi",
    "call rax",
    "mapped_after_call:",
    "add rsp, 24",
    ".cfi_adjust_cfa_offset -24",
    "ret",
    ".cfi_endproc",
    ".size mapped, . - mapped",
    ".globl unmapped",
    ".type unmapped, @function",
    "unmapped:",
    "sub rsp, 24",
    "mov rax, rdi",
    "mov rdi, rsi",
    "call rax",
    "unmapped_after_call:",
    "add rsp, 24",
    "ret",
    ".size unmapped, . - unmapped",
);

type Through = unsafe extern "C" fn(unsafe extern "C" fn(*const c_void), *const c_void);

unsafe extern "C" {
    fn mapped(function: unsafe extern "C" fn(*const c_void), argument: *const c_void);
    fn mapped_after_call();
    fn unmapped(function: unsafe extern "C" fn(*const c_void), argument: *const c_void);
    fn unmapped_after_call();
}

unsafe extern "C" fn suspend_in_callback(yielder: *const c_void) {
    frame::<20_000>(1);
    // SAFETY: `suspended_through` passes the yielder.
    unsafe { suspends(&*yielder.cast::<Out>()) };
}

/// Suspended in a callback of `through`, after it has grown. Runs to its end before it is dropped: nothing can unwind through it.
fn look_through(builder: &Builder, through: Through) -> Frames {
    let mut coroutine = builder.spawn(move |yielder: &Out, ()| {
        // SAFETY: the callback gets the argument it expects.
        unsafe { through(suspend_in_callback, (&raw const *yielder).cast()) };
        black_box(());
    });
    assert!(coroutine.resume(()).yielded().is_some());
    assert!(grown(&coroutine.stats()) > 0);
    let frames = coroutine.frames();
    assert!(coroutine.resume(()).returned().is_some());
    frames
}

#[test]
fn words_with_a_map_are_counted_by_it() {
    let after = mapped_after_call as *const () as usize;
    let map = FrameMap::at_return(after)
        .word(Place::at(Register::RSP, 0), Verdict::Pointer)
        .rest(Verdict::Data)
        .source(Source::Llvm);
    // SAFETY: true of the assembly in this file.
    let _registration = unsafe { map::register(vec![map]) }.unwrap();
    both_ways(|builder| {
        let frames = look_through(&builder, mapped);
        check(&frames);
        let frame = frames.frames.iter().find(|frame| frame.pc == after).expect("it is there");
        assert_eq!((name(frame), frame.size, frame.source), ("mapped", 32, Source::Llvm));
        // Both words had rsp for a value. When the stack moved the one that is data stayed what it was.
        let moved = frames.growth == Growth::Relocate;
        let inside = if moved { 1 } else { 2 };
        let words = Words { pointers: 1, data: 2, return_addresses: 1, inside, ..Words::default() };
        assert_eq!(frame.words(), words);
        assert_eq!(frame.cells[0], Cell { word: Word::Own(Verdict::Pointer), inside: true });
        assert_eq!(frame.cells[1], Cell { word: Word::Own(Verdict::Data), inside: !moved });
        assert_eq!(frame.cells[3], Cell { word: Word::ReturnAddress, inside: false });
    });
}

#[test]
fn a_function_without_unwind_tables_is_named() {
    let after = unmapped_after_call as *const () as usize;
    both_ways(|builder| {
        let frames = look_through(&builder, unmapped);
        check(&frames);
        assert_eq!(frames.end, End::Stuck { pc: after, why: Stuck::NoMap });
        assert_eq!(frames.stuck_in.last().unwrap().name, "unmapped");
        assert!(name(frames.frames.last().unwrap()).ends_with("suspend_in_callback"), "{frames}");
        let text = frames.to_string();
        let last = text.lines().last().unwrap();
        assert!(last.contains("unmapped: no map is for its code"), "{text}");
    });
}
