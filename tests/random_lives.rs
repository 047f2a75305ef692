//! Random lives: coroutines of several spawn sites are made, resumed, made to grow and shrink, frozen, thawed, moved into pools
//! and between them, and dropped, while budgets change and the kernel now and then refuses memory. After every step
//! their locals are looked at, and all slots and blocks are counted.
//!
//! Cases run in a process of their own, so that one that crashes is a failure like any other: what fails is made smaller, printed
//! with its seed, and kept in `proptest-regressions/random_lives.txt`, which always runs. `PROPTEST_CASES` asks for more.
#![cfg(target_env = "gnu")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::cell::Cell;
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook};
use std::sync::Once;

use proptest::collection::vec;
use proptest::prelude::*;
use regrow::{Builder, Coroutine, CoroutineResult, Error, Key, Pool, Shrink, Yielder, slots};

#[path = "support/corpus.rs"]
mod corpus;
#[path = "support/failing.rs"]
mod failing;
mod support;
use failing::{failing, failing_but_open};
use support::{Counted, live};

/// What a coroutine is resumed with.
#[derive(Clone, Copy, Debug)]
enum Order {
    Add(u64),
    /// Go so many KiB deep, and come back.
    Deep(u64),
    End,
}

/// Its sum so far, and where that is.
type Answer = (u64, usize);
type Life = Coroutine<Order, Answer, u64>;

/// A local of each of several frames, with a reference to its caller's.
struct Level<'a> {
    own: u64,
    caller: Option<&'a Level<'a>>,
}

/// The frames of a coroutine: as many levels as its seed says, and the outermost holds the sum.
fn levels(seed: u64) -> u64 {
    seed % 13
}

#[inline(never)]
fn level(
    yielder: &Yielder<Order, Answer>,
    caller: Option<&Level>,
    below: u64,
    seed: u64,
    sum: &mut u64,
    first: Order,
) {
    let here = black_box(Level { own: seed ^ below, caller });
    if below > 0 {
        level(yielder, Some(&here), below - 1, seed, sum, first);
    } else {
        obey(yielder, &here, seed, sum, first);
    }
    assert_eq!(black_box(&here).own, seed ^ below);
}

#[inline(never)]
fn obey(yielder: &Yielder<Order, Answer>, innermost: &Level, seed: u64, sum: &mut u64, mut order: Order) {
    loop {
        match order {
            Order::Add(number) => *sum += number,
            Order::Deep(kib) => assert_eq!(deep(kib), (0..=kib).sum::<u64>()),
            Order::End => return,
        }
        order = yielder.suspend((*sum, &raw const *sum as usize));
        let mut count = 0;
        let mut next = Some(innermost);
        while let Some(level) = next {
            assert_eq!(level.own, seed ^ count, "a local {count} frames up");
            count += 1;
            next = level.caller;
        }
        assert_eq!(count, levels(seed) + 1);
    }
}

/// Takes at least so many KiB of stack.
#[inline(never)]
fn deep(kib: u64) -> u64 {
    let local = black_box([kib as u8; 1024]);
    let below = if kib > 0 { deep(kib - 1) } else { 0 };
    below + u64::from(local[kib as usize])
}

fn outermost(yielder: &Yielder<Order, Answer>, first: Order, seed: u64) -> u64 {
    let mut sum = 0;
    level(yielder, None, levels(seed), seed, &mut sum, first);
    sum
}

/// Spawns at one of several sites. Their closures differ in size, and what they need at first: nothing; always the same; more
/// than the largest first size, with a closure that is boxed; now this, now that.
fn spawn(site: u8, builder: &Builder, seed: u64) -> Result<Life, Error> {
    let counted = Counted::new(());
    match site {
        0 => builder.try_spawn(move |yielder: &Yielder<Order, Answer>, first| {
            let _counted = counted;
            outermost(yielder, first, seed)
        }),
        1 => {
            let captured = [seed; 20];
            builder.try_spawn(move |yielder: &Yielder<Order, Answer>, first| {
                let _counted = counted;
                deep(6);
                let sum = outermost(yielder, first, seed);
                assert_eq!(black_box(&captured), &[seed; 20]);
                sum
            })
        }
        2 => {
            let captured = [seed; 200];
            builder.try_spawn(move |yielder: &Yielder<Order, Answer>, first| {
                let _counted = counted;
                deep(24);
                let sum = outermost(yielder, first, seed);
                assert_eq!(black_box(&captured), &[seed; 200]);
                sum
            })
        }
        _ => builder.try_spawn(move |yielder: &Yielder<Order, Answer>, first| {
            let _counted = counted;
            if seed.is_multiple_of(3) {
                deep(30);
            }
            outermost(yielder, first, seed)
        }),
    }
}

