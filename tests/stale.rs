//! A pointer to where a stack used to be, kept where the relocator cannot see it, is never silent: its first use
//! ends the process, and the report says whose stack it was, where, in which register, and how far from the top.

use std::hint::black_box;

use regrow::{Coroutine, CoroutineResult, Yielder};

mod support;
use support::{Outcome, frame, growths, relocating, this_test, variant};

/// What a child prints before it uses the pointer, so that the report can be checked against it.
fn tell(local: &u64, yielder: &Yielder<(), usize>) {
    let address = std::ptr::from_ref(local) as usize;
    let top = std::ptr::from_ref(yielder) as usize;
    println!("\nlocal at {address:#x}, {} bytes below its top", top - address);
}

/// A pointer on the heap, in a number, so that nothing rewrites it.
fn hide(local: &u64) -> Box<usize> {
    black_box(Box::new(std::ptr::from_ref(local) as usize))
}

#[inline(never)]
fn uses_the_pointer(hidden: &usize) -> u64 {
    // SAFETY: none; that is what the test is about. The process ends here.
    unsafe { black_box(*hidden as *const u64).read_volatile() }
}

#[inline(never)]
fn writes_through_the_pointer(hidden: &usize) {
    // SAFETY: none, as above.
    unsafe { black_box(*hidden as *mut u64).write_volatile(1) }
}

/// Suspends once with the hidden pointer, after its stack has moved `moves` times.
fn moved_away(moves: u64) -> (Coroutine<(), usize, ()>, usize) {
    let mut coroutine = relocating().name("left behind").spawn(move |yielder: &Yielder<(), usize>, ()| {
        let local = black_box(42);
        let hidden = hide(&local);
        move_times(moves);
        tell(&local, yielder);
        yielder.suspend(*hidden);
        black_box(local);
    });
    let CoroutineResult::Yield(hidden) = coroutine.resume(()) else { unreachable!() };
    (coroutine, hidden)
}

fn move_times(moves: u64) {
    #[inline(never)]
    fn deeper(moves: u64) {
        black_box([moves; 32]);
        if growths() < moves {
            deeper(moves);
        }
        black_box(moves);
    }
    deeper(moves);
    assert_eq!(growths(), moves);
}

fn is_reported(outcome: &Outcome, function: &str) {
    let said = &outcome.stderr;
    assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
    let told =
        outcome.stdout.lines().find_map(|line| line.strip_prefix("local at ")).expect("the child told");
    let (now_at, below_top) = told.split_once(", ").unwrap();
    for part in [
        "regrow: stale pointer into the stack of coroutine \"left behind\"",
        &format!("before it moved, {below_top}; it is now at {now_at}\n"),
        &format!("{function}+0x"),
    ] {
        assert!(said.contains(part), "no {part:?} in\n{outcome}");
    }
    // The register holds the address that the report is about.
    let address = said.split("fatal error: address ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    let register = said.lines().find(|line| line.starts_with("  register r")).expect("names a register");
    assert!(register.ends_with(&format!(" = {address}, +0 bytes to the address")), "{outcome}");
}

#[test]
fn a_box_that_holds_a_reference_to_a_local_is_caught_and_reported() {
    let test = this_test!();
    match variant().as_deref() {
        None => {
            is_reported(&test.child("read"), "stale::uses_the_pointer");
            is_reported(&test.child("write"), "stale::writes_through_the_pointer");
        }
        Some(how) => {
            let write = how == "write";
            let mut coroutine =
                relocating().name("left behind").spawn(move |yielder: &Yielder<(), usize>, ()| {
                    let local = black_box(42);
                    let hidden = hide(&local);
                    frame::<4096>(1);
                    tell(&local, yielder);
                    if write {
                        writes_through_the_pointer(&hidden)
                    } else {
                        black_box(uses_the_pointer(&hidden));
                    }
                    println!("it was silent: {local}");
                });
            coroutine.resume(());
        }
    }
}

#[test]
fn a_stale_pointer_is_caught_after_any_number_of_moves() {
    match variant() {
        None => {
            for moves in 1..=6 {
                is_reported(&this_test!().child(moves), "stale::uses_the_pointer");
            }
        }
        Some(moves) => {
            let (_coroutine, hidden) = moved_away(moves.parse().unwrap());
            println!("it was silent: {}", uses_the_pointer(&hidden));
        }
    }
}

#[test]
fn a_stale_pointer_used_by_another_thread_is_caught() {
    match variant() {
        None => is_reported(&this_test!().child(""), "stale::uses_the_pointer"),
        Some(_) => {
            let (_coroutine, hidden) = moved_away(2);
            // A thread that has nothing to do with coroutines.
            let value = std::thread::spawn(move || uses_the_pointer(&hidden)).join();
            println!("it was silent: {value:?}");
        }
    }
}

#[test]
fn a_stale_pointer_used_by_another_coroutine_is_caught() {
    match variant() {
        None => is_reported(&this_test!().child(""), "stale::uses_the_pointer"),
        Some(_) => {
            let (_coroutine, hidden) = moved_away(1);
            let value = Coroutine::<(), (), u64>::new(move |_, ()| uses_the_pointer(&hidden)).resume(());
            println!("it was silent: {value:?}");
        }
    }
}

/// The kernel does not fault where we would notice: a system call on a stale buffer fails with EFAULT instead.
#[test]
fn the_kernel_refuses_a_stale_pointer() {
    let (coroutine, hidden) = moved_away(1);
    // SAFETY: the kernel checks the buffer.
    let written = unsafe { libc::write(libc::STDOUT_FILENO, hidden as *const _, 8) };
    assert_eq!((written, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
    drop(coroutine);
}

/// An old slot is kept until its coroutine has ended, however many are made meanwhile, and used again then.
#[test]
fn old_slots_belong_to_their_coroutine_until_it_ends() {
    let (coroutine, hidden) = moved_away(3);
    let others: Vec<_> = (0..300).map(|_| moved_away(1)).collect();
    assert!(
        others.iter().all(|&(_, other)| hidden.abs_diff(other) >= 4096),
        "given to another while it was kept"
    );
    drop(coroutine);
    let again: Vec<_> = (0..300).map(|_| moved_away(1)).collect();
    assert!(again.iter().any(|&(_, other)| other.abs_diff(hidden) < 4096), "lost");
}
