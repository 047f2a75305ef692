//! The baseline without stacks: `async` functions whose futures are polled by hand.

use std::cell::Cell;
use std::future::Future;
use std::hint::black_box;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::measure::{Run, placed, timed};
use super::shapes::{Many, SITES_COROUTINES, order};

/// Pending once.
struct Pause(bool);

impl Future for Pause {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// Values go both ways through a cell.
type Slot<V> = Rc<Cell<V>>;
type Task = Pin<Box<dyn Future<Output = ()>>>;

async fn suspend<V: Default>(slot: &Cell<V>, value: V) -> V {
    slot.set(value);
    Pause(false).await;
    slot.take()
}

async fn callee(slot: &Cell<u64>, value: u64) -> u64 {
    black_box(suspend(slot, value).await)
}

macro_rules! levels { ($($name:ident calls $next:ident;)*) => { $(
    async fn $name(slot: &Cell<u64>, value: u64) -> u64 {
        black_box($next(slot, value).await)
    }
)* } }
levels! { down_2 calls callee; down_3 calls down_2; down_4 calls down_3; down_5 calls down_4; }

fn resume<V>(task: &mut Task, slot: &Cell<V>, value: V) -> V
where
    V: Default,
{
    slot.set(value);
    let _ = task.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    slot.take()
}

fn one<V: Default + 'static, const PLACE: usize>(task: impl FnOnce(Slot<V>) -> Task) -> Run<'static> {
    let slot = Slot::<V>::default();
    let mut task = task(Rc::clone(&slot));
    Box::new(move |count| {
        placed::<PLACE>();
        timed(count, || _ = black_box(resume(&mut task, &slot, V::default())))
    })
}

pub fn root_loop<V: Default + 'static, const PLACE: usize>() -> Run<'static> {
    one::<V, PLACE>(|slot| {
        Box::pin(async move {
            placed::<PLACE>();
            let mut value = slot.take();
            loop {
                value = suspend(&slot, value).await;
            }
        })
    })
}

/// Suspends in a function called for it; or in one five calls down.
pub fn calling(deep: bool) -> Run<'static> {
    one::<_, 0>(move |slot: Slot<u64>| {
        Box::pin(async move {
            let mut value = slot.take();
            loop {
                value = if deep { down_5(&slot, value).await } else { callee(&slot, value).await };
            }
        })
    })
}

pub fn sites() -> Run<'static> {
    let slot = Slot::<u64>::default();
    let task = |slot: Slot<u64>| -> Task {
        Box::pin(async move {
            let mut value = slot.take();
            loop {
                macro_rules! suspend_at { ($($site:literal)*) => { $(
                    value = suspend(&slot, value + $site).await;
                )* } }
                suspend_at!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            }
        })
    };
    let mut tasks: Vec<_> = (0..SITES_COROUTINES).map(|_| task(Rc::clone(&slot))).collect();
    for (index, task) in tasks.iter_mut().enumerate() {
        (0..index * 7 % 16).for_each(|_| _ = resume(task, &slot, 0));
    }
    Box::new(move |count| {
        timed(count, || tasks.iter_mut().for_each(|task| _ = black_box(resume(task, &slot, 1))))
    })
}

pub fn many(how: Many) -> Run<'static> {
    let slot = Slot::<u64>::default();
    let task = |slot: Slot<u64>| -> Task {
        Box::pin(async move {
            let mut value = slot.take();
            loop {
                value = if how.in_callee { callee(&slot, value).await } else { suspend(&slot, value).await };
            }
        })
    };
    let mut tasks: Vec<_> = (0..how.count).map(|_| task(Rc::clone(&slot))).collect();
    let order = order(how);
    Box::new(move |count| {
        timed(count, || {
            order.iter().for_each(|&index| _ = black_box(resume(&mut tasks[index as usize], &slot, 1)));
        })
    })
}

/// Boxed, polled to its end, freed.
pub fn created() -> Run<'static> {
    let slot = Slot::<u64>::default();
    Box::new(move |count| {
        timed(count, || {
            let inside = Rc::clone(&slot);
            let mut task: Task = black_box(Box::pin(async move { inside.set(inside.get() + 1) }));
            _ = black_box(resume(&mut task, &slot, 1));
        })
    })
}
