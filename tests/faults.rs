//! A fault that is not a growth ends as it would have without this crate, and reaches who was there before; an
//! overflow at the maximum ends in a report. Each in a child process.

use std::arch::asm;
use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::hint::black_box;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use regrow::{Builder, Coroutine, Yielder};

mod support;
use support::{Way, frame, growths, refuse, relocating, run, signalled_at, this_test, variant};

/// Reads a word by one instruction that is no growth point. What compilers emit, without their checks.
#[inline(never)]
fn load(address: usize) -> u64 {
    let word;
    // SAFETY: none: it is made to fault.
    unsafe { asm!("mov {}, [{}]", out(reg) word, in(reg) address) };
    word
}

#[inline(never)]
fn store(address: usize) {
    // SAFETY: none: it is made to fault.
    unsafe { asm!("mov qword ptr [{}], 1", in(reg) address) };
}

/// Runs `f` in a coroutine that has grown, so that all is installed and in use.
fn in_a_coroutine(builder: &Builder, f: impl FnOnce() + 'static) {
    run(builder, || {
        frame::<9000>(1);
        assert!(growths() > 0);
        f();
    });
}

fn say(text: &str) {
    // SAFETY: writes a string; allowed in a signal handler.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}

// --- faults that are not ours ------------------------------------------------------------------------------------

#[test]
fn a_wild_pointer_in_a_coroutine_dies_by_sigsegv() {
    static CONSTANT: u64 = 5;
    let wild: [(&str, fn()); 6] = [
        ("null", || {
            load(0);
        }),
        ("null, written", || store(8)),
        ("not canonical", || {
            load(0x8000_0000_0000_0000);
        }),
        ("privileged", || {
            // SAFETY: none: it is made to fault.
            unsafe { asm!("hlt") };
        }),
        ("read-only", || store(&raw const CONSTANT as usize)),
        ("called", || {
            // SAFETY: none: it is made to fault.
            let f: extern "C" fn() = unsafe { std::mem::transmute(black_box(16usize)) };
            f();
        }),
    ];
    match variant() {
        None => {
            for (name, _) in wild {
                for way in Way::BOTH {
                    let outcome = this_test!().child(format!("{way}, {name}"));
                    assert_eq!(outcome.signal(), Some(libc::SIGSEGV), "{name}: {outcome}");
                    assert!(!outcome.stderr.contains("regrow"), "{name}: {outcome}");
                }
            }
        }
        Some(which) => {
            let (way, name) = which.split_once(", ").unwrap();
            let (_, f) = wild.into_iter().find(|&(known, _)| known == name).unwrap();
            in_a_coroutine(&Way::named(way).builder(), f);
        }
    }
}

/// An address in the guard of a coroutine that is suspended: below the page its local is on.
fn guard_of(coroutine: &mut Coroutine<(), usize, ()>) -> usize {
    let local = coroutine.resume(()).yielded().unwrap();
    local / 4096 * 4096 - 64
}

fn suspended(builder: &Builder) -> Coroutine<(), usize, ()> {
    builder.spawn(|yielder: &Yielder<(), usize>, ()| {
        let local = black_box(1u64);
        yielder.suspend(&raw const local as usize);
    })
}

#[test]
fn a_wild_pointer_into_a_guard_dies_by_sigsegv() {
    match variant().as_deref() {
        None => {
            for which in ["of another, from a thread", "of another, from a coroutine", "own, far below"] {
                let outcome = this_test!().child(which);
                assert_eq!(outcome.signal(), Some(libc::SIGSEGV), "{which}: {outcome}");
            }
        }
        Some("of another, from a thread") => {
            let mut other = suspended(&relocating());
            store(guard_of(&mut other));
        }
        Some("of another, from a coroutine") => {
            let mut other = suspended(&relocating());
            let guard = guard_of(&mut other);
            in_a_coroutine(&relocating(), move || store(guard));
        }
        // Below everything the frame may use, by an instruction that no frame is made with.
        Some(_) => run(&relocating(), || {
            let local = black_box(1u64);
            store((&raw const local as usize) - 6000);
        }),
    }
}

#[test]
fn a_bus_error_in_a_coroutine_dies_by_sigbus() {
    match variant() {
        None => {
            let outcome = this_test!().child("");
            assert_eq!(outcome.signal(), Some(libc::SIGBUS), "{outcome}");
        }
        Some(_) => {
            // SAFETY: a mapping past the end of an empty file, touched nowhere else.
            let page = unsafe {
                let file = libc::memfd_create(c"empty".as_ptr(), 0);
                libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file, 0)
            } as usize;
            in_a_coroutine(&relocating(), move || {
                load(page);
            });
        }
    }
}

