//! Growth of stacks that move, and shrinking of all.
//!
//! A stack that moves runs into its guard page, the fault handler (src/handler/) looks at the instruction ([`point`]), and the
//! stack becomes larger ([`overflow`]): it moves ([`relocate`]), its words rewritten ([`rewrite`]) as their frames' maps say
//! ([`obey`]). One that grows in place needs none of this: all of its window is accessible, and the kernel gives it memory as it
//! is touched.
//!
//! Invariants, at every instruction of the interrupted program:
//! 1. A slot belongs to one coroutine, as its stack or as one of its old slots, or to nobody.
//! 2. `record.open` bytes below a live slot's end are accessible, and guards are below them (src/stack/pages.rs).
//! 3. Of an old slot nothing is accessible.
//! 4. A stack moves only at a growth point, and only if its owner allowed it.

pub(crate) mod growth;
pub(crate) mod obey;
pub(crate) mod overflow;
pub(crate) mod point;
pub(crate) mod relocate;
pub(crate) mod rewrite;
mod scratch;
pub(crate) mod shrink;
