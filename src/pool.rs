//! Pools: many parked coroutines whose stacks share a memory budget.
//!
//! ```text
//!  entries   | coroutine | coroutine | free | coroutine | ...      a Key is an index and a generation
//!                  │  ▲        │  ▲
//!  order     oldest ◄──┘  ... newest                               those that may be frozen, by their latest resume
//! ```
//!
//! A stack that grows in place counts from its stack pointer up. Memory it has touched below is not measured at each resume.
//! Instead it is given up by one in [`SHRINK_EVERY`] stacks that return to the pool, and by each stack that is frozen.
//!
//! The pool freezes what exceeds the budget, oldest first. A coroutine that is frozen, or cannot be, leaves the order until its
//! next resume. So each resume freezes at most as much as it has thawed or grown, and looks at each coroutine once.
//!
//! A stack that grows in place thaws when it is touched, at any time and on any thread. The fault handler then lists the number
//! of its entry. Every change of the pool first empties this list; [`Pool::stats`] only adds it up.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use crate::coroutine::{Coroutine, CoroutineResult};
use crate::error::Error;
use crate::freeze::touched::{Told, Touched};
use crate::settings::Growth;

/// A coroutine in a [`Pool`]. The key stays the same until the coroutine has ended or is removed, and is never reused.
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

/// Counts of a [`Pool`]; see [`Pool::stats`].
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
    /// Number of coroutines that have a stack.
    pub live: usize,
    /// Accessible bytes of these stacks; for those that grow in place, the bytes from the stack pointer up.
    pub live_bytes: usize,
    /// Number of frozen coroutines.
    pub frozen: usize,
    /// Bytes of the blocks that hold them.
    pub frozen_bytes: usize,
}

/// Parked coroutines with a memory budget: when their stacks exceed it, the pool [freezes](Coroutine::freeze) the least
/// recently resumed ones. A frozen coroutine thaws when it is resumed, or when a thread that has not blocked SIGSEGV touches
/// its stack. [Pin](crate::pin()) a stack that is shared with a thread that blocks SIGSEGV.
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
    /// Dropped first, because frozen coroutines refer to `touched`.
    entries: Vec<Entry<In, Out, Ret>>,
    /// The entries that have thawed because they were touched; exists from the first frozen coroutine on.
    touched: Option<Arc<Touched>>,
    /// Indices of entries without a coroutine.
    free: Vec<u32>,
    oldest: Option<u32>,
    newest: Option<u32>,
    budget: usize,
    /// Number of coroutines put in, or put back after a resume.
    puts: u32,
    stats: PoolStats,
}

/// Of the stacks that grow in place and are put back, one in this many gives up the memory below its stack pointer.
const SHRINK_EVERY: u32 = 16;

#[derive(Debug)]
struct Entry<In, Out, Ret> {
    generation: u32,
    /// Bytes for which the coroutine counts.
    bytes: usize,
    frozen: bool,
    /// True if it is in the order, between `older` and `newer`.
    ordered: bool,
    older: Option<u32>,
    newer: Option<u32>,
    coroutine: Option<Coroutine<In, Out, Ret>>,
}

impl<In, Out, Ret> Pool<In, Out, Ret> {
    /// An empty pool with a budget, in bytes, for stacks that are not frozen.
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

    /// Changes the budget and freezes what exceeds it.
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

