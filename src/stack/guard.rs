//! Guard pages: memory that faults when touched. The kernel offers one of two means.
//!
//! | means | since | mappings | price |
//! | --- | --- | --- | --- |
//! | `madvise(MADV_GUARD_INSTALL)` | Linux 6.13 | none | 0.7 µs |
//! | page protection (`region`) | always | two per stack, limited by `vm.max_map_count` | 2.5 µs |
//!
//! `REGROW_GUARD=protect` in the environment selects page protection on any kernel. The kernel refuses markers in
//! locked memory (`mlockall`), so each such call uses page protection instead.
//!
//! With page protection, the pages of a finished stack are mapped anew ([`renew`]). Otherwise written pages would stay a
//! separate mapping (at least before Linux 6.16), and the process would run out of mappings.
//!
//! This module only makes system calls on address ranges. The fault handler may call it once [`detect`] has run.

use core::ffi::c_int;
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicIsize, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::io;

use crate::error::Error;
use crate::size::PAGE;

const MADV_GUARD_INSTALL: c_int = 102;
const MADV_GUARD_REMOVE: c_int = 103;
/// Stands for this process in place of a process descriptor (Linux 6.15).
const PIDFD_SELF: c_int = -10000;

const UNKNOWN: u8 = 0;
const MADVISE: u8 = 1;
const PROTECT: u8 = 2;

const RESERVING: &str = "reserving address space for stacks";
/// How many addresses [`Reserved::at`] tries.
const PLACES: usize = 10_000;

static MEANS: AtomicU8 = AtomicU8::new(UNKNOWN);

/// The kernel once refused a marker because memory is locked, so both kinds of guards may exist.
static LOCKED: AtomicBool = AtomicBool::new(false);

/// `MADV_DONTNEED` for locked memory (Linux 5.18).
const MADV_DONTNEED_LOCKED: c_int = 24;

/// With page protection: how many more stacks may be opened before the mappings of the process are counted again.
static LEFT: AtomicIsize = AtomicIsize::new(0);

/// Frozen stacks that will take a slot when they thaw. Mappings are kept for them.
static OWED: AtomicUsize = AtomicUsize::new(0);

/// One in this many mappings is left to the rest of the program and to stacks that must grow.
const RESERVED: usize = 16;

/// No stack is made when there is room for fewer than this: every creation would have to count the mappings.
const FEWEST: usize = 32;

/// Finds the kernel's means. Called before the first slot is made, never in the handler.
pub(crate) fn detect() {
    if MEANS.load(Ordering::Relaxed) != UNKNOWN {
        return;
    }
    let forced = std::env::var_os("REGROW_GUARD").is_some_and(|value| value == "protect");
    let means = if !forced && kernel_has_guards() { MADVISE } else { PROTECT };
    let _ = region::page::size(); // cached here for the handler
    MEANS.store(means, Ordering::Relaxed);
}

fn kernel_has_guards() -> bool {
    let Ok(page) = Reserved::new(PAGE, libc::PROT_READ | libc::PROT_WRITE) else { return false };
    // SAFETY: the page was mapped above, and no other code knows of it.
    unsafe { libc::madvise(page.start as *mut _, PAGE, MADV_GUARD_INSTALL) == 0 }
}

pub(crate) fn by_madvise() -> bool {
    MEANS.load(Ordering::Relaxed) == MADVISE
}

/// Fails if the process would have too few mappings left for a new stack. The reserve keeps `malloc` working and lets a
/// running stack grow. Not called in the handler, which may use the last mapping.
pub(crate) fn leave_mappings() -> Result<(), Error> {
    if by_madvise() || LEFT.fetch_sub(1, Ordering::Relaxed) > 0 {
        return Ok(());
    }
    let Some((used, most)) = mappings() else { return Ok(()) };
    let used = used + 2 * OWED.load(Ordering::Relaxed);
    let stacks = (most - most / RESERVED).saturating_sub(used) / 2;
    if stacks < FEWEST {
        LEFT.store(0, Ordering::Relaxed);
        return Err(Error::Mappings { source: io::Error::from_raw_os_error(libc::ENOMEM) });
    }
    // The rest of the program takes mappings too, so they are counted again after half of the room is used.
    LEFT.store((stacks / 2) as isize, Ordering::Relaxed);
    Ok(())
}

