//! Ordinary code does not notice that its stack grows, whichever way: not what is in its frames, in its
//! registers or below `rsp`, not what it points to, and not what it is in the middle of.

use std::arch::{asm, global_asm};
use std::cell::Cell;
use std::fmt::{self, Write};
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind};

use regrow::{Growth, Yielder, current_stats};

mod support;
use support::{OnDrop, below, both_ways, frame, growths, relocating, run};

/// Enough of a frame that a stack of the first size, and of the one after, must grow.
fn grow() {
    black_box(frame::<8192>(3));
}

/// Runs `f` at many depths of a fresh coroutine's first page, both ways, so that growths fall on many
/// different instructions of it; compares with the plain thread.
fn at_many_depths<R: PartialEq + fmt::Debug + 'static>(f: fn() -> R) {
    let expected = f();
    both_ways(|builder| {
        for steps in 0..40 {
            let found = run(&builder, move || {
                let mut found = None;
                below(steps, &mut || found = Some(f()));
                assert!(growths() > 0, "it was meant to grow");
                found
            });
            assert_eq!(found.as_ref(), Some(&expected), "{builder:?}, {steps} steps down");
        }
    });
}

// --- depth -----------------------------------------------------------------------------------------------------

/// Recurses; each frame writes to its caller's, and the one at depth `at` needs a lot at once.
#[inline(never)]
fn deep(depth: u64, at: u64, callers: &mut u64) -> u64 {
    let mut local = black_box([depth; 6]);
    *callers += depth;
    if depth == at {
        grow();
    }
    let below = if depth == 0 { 1 } else { deep(depth - 1, at, &mut local[3]) };
    local.iter().fold(below, |sum, &word| sum.wrapping_mul(31).wrapping_add(word))
}

#[test]
fn a_stack_can_grow_at_every_depth() {
    const DEPTH: u64 = 120;
    both_ways(|builder| {
        for at in 0..=DEPTH {
            let f = move || {
                let mut top = 5;
                (deep(DEPTH, at, &mut top), top)
            };
            assert_eq!(run(&builder, f), f(), "{builder:?}, growth at {at}");
        }
    });
}

#[test]
fn a_hundred_thousand_frames_deep() {
    let f = || {
        let mut top = 5;
        (deep(100_000, 50_000, &mut top), top)
    };
    let expected = std::thread::Builder::new().stack_size(256 << 20).spawn(f).unwrap().join().unwrap();
    both_ways(|builder| {
        assert_eq!(run(&builder.maximum(256 << 20), f), expected);
    });
}

#[test]
fn a_grown_stack_stays_right_over_suspends() {
    both_ways(|builder| {
        let mut coroutine = builder.spawn(|yielder: &Yielder<u64, u64>, mut depth: u64| {
            let mut top = 1;
            while depth != 0 {
                let sum = deep(depth, 0, &mut top);
                depth = yielder.suspend(sum);
            }
            top
        });
        let mut expected_top = 1;
        for depth in 1..200 {
            let expected = deep(depth, 0, &mut expected_top);
            assert_eq!(coroutine.resume(depth).yielded(), Some(expected));
        }
        assert_eq!(coroutine.resume(0).returned(), Some(expected_top));
    });
}

#[test]
fn the_counters_tell_what_happened() {
    both_ways(|builder| {
        let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
            grow();
            yielder.suspend(());
        });
        coroutine.resume(());
        let stats = coroutine.stats();
        if coroutine.growth() == Growth::InPlace {
            // The kernel made it larger, and says how large.
            assert_eq!((stats.growths, stats.last, stats.bytes_copied), (0, None, 0));
            assert!(
                stats.size >= 12 << 10 && stats.size % 4096 == 0 && stats.highest == stats.size,
                "{stats:?}"
            );
            return;
        }
        let last = stats.last.expect("it grew");
        assert!(stats.growths >= 1 && stats.size >= 8192 && stats.size.is_power_of_two(), "{stats:?}");
        assert_eq!((stats.highest, last.to), (stats.size, stats.size));
        assert!(last.from < last.to);
        assert!(stats.bytes_copied >= 1024 && stats.words_rewritten > 0, "{stats:?}");
        assert!(last.bytes > 0 && last.words > 0);
    });
}