// --- handlers that were there before -------------------------------------------------------------------------------

const FAULT_AT: usize = 0x10;

fn install(handler: usize, flags: c_int) {
    // SAFETY: plain data for system calls; each handler below has the signature its flags ask for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        libc::sigaddset(&mut action.sa_mask, libc::SIGUSR1);
        assert_eq!(libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()), 0);
    }
}

/// Which of some signals are blocked now.
fn blocked() -> [bool; 4] {
    // SAFETY: plain data for a system call.
    unsafe {
        let mut mask = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_SETMASK, ptr::null(), &mut mask);
        [libc::SIGSEGV, libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM]
            .map(|signal| libc::sigismember(&mask, signal) == 1)
    }
}

unsafe extern "C" fn with_siginfo(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel's, or so it must look.
    let (address, code, rip) = unsafe {
        let context = &*context.cast::<libc::ucontext_t>();
        (
            (*info).si_addr() as usize,
            (*info).si_code,
            context.uc_mcontext.gregs[libc::REG_RIP as usize] as usize,
        )
    };
    let in_load = rip.wrapping_sub(load as *const () as usize) < 64;
    let right = signal == libc::SIGSEGV && address == FAULT_AT && code == 1 && in_load;
    say(if right { "reached with siginfo" } else { "reached with something else" });
    say(if blocked() == [true, true, false, false] { ", masked right" } else { ", masked wrong" });
    // SAFETY: ends the process.
    unsafe { libc::_exit(42) }
}

unsafe extern "C" fn without_siginfo(signal: c_int) {
    say(if signal == libc::SIGSEGV { "reached" } else { "reached by something else" });
    say(if blocked() == [false, true, false, false] { ", masked right" } else { ", masked wrong" });
    // SAFETY: ends the process.
    unsafe { libc::_exit(43) }
}

static COUNTED: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn returns(_signal: c_int) {
    say("reached once");
    if COUNTED.fetch_add(1, Ordering::Relaxed) > 3 {
        // SAFETY: ends the process.
        unsafe { libc::_exit(1) }
    }
}

struct Page(UnsafeCell<usize>);
// SAFETY: written before the one thread faults.
unsafe impl Sync for Page {}
static PAGE: Page = Page(UnsafeCell::new(0));

/// A pager in user space: gives access to the page and lets the instruction run again.
unsafe extern "C" fn opens_the_page(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the page is this test's.
    unsafe {
        let page = *PAGE.0.get();
        if (*info).si_addr() as usize / 4096 * 4096 != page {
            libc::_exit(1);
        }
        libc::mprotect(page as *mut c_void, 4096, libc::PROT_READ | libc::PROT_WRITE);
        *libc::__errno_location() = 77;
    }
}

