//! Stackful coroutines whose stacks start at 2 KiB and grow, by moving if you let them.
#![warn(missing_docs)]

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("regrow is for x86-64 Linux: its switch, its fault handler and its guard pages are made for that");

mod builder;
mod coroutine;
mod error;
mod grow;
pub mod map;
mod report;
mod stack;
mod stats;
mod switch;
mod symbol;
mod thread;

pub use builder::{Builder, DEFAULT_MAXIMUM_IN_PLACE, DEFAULT_MAXIMUM_RELOCATE};
pub use coroutine::{Coroutine, CoroutineResult, Yielder, current_stats};
pub use error::Error;
pub use stack::class::{MAX_SIZE, MIN_SIZE};
pub use stats::{Growth, LastGrowth, Stats, Totals, totals};
pub use thread::{prepare_thread, signals_on_coroutine_stacks};
