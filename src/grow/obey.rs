//! Rewriting the words of a copied stack according to its frame maps.
//!
//! ```text
//!   lowest                                                        base
//!     │ red zone │ frame │ frame │ frame │ ...        │ first frame │ head
//!     └ by value └ each word by the verdict of its frame ┘
//! ```
//!
//! | word | what happens |
//! | --- | --- |
//! | pointer, by its map | moved with what it points to; left alone if that is not this stack |
//! | data, by its map | stays, whatever its value |
//! | ambiguous | moved if its value lies in the window |
//! | return address | stays |
//! | a caller's register, saved in a frame | the verdict of the frame that uses it, further out |
//!
//! This is safe code on two slices, the old words and the new, so it can be tested on made-up stacks.
#![forbid(unsafe_code)]

use super::rewrite::Window;
use crate::map::{End, Frame, Kind, Location, Reader, Register, Registers, Stuck, Verdict, Walk, Word};
use crate::not_moved::{NotMoved, Reason};
use crate::pin;
use crate::settings::Maps;
use crate::stats::WordsByMap;

const WORD: usize = size_of::<usize>();
const SAVED: usize = Register::CALLEE_SAVED.len();

/// A stack that was copied and is not rewritten yet.
pub(crate) struct Copied<'a> {
    /// The old address of the first word.
    pub lowest: usize,
    pub old: &'a [usize],
    pub new: &'a mut [usize],
    pub window: Window,
    /// Where a suspended coroutine has put callee-saved registers, in the order of `Register::CALLEE_SAVED`.
    pub parked: [Option<usize>; SAVED],
}

/// The number of words, by verdict.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Words {
    /// Words that were changed.
    pub rewritten: usize,
    /// Words that were judged.
    pub by_map: WordsByMap,
    /// Callee-saved registers that are data in the frame that uses them: the context keeps them.
    pub keep: [bool; SAVED],
}

/// Rewrites all frames from the context `start` up to the base. After an error the new words are invalid.
pub(crate) fn rewrite(
    reader: &Reader<'_>,
    start: &Registers,
    policy: Maps,
    mut stack: Copied<'_>,
) -> Result<Words, NotMoved> {
    let mut words = Words::default();
    if policy == Maps::Off {
        let all = stack.lowest..stack.lowest + stack.old.len() * WORD;
        stack.by_value(all.start, all.end, &mut words);
        return Ok(words);
    }
    let old = stack.old;
    let lowest = stack.lowest;
    let mut walk = Walk::new(reader, start, |address| old.get(address.wrapping_sub(lowest) / WORD).copied());
    let mut below = lowest; // the frames up to here have been judged
    let mut ambiguous = None; // start of a stretch of frames whose words go by value, which are rewritten at its end
    let top = lowest + old.len() * WORD;
    while let Some(frame) = walk.advance() {
        if frame.kind() == Kind::Base {
            break;
        }
        if let Some(reason) = objection(frame, policy) {
            return Err(NotMoved::at(reason, frame.pc()));
        }
        let range = frame.range();
        // The innermost frame may begin in the guard, where nothing was written yet.
        if range.start < below && below != lowest || range.end < below || range.end > top {
            return Err(NotMoved::at(Reason::Inconsistent, frame.pc()));
        }
        if frame.map().is_ambiguous() {
            ambiguous.get_or_insert(below); // for the innermost frame this includes the red zone
        } else {
            if let Some(from) = ambiguous.take() {
                stack.by_value(from, range.start, &mut words);
            }
            stack.by_map(frame, &mut words);
            stack.claim_registers(frame, &mut words);
        }
        below = range.end;
    }
    if let Some(from) = ambiguous {
        stack.by_value(from, below, &mut words);
    }
    reached_base(walk.end(), start).map(|()| words)
}

/// Why a stack with this frame must stay, if the frame alone decides it.
fn objection(frame: &Frame<'_>, policy: Maps) -> Option<Reason> {
    if pin::is_pinned_code(frame.code()) {
        Some(Reason::PinnedCode)
    } else if policy == Maps::Precise && !frame.is_precise() {
        Some(Reason::Imprecise)
    } else {
        None
    }
}

/// An error unless the walk from `start` has ended at the base of the stack.
fn reached_base(end: Option<End>, start: &Registers) -> Result<(), NotMoved> {
    match end {
        Some(End::Base) => Ok(()),
        Some(End::Stuck { pc, why: Stuck::NoMap | Stuck::NoRules | Stuck::Rules(_) }) => {
            Err(NotMoved::at(Reason::NoMap, pc))
        }
        Some(End::Stuck { pc, .. }) => Err(NotMoved::at(Reason::Inconsistent, pc)),
        Some(End::Outermost) | None => Err(NotMoved::at(Reason::Inconsistent, start.pc())),
    }
}

