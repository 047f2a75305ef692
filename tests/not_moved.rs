//! What keeps a stack in place, that it is said why, and what happens at the end of the room.

use std::hint::black_box;

use regrow::map::{self, Cfa, FrameMap, Place, Register, Rules};
use regrow::{Coroutine, Reason, Yielder, current_stats, not_moved, pin, pin_code, pin_object, pinned_room};

mod support;
use support::{frame, relocating, this_test, variant};

extern "C" fn grow() {
    black_box(frame::<8192>(1));
}

fn count(reason: Reason) -> u64 {
    not_moved().find(|(other, _)| *other == reason).unwrap().1
}

/// Runs `f` in a coroutine that suspends after it; returns the coroutine.
fn suspended(f: impl FnOnce() + 'static) -> Coroutine<(), u64, ()> {
    let mut coroutine = relocating().spawn(move |yielder: &Yielder<(), u64>, ()| {
        f();
        yielder.suspend(current_stats().unwrap().bytes_copied);
    });
    coroutine.resume(());
    coroutine
}

#[test]
fn a_pinned_stack_grows_in_place_and_moves_again_afterwards() {
    let before = count(Reason::Pinned);
    let coroutine = suspended(|| {
        let outer = pin();
        let copied = current_stats().unwrap().bytes_copied; // by growths of this debug build's large frames
        let local = black_box(3u64);
        let address = &raw const local as usize;
        let kept = Box::new(address ^ usize::MAX); // not to be recognised
        let inner = pin();
        grow();
        drop(inner);
        grow();
        assert_eq!(&raw const local as usize, !*kept);
        assert_eq!(current_stats().unwrap().bytes_copied, copied);
        drop(outer);
        black_box(frame::<100_000>(2)); // more than the room a pinned stack has
        assert!(current_stats().unwrap().bytes_copied > copied, "the pins are gone");
    });
    let why = coroutine.last_not_moved().unwrap();
    assert_eq!(why.reason, Reason::Pinned);
    assert!(!why.function().is_empty());
    assert!(count(Reason::Pinned) > before);
}

#[test]
fn a_pin_dropped_in_another_coroutine_releases_its_own() {
    let mut pinned = relocating().spawn(|yielder: &Yielder<(), Option<regrow::Pinned>>, ()| {
        yielder.suspend(Some(pin()));
        let before = current_stats().unwrap().bytes_copied;
        black_box(frame::<100_000>(1)); // more than the room a pinned stack has
        yielder.suspend(None);
        current_stats().unwrap().bytes_copied - before
    });
    let guard = pinned.resume(()).yielded().flatten().unwrap();
    suspended(move || {
        let mine = pin();
        let copied = current_stats().unwrap().bytes_copied;
        drop(guard); // of `pinned`
        grow();
        assert_eq!(current_stats().unwrap().bytes_copied, copied, "still pinned by its own");
        drop(mine);
    });
    pinned.resume(());
    assert!(pinned.resume(()).returned().unwrap() > 0, "its pin is gone, it moved");
}

#[test]
fn pinned_code_keeps_every_stack_with_a_frame_of_it() {
    #[inline(never)]
    fn library() -> u64 {
        grow();
        black_box(1)
    }
    let start = library as *const () as usize;
    let pinned = pin_code(start..start + 16).unwrap();
    let coroutine = suspended(|| assert_eq!(library(), 1));
    let why = coroutine.last_not_moved().unwrap();
    assert_eq!(why.reason, Reason::PinnedCode);
    assert!(why.function().contains("library"), "{}", why.function());
    drop(pinned);
    assert!(suspended(|| assert_eq!(library(), 1)).last_not_moved().is_none());
}

#[test]
fn a_whole_object_can_be_pinned() {
    unsafe extern "C" fn compare(left: *const libc::c_void, right: *const libc::c_void) -> i32 {
        grow();
        // SAFETY: `qsort` passes elements.
        unsafe { *left.cast::<i32>() - *right.cast::<i32>() }
    }
    let sort = || {
        let mut numbers = [3, 1, 2];
        // SAFETY: three elements of four bytes.
        unsafe { libc::qsort(numbers.as_mut_ptr().cast(), 3, 4, Some(compare)) };
        assert_eq!(numbers, [1, 2, 3]);
    };
    let pinned = pin_object("libc.so").unwrap();
    let why = suspended(sort).last_not_moved().unwrap();
    assert_eq!(why.reason, Reason::PinnedCode);
    assert!(why.function().contains("libc.so"), "{}", why.function());
    drop(pinned);
    assert!(suspended(sort).last_not_moved().is_none());
}

/// `push rbx; call rdi; pop rbx; ret`, in memory of its own: what a JIT compiler makes, without unwind data.
struct Compiled(region::Allocation);

