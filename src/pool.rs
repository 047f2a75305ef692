//! Pools: many parked coroutines whose stacks together keep to a budget.
//!
//! ```text
//!  entries   | coroutine | coroutine | free | coroutine | ...      a Key is an index and a generation
//!                  │  ▲        │  ▲
//!  order     oldest ◄──┘  ... newest                               those that may be frozen, by their latest resume
//! ```
//!
//! A stack that grows in place counts from its stack pointer up. What it has touched below that is not asked for at each
//! resume: one in [`SHRINK_EVERY`] that comes back gives it up, and so does each that is frozen.
//!
//! What is above the budget is frozen from the oldest end. One that is frozen, or cannot be, is not in the order until it
//! is resumed again: so each resume freezes at most as much as it has thawed or grown, and looks at nothing twice.
//!
//! A stack that grows in place thaws when it is touched, at any time and on any thread. The fault handler then leaves the
//! number of its entry on a list. Whatever changes the pool takes them off first; to look at the pool, they are added up.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use crate::coroutine::{Coroutine, CoroutineResult};
use crate::error::Error;
use crate::freeze::touched::{Told, Touched};
use crate::settings::Growth;

/// A coroutine in a [`Pool`]. It stays the same until the coroutine has ended or was removed, and is not used again.
///
/// ```
/// use regrow::{Coroutine, Pool};
/// let mut pool = Pool::<(), (), u32>::new(1 << 20);
/// let [one, two] = [1, 2].map(|number| pool.insert(Coroutine::new(move |_, ()| number)));
/// assert_ne!(one, two);
/// assert_eq!(pool.resume(two, ()).unwrap().returned(), Some(2));
/// assert!(pool.get(two).is_none() && pool.get(one).is_some());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    index: u32,
    generation: u32,
}

/// What a [`Pool`] holds; see [`Pool::stats`].
///
/// ```
/// use regrow::{Coroutine, Pool, PoolStats};
/// let mut pool = Pool::<(), (), ()>::new(1 << 20);
/// pool.insert(Coroutine::new(|_, ()| ()));
/// let PoolStats { live, live_bytes, frozen, .. } = pool.stats();
/// assert_eq!((live, live_bytes, frozen), (1, 4096, 0));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct PoolStats {
    /// How many coroutines have a stack.
    pub live: usize,
    /// Bytes of these stacks that are accessible; of those that grow in place, from the stack pointer up.
    pub live_bytes: usize,
    /// How many are frozen.
    pub frozen: usize,
    /// Bytes of the blocks they are in.
    pub frozen_bytes: usize,
}

/// Parked coroutines that keep to a budget of memory: when their stacks exceed it, the least recently resumed are
/// [frozen](Coroutine::freeze). They thaw by themselves when they are resumed, and when their stack is touched by a thread that
/// has not blocked SIGSEGV. [Pin](crate::pin()) a stack that is shared with one that has.
///
/// ```
/// use regrow::{Builder, Coroutine, CoroutineResult, Pool};
///
/// let mut pool = Pool::new(100 * 4096);
/// // SAFETY: nothing is kept outside the stacks.
/// let builder = unsafe { Builder::new().relocating() };
/// let keys: Vec<_> = (0..1000)
///     .map(|number: u32| {
///         let mut coroutine = builder.spawn(move |yielder: &regrow::Yielder<u32, ()>, _| {
///             number + yielder.suspend(())
///         });
///         coroutine.resume(0);
///         pool.insert(coroutine)
///     })
///     .collect();
/// assert_eq!(pool.stats().live, 100);
/// assert_eq!(pool.stats().frozen, 900);
/// assert_eq!(pool.resume(keys[7], 5), Some(CoroutineResult::Return(12)));
/// assert_eq!(pool.resume(keys[7], 5), None);
/// ```
#[derive(Debug)]
pub struct Pool<In, Out, Ret> {
    /// Dropped first: what is frozen names `touched`.
    entries: Vec<Entry<In, Out, Ret>>,
    /// Which entries have thawed because they were touched; from the first frozen coroutine on.
    touched: Option<Arc<Touched>>,
    /// Indices of entries without a coroutine.
    free: Vec<u32>,
    oldest: Option<u32>,
    newest: Option<u32>,
    budget: usize,
    /// How many coroutines were put in, or back in after a resume.
    puts: u32,
    stats: PoolStats,
}

