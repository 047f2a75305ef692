//! Guard pages: memory that faults when touched, by whichever means the kernel offers.
//!
//! | means | since | mappings | price |
//! | --- | --- | --- | --- |
//! | `madvise(MADV_GUARD_INSTALL)` | Linux 6.13 | none | 0.7 µs |
//! | page protection (`region`) | always | two a stack, `vm.max_map_count` bounds them | 2.5 µs |
//!
//! The environment variable `REGROW_GUARD=protect` asks for the second on any kernel.
//! All of it is system calls on address ranges: safe to call in the fault handler once [`detect`] ran.

use core::ffi::c_int;
use core::ops::Range;
use core::sync::atomic::{AtomicU8, Ordering};
use std::io;

use super::class::PAGE;
use crate::error::Error;

const MADV_GUARD_INSTALL: c_int = 102;
const MADV_GUARD_REMOVE: c_int = 103;
/// This process, where a descriptor of a process is asked for (Linux 6.15).
const PIDFD_SELF: c_int = -10000;

const UNKNOWN: u8 = 0;
const MADVISE: u8 = 1;
const PROTECT: u8 = 2;

const RESERVING: &str = "reserving address space for stacks";
/// At how many places [`reserve_at`] asks for some.
const PLACES: usize = 10_000;

static MEANS: AtomicU8 = AtomicU8::new(UNKNOWN);

/// Finds out which means this kernel has. Called before the first slot is made, never in the handler.
pub(crate) fn detect() {
    if MEANS.load(Ordering::Relaxed) != UNKNOWN {
        return;
    }
    let forced = std::env::var_os("REGROW_GUARD").is_some_and(|value| value == "protect");
    let means = if !forced && kernel_has_guards() { MADVISE } else { PROTECT };
    let _ = region::page::size(); // looked up once, here, so that the handler finds it known
    MEANS.store(means, Ordering::Relaxed);
}

fn kernel_has_guards() -> bool {
    let Ok(page) = reserve(PAGE, libc::PROT_READ | libc::PROT_WRITE) else { return false };
    // SAFETY: the page was mapped above and nobody else knows of it.
    unsafe {
        let answer = libc::madvise(page as *mut _, PAGE, MADV_GUARD_INSTALL);
        libc::munmap(page as *mut _, PAGE);
        answer == 0
    }
}

/// True where guards cost no mappings.
pub(crate) fn by_madvise() -> bool {
    MEANS.load(Ordering::Relaxed) == MADVISE
}

/// New private address space, `bytes` long, with this protection.
pub(crate) fn reserve(bytes: usize, protection: c_int) -> Result<usize, Error> {
    reserve_near(0, bytes, protection)
}

