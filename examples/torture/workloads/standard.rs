//! The standard library.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, LinkedList, VecDeque};
use std::fmt::Write as _;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, RwLock, mpsc};

use super::Workload;

pub const WORKLOADS: &[Workload] = &[
    Workload::clean("formatting", formatting),
    Workload::clean("strings", strings),
    Workload::clean("sorting", sorting),
    Workload::clean("hash-map", hash_map),
    Workload::clean("btree-map", btree_map),
    Workload::clean("queues", queues),
    Workload::clean("rc", rc),
    Workload::clean("iterators", iterators),
    Workload::clean("closures", closures),
    Workload::clean("channels", channels),
    Workload::clean("threads", threads),
    Workload::clean("files", files),
    Workload::clean("processes", processes),
    Workload::clean("panics", panics),
    Workload::clean("backtraces", backtraces),
    Workload::clean("recursion", recursion),
];

fn formatting() -> String {
    let mut out = String::new();
    for number in [0.0f64, 1.5, -2.25e-7, 6.02e23, f64::NAN, f64::MAX] {
        write!(out, "{number} {number:?} {number:10.3e} {number:+09.2}|").unwrap();
    }
    for number in [i128::MIN, -1, 0, 255, i128::MAX] {
        write!(out, "{number} {number:#x} {number:#b} {number:>45}|").unwrap();
    }
    write!(out, "{:#?} {:?} {:^20}", Some(("a", [1, 2], 'c')), "quote\"\n\u{301}", "centre").unwrap();
    out
}

fn strings() -> String {
    let text = "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg";
    let words: Vec<String> = text.split_whitespace().map(str::to_uppercase).collect();
    let reversed: String = text.chars().rev().collect();
    let replaced = text.replace("en", "EN").to_lowercase();
    let numbers: Vec<f64> = "1.5;2e3;-0.25".split(';').map(|part| part.parse().unwrap()).collect();
    let lossy = String::from_utf8_lossy(b"good \xff bad \xc3\xa4");
    let cow: Cow<'_, str> =
        if text.contains("Zwerg") { Cow::Owned(text.trim_matches('F').into()) } else { "".into() };
    format!("{words:?} {reversed} {replaced} {numbers:?} {lossy} {cow} {:?}", text.char_indices().nth(10))
}

/// Numbers in no order, the same each time.
fn scrambled(count: usize) -> Vec<u32> {
    let mut state = 12345u32;
    let step = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    (0..count).map(step).collect()
}

fn sorting() -> String {
    let mut stable = scrambled(90);
    let mut unstable = stable.clone();
    let mut strings: Vec<_> = stable.iter().map(|number| format!("{number:x}")).collect();
    stable.sort();
    unstable.sort_unstable_by(|a, b| b.cmp(a));
    strings.sort_by_key(|text| std::cmp::Reverse(text.len()));
    let mut selected = scrambled(100);
    selected.select_nth_unstable(50);
    format!(
        "{stable:?} {unstable:?} {} {} {:?}",
        strings.join(","),
        selected[50],
        stable.binary_search(&stable[70])
    )
}

fn hash_map() -> String {
    let mut counts: HashMap<String, Vec<usize>> = HashMap::new();
    for (index, number) in scrambled(70).into_iter().enumerate() {
        counts.entry(format!("key {}", number % 40)).or_default().push(index);
    }
    counts.retain(|_, indices| indices.len() > 2);
    let set: HashSet<u32> = scrambled(60).into_iter().map(|number| number % 64).collect();
    let mut entries: Vec<_> = counts.into_iter().collect();
    entries.sort();
    format!("{entries:?} {}", set.len())
}

fn btree_map() -> String {
    let mut map: BTreeMap<u32, String> =
        scrambled(60).into_iter().map(|n| (n % 500, n.to_string())).collect();
    let upper = map.split_off(&250);
    map.retain(|key, _| key % 3 != 0);
    let range: Vec<_> = upper.range(300..400).map(|(key, value)| format!("{key}={value}")).collect();
    format!("{map:?} {range:?} {:?}", upper.first_key_value())
}

