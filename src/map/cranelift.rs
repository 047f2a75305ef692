//! The recorder for Cranelift: reads the user stack maps and the unwind data of finished code.
//!
//! ```text
//!    rsp + size ┌─────────────────────────────┐  return address above
//!               │ rbp of the caller           │
//!               │ callee-saved registers      │
//!               │ spilled values              │  rest
//!               │ stack slots                 │  words named by the call's stack map: pointers; others: rest
//!               │ arguments of calls          │  ambiguous
//!           rsp └─────────────────────────────┘
//! ```
//!
//! # What a stack map says
//!
//! For each call, in which words of the frame's *stack slots* the values lie that were declared to be in need
//! of a stack map and are used after the call. `cranelift-frontend` stores such a value to a slot of its own
//! before every call and loads it again afterwards, so each copy of it that survives the call is in the map.
//! Here each such word is a pointer. A call without a map of its own gets a frame without pointers.
//!
//! # What Cranelift does not say
//!
//! A value that was not declared may be anywhere across a call, in a spill slot or in a callee-saved
//! register, and nothing records it. So all that is not in the map is `rest`: [`Verdict::Ambiguous`], unless
//! the compiler's author sees to all of the following and says [`Verdict::Data`]:
//!
//! 1. Every value that may hold a pointer into a stack, also one computed from another, and every result of
//!    `stack_addr`, is declared: `FunctionBuilder::declare_value_needs_stack_map`, or
//!    `declare_var_needs_stack_map`.
//! 2. Optimisation is off (`opt_level=none`, see [`configure`]). With it on, equal `stack_addr`s are merged
//!    and moved out of loops *after* the declarations were obeyed; the merged one then waits in a
//!    callee-saved register across the calls in between, and no map names it. This happens to the
//!    addresses of the slots that the front end stores declared values to, so no declaration avoids it.
//! 3. A pointer stored *into* a stack slot of one's own is declared at each call during which it matters, by
//!    `DataFlowGraph::append_user_stack_map_entry`. The map then says the word is a pointer, so it must be
//!    written before the first such call.
//! 4. No function returns more than its calling convention has registers for, none takes a
//!    `StructReturn` or `StructArgument`: Cranelift keeps the address of that memory for itself.
//! 5. `get_stack_pointer`, `get_frame_pointer` and dynamic stack slots are not used.
//! 6. A function that passes arguments in memory has a stack slot, any at all. Such arguments are in no map
//!    until the callee has read them, which it has not while its prologue makes the stack overflow. The words
//!    below the first stack slot are therefore ambiguous whatever `rest` is; without a slot nothing tells
//!    where they end. Calls with at most six integer arguments pass none in memory.
//!
//! # Where the stack overflows
//!
//! At `push rbp`, at a probe, at the first store to a frame of less than a page, or at the push of a call.
//! None of these is a return address, so no map speaks for the *interrupted* frame: its words and the
//! registers, among them arguments the function has just been given, are judged by value. All frames above it
//! stand at calls.
//!
//! # Unwinding
//!
//! Code made at run time is in no `.eh_frame`; [`unwind_rows`] gives the same in the form the table takes,
//! with one correction. A prologue probes the stack, and overflows it, *before* Cranelift's rows change from
//! `rsp` to `rbp`:
//!
//! ```text
//!                          Cranelift's rows     here
//!   push rbp               rsp + 8              rsp + 8
//!   mov rbp, rsp           rsp + 16             rsp + 16
//!   sub rsp, 4096          rsp + 16             rbp + 16
//!   mov [rsp], 0           rsp + 16, wrong      rbp + 16        the stack overflows here
//!   add rsp, 4096          rsp + 16, wrong      rbp + 16
//!   sub rsp, frame         rbp + 16             rbp + 16
//! ```
//!
//! A function whose tail call needs more memory for arguments than it was itself given moves its return
//! address in the prologue. No rule holds meanwhile, and no row is given.
//!
//! Cranelift describes no epilogues. Between `pop rbp` and `ret` the row is wrong; no stack can overflow
//! there, for nothing is pushed.

use core::fmt;

use cranelift_codegen::gimli;
use cranelift_codegen::gimli::read::UnwindSection as _;
use cranelift_codegen::isa::TargetIsa;
use cranelift_codegen::isa::unwind::UnwindInfo;
use cranelift_codegen::settings::{Configurable, SetResult};
use cranelift_codegen::{CodegenError, CompiledCode};

use super::recorded::{Base, Frame, UnwindRow, Verdict};

