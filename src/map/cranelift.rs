//! The recorder for Cranelift: frame maps from the user stack maps and the unwind data of finished code.
//!
//! ```text
//!    rsp + size ┌─────────────────────────────┐  return address above
//!               │ rbp of the caller           │  rules say where
//!               │ callee-saved registers      │  rules say where
//!               │ spilled values              │  rest
//!               │ stack slots                 │  words named by the call's stack map: pointers; others: rest
//!               │ arguments of calls          │  ambiguous
//!           rsp └─────────────────────────────┘
//! ```
//!
//! # Which code gets which map
//!
//! ```text
//!   push rbp                  ┐
//!   mov rbp, rsp              │
//!   probes                    │ prologue   all words are data: no value of the function's own is in them yet
//!   sub rsp, size             │
//!   mov [rsp + ..], rbx       ┘
//!   ...                         body       all words are ambiguous
//!   call f                      call       as the call's stack map says, and `rest`
//!   ...                         body
//! ```
//!
//! The prologue ends at the last change of the unwind rules, since no other code changes them. If the instruction there is the
//! `sub rsp` that makes room for the frame (it is if no register is saved), the prologue ends after it. A callee-saved register
//! that the prologue has saved is data: the copy in the register is dead. `rbp` is a pointer as soon as the frame's end is counted from it.
//!
//! # What a stack map says
//!
//! For each call it lists words of the frame's *stack slots*: those that hold a value which was declared to need a stack map and
//! is used after the call. `cranelift-frontend` stores such a value to a slot of its own before each call and loads it again
//! afterwards, so each copy that survives the call is in the map. Here each such word is a pointer. A call without a map gets a frame
//! without pointers.
//!
//! # What Cranelift does not say
//!
//! A value that was not declared may wait across a call in any spill slot or callee-saved register, and nothing records it. So
//! everything outside the map is `rest`. That is [`Verdict::Ambiguous`], unless the compiler's author makes sure of all of the following and
//! says [`Verdict::Data`]:
//!
//! 1. Every value that may hold a pointer into a stack is declared (`FunctionBuilder::declare_value_needs_stack_map` or
//!    `declare_var_needs_stack_map`). That includes every result of `stack_addr`, and values computed from others.
//! 2. Optimisation is off (`opt_level=none`, see [`configure`]). Otherwise equal `stack_addr`s are merged and moved out of loops
//!    *after* the declarations were obeyed. The merged one then waits in a callee-saved register across calls, and no map
//!    names it. This happens to the addresses of the slots that hold declared values, so no declaration avoids it.
//! 3. A pointer stored *into* a stack slot of your own is declared at each call during which it matters
//!    (`DataFlowGraph::append_user_stack_map_entry`). The map then says that the word is a pointer, so write it before the
//!    first such call.
//! 4. No function returns more than its calling convention has registers for, and none takes a `StructReturn` or
//!    `StructArgument`: Cranelift keeps the address of that memory for itself.
//! 5. `get_stack_pointer`, `get_frame_pointer` and dynamic stack slots are not used.
//! 6. A function that passes arguments in memory has at least one stack slot. Such arguments are in no map until the callee has read
//!    them, and it has not read them while its prologue makes the stack overflow. So the words below the first stack slot are
//!    ambiguous, whatever `rest` is. Without a slot nothing tells where they end. Calls with at most six integer arguments pass
//!    none in memory.
//! 7. No tail call passes more arguments in memory than its function was given itself. (Those that are passed
//!    then lie where the caller's frame seems to begin.)
//!
//! Some calling conventions (`preserve_all`) have the callee save registers that System V lets it destroy. The words that hold them have
//! no owner, so they are ambiguous, whatever `rest` is.
//!
//! # Where the stack overflows
//!
//! With [`configure`]'s settings it overflows only in the prologue: at `push rbp`, or at a probe. The probes touch the whole frame and, if
//! the function calls others, room for their return address and `rbp`. So each frame of a growing stack has a map with a verdict for
//! each of its words: the innermost is in its prologue, and the others are at calls.
//!
//! With wider probes, a frame smaller than their distance overflows at a store in the body or at a call. At a store nothing tells
//! which words hold which values. At a call its map says what the frame holds (see [`FrameMap::at_return`]).
//!
//! # Unwinding
//!
//! Code made at run time has no `.eh_frame`, so the maps bring its rules, with two corrections. First, a prologue probes the stack,
//! and overflows it, *before* Cranelift's rows change from `rsp` to `rbp`:
//!
//! ```text
//!                          Cranelift's rows     here
//!   push rbp               rsp + 8              rsp + 8
//!   mov rbp, rsp           rsp + 16             rsp + 16
//!   sub rsp, 16            rsp + 16             rbp + 16
//!   mov [rsp], 0           rsp + 16, wrong      rbp + 16        the stack overflows here
//!   add rsp, 16            rsp + 16, wrong      rbp + 16
//!   sub rsp, frame         rbp + 16             rbp + 16
//! ```
//!
//! Second, a function whose tail call needs more memory for arguments than it was given itself moves its return address and
//! its caller's `rbp` down in the prologue. During that no rule holds, and no map is given. Afterwards:
//!
//! ```text
//!                          Cranelift's rows     here
//!   CFA                    rbp + 16, wrong      rbp + 16 + moved by
//!   return address         CFA - 8              rbp + 8, which is CFA - 8 - moved by
//!   rbp of the caller      CFA - 16             rbp + 0
//! ```
//!
//! Cranelift does not describe epilogues. Between `pop rbp` and `ret` the rules are wrong. No stack can overflow there, because nothing is
//! pushed.

