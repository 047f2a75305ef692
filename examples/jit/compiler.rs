//! The language to x86-64 code, by Cranelift, with precise stack maps.
//!
//! Compiled code must let the stack move whenever a function is called, and be able to say which words of
//! its frame are pointers then. Cranelift keeps the book (`cranelift_frontend`: values declared to need a
//! stack map are spilled before a call and reloaded after it), if it is told of every pointer:
//!
//! - Every value of a pointer type is declared, named or not: `f(&x, g(), yield 1)` keeps `&x` across two
//!   calls.
//! - A local whose address is taken has a stack slot; if it is a pointer itself, its slot is added to the
//!   map of each call in its scope.
//! - The context, a parameter added to every function, is handled as a pointer into the stack, which it may
//!   be.
//! - No address of a slot is computed earlier than where it is used, and no optimisation may share it:
//!   Cranelift's would keep one `stack_addr` across calls in a register that no map mentions.
//!
//! What is left is never a pointer at a call: registers, spilled temporaries, slots of integers. So
//! `regrow::map::cranelift` may be told that the rest of each frame is data ([`Module::link`]).
//!
//! # Where the stack overflows
//!
//! In prologues, where a frame holds nothing yet: they probe all of the frame (`configure`). The function
//! that `yield` calls is Rust code, of whose frame no map knows all: the stack could not move if it overflowed
//! there. So `yield` first calls a compiled function with a large frame and nothing in it, which returns at
//! once. What comes next has as much room as that frame had:
//!
//! ```text
//!   ├───────────────┤                      ├───────────────┤
//!   │ frame of f    │                      │ frame of f    │
//!   ├───────────────┤                      ├───────────────┤
//!   │ frame of room │  probed: the stack   │ yield's       │
//!   │               │  moves here, if ever │ function      │
//!   └───────────────┘                      └───────────────┘
//! ```

use std::error::Error;
use std::ffi::c_void;

use cranelift_codegen::Context;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::immediates::Imm64;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{
    AbiParam, ExtFuncData, ExternalName, FuncRef, Inst, InstBuilder, MemFlagsData, SigRef, Signature,
    StackSlot, StackSlotData, StackSlotKind, UserExternalName, UserStackMapEntry, Value,
};
use cranelift_codegen::isa::{CallConv, OwnedTargetIsa, TargetIsa};
use cranelift_codegen::settings;
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext, Variable};
use regrow::map;

use crate::module::{Call, Module, Object};
use crate::syntax::{
    Block, Expression, Function, FunctionId, Kind, LocalId, Operator, Program, Statement, Type,
};

/// How many bytes the function that `yield` calls may need on the stack.
const ROOM: u32 = 1024;

/// What compiled code calls for `yield`: with the context it was entered with, and the value. Returns what
/// `yield` evaluates to. It does not unwind.
pub type YieldFunction = unsafe extern "C" fn(context: *const c_void, value: i64) -> i64;

/// Compiles a program into executable memory.
pub fn compile(program: &Program, yield_function: YieldFunction) -> Result<Module, Box<dyn Error>> {
    let isa = host()?;
    let mut context = Context::new();
    let mut builder_context = FunctionBuilderContext::new();
    let mut objects = Vec::new();
    for function in &program.functions {
        context.clear();
        context.func.signature = signature(function.parameters);
        let builder = FunctionBuilder::new(&mut context.func, &mut builder_context);
        Translator::new(builder, program, function, yield_function).translate(&*isa);
        let parameters = function.locals[..function.parameters].iter().map(|local| local.ty).collect();
        objects.push(generate(&mut context, &function.name, parameters, &*isa)?);
    }
    assert_eq!(objects.len(), room_id(program));
    context.clear();
    make_room(FunctionBuilder::new(&mut context.func, &mut builder_context), &*isa);
    objects.push(generate(&mut context, "(room)", Vec::new(), &*isa)?);
    let entry = objects.len();
    context.clear();
    context.func.signature = signature(1);
    enter(FunctionBuilder::new(&mut context.func, &mut builder_context), program.main, &*isa);
    objects.push(generate(&mut context, "(entry)", Vec::new(), &*isa)?);
    Module::link(objects, entry, &*isa)
}

