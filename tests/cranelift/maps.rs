//! The recorder for Cranelift: functions are compiled here, their maps obeyed at a call, their unwind rules
//! compared with what their instructions do.

#[path = "../recorded/mod.rs"]
mod recorded;
#[path = "../support/mod.rs"]
mod support;
#[path = "../walkers/mod.rs"]
mod walkers;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{
    AbiParam, Function, InstBuilder as _, MemFlagsData, Signature, StackSlotData, StackSlotKind,
    UserFuncName, UserStackMapEntry, Value, types::I64,
};
use cranelift_codegen::isa::{self, CallConv, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable as _};
use cranelift_codegen::{Context, FinalizedMachReloc};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use recorded::{Code, Objects, Stop};
use regrow::map::cranelift::{Error, configure, maps, register};
use regrow::map::{
    self, Cfa, End, FrameMap, Location, Place, Register, Registration, Rules, Source, Verdict, Walk, Word,
};
use regrow::{Maps, RawFunction, totals};

fn isa(opt_level: &str) -> OwnedTargetIsa {
    let mut flags = settings::builder();
    configure(&mut flags).unwrap();
    flags.set("opt_level", opt_level).unwrap();
    isa::lookup_by_name("x86_64-unknown-linux-gnu").unwrap().finish(settings::Flags::new(flags)).unwrap()
}

/// A function under test, compiled, in place, and its maps registered.
struct Compiled {
    maps: Vec<FrameMap>,
    _registration: Registration<'static>,
    returns: Vec<usize>,
    size: usize,
    code: Code,
}

/// Compiles `fn(*mut usize, callee) -> usize`, of what `body` builds from the two parameters; its value is the result.
fn compile(opt_level: &str, body: impl FnOnce(&mut FunctionBuilder<'_>, Value, Value) -> Value) -> Compiled {
    compile_as(opt_level, CallConv::SystemV, 2, |builder, parameters| {
        let result = body(builder, parameters[0], parameters[1]);
        builder.ins().return_(&[result]);
    })
}

/// Compiles a function with so many parameters and one result.
fn compile_as(
    opt_level: &str,
    convention: CallConv,
    parameters: usize,
    body: impl FnOnce(&mut FunctionBuilder<'_>, &[Value]),
) -> Compiled {
    let isa = isa(opt_level);
    let mut function =
        Function::with_name_signature(UserFuncName::default(), signature(convention, parameters));
    let mut contexts = FunctionBuilderContext::new();
    let mut builder = FunctionBuilder::new(&mut function, &mut contexts);
    let block = builder.create_block();
    builder.append_block_params_for_function_params(block);
    builder.switch_to_block(block);
    let parameters = builder.block_params(block).to_vec();
    body(&mut builder, &parameters);
    builder.seal_all_blocks();
    builder.finalize(isa.frontend_config());
    let mut context = Context::for_function(function);
    let compiled = context.compile(&*isa, &mut Default::default()).unwrap();
    assert_eq!(compiled.buffer.relocs(), <&[FinalizedMachReloc]>::default());
    let bytes = compiled.code_buffer();
    let code = Code::new(bytes.len(), |_, memory| memory.copy_from_slice(bytes));
    let address = code.address();
    Compiled {
        maps: maps(compiled, &*isa, address, Verdict::Data).unwrap(),
        // SAFETY: the code was compiled as `configure` asks for, lies at the address, and is kept with the maps.
        _registration: unsafe { register(compiled, &*isa, address, Verdict::Data) }.unwrap(),
        returns: compiled.buffer.call_sites().map(|site| address + site.ret_addr as usize).collect(),
        size: compiled.buffer.frame_layout().unwrap().frame_to_fp_offset as usize + 8,
        code,
    }
}

fn signature(convention: CallConv, parameters: usize) -> Signature {
    let mut signature = Signature::new(convention);
    signature.params.extend(vec![AbiParam::new(I64); parameters]);
    signature.returns.push(AbiParam::new(I64));
    signature
}

type Two = extern "C" fn(usize, usize) -> usize;

impl Compiled {
    /// Runs it on objects that the first call moves.
    fn run(&self) -> (usize, Vec<Stop>) {
        // SAFETY: the code is in place, and this is its signature; it reads objects, and calls its callee.
        let function = unsafe { core::mem::transmute::<*const (), Two>(self.code.address() as *const ()) };
        recorded::run(Objects::new(), |old| function(old.addr(), recorded::callee as *const () as usize))
    }

    fn instructions(&self) -> Vec<Instruction> {
        let address = self.code.address() as u64;
        Decoder::with_ip(64, self.code.bytes(), address, DecoderOptions::NONE).into_iter().collect()
    }

    fn rules_at(&self, address: usize) -> Option<Rules> {
        let reader = map::process().read();
        let map = reader.find(address)?;
        assert_eq!(map.source(), Source::Cranelift);
        map.rules().map(Result::unwrap)
    }

    /// The words that the map of the call that returns to `returns` names, by their offset from `rsp`.
    fn words(&self, returns: usize) -> Vec<(usize, Verdict)> {
        let map = self.maps.iter().find(|map| map.range() == (returns - 1..returns)).unwrap();
        let offset = |place| (0..self.size).find(|&at| Place::cfa(at as i32 - 8 - self.size as i32) == place);
        map.words().iter().map(|&(place, verdict)| (offset(place).unwrap(), verdict)).collect()
    }
}

fn call(builder: &mut FunctionBuilder<'_>, callee: Value) -> cranelift_codegen::ir::Inst {
    let signature = builder.import_signature(Signature::new(CallConv::SystemV));
    builder.ins().call_indirect(signature, callee, &[])
}

fn load(builder: &mut FunctionBuilder<'_>, pointer: Value, offset: i32) -> Value {
    builder.ins().load(I64, MemFlagsData::trusted(), pointer, offset)
}

/// Declares a base, a pointer derived from it, and the address of a slot in which a pointer is stored.
fn every_kind(builder: &mut FunctionBuilder<'_>, pointer: Value, callee: Value) -> Value {
    let slot = builder.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, 24, 3));
    let derived = builder.ins().iadd_imm_u(pointer, 16);
    let address = builder.ins().stack_addr(I64, slot, 8);
    for value in [pointer, derived, address] {
        builder.declare_value_needs_stack_map(value);
    }
    builder.ins().store(MemFlagsData::trusted(), pointer, address, 0);
    for _ in 0..2 {
        let inst = call(builder, callee);
        builder.func.dfg.append_user_stack_map_entry(inst, UserStackMapEntry { ty: I64, slot, offset: 8 });
    }
    let stored = load(builder, address, 0);
    let values = [load(builder, pointer, 0), load(builder, derived, 8), load(builder, stored, 8)];
    values.into_iter().fold(builder.ins().iconst(I64, 0), |sum, value| {
        let shifted = builder.ins().imul_imm_u(sum, 1000);
        builder.ins().iadd(shifted, value)
    })
}

