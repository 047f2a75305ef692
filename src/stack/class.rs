//! Sizes: which slots there are, and how many pages a stack of a given size takes.
//!
//! A *size* is a power of two of bytes a user may count on. The top page of a slot gives up to half
//! of itself to the record, the closure and the colour, so:
//!
//! ```text
//!   size 2 KiB    1 page    | 2 KiB stack | head |
//!   size 4 KiB    2 pages   | 4 KiB       | 2 KiB stack | head |
//!   size S        S + 4 KiB
//! ```

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// The smallest stack, in bytes: half a page; the record and the closure take the other half.
pub const MIN_SIZE: usize = 2048;

/// The largest stack, in bytes (4 GiB).
pub const MAX_SIZE: usize = 1 << 32;

/// At most this much at the top of a slot is not stack: record, closure, colour, base.
pub(crate) const HEAD: usize = 2048;

/// Never opened, at the bottom of each slot. Wider than a page, since C compiled without probes
/// can step over a page without touching it.
pub(crate) const GUARD: usize = 4 * PAGE;

/// The least slack of a slot whose stack moves: with guard and stack the smallest slot takes 64 KiB.
const MIN_SLACK: usize = 11 * PAGE;

/// Slots of moving stacks end at multiples of this, so that a move changes no address in its low 16 bits.
///
/// A word of a frame need not be one value: a `u16` that was stored over half a dead pointer leaves a word that
/// looks like a pointer into the stack, and is rewritten as one. The `u16` in it must not change by that.
pub(crate) const ALIGN: usize = 1 << 16;

/// True if a slot of a moving stack ending at `end` has addresses whose lower 32 bits are a small integer, positive or
/// negative: none is used there (src/grow/rewrite.rs says why).
pub(crate) const fn looks_like_integers(class: Class, end: usize) -> bool {
    const NEAR: usize = 1 << 16;
    if !class.is_moving() || class.stride() > 1 << 24 {
        return false; // a slot of many megabytes has no choice
    }
    let (start, last) = (end - class.stride(), end - 1);
    start >> 32 != (last + NEAR) >> 32 || start.wrapping_sub(NEAR) >> 32 != last >> 32
}

/// How many classes there are: those of moving stacks, then those of stacks that stay.
pub(crate) const CLASSES: usize = 2 * SIZES;
const SIZES: usize = 22;

/// A kind of slot: a log2 of its size, and whether the stacks in it move or stay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Class(u8);

impl Class {
    /// Slots for moving stacks of `size` bytes: opened whole, with slack below for growth that may not move.
    pub(crate) const fn moving(size: usize) -> Self {
        Self((size / MIN_SIZE).trailing_zeros() as u8)
    }

    /// Slots for stacks that stay and grow to at most `maximum` bytes.
    pub(crate) const fn staying(maximum: usize) -> Self {
        Self((maximum / MIN_SIZE).trailing_zeros() as u8 + SIZES as u8)
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }

    pub(crate) const fn from_index(index: usize) -> Self {
        Self(index as u8)
    }

    pub(crate) const fn is_moving(self) -> bool {
        self.index() < SIZES
    }

    /// The size for moving stacks, the maximum for staying ones, in bytes.
    pub(crate) const fn size(self) -> usize {
        MIN_SIZE << (self.index() % SIZES)
    }

    /// The most a stack in this slot can open, in bytes below the slot's end.
    pub(crate) const fn window(self) -> usize {
        let open = open_bytes(self.size());
        if !self.is_moving() {
            open
        } else if self.size() < MIN_SLACK {
            open + MIN_SLACK
        } else {
            open + self.size()
        }
    }

    /// Bytes from one slot to the next, a multiple of [`ALIGN`] where stacks move.
    pub(crate) const fn stride(self) -> usize {
        let bytes = GUARD + self.window();
        if self.is_moving() { bytes.next_multiple_of(ALIGN) } else { bytes }
    }
}

/// Bytes of a slot that must be accessible for a stack of `size` bytes.
pub(crate) const fn open_bytes(size: usize) -> usize {
    if size <= MIN_SIZE { PAGE } else { size + PAGE }
}

/// The size of a stack of which `open` bytes are accessible: the inverse of [`open_bytes`].
pub(crate) const fn size_of_open(open: usize) -> usize {
    if open <= PAGE { MIN_SIZE } else { open - PAGE }
}

/// The size to grow to: doubled from `size` until it holds `need` bytes below the slot's end,
/// `maximum` at most. `None` if `need` does not fit in the maximum or nothing would be gained.
pub(crate) fn grown(size: usize, need: usize, maximum: usize) -> Option<usize> {
    let mut next = size.checked_next_power_of_two()?.max(MIN_SIZE);
    while next <= size || open_bytes(next) < need {
        next = next.checked_mul(2)?;
    }
    (next <= maximum).then_some(next)
}

/// As [`grown`], for a stack that stays, of which `used` bytes below the slot's end are in use. They may be more than are
/// open, and guards go below what is opened: not over them. At the maximum the guards are there already.
pub(crate) fn grown_in_place(size: usize, need: usize, used: usize, maximum: usize) -> Option<usize> {
    grown(size, need.max(used.min(open_bytes(maximum))), maximum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_bytes_and_size_of_open_are_inverse() {
        for log in 11..32 {
            assert_eq!(size_of_open(open_bytes(1 << log)), 1 << log);
        }
    }

    #[test]
    fn classes_keep_their_size_and_do_not_collide() {
        let mut seen = std::collections::HashSet::new();
        for log in 11..=32 {
            for class in [Class::moving(1 << log), Class::staying(1 << log)] {
                assert_eq!(class.size(), 1 << log);
                assert!(class.index() < CLASSES && seen.insert(class.index()));
                assert_eq!(Class::from_index(class.index()), class);
                assert_eq!(class.stride() % PAGE, 0);
            }
        }
    }

    #[test]
    fn moves_change_no_low_bits() {
        for log in 11..=32 {
            assert_eq!(Class::moving(1 << log).stride() % ALIGN, 0);
        }
    }

    #[test]
    fn slots_at_multiples_of_four_gib_are_left_out() {
        let class = Class::moving(MIN_SIZE);
        let four_gib = 0x7f12_0000_0000;
        for (end, expected) in [
            (four_gib - 0x2_0000, false),
            (four_gib - 0x1_0000, false),
            (four_gib, true),
            (four_gib + 0x1_0000, true),
            (four_gib + 0x2_0000, false),
        ] {
            assert_eq!(looks_like_integers(class, end), expected, "{end:#x}");
        }
        assert!(!looks_like_integers(Class::staying(MIN_SIZE), four_gib));
    }

    #[test]
    fn growth_doubles_until_the_need_fits() {
        assert_eq!(grown(2048, 4097, 1 << 20), Some(4096));
        assert_eq!(grown(2048, 40_000, 1 << 20), Some(65_536));
        assert_eq!(grown(4096, 4096 + 4096 + 1, 8192), Some(8192));
        assert_eq!(grown(8192, 1, 8192), None);
        assert_eq!(grown(2048, usize::MAX, 1 << 32), None);
        assert_eq!(grown_in_place(2048, 4097, 40_000, 1 << 20), Some(65_536));
        assert_eq!(grown_in_place(2048, 4097, 80_000, 65_536), Some(65_536));
        assert_eq!(grown_in_place(2048, 80_000, 40_000, 65_536), None);
    }

    #[test]
    fn the_smallest_slot_takes_sixteen_pages() {
        assert_eq!(Class::moving(MIN_SIZE).stride(), 16 * PAGE);
    }
}
