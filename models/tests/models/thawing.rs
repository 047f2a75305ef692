//! Stacks frozen in place, touched and thawed: src/stack/custody.rs and src/freeze/touched.rs.

use std::cell::UnsafeCell as StdUnsafeCell;
use std::convert::Infallible;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::Mutex;
use loom::thread;

use crate::check;

use crate::block::Frozen;
use crate::custody::{Block, Custody};
use crate::touched::Touched;

/// What is on the stack.
const BYTES: u32 = 0x1234;
/// Which of its owner's it is.
const ENTRY: u32 = 7;

/// A stack, its block, and the list that its owner drops.
struct Model {
    custody: Custody,
    /// Whether the stack is accessible. Locked by whoever uses the stack: the kernel takes pages from all threads at once.
    accessible: Mutex<bool>,
    stack: UnsafeCell<u32>,
    block: StdUnsafeCell<Frozen>,
    list: Box<StdUnsafeCell<ManuallyDrop<Touched>>>,
}

// SAFETY: loom sees who uses stack, block and list.
unsafe impl Send for Model {}
// SAFETY: as for `Send`: loom sees it.
unsafe impl Sync for Model {}

impl Model {
    /// The stack is not frozen, and the list empty.
    fn new() -> Arc<Self> {
        let list = Box::new(StdUnsafeCell::new(ManuallyDrop::new(Touched::new())));
        let model = Self {
            custody: Custody::default(),
            accessible: Mutex::new(true),
            stack: UnsafeCell::new(BYTES),
            block: StdUnsafeCell::new(Frozen::new(list.get().cast(), ENTRY)),
            list,
        };
        assert!(!model.custody.is_frozen() && model.list().is_empty());
        Arc::new(model)
    }

    fn frozen() -> Arc<Self> {
        let model = Self::new();
        model.freeze();
        model
    }

    fn list(&self) -> &Touched {
        // SAFETY: only the owner drops the list; loom sees who uses it afterwards.
        unsafe { &*self.list.get() }
    }

    fn block(&self) -> NonNull<Frozen> {
        NonNull::new(self.block.get()).unwrap()
    }

    /// Writes the stack while nobody has access to it.
    fn write_stack(&self, bytes: u32) {
        // SAFETY: the pointer is valid for this call, in which loom sees that nobody else uses it.
        self.stack.with_mut(|stack| unsafe { *stack = bytes });
    }

    /// As `in_place::freeze`.
    fn freeze(&self) {
        self.custody.begin();
        *self.accessible.lock().unwrap() = false;
        self.write_stack(0);
        self.custody.put(Some(self.block().cast()));
    }

    /// As `in_place::bring_back`.
    fn bring_back(&self) -> Result<(), Infallible> {
        self.write_stack(BYTES);
        *self.accessible.lock().unwrap() = true;
        Ok(())
    }

    /// As `in_place::peek`, for whoever changes the block.
    fn peek(&self) {
        if let Some(block) = self.custody.take() {
            // SAFETY: the model keeps its block. loom sees who else uses it.
            unsafe { block.cast::<Frozen>().as_mut() }.write();
            self.custody.put(Some(block));
        }
    }

    /// As `in_place::thaw`, for the owner: true if it was this that thawed the stack.
    fn thaw(&self) -> bool {
        let mut left = None;
        let Ok(()) = self.custody.thaw(|_| self.bring_back(), |block| left = Some(block));
        // SAFETY: the block was taken by this thread, which is its only user.
        left.map(|block: NonNull<Block>| unsafe { Frozen::free(block.cast()) }).is_some()
    }

    /// As `in_place::serve`, in the fault handler.
    fn serve(&self) {
        if self.custody.is_frozen_or_busy() {
            // SAFETY: the block is this thread's; that the list lives is what is tried.
            let Ok(()) =
                self.custody.thaw(|_| self.bring_back(), |block| unsafe { Touched::leave(block.cast()) });
        }
    }

    /// Any code, which has a pointer into the stack and reads there.
    fn touch(&self) {
        loop {
            {
                let accessible = self.accessible.lock().unwrap();
                if *accessible {
                    // SAFETY: the pointer is valid for this call, in which loom sees that nobody writes it.
                    return assert_eq!(self.stack.with(|stack| unsafe { *stack }), BYTES);
                }
            }
            self.serve();
        }
    }

