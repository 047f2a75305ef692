//! Where functions begin and end, as the unwind tables of the loaded objects have it.

use core::ffi::{c_int, c_void};
use core::ops::Range;
use core::slice;

use gimli::{BaseAddresses, CieOrFde, EhFrame, EhFrameHdr, NativeEndian, Pointer, UnwindSection};

use crate::size::PAGE;

/// An executable or a shared library.
pub(super) struct Object {
    /// Where its code is mapped, whole pages.
    pub code: Range<usize>,
    /// The address ranges of its functions, sorted.
    pub functions: Vec<Range<usize>>,
}

impl Object {
    /// Bytes of its code, or none if they do not all lie in it. Only for an object that stays loaded.
    pub(super) fn bytes(&self, range: Range<usize>) -> &'static [u8] {
        if range.is_empty() || !self.holds(&range) {
            return &[];
        }
        // SAFETY: the range lies in code, which is mapped and readable. It is not written to but by `breakpoints`, which
        // replaces single bytes of it after it has read them all.
        unsafe { slice::from_raw_parts(range.start as *const u8, range.len()) }
    }

    /// Whether all of a range lies in its code.
    pub(super) fn holds(&self, range: &Range<usize>) -> bool {
        self.code.start <= range.start && range.end <= self.code.end
    }
}

/// All objects that are loaded now.
pub(super) fn loaded_objects() -> Vec<Object> {
    let mut objects = Vec::new();
    // SAFETY: the callback has the signature that the loader asks for, and gets the vector, which is not used meanwhile.
    unsafe { libc::dl_iterate_phdr(Some(on_object), (&raw mut objects).cast()) };
    objects
}

unsafe extern "C" fn on_object(info: *mut libc::dl_phdr_info, _size: usize, data: *mut c_void) -> c_int {
    // SAFETY: the loader passes an object's description, whose header table is as long as it says; what it describes stays
    // mapped while this runs. `data` is the vector of `loaded_objects`.
    let (base, headers, objects, functions) = unsafe {
        let base = (*info).dlpi_addr as usize;
        let headers = slice::from_raw_parts((*info).dlpi_phdr, usize::from((*info).dlpi_phnum));
        (base, headers, &mut *data.cast::<Vec<Object>>(), functions(base, headers).unwrap_or_default())
    };
    let code = headers
        .iter()
        .find(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_X != 0)
        .map_or(0..0, |header| {
            let start = (base + header.p_vaddr as usize) / PAGE * PAGE;
            start..(base + (header.p_vaddr + header.p_memsz) as usize).next_multiple_of(PAGE)
        });
    objects.push(Object { code, functions });
    0
}

/// The functions of the object loaded at `base`.
///
/// # Safety
/// `headers` are its program headers, and what they say is mapped.
unsafe fn functions(base: usize, headers: &[libc::Elf64_Phdr]) -> Option<Vec<Range<usize>>> {
    let range = |header: &libc::Elf64_Phdr| {
        let start = base + header.p_vaddr as usize;
        start..start + header.p_memsz as usize
    };
    let index = headers.iter().find(|header| header.p_type == libc::PT_GNU_EH_FRAME).map(range)?;
    // SAFETY: the ranges come from the program headers, so they are mapped as the caller says, and nobody writes to them.
    let bytes = |range: Range<usize>| unsafe { slice::from_raw_parts(range.start as *const u8, range.len()) };
    let bases = BaseAddresses::default().set_eh_frame_hdr(index.start as u64);
    let header = EhFrameHdr::new(bytes(index), NativeEndian).parse(&bases, 8).ok()?;
    let Pointer::Direct(start) = header.eh_frame_ptr() else { return None };
    // The section's length is written nowhere that is mapped: it ends in a zero, in the segment it is in.
    let segment = headers
        .iter()
        .filter(|header| header.p_type == libc::PT_LOAD)
        .map(range)
        .find(|range| range.contains(&(start as usize)))?;
    let section = EhFrame::new(bytes(start as usize..segment.end), NativeEndian);
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

/// Reads the memory at an address as far as there is any; returns how many bytes there were.
pub(super) fn read(address: usize, bytes: &mut [u8]) -> usize {
    let here = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let there = libc::iovec { iov_base: address as *mut c_void, iov_len: bytes.len() };
    // SAFETY: the kernel writes no more than the length of `bytes`, and checks the other range.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &here, 1, &there, 1, 0) };
    usize::try_from(read).unwrap_or(0)
}

/// The one of some sorted ranges that holds `address`.
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
