//! Scouts: the few coroutines that report to their spawn site (src/site.rs) how much stack they have used.

use core::sync::atomic::{AtomicU32, Ordering};

use super::guard;
use super::pages::each_resident;
use super::record::Record;
use crate::settings::Growth;
use crate::site::{LARGEST, SCOUT_EVERY};
use crate::size::{PAGE, size_of_open};

/// True for one in [`SCOUT_EVERY`] coroutines that grow in place in a slot new to their thread. The first ones of a
/// program are exempt: a few coroutines take little memory, and watching costs time.
pub(crate) fn is_ones_turn() -> bool {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed) % SCOUT_EVERY == SCOUT_EVERY - 1
}

/// Gives all pages of a scout's stack back except the uppermost, so that the pages it uses can be told at its end.
///
/// # Safety
/// The slot of `record` is the caller's, and nothing below its head is needed.
pub(crate) unsafe fn send(record: *mut Record) {
    // SAFETY: the slot is the caller's, so its record is accessible. Nothing below the uppermost page is needed.
    unsafe {
        let open = (*record).open;
        if open > PAGE {
            guard::discard(Record::end(record) - open, open - PAGE);
        }
        (*record).scout = true;
        (*record).tidy = true;
    }
}

/// Reports to the site how much stack a finished coroutine needed.
pub(super) fn learn(record: &Record) {
    let Some(site) = record.site else { return };
    if record.settings.growth == Growth::InPlace {
        return; // it already reported: src/grow/shrink.rs
    }
    if record.growths != 0 {
        site.grew_to(record.highest);
    } else if record.scout {
        site.scouted(used(record));
    }
}

/// The stack size that a scout has used, down to its lowest resident page. The stack has not moved or grown.
fn used(record: &Record) -> usize {
    let mut room = [0u8; LARGEST / PAGE + 1];
    let pages = (record.open / PAGE).min(room.len());
    let end = Record::end(record);
    let Some(mut resident) = each_resident(end - pages * PAGE..end, &mut room) else { return record.size() };
    let lowest = resident.position(|has_memory| has_memory).unwrap_or(pages - 1);
    size_of_open((pages - lowest) * PAGE)
}
