//! Scouts: the few coroutines that tell their spawn site (src/site.rs) how much stack they have used.

use core::sync::atomic::{AtomicU32, Ordering};

use super::guard;
use super::pages::each_resident;
use super::record::Record;
use crate::settings::Growth;
use crate::site::{LARGEST, SCOUT_EVERY};
use crate::size::{PAGE, size_of_open};

/// True for one in [`SCOUT_EVERY`] coroutines that grow in place and are made in a slot that is new to their thread. Not for the
/// first ones of a program: a few take little memory, and to be watched costs time.
pub(crate) fn is_ones_turn() -> bool {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed) % SCOUT_EVERY == SCOUT_EVERY - 1
}

/// Gives all pages of a scout's stack back but the uppermost, so that at its end those it used can be told.
///
/// # Safety
/// The slot of `record` is the caller's, and nothing below its head is needed.
pub(crate) unsafe fn send(record: *mut Record) {
    // SAFETY: the slot is the caller's, so its record is accessible; what is below its uppermost page is not needed.
    unsafe {
        let open = (*record).open;
        if open > PAGE {
            guard::discard(Record::end(record) - open, open - PAGE);
        }
        (*record).scout = true;
        (*record).tidy = true;
    }
}

/// Tells the site of a coroutine that has ended how much stack it needed.
pub(super) fn learn(record: &Record) {
    let Some(site) = record.site else { return };
    if record.settings.growth == Growth::InPlace {
        return; // it has told as soon as it knew: src/grow/shrink.rs
    }
    if record.growths != 0 {
        site.grew_to(record.highest);
    } else if record.scout {
        site.scouted(used(record));
    }
}

/// The size of the stack that a scout has used, which has neither moved nor grown: down to its lowest page that is resident.
fn used(record: &Record) -> usize {
    let mut room = [0u8; LARGEST / PAGE + 1];
    let pages = (record.open / PAGE).min(room.len());
    let end = Record::end(record);
    let Some(mut resident) = each_resident(end - pages * PAGE..end, &mut room) else { return record.size() };
    let lowest = resident.position(|has_memory| has_memory).unwrap_or(pages - 1);
    size_of_open((pages - lowest) * PAGE)
}
