//! A count of all slots, by what they are in use for. For tests: it shows a slot that is lost, or on two lists.
//!
//! ```text
//!  arena   | slot | slot | slot | ...                     | fresh, never used ... |
//!            │      │      └ on neither list: has a stack, or is one that its stack has left (OLD)
//!            │      └ in this thread's stock (src/stack/stock.rs)
//!            └ on the free list of its class
//! ```

use core::sync::atomic::Ordering;

use super::arena::{self, Slot};
use super::stock;

/// How many slots are used for what; see [`slots`].
#[doc(hidden)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Slots {
    /// On the free lists.
    pub free: usize,
    /// In the stock of this thread.
    pub cached: usize,
    /// Left by a stack whose coroutine has not ended.
    pub old: usize,
    /// All others that were ever used: with a stack, frozen in place or not, or in the stock of another thread.
    pub in_use: usize,
    /// Found a second time on a list, or on two of them: 0 unless there is a bug.
    pub twice: usize,
}

/// Counts all slots of this process. Exact while no other thread makes, grows or ends coroutines.
///
/// ```standalone_crate
/// let before = regrow::slots();
/// let coroutine = regrow::Coroutine::<(), (), ()>::new(|_, ()| ());
/// assert_eq!(regrow::slots().in_use, before.in_use + 1);
/// drop(coroutine);
/// assert_eq!(regrow::slots().in_use, before.in_use);
/// ```
#[doc(hidden)]
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
