//! The systems of coroutines that are compared, behind one interface, so that each shape is written once.
//!
//! The interface is inlined away: what is measured is each system's own public interface.

use std::cell::UnsafeCell;
use std::num::NonZeroUsize;
use std::rc::Rc;

use corosensei::stack::{DefaultStack, Stack, StackPointer};
use regrow::{Coroutine, CoroutineResult};

/// A stackful coroutine system. Values of one type go both ways, from the first resume to the last suspend.
pub trait System: 'static {
    type Coroutine<V: 'static>;
    type Yielder<'a, V: 'static>: Copy;
    /// Stacks of coroutines that have ended are used for new ones.
    const KEEPS_STACKS: bool = false;

    fn spawn<V, F>(&mut self, f: F) -> Self::Coroutine<V>
    where
        V: Default + 'static,
        F: FnOnce(Self::Yielder<'_, V>, V) + 'static;
    fn resume<V: Default + 'static>(coroutine: &mut Self::Coroutine<V>, value: V) -> V;
    fn suspend<V: 'static>(yielder: Self::Yielder<'_, V>, value: V) -> V;
    /// Where the system has such a thing.
    fn prefetch<V: 'static>(_: &Self::Coroutine<V>) {}
}

/// This crate, its default coroutines: they grow in place.
pub struct Regrow;

impl System for Regrow {
    type Coroutine<V: 'static> = Coroutine<V, V, ()>;
    type Yielder<'a, V: 'static> = &'a regrow::Yielder<V, V>;
    const KEEPS_STACKS: bool = true;

    #[inline(always)]
    fn spawn<V, F>(&mut self, f: F) -> Self::Coroutine<V>
    where
        V: Default + 'static,
        F: FnOnce(Self::Yielder<'_, V>, V) + 'static,
    {
        Coroutine::new(f)
    }

    #[inline(always)]
    fn resume<V: Default + 'static>(coroutine: &mut Self::Coroutine<V>, value: V) -> V {
        match coroutine.resume(value) {
            CoroutineResult::Yield(value) => value,
            CoroutineResult::Return(()) => V::default(),
        }
    }

    #[inline(always)]
    fn suspend<V: 'static>(yielder: Self::Yielder<'_, V>, value: V) -> V {
        yielder.suspend(value)
    }

    #[inline(always)]
    fn prefetch<V: 'static>(coroutine: &Self::Coroutine<V>) {
        coroutine.prefetch();
    }
}

/// This crate, coroutines whose stacks move.
pub struct Relocating(pub regrow::Builder);

impl Relocating {
    pub fn new() -> Self {
        // SAFETY: the shapes keep no pointer to a coroutine's stack outside it.
        Self(unsafe { regrow::Builder::new().relocating() })
    }
}

impl System for Relocating {
    type Coroutine<V: 'static> = Coroutine<V, V, ()>;
    type Yielder<'a, V: 'static> = &'a regrow::Yielder<V, V>;
    const KEEPS_STACKS: bool = true;

    #[inline(always)]
    fn spawn<V, F>(&mut self, f: F) -> Self::Coroutine<V>
    where
        V: Default + 'static,
        F: FnOnce(Self::Yielder<'_, V>, V) + 'static,
    {
        self.0.spawn(f)
    }

    #[inline(always)]
    fn resume<V: Default + 'static>(coroutine: &mut Self::Coroutine<V>, value: V) -> V {
        Regrow::resume(coroutine, value)
    }

    #[inline(always)]
    fn suspend<V: 'static>(yielder: Self::Yielder<'_, V>, value: V) -> V {
        Regrow::suspend(yielder, value)
    }

    #[inline(always)]
    fn prefetch<V: 'static>(coroutine: &Self::Coroutine<V>) {
        coroutine.prefetch();
    }
}

/// corosensei on stacks from a source of one's own.
pub struct Corosensei<S, M>(pub M, std::marker::PhantomData<S>);

impl<S, M: FnMut() -> S> Corosensei<S, M> {
    pub fn on(stacks: M) -> Self {
        Self(stacks, std::marker::PhantomData)
    }
}

/// corosensei as it comes: a mapping and a guard page for each stack.
pub fn corosensei() -> Corosensei<DefaultStack, impl FnMut() -> DefaultStack> {
    Corosensei::on(|| DefaultStack::new(16 << 10).expect("fewer stacks than vm.max_map_count allows"))
}

