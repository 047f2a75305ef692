//! The language by the book: walks the tree, on the heap, with no stack to move. What compiled code is
//! compared with.

use std::fmt;

use crate::syntax::{Block, Expression, FunctionId, Kind, LocalId, Operator, Program, Statement};

/// Why a program has no result. Compiled code does not check any of this: such a program is not to be run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trap {
    /// It followed a pointer to a local that has died.
    Dangling,
    /// It evaluated more expressions than it was allowed to.
    Fuel,
    /// It called deeper than it was allowed to.
    Depth,
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dangling => "it follows a pointer to a local that has died",
            Self::Fuel => "it runs too long",
            Self::Depth => "it calls too deep",
        })
    }
}

impl std::error::Error for Trap {}

/// How much a program may do before it is stopped.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Expressions evaluated.
    pub fuel: u64,
    /// Calls in progress.
    pub depth: usize,
}

/// Runs a program; `resume` is called with each yielded value and returns what `yield` evaluates to.
pub fn run(
    program: &Program,
    arguments: [i64; 2],
    limits: Limits,
    resume: impl FnMut(i64) -> i64,
) -> Result<i64, Trap> {
    let mut interpreter = Interpreter { program, resume, cells: Vec::new(), births: 0, limits };
    interpreter.call(program.main, arguments.map(Value::Int).to_vec())
}

#[derive(Clone, Copy)]
enum Value {
    Int(i64),
    Pointer(Address),
}

impl Value {
    /// For values that the parser has found to be such.
    fn int(self) -> i64 {
        match self {
            Self::Int(int) => int,
            Self::Pointer(_) => unreachable!("the parser checked the types"),
        }
    }

    fn pointer(self) -> Address {
        match self {
            Self::Pointer(address) => address,
            Self::Int(_) => unreachable!("the parser checked the types"),
        }
    }
}

/// A cell, and which birth in it is meant.
#[derive(Clone, Copy)]
struct Address {
    cell: usize,
    birth: u64,
}

/// A living local.
struct Cell {
    value: Value,
    birth: u64,
}

/// Where the locals of a call in progress are.
type Frame = Vec<Option<Address>>;

/// How a statement ended.
enum Flow {
    Next,
    Return(i64),
}

struct Interpreter<'p, R> {
    program: &'p Program,
    resume: R,
    /// The living locals, oldest first.
    cells: Vec<Cell>,
    births: u64,
    limits: Limits,
}

impl<R: FnMut(i64) -> i64> Interpreter<'_, R> {
    fn call(&mut self, function: FunctionId, arguments: Vec<Value>) -> Result<i64, Trap> {
        let function = &self.program.functions[function];
        self.limits.depth = self.limits.depth.checked_sub(1).ok_or(Trap::Depth)?;
        let caller = self.cells.len();
        let mut frame = vec![None; function.locals.len()];
        for (local, argument) in arguments.into_iter().enumerate() {
            self.bear(&mut frame, local, argument);
        }
        let flow = self.block(&mut frame, &function.body)?;
        self.cells.truncate(caller);
        self.limits.depth += 1;
        Ok(match flow {
            Flow::Next => 0,
            Flow::Return(value) => value,
        })
    }

    fn bear(&mut self, frame: &mut Frame, local: LocalId, value: Value) {
        self.births += 1;
        frame[local] = Some(Address { cell: self.cells.len(), birth: self.births });
        self.cells.push(Cell { value, birth: self.births });
    }

    fn cell(&mut self, address: Address) -> Result<&mut Value, Trap> {
        let cell = self.cells.get_mut(address.cell).filter(|cell| cell.birth == address.birth);
        cell.map(|cell| &mut cell.value).ok_or(Trap::Dangling)
    }

    fn block(&mut self, frame: &mut Frame, block: &Block) -> Result<Flow, Trap> {
        let outer = self.cells.len();
        for statement in block {
            if let Flow::Return(value) = self.statement(frame, statement)? {
                return Ok(Flow::Return(value));
            }
        }
        self.cells.truncate(outer);
        Ok(Flow::Next)
    }

    fn statement(&mut self, frame: &mut Frame, statement: &Statement) -> Result<Flow, Trap> {
        match statement {
            Statement::Let(local, value) => {
                let value = self.evaluate(frame, value)?;
                self.bear(frame, *local, value);
            }
            Statement::Assign(local, value) => {
                let value = self.evaluate(frame, value)?;
                *self.cell(home(frame, *local))? = value;
            }
            Statement::Store(pointer, value) => {
                let address = self.evaluate(frame, pointer)?.pointer();
                let value = self.evaluate(frame, value)?;
                *self.cell(address)? = value;
            }
            Statement::If(condition, then, otherwise) => {
                let branch = if self.evaluate(frame, condition)?.int() != 0 { then } else { otherwise };
                return self.block(frame, branch);
            }
            Statement::While(condition, body) => {
                while self.evaluate(frame, condition)?.int() != 0 {
                    if let Flow::Return(value) = self.block(frame, body)? {
                        return Ok(Flow::Return(value));
                    }
                }
            }
            Statement::Return(value) => return Ok(Flow::Return(self.evaluate(frame, value)?.int())),
            Statement::Evaluate(expression) => {
                self.evaluate(frame, expression)?;
            }
        }
        Ok(Flow::Next)
    }

    fn evaluate(&mut self, frame: &mut Frame, expression: &Expression) -> Result<Value, Trap> {
        self.limits.fuel = self.limits.fuel.checked_sub(1).ok_or(Trap::Fuel)?;
        Ok(match &expression.kind {
            Kind::Literal(number) => Value::Int(*number),
            Kind::Local(local) => *self.cell(home(frame, *local))?,
            Kind::Address(local) => Value::Pointer(home(frame, *local)),
            Kind::Load(pointer) => {
                let address = self.evaluate(frame, pointer)?.pointer();
                *self.cell(address)?
            }
            Kind::Binary(operator, left, right) => {
                let left = self.evaluate(frame, left)?.int();
                let right = self.evaluate(frame, right)?.int();
                Value::Int(apply(*operator, left, right))
            }
            Kind::Call(function, arguments) => {
                let arguments = arguments.iter().map(|argument| self.evaluate(frame, argument));
                let arguments = arguments.collect::<Result<_, _>>()?;
                Value::Int(self.call(*function, arguments)?)
            }
            Kind::Yield(value) => {
                let value = self.evaluate(frame, value)?.int();
                Value::Int((self.resume)(value))
            }
        })
    }
}

fn home(frame: &Frame, local: LocalId) -> Address {
    frame[local].expect("the parser lets no local be named before its `let`")
}

fn apply(operator: Operator, left: i64, right: i64) -> i64 {
    match operator {
        Operator::Or => left | right,
        Operator::Xor => left ^ right,
        Operator::And => left & right,
        Operator::Equal => (left == right).into(),
        Operator::Unequal => (left != right).into(),
        Operator::Less => (left < right).into(),
        Operator::LessOrEqual => (left <= right).into(),
        Operator::ShiftLeft => left.wrapping_shl(right as u32),
        Operator::ShiftRight => left.wrapping_shr(right as u32),
        Operator::Add => left.wrapping_add(right),
        Operator::Subtract => left.wrapping_sub(right),
        Operator::Multiply => left.wrapping_mul(right),
    }
}
