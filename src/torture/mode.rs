//! The points at which torture moves stacks.
#![forbid(unsafe_code)]

use core::fmt;
use core::str::FromStr;

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
    /// At every growth point: wherever the stack could really overflow and move. Code that runs on relocating coroutines has to
    /// be clean in this mode.
    GrowthPoints,
    /// At every growth point of the program's own code (statically linked code included), by breakpoints. Only growth points
    /// trap, so this mode is by far faster. Shared libraries (libc) run undisturbed.
    Breakpoints,
    /// At every N-th instruction, growth point or not; 0 counts as 1. Stricter than any move without torture.
    Every(u64),
    /// At random instructions, every N-th on average; 0 counts as 1. See [`Torture::seed`](super::Torture::seed).
    Random(u64),
    /// Only where the stack overflows, but by the smallest step each time: from 2 KiB, doubled as often as needed. This mode
    /// runs at full speed, because it steps through nothing.
    Overflows,
}

impl fmt::Display for Mode {
    /// Writes the form that [`FromStr`] parses.
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

/// The error for a text that names no [`Mode`].
///
/// ```
/// use regrow::torture::Mode;
/// let error = "often".parse::<Mode>().unwrap_err();
/// assert!(error.to_string().starts_with("no mode is called \"often\""));
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownMode(String);

impl fmt::Display for UnknownMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no mode is called {:?}: there are growth-points, breakpoints, every-N, random-N and overflows, where N is a number",
            self.0
        )
    }
}

impl std::error::Error for UnknownMode {}

impl FromStr for Mode {
    type Err = UnknownMode;

    /// Parses the displayed form.
    ///
    /// ```
    /// use regrow::torture::Mode;
    /// assert_eq!("random-50".parse(), Ok(Mode::Random(50)));
    /// ```
    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        let with_distance = || {
            let (name, distance) = text.split_once('-')?;
            let distance = distance.parse().ok()?;
            match name {
                "every" => Some(Self::Every(distance)),
                "random" => Some(Self::Random(distance)),
                _ => None,
            }
        };
        match text {
            "growth-points" => Ok(Self::GrowthPoints),
            "breakpoints" => Ok(Self::Breakpoints),
            "overflows" => Ok(Self::Overflows),
            _ => with_distance().ok_or_else(|| UnknownMode(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_parsed_as_it_is_displayed() {
        for mode in
            [Mode::GrowthPoints, Mode::Breakpoints, Mode::Every(1), Mode::Random(u64::MAX), Mode::Overflows]
        {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
    }

    #[test]
    fn what_is_no_mode_is_named() {
        for text in [
            "",
            "Overflows",
            "every",
            "every-",
            "random-x",
            "often-3",
            "random--1",
            "every-99999999999999999999",
        ] {
            let error = text.parse::<Mode>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
