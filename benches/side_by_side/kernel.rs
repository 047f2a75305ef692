//! The kernel's share of a growth: the same faults, system calls and first touches of pages as ours, and nothing else.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const GUARD_INSTALL: c_int = 102;
const GUARD_REMOVE: c_int = 103;

/// Bytes that are accessible at sizes from 2 to 64 KiB, each twice the last.
const OPEN: [usize; 6] = [PAGE, 2 * PAGE, 3 * PAGE, 5 * PAGE, 9 * PAGE, 17 * PAGE];

/// A stretch of memory, each page of which can be guarded.
pub struct Prices {
    slots: [usize; OPEN.len()],
}

thread_local! {
    /// What the next fault opens: start and length.
    static NEXT: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
    static OTHERS: Cell<(usize, usize, usize, usize)> = const { Cell::new((0, 0, 0, 0)) };
}

fn advise(start: usize, bytes: usize, advice: c_int) {
    // SAFETY: callers pass stretches of the mapping made by `Prices::new`.
    let answer = unsafe { libc::madvise(start as *mut c_void, bytes, advice) };
    assert_eq!(answer, 0, "guard pages by madvise: Linux 6.13");
}

fn touch(from: usize, to: usize) {
    compiler_fence(Ordering::SeqCst); // the handler reads what was just set
    for page in (from..to).step_by(PAGE).rev() {
        // SAFETY: in the mapping of `Prices::new`; where it is guarded, the handler opens it.
        unsafe { (page as *mut u8).write_volatile(1) };
    }
}

extern "C" fn on_fault(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let (start, bytes) = NEXT.get();
    // SAFETY: a stretch of our own mapping.
    unsafe { libc::madvise(start as *mut c_void, bytes, GUARD_REMOVE) };
    let (open, open_bytes, close, close_bytes) = OTHERS.get();
    if close_bytes != 0 {
        // SAFETY: the same.
        unsafe { libc::madvise(open as *mut c_void, open_bytes, GUARD_REMOVE) };
        touch(open + open_bytes - close_bytes, open + open_bytes);
        // SAFETY: the same.
        unsafe { libc::madvise(close as *mut c_void, close_bytes, GUARD_INSTALL) };
    }
}

impl Prices {
    const SLOT: usize = 128 << 10;

    pub fn new() -> Self {
        let bytes = Self::SLOT * OPEN.len();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes. It stays as long as the process.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, access, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: that mapping.
        unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) };
        advise(start as usize, bytes, GUARD_INSTALL);
        let end = |slot: usize| start as usize + (slot + 1) * Self::SLOT;
        let prices = Self { slots: std::array::from_fn(end) };
        // The first page of a stack, and the largest slot, are warm.
        for (end, bytes) in [(prices.slots[0], OPEN[0]), (prices.slots[5], OPEN[5])] {
            advise(end - bytes, bytes, GUARD_REMOVE);
            touch(end - bytes, end);
        }
        prices
    }

    /// Five faults, each of which opens a slot, touches what would be copied, and closes the slot before.
    pub fn grow_by_moving(&self) {
        for size in 1..OPEN.len() {
            let (from, to) = (self.slots[size - 1], self.slots[size]);
            let fault = from - OPEN[size - 1] - PAGE;
            NEXT.set((fault, PAGE));
            OTHERS.set((to - OPEN[size], OPEN[size], from - OPEN[size - 1], OPEN[size - 1]));
            touch(fault, fault + PAGE);
            advise(fault, PAGE, GUARD_INSTALL);
            touch(to - OPEN[size], to - OPEN[size - 1]);
        }
        advise(self.slots[0] - OPEN[0], OPEN[0], GUARD_REMOVE);
        touch(self.slots[0] - OPEN[0], self.slots[0]);
    }
}

/// How long it takes to copy `bytes`, just written, to memory that nobody used before, and to close where they were.
pub fn copied(bytes: usize) -> Duration {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping where the kernel likes, given back below.
    let start = unsafe { libc::mmap(ptr::null_mut(), 2 * bytes, access, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    // SAFETY: that mapping.
    unsafe { libc::madvise(start, 2 * bytes, libc::MADV_NOHUGEPAGE) };
    let (from, to) = (start as usize, start as usize + bytes);
    touch(from, to);
    let before = Instant::now();
    // SAFETY: both halves of the mapping.
    unsafe { ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
    advise(from, bytes, GUARD_INSTALL);
    let time = before.elapsed();
    // SAFETY: the mapping, which nobody else knows of.
    unsafe { libc::munmap(start, 2 * bytes) };
    time
}

/// Runs `f` while faults go to the handler here.
pub fn with_handler(_: &Prices, f: impl FnOnce() -> Duration) -> Duration {
    // SAFETY: plain data for system calls. What is there now is put back; meanwhile no coroutine runs.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = on_fault as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut ours.sa_mask);
        libc::sigaction(libc::SIGSEGV, &ours, &mut before);
        let time = f();
        libc::sigaction(libc::SIGSEGV, &before, ptr::null_mut());
        time
    }
}
