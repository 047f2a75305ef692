//! Compiled code in executable memory, and what is known about its frames.
//!
//! ```text
//!   code       ┌─────────┬─────────┬─────────┐   read and execute, functions at multiples of 16;
//!              │ main    │ descend │ ...     │   they call each other directly
//!              └─────────┴─────────┴─────────┘
//!   .eh_frame  ┌─────┬─────┬─────┬───────────┐   registered with the unwinder: the unwinding of a
//!              │ CIE │ FDE │ FDE │ ... 0     │   dropped coroutine runs through compiled frames
//!              └─────┴─────┴─────┴───────────┘
//! ```

use std::error::Error;
use std::ffi::c_void;
use std::{mem, ptr};

use cranelift_codegen::binemit::Reloc;
use cranelift_codegen::gimli::RunTimeEndian;
use cranelift_codegen::gimli::write::{Address, EhFrame, EndianVec, FrameTable};
use cranelift_codegen::ir::{ExternalName, UserExternalNameRef, UserStackMap};
use cranelift_codegen::isa::TargetIsa;
use cranelift_codegen::isa::unwind::UnwindInfo;
use cranelift_codegen::{FinalizedMachReloc, FinalizedRelocTarget};
use region::{Allocation, Protection};

use crate::syntax::{FunctionId, Type};

/// Functions start at multiples of this.
const ALIGNMENT: usize = 16;

/// A compiled function before it has an address.
pub struct Object {
    pub name: String,
    pub parameters: Vec<Type>,
    pub bytes: Vec<u8>,
    pub calls: Vec<Call>,
    pub stack_maps: Vec<StackMap>,
    pub unwind: UnwindInfo,
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
    /// Bytes of code.
    pub size: usize,
    /// Sorted by offset.
    pub stack_maps: Vec<StackMap>,
    pub unwind: UnwindInfo,
}

/// A program's compiled functions. They can be run as long as this lives.
pub struct Module {
    pub functions: Vec<Function>,
    main: FunctionId,
    /// Unwind rows of all functions, as a section with absolute addresses, ended by a zero.
    pub eh_frame: Vec<u8>,
    /// Holds the code.
    _code: Allocation,
}

/// Compiled code of `fn main(int, int)`, with the context before the parameters.
///
/// # Safety
/// The context is what the `yield` function it was compiled with takes.
pub type Entry = unsafe extern "C-unwind" fn(context: *const c_void, i64, i64) -> i64;

impl Module {
    /// Gives the functions addresses, in their order, and makes them known to the unwinder.
    pub fn link(objects: Vec<Object>, main: FunctionId, isa: &dyn TargetIsa) -> Result<Self, Box<dyn Error>> {
        let mut length = 0;
        let mut offsets = Vec::new();
        for object in &objects {
            offsets.push(length);
            length += object.bytes.len().next_multiple_of(ALIGNMENT);
        }
        let image = image(&objects, &offsets, length)?;
        let mut code = region::alloc(length.max(1), Protection::READ_WRITE)?;
        let start = code.as_mut_ptr::<u8>();
        // SAFETY: the allocation is at least as long as the image, is ours alone, and nobody writes to it
        // again.
        unsafe {
            ptr::copy_nonoverlapping(image.as_ptr(), start, length);
            region::protect(start, code.len(), Protection::READ_EXECUTE)?;
        }
        let functions: Vec<_> = objects
            .into_iter()
            .zip(offsets)
            .map(|(object, offset)| Function {
                name: object.name,
                parameters: object.parameters,
                address: start as usize + offset,
                size: object.bytes.len(),
                stack_maps: object.stack_maps,
                unwind: object.unwind,
            })
            .collect();
        let eh_frame = eh_frame(&functions, isa)?;
        // SAFETY: a whole section, ended by a zero, that stays where it is until it is deregistered in
        // `drop`.
        unsafe { __register_frame(eh_frame.as_ptr()) };
        Ok(Self { functions, main, eh_frame, _code: code })
    }

    /// The program's `main`.
    pub fn entry(&self) -> Entry {
        // SAFETY: the address of compiled code with just these parameters and that result, as the parser
        // made sure. The type is that of an unsafe function: whoever calls it keeps the module alive, and
        // passes a context.
        unsafe { mem::transmute::<usize, Entry>(self.functions[self.main].address) }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: registered in `link` at this address.
        unsafe { __deregister_frame(self.eh_frame.as_ptr()) };
    }
}

/// The code of all functions at their offsets, calls filled in.
fn image(objects: &[Object], offsets: &[usize], length: usize) -> Result<Vec<u8>, Box<dyn Error>> {
    const INT3: u8 = 0xcc;
    let mut image = vec![INT3; length];
    for (object, &offset) in objects.iter().zip(offsets) {
        image[offset..][..object.bytes.len()].copy_from_slice(&object.bytes);
        for call in &object.calls {
            let field = offset + call.offset;
            let distance = i32::try_from(offsets[call.callee] as i64 + call.addend - field as i64)?;
            image[field..][..4].copy_from_slice(&distance.to_le_bytes());
        }
    }
    Ok(image)
}

fn eh_frame(functions: &[Function], isa: &dyn TargetIsa) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut table = FrameTable::default();
    let cie = table.add_cie(isa.create_systemv_cie().ok_or("no unwinding on this machine")?);
    for function in functions {
        let UnwindInfo::SystemV(unwind) = &function.unwind else {
            return Err("unwind information of another system".into());
        };
        table.add_fde(cie, unwind.to_fde(Address::Constant(function.address as u64)));
    }
    let mut section = EhFrame(EndianVec::new(RunTimeEndian::Little));
    table.write_eh_frame(&mut section)?;
    let mut bytes = section.0.into_vec();
    bytes.extend(0u32.to_le_bytes());
    Ok(bytes)
}

unsafe extern "C" {
    /// Libgcc's unwinder, which std uses: adds a section to what it searches.
    fn __register_frame(eh_frame: *const u8);
    fn __deregister_frame(eh_frame: *const u8);
}