// --- arguments -------------------------------------------------------------------------------------------------

#[derive(Clone, Copy)]
#[repr(C)]
struct Large([u64; 9]);

/// Six arguments in registers, eight in xmm registers, the rest and the structure on the stack.
#[inline(never)]
extern "C" fn many(
    a: u64,
    b: &u64,
    c: u64,
    d: &u64,
    e: u64,
    f: &u64,
    g: u64,
    h: &u64,
    i: u64,
    j: &u64,
    k: u8,
    l: u16,
    x0: f64,
    x1: f64,
    x2: f64,
    x3: f64,
    x4: f64,
    x5: f64,
    x6: f64,
    x7: f64,
    x8: f64,
    x9: f64,
    large: Large,
    m: &Large,
) -> f64 {
    let before = black_box([a, *b, c, *d, e, *f, g, *h, i, *j]);
    grow();
    let after = [a, *b, c, *d, e, *f, g, *h, i, *j];
    assert_eq!(black_box(before), after);
    let integers: u64 = after.iter().sum::<u64>() + u64::from(k) + u64::from(l);
    let floats = x0
        + x1 * 2.0
        + x2 * 3.0
        + x3 * 5.0
        + x4 * 7.0
        + x5 * 11.0
        + x6 * 13.0
        + x7 * 17.0
        + x8 * 19.0
        + x9 * 23.0;
    let words: u64 = large.0.iter().zip(&m.0).map(|(x, y)| x * y).sum();
    integers as f64 + floats + words as f64
}

#[test]
fn arguments_on_the_stack_survive() {
    at_many_depths(|| {
        let l = black_box([10, 20, 30, 40, 50]);
        let large = Large(black_box([1, 2, 3, 4, 5, 6, 7, 8, 9]));
        many(
            1, &l[0], 2, &l[1], 3, &l[2], 4, &l[3], 5, &l[4], 6, 7, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5,
            9.5, 10.5, large, &large,
        )
    });
}

// --- registers -------------------------------------------------------------------------------------------------

global_asm!(
    // regrow_test_registers(values: *mut [u64; 13], distance): loads rax rbx rcx rdx rbp r8-r15 from `values`,
    // writes `distance` bytes below rsp, and stores them again.
    ".globl regrow_test_registers",
    "regrow_test_registers:",
    ".cfi_startproc",
    "push rbx",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbx, -16",
    "push rbp",
    ".cfi_def_cfa_offset 24",
    ".cfi_offset rbp, -24",
    "push r12",
    ".cfi_def_cfa_offset 32",
    ".cfi_offset r12, -32",
    "push r13",
    ".cfi_def_cfa_offset 40",
    ".cfi_offset r13, -40",
    "push r14",
    ".cfi_def_cfa_offset 48",
    ".cfi_offset r14, -48",
    "push r15",
    ".cfi_def_cfa_offset 56",
    ".cfi_offset r15, -56",
    "neg rsi",
    "mov rax, [rdi]",
    "mov rbx, [rdi + 8]",
    "mov rcx, [rdi + 16]",
    "mov rdx, [rdi + 24]",
    "mov rbp, [rdi + 32]",
    "mov r8, [rdi + 40]",
    "mov r9, [rdi + 48]",
    "mov r10, [rdi + 56]",
    "mov r11, [rdi + 64]",
    "mov r12, [rdi + 72]",
    "mov r13, [rdi + 80]",
    "mov r14, [rdi + 88]",
    "mov r15, [rdi + 96]",
    "mov byte ptr [rsp + rsi], 0",
    "mov [rdi], rax",
    "mov [rdi + 8], rbx",
    "mov [rdi + 16], rcx",
    "mov [rdi + 24], rdx",
    "mov [rdi + 32], rbp",
    "mov [rdi + 40], r8",
    "mov [rdi + 48], r9",
    "mov [rdi + 56], r10",
    "mov [rdi + 64], r11",
    "mov [rdi + 72], r12",
    "mov [rdi + 80], r13",
    "mov [rdi + 88], r14",
    "mov [rdi + 96], r15",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".cfi_endproc",
    // regrow_test_red_zone(words: *mut [u64; 16], distance) -> rsp: a leaf function that keeps 16 words in the red
    // zone, every second one a pointer to itself, writes `distance` bytes below rsp, and copies the 16 words out.
    ".globl regrow_test_red_zone",
    "regrow_test_red_zone:",
    ".cfi_startproc",
    ".irp i, 1, 3, 5, 7, 9, 11, 13, 15",
    "lea rax, [rsp - 8 * \\i]",
    "mov [rsp - 8 * \\i], rax",
    "mov qword ptr [rsp - 8 * \\i - 8], 1000 + \\i",
    ".endr",
    "neg rsi",
    "mov byte ptr [rsp + rsi], 0",
    ".irp i, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16",
    "mov rax, [rsp - 8 * \\i]",
    "mov [rdi + 8 * \\i - 8], rax",
    ".endr",
    "mov rax, rsp",
    "ret",
    ".cfi_endproc",
    // regrow_test_rbp_frames(depth) -> sum: recursion with rbp-based frames and rbp-based stores into them.
    ".globl regrow_test_rbp_frames",
    "regrow_test_rbp_frames:",
    ".cfi_startproc",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "sub rsp, 112",
    "mov [rbp - 112], rdi", // the lowest word first: the store that meets the guard is based on rbp
    "lea rax, [rbp - 112]",
    "mov [rbp - 8], rax",
    "xor eax, eax",
    "test rdi, rdi",
    "jz 2f",
    "dec rdi",
    "call regrow_test_rbp_frames",
    "2:",
    "mov rdx, [rbp - 8]", // the pointer to the lowest word
    "add rax, [rdx]",
    "leave",
    "ret",
    ".cfi_endproc",
    // regrow_test_pushes(n) -> sum: pushes n, n - 1, ..., 1, then takes them off again.
    ".globl regrow_test_pushes",
    "regrow_test_pushes:",
    ".cfi_startproc",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "mov rcx, rdi",
    "xor eax, eax",
    "2: push rcx",
    "dec rcx",
    "jnz 2b",
    "3: pop rdx",
    "add rax, rdx",
    "dec rdi",
    "jnz 3b",
    "pop rbp",
    "ret",
    ".cfi_endproc",
);

