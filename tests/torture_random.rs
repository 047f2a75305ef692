//! Random programs: trees of calls over the operations that matter to a moving stack. Under torture, with suspends, each
//! computes what it computes on a plain thread without.

use std::cell::RefCell;
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::rc::Rc;

use proptest::prelude::*;
use regrow::torture::{Mode, Torture};
use regrow::{Coroutine, Yielder, pin, pinned_room, reserve};

#[path = "support/corpus.rs"]
mod corpus;
mod support;
use support::{OnDrop, relocating};

/// One operation; what it contains runs in a frame below its own.
#[derive(Clone, Debug)]
enum Op {
    /// A call with arguments in all registers and on the stack.
    Call(Vec<Op>),
    /// A local array, filled before and checked after.
    Array(ArraySize, Vec<Op>),
    /// Pointers to a local of the caller and one of its own go down, and are written through.
    Through(Vec<Op>),
    /// Iterates over a local slice, with the rest between two elements.
    Slice(Vec<Op>),
    /// A call through a vtable of an object on the stack.
    Dyn(Vec<Op>),
    /// A closure that captures locals by reference.
    Closure(Vec<Op>),
    /// Floats and wide vectors live across.
    Floats(Vec<Op>),
    /// Catches what is thrown below.
    Catch(Vec<Op>),
    /// Throws, if somebody catches.
    Throw,
    /// The rest, so many frames further down.
    Recurse(u8, Vec<Op>),
    Suspend,
    /// The rest in a coroutine of its own, resumed until it ends and made smaller each time; its stack moves or stays.
    Nested(bool, Vec<Op>),
    /// More stack is asked for, before the rest.
    Reserve(u16, Vec<Op>),
    /// The stack is pinned for the rest.
    Pinned(Vec<Op>),
}

#[derive(Clone, Copy, Debug)]
enum ArraySize {
    Few,
    Line,
    Page,
    Pages,
}

/// What a program carries along; lives in its outermost frame and is passed down by reference.
struct State<'a> {
    suspend: &'a dyn Fn(),
    catchers: u32,
    /// Written by destructors.
    dropped: Rc<RefCell<u64>>,
    sum: u64,
}

impl State<'_> {
    fn add(&mut self, value: u64) {
        self.sum = (self.sum ^ value).wrapping_mul(0x100_0000_01b3).rotate_left(9);
    }
}

fn run_all(ops: &[Op], state: &mut State<'_>, callers: &mut [u64; 4]) {
    for op in ops {
        run(op, state, callers);
    }
}

#[inline(never)]
fn run(op: &Op, state: &mut State<'_>, callers: &mut [u64; 4]) {
    state.add(callers[1]);
    match op {
        Op::Call(rest) => {
            let [a, b, c, d] = *callers;
            let result = many_arguments(rest, state, a, b, c, d, 5, a ^ b, 1.5 + c as f64, b | d, [a, b, c]);
            callers[2] = callers[2].wrapping_add(result);
        }
        Op::Array(size, rest) => match size {
            ArraySize::Few => array::<3>(rest, state, callers),
            ArraySize::Line => array::<29>(rest, state, callers),
            ArraySize::Page => array::<500>(rest, state, callers),
            ArraySize::Pages => array::<2500>(rest, state, callers),
        },
        Op::Through(rest) => {
            let mut own = black_box([callers[0], 2, 3, 4]);
            write_through(rest, state, &mut own, &mut callers[3]);
            own.iter().for_each(|word| state.add(*word));
        }
        Op::Slice(rest) => {
            let local = black_box([callers[0], 7, 11, callers[3]]);
            let mut between = Some(rest);
            for (index, word) in local.iter().enumerate().filter(|(_, word)| **word != 1) {
                state.add(word.wrapping_add(index as u64));
                if let Some(rest) = between.take() {
                    run_all(rest, state, &mut [index as u64; 4]);
                }
            }
        }
        Op::Dyn(rest) => {
            let object = Object { rest, salt: callers[0] };
            let object: &dyn Runs = black_box(&object);
            object.run(state, callers);
        }
        Op::Closure(rest) => {
            let mut count = black_box(3u64);
            let mut closure = |state: &mut State<'_>| {
                count += callers[0] & 7;
                run_all(rest, state, callers);
                count += 1;
            };
            call(&mut closure, state);
            state.add(count);
        }
        Op::Floats(rest) => floats(rest, state, callers),
        Op::Catch(rest) => {
            state.catchers += 1;
            let caught = catch_unwind(AssertUnwindSafe(|| run_all(rest, state, callers)));
            state.catchers -= 1;
            state.add(caught.is_err().into());
        }
        Op::Throw if state.catchers > 0 => {
            let dropped = Rc::clone(&state.dropped);
            let local = black_box([callers[0]; 3]);
            let _note = OnDrop(move || *dropped.borrow_mut() += local[1] & 0xff);
            panic_any(Thrown);
        }
        Op::Throw => {}
        Op::Recurse(depth, rest) => recurse(*depth, rest, state, callers),
        Op::Suspend => (state.suspend)(),
        Op::Reserve(bytes, rest) => {
            reserve(usize::from(*bytes)).expect("there is room");
            run_all(rest, state, callers);
        }
        Op::Pinned(rest) => {
            // A pinned stack has its slot's slack and no more: what needs more runs without the pin.
            let _pin = pinned_room().is_none_or(|room| room > most_stack(rest)).then(pin);
            run_all(rest, state, callers);
        }
        Op::Nested(moves, rest) => {
            // It may borrow nothing of this stack.
            let (rest, seed) = (rest.clone(), callers[0]);
            let body = move |yielder: &Yielder<(), ()>, ()| outermost(&rest, seed, &|| yielder.suspend(()));
            let mut nested = if *moves { relocating().spawn(body) } else { Coroutine::new(body) };
            let result = loop {
                if let Some(result) = nested.resume(()).returned() {
                    break result;
                }
                nested.shrink().expect("there is memory");
            };
            state.add(result);
        }
    }
    callers[0] = callers[0].wrapping_mul(31) + 1;
}

