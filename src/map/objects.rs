//! Loaded objects: the program and its shared libraries, as the loader knows them.

use core::ffi::{CStr, c_int, c_void};
use core::ops::{ControlFlow, Range};
use core::slice;

/// One of them. It stays loaded as long as this value lives.
pub(crate) struct LoadedObject<'a> {
    info: &'a libc::dl_phdr_info,
    headers: &'a [libc::Elf64_Phdr],
}

/// A part of it that is mapped: where it lies, and with which rights (`libc::PF_R` and others).
pub(crate) struct Segment {
    pub range: Range<usize>,
    flags: u32,
}

/// Shows all loaded objects to `each`, the program first, until that breaks off. The loader's lock is held meanwhile.
pub(crate) fn visit(mut each: impl FnMut(&LoadedObject<'_>) -> ControlFlow<()>) {
    let mut each: &mut dyn FnMut(&LoadedObject<'_>) -> ControlFlow<()> = &mut each;
    // SAFETY: the callback is called with this argument only, during the call.
    unsafe { libc::dl_iterate_phdr(Some(show), (&raw mut each).cast()) };
}

/// # Safety
/// To be called by `dl_iterate_phdr`, with the argument that [`visit`] gives it.
unsafe extern "C" fn show(info: *mut libc::dl_phdr_info, _size: usize, each: *mut c_void) -> c_int {
    // SAFETY: the loader passes an object's description and our argument. It keeps the object loaded until we return, and there
    // are as many headers as it says.
    let (object, each) = unsafe {
        let info = &*info;
        let headers = slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into());
        let each = &mut *each.cast::<&mut dyn FnMut(&LoadedObject<'_>) -> ControlFlow<()>>();
        (LoadedObject { info, headers }, each)
    };
    c_int::from(each(&object).is_break())
}

impl<'a> LoadedObject<'a> {
    /// How many objects the process has loaded and unloaded.
    pub(crate) fn changes(&self) -> (u64, u64) {
        (self.info.dlpi_adds, self.info.dlpi_subs)
    }

    /// What its addresses count from.
    pub(crate) fn address(&self) -> usize {
        self.info.dlpi_addr as usize
    }

    /// The path of its file; empty for the program.
    pub(crate) fn path(&self) -> &CStr {
        if self.info.dlpi_name.is_null() {
            return c"";
        }
        // SAFETY: the loader's name for the object, ended by a zero byte.
        unsafe { CStr::from_ptr(self.info.dlpi_name) }
    }

    /// What of it is mapped from its file.
    pub(crate) fn segments(&self) -> impl Iterator<Item = Segment> {
        let loaded = self.headers.iter().filter(|header| header.p_type == libc::PT_LOAD);
        loaded.map(|header| Segment { range: self.range(header), flags: header.p_flags })
    }

    /// Where its code is.
    pub(crate) fn code(&self) -> impl Iterator<Item = Range<usize>> {
        self.segments().filter(|segment| segment.flags & libc::PF_X != 0).map(|segment| segment.range)
    }

    /// The bytes of its segments that are readable and constant.
    pub(crate) fn constants(&self) -> impl Iterator<Item = &'a [u8]> {
        let constant = |segment: &Segment| segment.flags & (libc::PF_R | libc::PF_W) == libc::PF_R;
        // SAFETY: these are mapped as their headers say, readable, and written by nobody.
        self.segments().filter(constant).map(|segment| unsafe { bytes(&segment.range) })
    }

    /// The header of its unwind tables, `.eh_frame_hdr`.
    pub(crate) fn unwind_header(&self) -> Option<&'a [u8]> {
        let header = self.headers.iter().find(|header| header.p_type == libc::PT_GNU_EH_FRAME)?;
        // SAFETY: it lies in a segment that is readable and constant.
        Some(unsafe { bytes(&self.range(header)) })
    }

    fn range(&self, header: &libc::Elf64_Phdr) -> Range<usize> {
        let start = self.address().wrapping_add(header.p_vaddr as usize);
        start..start.wrapping_add(header.p_memsz as usize)
    }
}

/// # Safety
/// The range is mapped, readable, and not written as long as the result is used.
unsafe fn bytes<'a>(range: &Range<usize>) -> &'a [u8] {
    // SAFETY: as the caller says.
    unsafe { slice::from_raw_parts(range.start as *const u8, range.len()) }
}
