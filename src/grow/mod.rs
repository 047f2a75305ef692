//! Growth of stacks that move, and shrinking of all stacks.
//!
//! A stack that moves runs into its guard page. The fault handler (src/handler/) examines the instruction
//! ([`point`]) and makes the stack larger ([`overflow`]): it moves ([`relocate`]), and its words are
//! rewritten ([`rewrite`]) according to the maps of their frames ([`obey`]). A stack that grows in place
//! needs none of this: its whole window is accessible, and the kernel adds memory as it is touched.
//!
//! Invariants, at every instruction of the interrupted program:
//! 1. A slot belongs to at most one coroutine, as its stack or as one of its old slots.
//! 2. `record.open` bytes below a live slot's end are accessible, and guards lie below them (src/stack/pages.rs).
//! 3. No byte of an old slot is accessible.
//! 4. A stack moves only at a growth point, and only if its owner allowed it.

pub(crate) mod growth;
pub(crate) mod obey;
pub(crate) mod overflow;
pub(crate) mod point;
pub(crate) mod relocate;
pub(crate) mod rewrite;
mod scratch;
pub(crate) mod shrink;