use core::fmt;
use core::ops::Range;

use cranelift_codegen::gimli;
use cranelift_codegen::gimli::read::UnwindSection as _;
use cranelift_codegen::isa::TargetIsa;
use cranelift_codegen::isa::unwind::UnwindInfo;
use cranelift_codegen::settings::{Configurable, SetResult};
use cranelift_codegen::{CodegenError, CompiledCode};

use super::error;
use super::frame_map::{Cfa, FrameMap, Place, Register, Rules, Source, Verdict};
use super::process;
use super::stack_maps::Registration;

/// Hidden lines of examples: `isa`, made with the settings of [`configure`], and `function`, which returns at once.
macro_rules! an_empty_function {
    () => {
        r#"# use cranelift_codegen::ir::{Function, InstBuilder, Signature, UserFuncName};
# use cranelift_codegen::{Context, isa, settings};
# use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
# let mut flags = settings::builder();
# cranelift::configure(&mut flags)?;
# let isa = isa::lookup_by_name("x86_64-unknown-linux-gnu")?.finish(settings::Flags::new(flags))?;
# let signature = Signature::new(isa::CallConv::SystemV);
# let mut function = Function::with_name_signature(UserFuncName::default(), signature);
# let mut contexts = FunctionBuilderContext::new();
# let mut builder = FunctionBuilder::new(&mut function, &mut contexts);
# let block = builder.create_block();
# builder.switch_to_block(block);
# builder.seal_block(block);
# builder.ins().return_(&[]);
# builder.finalize(isa.frontend_config());"#
    };
}

/// Chooses the best settings for code that runs on growing stacks.
///
/// | setting | value | why |
/// | --- | --- | --- |
/// | `opt_level` | `none` | no undeclared stack address waits across a call |
/// | `preserve_frame_pointers` | `true` | every frame has the same rule: CFA = `rbp` + 16 |
/// | `enable_probestack` | `true` | the stack overflows in prologues, before a frame holds anything |
/// | `probestack_strategy` | `inline` | there is no `__probestack` to call |
/// | `probestack_size_log2` | 4 | all of a frame is touched: its size is a multiple of 16 bytes |
/// | `unwind_info` | `true` | rules come from it |
///
/// Code whose `rest` is [`Verdict::Ambiguous`] may be optimised: set `opt_level` again afterwards. Then frames overflow anywhere, so set
/// `probestack_size_log2` to 12 (a page; the guard is never narrower). That saves a store for each 16 bytes of a frame.
///
/// # Errors
///
/// None, as long as Cranelift knows these settings.
///
/// ```
/// let mut flags = cranelift_codegen::settings::builder();
/// regrow::map::cranelift::configure(&mut flags)?;
/// let isa = cranelift_codegen::isa::lookup_by_name("x86_64-unknown-linux-gnu")?
///     .finish(cranelift_codegen::settings::Flags::new(flags))?;
/// assert!(isa.flags().preserve_frame_pointers());
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
pub fn configure(flags: &mut impl Configurable) -> SetResult<()> {
    flags.set("opt_level", "none")?;
    flags.set("preserve_frame_pointers", "true")?;
    flags.set("enable_probestack", "true")?;
    flags.set("probestack_strategy", "inline")?;
    flags.set("probestack_size_log2", "4")?;
    flags.set("unwind_info", "true")
}