unsafe extern "C" fn counts(_signal: c_int) {
    COUNTED.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn a_handler_installed_before_is_reached_as_the_kernel_would() {
    let test = this_test!();
    let Some(how) = variant() else {
        let exits = |how, code, text: &str| {
            let outcome = test.child(how);
            assert_eq!(outcome.status.code(), Some(code), "{how}: {outcome}");
            assert!(outcome.stderr.contains(text), "{how}: {outcome}");
        };
        exits("siginfo", 42, "reached with siginfo, masked right");
        exits("siginfo, no stack of its own", 42, "reached with siginfo, masked right");
        exits("siginfo, small alternate stack", 42, "reached with siginfo, masked right");
        exits("plain, nodefer", 43, "reached, masked right");
        exits("recovers", 0, "went on");
        exits("recovers, small alternate stack", 0, "went on");
        exits("sent", 0, "went on");
        exits("sent, ignored", 0, "went on");
        for (how, times) in [("reset", 1), ("ignored", 0), ("default", 0)] {
            let outcome = test.child(how);
            assert_eq!(outcome.signal(), Some(libc::SIGSEGV), "{how}: {outcome}");
            assert_eq!(outcome.stderr.matches("reached once").count(), times, "{how}: {outcome}");
        }
        return;
    };
    let (how, alternate) = match how.strip_suffix(", small alternate stack") {
        Some(how) => (how, Some(AlternateStack::new(8 << 10))),
        None => (how.as_str(), None),
    };
    let use_alternate = move || {
        if let Some(alternate) = alternate {
            alternate.install();
        }
    };
    let faults = move || {
        use_alternate();
        load(FAULT_AT);
    };
    let sent = || {
        let before = growths();
        // SAFETY: the handler, or its absence, is what this is about.
        unsafe { libc::raise(libc::SIGSEGV) };
        frame::<100_000>(1);
        assert!(growths() > before);
        say("went on");
    };
    match how {
        "siginfo" => install(with_siginfo as *const () as usize, libc::SA_SIGINFO | libc::SA_ONSTACK),
        "siginfo, no stack of its own" => install(with_siginfo as *const () as usize, libc::SA_SIGINFO),
        "plain, nodefer" => install(without_siginfo as *const () as usize, libc::SA_NODEFER),
        "reset" => install(returns as *const () as usize, libc::SA_RESETHAND),
        "ignored" | "sent, ignored" => install(libc::SIG_IGN, 0),
        "default" => install(libc::SIG_DFL, 0),
        "recovers" => install(opens_the_page as *const () as usize, libc::SA_SIGINFO),
        "sent" => install(counts as *const () as usize, 0),
        _ => unreachable!(),
    }
    match how {
        "recovers" => {
            // SAFETY: a new page.
            let page = unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                libc::mmap(ptr::null_mut(), 4096, libc::PROT_NONE, flags, -1, 0)
            } as usize;
            // SAFETY: before the handler can run.
            unsafe { *PAGE.0.get() = page };
            in_a_coroutine(&relocating(), move || {
                use_alternate();
                let mask = blocked();
                // SAFETY: this thread's errno.
                unsafe { *libc::__errno_location() = 5 };
                store(page + 80);
                // SAFETY: as above.
                assert_eq!(unsafe { *libc::__errno_location() }, 5);
                assert_eq!((load(page + 80), blocked()), (1, mask));
                assert!(alternate.is_none_or(AlternateStack::is_intact));
                say("went on");
            });
        }
        "sent" => {
            in_a_coroutine(&relocating(), sent);
            assert_eq!(COUNTED.load(Ordering::Relaxed), 1);
        }
        "sent, ignored" => in_a_coroutine(&relocating(), sent),
        _ => in_a_coroutine(&relocating(), faults),
    }
}

#[test]
fn sigsegv_from_outside_kills_as_it_would_have() {
    match variant().as_deref() {
        None => {
            for how in ["the default action", "what std installed"] {
                let mut process = this_test!().command(how).spawn().unwrap();
                let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
                lines.find(|line| line.as_ref().unwrap().ends_with("ready")).unwrap().unwrap();
                // Std's handler takes the first for a fault, restores the default action and returns.
                let status = loop {
                    // SAFETY: the child was not waited for yet.
                    unsafe { libc::kill(process.id() as i32, libc::SIGSEGV) };
                    if how == "the default action" {
                        break process.wait().unwrap();
                    }
                    std::thread::sleep(std::time::Duration::from_millis(2));
                    if let Some(status) = process.try_wait().unwrap() {
                        break status;
                    }
                };
                assert_eq!(status.signal(), Some(libc::SIGSEGV), "{how}");
            }
        }
        Some(how) => {
            if how == "the default action" {
                install(libc::SIG_DFL, 0);
            }
            in_a_coroutine(&relocating(), || {
                println!("\nready");
                loop {
                    // SAFETY: waits for a signal.
                    unsafe { libc::pause() };
                }
            });
        }
    }
}

