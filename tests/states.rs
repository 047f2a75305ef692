//! Where a coroutine is, is known whatever is asked: suspended on another stack than its own, running, frozen.

use std::arch::{asm, global_asm};
use std::cell::RefCell;
use std::ffi::{CString, c_void};
use std::hint::black_box;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::ptr;

use regrow::frames::State;
use regrow::{
    Builder, Coroutine, Growth, Pool, Reason, Shrink, Yielder, current_stats, not_moved, pin, pinned_room,
    reserve,
};

mod support;
use support::{Counted, OnDrop, Way, both_ways, builders, frame, live, relocating, this_test, variant};

type Asked = Coroutine<(), u64, u64>;

// --- suspended on another stack ----------------------------------------------------------------------------------

/// Where the other stack lies.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Place {
    /// Where `stacker` has it.
    Stacker,
    /// 64 GiB above the coroutine's own.
    Above,
    /// 64 GiB below.
    Below,
    /// In the stack of another coroutine, which is suspended.
    InAnothersStack,
}

const PLACES: [Place; 4] = [Place::Stacker, Place::Above, Place::Below, Place::InAnothersStack];

/// Calls `f` on the stack that ends at `end`.
fn call_on(end: usize, mut f: &mut dyn FnMut()) {
    extern "C" fn call(f: &mut &mut dyn FnMut()) {
        f();
    }
    // SAFETY: the callers give memory that is nobody else's meanwhile, its end a multiple of 16; `call` does not unwind, and keeps r12.
    unsafe {
        asm!(
            "xchg rsp, r12",
            "call {call}",
            "mov rsp, r12",
            call = in(reg) call as extern "C" fn(&mut &mut dyn FnMut()),
            inout("r12") end & !15 => _,
            in("rdi") &raw mut f,
            clobber_abi("C"),
        );
    }
}

