//! Carrying pages: memory goes from one place to another by changes of the page table, not by copying.
//!
//! ```text
//!   from  | page | page | nothing | page |   ──►   | nothing ...                  |
//!   to    | nothing ...                  |         | page | page | nothing | page |
//! ```
//!
//! `userfaultfd` can (`UFFDIO_MOVE`, Linux 6.8); `mremap` can too, but leaves mappings that never merge with their neighbours
//! again. Arenas of moving stacks are registered with one descriptor, which is opened with the first of them and stays: to
//! open one for each use takes 10 µs. They are registered for write protection, of which no use is made, so nothing else about
//! them changes.
//!
//! After a `fork` the descriptor still stands for the memory of the parent: the kernel refuses to carry there, but would
//! register. So a child does not inherit its number, and copies. System calls only, as the fault handler needs it.

use core::ffi::{c_int, c_ulong};
use core::sync::atomic::{AtomicBool, Ordering};

use super::guard::{self, NotInherited};

/// This process's own accesses only: needs no privilege.
const UFFD_USER_MODE_ONLY: c_int = 1;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MOVE: u64 = 1 << 16;
const REGISTER_MODE_WP: u64 = 2;
const MOVE_MODE_ALLOW_SRC_HOLES: u64 = 2;

const UFFDIO_API: c_ulong = request::<Api>(READ | WRITE, 0x3f);
const UFFDIO_REGISTER: c_ulong = request::<Register>(READ | WRITE, 0x00);
const UFFDIO_MOVE: c_ulong = request::<Move>(READ | WRITE, 0x05);

const WRITE: c_ulong = 1;
const READ: c_ulong = 2;

/// The number of an `ioctl` of userfaultfd, whose argument is a `T`.
const fn request<T>(direction: c_ulong, number: c_ulong) -> c_ulong {
    direction << 30 | (size_of::<T>() as c_ulong) << 16 | 0xaa << 8 | number
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Move {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    /// Set by the kernel: bytes that were carried, or minus an error number.
    moved: i64,
}

/// The descriptor's number plus one; 0 or no number where there is none: before it is opened, after a fork, or where the
/// kernel has nothing of the kind.
static DESCRIPTOR: NotInherited = NotInherited::new();

/// It was asked for, in this process or in one that this was forked from.
static ASKED: AtomicBool = AtomicBool::new(false);

/// Registers an arena: pages may be carried to it. Without effect where the kernel does not have that.
///
/// # Safety
/// The range is page-aligned memory that was reserved by the caller, and holds no stack yet.
pub(crate) unsafe fn register(start: usize, bytes: usize) {
    // Who comes second while the first one opens it has an arena whose stacks are copied to; so has a handler that
    // interrupts this.
    if !ASKED.swap(true, Ordering::Relaxed) && guard::by_madvise() {
        open();
    }
    let Some(file) = descriptor() else { return };
    let mut range = Register { start: start as u64, length: bytes as u64, mode: REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: the request gets the argument it expects, and no stack is in the range yet. After an error stacks are copied there.
    unsafe { libc::ioctl(file, UFFDIO_REGISTER, &mut range) };
}

/// Opens the descriptor, if the kernel can carry pages.
fn open() {
    let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_MOVE, ioctls: 0 };
    // SAFETY: the request gets the argument it expects. The descriptor is opened here, and closed unless its number is kept.
    unsafe {
        let file = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) as c_int;
        if file < 0 {
            return;
        }
        match DESCRIPTOR.get_or_make() {
            Some(number) if libc::ioctl(file, UFFDIO_API, &mut api) == 0 => {
                number.store(file as u64 + 1, Ordering::Relaxed);
            }
            _ => {
                libc::close(file);
            }
        }
    }
}

fn descriptor() -> Option<c_int> {
    let file = DESCRIPTOR.get()?.load(Ordering::Relaxed).checked_sub(1)?;
    c_int::try_from(file).ok()
}

/// True if [`carry`] is worth a try.
pub(crate) fn is_possible() -> bool {
    descriptor().is_some()
}

/// Carries pages from one place in registered arenas to another, where none are. Returns how many bytes from the beginning on
/// are there now, and left nothing behind: all, or fewer where the kernel does not have this, or a page is shared or otherwise
/// held.
///
/// # Safety
/// Both ranges are page-aligned private memory that nobody else uses, and do not overlap.
pub(crate) unsafe fn carry(from: usize, to: usize, bytes: usize) -> usize {
    let Some(file) = descriptor() else { return 0 };
    let mut carried = Move {
        to: to as u64,
        from: from as u64,
        length: bytes as u64,
        mode: MOVE_MODE_ALLOW_SRC_HOLES,
        moved: 0,
    };
    // SAFETY: the request gets the argument it expects, and nobody else uses the pages of either range. Should somebody have
    // closed the descriptor, and another have taken its number, then the arenas are not registered with that, and the kernel
    // refuses.
    unsafe { libc::ioctl(file, UFFDIO_MOVE, &mut carried) };
    usize::try_from(carried.moved).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::PAGE;
    use std::sync::OnceLock;

    fn has_descriptor() -> bool {
        static HAS: OnceLock<bool> = OnceLock::new();
        *HAS.get_or_init(|| {
            guard::detect();
            let page = guard::reserve(PAGE, libc::PROT_NONE).unwrap();
            // SAFETY: the page was reserved above, and is never used.
            unsafe { register(page, PAGE) };
            is_possible()
        })
    }

    #[test]
    fn pages_are_carried_holes_and_all_or_left_alone() {
        const PAGES: usize = 64;
        if !has_descriptor() {
            return eprintln!("skipped: this kernel does not carry pages");
        }
        let map = || guard::reserve(PAGES * PAGE, libc::PROT_READ | libc::PROT_WRITE).unwrap();
        let (from, to) = (map(), map());
        let byte = |start: usize, page: usize| (start + page * PAGE + 5) as *mut u8;
        let is_hole = |page| (10..20).contains(&page);
        // SAFETY: two stretches of memory, mapped above and known to nobody else.
        unsafe {
            register(from, PAGES * PAGE);
            register(to, PAGES * PAGE);
            (0..PAGES).filter(|&page| !is_hole(page)).for_each(|page| *byte(from, page) = page as u8 + 1);
            assert_eq!(carry(from, to, PAGES * PAGE), PAGES * PAGE);
            for page in 0..PAGES {
                assert_eq!(*byte(to, page), if is_hole(page) { 0 } else { page as u8 + 1 });
                assert_eq!(*byte(from, page), 0, "page {page} was left behind");
            }
            // Where something is already nothing goes.
            assert_eq!(carry(to, from, PAGES * PAGE), 0);
            assert_eq!(*byte(to, 3), 4);
            guard::unreserve(from, PAGES * PAGE);
            guard::unreserve(to, PAGES * PAGE);
        }
    }

    #[test]
    fn the_descriptor_is_not_a_childs() {
        if !has_descriptor() {
            return eprintln!("skipped: this kernel does not carry pages");
        }
        let mut status = -1;
        // SAFETY: the child calls nothing that another thread might have been in.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(is_possible().into());
            }
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
        }
        assert!(is_possible() && status == 0);
    }
}
