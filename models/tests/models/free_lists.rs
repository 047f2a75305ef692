//! Free lists of slots: src/stack/free_list.rs.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::thread;

use crate::check;

use crate::free_list::{FreeList, Link};
use crate::sync::AtomicU32;

/// Slots whose links are 1, 2, ...: all of them on the list at first, 1 the newest.
struct Slots {
    free: FreeList,
    entries: Vec<Entry>,
}

#[derive(Default)]
struct Entry {
    next: AtomicU32,
    /// What the owner of the slot writes: how often it was used.
    uses: UnsafeCell<u32>,
}

// SAFETY: loom sees who uses the cells.
unsafe impl Send for Slots {}
// SAFETY: as for `Send`: loom sees it.
unsafe impl Sync for Slots {}

impl Slots {
    fn new(count: u32) -> Arc<Self> {
        let entries = (0..count).map(|_| Entry::default()).collect();
        let slots = Self { free: FreeList::new(), entries };
        (1..=count).rev().for_each(|link| slots.push(link));
        Arc::new(slots)
    }

    fn entry(&self, link: Link) -> Option<&Entry> {
        self.entries.get(link.checked_sub(1)? as usize)
    }

    fn pop(&self) -> Option<Link> {
        self.free.pop(|link| Some(&self.entry(link)?.next))
    }

    fn push(&self, link: Link) {
        self.free.push(link, &self.entry(link).unwrap().next);
    }

    /// Takes a slot and uses it. Fails if somebody else does, or did without our knowing.
    fn take(&self) -> Option<Link> {
        let link = self.pop()?;
        // SAFETY: the pointer is valid for this call, in which loom sees that nobody else uses it.
        self.entry(link).unwrap().uses.with_mut(|uses| unsafe { *uses += 1 });
        Some(link)
    }

    /// Asserts that every slot is in one place: among those that somebody has, or on the list.
    fn assert_each_is_in_one_place(&self, had: impl IntoIterator<Item = Option<Link>>) {
        let mut all: Vec<Link> = had.into_iter().flatten().collect();
        while let Some(link) = self.take() {
            assert!(all.len() < self.entries.len(), "the list is a ring, or a slot is in two places");
            all.push(link);
        }
        all.sort_unstable();
        assert!(all.iter().copied().eq(1..=self.entries.len() as Link), "{all:?}");
    }
}

/// Fails if `changed` counts nothing: the first thread looks at slot 1 and finds 2 behind it, the other takes both and puts
/// 1 back, and the exchange of the first makes 2 the newest, which the other has.
#[test]
fn a_slot_that_comes_back_meanwhile_does_not_bring_back_what_was_behind_it() {
    check(|| {
        let slots = Slots::new(3);
        let other = {
            let slots = slots.clone();
            thread::spawn(move || {
                let (first, second) = (slots.take(), slots.take());
                slots.push(first.unwrap());
                second
            })
        };
        let mine = slots.take();
        let others = other.join().unwrap();
        slots.assert_each_is_in_one_place([mine, others]);
    });
}

/// Fails if `push` exchanges with `Relaxed`, or if `pop` looks and exchanges without `Acquire`: the next owner does not know
/// what the one before did.
#[test]
fn whoever_takes_a_slot_knows_all_that_was_done_to_it_before() {
    check(|| {
        let slots = Slots::new(1);
        let threads = [(); 2].map(|()| {
            let slots = slots.clone();
            thread::spawn(move || {
                let link = slots.take();
                link.into_iter().for_each(|link| slots.push(link));
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
        slots.assert_each_is_in_one_place([]);
    });
}

/// Fails if `push` writes `next` after its exchange, or `pop` looks a second time without `Acquire`: what was on the list is
/// lost.
#[test]
fn slots_that_are_put_back_at_the_same_time_are_all_there() {
    check(|| {
        let slots = Slots::new(3);
        let (first, second) = (slots.take().unwrap(), slots.take().unwrap());
        let threads = [first, second].map(|link| {
            let slots = slots.clone();
            thread::spawn(move || slots.push(link))
        });
        let third = slots.take();
        for thread in threads {
            thread.join().unwrap();
        }
        slots.assert_each_is_in_one_place([third]);
    });
}