/// One in so many stacks that grow in place, of those put back, gives up the memory that it has below its stack pointer.
const SHRINK_EVERY: u32 = 16;

#[derive(Debug)]
struct Entry<In, Out, Ret> {
    generation: u32,
    /// Bytes that the coroutine counts for.
    bytes: usize,
    frozen: bool,
    /// It is in the order, between these two.
    ordered: bool,
    older: Option<u32>,
    newer: Option<u32>,
    coroutine: Option<Coroutine<In, Out, Ret>>,
}

impl<In, Out, Ret> Pool<In, Out, Ret> {
    /// An empty pool, with a budget of so many bytes for stacks that are not frozen.
    ///
    /// ```
    /// assert!(regrow::Pool::<(), (), ()>::new(1 << 20).is_empty());
    /// ```
    #[must_use]
    pub const fn new(budget: usize) -> Self {
        let stats = PoolStats { live: 0, live_bytes: 0, frozen: 0, frozen_bytes: 0 };
        Self {
            entries: Vec::new(),
            touched: None,
            free: Vec::new(),
            oldest: None,
            newest: None,
            budget,
            puts: 0,
            stats,
        }
    }

    /// The budget, in bytes.
    ///
    /// ```
    /// assert_eq!(regrow::Pool::<(), (), ()>::new(5000).budget(), 5000);
    /// ```
    #[must_use]
    pub const fn budget(&self) -> usize {
        self.budget
    }

    /// Changes the budget, and freezes what is above it.
    ///
    /// ```
    /// let mut pool = regrow::Pool::<(), (), ()>::new(1 << 20);
    /// pool.set_budget(1 << 10);
    /// assert_eq!(pool.budget(), 1024);
    /// ```
    pub fn set_budget(&mut self, bytes: usize) {
        self.budget = bytes;
        self.notice_touched();
        self.freeze_down_to(bytes);
    }

    /// Takes a coroutine in, as the one resumed most recently.
    ///
    /// # Panics
    /// If the pool holds 2³² coroutines.
    ///
    /// ```
    /// let mut pool = regrow::Pool::new(1 << 20);
    /// let key = pool.insert(regrow::Coroutine::<u32, (), u32>::new(|_, number| number + 1));
    /// assert_eq!(pool.resume(key, 1).unwrap().returned(), Some(2));
    /// ```
    pub fn insert(&mut self, coroutine: Coroutine<In, Out, Ret>) -> Key {
        let index = self.free.pop().unwrap_or_else(|| {
            let index = u32::try_from(self.entries.len()).expect("a pool holds at most 2^32 coroutines");
            self.entries.push(Entry {
                generation: 0,
                bytes: 0,
                frozen: false,
                ordered: false,
                older: None,
                newer: None,
                coroutine: None,
            });
            index
        });
        let key = Key { index, generation: self.entries[index as usize].generation };
        let told = self.told(index);
        // SAFETY: the list lives as long as the entries, and what leaves them is told another.
        unsafe { coroutine.tell(told) };
        self.put(key, coroutine);
        key
    }

    /// Resumes a coroutine; `None` if it has ended or was removed. When it ends it is no longer in the pool.
    ///
    /// # Panics
    /// If the coroutine does; it is no longer in the pool then. And if it is frozen and there is no memory to thaw it; it
    /// stays as it is then, and may be resumed later.
    ///
    /// ```
    /// let mut pool = regrow::Pool::new(0); // all are frozen whenever they suspend
    /// let key = pool.insert(regrow::Coroutine::<u32, u32, ()>::new(|yielder, number| drop(yielder.suspend(number))));
    /// assert_eq!(pool.resume(key, 1).unwrap().yielded(), Some(1));
    /// assert_eq!(pool.resume(key, 2).unwrap().returned(), Some(()));
    /// assert_eq!(pool.resume(key, 3), None);
    /// ```
    pub fn resume(&mut self, key: Key, input: In) -> Option<CoroutineResult<Out, Ret>> {
        let mut coroutine = self.take(key)?;
        let result = catch_unwind(AssertUnwindSafe(|| coroutine.resume(input)));
        if coroutine.done() {
            self.forget(key);
        } else {
            self.put(key, coroutine);
        }
        Some(result.unwrap_or_else(|payload| resume_unwind(payload)))
    }