unsafe extern "C" {
    fn regrow_test_registers(values: *mut [u64; 13], distance: usize);
    fn regrow_test_red_zone(words: *mut [u64; 16], distance: usize) -> u64;
    fn regrow_test_rbp_frames(depth: u64) -> u64;
    fn regrow_test_pushes(n: u64) -> u64;
}

#[test]
fn all_general_registers_survive_and_pointers_among_them_follow() {
    both_ways(|builder| {
        for pointers in [0b0_1010_1010_1010_u64, 0b1_0101_0101_0101, u64::MAX, 0] {
            for distance in [4096, 5000, 9000, 20_000] {
                run(&builder, move || {
                    let target = black_box([7u64; 13]);
                    let expected = || {
                        std::array::from_fn::<u64, 13, _>(|n| match pointers >> n & 1 {
                            0 => 0x1111_1111_1111_1111 * (n as u64 + 1),
                            _ => &raw const target[n] as u64,
                        })
                    };
                    let mut values = expected();
                    // SAFETY: it keeps the calling convention, and has a stack that grows.
                    unsafe { regrow_test_registers(&mut values, distance) };
                    assert!(growths() > 0);
                    assert_eq!(values, expected());
                });
            }
        }
    });
}

#[test]
fn the_red_zone_moves_too() {
    both_ways(|builder| {
        for steps in 0..30 {
            run(&builder, move || {
                below(steps, &mut || {
                    let mut words = [0; 16];
                    // SAFETY: it keeps the calling convention, and has a stack that grows.
                    let rsp = unsafe { regrow_test_red_zone(&mut words, 8000) };
                    let expected: [u64; 16] = std::array::from_fn(|n| match n % 2 {
                        0 => rsp - 8 * (n as u64 + 1),
                        _ => 1000 + n as u64,
                    });
                    assert_eq!(words, expected);
                });
                assert!(growths() > 0);
            });
        }
    });
}

#[test]
fn frames_based_on_rbp_survive() {
    both_ways(|builder| {
        for depth in [10, 17, 30, 100, 300, 10_000] {
            // SAFETY: it keeps the calling convention, and has a stack that grows.
            let sum = run(&builder, move || unsafe { regrow_test_rbp_frames(depth) });
            assert_eq!(sum, depth * (depth + 1) / 2, "{builder:?}");
        }
    });
}

