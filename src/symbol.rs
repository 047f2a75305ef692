//! Function names for addresses, without allocating, for reports made in the fault handler.
//!
//! `/proc/self/maps` says which file an address comes from, the file's symbol table which function it is.
//! Both are read with plain system calls; the ELF file is read in place (`object`), the name is
//! demangled as it is written (`rustc-demangle`).

use core::ffi::CStr;
use core::fmt::{self, Write};
use core::slice;

use object::read::elf::ElfFile64;
use object::{Object, ObjectSegment, ObjectSymbol, SymbolKind};

/// Writes `0x1234 function+0x10 (file)`, as much of it as can be found.
pub(crate) fn describe(pc: usize, out: &mut impl Write) -> fmt::Result {
    write!(out, "{pc:#x} ")?;
    let mut line = [0; LINE];
    let Some(mapping) = Mapping::of(pc, &mut line) else { return out.write_str("(no mapping)") };
    let Ok(path) = CStr::from_bytes_until_nul(mapping.path) else { return out.write_str("?") };
    let name = path.to_str().unwrap_or("?");
    match File::open(path) {
        Some(file) => function(file.bytes(), pc - mapping.start + mapping.offset, out)?,
        None => out.write_str("?")?,
    }
    write!(out, " ({})", name.rsplit('/').next().unwrap_or(name))
}

/// Writes the function at an offset in an ELF file.
fn function(elf: &[u8], offset: usize, out: &mut impl Write) -> fmt::Result {
    let Ok(elf) = ElfFile64::<object::Endianness>::parse(elf) else { return out.write_str("?") };
    let address = elf.segments().find_map(|segment| {
        let (start, length) = segment.file_range();
        (offset as u64).checked_sub(start).filter(|at| *at < length).map(|at| segment.address() + at)
    });
    let Some(address) = address else { return out.write_str("?") };
    let covers = |symbol: &object::read::elf::ElfSymbol64<'_, '_>| {
        symbol.kind() == SymbolKind::Text && address.wrapping_sub(symbol.address()) < symbol.size().max(1)
    };
    let found = elf.symbols().find(covers).or_else(|| elf.dynamic_symbols().find(covers));
    match found.and_then(|symbol| Some((symbol.name().ok()?, address - symbol.address()))) {
        Some((name, into)) => write!(out, "{:#}+{into:#x}", rustc_demangle::demangle(name)),
        None => out.write_str("?"),
    }
}

/// A whole file, mapped.
struct File {
    start: *mut libc::c_void,
    bytes: usize,
}

impl File {
    fn open(path: &CStr) -> Option<Self> {
        // SAFETY: plain system calls; the mapping is private to this value and the file handle is closed.
        unsafe {
            let file = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
            if file < 0 {
                return None;
            }
            let mut status: libc::stat = core::mem::zeroed();
            let known = libc::fstat(file, &mut status) == 0 && status.st_size > 0;
            let bytes = status.st_size as usize;
            let start = if known {
                libc::mmap(core::ptr::null_mut(), bytes, libc::PROT_READ, libc::MAP_PRIVATE, file, 0)
            } else {
                libc::MAP_FAILED
            };
            libc::close(file);
            (start != libc::MAP_FAILED).then_some(Self { start, bytes })
        }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: mapped by `open`, until dropped.
        unsafe { slice::from_raw_parts(self.start.cast(), self.bytes) }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: mapped by `open`.
        unsafe { libc::munmap(self.start, self.bytes) };
    }
}

/// A line of `/proc/self/maps` that is longer is cut: its path is not found.
const LINE: usize = 4096 + 128;

struct Mapping<'a> {
    start: usize,
    offset: usize,
    /// Ends in a zero byte.
    path: &'a [u8],
}

impl<'a> Mapping<'a> {
    /// The mapping that holds `address`.
    fn of(address: usize, line: &'a mut [u8; LINE]) -> Option<Self> {
        // SAFETY: plain system calls on a file handle of our own.
        let file = unsafe { libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        if file < 0 {
            return None;
        }
        let length = find_line(file, address, line);
        // SAFETY: the file handle is ours.
        unsafe { libc::close(file) };
        let line = &line[..=length?]; // with a zero byte at its end
        let (start, _) = range(line)?;
        let mut fields = line.split(|&byte| byte == b' ');
        let offset = hex(fields.nth(2)?)?;
        let path = line.iter().position(|&byte| byte == b'/')?;
        Some(Self { start, offset, path: &line[path..] })
    }
}

/// Reads lines until one covers `address`; leaves it in `line`, ended by a zero byte, and returns its length.
fn find_line(file: i32, address: usize, line: &mut [u8; LINE]) -> Option<usize> {
    let mut buffer = [0u8; 1024];
    let mut length = 0;
    loop {
        // SAFETY: reads into the buffer.
        let read = unsafe { libc::read(file, buffer.as_mut_ptr().cast(), buffer.len()) };
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

/// The two addresses a line begins with.
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
        describe(a_function_of_this_program_and_one_of_libc_are_found as *const () as usize, &mut text).unwrap();
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