#[test]
fn without_unwind_data_there_are_no_maps() {
    let mut flags = settings::builder();
    configure(&mut flags).unwrap();
    flags.set("unwind_info", "false").unwrap();
    let isa = isa::lookup_by_name("x86_64-unknown-linux-gnu").unwrap();
    let isa = isa.finish(settings::Flags::new(flags)).unwrap();
    let mut function =
        Function::with_name_signature(UserFuncName::default(), signature(CallConv::SystemV, 1));
    let mut contexts = FunctionBuilderContext::new();
    let mut builder = FunctionBuilder::new(&mut function, &mut contexts);
    let block = builder.create_block();
    builder.append_block_params_for_function_params(block);
    builder.switch_to_block(block);
    let parameter = builder.block_params(block)[0];
    builder.ins().return_(&[parameter]);
    builder.seal_all_blocks();
    builder.finalize(isa.frontend_config());
    let mut context = Context::for_function(function);
    let compiled = context.compile(&*isa, &mut Default::default()).unwrap();
    let refused = maps(compiled, &*isa, 0x1000, Verdict::Data);
    assert!(matches!(refused, Err(Error::Missing)), "{refused:?}");
}

#[test]
fn code_goes_on_with_the_moved_pointers_and_no_others() {
    let compiled = compile("none", every_kind);
    assert_eq!(compiled.returns.len(), 2);
    let (result, stops) = compiled.run();
    assert_eq!(result, 1_004_002);
    // The base, the derived pointer, the word of the slot. All of them point to the new objects at the second
    // call.
    assert_eq!(stops.iter().map(|stop| stop.words).collect::<Vec<_>>(), [3, 0]);
    for (stop, &returns) in stops.iter().zip(&compiled.returns) {
        assert_eq!((stop.return_address, stop.source), (returns, Source::Cranelift));
        assert_eq!((stop.pointers, stop.ambiguous, stop.registers), (4, 0, 0), "{stop:?}");
        assert!(stop.is_precise && stop.size == compiled.size, "{stop:?}");
        assert!(stop.stack_addresses.is_empty(), "{stop:?}");
    }
}

