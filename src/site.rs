//! Learned start sizes: how much stack the coroutines of one spawn site need.
//!
//! A *site* is a place in the code that makes coroutines of one closure: a static of 32 bytes that the assembler puts
//! beside that code. So kinds of coroutines with different needs never share an average, and finding a site costs one
//! instruction.
//!
//! A site learns from growth: when a coroutine that grew by moving has ended, later ones start with its final size. A
//! larger start costs only address space, since pages are used as they are touched. *Scouts* reveal sizes that are too
//! large: one in 64 coroutines starts on untouched pages, and at its end the kernel tells which it used.
//!
//! Stacks that grow in place have no start size. Their scouts, one in 64 of those made in a slot new to the thread, are
//! watched (src/grow/shrink.rs). Once a scout has given back what a spike left, its site is *spiky*, and later coroutines
//! from it are watched too.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::size::MIN_SIZE;

/// The largest size a site learns. A slot for more would take page tables of its own.
pub(crate) const LARGEST: usize = 256 << 10;

/// Where a size was learned, one in this many coroutines is a scout.
pub(crate) const SCOUT_EVERY: u32 = 64;

/// After this many scouts, the largest size any of them used becomes the learned one.
const SCOUTS: u32 = 8;

/// The record of one spawn site, in the section `regrow_sites`.
#[repr(C, align(16))]
pub(crate) struct Site {
    /// Returns the name of the closure, for reading.
    name: fn() -> &'static str,
    /// log2 of the learned size; 0 if there is no such size; or [`SPIKY`].
    learned: AtomicU32,
    /// How many coroutines started with the learned size.
    spawned: AtomicU32,
    /// Scouts reported since the last time a size was learned from scouts, and log2 of the most they used.
    scouts: AtomicU32,
    most: AtomicU32,
}

/// The site of the code that this is inlined into, for coroutines of `$closure`.
macro_rules! here {
    ($closure:ty) => {{
        let site: *const $crate::site::Site;
        // SAFETY: the section gets a valid `Site`, with a name and zeros, that lasts as long as the program. Its address
        // is read.
        unsafe {
            core::arch::asm!(
                ".pushsection regrow_sites, \"aw\", @progbits",
                ".p2align 4",
                "77: .quad {name}",
                ".zero 24",
                ".popsection",
                "lea {site}, [rip + 77b]",
                name = sym core::any::type_name::<$closure>,
                site = out(reg) site,
                options(nomem, nostack, preserves_flags),
            );
            &*site
        }
    }};
}
pub(crate) use here;

/// Marks a site whose coroutines grow in place and have had spikes. Never a size, since it would be 2 bytes.
const SPIKY: u32 = 1;

impl Site {
    /// The start size of coroutines made here, if one was learned.
    #[inline(always)]
    pub(crate) fn learned(&self) -> Option<usize> {
        match self.learned.load(Ordering::Relaxed) {
            0 | SPIKY => None,
            log => Some(1 << log),
        }
    }

    /// True if coroutines that are made here and grow in place are to be watched.
    #[inline(always)]
    pub(crate) fn is_spiky(&self) -> bool {
        self.learned.load(Ordering::Relaxed) == SPIKY
    }

    /// Called when a scout that grows in place has given back what a spike left.
    pub(crate) fn had_spike(&self) {
        let _ = self.learned.compare_exchange(0, SPIKY, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Counts a coroutine that starts with the learned size. True if it is to be a scout.
    pub(crate) fn count(&self) -> bool {
        self.spawned.fetch_add(1, Ordering::Relaxed) % SCOUT_EVERY == SCOUT_EVERY - 1
    }

    /// Called when a coroutine whose stack grew to `size` has ended.
    pub(crate) fn grew_to(&self, size: usize) {
        self.learned.fetch_max(log(size), Ordering::Relaxed);
        self.most.fetch_max(log(size), Ordering::Relaxed);
    }

    /// Called when a scout that used a stack of `size` has ended.
    pub(crate) fn scouted(&self, size: usize) {
        self.most.fetch_max(log(size), Ordering::Relaxed);
        if self.scouts.fetch_add(1, Ordering::Relaxed) + 1 >= SCOUTS {
            self.scouts.store(0, Ordering::Relaxed);
            let most = self.most.swap(0, Ordering::Relaxed);
            self.learned.store(if most <= log(MIN_SIZE) { 0 } else { most }, Ordering::Relaxed);
        }
    }
}

/// log2 of the power of two that holds `size`, limited to that of [`LARGEST`].
fn log(size: usize) -> u32 {
    size.min(LARGEST).next_power_of_two().trailing_zeros()
}

/// The record of a spawn site of coroutines that move; see [`spawn_sites`].
///
/// ```
/// # #[inline(never)]
/// # fn deeper() {
/// #     std::hint::black_box([0u8; 10_000]);
/// # }
///
/// use regrow::{Builder, SpawnSite, Yielder};
/// // SAFETY: nothing is kept outside the stacks.
/// let builder = unsafe { Builder::new().relocating() };
/// for _ in 0..10 {
///     builder.spawn(|_: &Yielder<(), ()>, ()| deeper()).resume(()); // 10,000 bytes
/// }
/// let sites: Vec<SpawnSite> = regrow::spawn_sites();
/// assert_eq!(sites.len(), 1);
/// assert!(sites[0].first_size > 10_000);
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct SpawnSite {
    /// The type of the coroutines' closure, which tells where it is written.
    pub closure: &'static str,
    /// The size they start with, in bytes.
    pub first_size: usize,
    /// How many coroutines have started with a learned size.
    pub spawned: u32,
}

/// The spawn sites of this program that have learned a start size.
///
/// ```
/// for site in regrow::spawn_sites() {
///     println!("{} starts with {} bytes", site.closure, site.first_size);
/// }
/// ```
#[must_use]
pub fn spawn_sites() -> Vec<SpawnSite> {
    let (first, end): (*const Site, *const Site);
    // SAFETY: the linker gives the section these two symbols; they are null if the program makes no coroutine. The
    // section holds only sites.
    let sites = unsafe {
        asm!(
            ".weak __start_regrow_sites",
            ".weak __stop_regrow_sites",
            "mov {first}, [rip + __start_regrow_sites@GOTPCREL]",
            "mov {end}, [rip + __stop_regrow_sites@GOTPCREL]",
            first = out(reg) first,
            end = out(reg) end,
            options(nostack, preserves_flags, pure, readonly),
        );
        if first.is_null() {
            return Vec::new();
        }
        core::slice::from_raw_parts(first, end.offset_from_unsigned(first))
    };
    let described = |site: &Site| {
        Some(SpawnSite {
            closure: (site.name)(),
            first_size: site.learned()?,
            spawned: site.spawned.load(Ordering::Relaxed),
        })
    };
    sites.iter().filter_map(described).collect()
}
