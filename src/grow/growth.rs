//! The common part of all growths, by fault or on request: opening pages, and counting.

use crate::error::Error;
use crate::settings::{Growth, Shrink};
use crate::size;
use crate::stack::record::{Record, Room};
use crate::stack::stock;
use crate::stats::{self, LastGrowth};
use crate::switch::Running;
use crate::trace::{self, Event, Name};

/// A growth that has begun.
pub(crate) struct Begun {
    /// The stack's size before the growth, in bytes.
    from: usize,
    /// The end of its slot before.
    end: usize,
    /// When it began, by the clock of [`now`].
    at: u64,
}

/// The result of a growth.
pub(crate) struct Done {
    pub growth: Growth,
    pub bytes: usize,
    pub words: usize,
}

impl Begun {
    /// Begins a growth of the running coroutine's stack.
    pub(crate) fn now(running: Running) -> Self {
        Self { from: running.room().size(), end: Record::end(running.record()), at: now() }
    }

    /// Ends the growth: counts it, in the record and for the process.
    pub(crate) fn finish(self, running: Running, done: Done) {
        let Done { growth, bytes, words } = done;
        let nanoseconds = now().wrapping_sub(self.at);
        let last = LastGrowth { from: self.from, to: running.room().size(), bytes, words, nanoseconds };
        // The stack has just grown, so this does not run into its guard.
        running.with_record(|record| count(record, &last));
        if running.room().settings.shrink != Shrink::Off {
            running.watch();
        }
        stats::count(growth, &last);
        if trace::is_on() {
            let name = running.with_record(|record| record.name.clone());
            let before = Name { end: self.end, name: name.as_deref() };
            trace::tell(&before, &Event::Grown { growth, last, now: Record::end(running.record()) });
        }
    }
}

fn count(record: &mut Record, last: &LastGrowth) {
    record.tidy = true;
    record.growths += 1;
    record.bytes_copied += last.bytes as u64;
    record.words_rewritten += last.words as u64;
    record.highest = record.highest.max(last.to);
    record.last = *last;
    record.watch.start_over(record.settings.shrink, record.shrinks != 0);
}

/// How many bytes to open of a stack that uses its slack before it moves. `None` if the slack is too small for `need`.
pub(crate) fn slack_first(room: Room, need: usize) -> Option<usize> {
    let (size, maximum) = (room.size(), room.settings.maximum());
    let in_window = |size| Some(size::open_bytes(size)).filter(|&open| open <= room.class.window());
    let sizes = [size::grown_in_slack(size, need, maximum), size::grown(size, need, maximum)];
    sizes.into_iter().flatten().find_map(in_window).filter(|_| room.settings.slack_first)
}

/// Grows the running coroutine's stack without a move: makes `open` bytes of its slot accessible.
///
/// # Safety
/// The bytes are within the slot's window, more than are open, and nothing below those that are open is needed.
pub(crate) unsafe fn open(running: Running, open: usize) -> Result<Done, Error> {
    let record = running.record();
    // SAFETY: the slot is the running coroutine's. On its own stack this code may have faulted, and opened more already.
    unsafe { stock::resize(record, open.max((*record).open))? };
    Ok(Done { growth: Growth::InPlace, bytes: 0, words: 0 })
}

/// Nanoseconds of a monotonic clock, read without a system call.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
}
