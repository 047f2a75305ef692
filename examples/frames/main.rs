//! Looking at a stack: a coroutine that has suspended deep inside a recursion, a `dyn` call, code with a stack map, a
//! sort's comparator and a formatter, printed as a table and drawn as a picture.
//!
//! `cargo run --release --example frames -- [--inlined] [--svg FILE]`, with `--features backtrace` for files and lines.

mod svg;

use std::arch::global_asm;
use std::ffi::c_void;
use std::fmt;
use std::hint::black_box;

use regrow::map::{self, FrameMap, Place, Register, Registration, Verdict};
use regrow::{Builder, Yielder};

type Out = Yielder<(), u64>;

/// What a tree of accounts is visited with.
trait Visitor {
    fn visit(&self, depth: usize, balances: &mut [u64; 12]) -> u64;
}

/// Sorts balances at the bottom of the tree, by how they are written.
struct Sorter<'a>(&'a Out);

impl Visitor for Sorter<'_> {
    #[inline(never)]
    fn visit(&self, depth: usize, balances: &mut [u64; 12]) -> u64 {
        let mut sort = || {
            let longest = black_box([depth as u64; 250]);
            balances.sort_by(|a, b| {
                let written = [Money(*a, self.0), Money(*b, self.0)].map(|money| money.to_string());
                written[0].len().cmp(&written[1].len()).then_with(|| written[0].cmp(&written[1]))
            });
            balances[0] + longest[7]
        };
        through_compiled_code(&mut sort)
    }
}

/// Suspends each time it is written.
struct Money<'a>(u64, &'a Out);

impl fmt::Display for Money<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(cents, yielder) = self;
        write!(f, "{}", cents / 100)?;
        yielder.suspend(*cents);
        write!(f, ".{:02}", cents % 100)
    }
}

/// A recursion with an array in each frame, which its callee gets a pointer to.
#[inline(never)]
fn descend(depth: usize, visitor: &dyn Visitor, above: &mut [u64; 12]) -> u64 {
    let mut balances = above.map(|balance| balance * 31 % 100_003);
    let sum = match depth {
        0 => visitor.visit(depth, &mut balances),
        _ => descend(depth - 1, visitor, &mut balances),
    };
    black_box(sum) + balances[depth]
}

// A function as a compiler that records stack maps would make it: a frame of a pointer to a local, the local itself, a
// counter, and padding. It calls `rdi` with `rsi`.
global_asm!(
    ".globl compiled_code",
    ".type compiled_code, @function",
    "compiled_code:",
    "  .cfi_startproc",
    "  push rbx",
    "  .cfi_adjust_cfa_offset 8",
    "  .cfi_offset rbx, -16",
    "  sub rsp, 48",
    "  .cfi_adjust_cfa_offset 48",
    "  mov rbx, rsi",           // rbx <- the pointer that it keeps across the call
    "  mov qword ptr [rsp], 3", // a counter
    "  mov qword ptr [rsp + 8], 4",
    "  mov qword ptr [rsp + 16], 5",
    "  lea rax, [rsp + 8]",
    "  mov [rsp + 24], rax", // a pointer to a local
    "  mov [rsp + 32], rsi", // and one to its caller's frame
    "  mov qword ptr [rsp + 40], 0",
    "  mov rax, rdi",
    "  mov rdi, rsi",
    "  call rax",
    "compiled_code_after_call:",
    "  add rsp, 48",
    "  .cfi_adjust_cfa_offset -48",
    "  pop rbx",
    "  .cfi_adjust_cfa_offset -8",
    "  ret",
    "  .cfi_endproc",
    ".size compiled_code, . - compiled_code",
);

unsafe extern "C-unwind" {
    fn compiled_code(function: unsafe extern "C-unwind" fn(*mut c_void) -> u64, argument: *mut c_void)
    -> u64;
    fn compiled_code_after_call();
}

/// Tells regrow what that compiler knows about words. Where the frame ends is in its unwind tables.
fn register_compiled_code() -> Registration<'static> {
    let map = FrameMap::at_return(compiled_code_after_call as *const () as usize)
        .word(Place::at(Register::RSP, 24), Verdict::Pointer)
        .word(Place::at(Register::RSP, 32), Verdict::Pointer)
        .register(Register::RBX, Verdict::Pointer)
        .rest(Verdict::Data);
    // SAFETY: true of the assembly above, which stays.
    unsafe { map::register(vec![map]) }.expect("nobody else speaks for this code")
}

fn through_compiled_code<F: FnMut() -> u64>(f: &mut F) -> u64 {
    unsafe extern "C-unwind" fn call_back<F: FnMut() -> u64>(f: *mut c_void) -> u64 {
        // SAFETY: the pointer that `through_compiled_code` passes on.
        unsafe { (*f.cast::<F>())() }
    }
    // SAFETY: it calls `call_back` with the pointer, and returns what that returns.
    unsafe { compiled_code(call_back::<F>, (&raw mut *f).cast()) }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut picture = None;
    let mut inlined = false;
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            lexopt::Arg::Long("svg") => picture = Some(arguments.value()?),
            lexopt::Arg::Long("inlined") => inlined = true,
            _ => return Err(argument.unexpected().into()),
        }
    }

    let _registration = register_compiled_code();
    // SAFETY: the stack is pointed to by itself only.
    let builder = unsafe { Builder::new().name("ledger").relocating() };
    let mut coroutine = builder.spawn(|yielder: &Out, ()| {
        let mut balances = std::array::from_fn(|index| 7919 * (index as u64 + 1));
        descend(3, &Sorter(yielder), &mut balances)
    });
    for _ in 0..5 {
        coroutine.resume(()).yielded().ok_or("it returned already")?;
    }

    let frames = coroutine.frames();
    if inlined {
        println!("{frames:#}");
    } else {
        println!("{frames}");
    }
    if let Some(file) = picture {
        std::fs::write(&file, svg::draw(&frames))?;
        println!("drawn in {}", file.display());
    }
    Ok(())
}
