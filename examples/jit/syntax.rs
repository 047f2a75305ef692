//! The language: integers, pointers to locals, functions, `yield`. Its grammar, its tree, its parser.
//!
//! ```text
//!   program    = { "fn" name "(" [ name ":" type { "," name ":" type } ] ")" block }
//!   type       = { "*" } "int"
//!   block      = "{" { statement } "}"
//!   statement  = "let" name "=" expression ";"
//!              | name "=" expression ";" | "*" unary "=" expression ";"
//!              | "if" expression block [ "else" block ]
//!              | "while" expression block
//!              | "return" expression ";"
//!              | expression ";"
//!   expression = unary { operator unary }            operators below, tightest last
//!   unary      = ( "-" | "*" | "yield" ) unary | "&" name
//!              | number | name | name "(" [ expression { "," expression } ] ")" | "(" expression ")"
//! ```
//!
//! An `int` has 64 bits and wraps. Every function returns an `int`, 0 if it runs off its end. `yield e`
//! hands `e` to whoever runs the program; its value is what they hand back. Everything is evaluated from
//! left to right, the pointer of `*p = e` before `e`. A local lives until its block is left, and a new one
//! is born whenever its `let` is reached: to use a pointer to one that has died is an error.
//!
//! Pointers are made by `&`, copied, stored, and followed; there is no arithmetic on them and no way from
//! or to an `int`. So the type of a word says whether it points into the stack, which is all a stack map
//! needs.

use std::collections::HashMap;
use std::fmt;

/// How many parameters a function may have: as many as travel in registers, next to the one the
/// compiler adds. On the stack they would lie in the caller's frame, and belong to the callee's map.
pub const MAX_PARAMETERS: usize = 5;

/// `int` behind so many stars.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Type {
    stars: u8,
}

impl Type {
    pub const INT: Self = Self { stars: 0 };

    pub fn is_pointer(self) -> bool {
        self.stars > 0
    }

    fn pointer(self) -> Self {
        Self { stars: self.stars.saturating_add(1) }
    }

    fn pointee(self) -> Option<Self> {
        self.stars.checked_sub(1).map(|stars| Self { stars })
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}int", "*".repeat(self.stars.into()))
    }
}

/// A parsed and checked program: every name is resolved, every type is right.
pub struct Program {
    pub functions: Vec<Function>,
    /// The function to start with: `fn main(int, int)`.
    pub main: FunctionId,
}

/// A function's number in its program.
pub type FunctionId = usize;

/// A local's number in its function. The parameters come first.
pub type LocalId = usize;

pub struct Function {
    pub name: String,
    pub parameters: usize,
    pub locals: Vec<Local>,
    pub body: Block,
}

pub struct Local {
    pub ty: Type,
    /// Somewhere there is an `&` before it, so it must have an address.
    pub addressed: bool,
}

pub type Block = Vec<Statement>;

pub enum Statement {
    /// The birth of a local.
    Let(LocalId, Expression),
    Assign(LocalId, Expression),
    /// Through the pointer on the left.
    Store(Expression, Expression),
    If(Expression, Block, Block),
    While(Expression, Block),
    Return(Expression),
    Evaluate(Expression),
}

pub struct Expression {
    pub kind: Kind,
    pub ty: Type,
}