#[test]
fn a_push_may_be_what_overflows() {
    both_ways(|builder| {
        // SAFETY: it keeps the calling convention, and has a stack that grows.
        let sum = run(&builder, || unsafe { regrow_test_pushes(100_000) });
        assert_eq!(sum, 100_000 * 100_001 / 2);
    });
}

/// Sixteen values alive across a call, too many for the callee-saved registers in any build.
#[inline(never)]
fn much_alive(words: &[u64; 16]) -> u64 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = black_box(*words);
    let before = a ^ b.rotate_left(1) ^ c.rotate_left(2) ^ d.rotate_left(3);
    grow();
    let first = words.iter().sum::<u64>();
    assert_eq!(before, a ^ b.rotate_left(1) ^ c.rotate_left(2) ^ d.rotate_left(3));
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
        .iter()
        .fold(first, |sum, &x| sum.wrapping_mul(33).wrapping_add(x))
}

#[test]
fn many_live_values_survive() {
    at_many_depths(|| much_alive(&black_box(std::array::from_fn(|n| (n as u64 + 1) * 0x0123_4567_89ab))));
}

// --- vector registers ------------------------------------------------------------------------------------------

/// Makes a function that loads registers from consecutive lines of memory, overflows the stack by a store
/// based on rsp, and stores them again.
macro_rules! through_registers {
    ($name:ident, $feature:literal, $load:literal, $store:literal, $end:literal, $list:literal, $($clobber:tt),*) => {
        #[target_feature(enable = $feature)]
        fn $name(lines: *mut u64, distance: usize) {
            // SAFETY: reads and writes the lines only, and a frame below rsp, as a call would.
            unsafe {
                asm!(
                    concat!(".irp i, ", $list),
                    $load,
                    ".endr",
                    "sub rsp, {distance}",
                    "mov byte ptr [rsp], 0",
                    "add rsp, {distance}",
                    concat!(".irp i, ", $list),
                    $store,
                    ".endr",
                    $end,
                    at = inout(reg) lines => _,
                    distance = inout(reg) distance => _,
                    $(out($clobber) _,)*
                );
            }
        }
    };
}

through_registers! {
    through_xmm, "sse2", "movdqu xmm\\i, [{at} + 16 * \\i]", "movdqu [{at} + 16 * \\i], xmm\\i", "",
    "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
    "xmm12", "xmm13", "xmm14", "xmm15"
}

through_registers! {
    through_mmx, "sse2", "movq mm\\i, [{at} + 8 * \\i]", "movq [{at} + 8 * \\i], mm\\i", "emms",
    "0, 1, 2, 3, 4, 5, 6, 7",
    "mm0", "mm1", "mm2", "mm3", "mm4", "mm5", "mm6", "mm7", "st(0)", "st(1)", "st(2)", "st(3)", "st(4)",
    "st(5)", "st(6)", "st(7)"
}

through_registers! {
    through_ymm, "avx", "vmovdqu ymm\\i, [{at} + 32 * \\i]", "vmovdqu [{at} + 32 * \\i], ymm\\i", "vzeroupper",
    "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11",
    "ymm12", "ymm13", "ymm14", "ymm15"
}

through_registers! {
    through_zmm, "avx512f", "vmovdqu64 zmm\\i, [{at} + 64 * \\i]", "vmovdqu64 [{at} + 64 * \\i], zmm\\i", "vzeroupper",
    "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, \
     20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
    "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11",
    "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22",
    "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28", "zmm29", "zmm30", "zmm31"
}

through_registers! {
    through_masks, "avx512bw", "kmovq k\\i, [{at} + 8 * \\i]", "kmovq [{at} + 8 * \\i], k\\i", "",
    "1, 2, 3, 4, 5, 6, 7",
    "k1", "k2", "k3", "k4", "k5", "k6", "k7"
}

