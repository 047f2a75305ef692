//! Breakpoints at every growth point of the program's own code, so that only moves cost a trap.
//!
//! The code of the executable (or library) that holds this crate is mapped privately, so a write changes only this process's
//! copy. The first byte of each growth point becomes an `int3`. The instruction itself runs elsewhere, so the breakpoint always
//! stays in place:
//!
//! ```text
//!   a: push rbp         a: int3 ──trap──► move the stack, go on at ─►  d: push rbp
//!   b: mov rbp, rsp     b: mov rbp, rsp ◄────────────────────────────     jmp  b
//!
//!   a: call f           a: int3 ──trap──►                              d: push [b as a constant]
//!   b: ...              b: ... ◄──────────── f returns to b ──────        jmp  f
//! ```
//!
//! Not patched:
//! - functions that the handlers call, because a trap in a handler ends the process. That includes functions whose address the
//!   handlers take, or find in data they use. Functions that do not return (panics) are not followed;
//! - functions that do not decode to their end because they contain data;
//! - growth points in probe loops, because the fault handler reads the instruction after them.

use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::collections::HashSet;
use std::sync::OnceLock;

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, Decoder, DecoderOptions, FlowControl, Instruction,
    InstructionBlock, OpKind, Register,
};

use super::functions::{Object, holding, loaded_objects, read};
use crate::grow::point::probe_loop_end;
use crate::grow::relocate::is_growth_point;
use crate::size::PAGE;

/// One growth point.
struct Patch {
    at: usize,
    original: u8,
    /// Where the displaced instruction runs.
    displaced: usize,
}

/// The program's code, prepared once per process.
struct Patches {
    code: Range<usize>,
    /// Sorted by `at`, which is also the order of `displaced`.
    list: Vec<Patch>,
}

static PATCHES: OnceLock<Result<Patches, &'static str>> = OnceLock::new();

const INT3: u8 = 0xcc;

/// The code is writable, and the breakpoints are in or have been in.
static INSERTED: AtomicBool = AtomicBool::new(false);

/// The breakpoints are out, but the pages are still writable.
static REMOVED: AtomicBool = AtomicBool::new(false);

#[inline(never)]
pub(super) fn insert(handlers: &[usize]) -> Result<(), &'static str> {
    let patches = PATCHES.get_or_init(|| prepare(handlers)).as_ref().map_err(|error| *error)?;
    protect(&patches.code, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)?;
    REMOVED.store(false, Ordering::Relaxed);
    INSERTED.store(true, Ordering::Relaxed);
    patches.list.iter().for_each(|patch| write(patch.at, INT3));
    Ok(())
}

/// Removes the breakpoints if they are in. Callable in a handler, and more than once.
pub(super) fn remove() {
    if INSERTED.load(Ordering::Relaxed)
        && let Some(Ok(patches)) = PATCHES.get()
    {
        REMOVED.store(true, Ordering::Relaxed);
        patches.list.iter().for_each(|patch| write(patch.at, patch.original));
    }
}

/// Makes the code read-only again after [`remove`].
pub(super) fn seal() {
    if INSERTED.swap(false, Ordering::Relaxed)
        && let Some(Ok(patches)) = PATCHES.get()
    {
        // If this fails, the code stays writable but behaves as before.
        let _ = protect(&patches.code, libc::PROT_READ | libc::PROT_EXEC);
    }
}

/// Removes one breakpoint. False if the breakpoints are not in.
pub(super) fn take_out(at: usize) -> bool {
    let inserted = INSERTED.load(Ordering::Relaxed);
    if inserted && let Some(patch) = patch(at) {
        write(at, patch.original);
    }
    inserted
}

/// Puts a removed breakpoint back if the others are still in.
pub(super) fn put_back(at: usize) {
    if !REMOVED.load(Ordering::Relaxed) && INSERTED.load(Ordering::Relaxed) {
        write(at, INT3);
    }
}

/// A byte of the program's code without breakpoints.
pub(super) fn code(at: usize) -> u8 {
    // SAFETY: the handlers ask for bytes of an instruction that is about to run, or of the instruction that it continues to.
    // Both are readable.
    let byte = unsafe { *(at as *const u8) };
    if byte == INT3 { patch(at).map_or(byte, |patch| patch.original) } else { byte }
}

fn patch(at: usize) -> Option<&'static Patch> {
    let Some(Ok(patches)) = PATCHES.get() else { return None };
    patches.list.get(patches.list.binary_search_by_key(&at, |patch| patch.at).ok()?)
}

/// Where the instruction runs whose breakpoint is at `at`.
pub(super) fn displaced(at: usize) -> Option<usize> {
    Some(patch(at)?.displaced)
}

