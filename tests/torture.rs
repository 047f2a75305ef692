//! The torture itself: that it moves where it says, finds what is there to find and nothing else, and leaves the
//! process as it was.

use std::arch::asm;
use std::cell::Cell;
use std::hint::black_box;
use std::panic::catch_unwind;
use std::process::Command;

use regrow::torture::{Finding, Kind, Mode, Report, Torture};
use regrow::{Builder, Yielder, current_stats, pinned_room, reserve};

mod support;
use support::{below, both_ways, frame, random, relocating, this_test, variant};

const MODES: [Mode; 6] = [
    Mode::GrowthPoints,
    Mode::Breakpoints,
    Mode::Every(1),
    Mode::Every(13),
    Mode::Random(5),
    Mode::Overflows,
];

fn torture<R: 'static>(mode: Mode, f: impl FnOnce() -> R + 'static) -> (Option<R>, Report) {
    // SAFETY: the tests look at the report; those that break the promise do it so that it is a finding.
    unsafe { Torture::new(mode).run(f) }
}

/// Runs `f`, which keeps the promise, in every mode.
fn is_clean_everywhere<R: PartialEq + std::fmt::Debug + 'static>(f: fn() -> R) {
    let expected = f();
    for mode in MODES {
        let (value, report) = torture(mode, f);
        assert!(report.is_clean(), "{report}");
        assert_eq!(value.as_ref(), Some(&expected), "{report}");
    }
}

// --- where it moves ----------------------------------------------------------------------------------------------

/// Pushes once and returns where it is.
#[inline(never)]
fn pushes() -> usize {
    let at;
    // SAFETY: takes back what it pushes.
    unsafe { asm!("lea {0}, [rip + 2f]", "2:", "push rax", "lea rsp, [rsp + 8]", out(reg) at) };
    at
}

#[test]
fn words_of_other_threads_are_not_counted() {
    let words = || torture(Mode::GrowthPoints, || (0..20).fold(0, |_, _| pushes())).1.words_by_map;
    words(); // what is done once only
    let alone = words();
    assert!(alone.ambiguous > 0);
    let done = &std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                support::run(&relocating(), || frame::<20_000>(1));
            }
        });
        let all = [(); 20].map(|()| words());
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(all, [alone; 20]);
    });
}

#[test]
fn a_push_is_moved_at_each_time() {
    for mode in [Mode::GrowthPoints, Mode::Breakpoints, Mode::Every(1)] {
        let (at, report) = torture(mode, || (0..20).fold(0, |_, _| pushes()));
        let hit = report.hits.iter().find(|hit| Some(hit.pc) == at);
        assert_eq!(hit.map(|hit| hit.moves), Some(20), "{report}");
        let named = report.functions();
        assert!(
            named.iter().any(|(name, moves)| name.ends_with("torture::pushes") && *moves >= 20),
            "{named:?}"
        );
        assert_eq!(report.hits.iter().map(|hit| hit.moves).sum::<u64>(), report.moves);
    }
}

#[test]
fn the_stack_is_elsewhere_after_each_move_and_back_after_no_fewer_than_256() {
    let places = || {
        let here = |yielder: &Yielder<(), ()>| std::ptr::from_ref(yielder) as usize;
        // SAFETY: addresses are only looked at.
        let (places, report) = unsafe {
            Torture::new(Mode::GrowthPoints).run_suspending(move |yielder| {
                let mut places = Vec::with_capacity(700);
                for _ in 0..700 {
                    black_box(pushes());
                    places.push(black_box(here(yielder)));
                }
                places
            })
        };
        assert!(report.is_clean(), "{report}");
        places.unwrap()
    };
    let places = places();
    assert!(places.windows(2).all(|pair| pair[0] != pair[1]));
    // Each round of the loop is several moves, at least two.
    assert!(places.windows(30).all(|window| !window[1..].contains(&window[0])));
}

