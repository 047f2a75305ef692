//! Making coroutines: sizes, growth, name.

use core::mem::{ManuallyDrop, MaybeUninit};
use std::sync::Arc;

use crate::coroutine::{self, Coroutine, Yielder};
use crate::error::Error;
use crate::not_moved;
use crate::settings::{Growth, Maps, Settings, Shrink};
use crate::site::{self, Site};
use crate::size::{MAX_SIZE, MIN_SIZE};
use crate::stack::record::{INLINE_CLOSURE, Record, SCOUT};
use crate::stack::watch::Watch;
use crate::stack::{scouts, stock};
use crate::switch::{self, Entry, Handle};
use crate::thread;

/// The default maximum of a stack that grows in place: 256 KiB.
///
/// Each such coroutine reserves this much address space. All of it is stack from the start, and the kernel
/// adds memory page by page as it is touched. A larger maximum costs more page tables for each coroutine:
///
/// | maximum | page tables of a small coroutine | coroutines in 47 bits of address space |
/// | --- | --- | --- |
/// | 64 KiB | 0.2 KB | 1.6 billion |
/// | 256 KiB | 0.6 KB | 500 million |
/// | 1 MiB | 2.1 KB | 130 million |
/// | 2 MiB and more | 4.1 KB | 65 million and less |
///
/// 256 KiB is enough for nearly all release builds. Frames of debug builds are
/// several times as large: some parsers (for example sqlparser) need 1 MiB there.
///
/// ```
/// use regrow::{Coroutine, DEFAULT_MAXIMUM_IN_PLACE, Error, Yielder, reserve};
/// let mut coroutine = Coroutine::new(|_: &Yielder<(), ()>, ()| reserve(2 * DEFAULT_MAXIMUM_IN_PLACE));
/// let error = coroutine.resume(()).returned().unwrap().unwrap_err();
/// assert!(matches!(error, Error::Room { maximum: DEFAULT_MAXIMUM_IN_PLACE, .. }), "{error}");
/// ```
pub const DEFAULT_MAXIMUM_IN_PLACE: usize = 256 << 10;

/// The default maximum of a stack that moves: 256 MiB.
///
/// ```
/// use regrow::{Builder, DEFAULT_MAXIMUM_RELOCATE, Error, Yielder, reserve};
/// // SAFETY: nothing is kept outside the stack.
/// let builder = unsafe { Builder::new().relocating() };
/// let mut coroutine = builder.spawn(|_: &Yielder<(), ()>, ()| reserve(2 * DEFAULT_MAXIMUM_RELOCATE));
/// let error = coroutine.resume(()).returned().unwrap().unwrap_err();
/// assert!(matches!(error, Error::Room { maximum: DEFAULT_MAXIMUM_RELOCATE, .. }), "{error}");
/// ```
pub const DEFAULT_MAXIMUM_RELOCATE: usize = 256 << 20;

/// The function that [`Builder::spawn_raw`] starts. It gets the yielder and the first value, and returns the last.
///
/// ```
/// use regrow::{Builder, RawFunction, Yielder};
/// unsafe extern "C" fn doubles(_: &Yielder<usize, usize>, argument: usize) -> usize {
///     argument * 2
/// }
/// let compiled: RawFunction = doubles;
/// // SAFETY: it does not unwind, and is not dropped while it is suspended.
/// let mut coroutine = unsafe { Builder::new().spawn_raw(compiled)? };
/// assert_eq!(coroutine.resume(21).returned(), Some(42));
/// # Ok::<(), regrow::Error>(())
/// ```
pub type RawFunction = unsafe extern "C" fn(yielder: &Yielder<usize, usize>, argument: usize) -> usize;

/// Makes coroutines with properties other than the default ones.
///
/// ```
/// use regrow::{Builder, CoroutineResult, Yielder};
///
/// let mut coroutine = Builder::new()
///     .name("parser")
///     .first_size(8 << 10)
///     .maximum(1 << 20)
///     .spawn(|yielder: &Yielder<u32, u32>, first: u32| yielder.suspend(first + 1) * 10);
/// assert_eq!(coroutine.resume(1), CoroutineResult::Yield(2));
/// assert_eq!(coroutine.resume(7), CoroutineResult::Return(70));
/// ```
#[derive(Clone, Debug)]
pub struct Builder {
    first_size: usize,
    maximum: Option<usize>,
    name: Option<Arc<str>>,
    learn: bool,
    /// All but the two sizes, which are checked when a coroutine is made.
    settings: Settings,
}

