//! The settings of a coroutine: how its stack grows, when it shrinks, which of its words may be judged by value.
#![forbid(unsafe_code)]

use crate::size::{Class, MIN_SIZE};

/// How a stack gets more room.
///
/// ```
/// use regrow::{Builder, Growth, Yielder};
/// let coroutine = Builder::new().spawn(|_: &Yielder<(), ()>, ()| ());
/// assert_eq!(coroutine.growth(), Growth::InPlace);
/// // SAFETY: nothing is kept outside the stack.
/// let coroutine = unsafe { Builder::new().relocating() }.spawn(|_: &Yielder<(), ()>, ()| ());
/// assert_eq!(coroutine.growth(), Growth::Relocate);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Growth {
    /// The whole maximum is accessible from the start, and the kernel
    /// adds memory page by page as it is touched. The stack never moves.
    InPlace,
    /// The stack moves to a slot twice the size, and every pointer into it is rewritten.
    Relocate,
}

/// When a stack shrinks by itself; see [`Builder::shrink`](crate::Builder::shrink).
///
/// ```
/// # #[inline(never)]
/// # fn deeper() {
/// #     std::hint::black_box([0u8; 10_000]);
/// # }
///
/// use regrow::{Builder, Shrink, Yielder};
/// let size_after_a_spike = |policy| {
///     // SAFETY: nothing is kept outside the stack.
///     let builder = unsafe { Builder::new().relocating() }.learn(false).shrink(policy);
///     let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
///         deeper();
///         loop {
///             yielder.suspend(());
///         }
///     });
///     for _ in 0..10 {
///         coroutine.resume(());
///     }
///     coroutine.stats().size
/// };
/// assert_eq!(size_after_a_spike(Shrink::Eager), 2048);
/// assert!(size_after_a_spike(Shrink::Default) > 10_000); // not yet
/// assert!(size_after_a_spike(Shrink::Off) > 10_000);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
#[repr(u8)]
#[non_exhaustive]
pub enum Shrink {
    /// Only when asked to ([`Coroutine::shrink`](crate::Coroutine::shrink)).
    Off,
    /// A stack that moves: when less than a quarter was used over 32 resumes; each attempt in vain doubles that number. A stack
    /// that grows in place: when it was used below the page it is suspended in, and then not for 32 resumes. Of these only some
    /// are watched: one in 64 that is made in new memory, and all from a spawn site where one of those had such a spike.
    #[default]
    Default,
    /// A stack that moves: at a resume that finds less than a quarter used since the one before. A stack that grows in place:
    /// at a resume that finds nothing used below its page since the one before. Each resume takes a few nanoseconds longer.
    Eager,
}

/// Which words of a stack that moves may be judged by their value; see [`Builder::maps`](crate::Builder::maps).
///
/// ```
/// # #[inline(never)]
/// # fn deeper() {
/// #     std::hint::black_box([0u8; 10_000]);
/// # }
///
/// use regrow::{Builder, Maps, Reason, Yielder};
/// // SAFETY: nothing is kept outside the stack.
/// let builder = unsafe { Builder::new().relocating() }.maps(Maps::Precise);
/// let mut coroutine = builder.spawn(|yielder: &Yielder<(), ()>, ()| {
///     deeper();
///     yielder.suspend(());
/// });
/// coroutine.resume(());
/// // rustc records no pointers, so its frames do not move: the stack has grown in place.
/// assert_eq!(coroutine.last_not_moved().unwrap().reason, Reason::Imprecise);
/// assert!(coroutine.stats().growths > 0);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
#[repr(u8)]
#[non_exhaustive]
pub enum Maps {
    /// Words that no map describes. Every frame needs unwind data, which compilers
    /// emit (`.eh_frame`). A stack with a frame without unwind data grows in place.
    #[default]
    Ambiguous,
    /// No word in frames: a stack with a word that no map describes grows in place. This is for compilers that
    /// record all of their frames, and start their code with [`Builder::spawn_raw`](crate::Builder::spawn_raw).
    /// The registers of the interrupted function, which no compiler's map describes, are judged by value.
    Precise,
    /// All words: no map is read, and no frame needs one.
    Off,
}

/// All settings, checked. A builder, a coroutine's record and the block of a frozen coroutine each have a copy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub growth: Growth,
    pub shrink: Shrink,
    pub maps: Maps,
    /// It uses up the slack of its slot before it moves.
    pub slack_first: bool,
    /// No Rust frames lie below: dropping it unwinds nothing.
    pub raw: bool,
    /// log2 of the first size, below which it does not shrink.
    first_log: u8,
    /// log2 of the largest size.
    maximum_log: u8,
}

impl Settings {
    /// The settings of a stack that grows in place, up to `maximum` bytes, a power of two.
    pub(crate) const fn in_place(maximum: usize) -> Self {
        Self {
            growth: Growth::InPlace,
            shrink: Shrink::Default,
            maps: Maps::Ambiguous,
            slack_first: false,
            raw: false,
            first_log: MIN_SIZE.trailing_zeros() as u8,
            maximum_log: maximum.trailing_zeros() as u8,
        }
    }

    /// With these sizes in bytes, both powers of two.
    pub(crate) fn with_sizes(self, first: usize, maximum: usize) -> Self {
        Self { first_log: first.trailing_zeros() as u8, maximum_log: maximum.trailing_zeros() as u8, ..self }
    }

    pub(crate) const fn first_size(self) -> usize {
        1 << self.first_log
    }

    pub(crate) const fn maximum(self) -> usize {
        1 << self.maximum_log
    }

    /// The class of the slot that a coroutine starts in.
    pub(crate) const fn first_class(self) -> Class {
        match self.growth {
            Growth::InPlace => Class::staying(self.maximum()),
            Growth::Relocate => Class::moving(self.first_size()),
        }
    }
}