#[test]
fn all_calls_have_maps() {
    let compiled = compile("none", |builder, pointer, callee| {
        builder.declare_value_needs_stack_map(pointer);
        call(builder, callee); // the pointer is live
        let value = load(builder, pointer, 0);
        call(builder, callee); // nothing is
        value
    });
    let instructions = compiled.instructions();
    let calls = instructions.iter().filter(|instruction| instruction.mnemonic() == Mnemonic::Call);
    let returns: Vec<_> = calls.map(|call| call.next_ip() as usize).collect();
    assert_eq!(compiled.returns, returns);
    let words: Vec<_> = returns.iter().map(|&returns| compiled.words(returns).len()).collect();
    assert_eq!(words, [1, 0]);
    let (result, stops) = compiled.run();
    assert_eq!(result, 1);
    assert!(stops.iter().all(|stop| stop.is_precise), "{stops:?}");
}

#[test]
fn arguments_in_memory_are_ambiguous() {
    let compiled = compile("none", |builder, pointer, callee| {
        builder.declare_value_needs_stack_map(pointer);
        let mut signature = Signature::new(CallConv::SystemV);
        signature.params.extend([AbiParam::new(I64); 9]);
        let signature = builder.import_signature(signature);
        builder.ins().call_indirect(signature, callee, &[pointer; 9]);
        load(builder, pointer, 0)
    });
    // Three arguments, and a word to align them; then the pointer's own slot.
    let arguments = [0, 8, 16, 24].map(|offset| (offset, Verdict::Ambiguous));
    assert_eq!(compiled.words(compiled.returns[0]), [&arguments[..], &[(32, Verdict::Pointer)]].concat());
    let (result, stops) = compiled.run();
    assert_eq!((result, stops[0].ambiguous), (1, 4));
}

/// Why [`configure`] turns optimisation off. If this fails, Cranelift has become better: say so there.
#[test]
fn optimised_code_keeps_undeclared_stack_addresses_across_calls() {
    // The only pointer is declared. But the addition reads it from the slot that the front end stored it to,
    // by an address that was computed for the store, and kept.
    let declared = |builder: &mut FunctionBuilder<'_>, pointer, callee| {
        builder.declare_value_needs_stack_map(pointer);
        call(builder, callee);
        builder.ins().iadd(pointer, callee)
    };
    let addresses = |opt_level| compile(opt_level, declared).run().1.remove(0).stack_addresses.len();
    assert_eq!(addresses("none"), 0);
    assert_eq!(addresses("speed"), 1);
}

/// What a straight run of instructions has done to the stack, in terms of the CFA.
struct Machine {
    /// Bytes from the CFA to `rsp`, and to `rbp` once it is a frame pointer.
    rsp: i64,
    rbp: Option<i64>,
    saved: [Place; 6],
}

fn saved_index(register: iced_x86::Register) -> Option<usize> {
    use iced_x86::Register::{R12, R13, R14, R15, RBP, RBX};
    [RBX, RBP, R12, R13, R14, R15].iter().position(|known| *known == register)
}

impl Machine {
    fn new() -> Self {
        Self { rsp: -8, rbp: None, saved: [Place::SAME; 6] }
    }

    /// Follows one instruction of a prologue or body.
    fn step(&mut self, instruction: &Instruction) {
        use iced_x86::Register::{RBP, RSP};
        match (instruction.mnemonic(), instruction.op0_kind(), instruction.op0_register()) {
            (Mnemonic::Push, _, register) => {
                self.rsp -= 8;
                self.save(register, self.rsp);
            }
            (Mnemonic::Mov, OpKind::Register, RBP) => self.rbp = Some(self.rsp),
            (Mnemonic::Sub, OpKind::Register, RSP) => self.rsp -= instruction.immediate(1) as i64,
            (Mnemonic::Add, OpKind::Register, RSP) => self.rsp += instruction.immediate(1) as i64,
            (Mnemonic::Mov, OpKind::Memory, _) if instruction.memory_base() == RSP => {
                self.save(instruction.op1_register(), self.rsp + instruction.memory_displacement64() as i64);
            }
            _ => {}
        }
    }

    fn save(&mut self, register: iced_x86::Register, offset: i64) {
        if let Some(place) = saved_index(register).map(|index| &mut self.saved[index])
            && *place == Place::SAME
        {
            *place = Place::cfa(offset as i32);
        }
    }

