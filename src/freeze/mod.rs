//! Freezing: the used bytes of a suspended coroutine go into a [`block`] of their size, and its memory to others.
//!
//! A stack that moves gives its slot away ([`moving`]). A stack that grows in place keeps slot and address, and is thawed when it
//! is touched ([`in_place`]). src/stack/custody.rs decides which thread has its block; [`touched`] is the list of thawed ones.

mod alone;
pub(crate) mod block;
mod forks;
pub(crate) mod in_place;
mod moving;
pub(crate) mod state;
pub(crate) mod touched;

use block::Frozen;
use state::State;
use touched::Told;

use crate::error::Error;
use crate::grow::shrink;
use crate::settings::Growth;
use crate::stack::stock::Prepare;
use crate::stack::suspended::Suspended;
use crate::switch::Handle;
use crate::trace::{self, Event, Name};

/// Lets `look` see the block of the coroutine, if it is frozen. If it is frozen in place it may have thawed meanwhile.
pub(crate) fn peek<R>(handle: &Handle, look: impl FnOnce(&Frozen) -> R) -> Option<R> {
    match State::of(handle) {
        // SAFETY: a block without a slot is the coroutine's as long as the handle says so.
        State::FrozenElsewhere(block) => Some(look(unsafe { block.as_ref() })),
        State::FrozenHere => in_place::peek(handle.base, |frozen| look(frozen)),
        _ => None,
    }
}

/// Names the list that learns when the stack is touched, if it is frozen in place.
///
/// # Safety
/// The list lives as long as the coroutine is frozen.
pub(crate) unsafe fn tell(handle: &Handle, told: Told) {
    if let State::FrozenHere = State::of(handle) {
        in_place::peek(handle.base, |frozen| frozen.tell(told.list.cast(), told.entry));
    }
}

/// Puts a suspended coroutine into a block, and gives back its slot or its pages. `false`
/// if it must stay as it is: it never ran, is pinned, or has a frame that cannot be moved.
///
/// # Safety
/// The list in `told` lives as long as the coroutine is frozen.
pub(crate) unsafe fn freeze(mut suspended: Suspended<'_>, told: Told) -> Result<bool, Error> {
    let record = suspended.record();
    let (growth, pinned) = (record.settings.growth, record.is_pinned());
    // What is frozen has no record that could be asked for its name.
    let (name, end) = (if trace::is_on() { record.name.clone() } else { None }, suspended.end());
    let outcome = match growth {
        _ if suspended.is_fresh() => Ok(false),
        Growth::Relocate => moving::freeze(&mut suspended),
        Growth::InPlace if pinned => Ok(false),
        // SAFETY: the caller guarantees that the list lives as long as the coroutine is frozen.
        Growth::InPlace => unsafe { in_place::freeze(&mut suspended, told) },
    };
    if !matches!(outcome, Ok(true)) {
        shrink::watch_again(&mut suspended);
    } else if trace::is_on()
        && let Some(bytes) = peek(suspended.handle(), Frozen::bytes)
    {
        trace::tell(&Name { name: name.as_deref(), end }, &Event::Frozen(bytes));
    }
    outcome
}

/// Brings a frozen coroutine back onto a stack. After an error it is still frozen.
///
/// # Safety
/// The handle is that of a frozen coroutine. If it is frozen in place it may have thawed without the handle knowing.
pub(crate) unsafe fn thaw(handle: &mut Handle, prepare: Prepare) -> Result<(), Error> {
    let thawed = match State::of(handle) {
        State::FrozenElsewhere(block) => {
            // SAFETY: the handle says that the coroutine is frozen in this block.
            unsafe { moving::thaw(handle, block, prepare)? };
            true
        }
        _ => in_place::thaw(handle)?,
    };
    if trace::is_on() && thawed {
        // SAFETY: it is suspended since, so its base and record are accessible, and only its owner freezes it again.
        let record = unsafe { &*(*handle.base).record() };
        trace::tell(&record.called(), &Event::Thawed);
    }
    Ok(())
}