/// The settings of [`Coroutine::new`].
const DEFAULT: Settings = Settings::in_place(DEFAULT_MAXIMUM_IN_PLACE);

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// A first size of 2 KiB, growth in place, no name.
    ///
    /// ```
    /// use regrow::{Builder, Growth, Yielder};
    /// let coroutine = Builder::new().spawn(|_: &Yielder<(), ()>, ()| ());
    /// assert_eq!((coroutine.stats().size, coroutine.growth(), coroutine.name()), (4096, Growth::InPlace, None));
    /// ```
    #[must_use]
    pub const fn new() -> Self {
        Self { first_size: MIN_SIZE, maximum: None, name: None, learn: true, settings: DEFAULT }
    }

    /// The stack size at the start, for a stack that moves: a power of two from
    /// [`MIN_SIZE`] to [`MAX_SIZE`]. Memory is used only as it is touched.
    ///
    /// A stack that grows in place has its whole [`maximum`](Self::maximum)
    /// from the start: the maximum just may not be smaller than this size.
    ///
    /// ```
    /// // SAFETY: nothing is kept outside the stack.
    /// let builder = unsafe { regrow::Builder::new().relocating() }.first_size(16 << 10);
    /// let coroutine = builder.spawn(|_: &regrow::Yielder<(), ()>, ()| ());
    /// assert_eq!(coroutine.stats().size, 16384);
    /// ```
    #[must_use]
    pub const fn first_size(mut self, bytes: usize) -> Self {
        self.first_size = bytes;
        self
    }

    /// The largest stack size: a power of two up to [`MAX_SIZE`]. A coroutine that needs more ends the process with a report.
    ///
    /// The default is [`DEFAULT_MAXIMUM_IN_PLACE`] or [`DEFAULT_MAXIMUM_RELOCATE`], or the first size if that is larger.
    ///
    /// ```
    /// use regrow::{Builder, Error, Yielder, reserve};
    /// let builder = Builder::new().maximum(64 << 20);
    /// let mut coroutine = builder.spawn(|_: &Yielder<(), ()>, ()| reserve(100 << 20));
    /// assert!(matches!(coroutine.resume(()).returned(), Some(Err(Error::Room { maximum: 0x400_0000, .. }))));
    /// ```
    #[must_use]
    pub const fn maximum(mut self, bytes: usize) -> Self {
        self.maximum = Some(bytes);
        self
    }

    /// When the stack shrinks by itself, or gives memory back if it grows in place. Resumes of watched
    /// coroutines check this; it costs the others nothing. [`Shrink`] says which coroutines are watched.
    ///
    /// A coroutine that stays parked is not resumed, so it keeps its memory. [`Coroutine::shrink`] gives it back at
    /// any time. So does freezing, by hand or by a [`Pool`](crate::Pool), which counts this memory in its budget.
    ///
    /// ```
    /// use regrow::{Builder, Shrink, Yielder};
    ///
    /// #[inline(never)]
    /// fn deeper() {
    ///     std::hint::black_box([0u8; 10_000]);
    /// }
    /// let mut coroutine = Builder::new().shrink(Shrink::Eager).spawn(|yielder: &Yielder<(), ()>, ()| {
    ///     deeper();
    ///     loop {
    ///         yielder.suspend(());
    ///     }
    /// });
    /// coroutine.resume(());
    /// assert!(coroutine.stats().size >= 8192);
    /// for _ in 0..3 {
    ///     coroutine.resume(());
    /// }
    /// assert!(coroutine.stats().size <= 8192);
    /// ```
    #[must_use]
    pub const fn shrink(mut self, policy: Shrink) -> Self {
        self.settings.shrink = policy;
        self
    }

    /// What must be known about the frames of a stack that moves. By default every frame
    /// needs unwind data, and words that no stack map describes are judged by their value.
    ///
    /// ```
    /// use regrow::{Builder, Maps, Yielder, current_stats};
    /// # #[inline(never)]
    /// # fn deeper() {
    /// #     std::hint::black_box([0u8; 10_000]);
    /// # }
    /// // SAFETY: the code started from this builder keeps nothing outside its stack.
    /// let builder = unsafe { Builder::new().relocating() }.maps(Maps::Precise);
    /// let mut coroutine = builder.spawn(|_: &Yielder<(), ()>, ()| {
    ///     deeper();
    ///     current_stats().unwrap()
    /// });
    /// // rustc records no pointers for this code: the stack grows, but in place.
    /// let stats = coroutine.resume(()).returned().unwrap();
    /// assert!(stats.growths > 0 && stats.bytes_copied == 0);
    /// ```
    #[must_use]
    pub const fn maps(mut self, maps: Maps) -> Self {
        self.settings.maps = maps;
        self
    }

    /// Whether a coroutine starts with the size that earlier ones made by the same code needed, if that is
    /// more than the first size. On by default. [`spawn_sites`](crate::spawn_sites) shows what was learned.
    ///
    /// ```
    /// use regrow::{Builder, Yielder};
    /// # #[inline(never)]
    /// # fn deeper() {
    /// #     std::hint::black_box([0u8; 10_000]);
    /// # }
    /// let first_sizes = |builder: Builder| {
    ///     [(); 3].map(|()| {
    ///         let mut coroutine = builder.spawn(|_: &Yielder<(), ()>, ()| deeper()); // 10,000 bytes
    ///         let first_size = coroutine.stats().size;
    ///         coroutine.resume(());
    ///         first_size
    ///     })
    /// };
    /// // SAFETY: nothing is kept outside the stacks.
    /// let builder = unsafe { Builder::new().relocating() };
    /// assert_eq!(first_sizes(builder.clone().learn(false)), [2048; 3]);
    /// assert!(first_sizes(builder)[2] > 10_000);
    /// ```
    #[must_use]
    pub const fn learn(mut self, learn: bool) -> Self {
        self.learn = learn;
        self
    }

    /// Whether a stack that moves first uses the slack of its slot: from 2 KiB to
    /// 32 KiB it then grows without moving. No effect on stacks that grow in place.
    ///
    /// Off by default: then code that breaks the promise of [`relocating`](Self::relocating) fails at the first growth, and not
    /// only in the rare run that needs 40 KiB. Code that is known to keep the promise grows faster with it (docs/benchmarks.md).
    ///
    /// ```
    /// use regrow::{Builder, Yielder, current_stats, reserve};
    /// // SAFETY: nothing is kept outside the stack.
    /// let builder = unsafe { Builder::new().relocating() }.slack_first(true);
    /// let mut coroutine = builder.spawn(|_: &Yielder<(), ()>, ()| {
    ///     let copied_for = |bytes| {
    ///         reserve(bytes).unwrap();
    ///         current_stats().unwrap().bytes_copied
    ///     };
    ///     assert_eq!(copied_for(20_000), 0);
    ///     assert_ne!(copied_for(60_000), 0);
    /// });
    /// coroutine.resume(());
    /// ```
    #[must_use]
    pub const fn slack_first(mut self, first: bool) -> Self {
        self.settings.slack_first = first;
        self
    }

    /// A name for reports.
    ///
    /// ```
    /// let coroutine = regrow::Builder::new().name("reader 7").spawn(|_: &regrow::Yielder<(), ()>, ()| ());
    /// assert_eq!(coroutine.name(), Some("reader 7"));
    /// ```
    #[must_use]
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Lets stacks grow by moving: [`Growth::Relocate`].
    ///
    /// A stack that runs into its guard page is copied to a slot twice the size. Every word in it and in the registers whose
    /// value lies in the old slot is rewritten. So a coroutine starts in one page and can grow without reserved address space.
    ///
    /// # Safety
    /// For every coroutine spawned from this builder: **no pointer into its stack may be kept outside it.** Not
    /// on the heap (a `Vec<&T>` of locals, a `Box<dyn Iterator>` over a local), in a static or thread-local, on
    /// another stack (a nested coroutine's closure that borrows a local), by another thread (`std::thread::scope`
    /// borrowing locals), or by the kernel (a buffer in a pending asynchronous operation). Inside the stack,
    /// pointers into it must be plain aligned words: not compressed, tagged beyond the slot, xored, or packed.
    ///
    /// A word that no map describes must not have to keep its value if it looks like a pointer into the used part
    /// of the stack. This includes words that hold several values: a small value stored over part of a dead pointer
    /// leaves a word that still looks like a pointer if it equals the part it replaces. No flag, small integer or
    /// ASCII character does, and moves do not change the lower 16 bits. For other values it is a matter of odds
    /// (README.md). [`Maps::Precise`] leaves nothing to odds, and `regrow::torture` shows what your code does.
    ///
    /// Optimising compilers keep parts of addresses across calls (`total - base`, `a - 4 * lo`).
    /// A move does not change these, so the result is wrong. No tool shows yet which compiled
    /// code is free of them, unless its compiler records its pointers ([`Maps::Precise`]).
    ///
    /// Allowed are references in frames and registers, pointers from one frame to another, and
    /// references passed down the stack, as in nearly all Rust code. A broken promise is noticed when
    /// the stale pointer is used: the old slot is inaccessible, and the process ends with a report.
    ///
    /// ```
    /// use regrow::{Builder, Growth, Yielder};
    ///
    /// // SAFETY: the closure keeps nothing on the heap.
    /// let builder = unsafe { Builder::new().relocating() };
    /// let mut coroutine = builder.spawn(|_: &Yielder<(), ()>, ()| {
    ///     let buffer = std::hint::black_box([1u8; 50_000]);
    ///     buffer.iter().map(|&byte| u32::from(byte)).sum::<u32>()
    /// });
    /// assert_eq!(coroutine.growth(), Growth::Relocate);
    /// assert_eq!(coroutine.resume(()).returned(), Some(50_000));
    /// ```
    #[must_use]
    pub unsafe fn relocating(mut self) -> Self {
        self.settings.growth = Growth::Relocate;
        self
    }

    /// Makes a coroutine that runs `f` when it is first resumed.
    ///
    /// # Panics
    /// Where [`try_spawn`](Self::try_spawn) returns an error.
    ///
    /// ```
    /// let mut coroutine = regrow::Builder::new().spawn(|_: &regrow::Yielder<u8, ()>, byte| byte + 1);
    /// assert_eq!(coroutine.resume(1).returned(), Some(2));
    /// ```
    #[track_caller]
    pub fn spawn<In, Out, Ret, F>(&self, f: F) -> Coroutine<In, Out, Ret>
    where
        F: FnOnce(&Yielder<In, Out>, In) -> Ret + 'static,
        In: 'static,
        Out: 'static,
        Ret: 'static,
    {
        match self.try_spawn(f) {
            Ok(coroutine) => coroutine,
            Err(error) => panic!("cannot create a coroutine: {error}"),
        }
    }

    /// As [`spawn`](Self::spawn), returning what went wrong.
    ///
    /// # Errors
    /// If a size is not a power of two or out of range, or if the system refuses memory, mappings, or the fault handler.
    ///
    /// ```
    /// let too_small = regrow::Builder::new().maximum(1024);
    /// let error = too_small.try_spawn(|_: &regrow::Yielder<(), ()>, ()| ()).unwrap_err();
    /// println!("{error}");
    /// ```
    pub fn try_spawn<In, Out, Ret, F>(&self, f: F) -> Result<Coroutine<In, Out, Ret>, Error>
    where
        F: FnOnce(&Yielder<In, Out>, In) -> Ret + 'static,
        In: 'static,
        Out: 'static,
        Ret: 'static,
    {
        make(f, self.checked()?, self.learn, &self.name)
    }

    /// Makes a coroutine that runs `function` when it is first resumed, with no frame of Rust code below it.
    ///
    /// This is for compilers. The stack holds only the frames of their code and of the functions that it calls. With
    /// [`Maps::Precise`] and maps for all of their code, it moves without guessing. `function` gets the coroutine's
    /// yielder, which it passes to functions that suspend, and the first resume's value. It returns the last value.
    ///
    /// ```
    /// use regrow::{Builder, CoroutineResult, Yielder};
    ///
    /// unsafe extern "C" fn compiled(yielder: &Yielder<usize, usize>, argument: usize) -> usize {
    ///     yielder.suspend(argument + 1) * 2
    /// }
    /// // SAFETY: the function does not unwind, and leaves nothing behind when it is dropped.
    /// let mut coroutine = unsafe { Builder::new().spawn_raw(compiled)? };
    /// assert_eq!(coroutine.resume(1), CoroutineResult::Yield(2));
    /// assert_eq!(coroutine.resume(20), CoroutineResult::Return(40));
    /// # Ok::<(), regrow::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`try_spawn`](Self::try_spawn).
    ///
    /// # Safety
    /// `function` does not unwind: a panic that leaves it ends the process. Dropping the suspended
    /// coroutine forgets its frames without unwinding them, so nothing outside may still refer to them.
    pub unsafe fn spawn_raw(&self, function: RawFunction) -> Result<Coroutine<usize, usize, usize>, Error> {
        let mut settings = self.checked()?;
        settings.raw = true;
        let record = take(settings)?;
        // SAFETY: the slot was taken for these settings, and a function pointer fits; asm/switch.S calls it.
        Ok(Coroutine::from_handle(unsafe {
            fill(record, function, switch::regrow_raw, settings, &self.name)
        }))
    }

    /// The settings, with both sizes.
    fn checked(&self) -> Result<Settings, Error> {
        let maximum = self.checked_maximum()?;
        if self.settings.growth == Growth::Relocate && self.settings.maps != Maps::Off {
            not_moved::record_unknown_code();
        }
        Ok(self.settings.with_sizes(self.first_size, maximum))
    }

    fn checked_maximum(&self) -> Result<usize, Error> {
        let default = match self.settings.growth {
            Growth::InPlace => DEFAULT_MAXIMUM_IN_PLACE,
            Growth::Relocate => DEFAULT_MAXIMUM_RELOCATE,
        };
        let first = self.first_size;
        let maximum = self.maximum.unwrap_or(default.max(first));
        for (what, bytes) in [("first_size", first), ("maximum", maximum)] {
            if !bytes.is_power_of_two() || !(MIN_SIZE..=MAX_SIZE).contains(&bytes) {
                return Err(Error::Size { what, bytes });
            }
        }
        if first > maximum {
            return Err(Error::FirstAboveMaximum { first, maximum });
        }
        Ok(maximum)
    }
}

