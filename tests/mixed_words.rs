//! Words of several values: what is stored over a part of a dead pointer keeps its value when the stack moves.

use std::hint::black_box;

use regrow::{Coroutine, Yielder, current_stats};

mod support;
use support::{frame, relocating};

/// A dead pointer of which some bytes were overwritten.
#[repr(align(8))]
#[derive(Clone, Copy)]
struct Mixed {
    bytes: [u8; 8],
    /// What was stored, and where.
    value: [u8; 4],
    offset: u8,
    size: u8,
}

impl Mixed {
    fn new(dead: usize, offset: usize, value: &[u8]) -> Self {
        let mut mixed =
            Self { bytes: dead.to_le_bytes(), value: [0; 4], offset: offset as u8, size: value.len() as u8 };
        mixed.bytes[offset..offset + value.len()].copy_from_slice(value);
        mixed.value[..value.len()].copy_from_slice(value);
        mixed
    }

    fn is_kept(&self) -> bool {
        let (offset, size) = (usize::from(self.offset), usize::from(self.size));
        self.bytes[offset..offset + size] == self.value[..size]
    }
}

/// Flags, characters and small integers of each size, at each place, over pointers to `dead`.
fn mixtures(dead: usize) -> Vec<Mixed> {
    let small = || (-300..300i32).chain([-65_536, -65_535, 65_535, 65_536, 1_000_000]);
    let mut all = Vec::new();
    for offset in 0..8 {
        all.extend((0..128).chain([255]).map(|value| Mixed::new(dead, offset, &[value])));
    }
    for offset in [0, 2, 4, 6] {
        all.extend(small().map(|value| Mixed::new(dead, offset, &(value as i16).to_le_bytes())));
    }
    for offset in [0, 4] {
        all.extend(small().map(|value| Mixed::new(dead, offset, &value.to_le_bytes())));
    }
    all
}

/// Has `N` such words in its frame while the stack grows from 64 KiB to 512 KiB; returns how often it moved.
#[inline(never)]
fn grows_below<const N: usize>(part: usize) -> u64 {
    let here = 0u8;
    let mut words = [Mixed::new(0, 0, &[]); N];
    let all = mixtures(&raw const here as usize);
    for (word, mixed) in words.iter_mut().zip(all.iter().cycle().skip(part * N)) {
        *word = *mixed;
    }
    drop(all);
    let words = black_box(&mut words);
    let before = current_stats().unwrap().bytes_copied;
    black_box(frame::<60_000>(1) + frame::<120_000>(2) + frame::<250_000>(3));
    for word in words.iter() {
        let (value, offset) = (&word.value[..word.size.into()], word.offset);
        assert!(word.is_kept(), "{value:x?} at {offset} of {:x?}, seen from {:p}", word.bytes, &here);
    }
    current_stats().unwrap().bytes_copied - before
}

#[test]
fn small_values_over_dead_pointers_are_kept() {
    const PART: usize = 600;
    let parts = mixtures(0).len().div_ceil(PART);
    let mut alive = Vec::new(); // so that each has other slots
    for part in 0..30 * parts {
        let mut coroutine: Coroutine<(), u64, ()> =
            relocating().first_size(64 << 10).spawn(move |yielder: &Yielder<(), u64>, ()| {
                yielder.suspend(grows_below::<PART>(part));
            });
        assert!(coroutine.resume(()).yielded().unwrap() > 100_000, "it moved");
        coroutine.shrink().unwrap();
        alive.push(coroutine);
    }
}
