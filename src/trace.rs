//! `REGROW_TRACE=moves` writes a line to standard error for each event of a stack.
//!
//! The fault handler writes lines too. So a line is written without allocating and by one system call, and lines of
//! several threads do not mix. While tracing is off, each place that would write a line costs one relaxed load.
//! Switching, spawning and ending contain no such place.
#![forbid(unsafe_code)]

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};
use std::sync::Once;

use crate::not_moved::NotMoved;
use crate::settings::Growth;
use crate::stats::LastGrowth;
use crate::stderr::Stderr;

/// The value of the variable that turns tracing on.
const MOVES: &str = "moves";

/// The most characters of a name in an event's line, so that the line fits into the buffer.
const NAME: usize = 60;

static ON: AtomicBool = AtomicBool::new(false);

/// Reads the variable once, never in the handler.
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

/// True if events are traced.
#[inline]
pub(crate) fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// The name of a coroutine in reports and in the trace.
pub(crate) struct Name<'a> {
    pub name: Option<&'a str>,
    /// One past the highest address of its slot.
    pub end: usize,
}

impl fmt::Display for Name<'_> {
    /// The precision, if given, limits the characters of the name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name, f.precision()) {
            (Some(name), Some(most)) => write!(f, "coroutine \"{name:.most$}\""),
            (Some(name), None) => write!(f, "coroutine \"{name}\""),
            (None, _) => write!(f, "coroutine {:#x}", self.end),
        }
    }
}

/// An event of a stack. Sizes are in bytes. `now` is one past the highest address of the slot it is in afterwards.
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
    /// It thawed because its memory was touched.
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

/// Writes the line of an event. `who` is the name of the coroutine before it.
#[cold]
#[inline(never)]
pub(crate) fn tell(who: &Name<'_>, event: &Event) {
    line(who, event).write();
}

/// The line of an event, for writing once the writer may wait.
#[cold]
#[inline(never)]
pub(crate) fn line(who: &Name<'_>, event: &Event) -> Line {
    let mut line = Line(Stderr::new());
    let _ = write!(line.0, "regrow: {who:.NAME$} {event}");
    line
}

/// A line not yet written.
pub(crate) struct Line(Stderr);

impl Line {
    pub(crate) fn write(mut self) {
        let _ = self.0.write_str("\n");
    }
}