fn queues() -> String {
    let mut heap: BinaryHeap<_> = scrambled(120).into_iter().collect();
    let mut ring: VecDeque<_> = scrambled(60).into();
    ring.rotate_left(17);
    ring.extend(std::iter::from_fn(|| heap.pop()).take(50));
    let mut list: LinkedList<_> = ring.iter().filter(|number| *number % 2 == 0).collect();
    let tail = list.split_off(list.len() / 2);
    format!("{ring:?} {list:?} {tail:?}")
}

struct Node {
    name: String,
    parent: RefCell<Weak<Node>>,
    children: RefCell<Vec<Rc<Node>>>,
}

fn rc() -> String {
    fn grow(depth: u32, name: &str) -> Rc<Node> {
        let node = Rc::new(Node {
            name: name.to_string(),
            parent: RefCell::default(),
            children: RefCell::default(),
        });
        for child in 0..if depth == 0 { 0 } else { 3 } {
            let child = grow(depth - 1, &format!("{name}.{child}"));
            *child.parent.borrow_mut() = Rc::downgrade(&node);
            node.children.borrow_mut().push(child);
        }
        node
    }
    fn path(node: &Node) -> String {
        match node.parent.borrow().upgrade() {
            Some(parent) => format!("{} < {}", node.name, path(&parent)),
            None => node.name.clone(),
        }
    }
    let root = grow(3, "root");
    let leaf = root.children.borrow()[1].children.borrow()[2].children.borrow()[0].clone();
    format!("{} {} {}", path(&leaf), Rc::strong_count(&leaf), Rc::weak_count(&root))
}

fn iterators() -> String {
    let numbers = scrambled(64);
    let local = [3u32, 1, 4, 1, 5, 9, 2, 6];
    let zipped: u64 =
        numbers.iter().zip(local.iter().cycle()).map(|(a, b)| u64::from(*a) * u64::from(*b)).sum();
    let chunks: Vec<u32> = numbers.chunks(7).flat_map(|chunk| chunk.iter().copied().max()).collect();
    let folded = local
        .iter()
        .rev()
        .skip_while(|n| **n > 4)
        .step_by(2)
        .fold(String::new(), |text, n| format!("{text}{n}"));
    let windows = numbers.windows(3).filter(|w| w[0] < w[1] && w[1] < w[2]).count();
    let floats: f64 = numbers.iter().map(|n| f64::from(*n).sqrt().sin()).sum();
    let (even, odd): (Vec<u32>, Vec<u32>) = numbers.iter().partition(|n| *n % 2 == 0);
    format!("{zipped} {chunks:?} {folded} {windows} {floats} {} {}", even.len(), odd.len())
}

fn closures() -> String {
    let mut log = Vec::new();
    let mut counter = 0;
    let mut note = |what: &dyn std::fmt::Display| {
        counter += 1;
        log.push(format!("{counter}: {what}"));
    };
    let boxed: Vec<Box<dyn Fn(u32) -> u32>> =
        (1..6u32).map(|factor| Box::new(move |n| n * factor) as Box<dyn Fn(u32) -> u32>).collect();
    for (index, f) in boxed.iter().enumerate() {
        note(&f(index as u32 + 10));
    }
    fn twice(f: &mut dyn FnMut(&dyn std::fmt::Display)) {
        f(&"first");
        f(&2.5);
    }
    twice(&mut note);
    log.join(", ")
}

fn channels() -> String {
    let (sender, receiver) = mpsc::channel();
    let (bounded, from_bounded) = mpsc::sync_channel(64);
    for number in 0..50 {
        sender.send(format!("message {number}")).unwrap();
        bounded.send(number * number).unwrap();
    }
    drop((sender, bounded));
    let texts: Vec<String> = receiver.iter().collect();
    let numbers: u32 = from_bounded.iter().sum();
    format!("{} {numbers}", texts.join(" "))
}

/// libc blocks all signals while it creates a thread or a process, SIGSEGV with them: a stack that overflows there
/// cannot grow, the process dies. So the room is made before.
#[inline(never)]
fn make_room() {
    black_box([0u8; 16 << 10]);
}

