//! The recorder for Cranelift: functions are compiled here, their maps obeyed at a call, their unwind rules
//! compared with what their instructions do.

mod recorded;

use cranelift_codegen::ir::{
    AbiParam, Function, InstBuilder as _, MemFlagsData, Signature, StackSlotData, StackSlotKind,
    UserFuncName, UserStackMapEntry, Value, types::I64,
};
use cranelift_codegen::isa::{self, CallConv, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable as _};
use cranelift_codegen::{Context, FinalizedMachReloc};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use recorded::{Code, Objects, Stop};
use regrow::map::cranelift::{configure, frames, unwind_rows};
use regrow::map::recorded::{Base, Frame, UnwindRow, Verdict, Word};

fn isa(opt_level: &str) -> OwnedTargetIsa {
    let mut flags = settings::builder();
    configure(&mut flags).unwrap();
    flags.set("opt_level", opt_level).unwrap();
    isa::lookup_by_name("x86_64-unknown-linux-gnu").unwrap().finish(settings::Flags::new(flags)).unwrap()
}

/// A function under test, compiled and in place: `fn(*mut u64, callee) -> u64`.
struct Compiled {
    code: Code,
    bytes: Vec<u8>,
    frames: Vec<Frame>,
    rows: Vec<UnwindRow>,
}

