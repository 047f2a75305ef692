//! Carrying pages: memory goes from one place to another by changes of the page table, not by copying.
//!
//! ```text
//!   from  | page | page | nothing | page |   ──►   | nothing ...                  |
//!   to    | nothing ...                  |         | page | page | nothing | page |
//! ```
//!
//! `userfaultfd` can (`UFFDIO_MOVE`, Linux 6.8); `mremap` can too, but leaves mappings that never merge with their neighbours
//! again. The place where the pages go is registered with the descriptor for as long as that takes.
//!
//! The descriptor is opened for each use, which takes 10 µs: one that is kept would, after a `fork`, carry the parent's
//! memory. System calls only, as the fault handler needs it.

use core::ffi::{c_int, c_ulong};

/// This process's own accesses only: needs no privilege.
const UFFD_USER_MODE_ONLY: c_int = 1;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MOVE: u64 = 1 << 16;
const REGISTER_MODE_MISSING: u64 = 1;
const MOVE_MODE_ALLOW_SRC_HOLES: u64 = 2;

const UFFDIO_API: c_ulong = request::<Api>(READ | WRITE, 0x3f);
const UFFDIO_REGISTER: c_ulong = request::<Register>(READ | WRITE, 0x00);
const UFFDIO_UNREGISTER: c_ulong = request::<Range>(READ, 0x01);
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
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    length: u64,
}

#[repr(C)]
struct Register {
    range: Range,
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

/// Carries pages from one place to another, where none are. Returns how many bytes from the beginning on are there now, and
/// left nothing behind: all, or fewer where the kernel does not have this, or a page is shared or otherwise held.
///
/// # Safety
/// Both ranges are page-aligned private memory that nobody else uses, and do not overlap.
pub(crate) unsafe fn carry(from: usize, to: usize, bytes: usize) -> usize {
    // SAFETY: opens a descriptor, which is ours until it is closed.
    unsafe {
        let file = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) as c_int;
        if file < 0 {
            return 0;
        }
        let moved = carry_by(file, from, to, bytes);
        libc::close(file);
        moved
    }
}

/// # Safety
/// As for [`carry`]; `file` is a new descriptor of userfaultfd.
unsafe fn carry_by(file: c_int, from: usize, to: usize, bytes: usize) -> usize {
    let (from, range) = (from as u64, Range { start: to as u64, length: bytes as u64 });
    let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_MOVE, ioctls: 0 };
    let mut register = Register { range, mode: REGISTER_MODE_MISSING, ioctls: 0 };
    let mut carried =
        Move { to: range.start, from, length: range.length, mode: MOVE_MODE_ALLOW_SRC_HOLES, moved: 0 };
    // SAFETY: each request gets the argument it expects; by the caller's word nobody waits for these pages.
    unsafe {
        if libc::ioctl(file, UFFDIO_API, &mut api) != 0
            || libc::ioctl(file, UFFDIO_REGISTER, &mut register) != 0
        {
            return 0;
        }
        libc::ioctl(file, UFFDIO_MOVE, &mut carried);
        libc::ioctl(file, UFFDIO_UNREGISTER, &range); // or when it is closed
    }
    usize::try_from(carried.moved).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stack::class::PAGE;
    use crate::stack::guard;

    #[test]
    fn pages_are_carried_holes_and_all_or_left_alone() {
        const PAGES: usize = 64;
        let map = || guard::reserve(PAGES * PAGE, libc::PROT_READ | libc::PROT_WRITE).unwrap();
        let (from, to) = (map(), map());
        let byte = |start: usize, page: usize| (start + page * PAGE + 5) as *mut u8;
        let is_hole = |page| (10..20).contains(&page);
        // SAFETY: two stretches of memory, mapped above and known to nobody else.
        unsafe {
            (0..PAGES).filter(|&page| !is_hole(page)).for_each(|page| *byte(from, page) = page as u8 + 1);
            let carried = carry(from, to, PAGES * PAGE);
            if carried == 0 {
                return eprintln!("skipped: this kernel does not carry pages");
            }
            assert_eq!(carried, PAGES * PAGE);
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
}
