//! Finds function names for addresses without allocating, for reports made in the fault handler.
//!
//! `/proc/self/maps` gives the file of an address, and the file's symbol table gives the function. Plain system calls read
//! both. The ELF file is parsed in place (`object`), and the name is demangled while it is written (`rustc-demangle`).

use core::ffi::CStr;
use core::fmt::{self, Write};
use core::slice;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use object::LittleEndian;
use object::elf::{FileHeader64, PT_LOAD, SHT_DYNSYM, SHT_SYMTAB, STT_FUNC};
use object::read::elf::{FileHeader, ProgramHeader, Sym};

/// Writes `0x1234 function+0x10 (file)`, or as much of it as is known.
pub(crate) fn describe(pc: usize, out: &mut impl Write) -> fmt::Result {
    write!(out, "{pc:#x} ")?;
    look_up(pc, |found| {
        let Some(file) = found.file else { return out.write_str("(no mapping)") };
        match found.function {
            Some((name, into)) => write!(out, "{:#}+{into:#x}", rustc_demangle::demangle(name))?,
            None => out.write_str("?")?,
        }
        write!(out, " ({})", file.rsplit('/').next().unwrap_or(file))
    })
}

/// The name of the function at `pc`, for use outside the fault handler.
pub(crate) fn name(pc: usize) -> Option<String> {
    look_up(pc, |found| found.function.map(|(name, _)| format!("{:#}", rustc_demangle::demangle(name))))
}

struct Found<'a> {
    /// The path of its file.
    file: Option<&'a str>,
    /// The function's symbol, and the offset of the address in it.
    function: Option<(&'a str, u64)>,
}

/// Looks up an address and passes the result on while the files are open.
fn look_up<R>(pc: usize, then: impl FnOnce(Found<'_>) -> R) -> R {
    let mut line = [0; LINE];
    let Some(mapping) = Mapping::of(pc, &mut line) else { return then(Found { file: None, function: None }) };
    let path = CStr::from_bytes_until_nul(mapping.path).unwrap_or_default();
    let file = path.to_str().ok();
    let offset = (pc - mapping.start + mapping.offset) as u64;
    let opened = File::open(path);
    let function = opened.as_ref().and_then(|opened| find(opened.bytes(), offset));
    then(Found { file, function })
}

/// The name of the function at an offset in an ELF file, and the offset in that function. Uses the lower of `object`'s two
/// interfaces, because its `ElfFile` allocates.
fn find(elf: &[u8], offset: u64) -> Option<(&str, u64)> {
    const ENDIAN: LittleEndian = LittleEndian;
    let header = FileHeader64::<LittleEndian>::parse(elf).ok()?;
    let address = header.program_headers(ENDIAN, elf).ok()?.iter().find_map(|segment| {
        let (start, length) = segment.file_range(ENDIAN);
        let into = offset.checked_sub(start).filter(|into| *into < length)?;
        (segment.p_type(ENDIAN) == PT_LOAD).then(|| segment.p_vaddr(ENDIAN).wrapping_add(into))
    })?;
    let sections = header.sections(ENDIAN, elf).ok()?;
    [SHT_SYMTAB, SHT_DYNSYM].into_iter().find_map(|table| {
        let symbols = sections.symbols(ENDIAN, elf, table).ok()?;
        let symbol = symbols.iter().find(|symbol| {
            let into = address.wrapping_sub(symbol.st_value(ENDIAN));
            symbol.st_type() == STT_FUNC && into < symbol.st_size(ENDIAN).max(1)
        })?;
        let name = symbols.symbol_name(ENDIAN, symbol).ok()?;
        Some((core::str::from_utf8(name).ok()?, address - symbol.st_value(ENDIAN)))
    })
}

/// Opens a file for reading. A plain system call, because `std::fs` may allocate for the path.
fn open(path: &CStr) -> Option<OwnedFd> {
    // SAFETY: the path ends with a zero byte. The descriptor is new, so this value alone owns it.
    unsafe {
        let file = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        (file >= 0).then(|| OwnedFd::from_raw_fd(file))
    }
}

/// A whole file, mapped.
struct File {
    start: *mut libc::c_void,
    bytes: usize,
}

impl File {
    fn open(path: &CStr) -> Option<Self> {
        let file = open(path)?;
        // SAFETY: zeros are a `stat`, which the kernel fills in. The new mapping is private to this value.
        unsafe {
            let mut status: libc::stat = core::mem::zeroed();
            let known = libc::fstat(file.as_raw_fd(), &mut status) == 0 && status.st_size > 0;
            let bytes = status.st_size as usize;
            let start = if known {
                libc::mmap(
                    core::ptr::null_mut(),
                    bytes,
                    libc::PROT_READ,
                    libc::MAP_PRIVATE,
                    file.as_raw_fd(),
                    0,
                )
            } else {
                libc::MAP_FAILED
            };
            (start != libc::MAP_FAILED).then_some(Self { start, bytes })
        }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `open` mapped this many bytes, and they stay mapped until this value is dropped.
        unsafe { slice::from_raw_parts(self.start.cast(), self.bytes) }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: `open` made the mapping for this value alone, and no borrow of its bytes is left.
        unsafe { libc::munmap(self.start, self.bytes) };
    }
}

/// Longest line of `/proc/self/maps`. A longer line is cut, and its path is not found.
const LINE: usize = 4096 + 128;

struct Mapping<'a> {
    start: usize,
    offset: usize,
    /// Ends with a zero byte.
    path: &'a [u8],
}

