//! The shapes of a coroutine's life: created, run, finished.

use std::cell::RefCell;
use std::hint::black_box;
use std::rc::Rc;

use corosensei::stack::DefaultStack;
use regrow::Coroutine;

use super::measure::{Run, now, timed};
use super::systems::System;

/// Creates a coroutine, runs it, and takes its result, on the stack of the one before.
pub fn regrow_reused() -> Run<'static> {
    Box::new(|count| {
        timed(count, || {
            let mut coroutine = Coroutine::<u64, (), u64>::new(|_, value| value + 1);
            _ = black_box(coroutine.resume(1));
        })
    })
}

pub fn corosensei_reused() -> Run<'static> {
    let mut stack = Some(DefaultStack::new(16 << 10).expect("a stack"));
    Box::new(move |count| {
        timed(count, || {
            let own = stack.take().expect("put back below");
            let mut coroutine =
                corosensei::Coroutine::<u64, (), u64, _>::with_stack(own, |_, value| value + 1);
            _ = black_box(coroutine.resume(1).as_return());
            stack = Some(coroutine.into_stack());
        })
    })
}

pub fn generator_reused() -> Run<'static> {
    let mut generator = generator::Gn::<u64>::new_scoped_opt(0x800, |_| 0);
    generator.send(1);
    Box::new(move |count| {
        timed(count, || {
            generator.scoped_init(|mut scope: generator::Scope<'_, '_, u64, u64>| {
                scope.get_yield().unwrap_or(0) + 1
            });
            _ = black_box(generator.send(1));
        })
    })
}

/// How many live at once where stacks are new.
pub const NEW: u64 = 500;

/// Creates coroutines on stacks that were never used, all alive at once, runs each until it suspends, and then to its
/// end. One operation is [`NEW`] of them. Their stacks are kept from being used again.
pub fn new_stacks<S: System>(system: S) -> Run<'static> {
    let system = Rc::new(RefCell::new(system));
    let mut kept = Vec::new();
    Box::new(move |count| {
        let mut time = std::time::Duration::ZERO;
        for _ in 0..count {
            let start = now();
            let mut all: Vec<_> = (0..NEW)
                .map(|_| {
                    let mut one =
                        system.borrow_mut().spawn(|yielder, value: u64| _ = S::suspend(yielder, value));
                    S::resume(&mut one, 1);
                    one
                })
                .collect();
            all.iter_mut().for_each(|one| _ = black_box(S::resume(one, 1)));
            drop(all);
            time += now() - start;
            if S::KEEPS_STACKS {
                kept.extend((0..NEW).map(|_| system.borrow_mut().spawn(|_, _: u64| ())));
            }
        }
        time
    })
}
