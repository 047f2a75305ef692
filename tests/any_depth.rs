//! On a stack that grows in place, whatever touches it finds it there, at every depth: code, the kernel when it delivers a signal
//! or answers a system call, and code that runs where no handler can.

use std::ffi::{c_int, c_void};
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use regrow::{Builder, Coroutine, Yielder};

mod support;
use support::{OnDrop, depths, down, frame, fresh, run, this_test, variant};

// --- signals -----------------------------------------------------------------------------------------------------

static SEEN: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_signal: c_int) {
    // A handler that does something, with a frame of its own.
    let bytes = black_box([1u8; 2000]);
    SEEN.fetch_add(usize::from(bytes[77]), Ordering::SeqCst);
}

/// As most programs and crates install one: without `SA_ONSTACK`.
fn handle(signal: c_int) {
    // SAFETY: the handler does what a handler may do.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
}

#[test]
fn a_signal_whose_handler_has_no_stack_of_its_own_is_seen_at_every_depth() {
    if variant().is_none() {
        return this_test!().passes();
    }
    handle(libc::SIGUSR1);
    for levels in depths() {
        let before = SEEN.load(Ordering::SeqCst);
        run(&fresh(), move || {
            // SAFETY: sends this thread a signal that is handled.
            down(levels, &|| unsafe { libc::raise(libc::SIGUSR1) });
            frame::<60_000>(1);
        });
        assert_eq!(SEEN.load(Ordering::SeqCst), before + 1, "{levels} levels down");
    }
}

#[test]
fn signals_that_come_at_any_time_harm_nothing() {
    const TIMES: usize = 300;
    let Some(variant) = variant() else {
        return this_test!().passes_each(["timer", "another process"]);
    };
    let mut sender = None;
    if variant == "timer" {
        handle(libc::SIGPROF);
        let millisecond = libc::timeval { tv_sec: 0, tv_usec: 1000 };
        let every = libc::itimerval { it_interval: millisecond, it_value: millisecond };
        // SAFETY: plain data for a system call.
        unsafe { libc::setitimer(libc::ITIMER_PROF, &every, std::ptr::null_mut()) };
    } else {
        handle(libc::SIGUSR2);
        let loops = format!("while kill -USR2 {} 2>/dev/null; do :; done", std::process::id());
        sender = Some(std::process::Command::new("sh").args(["-c", &loops]).spawn().unwrap());
    }
    let mut rounds = 0;
    while SEEN.load(Ordering::SeqCst) < TIMES {
        rounds += 1;
        let sum = run(&fresh(), move || down(rounds % 300, &|| frame::<3000>(1)) + frame::<60_000>(2));
        assert_eq!(sum, 3000 + 120_000);
    }
    if let Some(mut sender) = sender {
        sender.kill().unwrap();
        sender.wait().unwrap();
    }
}

// --- where no handler can run ------------------------------------------------------------------------------------

/// Blocks every signal of this thread, those of faults among them.
fn block_all() {
    // SAFETY: plain data for system calls.
    unsafe {
        let mut all = MaybeUninit::uninit();
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut());
    }
}

#[test]
fn a_thread_with_all_signals_blocked_uses_all_of_its_stacks() {
    std::thread::spawn(|| {
        block_all();
        for levels in depths() {
            run(&fresh(), move || down(levels, &|| frame::<40_000>(1)));
        }
    })
    .join()
    .unwrap();
}

/// A coroutine that is sent to other threads.
struct Sent(Coroutine<(), u64, u64>);

// SAFETY: what is on the stack of the coroutines below is numbers.
unsafe impl Send for Sent {}

#[test]
fn a_thread_that_was_never_prepared_resumes_and_drops() {
    extern "C" fn resume(sent: *mut c_void) -> *mut c_void {
        // SAFETY: `pthread_create` passes what it was given below: a box of a coroutine.
        let mut sent = unsafe { Box::from_raw(sent.cast::<Sent>()) };
        assert_eq!(sent.0.resume(()).yielded(), Some(30_000));
        drop(sent);
        std::ptr::null_mut()
    }
    for levels in depths().step_by(7) {
        let mut coroutine = fresh().spawn(move |yielder: &Yielder<(), u64>, ()| {
            yielder.suspend(1);
            let _at_drop = OnDrop(|| _ = black_box(frame::<50_000>(1)));
            yielder.suspend(down(levels, &|| frame::<30_000>(1)));
            0
        });
        coroutine.resume(());
        let sent = Box::into_raw(Box::new(Sent(coroutine)));
        // SAFETY: the thread's function gets the argument it expects.
        unsafe {
            let mut thread = MaybeUninit::uninit();
            assert_eq!(libc::pthread_create(thread.as_mut_ptr(), std::ptr::null(), resume, sent.cast()), 0);
            assert_eq!(libc::pthread_join(thread.assume_init(), std::ptr::null_mut()), 0);
        }
    }
}

