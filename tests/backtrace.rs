//! A backtrace taken inside a coroutine goes on into whoever resumed it: std's, gdb's, and the chain of frame
//! pointers; over several levels, and after stacks have moved.

use std::backtrace::Backtrace;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;

use regrow::{Builder, Yielder};

mod support;
use support::{Way, both_ways, frame, growths, outcome, this_test, variant};

/// The functions on the way from the innermost to the test, in the order in which a backtrace shows them.
const WAY: [&str; 4] = ["innermost_function", "calls_innermost", "resumes_the_inner", "resumes_the_outer"];

#[inline(never)]
fn innermost_function<R>(look: &dyn Fn() -> R) -> R {
    black_box(look())
}

#[inline(never)]
fn calls_innermost<R>(look: &dyn Fn() -> R, steps: usize) -> R {
    // The stack moves between the frames above and those below.
    if steps > 0 {
        frame::<5000>(1);
        return black_box(calls_innermost(look, steps - 1));
    }
    black_box(innermost_function(look))
}

#[inline(never)]
fn resumes_the_inner<R: 'static>(builder: &Builder, look: fn() -> R) -> R {
    let mut inner = builder.spawn(move |yielder: &Yielder<(), ()>, ()| {
        // The first resumer is not the last one: only that counts.
        yielder.suspend(());
        let found = calls_innermost(&look, 3);
        assert!(growths() > 0);
        found
    });
    inner.resume(());
    frame::<9000>(1);
    black_box(inner.resume(()).returned()).unwrap()
}

#[inline(never)]
fn resumes_the_outer<R: 'static>(builder: &Builder, look: fn() -> R) -> R {
    let builder = builder.clone();
    let inner = builder.clone();
    let mut outer = builder.spawn(move |_: &Yielder<(), ()>, ()| resumes_the_inner(&inner, look));
    black_box(outer.resume(()).returned()).unwrap()
}

/// That `text` names the functions of [`WAY`] and the test, each after the other.
fn shows_the_way(text: &str, test: &str) {
    let mut rest = text;
    for function in WAY.iter().chain([&test]) {
        let at = rest.find(function).unwrap_or_else(|| panic!("no {function} where it belongs in\n{text}"));
        rest = &rest[at + function.len()..];
    }
}

#[test]
fn stds_backtrace_goes_on_into_the_resumers() {
    both_ways(|builder| {
        let trace = resumes_the_outer(&builder, || Backtrace::force_capture().to_string());
        shows_the_way(&trace, "stds_backtrace_goes_on_into_the_resumers");
    });
}

#[test]
fn the_backtrace_crate_sees_the_same() {
    fn look() -> String {
        let mut names = String::new();
        backtrace::trace(|frame| {
            backtrace::resolve_frame(frame, |symbol| {
                names += &symbol.name().map_or_else(String::new, |name| format!("{name}\n"));
            });
            true
        });
        names
    }
    both_ways(|builder| {
        shows_the_way(&resumes_the_outer(&builder, look), "the_backtrace_crate_sees_the_same");
    });
}

#[test]
fn gdbs_backtrace_goes_on_into_the_resumers() {
    let test = this_test!();
    match variant() {
        None => {
            if Command::new("gdb").arg("--version").output().is_err() {
                return eprintln!("skipped: no gdb on the path");
            }
            for way in Way::BOTH {
                let mut gdb = Command::new("gdb");
                gdb.args(["-nx", "-batch", "-ex", "set debuginfod enabled off", "-ex", "set width 0"]);
                gdb.args(["-ex", "handle SIGSEGV nostop noprint pass", "-ex", "run", "-ex", "bt 60"]);
                let outcome = outcome(test.under(gdb.arg("--args"), way));
                if !outcome.stdout.contains("SIGTRAP") {
                    return eprintln!("skipped: gdb cannot run a program here\n{outcome}");
                }
                let trace = &outcome.stdout[outcome.stdout.find("SIGTRAP").unwrap()..];
                assert!(!outcome.stderr.contains("corrupt"), "{outcome}");
                shows_the_way(trace, test.name());
            }
        }
        Some(way) => {
            // SAFETY: a breakpoint, for gdb.
            let stop = || unsafe { std::arch::asm!("int3") };
            resumes_the_outer(&Way::named(&way).builder(), stop);
        }
    }
}

/// Compiled with frame pointers, so in a package of its own: tests/support/frame_pointers.rs.
#[test]
fn the_chain_of_frame_pointers_goes_on_into_the_resumers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let package = Path::new(env!("CARGO_TARGET_TMPDIR")).join("frame_pointers");
    std::fs::create_dir_all(&package).unwrap();
    std::fs::copy(root.join("Cargo.lock"), package.join("Cargo.lock")).unwrap();
    let program = root.join("tests/support/frame_pointers.rs");
    let manifest = format!(
        "[package]\nname = \"frame_pointers\"\nedition = \"2024\"\n[dependencies]\nregrow.path = {root:?}\n\
         [[bin]]\nname = \"frame_pointers\"\npath = {program:?}\n[workspace]\n"
    );
    std::fs::write(package.join("Cargo.toml"), manifest).unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "--quiet", "--offline", "--target-dir"]).arg(package.join("target"));
    cargo.args(["--release"].iter().filter(|_| !cfg!(debug_assertions)));
    cargo.current_dir(&package).env("RUSTFLAGS", "-Cforce-frame-pointers=yes");
    let outcome = outcome(&mut cargo);
    assert!(outcome.status.success() && outcome.stdout == "the chain is whole\n".repeat(2), "{outcome}");
}
