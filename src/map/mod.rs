//! Stack maps: what is known about frames. They are recorded outside the fault handler and looked up inside it.
//!
//! ```text
//!   .eh_frame of every object (eh_frame.rs) ──────────────► unwind layer      ┐
//!   asm/frame_map.inc (assembly.rs), LLVM, Cranelift, JITs ─► registered layer ┴─► StackMaps (stack_maps.rs)
//!                                                                                     │ read, find
//!   registers, memory ──────────────────────────────────────────────► Walk (walk.rs) ─┴─► Frame, Frame, ... End
//! ```
//!
//! A [`FrameMap`] says two things about a range of code: the rules that lead from a frame to its caller's, and for each word whether it
//! is a pointer, data or ambiguous. [`StackMaps`] keeps maps in sorted tables, which anyone can read at any time. A [`Walk`] goes
//! through the frames of a stack.
//!
//! Hand-written assembly gives its maps by the macros in `asm/frame_map.inc`. The build script of a crate that depends on this one finds
//! the file's directory in `DEP_REGROW_INCLUDE`.

mod assembly;
#[cfg(feature = "cranelift")]
pub mod cranelift;
mod eh_frame;
mod error;
mod frame_map;
pub mod llvm;
pub(crate) mod objects;
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
