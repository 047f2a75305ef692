//! A value that is replaced as a whole, and read without a lock: readers never wait, and no writer waits for readers.
//!
//! ```text
//!   reader   epoch ─► readers[epoch & 1] += 1 ─► current ─► look up ... ─► readers[epoch & 1] -= 1
//!   writer   lock; current = new; old on the list of retired ones; epoch += 1; free what no reader can have
//! ```
//!
//! A reader counts itself in before it loads `current`. So whoever may hold a value was counted when the value was replaced:
//! once each of the two counters has been seen at zero after that, nobody holds it. Changing the epoch sends new readers to the
//! other counter, and so lets the first drain. A writer never waits for that: what it cannot free, a later one will. Thus a
//! reader that is a fault handler on top of a writer, or that a fork has cut off for ever, stops nobody.
//!
//! Reader and writer each write one word and then read the other's. One of them must see the other. That is what all the
//! `SeqCst` is for.

use core::ptr::{self, NonNull};

use crate::sync::{AtomicPtr, AtomicUsize, Ordering::SeqCst};

pub(super) struct Published<T> {
    /// Null as long as there is none.
    current: AtomicPtr<T>,
    epoch: AtomicUsize,
    readers: [Counter; 2],
}

/// On a cache line of its own: readers on all threads write it.
#[repr(align(64))]
struct Counter(AtomicUsize);

/// A value that was replaced.
pub(super) struct Retired<T> {
    value: NonNull<T>,
    /// Which counters have been seen at zero since.
    drained: [bool; 2],
}

/// Somebody reads; what was current when it began stays.
pub(super) struct Reading<'a, T> {
    pub(super) value: Option<&'a T>,
    counter: &'a AtomicUsize,
}

impl<T> Drop for Reading<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.counter.fetch_sub(1, SeqCst);
    }
}

impl<T> Published<T> {
    pub(super) const fn new() -> Self {
        Self {
            current: AtomicPtr::new(ptr::null_mut()),
            epoch: AtomicUsize::new(0),
            readers: [const { Counter(AtomicUsize::new(0)) }; 2],
        }
    }

    /// Begins reading. Wait-free, allocates nothing, may be called in a signal handler.
    #[inline]
    pub(super) fn read(&self) -> Reading<'_, T> {
        let side = self.epoch.load(SeqCst) & 1;
        let counter = &self.readers[side].0;
        counter.fetch_add(1, SeqCst);
        // SAFETY: `replace` was given a valid value. It is freed only after this counter was seen at zero after `current` had
        // been changed.
        let value = unsafe { self.current.load(SeqCst).as_ref() };
        Reading { value, counter }
    }

    /// The current value, for a writer: nobody else replaces it.
    pub(super) fn current(&self) -> Option<NonNull<T>> {
        NonNull::new(self.current.load(SeqCst))
    }

    /// Makes `new` the current value. `free` gets those of the replaced ones that no reader can have.
    ///
    /// # Safety
    /// One writer at a time. `new` is valid until it is given to `free`. What is in `retired` comes from earlier calls for
    /// this same value.
    pub(super) unsafe fn replace(
        &self,
        new: NonNull<T>,
        retired: &mut Vec<Retired<T>>,
        free: impl FnMut(NonNull<T>),
    ) {
        let old = self.current();
        self.current.store(new.as_ptr(), SeqCst);
        retired.extend(old.map(|value| Retired { value, drained: [false; 2] }));
        self.take_unread(retired).for_each(free);
    }

    /// Takes off the list what no reader can have.
    fn take_unread(&self, retired: &mut Vec<Retired<T>>) -> impl Iterator<Item = NonNull<T>> {
        // Twice: with no reader inside, as usual, everything goes at once.
        for _ in 0..2 {
            let side = self.epoch.fetch_add(1, SeqCst) & 1;
            if self.readers[side].0.load(SeqCst) == 0 {
                retired.iter_mut().for_each(|one| one.drained[side] = true);
            }
        }
        retired.extract_if(.., |one| one.drained == [true; 2]).map(Retired::value)
    }
}

impl<T> Retired<T> {
    /// What was replaced.
    pub(super) fn value(self) -> NonNull<T> {
        self.value
    }
}
