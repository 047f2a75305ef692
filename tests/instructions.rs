//! How many instructions a switch takes, and which: decoded from the code of two functions of this program, one that
//! resumes and one that suspends. As compilers optimise it, so in release builds only.
#![cfg(not(debug_assertions))]

use std::collections::{BTreeMap, VecDeque};
use std::hint::black_box;
use std::slice;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Formatter, Instruction, InstructionInfoFactory,
    IntelFormatter, OpAccess, Register,
};
use object::{Object, ObjectSymbol};
use regrow::{Coroutine, CoroutineResult, Yielder};

#[inline(never)]
fn probe_resume(coroutine: &mut Coroutine<u64, u64, ()>, value: u64) -> u64 {
    match coroutine.resume(value) {
        CoroutineResult::Yield(value) => value,
        CoroutineResult::Return(()) => 0,
    }
}

#[inline(never)]
fn probe_suspend(yielder: &Yielder<u64, u64>, value: u64) -> u64 {
    yielder.suspend(value)
}

/// The instructions of the function at `address`.
fn decode(address: usize) -> BTreeMap<u64, Instruction> {
    let program = std::fs::read("/proc/self/exe").unwrap();
    let file = object::File::parse(&*program).unwrap();
    // Where the program is loaded: this function's address less its symbol's is the same for all.
    let symbols = || file.symbols().filter(|symbol| symbol.size() != 0);
    let anchor =
        symbols().find(|symbol| symbol.name().is_ok_and(|name| name.contains("probe_suspend"))).unwrap();
    let load = probe_suspend as *const () as u64 - anchor.address();
    let symbol = symbols().find(|symbol| symbol.address() + load == address as u64).unwrap();
    // SAFETY: the code of a function of this program, as its symbol says.
    let code = unsafe { slice::from_raw_parts(address as *const u8, symbol.size() as usize) };
    Decoder::with_ip(64, code, address as u64, DecoderOptions::NONE)
        .into_iter()
        .map(|instruction| (instruction.ip(), instruction))
        .collect()
}

/// The shortest way from `start` to an instruction that is `last`, without calls.
fn path(
    code: &BTreeMap<u64, Instruction>,
    start: u64,
    last: impl Fn(&Instruction) -> bool,
) -> Vec<Instruction> {
    let mut ways = VecDeque::from([vec![start]]);
    let mut seen = vec![start];
    while let Some(way) = ways.pop_front() {
        let instruction = &code[way.last().unwrap()];
        if last(instruction) {
            return way.iter().map(|at| code[at]).collect();
        }
        let next = match instruction.flow_control() {
            FlowControl::Next => vec![instruction.next_ip()],
            FlowControl::ConditionalBranch => vec![instruction.next_ip(), instruction.near_branch_target()],
            FlowControl::UnconditionalBranch => vec![instruction.near_branch_target()],
            _ => vec![],
        };
        for next in next {
            if code.contains_key(&next) && !seen.contains(&next) {
                seen.push(next);
                ways.push_back(way.iter().copied().chain([next]).collect());
            }
        }
    }
    panic!("no way without a call");
}

/// The instructions of a probe that switches: up to the jump to the other side, and from where it comes back.
fn switch_of(probe: usize) -> Vec<Instruction> {
    let code = decode(probe);
    let there = path(&code, probe as u64, |instruction| instruction.code() == Code::Jmp_rm64);
    let landing = there
        .iter()
        .rfind(|instruction| instruction.code() == Code::Lea_r64_m && instruction.is_ip_rel_memory_operand())
        .expect("the address to come back to is taken")
        .ip_rel_memory_address();
    let back = path(&code, landing, |instruction| instruction.flow_control() == FlowControl::Return);
    there.into_iter().chain(back).collect()
}

fn listing(instructions: &[Instruction]) -> String {
    let mut formatter = IntelFormatter::new();
    let mut out = String::new();
    for instruction in instructions {
        formatter.format(instruction, &mut out);
        out.push('\n');
    }
    out
}

/// Without what every function does: save and restore what it uses.
fn own(instruction: &&Instruction) -> bool {
    let code = instruction.code();
    let frame = matches!(code, Code::Push_r64 | Code::Pop_r64 | Code::Retnq)
        || instruction.op0_register() == Register::RSP
            && instruction.op_count() == 2
            && !matches!(code, Code::Mov_r64_rm64 | Code::Mov_rm64_r64);
    !frame
}

fn check(what: &str, probe: usize, most: usize) {
    let instructions = switch_of(probe);
    let count = instructions.iter().filter(own).count();
    let listing = listing(&instructions);
    println!("{what}: {count} instructions\n{listing}");
    assert!(count <= most, "{what} takes {count} instructions, {most} at most were expected:\n{listing}");
    let mut factory = InstructionInfoFactory::new();
    for instruction in &instructions {
        let locked = instruction.has_lock_prefix() || instruction.code() == Code::Xchg_rm64_r64;
        assert!(!locked, "an atomic operation in {what}:\n{listing}");
        // A counter: memory that is read and written by one instruction.
        let counts = factory
            .info(instruction)
            .used_memory()
            .iter()
            .any(|memory| matches!(memory.access(), OpAccess::ReadWrite | OpAccess::ReadCondWrite));
        assert!(!counts, "memory is changed in place in {what}:\n{listing}");
    }
}

/// What the two sides of a switch cost, without the saving of registers around them. Of the thread's variables only one is
/// used, which is one instruction away: nothing is called, not even for its address.
#[test]
fn a_switch_is_a_few_plain_instructions() {
    let mut echo = Coroutine::<u64, u64, ()>::new(|yielder, mut value| {
        loop {
            value = probe_suspend(yielder, black_box(value));
        }
    });
    assert_eq!(probe_resume(&mut echo, black_box(3)), 3);
    check("a resume", probe_resume as *const () as usize, 32);
    check("a suspend", probe_suspend as *const () as usize, 21);
}