/// A panic that is no news.
struct Thrown;

/// Bytes of stack that some operations take at most, unoptimised.
fn most_stack(ops: &[Op]) -> usize {
    ops.iter().map(most_stack_of).max().unwrap_or(0)
}

fn most_stack_of(op: &Op) -> usize {
    const FRAMES: usize = 3 << 10;
    const PANIC: usize = 16 << 10;
    match op {
        // In the array's frame are copies of it.
        Op::Array(size, rest) => {
            let words = match size {
                ArraySize::Few => 3,
                ArraySize::Line => 29,
                ArraySize::Page => 500,
                ArraySize::Pages => 2500,
            };
            FRAMES + 3 * words * size_of::<u64>() + most_stack(rest)
        }
        Op::Recurse(depth, rest) => FRAMES + usize::from(*depth) * 512 + most_stack(rest),
        Op::Reserve(bytes, rest) => FRAMES + usize::from(*bytes).max(most_stack(rest)),
        Op::Throw => PANIC,
        // The rest has a stack of its own.
        Op::Nested(..) | Op::Suspend => 2 * FRAMES,
        Op::Call(rest)
        | Op::Through(rest)
        | Op::Slice(rest)
        | Op::Dyn(rest)
        | Op::Closure(rest)
        | Op::Floats(rest)
        | Op::Catch(rest)
        | Op::Pinned(rest) => FRAMES + most_stack(rest),
    }
}

#[inline(never)]
#[expect(clippy::too_many_arguments, reason = "that is the point")]
fn many_arguments(
    rest: &[Op],
    state: &mut State<'_>,
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    e: u32,
    f: u64,
    g: f64,
    h: u64,
    i: [u64; 3],
) -> u64 {
    run_all(rest, state, &mut [d, c, b, a]);
    let sum = a.wrapping_add(b).wrapping_add(c).wrapping_add(d).wrapping_add(f).wrapping_add(h);
    state.add(g.to_bits());
    sum.wrapping_add(e.into()) ^ i[0] ^ i[2]
}

#[inline(never)]
fn array<const N: usize>(rest: &[Op], state: &mut State<'_>, callers: &mut [u64; 4]) {
    let local = black_box([callers[0]; N]);
    run_all(rest, state, callers);
    let local = black_box(&local);
    state.add(local[0] ^ local[N / 2].rotate_left(7) ^ local[N - 1].rotate_left(13));
}

#[inline(never)]
fn write_through(rest: &[Op], state: &mut State<'_>, own: &mut [u64; 4], callers: &mut u64) {
    let (first, second) = own.split_at_mut(2);
    first[0] ^= *callers;
    run_all(rest, state, &mut [second[0], first[1], 8, 9]);
    second[1] += first[0] & 0xffff;
    *callers = callers.wrapping_add(second[1]);
}

trait Runs {
    fn run(&self, state: &mut State<'_>, callers: &mut [u64; 4]);
}

struct Object<'a> {
    rest: &'a [Op],
    salt: u64,
}