/// How a coroutine is made.
#[derive(Clone, Copy, Debug)]
struct Kind {
    site: u8,
    moves: bool,
    first_log: u8,
    shrink: u8,
    named: bool,
    learn: bool,
    seed: u64,
}

impl Kind {
    fn builder(self) -> Builder {
        let shrink = [Shrink::Off, Shrink::Default, Shrink::Eager][usize::from(self.shrink)];
        let builder = Builder::new().first_size(1 << self.first_log).maximum(1 << 20);
        let builder = builder.shrink(shrink).learn(self.learn).slack_first(!self.seed.is_multiple_of(2));
        let builder = if self.named { builder.name("somebody") } else { builder };
        // SAFETY: the address of a sum that leaves the stack is used for stacks that stay only.
        if self.moves { unsafe { builder.relocating() } } else { builder }
    }
}

/// Which mapping call of a step fails: this one, and if it says so those after it.
type Failure = Option<(i32, bool)>;

/// One step: what is done to the coroutine of that number, or to the whole.
#[derive(Clone, Debug)]
enum Step {
    Spawn(Kind, Failure),
    Add(usize, u64, Failure),
    Deep(usize, u64, Failure),
    Shrink(usize, Failure),
    Freeze(usize, Failure),
    Thaw(usize, Failure),
    /// Somebody reads a local of a stack that stays, frozen or not.
    Look(usize),
    End(usize),
    Drop(usize),
    /// Out of where it is, into this pool or none.
    Move(usize, usize),
    Budget(usize, usize),
    TrimPool(usize),
    TrimThread,
}

const POOLS: usize = 2;
/// More coroutines than this are not alive at a time.
const MOST: usize = 10;

fn kinds() -> impl Strategy<Value = Kind> {
    let flags = any::<[bool; 3]>();
    (0..4u8, 11..15u8, 0..3u8, flags, 0..1000u64).prop_map(
        |(site, first_log, shrink, [moves, named, learn], seed)| Kind {
            site,
            moves,
            first_log,
            shrink,
            named,
            learn,
            seed,
        },
    )
}

fn steps() -> impl Strategy<Value = Step> {
    let failure = || prop_oneof![3 => Just(None), 1 => (0..8, any::<bool>()).prop_map(Some)];
    let which = 0..MOST;
    prop_oneof![
        5 => (kinds(), failure()).prop_map(|(kind, failure)| Step::Spawn(kind, failure)),
        4 => (which.clone(), 1..1000u64, failure()).prop_map(|(which, number, f)| Step::Add(which, number, f)),
        5 => (which.clone(), 0..60u64, failure()).prop_map(|(which, kib, f)| Step::Deep(which, kib, f)),
        3 => (which.clone(), failure()).prop_map(|(which, failure)| Step::Shrink(which, failure)),
        6 => (which.clone(), failure()).prop_map(|(which, failure)| Step::Freeze(which, failure)),
        4 => (which.clone(), failure()).prop_map(|(which, failure)| Step::Thaw(which, failure)),
        2 => which.clone().prop_map(Step::Look),
        2 => which.clone().prop_map(Step::End),
        2 => which.clone().prop_map(Step::Drop),
        4 => (which, 0..=POOLS).prop_map(|(which, to)| Step::Move(which, to)),
        2 => (0..POOLS, 0..40usize).prop_map(|(pool, pages)| Step::Budget(pool, pages * 4096)),
        1 => (0..POOLS).prop_map(Step::TrimPool),
        1 => Just(Step::TrimThread),
    ]
}

/// Where a coroutine is.
enum Home {
    None(Life),
    Pool(usize, Key),
}

/// What is known of a coroutine.
#[derive(Clone, Copy)]
struct Facts {
    kind: Kind,
    sum: u64,
    /// Where its sum is, once it has run; for a stack that stays.
    address: Option<usize>,
}

struct World {
    pools: [Pool<Order, Answer, u64>; POOLS],
    all: Vec<(Home, Facts)>,
}

impl World {
    fn life(&self, which: usize) -> &Life {
        match &self.all[which].0 {
            Home::None(life) => life,
            Home::Pool(pool, key) => self.pools[*pool].get(*key).expect("it is in its pool"),
        }
    }

