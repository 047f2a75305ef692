//! Rewriting words: everything whose value lies in the window of the moving stack moves with it.
//!
//! For registers the window is the whole slot: `rsp` may be in the guard already, others may be on the way there. All but its
//! first address, which is the end of the slot below, and the start of its arena if it is the first: what takes slots runs on
//! moving stacks, too, with these in registers. For words
//! of frames it is what is in use, down to the red zone. Its end is that of the slot, so that a pointer past the
//! highest object is in it.
//!
//! A word need not be one value. What is left of a dead pointer after a byte, a `u16` or a `u32` was stored over a part of
//! it looks like a pointer still, if the value equals that part. Which slots are used, and that moves are by multiples of 64
//! KiB, sees to it that common values do not or are not changed by it (src/size.rs). For any other `u32` the odds
//! are one in some hundred thousand that it matches the slot's address. A stack map has no such doubts.

use core::ops::Range;

/// From how many words on it pays to ask what the processor can do.
const LONG: usize = 64;

/// The addresses that count as pointers into a moving stack, and how far they move.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    start: usize,
    length: usize,
    distance: usize,
}

impl Window {
    /// The window `from` of a stack, up to its slot's end, that moves to the slot ending at `to_end`.
    pub(crate) fn new(from: Range<usize>, to_end: usize) -> Self {
        Self {
            start: from.start,
            length: from.end.wrapping_sub(from.start),
            distance: to_end.wrapping_sub(from.end),
        }
    }

    /// Where a value that may be a pointer goes.
    pub(crate) fn moved(self, word: usize) -> usize {
        let inside = word.wrapping_sub(self.start) < self.length;
        word.wrapping_add(if inside { self.distance } else { 0 })
    }

    /// Where a value goes that is known to be on the scale of `rsp`, wherever it lies.
    pub(crate) fn shift(self, word: usize) -> usize {
        word.wrapping_add(self.distance)
    }

    /// Rewrites each word in place; returns how many changed.
    pub(crate) fn rewrite(self, words: &mut [usize]) -> usize {
        if words.len() >= LONG && is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has been asked. (With `cpuid`, the first time; nothing that a handler must not do.)
            return unsafe { self.rewrite_with_avx2(words) };
        }
        self.rewrite_each(words)
    }

    /// The same code, compiled for a comparison of four words at once, which the baseline has not for words of 64 bits.
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