/// Compiles what `body` builds from the two parameters; its value is the function's result.
fn compile(opt_level: &str, body: impl FnOnce(&mut FunctionBuilder<'_>, Value, Value) -> Value) -> Compiled {
    let isa = isa(opt_level);
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params.extend([AbiParam::new(I64), AbiParam::new(I64)]);
    signature.returns.push(AbiParam::new(I64));
    let mut function = Function::with_name_signature(UserFuncName::default(), signature);
    let mut contexts = FunctionBuilderContext::new();
    let mut builder = FunctionBuilder::new(&mut function, &mut contexts);
    let block = builder.create_block();
    builder.append_block_params_for_function_params(block);
    builder.switch_to_block(block);
    builder.seal_block(block);
    let &[pointer, callee] = builder.block_params(block) else { unreachable!() };
    let result = body(&mut builder, pointer, callee);
    builder.ins().return_(&[result]);
    builder.finalize(isa.frontend_config());
    let mut context = Context::for_function(function);
    let compiled = context.compile(&*isa, &mut Default::default()).unwrap();
    assert_eq!(compiled.buffer.relocs(), <&[FinalizedMachReloc]>::default());
    let bytes = compiled.code_buffer().to_vec();
    let code = Code::new(bytes.len(), |_, memory| memory.copy_from_slice(&bytes));
    Compiled {
        frames: frames(compiled, code.address(), Verdict::Data).collect(),
        rows: unwind_rows(compiled, &*isa, code.address()).unwrap(),
        code,
        bytes,
    }
}

impl Compiled {
    /// Runs it on eight objects that are 900 each before the first call moves them, 1 to 8 after.
    fn run(&self) -> (u64, Vec<Stop>) {
        type Function = extern "C" fn(*mut u64, *const ()) -> u64;
        // SAFETY: the code is in place, and this is its signature; it reads objects, and calls its callee.
        let function =
            unsafe { core::mem::transmute::<*const (), Function>(self.code.address() as *const ()) };
        let objects = Objects { old: Box::new([900; 8]), new: Box::new([1, 2, 3, 4, 5, 6, 7, 8]) };
        recorded::run(self.frames.clone(), objects, |old| function(old, recorded::callee as *const ()))
    }

    fn instructions(&self) -> Vec<Instruction> {
        Decoder::with_ip(64, &self.bytes, self.code.address(), DecoderOptions::NONE).into_iter().collect()
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
fn code_goes_on_with_the_moved_pointers_and_no_others() {
    let compiled = compile("none", every_kind);
    assert_eq!(compiled.frames.len(), 2);
    let (result, stops) = compiled.run();
    assert_eq!(result, 1_004_002);
    // The base, the derived pointer, the word of the slot. All of them point to the new objects at the second
    // call.
    assert_eq!(stops.iter().map(|stop| stop.words).collect::<Vec<_>>(), [3, 0]);
    for (stop, frame) in stops.iter().zip(&compiled.frames) {
        assert_eq!(stop.return_address, frame.return_address);
        assert_eq!(frame.words.iter().filter(|word| word.verdict == Verdict::Pointer).count(), 4);
        assert_eq!(frame.words.iter().filter(|word| word.verdict == Verdict::Ambiguous).count(), 0);
        let inside = compiled.code.address()..compiled.code.address() + compiled.bytes.len() as u64;
        assert!(!inside.contains(&stop.callers_return_address.unwrap()));
        assert!(stop.stack_addresses.is_empty(), "{stop:?}");
    }
}

#[test]
fn frames_stand_at_the_return_addresses_of_all_calls() {
    let compiled = compile("none", |builder, pointer, callee| {
        builder.declare_value_needs_stack_map(pointer);
        call(builder, callee); // the pointer is live
        let value = load(builder, pointer, 0);
        call(builder, callee); // nothing is
        value
    });
    let instructions = compiled.instructions();
    let calls = instructions.iter().filter(|instruction| instruction.mnemonic() == Mnemonic::Call);
    let returns: Vec<_> = calls.map(|call| call.next_ip()).collect();
    assert_eq!(compiled.frames.iter().map(|frame| frame.return_address).collect::<Vec<_>>(), returns);
    assert_eq!(compiled.frames.iter().map(|frame| frame.words.len()).collect::<Vec<_>>(), [1, 0]);
    assert!(compiled.frames.iter().all(|frame| frame.rest == Verdict::Data && frame.size.is_some()));
    assert_eq!(compiled.run().0, 1);
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
    let word = |offset, verdict| Word { base: Base::Rsp, offset, verdict };
    let arguments = [0, 8, 16, 24].map(|offset| word(offset, Verdict::Ambiguous));
    assert_eq!(compiled.frames[0].words, [&arguments[..], &[word(32, Verdict::Pointer)]].concat());
    assert_eq!(compiled.run().0, 1);
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
    /// Where the caller's registers are.
    saved: Vec<(u16, i32)>,
}

const CALLEE_SAVED: [(Register, u16); 6] = [
    (Register::RBX, 3),
    (Register::RBP, 6),
    (Register::R12, 12),
    (Register::R13, 13),
    (Register::R14, 14),
    (Register::R15, 15),
];

impl Machine {
    /// Follows one instruction of a prologue or body.
    fn step(&mut self, instruction: &Instruction) {
        let saves =
            |register| CALLEE_SAVED.iter().find(|(known, _)| *known == register).map(|&(_, number)| number);
        match (instruction.mnemonic(), instruction.op0_kind(), instruction.op0_register()) {
            (Mnemonic::Push, _, register) => {
                self.rsp -= 8;
                self.saved.extend(saves(register).map(|number| (number, self.rsp as i32)));
            }
            (Mnemonic::Mov, OpKind::Register, Register::RBP) => self.rbp = Some(self.rsp),
            (Mnemonic::Sub, OpKind::Register, Register::RSP) => self.rsp -= instruction.immediate(1) as i64,
            (Mnemonic::Add, OpKind::Register, Register::RSP) => self.rsp += instruction.immediate(1) as i64,
            (Mnemonic::Mov, OpKind::Memory, _) if instruction.memory_base() == Register::RSP => {
                let place = self.rsp + instruction.memory_displacement64() as i64;
                let known = |number: &u16| !self.saved.iter().any(|(register, _)| register == number);
                let first = saves(instruction.op1_register()).filter(known);
                self.saved.extend(first.map(|number| (number, place as i32)));
            }
            _ => {}
        }
        self.saved.sort_unstable();
    }
}

/// Six values that are live across a call, so that callee-saved registers are saved, and a slot of so many
/// bytes.
fn large(builder: &mut FunctionBuilder<'_>, pointer: Value, callee: Value, bytes: u32) -> Value {
    builder.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, bytes, 3));
    let values: Vec<_> = (0..6).map(|index| load(builder, pointer, 8 * index)).collect();
    call(builder, callee);
    values.into_iter().reduce(|sum, value| builder.ins().iadd(sum, value)).unwrap()
}

#[test]
fn unwind_rows_say_what_the_instructions_do() {
    for bytes in [16, 6000, 3 * 4096 + 100] {
        let compiled = compile("none", |builder, pointer, callee| large(builder, pointer, callee, bytes));
        assert_eq!(compiled.run().0, 6 * 900);
        let (first, last) = (compiled.rows.first().unwrap(), compiled.rows.last().unwrap());
        assert_eq!(first.code.start, compiled.code.address());
        assert_eq!(last.code.end, compiled.code.address() + compiled.bytes.len() as u64);
        assert!(compiled.rows.windows(2).all(|rows| rows[0].code.end == rows[1].code.start));
        assert!(last.saved.len() > 3, "{last:?}");

        let mut machine = Machine { rsp: -8, rbp: None, saved: vec![] };
        for instruction in compiled.instructions() {
            if instruction.mnemonic() == Mnemonic::Mov && instruction.op0_register() == Register::RSP {
                break; // the epilogue
            }
            let row = compiled.rows.iter().find(|row| row.code.contains(&instruction.ip())).unwrap();
            let register = match row.cfa_register {
                7 => machine.rsp,
                6 => machine.rbp.unwrap(),
                other => panic!("CFA from register {other}"),
            };
            assert_eq!(register + i64::from(row.cfa_offset), 0, "CFA at {instruction}: {row:x?}");
            assert_eq!(row.saved, machine.saved, "saved at {instruction}");
            if instruction.mnemonic() == Mnemonic::Call {
                assert_eq!(compiled.frames[0].size, Some((-machine.rsp - 8) as u64));
            }
            machine.step(&instruction);
        }
    }
}

#[test]
fn the_frame_pointer_rules_as_soon_as_it_is_set() {
    for bytes in [16, 6000, 100_000] {
        let compiled = compile("none", |builder, pointer, callee| large(builder, pointer, callee, bytes));
        let set = compiled.instructions().into_iter().find(|instruction| {
            instruction.op0_register() == Register::RBP && instruction.mnemonic() == Mnemonic::Mov
        });
        let set = set.unwrap().next_ip();
        for row in &compiled.rows {
            assert!(row.code.end <= set || row.code.start >= set, "{row:x?}");
            assert_eq!((row.cfa_register, row.cfa_offset) == (6, 16), row.code.start >= set, "{row:x?}");
        }
    }
}

#[test]
fn large_frames_touch_each_page_in_the_prologue() {
    let compiled =
        compile("none", |builder, pointer, callee| large(builder, pointer, callee, 3 * 4096 + 100));
    let mut machine = Machine { rsp: -8, rbp: None, saved: vec![] };
    let mut touched = Vec::new();
    for instruction in compiled.instructions() {
        if instruction.op0_kind() == OpKind::Memory && instruction.op1_kind() == OpKind::Immediate32 {
            touched.push(machine.rsp);
        }
        machine.step(&instruction);
    }
    // Below the return address and rbp.
    assert_eq!(touched, [4096, 8192, 12288].map(|depth| -16 - depth));
}

#[test]
fn no_rule_is_given_while_a_tail_call_makes_room_for_its_arguments() {
    let isa = isa("none");
    let mut signature = Signature::new(CallConv::Tail);
    signature.params.push(AbiParam::new(I64));
    let mut callee = Signature::new(CallConv::Tail);
    callee.params.extend([AbiParam::new(I64); 12]);
    let mut function = Function::with_name_signature(UserFuncName::default(), signature);
    let mut contexts = FunctionBuilderContext::new();
    let mut builder = FunctionBuilder::new(&mut function, &mut contexts);
    let block = builder.create_block();
    builder.append_block_params_for_function_params(block);
    builder.switch_to_block(block);
    builder.seal_block(block);
    let target = builder.block_params(block)[0];
    let callee = builder.import_signature(callee);
    builder.ins().return_call_indirect(callee, target, &[target; 12]);
    builder.finalize(isa.frontend_config());
    let mut context = Context::for_function(function);
    let code = context.compile(&*isa, &mut Default::default()).unwrap();
    let rows = unwind_rows(code, &*isa, 0).unwrap();
    let set: Vec<_> = Decoder::with_ip(64, code.code_buffer(), 0, DecoderOptions::NONE)
        .into_iter()
        .filter(|instruction| {
            instruction.mnemonic() == Mnemonic::Mov && instruction.op0_register() == Register::RBP
        })
        .map(|instruction| instruction.next_ip())
        .collect();
    let &[first, second] = &set[..] else { panic!("{set:?}") };
    let ruled = |at| rows.iter().any(|row| row.code.contains(&at));
    assert!(ruled(first) && ruled(second - 3));
    assert!(!ruled(second), "{rows:x?}");
    assert!(ruled(code.code_buffer().len() as u64 - 1));
}
