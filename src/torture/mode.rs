//! Where torture moves stacks.
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
    /// As it is parsed.
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

/// What is no [`Mode`].
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

    /// As it is displayed.
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