/// Of the function that makes room; those of the program come before it.
fn room_id(program: &Program) -> FunctionId {
    program.functions.len()
}

/// The machine we run on, and what moving stacks ask of its code.
fn host() -> Result<OwnedTargetIsa, Box<dyn Error>> {
    let mut flags = settings::builder();
    map::cranelift::configure(&mut flags)?;
    Ok(cranelift_native::builder()?.finish(settings::Flags::new(flags))?)
}

/// The context and the parameters, every one a word.
fn signature(parameters: usize) -> Signature {
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params = vec![AbiParam::new(I64); parameters + 1];
    signature.returns.push(AbiParam::new(I64));
    signature
}

/// Machine code of the function in `context`.
fn generate(
    context: &mut Context,
    name: &str,
    parameters: Vec<Type>,
    isa: &dyn TargetIsa,
) -> Result<Object, Box<dyn Error>> {
    context.compile(isa, &mut ControlPlane::default()).map_err(|error| error.inner)?;
    let code = context.take_compiled_code().ok_or("no code")?;
    let id = |name| context.func.params.user_named_funcs()[name].index as usize;
    let calls = code.buffer.relocs().iter().map(|relocation| Call::new(relocation, id));
    let calls = calls.collect::<Result<_, _>>()?;
    Ok(Object { name: name.to_string(), parameters, code, calls })
}

/// Imports function `id` of the same module.
fn import(builder: &mut FunctionBuilder<'_>, id: FunctionId, signature: Signature) -> FuncRef {
    let signature = builder.import_signature(signature);
    let name = UserExternalName::new(0, id as u32);
    let name = ExternalName::user(builder.func.declare_imported_user_function(name));
    builder.import_function(ExtFuncData { name, signature, colocated: true, patchable: false })
}

/// A function whose prologue probes [`ROOM`] bytes of stack, and that does nothing else.
fn make_room(mut builder: FunctionBuilder<'_>, isa: &dyn TargetIsa) {
    builder.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, ROOM, 3));
    let block = builder.create_block();
    builder.switch_to_block(block);
    builder.ins().return_(&[]);
    builder.seal_all_blocks();
    builder.finalize(isa.frontend_config());
}

/// A function of the context and the address of two words, which calls `main` with them.
fn enter(mut builder: FunctionBuilder<'_>, main: FunctionId, isa: &dyn TargetIsa) {
    let block = builder.create_block();
    builder.append_block_params_for_function_params(block);
    builder.switch_to_block(block);
    let &[context, arguments] = builder.block_params(block) else { unreachable!("two parameters") };
    for pointer in [context, arguments] {
        builder.declare_value_needs_stack_map(pointer);
    }
    let [a, b] = [0, 8].map(|offset| builder.ins().load(I64, MemFlagsData::trusted(), arguments, offset));
    let main = import(&mut builder, main, signature(2));
    let call = builder.ins().call(main, &[context, a, b]);
    let result = builder.inst_results(call)[0];
    builder.ins().return_(&[result]);
    builder.seal_all_blocks();
    builder.finalize(isa.frontend_config());
}

/// Where a local lives.
#[derive(Clone, Copy)]
enum Home {
    Variable(Variable),
    /// Its address is taken.
    Slot(StackSlot),
}

/// Translates one function.
struct Translator<'a> {
    builder: FunctionBuilder<'a>,
    function: &'a Function,
    yield_function: YieldFunction,
    yield_signature: SigRef,
    callees: Vec<FuncRef>,
    room: FuncRef,
    context: Variable,
    homes: Vec<Home>,
    /// The slots in scope that hold pointers.
    pointers: Vec<StackSlot>,
}

