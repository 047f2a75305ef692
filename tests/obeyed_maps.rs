//! The relocator does what maps say: hand-written frames in which a word's map and its value disagree.

use std::arch::global_asm;
use std::hint::black_box;

use regrow::{Builder, Maps, Reason, Yielder, current_stats, totals};

mod support;
use support::{this_test, variant};

global_asm!(
    include_str!("../asm/frame_map.inc"),
    // obeyed_mapped(pointer, call, out: *mut [usize; 4]): keeps `pointer` in three words of its frame and in rbx while it
    // calls `call`, then copies what they are to `out`. By its map the first word is a pointer, the second data, rbx data.
    // obeyed_unmapped: the same without a map.
    ".macro obeyed_function name, mapped",
    ".globl \\name",
    "\\name:",
    ".cfi_startproc",
    "push rbx",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbx, -16",
    "push rbp",
    ".cfi_def_cfa_offset 24",
    ".cfi_offset rbp, -24",
    "sub rsp, 40",
    ".cfi_def_cfa_offset 64",
    "mov [rsp], rdi",
    "mov [rsp + 8], rdi",
    "mov [rsp + 16], rdi",
    "mov rbx, rdi",
    "mov rbp, rdx",
    "call rsi",
    "1: mov rax, [rsp]",
    "mov [rbp], rax",
    "mov rax, [rsp + 8]",
    "mov [rbp + 8], rax",
    "mov rax, [rsp + 16]",
    "mov [rbp + 16], rax",
    "mov [rbp + 24], rbx",
    "add rsp, 40",
    ".cfi_def_cfa_offset 24",
    "pop rbp",
    ".cfi_def_cfa_offset 16",
    "pop rbx",
    ".cfi_def_cfa_offset 8",
    "ret",
    ".cfi_endproc",
    ".if \\mapped",
    "frame_map_return 1b",
    "frame_map_words rsp, 0, pointer",
    "frame_map_words rsp, 8, data",
    "frame_map_register rbx, data",
    "frame_map_end",
    ".endif",
    ".endm",
    "obeyed_function obeyed_mapped, 1",
    "obeyed_function obeyed_unmapped, 0",
    // obeyed_recurse(yielder, depth) -> sum of 1..=depth: each frame keeps a pointer to its own word, which holds the depth,
    // in a word of its own. Every word is mapped, at every instruction that can meet the guard.
    ".globl obeyed_recurse",
    "obeyed_recurse:",
    ".cfi_startproc",
    "sub rsp, 40",
    ".cfi_def_cfa_offset 48",
    "2: mov qword ptr [rsp], rsi", // the first touch of the frame
    "3: lea rax, [rsp]",
    "mov [rsp + 8], rax",
    "xor eax, eax",
    "test rsi, rsi",
    "jz 4f",
    "dec rsi",
    "call obeyed_recurse",
    "4: mov rdx, [rsp + 8]",
    "add rax, [rdx]", // through the pointer
    "add rsp, 40",
    ".cfi_def_cfa_offset 8",
    "ret",
    ".cfi_endproc",
    "frame_map_range 2b, 3b", // nothing of its own is in the frame yet
    "frame_map_rest data",
    "frame_map_end",
    "frame_map_range 3b, 4b",
    "frame_map_words rsp, 8, pointer",
    "frame_map_rest data",
    "frame_map_end",
    "frame_map_range obeyed_recurse, 2b",
    "frame_map_rest data",
    "frame_map_end",
);

unsafe extern "C" {
    fn obeyed_mapped(pointer: *const u64, call: extern "C" fn(), out: *mut [usize; 4]);
    fn obeyed_unmapped(pointer: *const u64, call: extern "C" fn(), out: *mut [usize; 4]);
    fn obeyed_recurse(yielder: &Yielder<usize, usize>, depth: usize) -> usize;
}

type Keeper = unsafe extern "C" fn(*const u64, extern "C" fn(), *mut [usize; 4]);

extern "C" fn grow() {
    black_box([0u8; 8192]);
}

/// Which of the four copies of a pointer to a local have followed it when the stack moved.
fn followed(keeper: Keeper, maps: Maps) -> [bool; 4] {
    // SAFETY: the keepers keep pointers in their frames and registers only.
    let builder = unsafe { Builder::new().learn(false).relocating() }.maps(maps);
    let mut coroutine = builder.spawn(move |_: &Yielder<(), ()>, ()| {
        let mut out = Box::new([0; 4]); // before anything is looked at: the allocator needs stack, too
        let local = black_box(7u64);
        let before = black_box(!(&raw const local as usize)); // no address: a move leaves it alone
        // SAFETY: the keeper reads no memory but its own.
        unsafe { keeper(&local, grow, &raw mut *out) };
        let before = !black_box(before);
        let after = &raw const local as usize;
        assert_ne!(before, after, "it was meant to move");
        out.map(|copy| copy == after)
    });
    coroutine.resume(()).returned().unwrap()
}

#[test]
fn pointers_move_data_stays_and_only_that_differs_without_a_map() {
    let mapped = followed(obeyed_mapped, Maps::Ambiguous);
    let unmapped = followed(obeyed_unmapped, Maps::Ambiguous);
    assert_eq!(mapped, [true, false, true, false], "pointer, data, ambiguous, rbx: data");
    assert_eq!(unmapped, [true; 4]);
    let off = followed(obeyed_mapped, Maps::Off);
    assert_eq!(off, [true; 4], "no map is looked at");
}

#[test]
fn precise_does_not_move_frames_that_are_not() {
    // SAFETY: nothing is kept outside the stack.
    let builder = unsafe { Builder::new().learn(false).relocating() }.maps(Maps::Precise);
    let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
        grow();
        yielder.suspend(());
        current_stats().unwrap()
    });
    coroutine.resume(());
    let reason = coroutine.last_not_moved().expect("it grew in place");
    assert_eq!(reason.reason, Reason::Imprecise);
    let stats = coroutine.resume(()).returned().unwrap();
    assert!(stats.growths > 0 && stats.bytes_copied == 0);
}

/// Its own process, so that no other test's words are counted.
#[test]
fn code_that_maps_all_its_frames_moves_without_a_guess() {
    if variant().is_none() {
        return this_test!().passes();
    }
    // SAFETY: the function keeps pointers to its frames in its frames, and does not unwind.
    let mut coroutine = unsafe {
        Builder::new().relocating().maps(Maps::Precise).maximum(64 << 20).spawn_raw(obeyed_recurse).unwrap()
    };
    let depth = 100_000;
    assert_eq!(coroutine.resume(depth).returned(), Some(depth * (depth + 1) / 2));
    let totals = totals();
    assert!(totals.moves >= 10, "{totals:?}");
    assert_eq!(totals.in_place, 0);
    assert_eq!(totals.words_by_map.ambiguous, 0);
    assert!(totals.words_by_map.pointers > 100_000);
    assert_eq!(totals.words_by_map.elsewhere, 0);
}
