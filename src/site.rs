//! Learned start sizes: what the coroutines of one spawn site have come to need.
//!
//! A *site* is one place in the program's code that makes coroutines of one closure: a static of 32 bytes that
//! the assembler puts beside that code. So two kinds of coroutines that need very different stacks never share
//! an average, and finding a site costs one instruction.
//!
//! A site learns from what fails: when a coroutine that grew by moving has ended, the next ones start with the size it came
//! to. Starting larger costs address space only, since pages are used as they are touched. What is too large is found out
//! by *scouts*: one in 64 coroutines starts on untouched pages, and at its end the kernel says which of them it used.
//!
//! Stacks that grow in place have no size to start with. Their scouts, one in 64 of those made in a slot that is new to the
//! thread, are watched (src/grow/shrink.rs). When one of them has given back what a spike left in it, its site is *spiky*:
//! the coroutines made there from then on are watched, too.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::size::MIN_SIZE;

/// No site learns a larger size: beyond it a slot takes page tables of its own.
pub(crate) const LARGEST: usize = 256 << 10;

/// Every how many coroutines of a site that has learned something there is a scout.
pub(crate) const SCOUT_EVERY: u32 = 64;

/// After how many scouts the largest size any of them used becomes the one learned.
const SCOUTS: u32 = 8;

/// What is known of one spawn site. In the section `regrow_sites`.
#[repr(C, align(16))]
pub(crate) struct Site {
    /// Names the closure, for reading.
    name: fn() -> &'static str,
    /// log2 of the size learned; 0: none. [`SPIKY`].
    learned: AtomicU32,
    /// How many coroutines started with it.
    spawned: AtomicU32,
    /// Scouts that have reported since something was learned from them, and log2 of the most they used.
    scouts: AtomicU32,
    most: AtomicU32,
}

/// The site of the code this is inlined into, for coroutines of the closure `$closure`.
macro_rules! here {
    ($closure:ty) => {{
        let site: *const $crate::site::Site;
        // SAFETY: what is put into the section is a `Site`, with a name and zeros, and lasts as long as the program. Its own address
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

/// Learned of a site whose coroutines grow in place and have had spikes. No size: it would be 2 bytes.
const SPIKY: u32 = 1;

impl Site {
    /// The size that coroutines made here start with, if anything was learned.
    #[inline(always)]
    pub(crate) fn learned(&self) -> Option<usize> {
        match self.learned.load(Ordering::Relaxed) {
            0 | SPIKY => None,
            log => Some(1 << log),
        }
    }

    /// True if coroutines made here that grow in place are to be watched.
    #[inline(always)]
    pub(crate) fn is_spiky(&self) -> bool {
        self.learned.load(Ordering::Relaxed) == SPIKY
    }

    /// A scout that grows in place has given back what a spike had left.
    pub(crate) fn had_spike(&self) {
        let _ = self.learned.compare_exchange(0, SPIKY, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Counts a coroutine that starts with what was learned; true if it is to be a scout.
    pub(crate) fn count(&self) -> bool {
        self.spawned.fetch_add(1, Ordering::Relaxed) % SCOUT_EVERY == SCOUT_EVERY - 1
    }

    /// A coroutine has ended whose stack grew to `size`.
    pub(crate) fn grew_to(&self, size: usize) {
        self.learned.fetch_max(log(size), Ordering::Relaxed);
        self.most.fetch_max(log(size), Ordering::Relaxed);
    }

    /// A scout has ended that used a stack of `size`.
    pub(crate) fn scouted(&self, size: usize) {
        self.most.fetch_max(log(size), Ordering::Relaxed);
        if self.scouts.fetch_add(1, Ordering::Relaxed) + 1 >= SCOUTS {
            self.scouts.store(0, Ordering::Relaxed);
            let most = self.most.swap(0, Ordering::Relaxed);
            self.learned.store(if most <= log(MIN_SIZE) { 0 } else { most }, Ordering::Relaxed);
        }
    }
}

/// Of the power of two that holds `size`, at most the largest that is learned.
fn log(size: usize) -> u32 {
    size.min(LARGEST).next_power_of_two().trailing_zeros()
}

/// What a spawn site of coroutines that move has learned; see [`spawn_sites`].
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
    /// The type of the coroutines' closure, which says where it is written.
    pub closure: &'static str,
    /// The size they start with, in bytes.
    pub first_size: usize,
    /// How many have started with a size that was learned.
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
    // SAFETY: the linker gives the section these two symbols, and they are null if the program makes no coroutine. All
    // in the section are sites.
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
