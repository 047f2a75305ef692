//! `REGROW_TRACE=moves`: a line on standard error for whatever happens to a stack.
//!
//! The lines are written in the fault handler, too: without allocating, and each by one system call, so that those of several
//! threads do not mix. When tracing is off, each place that would write a line costs one relaxed load, and there is none on
//! the way of a switch, of a spawn or of an end.
#![forbid(unsafe_code)]

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};
use std::sync::Once;

use crate::not_moved::NotMoved;
use crate::settings::Growth;
use crate::stats::LastGrowth;
use crate::stderr::Stderr;

/// The value of the variable with which it traces.
const MOVES: &str = "moves";

/// The line of an event holds so many characters of a name, so that it fits into the buffer.
const NAME: usize = 60;

static ON: AtomicBool = AtomicBool::new(false);

/// Reads the variable, once. Never in the handler.
pub(crate) fn detect() {
    static READ: Once = Once::new();
    READ.call_once(|| {
        let Some(value) = std::env::var_os("REGROW_TRACE").filter(|value| !value.is_empty()) else { return };
        if value == MOVES {
            ON.store(true, Ordering::Relaxed);
        } else {
            let _ = writeln!(
                Stderr::new(),
                "regrow: nothing is traced, since REGROW_TRACE is not \"{MOVES}\", its only value, but {value:?}"
            );
        }
    });
}

/// True if events are to be told.
#[inline]
pub(crate) fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// How a coroutine is called in reports and in the trace.
pub(crate) struct Name<'a> {
    pub name: Option<&'a str>,
    /// One past the highest address of its slot.
    pub end: usize,
}

impl fmt::Display for Name<'_> {
    /// With a precision: at most so many characters of the name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name, f.precision()) {
            (Some(name), Some(most)) => write!(f, "coroutine \"{name:.most$}\""),
            (Some(name), None) => write!(f, "coroutine \"{name}\""),
            (None, _) => write!(f, "coroutine {:#x}", self.end),
        }
    }
}

/// What happened to a stack. Sizes are in bytes; `now` is one past the highest address of the slot it is in since.
pub(crate) enum Event {
    /// It grew.
    Grown { growth: Growth, last: LastGrowth, now: usize },
    /// It did not move.
    NotMoved(NotMoved),
    /// It shrank to this size.
    Shrunk { to: usize, now: usize },
    /// It went into a block of this size.
    Frozen(usize),
    /// Its owner thawed it.
    Thawed,
    /// It thawed because somebody touched it.
    Touched,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Grown { growth: Growth::Relocate, last, now } => write!(
                f,
                "moved {} -> {} bytes, {} copied, {} words, {} ns, now {now:#x}",
                last.from, last.to, last.bytes, last.words, last.nanoseconds
            ),
            Self::Grown { growth: Growth::InPlace, last, .. } => {
                write!(f, "opened slack {} -> {} bytes, {} ns", last.from, last.to, last.nanoseconds)
            }
            Self::NotMoved(why) => write!(f, "not moved: {:?} at {:#x}", why.reason, why.frame),
            Self::Shrunk { to, now } => write!(f, "shrunk to {to} bytes, now {now:#x}"),
            Self::Frozen(bytes) => write!(f, "frozen, {bytes} bytes"),
            Self::Thawed => f.write_str("thawed"),
            Self::Touched => f.write_str("thawed because it was touched"),
        }
    }
}

/// Writes the line of an event. `who` is how the coroutine was called before it.
#[cold]
#[inline(never)]
pub(crate) fn tell(who: &Name<'_>, event: &Event) {
    line(who, event).write();
}

/// The line of an event, to be written when the writer may wait.
#[cold]
#[inline(never)]
pub(crate) fn line(who: &Name<'_>, event: &Event) -> Line {
    let mut line = Line(Stderr::new());
    let _ = write!(line.0, "regrow: {who:.NAME$} {event}");
    line
}

/// A line that is not written yet.
pub(crate) struct Line(Stderr);

impl Line {
    pub(crate) fn write(mut self) {
        let _ = self.0.write_str("\n");
    }
}