#[test]
fn distances_and_limits_are_kept() {
    let f = || (0..500u64).fold(0, |sum, n| black_box(sum + n));
    let (_, all) = torture(Mode::Every(1), f);
    let (_, some) = torture(Mode::Every(10), f);
    assert!(some.moves + some.skipped <= some.steps / 10 + 1 && some.moves > some.steps / 11, "{some}");
    assert!(all.moves + all.skipped + all.refused == all.steps, "{all}");
    // SAFETY: nothing is kept.
    let (value, limited) = unsafe { Torture::new(Mode::Every(1)).limit(100).run(f) };
    assert_eq!((value, limited.steps), (Some(f()), 100));
}

#[test]
fn a_seed_decides_and_another_decides_otherwise() {
    let moves = |seed| {
        // SAFETY: nothing is kept.
        let (_, report) = unsafe {
            Torture::new(Mode::Random(3))
                .seed(seed)
                .run(|| (0..300u64).fold(1, |product, n| black_box(product ^ n)))
        };
        let mut hits: Vec<_> = report.hits.iter().map(|hit| (hit.pc, hit.moves)).collect();
        hits.sort_unstable();
        hits
    };
    moves(0); // what is done once is done
    assert_eq!(moves(1), moves(1));
    assert_ne!(moves(1), moves(2));
}

#[test]
fn overflows_go_by_the_smallest_step() {
    let (_, report) = torture(Mode::Overflows, || black_box(frame::<60_000>(1)));
    // 2 KiB, 4, 8, 16, 32, 64 KiB: by ordinary growth it would be one step.
    assert!(report.growths >= 5, "{report}");
    assert!(report.is_clean() && report.steps == 0);
}

// --- what it must not break --------------------------------------------------------------------------------------

/// What takes slots and gives them back runs on moving stacks, with addresses at the edges of slots in registers: of the one next
/// to where the stack happens to be, now and then. In a process of its own, where all slots are still to be taken.
#[test]
fn coroutines_are_made_inside() {
    if variant().is_none() {
        return this_test!().passes();
    }
    // Unoptimised one takes ten seconds.
    const MADE: u32 = if cfg!(debug_assertions) { 1 } else { 50 };
    let (value, report) = torture(Mode::Every(1), || {
        let mut made = Vec::new();
        for n in 0..MADE {
            let mut inner = relocating().spawn(|yielder: &Yielder<u32, u32>, n| yielder.suspend(n) * 2);
            assert_eq!(inner.resume(n).yielded(), Some(n));
            made.push(inner);
        }
        made.into_iter().map(|mut inner| inner.resume(2).returned().unwrap()).sum::<u32>()
    });
    assert!(report.is_clean(), "{report}");
    assert_eq!(value, Some(4 * MADE), "{report}");
}

/// What the crate itself computes with addresses of the stack it runs on, at whichever instruction that stack moves.
#[test]
fn what_is_asked_about_the_stack_is_answered() {
    is_clean_everywhere(|| {
        let reserved = [1000, 3000, 9000].map(|bytes| reserve(black_box(bytes)).is_ok());
        let size = current_stats().map_or(0, |stats| stats.size);
        (reserved, size <= 1 << 15, pinned_room().is_none_or(|room| room < 1 << 30))
    });
}

/// A frame of `N` bytes, filled by a library routine, of which only a few are looked at.
#[inline(never)]
fn large<const N: usize>(seed: u8) -> u8 {
    let mut bytes = black_box([seed; N]);
    bytes[N / 2] += 1;
    let bytes = black_box(&bytes);
    bytes[0] + bytes[N / 2] + bytes[N - 1]
}

#[test]
fn frames_of_many_sizes() {
    is_clean_everywhere(|| {
        let mut sums = [0; 4];
        below(3, &mut || sums = [large::<3>(1), large::<300>(2), large::<3000>(3), large::<5000>(4)]);
        sums
    });
}

/// Frames of more than a page, whose prologue keeps the end of a loop in a register.
#[test]
fn probe_loops() {
    is_clean_everywhere(|| [large::<20_000>(1), large::<90_000>(2)]);
}