impl<In, Out, Ret> Coroutine<In, Out, Ret> {
    /// Makes a coroutine that runs `f` when it is first resumed. Its stack of 2 KiB grows
    /// in place, up to [`DEFAULT_MAXIMUM_IN_PLACE`](crate::DEFAULT_MAXIMUM_IN_PLACE).
    ///
    /// # Panics
    /// Where [`try_new`](Self::try_new) returns an error.
    ///
    /// ```
    /// let mut coroutine = regrow::Coroutine::<u32, (), u32>::new(|_, input| input * 2);
    /// assert_eq!(coroutine.resume(21).returned(), Some(42));
    /// ```
    #[inline]
    #[track_caller]
    pub fn new<F>(f: F) -> Self
    where
        F: FnOnce(&Yielder<In, Out>, In) -> Ret + 'static,
        In: 'static,
        Out: 'static,
        Ret: 'static,
    {
        match Self::try_new(f) {
            Ok(coroutine) => coroutine,
            Err(error) => panic!("cannot create a coroutine: {error}"),
        }
    }

    /// As [`new`](Self::new), returning what went wrong.
    ///
    /// # Errors
    /// If the system refuses memory, mappings, or the fault handler.
    ///
    /// ```
    /// # fn main() -> Result<(), regrow::Error> {
    /// let mut coroutine = regrow::Coroutine::<(), (), u32>::try_new(|_, ()| 1)?;
    /// # let _ = coroutine.resume(());
    /// # Ok(())
    /// # }
    /// ```
    #[inline]
    pub fn try_new<F>(f: F) -> Result<Self, Error>
    where
        F: FnOnce(&Yielder<In, Out>, In) -> Ret + 'static,
        In: 'static,
        Out: 'static,
        Ret: 'static,
    {
        make(f, DEFAULT, true, &None)
    }
}

