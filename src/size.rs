//! Sizes: the kinds of slots, and the number of pages for a stack of a given size.
//!
//! A *size* is a power of two of bytes that a user may count on. Up to half of a slot's top page holds the record, the
//! closure and the colour:
//!
//! ```text
//!   size 2 KiB    1 page    | 2 KiB stack | head |
//!   size 4 KiB    2 pages   | 4 KiB       | 2 KiB stack | head |
//!   size S        S + 4 KiB
//! ```
#![forbid(unsafe_code)]

pub(crate) const PAGE: usize = 4096;

/// The smallest stack, in bytes: half a page. The record and the closure take the other half.
///
/// ```
/// // SAFETY: nothing is kept outside the stack.
/// let builder = unsafe { regrow::Builder::new().relocating() };
/// let coroutine = builder.spawn(|_: &regrow::Yielder<(), ()>, ()| ());
/// assert_eq!(coroutine.stats().size, regrow::MIN_SIZE);
/// ```
pub const MIN_SIZE: usize = 2048;

/// The largest stack, in bytes (4 GiB).
///
/// ```
/// use regrow::{Builder, Error, MAX_SIZE, Yielder};
/// let builder = Builder::new().maximum(2 * MAX_SIZE);
/// let error = builder.try_spawn(|_: &Yielder<(), ()>, ()| ()).unwrap_err();
/// assert!(matches!(error, Error::Size { what: "maximum", .. }), "{error}");
/// ```
pub const MAX_SIZE: usize = 1 << 32;

/// The most bytes at the top of a slot that are not stack: record, closure, colour, base.
pub(crate) const HEAD: usize = 2048;

/// The bottom of each slot, never opened. It is wider than a page, since C code compiled without probes can step over a
/// page without touching it.
pub(crate) const GUARD: usize = 4 * PAGE;

/// The least slack of a slot whose stack moves. With guard and stack, the smallest slot takes 64 KiB.
const MIN_SLACK: usize = 11 * PAGE;

/// Slots of moving stacks end at multiples of this, so a move never changes the low 16 bits of an address.
///
/// A frame's word may hold several values. A `u16` stored over half of a dead pointer can leave a word that looks like a
/// pointer into the stack and is rewritten as one. The `u16` then stays as it was.
pub(crate) const ALIGN: usize = 1 << 16;

/// The first address, from `from` on, where a slot of `class` may start: one whose bytes are no common data.
///
/// A byte or small integer may also be stored over another part of a dead pointer. A move changes it only if the mixture
/// is still an address in the slot, so only if it equals that part of the address. Therefore slots lie where these bytes
/// are no small integers (of either sign), flags or ASCII characters:
///
/// ```text
///   byte of an address     7    6    5       4         3         2       1    0
///                        │ the same all  │ 80–fe   │ 80–fe   │ 80–fe   │ not changed │
///                        │ over a TiB    │ of each │         │         │ by moves    │
/// ```
///
/// A slot larger than an eighth of such a byte's period has no choice.
pub(crate) const fn next_place(class: Class, from: usize) -> usize {
    let start = next_by_byte(class, next_by_byte(class, next_by_byte(class, from, 4), 3), 2);
    if start == from { from } else { next_place(class, start) }
}

/// The same for one byte.
const fn next_by_byte(class: Class, from: usize, byte: u32) -> usize {
    let period = 256 << (8 * byte);
    let below = from % period;
    if !class.is_moving() || class.stride() > period / 8 {
        from
    } else if below < period / 2 {
        from - below + period / 2
    } else if below + class.stride() > period - period / 256 {
        from - below + period + period / 2
    } else {
        from
    }
}

/// The upper end of the TiB for arenas, if `free` is an address with room. This is the TiB below that of `free`, or its own
/// if three quarters of it lie below `free`. All addresses in a TiB have the same sixth byte.
pub(crate) const fn arenas_below(free: usize) -> usize {
    const TIB: usize = 1 << 40;
    let start = free / TIB * TIB;
    if start == 0 || free - start >= TIB / 4 * 3 { start + TIB } else { start }
}

/// The addresses, from `below` down, where an arena of this class may start: its first slots are not left out there.
pub(crate) fn arena_places(class: Class, below: usize, step: usize) -> impl Iterator<Item = usize> {
    const LOWEST: usize = 0x8080_0000;
    const FOUR_GIB: usize = 1 << 32;
    let highest = below.checked_sub(LOWEST).map_or(0, |below| below / FOUR_GIB);
    (0..=highest)
        .rev()
        .step_by(step.div_ceil(FOUR_GIB))
        .map(|number| number * FOUR_GIB + LOWEST)
        .filter(move |&start| next_place(class, start) == start)
}

/// The number of classes: first those of moving stacks, then those of stacks that stay.
pub(crate) const CLASSES: usize = 2 * SIZES;
const SIZES: usize = 22;

/// A kind of slot: log2 of its size, and whether its stacks move or stay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Class(u8);

impl Class {
    /// Slots for moving stacks of `size` bytes: opened whole, with slack below for growth that may not move.
    pub(crate) const fn moving(size: usize) -> Self {
        Self((size / MIN_SIZE).trailing_zeros() as u8)
    }

    /// Slots for stacks that stay, with all `maximum` bytes accessible.
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

    /// Accessible bytes below the slot's end for a stack of the slot's size with no slack opened.
    pub(crate) const fn first_open(self) -> usize {
        open_bytes(self.size())
    }

    /// The most bytes below the slot's end that a stack in this slot can open.
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

    /// Bytes from one slot to the next. A multiple of [`ALIGN`] if stacks move.
    pub(crate) const fn stride(self) -> usize {
        let bytes = GUARD + self.window();
        if self.is_moving() { bytes.next_multiple_of(ALIGN) } else { bytes }
    }
}