pub enum Kind {
    Literal(i64),
    Local(LocalId),
    Address(LocalId),
    Load(Box<Expression>),
    Binary(Operator, Box<Expression>, Box<Expression>),
    Call(FunctionId, Vec<Expression>),
    Yield(Box<Expression>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operator {
    Or,
    Xor,
    And,
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    ShiftLeft,
    /// Arithmetic; both shifts count modulo 64.
    ShiftRight,
    Add,
    Subtract,
    Multiply,
}

/// Operators with their signs and how tightly they bind.
pub const OPERATORS: [(&str, Operator, u8); 12] = [
    ("|", Operator::Or, 1),
    ("^", Operator::Xor, 2),
    ("&", Operator::And, 3),
    ("==", Operator::Equal, 4),
    ("!=", Operator::Unequal, 4),
    ("<", Operator::Less, 5),
    ("<=", Operator::LessOrEqual, 5),
    ("<<", Operator::ShiftLeft, 6),
    (">>", Operator::ShiftRight, 6),
    ("+", Operator::Add, 7),
    ("-", Operator::Subtract, 7),
    ("*", Operator::Multiply, 8),
];

/// What is wrong with a source text.
#[derive(PartialEq, Eq, Debug)]
pub struct Error {
    pub line: usize,
    pub message: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for Error {}

/// Parses and checks a program.
pub fn parse(source: &str) -> Result<Program, Error> {
    let tokens = tokens(source)?;
    let headers = headers(&tokens)?;
    let mut parser = Parser::new(&tokens, &headers);
    let mut functions = Vec::new();
    while !parser.at_end() {
        functions.push(parser.function()?);
    }
    match headers.get("main") {
        Some(main) if main.parameters == [Type::INT; 2] => Ok(Program { functions, main: main.id }),
        _ => parser.error("a program needs a function main of two ints to start with"),
    }
}

#[derive(Clone, Copy)]
struct Token<'s> {
    text: &'s str,
    line: usize,
}

/// Words, numbers and signs; `#` starts a comment.
fn tokens(source: &str) -> Result<Vec<Token<'_>>, Error> {
    const SIGNS: [&str; 20] = [
        "<<", ">>", "<=", "==", "!=", "|", "^", "&", "<", "+", "-", "*", "=", "(", ")", "{", "}", ",", ":",
        ";",
    ];
    let mut tokens = Vec::new();
    for (index, text) in source.lines().enumerate() {
        let line = index + 1;
        let mut rest = text.split('#').next().unwrap_or_default().trim_start();
        while !rest.is_empty() {
            let word = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
            let sign = SIGNS.iter().find(|sign| rest.starts_with(**sign)).map_or(0, |sign| sign.len());
            let length = word.max(sign);
            if length == 0 {
                return Err(Error { line, message: format!("what is this: {rest}") });
            }
            let (text, after) = rest.split_at(length);
            tokens.push(Token { text, line });
            rest = after.trim_start();
        }
    }
    Ok(tokens)
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// What a caller must know of a function.
struct Header {
    id: FunctionId,
    parameters: Vec<Type>,
}

/// The headers of all functions: a function may be called above its definition.
fn headers<'s>(tokens: &[Token<'s>]) -> Result<HashMap<&'s str, Header>, Error> {
    let none = HashMap::new();
    let mut parser = Parser::new(tokens, &none);
    let mut headers = HashMap::new();
    while let Some(token) = parser.next() {
        if token.text != "fn" {
            continue;
        }
        let (name, parameters) = parser.header()?;
        let parameters = parameters.into_iter().map(|(_, ty)| ty).collect();
        let header = Header { id: headers.len(), parameters };
        if headers.insert(name, header).is_some() {
            return parser.error(format!("a second function {name}"));
        }
    }
    Ok(headers)
}

type Parameters<'s> = Vec<(&'s str, Type)>;

struct Parser<'t, 's> {
    tokens: &'t [Token<'s>],
    at: usize,
    headers: &'t HashMap<&'s str, Header>,
    locals: Vec<Local>,
    /// The names that can be seen, the innermost last.
    names: Vec<(&'s str, LocalId)>,
}