// --- signals whose frame does not fit ----------------------------------------------------------------------------

fn count(signal: c_int) {
    // SAFETY: plain data for a system call; without SA_ONSTACK, as most programs do it.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = counts as *const () as usize;
        assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
    }
}

/// The lowest accessible address of a coroutine's first page.
#[inline(never)]
fn lowest() -> usize {
    let local = black_box(0u8);
    &raw const local as usize / 4096 * 4096
}

/// The lowest address of a page with nothing below it.
fn a_page_with_a_guard() -> usize {
    // SAFETY: a new mapping.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let guard = libc::mmap(ptr::null_mut(), 8192, libc::PROT_NONE, flags, -1, 0) as usize;
        libc::mprotect((guard + 4096) as *mut c_void, 4096, libc::PROT_READ | libc::PROT_WRITE);
        guard + 4096
    }
}

#[test]
fn a_signal_that_does_not_fit_on_a_stack_that_moves_is_sent_again_or_told() {
    let test = this_test!();
    match variant().as_deref() {
        None => {
            for how in ["before any fault", "after a growth"] {
                let outcome = test.child(how);
                assert!(outcome.status.success(), "{how}: {outcome}");
                assert!(outcome.stderr.contains("went on"), "{how}: {outcome}");
            }
            let outcome = test.child("of two");
            assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
            assert!(outcome.stderr.contains("lost signal, one of 10 12\n"), "{outcome}");
        }
        Some(how) => {
            if how == "after a growth" {
                in_a_coroutine(&relocating(), || ());
            } else {
                run(&relocating(), || ());
            }
            count(libc::SIGUSR1);
            if how == "of two" {
                count(libc::SIGUSR2);
            }
            run(&relocating(), || {
                for _ in 0..2 {
                    signalled_at(lowest(), libc::SIGUSR1);
                }
                assert_eq!(COUNTED.load(Ordering::Relaxed), 2);
                frame::<9000>(1);
                assert!(growths() > 0);
            });
            say("went on");
        }
    }
}

#[test]
fn handlers_that_exist_before_the_first_stack_that_moves_need_no_room_on_it() {
    match variant() {
        None => this_test!().passes(),
        Some(_) => {
            let ours = [libc::SIGUSR1, libc::SIGUSR2];
            for signal in ours {
                count(signal);
            }
            run(&Builder::new(), || ());
            assert_eq!(regrow::signals_on_coroutine_stacks(), ours, "a stack that stays has room for all");
            run(&relocating(), move || {
                for signal in ours {
                    signalled_at(lowest(), signal);
                }
            });
            assert_eq!(COUNTED.load(Ordering::Relaxed), 2);
            count(libc::SIGTERM);
            assert_eq!(regrow::keep_signals_off_coroutine_stacks(), [libc::SIGTERM]);
            run(&relocating(), || signalled_at(lowest(), libc::SIGTERM));
            assert_eq!(COUNTED.load(Ordering::Relaxed), 3);
        }
    }
}

#[test]
fn a_signal_that_does_not_fit_on_another_stack_leaves_the_handler_installed() {
    match variant().as_deref() {
        None => {
            for how in ["what std installed", "the default action"] {
                let outcome = this_test!().child(how);
                assert!(outcome.status.success(), "{how}: {outcome}");
                assert!(outcome.stderr.contains("went on"), "{how}: {outcome}");
            }
        }
        Some(how) => {
            if how == "the default action" {
                install(libc::SIG_DFL, 0);
            }
            in_a_coroutine(&relocating(), || ());
            count(libc::SIGUSR1);
            let lowest = a_page_with_a_guard();
            for _ in 0..3 {
                signalled_at(lowest, libc::SIGUSR1);
            }
            in_a_coroutine(&relocating(), || say("went on"));
        }
    }
}