    fn take_step(&mut self, step: &Step) {
        match *step {
            Step::Spawn(kind, failure) => self.spawn(kind, failure),
            Step::Add(which, number, failure) => self.resume(which, Order::Add(number), failure),
            Step::Deep(which, kib, failure) => self.resume(which, Order::Deep(kib), failure),
            Step::End(which) => self.resume(which, Order::End, None),
            Step::Shrink(which, failure) => self.by_hand(which, |life, _| {
                let shrunk = with(failure, || life.shrink());
                assert!(failure.is_some() || shrunk.is_ok());
            }),
            Step::Freeze(which, failure) => self.by_hand(which, |life, _| {
                let can = life.started();
                let frozen = with(failure, || life.freeze());
                assert!(failure.is_some() || frozen.is_ok_and(|it| it == can), "{:?}", life.last_not_moved());
            }),
            Step::Thaw(which, failure) => self.by_hand(which, |life, _| {
                let frozen = life.is_frozen();
                let thawed = with(failure, || life.thaw());
                assert!(failure.is_some() || thawed.is_ok());
                assert_eq!(life.is_frozen(), frozen && thawed.is_err());
            }),
            Step::Look(which) => {
                if let Some((_, Facts { address: Some(address), sum, .. })) = self.all.get(which) {
                    // SAFETY: a local of a suspended coroutine whose stack stays.
                    assert_eq!(unsafe { (*address as *const u64).read_volatile() }, *sum);
                }
            }
            Step::Drop(which) => drop(self.take(which)),
            Step::Move(which, to) => {
                if let Some((life, facts)) = self.take(which) {
                    self.put(life, facts, to.checked_sub(1));
                }
            }
            Step::Budget(pool, bytes) => self.pools[pool].set_budget(bytes),
            Step::TrimPool(pool) => drop(self.pools[pool].trim()),
            Step::TrimThread => drop(regrow::trim()),
        }
    }

    fn spawn(&mut self, kind: Kind, failure: Failure) {
        if self.all.len() == MOST {
            return;
        }
        match with(failure, || spawn(kind.site, &kind.builder(), kind.seed)) {
            Ok(life) => self.put(life, Facts { kind, sum: 0, address: None }, None),
            Err(error) => assert!(failure.is_some(), "{error}"),
        }
    }

    /// Takes a coroutine off the list, and out of its pool if it is in one.
    fn take(&mut self, which: usize) -> Option<(Life, Facts)> {
        if which >= self.all.len() {
            return None;
        }
        let (home, facts) = self.all.swap_remove(which);
        let life = match home {
            Home::None(life) => life,
            Home::Pool(pool, key) => self.pools[pool].remove(key).expect("it is in its pool"),
        };
        Some((life, facts))
    }

    fn put(&mut self, life: Life, facts: Facts, pool: Option<usize>) {
        let home = match pool {
            None => Home::None(life),
            Some(pool) => Home::Pool(pool, self.pools[pool].insert(life)),
        };
        self.all.push((home, facts));
    }

    /// Does what only the owner can do to a coroutine: not to one in a pool.
    fn by_hand(&mut self, which: usize, step: impl FnOnce(&mut Life, Kind)) {
        if let Some((Home::None(life), facts)) = self.all.get_mut(which) {
            step(life, facts.kind);
        }
    }

    /// Resumes a coroutine. A failure is of a call that takes access or address space: without memory a stack may stay
    /// frozen, then the resume panics, or grow in place instead of moving.
    fn resume(&mut self, which: usize, order: Order, failure: Failure) {
        let Some((home, facts)) = self.all.get_mut(which) else { return };
        let pools = &mut self.pools;
        let (result, failed) = failing_but_open(failure.map_or(-1, |(number, _)| number), || {
            catch_unwind(AssertUnwindSafe(|| match home {
                Home::None(life) => life.resume(order),
                Home::Pool(pool, key) => pools[*pool].resume(*key, order).expect("it is in its pool"),
            }))
        });
        if let Order::Add(number) = order
            && result.is_ok()
        {
            facts.sum += number;
        }
        match (result, order) {
            (Ok(CoroutineResult::Yield((sum, address))), Order::Add(_) | Order::Deep(_)) => {
                assert_eq!(sum, facts.sum);
                facts.address = (!facts.kind.moves).then_some(address);
            }
            (Ok(CoroutineResult::Return(sum)), Order::End) => {
                assert_eq!(sum, facts.sum);
                let (home, _) = self.all.swap_remove(which);
                assert!(matches!(home, Home::Pool(..)) || matches!(home, Home::None(life) if life.done()));
            }
            (Ok(result), _) => panic!("{result:?} to {order:?}"),
            (Err(payload), _) if !failed => resume_unwind(payload),
            (Err(payload), _) => {
                assert!(says_that_it_is_frozen(&*payload));
                assert!(self.life(which).is_frozen());
            }
        }
    }