    fn rules(&self) -> Rules {
        let cfa = self.rbp.map_or(Cfa::rsp(-self.rsp as i32), |rbp| Cfa::rbp(-rbp as i32));
        let saved = Register::CALLEE_SAVED.into_iter().zip(self.saved);
        saved.fold(Rules::new(cfa), |rules, (register, place)| rules.saved(register, place))
    }
}

/// Where the body begins: after the instruction that makes room for the frame, and the saves that follow it.
fn body(instructions: &[Instruction]) -> usize {
    let is_save = |instruction: &Instruction| {
        instruction.mnemonic() == Mnemonic::Mov
            && instruction.op0_kind() == OpKind::Memory
            && instruction.op1_kind() == OpKind::Register
            && saved_index(instruction.op1_register()).is_some()
    };
    let sets = |instruction: &Instruction| {
        instruction.mnemonic() == Mnemonic::Mov && instruction.op0_register() == iced_x86::Register::RBP
    };
    let makes_room = |instruction: &Instruction| {
        instruction.mnemonic() == Mnemonic::Sub && instruction.op0_register() == iced_x86::Register::RSP
    };
    let touches = |instruction: &Instruction| instruction.op1_kind() == OpKind::Immediate32;
    // The last `sub rsp` in the function that does not belong to a probe.
    let room = (0..instructions.len() - 1)
        .rfind(|&at| makes_room(&instructions[at]) && !touches(&instructions[at + 1]));
    let from = room.or_else(|| instructions.iter().rposition(sets)).unwrap() + 1;
    let saves = instructions[from..].iter().take_while(|instruction| is_save(instruction)).count();
    instructions[from + saves].ip() as usize
}

/// Six values that are live across a call, so that callee-saved registers are saved, and a slot of so many
/// bytes.
fn large(builder: &mut FunctionBuilder<'_>, pointer: Value, callee: Value, bytes: u32) -> Value {
    builder.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, bytes, 3));
    let values: Vec<_> = (0..6).map(|index| load(builder, pointer, 8 * index)).collect();
    call(builder, callee);
    values.into_iter().reduce(|sum, value| builder.ins().iadd(sum, value)).unwrap()
}

/// Of stack slots: none, with no probe or a few, and with loops of them.
const SIZES: [u32; 4] = [0, 16, 200, 6000];

#[test]
fn rules_say_what_the_instructions_do() {
    for bytes in SIZES {
        let compiled = compile("none", |builder, pointer, callee| large(builder, pointer, callee, bytes));
        assert_eq!(compiled.run().0, 6 * 900);
        assert_eq!(compiled.maps.first().unwrap().range().start, compiled.code.address());
        assert_eq!(
            compiled.maps.last().unwrap().range().end,
            compiled.instructions().last().unwrap().next_ip() as usize
        );
        assert!(compiled.maps.windows(2).all(|maps| maps[0].range().end == maps[1].range().start));

        let mut machine = Machine::new();
        let mut in_loop = false;
        for instruction in compiled.instructions() {
            if instruction.mnemonic() == Mnemonic::Mov
                && instruction.op0_register() == iced_x86::Register::RSP
            {
                break; // the epilogue
            }
            let at = instruction.ip() as usize;
            assert_eq!(compiled.rules_at(at), Some(machine.rules()), "at {instruction}");
            assert_eq!(compiled.rules_at(instruction.next_ip() as usize - 1), Some(machine.rules()));
            if instruction.mnemonic() == Mnemonic::Call {
                assert_eq!(compiled.size as i64, -machine.rsp - 8);
            }
            // A loop of probes takes off as much as is added after it.
            in_loop |= instruction.mnemonic() == Mnemonic::Mov
                && instruction.op1_register() == iced_x86::Register::RSP
                && instruction.op0_register() == iced_x86::Register::R11;
            let adds = instruction.mnemonic() == Mnemonic::Add;
            match in_loop {
                true if adds => in_loop = false,
                true => {}
                false => machine.step(&instruction),
            }
        }
        let saved = machine.saved.iter().filter(|place| **place != Place::SAME).count();
        assert!(saved > 3, "{saved}");
    }
}

#[test]
fn words_of_a_prologue_are_data_and_those_of_a_body_ambiguous() {
    for (bytes, values) in SIZES.into_iter().flat_map(|bytes| [(bytes, 0), (bytes, 6)]) {
        let compiled = compile("none", |builder, pointer, callee| match values {
            0 if bytes == 0 => load(builder, pointer, 0),
            0 => {
                builder.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, bytes, 3));
                call(builder, callee);
                builder.ins().iconst(I64, 7)
            }
            _ => large(builder, pointer, callee, bytes),
        });
        let body = body(&compiled.instructions());
        for instruction in compiled.instructions() {
            let (first, last) = (instruction.ip() as usize, instruction.next_ip() as usize - 1);
            let expected = match instruction.mnemonic() {
                _ if first < body => [Verdict::Data; 2],
                Mnemonic::Call => [Verdict::Ambiguous, Verdict::Data],
                _ => [Verdict::Ambiguous; 2],
            };
            let reader = map::process().read();
            let found = [first, last].map(|at| reader.find(at).unwrap().rest());
            assert_eq!(found, expected, "at {instruction}, {bytes} bytes, {values} values");
        }
    }
}

