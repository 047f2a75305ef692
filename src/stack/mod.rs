//! Stacks: guard pages, arenas of slots, the head of a slot, each thread's stock of free ones.
//!
//! From the top down: the end of a coroutine ([`release`]), the slots that a thread keeps ([`stock`]), the head of a
//! slot ([`record`]), where slots are ([`arena`]), and which of their pages are accessible ([`pages`], [`guard`]).

pub(crate) mod arena;
pub(crate) mod carry;
pub(crate) mod census;
pub(crate) mod custody;
pub(crate) mod free_list;
pub(crate) mod guard;
pub(crate) mod own_memory;
pub(crate) mod pages;
pub(crate) mod record;
pub(crate) mod release;
pub(crate) mod scouts;
pub(crate) mod stock;
pub(crate) mod suspended;
pub(crate) mod watch;