/// Each of these is a pointer into the stack across a growth point, and must be the one it would be if taken now.
#[test]
fn every_place_of_a_pointer_moves_with_the_stack() {
    let general_and_red_zone = || {
        let (wrong_general, wrong_red_zone): (u64, u64);
        // SAFETY: keeps what it must; leaves the stack as it was.
        unsafe {
            asm!(
                "push rbx", "push rbp", "sub rsp, 256",
                "lea rbx, [rsp + 32]",
                "mov rbp, rbx", "mov r8, rbx", "mov r9, rbx", "mov r10, rbx", "mov r11, rbx", "mov r12, rbx", "mov r13, rbx",
                "mov r14, rbx", "mov r15, rbx", "mov rcx, rbx", "mov rdx, rbx", "mov rsi, rbx", "mov rdi, rbx",
                "mov [rsp - 96], rbx",
                "mov qword ptr [rsp - 120], 0", // moves here
                "lea rax, [rsp + 32]",
                "sub rbx, rax", "sub rbp, rax", "sub r8, rax", "sub r9, rax", "sub r10, rax", "sub r11, rax", "sub r12, rax",
                "sub r13, rax", "sub r14, rax", "sub r15, rax", "sub rcx, rax", "sub rdx, rax", "sub rsi, rax", "sub rdi, rax",
                "sub rax, [rsp - 96]",
                "or rbx, rbp", "or rbx, r8", "or rbx, r9", "or rbx, r10", "or rbx, r11", "or rbx, r12", "or rbx, r13",
                "or rbx, r14", "or rbx, r15", "or rbx, rcx", "or rbx, rdx", "or rbx, rsi", "or rbx, rdi",
                "mov rcx, rbx",
                "add rsp, 256", "pop rbp", "pop rbx",
                out("rax") wrong_red_zone, out("rcx") wrong_general, out("rdx") _, out("rsi") _, out("rdi") _,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            );
        }
        (wrong_general, wrong_red_zone)
    };
    let vectors = || {
        if !is_x86_feature_detected!("avx512f") {
            return [0; 3];
        }
        let (x, y, z): (u64, u64, u64);
        // SAFETY: the processor has these registers; leaves the stack as it was.
        unsafe {
            asm!(
                "sub rsp, 256", "lea rax, [rsp + 32]",
                "vpbroadcastq zmm3, rax", "vpbroadcastq zmm16, rax", "vpbroadcastq zmm31, rax",
                "mov qword ptr [rsp - 120], 0", // moves here
                "lea rax, [rsp + 32]",
                "vpbroadcastq zmm4, rax",
                "vpxorq zmm3, zmm3, zmm4", "vpxorq zmm16, zmm16, zmm4", "vpxorq zmm31, zmm31, zmm4",
                "vptestmq k1, zmm3, zmm3", "kmovw eax, k1",
                "vptestmq k1, zmm16, zmm16", "kmovw ecx, k1",
                "vptestmq k1, zmm31, zmm31", "kmovw edx, k1",
                "add rsp, 256",
                out("rax") x, out("rcx") y, out("rdx") z, out("xmm3") _, out("xmm4") _, out("xmm16") _, out("xmm31") _, out("k1") _,
            );
        }
        [x, y, z]
    };
    assert_eq!((general_and_red_zone(), vectors()), ((0, 0), [0; 3]));
    is_clean_everywhere(general_and_red_zone);
    is_clean_everywhere(vectors);
}

#[test]
fn panics_are_passed_on() {
    for mode in MODES {
        let panicking = move || torture(mode, || std::panic::resume_unwind(Box::new(black_box(5u32))));
        assert_eq!(catch_unwind(panicking).unwrap_err().downcast_ref(), Some(&5u32), "{mode}");
    }
    // And the next torture finds everything in order.
    is_clean_everywhere(|| 1);
}

/// Creating a thread and a process blocks SIGTRAP for a while, which would kill the process if it were stepped.
#[test]
fn code_that_blocks_sigtrap() {
    is_clean_everywhere(|| {
        large::<16_000>(1); // SIGSEGV is blocked as well, so the stack cannot grow there
        let status = Command::new("true").status().unwrap();
        (status.success(), std::thread::spawn(|| 7).join().unwrap())
    });
    let mask = || {
        // SAFETY: plain data for system calls.
        unsafe {
            let mut all = std::mem::zeroed();
            let mut before = std::mem::zeroed();
            let mut now = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_BLOCK, &all, &mut before);
            libc::pthread_sigmask(libc::SIG_SETMASK, &before, &mut now);
            [libc::sigismember(&before, libc::SIGTRAP), libc::sigismember(&now, libc::SIGTRAP)]
        }
    };
    // The program's own code can have no breakpoints while SIGTRAP is blocked.
    for mode in MODES.into_iter().filter(|mode| *mode != Mode::Breakpoints) {
        let (after, report) = torture(mode, mask);
        assert!(report.is_clean(), "{report}");
        assert_eq!(after, Some([0, 1]), "{report}");
    }
}