/// As [`reserve`]: at `wanted`, if nothing is there.
fn reserve_near(wanted: usize, bytes: usize, protection: c_int) -> Result<usize, Error> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, where the kernel likes, touches nothing that exists.
    let at = unsafe { libc::mmap(wanted as *mut _, bytes, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED { Err(memory(RESERVING, bytes)) } else { Ok(at as usize) }
}

/// As [`reserve`] without access, at one of `places`, which are tried in turn: those below an address where that much is free.
pub(crate) fn reserve_at<I: Iterator<Item = usize>>(
    bytes: usize,
    places: impl FnOnce(usize) -> I,
) -> Result<usize, Error> {
    // The kernel fills its address space from the top: what lies below is free, or else some way further below.
    let free = reserve(bytes, libc::PROT_NONE)?;
    // SAFETY: reserved above, nobody knows of it.
    unsafe { unreserve(free, bytes) };
    for wanted in places(free).take(PLACES) {
        let at = reserve_near(wanted, bytes, libc::PROT_NONE)?;
        if at == wanted {
            return Ok(at);
        }
        // SAFETY: the same.
        unsafe { unreserve(at, bytes) };
    }
    Err(Error::Memory { doing: RESERVING, bytes, source: io::Error::from_raw_os_error(libc::ENOMEM) })
}

/// Gives reserved address space back.
///
/// # Safety
/// The range came from [`reserve`] and nobody uses it any more.
pub(crate) unsafe fn unreserve(start: usize, bytes: usize) {
    // SAFETY: the caller vouches for the range.
    unsafe { libc::munmap(start as *mut _, bytes) };
}

/// Prepares reserved (inaccessible) address space for [`install`].
///
/// # Safety
/// The range is reserved, page-aligned, and holds no stack.
pub(crate) unsafe fn make_usable(start: usize, bytes: usize) -> Result<(), Error> {
    if !by_madvise() {
        return Ok(());
    }
    // Guard markers need a mapping that could be accessed. Neighbours of equal protection merge, so an arena
    // stays two mappings however far it has come.
    // SAFETY: the caller vouches for the range.
    unsafe { check(libc::mprotect(start as *mut _, bytes, libc::PROT_READ | libc::PROT_WRITE), bytes) }
}

/// Makes guard markers of ranges, of which there are not very many, by one system call if the kernel allows it. Only where
/// guards are markers.
///
/// # Safety
/// As for [`make_usable`], which was called for the ranges. None of them is needed any more.
pub(crate) unsafe fn install(ranges: impl Iterator<Item = Range<usize>> + Clone) -> Result<(), Error> {
    // SAFETY: the caller vouches for the ranges.
    if unsafe { install_at_once(ranges.clone()) } {
        return Ok(());
    }
    for range in ranges.filter(|range| !range.is_empty()) {
        // SAFETY: the same.
        unsafe { close(range.start, range.len())? };
    }
    Ok(())
}

/// True if all the ranges are guards now; false if none or some are.
///
/// # Safety
/// As for [`install`].
unsafe fn install_at_once(ranges: impl Iterator<Item = Range<usize>>) -> bool {
    let mut list = [libc::iovec { iov_base: core::ptr::null_mut(), iov_len: 0 }; MOST_AT_ONCE];
    let (mut count, mut bytes) = (0, 0);
    for range in ranges.filter(|range| !range.is_empty()) {
        let Some(place) = list.get_mut(count) else { return false };
        *place = libc::iovec { iov_base: range.start as *mut _, iov_len: range.len() };
        count += 1;
        bytes += range.len();
    }
    // SAFETY: the caller vouches for the ranges.
    let done = unsafe {
        libc::syscall(libc::SYS_process_madvise, PIDFD_SELF, list.as_ptr(), count, MADV_GUARD_INSTALL, 0)
    };
    done == bytes as libc::c_long
}

/// The most ranges that one system call takes.
const MOST_AT_ONCE: usize = 64;

/// Makes pages accessible.
///
/// # Safety
/// The range is page-aligned and inside a slot that belongs to the caller.
pub(crate) unsafe fn open(start: usize, bytes: usize) -> Result<(), Error> {
    if by_madvise() {
        // SAFETY: the caller vouches for the range.
        return unsafe { check(libc::madvise(start as *mut _, bytes, MADV_GUARD_REMOVE), bytes) };
    }
    // SAFETY: the same.
    unsafe { protect(start, bytes, region::Protection::READ_WRITE) }
}

/// Makes pages inaccessible and gives their memory back.
///
/// # Safety
/// As for [`open`]; the contents are lost unless there is an error.
pub(crate) unsafe fn close(start: usize, bytes: usize) -> Result<(), Error> {
    if by_madvise() {
        // SAFETY: the caller vouches for the range.
        return unsafe { check(libc::madvise(start as *mut _, bytes, MADV_GUARD_INSTALL), bytes) };
    }
    // In this order: after an error the contents are what they were.
    // SAFETY: the same.
    unsafe {
        protect(start, bytes, region::Protection::NONE)?;
        discard(start, bytes);
    }
    Ok(())
}

/// Takes the access to pages away, guards or not, and leaves their contents.
///
/// # Safety
/// As for [`open`].
pub(crate) unsafe fn forbid(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the caller vouches for the range.
    unsafe { check(libc::mprotect(start as *mut _, bytes, libc::PROT_NONE), bytes) }
}

/// Undoes [`forbid`]: what is not a guard is accessible.
///
/// # Safety
/// As for [`open`].
pub(crate) unsafe fn allow(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the caller vouches for the range.
    unsafe { check(libc::mprotect(start as *mut _, bytes, libc::PROT_READ | libc::PROT_WRITE), bytes) }
}

/// Gives the memory of accessible pages back; they read as zeros afterwards.
///
/// # Safety
/// As for [`open`]; the contents are lost.
pub(crate) unsafe fn discard(start: usize, bytes: usize) {
    // SAFETY: the caller vouches for the range. Failing only means that the memory stays.
    unsafe { libc::madvise(start as *mut _, bytes, libc::MADV_DONTNEED) };
}

/// # Safety
/// As for [`open`].
unsafe fn protect(start: usize, bytes: usize, protection: region::Protection) -> Result<(), Error> {
    // SAFETY: the caller vouches for the range.
    match unsafe { region::protect(start as *const u8, bytes, protection) } {
        Ok(()) => Ok(()),
        Err(region::Error::SystemCall(libc::ENOMEM)) => {
            Err(Error::Mappings { source: io::Error::from_raw_os_error(libc::ENOMEM) })
        }
        Err(_) => Err(memory("protecting stack pages", bytes)),
    }
}

fn check(answer: c_int, bytes: usize) -> Result<(), Error> {
    if answer == 0 { Ok(()) } else { Err(memory("changing guard pages", bytes)) }
}

fn memory(doing: &'static str, bytes: usize) -> Error {
    Error::Memory { doing, bytes, source: io::Error::last_os_error() }
}
