//! A census: the number of stack slots in the process, by use.
//!
//! ```text
//!  arena   | slot | slot | slot | ...                     | fresh, never used ... |
//!            │      │      └ on no list: has a stack, or its stack has left (OLD)
//!            │      └ in this thread's stock (src/stack/stock.rs)
//!            └ on the free list of its class
//! ```
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering;

use super::arena::{self, Slot};
use super::stock;

/// The number of stack slots in the process, by use; see [`slots`].
///
/// A slot is address space for one stack. Only its memory is given back to the kernel, never the slot itself.
///
/// ```
/// use regrow::Slots;
/// let coroutine = regrow::Coroutine::<(), (), ()>::new(|_, ()| ());
/// drop(coroutine);
/// // Its slot waits on this thread for the next coroutine, or lies on a list that all threads take from.
/// let Slots { cached, .. } = regrow::slots();
/// assert!(cached > 0);
/// regrow::trim();
/// let Slots { free, cached, .. } = regrow::slots();
/// assert!(free > 0 && cached == 0);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Slots {
    /// Any thread may take these for a new stack.
    pub free: usize,
    /// This thread keeps these for its next coroutines. [`trim`](crate::trim) makes them free.
    pub cached: usize,
    /// A stack has moved away from these. They become free when its coroutine ends.
    pub old: usize,
    /// All other slots ever used: they hold a stack, frozen in place or not, or another thread keeps them.
    pub in_use: usize,
    /// A self-check: slots found more than once on the lists. Any value but 0 is a bug in this crate.
    pub twice: usize,
}

/// Counts all slots of this process. This can test that no coroutine leaks, or show how much many coroutines take.
///
/// The counts are exact while no other thread makes, grows or ends coroutines. A census visits every slot and allocates
/// one byte for each.
///
/// ```standalone_crate
/// let before = regrow::slots();
/// let coroutine = regrow::Coroutine::<(), (), ()>::new(|_, ()| ());
/// assert_eq!(regrow::slots().in_use, before.in_use + 1);
/// drop(coroutine);
/// let after = regrow::slots();
/// assert_eq!((after.in_use, after.twice), (before.in_use, 0));
/// ```
#[must_use]
pub fn slots() -> Slots {
    let mut census = Census::new();
    let mut slots = Slots::default();
    for mut link in arena::newest_free() {
        while let Some(slot) = Slot::from_link(link) {
            if !census.meet(slot) {
                slots.twice += 1;
                break; // from here on the list is a ring
            }
            slots.free += 1;
            link = slot.meta().next.load(Ordering::Acquire);
        }
    }
    stock::visit(|slot| {
        let first_time = census.meet(slot);
        *(if first_time { &mut slots.cached } else { &mut slots.twice }) += 1;
        first_time
    });
    for slot in census.unmet() {
        *(if slot.is_old() { &mut slots.old } else { &mut slots.in_use }) += 1;
    }
    slots
}

/// For each slot ever used, by arena: whether it was met.
struct Census(Vec<Vec<bool>>);

impl Census {
    fn new() -> Self {
        Self(arena::used().map(|slots| vec![false; slots]).collect())
    }

    /// True the first time. A slot first used during the census counts as met.
    fn meet(&mut self, slot: Slot) -> bool {
        let (arena, index) = slot.numbers();
        let met = self.0.get_mut(arena).and_then(|arena| arena.get_mut(index));
        met.is_none_or(|met| !core::mem::replace(met, true))
    }

    fn unmet(&self) -> impl Iterator<Item = Slot> {
        let arenas = self.0.iter().enumerate();
        let all = arenas.flat_map(|(arena, slots)| {
            let unmet = slots.iter().enumerate().filter(|(_, met)| !**met);
            unmet.map(move |(index, _)| Slot::of(arena, index))
        });
        all.filter(|slot| !slot.is_left_out())
    }
}