impl<'a> Translator<'a> {
    fn new(
        mut builder: FunctionBuilder<'a>,
        program: &Program,
        function: &'a Function,
        yield_function: YieldFunction,
    ) -> Self {
        let callees = program.functions.iter().enumerate();
        let callees =
            callees.map(|(id, callee)| import(&mut builder, id, signature(callee.parameters))).collect();
        let room = import(&mut builder, room_id(program), Signature::new(CallConv::SystemV));
        let yield_signature = builder.import_signature(signature(1));
        let context = builder.declare_var(I64);
        builder.declare_var_needs_stack_map(context);
        Self {
            builder,
            function,
            yield_function,
            yield_signature,
            callees,
            room,
            context,
            homes: Vec::new(),
            pointers: Vec::new(),
        }
    }

    fn translate(mut self, isa: &dyn TargetIsa) {
        self.enter();
        self.block(&self.function.body);
        let zero = self.iconst(0);
        self.builder.ins().return_(&[zero]);
        self.builder.seal_all_blocks();
        self.builder.finalize(isa.frontend_config());
    }

    /// Brings the locals into being.
    fn enter(&mut self) {
        for local in &self.function.locals {
            let home = if local.addressed { Home::Slot(self.slot()) } else { self.variable(local.ty) };
            self.homes.push(home);
        }
        let entry = self.builder.create_block();
        self.builder.append_block_params_for_function_params(entry);
        self.builder.switch_to_block(entry);
        let parameters = self.builder.block_params(entry).to_vec();
        self.builder.def_var(self.context, parameters[0]);
        for (local, &value) in parameters[1..].iter().enumerate() {
            self.declare_if_pointer(value, self.function.locals[local].ty);
            self.bear(local, value);
        }
    }

