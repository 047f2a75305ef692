//! Processes that are forked: their stacks are their own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use regrow::{Builder, Coroutine, Yielder};

mod support;
use support::{Way, both_ways, this_test, variant};

/// A suspended coroutine that counts on its stack, and the address of its counter.
fn with_counter(builder: &Builder) -> (Coroutine<(), usize, u64>, usize) {
    let mut coroutine = builder.spawn(|yielder: &Yielder<(), usize>, ()| {
        let counter = AtomicU64::new(7);
        yielder.suspend((&raw const counter).expose_provenance());
        counter.load(Ordering::Relaxed)
    });
    let address = coroutine.resume(()).yielded().unwrap();
    (coroutine, address)
}

fn in_place() -> Builder {
    Way::InPlace.builder()
}

/// The counter of a coroutine that grows in place.
fn counter(address: usize) -> &'static AtomicU64 {
    // SAFETY: the coroutine, whose stack stays, is suspended while it is used, or frozen: then this thaws it.
    unsafe { &*std::ptr::with_exposed_provenance(address) }
}

/// Forks; the child ends with what `f` returns. Returns how it ended: its status, or minus a signal's number.
fn forked(f: impl FnOnce() -> i32) -> i32 {
    // SAFETY: what the children here call takes no lock that another thread may have held, but malloc's, which glibc sees to.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::alarm(20);
            libc::_exit(f());
        }
        ended(child)
    }
}

fn ended(child: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: writes the status.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) }
}

/// The first process of a pid namespace is process 1, and so is the first of a namespace in that.
#[test]
fn a_child_with_its_parents_process_id_thaws_its_own_stacks() {
    if variant().is_none() {
        return this_test!().passes();
    }
    let in_namespace = |f: &dyn Fn() -> i32| {
        // SAFETY: no memory is touched.
        if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
            println!("skipped: it takes root to make a pid namespace");
            return 0;
        }
        forked(f)
    };
    let status = in_namespace(&|| {
        // Another thread, so that stacks are frozen through /proc/self/mem; it has to outlast the fork.
        std::thread::spawn(std::thread::park);
        let (mut coroutine, address) = with_counter(&in_place());
        coroutine.freeze().unwrap();
        // Thawed and frozen again: the parent has used whatever it keeps.
        coroutine.thaw().unwrap();
        coroutine.freeze().unwrap();
        let status = in_namespace(&|| {
            assert_eq!(std::process::id(), 1);
            std::thread::spawn(std::thread::park);
            let seen = counter(address).fetch_add(5, Ordering::Relaxed);
            i32::from(seen != 7 || counter(address).load(Ordering::Relaxed) != 12)
        });
        let untouched = coroutine.is_frozen() && coroutine.resume(()).returned() == Some(7);
        status + 2 * i32::from(!untouched)
    });
    assert_eq!(status, 0);
}

#[test]
fn a_child_resumes_and_drops_what_its_parent_has_frozen() {
    if variant().is_none() {
        return this_test!().passes();
    }
    both_ways(|builder| {
        for threads in [false, true] {
            threads.then(|| std::thread::spawn(std::thread::park));
            let mut frozen: Vec<_> = (0..40).map(|_| with_counter(&builder).0).collect();
            frozen.iter_mut().for_each(|coroutine| assert!(coroutine.freeze().unwrap()));
            let mut in_child = frozen;
            let status = forked(|| {
                drop(in_child.split_off(20));
                let right = |coroutine: &mut Coroutine<_, _, _>| coroutine.resume(()).returned() == Some(7);
                let others = (0..20).all(|_| {
                    let mut coroutine = with_counter(&builder).0;
                    coroutine.freeze().unwrap() && right(&mut coroutine)
                });
                i32::from(!others || !in_child.iter_mut().all(right))
            });
            assert_eq!(status, 0);
            for coroutine in &mut in_child {
                assert!(coroutine.is_frozen());
                assert_eq!(coroutine.resume(()).returned(), Some(7));
            }
        }
    });
}

/// Another thread freezes and thaws all the time.
#[test]
fn a_process_forked_in_the_middle_of_a_thaw_has_all_stacks() {
    static END: AtomicBool = AtomicBool::new(false);
    static ADDRESS: AtomicU64 = AtomicU64::new(0);
    if variant().is_none() {
        return this_test!().passes();
    }
    let other = std::thread::spawn(|| {
        let (mut coroutine, address) = with_counter(&in_place());
        ADDRESS.store(address as u64, Ordering::Release);
        while !END.load(Ordering::Relaxed) {
            coroutine.freeze().unwrap();
            coroutine.thaw().unwrap();
        }
        assert_eq!(coroutine.resume(()).returned(), Some(7));
    });
    while ADDRESS.load(Ordering::Acquire) == 0 {
        std::thread::yield_now();
    }
    let address = ADDRESS.load(Ordering::Relaxed) as usize;
    regrow::prepare_thread().unwrap();
    for _ in 0..300 {
        let status = forked(|| i32::from(counter(address).fetch_add(1, Ordering::Relaxed) != 7));
        assert_eq!(status, 0);
    }
    END.store(true, Ordering::Relaxed);
    other.join().unwrap();
}
