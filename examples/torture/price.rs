//! What a step costs, beside the bare trap: the same loop stepped through by a handler that does nothing, by a torture
//! that never moves, and by one that moves at every instruction; the same for breakpoints.

use std::arch::asm;
use std::ffi::{c_int, c_void};
use std::hint::black_box;
use std::time::Instant;

use regrow::torture::{Mode, Torture};

const ROUNDS: usize = 9;
/// Instructions of one measurement: a loop of two, so many times.
const STEPS: u64 = 20_000;

/// Median microseconds of alternating rounds, printed with their ratio to the bare trap.
pub fn measure() {
    let mut rounds: [Vec<f64>; 5] = Default::default();
    for _ in 0..ROUNDS {
        rounds[0].push(bare(STEPS));
        rounds[1].push(tortured(Mode::Every(u64::MAX)));
        rounds[2].push(tortured(Mode::Every(1)));
        rounds[3].push(bare_breakpoints(STEPS));
        rounds[4].push(tortured(Mode::Breakpoints));
    }
    let [bare, step, moved, breakpoint, moved_by_breakpoint] = rounds.map(|mut round| {
        round.sort_by(f64::total_cmp);
        round[ROUNDS / 2]
    });
    println!("| what | µs | of the bare trap |\n| --- | ---: | ---: |");
    for (what, price) in [
        ("a single-step trap, bare", bare),
        ("a step of the torture", step),
        ("a step that moves the stack", moved),
        ("an int3 trap, bare", breakpoint),
        ("a breakpoint that moves the stack", moved_by_breakpoint),
    ] {
        println!("| {what} | {price:.2} | {:.2} |", price / bare);
    }
}

/// Two instructions, `count / 2` times.
#[inline(never)]
fn spin(count: u64) {
    // SAFETY: counts a register down.
    unsafe { asm!("2:", "dec {0}", "jnz 2b", inout(reg) count / 2 => _, options(nomem, nostack)) };
}

/// A growth point, `count` times, and an instruction between them.
#[inline(never)]
fn push(count: u64) {
    // SAFETY: what is pushed is dropped, above the red zone's end since the stack is said to be used.
    unsafe { asm!("2:", "push rax", "lea rsp, [rsp + 8]", "dec {0}", "jnz 2b", inout(reg) count => _) };
}

/// Microseconds a step, on the loop alone: what else is stepped through is the same for both counts.
fn tortured(mode: Mode) -> f64 {
    let time = |count: u64| {
        let start = Instant::now();
        // SAFETY: a loop in registers.
        let (_, report) = unsafe {
            Torture::new(mode).run(move || match mode {
                Mode::Breakpoints => push(black_box(count)),
                _ => spin(black_box(count)),
            })
        };
        assert!(report.is_clean() && report.steps >= count);
        start.elapsed().as_secs_f64() * 1e6
    };
    let short = time(2);
    (time(STEPS) - short) / STEPS as f64
}

extern "C" fn nothing(_signal: c_int, _info: *mut libc::siginfo_t, _context: *mut c_void) {}

/// Runs `f` with a SIGTRAP handler that does nothing.
fn with_bare_handler(f: impl FnOnce()) {
    // SAFETY: plain data for system calls; the handler only returns.
    unsafe {
        let mut ours: libc::sigaction = std::mem::zeroed();
        let mut before = ours;
        ours.sa_sigaction = nothing as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut ours.sa_mask);
        libc::sigaction(libc::SIGTRAP, &ours, &mut before);
        f();
        libc::sigaction(libc::SIGTRAP, &before, std::ptr::null_mut());
    }
}

fn bare(count: u64) -> f64 {
    let start = Instant::now();
    with_bare_handler(|| {
        // SAFETY: the handler returns; the trap flag is cleared again.
        unsafe { asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq") };
        spin(count);
        // SAFETY: as above.
        unsafe { asm!("pushfq", "and qword ptr [rsp], -0x101", "popfq") };
    });
    start.elapsed().as_secs_f64() * 1e6 / count as f64
}

fn bare_breakpoints(count: u64) -> f64 {
    let start = Instant::now();
    with_bare_handler(|| {
        for _ in 0..count {
            // SAFETY: the handler returns behind the instruction.
            unsafe { asm!("int3") };
        }
    });
    start.elapsed().as_secs_f64() * 1e6 / count as f64
}