#[inline(always)]
fn make<In, Out, Ret, F>(
    f: F,
    settings: Settings,
    learn: bool,
    name: &Option<Arc<str>>,
) -> Result<Coroutine<In, Out, Ret>, Error>
where
    F: FnOnce(&Yielder<In, Out>, In) -> Ret + 'static,
{
    let site = site::here!(F);
    if settings.growth == Growth::Relocate
        && learn
        && let Some(learned) = site.learned()
    {
        return make_learned(f, settings, name, site, learned);
    }
    let record = take(settings)?;
    // SAFETY: the slot was taken above, for these settings.
    let (mut coroutine, scout) = unsafe {
        let scout = (*record).counted == SCOUT;
        let coroutine = fill_with_closure(record, f, settings, name);
        (*record).site = learn.then_some(site);
        (coroutine, scout)
    };
    let watched = match settings.shrink {
        Shrink::Off => false,
        Shrink::Eager => true,
        Shrink::Default => scout || learn && site.is_spiky(),
    };
    if settings.growth == Growth::InPlace && watched {
        // SAFETY: the slot is the coroutine's, and no other code knows it yet.
        unsafe { (*record).scout = scout };
        coroutine.watch();
    }
    Ok(coroutine)
}

/// A slot for a coroutine with these settings.
#[inline(always)]
fn take(settings: Settings) -> Result<*mut Record, Error> {
    let class = settings.first_class();
    stock::take(class, class.first_open(), thread::prepare)
}

