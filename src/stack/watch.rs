//! What a record keeps of whether its stack has more memory than it needs: src/grow/shrink.rs.
#![forbid(unsafe_code)]

use crate::settings::Shrink;

/// How many resumes a mark must outlast, with [`Shrink::Default`].
const PATIENCE: u16 = 32;

/// What a record keeps for this.
#[derive(Clone, Copy)]
pub(crate) struct Watch {
    /// The mark is in place.
    pub marked: bool,
    /// Of a stack that stays: a mark was overwritten, and nothing has been given back since.
    pub spike: bool,
    /// Resumes that the mark has outlasted.
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

    /// The stack has grown: whatever was marked is elsewhere.
    pub(crate) fn start_over(&mut self, policy: Shrink, shrunk_before: bool) {
        self.marked = false;
        self.quiet = 0;
        if shrunk_before && policy == Shrink::Default {
            self.patience = self.patience.saturating_mul(2);
        }
    }
}
