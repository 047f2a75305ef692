//! Why maps are not accepted.
#![forbid(unsafe_code)]

use core::fmt;

/// Why maps were not accepted.
///
/// ```
/// use regrow::map::{Error, FrameMap, StackMaps};
/// let maps = StackMaps::new();
/// let error = maps.register(vec![FrameMap::new(1..9), FrameMap::new(8..10)]).unwrap_err();
/// assert_eq!(error, Error::Overlap { address: 8 });
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Error {
    /// A range of code is empty, or larger than 2 GiB.
    Range {
        /// Its first address.
        start: usize,
        /// One past its last address.
        end: usize,
    },
    /// Two maps cover the same code.
    Overlap {
        /// An address that both cover.
        address: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range { start, end } => {
                write!(f, "a frame map for {start:#x}..{end:#x}: give a range of 1 byte to 2 GiB of code")
            }
            Self::Overlap { address } => write!(
                f,
                "two frame maps are for address {address:#x}: give one, or drop the registration of the other first"
            ),
        }
    }
}

impl std::error::Error for Error {}