/// As [`make`], at a site that has learned a start size.
#[cold]
#[inline(never)]
fn make_learned<In, Out, Ret, F>(
    f: F,
    settings: Settings,
    name: &Option<Arc<str>>,
    site: &'static Site,
    learned: usize,
) -> Result<Coroutine<In, Out, Ret>, Error>
where
    F: FnOnce(&Yielder<In, Out>, In) -> Ret + 'static,
{
    let first_size = learned.clamp(settings.first_size(), settings.maximum());
    let settings = settings.with_sizes(first_size, settings.maximum());
    let record = take(settings)?;
    // SAFETY: the slot was taken above, for these settings.
    unsafe {
        let coroutine = fill_with_closure(record, f, settings, name);
        (*record).site = Some(site);
        if site.count() {
            scouts::send(record);
        }
        Ok(coroutine)
    }
}

/// # Safety
/// As for [`fill`].
#[inline(always)]
unsafe fn fill_with_closure<In, Out, Ret, F>(
    record: *mut Record,
    f: F,
    settings: Settings,
    name: &Option<Arc<str>>,
) -> Coroutine<In, Out, Ret>
where
    F: FnOnce(&Yielder<In, Out>, In) -> Ret + 'static,
{
    // SAFETY: the slot was taken for these settings, and the entry function takes the closure that is put there. A closure too
    // large for the head goes to the heap, and the box, which fits, into the head.
    Coroutine::from_handle(unsafe {
        if size_of::<F>() <= INLINE_CLOSURE && align_of::<F>() <= 16 {
            fill(record, f, coroutine::entry::<In, Out, Ret, F>, settings, name)
        } else {
            let boxed = Box::new(f);
            let f = move |yielder: &Yielder<In, Out>, input: In| (*boxed)(yielder, input);
            let entry = entry_of(&f);
            fill(record, f, entry, settings, name)
        }
    })
}