#[test]
fn a_protection_fault_near_the_end_of_a_stack_is_no_lost_signal() {
    match variant() {
        None => {
            let outcome = this_test!().child("");
            assert_eq!(outcome.signal(), Some(libc::SIGSEGV), "{outcome}");
        }
        Some(_) => {
            in_a_coroutine(&relocating(), || ());
            count(libc::SIGUSR1);
            run(&relocating(), || load(0x8000_0000_0000_0000));
        }
    }
}

/// Lets the kernel refuse handlers for SIGBUS from now on.
fn refuse_handlers_for_sigbus() {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let if_equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let mut filter = [
        step(load, 0, 0, 0), // the number of the call
        step(if_equal, 0, 5, libc::SYS_rt_sigaction as u32),
        step(load, 0, 0, 16), // its first argument
        step(if_equal, 0, 3, libc::SIGBUS as u32),
        step(load, 0, 0, 24), // its second, of which the lower half says enough
        step(if_equal, 1, 0, 0),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: a filter of this length, read by the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program), 0);
    }
}

#[test]
fn a_handler_that_could_be_installed_for_one_signal_only_reaches_who_was_there() {
    match variant() {
        None => {
            let outcome = this_test!().child("");
            assert_eq!(outcome.status.code(), Some(42), "{outcome}");
            assert!(outcome.stderr.contains("reached with siginfo"), "{outcome}");
        }
        Some(_) => {
            install(with_siginfo as *const () as usize, libc::SA_SIGINFO | libc::SA_ONSTACK);
            refuse_handlers_for_sigbus();
            for _ in 0..3 {
                assert!(matches!(regrow::prepare_thread(), Err(regrow::Error::Handler { .. })));
            }
            load(FAULT_AT);
        }
    }
}

// --- alternate stacks that are too small -------------------------------------------------------------------------

const CANARY: u8 = 0x5a;

/// An alternate stack of so many bytes, with memory below it that nothing may write to.
#[derive(Clone, Copy)]
struct AlternateStack {
    below: &'static [u8],
    bytes: usize,
}

impl AlternateStack {
    fn new(bytes: usize) -> Self {
        const BELOW: usize = 64 << 10;
        let memory: &'static _ = vec![CANARY; BELOW + bytes].leak();
        Self { below: &memory[..BELOW], bytes }
    }

    /// Makes it this thread's. Making coroutines may undo it.
    fn install(self) {
        let start = self.below.as_ptr_range().end as *mut c_void;
        let stack = libc::stack_t { ss_sp: start, ss_flags: 0, ss_size: self.bytes };
        // SAFETY: memory that is there for good, and for nothing else.
        assert_eq!(unsafe { libc::sigaltstack(&stack, ptr::null_mut()) }, 0);
    }

    fn is_intact(self) -> bool {
        self.below.iter().all(|&byte| byte == CANARY)
    }
}

/// What the kernel needs to deliver a signal, and a handler that takes nothing.
fn smallest_alternate_stack() -> usize {
    // SAFETY: reads the auxiliary vector.
    unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) as usize }
}

#[test]
fn stacks_move_whatever_the_size_of_the_alternate_stack() {
    match variant() {
        None => this_test!().passes_each([
            smallest_alternate_stack(),
            4096,
            6000,
            8 << 10,
            16 << 10,
            32 << 10,
            64 << 10,
        ]),
        Some(bytes) => {
            let alternate = AlternateStack::new(bytes.parse().unwrap());
            for levels in (0..40).step_by(3) {
                run(&relocating(), move || {
                    alternate.install();
                    support::below(levels, &mut || _ = frame::<3000>(1));
                    assert_eq!(frame::<200_000>(1), 200_000);
                    let last = regrow::current_stats().unwrap().last;
                    assert!(last.is_some_and(|last| last.bytes > 0), "it has not moved");
                });
            }
            assert!(alternate.is_intact());
        }
    }
}

/// Reads a word where the stack has so many bytes above `lowest`.
#[inline(never)]
fn load_with_room(lowest: usize, room: usize, address: usize) -> u64 {
    let word;
    // SAFETY: the code uses no stack while `rsp` is elsewhere, and a signal's handler only what is above `lowest`.
    unsafe {
        asm!(
            "mov {kept}, rsp",
            "mov rsp, {low}",
            "mov {address}, [{address}]",
            "mov rsp, {kept}",
            kept = out(reg) _,
            low = in(reg) (lowest + room) & !15,
            address = inout(reg) address => word,
        );
    }
    word
}

