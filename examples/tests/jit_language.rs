//! The language of `examples/jit`: compiled code does what the interpreter does, on a plain stack, on one
//! that moves, with frames of Rust code among its own or with precise maps and none, and on one where every
//! word that no stack map names is spoiled at every `yield`.

#[path = "../jit/compiler.rs"]
mod compiler;
#[path = "../jit/interpreter.rs"]
mod interpreter;
#[path = "../jit/module.rs"]
#[allow(dead_code, reason = "the example prints what is not needed here")]
mod module;
#[path = "../jit/syntax.rs"]
mod syntax;

use std::arch::naked_asm;
use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::fs;
use std::hint::black_box;
use std::ops::Range;
use std::ptr;

use interpreter::{Limits, Trap};
use module::{Entry, Module};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use regrow::{Builder, Coroutine, CoroutineResult, Maps, Yielder, current_stats};
use syntax::{Program, parse};

/// What a program yields and returns.
#[derive(PartialEq, Eq, Debug)]
struct Trace {
    yields: Vec<i64>,
    result: i64,
}

/// What a program is resumed with after this many yields.
fn answer(yields: usize, value: i64) -> i64 {
    value.wrapping_mul(0x5851_f42d_4c95_7f2d).rotate_left(17) ^ yields as i64
}

fn interpret(program: &Program, arguments: [i64; 2]) -> Result<Trace, Trap> {
    let mut yields = Vec::new();
    let limits = Limits { fuel: 100_000, depth: 200 };
    let result = interpreter::run(program, arguments, limits, |value| {
        yields.push(value);
        answer(yields.len(), value)
    })?;
    Ok(Trace { yields, result })
}

/// The context of programs that run on the test's own stack.
struct Recorder<'m> {
    module: &'m Module,
    yields: RefCell<Vec<i64>>,
    frames: Frames,
}

/// What [`spoil`] saw in the frames.
#[derive(Default)]
struct Frames {
    /// Words that point into the stack, as their maps say.
    pointers: Cell<usize>,
    /// Words that point into the stack and are not in a map. They have been spoiled.
    dead: Cell<usize>,
    /// What contradicts the maps.
    faults: RefCell<Vec<String>>,
    /// Spoiled words point here, and this to itself: a program that uses one goes wrong, but does not
    /// crash.
    decoy: Cell<usize>,
}

impl<'m> Recorder<'m> {
    fn new(module: &'m Module) -> Self {
        Self { module, yields: RefCell::default(), frames: Frames::default() }
    }

    /// # Safety
    /// `context` is a recorder.
    unsafe extern "C" fn record(context: *const c_void, value: i64) -> i64 {
        // SAFETY: by the caller's word.
        let mut yields = unsafe { &*context.cast::<Self>() }.yields.borrow_mut();
        yields.push(value);
        answer(yields.len(), value)
    }
}

fn run_plain(program: &Program, arguments: [i64; 2]) -> Trace {
    let module = compiler::compile(program, Recorder::record).unwrap();
    let recorder = Recorder::new(&module);
    // SAFETY: the module lives, and was compiled for this context.
    let result = unsafe { module.entry()(ptr::from_ref(&recorder).cast(), &arguments) };
    Trace { yields: recorder.yields.take(), result }
}

/// # Safety
/// `context` is the yielder of the running coroutine.
unsafe extern "C" fn suspend(context: *const c_void, value: i64) -> i64 {
    // SAFETY: by the caller's word.
    unsafe { &*context.cast::<Yielder<usize, usize>>() }.suspend(value as usize) as i64
}

/// Coroutines on stacks of 2 KiB that may move.
fn relocating() -> Builder {
    // SAFETY: compiled code keeps pointers in its frames and in registers; the closure of `run_moving` keeps
    // none.
    unsafe { Builder::new().learn(false).relocating() }
}

/// Resumes a coroutine to its end, with `look` after each yield.
fn resume_to_end<R: 'static>(
    mut coroutine: Coroutine<usize, usize, R>,
    mut input: usize,
    mut look: impl FnMut(&Coroutine<usize, usize, R>),
) -> (Vec<i64>, R) {
    let mut yields = Vec::new();
    loop {
        match coroutine.resume(input) {
            CoroutineResult::Yield(value) => {
                yields.push(value as i64);
                input = answer(yields.len(), value as i64) as usize;
                look(&coroutine);
            }
            CoroutineResult::Return(result) => return (yields, result),
        }
    }
}