/// Takes `N` words, among them pointers to the stack, through the registers of `through`, both ways.
fn registers_survive<const N: usize>(through: unsafe fn(*mut u64, usize)) {
    both_ways(|builder| {
        for odd in 0..2 {
            run(&builder.clone().first_size(4096), move || {
                let target = black_box([1u8; 32]);
                let expected = || {
                    std::array::from_fn::<u64, N, _>(|n| match n % 2 == odd {
                        true => &raw const target[n % 32] as u64,
                        false => 0x0101_0101_0101_0101_u64.wrapping_mul(n as u64 + 1),
                    })
                };
                let mut lines = expected();
                let before = growths();
                // SAFETY: the caller has seen to it that the processor has these registers.
                unsafe { through(lines.as_mut_ptr(), current_stats().unwrap().size + 8192) };
                assert!(growths() > before);
                assert_eq!(lines, expected());
            });
        }
    });
}

#[test]
fn xmm_and_mmx_registers_survive_and_pointers_among_them_follow() {
    registers_survive::<32>(through_xmm);
    registers_survive::<8>(through_mmx);
}

#[test]
fn ymm_registers_survive_and_pointers_among_them_follow() {
    if !is_x86_feature_detected!("avx") {
        return eprintln!("skipped: this processor has no AVX");
    }
    registers_survive::<64>(through_ymm);
}

#[test]
fn zmm_and_mask_registers_survive_and_pointers_among_them_follow() {
    if !is_x86_feature_detected!("avx512f") || !is_x86_feature_detected!("avx512bw") {
        return eprintln!("skipped: this processor has no AVX-512");
    }
    registers_survive::<256>(through_zmm);
    registers_survive::<8>(through_masks);
}

/// Compiled code that keeps eight accumulators in vector registers around calls that grow the stack.
#[target_feature(enable = "avx2,fma")]
fn dot_products(left: &[f64; 64], right: &[f64; 64]) -> f64 {
    let mut sums = [0.0; 8];
    for (lefts, rights) in left.chunks_exact(8).zip(right.chunks_exact(8)) {
        for lane in 0..8 {
            sums[lane] = f64::mul_add(lefts[lane], rights[lane], sums[lane]);
        }
        if lefts[0] == 24.0 {
            grow();
        }
    }
    sums.iter().sum()
}

#[test]
fn vectorised_code_computes_the_same() {
    if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
        return eprintln!("skipped: this processor has no AVX2");
    }
    at_many_depths(|| {
        let left = black_box(std::array::from_fn(|n| n as f64));
        let right = black_box(std::array::from_fn(|n| 1.0 / (n as f64 + 1.0)));
        // SAFETY: the processor has what it needs, as seen above.
        unsafe { dot_products(&left, &right) }.to_bits()
    });
}

// --- in the middle of something ----------------------------------------------------------------------------------

/// Grows the stack when it is dropped, and counts that in a frame further up.
struct GrowsWhenDropped<'a>(&'a Cell<u32>, [u64; 8]);

impl<'a> GrowsWhenDropped<'a> {
    fn new(count: &'a Cell<u32>) -> Self {
        Self(count, black_box([9; 8]))
    }
}

impl Drop for GrowsWhenDropped<'_> {
    fn drop(&mut self) {
        let mut top = 0;
        black_box(deep(60, 60 - u64::from(self.0.get()), &mut top));
        assert_eq!(self.1, [9; 8]);
        self.0.set(self.0.get() + 1);
    }
}

/// Silences the messages of panics that are meant to happen, in all threads of this test binary.
fn quiet() {
    std::panic::set_hook(Box::new(|info| {
        if !info.payload_as_str().is_some_and(|text| text.starts_with("meant")) {
            eprintln!("{info}");
        }
    }));
}

#[inline(never)]
fn panics_with_much_to_drop(count: &Cell<u32>) -> u64 {
    let _first = GrowsWhenDropped::new(count);
    let _second = GrowsWhenDropped::new(count);
    below(3, &mut || {
        let _third = GrowsWhenDropped::new(count);
        panic!("meant {}", count.get());
    });
    0
}

#[test]
fn a_stack_can_grow_in_the_drop_glue_of_a_panic() {
    quiet();
    at_many_depths(|| {
        let count = Cell::new(0);
        let payload = catch_unwind(AssertUnwindSafe(|| panics_with_much_to_drop(&count))).unwrap_err();
        (payload.downcast_ref::<String>().cloned(), count.get())
    });
}

