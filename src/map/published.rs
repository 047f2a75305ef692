//! A value that is replaced as a whole and read without a lock. Readers never wait, and no writer waits for readers.
//!
//! ```text
//!   reader   epoch ─► readers[epoch & 1] += 1 ─► current ─► look up ... ─► readers[epoch & 1] -= 1
//!   writer   lock; current = new; old on the list of retired ones; epoch += 1; free what no reader can have
//! ```
//!
//! A reader counts itself in before it loads `current`. So every reader that may hold a value was counted when the value was replaced.
//! Once both counters have been seen at zero after that, no reader holds it. Changing the epoch sends new readers to the other
//! counter, which lets the first one drain. A writer does not wait for that: a later writer frees what it could not. So a reader
//! stops nobody, even if it is a fault handler on top of a writer, or was cut off for ever by a fork.
//!
//! Reader and writer each write one word and then read the other's. At least one of them has to see the other's write. That is what
//! `SeqCst` is for.

use core::ptr::{self, NonNull};

use crate::sync::{AtomicPtr, AtomicUsize, Ordering::SeqCst};

pub(super) struct Published<T> {
    /// Null if there is no value yet.
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

/// Keeps the value that was current when reading began.
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

    /// Begins reading. It does not wait or allocate, and may be called in a signal handler.
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

    /// The current value, for a writer. No other writer replaces it meanwhile.
    pub(super) fn current(&self) -> Option<NonNull<T>> {
        NonNull::new(self.current.load(SeqCst))
    }

    /// Makes `new` the current value, and passes to `free` those replaced values that no reader can hold.
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

    /// Takes the values that no reader can hold off the list.
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