/// Chooses the settings that code on growing stacks is best compiled with.
///
/// | setting | value | why |
/// | --- | --- | --- |
/// | `opt_level` | `none` | no undeclared stack address waits across a call |
/// | `preserve_frame_pointers` | `true` | every frame has the same rule: CFA = `rbp` + 16 |
/// | `enable_probestack` | `true` | a frame of a page or more touches each page: none steps over the guard |
/// | `probestack_strategy` | `inline` | there is no `__probestack` to call |
/// | `probestack_size_log2` | 12 | a page: the guard is never narrower |
/// | `unwind_info` | `true` | for [`unwind_rows`] |
///
/// Code whose frames' rest is [`Verdict::Ambiguous`] may be optimised: set `opt_level` again afterwards.
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
    flags.set("probestack_size_log2", "12")?;
    flags.set("unwind_info", "true")
}

/// The frames of `code` at each of its calls, when it lies at `address`, in ascending order.
///
/// Tail calls are among them; nothing ever returns to there.
///
/// ```
/// # use cranelift_codegen::ir::{AbiParam, Function, InstBuilder, Signature, UserFuncName, types};
/// # use cranelift_codegen::{Context, isa, settings};
/// # use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
/// use regrow::map::{cranelift, recorded::Verdict};
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
/// let frames: Vec<_> = cranelift::frames(code, 0x1000, Verdict::Data).collect();
/// assert_eq!(frames.len(), 1);
/// assert_eq!(frames[0].words.len(), 1);
/// assert_eq!(frames[0].words[0].verdict, Verdict::Pointer);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
pub fn frames(code: &CompiledCode, address: u64, rest: Verdict) -> impl Iterator<Item = Frame> {
    let layout = code.buffer.frame_layout();
    let size = layout.map(|layout| u64::from(layout.frame_to_fp_offset) + 8);
    let arguments = layout.and_then(|layout| layout.stackslots.values().map(|slot| slot.offset).min());
    let maps = code.buffer.user_stack_maps();
    code.buffer.call_sites().map(move |site| {
        let mut frame =
            Frame { size, ..Frame::new(address, address.wrapping_add(site.ret_addr.into()), rest) };
        for offset in (0..arguments.unwrap_or(0)).step_by(8) {
            frame.add(Base::Rsp, offset as i32, Verdict::Ambiguous);
        }
        let map = maps.binary_search_by_key(&site.ret_addr, |&(return_offset, ..)| return_offset);
        for (ty, offset) in map.into_iter().flat_map(|index| maps[index].2.entries()) {
            for word in 0..ty.bytes() / 8 {
                frame.add(Base::Rsp, (offset + 8 * word) as i32, Verdict::Pointer);
            }
        }
        frame.finish()
    })
}

/// Why there are no [`unwind_rows`].
#[derive(Debug)]
#[non_exhaustive]
pub enum UnwindError {
    /// Cranelift has no System V unwind data for this code: it is for another system.
    Missing,
    /// Cranelift could not make it.
    Codegen(CodegenError),
    /// What it made cannot be written as DWARF.
    Written(gimli::write::Error),
    /// What was written cannot be read.
    Read(gimli::Error),
    /// A rule that is neither "register + offset" for the CFA nor "saved at an offset from the CFA".
    Rule,
}

impl fmt::Display for UnwindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("no System V unwind data for this code"),
            Self::Codegen(error) => write!(f, "no unwind data: {error}"),
            Self::Written(error) => write!(f, "unwind data that cannot be written: {error}"),
            Self::Read(error) => write!(f, "unwind data that cannot be read: {error}"),
            Self::Rule => f.write_str("an unwind rule of a kind that Cranelift is not known to make"),
        }
    }
}

impl core::error::Error for UnwindError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Codegen(error) => Some(error),
            Self::Written(error) => Some(error),
            Self::Read(error) => Some(error),
            Self::Missing | Self::Rule => None,
        }
    }
}

