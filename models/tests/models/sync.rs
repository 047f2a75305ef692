//! What src/sync.rs is for the library: atomics of loom's.
//!
//! They differ from loom's in three ways. They can be made in constants: the atomic of loom's comes with the first use, which
//! a model sees to before it starts threads. `SeqCst` holds: for loom it is `AcqRel`, but its fences are right, so there is
//! one beside each such access. And to drop one is to write it, so nobody may use it at the same time or later.

use std::cell::{Cell, OnceCell};

use loom::sync::atomic::fence;

pub(crate) use loom::sync::atomic::Ordering;

/// Lets other threads run, one of which is waited for.
pub(crate) fn let_others_run() {
    loom::thread::yield_now();
}

/// On which side of a `SeqCst` access its fence is. With either there is one between any two such accesses of a thread. With
/// one of them a model may fail that does not with the other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fence {
    Before,
    After,
}

thread_local! {
    /// In the model that runs on this thread.
    pub(crate) static FENCE: Cell<Fence> = const { Cell::new(Fence::Before) };
}

/// Does what has this order.
fn ordered<R>(order: Ordering, access: impl FnOnce() -> R) -> R {
    let fence_here = |side| {
        if order == Ordering::SeqCst && FENCE.get() == side {
            fence(Ordering::SeqCst);
        }
    };
    fence_here(Fence::Before);
    let result = access();
    fence_here(Fence::After);
    result
}

/// What loom has of an atomic.
#[derive(Debug)]
struct Made<A> {
    atomic: A,
    /// How often it was loaded. loom looks for another order of two accesses only if no third comes between, such as a load by
    /// one of the two threads. Since loads count, it looks for other orders of theirs, too.
    loads: loom::sync::atomic::AtomicUsize,
}

macro_rules! atomic {
    ($name:ident $(<$parameter:ident>)?, $value:ty) => {
        #[derive(Debug)]
        pub(crate) struct $name $(<$parameter>)? {
            first: $value,
            made: OnceCell<Made<loom::sync::atomic::$name $(<$parameter>)?>>,
        }

        // SAFETY: loom runs one thread at a time, all of them on one thread of the system's, and does not change over to
        // another while it makes an atomic.
        unsafe impl $(<$parameter>)? Send for $name $(<$parameter>)? {}
        // SAFETY: as said above, no two threads use the cell at once.
        unsafe impl $(<$parameter>)? Sync for $name $(<$parameter>)? {}

        #[allow(dead_code, reason = "each is used in some ways only")]
        impl $(<$parameter>)? $name $(<$parameter>)? {
            pub(crate) const fn new(first: $value) -> Self {
                Self { first, made: OnceCell::new() }
            }

            fn made(&self) -> &Made<loom::sync::atomic::$name $(<$parameter>)?> {
                self.made.get_or_init(|| Made {
                    atomic: loom::sync::atomic::$name::new(self.first),
                    loads: loom::sync::atomic::AtomicUsize::new(0),
                })
            }

            pub(crate) fn load(&self, order: Ordering) -> $value {
                self.made().loads.fetch_add(1, Ordering::Relaxed);
                ordered(order, || self.made().atomic.load(order))
            }

            pub(crate) fn store(&self, value: $value, order: Ordering) {
                ordered(order, || self.made().atomic.store(value, order));
            }

            pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                ordered(order, || self.made().atomic.swap(value, order))
            }

            pub(crate) fn compare_exchange(
                &self,
                seen: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                ordered(success, || self.made().atomic.compare_exchange(seen, new, success, failure))
            }

            pub(crate) fn compare_exchange_weak(
                &self,
                seen: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.compare_exchange(seen, new, success, failure)
            }
        }

        impl $(<$parameter>)? Drop for $name $(<$parameter>)? {
            fn drop(&mut self) {
                if let Some(made) = self.made.get_mut()
                    && !std::thread::panicking()
                {
                    made.atomic.with_mut(|_| ());
                }
            }
        }
    };
}

macro_rules! adding {
    ($name:ident, $value:ty) => {
        impl $name {
            pub(crate) fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                ordered(order, || self.made().atomic.fetch_add(value, order))
            }

            pub(crate) fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                ordered(order, || self.made().atomic.fetch_sub(value, order))
            }
        }
    };
}

macro_rules! zero {
    ($name:ident) => {
        impl Default for $name {
            fn default() -> Self {
                Self::new(0)
            }
        }
    };
}

atomic!(AtomicPtr<T>, *mut T);
atomic!(AtomicU32, u32);
atomic!(AtomicU64, u64);
atomic!(AtomicUsize, usize);
adding!(AtomicUsize, usize);
zero!(AtomicU32);
zero!(AtomicUsize);