    fn slot(&mut self) -> StackSlot {
        self.builder.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, 8, 3))
    }

    fn variable(&mut self, ty: Type) -> Home {
        let variable = self.builder.declare_var(I64);
        if ty.is_pointer() {
            self.builder.declare_var_needs_stack_map(variable);
        }
        Home::Variable(variable)
    }

    fn declare_if_pointer(&mut self, value: Value, ty: Type) {
        if ty.is_pointer() {
            self.builder.declare_value_needs_stack_map(value);
        }
    }

    fn iconst(&mut self, number: i64) -> Value {
        self.builder.ins().iconst(I64, Imm64::new(number))
    }

    /// Begins a local's life. From here on its slot, if it has one and is a pointer, is in the maps.
    fn bear(&mut self, local: LocalId, value: Value) {
        self.assign(local, value);
        if let Home::Slot(slot) = self.homes[local]
            && self.function.locals[local].ty.is_pointer()
        {
            self.pointers.push(slot);
        }
    }

    fn assign(&mut self, local: LocalId, value: Value) {
        match self.homes[local] {
            Home::Variable(variable) => self.builder.def_var(variable, value),
            Home::Slot(slot) => {
                self.builder.ins().stack_store(I64, value, slot, 0);
            }
        }
    }

    fn block(&mut self, block: &Block) {
        let outer = self.pointers.len();
        for statement in block {
            self.statement(statement);
        }
        self.pointers.truncate(outer);
    }

    fn statement(&mut self, statement: &Statement) {
        match statement {
            Statement::Let(local, value) => {
                let value = self.expression(value);
                self.bear(*local, value);
            }
            Statement::Assign(local, value) => {
                let value = self.expression(value);
                self.assign(*local, value);
            }
            Statement::Store(pointer, value) => {
                let pointer = self.expression(pointer);
                let value = self.expression(value);
                self.builder.ins().store(MemFlagsData::trusted(), value, pointer, 0);
            }
            Statement::If(condition, then, otherwise) => self.branch(condition, then, otherwise),
            Statement::While(condition, body) => self.repeat(condition, body),
            Statement::Return(value) => {
                let value = self.expression(value);
                self.builder.ins().return_(&[value]);
                let unreachable = self.builder.create_block();
                self.builder.switch_to_block(unreachable);
            }
            Statement::Evaluate(expression) => {
                self.expression(expression);
            }
        }
    }

    fn branch(&mut self, condition: &Expression, then: &Block, otherwise: &Block) {
        let condition = self.expression(condition);
        let [yes, no, after] = [(); 3].map(|()| self.builder.create_block());
        self.builder.ins().brif(condition, yes, &[], no, &[]);
        for (start, statements) in [(yes, then), (no, otherwise)] {
            self.builder.switch_to_block(start);
            self.block(statements);
            self.builder.ins().jump(after, &[]);
        }
        self.builder.switch_to_block(after);
    }

    fn repeat(&mut self, condition: &Expression, body: &Block) {
        let [head, inside, after] = [(); 3].map(|()| self.builder.create_block());
        self.builder.ins().jump(head, &[]);
        self.builder.switch_to_block(head);
        let condition = self.expression(condition);
        self.builder.ins().brif(condition, inside, &[], after, &[]);
        self.builder.switch_to_block(inside);
        self.block(body);
        self.builder.ins().jump(head, &[]);
        self.builder.switch_to_block(after);
    }

    fn expression(&mut self, expression: &Expression) -> Value {
        let value = match &expression.kind {
            Kind::Literal(number) => self.iconst(*number),
            Kind::Local(local) => match self.homes[*local] {
                // Declared, if at all, with the variable.
                Home::Variable(variable) => return self.builder.use_var(variable),
                Home::Slot(slot) => self.builder.ins().stack_load(I64, I64, slot, 0),
            },
            Kind::Address(local) => match self.homes[*local] {
                Home::Slot(slot) => self.builder.ins().stack_addr(I64, slot, 0),
                Home::Variable(_) => unreachable!("the parser marks locals whose address is taken"),
            },
            Kind::Load(pointer) => {
                let pointer = self.expression(pointer);
                self.builder.ins().load(I64, MemFlagsData::trusted(), pointer, 0)
            }
            Kind::Binary(operator, left, right) => {
                let left = self.expression(left);
                let right = self.expression(right);
                self.operator(*operator, left, right)
            }
            Kind::Call(function, arguments) => self.call(*function, arguments),
            Kind::Yield(value) => self.suspend(value),
        };
        self.declare_if_pointer(value, expression.ty);
        value
    }

    fn operator(&mut self, operator: Operator, left: Value, right: Value) -> Value {
        let ins = self.builder.ins();
        let condition = match operator {
            Operator::Or => return ins.bor(left, right),
            Operator::Xor => return ins.bxor(left, right),
            Operator::And => return ins.band(left, right),
            Operator::ShiftLeft => return ins.ishl(left, right),
            Operator::ShiftRight => return ins.sshr(left, right),
            Operator::Add => return ins.iadd(left, right),
            Operator::Subtract => return ins.isub(left, right),
            Operator::Multiply => return ins.imul(left, right),
            Operator::Equal => IntCC::Equal,
            Operator::Unequal => IntCC::NotEqual,
            Operator::Less => IntCC::SignedLessThan,
            Operator::LessOrEqual => IntCC::SignedLessThanOrEqual,
        };
        let truth = ins.icmp(condition, left, right);
        self.builder.ins().uextend(I64, truth)
    }

    fn call(&mut self, function: usize, arguments: &[Expression]) -> Value {
        let mut values: Vec<_> = arguments.iter().map(|argument| self.expression(argument)).collect();
        values.insert(0, self.builder.use_var(self.context));
        let call = self.builder.ins().call(self.callees[function], &values);
        self.result(call)
    }

    fn suspend(&mut self, value: &Expression) -> Value {
        let value = self.expression(value);
        let room = self.builder.ins().call(self.room, &[]);
        self.keep_pointers(room);
        let context = self.builder.use_var(self.context);
        let callee = self.iconst(self.yield_function as usize as i64);
        let call = self.builder.ins().call_indirect(self.yield_signature, callee, &[context, value]);
        self.result(call)
    }

    fn result(&mut self, call: Inst) -> Value {
        self.keep_pointers(call);
        self.builder.inst_results(call)[0]
    }

    /// Adds the slots that hold pointers to a call's map.
    fn keep_pointers(&mut self, call: Inst) {
        for &slot in &self.pointers {
            let entry = UserStackMapEntry { ty: I64, slot, offset: 0 };
            self.builder.func.dfg.append_user_stack_map_entry(call, entry);
        }
    }
}