#[test]
fn a_stack_can_grow_while_a_panic_leaves_the_coroutine() {
    quiet();
    both_ways(|builder| {
        for steps in 0..40 {
            let mut coroutine = builder.spawn(move |_: &Yielder<(), ()>, ()| {
                let count = Cell::new(0);
                below(steps, &mut || {
                    panics_with_much_to_drop(&count);
                });
            });
            let payload = catch_unwind(AssertUnwindSafe(|| coroutine.resume(()))).unwrap_err();
            assert_eq!(payload.downcast_ref::<String>().unwrap(), "meant 0");
            assert!(coroutine.done());
        }
    });
}

#[test]
fn a_stack_can_grow_while_a_dropped_coroutine_unwinds() {
    thread_local!(static DROPPED: Cell<u32> = const { Cell::new(0) });
    both_ways(|builder| {
        for steps in 0..40 {
            DROPPED.set(0);
            let mut coroutine = builder.spawn(move |yielder: &Yielder<(), ()>, ()| {
                let count = Cell::new(0);
                let _tells = OnDrop(|| DROPPED.set(count.get()));
                below(steps, &mut || {
                    let _first = GrowsWhenDropped::new(&count);
                    let _second = GrowsWhenDropped::new(&count);
                    yielder.suspend(());
                });
            });
            coroutine.resume(());
            drop(coroutine);
            assert_eq!(DROPPED.get(), 2);
        }
    });
}

#[test]
fn a_stack_can_grow_inside_catch_unwind() {
    quiet();
    at_many_depths(|| {
        let mut local = [1u64; 4];
        let outer = catch_unwind(AssertUnwindSafe(|| {
            let inner = catch_unwind(AssertUnwindSafe(|| {
                local[0] = deep(50, 25, &mut local[1]);
                panic!("meant");
            }));
            assert!(inner.is_err());
            grow();
            local[2] = deep(50, 5, &mut local[3]);
            local[0]
        }));
        (outer.unwrap(), local)
    });
}

/// Prints itself by way of many frames, in the middle of which the stack grows.
struct Nested<'a>(u32, Option<&'a Nested<'a>>);

impl fmt::Display for Nested<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        grow();
        match self.1 {
            Some(inner) => write!(f, "({:>5}|{:e}|{inner:>8.3})", self.0, f64::from(self.0) / 3.0),
            None => write!(f, "{:#010x}", self.0),
        }
    }
}

/// Text in a buffer on the stack.
struct Text {
    bytes: [u8; 256],
    used: usize,
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.bytes
            .get_mut(self.used..self.used + text.len())
            .ok_or(fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.used += text.len();
        Ok(())
    }
}

#[test]
fn a_stack_can_grow_inside_formatting() {
    at_many_depths(|| {
        let innermost = Nested(3, None);
        let middle = Nested(2, Some(&innermost));
        let outer = Nested(1, Some(&middle));
        let mut text = Text { bytes: [0; 256], used: 0 };
        write!(text, "{outer} {outer}").unwrap();
        (text.bytes, format!("{outer:?}", outer = outer.to_string()))
    });
}

#[test]
fn a_stack_can_grow_inside_the_comparator_of_a_sort() {
    at_many_depths(|| {
        let mut state = 99;
        let numbers: [u64; 100] = std::array::from_fn(|_| support::random(&mut state));
        let calls = Cell::new(0u64);
        let compare = |a: &&u64, b: &&u64| {
            calls.set(calls.get() + 1);
            if calls.get() % 64 == 1 {
                deep(calls.get() / 16, 0, &mut 0);
            }
            a.cmp(b)
        };
        let mut unstable: [&u64; 100] = std::array::from_fn(|n| &numbers[n]);
        unstable.sort_unstable_by(compare);
        let mut stable: [&u64; 100] = std::array::from_fn(|n| &numbers[n]);
        stable.sort_by(compare);
        grow();
        assert!(stable.is_sorted() && unstable.is_sorted());
        // The references still are to the numbers in the array.
        assert!(stable.iter().all(|x| numbers.as_ptr_range().contains(&std::ptr::from_ref::<u64>(x))));
        calls.get()
    });
}

// --- pointers ----------------------------------------------------------------------------------------------------