/// Why there are no [`maps`].
///
/// ```
#[doc = an_empty_function!()]
/// use regrow::map::{self, Verdict, cranelift};
/// # let mut context = Context::for_function(function);
/// # let code = context.compile(&*isa, &mut Default::default()).map_err(|error| error.inner)?;
/// # let address = 0x7200_0000;
/// // Code that was freed, and its registration forgotten; then other code at the same address.
/// // SAFETY: nothing runs at the address.
/// let forgotten = unsafe { cranelift::register(code, &*isa, address, Verdict::Ambiguous)? };
/// // SAFETY: nothing runs at the address.
/// let error = unsafe { cranelift::register(code, &*isa, address, Verdict::Ambiguous) }.unwrap_err();
/// assert!(matches!(error, cranelift::Error::Refused(map::Error::Overlap { .. })), "{error}");
/// # drop(forgotten);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Cranelift has no System V unwind data for this code. It is for another system, or `unwind_info` is off.
    Missing,
    /// Cranelift could not make the unwind data.
    Codegen(CodegenError),
    /// The unwind data cannot be written as DWARF.
    Written(gimli::write::Error),
    /// The written data cannot be read.
    Read(gimli::Error),
    /// A rule that Cranelift is not known to make, or a frame of 64 MiB or more.
    Rule,
    /// The maps could not be registered.
    Refused(error::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("no System V unwind data for this code"),
            Self::Codegen(error) => write!(f, "no unwind data: {error}"),
            Self::Written(error) => write!(f, "unwind data that cannot be written: {error}"),
            Self::Read(error) => write!(f, "unwind data that cannot be read: {error}"),
            Self::Rule => {
                f.write_str("a frame with a rule that Cranelift is not known to make, or too large")
            }
            Self::Refused(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Codegen(error) => Some(error),
            Self::Written(error) => Some(error),
            Self::Read(error) => Some(error),
            Self::Refused(error) => Some(error),
            Self::Missing | Self::Rule => None,
        }
    }
}

/// Adds the maps of `code`, which lies at `address`, to those of the process.
///
/// The time is linear in the number of earlier registrations. For a module of many functions, collect their [`maps`] and
/// [`register`](super::register) them together.
///
/// `rest` is the verdict for everything that Cranelift does not record. Read [above](self#what-cranelift-does-not-say) before you
/// say [`Data`](Verdict::Data).
///
/// # Safety
///
/// That of [`map::register`](super::register) for these maps:
///
/// - `isa` is what the code was compiled for. The code lies at `address`, with no changes but relocations.
/// - `rest` is true of everything that Cranelift does not record. [`Verdict::Ambiguous`] always is. [`Verdict::Data`] is if the code
///   keeps to [the list above](self#what-cranelift-does-not-say).
/// - The result is dropped before the code is changed or freed, and is leaked only if the code stays until the program ends.
///   It may be dropped earlier: frames of the code are then judged by unwind tables alone.
///
/// Safe code cannot register maps:
///
/// ```compile_fail,E0133
/// fn f(code: &cranelift_codegen::CompiledCode, isa: &dyn cranelift_codegen::isa::TargetIsa) {
///     let registration = regrow::map::cranelift::register(code, isa, 0, regrow::map::Verdict::Data);
/// }
/// ```
///
/// # Errors
/// As [`maps`]; [`Error::Refused`] if the code at `address` has maps already.
///
/// ```
#[doc = an_empty_function!()]
/// use regrow::map::{self, Cfa, Place, Register, Rules, Verdict, cranelift};
/// let mut context = Context::for_function(function);
/// let code = context.compile(&*isa, &mut Default::default()).map_err(|error| error.inner)?;
/// // ... copied to executable memory at
/// let address = 0x7100_0000;
/// // SAFETY: the code lies at the address until the result is dropped, and was compiled with the settings of `configure`.
/// let registration = unsafe { cranelift::register(code, &*isa, address, Verdict::Data)? };
///
/// let rules_at = |offset| map::process().read().find(address + offset).unwrap().rules().unwrap();
/// assert_eq!(rules_at(0), Ok(Rules::new(Cfa::rsp(8))));
/// let body = Rules::new(Cfa::rbp(16)).saved(Register::RBP, Place::cfa(-16));
/// assert_eq!(rules_at(code.code_buffer().len() - 1), Ok(body));
/// drop(registration); // the code is freed
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
pub unsafe fn register(
    code: &CompiledCode,
    isa: &dyn TargetIsa,
    address: usize,
    rest: Verdict,
) -> Result<Registration<'static>, Error> {
    let maps = maps(code, isa, address, rest)?;
    // SAFETY: the code lies at `address` while the maps are registered, and `rest` is true of it: the caller's contract.
    unsafe { process::register(maps) }.map_err(Error::Refused)
}