/// Runs a program below so many frames of Rust code; also returns how often the stack grew.
fn run_moving(program: &Program, arguments: [i64; 2], frames: usize) -> (Trace, u64) {
    let module = compiler::compile(program, suspend).unwrap();
    let entry = module.entry();
    let coroutine = relocating().spawn(move |yielder: &Yielder<usize, usize>, _| {
        // SAFETY: the module outlives the coroutine, and was compiled for this context.
        let result = below(frames, &|| unsafe { entry(ptr::from_ref(yielder).cast(), &arguments) });
        (result, current_stats().map_or(0, |stats| stats.growths))
    });
    let (yields, (result, growths)) = resume_to_end(coroutine, 0, |_| {});
    (Trace { yields, result }, growths)
}

/// Runs a program with no frame of Rust code below it, and no word judged by its value: else its stack
/// would not have moved. Also returns how often it had at the last yield.
fn run_precise(program: &Program, arguments: [i64; 2]) -> (Trace, u64) {
    let module = compiler::compile(program, suspend).unwrap();
    // SAFETY: compiled code does not unwind, the module outlives the coroutine, and was compiled for this
    // context.
    let coroutine = unsafe { relocating().maps(Maps::Precise).spawn_raw(module.raw_entry()).unwrap() };
    let mut moves = 0;
    let (yields, result) = resume_to_end(coroutine, ptr::from_ref(&arguments) as usize, |coroutine| {
        assert_eq!(coroutine.last_not_moved(), None);
        moves = coroutine.stats().growths;
    });
    (Trace { yields, result: result as i64 }, moves)
}

/// Calls `f` with that many frames more on the stack.
fn below(frames: usize, f: &dyn Fn() -> i64) -> i64 {
    if frames == 0 { f() } else { black_box(below(frames - 1, black_box(f))) }
}

/// Runs a program whose frames and callee-saved registers are spoiled at each yield, but for the words that
/// its stack maps name; those must point into the stack. What is lost was not needed, or the trace differs.
fn run_spoiled(program: &Program, arguments: [i64; 2]) -> (Trace, Frames) {
    let module = compiler::compile(program, spoil_and_record).unwrap();
    let recorder = Recorder::new(&module);
    // SAFETY: as in `run_plain`.
    let result = unsafe { enter(module.entry(), ptr::from_ref(&recorder).cast(), &arguments) };
    (Trace { yields: recorder.yields.take(), result }, recorder.frames)
}

