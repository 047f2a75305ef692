//! Real code under torture: the output is a plain thread's and the report clean, or the report names the culprit.
//!
//! A small set, in the modes that are quick: `cargo test --release --features torture`. All of it, in all modes:
//! `cargo run --release --features torture --example torture -- --mode all`

use regrow::torture::{Mode, Torture};
use regrow::{Builder, Yielder};

#[path = "../torture/workloads/mod.rs"]
mod workloads;
use workloads::{Expected, Workload};

fn chosen(choose: impl Fn(&Workload) -> bool) -> Vec<Workload> {
    workloads::quiet_panics();
    workloads::all().into_iter().filter(choose).collect()
}

/// Unoptimised code takes longer, and says less.
const SHARE: u64 = if cfg!(debug_assertions) { 4 } else { 1 };

fn is_clean(workload: Workload, mode: Mode, limit: u64) {
    let expected = workload.on_a_plain_thread();
    // SAFETY: a test of just this.
    let (value, report) = unsafe { Torture::new(mode).seed(7).limit(limit / SHARE).run(workload.run) };
    assert!(report.is_clean(), "{}: {report}", workload.name);
    assert_eq!(value.as_ref(), Some(&expected), "{}: {report}", workload.name);
    assert!(report.moves > 0 || mode == Mode::Overflows, "{}: {report}", workload.name);
}

/// By breakpoints, which are quick.
#[test]
fn clean_at_every_growth_point_of_the_program() {
    let clean = chosen(|workload| workload.expected == Expected::Clean);
    assert!(clean.len() >= 25);
    for workload in clean {
        is_clean(workload, Mode::Breakpoints, 60_000);
    }
}

#[test]
fn clean_at_every_growth_point_libraries_included() {
    for workload in chosen(|workload| ["closures", "threads", "recursion"].contains(&workload.name)) {
        is_clean(workload, Mode::GrowthPoints, 30_000);
    }
}

#[test]
fn clean_at_every_instruction() {
    let names = ["formatting", "iterators", "serde_json", "sha2", "pulldown-cmark", "csv"];
    for workload in chosen(|workload| names.contains(&workload.name)) {
        is_clean(workload, Mode::Every(1), 15_000);
        is_clean(workload, Mode::Random(20), 15_000);
    }
}

#[test]
fn clean_at_every_overflow() {
    for workload in chosen(|workload| workload.expected == Expected::Clean) {
        is_clean(workload, Mode::Overflows, u64::MAX);
    }
}

#[test]
fn culprits_are_named_and_run_well_in_place() {
    for workload in chosen(|workload| workload.expected != Expected::Clean) {
        let expected = workload.on_a_plain_thread();
        let Expected::Culprit(name) = workload.expected else { unreachable!() };
        // SAFETY: a test of just this.
        let (value, report) = unsafe { Torture::new(Mode::Breakpoints).run(workload.run) };
        let [finding] = report.findings.as_slice() else { panic!("{}: {report}", workload.name) };
        let functions = finding.backtrace.iter().chain([&finding.function]).chain(&finding.points_into);
        let named = functions.into_iter().any(|function| function.contains(name));
        assert!(named && value.is_none(), "{}: {report}", workload.name);

        let run = workload.run;
        let mut in_place = Builder::new().maximum(1 << 20).spawn(move |_: &Yielder<(), ()>, ()| run());
        assert_eq!(in_place.resume(()).returned(), Some(expected), "{}", workload.name);
    }
}
