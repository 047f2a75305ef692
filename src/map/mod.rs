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
mod frame_map;
pub mod llvm;
mod published;
mod stack_maps;
mod table;
mod walk;

pub use eh_frame::{ObjectReport, Report, record_loaded_objects, register_eh_frame};
pub use frame_map::{Cfa, FrameMap, Kind, Place, Register, Rules, Source, Unwalkable, Verdict};
pub use stack_maps::{Map, ProcessMaps, Reader, Registration, StackMaps};
pub use walk::{End, Frame, Location, Registers, Stuck, Walk, Word};

use core::fmt;

/// Why maps were not accepted.
///
/// ```
/// use regrow::map::{Error, FrameMap, StackMaps};
/// let maps = StackMaps::new();
/// let error = maps.register(vec![FrameMap::new(1..9), FrameMap::new(8..10)]).unwrap_err();
/// assert_eq!(error, Error::Overlap { address: 8 });
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Error {
    /// A range of code is empty, or larger than 2 GiB.
    Range {
        /// Its first address.
        start: usize,
        /// One past its last address.
        end: usize,
    },
    /// Two maps are for the same code.
    Overlap {
        /// An address that both are for.
        address: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range { start, end } => {
                write!(f, "a frame map for {start:#x}..{end:#x}: give a range of 1 byte to 2 GiB of code")
            }
            Self::Overlap { address } => write!(
                f,
                "two frame maps are for address {address:#x}: give one, or drop the registration of the other first"
            ),
        }
    }
}

impl std::error::Error for Error {}

static PROCESS: StackMaps = StackMaps::new();

/// The maps that stacks are moved by.
///
/// ```
/// regrow::map::record_loaded_objects();
/// let here = regrow::map::process as fn() -> _ as usize;
/// assert!(regrow::map::process().read().find(here).is_some());
/// ```
#[must_use]
pub fn process() -> ProcessMaps {
    ProcessMaps(&PROCESS)
}

/// Adds maps to those of the process: how a compiler tells what it knows. See [`StackMaps::register`].
///
/// # Safety
///
/// Stacks are moved by these maps. A map that is wrong leaves a pointer behind, or changes a word that is not one, and so
/// lets even safe code read and write memory that is not its own. So, as long as the maps are registered:
///
/// - The code range of each map holds the code that the map is for.
/// - What a map says of a frame is true whenever the code has a frame on the stack of a coroutine, at each address in the
///   map's range. Its [rules](FrameMap::rules) find the frame's caller. What it calls a [pointer](Verdict::Pointer) is an
///   address or not in use. What it calls [data](Verdict::Data) is never used as an address in the stack. Its words are
///   in the frame. [`Verdict::Ambiguous`] is always true.
/// - The result is dropped before the code is changed or freed. So it is leaked only if the code stays for as long as the
///   program runs. It may be dropped earlier: frames of the code are then judged by unwind tables alone.
///
/// Safe code cannot register maps:
///
/// ```compile_fail,E0133
/// let registration = regrow::map::register(Vec::new());
/// ```
///
/// # Errors
/// As [`StackMaps::register`].
///
/// ```
/// use regrow::map::{self, FrameMap, Place, Register, Source, Verdict};
/// // Code that a compiler has put at `code`, with a call at byte 17 that returns to byte 22.
/// let code = 0x7000_0000;
/// let map = FrameMap::at_return(code + 22)
///     .word(Place::at(Register::RSP, 8), Verdict::Pointer)
///     .rest(Verdict::Data)
///     .source(Source::Cranelift);
/// // SAFETY: the compiler wrote the map of this code; the maps are removed before the code is freed.
/// let registration = unsafe { map::register(vec![map])? };
/// // ... run it ... and when it is freed:
/// drop(registration);
/// # Ok::<(), map::Error>(())
/// ```
pub unsafe fn register(maps: Vec<FrameMap>) -> Result<Registration<'static>, Error> {
    PROCESS.register(maps)
}
