//! Pools keep to their budget, freeze the least recently resumed, and lose nothing.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use regrow::{Builder, Coroutine, Key, Pool, Yielder, pin};

#[path = "support/corpus.rs"]
mod corpus;
mod support;
use support::{Counted, both_ways, builders, frame, live};

/// Adds up what it is given until that is 0; grows at some sums.
fn adder(builder: &Builder) -> Coroutine<u64, u64, u64> {
    builder.spawn(|yielder: &Yielder<u64, u64>, first| {
        let _counted = Counted::new(());
        let mut sum = first;
        loop {
            match yielder.suspend(sum) {
                0 => return sum,
                number => sum += number,
            }
            if sum % 16 == 0 {
                frame::<9000>(1);
            }
        }
    })
}

fn pool_of(builder: &Builder, count: u64, budget: usize) -> (Pool<u64, u64, u64>, Vec<Key>) {
    let mut pool = Pool::new(budget);
    let keys = (0..count)
        .map(|number| {
            let key = pool.insert(adder(builder));
            assert_eq!(pool.resume(key, number + 1).unwrap().yielded(), Some(number + 1));
            key
        })
        .collect();
    (pool, keys)
}

#[test]
fn the_least_recently_resumed_are_frozen() {
    both_ways(|builder| {
        let (mut pool, keys) = pool_of(&builder, 10, 4 * 4096);
        // Of those ordered by their latest resume, so many of the first are frozen as is needed, and no more.
        let frozen = |pool: &Pool<u64, u64, u64>, order: [usize; 10]| {
            let stats = pool.stats();
            let is_frozen = |at: &usize| pool.get(keys[*at]).unwrap().is_frozen();
            assert!(stats.live_bytes <= pool.budget() && stats.live_bytes + 3 * 4096 > pool.budget());
            assert!(order[..stats.frozen].iter().all(is_frozen));
            assert!(!order[stats.frozen..].iter().any(is_frozen));
            stats.frozen
        };
        assert_eq!(frozen(&pool, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), 6);
        assert_eq!(pool.resume(keys[2], 2).unwrap().yielded(), Some(5));
        frozen(&pool, [0, 1, 3, 4, 5, 6, 7, 8, 9, 2]);
        pool.set_budget(8192);
        frozen(&pool, [0, 1, 3, 4, 5, 6, 7, 8, 9, 2]);
        assert!(pool.trim() > 4096);
        assert_eq!((pool.stats().live, pool.stats().live_bytes, pool.stats().frozen), (0, 0, 10));
        drop(pool);
        assert_eq!(live(), 0);
    });
}

#[test]
fn who_cannot_be_frozen_stays_and_is_counted() {
    let mut pool = Pool::new(0);
    let key = pool.insert(Coroutine::<(), (), ()>::new(|yielder, ()| {
        let pin = pin();
        yielder.suspend(());
        drop(pin);
        yielder.suspend(());
    }));
    pool.resume(key, ());
    assert_eq!((pool.stats().live, pool.stats().frozen), (1, 0));
    pool.resume(key, ());
    assert_eq!((pool.stats().live, pool.stats().frozen), (0, 1));
}