/// The maps of `code` when it lies at `address`, in ascending order: for its prologue, for each call, and for the code between.
/// See [`register`] for `rest`.
///
/// # Errors
/// [`Error`]. Code for x86-64 Linux with frames of less than 64 MiB is not known to cause one.
///
/// ```
/// # use cranelift_codegen::ir::{AbiParam, Function, InstBuilder, Signature, UserFuncName, types};
/// # use cranelift_codegen::{Context, isa, settings};
/// # use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
/// use regrow::map::{Verdict, cranelift};
/// # let mut flags = settings::builder();
/// # cranelift::configure(&mut flags)?;
/// # let isa = isa::lookup_by_name("x86_64-unknown-linux-gnu")?.finish(settings::Flags::new(flags))?;
/// # let mut signature = Signature::new(isa::CallConv::SystemV);
/// # signature.params.push(AbiParam::new(types::I64));
/// # signature.returns.push(AbiParam::new(types::I64));
/// # let mut function = Function::with_name_signature(UserFuncName::default(), signature);
/// # let mut contexts = FunctionBuilderContext::new();
/// // A function that calls its parameter, and then returns it.
/// let mut builder = FunctionBuilder::new(&mut function, &mut contexts);
/// # let block = builder.create_block();
/// # builder.append_block_params_for_function_params(block);
/// # builder.switch_to_block(block);
/// # builder.seal_block(block);
/// # let callee = builder.import_signature(Signature::new(isa::CallConv::SystemV));
/// let pointer = builder.block_params(block)[0];
/// builder.declare_value_needs_stack_map(pointer);
/// builder.ins().call_indirect(callee, pointer, &[]);
/// builder.ins().return_(&[pointer]);
/// # builder.finalize(isa.frontend_config());
/// let mut context = Context::for_function(function);
/// let code = context.compile(&*isa, &mut Default::default()).map_err(|error| error.inner)?;
///
/// let maps = cranelift::maps(code, &*isa, 0x1000, Verdict::Data)?;
/// let call = code.buffer.call_sites().next().unwrap().ret_addr as usize;
/// let map = maps.iter().find(|map| map.range() == (0x1000 + call - 1..0x1000 + call)).unwrap();
/// assert_eq!(map.words().iter().map(|(_, verdict)| *verdict).collect::<Vec<_>>(), [Verdict::Pointer]);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
pub fn maps(
    code: &CompiledCode,
    isa: &dyn TargetIsa,
    address: usize,
    rest: Verdict,
) -> Result<Vec<FrameMap>, Error> {
    let rows = rows(code, isa)?;
    let body = prologue_end(code, &rows);
    let calls: Vec<_> = code.buffer.call_sites().map(|site| site.ret_addr as usize).collect();
    let mut maps = Vec::new();
    for row in &rows {
        let Range { start, end } = row.code.clone();
        let middle = body.clamp(start, end);
        maps.extend(row.map(start..middle, address, Verdict::Data));
        let mut from = middle;
        for &returns in calls.iter().filter(|&&returns| (middle + 1..=end).contains(&returns)) {
            maps.extend(row.map(from..returns - 1, address, Verdict::Ambiguous));
            let map = row.map(returns - 1..returns, address, rest).ok_or(Error::Rule)?;
            maps.push(row.add_stack_map(map, code, returns)?);
            from = returns;
        }
        maps.extend(row.map(from..end, address, Verdict::Ambiguous));
    }
    Ok(maps)
}

/// A row of the unwind table.
#[derive(Clone, Debug)]
struct Row {
    /// Offsets from the function's first byte.
    code: Range<usize>,
    rules: Rules,
    /// Where registers lie that rules cannot speak of: System V lets callees destroy them.
    others: Vec<Place>,
}

