//! The tests of the tests: children are started by the right name, and one that runs nothing is noticed.

mod support;
use support::{Test, this_test, variant};

#[test]
fn a_test_knows_its_name_in_closures_too() {
    let inside = || this_test!().name();
    assert_eq!(inside(), "a_test_knows_its_name_in_closures_too");
}

mod inner {
    use super::*;

    #[test]
    fn a_test_in_a_module_is_found() {
        if variant().is_none() {
            this_test!().passes();
        }
    }
}

fn no_test() {}

#[test]
#[should_panic(expected = "is not one test of this binary")]
fn a_child_that_runs_no_test_is_noticed() {
    Test::of(no_test).child("");
}

#[test]
#[should_panic(expected = "1 failed")]
fn a_child_that_fails_is_noticed() {
    assert!(variant().is_none(), "meant");
    this_test!().passes();
}

#[test]
#[should_panic(expected = "exit status: 0")]
fn a_child_that_ends_before_its_test_has_not_passed() {
    if variant().is_some() {
        std::process::exit(0);
    }
    this_test!().passes();
}