#[test]
fn stepping_goes_on_after_sigtrap_was_blocked() {
    let (at, report) = torture(Mode::GrowthPoints, || {
        large::<16_000>(1); // as above
        std::thread::spawn(|| ()).join().unwrap();
        (0..10).fold(0, |_, _| pushes())
    });
    assert!(report.hits.iter().any(|hit| Some(hit.pc) == at && hit.moves == 10), "{report}");
}

#[test]
fn nested_coroutines_are_tortured_too() {
    is_clean_everywhere(|| {
        let mut sum = 0;
        both_ways(|builder| {
            let mut inner = builder.spawn(|yielder: &Yielder<u64, u64>, mut n: u64| {
                for _ in 0..2 {
                    let local = black_box([n; 20]);
                    n = yielder.suspend(local[0] + local[19]);
                }
                n
            });
            for n in 1..=2 {
                sum += inner.resume(n).yielded().unwrap();
            }
            sum += inner.resume(9).returned().unwrap();
        });
        sum
    });
}

#[test]
fn suspends_come_back_at_once() {
    for mode in MODES {
        // SAFETY: nothing is kept.
        let (value, report) = unsafe {
            Torture::new(mode).run_suspending(|yielder| {
                (0..20u64).fold(0, |sum, n| {
                    let local = black_box(n);
                    yielder.suspend(());
                    sum + local
                })
            })
        };
        assert!(report.is_clean(), "{report}");
        assert_eq!(value, Some(190));
    }
}

#[test]
fn threads_wait_for_their_turn() {
    let tortures: Vec<_> = (0..4)
        .map(|seed| {
            std::thread::spawn(move || torture(MODES[seed], move || format!("{seed:?} {:?}", [seed; 9])))
        })
        .collect();
    for (seed, thread) in tortures.into_iter().enumerate() {
        let (value, report) = thread.join().unwrap();
        assert!(report.is_clean(), "{report}");
        assert_eq!(value, Some(format!("{seed:?} {:?}", [seed; 9])));
    }
}

/// In a process of its own: the other tests put breakpoints into the same code.
#[test]
fn the_code_is_as_before() {
    if variant().is_none() {
        return this_test!().passes();
    }
    let code = || {
        let mut bytes = vec![0u8; 256];
        // SAFETY: code of this program is readable.
        unsafe { (frame::<300> as *const u8).copy_to_nonoverlapping(bytes.as_mut_ptr(), 64) };
        bytes
    };
    let before = code();
    let (during, _) = torture(Mode::Breakpoints, code);
    assert_eq!(code(), before);
    assert!(during.unwrap().contains(&0xcc));
}

// --- what it must find -------------------------------------------------------------------------------------------

thread_local! {
    static HIDDEN: Cell<usize> = const { Cell::new(0) };
}

#[inline(never)]
fn reads_the_hidden_pointer() -> u64 {
    // SAFETY: none; this is what has to be found.
    unsafe { black_box(*(black_box(HIDDEN.get()) as *const u64)) }
}

#[inline(never)]
fn owns_the_local() -> u64 {
    let local = black_box([4711u64; 5]);
    HIDDEN.set(&raw const local[2] as usize);
    let read = below_reads(3);
    read + black_box(local)[0]
}

#[inline(never)]
fn below_reads(steps: u64) -> u64 {
    let here = black_box([steps; 3]);
    if steps == 0 { reads_the_hidden_pointer() } else { below_reads(steps - 1) + black_box(here)[0] }
}

fn the_finding(report: &Report) -> &Finding {
    match report.findings.as_slice() {
        [finding] => finding,
        _ => panic!("not one finding: {report}"),
    }
}

