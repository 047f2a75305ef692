//! Carrying pages: moving memory by changing the page table, without copying.
//!
//! ```text
//!   from  | page | page | nothing | page |   ──►   | nothing ...                  |
//!   to    | nothing ...                  |         | page | page | nothing | page |
//! ```
//!
//! `userfaultfd` can do this (`UFFDIO_MOVE`, Linux 6.8). `mremap` can too, but its mappings never merge with their
//! neighbours again. Arenas of moving stacks are registered with one descriptor. It is opened with the first arena and
//! stays open, because opening takes 10 µs. The registration is for write protection, which is never used, so it changes
//! nothing else.
//!
//! After a `fork` the descriptor still refers to the parent's memory. The kernel would refuse to carry there, but would
//! register. So a child does not inherit the descriptor's number, and copies. The fault handler uses this module, so it
//! makes only system calls.

use core::ffi::{c_int, c_ulong};
use core::sync::atomic::{AtomicBool, Ordering};

use super::guard::{self, NotInherited};

/// Handles only this process's own accesses, which needs no privilege.
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

/// The number of a userfaultfd `ioctl` with an argument of type `T`.
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
    /// Set by the kernel: the number of bytes carried, or a negated error number.
    moved: i64,
}

/// The descriptor's number plus one. Without a descriptor it is 0 or missing: before the descriptor is opened, after a
/// fork, or if the kernel cannot carry.
static DESCRIPTOR: NotInherited = NotInherited::new();

/// The descriptor was requested, in this process or in one that it was forked from.
static ASKED: AtomicBool = AtomicBool::new(false);

/// Registers an arena, so that pages can be carried to it. No effect if the kernel cannot carry.
///
/// # Safety
/// The range is page-aligned memory that the caller reserved, and holds no stack yet.
pub(crate) unsafe fn register(start: usize, bytes: usize) {
    // If two threads (or this code and a handler) race here, the loser's arena is not registered and its stacks are
    // copied instead.
    if !ASKED.swap(true, Ordering::Relaxed) && guard::by_madvise() {
        open();
    }
    let Some(file) = descriptor() else { return };
    let mut range = Register { start: start as u64, length: bytes as u64, mode: REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: the request gets the argument it expects, and the range holds no stack yet. After an error its stacks are
    // copied.
    unsafe { libc::ioctl(file, UFFDIO_REGISTER, &mut range) };
}

/// Opens the descriptor, if the kernel can carry pages.
fn open() {
    let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_MOVE, ioctls: 0 };
    // SAFETY: the request gets the argument it expects. The descriptor is opened here, and closed unless its number is
    // kept.
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

/// True if [`carry`] is worth trying.
pub(crate) fn is_possible() -> bool {
    descriptor().is_some()
}

/// Carries pages between two places in registered arenas; the destination has no pages. Returns how many bytes from the
/// start on were carried, leaving nothing behind. These are fewer than `bytes` if the kernel cannot carry or a page is
/// shared or otherwise held.
///
/// # Safety
/// Both ranges are page-aligned private memory that no other code uses, and do not overlap.
pub(crate) unsafe fn carry(from: usize, to: usize, bytes: usize) -> usize {
    let Some(file) = descriptor() else { return 0 };
    let mut carried = Move {
        to: to as u64,
        from: from as u64,
        length: bytes as u64,
        mode: MOVE_MODE_ALLOW_SRC_HOLES,
        moved: 0,
    };
    // SAFETY: the request gets the argument it expects, and no other code uses the pages. If the descriptor was closed
    // and its number reused, the arenas are not registered with it, and the kernel refuses.
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
        // SAFETY: both stretches of memory were mapped above, and no other code knows of them.
        unsafe {
            register(from, PAGES * PAGE);
            register(to, PAGES * PAGE);
            (0..PAGES).filter(|&page| !is_hole(page)).for_each(|page| *byte(from, page) = page as u8 + 1);
            assert_eq!(carry(from, to, PAGES * PAGE), PAGES * PAGE);
            for page in 0..PAGES {
                assert_eq!(*byte(to, page), if is_hole(page) { 0 } else { page as u8 + 1 });
                assert_eq!(*byte(from, page), 0, "page {page} was left behind");
            }
            // The kernel carries nothing onto existing pages.
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
        // SAFETY: the child calls nothing that another thread could have been running.
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
