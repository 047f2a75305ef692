//! Values that are read without a lock while they are replaced: src/map/published.rs.

use std::ptr::NonNull;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::Mutex;
use loom::thread;

use crate::check;

use crate::published::{Published, Retired};

/// Values 0, 1, ..., to be published in this order.
struct Model {
    published: Published<Value>,
    values: Vec<Value>,
    writer: Mutex<Writer>,
}

#[derive(Default)]
struct Writer {
    made: usize,
    freed: usize,
    retired: Vec<Retired<Value>>,
}

/// Whether it was freed. It is written then, so nobody may read it at the same time or later.
struct Value(UnsafeCell<bool>);

// SAFETY: loom sees who uses the cells; the pointers are to values that the model owns.
unsafe impl Send for Model {}
// SAFETY: as for `Send`: loom sees it.
unsafe impl Sync for Model {}

impl Value {
    fn read(&self) {
        // SAFETY: the pointer is valid for this call, in which loom sees that nobody writes it.
        assert!(!self.0.with(|freed| unsafe { *freed }), "it was freed");
    }

    fn free(&self) {
        // SAFETY: the pointer is valid for this call, in which loom sees that nobody else uses it.
        assert!(!self.0.with_mut(|freed| unsafe { freed.replace(true) }), "freed twice");
    }
}

impl Model {
    /// The first value is published.
    fn new(values: usize) -> Arc<Self> {
        let values = (0..values).map(|_| Value(UnsafeCell::new(false))).collect();
        let model = Self { published: Published::new(), values, writer: Mutex::default() };
        model.replace();
        Arc::new(model)
    }

    /// Publishes the next value.
    fn replace(&self) {
        let writer = &mut *self.writer.lock().unwrap();
        let new = NonNull::from(&self.values[writer.made]);
        writer.made += 1;
        // SAFETY: the lock is held. The model keeps its values and frees none of them elsewhere.
        unsafe {
            self.published.replace(new, &mut writer.retired, |value| {
                value.as_ref().free();
                writer.freed += 1;
            });
        }
    }

    /// Reads what is current, and reads it again after `meanwhile`.
    fn read(&self, meanwhile: impl FnOnce()) {
        let reading = self.published.read();
        let value = reading.value.unwrap();
        value.read();
        meanwhile();
        value.read();
    }
}

/// Fails if a reader loads `current` before it counts itself in, or leaves with `Relaxed`; if its load is not `SeqCst`,
/// or nothing of the writer's is.
#[test]
fn what_a_reader_has_is_not_freed_while_a_writer_replaces_it_twice() {
    check(|| {
        let model = Model::new(3);
        let reader = {
            let model = model.clone();
            thread::spawn(move || model.read(|| ()))
        };
        model.replace();
        model.replace();
        reader.join().unwrap();
    });
}

/// Fails after the same changes; if a writer looks at the counters before it stores the new value; and if it frees what it has
/// replaced when one of the counters was at zero.
#[test]
fn what_two_readers_have_is_not_freed_by_two_writers() {
    check(|| {
        let model = Model::new(3);
        let reader = {
            let model = model.clone();
            thread::spawn(move || model.read(|| ()))
        };
        let writer = {
            let model = model.clone();
            thread::spawn(move || model.replace())
        };
        // A reader on top of a writer, like a fault handler.
        model.read(|| model.replace());
        reader.join().unwrap();
        writer.join().unwrap();
    });
}

/// Fails if a writer frees nothing, or looks at one counter only.
#[test]
fn once_no_reader_is_left_the_next_writer_frees_all() {
    check(|| {
        let model = Model::new(3);
        let reader = {
            let model = model.clone();
            thread::spawn(move || model.read(|| ()))
        };
        model.replace();
        reader.join().unwrap();
        model.replace();
        assert_eq!(model.writer.lock().unwrap().freed, 2);
    });
}