impl Runs for Object<'_> {
    fn run(&self, state: &mut State<'_>, callers: &mut [u64; 4]) {
        run_all(self.rest, state, callers);
        state.add(self.salt);
    }
}

#[inline(never)]
fn call(closure: &mut dyn FnMut(&mut State<'_>), state: &mut State<'_>) {
    closure(state);
}

#[inline(never)]
fn floats(rest: &[Op], state: &mut State<'_>, callers: &mut [u64; 4]) {
    let (x, y) = (black_box(callers[0] as f64 + 0.25), black_box(callers[1] as f32 * 1.5));
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has it.
        unsafe { wide(rest, state, callers) };
    } else {
        run_all(rest, state, callers);
    }
    state.add((x * 3.0).to_bits() ^ u64::from((y + 1.0).to_bits()));
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn wide(rest: &[Op], state: &mut State<'_>, callers: &mut [u64; 4]) {
    use std::arch::x86_64::{_mm256_add_epi64, _mm256_extract_epi64, _mm256_set_epi64x};
    let [a, b, c, d] = callers.map(|word| word as i64);
    let vector = black_box(_mm256_set_epi64x(a, b, c, d));
    run_all(rest, state, callers);
    let sum = _mm256_add_epi64(vector, vector);
    state.add(_mm256_extract_epi64::<3>(sum) as u64 ^ _mm256_extract_epi64::<0>(sum) as u64);
}

#[inline(never)]
fn recurse(depth: u8, rest: &[Op], state: &mut State<'_>, callers: &mut [u64; 4]) {
    let local = black_box([u64::from(depth); 5]);
    match depth {
        0 => run_all(rest, state, callers),
        _ => recurse(depth - 1, rest, state, callers),
    }
    state.add(black_box(local)[2]);
}

fn outermost(ops: &[Op], seed: u64, suspend: &dyn Fn()) -> u64 {
    let dropped = Rc::default();
    let mut state = State { suspend, catchers: 0, dropped: Rc::clone(&dropped), sum: 0 };
    run_all(ops, &mut state, &mut [seed, 2, 3, 4]);
    state.sum ^ *dropped.borrow()
}

fn programs() -> impl Strategy<Value = Vec<Op>> {
    let size = prop_oneof![
        4 => Just(ArraySize::Few), 3 => Just(ArraySize::Line), 2 => Just(ArraySize::Page), 1 => Just(ArraySize::Pages)
    ];
    let leaf = prop_oneof![3 => Just(Op::Suspend), 1 => Just(Op::Throw), 1 => Just(Op::Call(Vec::new()))];
    let op = leaf.prop_recursive(6, 24, 3, move |inner| {
        let rest = || prop::collection::vec(inner.clone(), 0..3);
        prop_oneof![
            rest().prop_map(Op::Call),
            (size.clone(), rest()).prop_map(|(size, rest)| Op::Array(size, rest)),
            rest().prop_map(Op::Through),
            rest().prop_map(Op::Slice),
            rest().prop_map(Op::Dyn),
            rest().prop_map(Op::Closure),
            rest().prop_map(Op::Floats),
            rest().prop_map(Op::Catch),
            (0..20u8, rest()).prop_map(|(depth, rest)| Op::Recurse(depth, rest)),
            (any::<bool>(), rest()).prop_map(|(moves, rest)| Op::Nested(moves, rest)),
            (0..20_000u16, rest()).prop_map(|(bytes, rest)| Op::Reserve(bytes, rest)),
            rest().prop_map(Op::Pinned),
        ]
    });
    prop::collection::vec(op, 1..4)
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![
        6 => Just(Mode::Breakpoints),
        1 => Just(Mode::GrowthPoints),
        1 => (2..40u64).prop_map(Mode::Random),
        2 => Just(Mode::Overflows),
    ]
}

proptest! {
    #![proptest_config(corpus::cases(60))]

    #[test]
    fn the_same_as_on_a_plain_thread(program in programs(), mode in modes(), seed in any::<u64>()) {
        std::panic::set_hook(Box::new(|panic| {
            if !panic.payload().is::<Thrown>() {
                eprintln!("{panic}");
            }
        }));
        let expected = outermost(&program, seed, &|| ());
        // SAFETY: the programs keep everything on their stacks; the test is about that.
        let (found, report) = unsafe {
            Torture::new(mode)
                .seed(seed)
                .limit(20_000)
                .run_suspending(move |yielder| outermost(&program, seed, &|| yielder.suspend(())))
        };
        prop_assert!(report.is_clean(), "{}", report);
        prop_assert_eq!(found, Some(expected), "{}", report);
    }
}
