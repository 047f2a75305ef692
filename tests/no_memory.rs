//! The kernel refuses memory: at each mapping call in turn there is an error, or it goes on without, and nothing is lost.
//!
//! This test binary has its own `mmap`, `mprotect`, `madvise` and `syscall`, in front of the C library's: on a thread that asks for it
//! the call of a given number fails with `ENOMEM`, or all from that one on.
#![cfg(target_env = "gnu")]

use std::cell::Cell;
use std::ffi::{c_int, c_long, c_void};

use regrow::{Builder, Coroutine, Error, Yielder};

mod support;
use support::{Counted, both_ways, frame, live, variant};

thread_local! {
    /// After how many more calls one fails; negative: none does.
    static FAILS_AFTER: Cell<i32> = const { Cell::new(-1) };
    /// Those after it fail as well.
    static PERSISTS: Cell<bool> = const { Cell::new(false) };
    /// One has failed.
    static FAILED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, in which the mapping call with this number, from 0, fails, and if it `persists` all later ones. True if there
/// were so many.
fn failing<R>(number: i32, persists: bool, f: impl FnOnce() -> R) -> (R, bool) {
    FAILED.set(false);
    PERSISTS.set(persists);
    FAILS_AFTER.set(number);
    let result = f();
    FAILS_AFTER.set(-1);
    (result, FAILED.get())
}

/// One mapping call, or its failure.
fn call(number: c_long, arguments: [usize; 6]) -> c_long {
    let left = FAILS_AFTER.get();
    if left >= 0 {
        FAILS_AFTER.set(if left == 0 && PERSISTS.get() { 0 } else { left - 1 });
        if left == 0 {
            FAILED.set(true);
            // SAFETY: errno is this thread's.
            unsafe { *libc::__errno_location() = libc::ENOMEM };
            return -1;
        }
    }
    pass_on(number, arguments)
}

/// What the C library's `syscall` does.
fn pass_on(number: c_long, arguments: [usize; 6]) -> c_long {
    let [a, b, c, d, e, f] = arguments;
    let answer: c_long;
    // SAFETY: passed on as it came; errno is this thread's.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => answer,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
        if !(-4095..0).contains(&answer) {
            return answer;
        }
        *libc::__errno_location() = -answer as c_int;
    }
    -1
}

/// The C functions by which this process changes its mappings, but for `munmap`, which gives some back.
mod interposed {
    use super::*;

    #[unsafe(no_mangle)]
    extern "C" fn mmap(
        at: *mut c_void,
        bytes: usize,
        protection: c_int,
        flags: c_int,
        file: c_int,
        offset: libc::off_t,
    ) -> *mut c_void {
        let rest = [protection as usize, flags as usize, file as usize, offset as usize];
        call(libc::SYS_mmap, [at as usize, bytes, rest[0], rest[1], rest[2], rest[3]]) as *mut c_void
    }

    #[unsafe(no_mangle)]
    extern "C" fn mprotect(at: *mut c_void, bytes: usize, protection: c_int) -> c_int {
        call(libc::SYS_mprotect, [at as usize, bytes, protection as usize, 0, 0, 0]) as c_int
    }

    #[unsafe(no_mangle)]
    extern "C" fn madvise(at: *mut c_void, bytes: usize, advice: c_int) -> c_int {
        call(libc::SYS_madvise, [at as usize, bytes, advice as usize, 0, 0, 0]) as c_int
    }

    /// In C the arguments are variable; they arrive in the same registers.
    #[unsafe(no_mangle)]
    extern "C" fn syscall(
        number: c_long,
        a: usize,
        b: usize,
        c: usize,
        d: usize,
        e: usize,
        f: usize,
    ) -> c_long {
        let arguments = [a, b, c, d, e, f];
        match number {
            libc::SYS_process_madvise => call(number, arguments),
            _ => pass_on(number, arguments),
        }
    }
}

/// Keeps values and pointers to them across a suspend, after it has grown; answers with their sum.
fn sleeper(builder: &Builder) -> Result<Coroutine<u64, u64, u64>, Error> {
    builder.try_spawn(|yielder: &Yielder<u64, u64>, mut sum| {
        let _counted = Counted::new(());
        frame::<12_000>(1);
        let total = &mut sum;
        loop {
            match yielder.suspend(*total) {
                0 => return *total,
                number => *total += number,
            }
        }
    })
}

/// Runs `step` with its first mapping call failing, then with the second, until it has no more; returns how many it had.
fn each_call(persists: bool, mut step: impl FnMut(&mut dyn FnMut(&mut dyn FnMut()))) -> i32 {
    for number in 0.. {
        let mut failed = false;
        step(&mut |f| failed = failing(number, persists, f).1);
        if !failed {
            return number;
        }
        assert!(number < 100, "there is no end to it");
    }
    0
}

