//! The shapes of switching: how the two sides of a switch call, and how many coroutines there are.

use std::hint::black_box;

use super::measure::{Run, placed, timed};
use super::systems::System;

/// Suspends in a loop, in the coroutine's root function.
pub fn root_loop<S: System, V: Default + 'static, const PLACE: usize>(mut system: S) -> Run<'static> {
    let mut coroutine = system.spawn(|yielder, mut value: V| {
        placed::<PLACE>();
        loop {
            value = S::suspend(yielder, value);
        }
    });
    Box::new(move |count| {
        placed::<PLACE>();
        timed(count, || _ = black_box(S::resume(&mut coroutine, V::default())))
    })
}

/// Suspends in a function that is called for it, and returns.
#[inline(never)]
fn callee<S: System>(yielder: S::Yielder<'_, u64>, value: u64) -> u64 {
    black_box(S::suspend(yielder, value))
}

pub fn fresh_callee<S: System>(mut system: S) -> Run<'static> {
    let mut coroutine = system.spawn(|yielder, mut value: u64| {
        loop {
            value = callee::<S>(yielder, value);
        }
    });
    Box::new(move |count| timed(count, || _ = black_box(S::resume(&mut coroutine, 1))))
}

/// Suspends `depth` calls down, and returns through all of them.
#[inline(never)]
fn suspend_below<S: System>(yielder: S::Yielder<'_, u64>, value: u64, depth: u32) -> u64 {
    match depth {
        0 => callee::<S>(yielder, value),
        _ => black_box(suspend_below::<S>(yielder, value, depth - 1)),
    }
}

#[inline(never)]
fn resume_here<S: System>(coroutine: &mut S::Coroutine<u64>, value: u64) -> u64 {
    black_box(S::resume(coroutine, value))
}

#[inline(never)]
fn resume_below<S: System>(coroutine: &mut S::Coroutine<u64>, value: u64, depth: u32) -> u64 {
    match depth {
        0 => resume_here::<S>(coroutine, value),
        _ => black_box(resume_below::<S>(coroutine, value, depth - 1)),
    }
}

/// Calls so many functions before it suspends, and so many before it resumes, all of which then return.
pub fn deep<S: System>(mut system: S, inside: u32, outside: u32) -> Run<'static> {
    let mut coroutine = system.spawn(move |yielder, mut value: u64| {
        loop {
            value = if inside == 0 {
                S::suspend(yielder, value)
            } else {
                suspend_below::<S>(yielder, value, inside - 1)
            };
        }
    });
    Box::new(move |count| {
        if outside == 0 {
            timed(count, || _ = black_box(S::resume(&mut coroutine, 1)))
        } else {
            timed(count, || _ = black_box(resume_below::<S>(&mut coroutine, 1, outside - 1)))
        }
    })
}

/// Walks over a search tree into which numbers were put at random, and suspends at each: at one place in the code, but at any
/// depth. Small enough that the processor learns the way, which it would now and then with a larger one.
pub fn tree_walk<S: System>(mut system: S) -> Run<'static> {
    let tree = tree(&order(Many { count: 255, shuffled: true, ..Many::default() }));
    let mut coroutine = system.spawn(move |yielder, _: u64| {
        loop {
            walk::<S>(&tree, 0, yielder);
        }
    });
    Box::new(move |count| timed(count, || _ = black_box(S::resume(&mut coroutine, 1))))
}

/// A node's number, and where those are that are less and greater.
struct Node {
    number: u32,
    children: [Option<usize>; 2],
}

/// The first number is at the root.
fn tree(numbers: &[u32]) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::new();
    for &number in numbers {
        let (new, mut at) = (nodes.len(), 0);
        nodes.push(Node { number, children: [None; 2] });
        while at != new {
            let side = usize::from(number > nodes[at].number);
            at = *nodes[at].children[side].get_or_insert(new);
        }
    }
    nodes
}

#[inline(never)]
fn walk<S: System>(tree: &[Node], at: usize, yielder: S::Yielder<'_, u64>) {
    let Node { number, children: [less, greater] } = tree[at];
    if let Some(less) = less {
        walk::<S>(tree, less, yielder);
    }
    black_box(S::suspend(yielder, number.into()));
    if let Some(greater) = greater {
        walk::<S>(tree, greater, yielder);
    }
}

/// 100 coroutines in turn, each at one of 16 places where it suspends.
pub fn sites<S: System>(mut system: S) -> Run<'static> {
    let mut coroutines: Vec<_> = (0..SITES_COROUTINES)
        .map(|_| {
            system.spawn(|yielder, mut value: u64| {
                loop {
                    macro_rules! suspend_at { ($($site:literal)*) => { $(
                        value = S::suspend(yielder, value + $site);
                    )* } }
                    suspend_at!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
                }
            })
        })
        .collect();
    // Neighbours are at different places.
    for (index, coroutine) in coroutines.iter_mut().enumerate() {
        (0..index * 7 % 16).for_each(|_| _ = S::resume(coroutine, 0));
    }
    Box::new(move |count| {
        timed(count, || coroutines.iter_mut().for_each(|one| _ = black_box(S::resume(one, 1))))
    })
}

pub const SITES_COROUTINES: u64 = 100;

/// In which order, and how, many coroutines are resumed.
#[derive(Clone, Copy, Default)]
pub struct Many {
    pub count: usize,
    pub shuffled: bool,
    /// Whether each suspends in a function called for it.
    pub in_callee: bool,
    /// How far ahead the next ones are fetched; 0: they are not.
    pub ahead: usize,
}

/// Many coroutines in turn; one operation is a pass over all.
pub fn many<S: System>(mut system: S, how: Many) -> Run<'static> {
    let mut coroutines: Vec<_> = (0..how.count)
        .map(|_| {
            system.spawn(move |yielder, mut value: u64| {
                loop {
                    value =
                        if how.in_callee { callee::<S>(yielder, value) } else { S::suspend(yielder, value) };
                }
            })
        })
        .collect();
    let order = order(how);
    Box::new(move |count| {
        timed(count, || match how.ahead {
            0 => order.iter().for_each(|&index| _ = black_box(S::resume(&mut coroutines[index as usize], 1))),
            ahead => {
                for (place, &index) in order.iter().enumerate() {
                    if let Some(&later) = order.get(place + ahead) {
                        S::prefetch(&coroutines[later as usize]);
                    }
                    black_box(S::resume(&mut coroutines[index as usize], 1));
                }
            }
        })
    })
}

/// The numbers of coroutines in the order in which they are resumed.
pub fn order(how: Many) -> Vec<u32> {
    let mut order: Vec<u32> = (0..how.count as u32).collect();
    if how.shuffled {
        let mut random = 0x2545_f491_4f6c_dd1du64;
        for last in (1..order.len()).rev() {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            order.swap(last, (random % (last as u64 + 1)) as usize);
        }
    }
    order
}
