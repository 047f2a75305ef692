//! What the documentation of `Coroutine` says about `stacker`, as an example of libraries that ask the thread for its stack.

use std::ffi::c_void;
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

use regrow::{Builder, Yielder};

mod support;
use support::run;

const MAXIMUM: usize = 64 << 10;
const SEGMENT: usize = 1 << 20;
const RED_ZONE: usize = 128 << 10;

fn builder() -> Builder {
    Builder::new().learn(false).maximum(MAXIMUM)
}

/// About where the stack pointer is.
#[inline(never)]
fn here() -> usize {
    let local = black_box(0u8);
    &raw const local as usize
}

fn near(one: usize, other: usize, bytes: usize) -> bool {
    one.abs_diff(other) < bytes
}

/// Where stacker takes the stack of this thread to end. Called on that stack.
fn limit_of_the_thread() -> usize {
    here() - stacker::remaining_stack().unwrap()
}

fn is_about_a_segment(left: Option<usize>) -> bool {
    left.is_some_and(|left| (SEGMENT / 2..2 * SEGMENT).contains(&left))
}

/// Needs some hundred bytes a level, and has stacker look at each whether they are there.
fn recurse(levels: u64) -> u64 {
    stacker::maybe_grow(RED_ZONE, SEGMENT, || {
        let words = black_box([levels; 64]);
        let sum = if levels == 0 { 0 } else { recurse(levels - 1) };
        assert_eq!(black_box(words), [levels; 64]);
        sum + levels
    })
}

/// Runs `f` on a thread whose stack lies a little above this address.
fn on_a_thread_at(address: usize, f: fn()) {
    const BYTES: usize = 1 << 20;
    static BEFORE: AtomicUsize = AtomicUsize::new(0);
    let address = address + 2 * BYTES * BEFORE.fetch_add(1, Ordering::Relaxed);
    extern "C" fn call(f: *mut c_void) -> *mut c_void {
        // SAFETY: `pthread_create` passes what it was given below.
        let f: fn() = unsafe { std::mem::transmute(f) };
        f();
        std::ptr::null_mut()
    }
    // SAFETY: a new mapping, which stays, is the thread's stack; the function gets the argument it expects.
    unsafe {
        let (access, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
        );
        let stack = libc::mmap(address as *mut c_void, BYTES, access, flags, -1, 0);
        assert_ne!(stack, libc::MAP_FAILED);
        let mut attributes = MaybeUninit::uninit();
        let mut thread = MaybeUninit::uninit();
        libc::pthread_attr_init(attributes.as_mut_ptr());
        assert_eq!(libc::pthread_attr_setstack(attributes.as_mut_ptr(), stack, BYTES), 0);
        assert_eq!(libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), call, f as *mut c_void), 0);
        assert_eq!(libc::pthread_join(thread.assume_init(), std::ptr::null_mut()), 0);
    }
}

/// As low, and as high, as stacks are hardly ever.
const LOW: usize = 0x10_0000_0000;
const HIGH: usize = 0x7fff_0000_0000;

#[test]
fn what_stacker_takes_for_the_end_of_a_coroutines_stack_is_the_threads() {
    on_a_thread_at(HIGH, || {
        assert_eq!(run(&builder(), stacker::remaining_stack), Some(0), "the coroutine's stack lies below");
    });
    on_a_thread_at(LOW, || {
        let left = run(&builder(), stacker::remaining_stack).unwrap();
        assert!(left > 1 << 30, "the coroutine's stack lies above");
    });
}

#[test]
fn below_the_threads_stack_maybe_grow_makes_a_segment_at_its_outermost_call() {
    on_a_thread_at(HIGH, || {
        run(&builder(), || {
            stacker::maybe_grow(100, SEGMENT, || {
                assert!(is_about_a_segment(stacker::remaining_stack()));
                let outer = here();
                stacker::maybe_grow(RED_ZONE, SEGMENT, || assert!(near(here(), outer, 4096)));
            });
        });
    });
}

#[test]
fn above_the_threads_stack_maybe_grow_makes_no_segment_even_where_one_is_needed() {
    on_a_thread_at(LOW, || {
        run(&builder(), || {
            let coroutine = here();
            stacker::maybe_grow(4 * MAXIMUM, SEGMENT, || assert!(near(coroutine, here(), 4096)));
        });
    });
}

#[test]
fn within_grow_all_is_right_wherever_the_coroutine_is() {
    for thread in [LOW, HIGH] {
        on_a_thread_at(thread, || {
            let limit = limit_of_the_thread();
            run(&builder(), || {
                let levels = 10_000; // some megabytes
                let (left, sum) = stacker::grow(SEGMENT, || (stacker::remaining_stack(), recurse(levels)));
                assert!(is_about_a_segment(left));
                assert_eq!(sum, (0..=levels).sum());
            });
            assert!(near(limit, limit_of_the_thread(), 4096), "the thread is as it was");
        });
    }
}

#[test]
fn a_coroutine_that_suspends_within_grow_leaves_its_bounds_to_its_resumer() {
    on_a_thread_at(HIGH, || {
        let limit = limit_of_the_thread();
        let mut coroutine = builder().spawn(|yielder: &Yielder<(), ()>, ()| {
            stacker::grow(SEGMENT, || yielder.suspend(()));
        });
        coroutine.resume(());
        assert!(!near(limit, limit_of_the_thread(), 4 * SEGMENT));
        coroutine.resume(());
        assert!(near(limit, limit_of_the_thread(), 4096));
    });
}