impl Row {
    /// A map for a part of the row's code, with one verdict on all of the frame's own; `None` if there is no code.
    fn map(&self, part: Range<usize>, address: usize, verdict: Verdict) -> Option<FrameMap> {
        let range = address.wrapping_add(part.start)..address.wrapping_add(part.end);
        let map = FrameMap::new(range).rules(self.rules).rest(verdict).registers(verdict);
        let map = self.others.iter().fold(map, |map, &place| map.word(place, Verdict::Ambiguous));
        (!part.is_empty()).then(|| map.source(Source::Cranelift))
    }

    /// Adds what the stack map of the call that returns to `returns` says. Its offsets are from `rsp`. Here they are from the CFA,
    /// and so from `rbp`: a function that was entered by a tail call may have its own arguments at the caller's `rsp`.
    fn add_stack_map(
        &self,
        mut map: FrameMap,
        code: &CompiledCode,
        returns: usize,
    ) -> Result<FrameMap, Error> {
        let layout = code.buffer.frame_layout().ok_or(Error::Rule)?;
        let Cfa::Register(Register::RBP, above) = self.rules.cfa else { return Err(Error::Rule) };
        let size = i64::from(layout.frame_to_fp_offset) + i64::from(above);
        let word = |offset: u32| cfa(i64::from(offset) - size);
        let arguments_end = layout.stackslots.values().map(|slot| slot.offset).min().unwrap_or(0);
        for argument in (0..arguments_end).step_by(8) {
            map = map.word(word(argument)?, Verdict::Ambiguous);
        }
        let known = code.buffer.user_stack_maps();
        let found = known.binary_search_by_key(&returns, |&(returns, ..)| returns as usize);
        for (ty, offset) in found.into_iter().flat_map(|index| known[index].2.entries()) {
            for part in (0..ty.bytes()).step_by(8) {
                map = map.word(word(offset + part)?, Verdict::Pointer);
            }
        }
        Ok(map)
    }

    fn read(row: &gimli::UnwindTableRow<usize>) -> Result<Self, Error> {
        let gimli::CfaRule::RegisterAndOffset { register, offset } = *row.cfa() else {
            return Err(Error::Rule);
        };
        let register = Register::from_dwarf(register.0).ok_or(Error::Rule)?;
        let cfa = Cfa::Register(register, i32::try_from(offset).map_err(|_| Error::Rule)?);
        let code = row.start_address() as usize..row.end_address() as usize;
        let mut all = Self { code, rules: Rules::new(cfa), others: Vec::new() };
        for (register, rule) in row.registers() {
            match *rule {
                gimli::RegisterRule::Offset(-8) if *register == gimli::X86_64::RA => {}
                gimli::RegisterRule::Offset(offset) => all.save(*register, offset)?,
                _ => return Err(Error::Rule),
            }
        }
        Ok(all)
    }

    fn save(&mut self, register: gimli::Register, offset: i64) -> Result<(), Error> {
        let kept = Register::from_dwarf(register.0).filter(|register| register.saved_index().is_some());
        let place = cfa(offset)?;
        match kept {
            Some(register) => self.rules = self.rules.saved(register, place),
            None if register < gimli::X86_64::RA => self.others.push(place),
            None => self.others.extend([place, cfa(offset + 8)?]), // of 16 bytes
        }
        Ok(())
    }

    /// Corrects a row of after the return address and the caller's `rbp` were moved down.
    fn move_down(&mut self, bytes: i32) -> Result<(), Error> {
        let bytes = i64::from(bytes);
        let end = i32::try_from(16 + bytes).map_err(|_| Error::Rule)?;
        let rules = self.rules.saved(Register::RBP, cfa(-16 - bytes)?).return_address(cfa(-8 - bytes)?);
        self.rules = Rules { cfa: Cfa::rbp(end), ..rules };
        Ok(())
    }
}

fn cfa(offset: i64) -> Result<Place, Error> {
    Place::checked(None, offset).ok_or(Error::Rule)
}

