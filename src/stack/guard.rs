//! Guard pages: memory that faults when touched, by whichever means the kernel offers.
//!
//! | means | since | mappings | price |
//! | --- | --- | --- | --- |
//! | `madvise(MADV_GUARD_INSTALL)` | Linux 6.13 | none | 0.7 µs |
//! | page protection (`region`) | always | two a stack, `vm.max_map_count` bounds them | 2.5 µs |
//!
//! The environment variable `REGROW_GUARD=protect` asks for the second on any kernel. In locked memory (`mlockall`) the kernel
//! refuses markers: there, too, guards are pages without access, call by call.
//!
//! With guards by protection a stack that ends is mapped anew ([`renew`]): what was written to keeps a mapping from being one with
//! its neighbours, on kernels before 6.16 at least, and then the process would run out of them.
//! All of it is system calls on address ranges: safe to call in the fault handler once [`detect`] ran.

use core::ffi::c_int;
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicIsize, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::io;

use crate::error::Error;
use crate::size::PAGE;

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

/// The kernel once refused a marker because memory is locked: there may be guards of both kinds.
static LOCKED: AtomicBool = AtomicBool::new(false);

/// `MADV_DONTNEED` for locked memory (Linux 5.18).
const MADV_DONTNEED_LOCKED: c_int = 24;

/// By protection: how many more stacks may be opened before the mappings of the process are counted again.
static LEFT: AtomicIsize = AtomicIsize::new(0);

/// Frozen stacks that will take a slot when they thaw: their mappings are kept for them.
static OWED: AtomicUsize = AtomicUsize::new(0);

/// One mapping in so many is left to the rest of the program, and to stacks that must grow.
const RESERVED: usize = 16;

/// With room for fewer stacks than this no more are made: each time would take a count.
const FEWEST: usize = 32;

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
    let Ok(page) = Reserved::new(PAGE, libc::PROT_READ | libc::PROT_WRITE) else { return false };
    // SAFETY: the page was mapped above and nobody else knows of it.
    unsafe { libc::madvise(page.start as *mut _, PAGE, MADV_GUARD_INSTALL) == 0 }
}

/// True where guards cost no mappings.
pub(crate) fn by_madvise() -> bool {
    MEANS.load(Ordering::Relaxed) == MADVISE
}

/// Whether a new stack may be made: an error if the process would have too few mappings left. Then `malloc` goes on working,
/// and a running stack that must grow finds some. Not in the handler, which may use the last one.
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
    // Others take mappings, too: so they are counted again after half of what there is.
    LEFT.store((stacks / 2) as isize, Ordering::Relaxed);
    Ok(())
}

/// A stack has left its slot, and will take another one without asking [`leave_mappings`].
pub(crate) fn owe() {
    OWED.fetch_add(1, Ordering::Relaxed);
    LEFT.fetch_sub(1, Ordering::Relaxed);
}

/// It has taken it.
pub(crate) fn paid() {
    OWED.fetch_sub(1, Ordering::Relaxed);
}

/// How many mappings the process has, and how many it may have; `None` without `/proc`. System calls only.
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