    /// Looks at the locals of every coroutine that has run: it looks itself, when it is resumed. Those that are frozen
    /// are, if `wake` says so, and frozen again.
    fn check_locals(&mut self, wake: bool) {
        for which in 0..self.all.len() {
            let frozen = self.life(which).is_frozen();
            if self.life(which).started() && (wake || !frozen) {
                self.resume(which, Order::Add(1), None);
                if frozen {
                    self.take_step(&Step::Freeze(which, None));
                }
            }
        }
    }

    /// No slot is lost and none handed out twice; every block is that of a coroutine that is frozen.
    fn check_memory(&self) {
        let frozen = |moves: bool| {
            let is = |which: &usize| self.all[*which].1.kind.moves == moves && self.life(*which).is_frozen();
            (0..self.all.len()).filter(is).count()
        };
        let slots = slots();
        assert_eq!(slots.twice, 0, "{slots:?}");
        assert_eq!(slots.in_use, self.all.len() - frozen(true), "{slots:?}");
        let stats = |which: usize| self.life(which).stats();
        let moves: u64 = (0..self.all.len()).map(|which| stats(which).growths + stats(which).shrinks).sum();
        assert!(slots.old as u64 <= moves, "{slots:?}, {moves} moves");

        // One block for each, and one for its record if there is more to it.
        let frozen = (frozen(true) + frozen(false)) as isize;
        let blocks = BLOCKS.get();
        assert!((frozen..=2 * frozen).contains(&blocks), "{blocks} blocks of {frozen} frozen coroutines");
        assert_eq!(live(), self.all.len() as isize);
    }
}

/// Does something with a call of it failing.
fn with<R>(failure: Failure, f: impl FnOnce() -> R) -> R {
    let (number, persists) = failure.unwrap_or((-1, false));
    failing(number, persists, f).0
}

/// The panic of a resume for which there was no memory.
fn says_that_it_is_frozen(payload: &(dyn Any + Send)) -> bool {
    payload.downcast_ref::<String>().is_some_and(|said| said.starts_with("cannot resume a frozen coroutine"))
}

/// Has the process allocate what it keeps for good, and keeps the panics quiet that are meant: their backtraces would
/// leave allocations behind, too.
fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        support::run(&support::relocating(), || support::frame::<9000>(1)); // unwind tables
        let usual = take_hook();
        set_hook(Box::new(move |panic| {
            if !says_that_it_is_frozen(panic.payload()) {
                usual(panic);
            }
        }));
    });
}

/// Frees the blocks of stacks that the fault handler has thawed: freezing does, and what changes a pool.
fn free_thawed(pools: &mut [Pool<Order, Answer, u64>]) {
    let mut coroutine = Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
    coroutine.resume(());
    assert!(coroutine.freeze().is_ok_and(|frozen| frozen));
    for pool in pools {
        pool.set_budget(pool.budget());
    }
}

/// Counts what is aligned as nothing but blocks of frozen coroutines and records are.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    /// How many blocks this thread has.
    static BLOCKS: Cell<isize> = const { Cell::new(0) };
}

impl Counting {
    fn count(layout: Layout, number: isize) {
        if layout.align() >= 16 {
            BLOCKS.set(BLOCKS.get() + number);
        }
    }
}

// SAFETY: all of it is the system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout, 1);
        // SAFETY: by the caller's word.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        Self::count(layout, -1);
        // SAFETY: by the caller's word.
        unsafe { System.dealloc(at, layout) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        fork: true,
        ..corpus::cases(300)
    })]

    #[test]
    fn nothing_is_lost(steps in vec(steps(), 1..120), wake in any::<bool>()) {
        prepare();
        let blocks = BLOCKS.replace(0);
        let mut world = World { pools: [Pool::new(5 * 4096), Pool::new(40 * 4096)], all: Vec::new() };
        for step in &steps {
            world.take_step(step);
            free_thawed(&mut world.pools);
            world.check_memory();
            world.check_locals(wake);
            world.check_memory();
        }
        drop(world);
        let slots = slots();
        prop_assert_eq!((slots.in_use, slots.old, slots.twice), (0, 0, 0));
        prop_assert_eq!((BLOCKS.replace(blocks), live()), (0, 0));
        regrow::trim();
        let after = regrow::slots();
        prop_assert_eq!((after.free, after.cached), (slots.free + slots.cached, 0));
        prop_assert_eq!((after.in_use, after.old, after.twice), (0, 0, 0));
    }
}