/// For an address in a displaced copy: the address of the original, and whether `pc` is past the copy's first instruction.
pub(super) fn original(pc: usize) -> Option<(usize, bool)> {
    const LONGEST: usize = 32;
    let Some(Ok(patches)) = PATCHES.get() else { return None };
    let after = patches.list.partition_point(|patch| patch.displaced <= pc);
    let patch = patches.list.get(after.checked_sub(1)?)?;
    (pc - patch.displaced < LONGEST).then_some((patch.at, pc != patch.displaced))
}

fn write(at: usize, byte: u8) {
    // SAFETY: the byte is the first of an instruction, in pages that are writable now. Other threads may run it: they see
    // either byte, and both have the same effect in the end.
    unsafe { AtomicU8::from_ptr(at as *mut u8).store(byte, Ordering::Relaxed) };
}

fn protect(code: &Range<usize>, protection: i32) -> Result<(), &'static str> {
    // SAFETY: the range is the program's code, which stays executable, or the area of displaced instructions, which becomes
    // executable when all of it has been written.
    match unsafe { libc::mprotect(code.start as *mut _, code.len(), protection) } {
        0 => Ok(()),
        _ => Err("the system allows no code to be written (SELinux?): use Mode::GrowthPoints"),
    }
}

fn prepare(handlers: &[usize]) -> Result<Patches, &'static str> {
    let ours = handlers.first().copied().unwrap_or_default();
    let object = loaded_objects().into_iter().find(|object| object.code.contains(&ours));
    let object = object.ok_or("this program's code has no unwind tables: use Mode::GrowthPoints")?;
    // The code that inserts breakpoints must not hit one either.
    let left_out = reachable(&object, &[handlers, &[insert as *const () as usize]].concat());

    let points: Vec<Instruction> = object
        .functions
        .iter()
        .filter(|function| !left_out.contains(&function.start))
        .filter_map(|function| instructions(&object, function))
        .flatten()
        .filter(|instruction| {
            let at = instruction.ip() as usize;
            let byte = |offset| code_byte(&object, at + offset);
            is_growth_point(at, byte) && probe_loop_end(byte).is_none()
        })
        .collect();
    let mut list = displace(&points, &object)?;
    list.sort_unstable_by_key(|patch| patch.at);
    Ok(Patches { code: object.code, list })
}

/// A byte of an object's code; 0 outside the code.
fn code_byte(object: &Object, at: usize) -> u8 {
    object.bytes(at..at + 1).first().copied().unwrap_or_default()
}

/// The instructions of a function; `None` if some of its bytes do not decode.
fn instructions(object: &Object, function: &Range<usize>) -> Option<Vec<Instruction>> {
    let bytes = object.bytes(function.clone());
    let decoder = Decoder::with_ip(64, bytes, function.start as u64, DecoderOptions::NONE);
    let instructions: Vec<_> = decoder.into_iter().collect();
    instructions.iter().all(|instruction| !instruction.is_invalid()).then_some(instructions)
}

/// The starts of the functions reachable from those that hold `roots`.
fn reachable(object: &Object, roots: &[usize]) -> HashSet<usize> {
    let mut found = HashSet::new();
    let mut next = roots.to_vec();
    while let Some(address) = next.pop() {
        let Some(function) = holding(&object.functions, address) else { continue };
        if !object.holds(function) || found.contains(&function.start) {
            continue;
        }
        let instructions = instructions(object, function).unwrap_or_default();
        if !instructions.iter().any(|instruction| is_way_out(instruction, function)) {
            continue;
        }
        found.insert(function.start);
        for instruction in &instructions {
            if instruction.is_ip_rel_memory_operand() {
                let address = instruction.memory_displacement64() as usize;
                next.push(address);
                next.extend(function_in_data(object, address));
            } else {
                next.push(instruction.near_branch_target() as usize); // 0 for most instructions
            }
        }
    }
    found
}

/// Whether a function may return by this instruction. A function that only panics has no such instruction.
fn is_way_out(instruction: &Instruction, function: &Range<usize>) -> bool {
    match instruction.flow_control() {
        FlowControl::Return | FlowControl::IndirectBranch => true,
        FlowControl::UnconditionalBranch => !function.contains(&(instruction.near_branch_target() as usize)),
        _ => false,
    }
}

/// The function whose address is in the data at `address`: in the linker's table, or in a thread-local variable's key.
fn function_in_data(object: &Object, address: usize) -> Option<usize> {
    let mut word = [0; size_of::<usize>()];
    if object.code.contains(&address) || read(address, &mut word) != word.len() {
        return None;
    }
    let word = usize::from_ne_bytes(word);
    holding(&object.functions, word).is_some_and(|found| found.start == word).then_some(word)
}