    /// Takes a coroutine out, frozen or not. `None` if it has ended or was removed before.
    ///
    /// ```
    /// let mut pool = regrow::Pool::new(1 << 20);
    /// let key = pool.insert(regrow::Coroutine::<(), (), ()>::new(|_, ()| ()));
    /// assert!(pool.remove(key).is_some());
    /// assert!(pool.remove(key).is_none());
    /// ```
    pub fn remove(&mut self, key: Key) -> Option<Coroutine<In, Out, Ret>> {
        // SAFETY: the list of `Told::NOBODY` is a static: it lives forever.
        unsafe { self.get(key)?.tell(Told::NOBODY) };
        let coroutine = self.take(key)?;
        self.forget(key);
        Some(coroutine)
    }

    /// A coroutine, to look at. `None` if it has ended or was removed.
    ///
    /// ```
    /// let mut pool = regrow::Pool::new(1 << 20);
    /// let key = pool.insert(regrow::Coroutine::<(), (), ()>::new(|_, ()| ()));
    /// assert!(!pool.get(key).unwrap().started());
    /// ```
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&Coroutine<In, Out, Ret>> {
        let entry = self.entries.get(key.index as usize)?;
        entry.coroutine.as_ref().filter(|_| entry.generation == key.generation)
    }

    /// Freezes all that can be; returns by how many bytes the pool takes less then. [`trim`](crate::trim()) also gives back
    /// the slots that the thread keeps for reuse.
    ///
    /// ```
    /// let mut pool = regrow::Pool::<(), (), ()>::new(1 << 20);
    /// assert_eq!(pool.trim(), 0);
    /// ```
    pub fn trim(&mut self) -> usize {
        let bytes = |stats: &PoolStats| stats.live_bytes + stats.frozen_bytes;
        self.notice_touched();
        let before = bytes(&self.stats);
        self.freeze_down_to(0);
        before.saturating_sub(bytes(&self.stats))
    }

