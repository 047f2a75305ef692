//! Stacks that move take their pages along, where the kernel has that; where it has not, or pages are shared, they are
//! right all the same. Each test in a child process, whose memory is its own.

use std::hint::black_box;
use std::io::{Read, Write};

use regrow::{Coroutine, Yielder, current_stats};

mod support;
use support::{relocating, this_test, variant};

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
    suspended_times(1, size, then)
}

/// The same, so many times before it needs more.
fn suspended_times(times: u32, size: usize, then: usize) -> Coroutine<(), (), u64> {
    let mut coroutine = relocating().spawn(move |yielder: &Yielder<(), ()>, ()| {
        let mut outermost = 0;
        let depth = descend(size, &mut outermost, &mut || {
            (0..times).for_each(|_| yielder.suspend(()));
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

/// A stack that moves from `size` bytes on touches the pages that it comes to use, and none for its move; nothing stays mapped
/// or open for it.
fn no_page_is_touched_to_move_from(size: usize) {
    let mappings = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut first = suspended(size, 4 * size); // the scratch
    first.resume(());
    let mut all: Vec<_> = (0..20).map(|_| suspended(size, 2 * size)).collect();
    let (mappings_before, descriptors_before) = (mappings(), descriptors());
    for coroutine in &mut all {
        let (before, bytes) = (page_faults(), coroutine.stats().bytes_copied);
        coroutine.resume(());
        let (faults, bytes) = (page_faults() - before, coroutine.stats().bytes_copied - bytes);
        // From somewhat more than half the size to all of it pages are touched as the stack goes down. Then it moves.
        assert!(bytes > size as u64, "{bytes} bytes copied");
        assert!(
            faults < (size / 2 / 4096 + size / 32_768) as i64 + 4,
            "{faults} page faults, from {size} bytes"
        );
    }
    assert!(mappings() <= mappings_before + 3, "{mappings_before} mappings, then {}", mappings());
    assert_eq!(descriptors(), descriptors_before);
    all.into_iter().for_each(finish);
    finish(first);
}

#[test]
fn no_page_is_touched_for_the_first_time_and_no_mapping_is_left() {
    if variant().is_none() {
        return this_test!().passes();
    }
    if !kernel_carries() {
        return eprintln!("skipped: this kernel does not carry pages");
    }
    [1 << 20, 64 << 10, 16 << 10].into_iter().for_each(no_page_is_touched_to_move_from);
}

#[test]
fn without_a_descriptor_it_is_copied() {
    if variant().is_none() {
        return this_test!().passes();
    }
    // SAFETY: a plain system call.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
    let all: Vec<_> = (0..5).map(|_| suspended(512 << 10, 8 << 20)).collect();
    all.into_iter().for_each(finish);
}

/// Programs that become daemons close everything that is open, and open something else, of the same kind for example.
#[test]
fn when_somebody_has_closed_the_descriptor_it_is_copied() {
    if variant().is_none() {
        return this_test!().passes();
    }
    let mut all: Vec<_> = (0..9).map(|_| suspended(128 << 10, 2 << 20)).collect();
    // SAFETY: nothing else in this process needs them.
    let close_all = || unsafe { libc::close_range(3, 100, 0) };
    assert_eq!(close_all(), 0);
    all.drain(..3).for_each(finish);
    let null = std::fs::File::open("/dev/null").unwrap();
    all.drain(..3).for_each(finish);
    drop(null);
    // SAFETY: opens a descriptor, which nobody uses.
    unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) };
    all.into_iter().for_each(finish);
}

/// After a `fork` the pages are shared, and the descriptor is for those of one process: neither process loses what the other
/// carries away.
#[test]
fn after_a_fork_each_process_has_its_own() {
    if variant().is_none() {
        return this_test!().passes();
    }
    // Slots to go to, in either process: usable, and without memory.
    (0..5).map(|_| suspended(512 << 10, 4 << 20)).collect::<Vec<_>>().into_iter().for_each(finish);
    regrow::trim();
    let mut all: Vec<_> = (0..5).map(|_| suspended_times(2, 512 << 10, 4 << 20)).collect();
    let (mut read, mut write) = std::io::pipe().unwrap();
    // SAFETY: this process has one thread that does anything, and the child ends by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let right = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            read.read_exact(&mut [0]).unwrap();
            all.into_iter().for_each(finish);
        }));
        // SAFETY: ends the process.
        unsafe { libc::_exit(if right.is_ok() { 0 } else { 1 }) };
    }
    // What is written to now is this process's alone.
    for coroutine in &mut all {
        coroutine.resume(());
    }
    write.write_all(&[0]).unwrap();
    let mut half = all.into_iter();
    half.by_ref().take(2).for_each(finish); // at the same time
    let mut status = -1;
    // SAFETY: writes `status`.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
    half.for_each(finish);
}