    /// Inserts a coroutine as the most recently resumed one.
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
        // SAFETY: the list lives as long as the entries, and a coroutine that leaves them is given another list.
        unsafe { coroutine.tell(told) };
        self.put(key, coroutine);
        key
    }

    /// Resumes a coroutine; `None` if it has ended or was removed. A coroutine that ends leaves the pool.
    ///
    /// # Panics
    /// If the coroutine panics; it then leaves the pool. If the coroutine is frozen and there is no memory to thaw it; it then
    /// stays frozen and may be resumed later.
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

    /// Removes a coroutine, frozen or not. `None` if it has ended or was removed before.
    ///
    /// ```
    /// let mut pool = regrow::Pool::new(1 << 20);
    /// let key = pool.insert(regrow::Coroutine::<(), (), ()>::new(|_, ()| ()));
    /// assert!(pool.remove(key).is_some());
    /// assert!(pool.remove(key).is_none());
    /// ```
    pub fn remove(&mut self, key: Key) -> Option<Coroutine<In, Out, Ret>> {
        // SAFETY: the list of `Told::NOBODY` is a static, which lives forever.
        unsafe { self.get(key)?.tell(Told::NOBODY) };
        let coroutine = self.take(key)?;
        self.forget(key);
        Some(coroutine)
    }

    /// Borrows a coroutine. `None` if it has ended or was removed.
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

    /// Freezes all coroutines that can be frozen. Returns by how many bytes the pool shrinks. [`trim`](crate::trim()) also
    /// gives back the slots that the thread keeps for reuse.
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

    /// Number of coroutines in the pool, and their bytes.
    ///
    /// A coroutine that grows in place and has thawed by a touch counts as live. The next change of the pool puts it back in
    /// the order, as the newest, so it may be frozen again.
    ///
    /// ```
    /// let mut pool = regrow::Pool::new(1 << 20);
    /// pool.insert(regrow::Coroutine::<(), (), ()>::new(|_, ()| ()));
    /// assert_eq!(pool.stats().live_bytes, 4096);
    /// ```
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let mut stats = self.stats;
        // The pool has frozen nothing since its last change, so each entry was touched at most once.
        for index in self.touched.iter().flat_map(|touched| touched.entries()) {
            let entry = &self.entries[index as usize];
            if entry.frozen {
                stats.remove(true, entry.bytes);
                stats.add(false, entry.coroutine.as_ref().map_or(0, Coroutine::parked_bytes));
            }
        }
        stats
    }

    /// Number of coroutines in the pool.
    ///
    /// ```
    /// assert_eq!(regrow::Pool::<(), (), ()>::new(0).len(), 0);
    /// ```
    #[must_use]
    pub const fn len(&self) -> usize {
        self.stats.live + self.stats.frozen
    }

    /// True if the pool is empty.
    ///
    /// ```
    /// assert!(regrow::Pool::<(), (), ()>::new(0).is_empty());
    /// ```
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts a coroutine into its entry, as the newest, and freezes what exceeds the budget.
    fn put(&mut self, key: Key, mut coroutine: Coroutine<In, Out, Ret>) {
        self.notice_touched(); // entries may have thawed while it was out
        self.puts = self.puts.wrapping_add(1);
        if self.puts.is_multiple_of(SHRINK_EVERY) && coroutine.growth() == Growth::InPlace {
            // This cannot fail, because a stack that grows in place needs no memory to shrink.
            let _ = coroutine.shrink();
        }
        self.entries[key.index as usize].coroutine = Some(coroutine);
        self.count(key.index);
        self.freeze_down_to(self.budget);
    }

    /// Takes a coroutine out of its entry, which stays reserved for it.
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
        // After 2³² coroutines an entry is used up and is not used again.
        if let Some(next) = key.generation.checked_add(1) {
            self.entries[key.index as usize].generation = next;
            self.free.push(key.index);
        }
    }

    /// Counts coroutines as live that have thawed by a touch.
    fn notice_touched(&mut self) {
        let Some(touched) = &self.touched else { return };
        for index in touched.take() {
            if self.entries[index as usize].coroutine.is_some() {
                self.uncount(index);
                self.count(index);
            }
        }
    }

    /// Freezes coroutines, oldest first, until at most `budget` bytes are live.
    fn freeze_down_to(&mut self, budget: usize) {
        // Stops at the newest entry of now, in case another thread touches a stack as soon as it is frozen.
        let newest = self.newest;
        let mut done = false;
        while self.stats.live_bytes > budget
            && !done
            && let Some(index) = self.oldest
        {
            done = Some(index) == newest;
            let told = self.told(index);
            let Some(coroutine) = &mut self.entries[index as usize].coroutine else { return };
            // SAFETY: the list lives as long as the entries, and a coroutine that leaves them is given another list.
            match unsafe { coroutine.freeze_telling(told) } {
                Ok(true) => {
                    self.uncount(index);
                    self.count(index);
                }
                // There is no memory for its block; the next resume tries again.
                Err(Error::Memory { .. } | Error::Mappings { .. }) => return,
                // It cannot be frozen.
                Ok(false) | Err(_) => self.leave_order(index),
            }
        }
    }

    /// The list and entry number that the handler uses when an entry's coroutine is touched.
    fn told(&mut self, entry: u32) -> Told {
        let list = Arc::as_ptr(self.touched.get_or_insert_with(|| Arc::new(Touched::new())));
        Told { list, entry }
    }

    /// Counts an entry's coroutine in its present state; one that is not frozen becomes the newest in the order.
    fn count(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        let Some(coroutine) = &entry.coroutine else { return };
        (entry.frozen, entry.bytes) = (coroutine.is_frozen(), coroutine.parked_bytes());
        self.stats.add(entry.frozen, entry.bytes);
        if !entry.frozen {
            self.make_newest(index);
        }
    }

    /// Removes an entry's coroutine from the counts and from the order.
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
    /// Counts a coroutine of so many bytes.
    const fn add(&mut self, frozen: bool, bytes: usize) {
        let (number, sum) = self.of(frozen);
        *number += 1;
        *sum += bytes;
    }

    /// Stops counting a coroutine of so many bytes.
    const fn remove(&mut self, frozen: bool, bytes: usize) {
        let (number, sum) = self.of(frozen);
        *number -= 1;
        *sum -= bytes;
    }

    /// The counters of frozen coroutines, or of live ones.
    const fn of(&mut self, frozen: bool) -> (&mut usize, &mut usize) {
        if frozen {
            (&mut self.frozen, &mut self.frozen_bytes)
        } else {
            (&mut self.live, &mut self.live_bytes)
        }
    }
}