    /// The owner goes, since nothing of its is frozen any more.
    fn drop_list(&self) {
        // SAFETY: the list is the owner's; loom sees who uses it at the same time or later.
        unsafe { ManuallyDrop::drop(&mut *self.list.get()) };
    }

    fn was_freed(&self) -> bool {
        // SAFETY: the threads that used the block have ended, or said that they do no longer.
        unsafe { self.block().as_ref() }.was_freed()
    }
}

fn spawn(model: &Arc<Model>, work: impl FnOnce(&Model) + 'static) -> thread::JoinHandle<()> {
    let model = model.clone();
    thread::spawn(move || work(&model))
}

// No more than two threads wait in one model: loom lets two that wait give way to each other for ever.

/// Fails if `thaw` publishes before it leaves the block, and if `put` stores or `settled` loads with `Relaxed`.
#[test]
fn the_owner_of_a_stack_that_is_not_frozen_may_drop_the_list() {
    check(|| {
        let model = Model::frozen();
        let toucher = spawn(&model, Model::touch);
        let by_owner = model.thaw();
        let entries: Vec<_> = model.list().entries().collect();
        assert_eq!(entries, if by_owner { vec![] } else { vec![ENTRY] });
        model.drop_list();
        assert!(model.was_freed());
        toucher.join().unwrap();
    });
}

/// Fails if `is_frozen` does not wait while the stack is `BUSY`.
#[test]
fn a_stack_whose_block_is_on_the_list_is_seen_as_thawed() {
    check(|| {
        let model = Model::frozen();
        let toucher = spawn(&model, Model::touch);
        for entry in model.list().take() {
            assert_eq!(entry, ENTRY);
            assert!(!model.custody.is_frozen());
        }
        toucher.join().unwrap();
        assert!(!model.custody.is_frozen());
        model.drop_list();
        assert!(model.was_freed());
    });
}

/// Fails if `take` looks and then stores without an exchange.
#[test]
fn a_stack_that_two_threads_touch_is_thawed_once() {
    check(|| {
        let model = Model::frozen();
        let toucher = spawn(&model, Model::touch);
        model.touch();
        // Whoever touched it sees it as it was; nobody waits for the others.
        assert!(model.custody.is_frozen_or_busy() || !model.list().is_empty());
        toucher.join().unwrap();
        assert_eq!(model.list().entries().count(), 1);
        model.drop_list();
        assert!(model.was_freed());
    });
}

/// Fails if `begin` leaves the word as it is, if `take` looks and then stores without an exchange, and if `put` comes before
/// the bytes are back. (Then whoever touches the stack may fault for ever, of which loom says "maximum number of branches".)
#[test]
fn whoever_touches_a_stack_while_it_freezes_finds_its_bytes() {
    check(|| {
        let model = Model::new();
        let toucher = spawn(&model, Model::touch);
        model.freeze();
        model.peek();
        model.thaw();
        model.touch();
        model.drop_list();
        assert!(model.was_freed());
        toucher.join().unwrap();
    });
}

/// Fails if `leave` writes the link after its exchange, exchanges with `Relaxed` or does not try again, and if `take` of the
/// list is with `Relaxed` or without an exchange.
#[test]
fn blocks_that_are_left_at_the_same_time_are_all_on_the_list() {
    check(|| {
        let list = Arc::new(Touched::new());
        assert!(list.is_empty());
        let leave = |entry| {
            let list = list.clone();
            thread::spawn(move || {
                let block = Box::into_raw(Box::new(Frozen::new(&raw const *list, entry)));
                // SAFETY: the block is new. The list lives until the last of its users is gone.
                unsafe { Touched::leave(NonNull::new(block).unwrap()) };
            })
        };
        let threads = [leave(1), leave(2)];
        let mut entries: Vec<_> = list.take().collect();
        for thread in threads {
            thread.join().unwrap();
        }
        entries.extend(list.take());
        entries.sort_unstable();
        assert_eq!(entries, [1, 2]);
    });
}
