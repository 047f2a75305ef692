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
//! What is left is never a pointer at a call: registers, spilled temporaries, slots of integers.
//!
//! A frame, and when it is touched. Between calls nothing but the prologue and the first instruction of the
//! body can run into the guard page, and then the frame holds no pointer yet but the caller's registers:
//!
//! ```text
//!        ┌──────────────────┐
//!        │ return address   │  the caller's call
//!  rbp → │ caller's rbp     │  prologue
//!        │ caller's rbx ... │  prologue
//!        │ spilled integers │
//!        │ pointers, locals │  explicit slots
//!  rsp → │ 0                │  first in the body: the lowest word
//!        └──────────────────┘
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
use cranelift_codegen::settings::{self, Configurable};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext, Variable};

use crate::module::{Call, Module, Object};
use crate::syntax::{Block, Expression, Function, Kind, LocalId, Operator, Program, Statement, Type};

/// What compiled code calls for `yield`: with the context it was entered with, and the value. Returns what
/// `yield` evaluates to.
pub type YieldFunction = unsafe extern "C-unwind" fn(context: *const c_void, value: i64) -> i64;

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
        objects.push(generate(&mut context, function, &*isa)?);
    }
    Module::link(objects, program.main, &*isa)
}

/// The machine we run on, and what the stack asks of its code.
fn host() -> Result<OwnedTargetIsa, Box<dyn Error>> {
    let mut flags = settings::builder();
    // One `stack_addr` must not serve two uses with a call between them.
    flags.set("opt_level", "none")?;
    // A frame larger than the guard may not step over it.
    flags.set("enable_probestack", "true")?;
    flags.set("probestack_strategy", "inline")?;
    flags.set("probestack_size_log2", "12")?;
    // Frames must be found, by the relocator as by a backtrace.
    flags.set("preserve_frame_pointers", "true")?;
    flags.set("unwind_info", "true")?;
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
    function: &Function,
    isa: &dyn TargetIsa,
) -> Result<Object, Box<dyn Error>> {
    let code = context.compile(isa, &mut ControlPlane::default()).map_err(|error| error.inner)?;
    let unwind = code.create_unwind_info(isa)?.ok_or("no unwind information")?;
    let (bytes, stack_maps) = (code.code_buffer().to_vec(), code.buffer.user_stack_maps().to_vec());
    let relocations = code.buffer.relocs().to_vec();
    let calls = relocations.iter().map(|relocation| {
        Call::new(relocation, |name| context.func.params.user_named_funcs()[name].index as usize)
    });
    Ok(Object {
        name: function.name.clone(),
        parameters: function.locals[..function.parameters].iter().map(|local| local.ty).collect(),
        bytes,
        calls: calls.collect::<Result<_, _>>()?,
        stack_maps,
        unwind,
    })
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
        let mut callees = Vec::new();
        for (id, callee) in program.functions.iter().enumerate() {
            let signature = builder.import_signature(signature(callee.parameters));
            let name = UserExternalName::new(0, id as u32);
            let name = ExternalName::user(builder.func.declare_imported_user_function(name));
            let data = ExtFuncData { name, signature, colocated: true, patchable: false };
            callees.push(builder.import_function(data));
        }
        let yield_signature = builder.import_signature(signature(1));
        let context = builder.declare_var(I64);
        builder.declare_var_needs_stack_map(context);
        Self {
            builder,
            function,
            yield_function,
            yield_signature,
            callees,
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

    /// Touches the frame, then brings the locals into being. Two blocks, since spills of parameters go to
    /// the beginning of theirs.
    fn enter(&mut self) {
        let lowest = self.slot(); // slots lie in the order of their making, from rsp upwards
        for local in &self.function.locals {
            let home = if local.addressed { Home::Slot(self.slot()) } else { self.variable(local.ty) };
            self.homes.push(home);
        }
        let entry = self.builder.create_block();
        self.builder.append_block_params_for_function_params(entry);
        self.builder.switch_to_block(entry);
        let zero = self.iconst(0);
        self.builder.ins().stack_store(I64, zero, lowest, 0);
        let arguments: Vec<_> = self.builder.block_params(entry).iter().map(|&value| value.into()).collect();

        let body = self.builder.create_block();
        let parameters: Vec<_> =
            arguments.iter().map(|_| self.builder.append_block_param(body, I64)).collect();
        self.builder.ins().jump(body, &arguments);
        self.builder.switch_to_block(body);
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
        let context = self.builder.use_var(self.context);
        let callee = self.iconst(self.yield_function as usize as i64);
        let call = self.builder.ins().call_indirect(self.yield_signature, callee, &[context, value]);
        self.result(call)
    }

    /// A call's result. Adds the slots that hold pointers to its map.
    fn result(&mut self, call: Inst) -> Value {
        for &slot in &self.pointers {
            let entry = UserStackMapEntry { ty: I64, slot, offset: 0 };
            self.builder.func.dfg.append_user_stack_map_entry(call, entry);
        }
        self.builder.inst_results(call)[0]
    }
}