/// The unwind rules of `code` when it lies at `address`, in ascending order; without gaps but for the one
/// [above](self#unwinding).
///
/// # Errors
///
/// [`UnwindError`]. None is known to occur for code for x86-64 Linux.
///
/// ```
/// # use cranelift_codegen::ir::{Function, InstBuilder, Signature, UserFuncName};
/// # use cranelift_codegen::{Context, isa, settings};
/// # use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
/// use regrow::map::cranelift;
/// # let mut flags = settings::builder();
/// # cranelift::configure(&mut flags)?;
/// # let isa = isa::lookup_by_name("x86_64-unknown-linux-gnu")?.finish(settings::Flags::new(flags))?;
/// # let signature = Signature::new(isa::CallConv::SystemV);
/// # let mut function = Function::with_name_signature(UserFuncName::default(), signature);
/// # let mut contexts = FunctionBuilderContext::new();
/// # let mut builder = FunctionBuilder::new(&mut function, &mut contexts);
/// # let block = builder.create_block();
/// # builder.switch_to_block(block);
/// # builder.seal_block(block);
/// # builder.ins().return_(&[]);
/// # builder.finalize(isa.frontend_config());
/// let mut context = Context::for_function(function);
/// context.compile(&*isa, &mut Default::default()).map_err(|error| error.inner)?;
///
/// let rows = cranelift::unwind_rows(context.compiled_code().unwrap(), &*isa, 0x1000)?;
/// assert_eq!((rows[0].cfa_register, rows[0].cfa_offset), (7, 8)); // at its first instruction: rsp + 8
/// let body = rows.last().unwrap();
/// assert_eq!((body.cfa_register, body.cfa_offset), (6, 16)); // once the frame is made: rbp + 16
/// assert_eq!(body.saved, [(6, -16)]); // the caller's rbp
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
pub fn unwind_rows(
    code: &CompiledCode,
    isa: &dyn TargetIsa,
    address: u64,
) -> Result<Vec<UnwindRow>, UnwindError> {
    let Some(UnwindInfo::SystemV(info)) = code.create_unwind_info(isa).map_err(UnwindError::Codegen)? else {
        return Err(UnwindError::Missing);
    };
    let cie = isa.create_systemv_cie().ok_or(UnwindError::Missing)?;
    let mut table = gimli::write::FrameTable::default();
    let cie = table.add_cie(cie);
    table.add_fde(cie, info.to_fde(gimli::write::Address::Constant(address)));
    let mut section = gimli::write::EhFrame(gimli::write::EndianVec::new(gimli::LittleEndian));
    table.write_eh_frame(&mut section).map_err(UnwindError::Written)?;
    rows_of(section.slice()).map(|rows| corrected(rows, code.code_buffer(), address))
}

/// `mov rbp, rsp`.
const SET_FRAME_POINTER: [u8; 3] = [0x48, 0x89, 0xe5];

/// The rows with the frame pointer in force from the instruction that sets it, up to one that sets it again.
fn corrected(mut rows: Vec<UnwindRow>, code: &[u8], address: u64) -> Vec<UnwindRow> {
    let pushed = rows.iter().position(|row| (row.cfa_register, row.cfa_offset) == (7, 16));
    let Some(index) = pushed else { return rows };
    let row = &mut rows[index];
    let bytes =
        (row.code.start.wrapping_sub(address) as usize)..(row.code.end.wrapping_sub(address) as usize);
    let Some(probes) = code.get(bytes).and_then(|bytes| bytes.strip_prefix(&SET_FRAME_POINTER)) else {
        return rows;
    };
    let again = probes.windows(3).position(|bytes| bytes == SET_FRAME_POINTER);
    let set = row.code.start + 3;
    let end = set + again.map_or(probes.len(), |at| at + 3) as u64;
    if set < end {
        let probing = UnwindRow { code: set..end, cfa_register: 6, ..row.clone() };
        row.code.end = set;
        rows.insert(index + 1, probing);
    }
    rows
}

/// The rows of the one function in `section`, in the form of an `.eh_frame`.
fn rows_of(section: &[u8]) -> Result<Vec<UnwindRow>, UnwindError> {
    let section = gimli::EhFrame::new(section, gimli::LittleEndian);
    let bases = gimli::BaseAddresses::default();
    let mut context = gimli::UnwindContext::new();
    let mut rows = Vec::new();
    let mut entries = section.entries(&bases);
    while let Some(entry) = entries.next().map_err(UnwindError::Read)? {
        let gimli::CieOrFde::Fde(fde) = entry else { continue };
        let fde = fde.parse(gimli::EhFrame::cie_from_offset).map_err(UnwindError::Read)?;
        let mut table = fde.rows(&section, &bases, &mut context).map_err(UnwindError::Read)?;
        while let Some(row) = table.next_row().map_err(UnwindError::Read)? {
            rows.push(row_of(row)?);
        }
    }
    Ok(rows)
}

fn row_of(row: &gimli::UnwindTableRow<usize>) -> Result<UnwindRow, UnwindError> {
    let gimli::CfaRule::RegisterAndOffset { register, offset } = *row.cfa() else {
        return Err(UnwindError::Rule);
    };
    let mut saved = Vec::new();
    for (register, rule) in row.registers() {
        match *rule {
            gimli::RegisterRule::Offset(-8) if *register == gimli::X86_64::RA => {}
            gimli::RegisterRule::Offset(offset) => saved.push((register.0, small(offset)?)),
            _ => return Err(UnwindError::Rule),
        }
    }
    saved.sort_unstable();
    let code = row.start_address()..row.end_address();
    Ok(UnwindRow { code, cfa_register: register.0, cfa_offset: small(offset)?, saved })
}

fn small(offset: i64) -> Result<i32, UnwindError> {
    offset.try_into().map_err(|_| UnwindError::Rule)
}