fn threads() -> String {
    make_room();
    let shared = Arc::new((Mutex::new(Vec::new()), Condvar::new(), RwLock::new(7), AtomicUsize::new(0)));
    let workers: Vec<_> = (0..3)
        .map(|worker| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                shared.3.fetch_add(worker, Ordering::SeqCst);
                shared.0.lock().unwrap().push(worker * *shared.2.read().unwrap());
                shared.1.notify_one();
                format!("worker {worker}")
            })
        })
        .collect();
    let (list, changed, ..) = &*shared;
    let guard = changed.wait_while(list.lock().unwrap(), |list| list.len() < 3).unwrap();
    let mut done = guard.clone();
    drop(guard);
    done.sort_unstable();
    let names: Vec<_> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
    static ONCE: OnceLock<String> = OnceLock::new();
    format!(
        "{done:?} {names:?} {} {}",
        shared.3.load(Ordering::SeqCst),
        ONCE.get_or_init(|| "once".to_string())
    )
}

fn files() -> String {
    let name = format!("regrow-torture-{}-{:?}", std::process::id(), std::thread::current().id());
    let folder = std::env::temp_dir().join(name.replace(['(', ')'], "-"));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("file.txt");
    let mut file =
        std::fs::OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
    for line in 0..30 {
        writeln!(file, "line {line} of a file").unwrap();
    }
    file.seek(SeekFrom::Start(10)).unwrap();
    let mut middle = [0; 100];
    file.read_exact(&mut middle).unwrap();
    file.rewind().unwrap();
    let longest = BufReader::new(&file).lines().map(|line| line.unwrap().len()).max();
    let missing = std::fs::read(folder.join("missing")).unwrap_err().kind();
    let entries: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let bytes = std::fs::metadata(&path).unwrap().len();
    std::fs::remove_dir_all(&folder).unwrap();
    format!("{} {longest:?} {missing:?} {entries:?} {bytes}", String::from_utf8_lossy(&middle))
}

fn processes() -> String {
    make_room();
    let output =
        Command::new("echo").args(["spoken", "by", "a process"]).env("SOME", "thing").output().unwrap();
    let mut cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    cat.stdin.take().unwrap().write_all(b"through a pipe and back").unwrap();
    let back = cat.wait_with_output().unwrap();
    let missing = Command::new("/no/such/program").status().unwrap_err().kind();
    format!("{output:?} {} {} {missing:?}", String::from_utf8_lossy(&back.stdout), back.status)
}

struct Noted(Rc<RefCell<Vec<u32>>>, u32);

impl Drop for Noted {
    fn drop(&mut self) {
        self.0.borrow_mut().push(self.1);
    }
}

fn panics() -> String {
    #[inline(never)]
    fn dive(depth: u32, noted: &Rc<RefCell<Vec<u32>>>) -> u32 {
        let _noted = Noted(Rc::clone(noted), depth);
        match depth {
            0 => panic!("at the bottom, {} dropped", noted.borrow().len()),
            _ => dive(depth - 1, noted) + depth,
        }
    }
    let noted = Rc::default();
    let mut messages = Vec::new();
    for depth in 0..3 {
        let payload = catch_unwind(AssertUnwindSafe(|| dive(depth, &noted))).unwrap_err();
        messages.push(payload.downcast_ref::<String>().cloned());
    }
    format!("{messages:?} {:?}", noted.borrow())
}

fn backtraces() -> String {
    #[inline(never)]
    fn taken_here() -> String {
        std::backtrace::Backtrace::force_capture().to_string()
    }
    let text = taken_here();
    let named = text.contains("taken_here") && text.contains("backtraces");
    format!("named: {named}")
}

fn recursion() -> String {
    fn ackermann(m: u32, n: u32) -> u32 {
        match (m, n) {
            (0, n) => n + 1,
            (m, 0) => ackermann(m - 1, 1),
            (m, n) => ackermann(m - 1, ackermann(m, n - 1)),
        }
    }
    fn queens(row: usize, columns: &mut [usize; 6], found: &mut u32) {
        if row == columns.len() {
            *found += 1;
            return;
        }
        for column in 0..columns.len() {
            let safe =
                |(other, &taken): (usize, &usize)| taken != column && taken.abs_diff(column) != row - other;
            if columns[..row].iter().enumerate().all(safe) {
                columns[row] = column;
                queens(row + 1, columns, found);
            }
        }
    }
    let mut found = 0;
    queens(0, &mut [0; 6], &mut found);
    format!("{} {found}", ackermann(2, 9))
}