/// The unwind rules of a function, in order; without gaps but for the one [above](self#unwinding).
fn rows(code: &CompiledCode, isa: &dyn TargetIsa) -> Result<Vec<Row>, Error> {
    if !isa.flags().unwind_info() {
        return Err(Error::Missing); // what it makes then says that the function does nothing
    }
    let Some(UnwindInfo::SystemV(info)) = code.create_unwind_info(isa).map_err(Error::Codegen)? else {
        return Err(Error::Missing);
    };
    let cie = isa.create_systemv_cie().ok_or(Error::Missing)?;
    let mut table = gimli::write::FrameTable::default();
    let cie = table.add_cie(cie);
    table.add_fde(cie, info.to_fde(gimli::write::Address::Constant(0)));
    let mut section = gimli::write::EhFrame(gimli::write::EndianVec::new(gimli::LittleEndian));
    table.write_eh_frame(&mut section).map_err(Error::Written)?;
    corrected(read_rows(section.slice())?, code.code_buffer())
}

/// The rows of the one function in `section`, in the form of an `.eh_frame`.
fn read_rows(section: &[u8]) -> Result<Vec<Row>, Error> {
    let section = gimli::EhFrame::new(section, gimli::LittleEndian);
    let bases = gimli::BaseAddresses::default();
    let mut context = gimli::UnwindContext::new();
    let mut rows = Vec::new();
    let mut entries = section.entries(&bases);
    while let Some(entry) = entries.next().map_err(Error::Read)? {
        let gimli::CieOrFde::Fde(fde) = entry else { continue };
        let fde = fde.parse(gimli::EhFrame::cie_from_offset).map_err(Error::Read)?;
        let mut table = fde.rows(&section, &bases, &mut context).map_err(Error::Read)?;
        while let Some(row) = table.next_row().map_err(Error::Read)? {
            rows.push(Row::read(row)?);
        }
    }
    Ok(rows)
}

/// `mov rbp, rsp`.
const SET_FRAME_POINTER: [u8; 3] = [0x48, 0x89, 0xe5];

/// The rows with the frame pointer in force from the instruction that sets it up to one that sets it again, further down.
fn corrected(mut rows: Vec<Row>, code: &[u8]) -> Result<Vec<Row>, Error> {
    let pushed = rows.iter().position(|row| row.rules.cfa == Cfa::rsp(16));
    let Some(index) = pushed else { return Ok(rows) };
    let Range { start, end } = rows[index].code;
    let Some(probes) = code.get(start..end).and_then(|bytes| bytes.strip_prefix(&SET_FRAME_POINTER)) else {
        return Ok(rows);
    };
    let again = probes.windows(SET_FRAME_POINTER.len()).position(|bytes| bytes == SET_FRAME_POINTER);
    if let Some(at) = again {
        let bytes = subtracted_before(&probes[..at]).ok_or(Error::Rule)?;
        rows[index + 1..].iter_mut().try_for_each(|row| row.move_down(bytes))?;
    }
    let set = start + SET_FRAME_POINTER.len();
    let until = set + again.map_or(probes.len(), |at| at + SET_FRAME_POINTER.len());
    if set < until {
        let row = &mut rows[index];
        row.code.end = set;
        let probing =
            Row { code: set..until, rules: Rules { cfa: Cfa::rbp(16), ..row.rules }, ..row.clone() };
        rows.insert(index + 1, probing);
    }
    Ok(rows)
}

/// Where the body begins.
fn prologue_end(code: &CompiledCode, rows: &[Row]) -> usize {
    let last = rows.last().map_or(0, |row| row.code.start);
    let size = code.buffer.frame_layout().map(|layout| i64::from(layout.frame_to_fp_offset));
    let here = code.code_buffer().get(last..).and_then(subtraction);
    last + here.filter(|(_, bytes)| Some(i64::from(*bytes)) == size).map_or(0, |(length, _)| length)
}

/// If `code` begins with `sub rsp, bytes`: the length of that, and the bytes.
fn subtraction(code: &[u8]) -> Option<(usize, i32)> {
    match *code {
        [0x48, 0x83, 0xec, bytes, ..] => Some((4, i32::from(bytes as i8))),
        [0x48, 0x81, 0xec, a, b, c, d, ..] => Some((7, i32::from_le_bytes([a, b, c, d]))),
        _ => None,
    }
}

/// If `code` ends with `sub rsp, bytes`: the bytes.
fn subtracted_before(code: &[u8]) -> Option<i32> {
    let ending = |length: usize| {
        let start = code.len().checked_sub(length)?;
        subtraction(&code[start..]).filter(|(found, _)| *found == length).map(|(_, bytes)| bytes)
    };
    ending(7).or_else(|| ending(4))
}
