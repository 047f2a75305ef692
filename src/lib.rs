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
//! A [`Coroutine`] is a page of memory: at its top a record and the closure, below them 2 KiB of stack.
//! [`resume`](Coroutine::resume) and [`suspend`](Yielder::suspend) exchange stack pointers, a few inlined instructions.
//! How the stack gets more room is the coroutine's [`Growth`]:
//!
//! - [`Growth::InPlace`], the default: a window of address space is reserved for this stack, all of it accessible. The kernel
//!   gives it memory page by page as it is touched, by code or by the kernel itself. A builder's
//!   [`maximum`](Builder::maximum) sets the window; it is [256 KiB](DEFAULT_MAXIMUM_IN_PLACE) otherwise. Below it is a guard.
//! - [`Growth::Relocate`]: below the 2 KiB is a guard. A call too deep touches it: SIGSEGV, handled on a stack of the thread's
//!   own. The handler copies the stack to a slot twice the size, rewrites every word in frames and
//!   registers that pointed into the old one, and makes the old one inaccessible. Then the interrupted instruction runs again
//!   and never knows. Nothing needs to be reserved for the [maximum](DEFAULT_MAXIMUM_RELOCATE). [`Builder::relocating`] is
//!   unsafe: it takes a promise that nothing outside the stack points into it.
//!
//! When the coroutine ends its slot is reused by
//! the next one on the same thread; [`trim`] gives what is kept for that back to the kernel.
//!
//! # What it takes from the process
//!
//! The first coroutine installs a handler for SIGSEGV and SIGBUS, once; the first of each thread replaces the thread's alternate
//! signal stack, where that handler runs ([`prepare_thread`]). The handler allocates nothing and takes no lock. A library that holds this
//! crate is never unloaded from then on. The first coroutine
//! that may move adds `SA_ONSTACK` to the handlers that exist ([`keep_signals_off_coroutine_stacks`]), reads the unwind tables of all that is loaded ([`map::record_loaded_objects`]), and opens a descriptor of
//! `userfaultfd`, which stays open: by it moving stacks take their pages along. Without it they are copied.
//!
//! For a filter of system calls (seccomp): `mmap`, `munmap`, `mprotect`, `madvise`, `rt_sigaction`, `rt_sigprocmask`, `sigaltstack`,
//! `sched_yield` and `clock_gettime` are needed; `process_madvise`, `userfaultfd` with its `ioctl`s, `process_vm_readv`, and
//! `openat`, `pread64` and `pwrite64` of `/proc/self/mem`, may be refused with an error, but not kill the process.
//!
//! # When something goes wrong
//!
//! [`Error`] says what to do when a coroutine cannot be created. A stack at its maximum, and a pointer to where
//! a stack no longer is, end the process with a report on standard error. Any other fault goes to
//! the handler that was there before. A panic comes out of [`resume`](Coroutine::resume).
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
