//! A kernel that refuses memory when it is told to. Whoever has this module has its own `mmap`, `mprotect`, `madvise` and `syscall`,
//! in front of the C library's: on a thread that asks for it the call of a given number fails with `ENOMEM`, or all from
//! that one on.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::cell::Cell;
use std::ffi::{c_int, c_long, c_void};

thread_local! {
    /// After how many more calls one fails; negative: none does.
    static FAILS_AFTER: Cell<i32> = const { Cell::new(-1) };
    /// Those after it fail as well.
    static PERSISTS: Cell<bool> = const { Cell::new(false) };
    /// Calls that only give access fail as well.
    static ALL: Cell<bool> = const { Cell::new(true) };
    /// One has failed.
    static FAILED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, in which the mapping call with this number, from 0, fails, and if it `persists` all later ones. True if there
/// were so many.
pub fn failing<R>(number: i32, persists: bool, f: impl FnOnce() -> R) -> (R, bool) {
    FAILED.set(false);
    PERSISTS.set(persists);
    FAILS_AFTER.set(number);
    let result = f();
    FAILS_AFTER.set(-1);
    (result, FAILED.get())
}

/// As [`failing`], where calls that only give access to pages which are there are not counted and work: without these
/// nobody can grow, and what grows without is ended.
pub fn failing_but_open<R>(number: i32, f: impl FnOnce() -> R) -> (R, bool) {
    ALL.set(false);
    let result = failing(number, false, f);
    ALL.set(true);
    result
}

/// One mapping call, or its failure.
fn call(number: c_long, arguments: [usize; 6], opens: bool) -> c_long {
    let left = FAILS_AFTER.get();
    if left >= 0 && (ALL.get() || !opens) {
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

    const MADV_GUARD_REMOVE: c_int = 103;

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
        call(libc::SYS_mmap, [at as usize, bytes, rest[0], rest[1], rest[2], rest[3]], false) as *mut c_void
    }

    #[unsafe(no_mangle)]
    extern "C" fn mprotect(at: *mut c_void, bytes: usize, protection: c_int) -> c_int {
        let opens = protection != libc::PROT_NONE;
        call(libc::SYS_mprotect, [at as usize, bytes, protection as usize, 0, 0, 0], opens) as c_int
    }

    #[unsafe(no_mangle)]
    extern "C" fn madvise(at: *mut c_void, bytes: usize, advice: c_int) -> c_int {
        let opens = advice == MADV_GUARD_REMOVE;
        call(libc::SYS_madvise, [at as usize, bytes, advice as usize, 0, 0, 0], opens) as c_int
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
            libc::SYS_process_madvise => call(number, arguments, false),
            _ => pass_on(number, arguments),
        }
    }
}