/// A stack that is touched thaws, on whatever thread: it is counted as live at once, and frozen again by the next change.
#[test]
fn who_is_touched_counts_as_live() {
    let mut pool = Pool::new(0);
    let keys: Vec<_> = (0..6)
        .map(|_| {
            pool.insert(Builder::new().spawn(|yielder: &Yielder<(), usize>, ()| {
                let counter = AtomicU64::new(0);
                loop {
                    yielder.suspend(&raw const counter as usize);
                }
            }))
        })
        .collect();
    let counters: Vec<usize> =
        keys.iter().map(|&key| pool.resume(key, ()).unwrap().yielded().unwrap()).collect();
    // SAFETY: these coroutines are suspended, where they stay in place, and not dropped before the end.
    let touch = |at: usize| unsafe { &*(counters[at] as *const AtomicU64) }.fetch_add(1, Ordering::Relaxed);
    let all = |pool: &Pool<(), usize, ()>| (pool.stats().live, pool.stats().live_bytes, pool.stats().frozen);
    let frozen_bytes = pool.stats().frozen_bytes / 6;
    assert_eq!(all(&pool), (0, 0, 6));

    touch(1);
    touch(1);
    std::thread::scope(|scope| drop(scope.spawn(|| touch(4)).join()));
    assert_eq!(all(&pool), (2, 8192, 4));
    assert_eq!(pool.stats().frozen_bytes, 4 * frozen_bytes);
    assert_eq!(pool.trim(), 2 * (4096 - frozen_bytes));
    assert_eq!(all(&pool), (0, 0, 6));

    // The one touched was used last: others are frozen first.
    pool.set_budget(2 * 4096);
    pool.resume(keys[0], ());
    touch(2);
    touch(3);
    assert_eq!(all(&pool), (3, 3 * 4096, 3));
    pool.set_budget(2 * 4096);
    assert_eq!(all(&pool), (2, 2 * 4096, 4));
    assert!(pool.get(keys[0]).unwrap().is_frozen());

    // Whoever has left the pool is not its any more, and what was frozen before it came is.
    pool.set_budget(0);
    let [mut one, two] = [0, 1].map(|at| pool.remove(keys[at]).unwrap());
    touch(0);
    assert_eq!(all(&pool), (0, 0, 4));
    assert!(!one.is_frozen() && two.is_frozen());
    pool.set_budget(usize::MAX);
    pool.insert(two);
    touch(1);
    assert_eq!(all(&pool), (1, 4096, 5 - 1));
    drop(pool);
    one.resume(());
}

#[test]
fn one_that_panics_is_gone() {
    let mut pool = Pool::new(1 << 20);
    let key = pool.insert(Coroutine::<(), (), ()>::new(|_, ()| panic!("meant")));
    assert!(catch_unwind(AssertUnwindSafe(|| pool.resume(key, ()))).is_err());
    assert!(pool.is_empty() && pool.resume(key, ()).is_none() && pool.get(key).is_none());
    assert_ne!(pool.insert(Coroutine::new(|_, ()| ())), key);
}

proptest! {
    #![proptest_config(corpus::cases(100))]

    /// Any order of insertions, resumes, ends, removals and budgets: sums are right, counters are those of the coroutines, and
    /// the budget is kept.
    #[test]
    fn any_order_of_operations(steps in prop::collection::vec((0..7u8, 1..1000u64), 1..150)) {
        let builders = builders();
        let mut pool = Pool::new(usize::MAX);
        let mut sums: HashMap<Key, u64> = HashMap::new();
        for (operation, number) in steps {
            let mut keys: Vec<_> = sums.keys().copied().collect();
            keys.sort_by_key(|key| sums[key]);
            let key = keys.get(number as usize % keys.len().max(1)).copied();
            match (operation, key) {
                (0 | 1, _) | (_, None) => {
                    let key = pool.insert(adder(&builders[number as usize % builders.len()]));
                    prop_assert_eq!(pool.resume(key, number).unwrap().yielded(), Some(number));
                    sums.insert(key, number);
                }
                (2, Some(key)) => {
                    prop_assert_eq!(pool.resume(key, 0).unwrap().returned(), sums.remove(&key));
                    prop_assert!(pool.resume(key, 0).is_none());
                }
                (3, Some(key)) => {
                    let sum = sums.remove(&key).unwrap();
                    let mut coroutine = pool.remove(key).unwrap();
                    prop_assert_eq!(coroutine.resume(1).yielded(), Some(sum + 1));
                }
                (4, _) => pool.set_budget(number as usize % 20 * 4096),
                (_, Some(key)) => {
                    let sum = sums.get_mut(&key).unwrap();
                    *sum += number;
                    prop_assert_eq!(pool.resume(key, number).unwrap().yielded(), Some(*sum));
                }
            }
            let all: Vec<_> = sums.keys().map(|&key| pool.get(key).unwrap()).collect();
            let bytes = |frozen| all.iter().filter(|it| it.is_frozen() == frozen).map(|it| it.bytes()).sum::<usize>();
            let stats = pool.stats();
            // What a stack that grows in place has touched below its stack pointer is not counted.
            prop_assert!(stats.live_bytes <= bytes(false) && stats.live_bytes >= 2048 * stats.live);
            prop_assert_eq!(stats.frozen_bytes, bytes(true));
            prop_assert!(stats.live_bytes <= pool.budget());
            prop_assert_eq!(pool.len(), sums.len());
            prop_assert_eq!(live(), sums.len() as isize);
        }
        drop(pool);
        prop_assert_eq!(live(), 0);
    }
}
