//! The part of a record that tells whether its stack has more memory than it needs: src/grow/shrink.rs.
#![forbid(unsafe_code)]

use crate::settings::Shrink;

/// How many resumes a mark must outlast, with [`Shrink::Default`].
const PATIENCE: u16 = 32;

/// The state of the watch.
#[derive(Clone, Copy)]
pub(crate) struct Watch {
    /// The mark is in place.
    pub marked: bool,
    /// For a stack that stays: a mark was overwritten, and nothing has been given back since.
    pub spike: bool,
    /// How many resumes the mark has survived.
    pub quiet: u16,
    pub patience: u16,
}

impl Watch {
    pub(crate) const fn new(policy: Shrink) -> Self {
        Self {
            marked: false,
            spike: false,
            quiet: 0,
            patience: if matches!(policy, Shrink::Eager) { 1 } else { PATIENCE },
        }
    }

    /// The stack has grown, so its mark is invalid.
    pub(crate) fn start_over(&mut self, policy: Shrink, shrunk_before: bool) {
        self.marked = false;
        self.quiet = 0;
        if shrunk_before && policy == Shrink::Default {
            self.patience = self.patience.saturating_mul(2);
        }
    }
}