#[test]
fn a_stale_pointer_is_described() {
    for mode in [Mode::GrowthPoints, Mode::Breakpoints, Mode::Every(1), Mode::Random(2)] {
        let (value, report) = torture(mode, owns_the_local);
        assert_eq!(value, None, "{report}");
        let finding = the_finding(&report);
        assert_eq!(finding.kind, Kind::Stale);
        assert!(finding.function.ends_with("reads_the_hidden_pointer"), "{report}");
        assert!(finding.points_into.as_deref().unwrap().ends_with("owns_the_local"), "{report}");
        assert!(
            finding.file.as_ref().unwrap().ends_with("torture.rs") || cfg!(not(debug_assertions)),
            "{report}"
        );
        assert!(finding.line.is_some() && finding.register.is_some(), "{report}");
        assert!(finding.instruction.contains(finding.register.unwrap()), "{report}");
        assert!((8..2000).contains(&finding.below_top.unwrap()), "{report}");
        assert!(!finding.on_another_thread);
        let callers: Vec<_> = ["reads_the_hidden_pointer", "below_reads", "owns_the_local"]
            .iter()
            .map(|name| finding.backtrace.iter().position(|caller| caller.ends_with(name)))
            .collect();
        assert!(callers.iter().all(Option::is_some) && callers.is_sorted(), "{report}");
        let text = report.to_string();
        assert!(text.contains("points into the frame of") && text.contains(&finding.function), "{text}");
    }
}

#[test]
fn a_pointer_left_long_ago_is_found() {
    for pushed in [300, 700, 3000] {
        let found = |more| {
            let (value, report) = torture(Mode::Breakpoints, move || {
                let local = black_box(1u64);
                HIDDEN.set(&raw const local as usize);
                for _ in 0..pushed + more {
                    pushes();
                }
                reads_the_hidden_pointer() + black_box(local)
            });
            assert!(value.is_some() || the_finding(&report).kind == Kind::Stale, "{report}");
            value.is_none()
        };
        // Unless the stack has just come back to that very slot: some moves later it has left it.
        assert!(found(0) || found(10) || found(20), "after {pushed}");
    }
}

#[test]
fn a_use_of_fresh_stack_is_told_apart() {
    for mode in [Mode::GrowthPoints, Mode::Breakpoints] {
        let (value, report) = torture(mode, || {
            let value: u64;
            // SAFETY: none. Reads a pointer from below the red zone, right after a growth point.
            unsafe {
                asm!("push rax", "lea rsp, [rsp + 8]", "lea {0}, [rsp - 400]", "push rax", "lea rsp, [rsp + 8]",
                     "mov {0}, [{0}]", "mov {0}, [{0}]", out(reg) value)
            };
            value
        });
        assert_eq!(value, None, "{report}");
        assert_eq!(the_finding(&report).kind, Kind::Poison, "{report}");
    }
}

#[test]
fn a_finding_leaves_nested_coroutines_as_well() {
    both_ways(|builder| {
        let (value, report) = torture(Mode::GrowthPoints, move || {
            let local = black_box(1u64);
            let address = &raw const local as usize;
            let mut inner = builder.spawn(move |_: &Yielder<(), ()>, ()| {
                HIDDEN.set(address);
                reads_the_hidden_pointer()
            });
            inner.resume(()).returned().unwrap() + black_box(local)
        });
        assert_eq!(value, None, "{report}");
        assert!(the_finding(&report).function.ends_with("reads_the_hidden_pointer"));
    });
    is_clean_everywhere(|| 1);
}

#[test]
fn growing_in_place_the_same_is_right() {
    let mut coroutine = Builder::new().spawn(|_: &Yielder<(), ()>, ()| owns_the_local());
    assert_eq!(coroutine.resume(()).returned(), Some(owns_the_local()));
}

/// Findings stop nothing but the closure: many in a row, each found anew.
#[test]
fn findings_do_not_wear_the_process_out() {
    let mut state = 1;
    for _ in 0..40 {
        let mode = [Mode::GrowthPoints, Mode::Breakpoints, Mode::Random(2)][random(&mut state) as usize % 3];
        let (value, report) = torture(mode, owns_the_local);
        assert!(value.is_none() && report.findings.len() == 1, "{report}");
    }
}
