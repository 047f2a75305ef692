//! Compiled code in executable memory, and what is known about its frames.
//!
//! ```text
//!   code       ┌─────────┬─────────┬─────────┐   read and execute, functions at multiples of 16;
//!              │ main    │ descend │ ...     │   they call each other directly
//!              └─────────┴─────────┴─────────┘
//!   maps       ┌──┬──┬─┬──┬──┬──┬──┬──┬──────┐   of prologues, calls, and what is between: registered
//!              │  │  │ │  │  │  │  │  │      │   together, gone before the code is
//!              └──┴──┴─┴──┴──┴──┴──┴──┴──────┘
//! ```

use std::error::Error;
use std::ffi::c_void;
use std::{mem, ptr};

use cranelift_codegen::binemit::Reloc;
use cranelift_codegen::ir::{ExternalName, UserExternalNameRef, UserStackMap};
use cranelift_codegen::isa::TargetIsa;
use cranelift_codegen::{CompiledCode, FinalizedMachReloc, FinalizedRelocTarget};
use region::{Allocation, Protection};
use regrow::RawFunction;
use regrow::map::{self, Registration, Verdict};

use crate::syntax::{FunctionId, Type};

/// Functions start at multiples of this.
const ALIGNMENT: usize = 16;

/// A compiled function before it has an address.
pub struct Object {
    pub name: String,
    pub parameters: Vec<Type>,
    pub code: CompiledCode,
    pub calls: Vec<Call>,
}

/// As Cranelift hands them out: offset of the return address from the function's start, bytes from `rsp` to
/// the saved `rbp`, and the words that hold pointers. A call that is not listed has no pointers to keep.
pub type StackMap = (u32, u32, UserStackMap);

/// A call whose distance is not known yet.
pub struct Call {
    /// Of the four bytes to fill in.
    offset: usize,
    callee: FunctionId,
    addend: i64,
}

impl Call {
    /// From a relocation; `callee` knows the functions by their names.
    pub fn new(
        relocation: &FinalizedMachReloc,
        callee: impl Fn(UserExternalNameRef) -> FunctionId,
    ) -> Result<Self, String> {
        match (relocation.kind, &relocation.target) {
            (Reloc::X86CallPCRel4, FinalizedRelocTarget::ExternalName(ExternalName::User(name))) => {
                Ok(Self {
                    offset: relocation.offset as usize,
                    callee: callee(*name),
                    addend: relocation.addend,
                })
            }
            _ => Err(format!("a relocation that is no call: {relocation:?}")),
        }
    }
}

/// A function that can be run.
pub struct Function {
    pub name: String,
    /// Types of the parameters, in rsi, rdx, rcx, r8, r9 on entry; the context is in rdi.
    pub parameters: Vec<Type>,
    pub address: usize,
    code: CompiledCode,
}

impl Function {
    /// Bytes of code.
    pub fn size(&self) -> usize {
        self.code.code_buffer().len()
    }

    /// Bytes from `rsp` to the saved `rbp`.
    pub fn frame(&self) -> u32 {
        self.code.buffer.frame_layout().map_or(0, |layout| layout.frame_to_fp_offset)
    }

    /// Sorted by offset.
    pub fn stack_maps(&self) -> &[StackMap] {
        self.code.buffer.user_stack_maps()
    }
}

/// A program's compiled functions. They can be run as long as this lives.
pub struct Module {
    pub functions: Vec<Function>,
    entry: FunctionId,
    /// The maps of all functions; dropped before the code is.
    _maps: Registration<'static>,
    _code: Allocation,
}

/// Compiled code that calls `fn main(int, int)` with these arguments, which it reads before anything else.
///
/// # Safety
/// The context is what the `yield` function it was compiled with takes.
pub type Entry = unsafe extern "C" fn(context: *const c_void, arguments: *const [i64; 2]) -> i64;

impl Module {
    /// Gives the functions addresses, in their order, and tells the process of their frames.
    pub fn link(
        objects: Vec<Object>,
        entry: FunctionId,
        isa: &dyn TargetIsa,
    ) -> Result<Self, Box<dyn Error>> {
        let mut length = 0;
        let mut offsets = Vec::new();
        for object in &objects {
            offsets.push(length);
            length += object.code.code_buffer().len().next_multiple_of(ALIGNMENT);
        }
        let image = image(&objects, &offsets, length)?;
        let mut code = region::alloc(length, Protection::READ_WRITE)?;
        let start = code.as_mut_ptr::<u8>();
        // SAFETY: the allocation is at least as long as the image, is ours alone, and nobody writes to it
        // again.
        unsafe {
            ptr::copy_nonoverlapping(image.as_ptr(), start, length);
            region::protect(start, code.len(), Protection::READ_EXECUTE)?;
        }
        let mut functions = Vec::new();
        let mut maps = Vec::new();
        for (Object { name, parameters, code, .. }, offset) in objects.into_iter().zip(offsets) {
            let address = start as usize + offset;
            // Data, for the compiler keeps to all that `regrow::map::cranelift` asks for.
            maps.extend(map::cranelift::maps(&code, isa, address, Verdict::Data)?);
            functions.push(Function { name, parameters, address, code });
        }
        // SAFETY: the maps are of the code at these addresses, compiled as `Data` asks for. They are dropped before it is,
        // with the module, which lives while its code runs.
        let maps = unsafe { map::register(maps)? };
        Ok(Self { functions, entry, _maps: maps, _code: code })
    }

    /// How the program is started.
    pub fn entry(&self) -> Entry {
        // SAFETY: the address of compiled code with just these parameters and that result. The type is that
        // of an unsafe function: whoever calls it keeps the module alive, and passes a context.
        unsafe { mem::transmute::<usize, Entry>(self.functions[self.entry].address) }
    }

    /// The same, as the first function of a coroutine: the yielder is the context, the first resume brings
    /// the address of the arguments.
    pub fn raw_entry(&self) -> RawFunction {
        // SAFETY: a reference, an address and an `i64` are passed and returned as words, as are these.
        unsafe { mem::transmute::<Entry, RawFunction>(self.entry()) }
    }
}

/// The code of all functions at their offsets, calls filled in.
fn image(objects: &[Object], offsets: &[usize], length: usize) -> Result<Vec<u8>, Box<dyn Error>> {
    const INT3: u8 = 0xcc;
    let mut image = vec![INT3; length];
    for (object, &offset) in objects.iter().zip(offsets) {
        let bytes = object.code.code_buffer();
        image[offset..][..bytes.len()].copy_from_slice(bytes);
        for call in &object.calls {
            let field = offset + call.offset;
            let distance = i32::try_from(offsets[call.callee] as i64 + call.addend - field as i64)?;
            image[field..][..4].copy_from_slice(&distance.to_le_bytes());
        }
    }
    Ok(image)
}