/// A context that was interrupted in code under test.
struct Interrupted {
    instruction: Instruction,
    registers: map::Registers,
}

impl Interrupted {
    fn is(&self, mnemonic: Mnemonic) -> bool {
        self.instruction.mnemonic() == mnemonic
    }

    /// The registers with another program counter.
    fn at(&self, pc: usize) -> map::Registers {
        let start = map::Registers::new(pc, 0);
        let all = (0..16).filter_map(Register::from_dwarf);
        all.fold(start, |start, one| start.with(one, self.registers.get(one).unwrap()))
    }
}

struct Stepped {
    instructions: BTreeMap<usize, Instruction>,
    visit: Box<dyn FnMut(Interrupted)>,
}

thread_local! {
    /// Set while code is stepped through.
    static STEPPED: RefCell<Option<Stepped>> = const { RefCell::new(None) };
}

extern "C" fn on_trap(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the interrupted context.
    let registers = walkers::interrupted(unsafe { &*context.cast() });
    STEPPED.with_borrow_mut(|stepped| {
        if let Some(stepped) = stepped
            && let Some(&instruction) = stepped.instructions.get(&registers.pc())
        {
            (stepped.visit)(Interrupted { instruction, registers });
        }
    });
}

/// Calls the first function with two arguments, and `visit` before each instruction of any of the functions.
fn step_through(functions: &[&Compiled], a: usize, b: usize, visit: impl FnMut(Interrupted)) -> usize {
    map::record_loaded_objects();
    let all = functions.iter().flat_map(|one| one.instructions());
    let instructions = all.map(|instruction| (instruction.ip() as usize, instruction)).collect();
    let visit: Box<dyn FnMut(Interrupted) + '_> = Box::new(visit);
    // SAFETY: only its lifetime changes; it is dropped below, before that ends.
    let visit = unsafe { core::mem::transmute::<Box<dyn FnMut(Interrupted) + '_>, Box<_>>(visit) };
    STEPPED.set(Some(Stepped { instructions, visit }));
    let mut result = functions[0].code.address();
    // SAFETY: the handler allocates, but only where code under test was interrupted. The function is in place, has two
    // parameters, and is called as the ABI says; the trap flag is as before afterwards.
    unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = on_trap as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGTRAP, &action, core::ptr::null_mut()), 0);
        core::arch::asm!(
            "pushfq",
            "or dword ptr [rsp], 0x100",
            "popfq",
            "call rax",
            "pushfq",
            "and dword ptr [rsp], 0xfffffeff",
            "popfq",
            inlateout("rax") result,
            in("rdi") a,
            in("rsi") b,
            clobber_abi("C"),
        );
    }
    STEPPED.set(None);
    result
}

/// So that stacks overflow in prologues only: down to the lowest word of the frame, and of what a call will push.
#[test]
fn a_prologue_touches_all_of_its_frame() {
    for (bytes, calls) in SIZES.into_iter().flat_map(|bytes| [(bytes, false), (bytes, true)]) {
        let compiled = compile("none", |builder, pointer, callee| {
            builder.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, bytes, 3));
            if calls {
                call(builder, callee);
            }
            pointer
        });
        let body = body(&compiled.instructions());
        let (mut in_prologue, mut needed) = (usize::MAX, usize::MAX);
        let callee = recorded::callee as *const () as usize;
        let visit = |at: Interrupted| {
            let rsp = at.registers.get(Register::RSP).unwrap();
            let writes = at.is(Mnemonic::Mov) && at.instruction.op0_kind() == OpKind::Memory;
            if at.registers.pc() >= body {
                needed = needed.min(if calls { rsp - 16 } else { rsp }); // a return address, the callee's rbp
            } else if at.is(Mnemonic::Push) || writes {
                in_prologue = in_prologue.min(if writes { rsp } else { rsp - 8 });
            }
        };
        let empty = Objects::new();
        let (result, _) = recorded::run(empty, |_| step_through(&[&compiled], 7, callee, visit));
        assert_eq!(result, 7);
        assert!(in_prologue <= needed, "{bytes} bytes, calls: {calls}: {in_prologue:#x} {needed:#x}");
    }
}