impl Copied<'_> {
    fn word(&mut self, address: usize) -> Option<&mut usize> {
        self.new.get_mut(address.wrapping_sub(self.lowest) / WORD)
    }

    fn by_value(&mut self, from: usize, to: usize, words: &mut Words) {
        let from = from.wrapping_sub(self.lowest) / WORD;
        let to = to.wrapping_sub(self.lowest) / WORD;
        let Some(range) = self.new.get_mut(from..to) else { return };
        words.by_map.ambiguous += range.len() as u64;
        words.rewritten += self.window.rewrite(range);
    }

    fn by_map(&mut self, frame: &Frame<'_>, words: &mut Words) {
        for address in frame.range().step_by(WORD) {
            match frame.word(address) {
                // A caller's register: judged by value, unless the frame that uses it has another verdict.
                Word::Saved(_) => {
                    let window = self.window;
                    if let Some(word) = self.word(address) {
                        *word = window.moved(*word);
                    }
                }
                Word::Own(Verdict::Ambiguous) => self.by_value(address, address + WORD, words),
                Word::Own(Verdict::Pointer) => self.pointer(address, words),
                Word::Own(Verdict::Data) => words.by_map.data += 1,
                Word::ReturnAddress => {}
            }
        }
    }

    fn pointer(&mut self, address: usize, words: &mut Words) {
        let window = self.window;
        let Some(word) = self.word(address) else { return };
        let moved = window.moved(*word);
        words.by_map.pointers += 1;
        words.rewritten += usize::from(moved != *word);
        words.by_map.elsewhere += u64::from(moved == *word);
        *word = moved;
    }

    /// Gives the registers that `frame` uses its verdict, wherever frames
    /// further in have saved them. Those frames have judged them by value.
    fn claim_registers(&mut self, frame: &Frame<'_>, words: &mut Words) {
        for index in 0..SAVED {
            if !frame.owns(index) || frame.map().register(index) != Verdict::Data {
                continue;
            }
            let parked = self.parked.get(index).copied().flatten();
            let place = match frame.register(index) {
                Location::Memory(address) => Some(address),
                Location::Register => parked,
                Location::Lost => continue,
            };
            match place {
                Some(address) => self.restore(address),
                None => words.keep[index] = true,
            }
        }
    }

    fn restore(&mut self, address: usize) {
        let old = self.old.get(address.wrapping_sub(self.lowest) / WORD).copied();
        if let (Some(old), Some(word)) = (old, self.word(address)) {
            *word = old;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{Cfa, FrameMap, Place, Rules, StackMaps};

    const OLD: usize = 0x10_0000;
    const NEW_END: usize = 0x90_0000;

    /// A stack of three frames, with a value in the window in every word that is not a return address:
    ///
    /// ```text
    ///   words 0, 1    red zone
    ///         2 - 5   leaf: pointer, data, saved rbx, return address
    ///         6 - 9   middle: pointer, data, ambiguous, return address; uses rbx as `rbx` says
    ///         10      base
    /// ```
    fn maps(maps: &StackMaps, rbx: Verdict) -> impl Drop {
        let leaf = Rules::new(Cfa::rsp(32)).saved(Register::RBX, Place::cfa(-16));
        let middle = Rules::new(Cfa::rsp(32)).saved(Register::RBX, Place::UNDEFINED);
        maps.register(vec![
            FrameMap::new(0x1000..0x1100)
                .rules(leaf)
                .word(Place::at(Register::RSP, 0), Verdict::Pointer)
                .register(Register::RBX, Verdict::Data)
                .rest(Verdict::Data),
            FrameMap::new(0x2000..0x2100)
                .rules(middle)
                .word(Place::at(Register::RSP, 0), Verdict::Pointer)
                .word(Place::at(Register::RSP, 8), Verdict::Data)
                .register(Register::RBX, rbx),
            FrameMap::new(0x3000..0x3100).rules(Rules::new(Cfa::rsp(8)).kind(Kind::Base)),
        ])
        .unwrap()
    }

    fn run(policy: Maps, rbx: Verdict) -> (Result<Words, NotMoved>, Vec<usize>) {
        let all = StackMaps::new();
        let _registration = maps(&all, rbx);
        let value = OLD + 8;
        let mut old = vec![value; 11];
        old[5] = 0x2010;
        old[9] = 0x3010;
        let mut new = old.clone();
        let copied = Copied {
            lowest: OLD,
            old: &old,
            new: &mut new,
            window: Window::new(OLD - 0x1000..OLD + 0x1000, NEW_END),
            parked: [None; SAVED],
        };
        let start = Registers::new(0x1010, OLD + 16).with(Register::RBX, value);
        let outcome = rewrite(&all.read(), &start, policy, copied);
        let changed = (0..11).filter(|&at| new[at] != old[at]).collect();
        (outcome, changed)
    }

    #[test]
    fn each_word_goes_by_its_map() {
        let (words, changed) = run(Maps::Ambiguous, Verdict::Ambiguous);
        assert_eq!(changed, [2, 4, 6, 8]); // pointers, saved rbx, the ambiguous one; not data and return addresses
        let words = words.unwrap().by_map;
        assert_eq!(words, WordsByMap { pointers: 2, elsewhere: 0, data: 2, ambiguous: 1 });
    }

    #[test]
    fn a_saved_register_goes_by_the_frame_that_uses_it() {
        let (words, changed) = run(Maps::Ambiguous, Verdict::Data);
        assert_eq!(changed, [2, 6, 8]);
        assert!(words.is_ok());
    }

    #[test]
    fn precise_means_no_ambiguous_word() {
        assert_eq!(run(Maps::Precise, Verdict::Data).0, Err(NotMoved::at(Reason::Imprecise, 0x2010)));
    }

    #[test]
    fn off_looks_at_values_only() {
        assert_eq!(run(Maps::Off, Verdict::Data).1, [0, 1, 2, 3, 4, 6, 7, 8, 10]);
    }
}