/// Pointers in a structure, and the structure itself returned by value, so that it lies in the caller's
/// frame, whose address is in a register or in the callee's.
struct Cursor<'a> {
    slice: &'a [u64],
    rest: std::slice::Iter<'a, u64>,
    end: *const u64,
    count: &'a Cell<u64>,
    filler: [u64; 12],
}

#[inline(never)]
fn cursor<'a>(slice: &'a [u64], count: &'a Cell<u64>, steps: u64) -> Cursor<'a> {
    let mut rest = slice.iter();
    rest.next();
    let cursor = Cursor { slice, rest, end: slice.as_ptr_range().end, count, filler: black_box([steps; 12]) };
    deep(steps, steps / 2, &mut 0);
    cursor
}

#[test]
fn pointers_in_a_structure_returned_by_value_follow() {
    both_ways(|builder| {
        for steps in 0..60 {
            run(&builder, move || {
                let numbers = black_box([1, 2, 3, 4, 5]);
                let count = Cell::new(0);
                let cursor = cursor(&numbers, &count, steps);
                cursor.count.set(7);
                assert_eq!(count.get(), 7);
                assert_eq!(cursor.slice.as_ptr(), numbers.as_ptr());
                assert_eq!(cursor.rest.as_slice(), [2, 3, 4, 5]);
                assert_eq!(cursor.end, numbers.as_ptr_range().end);
                assert_eq!(cursor.filler, [steps; 12]);
                assert!(growths() > 0);
            });
        }
    });
}

/// The highest frame of the stack: the coroutine's closure itself. Its array ends as near to the top as
/// anything can, and its iterators hold the address one past it.
#[test]
fn pointers_one_past_the_end_follow_at_the_very_top_of_the_stack() {
    both_ways(|builder| {
        let mut coroutine = builder.spawn(|_: &Yielder<(), ()>, ()| {
            let numbers = black_box([1u64, 2, 3, 4]);
            let mut forwards = numbers.iter();
            let used_up = numbers[4..].iter();
            let past = numbers.as_ptr_range().end;
            let mut sum = 0;
            for round in 0..4 {
                deep(20 << round, 1, &mut sum);
                sum += forwards.next().unwrap();
            }
            assert_eq!((forwards.len(), used_up.len()), (0, 0));
            assert_eq!((past, used_up.as_slice().as_ptr()), (numbers.as_ptr_range().end, past));
            assert!(growths() >= 2);
            numbers.iter().rev().copied().collect::<Vec<_>>()
        });
        assert_eq!(coroutine.resume(()).returned(), Some(vec![4, 3, 2, 1]));
    });
}

/// A list whose links are in as many frames, walked at the bottom after all of them have moved.
#[inline(never)]
fn chain(link: Option<&Link<'_>>, depth: u64) -> u64 {
    let here = Link { next: link, number: black_box(depth) };
    if depth > 0 {
        return chain(Some(&here), depth - 1) + black_box(here.number);
    }
    let mut sum = 0;
    let mut at = Some(&here);
    while let Some(link) = at {
        sum += link.number;
        at = link.next;
    }
    sum
}

struct Link<'a> {
    next: Option<&'a Link<'a>>,
    number: u64,
}

#[test]
fn pointers_from_frame_to_frame_follow() {
    both_ways(|builder| {
        for depth in [1, 20, 100, 3000] {
            assert_eq!(run(&builder, move || chain(None, depth)), depth * (depth + 1));
        }
    });
}