/// Writes the displaced copy of each of `points`, near the object's code.
fn displace(points: &[Instruction], object: &Object) -> Result<Vec<Patch>, &'static str> {
    const EACH: usize = 32; // enough for an instruction and a jump, or for CONSTANT and a return address
    let bytes = (points.len() * EACH + PAGE).next_multiple_of(PAGE);
    let area =
        near(&object.code, bytes).ok_or("no memory near the program's code: use Mode::GrowthPoints")?;
    let mut patches = Vec::with_capacity(points.len());
    for (index, point) in points.iter().enumerate() {
        let at = area + index * EACH;
        let Some(code) = out_of_line(object, point, at) else { continue };
        // SAFETY: the area has `EACH` bytes at this index, which is at least the code's length, and no thread runs it yet.
        unsafe { (at as *mut u8).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        let place = point.ip() as usize;
        patches.push(Patch { at: place, original: code_byte(object, place), displaced: at });
    }
    protect(&(area..area + bytes), libc::PROT_READ | libc::PROT_EXEC)?;
    Ok(patches)
}

/// Where the return address is in the displaced copy of a call.
const CONSTANT: usize = 24;

/// The displaced copy of an instruction, to run at `at`; `None` if the instruction cannot be displaced.
fn out_of_line(object: &Object, point: &Instruction, at: usize) -> Option<Vec<u8>> {
    match point.code() {
        Code::Call_rel32_64 | Code::Call_rm64 => {
            let mut code = vec![0xff, 0x35]; // push [rip + ...]
            code.extend_from_slice(&relative(at + 6, at + CONSTANT)?);
            match point.code() {
                Code::Call_rel32_64 => append_jump(&mut code, at, point.near_branch_target() as usize)?,
                _ => code.extend(encoded(&indirect_jump(point), at + code.len())?),
            }
            if code.len() > CONSTANT {
                return None;
            }
            code.resize(CONSTANT, INT3);
            code.extend_from_slice(&point.next_ip().to_le_bytes());
            Some(code)
        }
        _ if point.flow_control() == FlowControl::Next => {
            let mut code = if point.is_ip_rel_memory_operand() {
                encoded(point, at)?
            } else {
                let start = point.ip() as usize;
                object.bytes(start..start + point.len()).to_vec()
            };
            append_jump(&mut code, at, point.next_ip() as usize)?;
            Some(code)
        }
        _ => None,
    }
}

/// Appends a jump to `code`, which runs at `at`.
fn append_jump(code: &mut Vec<u8>, at: usize, target: usize) -> Option<()> {
    code.push(0xe9);
    let distance = relative(at + code.len() + size_of::<i32>(), target)?;
    code.extend_from_slice(&distance);
    Some(())
}

/// The bytes of a jump distance, measured from the end of the instruction.
fn relative(from: usize, to: usize) -> Option<[u8; 4]> {
    i32::try_from(to.wrapping_sub(from) as isize).ok().map(i32::to_le_bytes)
}

/// The bytes of an instruction that runs at `at`.
fn encoded(instruction: &Instruction, at: usize) -> Option<Vec<u8>> {
    let instructions = [*instruction];
    let block = InstructionBlock::new(&instructions, at as u64);
    Some(BlockEncoder::encode(64, block, BlockEncoderOptions::DONT_FIX_BRANCHES).ok()?.code_buffer)
}

/// The jump that goes, after a push, where an indirect call would have gone.
fn indirect_jump(call: &Instruction) -> Instruction {
    let mut jump = *call;
    jump.set_code(Code::Jmp_rm64);
    if call.op0_kind() == OpKind::Memory && call.memory_base() == Register::RSP {
        jump.set_memory_displacement64(call.memory_displacement64().wrapping_add(8));
        jump.set_memory_displ_size(4);
    }
    jump
}

/// New memory from which a relative jump reaches `code`.
fn near(code: &Range<usize>, bytes: usize) -> Option<usize> {
    const STEP: usize = 16 << 20;
    const REACH: usize = 1 << 30;
    let lower = (1..REACH / STEP).filter_map(|step| code.start.checked_sub(step * STEP + bytes));
    let higher = (1..REACH / STEP).map(|step| code.end + step * STEP);
    lower.chain(higher).find_map(|hint| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let hint = (hint / PAGE * PAGE) as *mut _;
        // SAFETY: with `MAP_FIXED_NOREPLACE` a new mapping replaces nothing.
        let at = unsafe { libc::mmap(hint, bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        (at == hint).then_some(at as usize)
    })
}
