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
//! A [`Coroutine`] takes one page of memory: a record and the closure at the top, 2 KiB of
//! stack below them. [`resume`](Coroutine::resume) and [`suspend`](Yielder::suspend) exchange
//! stack pointers in a few inlined instructions. [`Growth`] says how the stack gets more room:
//!
//! - [`Growth::InPlace`], the default: the stack has a window of reserved address space, all of it
//!   accessible, with a guard below. The kernel adds memory page by page as code or a system call touches
//!   it. [`Builder::maximum`] sets the size of the window, [256 KiB](DEFAULT_MAXIMUM_IN_PLACE) by default.
//! - [`Growth::Relocate`]: a guard lies right below the 2 KiB. A call that goes too deep touches it and raises
//!   SIGSEGV. The handler, on a signal stack of the thread, copies the stack to a slot twice the size. It rewrites
//!   every word in frames and registers that pointed into the old slot, and makes the old slot inaccessible. Then the
//!   interrupted instruction runs again. No address space is reserved for the [maximum](DEFAULT_MAXIMUM_RELOCATE).
//!   [`Builder::relocating`] is unsafe: the caller promises that nothing outside the stack points into it.
//!
//! The slot of a coroutine that has ended is reused by the next one on
//! the same thread. [`trim`] gives unused slots back to the kernel.
//!
//! # What it takes from the process
//!
//! The first coroutine installs a handler for SIGSEGV and SIGBUS. The handler runs on an alternate signal
//! stack, which the first coroutine of each thread sets up ([`prepare_thread`]). It allocates nothing and
//! takes no lock. A library that contains this crate is never unloaded once the handler is installed.
//!
//! The first coroutine that may move does three more things. It adds `SA_ONSTACK` to the
//! existing handlers ([`keep_signals_off_coroutine_stacks`]). It reads the unwind tables of all
//! loaded code ([`map::record_loaded_objects`]). And it opens a `userfaultfd` descriptor for the
//! rest of the process: with it, moving stacks take their pages along, instead of being copied.
//!
//! A filter of system calls (seccomp) must allow `mmap`, `munmap`, `mprotect`, `madvise`,
//! `rt_sigaction`, `rt_sigprocmask`, `sigaltstack`, `sched_yield` and `clock_gettime`. It may
//! refuse, with an error but not by killing the process, `process_madvise`, `userfaultfd` with
//! its `ioctl`s, `process_vm_readv`, and `openat`, `pread64` and `pwrite64` of `/proc/self/mem`.
//!
//! # When something goes wrong
//!
//! [`Error`] says what to do when a coroutine cannot be created. The process ends with a report on standard
//! error when a stack exceeds its maximum, or when a pointer to a place that a stack has left is used. Other
//! faults go to the handler that was installed before. A panic comes out of [`resume`](Coroutine::resume).
//!
//! # Where to look
//!
//! | for | see |
//! | --- | --- |
//! | sizes, names, the way to grow | [`Builder`] |
//! | what a stack did, and why it did not move | [`Stats`], [`totals`], [`Coroutine::last_not_moved`], [`not_moved`] |
//! | a line for each move, refusal, freeze and thaw | the environment variable `REGROW_TRACE=moves` |
//! | code that must not be moved, or must not fault | [`pin()`], [`pin_code`], [`reserve`] |
//! | many parked coroutines | [`Coroutine::freeze`], [`Pool`] |
//! | the frames of a suspended coroutine | [`frames`]; files and lines with the feature `backtrace` |
//! | compilers and hand-written assembly | [`map`]; Cranelift's maps with the feature `cranelift` |
//! | does my code keep the promise? | the module `torture`, with the feature of that name |
//!
//! No feature is on by default.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!(
    "regrow is for x86-64 Linux: its switch, its fault handler and its guard pages are made for that"
);

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

mod builder;
mod context;
mod coroutine;
mod error;
pub mod frames;
mod freeze;
mod grow;
mod handler;
mod hooks;
pub mod map;
mod not_moved;
mod pin;
mod pool;
mod report;
mod reserve;
mod settings;
mod signals;
mod site;
mod size;
mod stack;
mod stats;
mod stderr;
mod switch;
mod symbol;
mod sync;
mod thread;
#[cfg(feature = "torture")]
pub mod torture;
mod trace;
mod words;

pub use builder::{Builder, DEFAULT_MAXIMUM_IN_PLACE, DEFAULT_MAXIMUM_RELOCATE, RawFunction};
pub use coroutine::{Coroutine, CoroutineResult, Yielder, current_stats};
pub use error::Error;
pub use frames::Frames;
pub use not_moved::{NotMoved, Reason, not_moved};
pub use pin::{Pinned, PinnedCode, pin, pin_code, pin_object, pinned_room};
pub use pool::{Key, Pool, PoolStats};
pub use reserve::reserve;
pub use settings::{Growth, Maps, Shrink};
pub use signals::{keep_signals_off_coroutine_stacks, signals_on_coroutine_stacks};
pub use site::{SpawnSite, spawn_sites};
pub use size::{MAX_SIZE, MIN_SIZE};
pub use stack::census::{Slots, slots};
pub use stats::{LastGrowth, Stats, Totals, WordsByMap, totals};
pub use thread::{cached_bytes, prepare_thread, trim};
