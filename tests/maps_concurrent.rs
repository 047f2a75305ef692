//! Maps are added and removed while others read, in signal handlers too: what is found is always whole, and what
//! stays registered is always found.

use std::ffi::c_int;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use regrow::map::{Cfa, FrameMap, Place, Register, Rules, StackMaps, Verdict};

mod support;
use support::random;

/// Code of one module, and where the modules of the test lie. Odd ones overlap with their neighbours' spans.
const MODULE: usize = 0x1_0000;
const FUNCTIONS: usize = 20;
const MODULES: usize = 64;
/// The module that stays.
const LASTING: usize = MODULES;

fn start(module: usize, function: usize) -> usize {
    0x7000_0000 + module * MODULE + function * 0xa00
}

/// A size that says which function a map is of.
fn size(module: usize, function: usize) -> i32 {
    ((module * FUNCTIONS + function + 1) * 8) as i32
}

fn module(number: usize) -> Vec<FrameMap> {
    let map = |function| {
        let start = start(number, function);
        FrameMap::new(start..start + 0x500)
            .rules(Rules::new(Cfa::rsp(size(number, function))).saved(Register::RBP, Place::cfa(-16)))
            .word(Place::at(Register::RSP, 8 * function as i32), Verdict::Pointer)
            .rest(Verdict::Data)
    };
    (0..FUNCTIONS).map(map).collect()
}

/// Looks one function up; true if it is there. What is there must be its own.
fn check(maps: &StackMaps, number: usize, function: usize) -> bool {
    let reader = maps.read();
    let address = start(number, function);
    for inside in [address, address + 0x4ff] {
        let Some(map) = reader.find(inside) else { return false };
        let expected = Rules::new(Cfa::rsp(size(number, function))).saved(Register::RBP, Place::cfa(-16));
        assert_eq!(map.rules(), Some(Ok(expected)));
        assert_eq!(map.rest(), Verdict::Data);
    }
    assert!(reader.find(address + 0x500).is_none());
    true
}

static MAPS: StackMaps = StackMaps::new();
static IN_HANDLER: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_signal(_: c_int) {
    assert!(check(&MAPS, LASTING, 3));
    IN_HANDLER.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn readers_see_whole_maps_while_writers_come_and_go() {
    const ROUNDS: usize = 3000;
    static STOP: AtomicBool = AtomicBool::new(false);
    // SAFETY: a handler that only reads maps, for a signal that nobody else uses.
    unsafe { libc::signal(libc::SIGUSR1, on_signal as *const () as usize) };
    let lasting = MAPS.register(module(LASTING)).unwrap();
    let writers: Vec<_> = (0..2)
        .map(|writer| {
            thread::spawn(move || {
                let mut state = 0x9e37_79b9 + writer as u64;
                // Each writer has the modules of its parity; it sees its own exactly as it has left them.
                let mut mine: Vec<_> = (0..MODULES / 2).map(|_| None).collect();
                for _ in 0..ROUNDS {
                    let index = random(&mut state) as usize % mine.len();
                    let number = index * 2 + writer;
                    mine[index] = match mine[index].take() {
                        None => Some(MAPS.register(module(number)).unwrap()),
                        Some(registration) => {
                            drop(registration);
                            None
                        }
                    };
                    assert_eq!(
                        check(&MAPS, number, random(&mut state) as usize % FUNCTIONS),
                        mine[index].is_some()
                    );
                }
            })
        })
        .collect();
    let readers: Vec<_> = (0..4)
        .map(|reader| {
            thread::spawn(move || {
                let mut state = 0x1234_5678 + reader as u64;
                let mut found = 0usize;
                while !STOP.load(Ordering::Relaxed) {
                    for _ in 0..100 {
                        let number = random(&mut state) as usize % MODULES;
                        found += usize::from(check(&MAPS, number, random(&mut state) as usize % FUNCTIONS));
                        assert!(check(&MAPS, LASTING, random(&mut state) as usize % FUNCTIONS));
                    }
                }
                found
            })
        })
        .collect();
    while !writers.iter().all(|writer| writer.is_finished()) {
        for thread in &writers {
            if !thread.is_finished() {
                // SAFETY: the thread has not been joined.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
            }
        }
        thread::yield_now();
    }
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    STOP.store(true, Ordering::Relaxed);
    let found: usize = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
    assert!(found > 0 && IN_HANDLER.load(Ordering::Relaxed) > 0);
    println!("{found} found, {} look-ups in handlers", IN_HANDLER.load(Ordering::Relaxed));
    drop(lasting);
    assert!(!check(&MAPS, LASTING, 0));
}

/// A reader keeps what it sees, however much is changed, and changes do not wait for it.
#[test]
fn a_reader_sees_one_moment() {
    let maps = StackMaps::new();
    let first = maps.register(module(0)).unwrap();
    let reader = maps.read();
    drop(first);
    for number in 1..50 {
        let _registration = maps.register(module(number)).unwrap();
    }
    assert!(reader.find(start(0, 5)).is_some());
    assert!(maps.read().find(start(0, 5)).is_none());
}

/// Two registrations between each other's functions, as of assembly and LLVM in one program.
#[test]
fn interleaved_registrations_are_found_and_removed_one_by_one() {
    let maps = StackMaps::new();
    let (even, odd): (Vec<_>, Vec<_>) =
        module(0).into_iter().enumerate().partition(|(number, _)| number % 2 == 0);
    let strip = |list: Vec<(usize, FrameMap)>| list.into_iter().map(|(_, map)| map).collect::<Vec<_>>();
    let even = maps.register(strip(even)).unwrap();
    let odd = maps.register(strip(odd)).unwrap();
    assert!((0..FUNCTIONS).all(|function| check(&maps, 0, function)));
    let error = maps.register(vec![FrameMap::new(start(0, 3) + 0x4ff..start(0, 3) + 0x600)]).unwrap_err();
    assert!(error.to_string().contains("two frame maps"), "{error}");
    drop(even);
    assert!((0..FUNCTIONS).all(|function| check(&maps, 0, function) == (function % 2 == 1)));
    drop(odd);
    assert!((0..FUNCTIONS).all(|function| !check(&maps, 0, function)));
}
