//! Code that keeps pointers to its stack elsewhere: it may not run on a stack that moves, and torture has to say so.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Workload;

pub const WORKLOADS: &[Workload] = &[
    Workload::unclean("vec-of-references", vec_of_references, "sum_of"),
    Workload::unclean("boxed-iterator", boxed_iterator, "sum_of_boxed"),
    Workload::unclean("thread-local-pointer", thread_local_pointer, "read_back"),
    Workload::unclean("scoped-threads", scoped_threads, "scoped_threads"),
    Workload::unclean("regex-compile", regex_compile, "regex_syntax"),
    Workload::unclean("sqlite", sqlite, "sqlite3"),
];

/// On the heap: the elements of a vector.
fn vec_of_references() -> String {
    #[inline(never)]
    fn sum_of(references: &[&u32]) -> u32 {
        references.iter().copied().sum()
    }
    let numbers = black_box([1u32, 2, 3, 4]);
    let references: Vec<&u32> = black_box(numbers.iter().filter(|n| **n > 1).collect());
    sum_of(&references).to_string()
}

/// On the heap: an iterator's ends.
fn boxed_iterator() -> String {
    #[inline(never)]
    fn sum_of_boxed(iterator: Box<dyn Iterator<Item = &u32> + '_>) -> u32 {
        iterator.sum()
    }
    let numbers = black_box([1u32, 2, 3, 4]);
    sum_of_boxed(Box::new(numbers.iter().rev())).to_string()
}

/// In a thread-local variable, as scoped context libraries do.
fn thread_local_pointer() -> String {
    thread_local! {
        static CONTEXT: std::cell::Cell<*const u32> = const { std::cell::Cell::new(std::ptr::null()) };
    }
    #[inline(never)]
    fn read_back() -> u32 {
        // SAFETY: set below to a local that is alive during this call.
        unsafe { black_box(*CONTEXT.get()) }
    }
    let local = black_box(7);
    CONTEXT.set(&local);
    read_back().to_string()
}

/// With another thread: what its closure borrows.
fn scoped_threads() -> String {
    #[inline(never)]
    fn in_a_scoped_thread(local: &AtomicU32) {
        std::thread::sleep(std::time::Duration::from_millis(20));
        local.fetch_add(1, Ordering::Relaxed);
    }
    black_box([0u8; 16 << 10]); // as for `threads`
    let local = AtomicU32::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| in_a_scoped_thread(&local));
    });
    local.into_inner().to_string()
}

/// In a crate: regex-syntax visits a syntax tree whose root is a local with a `Vec` of references for a stack.
fn regex_compile() -> String {
    format!("{:?}", regex::Regex::new(r"(?<year>\d{4})-(?<month>\d{2})").unwrap())
}

/// In C: a parser object on the heap that is told of one on the stack.
fn sqlite() -> String {
    let connection = rusqlite::Connection::open_in_memory().unwrap();
    connection.execute_batch("CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT)").unwrap();
    for (a, b) in [(1, "one"), (2, "two"), (3, "three")] {
        connection.execute("INSERT INTO t VALUES (?1, ?2)", (a, b)).unwrap();
    }
    let mut statement = connection.prepare("SELECT a, b FROM t WHERE b LIKE 't%' ORDER BY b").unwrap();
    let rows = statement.query_map([], |row| Ok((row.get::<_, u32>(0)?, row.get::<_, String>(1)?))).unwrap();
    format!("{:?}", rows.map(Result::unwrap).collect::<Vec<_>>())
}