impl<S: Stack + 'static, M: FnMut() -> S + 'static> System for Corosensei<S, M> {
    type Coroutine<V: 'static> = corosensei::Coroutine<V, V, (), S>;
    type Yielder<'a, V: 'static> = &'a corosensei::Yielder<V, V>;

    #[inline(always)]
    fn spawn<V, F>(&mut self, f: F) -> Self::Coroutine<V>
    where
        V: Default + 'static,
        F: FnOnce(Self::Yielder<'_, V>, V) + 'static,
    {
        corosensei::Coroutine::with_stack((self.0)(), f)
    }

    #[inline(always)]
    fn resume<V: Default + 'static>(coroutine: &mut Self::Coroutine<V>, value: V) -> V {
        match coroutine.resume(value) {
            corosensei::CoroutineResult::Yield(value) => value,
            corosensei::CoroutineResult::Return(()) => V::default(),
        }
    }

    #[inline(always)]
    fn suspend<V: 'static>(yielder: Self::Yielder<'_, V>, value: V) -> V {
        yielder.suspend(value)
    }
}

/// One mapping that many stacks of a page are cut from, two pages apart and without guards: what corosensei needs to
/// have 100,000 of them.
pub struct Region {
    start: usize,
    bytes: usize,
}

impl Region {
    const STACK: usize = 8192;

    fn new(stacks: usize) -> Self {
        let bytes = stacks * Self::STACK;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: the mapping just made. Without huge pages, as the stacks of all others.
        unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) };
        Self { start: start as usize, bytes }
    }

    /// corosensei on stacks of a region for `count`: all ending at the end of a page, or spread over the cache's sets.
    pub fn corosensei(count: usize, coloured: bool) -> Corosensei<Piece, impl FnMut() -> Piece> {
        let region = Rc::new(Self::new(count));
        let mut next = 0;
        Corosensei::on(move || {
            assert!(next < count);
            let colour = if coloured { (next as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 } else { 0 };
            let end = region.start + (next + 1) * Self::STACK - ((colour as usize * 24) >> 32) * 64;
            next += 1;
            Piece { end, region: Rc::clone(&region) }
        })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; every piece keeps the region alive.
        unsafe { libc::munmap(self.start as *mut _, self.bytes) };
    }
}

/// A stack of a [`Region`].
pub struct Piece {
    end: usize,
    #[expect(dead_code, reason = "keeps it mapped")]
    region: Rc<Region>,
}

// SAFETY: the range is mapped as long as the piece lives, writable, and no other piece's. It has no guard page: the
// shapes that use it stay far within it.
unsafe impl Stack for Piece {
    fn base(&self) -> StackPointer {
        NonZeroUsize::new(self.end).expect("not at address 0")
    }

    fn limit(&self) -> StackPointer {
        NonZeroUsize::new(self.end - Region::STACK / 2).expect("not at address 0")
    }
}

/// The `generator` crate.
pub struct Generator;

/// A `Scope`, which is not `Copy` and has a lifetime of its own.
pub struct GeneratorYielder<V: 'static>(*const UnsafeCell<generator::Scope<'static, 'static, V, V>>);

impl<V> Clone for GeneratorYielder<V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for GeneratorYielder<V> {}

impl System for Generator {
    type Coroutine<V: 'static> = generator::LocalGenerator<'static, V, V>;
    type Yielder<'a, V: 'static> = GeneratorYielder<V>;

    #[inline(always)]
    fn spawn<V, F>(&mut self, f: F) -> Self::Coroutine<V>
    where
        V: Default + 'static,
        F: FnOnce(Self::Yielder<'_, V>, V) + 'static,
    {
        generator::Gn::new_scoped_opt_local(0x800, move |mut scope| {
            let first = scope.get_yield().expect("it is always resumed with a value");
            f(GeneratorYielder((&raw mut scope).cast()), first);
            V::default()
        })
    }

    #[inline(always)]
    fn resume<V: Default + 'static>(coroutine: &mut Self::Coroutine<V>, value: V) -> V {
        coroutine.send(value)
    }

    #[inline(always)]
    fn suspend<V: 'static>(yielder: Self::Yielder<'_, V>, value: V) -> V {
        // SAFETY: the scope lives as long as the closure runs, which is the only one that has yielders, and makes one
        // reference of them at a time.
        let scope = unsafe { &mut *UnsafeCell::raw_get(yielder.0) };
        scope.yield_(value).expect("it is always resumed with a value")
    }
}
