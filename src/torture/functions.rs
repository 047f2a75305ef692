//! Where functions begin and end, according to the unwind tables of the loaded objects.

use core::ffi::c_void;
use core::ops::{ControlFlow, Range};
use core::slice;

use gimli::{BaseAddresses, CieOrFde, EhFrame, EhFrameHdr, NativeEndian, Pointer, UnwindSection};

use crate::map::objects::{self, LoadedObject};
use crate::size::PAGE;

/// An executable or a shared library.
pub(super) struct Object {
    /// The address range of its code, in whole pages.
    pub code: Range<usize>,
    /// The address ranges of its functions, sorted.
    pub functions: Vec<Range<usize>>,
}

impl Object {
    /// Bytes of its code; empty if the range is not entirely in the code. Only for an object that stays loaded.
    pub(super) fn bytes(&self, range: Range<usize>) -> &'static [u8] {
        if range.is_empty() || !self.holds(&range) {
            return &[];
        }
        // SAFETY: the range lies in code, which is mapped and readable. Only `breakpoints` writes to it: it replaces single
        // bytes after it has read all of them.
        unsafe { slice::from_raw_parts(range.start as *const u8, range.len()) }
    }

    /// Whether a range lies entirely in its code.
    pub(super) fn holds(&self, range: &Range<usize>) -> bool {
        self.code.start <= range.start && range.end <= self.code.end
    }
}

/// All objects that are loaded now.
pub(super) fn loaded_objects() -> Vec<Object> {
    let mut objects = Vec::new();
    objects::visit(|object| {
        let pages = |code: Range<usize>| code.start / PAGE * PAGE..code.end.next_multiple_of(PAGE);
        objects.push(Object {
            code: object.code().next().map_or(0..0, pages),
            functions: functions(object).unwrap_or_default(),
        });
        ControlFlow::Continue(())
    });
    objects
}

/// The functions of a loaded object.
fn functions(object: &LoadedObject<'_>) -> Option<Vec<Range<usize>>> {
    let index = object.unwind_header()?;
    let bases = BaseAddresses::default().set_eh_frame_hdr(index.as_ptr() as u64);
    let header = EhFrameHdr::new(index, NativeEndian).parse(&bases, 8).ok()?;
    let Pointer::Direct(start) = header.eh_frame_ptr() else { return None };
    // No mapped table has the section's length. The section ends with a zero, within its segment.
    let section = object
        .constants()
        .filter_map(|segment| segment.get((start as usize).checked_sub(segment.as_ptr() as usize)?..))
        .find(|section| !section.is_empty())?;
    let section = EhFrame::new(section, NativeEndian);
    let bases = bases.set_eh_frame(start);

    let mut found = Vec::new();
    let mut entries = section.entries(&bases);
    while let Ok(Some(entry)) = entries.next() {
        let CieOrFde::Fde(partial) = entry else { continue };
        if let Ok(entry) = partial.parse(|section, bases, offset| section.cie_from_offset(bases, offset)) {
            let start = entry.initial_address() as usize;
            found.push(start..start + entry.len() as usize);
        }
    }
    found.sort_unstable_by_key(|function| function.start);
    found.dedup_by_key(|function| function.start);
    Some(found)
}

/// Reads the memory at an address as far as it is readable; returns the number of bytes read.
pub(super) fn read(address: usize, bytes: &mut [u8]) -> usize {
    let here = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let there = libc::iovec { iov_base: address as *mut c_void, iov_len: bytes.len() };
    // SAFETY: the kernel writes at most the length of `bytes`, and checks the other range.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &here, 1, &there, 1, 0) };
    usize::try_from(read).unwrap_or(0)
}

/// The range that holds `address`, among sorted ranges.
pub(super) fn holding(ranges: &[Range<usize>], address: usize) -> Option<&Range<usize>> {
    let after = ranges.partition_point(|range| range.start <= address);
    ranges.get(after.checked_sub(1)?).filter(|range| range.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_of_this_program_and_one_of_libc_are_found() {
        let objects = loaded_objects();
        for function in [loaded_objects as *const () as usize, libc::qsort as *const () as usize] {
            let found = objects.iter().filter_map(|object| holding(&object.functions, function));
            assert_eq!(found.map(|range| range.start).collect::<Vec<_>>(), [function]);
        }
    }
}