/// What a function found when it was entered.
#[derive(Debug)]
struct Entry {
    cfa: usize,
    return_address: usize,
    saved: [usize; 6],
}

impl Entry {
    fn new(registers: &map::Registers) -> Self {
        let rsp = registers.get(Register::RSP).unwrap();
        let saved = Register::CALLEE_SAVED.map(|register| registers.get(register).unwrap());
        Self { cfa: rsp + 8, return_address: recorded::memory(rsp).unwrap(), saved }
    }
}

/// Steps through functions and walks at each instruction. Returns the result, and how many instructions had no rules.
fn walk_at_each_instruction(functions: &[&Compiled]) -> (usize, usize) {
    let callee = recorded::callee as *const () as usize;
    let pointer = Cell::new(0);
    let mut outer_frames = 0;
    let bodies: Vec<_> = functions.iter().map(|one| body(&one.instructions())).collect();
    let mut frames: Vec<Entry> = Vec::new();
    let mut without = 0;
    let mut precise = [0, 0];
    let visit = |at: Interrupted| {
        let pc = at.registers.pc();
        let index = functions.iter().position(|one| one.code.contains(pc)).unwrap();
        if pc == functions[index].code.address() {
            frames.push(Entry::new(&at.registers));
        }
        if at.is(Mnemonic::Ret) || at.is(Mnemonic::Jmp) && at.instruction.is_jmp_near_indirect() {
            frames.pop(); // the one place without right rules
            return;
        }
        let entry = frames.last().unwrap();
        let reader = map::process().read();
        if reader.find(pc).is_none() {
            without += 1;
            return;
        }
        // At a call, as if it had faulted at its push.
        let start = if at.is(Mnemonic::Call) { at.at(pc + at.instruction.len() - 1) } else { at.registers };
        let mut walk = Walk::new(&reader, &start, recorded::memory);
        let frame = walk.next().unwrap();
        let what = format!("{} at {pc:#x}: {frame:?}, {entry:x?}", at.instruction);
        assert_eq!(frame.range().end, entry.cfa, "{what}");
        assert_eq!(frame.return_address().and_then(recorded::memory), Some(entry.return_address), "{what}");
        for (index, &register) in Register::CALLEE_SAVED.iter().enumerate() {
            let value = match frame.saved(index) {
                Some(address) => recorded::memory(address),
                None => at.registers.get(register),
            };
            assert_eq!(value, Some(entry.saved[index]), "{register} of the caller, {what}");
            assert_eq!(frame.owns(index), frame.saved(index).is_some());
            assert_eq!(frame.register(index), Location::Register);
        }
        let in_prologue = pc < bodies[index];
        if in_prologue || at.is(Mnemonic::Call) {
            assert!(frame.is_precise(), "{what}");
            precise[usize::from(in_prologue)] += 1;
        }
        // Frames further out, if they are of code under test, have but the one pointer.
        for outer in walk.by_ref().filter(|frame| functions.iter().any(|one| one.code.contains(frame.pc()))) {
            let is_pointer = |at: &usize| outer.word(*at) == Word::Own(Verdict::Pointer);
            let pointers: Vec<_> =
                outer.range().step_by(8).filter(is_pointer).map(recorded::memory).collect();
            assert_eq!(pointers, [Some(pointer.get())], "{outer:?}, {what}");
            outer_frames += 1;
        }
        assert_eq!(walk.end(), Some(End::Outermost), "{what}");
    };
    let (result, _) = recorded::run(Objects::new(), |old| {
        pointer.set(old.addr());
        step_through(functions, old.addr(), callee, visit)
    });
    assert!(frames.is_empty(), "{frames:x?}");
    assert_eq!(outer_frames > 0, functions.len() > 1);
    assert!(precise[0] > 0 && precise[1] > 2, "{precise:?}");
    (result, without)
}

#[test]
fn walks_are_right_at_each_instruction_and_precise_in_prologues_and_at_calls() {
    for bytes in SIZES {
        let compiled = compile("none", |builder, pointer, callee| large(builder, pointer, callee, bytes));
        assert_eq!(walk_at_each_instruction(&[&compiled]), (6 * 900, 0));
    }
    let compiled = compile("none", every_kind);
    assert_eq!(walk_at_each_instruction(&[&compiled]), (1_004_002, 0));
}

