//! Large stacks that move take their pages along, where the kernel has that; where it has not, or pages are shared, they are
//! right all the same. Each test in a child process, whose memory is its own.

use std::hint::black_box;

use regrow::{Coroutine, Yielder, current_stats};

mod support;
use support::{child, relocating, variant};

fn passes(test: &str) {
    let outcome = child(test, "");
    assert!(outcome.status.success() && outcome.stdout.contains("1 passed"), "{outcome}");
}

/// Recurses until the stack has `size` bytes, with a pointer into the outermost frame all the way; calls `f` there.
#[inline(never)]
fn descend(size: usize, outermost: &mut u64, f: &mut dyn FnMut()) -> u64 {
    let local = black_box([size as u64 ^ *outermost; 30]);
    *outermost += 1;
    let below = if current_stats().unwrap().size < size {
        descend(size, outermost, f)
    } else {
        f();
        0
    };
    // What was there on the way down is there on the way up.
    *outermost -= 1;
    assert!(black_box(local).iter().all(|&word| word == size as u64 ^ *outermost), "at {outermost}");
    below + 1
}

/// Suspends with a stack of `size` bytes, and of `then` the next time; returns how deep it was.
fn suspended(size: usize, then: usize) -> Coroutine<(), (), u64> {
    let mut coroutine = relocating().spawn(move |yielder: &Yielder<(), ()>, ()| {
        let mut outermost = 0;
        let depth = descend(size, &mut outermost, &mut || {
            yielder.suspend(());
            let mut inner = 0;
            descend(then, &mut inner, &mut || yielder.suspend(()));
            assert_eq!(inner, 0);
        });
        assert_eq!(outermost, 0);
        depth
    });
    coroutine.resume(());
    coroutine
}

fn finish(mut coroutine: Coroutine<(), (), u64>) {
    let mut answer = coroutine.resume(());
    while answer.yielded().is_some() {
        answer = coroutine.resume(());
    }
    assert!(coroutine.done());
}

fn page_faults() -> i64 {
    // SAFETY: plain data for a system call.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &mut usage);
        usage.ru_minflt
    }
}

fn kernel_carries() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    // SAFETY: opens and closes a descriptor.
    let allowed = unsafe { libc::close(libc::syscall(libc::SYS_userfaultfd, 1) as i32) == 0 };
    allowed
        && (numbers.next(), numbers.next()) >= (Some(6), Some(13))
        && std::env::var_os("REGROW_GUARD").is_none()
}

#[test]
fn no_page_is_touched_for_the_first_time_and_no_mapping_is_left() {
    if variant().is_none() {
        return passes("no_page_is_touched_for_the_first_time_and_no_mapping_is_left");
    }
    let mappings = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let mut first = suspended(1 << 20, 4 << 20); // the scratch
    first.resume(());
    let mut all: Vec<_> = (0..20).map(|_| suspended(1 << 20, 2 << 20)).collect();
    if !kernel_carries() {
        return eprintln!("skipped: this kernel does not carry pages");
    }
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let (mappings_before, descriptors_before) = (mappings(), descriptors());
    for coroutine in &mut all {
        let (before, bytes) = (page_faults(), coroutine.stats().bytes_copied);
        coroutine.resume(());
        let (faults, bytes) = (page_faults() - before, coroutine.stats().bytes_copied - bytes);
        // From somewhat more than 512 KiB to 1 MiB pages are touched as the stack goes down. Then it moves.
        assert!(bytes > 1 << 20, "{bytes} bytes copied");
        assert!(faults < 128 + 30, "{faults} page faults");
    }
    assert!(mappings() <= mappings_before + 3, "{mappings_before} mappings, then {}", mappings());
    assert_eq!(descriptors(), descriptors_before);
    all.into_iter().for_each(finish);
    finish(first);
}

#[test]
fn without_a_descriptor_it_is_copied() {
    if variant().is_none() {
        return passes("without_a_descriptor_it_is_copied");
    }
    let all: Vec<_> = (0..5).map(|_| suspended(512 << 10, 8 << 20)).collect();
    // SAFETY: a plain system call.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
    all.into_iter().for_each(finish);
}

/// After a `fork` the pages are shared: neither process loses what the other carries away.
#[test]
fn after_a_fork_each_process_has_its_own() {
    if variant().is_none() {
        return passes("after_a_fork_each_process_has_its_own");
    }
    let warm = suspended(512 << 10, 2 << 20);
    let all: Vec<_> = (0..5).map(|_| suspended(512 << 10, 4 << 20)).collect();
    // SAFETY: this process has one thread that does anything, and the child ends by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let right =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| all.into_iter().for_each(finish)));
        // SAFETY: ends the process.
        unsafe { libc::_exit(if right.is_ok() { 0 } else { 1 }) };
    }
    let mut half = all.into_iter();
    half.by_ref().take(2).for_each(finish); // at the same time
    let mut status = -1;
    // SAFETY: writes `status`.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
    half.for_each(finish);
    finish(warm);
}