/// With std's alternate stack, with none, and with none where the stack has room for the kernel's signal frame only.
#[test]
fn frozen_stacks_are_thawed_by_threads_that_were_never_prepared() {
    match variant().as_deref() {
        None => this_test!().passes_each(["std's", "without an alternate stack", "without room"]),
        Some(thread) => {
            let thread = thread.to_string();
            let mut coroutine = suspended(&Builder::new());
            let address = coroutine.resume(()).yielded().unwrap();
            assert!(coroutine.freeze().unwrap());
            let read = move || {
                if thread != "std's" {
                    let none =
                        libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
                    // SAFETY: plain data for a system call.
                    assert_eq!(unsafe { libc::sigaltstack(&none, ptr::null_mut()) }, 0);
                }
                const RED_ZONE: usize = 128;
                match thread.as_str() {
                    "without room" => {
                        let room = smallest_alternate_stack() + RED_ZONE;
                        load_with_room(a_page_with_a_guard(), room, address)
                    }
                    _ => load(address),
                }
            };
            assert_eq!(std::thread::spawn(read).join().unwrap(), 1);
        }
    }
}

#[test]
fn an_alternate_stack_too_small_where_there_is_no_memory_for_another_is_told() {
    match variant() {
        None => {
            for bytes in [smallest_alternate_stack(), 8 << 10] {
                let outcome = this_test!().child(bytes);
                assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
                let sentence = "a thread's signal stack is too small for the handler of faults\n";
                assert!(outcome.stderr.contains(sentence), "{outcome}");
            }
        }
        Some(bytes) => run(&relocating(), move || {
            AlternateStack::new(bytes.parse().unwrap()).install();
            refuse(&[libc::SYS_mmap], libc::ENOMEM);
            frame::<9000>(1);
        }),
    }
}

/// One that was installed after ours, calls ours, and lets other signals come meanwhile. Those begin at the end of the alternate
/// stack as long as the thread is on none that the kernel knows.
#[test]
fn signals_that_come_while_the_handler_is_on_a_stack_of_its_own_harm_nothing() {
    static OURS: std::sync::OnceLock<libc::sigaction> = std::sync::OnceLock::new();
    unsafe extern "C" fn in_front(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        let ours = OURS.get().unwrap().sa_sigaction;
        // SAFETY: the handler that was installed, with what the kernel gave this one.
        unsafe {
            let ours: unsafe extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                std::mem::transmute(ours);
            ours(signal, info, context);
        }
    }
    match variant() {
        None => this_test!().passes(),
        Some(_) => {
            run(&relocating(), || ());
            let alternate = AlternateStack::new(16 << 10);
            count(libc::SIGUSR2);
            regrow::keep_signals_off_coroutine_stacks();
            // SAFETY: plain data for system calls.
            unsafe {
                let mut ours = std::mem::zeroed();
                libc::sigaction(libc::SIGSEGV, ptr::null(), &mut ours);
                OURS.set(ours).ok().unwrap();
            }
            install(in_front as *const () as usize, libc::SA_SIGINFO | libc::SA_ONSTACK);
            // SAFETY: no arguments.
            let this = unsafe { libc::pthread_self() };
            static DONE: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
            let sender = std::thread::spawn(move || {
                while !DONE.load(Ordering::Relaxed) {
                    // SAFETY: the thread waits for this one.
                    unsafe { libc::pthread_kill(this, libc::SIGUSR2) };
                }
            });
            for _ in 0..500 {
                let grow = move || {
                    alternate.install();
                    frame::<60_000>(1)
                };
                assert_eq!(run(&relocating(), grow), 60_000);
            }
            assert!(COUNTED.load(Ordering::Relaxed) > 0 && alternate.is_intact());
            DONE.store(true, Ordering::Relaxed);
            sender.join().unwrap();
        }
    }
}