/// Calls `entry` with 0 in all registers it must preserve: whatever is found in them later is its own, and
/// the chain of frame pointers ends there.
#[unsafe(naked)]
unsafe extern "C" fn enter(entry: Entry, context: *const c_void, arguments: *const [i64; 2]) -> i64 {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 8",
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "xor ebp, ebp",
        "xor ebx, ebx",
        "xor r12d, r12d",
        "xor r13d, r13d",
        "xor r14d, r14d",
        "xor r15d, r15d",
        "call rax",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// The `yield` function: shows [`spoil`] the registers that compiled code trusts it to preserve.
#[unsafe(naked)]
unsafe extern "C" fn spoil_and_record(context: *const c_void, value: i64) -> i64 {
    naked_asm!(
        "push r15",
        "push r14",
        "push r13",
        "push r12",
        "push rbx",
        "mov rdx, rsp",
        "mov rcx, rbp",
        "call {spoil}",
        "pop rbx",
        "pop r12",
        "pop r13",
        "pop r14",
        "pop r15",
        "ret",
        spoil = sym spoil,
    )
}

/// Callee-saved registers, then the return address; above it, the frame of the compiled function that
/// yields.
#[repr(C)]
struct Saved {
    registers: [usize; 5],
    return_address: usize,
}

/// # Safety
/// As called by [`spoil_and_record`], below [`enter`], on a recorder.
unsafe extern "C" fn spoil(context: *const c_void, value: i64, saved: *mut Saved, mut rbp: usize) -> i64 {
    // SAFETY: by the caller's word. Compiled code does not look at the recorder.
    let Recorder { module, frames, .. } = unsafe { &*context.cast::<Recorder<'_>>() };
    // All frames lie below the recorder; a pointer may have outlived the frame it points to.
    let window = saved as usize - (64 << 10)..context as usize + 1;
    // SAFETY: pushed for this.
    let pushed = unsafe { &mut *saved };
    pushed.registers.iter_mut().for_each(|register| frames.spoil(register, &window));
    let mut return_address = pushed.return_address;
    // SAFETY: one past the pushed words, in the same stack.
    let mut sp = unsafe { saved.add(1) } as usize;
    while rbp != 0 {
        let pointers = frames.pointers_of(module, return_address, rbp - sp);
        // SAFETY: the words of a frame of compiled code, from its rsp to its rbp: nobody refers to them
        // now.
        let words = unsafe { std::slice::from_raw_parts_mut(sp as *mut usize, (rbp - sp) / 8) };
        for (index, word) in words.iter_mut().enumerate() {
            if pointers.contains(&(index * 8)) {
                frames.see_pointer(*word, &window);
            } else {
                frames.spoil(word, &window);
            }
        }
        sp = rbp + 16;
        // SAFETY: compiled code keeps its caller's rbp and the return address there.
        [rbp, return_address] = unsafe { *(rbp as *const [usize; 2]) };
    }
    // SAFETY: by the caller's word.
    unsafe { Recorder::record(context, value) }
}

impl Frames {
    /// A word that no map names, so it should not matter if it points into the stack.
    fn spoil(&self, word: &mut usize, window: &Range<usize>) {
        if window.contains(word) {
            self.decoy.set(self.decoy.as_ptr() as usize);
            *word = self.decoy.get();
            self.dead.update(|dead| dead + 1);
        }
    }

    /// A word that points into the stack, if its map is right.
    fn see_pointer(&self, word: usize, window: &Range<usize>) {
        if !window.contains(&word) {
            self.faults.borrow_mut().push(format!("{word:#x} is no pointer into the stack"));
        }
        self.pointers.update(|pointers| pointers + 1);
    }

    /// Offsets from rsp of the words that hold pointers at a call, by the map of a frame of `size` bytes.
    fn pointers_of(&self, module: &Module, return_address: usize, size: usize) -> Vec<usize> {
        let within =
            |function: &&module::Function| return_address.wrapping_sub(function.address) < function.size();
        let Some(function) = module.functions.iter().find(within) else {
            self.faults.borrow_mut().push(format!("{return_address:#x} is not in compiled code"));
            return Vec::new();
        };
        let map =
            function.stack_maps().iter().find(|(at, ..)| function.address + *at as usize == return_address);
        let Some((_, span, map)) = map else { return Vec::new() };
        if *span as usize != size {
            self.faults
                .borrow_mut()
                .push(format!("{}: {span} bytes by its map, {size} in fact", function.name));
        }
        map.entries().map(|(_, offset)| offset as usize).collect()
    }
}

const EXAMPLES: [&str; 5] = [
    include_str!("../jit/programs/ladder.jit"),
    include_str!("../jit/programs/record.jit"),
    include_str!("../jit/programs/sorting.jit"),
    include_str!("../jit/programs/tree.jit"),
    include_str!("../jit/programs/witness.jit"),
];

/// No pointer is live at a call but in the words the maps name, and those all hold pointers.
#[test]
fn maps_of_the_examples_are_precise() {
    for source in EXAMPLES {
        let program = parse(source).unwrap();
        let (trace, frames) = run_spoiled(&program, [60, 5]);
        assert_eq!(trace, interpret(&program, [60, 5]).unwrap(), "{source}");
        assert!(frames.faults.borrow().is_empty(), "{:?}\n{source}", frames.faults);
        let (pointers, dead) = (frames.pointers.get(), frames.dead.get());
        assert!(pointers > 100 && dead > 10, "{pointers} pointers, {dead} dead words\n{source}");
    }
}

const FAILURES: &str = "../proptest-regressions/jit_language.txt";

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(FAILURES))),
        ..ProptestConfig::default()
    })]

    /// Random programs mean the same interpreted, compiled, on stacks that move, and with unmapped words
    /// spoiled.
    #[test]
    fn compiled_programs_do_what_the_interpreter_does(
        choices in vec(any::<u32>(), 0..600),
        depth in 0..16i64,
        seed in any::<i64>(),
        frames in 0..20usize,
    ) {
        let source = format!("# main({depth}, {seed})\n{}", Writer::program(&choices));
        // Found here if compiled code ends the process.
        fs::write(concat!(env!("CARGO_TARGET_TMPDIR"), "/jit_language.jit"), &source)?;
        let program = parse(&source).map_err(|error| TestCaseError::fail(format!("{error}\n{source}")))?;
        let expected = interpret(&program, [depth, seed]);
        prop_assume!(expected.is_ok()); // compiled code need not notice what the interpreter traps
        let expected = expected.unwrap();
        prop_assert_eq!(&run_plain(&program, [depth, seed]), &expected, "plain\n{}", source);
        prop_assert_eq!(&run_moving(&program, [depth, seed], frames).0, &expected, "moving\n{}", source);
        prop_assert_eq!(&run_precise(&program, [depth, seed]).0, &expected, "precise\n{}", source);
        let (trace, frames) = run_spoiled(&program, [depth, seed]);
        prop_assert_eq!(&trace, &expected, "spoiled\n{}", source);
        prop_assert!(frames.faults.borrow().is_empty(), "{:?}\n{source}", frames.faults);
    }
}