impl<'t, 's> Parser<'t, 's> {
    fn new(tokens: &'t [Token<'s>], headers: &'t HashMap<&'s str, Header>) -> Self {
        Self { tokens, at: 0, headers, locals: Vec::new(), names: Vec::new() }
    }

    fn at_end(&self) -> bool {
        self.at == self.tokens.len()
    }

    fn peek(&self) -> &'s str {
        self.tokens.get(self.at).map_or("", |token| token.text)
    }

    fn next(&mut self) -> Option<Token<'s>> {
        let token = self.tokens.get(self.at).copied();
        self.at += usize::from(token.is_some());
        token
    }

    /// Takes the next token if it is this one.
    fn take(&mut self, text: &str) -> bool {
        let found = self.peek() == text;
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, text: &str) -> Result<(), Error> {
        if self.take(text) { Ok(()) } else { self.error(format!("expected {text}, found {}", self.peek())) }
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T, Error> {
        let token = self.tokens.get(self.at).or(self.tokens.last());
        Err(Error { line: token.map_or(1, |token| token.line), message: message.into() })
    }

    fn name(&mut self) -> Result<&'s str, Error> {
        const KEYWORDS: [&str; 8] = ["fn", "let", "if", "else", "while", "return", "yield", "int"];
        let text = self.peek();
        if KEYWORDS.contains(&text) || !text.starts_with(|c: char| is_word(c) && !c.is_ascii_digit()) {
            return self.error(format!("expected a name, found {text}"));
        }
        self.at += 1;
        Ok(text)
    }

    /// A comma-separated list up to the closing parenthesis.
    fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Result<T, Error>) -> Result<Vec<T>, Error> {
        let mut items = Vec::new();
        self.expect("(")?;
        while !self.take(")") {
            if !items.is_empty() {
                self.expect(",")?;
            }
            items.push(item(self)?);
        }
        Ok(items)
    }

    /// Name and parameters, after the `fn`.
    fn header(&mut self) -> Result<(&'s str, Parameters<'s>), Error> {
        let name = self.name()?;
        let parameters = self.list(|parser| {
            let name = parser.name()?;
            parser.expect(":")?;
            Ok((name, parser.ty()?))
        })?;
        if parameters.len() > MAX_PARAMETERS {
            return self.error(format!("{name} has more than {MAX_PARAMETERS} parameters"));
        }
        Ok((name, parameters))
    }

    fn ty(&mut self) -> Result<Type, Error> {
        if self.take("*") {
            return Ok(self.ty()?.pointer());
        }
        self.expect("int")?;
        Ok(Type::INT)
    }

    fn function(&mut self) -> Result<Function, Error> {
        self.expect("fn")?;
        let (name, parameters) = self.header()?;
        self.names.clear();
        for &(name, ty) in &parameters {
            self.declare(name, ty);
        }
        let body = self.block()?;
        let locals = std::mem::take(&mut self.locals);
        Ok(Function { name: name.to_string(), parameters: parameters.len(), locals, body })
    }

    fn declare(&mut self, name: &'s str, ty: Type) -> LocalId {
        let local = self.locals.len();
        self.locals.push(Local { ty, addressed: false });
        self.names.push((name, local));
        local
    }

    fn resolve(&mut self) -> Result<LocalId, Error> {
        let name = self.name()?;
        match self.names.iter().rev().find(|(known, _)| *known == name) {
            Some(&(_, local)) => Ok(local),
            None => self.error(format!("no local {name}")),
        }
    }

    fn block(&mut self) -> Result<Block, Error> {
        let outer = self.names.len();
        let mut statements = Vec::new();
        self.expect("{")?;
        while !self.take("}") {
            statements.push(self.statement()?);
        }
        self.names.truncate(outer);
        Ok(statements)
    }

    fn statement(&mut self) -> Result<Statement, Error> {
        if self.take("if") {
            let condition = self.int()?;
            let then = self.block()?;
            let otherwise = if self.take("else") { self.block()? } else { Block::new() };
            return Ok(Statement::If(condition, then, otherwise));
        }
        if self.take("while") {
            return Ok(Statement::While(self.int()?, self.block()?));
        }
        let statement = self.simple_statement()?;
        self.expect(";")?;
        Ok(statement)
    }

    fn simple_statement(&mut self) -> Result<Statement, Error> {
        if self.take("let") {
            let name = self.name()?;
            self.expect("=")?;
            let value = self.expression(0)?;
            return Ok(Statement::Let(self.declare(name, value.ty), value));
        }
        if self.take("return") {
            return Ok(Statement::Return(self.int()?));
        }
        let left = self.expression(0)?;
        if !self.take("=") {
            return Ok(Statement::Evaluate(left));
        }
        let ty = left.ty;
        match left.kind {
            Kind::Local(local) => Ok(Statement::Assign(local, self.typed(ty)?)),
            Kind::Load(pointer) => Ok(Statement::Store(*pointer, self.typed(ty)?)),
            _ => self.error("only a local and what a pointer points to can be assigned to"),
        }
    }

    fn typed(&mut self, ty: Type) -> Result<Expression, Error> {
        let expression = self.expression(0)?;
        self.check(&expression, ty)?;
        Ok(expression)
    }

    fn int(&mut self) -> Result<Expression, Error> {
        self.typed(Type::INT)
    }

    fn check(&self, expression: &Expression, ty: Type) -> Result<(), Error> {
        if expression.ty == ty {
            return Ok(());
        }
        self.error(format!("expected {ty}, found {}", expression.ty))
    }

    /// An expression of operators that bind tighter than `level`.
    fn expression(&mut self, level: u8) -> Result<Expression, Error> {
        let mut left = self.unary()?;
        while let Some(&(sign, operator, binding)) = OPERATORS.iter().find(|(sign, ..)| *sign == self.peek())
        {
            if binding <= level {
                break;
            }
            self.expect(sign)?;
            let right = self.expression(binding)?;
            self.check(&left, Type::INT)?;
            self.check(&right, Type::INT)?;
            left = binary(operator, left, right);
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Expression, Error> {
        if self.take("-") {
            let operand = self.unary()?;
            self.check(&operand, Type::INT)?;
            let zero = Expression { kind: Kind::Literal(0), ty: Type::INT };
            return Ok(binary(Operator::Subtract, zero, operand));
        }
        if self.take("*") {
            let pointer = self.unary()?;
            return match pointer.ty.pointee() {
                Some(ty) => Ok(Expression { kind: Kind::Load(Box::new(pointer)), ty }),
                None => self.error("an int is no pointer"),
            };
        }
        if self.take("&") {
            let local = self.resolve()?;
            self.locals[local].addressed = true;
            return Ok(Expression { kind: Kind::Address(local), ty: self.locals[local].ty.pointer() });
        }
        if self.take("yield") {
            let value = self.unary()?;
            self.check(&value, Type::INT)?;
            return Ok(Expression { kind: Kind::Yield(Box::new(value)), ty: Type::INT });
        }
        self.operand()
    }

    fn operand(&mut self) -> Result<Expression, Error> {
        if self.take("(") {
            let expression = self.expression(0)?;
            self.expect(")")?;
            return Ok(expression);
        }
        if self.peek().starts_with(|c: char| c.is_ascii_digit()) {
            return match self.peek().parse() {
                Ok(number) => {
                    self.at += 1;
                    Ok(Expression { kind: Kind::Literal(number), ty: Type::INT })
                }
                Err(_) => self.error(format!("{} is no number of 64 bits", self.peek())),
            };
        }
        if self.tokens.get(self.at + 1).is_some_and(|token| token.text == "(") {
            return self.call();
        }
        let local = self.resolve()?;
        Ok(Expression { kind: Kind::Local(local), ty: self.locals[local].ty })
    }

    fn call(&mut self) -> Result<Expression, Error> {
        let name = self.name()?;
        let Some(header) = self.headers.get(name) else {
            return self.error(format!("no function {name}"));
        };
        let arguments = self.list(|parser| parser.expression(0))?;
        if arguments.len() != header.parameters.len() {
            return self.error(format!("{name} takes {} arguments", header.parameters.len()));
        }
        for (argument, ty) in arguments.iter().zip(&header.parameters) {
            self.check(argument, *ty)?;
        }
        Ok(Expression { kind: Kind::Call(header.id, arguments), ty: Type::INT })
    }
}

fn binary(operator: Operator, left: Expression, right: Expression) -> Expression {
    Expression { kind: Kind::Binary(operator, Box::new(left), Box::new(right)), ty: Type::INT }
}
