//! A buffer in which a stack is rewritten, before its pages are carried to the new slot.
//!
//! The kernel's first touch of a new page costs three times as much as copying and rewriting it.
//! A stack that moves leaves as many pages behind, so these are reused (src/stack/carry.rs):
//!
//! ```text
//!   old slot ── copied ──► scratch, rewritten there
//!      │                      │
//!      └─ pages carried ──► new slot ◄─ copied
//! ```
//!
//! The scratch is kept, so its pages are warm. There is one: a move that finds it in use writes to new memory.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::size::open_bytes;
use crate::stack::{carry, guard};

/// The scratch's size, and the most memory that it keeps. A larger stack writes to new memory, too.
const MOST: usize = open_bytes(4 << 20);

static IN_USE: AtomicBool = AtomicBool::new(false);

/// The scratch's address; 0: not mapped yet.
static START: AtomicUsize = AtomicUsize::new(0);

/// The scratch, taken until it is dropped.
pub(crate) struct Scratch {
    start: usize,
}

impl Scratch {
    /// Takes it for a stack of so many bytes. `None` if it would not help or is not available.
    pub(crate) fn take(bytes: usize) -> Option<Self> {
        if bytes > MOST || !carry::is_possible() || IN_USE.swap(true, Ordering::Acquire) {
            return None;
        }
        let mut scratch = Self { start: START.load(Ordering::Relaxed) };
        if scratch.start == 0 {
            scratch.start = guard::reserve(MOST, libc::PROT_READ | libc::PROT_WRITE).ok()?;
            START.store(scratch.start, Ordering::Relaxed);
        }
        Some(scratch)
    }

    /// Its first byte, of [`MOST`].
    pub(crate) fn start(&self) -> usize {
        self.start
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        IN_USE.store(false, Ordering::Release);
    }
}
