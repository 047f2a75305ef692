//! Where torture moves stacks.
#![forbid(unsafe_code)]

use core::fmt;

/// Where to move the stack.
///
/// ```
/// use regrow::torture::{Mode, Torture};
/// for mode in [Mode::Breakpoints, Mode::GrowthPoints, Mode::Every(2), Mode::Random(2), Mode::Overflows] {
///     // SAFETY: nothing is kept anywhere.
///     let (value, report) = unsafe { Torture::new(mode).run(|| "1,2,3".split(',').count()) };
///     assert!(report.is_clean(), "{report}");
///     assert_eq!((value, report.mode), (Some(3), mode));
/// }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Mode {
    /// At every growth point: wherever the stack could overflow and be moved in earnest. What has to be clean for
    /// code that runs on relocating coroutines.
    GrowthPoints,
    /// At every growth point of the program's own code, what is linked into it statically, by breakpoints: a trap at
    /// each of them and none in between, so this is the faster one by far. Shared libraries (libc) run undisturbed.
    Breakpoints,
    /// At every so many-th instruction, growth point or not; 1 for every one, and 0 too. Stricter than what happens
    /// without torture.
    Every(u64),
    /// At random, on average at every so many-th instruction; 1 for every one, and 0 too. [`Torture::seed`](super::Torture::seed) tells one run from
    /// another.
    Random(u64),
    /// Only where it overflows, but by the smallest step each time: from 2 KiB up, doubled as often as it takes.
    /// Nothing is stepped through, so this is the mode that runs at full speed.
    Overflows,
}

impl fmt::Display for Mode {
    /// As the `torture` example takes it on its command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GrowthPoints => f.write_str("growth-points"),
            Self::Breakpoints => f.write_str("breakpoints"),
            Self::Every(distance) => write!(f, "every-{distance}"),
            Self::Random(distance) => write!(f, "random-{distance}"),
            Self::Overflows => f.write_str("overflows"),
        }
    }
}
