//! The library's lock-free protocols, under `loom`: it runs each model in every order that the threads' steps may have, and
//! lets each load see every value that the memory order allows.
//!
//! The files with the protocols are those of the library. What they use of it is here: atomics and waiting ([`sync`]), and
//! blocks of frozen stacks ([`block`]). Each model names the changes to these files that it was seen to fail after.

mod block;
mod sync;

#[path = "../../../src/stack/custody.rs"]
mod custody;
#[path = "../../../src/stack/free_list.rs"]
#[expect(dead_code, reason = "no model needs all of it")]
mod free_list;
#[path = "../../../src/map/published.rs"]
mod published;
#[path = "../../../src/freeze/touched.rs"]
#[expect(dead_code, reason = "no model needs all of it")]
mod touched;

mod free_lists;
mod readers;
mod thawing;

use sync::{FENCE, Fence};

/// Runs a model in every order that has at most three preemptions. (Without a bound some models take minutes.)
fn check(model: impl Fn() + Copy + Send + Sync + 'static) {
    for fence in [Fence::Before, Fence::After] {
        FENCE.set(fence);
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }
}