/// A stack has left its slot and will take another without asking [`leave_mappings`].
pub(crate) fn owe() {
    OWED.fetch_add(1, Ordering::Relaxed);
    LEFT.fetch_sub(1, Ordering::Relaxed);
}

/// Such a stack has taken a slot.
pub(crate) fn paid() {
    OWED.fetch_sub(1, Ordering::Relaxed);
}

/// How many mappings the process has, and how many it may have. `None` without `/proc`. Makes only system calls.
fn mappings() -> Option<(usize, usize)> {
    let mut most = 0;
    read(c"/proc/sys/vm/max_map_count", |text| {
        for digit in text.iter().filter(|byte| byte.is_ascii_digit()) {
            most = most * 10 + usize::from(digit - b'0');
        }
    })?;
    let mut used = 0;
    read(c"/proc/self/maps", |text| used += text.iter().filter(|&&byte| byte == b'\n').count())?;
    Some((used, most))
}

/// Passes a file's text to `each` in pieces. `None` if it cannot be read.
fn read(path: &core::ffi::CStr, mut each: impl FnMut(&[u8])) -> Option<()> {
    let mut piece = [0; 2048];
    // SAFETY: the path ends in a zero byte. The kernel writes at most `piece.len()` bytes. The descriptor was opened
    // here, so no other code closes it.
    unsafe {
        let file = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        if file < 0 {
            return None;
        }
        let end = loop {
            match libc::read(file, piece.as_mut_ptr().cast(), piece.len()) {
                length @ 1.. => each(&piece[..length as usize]),
                end => break end,
            }
        };
        libc::close(file);
        (end == 0).then_some(())
    }
}

/// Private address space that no other code knows of yet. Dropping it gives it back.
pub(super) struct Reserved {
    start: usize,
    bytes: usize,
}

impl Reserved {
    /// Reserves `bytes` with this protection.
    pub(super) fn new(bytes: usize, protection: c_int) -> Result<Self, Error> {
        Self::near(0, bytes, protection)
    }

    /// Like [`new`](Self::new), but at `wanted` if that range is free.
    fn near(wanted: usize, bytes: usize, protection: c_int) -> Result<Self, Error> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: without `MAP_FIXED` the kernel places a new mapping only in free address space.
        let at = unsafe { libc::mmap(wanted as *mut _, bytes, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(refused(RESERVING, bytes));
        }
        Ok(Self { start: at as usize, bytes })
    }

    /// Reserves inaccessible memory at one of `places`, tried in turn. The closure gets an address where that much memory
    /// is free.
    pub(super) fn at<I: Iterator<Item = usize>>(
        bytes: usize,
        places: impl FnOnce(usize) -> I,
    ) -> Result<Self, Error> {
        // The kernel fills the address space from the top, so there is free space below this address.
        let free = Self::new(bytes, libc::PROT_NONE)?.start;
        for wanted in places(free).take(PLACES) {
            let found = Self::near(wanted, bytes, libc::PROT_NONE)?;
            if found.start == wanted {
                return Ok(found);
            }
        }
        Err(Error::Memory { doing: RESERVING, bytes, source: io::Error::from_raw_os_error(libc::ENOMEM) })
    }

    /// Reserves inaccessible memory at a multiple of `align`.
    pub(super) fn aligned(bytes: usize, align: usize) -> Result<Self, Error> {
        let more = Self::new(bytes + align, libc::PROT_NONE)?.keep();
        let start = more.next_multiple_of(align);
        drop(Self { start: more, bytes: start - more });
        drop(Self { start: start + bytes, bytes: more + align - start });
        Ok(Self { start, bytes })
    }

    pub(super) fn start(&self) -> usize {
        self.start
    }

    /// Keeps the range reserved. Returns its start.
    pub(super) fn keep(self) -> usize {
        core::mem::ManuallyDrop::new(self).start
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.bytes != 0 {
            // SAFETY: this module reserved the range, and no other code knows of it before `keep`.
            unsafe { unreserve(self.start, self.bytes) }
        }
    }
}

/// Reserves `bytes` of new private address space with this protection, for good.
pub(crate) fn reserve(bytes: usize, protection: c_int) -> Result<usize, Error> {
    Reserved::new(bytes, protection).map(Reserved::keep)
}

