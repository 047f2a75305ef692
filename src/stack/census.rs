//! A census: how many slots of stack the process has, by what they are in use for.
//!
//! ```text
//!  arena   | slot | slot | slot | ...                     | fresh, never used ... |
//!            │      │      └ on neither list: has a stack, or is one that its stack has left (OLD)
//!            │      └ in this thread's stock (src/stack/stock.rs)
//!            └ on the free list of its class
//! ```
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering;

use super::arena::{self, Slot};
use super::stock;

/// How many slots of stack the process has, by what they are in use for; see [`slots`].
///
/// A slot is a stretch of address space for one stack. It is never given back to the kernel, only its memory is.
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
    /// Any thread may take them for a new stack.
    pub free: usize,
    /// This thread keeps them for its next coroutines; [`trim`](crate::trim) makes them free.
    pub cached: usize,
    /// A stack has moved away from them. They become free when its coroutine ends.
    pub old: usize,
    /// All others that were ever used: those that hold a stack, frozen in place or not, and those that another thread keeps.
    pub in_use: usize,
    /// A check of this crate on itself: slots that were found a second time, on one list or on two. It is 0, or there is a
    /// bug in this crate.
    pub twice: usize,
}

/// Counts all slots of this process: for a test that no coroutine is leaked, or to see what many coroutines take.
///
/// The counts are exact while no other thread makes, grows or ends coroutines. A census visits every slot, and allocates a
/// byte for each.
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

/// For each slot that was ever used, arena by arena: whether it was met.
struct Census(Vec<Vec<bool>>);

impl Census {
    fn new() -> Self {
        Self(arena::used().map(|slots| vec![false; slots]).collect())
    }

    /// True the first time. A slot that came into use just now counts as met.
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