#[test]
fn the_status_of_exit_is_what_it_was_called_with_at_every_depth() {
    let Some(levels) = variant() else {
        for levels in (0..60).step_by(2) {
            let outcome = this_test!().child(levels);
            assert_eq!(outcome.status.code(), Some(5), "{levels} levels down: {outcome}");
        }
        return;
    };
    let levels = levels.parse().unwrap();
    extern "C" fn at_exit() {
        // On the coroutine's stack, from which `exit` was called.
        frame::<30_000>(1);
        run(&Builder::new(), || frame::<30_000>(1));
    }
    // SAFETY: the function is there until the end.
    unsafe { libc::atexit(at_exit) };
    print!("text in the buffer of standard output ");
    run(&fresh(), move || down(levels, &|| std::process::exit(5)));
}

#[test]
fn a_destructor_of_a_thread_local_resumes() {
    struct Last(Option<Coroutine<(), (), ()>>);
    impl Drop for Last {
        fn drop(&mut self) {
            if let Some(coroutine) = &mut self.0 {
                coroutine.resume(());
            }
            println!("destructor: resumed");
        }
    }
    thread_local!(static LAST: std::cell::RefCell<Last> = const { std::cell::RefCell::new(Last(None)) });
    if variant().is_none() {
        let outcome = this_test!().child("");
        assert!(outcome.status.success() && outcome.stdout.contains("destructor: resumed"), "{outcome}");
        return;
    }
    std::thread::spawn(|| {
        let mut coroutine = fresh().spawn(|yielder: &Yielder<(), ()>, ()| {
            yielder.suspend(());
            frame::<30_000>(1);
        });
        coroutine.resume(());
        LAST.with_borrow_mut(|last| last.0 = Some(coroutine));
    })
    .join()
    .unwrap();
}

#[test]
fn processes_and_threads_are_started_at_every_depth() {
    for levels in depths().step_by(20) {
        run(&fresh(), move || {
            down(levels, &|| {
                assert!(std::process::Command::new("true").status().unwrap().success());
                assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
                // SAFETY: a constant command; the stream is closed.
                unsafe {
                    assert_eq!(libc::system(c"exit 3".as_ptr()), 3 << 8);
                    let stream = libc::popen(c"echo 5".as_ptr(), c"r".as_ptr());
                    assert_eq!(libc::fgetc(stream), i32::from(b'5'));
                    libc::pclose(stream);
                }
            });
        });
    }
}

// --- what the kernel writes to the stack -------------------------------------------------------------------------

/// A place on the stack that nobody has touched.
macro_rules! untouched {
    ($type:ty) => {
        black_box(&mut MaybeUninit::<$type>::uninit()).as_mut_ptr()
    };
}

