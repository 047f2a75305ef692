//! Rewriting words: every value in the window of the moving stack moves with it.
//!
//! For registers the window is the whole slot, since `rsp` and others may be in the guard already. It excludes
//! the slot's first address. That is also the end of the slot below, or the start of the arena: the code that
//! takes slots runs on moving stacks, too, with these addresses in registers. For words of frames the window is
//! the used part, down to the red zone. It includes the slot's end: a pointer past the highest object.
//!
//! A word may hold several values. If a byte, a `u16` or a `u32` is stored over a part of a dead pointer, the
//! word still looks like a pointer if the value equals that part. The choice of slots, and moves by multiples
//! of 64 KiB, make sure that common values do not match or are not changed (src/size.rs). The odds that any
//! other `u32` matches the slot's address are one in some hundred thousand. A stack map avoids this risk.

use core::ops::Range;

/// From this many words on, checking the processor's features pays off.
const LONG: usize = 64;

/// The addresses that count as pointers into a moving stack, and how far they move.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    start: usize,
    length: usize,
    distance: usize,
}

impl Window {
    /// The window `from` of a stack, up to its slot's end, which moves to the slot that ends at `to_end`.
    pub(crate) fn new(from: Range<usize>, to_end: usize) -> Self {
        Self {
            start: from.start,
            length: from.end.wrapping_sub(from.start),
            distance: to_end.wrapping_sub(from.end),
        }
    }

    /// The new value of a word that may be a pointer.
    pub(crate) fn moved(self, word: usize) -> usize {
        let inside = word.wrapping_sub(self.start) < self.length;
        word.wrapping_add(if inside { self.distance } else { 0 })
    }

    /// The new value of a word that certainly moves with `rsp`, wherever it points.
    pub(crate) fn shift(self, word: usize) -> usize {
        word.wrapping_add(self.distance)
    }

    /// Rewrites each word in place; returns how many changed.
    pub(crate) fn rewrite(self, words: &mut [usize]) -> usize {
        if words.len() >= LONG && is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has this feature, as just checked. (The first check uses `cpuid`, which a handler may.)
            return unsafe { self.rewrite_with_avx2(words) };
        }
        self.rewrite_each(words)
    }

    /// The same code, compiled for AVX2, which compares four words at once. The baseline cannot compare 64-bit words so.
    #[target_feature(enable = "avx2")]
    fn rewrite_with_avx2(self, words: &mut [usize]) -> usize {
        self.rewrite_each(words)
    }

    #[inline(always)]
    fn rewrite_each(self, words: &mut [usize]) -> usize {
        let mut changed = 0;
        for word in words {
            let inside = word.wrapping_sub(self.start) < self.length;
            changed += usize::from(inside);
            *word = word.wrapping_add(if inside { self.distance } else { 0 });
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_is_the_slot_and_nothing_else() {
        let window = Window::new(0x1000..0x3000, 0x9000);
        let mut words = [0xfff, 0x1000, 0x2ff8, 0x2fff, 0x3000, usize::MAX, 0];
        assert_eq!(window.rewrite(&mut words), 3);
        assert_eq!(words, [0xfff, 0x7000, 0x8ff8, 0x8fff, 0x3000, usize::MAX, 0]);
        assert_eq!(window.moved(0x1000), 0x7000);
        assert_eq!(window.moved(0x3000), 0x3000);
    }

    #[test]
    fn moving_down_works_like_moving_up() {
        let window = Window::new(0x9000..0xb000, 0x3000);
        assert_eq!(window.moved(0xaff0), 0x2ff0);
    }
}