/// `fn(callee, pointer) -> usize` with a declared pointer, which calls a function of the convention for tail calls; that, a
/// call later, makes room for the arguments of its tail call, of a function that calls again.
fn tail_calls() -> [Compiled; 3] {
    const ARGUMENTS: usize = 12;
    let last = compile_as("none", CallConv::Tail, ARGUMENTS, |builder, parameters| {
        call(builder, parameters[0]);
        let sum = parameters[1..].iter().copied().reduce(|sum, one| builder.ins().iadd(sum, one)).unwrap();
        builder.ins().return_(&[sum]);
    });
    let middle = compile_as("none", CallConv::Tail, 1, |builder, parameters| {
        let callee = parameters[0];
        let numbers: Vec<_> = (1..ARGUMENTS).map(|n| builder.ins().iconst(I64, n as i64)).collect();
        call(builder, callee);
        let signature = builder.import_signature(signature(CallConv::Tail, ARGUMENTS));
        let target = builder.ins().iconst(I64, last.code.address() as i64);
        builder.ins().return_call_indirect(signature, target, &[&[callee], &numbers[..]].concat());
    });
    let first = compile("none", |builder, pointer, callee| {
        builder.declare_value_needs_stack_map(pointer);
        let signature = builder.import_signature(signature(CallConv::Tail, 1));
        let target = builder.ins().iconst(I64, middle.code.address() as i64);
        let inst = builder.ins().call_indirect(signature, target, &[callee]);
        let sum = builder.inst_results(inst)[0];
        let value = load(builder, pointer, 0);
        builder.ins().iadd(sum, value)
    });
    [first, middle, last]
}

#[test]
fn a_function_that_makes_room_for_a_tail_call_has_right_rules_but_while_it_does() {
    let functions = tail_calls();
    let [first, middle, last] = &functions;
    let (result, without) = walk_at_each_instruction(&[first, middle, last]);
    assert_eq!(result, (1..12).sum::<usize>() + 900, "nothing was moved: the calls were of others");
    // From the second `mov rbp, rsp` on, two words are moved: two loads, two stores.
    assert_eq!(without, 4);
}

/// `rec(n, pointer, rec, callee) -> usize`: in each frame the address of a slot, declared; in the slot the pointer, declared
/// at the call, and a number that looks like a pointer into the frame, but is none.
fn recursive(bytes: u32) -> Compiled {
    compile_as("none", CallConv::SystemV, 4, |builder, parameters| {
        let &[n, pointer, own, callee] = parameters else { unreachable!() };
        let slot =
            builder.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, 16 + bytes, 3));
        let address = builder.ins().stack_addr(I64, slot, 0);
        for value in [pointer, address] {
            builder.declare_value_needs_stack_map(value);
        }
        builder.ins().store(MemFlagsData::trusted(), pointer, address, 0);
        let lure = builder.ins().iadd_imm_u(pointer, 4);
        builder.ins().store(MemFlagsData::trusted(), lure, address, 8);
        let [deeper, deepest, after] = [(); 3].map(|()| builder.create_block());
        let sum = builder.append_block_param(after, I64);
        builder.ins().brif(n, deeper, &[], deepest, &[]);
        for block in [deeper, deepest] {
            builder.switch_to_block(block);
            let inst = if block == deeper {
                let signature = builder.import_signature(signature(CallConv::SystemV, 4));
                let less = builder.ins().iadd_imm_s(n, -1);
                builder.ins().call_indirect(signature, own, &[less, address, own, callee])
            } else {
                let signature = builder.import_signature(signature(CallConv::SystemV, 1));
                builder.ins().call_indirect(signature, callee, &[address])
            };
            let entry = UserStackMapEntry { ty: I64, slot, offset: 0 };
            builder.func.dfg.append_user_stack_map_entry(inst, entry);
            let result = builder.inst_results(inst)[0];
            builder.ins().jump(after, &[result.into()]);
        }
        builder.switch_to_block(after);
        // One for the stored pointer, which has moved with the other, and one for the lure, of which no copy has.
        let sum = [(0, pointer), (8, lure)].into_iter().fold(sum, |sum, (offset, value)| {
            let stored = load(builder, address, offset);
            let same = builder.ins().icmp(IntCC::Equal, stored, value);
            let same = builder.ins().uextend(I64, same);
            builder.ins().iadd(sum, same)
        });
        builder.ins().return_(&[sum]);
    })
}

type Recursive = extern "C" fn(usize, usize, usize, extern "C" fn(usize) -> usize) -> usize;