/// Words near, but not in, the stack's slot: nobody may rewrite them.
#[test]
fn integers_that_look_like_other_addresses_stay() {
    static STATIC: u64 = 1;
    let mut neighbours = Vec::new();
    let mut addresses =
        vec![&raw const STATIC as u64, addresses_on_this_thread as *const () as u64, 0, 1, u64::MAX];
    addresses.push(Box::into_raw(Box::new(1)) as u64);
    for _ in 0..20 {
        // The stacks before and after the one under test, of the same class, still alive.
        let mut neighbour = relocating().spawn(|yielder: &Yielder<(), u64>, ()| {
            let local = black_box(1);
            yielder.suspend(&raw const local as u64);
        });
        addresses.push(neighbour.resume(()).yielded().unwrap());
        neighbours.push(neighbour);
    }
    both_ways(|builder| {
        let addresses = addresses.clone();
        let mut coroutine = builder.spawn(move |yielder: &Yielder<(), ()>, ()| {
            let mut in_frame = [0; 32];
            in_frame[..addresses.len()].copy_from_slice(&addresses);
            // The end of our own slot is a page boundary, and the next slot's first byte.
            let end = (&raw const *yielder as u64).next_multiple_of(4096);
            let ours = black_box([end, end + 8, end + 4096]);
            let copy = Box::new(ours);
            for distance in [5000, 20_000, 60_000] {
                let mut values: [u64; 13] = std::array::from_fn(|n| in_frame[n]);
                // SAFETY: it keeps the calling convention, and has a stack that grows.
                unsafe { regrow_test_registers(&mut values, distance) };
                assert_eq!(values, addresses[..13]);
                assert_eq!(in_frame[..addresses.len()], addresses);
                assert_eq!(black_box(ours), *copy);
            }
            assert!(growths() >= 2);
        });
        coroutine.resume(());
    });
    fn addresses_on_this_thread() {}
}

/// A word need not be one value. Where a small one was stored over part of a dead pointer the word as a whole
/// still looks like a pointer into the stack.
#[test]
fn small_values_over_dead_pointers_stay() {
    both_ways(|builder| {
        run(&builder, || {
            let mut words = [0u64; 64];
            let at = &raw mut words[0];
            for (n, word) in words.iter_mut().enumerate() {
                *word = black_box(at) as u64;
                // SAFETY: the low bytes of a word, on a little-endian machine.
                unsafe { (&raw mut *word).cast::<u16>().write_volatile(0x0401 * n as u16) };
            }
            black_box(&mut words);
            let mut seen = 0;
            for size in [9000, 20_000, 60_000, 200_000] {
                // SAFETY: it keeps the calling convention, and has a stack that grows.
                unsafe { regrow_test_pushes(size / 8) };
                seen += 1;
                let low = words.map(|word| black_box(word) as u16);
                assert_eq!(low, std::array::from_fn(|n| 0x0401 * n as u16));
                assert!(growths() >= seen);
            }
        });
    });
}

#[test]
fn alignment_is_kept_by_moves() {
    #[repr(align(64))]
    struct Line([u8; 64]);
    #[repr(align(1024))]
    struct Block([u8; 1024]);

    both_ways(|builder| {
        for steps in 0..20 {
            run(&builder, move || {
                below(steps, &mut || {
                    let line = black_box(Line([1; 64]));
                    let block = black_box(Block([2; 1024]));
                    deep(100, 50, &mut 0);
                    assert_eq!((&raw const line as usize % 64, &raw const block as usize % 1024), (0, 0));
                    assert!(line.0.iter().all(|&x| x == 1) && block.0.iter().all(|&x| x == 2));
                });
                assert!(growths() > 0);
            });
        }
    });
}

/// Larger than a page, a frame is probed page by page; the register that holds where that ends may point
/// far outside the stack as it is.
#[test]
fn frames_much_larger_than_the_stack_survive() {
    #[inline(never)]
    fn large<const N: usize>(caller: &mut usize) -> usize {
        let bytes = black_box([7u8; N]);
        *caller += N;
        bytes.iter().map(|&byte| usize::from(byte)).sum()
    }

    fn of<const N: usize>() {
        both_ways(|builder| {
            for steps in 0..20 {
                run(&builder, move || {
                    let mut caller = steps;
                    below(steps, &mut || assert_eq!(large::<N>(&mut caller), 7 * N));
                    assert_eq!(caller, steps + N);
                    assert!(growths() > 0);
                    assert!(
                        current_stats().unwrap().size <= 8 * N.next_power_of_two(),
                        "no more than it needs"
                    );
                });
            }
        });
    }
    of::<9_000>();
    of::<20_000>();
    of::<100_000>();
    of::<1_000_000>();
}

#[test]
fn a_larger_first_size_needs_no_growth() {
    both_ways(|builder| {
        let stats = run(&builder.first_size(64 << 10), || {
            frame::<15_000>(1);
            current_stats().unwrap()
        });
        assert_eq!(stats.growths, 0);
    });
}