// SAFETY: the memory is written once, before anyone else sees it.
unsafe impl Send for Compiled {}
// SAFETY: the same.
unsafe impl Sync for Compiled {}

impl Compiled {
    fn new() -> Self {
        let code = [0x53, 0xff, 0xd7, 0x5b, 0xc3];
        let mut memory = region::alloc(code.len(), region::Protection::READ_WRITE_EXECUTE).unwrap();
        // SAFETY: five bytes of a page just allocated.
        unsafe { memory.as_mut_ptr::<u8>().copy_from(code.as_ptr(), code.len()) };
        Self(memory)
    }

    fn address(&self) -> usize {
        self.0.as_ptr::<u8>() as usize
    }

    fn call(&self, function: extern "C" fn()) {
        // SAFETY: the code is what its type says.
        let code: unsafe extern "C" fn(extern "C" fn()) = unsafe { std::mem::transmute(self.address()) };
        // SAFETY: it keeps the calling convention.
        unsafe { code(function) }
    }

    fn maps(&self) -> Vec<FrameMap> {
        let code = self.address();
        let pushed = Rules::new(Cfa::rsp(16)).saved(Register::RBX, Place::cfa(-16));
        vec![
            FrameMap::new(code..code + 1).rules(Rules::new(Cfa::rsp(8))),
            FrameMap::new(code + 1..code + 4).rules(pushed),
            FrameMap::new(code + 4..code + 5).rules(Rules::new(Cfa::rsp(8))),
        ]
    }
}

#[test]
fn code_without_unwind_data_keeps_the_stack_in_place_and_is_named() {
    let code = std::rc::Rc::new(Compiled::new());
    let run = || {
        let code = code.clone();
        suspended(move || code.call(grow))
    };
    let before = count(Reason::NoMap);
    let why = run().last_not_moved().unwrap();
    assert_eq!((why.reason, why.frame), (Reason::NoMap, code.address() + 3));
    assert!(count(Reason::NoMap) > before);

    // SAFETY: the code's own maps, dropped before it is freed.
    let registration = unsafe { map::register(code.maps()) }.unwrap();
    let moved = run();
    assert_eq!(moved.last_not_moved(), None);
    assert!(moved.stats().bytes_copied > 0);

    drop(registration);
    assert_eq!(run().last_not_moved().unwrap().reason, Reason::NoMap);
}

#[test]
fn maps_removed_and_added_while_other_threads_grow_are_read_whole() {
    let code = std::sync::Arc::new(Compiled::new());
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let growers: Vec<_> = (0..4)
        .map(|_| {
            let (code, done) = (code.clone(), done.clone());
            std::thread::spawn(move || {
                let mut outcomes = [0u32; 2];
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let code = code.clone();
                    let coroutine = suspended(move || code.call(grow));
                    match coroutine.last_not_moved().map(|why| why.reason) {
                        None => outcomes[0] += 1,
                        Some(Reason::NoMap) => outcomes[1] += 1,
                        Some(other) => panic!("{other:?}"),
                    }
                }
                outcomes
            })
        })
        .collect();
    for _ in 0..300 {
        // SAFETY: the code's own maps, dropped before it is freed.
        let registration = unsafe { map::register(code.maps()) }.unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
        drop(registration);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    let outcomes: Vec<_> = growers.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(outcomes.iter().any(|&[moved, _]| moved > 0), "{outcomes:?}");
    assert!(outcomes.iter().any(|&[_, stayed]| stayed > 0), "{outcomes:?}");
}

#[test]
fn the_room_of_a_pinned_stack_is_what_it_says_and_ends_with_a_report() {
    /// Uses `bytes` of stack or a little more, then reports.
    #[inline(never)]
    fn use_bytes(bytes: usize) {
        let local = black_box([0u8; 512]);
        if bytes > 4096 {
            use_bytes(bytes - 1024);
        }
        black_box(local);
    }
    let test = this_test!();
    match variant().as_deref() {
        None => {
            test.passes_each(["within"]);
            let outcome = test.child("beyond");
            assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
            for part in ["used up its slack", "coroutine \"pinned one\"", "not moved: Pinned", "use_bytes"] {
                assert!(outcome.stderr.contains(part), "{part} in {outcome}");
            }
        }
        Some(which) => {
            let beyond = which == "beyond";
            let mut coroutine = relocating().name("pinned one").spawn(move |_: &Yielder<(), ()>, ()| {
                let _pin = pin();
                let room = pinned_room().unwrap();
                assert!(room >= 44 << 10, "{room}");
                // Each level takes more than 1 KiB only in a debug build: half of the room is safely within.
                use_bytes(if beyond { 4 * room } else { room / 2 });
            });
            coroutine.resume(());
        }
    }
}
