//! What is tortured: code that people run, each piece with an output that must not depend on where its stack is.
#![allow(dead_code, reason = "the example and the tests each use their own part of this")]

mod crates;
mod standard;
mod unclean;

/// A piece of code.
#[derive(Clone, Copy)]
pub struct Workload {
    pub name: &'static str,
    pub run: fn() -> String,
    pub expected: Expected,
}

/// What a torture of it has to say.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    Clean,
    /// It keeps pointers to its stack somewhere else: a function with this in its name, one of its callers, or the one
    /// whose frame it points into is named.
    Culprit(&'static str),
}

impl Workload {
    const fn clean(name: &'static str, run: fn() -> String) -> Self {
        Self { name, run, expected: Expected::Clean }
    }

    const fn unclean(name: &'static str, run: fn() -> String, culprit: &'static str) -> Self {
        Self { name, run, expected: Expected::Culprit(culprit) }
    }

    /// What it says on a plain thread.
    pub fn on_a_plain_thread(self) -> String {
        std::thread::spawn(self.run).join().expect("a workload does not panic")
    }
}

/// All of them: first those that are clean.
pub fn all() -> Vec<Workload> {
    [standard::WORKLOADS, crates::WORKLOADS, unclean::WORKLOADS].concat()
}

/// Panics that are part of a workload are not printed. Their backtraces are taken.
pub fn quiet_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = std::backtrace::Backtrace::force_capture();
        let text = panic.payload().downcast_ref::<String>();
        if !text.is_some_and(|text| text.starts_with("at the bottom")) {
            eprintln!("{panic}\n{backtrace}");
        }
    }));
}
