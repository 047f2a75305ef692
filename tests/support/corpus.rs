//! Random cases by proptest. What fails is made smaller, printed and kept, and is tried first from then on.

use proptest::test_runner::{Config, FileFailurePersistence};

/// So many cases, from a random seed or from that in `PROPTEST_RNG_SEED`. Failures are kept in `proptest-regressions/`, in the
/// file of this test binary.
pub fn cases(number: u32) -> Config {
    const FILE: &str =
        concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/", env!("CARGO_CRATE_NAME"), ".txt");
    Config {
        cases: number,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(FILE))),
        ..Config::default()
    }
}