/// Bytes of a slot that must be accessible for a stack of `size` bytes.
pub(crate) const fn open_bytes(size: usize) -> usize {
    if size <= MIN_SIZE { PAGE } else { size + PAGE }
}

/// The size of a stack with `open` accessible bytes: the inverse of [`open_bytes`].
pub(crate) const fn size_of_open(open: usize) -> usize {
    if open <= PAGE { MIN_SIZE } else { open - PAGE }
}

/// The size to grow to: `size`, doubled once or more until `need` bytes fit below the slot's end. `None` if that exceeds
/// `maximum`.
pub(crate) fn grown(size: usize, need: usize, maximum: usize) -> Option<usize> {
    let mut next = size.checked_next_power_of_two()?.max(MIN_SIZE);
    while next <= size || open_bytes(next) < need {
        next = next.checked_mul(2)?;
    }
    (next <= maximum).then_some(next)
}

/// Up to this size, a stack that opens slack opens four times as much. Untouched pages cost nothing, and each opening
/// costs a fault.
const QUICK: usize = 64 << 10;

/// Like [`grown`], for a stack that opens the slack of its slot.
pub(crate) fn grown_in_slack(size: usize, need: usize, maximum: usize) -> Option<usize> {
    Some(grown(size, need, maximum)?.max((4 * size).min(QUICK)).min(maximum))
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
    fn slots_lie_where_no_byte_looks_like_common_data() {
        let mut start = 0x7ffe_fe00_0000;
        for log in (11..=18).cycle().take(100_000) {
            let class = Class::moving(1 << log);
            start = next_place(class, start);
            assert_eq!(next_place(class, start), start);
            let last = start + class.stride() - 1;
            for address in [start, start + class.stride() / 2, last] {
                for byte in [2, 3, 4] {
                    assert!((0x80..0xff).contains(&address.to_le_bytes()[byte]), "{address:#x}");
                }
            }
            assert_eq!(start >> 24, last >> 24);
            start += class.stride();
        }
    }

    #[test]
    fn no_place_is_left_out_that_would_do() {
        let class = Class::moving(MIN_SIZE);
        for (from, expected) in [
            (0x7f12_0000_0000, 0x7f80_8080_0000),
            (0x7f92_0000_0000, 0x7f92_8080_0000),
            (0x7f92_8080_0000, 0x7f92_8080_0000),
            (0x7f92_80fe_0000, 0x7f92_80fe_0000),
            (0x7f92_80ff_0000, 0x7f92_8180_0000),
            (0x7f92_ff00_0000, 0x7f93_8080_0000),
            (0x7efe_ff00_0000, 0x7f80_8080_0000),
        ] {
            assert_eq!(next_place(class, from), expected, "{from:#x}");
            assert_eq!(next_place(Class::staying(MIN_SIZE), from), from);
        }
        let large = Class::moving(MAX_SIZE);
        assert_eq!(next_place(large, 0x7f92_0000_0000), 0x7f92_0000_0000);
    }

    #[test]
    fn arenas_have_room_in_one_tib() {
        for (free, expected) in [
            (0x7f12_3456_7000, 0x7f00_0000_0000),
            (0x7f83_0000_0000, 0x7f00_0000_0000),
            (0x7fc0_0000_0000, 0x8000_0000_0000),
            (0x7ffe_0000_0000, 0x8000_0000_0000),
            (0x0012_3456_7000, 0x0100_0000_0000),
        ] {
            assert_eq!(arenas_below(free), expected, "{free:#x}");
        }
    }

    #[test]
    fn arenas_start_where_their_slots_are_not_left_out() {
        let places = |below, step| arena_places(Class::moving(MIN_SIZE), below, step);
        assert!(
            places(0x7f12_0000_0000, 1 << 40)
                .all(|start| next_place(Class::moving(MIN_SIZE), start) == start)
        );
        let below = places(0x7f80_8080_0000, 1 << 20).take(2).collect::<Vec<_>>();
        assert_eq!(below, [0x7f80_8080_0000, 0x7efe_8080_0000]);
        assert_eq!(places(0x7f90_0000_0000, 3 << 32).nth(1), Some(0x7f8c_8080_0000));
        assert_eq!(places(0x1000, 1 << 20).next(), None);
    }

    #[test]
    fn growth_doubles_until_the_need_fits() {
        assert_eq!(grown(2048, 4097, 1 << 20), Some(4096));
        assert_eq!(grown(2048, 40_000, 1 << 20), Some(65_536));
        assert_eq!(grown(4096, 4096 + 4096 + 1, 8192), Some(8192));
        assert_eq!(grown(8192, 1, 8192), None);
        assert_eq!(grown(2048, usize::MAX, 1 << 32), None);
    }

    #[test]
    fn slack_is_opened_fourfold_at_first() {
        let all = |first, maximum| {
            let next = |&size: &usize| grown_in_slack(size, open_bytes(size) + 1, maximum);
            core::iter::successors(Some(first), next).collect::<Vec<_>>()
        };
        let kib = |sizes: &[usize]| sizes.iter().map(|size| size << 10).collect::<Vec<_>>();
        assert_eq!(all(2 << 10, 256 << 10), kib(&[2, 8, 32, 64, 128, 256]));
        assert_eq!(all(4 << 10, 128 << 10), kib(&[4, 16, 64, 128]));
        assert_eq!(all(2 << 10, 4 << 10), kib(&[2, 4]));
        assert_eq!(all(8 << 10, 16 << 10), kib(&[8, 16]));
    }

    #[test]
    fn the_smallest_slot_takes_sixteen_pages() {
        assert_eq!(Class::moving(MIN_SIZE).stride(), 16 * PAGE);
    }
}