// --- overflow ----------------------------------------------------------------------------------------------------

#[inline(never)]
fn recurses_for_ever(depth: u64) -> u64 {
    let here = black_box([depth; 32]);
    let below = if black_box(true) { recurses_for_ever(depth + 1) } else { 0 };
    below + black_box(here)[3]
}

#[test]
fn an_overflow_of_a_plain_thread_is_still_told_by_std() {
    match variant().as_deref() {
        None => {
            for how in ["a thread without coroutines", "a thread that ran one", "a thread that runs one"] {
                let outcome = this_test!().child(how);
                assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{how}: {outcome}");
                assert!(outcome.stderr.contains("has overflowed its stack"), "{how}: {outcome}");
                assert!(!outcome.stderr.contains("regrow"), "{how}: {outcome}");
            }
        }
        Some(how) => {
            in_a_coroutine(&relocating(), || ());
            let how = how.to_string();
            let thread = std::thread::spawn(move || {
                let mut alive = None;
                if how != "a thread without coroutines" {
                    in_a_coroutine(&relocating(), || ());
                }
                if how == "a thread that runs one" {
                    let mut coroutine = suspended(&relocating());
                    coroutine.resume(());
                    alive = Some(coroutine);
                }
                black_box(recurses_for_ever(0));
                drop(alive);
            });
            let _ = thread.join();
        }
    }
}

#[test]
fn an_overflow_at_the_maximum_is_reported() {
    match variant() {
        None => {
            for way in ["moving", "in place", "moving, small alternate stack"] {
                let outcome = this_test!().child(way);
                assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
                for part in [
                    "regrow: coroutine \"deep one\" exceeds its 16384-byte stack limit\n",
                    "fatal error: stack overflow\n",
                    "  size 16384 bytes, ",
                    "raise Builder::maximum",
                    "coroutine \"deep one\" [running]:\n",
                    "faults::recurses_for_ever+0x",
                    "(faults-",
                ] {
                    assert!(outcome.stderr.contains(part), "no {part:?} in\n{outcome}");
                }
            }
        }
        Some(way) => {
            let small = way.strip_suffix(", small alternate stack");
            let builder = Way::named(small.unwrap_or(&way)).builder().name("deep one").maximum(16 << 10);
            let is_small = small.is_some();
            run(&builder, move || {
                if is_small {
                    AlternateStack::new(8 << 10).install();
                }
                black_box(recurses_for_ever(0))
            });
        }
    }
}

/// What a report reads may be damaged: here, the coroutine's name.
#[test]
fn a_fault_while_a_report_is_written_ends_by_sigabrt() {
    match variant() {
        None => {
            let outcome = this_test!().child("");
            assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
        }
        Some(_) => {
            let name: std::sync::Arc<str> = "n".repeat(1 << 20).into();
            let page = (name.as_ptr() as usize).next_multiple_of(4096);
            let builder = Builder::new().maximum(4096).name(name);
            run(&builder, move || {
                // SAFETY: pages in the middle of the name, which only the report reads.
                unsafe { libc::mprotect(page as *mut c_void, 64 << 10, libc::PROT_NONE) };
                frame::<50_000>(1);
            });
        }
    }
}

#[test]
fn a_stack_that_may_not_move_and_has_no_slack_left_is_reported() {
    match variant() {
        None => {
            let outcome = this_test!().child("");
            assert_eq!(outcome.signal(), Some(libc::SIGABRT), "{outcome}");
            assert!(
                outcome.stderr.contains("may not move its stack here and has used up its slack"),
                "{outcome}"
            );
            assert!(outcome.stderr.contains("Builder::first_size"), "{outcome}");
        }
        Some(_) => run(&relocating(), || {
            // SAFETY: a frame below this one, touched only at its lowest word, by no growth point.
            unsafe {
                asm!(
                    "sub rsp, 50000",
                    "mov {low}, rsp",
                    "mov qword ptr [{low}], 0",
                    "add rsp, 50000",
                    low = out(reg) _,
                );
            }
        }),
    }
}