/// Writes random programs without errors of syntax or type. They terminate: each function passes on less
/// than its first parameter, and loops count. When the choices have run out, all are 0, which ends
/// everything soon.
struct Writer<'c> {
    choices: std::slice::Iter<'c, u32>,
    text: String,
    /// Stars of the parameters of each function, `main` not among them.
    functions: Vec<Vec<usize>>,
    /// Locals in scope, oldest first: name and stars.
    scope: Vec<(String, usize)>,
    names: usize,
    /// Calls that may still be written into this function.
    calls: usize,
}

impl<'c> Writer<'c> {
    fn program(choices: &'c [u32]) -> String {
        let mut writer = Self {
            choices: choices.iter(),
            text: String::new(),
            functions: Vec::new(),
            scope: Vec::new(),
            names: 0,
            calls: 0,
        };
        for _ in 0..1 + writer.choose(3) {
            let parameters = (0..writer.choose(5)).map(|_| writer.choose(3)).collect();
            writer.functions.push(parameters);
        }
        writer.function("main", &[0]);
        for function in 0..writer.functions.len() {
            let parameters = writer.functions[function].clone();
            writer.function(&format!("f{function}"), &parameters);
        }
        writer.text
    }

    fn choose(&mut self, below: usize) -> usize {
        self.choices.next().map_or(0, |&choice| choice as usize % below)
    }

    fn name(&mut self, stars: usize) -> String {
        let name = format!("{}{}", ["i", "p", "q", "r"][stars], self.names);
        self.names += 1;
        name
    }

    fn declare(&mut self, stars: usize, value: &str) {
        let name = self.name(stars);
        self.text += &format!("let {name} = {value};\n");
        self.scope.push((name, stars));
    }

    fn function(&mut self, name: &str, parameters: &[usize]) {
        self.scope.clear();
        self.calls = 2;
        let mut header = vec!["n: int".to_string()];
        for &stars in parameters {
            let name = self.name(stars);
            header.push(format!("{name}: {}int", "*".repeat(stars)));
            self.scope.push((name, stars));
        }
        self.text += &format!("fn {name}({}) {{\n", header.join(", "));
        // From here on there is something of every type.
        self.declare(0, "n");
        for stars in 1..3 {
            let pointee = format!("&{}", self.scope[self.scope.len() - 1].0);
            self.declare(stars, &pointee);
        }
        let value = self.int(1);
        self.text += &format!("if n < 1 {{ return {value}; }}\n");
        self.block(3);
        let value = self.int(3);
        self.text += &format!("return {value};\n}}\n");
    }

    fn block(&mut self, depth: usize) {
        let outer = self.scope.len();
        for _ in 0..self.choose(3 * depth + 1) {
            self.statement(depth);
        }
        self.scope.truncate(outer);
    }