#[test]
fn spawning_says_so_and_loses_nothing() {
    let builders = both_ways().into_iter().chain([10, 12, 14].map(|log| Builder::new().maximum(4096 << log)));
    for builder in builders {
        for persists in [false, true] {
            each_call(persists, |with_failure| {
                regrow::trim();
                let mut spawned = None;
                with_failure(&mut || spawned = Some(sleeper(&builder)));
                match spawned.unwrap() {
                    Ok(mut coroutine) => assert_eq!(coroutine.resume(3).yielded(), Some(3)),
                    Err(error) => assert!(matches!(error, Error::Memory { .. }), "{error}"),
                }
                assert_eq!(live(), 0);
            });
        }
    }
}

/// The first coroutine of a process, and of a thread.
#[test]
fn the_first_spawn_of_a_process_says_so_and_works_the_next_time() {
    const TEST: &str = "the_first_spawn_of_a_process_says_so_and_works_the_next_time";
    let Some(number) = variant() else {
        for number in 0..12 {
            let outcome = support::child(TEST, &number.to_string());
            assert!(outcome.status.success(), "call {number}: {outcome}");
        }
        return;
    };
    for builder in both_ways() {
        let number = number.parse().unwrap();
        let (spawned, failed) = failing(number, false, || sleeper(&builder));
        assert!(failed || spawned.is_ok());
        if let Err(error) = spawned {
            assert!(matches!(error, Error::Memory { .. } | Error::Mappings { .. }), "{error}");
        }
        assert_eq!(sleeper(&builder).unwrap().resume(3).yielded(), Some(3));
    }
}

/// Of [`both_ways`], which is which.
const MOVING: usize = 0;
const IN_PLACE: usize = 1;

/// Every step in the life of a parked coroutine, with each of its mapping calls failing.
#[test]
fn parked_coroutines_stay_what_they_are() {
    type Step = fn(&mut Coroutine<u64, u64, u64>) -> Result<(), Error>;
    let steps: [(&str, Step); 3] = [
        ("freeze", |coroutine| coroutine.freeze().map(drop)),
        ("shrink", |coroutine| coroutine.shrink().map(drop)),
        ("thaw", |coroutine| coroutine.thaw()),
    ];
    for (way, persists) in [(MOVING, false), (MOVING, true), (IN_PLACE, false), (IN_PLACE, true)] {
        let builder = &both_ways()[way];
        for (name, step) in steps {
            let calls = each_call(persists, |with_failure| {
                let mut coroutine = sleeper(builder).unwrap();
                assert_eq!(coroutine.resume(3).yielded(), Some(3));
                if name == "thaw" {
                    assert!(coroutine.freeze().unwrap());
                }
                regrow::trim();
                let mut outcome = Ok(());
                with_failure(&mut || outcome = step(&mut coroutine));
                if let Err(error) = &outcome {
                    assert!(matches!(error, Error::Memory { .. }), "{name}: {error}");
                    assert!(name != "thaw" || coroutine.is_frozen());
                }
                assert_eq!(coroutine.resume(4).yielded(), Some(7), "after {name}: {outcome:?}");
                assert_eq!(coroutine.resume(0).returned(), Some(7));
                assert_eq!(live(), 0);
            });
            // One that moves may find a slot that is ready.
            assert!(calls > 0 || way == MOVING && name != "shrink", "{name}");
        }
    }
}

/// A growth that may not move for want of memory is made in place, if that works; else the process ends with a report.
#[test]
fn a_growth_without_memory_ends_in_a_report_at_worst() {
    const TEST: &str = "a_growth_without_memory_ends_in_a_report_at_worst";
    let Some(variant) = variant() else {
        let mut reports = 0;
        for way in 0..2 {
            for number in 0..6 {
                let outcome = support::child(TEST, &format!("{way} {number}"));
                if !outcome.status.success() {
                    assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{way} {number}: {outcome}");
                    assert!(outcome.stderr.contains("out of memory"), "{way} {number}: {outcome}");
                    reports += 1;
                }
            }
        }
        assert!(reports > 0, "a stack that grows in place needs its one call");
        return;
    };
    let (way, number) = variant.split_once(' ').unwrap();
    let mut coroutine = sleeper(&both_ways()[way.parse::<usize>().unwrap()]).unwrap();
    let (answer, _) = failing(number.parse().unwrap(), false, || coroutine.resume(3).yielded());
    assert_eq!(answer, Some(3));
    assert_eq!(coroutine.resume(0).returned(), Some(3));
}
