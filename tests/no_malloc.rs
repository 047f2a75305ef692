//! Nothing that the fault handler does calls malloc: not Rust's allocator, not libc's, and not for a growth into
//! the first slot of its class, into a new arena, or into a report.
//!
//! This test binary has its own `malloc` and its kin, in front of glibc's: armed on a thread, they end the process.
#![cfg(target_env = "gnu")]

use std::cell::Cell;
use std::ffi::c_void;
use std::hint::black_box;

use regrow::{Builder, Coroutine, Yielder, pin, totals};

mod support;
use support::{OnDrop, Test, both_ways, frame, growths, relocating, run, this_test, variant};

thread_local! {
    /// Constant and without a destructor: reading it never allocates.
    static ARMED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, in which nothing may be allocated on this thread.
fn armed<R>(f: impl FnOnce() -> R) -> R {
    ARMED.set(true);
    let disarms = OnDrop(|| ARMED.set(false));
    let result = f();
    drop(disarms);
    result
}

fn allocates(what: &str) {
    if ARMED.get() {
        for text in ["ALLOCATED: ", what, "\n"] {
            // SAFETY: writes a string.
            unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
        }
        // SAFETY: ends the process.
        unsafe { libc::_exit(99) }
    }
}

unsafe extern "C" {
    fn __libc_malloc(bytes: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, bytes: usize) -> *mut c_void;
    fn __libc_realloc(old: *mut c_void, bytes: usize) -> *mut c_void;
    fn __libc_memalign(align: usize, bytes: usize) -> *mut c_void;
    fn __libc_free(old: *mut c_void);
}

/// The C functions by which everything in this process allocates.
mod interposed {
    use super::*;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn malloc(bytes: usize) -> *mut c_void {
        allocates("malloc");
        // SAFETY: passed on as it came, like all below.
        unsafe { __libc_malloc(bytes) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn calloc(count: usize, bytes: usize) -> *mut c_void {
        allocates("calloc");
        // SAFETY: as above.
        unsafe { __libc_calloc(count, bytes) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn realloc(old: *mut c_void, bytes: usize) -> *mut c_void {
        allocates("realloc");
        // SAFETY: as above.
        unsafe { __libc_realloc(old, bytes) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn free(old: *mut c_void) {
        allocates("free");
        // SAFETY: as above.
        unsafe { __libc_free(old) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memalign(align: usize, bytes: usize) -> *mut c_void {
        allocates("memalign");
        // SAFETY: as above.
        unsafe { __libc_memalign(align, bytes) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn aligned_alloc(align: usize, bytes: usize) -> *mut c_void {
        allocates("aligned_alloc");
        // SAFETY: as above.
        unsafe { __libc_memalign(align, bytes) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn posix_memalign(to: *mut *mut c_void, align: usize, bytes: usize) -> i32 {
        allocates("posix_memalign");
        // SAFETY: as above; the caller's pointer is valid.
        unsafe {
            *to = __libc_memalign(align, bytes);
            if (*to).is_null() { libc::ENOMEM } else { 0 }
        }
    }
}

/// Uses more and more stack, in steps, so that it grows through every class up to `KIB`.
fn grows_through_many_sizes() {
    armed(|| {
        frame::<1500>(1);
        frame::<3000>(2);
        frame::<7000>(3);
        frame::<15_000>(4);
        frame::<31_000>(5);
        frame::<63_000>(6);
    });
    assert!(growths() >= 3);
}

/// The first growth of a process: nothing of the class was ever used.
fn first_ever() {
    both_ways(|builder| {
        run(&builder, grows_through_many_sizes);
    });
}

/// So many stacks of one size at the same time that their arena is used up and growth itself must make another,
/// and then another.
fn new_arenas() {
    let before = totals();
    let mut live = Vec::new();
    for _ in 0..700 {
        let mut coroutine = relocating().spawn(|yielder: &Yielder<(), ()>, ()| {
            armed(|| black_box(frame::<3900>(1)));
            yielder.suspend(());
        });
        coroutine.resume(());
        live.push(coroutine);
    }
    assert!(totals().moves - before.moves >= 700);
}

/// Both with guard pages by madvise, where this kernel has them, and by protection.
fn in_children(test: Test) {
    for guard in ["", "protect"] {
        test.passes_each_with([guard], &[("REGROW_GUARD", guard)]);
    }
}

#[test]
fn the_first_growth_of_a_process_calls_no_malloc() {
    match variant() {
        None => in_children(this_test!()),
        Some(_) => first_ever(),
    }
}

#[test]
fn a_growth_that_needs_a_new_arena_calls_no_malloc() {
    match variant() {
        None => in_children(this_test!()),
        Some(_) => new_arenas(),
    }
}

#[test]
fn growth_into_reused_slots_calls_no_malloc() {
    for _ in 0..100 {
        first_ever();
    }
}

#[test]
fn growth_where_the_stack_may_not_move_calls_no_malloc() {
    {
        run(&relocating(), || {
            // An inline loop, or memset's, that writes to an untouched frame: slack is opened.
            armed(|| {
                let mut bytes = std::mem::MaybeUninit::<[u8; 20_000]>::uninit();
                // SAFETY: all bytes, from the lowest up.
                unsafe { black_box(&mut bytes).as_mut_ptr().cast::<u8>().write_bytes(1, 20_000) };
                black_box(&bytes);
            });
            assert!(growths() > 0);
        });
    }
}

/// Resuming, suspending, and taking a stack from the thread's stock are free of it as well.
#[test]
fn switching_and_reusing_stacks_calls_no_malloc() {
    drop(Coroutine::<(), (), ()>::new(|_, ()| ()));
    armed(|| {
        for _ in 0..1000 {
            let mut coroutine =
                Coroutine::<u64, u64, u64>::new(|yielder, number| yielder.suspend(number + 1));
            black_box(coroutine.resume(1));
            black_box(coroutine.resume(2));
        }
    });
}

/// Nor does the handler when it thaws a stack that grows in place, also one that has grown and has a name.
#[test]
fn thawing_a_touched_stack_calls_no_malloc() {
    for builder in [Builder::new().learn(false), Builder::new().learn(false).name("sleeper")] {
        let mut coroutine = builder.spawn(|yielder: &Yielder<(), usize>, ()| {
            let local = black_box(5u64);
            frame::<10_000>(1);
            yielder.suspend(&raw const local as usize);
        });
        let local = coroutine.resume(()).yielded().unwrap() as *const u64;
        for _ in 0..3 {
            assert!(coroutine.freeze().unwrap());
            // SAFETY: a local of a suspended coroutine, which stays where it is.
            assert_eq!(armed(|| unsafe { local.read_volatile() }), 5);
            assert!(!coroutine.is_frozen());
        }
    }
}

/// The lines of `REGROW_TRACE` are written in the handler.
#[test]
fn tracing_calls_no_malloc() {
    if variant().is_some() {
        first_ever();
        run(&relocating(), || {
            let pinned = pin();
            armed(|| frame::<10_000>(1));
            drop(pinned);
        });
        thawing_a_touched_stack_calls_no_malloc();
        return;
    }
    let outcome = this_test!().child_with("child", &[("REGROW_TRACE", "moves")]);
    assert!(outcome.has_passed(), "{outcome}");
    for line in [" moved ", " not moved: Pinned at ", " opened slack ", "\"sleeper\" thawed because"] {
        assert!(outcome.stderr.contains(line), "{line}: {outcome}");
    }
}

extern "C" fn nothing(_signal: i32) {}

/// Runs `f` in a process that has another thread.
fn among_threads(f: impl FnOnce()) {
    let (ends, waits) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || waits.recv());
    f();
    drop(ends);
    let _ = other.join().unwrap();
}

/// Reports are made in the handler too.
#[test]
fn reports_call_no_malloc() {
    match variant().as_deref() {
        None => {
            for (report, says) in [
                ("overflow", "stack overflow"),
                ("stale", "stale pointer"),
                ("no memory", "fatal error: out of memory"),
                ("no memory", "Cannot allocate memory (os error 12)"),
                ("cannot thaw", "cannot thaw the stack of coroutine"),
                ("cannot thaw", "Operation not permitted (os error 1)"),
                ("lost signal", "lost signal, one of 10 12"),
            ] {
                let outcome = this_test!().child(report);
                assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
                assert!(outcome.stderr.contains(says), "{outcome}");
                if ["overflow", "stale"].contains(&report) {
                    assert!(outcome.stderr.contains("regrow_entry+0x"), "{outcome}");
                }
            }
        }
        Some("overflow") => run(&Builder::new().maximum(4096), || {
            armed(|| frame::<50_000>(1));
        }),
        Some("no memory") => run(&relocating(), || {
            let calls = [
                libc::SYS_mmap,
                libc::SYS_mprotect,
                libc::SYS_madvise,
                libc::SYS_process_madvise,
                libc::SYS_ioctl,
            ];
            support::refuse(&calls, libc::ENOMEM);
            armed(|| frame::<50_000>(1));
        }),
        Some("cannot thaw") => among_threads(|| {
            let mut coroutine = Builder::new().learn(false).spawn(|yielder: &Yielder<(), usize>, ()| {
                let local = black_box(5u64);
                yielder.suspend(&raw const local as usize);
            });
            let local = coroutine.resume(()).yielded().unwrap() as *const u64;
            assert!(coroutine.freeze().unwrap());
            support::refuse(&[libc::SYS_pwrite64], libc::EPERM);
            // SAFETY: a local of a suspended coroutine, which stays where it is.
            armed(|| unsafe { black_box(local.read_volatile()) });
        }),
        Some("lost signal") => {
            run(&relocating(), || ());
            for signal in [libc::SIGUSR1, libc::SIGUSR2] {
                // SAFETY: a handler that does nothing.
                unsafe { libc::signal(signal, nothing as *const () as usize) };
            }
            run(&relocating(), || {
                let local = black_box(0u8);
                let lowest = &raw const local as usize / 4096 * 4096;
                armed(|| support::signalled_at(lowest, libc::SIGUSR1));
            });
        }
        Some(_) => run(&relocating(), || {
            let local = black_box(1u64);
            let hidden = black_box(Box::new(&raw const local as usize));
            frame::<5000>(1);
            // SAFETY: none: a stale pointer is what this is about, and ends the process.
            armed(|| unsafe { black_box(*hidden as *const u64).read_volatile() });
        }),
    }
}

/// The test of the test: an allocation while armed is noticed.
#[test]
fn an_allocation_while_armed_ends_the_process() {
    match variant().as_deref() {
        None => {
            for how in ["rust", "libc"] {
                let outcome = this_test!().child(how);
                assert_eq!(outcome.status.code(), Some(99), "{outcome}");
                assert!(outcome.stderr.contains("ALLOCATED"), "{outcome}");
            }
        }
        Some("rust") => drop(armed(|| black_box(Box::new(5)))),
        // SAFETY: a string, copied.
        Some(_) => armed(|| unsafe {
            black_box(libc::strdup(c"text".as_ptr()));
        }),
    }
}
