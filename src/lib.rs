//! Stackful coroutines whose stacks start at 2 KiB and grow when they run out: in place, or by moving.
//!
//! ```
//! use regrow::{Coroutine, CoroutineResult};
//!
//! let mut coroutine = Coroutine::new(|yielder, first: u32| {
//!     let second = yielder.suspend(first * 2);
//!     first + second
//! });
//! assert_eq!(coroutine.resume(10), CoroutineResult::Yield(20));
//! assert_eq!(coroutine.resume(5), CoroutineResult::Return(15));
//! ```
//!
//! # The life of a stack
//!
//! A [`Coroutine`] is a page of memory: at its top a record and the closure, below them 2 KiB of stack, below
//! that a guard. [`resume`](Coroutine::resume) and [`suspend`](Yielder::suspend) exchange stack pointers,
//! a few inlined instructions. A call too deep touches the guard: SIGSEGV, handled on a stack of
//! the thread's own. What the handler does is the coroutine's [`Growth`]:
//!
//! - [`Growth::InPlace`], the default: it opens guard pages below, inside a window reserved for this stack.
//!   Safe for any code. A builder's [`maximum`](Builder::maximum) sets the window.
//! - [`Growth::Relocate`]: it copies the stack to a slot twice the size, rewrites every word in frames and
//!   registers that pointed into the old one, and makes the old one inaccessible. Nothing needs to be
//!   reserved. [`Builder::relocating`] is unsafe: it takes a promise that
//!   nothing outside the stack points into it.
//!
//! Then the interrupted instruction runs again and never knows. When the coroutine ends its slot is reused by
//! the next one on the same thread.
//!
//! # When something goes wrong
//!
//! [`Error`] says what to do when a coroutine cannot be created. A stack at its maximum, and a pointer to where
//! a stack no longer is, end the process with a report on standard error. Any other fault goes to
//! the handler that was there before.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!(
    "regrow is for x86-64 Linux: its switch, its fault handler and its guard pages are made for that"
);

mod builder;
mod coroutine;
mod error;
pub mod frames;
mod grow;
pub mod map;
mod pin;
mod pool;
mod report;
mod site;
mod stack;
mod stats;
mod switch;
mod symbol;
mod thread;
#[cfg(feature = "torture")]
pub mod torture;

pub use builder::{Builder, DEFAULT_MAXIMUM_IN_PLACE, DEFAULT_MAXIMUM_RELOCATE, RawFunction};
pub use coroutine::{Coroutine, CoroutineResult, Yielder, current_stats};
pub use error::Error;
pub use frames::Frames;
pub use grow::{Maps, NotMoved, Reason, Shrink, not_moved, reserve};
pub use pin::{Pinned, PinnedCode, pin, pin_code, pin_object, pinned_room};
pub use pool::{Key, Pool, PoolStats};
pub use site::{SpawnSite, spawn_sites};
pub use stack::class::{MAX_SIZE, MIN_SIZE};
#[doc(hidden)]
pub use stack::{Slots, slots};
pub use stats::{Growth, LastGrowth, Stats, Totals, WordsByMap, totals};
pub use thread::{cached_bytes, prepare_thread, signals_on_coroutine_stacks, trim};