impl Compiled {
    fn recurse(&self, depth: usize, callback: extern "C" fn(usize) -> usize) -> usize {
        let address = self.code.address();
        // SAFETY: the code is in place, and this is its signature.
        let function = unsafe { core::mem::transmute::<*const (), Recursive>(address as *const ()) };
        function(depth, 0, address, callback)
    }
}

thread_local! {
    /// Where the code is that the callback looks for, and how many frames of it were found.
    static LOOKED_FOR: Cell<(usize, usize, usize)> = const { Cell::new((0, 0, 0)) };
}

/// Walks the coroutine it is called in; `address` is that of the slot of the frame that called.
extern "C" fn look(mut address: usize) -> usize {
    let start = walkers::registers();
    let reader = map::process().read();
    let mut walk = Walk::new(&reader, &start, recorded::memory);
    let (from, to, _) = LOOKED_FOR.get();
    let mut count = 0;
    for frame in walk.by_ref().filter(|frame| (from..to).contains(&frame.pc())) {
        assert!(frame.is_precise() && frame.map().source() == Source::Cranelift, "{frame:?}");
        assert!(frame.range().contains(&address));
        let value = |address| recorded::memory(address).unwrap();
        let is_pointer = |at: &usize| frame.word(*at) == Word::Own(Verdict::Pointer);
        let mut pointers: Vec<_> = frame.range().step_by(8).filter(is_pointer).map(value).collect();
        pointers.sort_unstable();
        let outer = value(address);
        let mut expected = [address, outer, outer];
        expected.sort_unstable();
        assert_eq!(pointers, expected, "{frame:?}");
        let rbp = Register::RBP.saved_index().unwrap();
        assert!(frame.owns(rbp) && frame.map().register(rbp) == Verdict::Pointer);
        assert_eq!(frame.word(address + 8), Word::Own(Verdict::Data));
        address = outer;
        count += 1;
    }
    assert_eq!((walk.end(), address), (Some(End::Base), 0));
    LOOKED_FOR.set((from, to, count));
    1000
}

#[test]
fn frames_on_a_coroutine_are_precise_and_their_pointers_exact() {
    map::record_loaded_objects();
    for (builder, bytes) in support::builders().into_iter().flat_map(|one| [(one.clone(), 0), (one, 20_000)])
    {
        let depth = 40;
        let (result, found) = support::run(&builder, move || {
            let compiled = recursive(bytes);
            let end = compiled.code.address() + compiled.code.bytes().len();
            LOOKED_FOR.set((compiled.code.address(), end, 0));
            let result = compiled.recurse(depth, look);
            assert!(support::growths() > 0);
            (result, LOOKED_FOR.get().2)
        });
        assert_eq!((result, found), (1000 + 2 * (depth + 1), depth + 1));
    }
}

/// Its own process, so that no other test's words are counted.
#[test]
fn compiled_code_moves_without_a_guess() {
    if support::variant().is_none() {
        return support::this_test!().passes();
    }
    for bytes in [0, 40, 3000, 20_000] {
        let recursive = recursive(bytes);
        let leaf = compile_as("none", CallConv::SystemV, 1, |builder, _| {
            let result = builder.ins().iconst(I64, 1000);
            builder.ins().return_(&[result]);
        });
        // Of a yielder, which it does not use, and the depth.
        let entry = compile("none", |builder, _, depth| {
            let signature = builder.import_signature(signature(CallConv::SystemV, 4));
            let [own, leaf] =
                [&recursive, &leaf].map(|one| builder.ins().iconst(I64, one.code.address() as i64));
            let null = builder.ins().iconst(I64, 0);
            let inst = builder.ins().call_indirect(signature, own, &[depth, null, own, leaf]);
            builder.inst_results(inst)[0]
        });
        let before = totals();
        // SAFETY: the code is in place and of this type, keeps pointers to its frames in its frames, and does not unwind.
        let mut coroutine = unsafe {
            let function = core::mem::transmute::<*const (), RawFunction>(entry.code.address() as *const ());
            support::relocating().maps(Maps::Precise).maximum(64 << 20).spawn_raw(function).unwrap()
        };
        let depth = 600;
        assert_eq!(coroutine.resume(depth).returned(), Some(1000 + 2 * (depth + 1)));
        let totals = totals();
        assert!(totals.moves >= before.moves + 5, "{totals:?}");
        assert_eq!((totals.in_place, totals.words_by_map.ambiguous), (0, 0), "{bytes} bytes: {totals:?}");
        assert!(totals.words_by_map.pointers > before.words_by_map.pointers + 600, "{totals:?}");
        assert!(totals.words_by_map.data > before.words_by_map.data + 600, "{totals:?}");
    }
}
