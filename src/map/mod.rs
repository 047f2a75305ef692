//! Stack maps: what is known about frames, recorded outside the fault handler, looked up inside it.
//!
//! ```text
//!   .eh_frame of every object (eh_frame.rs) ──────────────► unwind layer      ┐
//!   asm/frame_map.inc (assembly.rs), LLVM, Cranelift, JITs ─► registered layer ┴─► StackMaps (stack_maps.rs)
//!                                                                                     │ read, find
//!   registers, memory ──────────────────────────────────────────────► Walk (walk.rs) ─┴─► Frame, Frame, ... End
//! ```
//!
//! Hand-written assembly says what its frames hold with the macros in `asm/frame_map.inc`, which explains itself; a build script of a
//! crate that depends on this one finds its directory in `DEP_REGROW_INCLUDE`.
//!
//! A [`FrameMap`] says two things about a range of code: the rules by which a frame's caller is found, and for
//! each word whether it is a pointer, data, or ambiguous. Maps live in sorted tables, and those in
//! [`StackMaps`], which can be read at any time by anyone. A [`Walk`] goes through the frames of a stack.

mod assembly;
#[cfg(feature = "cranelift")]
pub mod cranelift;
mod eh_frame;
mod error;
mod frame_map;
pub mod llvm;
mod process;
mod published;
mod stack_maps;
mod table;
mod walk;

pub use eh_frame::{ObjectReport, Report, record_loaded_objects, register_eh_frame};
pub use error::Error;
pub use frame_map::{Cfa, FrameMap, Kind, Place, Register, Rules, Source, Unwalkable, Verdict};
pub use process::{process, register};
pub use stack_maps::{Map, ProcessMaps, Reader, Registration, StackMaps};
pub use walk::{End, Frame, Location, Registers, Stuck, Walk, Word};
