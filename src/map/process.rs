//! The maps of the process, and the way to add to them.

use super::error::Error;
use super::frame_map::FrameMap;
use super::stack_maps::{ProcessMaps, Registration, StackMaps};

pub(super) static PROCESS: StackMaps = StackMaps::new();

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

/// Adds maps to those of the process. A compiler calls this to say what it knows. See [`StackMaps::register`].
///
/// # Safety
///
/// Stacks are moved by these maps. A wrong map leaves a pointer behind, or changes a word that is not one. Then even safe code reads
/// and writes memory that is not its own. So, as long as the maps are registered:
///
/// - The code range of each map holds the code that the map is for.
/// - What a map says of a frame is true whenever the code has a frame on the stack of a coroutine, at each address in the
///   map's range. Its [rules](FrameMap::rules) find the frame's caller. What it calls a [pointer](super::Verdict::Pointer) is an
///   address or not in use. What it calls [data](super::Verdict::Data) is never used as an address in the stack. Its words are
///   in the frame. [`Verdict::Ambiguous`](super::Verdict::Ambiguous) is always true.
/// - The result is dropped before the code is changed or freed, and is leaked only if the code stays until the program ends.
///   It may be dropped earlier: frames of the code are then judged by unwind tables alone.
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