    fn statement(&mut self, depth: usize) {
        match self.choose(if depth > 1 { 10 } else { 8 }) {
            0 => {
                let value = self.int(2);
                self.declare(0, &value);
            }
            1 => {
                let stars = 1 + self.choose(2);
                let value = self.pointer(stars, self.scope.len());
                self.declare(stars, &value);
            }
            2 => {
                let stars = self.choose(3);
                let target = self.local(stars, self.scope.len());
                // Nothing younger than itself, which would die earlier.
                let younger = self.scope.iter().position(|(name, _)| *name == target).unwrap_or(0);
                let value = if stars == 0 { self.int(3) } else { self.pointer(stars, younger) };
                self.text += &format!("{target} = {value};\n");
            }
            3 | 4 => {
                let (target, value) = (self.pointer(1, self.scope.len()), self.int(3));
                self.text += &format!("*{target} = {value};\n");
            }
            5 => {
                let (target, value) = (self.pointer(2, self.scope.len()), self.pointer(1, self.scope.len()));
                self.text += &format!("*{target} = {value};\n");
            }
            6 | 7 => {
                let value = self.int(3);
                self.text += &format!("{value};\n");
            }
            8 => {
                let condition = self.int(2);
                self.text += &format!("if {condition} & 1 {{\n");
                self.block(depth - 1);
                self.text += "} else {\n";
                self.block(depth - 1);
                self.text += "}\n";
            }
            _ => {
                let (counter, turns) = (self.name(0), self.choose(4));
                self.text += &format!("let {counter} = 0;\nwhile {counter} < {turns} {{\n");
                self.text += &format!("{counter} = {counter} + 1;\n");
                self.block(depth - 1);
                self.text += "}\n";
            }
        }
    }

    /// A local of a type, of the oldest `limit` ones or the first such.
    fn local(&mut self, stars: usize, limit: usize) -> String {
        let of_type = |scope: &[(String, usize)]| -> Vec<String> {
            scope.iter().filter(|(_, others)| *others == stars).map(|(name, _)| name.clone()).collect()
        };
        let some = of_type(&self.scope[..limit]);
        let some = if some.is_empty() { of_type(&self.scope)[..1].to_vec() } else { some };
        let index = self.choose(some.len());
        some[index].clone()
    }

    fn pointer(&mut self, stars: usize, limit: usize) -> String {
        match self.choose(3) {
            0 => self.local(stars, limit),
            1 if stars < 2 => format!("*{}", self.local(stars + 1, limit)),
            _ => format!("&{}", self.local(stars - 1, limit)),
        }
    }

    fn int(&mut self, depth: usize) -> String {
        match self.choose(if depth > 0 { 9 } else { 4 }) {
            0 => self.local(0, self.scope.len()),
            1 => self.choose(1 << 20).to_string(),
            2 => format!("*{}", self.pointer(1, self.scope.len())),
            3 => format!("**{}", self.pointer(2, self.scope.len())),
            4 => format!("(yield {})", self.int(depth - 1)),
            5 => format!("-{}", self.int(depth - 1)),
            6 => self.call(depth - 1),
            _ => {
                let (left, right) = (self.int(depth - 1), self.int(depth - 1));
                let operator = self.choose(syntax::OPERATORS.len());
                format!("({left} {} {right})", syntax::OPERATORS[operator].0)
            }
        }
    }

    fn call(&mut self, depth: usize) -> String {
        if self.calls == 0 {
            return self.int(0);
        }
        self.calls -= 1;
        let function = self.choose(self.functions.len());
        let mut arguments = vec!["n - 1".to_string()];
        for stars in self.functions[function].clone() {
            let limit = self.scope.len();
            arguments.push(if stars == 0 { self.int(depth) } else { self.pointer(stars, limit) });
        }
        format!("f{function}({})", arguments.join(", "))
    }
}

/// Stacks of compiled code do move, and come back with the right result.
#[test]
fn the_examples_run_on_stacks_that_move() {
    for source in EXAMPLES {
        let program = parse(source).unwrap();
        let expected = interpret(&program, [150, 3]).unwrap();
        for (trace, growths) in [run_moving(&program, [150, 3], 0), run_precise(&program, [150, 3])] {
            assert_eq!(trace, expected);
            assert!(growths >= 3, "{growths} growths: {source}");
        }
    }
}

fn result(source: &str, arguments: [i64; 2]) -> Result<i64, Trap> {
    let program = parse(source).unwrap();
    let expected = interpret(&program, arguments)?;
    assert_eq!(run_plain(&program, arguments), expected);
    Ok(expected.result)
}

#[test]
fn what_expressions_mean() {
    let of =
        |expression| result(&format!("fn main(a: int, b: int) {{ return {expression}; }}"), [7, -2]).unwrap();
    assert_eq!(of("a + b * 3"), 1);
    assert_eq!(of("a - b - 1"), 8);
    assert_eq!(of("-a * b"), 14);
    assert_eq!(of("1 << 65 | b >> 1 & 1"), 3);
    assert_eq!(of("b >> 1"), -1);
    assert_eq!(of("(a == 7) + (a != 7) + (b < a) + (a <= 7)"), 3);
    assert_eq!(of("a ^ a == 7"), 6);
    assert_eq!(of("9223372036854775807 + 1"), i64::MIN);
}