/// A call and its name.
type Call = (&'static str, Box<dyn Fn() -> i64>);

/// Calls that let the kernel write to the caller's frame, by name. Each returns -1 and sets `errno` if it fails.
#[rustfmt::skip]
fn calls() -> Vec<Call> {
    use libc::*;
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    let zero = zeros.as_raw_fd();
    std::mem::forget(zeros);
    let mut pair = [0; 2];
    // SAFETY: plain system calls; the descriptors live as long as the process.
    let (socket, events, timer) = unsafe {
        assert_eq!(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair.as_mut_ptr()), 0);
        (pair[0], epoll_create1(0), timerfd_create(CLOCK_MONOTONIC, 0))
    };
    let other = pair[1];
    macro_rules! call {
        ($($name:literal: $call:expr;)*) => {
            // SAFETY: each call is given room for what it writes, on its own stack.
            vec![$(($name, Box::new(move || i64::from(unsafe { $call } as i32)) as Box<dyn Fn() -> i64>)),*]
        };
    }
    call! {
        "read": read(zero, untouched!([u8; 700]).cast(), 700);
        "pread": pread(zero, untouched!([u8; 300]).cast(), 300, 0);
        "readv": readv(zero, &iovec { iov_base: untouched!([u8; 500]).cast(), iov_len: 500 }, 1);
        "recv": { send(other, [1u8; 99].as_ptr().cast(), 99, 0); recv(socket, untouched!([u8; 99]).cast(), 99, 0) };
        "recvfrom": { send(other, [1u8; 99].as_ptr().cast(), 99, 0);
            recvfrom(socket, untouched!([u8; 99]).cast(), 99, 0, untouched!(sockaddr_storage).cast(), black_box(&mut 128)) };
        "getsockopt": getsockopt(socket, SOL_SOCKET, SO_TYPE, untouched!(c_int).cast(), black_box(&mut 4));
        "getsockname": getsockname(socket, untouched!(sockaddr_storage).cast(), black_box(&mut 128));
        "getpeername": getpeername(socket, untouched!(sockaddr_storage).cast(), black_box(&mut 128));
        "fstat": fstat(zero, untouched!(stat));
        "stat": stat(c"/".as_ptr(), untouched!(stat));
        "lstat": lstat(c"/".as_ptr(), untouched!(stat));
        "statfs": statfs(c"/".as_ptr(), untouched!(statfs));
        "fstatfs": fstatfs(zero, untouched!(statfs));
        "statvfs": statvfs(c"/".as_ptr(), untouched!(statvfs));
        "statx": statx(AT_FDCWD, c"/".as_ptr(), 0, STATX_ALL, untouched!(statx));
        "getcwd": if getcwd(untouched!([u8; 4096]).cast(), 4096).is_null() { -1 } else { 0 };
        "readlink": readlink(c"/proc/self/exe".as_ptr(), untouched!([u8; 999]).cast(), 999);
        "uname": uname(untouched!(utsname));
        "sysinfo": sysinfo(untouched!(sysinfo));
        "times": times(untouched!(tms)) as i32 & 0xffff;
        "getrusage": getrusage(RUSAGE_SELF, untouched!(rusage));
        "getrlimit": getrlimit(RLIMIT_CORE, untouched!(rlimit));
        "prlimit": prlimit(0, RLIMIT_CORE, std::ptr::null(), untouched!(rlimit));
        "clock_gettime": syscall(SYS_clock_gettime, CLOCK_REALTIME, untouched!(timespec));
        "clock_getres": syscall(SYS_clock_getres, CLOCK_REALTIME, untouched!(timespec));
        "gettimeofday": syscall(SYS_gettimeofday, untouched!(timeval), 0);
        "sigaction": sigaction(SIGUSR2, std::ptr::null(), untouched!(sigaction));
        "sigprocmask": pthread_sigmask(SIG_BLOCK, std::ptr::null(), untouched!(sigset_t));
        "sigpending": sigpending(untouched!(sigset_t));
        "sigaltstack": sigaltstack(std::ptr::null(), untouched!(stack_t));
        "getitimer": getitimer(ITIMER_VIRTUAL, untouched!(itimerval));
        "timerfd_gettime": timerfd_gettime(timer, untouched!(itimerspec));
        "epoll_wait": epoll_wait(events, untouched!([epoll_event; 50]).cast(), 50, 0);
        "poll": poll(&mut pollfd { fd: zero, events: POLLIN, revents: 0 }, 1, 0);
        "select": { let set = untouched!(fd_set); FD_ZERO(set); FD_SET(zero, set);
            select(zero + 1, set, std::ptr::null_mut(), std::ptr::null_mut(), &mut timeval { tv_sec: 0, tv_usec: 0 }) };
        "pipe2": { let ends = untouched!([c_int; 2]).cast::<c_int>(); let done = pipe2(ends, O_CLOEXEC);
            if done == 0 { close(*ends); close(*ends.add(1)); } done };
        "socketpair": { let ends = untouched!([c_int; 2]).cast::<c_int>();
            let done = socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
            if done == 0 { close(*ends); close(*ends.add(1)); } done };
        "sched_getaffinity": sched_getaffinity(0, size_of::<cpu_set_t>(), untouched!(cpu_set_t));
        "sched_getparam": sched_getparam(0, untouched!(sched_param));
        "getgroups": getgroups(200, untouched!([gid_t; 200]).cast());
        "getresuid": getresuid(untouched!(uid_t), untouched!(uid_t), untouched!(uid_t));
        "getrandom": getrandom(untouched!([u8; 200]).cast(), 200, 0);
        "ioctl": ioctl(socket, FIONREAD, untouched!(c_int));
        "prctl": prctl(PR_GET_NAME, untouched!([u8; 16]));
        "mincore": mincore((black_box(call as *const () as usize) & !4095) as *mut _, 4096, untouched!(u8));
        "nanosleep": nanosleep(&timespec { tv_sec: 0, tv_nsec: 1 }, untouched!(timespec));
    }
}

#[inline(never)]
fn call(f: &dyn Fn() -> i64) -> Result<(), String> {
    if f() == -1 { Err(std::io::Error::last_os_error().to_string()) } else { Ok(()) }
}

#[test]
fn the_kernel_writes_its_answers_at_every_depth() {
    let calls: &'static [_] = calls().leak();
    assert!(calls.len() >= 40);
    for (name, f) in calls {
        for levels in (0..128).chain((128..384).step_by(2)) {
            let f: &'static dyn Fn() -> i64 = &**f;
            let outcome = run(&fresh(), move || down(levels, &|| call(f)));
            assert_eq!(outcome, Ok(()), "{name}, {levels} levels down");
        }
    }
}

/// As C compiled without probes has it: the stack pointer goes down at once, and the kernel fills what is above it.
#[test]
fn a_large_frame_without_probes_is_filled_by_the_kernel() {
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    let file = zeros.as_raw_fd();
    for bytes in [8_000, 17_000, 20_000, 24_000, 32_768, 65_536, 131_072, 200_000] {
        let read = run(&fresh(), move || {
            let read: isize;
            // SAFETY: `read` into memory below the stack pointer's old place, which is the stack pointer's meanwhile; the
            // system call keeps r12.
            unsafe {
                std::arch::asm!(
                    "mov r12, rsp",
                    "sub rsp, rdx",
                    "and rsp, -16",
                    "mov rsi, rsp",
                    "syscall",
                    "mov rsp, r12",
                    inout("rax") libc::SYS_read as isize => read,
                    in("rdi") file as isize,
                    in("rdx") bytes,
                    out("rsi") _, out("rcx") _, out("r11") _, out("r12") _,
                );
            }
            read
        });
        assert_eq!(read, bytes as isize);
    }
}