/// Shows the text of a file to `each`, piece by piece. `None` if it cannot be read.
fn read(path: &core::ffi::CStr, mut each: impl FnMut(&[u8])) -> Option<()> {
    let mut piece = [0; 2048];
    // SAFETY: the path ends in a zero byte. The kernel writes no more than the length of `piece`. The descriptor was opened here,
    // so nobody else closes it.
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

/// Private address space of which nobody else knows yet. It is given back when this is dropped.
pub(super) struct Reserved {
    start: usize,
    bytes: usize,
}

impl Reserved {
    /// `bytes` of it, with this protection.
    pub(super) fn new(bytes: usize, protection: c_int) -> Result<Self, Error> {
        Self::near(0, bytes, protection)
    }

    /// As [`new`](Self::new): at `wanted`, if nothing is there.
    fn near(wanted: usize, bytes: usize, protection: c_int) -> Result<Self, Error> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: without `MAP_FIXED` a new mapping goes where nothing is.
        let at = unsafe { libc::mmap(wanted as *mut _, bytes, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(refused(RESERVING, bytes));
        }
        Ok(Self { start: at as usize, bytes })
    }

    /// Without access, at one of `places`, which are tried in turn: those below an address where that much is free.
    pub(super) fn at<I: Iterator<Item = usize>>(
        bytes: usize,
        places: impl FnOnce(usize) -> I,
    ) -> Result<Self, Error> {
        // The kernel fills its address space from the top: what lies below is free, or else some way further below.
        let free = Self::new(bytes, libc::PROT_NONE)?.start;
        for wanted in places(free).take(PLACES) {
            let found = Self::near(wanted, bytes, libc::PROT_NONE)?;
            if found.start == wanted {
                return Ok(found);
            }
        }
        Err(Error::Memory { doing: RESERVING, bytes, source: io::Error::from_raw_os_error(libc::ENOMEM) })
    }

    /// Without access, at a multiple of `align`.
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

    /// It stays reserved. Returns where it starts.
    pub(super) fn keep(self) -> usize {
        core::mem::ManuallyDrop::new(self).start
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.bytes != 0 {
            // SAFETY: this module reserved the range, and nobody else knows of it before `keep`.
            unsafe { unreserve(self.start, self.bytes) }
        }
    }
}

/// New private address space, `bytes` long, with this protection. It stays reserved.
pub(crate) fn reserve(bytes: usize, protection: c_int) -> Result<usize, Error> {
    Reserved::new(bytes, protection).map(Reserved::keep)
}

/// A number of this process. A child made by `fork` finds 0, whatever it was in the parent.
///
/// It lies on a page that the kernel gives a child as zeros. The page is made when it is first asked for, and never unmapped.
/// Callable in the fault handler: nobody waits for anybody.
pub(super) struct NotInherited(AtomicPtr<AtomicU64>);

impl NotInherited {
    pub(super) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    /// The number, if there is a page for it.
    pub(super) fn get(&self) -> Option<&'static AtomicU64> {
        // SAFETY: the pointer is null, or that of a page that is never unmapped; zeros are an `AtomicU64`.
        unsafe { self.0.load(Ordering::Acquire).as_ref() }
    }

    /// The number, 0 at first. `None` where the kernel has no such pages.
    pub(super) fn get_or_make(&self) -> Option<&'static AtomicU64> {
        if let Some(number) = self.get() {
            return Some(number);
        }
        let page = Reserved::new(PAGE, libc::PROT_READ | libc::PROT_WRITE).ok()?;
        // SAFETY: the page was reserved above, and nobody else knows of it.
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
/// The range came from [`reserve`] and nobody uses it any more.
pub(crate) unsafe fn unreserve(start: usize, bytes: usize) {
    // SAFETY: the range is a mapping of this crate's own, and no longer used.
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
    // SAFETY: the range is reserved address space without a stack: nothing relies on its being inaccessible.
    unsafe { check(libc::mprotect(start as *mut _, bytes, libc::PROT_READ | libc::PROT_WRITE), bytes) }
}

/// Makes guard markers of ranges, of which there are not very many, by one system call if the kernel allows it. Only where
/// guards are markers.
///
/// # Safety
/// As for [`make_usable`], which was called for the ranges. None of them is needed any more.
pub(crate) unsafe fn install(ranges: impl Iterator<Item = Range<usize>> + Clone) -> Result<(), Error> {
    let mut each = ranges.clone().filter(|range| !range.is_empty());
    // SAFETY: the ranges are usable, and what they hold is not needed: both calls only make guards of them.
    unsafe {
        if install_at_once(ranges) {
            return Ok(());
        }
        each.try_for_each(|range| close(range.start, range.len()))
    }
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
    // SAFETY: the list holds `count` ranges, and what they hold is not needed.
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
    // SAFETY: the range is whole pages of a slot that the caller owns, which nobody expects to fault any more.
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
/// As for [`open`]; the contents are lost unless there is an error.
pub(crate) unsafe fn close(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the range is whole pages of a slot that the caller owns, and what they hold is not needed.
    unsafe {
        if by_madvise() {
            match mark(start, bytes) {
                // Locked memory: the kernel installs no markers there.
                Err(Error::Memory { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                    LOCKED.store(true, Ordering::Relaxed);
                }
                other => return other,
            }
        } else if renew(start, bytes).is_ok() {
            return Ok(());
        }
        // In this order: after an error the contents are what they were.
        protect(start, bytes, region::Protection::NONE)?;
        discard(start, bytes);
    }
    Ok(())
}

/// Makes guard markers of pages. An error where memory is locked.
///
/// # Safety
/// As for [`close`]. Only where guards are markers.
pub(crate) unsafe fn mark(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the range is whole pages of a slot that the caller owns, and what they hold is not needed.
    unsafe { check(libc::madvise(start as *mut _, bytes, MADV_GUARD_INSTALL), bytes) }
}

/// Removes guard markers, and leaves the protection.
///
/// # Safety
/// As for [`open`]. Only where guards are markers.
pub(crate) unsafe fn unmark(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the range is whole pages of a slot that the caller owns; pages that are no guards stay as they are.
    unsafe { check(libc::madvise(start as *mut _, bytes, MADV_GUARD_REMOVE), bytes) }
}

/// By protection: takes back all accessible pages of a slot that nobody uses, with their mappings. True if it did.
///
/// # Safety
/// As for [`close`].
pub(crate) unsafe fn take_back(start: usize, bytes: usize) -> bool {
    // SAFETY: nobody uses the slot, so what the pages hold is not needed.
    let done = !by_madvise() && unsafe { renew(start, bytes) }.is_ok();
    if done {
        LEFT.fetch_add(1, Ordering::Relaxed);
    }
    done
}

/// Maps pages anew, without access: nothing keeps them from being one mapping with their neighbours.
///
/// # Safety
/// As for [`close`].
unsafe fn renew(start: usize, bytes: usize) -> Result<(), Error> {
    if bytes == 0 {
        return Ok(());
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the new mapping replaces whole pages of a slot that the caller owns, and what they hold is not needed.
    unsafe {
        let at = libc::mmap(start as *mut _, bytes, libc::PROT_NONE, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return Err(refused("mapping stack pages anew", bytes));
        }
        // As the arena is; mappings that differ in this stay two.
        libc::madvise(start as *mut _, bytes, libc::MADV_NOHUGEPAGE);
    }
    Ok(())
}

/// Takes the access to pages away, guards or not, and leaves their contents.
///
/// By protection they stay a mapping of their own, since they differ from the guards around them in whether they are dumped:
/// so [`allow`] needs no new one, of which there may be none.
///
/// # Safety
/// As for [`open`].
pub(crate) unsafe fn forbid(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the range is whole pages of a slot that the caller owns; what they hold stays.
    unsafe {
        if !by_madvise() {
            check(libc::madvise(start as *mut _, bytes, libc::MADV_DONTDUMP), bytes)?;
        }
        check(libc::mprotect(start as *mut _, bytes, libc::PROT_NONE), bytes)
    }
}

/// Undoes [`forbid`]: what is not a guard is accessible.
///
/// # Safety
/// As for [`open`].
pub(crate) unsafe fn allow(start: usize, bytes: usize) -> Result<(), Error> {
    // SAFETY: the range is whole pages of a slot that the caller owns; what they hold stays, and guard markers do, too.
    unsafe {
        check(libc::mprotect(start as *mut _, bytes, libc::PROT_READ | libc::PROT_WRITE), bytes)?;
        if !by_madvise() {
            libc::madvise(start as *mut _, bytes, libc::MADV_DODUMP);
        }
    }
    Ok(())
}

/// Gives the memory of accessible pages back; they read as zeros afterwards.
///
/// # Safety
/// As for [`open`]; the contents are lost.
pub(crate) unsafe fn discard(start: usize, bytes: usize) {
    // SAFETY: the range is whole pages of a slot that the caller owns, and what they hold is not needed. After an error the
    // memory stays, which harms nobody.
    unsafe {
        if libc::madvise(start as *mut _, bytes, libc::MADV_DONTNEED) != 0 {
            libc::madvise(start as *mut _, bytes, MADV_DONTNEED_LOCKED);
        }
    }
}

/// # Safety
/// As for [`open`].
unsafe fn protect(start: usize, bytes: usize, protection: region::Protection) -> Result<(), Error> {
    // SAFETY: the range is whole pages of a slot that the caller owns, and has decided about.
    match unsafe { region::protect(start as *const u8, bytes, protection) } {
        Ok(()) => Ok(()),
        Err(_) => Err(refused("protecting stack pages", bytes)),
    }
}

fn check(answer: c_int, bytes: usize) -> Result<(), Error> {
    if answer == 0 { Ok(()) } else { Err(refused("changing guard pages", bytes)) }
}

/// What the kernel's refusal just now is about: memory, or mappings if the process has no more.
fn refused(doing: &'static str, bytes: usize) -> Error {
    let source = io::Error::last_os_error();
    let is_about_mappings = source.raw_os_error() == Some(libc::ENOMEM)
        && mappings().is_some_and(|(used, most)| used + 4 >= most);
    if is_about_mappings { Error::Mappings { source } } else { Error::Memory { doing, bytes, source } }
}