/// The entry function of coroutines that run such a closure, whose type may have no name.
fn entry_of<In, Out, Ret, F>(_: &F) -> Entry
where
    F: FnOnce(&Yielder<In, Out>, In) -> Ret,
{
    coroutine::entry::<In, Out, Ret, F>
}

/// Writes the head of a slot that was just taken.
///
/// # Safety
/// The caller owns the slot of `record`, taken for these settings. `F` is what `entry`
/// expects to find, at most [`INLINE_CLOSURE`] bytes large and aligned to at most 16.
#[inline(always)]
unsafe fn fill<F>(
    record: *mut Record,
    f: F,
    entry: Entry,
    settings: Settings,
    name: &Option<Arc<str>>,
) -> Handle {
    let place = Record::closure(record, size_of::<F>());
    let base = Record::base(record, size_of::<F>());
    // SAFETY: record, closure and base lie in the head, do not overlap, and are accessible. Values
    // of an earlier owner are overwritten and need no drop: `release` has taken its name out.
    unsafe {
        Record::clear(record);
        (*record).settings = settings;
        (*record).watch = Watch::new(settings.shrink);
        (*record).base_offset = (Record::end(record) - base as usize) as u16;
        (*record).drop_closure = coroutine::drop_closure::<F>;
        (*record).highest = if settings.growth == Growth::InPlace { 0 } else { settings.first_size() };
        if name.is_some() {
            (*record).name.clone_from(name);
            (*record).tidy = true;
        }
        place.cast::<MaybeUninit<ManuallyDrop<F>>>().write(MaybeUninit::new(ManuallyDrop::new(f)));
        switch::prepare(base, record.cast(), entry)
    }
}