/// A number of this process. In a child made by `fork` it is 0, whatever it was in the parent.
///
/// The number lies on a page that the kernel gives to a child as zeros. The page is made on first use and never unmapped.
/// The fault handler may call this: no thread waits for another.
pub(super) struct NotInherited(AtomicPtr<AtomicU64>);

impl NotInherited {
    pub(super) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    pub(super) fn get(&self) -> Option<&'static AtomicU64> {
        // SAFETY: the pointer is null or points to a page that is never unmapped. Zeros are a valid `AtomicU64`.
        unsafe { self.0.load(Ordering::Acquire).as_ref() }
    }

    /// The number, 0 at first. `None` if the kernel has no such pages.
    pub(super) fn get_or_make(&self) -> Option<&'static AtomicU64> {
        if let Some(number) = self.get() {
            return Some(number);
        }
        let page = Reserved::new(PAGE, libc::PROT_READ | libc::PROT_WRITE).ok()?;
        // SAFETY: the page was reserved above, and no other code knows of it.
        if unsafe { libc::madvise(page.start as *mut _, PAGE, libc::MADV_WIPEONFORK) } != 0 {
            return None;
        }
        let new = page.start as *mut AtomicU64;
        if self.0.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            page.keep();
        }
        self.get()
    }
}

/// Gives reserved address space back.
///
/// # Safety
/// The range came from [`reserve`] and is no longer used.
pub(crate) unsafe fn unreserve(start: usize, bytes: usize) {
    // SAFETY: the range is a mapping made by this crate, and no longer used.
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
    // Guard markers need an accessible mapping. Neighbours of equal protection merge, so an arena stays two mappings at
    // any size.
    // SAFETY: the range is reserved and holds no stack, so no code relies on its being inaccessible.
    unsafe { check(libc::mprotect(start as *mut _, bytes, libc::PROT_READ | libc::PROT_WRITE), bytes) }
}

/// Turns a small number of ranges into guard markers, with one system call if the kernel allows it. Only where guards are
/// markers.
///
/// # Safety
/// As for [`make_usable`], which was called for the ranges. Their contents are no longer needed.
pub(crate) unsafe fn install(ranges: impl Iterator<Item = Range<usize>> + Clone) -> Result<(), Error> {
    let mut each = ranges.clone().filter(|range| !range.is_empty());
    // SAFETY: the ranges are usable and their contents are not needed. Both calls only turn them into guards.
    unsafe {
        if install_at_once(ranges) {
            return Ok(());
        }
        each.try_for_each(|range| close(range.start, range.len()))
    }
}

/// True if all ranges are guards now. If false, some of them may be.
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
    // SAFETY: the list holds `count` ranges, and their contents are not needed.
    let done = unsafe {
        libc::syscall(libc::SYS_process_madvise, PIDFD_SELF, list.as_ptr(), count, MADV_GUARD_INSTALL, 0)
    };
    done == bytes as libc::c_long
}

const MOST_AT_ONCE: usize = 64;