#[test]
fn what_statements_mean() {
    let fibonacci =
        "fn main(n: int, b: int) { if n < 2 { return n; } return main(n - 1, 0) + main(n - 2, 0); }";
    assert_eq!(result(fibonacci, [15, 0]), Ok(610));
    let count = "fn main(n: int, b: int) { let s = 0; while s * s < n { s = s + 1; } return s; }";
    assert_eq!(result(count, [50, 0]), Ok(8));
    let swap = "fn main(a: int, b: int) { let p = &a; swap(&p, &b); *p = *p * 10; return a + b; }
                fn swap(p: **int, q: *int) { let old = **p; **p = *q; *p = q; *q = old; }";
    assert_eq!(result(swap, [1, 2]), Ok(12));
    assert_eq!(
        result("fn main(a: int, b: int) { { } }".replace("{ { } }", "{ a; }").as_str(), [1, 2]),
        Ok(0)
    );
    let shadow = "fn main(a: int, b: int) { if 1 { let a = 5; b = a; } return a * 10 + b; }";
    assert_eq!(result(shadow, [1, 2]), Ok(15));
    // The pointer on the left is read before the value on the right.
    let order = "fn main(a: int, b: int) { let p = &a; *p = turn(&p, &b); return a * 10 + b; }
                 fn turn(p: **int, q: *int) { *p = q; return 9; }";
    assert_eq!(result(order, [1, 2]), Ok(92));
}

#[test]
fn what_the_interpreter_traps() {
    let dead_frame =
        "fn main(a: int, b: int) { let p = &a; f(&p); return *p; } fn f(p: **int) { let x = 1; *p = &x; }";
    assert_eq!(result(dead_frame, [1, 2]), Err(Trap::Dangling));
    let dead_block = "fn main(a: int, b: int) { let p = &a; if 1 { let x = 1; p = &x; } return *p; }";
    assert_eq!(result(dead_block, [1, 2]), Err(Trap::Dangling));
    let reborn = "fn main(a: int, b: int) {
                      let p = &b;
                      while a { let x = 1; if a == 1 { x = *p; } p = &x; a = a - 1; }
                  }";
    assert_eq!(result(reborn, [2, 2]), Err(Trap::Dangling));
    assert_eq!(result("fn main(a: int, b: int) { while 1 { } }", [1, 2]), Err(Trap::Fuel));
    assert_eq!(result("fn main(a: int, b: int) { return main(a, b); }", [1, 2]), Err(Trap::Depth));
}

#[test]
fn what_the_parser_rejects() {
    let error = |source: &str| parse(source).err().map(|error| error.to_string()).unwrap_or_default();
    let body = |body: &str| error(&format!("fn main(a: int, b: int) {{\n{body}\n}}"));
    assert_eq!(body("c = 1;"), "line 2: no local c");
    assert_eq!(body("f(1);"), "line 2: no function f");
    assert_eq!(body("main(1);"), "line 2: main takes 2 arguments");
    assert_eq!(body("main(1, &a);"), "line 2: expected int, found *int");
    assert_eq!(body("return *a;"), "line 2: an int is no pointer");
    assert_eq!(body("let p = &a; p = &p;"), "line 2: expected *int, found **int");
    assert_eq!(body("let p = &a; return p + 1;"), "line 2: expected int, found *int");
    assert_eq!(body("1 = 2;"), "line 2: only a local and what a pointer points to can be assigned to");
    assert_eq!(body("if 1 { let x = 1; } x = 2;"), "line 2: no local x");
    assert_eq!(body("a = 1 $ 2;"), "line 2: what is this: $ 2;");
    assert_eq!(body("a = 9223372036854775808;"), "line 2: 9223372036854775808 is no number of 64 bits");
    assert_eq!(body("let if = 1;"), "line 2: expected a name, found if");
    assert_eq!(error("fn f() { }"), "line 1: a program needs a function main of two ints to start with");
    assert_eq!(error("fn f() { }\nfn f() { }"), "line 2: a second function f");
    assert_eq!(
        error("fn f(a: int, b: int, c: int, d: int, e: int, f: int) { }"),
        "line 1: f has more than 5 parameters"
    );
}
