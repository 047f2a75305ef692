//! Many coroutines: what they cost the system, what happens where it gives no more, and that nothing is lost.
//! Each test in a child process, whose memory is its own.

use std::hint::black_box;

use regrow::{Builder, Coroutine, Error, Yielder};

mod support;
use support::{Counted, Way, by_markers, frame, live, outcome, relocating, this_test, variant};

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

/// Bytes of address space and of resident memory.
fn memory() -> (usize, usize) {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let mut pages = text.split(' ').map(|pages| pages.parse::<usize>().unwrap() * 4096);
    (pages.next().unwrap(), pages.next().unwrap())
}

/// Suspends with whatever stack `N` bytes of frame take.
fn suspended<const N: usize>(builder: &Builder) -> Result<Coroutine<(), (), u64>, Error> {
    let held = Counted::new(1);
    let mut coroutine = builder.try_spawn(move |yielder: &Yielder<(), ()>, ()| {
        let held = &held;
        let sum = frame::<N>(1);
        yielder.suspend(());
        sum + held.0
    })?;
    coroutine.resume(());
    Ok(coroutine)
}

#[test]
fn a_hundred_thousand_coroutines_take_a_few_dozen_mappings_and_a_page_each() {
    const COUNT: usize = 100_000;
    if !by_markers() {
        return;
    }
    let Some(way) = variant() else { return this_test!().passes_each(Way::BOTH) };
    let builder = Way::named(&way).builder();
    drop(suspended::<16>(&builder).unwrap());
    let mut live = Vec::with_capacity(COUNT);
    let (before, (_, memory_before)) = (mappings(), memory());
    for _ in 0..COUNT {
        let mut coroutine =
            builder.spawn(|yielder: &Yielder<u64, u64>, number: u64| yielder.suspend(number) + 1);
        assert_eq!(coroutine.resume(live.len() as u64).yielded(), Some(live.len() as u64));
        live.push(coroutine);
    }
    let (after, (_, memory_after)) = (mappings(), memory());
    if std::env::var_os("REGROW_GUARD").is_none() && kernel_has_guard_pages() {
        assert!(after - before <= 48, "{} mappings were added", after - before);
    }
    // A debug build needs more than half a page to suspend.
    let each = (memory_after - memory_before) / COUNT;
    let most = if cfg!(debug_assertions) { 3 * 4096 } else { 4096 + 100 };
    assert!(each <= most, "{each} bytes each");
    for (number, mut coroutine) in live.into_iter().enumerate() {
        assert_eq!(coroutine.resume(7).returned(), Some(8), "{number}");
    }
}

fn kernel_has_guard_pages() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(13))
}

/// As on a kernel before 6.13.
#[test]
fn everything_works_with_guard_pages_by_protection() {
    let Some(way) = variant() else {
        return this_test!().passes_each_with(Way::BOTH, &[("REGROW_GUARD", "protect")]);
    };
    let builder = Way::named(&way).builder();
    for _ in 0..3 {
        let mut live: Vec<_> = (0..300)
            .map(|n| match n % 3 {
                0 => suspended::<16>(&builder).unwrap(),
                1 => suspended::<5000>(&builder).unwrap(),
                _ => suspended::<50_000>(&builder).unwrap(),
            })
            .collect();
        for (n, coroutine) in live.iter_mut().enumerate().filter(|(n, _)| n % 2 == 0) {
            assert_eq!(coroutine.resume(()).returned(), Some([16, 5000, 50_000][n % 3] + 1));
        }
    }
    assert_eq!(self::live(), 0);
}