/// Makes pages accessible.
///
/// # Safety
/// The range is page-aligned and inside a slot that belongs to the caller.
pub(crate) unsafe fn open(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the caller owns these whole pages, and no code expects them to fault any more.
    unsafe {
        if by_madvise() {
            unmark(start, bytes)?;
            if !LOCKED.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
        protect(start, bytes, region::Protection::READ_WRITE)
    }
}

/// Makes pages inaccessible and gives their memory back.
///
/// # Safety
/// As for [`open`]. The contents are lost unless there is an error.
pub(crate) unsafe fn close(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the caller owns these whole pages, and their contents are not needed.
    unsafe {
        if by_madvise() {
            match mark(start, bytes) {
                // Memory is locked: the kernel refuses markers there.
                Err(Error::Memory { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                    LOCKED.store(true, Ordering::Relaxed);
                }
                other => return other,
            }
        } else if renew(start, bytes).is_ok() {
            return Ok(());
        }
        // Protection comes first, so that an error leaves the contents unchanged.
        protect(start, bytes, region::Protection::NONE)?;
        discard(start, bytes);
    }
    Ok(())
}

/// Turns pages into guard markers. An error if memory is locked.
///
/// # Safety
/// As for [`close`]. Only where guards are markers.
pub(crate) unsafe fn mark(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the caller owns these whole pages, and their contents are not needed.
    unsafe { check(libc::madvise(start as *mut _, bytes, MADV_GUARD_INSTALL), bytes) }
}

/// Removes guard markers without changing the protection.
///
/// # Safety
/// As for [`open`]. Only where guards are markers.
pub(crate) unsafe fn unmark(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the caller owns these whole pages. Pages that are not guards do not change.
    unsafe { check(libc::madvise(start as *mut _, bytes, MADV_GUARD_REMOVE), bytes) }
}

/// With page protection: takes back all accessible pages of an unused slot together with their mappings. True on success.
///
/// # Safety
/// As for [`close`].
pub(crate) unsafe fn take_back(start: usize, bytes: usize) -> bool {
    // SAFETY: the slot is unused, so the contents of its pages are not needed.
    let done = !by_madvise() && unsafe { renew(start, bytes) }.is_ok();
    if done {
        LEFT.fetch_add(1, Ordering::Relaxed);
    }
    done
}

/// Maps pages anew without access, so that they can merge with the neighbouring mappings.
///
/// # Safety
/// As for [`close`].
unsafe fn renew(start: usize, bytes: usize) -> Result<(), Error> {
    if bytes == 0 {
        return Ok(());
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the new mapping replaces whole pages that the caller owns, and their contents are not needed.
    unsafe {
        let at = libc::mmap(start as *mut _, bytes, libc::PROT_NONE, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return Err(refused("mapping stack pages anew", bytes));
        }
        // The arena has this setting too. Mappings that differ in it do not merge.
        libc::madvise(start as *mut _, bytes, libc::MADV_NOHUGEPAGE);
    }
    Ok(())
}

/// Makes pages inaccessible, guards or not, and keeps their contents.
///
/// With page protection, the pages are also excluded from core dumps, unlike the guards around them. So they stay a
/// separate mapping, and [`allow`] needs no new one, which the kernel might refuse.
///
/// # Safety
/// As for [`open`].
pub(crate) unsafe fn forbid(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the caller owns these whole pages, and their contents stay.
    unsafe {
        if !by_madvise() {
            check(libc::madvise(start as *mut _, bytes, libc::MADV_DONTDUMP), bytes)?;
        }
        check(libc::mprotect(start as *mut _, bytes, libc::PROT_NONE), bytes)
    }
}

/// Undoes [`forbid`]: pages that are not guards become accessible.
///
/// # Safety
/// As for [`open`].
pub(crate) unsafe fn allow(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the caller owns these whole pages. Contents and guard markers stay.
    unsafe {
        check(libc::mprotect(start as *mut _, bytes, libc::PROT_READ | libc::PROT_WRITE), bytes)?;
        if !by_madvise() {
            libc::madvise(start as *mut _, bytes, libc::MADV_DODUMP);
        }
    }
    Ok(())
}

/// Gives the memory of accessible pages back. The pages then read as zeros.
///
/// # Safety
/// As for [`open`]. The contents are lost.
pub(crate) unsafe fn discard(start: usize, bytes: usize) {
    // SAFETY: the caller owns these whole pages, and their contents are not needed. After an error
    // the memory stays, which is harmless.
    unsafe {
        if libc::madvise(start as *mut _, bytes, libc::MADV_DONTNEED) != 0 {
            libc::madvise(start as *mut _, bytes, MADV_DONTNEED_LOCKED);
        }
    }
}

/// # Safety
/// As for [`open`].
unsafe fn protect(start: usize, bytes: usize, protection: region::Protection) -> Result<(), Error> {
    // SAFETY: the caller owns these whole pages.
    match unsafe { region::protect(start as *const u8, bytes, protection) } {
        Ok(()) => Ok(()),
        Err(_) => Err(refused("protecting stack pages", bytes)),
    }
}

fn check(answer: c_int, bytes: usize) -> Result<(), Error> {
    if answer == 0 { Ok(()) } else { Err(refused("changing guard pages", bytes)) }
}

/// The error for the kernel's latest refusal: about mappings if the process has nearly used them up, else about memory.
fn refused(doing: &'static str, bytes: usize) -> Error {
    let source = io::Error::last_os_error();
    let is_about_mappings = source.raw_os_error() == Some(libc::ENOMEM)
        && mappings().is_some_and(|(used, most)| used + 4 >= most);
    if is_about_mappings { Error::Mappings { source } } else { Error::Memory { doing, bytes, source } }
}