/// A mapping near `wanted`.
fn mapping(wanted: usize, bytes: usize) -> usize {
    // SAFETY: a new mapping, which replaces nothing.
    let start = unsafe {
        libc::mmap(
            wanted as *mut _,
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(start, libc::MAP_FAILED);
    start as usize
}

/// Calls `f` on another stack.
fn elsewhere(place: Place, f: &mut dyn FnMut()) {
    const BYTES: usize = 256 << 10;
    const FAR: usize = 64 << 30;
    let local = 0u8;
    let here = &raw const local as usize;
    match place {
        Place::Stacker => stacker::grow(BYTES, f),
        Place::Above | Place::Below => {
            let wanted = if place == Place::Above { here + FAR } else { here - FAR };
            let start = mapping(wanted & !4095, BYTES);
            assert_eq!(start > here, place == Place::Above, "{start:#x}, {here:#x}");
            call_on(start + BYTES, f);
            // SAFETY: mapped above, and nothing runs there any more.
            unsafe { libc::munmap(start as *mut _, BYTES) };
        }
        Place::InAnothersStack => {
            let mut host = Builder::new().spawn(|yielder: &Yielder<(), usize>, ()| {
                let mut room = [0u8; 64 << 10];
                yielder.suspend(black_box(room.as_mut_ptr()) as usize + room.len());
                black_box(&room);
            });
            let end = host.resume(()).yielded().unwrap();
            call_on(end, f);
        }
    }
}

/// A coroutine that has grown, has an array alive, and suspends three times on another stack.
fn goes_elsewhere(builder: &Builder, place: Place) -> Asked {
    const LIVE: u64 = 0x5555_5555_5555_5555;
    let mut coroutine = builder.spawn(move |yielder: &Yielder<(), u64>, ()| {
        black_box(frame::<20_000>(1));
        yielder.suspend(0);
        let live = black_box([LIVE; 2000]); // more than a quarter of the stack
        for number in 1..=3 {
            elsewhere(place, &mut || yielder.suspend(number));
        }
        black_box(&live).iter().filter(|&&word| word != LIVE).count() as u64
    });
    assert_eq!(coroutine.resume(()).yielded(), Some(0));
    coroutine
}

/// Asks all that can be asked of a coroutine that has suspended on another stack.
fn ask_elsewhere(coroutine: &mut Asked, growth: Growth) {
    let before = coroutine.stats();
    assert!(!coroutine.shrink().unwrap());
    assert!(!coroutine.freeze().unwrap());
    assert!(!coroutine.is_frozen());
    coroutine.thaw().unwrap();
    let frames = coroutine.frames();
    assert_eq!((frames.state, frames.growth, frames.used), (State::OnAnotherStack, growth, 0));
    assert!(frames.frames.is_empty());
    assert!(frames.to_string().contains("on another stack"), "{frames}");
    assert_eq!(coroutine.stats(), before);
    assert_eq!((coroutine.growth(), coroutine.started(), coroutine.done()), (growth, true, false));
    assert!(coroutine.bytes() > 0);
    assert!(!format!("{coroutine:?}").is_empty());
}

#[test]
fn a_coroutine_that_suspends_on_another_stack_loses_nothing() {
    for shrink in [Shrink::Default, Shrink::Eager, Shrink::Off] {
        both_ways(|builder| {
            for place in PLACES {
                for asked in [false, true] {
                    let mut coroutine = goes_elsewhere(&builder.clone().shrink(shrink), place);
                    let growth = coroutine.growth();
                    for number in 1..=3 {
                        assert_eq!(coroutine.resume(()).yielded(), Some(number));
                        if asked {
                            ask_elsewhere(&mut coroutine, growth);
                        }
                    }
                    let damaged = coroutine.resume(()).returned();
                    assert_eq!(damaged, Some(0), "{growth:?}, {place:?}, {shrink:?}, asked: {asked}");
                }
            }
        });
    }
}

#[test]
fn a_coroutine_dropped_on_another_stack_unwinds_both() {
    both_ways(|builder| {
        for grown in [false, true] {
            let mut coroutine = builder.spawn(move |yielder: &Yielder<(), ()>, ()| {
                let _own = Counted::new(1);
                if grown {
                    black_box(frame::<20_000>(1));
                }
                stacker::grow(64 << 10, || {
                    let _other = Counted::new(2);
                    yielder.suspend(());
                });
            });
            coroutine.resume(());
            assert_eq!(live(), 2);
            drop(coroutine);
            assert_eq!(live(), 0);
        }
    });
}

#[test]
fn shrinking_goes_on_when_a_coroutine_is_back_on_its_own_stack() {
    let mut coroutine = relocating().shrink(Shrink::Eager).spawn(|yielder: &Yielder<(), ()>, ()| {
        black_box(frame::<20_000>(1));
        stacker::grow(64 << 10, || {
            (0..5).for_each(|_| yielder.suspend(()));
        });
        loop {
            yielder.suspend(());
        }
    });
    for _ in 0..5 {
        coroutine.resume(());
        assert!(coroutine.stats().size > 20_000, "on another stack nobody sees how much of it is used");
    }
    for _ in 0..5 {
        coroutine.resume(());
    }
    assert!(coroutine.stats().size < 20_000, "{:?}", coroutine.stats());
}

#[test]
fn a_pool_keeps_what_is_on_another_stack_as_it_is() {
    both_ways(|builder| {
        let mut pool = Pool::new(0);
        let keys = PLACES.map(|place| pool.insert(goes_elsewhere(&builder, place)));
        for number in 1..=3 {
            for key in keys {
                assert_eq!(pool.resume(key, ()).unwrap().yielded(), Some(number));
            }
            let stats = pool.stats();
            assert_eq!((stats.live, stats.frozen), (PLACES.len(), 0));
            assert_eq!(pool.trim(), 0);
        }
        for key in keys {
            assert_eq!(pool.resume(key, ()).unwrap().returned(), Some(0));
        }
    });
}

#[test]
fn a_stack_that_may_move_says_that_its_code_was_on_another() {
    let mut coroutine = goes_elsewhere(&relocating(), Place::Stacker);
    coroutine.resume(());
    for refused in [Coroutine::shrink, Coroutine::freeze] as [fn(&mut Asked) -> _; 2] {
        let before = count(Reason::OnAnotherStack);
        assert!(!refused(&mut coroutine).unwrap());
        assert!(count(Reason::OnAnotherStack) > before);
        assert_eq!(coroutine.last_not_moved().unwrap().reason, Reason::OnAnotherStack);
    }
}

#[test]
fn what_a_coroutine_asks_on_another_stack_is_about_its_own_or_nothing() {
    both_ways(|builder| {
        for place in PLACES {
            let mut coroutine = builder.spawn(move |_: &Yielder<(), ()>, ()| {
                elsewhere(place, &mut || {
                    let before = current_stats().unwrap();
                    let pin = pin();
                    for bytes in [0, 1000, 100_000, 1 << 40, usize::MAX] {
                        reserve(bytes).unwrap(); // as outside coroutines
                    }
                    assert_eq!(pinned_room(), None);
                    drop(pin);
                    assert_eq!(current_stats().unwrap(), before);
                });
                reserve(30_000).unwrap();
                assert!(pinned_room().is_some());
            });
            coroutine.resume(());
        }
    });
}

// --- running -----------------------------------------------------------------------------------------------------

thread_local! {
    static OUTER: RefCell<Option<Coroutine<(), (), ()>>> = const { RefCell::new(None) };
    static INNER: RefCell<Option<Coroutine<(), (), ()>>> = const { RefCell::new(None) };
    static CURIOUS: RefCell<Option<Curious>> = const { RefCell::new(None) };
}

/// Asks its coroutine all that can be asked, when it is dropped.
struct Curious(Coroutine<(), (), ()>);

impl Drop for Curious {
    fn drop(&mut self) {
        let coroutine = &mut self.0;
        assert!(coroutine.started() && !coroutine.done() && !coroutine.is_frozen());
        assert_eq!(coroutine.name(), Some("runner"));
        assert!(coroutine.bytes() > 0);
        let stats = coroutine.stats();
        assert!(!coroutine.shrink().unwrap());
        assert!(!coroutine.freeze().unwrap());
        coroutine.thaw().unwrap();
        let frames = coroutine.frames();
        assert_eq!((frames.state, frames.growth, frames.used), (State::Running, coroutine.growth(), 0));
        assert!(frames.to_string().contains("running"));
        assert_eq!(coroutine.stats(), stats);
        assert!(format!("{coroutine:?}").contains("started: true"));
        println!("asked");
    }
}

fn exit_inside() {
    let words = black_box([0x4141_4141_4141_4141u64; 64]);
    black_box(&words);
    std::process::exit(5);
}

/// A coroutine that suspends once, and then does `last`, which exits.
fn exits(builder: &Builder, last: fn()) -> Coroutine<(), (), ()> {
    builder.clone().name("runner").spawn(move |yielder: &Yielder<(), ()>, ()| {
        let _owned = OnDrop(|| println!("dropped its frames"));
        {
            let boxed = OnDrop(|| println!("dropped twice"));
            yielder.suspend(());
            std::mem::forget(boxed);
        }
        last();
    })
}

fn resume_outer() {
    OUTER.with_borrow_mut(|coroutine| coroutine.as_mut().unwrap().resume(()));
}

fn resume_inner() {
    INNER.with_borrow_mut(|coroutine| coroutine.as_mut().unwrap().resume(()));
}

fn grow_and_exit() {
    black_box(frame::<50_000>(1));
    exit_inside();
}

fn exit_elsewhere() {
    stacker::grow(64 << 10, exit_inside);
}

/// A coroutine that is dropped, and exits then.
fn exits_when_it_is_dropped(builder: &Builder) -> Coroutine<(), (), ()> {
    builder.spawn(|yielder: &Yielder<(), ()>, ()| {
        let _exits = OnDrop(exit_inside);
        yielder.suspend(());
    })
}

#[test]
fn a_coroutine_that_is_dropped_while_it_runs_is_leaked() {
    type Case = (&'static str, fn(&Builder));
    let ways: [Case; 7] = [
        ("runs", |builder| {
            OUTER.set(Some(exits(builder, exit_inside)));
            resume_outer();
            resume_outer();
        }),
        ("has grown", |builder| {
            OUTER.set(Some(exits(builder, grow_and_exit)));
            resume_outer();
            resume_outer();
        }),
        ("is on another stack", |builder| {
            OUTER.set(Some(exits(builder, exit_elsewhere)));
            resume_outer();
            resume_outer();
        }),
        ("waits for another", |builder| {
            OUTER.set(Some(exits(builder, resume_inner)));
            INNER.set(Some(exits(builder, grow_and_exit)));
            resume_inner();
            resume_outer();
            resume_outer();
        }),
        ("is being dropped", |builder| {
            OUTER.set(Some(exits_when_it_is_dropped(builder)));
            resume_outer();
            OUTER.with_borrow_mut(|coroutine| *coroutine = None);
        }),
        ("is asked", |builder| {
            CURIOUS.set(Some(Curious(exits(builder, grow_and_exit))));
            let resume = || CURIOUS.with_borrow_mut(|curious| curious.as_mut().unwrap().0.resume(()));
            resume();
            resume();
        }),
        ("is another's", |builder| {
            OUTER.set(Some(exits(builder, exit_inside)));
            INNER.set(Some(exits(builder, || ())));
            resume_inner();
            resume_outer();
            resume_outer();
        }),
    ];
    let Some(variant) = variant() else {
        for (name, _) in ways {
            for growth in Way::BOTH {
                let outcome = this_test!().child(format!("{growth}, {name}"));
                assert_eq!(outcome.status.code(), Some(5), "{growth}, {name}: {outcome}");
                // One that is suspended all the same is unwound.
                let dropped = outcome.stdout.matches("dropped its frames").count();
                assert_eq!(dropped, usize::from(name == "is another's"), "{growth}, {name}: {outcome}");
                let asked = outcome.stdout.contains("asked");
                assert_eq!(asked, name == "is asked", "{growth}, {name}: {outcome}");
            }
        }
        return;
    };
    let (growth, way) = variant.split_once(", ").unwrap();
    let (_, f) = ways.into_iter().find(|&(name, _)| name == way).unwrap();
    // With room for what runs on its stack at the end: whether it can still grow there is another question.
    f(&Way::named(growth).builder().first_size(32 << 10));
}

// --- frozen ------------------------------------------------------------------------------------------------------

fn count(reason: Reason) -> u64 {
    not_moved().find(|(other, _)| *other == reason).unwrap().1
}

/// A coroutine that has grown and then suspends for ever.
fn has_grown(builder: &Builder) -> Coroutine<(), u64, ()> {
    let mut coroutine = builder.spawn(|yielder: &Yielder<(), u64>, ()| {
        black_box(frame::<10_000>(1));
        for number in 0.. {
            yielder.suspend(number);
        }
    });
    coroutine.resume(());
    coroutine
}

#[test]
fn a_frozen_coroutine_answers_as_before() {
    both_ways(|builder| {
        let mut coroutine = builder.clone().name("answers").spawn(|yielder: &Yielder<(), ()>, ()| {
            let pin = pin();
            black_box(frame::<10_000>(1));
            black_box(&mut [0u8; 40_000]); // whose zeros look like memory that nobody has used
            drop(pin);
            yielder.suspend(());
        });
        coroutine.resume(());
        let answers = |coroutine: &Coroutine<(), (), ()>| {
            let frames = coroutine.frames();
            (
                coroutine.name().map(str::to_owned),
                (coroutine.growth(), frames.growth, frames.name),
                (coroutine.started(), coroutine.done()),
                coroutine.last_not_moved(),
                (coroutine.stats().growths, coroutine.stats().highest, coroutine.stats().last),
            )
        };
        let before = answers(&coroutine);
        assert!(coroutine.freeze().unwrap());
        assert!(coroutine.frames().state == State::Frozen);
        assert_eq!(answers(&coroutine), before);
        coroutine.thaw().unwrap();
        assert_eq!(answers(&coroutine), before);
    });
}

#[test]
fn a_refusal_outlives_freezing_also_if_the_stack_never_grew() {
    let mut coroutine = relocating().first_size(32 << 10).spawn(|yielder: &Yielder<(), ()>, ()| {
        stacker::grow(64 << 10, || yielder.suspend(()));
        yielder.suspend(());
    });
    coroutine.resume(());
    assert!(!coroutine.freeze().unwrap());
    coroutine.resume(());
    assert_eq!(coroutine.stats().growths, 0);
    assert!(coroutine.freeze().unwrap());
    assert_eq!(coroutine.last_not_moved().unwrap().reason, Reason::OnAnotherStack);
    coroutine.thaw().unwrap();
    assert_eq!(coroutine.last_not_moved().unwrap().reason, Reason::OnAnotherStack);
}

#[test]
fn a_stack_that_was_frozen_or_refused_shrinks_by_itself_as_others_do() {
    let after = |builder: &Builder, what: &dyn Fn(&mut Coroutine<(), u64, ()>)| {
        let mut coroutine = has_grown(builder);
        what(&mut coroutine);
        for _ in 0..5 {
            coroutine.resume(());
        }
        coroutine.stats().size
    };
    for builder in builders().map(|builder| builder.shrink(Shrink::Eager)) {
        let plain = after(&builder, &|_| ());
        let thawed = after(&builder, &|coroutine| {
            assert!(coroutine.freeze().unwrap());
            coroutine.thaw().unwrap();
        });
        let resumed = after(&builder, &|coroutine| assert!(coroutine.freeze().unwrap()));
        let asked = after(&builder, &|coroutine| {
            assert!(coroutine.freeze().unwrap());
            coroutine.thaw().unwrap();
            coroutine.thaw().unwrap();
            let _ = coroutine.frames();
        });
        assert!(thawed <= plain && resumed <= plain && asked <= plain, "{plain} {thawed} {resumed} {asked}");
    }
}

#[test]
fn a_stack_that_was_touched_while_frozen_shrinks_by_itself_whatever_is_asked_first() {
    type Question = fn(&mut Coroutine<(), usize, ()>);
    let questions: [Question; 3] = [
        |_| (),
        |coroutine| {
            let _ = coroutine.shrink().unwrap();
        },
        |coroutine| {
            assert!(coroutine.freeze().unwrap());
            coroutine.thaw().unwrap();
        },
    ];
    for ask in questions {
        let builder = Builder::new().learn(false).shrink(Shrink::Eager).maximum(1 << 20);
        let mut coroutine = builder.spawn(|yielder: &Yielder<(), usize>, ()| {
            let mut local = black_box(1u64);
            black_box(frame::<50_000>(1));
            loop {
                yielder.suspend(&raw mut local as usize);
                black_box(&mut local);
            }
        });
        let local = coroutine.resume(()).yielded().unwrap();
        assert!(coroutine.freeze().unwrap());
        // SAFETY: a local of a suspended coroutine; whoever touches it thaws it.
        assert_eq!(unsafe { ptr::read_volatile(local as *const u64) }, 1);
        assert!(!coroutine.is_frozen());
        ask(&mut coroutine);
        for _ in 0..5 {
            coroutine.resume(());
        }
        assert!(coroutine.stats().size < 50_000, "{:?}", coroutine.stats());
    }
}

#[test]
fn a_stack_that_could_not_shrink_when_it_was_asked_to_shrinks_by_itself_later() {
    #[inline(never)]
    fn uses_much(yielder: &Yielder<(), usize>) {
        let mut live = [1u64; 8000];
        yielder.suspend(black_box(&raw mut live) as usize);
        black_box(&mut live);
    }
    for touched in [false, true] {
        let builder = Builder::new().learn(false).shrink(Shrink::Eager).maximum(1 << 20);
        let mut coroutine = builder.spawn(|yielder: &Yielder<(), usize>, ()| {
            uses_much(yielder);
            loop {
                yielder.suspend(0);
            }
        });
        let live = coroutine.resume(()).yielded().unwrap();
        if touched {
            assert!(coroutine.freeze().unwrap());
            // SAFETY: a local of a suspended coroutine; whoever touches it thaws it.
            assert_eq!(unsafe { ptr::read_volatile(live as *const u64) }, 1);
        }
        let _ = coroutine.shrink().unwrap(); // not far: nearly all of it is in use
        for _ in 0..5 {
            coroutine.resume(());
        }
        assert!(coroutine.stats().size < 64_000, "{:?}", coroutine.stats());
    }
}

#[test]
fn a_stack_that_may_move_counts_every_refusal() {
    let mut coroutine = relocating().spawn(|yielder: &Yielder<(), ()>, ()| {
        black_box(frame::<100_000>(1)); // by moving: nothing is left to give back where it is
        let pin = pin();
        yielder.suspend(());
        drop(pin);
    });
    coroutine.resume(());
    for refused in [Coroutine::shrink, Coroutine::freeze] as [fn(&mut Coroutine<(), (), ()>) -> _; 2] {
        let before = count(Reason::Pinned);
        assert!(!refused(&mut coroutine).unwrap());
        assert!(count(Reason::Pinned) > before);
        let why = coroutine.last_not_moved().unwrap();
        assert_eq!(why.reason, Reason::Pinned);
        assert!(!why.function().is_empty());
    }
}

/// The yielder that code of another language is given, and gives back.
extern "C" fn suspend(yielder: *const c_void) {
    // SAFETY: it is the yielder of the coroutine that runs, passed on below.
    unsafe { (*yielder.cast::<Yielder<(), ()>>()).suspend(()) }
}

type Caller = unsafe extern "C" fn(extern "C" fn(*const c_void), *const c_void);

/// A coroutine that has suspended in what `caller` calls.
fn suspended_in(caller: Caller) -> Coroutine<(), (), ()> {
    let mut coroutine = relocating().spawn(move |yielder: &Yielder<(), ()>, ()| {
        // SAFETY: it calls its argument with the other one.
        unsafe { caller(suspend, ptr::from_ref(yielder).cast()) };
    });
    coroutine.resume(());
    coroutine
}

// A frame without unwind data.
global_asm!(
    ".globl unknown_frame",
    "unknown_frame:",
    "sub rsp, 8",
    "xchg rdi, rsi",
    "call rsi",
    "add rsp, 8",
    "ret"
);
unsafe extern "C" {
    fn unknown_frame(f: extern "C" fn(*const c_void), argument: *const c_void);
}

#[test]
fn a_frame_without_a_map_is_counted_when_it_keeps_a_stack_from_being_frozen() {
    let mut coroutine = suspended_in(unknown_frame);
    for _ in 0..2 {
        let before = count(Reason::NoMap);
        assert!(!coroutine.freeze().unwrap());
        assert!(count(Reason::NoMap) > before);
        assert_eq!(coroutine.last_not_moved().unwrap().reason, Reason::NoMap);
    }
    assert!(coroutine.resume(()).returned().is_some());
}

/// A library of one function, which calls its argument; made and loaded now.
fn load_library(name: &str) -> Caller {
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.c"));
    let library = source.with_extension("so");
    let code = "volatile int calls; void caller(void (*f)(const void *), const void *x) { f(x); calls++; }";
    std::fs::write(&source, code).unwrap();
    let mut command = Command::new("cc");
    let made = command.args(["-O1", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status().unwrap();
    assert!(made.success());
    let path = CString::new(library.as_os_str().as_bytes()).unwrap();
    // SAFETY: loads the library just made, for good, and looks up its function, which is a `Caller`.
    unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        assert!(!handle.is_null());
        let function = libc::dlsym(handle, c"caller".as_ptr());
        std::mem::transmute::<*mut c_void, Option<Caller>>(function).unwrap()
    }
}

/// Both in a process of their own: whatever else meets unknown code has the tables read again, too.
#[test]
fn code_that_was_loaded_since_is_looked_up_before_a_stack_stays() {
    match variant().as_deref() {
        None => this_test!().passes_each(["freeze", "shrink"]),
        Some(which) => {
            drop(relocating().spawn(|_: &Yielder<(), ()>, ()| ())); // the tables are read
            let caller = load_library(which);
            let mut coroutine = relocating().first_size(4096).spawn(move |yielder: &Yielder<(), ()>, ()| {
                black_box(frame::<100_000>(1)); // by moving
                // SAFETY: it calls its argument with the other one.
                unsafe { caller(suspend, ptr::from_ref(yielder).cast()) };
            });
            coroutine.resume(());
            assert_eq!(coroutine.last_not_moved(), None);
            assert!(if which == "freeze" { coroutine.freeze() } else { coroutine.shrink() }.unwrap());
            assert_eq!((coroutine.last_not_moved(), count(Reason::NoMap)), (None, 0));
            assert!(coroutine.resume(()).returned().is_some());
        }
    }
}