#[test]
fn running_out_of_mappings_is_an_error_that_names_the_setting() {
    let Some(way) = variant() else {
        return this_test!().passes_each_with(Way::BOTH, &[("REGROW_GUARD", "protect")]);
    };
    let builder = Way::named(&way).builder();
    let most: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    if most > 200_000 {
        return eprintln!("skipped: vm.max_map_count is {most}");
    }
    let mut coroutines = Vec::with_capacity(most);
    let error = loop {
        match suspended::<16>(&builder) {
            Ok(coroutine) => coroutines.push(coroutine),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Mappings { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("vm.max_map_count") && text.contains("6.13"), "{text}");
    assert!(coroutines.len() > most / 8, "only {} coroutines", coroutines.len());
    nothing_is_lost(&builder, coroutines);
}

/// How many mappings the process can still make: it makes them, and takes them back.
fn mappings_left(most: usize) -> usize {
    let bytes = 2 * most * 4096;
    let (none, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new mapping, of which every second page changes its protection, and that is gone afterwards.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), bytes, none, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        let page = |number: usize| at.byte_add(number * 2 * 4096);
        let split = (0..most).take_while(|&number| libc::mprotect(page(number), 4096, libc::PROT_READ) == 0);
        let left = 2 * split.count();
        libc::munmap(at, bytes);
        left
    }
}

#[test]
fn mappings_are_left_for_the_rest_of_the_program() {
    let Some(way) = variant() else {
        return this_test!().passes_each_with(Way::BOTH, &[("REGROW_GUARD", "protect")]);
    };
    let builder = Way::named(&way).builder();
    let most: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    if most > 200_000 {
        return eprintln!("skipped: vm.max_map_count is {most}");
    }
    let mut coroutines = Vec::with_capacity(most);
    while let Ok(coroutine) = suspended::<16>(&builder) {
        coroutines.push(coroutine);
    }
    let left = mappings_left(most);
    assert!(left > most / 32, "{left} mappings left with {} coroutines", coroutines.len());
    assert!(left < most / 4, "{left} mappings unused with {} coroutines", coroutines.len());
}

/// Those that the stock of the thread holds go with `trim`.
#[test]
fn mappings_go_back_when_coroutines_have_ended_and_the_thread_is_trimmed() {
    let Some(way) = variant() else {
        return this_test!().passes_each_with(Way::BOTH, &[("REGROW_GUARD", "protect")]);
    };
    let builder = Way::named(&way).builder();
    let before = mappings();
    let most: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    let at_a_time = (most / 4).min(20_000);
    for _ in 0..2 {
        // Some of them have grown.
        for _ in 0..2 {
            let make = |n| match n % 10 {
                0 => suspended::<5000>(&builder),
                1 => suspended::<50_000>(&builder),
                _ => suspended::<16>(&builder),
            };
            let many: Vec<_> = (0..at_a_time).map(|n| make(n).unwrap()).collect();
            drop(many);
        }
        regrow::trim();
        let after = mappings();
        assert!(after <= before + 100, "{before} mappings, then {after}");
    }
}

/// Takes all mappings that the process can still make.
fn take_all_mappings(most: usize) {
    let bytes = 2 * most * 4096;
    let (none, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new mapping, of which every second page changes its protection.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), bytes, none, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        let page = |number: usize| at.byte_add(number * 2 * 4096);
        let split = |number| libc::mprotect(page(number), 4096, libc::PROT_READ) == 0;
        assert!(!(0..most).all(split), "there are more than {most} mappings");
    }
}

/// In place whoever takes the mappings, while a stack that moves has given its own away: there it is new coroutines.
#[test]
fn what_is_frozen_thaws_and_what_runs_grows_when_all_mappings_are_taken() {
    let test = this_test!();
    let Some(variant) = variant() else {
        let variants = ["moving", "in place", "moving, alone", "in place, alone"];
        return test.passes_each_with(variants, &[("REGROW_GUARD", "protect")]);
    };
    let most: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    if most > 200_000 {
        return eprintln!("skipped: vm.max_map_count is {most}");
    }
    let (way, alone) = variant.split_once(',').map_or((&*variant, false), |(way, _)| (way, true));
    let builder = Way::named(way).builder();
    if alone {
        // The harness runs a test in a thread. A child process has only one, and glibc is told so.
        // SAFETY: the flag of the C library, true in the child; it only runs coroutines, and ends.
        unsafe {
            let child = libc::fork();
            if child != 0 {
                let mut status = -1;
                assert_eq!(libc::waitpid(child, &mut status, 0), child);
                return assert_eq!(status, 0);
            }
            let flag = libc::dlsym(libc::RTLD_DEFAULT, c"__libc_single_threaded".as_ptr());
            flag.cast::<u8>().as_mut().into_iter().for_each(|flag| *flag = 1);
        }
    }
    let mut frozen: Vec<_> = (0..most / 20).map(|_| suspended::<16>(&builder).unwrap()).collect();
    for coroutine in &mut frozen {
        assert!(coroutine.freeze().unwrap());
    }
    let mut growing = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
        yielder.suspend(());
        frame::<9000>(1)
    });
    growing.resume(());
    let mut others = Vec::with_capacity(most);
    if way == "moving" {
        while let Ok(coroutine) = suspended::<16>(&builder) {
            others.push(coroutine);
        }
    } else {
        take_all_mappings(most);
    }
    for mut coroutine in frozen {
        assert_eq!(coroutine.resume(()).returned(), Some(17));
    }
    if way == "moving" {
        take_all_mappings(most);
    }
    assert_eq!(growing.resume(()).returned(), Some(9000));
    drop(others);
    if alone {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
}