    /// How many coroutines are in it, and how many bytes they take.
    ///
    /// One that grows in place, and has thawed because somebody touched its stack, counts as live. It may be frozen
    /// again by whatever changes the pool next, since it is among those resumed most recently then.
    ///
    /// ```
    /// let mut pool = regrow::Pool::new(1 << 20);
    /// pool.insert(regrow::Coroutine::<(), (), ()>::new(|_, ()| ()));
    /// assert_eq!(pool.stats().live_bytes, 4096);
    /// ```
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let mut stats = self.stats;
        // Since the pool was changed last nothing in it was frozen: each of them was touched once.
        for index in self.touched.iter().flat_map(|touched| touched.entries()) {
            let entry = &self.entries[index as usize];
            if entry.frozen {
                stats.remove(true, entry.bytes);
                stats.add(false, entry.coroutine.as_ref().map_or(0, Coroutine::parked_bytes));
            }
        }
        stats
    }

    /// How many coroutines are in it.
    ///
    /// ```
    /// assert_eq!(regrow::Pool::<(), (), ()>::new(0).len(), 0);
    /// ```
    #[must_use]
    pub const fn len(&self) -> usize {
        self.stats.live + self.stats.frozen
    }

    /// True if no coroutine is in it.
    ///
    /// ```
    /// assert!(regrow::Pool::<(), (), ()>::new(0).is_empty());
    /// ```
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts a coroutine into its entry, as the newest, and freezes what is above the budget.
    fn put(&mut self, key: Key, mut coroutine: Coroutine<In, Out, Ret>) {
        self.notice_touched(); // while it was out, too
        self.puts = self.puts.wrapping_add(1);
        if self.puts.is_multiple_of(SHRINK_EVERY) && coroutine.growth() == Growth::InPlace {
            // Without an error: a stack that grows in place needs no memory for that.
            let _ = coroutine.shrink();
        }
        self.entries[key.index as usize].coroutine = Some(coroutine);
        self.count(key.index);
        self.freeze_down_to(self.budget);
    }

    /// Takes a coroutine out of its entry, which stays its own.
    fn take(&mut self, key: Key) -> Option<Coroutine<In, Out, Ret>> {
        self.notice_touched();
        let entry = self.entries.get_mut(key.index as usize)?;
        if entry.generation != key.generation {
            return None;
        }
        let coroutine = entry.coroutine.take()?;
        self.uncount(key.index);
        Some(coroutine)
    }

    /// Makes an entry without a coroutine free for another.
    fn forget(&mut self, key: Key) {
        // Used up after 2³² coroutines: an entry that is not used again.
        if let Some(next) = key.generation.checked_add(1) {
            self.entries[key.index as usize].generation = next;
            self.free.push(key.index);
        }
    }

    /// Counts those as live that have thawed because they were touched.
    fn notice_touched(&mut self) {
        let Some(touched) = &self.touched else { return };
        for index in touched.take() {
            if self.entries[index as usize].coroutine.is_some() {
                self.uncount(index);
                self.count(index);
            }
        }
    }

    /// Freezes, oldest first, until at most `budget` bytes are live.
    fn freeze_down_to(&mut self, budget: usize) {
        // Not further, should one be touched as soon as it is frozen.
        let newest = self.newest;
        let mut done = false;
        while self.stats.live_bytes > budget
            && !done
            && let Some(index) = self.oldest
        {
            done = Some(index) == newest;
            let told = self.told(index);
            let Some(coroutine) = &mut self.entries[index as usize].coroutine else { return };
            // SAFETY: the list lives as long as the entries, and what leaves them is told another.
            match unsafe { coroutine.freeze_telling(told) } {
                Ok(true) => {
                    self.uncount(index);
                    self.count(index);
                }
                // No memory for its block: the next resume tries again.
                Err(Error::Memory { .. } | Error::Mappings { .. }) => return,
                // It cannot be frozen.
                Ok(false) | Err(_) => self.leave_order(index),
            }
        }
    }

    /// Whom the handler tells when the coroutine of an entry is touched.
    fn told(&mut self, entry: u32) -> Told {
        let list = Arc::as_ptr(self.touched.get_or_insert_with(|| Arc::new(Touched::new())));
        Told { list, entry }
    }

    /// Counts the coroutine of an entry for what it is now; one that is not frozen is the newest in the order.
    fn count(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        let Some(coroutine) = &entry.coroutine else { return };
        (entry.frozen, entry.bytes) = (coroutine.is_frozen(), coroutine.parked_bytes());
        self.stats.add(entry.frozen, entry.bytes);
        if !entry.frozen {
            self.make_newest(index);
        }
    }

    /// Counts the coroutine of an entry no more, and takes it out of the order.
    fn uncount(&mut self, index: u32) {
        let Entry { frozen, bytes, .. } = self.entries[index as usize];
        self.stats.remove(frozen, bytes);
        self.leave_order(index);
    }

    fn make_newest(&mut self, index: u32) {
        let older = self.newest.replace(index);
        match older {
            Some(older) => self.entries[older as usize].newer = Some(index),
            None => self.oldest = Some(index),
        }
        let entry = &mut self.entries[index as usize];
        (entry.older, entry.newer, entry.ordered) = (older, None, true);
    }

    fn leave_order(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        if !core::mem::take(&mut entry.ordered) {
            return;
        }
        let (older, newer) = (entry.older, entry.newer);
        match older {
            Some(older) => self.entries[older as usize].newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => self.entries[newer as usize].older = older,
            None => self.newest = older,
        }
    }
}

impl PoolStats {
    /// Counts one more that takes so many bytes.
    const fn add(&mut self, frozen: bool, bytes: usize) {
        let (number, sum) = self.of(frozen);
        *number += 1;
        *sum += bytes;
    }

    /// Counts one that takes so many bytes no more.
    const fn remove(&mut self, frozen: bool, bytes: usize) {
        let (number, sum) = self.of(frozen);
        *number -= 1;
        *sum -= bytes;
    }

    /// The counters of those that are frozen, or of those that are not.
    const fn of(&mut self, frozen: bool) -> (&mut usize, &mut usize) {
        if frozen {
            (&mut self.frozen, &mut self.frozen_bytes)
        } else {
            (&mut self.live, &mut self.live_bytes)
        }
    }
}