impl<'a> Mapping<'a> {
    /// The mapping that holds `address`.
    fn of(address: usize, line: &'a mut [u8; LINE]) -> Option<Self> {
        let length = find_line(&open(c"/proc/self/maps")?, address, line)?;
        let line = &line[..=length]; // with a zero byte at its end
        let (start, _) = range(line)?;
        let mut fields = line.split(|&byte| byte == b' ');
        let offset = hex(fields.nth(2)?)?;
        let path = line.iter().position(|&byte| byte == b'/')?;
        Some(Self { start, offset, path: &line[path..] })
    }
}

/// Reads lines until one covers `address`. Leaves it in `line` with a zero byte at its end, and returns its length.
fn find_line(file: &OwnedFd, address: usize, line: &mut [u8; LINE]) -> Option<usize> {
    let mut buffer = [0u8; 1024];
    let mut length = 0;
    loop {
        // SAFETY: the kernel writes at most as much as the buffer holds.
        let read = unsafe { libc::read(file.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        for &byte in buffer.get(..usize::try_from(read).ok().filter(|&n| n > 0)?)? {
            if byte != b'\n' {
                *line.get_mut(length)? = byte;
                length = (length + 1).min(LINE - 1);
                continue;
            }
            line[length] = 0;
            if range(&line[..length]).is_some_and(|(start, end)| (start..end).contains(&address)) {
                return Some(length);
            }
            length = 0;
        }
    }
}

/// The two addresses at the start of a line.
fn range(line: &[u8]) -> Option<(usize, usize)> {
    let dash = line.iter().position(|&byte| byte == b'-')?;
    let space = line.iter().position(|&byte| byte == b' ')?;
    Some((hex(&line[..dash])?, hex(line.get(dash + 1..space)?)?))
}

fn hex(digits: &[u8]) -> Option<usize> {
    usize::from_str_radix(core::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_of_this_program_and_one_of_libc_are_found() {
        let mut text = String::new();
        describe(a_function_of_this_program_and_one_of_libc_are_found as *const () as usize, &mut text)
            .unwrap();
        assert!(text.contains("one_of_libc_are_found+0x0"), "{text}");
        text.clear();
        describe(libc::getpid as *const () as usize, &mut text).unwrap();
        assert!(text.contains("getpid") && text.contains("libc"), "{text}");
    }

    #[test]
    fn an_address_that_is_nowhere_is_no_error() {
        let mut text = String::new();
        describe(8, &mut text).unwrap();
        assert_eq!(text, "0x8 (no mapping)");
    }
}