#[test]
fn running_out_of_address_space_is_an_error_that_says_what_to_do() {
    let Some(way) = variant() else { return this_test!().passes_each(Way::BOTH) };
    let builder = Way::named(&way).builder();
    drop(suspended::<16>(&builder).unwrap());
    let mut coroutines = Vec::with_capacity(100_000);
    let most = memory().0 as u64 + (200 << 20);
    // SAFETY: plain data for a system call.
    unsafe { libc::setrlimit(libc::RLIMIT_AS, &libc::rlimit { rlim_cur: most, rlim_max: most }) };
    let error = loop {
        match suspended::<16>(&builder) {
            Ok(coroutine) => coroutines.push(coroutine),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Memory { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("the kernel refused") && text.contains("ulimit -v"), "{text}");
    // All of what there was has been used: a smaller arena is taken where a larger one is refused.
    assert!(coroutines.len() > 300, "only {} coroutines", coroutines.len());
    nothing_is_lost(&builder, coroutines);
}

/// Where the kernel charges for what may be written (`vm.overcommit_memory=2`): tests/kernels/run has it so, few machines have.
#[test]
fn strict_overcommit_is_an_error_that_says_what_to_do() {
    let Some(way) = variant() else {
        let mode = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default();
        if mode.trim() != "2" {
            return println!("vm.overcommit_memory is {}, not 2: nothing to see", mode.trim());
        }
        return this_test!().passes_each(Way::BOTH);
    };
    let builder = Way::named(&way).builder();
    let mut coroutines = Vec::with_capacity(100_000);
    let error = loop {
        match suspended::<16>(&builder) {
            Ok(coroutine) => coroutines.push(coroutine),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Memory { .. }), "{error:?}");
    assert!(error.to_string().contains("vm.overcommit_memory"), "{error}");
    assert!(coroutines.len() > 300, "only {} coroutines", coroutines.len());
    nothing_is_lost(&builder, coroutines);
}

/// Reserves what is free of a range of addresses, but for small pieces.
fn reserve_all(start: usize, bytes: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: a new mapping that replaces nothing.
    let at = unsafe { libc::mmap(start as *mut _, bytes, libc::PROT_NONE, flags, -1, 0) };
    if at == libc::MAP_FAILED && bytes > 16 << 20 {
        reserve_all(start, bytes / 2);
        reserve_all(start + bytes / 2, bytes / 2);
    }
}

/// Valgrind gives a program such a one.
#[test]
fn moving_coroutines_can_be_made_where_only_low_addresses_are_free() {
    if variant().is_none() {
        return this_test!().passes_each(["moving"]);
    }
    const LOW: usize = 1 << 38;
    reserve_all(LOW, (1 << 47) - 4096 - LOW);
    let make =
        |n| if n % 2 == 0 { suspended::<16>(&relocating()) } else { suspended::<20_000>(&relocating()) };
    let mut coroutines: Vec<_> = (0..500).map(|n| make(n).unwrap()).collect();
    for (n, coroutine) in coroutines.iter_mut().enumerate() {
        assert_eq!(coroutine.resume(()).returned(), Some([16, 20_000][n % 2] + 1));
    }
}

/// Valgrind itself: other signal delivery, other addresses, system calls that it does not know.
#[test]
fn coroutines_grow_freeze_and_move_under_valgrind() {
    let Some(way) = variant() else {
        if std::process::Command::new("valgrind").arg("--version").output().is_err() {
            return println!("skipped: no valgrind");
        }
        for way in Way::BOTH {
            let mut valgrind = std::process::Command::new("valgrind");
            let outcome = outcome(this_test!().under(valgrind.args(["--quiet", "--tool=none"]), way));
            assert!(outcome.has_passed(), "{way}: {outcome}");
        }
        return;
    };
    let builder = Way::named(&way).builder();
    let make = |n| match n % 3 {
        0 => suspended::<16>(&builder).unwrap(),
        1 => suspended::<5000>(&builder).unwrap(),
        _ => suspended::<50_000>(&builder).unwrap(),
    };
    let mut coroutines: Vec<_> = (0..30).map(make).collect();
    for (n, coroutine) in coroutines.iter_mut().enumerate() {
        assert!(n % 2 == 0 || coroutine.freeze().unwrap());
        assert_eq!(coroutine.resume(()).returned(), Some([16, 5000, 50_000][n % 3] + 1), "{n}");
    }
}

/// The kernel makes no guard markers in locked memory.
#[test]
fn coroutines_are_made_and_grow_in_locked_memory() {
    let variants = ["moving, before", "moving, after", "in place, before", "in place, after"];
    let Some(variant) = variant() else { return this_test!().passes_each(variants) };
    let (way, when) = variant.split_once(", ").unwrap();
    let builder = Way::named(way).builder();
    let make = |n| match n % 3 {
        0 => suspended::<16>(&builder).unwrap(),
        1 => suspended::<5000>(&builder).unwrap(),
        _ => suspended::<50_000>(&builder).unwrap(),
    };
    let mut coroutines = Vec::new();
    if when == "after" {
        coroutines.extend((0..3).map(make));
    }
    // SAFETY: no memory is touched.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) } != 0 {
        return println!("skipped: memory may not be locked");
    }
    for round in 0..3 {
        coroutines.extend((coroutines.len()..200).map(make));
        for (n, coroutine) in coroutines.iter_mut().enumerate() {
            // Frozen stacks, too.
            assert!(n % 2 == 0 || coroutine.freeze().unwrap());
            assert_eq!(coroutine.resume(()).returned(), Some([16, 5000, 50_000][n % 3] + 1), "{round}, {n}");
        }
        coroutines.clear();
    }
    assert_eq!(live(), 0);
}

/// After an error: what was refused was dropped, what there is works, and once it has ended as many are possible.
fn nothing_is_lost(builder: &Builder, coroutines: Vec<Coroutine<(), (), u64>>) {
    let count = coroutines.len();
    assert_eq!(live(), count as isize, "the closure that was refused is dropped");
    for mut coroutine in coroutines {
        assert_eq!(coroutine.resume(()).returned(), Some(17));
    }
    assert_eq!(live(), 0);
    for _ in 0..2 {
        let again: Vec<_> = (0..count).map(|_| suspended::<16>(builder)).collect();
        let made = again.iter().filter(|coroutine| coroutine.is_ok()).count();
        assert_eq!(made, count);
    }
}

/// Where no larger slot is to be had, a stack that moves grows into its slack.
#[test]
fn growth_without_memory_uses_the_slack_and_then_reports() {
    match variant() {
        None => {
            let outcome = this_test!().child("");
            assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
            for part in
                ["into the slack\n", "cannot grow its stack\nfatal error: out of memory\n", "ulimit -v"]
            {
                assert!(outcome.stderr.contains(part), "no {part:?} in\n{outcome}");
            }
        }
        Some(_) => {
            let mut coroutine = relocating().spawn(|yielder: &Yielder<(), ()>, ()| {
                yielder.suspend(());
                assert_eq!(frame::<9000>(1), 9000);
                eprintln!("into the slack");
                frame::<100_000>(1);
            });
            coroutine.resume(());
            let most = memory().0 as u64 + 4096;
            // SAFETY: plain data for a system call.
            unsafe { libc::setrlimit(libc::RLIMIT_AS, &libc::rlimit { rlim_cur: most, rlim_max: most }) };
            coroutine.resume(());
        }
    }
}

#[test]
fn the_memory_of_finished_coroutines_is_used_again() {
    let Some(way) = variant() else { return this_test!().passes_each(Way::BOTH) };
    let builder = Way::named(&way).builder();
    let round = |most: usize| {
        for n in 0..most {
            let mut coroutine = builder.spawn(move |_: &Yielder<u64, ()>, number: u64| {
                // Some grow, to different sizes.
                match n % 2000 {
                    0 => frame::<3000>(1),
                    100 => frame::<9000>(1),
                    200 => frame::<30_000>(1),
                    300 => frame::<90_000>(1),
                    _ => number,
                }
            });
            black_box(coroutine.resume(1));
        }
        // Many at a time, more than a thread keeps for itself.
        let many: Vec<_> = (0..3000).map(|_| suspended::<5000>(&builder).unwrap()).collect();
        drop(many);
        memory()
    };
    round(10_000);
    let (space_before, resident_before) = round(10_000);
    let (space, resident) = round(1_000_000);
    assert!(space <= space_before + (1 << 20), "{} more bytes of address space", space - space_before);
    assert!(resident <= resident_before + (4 << 20), "{} more bytes resident", resident - resident_before);
    assert!(resident < 200 << 20, "{resident} bytes resident");
}

/// Slots go from thread to thread: a process that makes threads for ever does not grow.
#[test]
fn threads_that_end_leave_nothing_behind() {
    let Some(way) = variant() else { return this_test!().passes_each(Way::BOTH) };
    let builder = Way::named(&way).builder();
    let round = || {
        for _ in 0..200 {
            let builder = builder.clone();
            std::thread::spawn(move || {
                let many: Vec<_> = (0..20).map(|_| suspended::<5000>(&builder).unwrap()).collect();
                drop(many);
            })
            .join()
            .unwrap();
        }
        (mappings(), memory())
    };
    round();
    let (mappings_before, (space_before, resident_before)) = round();
    let (mappings, (space, resident)) = round();
    assert!(mappings <= mappings_before + 4, "{mappings_before} mappings, then {mappings}");
    assert!(space <= space_before + (1 << 20) && resident <= resident_before + (2 << 20));
}
